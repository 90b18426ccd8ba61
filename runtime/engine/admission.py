"""Who gets a slot, who gives one away, and how a stream leaves it.

Whatever a step raises here, of any class, is the error of the one stream that it was made for: the others go on.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from aloud import memory
from aloud.engine.driven import Driven
from aloud.engine.guards import Watches
from aloud.engine.scheduler import Scheduler, SchedulerConfig
from aloud.engine.steps import Launched, Reading, Steps
from aloud.engine.stream import Prefix, Stream, Suspended
from aloud.engine.waiting import WaitingLine, is_live, rank
from aloud.errors import AloudError, OutOfMemory, Overloaded, StepFailed

logger = logging.getLogger(__name__)
KEPT_SECONDS = 0.5
"""For how long a slot is kept for the next piece of an utterance whose listener has played the one before: who asks for
more only then shall have it as soon as it can be made."""


@dataclass
class Kept:
    """A slot between two pieces of an utterance that plays in real time."""

    slot: int
    until: float  # by the loop's clock
    next: Stream | None = None  # once it has come


@dataclass(frozen=True)
class InFlight:
    """A frame that was launched and not yet read."""

    launched: Launched
    slots: np.ndarray  # int64 [rows]
    streams: tuple[Stream, ...]  # whose slots they were at the launch


@dataclass
class Counts:
    """What has happened since the loop was made."""

    accepted: int = 0
    refused: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    with_prefix: int = 0  # of those that got a slot: began behind a cached prefix
    suspended: int = 0  # times that a stream gave its slot to one that plays in real time
    steps: int = 0
    rows: int = 0
    read_positions: int = 0  # of prompts, by prefill


class Admission(Driven):
    """The slots of one model's steps, and the streams that have one or wait for one; `Loop` takes the steps."""

    def __init__(
        self,
        steps: Steps,
        slots: int,
        frame_rate_hz: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_waiting: int = 4096,
        stuck_after_seconds: float = 60.0,
    ) -> None:
        """Of steps over as many slots.

        clock: in seconds, from any beginning. max_waiting: refusable streams that may wait for a slot.
        stuck_after_seconds: a step that takes longer is taken for one that never ends.
        """
        super().__init__(clock, stuck_after_seconds)
        self._steps = steps
        self.max_waiting = max_waiting
        self.counts = Counts()
        config = SchedulerConfig(
            frame_seconds=1 / frame_rate_hz, batch_sizes=steps.batch_sizes, prefill_sizes=steps.prefill_sizes
        )
        self.scheduler = Scheduler(config, slots)
        self._watches = Watches(slots, frame_rate_hz)
        self._made = np.zeros(slots, np.int64)  # frames that a slot's stream has been given
        self._to_launch = np.zeros(slots, np.int64)  # frames that may still be launched for it
        self._max_frames = np.zeros(slots, np.int64)
        self._streams: list[Stream | None] = [None] * slots
        self._free = deque(range(slots))
        self._inbox: deque[Stream] = deque()  # new ones and cancelled ones; appending needs no lock
        self._waiting = WaitingLine()  # for a slot
        self._kept: dict[object, Kept] = {}  # by utterance
        self.failed_in_a_row = 0  # steps, since the last one that did not fail
        self._reading: deque[Stream] = deque()  # whose prompts are not yet read
        self._held: list[Stream] = []  # that wait for their frames to be taken
        self._giving: list[Stream] = []  # that give their slots away, once none of their frames is in flight
        self._passes: deque[tuple[int, Reading]] = deque()  # positions of prefill passes that were not yet timed
        self._in_flight: deque[InFlight] = deque()

    # --- who comes ----------------------------------------------------------------------------------------------------

    def _take_inbox(self) -> None:
        if self._kept:
            self._let_go_late(self._clock())
        while self._inbox:
            stream = self._inbox.popleft()
            if not stream.cancelled:
                refusal = self._refusal(stream) if stream.is_refusable else None
                if refusal is None:
                    self.counts.accepted += 1
                    self._waiting.add(stream)
                    if (kept := self._kept.get(stream.job.utterance)) is not None:
                        kept.next = stream
                else:
                    self.counts.refused += 1
                    stream.error = refusal
            elif not stream.is_over:
                if stream.slot < 0:
                    self._waiting.remove(stream)
                self._finish(stream, "cancelled")

    def _refusal(self, stream: Stream) -> Overloaded | None:
        """Why a new stream cannot run in time, if it cannot."""
        without_slot = self._waiting.without_slot(stream, len(self._free))
        if without_slot >= self.max_waiting and is_live(stream):
            given = [other for other in self._streams if other is not None and (other.gives_slot or _can_give(other))]
            without_slot = self._waiting.without_slot(stream, len(self._free) + len(given))
        if without_slot >= self.max_waiting:
            return Overloaded(
                f"{without_slot} requests wait for a stream already. Ask again later.", retry_after_seconds=1.0
            )
        coming = [other for other in (*self._waiting, *self._reading) if not other.is_over]
        starting = sum(other.job.lead_seconds is not None for other in coming)
        starting += sum(kept.next is None for kept in self._kept.values())
        after = self.scheduler.retry_after(self._clock(), stream.job.lead_seconds, starting)
        if after is None:
            return None
        return Overloaded(
            f"One more stream would make those that run late. Ask again in {after:.1f} s.", retry_after_seconds=after
        )

    def _admit(self) -> None:
        """Give slots to streams that wait for one."""
        if not self._waiting.count and not self._giving:
            return
        for utterance, kept in [item for item in self._kept.items() if item[1].next is not None]:
            assert kept.next is not None
            del self._kept[utterance]
            if kept.next.is_over:  # cancelled as soon as it had come
                self._free.append(kept.slot)
            else:
                self._waiting.remove(kept.next)
                self._begin(kept.next, kept.slot)
        self._make_room()
        while self._free and self._waiting.count:
            self._begin(self._waiting.pop(), self._free.popleft())

    def _begin(self, stream: Stream, slot: int) -> None:
        """Let a stream that has waited have a slot."""
        job = stream.job
        stream.slot = slot
        self._streams[slot] = stream
        if stream.suspended is not None:
            self._go_on(stream, stream.suspended)
            return
        self._made[slot] = 0
        self._to_launch[slot] = self._max_frames[slot] = job.max_frames
        self._watches.start(slot, job.guards, job.text_limit_frames)
        try:
            self._steps.start(slot, job.sampling, job.seed, job.positions)
            if job.prefix is not None:
                self.counts.with_prefix += 1
                self._steps.paste_prefix(slot, job.prefix.cache, job.prefix.positions)
        except Exception as error:
            self._fail(stream, error)
            return
        # Behind all that go before it or with it: what is being played does not wait for newcomers' prompts.
        place = len(self._reading)
        while place and rank(self._reading[place - 1]) > rank(stream):
            place -= 1
        self._reading.insert(place, stream)

    # --- slots between two pieces -------------------------------------------------------------------------------------

    def let_go(self, utterance: object) -> None:
        """Nothing more comes of an utterance, for which a slot may be kept; from any thread."""
        kept = self._kept.get(utterance)
        if kept is not None:
            kept.until = -math.inf
            self.wake()

    def _keep_slot(self, stream: Stream) -> None:
        """Where another piece may come, keep the slot for as long as this one is played."""
        job = stream.job
        if job.is_followed and job.lead_seconds is not None:
            until = self.scheduler.plays_until(stream.slot, self._clock()) + KEPT_SECONDS
            self._kept[job.utterance] = kept = Kept(stream.slot, until)
            if stream.cancelled:  # meanwhile, and `let_go` may have looked before
                kept.until = -math.inf

    def _let_go_late(self, now: float) -> None:
        """Free the slots that have been kept for long enough, or for what was cancelled."""
        for utterance, kept in list(self._kept.items()):
            if kept.until <= now if kept.next is None else kept.next.is_over:
                del self._kept[utterance]
                self._free.append(kept.slot)

    # --- who gives a slot away ----------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Take slots from streams of full pace, for those that are live."""
        while self._ask_for_slots():
            flying = {stream for flight in self._in_flight for stream in flight.streams}
            ready = [stream for stream in self._giving if stream not in flying]
            self._giving = [stream for stream in self._giving if stream in flying]
            without_memory = [stream for stream in ready if not self._suspend(stream)]
            if not without_memory:
                return

    def _ask_for_slots(self) -> bool:
        """Choose who is to give a slot, one for each live stream that waits for one -> whether somebody gives one."""
        self._giving = [stream for stream in self._giving if not stream.is_over]
        wanted = self._waiting.live - len(self._free) - len(self._giving)
        if wanted > 0:
            able = [stream for stream in self._streams if stream is not None and _can_give(stream)]
            # Those that wait for their frames to be taken miss nothing; of the others, the youngest have least to copy.
            able.sort(key=lambda stream: (not stream.held, self._made[stream.slot]))
            for stream in able[:wanted]:
                if stream in self._reading:  # it has nothing yet, and begins anew
                    self._reading.remove(stream)
                    stream.read_positions = 0
                    self.counts.with_prefix -= stream.job.prefix is not None
                    self._waiting.put_back(stream)
                    self._release(stream)
                else:
                    stream.gives_slot = True
                    self.scheduler.hold(stream.slot)
                    self._giving.append(stream)
        return bool(self._giving)

    def _suspend(self, stream: Stream) -> bool:
        """Copy a stream out of its slot, which is free then -> False where there is no memory for that."""
        slot, made = stream.slot, int(self._made[stream.slot])
        stream.gives_slot = False
        try:
            copy = self._steps.copy_stream(slot, stream.job.positions + max(0, made - 1))
        except Exception as error:
            if not memory.is_out_of_memory(error):
                self._fail(stream, error)
                return True
            logger.warning("There was no memory to suspend a stream of full pace: others wait for its slot")
            stream.keeps_slot = True
            if not stream.held:
                self.scheduler.resume(slot, self._clock())
            return False
        self.counts.suspended += 1
        stream.suspended = Suspended(copy, made, int(self._to_launch[slot]), self._watches.copy(slot))
        self._waiting.add(stream)
        self._release(stream)
        return True

    def _go_on(self, stream: Stream, suspended: Suspended) -> None:
        """Let a stream that was suspended run in the slot that it has now."""
        slot, stream.suspended = stream.slot, None
        self._made[slot], self._to_launch[slot] = suspended.made_frames, suspended.frames_to_launch
        self._max_frames[slot] = stream.job.max_frames
        self._watches.paste(slot, suspended.watch)
        try:
            self._steps.paste_stream(slot, suspended.copy)
        except Exception as error:
            self._fail(stream, error)
            return
        self.scheduler.start(slot, self._clock(), stream.job.lead_seconds, was_suspended=True)
        if stream.held:
            self.scheduler.hold(slot)

    # --- how a stream ends --------------------------------------------------------------------------------------------

    def _finish(self, stream: Stream, reason: str) -> None:
        if stream.job.keeps_cache and stream.slot >= 0 and reason != "cancelled":
            made = int(self._made[stream.slot])
            # A frame is read by the step after it, which has been made only where that step drew the end.
            read = stream.job.positions + (made if reason == "end" else max(0, made - 1))
            try:
                stream.prefix = Prefix(read, self._steps.copy_prefix(stream.slot, read))
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    self._fail(stream, error)
                    return
                logger.warning("There was no memory to keep what a stream has read: it will be read again")
        if reason == "cancelled":
            self.counts.cancelled += 1
        else:
            self.counts.finished += 1
            self._keep_slot(stream)  # before it is known to be over, and `let_go` may be called
        stream.finish_reason = reason
        self._release(stream)

    def _fail(self, stream: Stream, error: BaseException) -> None:
        if not stream.is_over:
            self.counts.failed += 1
            stream.error = _in_words(error)
            self._release(stream)

    def _release(self, stream: Stream) -> None:
        """Free the slot of a stream that is over or suspended."""
        stream.keep_own()
        if stream.is_over:
            stream.suspended = None
        slot, stream.slot = stream.slot, -1
        if slot >= 0:
            stream.lateness_seconds = self.scheduler.lateness(slot)
            self.scheduler.stop(slot)
            self._streams[slot] = None
            kept = self._kept.get(stream.job.utterance)
            if kept is None or kept.slot != slot:
                self._free.append(slot)


def _can_give(stream: Stream | None) -> bool:
    """Whether its slot may go to a live stream."""
    return stream is not None and not (stream.gives_slot or stream.keeps_slot or is_live(stream))


def _in_words(error: BaseException) -> BaseException:
    """What the user of a stream sees of an error in the middle of a step."""
    if isinstance(error, AloudError):
        return error
    if isinstance(error, Exception) and memory.is_out_of_memory(error):
        words: AloudError = OutOfMemory(
            f"There was not enough memory for a step: {error}. Load with a smaller max_streams or max_positions."
        )
    else:
        words = StepFailed(f"A step of the model failed: {type(error).__name__}: {error}. Ask again.")
    words.__cause__ = error
    return words
