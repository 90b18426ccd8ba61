"""Waiting for streams in one asyncio event loop: the engine's thread announces once a step, whoever has news wakes."""

from __future__ import annotations

import asyncio

from aloud.engine.loop import Loop
from aloud.engine.stream import Stream
from aloud.errors import DeviceStuck

CHECK_SECONDS = 1.0
"""How often those who wait look whether the device still answers."""


class Arrivals:
    """Those who wait in one event loop. `announce` is for the thread that drives, the rest for the event loop's."""

    def __init__(self, loop: Loop, event_loop: asyncio.AbstractEventLoop) -> None:
        """Of the event loop that runs now."""
        self._loop = loop
        self._event_loop = event_loop
        self._waiting: dict[asyncio.Future[None], Stream] = {}
        self._is_announced = False
        self._check: asyncio.TimerHandle | None = None

    @property
    def is_closed(self) -> bool:
        """Whether nobody will ever wait here again."""
        return self._event_loop.is_closed()

    async def wait(self, stream: Stream) -> None:
        """Return when a stream has a frame or is over. Raises `DeviceStuck`."""
        future: asyncio.Future[None] = self._event_loop.create_future()
        self._waiting[future] = stream
        if self._check is None:
            self._check = self._event_loop.call_later(CHECK_SECONDS, self._look)
        try:
            # News from before the entry above was made is not announced again.
            if not _has_news(stream):
                await future
        finally:
            self._waiting.pop(future, None)

    def announce(self) -> None:
        """Something may have arrived."""
        if self._waiting and not self._is_announced:
            self._is_announced = True
            try:
                self._event_loop.call_soon_threadsafe(self._wake)
            except RuntimeError:  # the event loop was closed, and those who waited with it
                self._waiting.clear()

    def _wake(self) -> None:
        self._is_announced = False
        for future, stream in list(self._waiting.items()):  # a waiter that is collected leaves from any thread
            if _has_news(stream) and not future.done():
                future.set_result(None)

    def _look(self) -> None:
        self._check = self._event_loop.call_later(CHECK_SECONDS, self._look) if self._waiting else None
        try:
            self._loop.check_stuck()
        except DeviceStuck as error:
            for future in list(self._waiting):
                if not future.done():
                    future.set_exception(error)


def _has_news(stream: Stream) -> bool:
    return bool(stream.frames) or stream.is_over
