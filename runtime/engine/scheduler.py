"""Who runs this tick, who waits, who is refused: earliest deadline first among streams that play in real time.

Speech has a clock. A stream's playback starts when its first frame is delivered; frame i is due `i * frame_seconds`
later. Its *lead* is what it has launched and not yet played: `launched * frame_seconds - elapsed playback`, which is
also the time left until the next frame that it launches is due. Frames in flight (launched, not delivered) count. A
real-time stream may run while its lead is at or below its limit, then it yields; a full-pace stream has no deadline
and takes what is left.

Nothing here reads a clock: every method that needs the time is given `now`, in seconds, never falling. Slots in one
array are distinct. The loop that uses this runs each tick so:

    rows = scheduler.choose(now);  launch them;  scheduler.launched(rows, now)
    while prompts wait and (room := scheduler.prefill_positions(now, planned)):  read up to `room` positions of one
    read the frame launched before;  scheduler.delivered(its rows that still live, now)

and times every captured batch size and prefill size once at start-up (`observe_frame`, `observe_prefill`), so that
admission need not extrapolate from the small batches of a quiet hour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from aloud.engine.cost import MeasuredCost

Slots = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]

IDLE, REALTIME, FULL = 0, 1, 2

SPARE_SHARE = 0.5
"""Share of the spare time that one tick gives away: an estimate wrong by a factor of two does no harm."""
STARVATION_FRAMES = 25
"""Full-pace streams get a row at least once in so many frame periods, even when real-time streams are late."""
LOAD_SECONDS = 10.0
"""Time constant of the rates of arrivals, ends and prefill work."""
RETRY_SECONDS = (0.5, 1.0, 30.0)
"""Least, unknown (no stream has ended yet) and most that a refusal asks to wait."""
LATE_EDGES = np.geomspace(1e-6, 100.0, 257)
"""Upper edges of the lateness histogram's bins, 7.5 % apart, seconds; a microsecond and less is in time."""


@dataclass(frozen=True)
class SchedulerConfig:
    """What the scheduler knows of the model and the device. Raises `ValueError` for what cannot be."""

    frame_seconds: float
    """Sound in one frame, 0.08 for Mimi."""
    batch_sizes: tuple[int, ...]
    """Captured batch sizes, ascending. The largest is what one tick can run; n rows cost what the next size costs."""
    prefill_sizes: tuple[int, ...]
    """Positions that one prefill pass may take, ascending; a pass costs what the next size costs."""
    headroom: float = 0.9
    """Share of the time that admission fills."""

    def __post_init__(self) -> None:
        for name, sizes in (("batch_sizes", self.batch_sizes), ("prefill_sizes", self.prefill_sizes)):
            if not sizes or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
                raise ValueError(f"{name} must be positive and ascending, and is {sizes}.")
        if not 0 < self.frame_seconds < math.inf:
            raise ValueError(f"frame_seconds must be positive, and is {self.frame_seconds}.")
        if not 0 < self.headroom <= 1:
            raise ValueError(f"headroom must be above 0 and at most 1, and is {self.headroom}.")


@dataclass(frozen=True)
class SchedulerStatistics:
    """Plain numbers since the scheduler was made; lateness in seconds, over all real-time frames delivered."""

    running_realtime: int
    running_full: int
    held: int
    frames: int
    realtime_frames: int
    late_frames: int
    lateness_p50: float
    lateness_p99: float
    lateness_max: float


