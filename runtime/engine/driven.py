"""What takes steps in one thread at a time: in that of whoever waits for it, or in one that does nothing else.

It knows when a step does not end, and tells those who wait for it. When the process ends no step runs any more, and in
one that was forked beside a thread that took steps none ever will.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aloud.errors import DeviceStuck, EngineClosed

logger = logging.getLogger(__name__)
FAULT_PAUSE_SECONDS = 0.1
LAST_STEP_SECONDS = 10.0
"""How long the end of the process waits for steps that run."""
TIDYING_SECONDS = 1.0
"""How long a thread that is over may still take for what libraries keep for each thread."""


class Driven(ABC):
    """Steps, and the threads that take them. Everything but the steps may be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, stuck_after_seconds: float = 60.0) -> None:
        """clock: in seconds, from any beginning. stuck_after_seconds: a longer step is one that never ends."""
        self._clock = clock
        self.stuck_after_seconds = stuck_after_seconds
        self.is_run = False  # whether a thread does nothing but drive
        self._listeners: list[Callable[[], None]] = []
        self._step_began: float | None = None  # while a step runs
        self._changed = threading.Condition()
        self._is_driven = False
        self._gone: str | None = None  # why no step runs any more, in a sentence
        _living.add(self)

    @abstractmethod
    def _step(self) -> float | None:
        """One step -> seconds until there may be something to do: 0 at once, None once something changes."""

    @abstractmethod
    def _has_news(self) -> bool:
        """Whether there is something to do that came since the last step."""

    @abstractmethod
    def _broken(self, error: BaseException) -> None:
        """A step was left by an interrupt, or by a fault of its own."""

    def step(self) -> float | None:
        """One step -> seconds until there may be something to do: 0 at once, None once something changes."""
        self._step_began = self._clock()
        try:
            return self._step()
        except BaseException as error:  # an interrupt, or a fault of its own
            self._broken(error)
            raise
        finally:
            self._step_began = None
            for listener in self._listeners:
                listener()

    def run(self, until: threading.Event) -> None:
        """Drive in this thread until an event is set and somebody wakes it."""
        self.is_run = True
        try:
            self._run(until)
        finally:
            self.is_run = False

    def _run(self, until: threading.Event) -> None:
        def is_over() -> bool:
            return until.is_set() or self.is_gone

        while not is_over():
            with self._drive(wait=True, unless=is_over) as driving:
                while driving and not is_over():
                    try:
                        pause = self.step()
                    except Exception:  # a fault of its own: what it broke has been told, the rest goes on
                        logger.exception("A step failed")
                        pause = FAULT_PAUSE_SECONDS
                    self.wake()
                    if pause != 0.0:
                        self.sleep(pause, is_over)

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """No step runs while this is held; waits for the one that does."""
        while True:
            with self._drive(wait=True) as driving:
                if driving:
                    yield
                    return
            self.check_stuck()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call a function, which must not wait, from the driving thread after each step."""
        self._listeners.append(listener)

    def stop_listening(self, listener: Callable[[], None]) -> None:
        """Take back `listen`."""
        self._listeners.remove(listener)

    @property
    def is_gone(self) -> bool:
        """Whether no step runs any more, because the process ends or was forked."""
        return self._gone is not None

    def check_here(self) -> None:
        """Raise `EngineClosed` where no step runs any more; takes no lock, as in a fork any may be held for ever.

        A daemon thread does not return when the process ends: nothing of it shall be heard then.
        """
        if self._gone is None:
            return
        if self._gone == _ENDING and threading.current_thread().daemon:
            threading.Event().wait()
        raise EngineClosed(self._gone)

    @property
    def stuck_seconds(self) -> float:
        """For how long the step that runs now has been running."""
        began = self._step_began
        return 0.0 if began is None else self._clock() - began

    def check_stuck(self) -> None:
        """Raise `DeviceStuck` when a step does not end, and what `check_here` does."""
        self.check_here()
        if self.stuck_seconds > self.stuck_after_seconds:
            raise DeviceStuck(
                f"The device has not answered for {self.stuck_seconds:.0f} s. Restart the process; if it happens "
                "again, check the device with its vendor's tools."
            )

    def wake(self) -> None:
        """End the sleep of whoever drives, and of those who wait."""
        with self._changed:
            self._changed.notify_all()

    def sleep(self, seconds: float | None, unless: Callable[[], bool]) -> bool:
        """Wait for something to change, unless something has -> whether it has, within so many seconds."""
        with self._changed:
            if self._has_news() or unless():
                return True
            return self._changed.wait(seconds)

    def now(self) -> float:
        """Seconds by its clock."""
        return self._clock()

    @contextmanager
    def _drive(self, *, wait: bool, unless: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Be the one that drives, or wait until whoever does has finished a step -> whether this is the one.

        unless: there is nothing to wait for; asked where no news can be missed.
        """
        with self._changed:
            if self.is_gone:
                driving = False  # and `check_here` tells those who would ask again
            elif self._is_driven:
                if not wait:
                    self._changed.notify_all()
                elif not unless():
                    # Until a step that began earlier is found to be stuck; the millisecond makes that certain.
                    self._changed.wait(max(0.0, self.stuck_after_seconds - self.stuck_seconds) + 0.001)
                driving = False
            else:
                driving = self._is_driven = True
        try:
            yield driving
        finally:
            if driving:
                with self._changed:
                    self._is_driven = False
                    self._changed.notify_all()

    def _end(self, limit_seconds: float) -> None:
        """Let no step begin, and wait for the one that runs, but no longer than that."""
        with self._changed:
            if self.is_gone:
                return
            self._gone = _ENDING
            self._changed.notify_all()  # whoever drives may sleep
            self._changed.wait_for(lambda: not self._is_driven, limit_seconds)

    def _forked(self) -> None:
        """In the child: what another thread was doing is never finished; what nobody was doing can go on."""
        self._changed = threading.Condition()
        if self._is_driven or self.is_run:
            self._gone = _FORKED


def join(thread: threading.Thread, limit_seconds: float) -> None:
    """Wait so long for a thread, and where the system shows it, for what it does behind its last line of Python.

    MKL frees a thread's memory there and holds a lock meanwhile; who forks at that moment has it held for ever.
    """
    thread.join(limit_seconds)
    end = time.monotonic() + TIDYING_SECONDS
    while not thread.is_alive() and os.path.exists(f"/proc/self/task/{thread.native_id}") and time.monotonic() < end:
        time.sleep(0.0005)


_ENDING = "The process ends: nothing is spoken any more. Speak before it does."
_FORKED = (
    "The engine was started before the process was forked, and threads do not survive that. "
    "Load the Runtime and make the Engine after the fork."
)
_living: weakref.WeakSet[Driven] = weakref.WeakSet()


def _end_all() -> None:
    """A thread that the end of the interpreter finds inside of torch takes the process down with it (SIGABRT)."""
    end = time.monotonic() + LAST_STEP_SECONDS
    for driven in list(_living):
        driven._end(max(0.0, end - time.monotonic()))


def _all_forked() -> None:
    for driven in list(_living):
        driven._forked()


# Runs after threads that are no daemons have been joined, and before those that are get killed.
atexit.register(_end_all)
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_all_forked)
