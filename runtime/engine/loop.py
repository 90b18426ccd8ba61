"""The loop: admit what waits, read prompts, launch a frame, hand out the one before; whoever waits drives it.

One tick is `Loop.step`; see `Driven` for who takes it. Everything else may be called from any thread.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from aloud import memory
from aloud.engine.driven import Driven
from aloud.engine.guards import REASONS, Watches
from aloud.engine.scheduler import Scheduler, SchedulerConfig
from aloud.engine.steps import HostFrame, Launched, Reading, Steps
from aloud.engine.stream import BUFFERED_FRAMES, Job, Prefix, Spoken, Stream, Suspended
from aloud.engine.waiting import WaitingLine, is_live
from aloud.errors import AloudError, LogitsNotFinite, OutOfMemory, Overloaded, StepFailed
from aloud.prompt_block import Piece

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _InFlight:
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


class Loop(Driven):
    """Many streams over one model's slots."""

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
        self.failed_in_a_row = 0  # steps, since the last one that did not fail
        self._reading: deque[Stream] = deque()  # whose prompts are not yet read
        self._held: list[Stream] = []  # that wait for their frames to be taken
        self._giving: list[Stream] = []  # that give their slots away, once none of their frames is in flight
        self._passes: deque[tuple[int, Reading]] = deque()  # positions of prefill passes that were not yet timed
        self._in_flight: deque[_InFlight] = deque()

    # --- from any thread ----------------------------------------------------------------------------------------------

    def submit(self, job: Job, *, is_refusable: bool = False) -> Stream:
        """Let a job begin as soon as there is room for it; see `Stream` for one that is refusable."""
        stream = Stream(job, is_refusable=is_refusable)
        self._inbox.append(stream)
        self.wake()
        return stream

    def cancel(self, stream: Stream) -> None:
        """End a stream now: nothing more is made of it, and its slot is free before the next frame."""
        stream.cancelled = True
        if stream.is_over:
            return
        self._inbox.append(stream)
        with self._drive(wait=False) as driving:
            if driving:
                self._take_inbox()

    def cancel_all(self) -> None:
        """End all streams now, between two ticks. Raises `DeviceStuck`."""
        while True:
            with self._drive(wait=True) as driving:
                if driving:
                    self._take_inbox()
                    for stream in [*self._waiting, *self._streams]:
                        if stream is not None:
                            stream.cancelled = True
                            self._inbox.append(stream)
                    self._take_inbox()
                    return
            self.check_stuck()

    def next(self, stream: Stream) -> Spoken | None:
        """Wait for a stream's next frame; None when there are no more.

        Raises the stream's error, and `DeviceStuck`.
        """
        self.wait(stream)
        spoken = self.take(stream)
        if spoken is None and stream.error is not None:
            raise stream.error
        return spoken

    def wait(self, stream: Stream) -> None:
        """Return when a stream has a frame or is over; meanwhile, drive if nobody else does.

        Raises `DeviceStuck`, and `Overloaded` when all slots have streams whose frames nobody takes.
        """

        def has_news() -> bool:
            return bool(stream.frames) or stream.is_over

        while not has_news():
            self.check_stuck()
            with self._drive(wait=True, unless=has_news) as driving:
                # What was awaited may have come while this thread waited to drive.
                pause = self.step() if driving and not has_news() else 0.0
            if pause == 0.0:
                continue
            longest = self.stuck_after_seconds if pause is None else pause
            if not self.sleep(longest, has_news) and pause is None:
                raise Overloaded(
                    f"All {self.slots} slots have streams whose frames nobody takes. Take them, close those streams, "
                    "or load with a larger max_streams.",
                    retry_after_seconds=longest,
                )

    def take(self, stream: Stream) -> Spoken | None:
        """A stream's next frame, if there is one, without waiting."""
        spoken = stream.take()
        if spoken is not None and stream.held:
            self.wake()
        return spoken

    @property
    def is_idle(self) -> bool:
        """Whether no stream waits or runs."""
        return not self._inbox and not self._waiting.count and len(self._free) == len(self._streams)

    @property
    def waiting(self) -> int:
        """Streams that wait for a slot."""
        return len(self._inbox) + self._waiting.count

    @property
    def used_slots(self) -> int:
        """Slots that have a stream."""
        return len(self._streams) - len(self._free)

    @property
    def slots(self) -> int:
        """Slots in all."""
        return len(self._streams)

    # --- one tick, from the thread that drives ------------------------------------------------------------------------

    def _step(self) -> float | None:
        self._take_inbox()
        self._resume()
        self._admit()
        read = self._prefill()
        slots = self.scheduler.choose(self._clock())
        if len(slots):
            self._launch(slots)
        ahead = self._steps.ahead if len(slots) else 0
        delivered = len(self._in_flight) > ahead
        while len(self._in_flight) > ahead:
            self._deliver(self._in_flight.popleft())
        if read or len(slots) or delivered or self._inbox:
            return 0.0
        now = self._clock()
        wake_at = self.scheduler.wake_at(now)
        return None if wake_at is None else max(0.001, wake_at - now)

    def _take_inbox(self) -> None:
        while self._inbox:
            stream = self._inbox.popleft()
            if not stream.cancelled:
                refusal = self._refusal(stream) if stream.is_refusable else None
                if refusal is None:
                    self.counts.accepted += 1
                    self._waiting.add(stream)
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
        starting = sum(other.job.lead_seconds is not None for other in (*self._waiting, *self._reading))
        after = self.scheduler.retry_after(self._clock(), stream.job.lead_seconds, starting)
        if after is None:
            return None
        return Overloaded(
            f"One more stream would make those that run late. Ask again in {after:.1f} s.", retry_after_seconds=after
        )

    def _resume(self) -> None:
        """Let streams go on whose frames have been taken."""
        if not self._held:
            return
        now, still_held = self._clock(), []
        for stream in self._held:
            if stream.is_over:
                continue
            if _has_room(stream):
                stream.held = False
                if stream.slot >= 0 and self._to_launch[stream.slot] > 0 and not stream.gives_slot:
                    self.scheduler.resume(stream.slot, now)
            else:
                still_held.append(stream)
        self._held = still_held

    def _admit(self) -> None:
        """Give slots to streams that wait for one."""
        if not self._waiting.count and not self._giving:
            return
        self._make_room()
        while self._free and self._waiting.count:
            stream = self._waiting.pop()
            job, slot = stream.job, self._free.popleft()
            stream.slot = slot
            self._streams[slot] = stream
            if stream.suspended is not None:
                self._go_on(stream, stream.suspended)
                continue
            self._made[slot] = 0
            self._to_launch[slot] = self._max_frames[slot] = job.max_frames
            self._watches.start(slot, job.guards, job.text_limit_frames)
            try:
                self._steps.start(slot, job.sampling, job.seed, job.positions)
                if job.prefix is not None:
                    self.counts.with_prefix += 1
                    self._steps.paste_prefix(slot, job.prefix.cache)
            except Exception as error:
                self._fail(stream, error)
            else:
                self._reading.append(stream)

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

    def _prefill(self) -> bool:
        """Read prompts for as long as no running stream becomes late -> whether there were any."""
        planned: list[int] = []
        while self._reading and (room := self.scheduler.prefill_positions(self._clock(), planned)):
            pieces = self._pieces(room if self._steps.prefill_together else self._steps.prefill_sizes[-1])
            if not pieces:
                break
            streams = [self._streams[piece.slot] for piece in pieces]
            positions = sum(piece.stop - piece.start for piece in pieces)
            planned.append(positions)
            self.counts.read_positions += positions
            try:
                self._passes.append((positions, self._steps.prefill(pieces)))
            except Exception as error:
                self._fail_pieces(pieces, error)
            if not self._in_flight:  # nobody waits meanwhile, and the next pass can be planned with what this one took
                self._time_passes()
            now = self._clock()
            for piece, stream in zip(pieces, streams, strict=True):
                if stream is None or stream.is_over:
                    continue
                stream.read_positions = piece.stop
                if piece.is_last:
                    if stream.job.max_frames:
                        self.scheduler.start(piece.slot, now, stream.job.lead_seconds, stream.job.plays_at)
                    else:
                        self._finish(stream, "length")
        return bool(planned)

    def _time_passes(self) -> None:
        """Tell the scheduler what prefill passes took; they are over, or are waited for."""
        while self._passes:
            positions, reading = self._passes.popleft()
            try:
                seconds = reading.seconds()
            except Exception:  # only a measurement is lost: a device that has failed says so to the next frame as well
                logger.exception("A pass over a prompt could not be timed")
            else:
                self.scheduler.observe_prefill(positions, seconds)

    def _pieces(self, budget: int) -> list[Piece]:
        """The next positions to read, `budget` of them at most, oldest stream first."""
        pieces: list[Piece] = []
        while self._reading and budget > 0:
            stream = self._reading[0]
            if stream.is_over:
                self._reading.popleft()
                continue
            job, start = stream.job, stream.read_positions
            stop = min(len(job.prompt), start + budget)
            before = job.positions - len(job.prompt)
            pieces.append(Piece(stream.slot, job.prompt, start, stop, before + start))
            budget -= stop - start
            if stop == len(job.prompt):
                self._reading.popleft()
            if not self._steps.prefill_together:
                break
        return pieces

    def _fail_pieces(self, pieces: Sequence[Piece], error: Exception) -> None:
        """Find out whose prompt it was: each one is read again by itself."""
        for piece in pieces:
            stream = self._streams[piece.slot]
            if stream is None:
                continue
            if len(pieces) > 1:
                try:
                    self._steps.prefill([piece])
                except Exception as own_error:
                    self._fail(stream, own_error)
            else:
                self._fail(stream, error)

    def _launch(self, slots: np.ndarray) -> None:
        streams = tuple(self._streams[slot] for slot in slots.tolist())
        try:
            launched = self._steps.launch(slots)
        except Exception as error:
            self.failed_in_a_row += 1
            for stream in streams:
                self._fail(stream, error)
            return
        self.counts.steps += 1
        self.counts.rows += len(slots)
        self.scheduler.launched(slots, self._clock())
        self._in_flight.append(_InFlight(launched, slots, streams))
        self._to_launch[slots] -= 1
        for slot in slots[self._to_launch[slots] <= 0].tolist():
            self.scheduler.hold(slot)  # all of its frames are under way

    def _deliver(self, flight: _InFlight) -> None:
        """Read a frame and give each stream its part; those that ended meanwhile have none."""
        try:
            frame = flight.launched.read()
        except Exception as error:
            self.failed_in_a_row += 1
            for stream in flight.streams:
                self._fail(stream, error)
            return
        self.failed_in_a_row = 0
        self.scheduler.observe_frame(len(flight.slots), frame.seconds)
        self._time_passes()
        rows = [row for row, stream in enumerate(flight.streams) if not stream.is_over]
        if not rows:
            return
        slots, codes, power, ended = flight.slots, frame.codes, frame.power, frame.ended
        if len(rows) < len(flight.streams):
            slots, codes, power, ended = slots[rows], codes[rows], power[rows], ended[rows]
        reasons = self._watches.see(slots, codes, power)
        undrawn = codes.min(axis=1) < 0
        is_none = ended | undrawn
        self._made[slots] += ~is_none
        self.scheduler.delivered(slots, self._clock())
        is_special = is_none | (self._made[slots] >= self._max_frames[slots]) | (reasons > 0)
        ordinary = rows
        if is_special.any():
            ordinary = [row for row, special in zip(rows, is_special.tolist(), strict=True) if not special]
            for index in is_special.nonzero()[0].tolist():
                row, guard = rows[index], REASONS[reasons[index]]
                self._deliver_special(
                    flight.streams[row], frame, row, undrawn=bool(undrawn[index]), ended=bool(ended[index]), guard=guard
                )
        for row in ordinary:
            stream = flight.streams[row]
            frames = stream.frames
            if frames:
                stream.keep_own()
            frames.append([(frame, row)])
            if len(frames) >= BUFFERED_FRAMES:
                self._hold(stream)

    def _deliver_special(
        self, stream: Stream, frame: HostFrame, row: int, *, undrawn: bool, ended: bool, guard: str | None
    ) -> None:
        """A frame that is the last, or is none."""
        if undrawn:
            self._fail(
                stream,
                LogitsNotFinite(
                    f"The model computed logits that are not finite in frame {int(self._made[stream.slot]) + 1}. "
                    "Load it in float32, or check the checkpoint."
                ),
            )
        elif ended:
            self._finish(stream, "end")
        else:
            stream.keep_own()
            stream.frames.append([(frame, row)])
            self._finish(stream, guard or "length")

    def _hold(self, stream: Stream) -> None:
        if stream.held:  # this frame was in flight when it was held
            return
        stream.held = True
        stream.keep_own()
        self._held.append(stream)
        self.scheduler.hold(stream.slot)

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
            self._free.append(slot)

    def _has_news(self) -> bool:
        return bool(self._inbox) or any(_has_room(stream) for stream in self._held)

    def _broken(self, error: BaseException) -> None:
        """No stream is whole any more."""
        self._in_flight.clear()
        self._passes.clear()
        self._reading.clear()
        self._giving.clear()
        for stream in [stream for stream in self._streams if stream is not None]:
            self._waiting.remove(stream)  # where the step was left while it was being suspended
            self._fail(stream, error)


def _can_give(stream: Stream | None) -> bool:
    """Whether its slot may go to a live stream."""
    return stream is not None and not (stream.gives_slot or stream.keeps_slot or is_live(stream))


def _has_room(stream: Stream) -> bool:
    return len(stream.frames) < BUFFERED_FRAMES // 2


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