class Scheduler:
    """Decides for `slots` slots which run, from what the loop tells it. Not safe for use by several threads.

    A call about a slot with no stream changes nothing (`stop`, `hold`, `resume`, `launched`, `delivered`): the news of
    an end may cross any of them. Only `start` on a slot that has a stream is an error.
    """

    def __init__(self, config: SchedulerConfig, slots: int) -> None:
        self._config = config
        self._frame_seconds = config.frame_seconds
        self._frame_cost = MeasuredCost(config.batch_sizes)
        self._prefill_cost = MeasuredCost(config.prefill_sizes)
        self._kind = np.zeros(slots, np.int8)
        self._held = np.zeros(slots, bool)
        self._paced = np.zeros(slots, bool)  # real time, not held
        self._free = np.zeros(slots, bool)  # full pace, not held
        self._playing = np.zeros(slots, bool)  # its clock runs: the first frame has been delivered
        self._origin = np.zeros(slots)  # when playback started; until then, when the stream did
        self._launched = np.zeros(slots, np.int64)  # frames since the clock was set
        self._delivered = np.zeros(slots, np.int64)
        self._lead = np.full(slots, math.inf)
        self._due = np.full(slots, math.inf)  # of the next frame to launch; infinite unless paced
        self._wake = np.full(slots, math.inf)  # from when it may run; infinite unless paced
        self._turn = np.zeros(slots, np.int64)  # place in the queue of full-pace streams
        self._lateness = np.zeros(slots)
        self._histogram = np.zeros(len(LATE_EDGES) + 1, np.int64)
        self._latest = 0.0
        self._realtime = self._full = 0  # streams, held ones too
        self._in_flight = self._frames = self._last_turn = 0
        self._full_ran = 0.0  # when a full-pace row was last launched, or the first of them came
        self._now: float | None = None
        # Sums that fade with LOAD_SECONDS: divided by it, they are rates.
        self._prefill_seconds = self._starts = self._realtime_starts = self._realtime_stops = 0.0

    # --- streams come, pause and go -----------------------------------------------------------------------------------

    def start(
        self,
        slot: int,
        now: float,
        lead_seconds: float | None,
        plays_at: float | None = None,
        *,
        was_suspended: bool = False,
    ) -> None:
        """A stream's prompt is read: it may run. `lead_seconds` is the lead it keeps; None is full pace.

        `plays_at` is when its first frame is due, where it goes on with something that is being played already. One
        that was suspended counts as no arrival.

        A lead shorter than about three ticks cannot be kept: one to wait for, one in flight, its own.
        Raises `ValueError` when the slot has a stream, or the lead is not positive.
        """
        if self._kind[slot] != IDLE:
            raise ValueError(f"Slot {slot} has a stream already; stop it first.")
        if lead_seconds is not None and not 0 < lead_seconds < math.inf:
            raise ValueError(f"The lead must be a positive number of seconds, or None, and is {lead_seconds}.")
        self._advance(now)
        self._starts += not was_suspended
        if lead_seconds is None:
            self._kind[slot], self._lead[slot] = FULL, math.inf
            self._full += 1
            self._queue(np.array([slot]))  # behind those that wait already: newcomers cannot starve them
        else:
            self._kind[slot], self._lead[slot] = REALTIME, lead_seconds
            self._realtime += 1
            self._realtime_starts += 1
        self._lateness[slot] = 0.0
        self._release(slot, now)
        if plays_at is not None and lead_seconds is not None:
            self._playing[slot] = True
            self._origin[slot] = plays_at
            self._place(np.array([slot]))

    def stop(self, slot: int) -> None:
        """The stream ended, was cancelled or failed. Frames in flight are forgotten; its lateness can still be read."""
        kind = self._kind[slot]
        if kind == IDLE:
            return
        if kind == REALTIME:
            self._realtime -= 1
            self._realtime_stops += 1
        else:
            self._full -= 1
        self._in_flight -= int(self._launched[slot] - self._delivered[slot])
        self._kind[slot] = IDLE
        self._launched[slot] = self._delivered[slot] = 0
        self._held[slot] = self._paced[slot] = self._free[slot] = self._playing[slot] = False
        self._due[slot] = self._wake[slot] = math.inf

    def hold(self, slot: int) -> None:
        """The consumer's buffer is full: the stream does not run until `resume`."""
        if self._kind[slot] == IDLE or self._held[slot]:
            return
        self._held[slot] = True
        self._paced[slot] = self._free[slot] = False
        self._due[slot] = self._wake[slot] = math.inf

    def resume(self, slot: int, now: float) -> None:
        """The buffer has room again. The playback clock starts anew with the next frame delivered, as after `start`."""
        if not self._held[slot]:
            return
        self._held[slot] = self._playing[slot] = False
        self._launched[slot] -= self._delivered[slot]  # what is in flight opens the new clock
        self._delivered[slot] = 0
        self._release(slot, now)

    # --- a tick -------------------------------------------------------------------------------------------------------

    def choose(self, now: float) -> Slots:
        """The slots to run now -> int64 [rows], ascending, at most the largest batch. Changes nothing.

        Real-time streams whose lead is at or below their limit; when they do not all fit, those whose next frame is
        due first, ties by slot. Until its first frame is delivered, a stream's frames count from when it was started
        (or resumed): its first frame was due then, and goes before all that are not yet late.

        Full-pace streams take the rows that padding makes free, and larger batches as long as the time that adds is
        within `SPARE_SHARE` of what no running real-time stream would miss. They take turns: who ran goes to the end of
        the queue, as who is new does, so that n that run all the time differ by one frame at most.

        Guaranteed, also under lasting overload: while full-pace streams may run, one of their rows is launched at the
        latest in the first tick after every `STARVATION_FRAMES` frame periods, in place of the last real-time one if
        need be; so with n of them, each runs once in n times that (and a tick each). That is of those that have a slot.
        """
        ready = np.flatnonzero(self._wake <= now)
        rows = self._frame_cost.largest
        waiting = np.flatnonzero(self._free) if self._full else ready[:0]
        if not waiting.size:
            return _first(ready, self._due, rows)
        if not self._realtime and waiting.size <= rows:
            return waiting
        starved = int(now >= self._full_ran + STARVATION_FRAMES * self._frame_seconds)
        paced = _first(ready, self._due, rows - starved)
        rows = self._rows_beside(now, paced, waiting.size, starved)
        return np.sort(np.concatenate((paced, _first(waiting, self._turn, rows - paced.size))))

    def launched(self, slots: Slots, now: float) -> None:
        """One frame of each of these slots, int64 [rows], was launched."""
        self._advance(now)
        kind = self._kind[slots]
        if not kind.all():
            slots, kind = slots[kind != IDLE], kind[kind != IDLE]
        self._launched[slots] += 1
        self._in_flight += slots.size
        full = slots[kind == FULL] if self._full else slots[:0]
        if full.size:
            self._full_ran = now
            self._queue(full)
        self._place(slots)

    def delivered(self, slots: Slots, now: float) -> None:
        """The oldest frame in flight of each of these slots, int64 [rows], reached the host.

        A slot with nothing in flight is passed over: its frame belonged to a stream that was stopped, and the new one
        has launched none. (Once the new stream has, the two cannot be told apart: name only streams that still live.)
        """
        slots = slots[self._launched[slots] > self._delivered[slots]]
        fresh = slots[~self._playing[slots]]
        if fresh.size:
            self._playing[fresh] = True
            self._origin[fresh] = now
            self._place(fresh)
        index = self._delivered[slots]
        self._delivered[slots] = index + 1
        self._in_flight -= slots.size
        self._frames += slots.size
        if self._full:
            paced = self._kind[slots] == REALTIME
            slots, index = slots[paced], index[paced]
        late = now - (self._origin[slots] + index * self._frame_seconds)
        if not late.size or late.max() <= LATE_EDGES[0]:
            self._histogram[0] += late.size
            return
        late[late <= LATE_EDGES[0]] = 0.0
        self._latest = max(self._latest, float(late.max()))
        self._lateness[slots] = np.maximum(self._lateness[slots], late)
        self._histogram += np.bincount(np.searchsorted(LATE_EDGES, late), minlength=len(self._histogram))

    def wake_at(self, now: float) -> float | None:
        """When `choose` next has something to run, if no event comes before: `now` if it has; None: only an event can.

        Events are start, stop, resume, delivered.
        """
        if self.choose(now).size:
            return now
        at = float(self._wake.min(initial=math.inf))
        if self._full and self._free.any():
            at = min(at, self._full_ran + STARVATION_FRAMES * self._frame_seconds)
        return at if at < math.inf else None

    # --- prompts ------------------------------------------------------------------------------------------------------

    def prefill_positions(self, now: float, planned: Sequence[int] = (), urgent: int = 0) -> int:
        """How many positions one more prefill pass of this tick may read; `planned` are those of its passes so far.

        The first pass gets at least the smallest prefill size, so that prompts always get on; a later one gets 0 when
        it would no longer fit. `urgent` are positions of what is being played and waits for its next sentence to be
        read: the first pass gets room for as many, also where what runs is late. Else those who wait would be late as
        well, ever more of them, with nothing to run on a device that is half idle. But for that, a tick's passes
        together take at most one frame period, so that a tick stays short, and at most `SPARE_SHARE` of what no running
        real-time stream would miss. No pass gets more than the largest size.
        Until a pass has been measured there is one a tick, of the largest size.
        """
        cost = self._prefill_cost
        if not cost.measured:
            return 0 if planned else cost.largest
        spare = SPARE_SHARE * self._spare(now, np.zeros(0, np.int64))
        budget = min(self._frame_seconds, spare) - sum(cost.of(positions) for positions in planned)
        fitting = int(np.searchsorted(cost.curve, budget, side="right"))
        least = 0 if planned else cost.size(min(max(urgent, 1), cost.largest))
        return max(least, int(cost.sizes[fitting - 1]) if fitting else 0)

    # --- measured times -----------------------------------------------------------------------------------------------

    def observe_frame(self, rows: int, seconds: float) -> None:
        """A tick of `rows` rows took so long on the device."""
        self._frame_cost.observe(rows, seconds)

    def observe_prefill(self, positions: int, seconds: float) -> None:
        """A prefill pass of `positions` positions took so long on the device."""
        self._prefill_cost.observe(positions, seconds)
        self._prefill_seconds += seconds

    def frame_estimate(self, rows: int) -> float:
        """Seconds to run `rows` rows once, in several ticks when they do not fit one; 0 before any measurement."""
        return self._frame_cost.of(rows)

    # --- admission ----------------------------------------------------------------------------------------------------

    def retry_after(self, now: float, lead_seconds: float | None, waiting: int = 0) -> float | None:
        """None: accept one more stream; otherwise after how many seconds it is worth asking again.

        `waiting` is how many real-time streams were accepted and have not started: their prompts wait. With them, the
        running and held ones and this one, a frame period must hold one frame of each (several ticks when they do not
        fit one) and the prefill work that real-time arrivals cost at the rate seen, within `headroom` of it. Accepts
        before any frame was measured, at full pace always, and the first real-time stream always: it makes nobody late.
        """
        self._advance(now)
        others = self._realtime + waiting
        if lead_seconds is None or others == 0 or not self._frame_cost.measured:
            return None
        # Full-pace prompts yield, so only the real-time share of the work counts; one more stream brings its part.
        share = self._realtime_starts / self._starts if self._starts > 0 else 0.0
        prefill_load = share * self._prefill_seconds / LOAD_SECONDS / others
        limit = self._config.headroom
        if self._frame_cost.of(others + 1) / self._frame_seconds + prefill_load * (others + 1) <= limit:
            return None
        streams = np.arange(1, others + 2)
        load = self._frame_cost.of_each(1, others + 1) / self._frame_seconds + prefill_load * streams
        excess = others + 1 - int(np.searchsorted(load, limit, side="right"))
        least, unknown, most = RETRY_SECONDS
        ends_per_second = self._realtime_stops / LOAD_SECONDS
        return min(max(excess / ends_per_second, least), most) if ends_per_second > 0 else unknown

    # --- what happened ------------------------------------------------------------------------------------------------

    @property
    def frames(self) -> int:
        """Frames delivered so far."""
        return self._frames

    def lateness(self, slot: int) -> float:
        """The most that a frame of the slot's stream was late, seconds; kept after its end, until the slot starts."""
        return float(self._lateness[slot])

    def plays_until(self, slot: int, now: float) -> float:
        """When a listener has played all that the slot's stream has been delivered; `now` if that has been."""
        if not self._playing[slot]:
            return now
        return max(now, float(self._origin[slot] + self._delivered[slot] * self._frame_seconds))

    def statistics(self) -> SchedulerStatistics:
        """Streams now, frames and lateness so far; percentiles are upper edges of the histogram's bins."""
        histogram = self._histogram.copy()  # others read while it grows
        total = int(histogram.sum())
        edges = np.concatenate(([0.0], LATE_EDGES[1:], [math.inf]))
        ranks = np.searchsorted(np.cumsum(histogram), [0.5 * total, 0.99 * total])
        middle, high = (min(float(edges[rank]), self._latest) for rank in ranks)
        return SchedulerStatistics(
            running_realtime=int(self._paced.sum()),
            running_full=int(self._free.sum()),
            held=int(self._held.sum()),
            frames=self._frames,
            realtime_frames=total,
            late_frames=total - int(histogram[0]),
            lateness_p50=middle,
            lateness_p99=high,
            lateness_max=self._latest,
        )

    # --- inside -------------------------------------------------------------------------------------------------------

    def _release(self, slot: int, now: float) -> None:
        """Let a stream run, its clock not yet started."""
        self._origin[slot] = now
        if self._kind[slot] == FULL:
            if not self._free.any():
                self._full_ran = now
            self._free[slot] = True
        else:
            self._paced[slot] = True
            self._place(np.array([slot]))

    def _queue(self, slots: Slots) -> None:
        """Put full-pace streams at the end of their queue, in the order they have in it."""
        self._turn[slots[np.argsort(self._turn[slots], kind="stable")]] = self._last_turn + 1 + np.arange(slots.size)
        self._last_turn += slots.size

    def _place(self, slots: Slots) -> None:
        """Set when the next frame of these slots is due and may run."""
        ahead = self._launched[slots] * self._frame_seconds
        lead = self._lead[slots]
        due = self._origin[slots] + ahead
        wake = due - lead
        standing = ~self._playing[slots]
        if standing.any():
            wake[standing] = np.where(ahead[standing] <= lead[standing], -math.inf, math.inf)
        outside = ~self._paced[slots]
        if outside.any():
            due[outside] = wake[outside] = math.inf
        self._due[slots] = due
        self._wake[slots] = wake

    def _rows_beside(self, now: float, paced: Slots, waiting: int, starved: int) -> int:
        """The captured size to fill when `waiting` full-pace streams could join the rows in `paced`."""
        cost = self._frame_cost
        base = cost.size(paced.size + starved)
        wanted = cost.size(min(paced.size + waiting, cost.largest))
        if wanted <= base:
            return base
        allowed = cost.of(paced.size) + SPARE_SHARE * self._spare(now, paced)
        fitting = int(np.searchsorted(cost.curve, allowed, side="right"))
        return max(base, min(wanted, int(cost.sizes[fitting - 1]) if fitting else 0))

    def _spare(self, now: float, batch: Slots) -> float:
        """Seconds that could be lost before `batch` (real-time slots) runs, and then all others, with no frame late.

        Frames in flight run first, then the batch, then the next frame of every stream that has launched one, in order
        of deadline: the k-th is there when the device has run k more rows, and not before the next tick ends, with all
        that may run by then. Where the first frame is still to come, the clock starts when what is in flight, or the
        batch, is done. A stream that has launched nothing goes before all and has no deadline to miss. Infinite when no
        real-time stream has launched anything.
        """
        cost = self._frame_cost
        flown = now + cost.of(self._in_flight)
        done = flown + cost.of(batch.size)
        due = np.where(self._playing, self._due, flown + self._launched * self._frame_seconds)
        begun = self._paced & (self._launched > 0)
        first = float(due[batch[begun[batch]]].min(initial=math.inf))
        due[batch] = np.where(begun[batch], due[batch], done) + self._frame_seconds
        begun[batch] = True
        order = np.sort(due[begun])
        if not order.size:
            return math.inf
        ahead = int(np.count_nonzero(self._paced)) - order.size
        together = min(int(np.count_nonzero(self._wake <= done)) - batch.size, cost.largest)
        seconds = np.maximum(cost.of_each(ahead + 1, ahead + order.size), cost.of(max(together, 0)))
        return min(first, float((order - seconds).min())) - done

    def _advance(self, now: float) -> None:
        """Let the rates fade."""
        if self._now is not None and now > self._now:
            fade = math.exp((self._now - now) / LOAD_SECONDS)
            self._prefill_seconds *= fade
            self._starts *= fade
            self._realtime_starts *= fade
            self._realtime_stops *= fade
        self._now = now if self._now is None else max(now, self._now)


def _first(slots: Slots, key: npt.NDArray[np.generic], count: int) -> Slots:
    """The `count` slots of least `key[slot]`, ties by slot; `slots` and the result ascend."""
    if slots.size <= count:
        return slots
    if count <= 0:
        return slots[:0]
    keys = key[slots]
    bound = np.partition(keys, count - 1)[count - 1]
    taken = keys < bound
    taken[np.flatnonzero(keys == bound)[: count - np.count_nonzero(taken)]] = True
    return slots[taken]
