"""The loop: admit what waits, read prompts, launch a frame, hand out the one before; whoever waits drives it.

One tick is `Loop.step`; see `Driven` for who takes it. Everything else may be called from any thread.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence

import numpy as np

from aloud.engine.admission import Admission, InFlight
from aloud.engine.guards import REASONS
from aloud.engine.steps import HostFrame
from aloud.engine.stream import BUFFERED_FRAMES, Job, Spoken, Stream
from aloud.engine.waiting import PLAYED, rank
from aloud.errors import LogitsNotFinite, Overloaded
from aloud.prompt_block import Piece

logger = logging.getLogger(__name__)


class Loop(Admission):
    """Many streams over one model's slots."""

    # --- from any thread ----------------------------------------------------------------------------------------------

    def submit(self, job: Job, *, is_refusable: bool = False) -> Stream:
        """Let a job begin as soon as there is room for it; see `Stream` for one that is refusable.

        Raises `EngineClosed` where the process was forked meanwhile, or ends.
        """
        self.check_here()
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
                    self._let_go_late(math.inf)
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
        return not self._inbox and not self._waiting.count and not self.used_slots

    @property
    def waiting(self) -> int:
        """Streams that wait for a slot."""
        return len(self._inbox) + self._waiting.count

    @property
    def used_slots(self) -> int:
        """Slots that have a stream."""
        return len(self._streams) - len(self._free) - len(self._kept)

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
        if self._kept and self._waiting.count:
            let_go_at = min(kept.until for kept in self._kept.values())
            wake_at = let_go_at if wake_at is None else min(wake_at, let_go_at)
        return None if wake_at is None else max(0.001, wake_at - now)

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

    def _prefill(self) -> bool:
        """Read prompts for as long as no running stream becomes late -> whether there were any."""
        planned: list[int] = []
        urgent = self._urgent_positions() if self._reading else 0
        while self._reading and (room := self.scheduler.prefill_positions(self._clock(), planned, urgent)):
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

    def _urgent_positions(self) -> int:
        """Positions to be read of the next sentences of what is being played, which stand before all others."""
        urgent = itertools.takewhile(lambda stream: rank(stream) == PLAYED, self._reading)
        return sum(len(stream.job.prompt) - stream.read_positions for stream in urgent if not stream.is_over)

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
        self._in_flight.append(InFlight(launched, slots, streams))
        self._to_launch[slots] -= 1
        for slot in slots[self._to_launch[slots] <= 0].tolist():
            self.scheduler.hold(slot)  # all of its frames are under way

    def _deliver(self, flight: InFlight) -> None:
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

    # --- for who drives -----------------------------------------------------------------------------------------------

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
        self._let_go_late(math.inf)


def _has_room(stream: Stream) -> bool:
    return len(stream.frames) < BUFFERED_FRAMES // 2
