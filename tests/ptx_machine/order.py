"""Which access to memory comes before which: what is between two threads that touch one place.

Two accesses of one place, one of them a write, need an order: one thread's own, a barrier of the program, a barrier of
the warp, or, between programs, an atomic operation that releases behind a barrier and one that acquires. Without, a
GPU may run them either way round, and what this machine happens to do first proves nothing.

Time is counted in each program by its barriers, and in each warp by all that it waits at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any

GRANULE = 16
"""Bytes that are watched as one place, until an access is smaller. Accesses are aligned to their size."""
NOBODY, ONE, WARP, PROGRAM, SEVERAL = range(5)  # who touched a place


class Fault(Exception):
    """What a GPU would leave undefined."""


class Clocks:
    """How far each program and each warp is; `generator` is for what nobody may rely on."""

    def __init__(self, programs: int, threads: int, generator: np.random.Generator) -> None:
        self.threads, self.generator = threads, generator
        self.of_program = np.zeros(programs, np.int32)
        self.of_warp = np.zeros(programs * threads // 32, np.int32)
        # By the program that knows and the one that is known about: its time from which on it is not known, the own
        # time when that was learnt, and the thread that did.
        self.known = np.zeros((programs, programs), np.int32)
        self.learnt = np.zeros((programs, programs), np.int32)
        self.learner = np.full((programs, programs), -1, np.int32)
        self.released: dict[int, Array] = {}  # by an atomic's place: what one who acquires there knows

    def program(self, lanes: Array) -> Array:
        """The program that a thread belongs to."""
        return lanes // self.threads

    def barrier(self, program: int) -> None:
        """All threads of a program have met."""
        self.of_program[program] += 1
        warps = self.threads // 32
        self.of_warp[program * warps : (program + 1) * warps] += 1

    def warp_barrier(self, warps: Array) -> None:
        """All threads of these warps have met."""
        self.of_warp[warps] += 1

    def acquire_release(self, lane: int, place: int) -> None:
        """A thread's atomic operation: it learns what others left there, and leaves what it knows."""
        program = lane // self.threads
        left = self.released.setdefault(place, np.zeros(len(self.known), np.int32))
        news = left > self.known[program]
        self.known[program][news] = left[news]
        self.learnt[program][news] = self.of_program[program]
        self.learner[program][news] = lane
        # What another thread of the program has learnt is this one's behind a barrier.
        own = (self.learner[program] == lane) | (self.learnt[program] < self.of_program[program])
        knows = np.maximum(left, np.where(own, self.known[program], 0))
        knows[program] = self.of_program[program]
        self.released[place] = knows

    def after_atomic(self, then: int, atomic: Atomic, now: Array) -> Array:
        """Whether what threads `now` do comes after an atomic operation of program `then`."""
        current = self.program(now)
        known, learner = self.known[current, then], self.learner[current, then]
        # One that releases is heard of by who acquires what it leaves; another, from behind a barrier.
        heard = (known >= atomic.time if atomic.releases else known > atomic.time) & (learner >= 0)
        heard &= (learner == now) | (self.learnt[current, then] < self.of_program[current])
        here = (atomic.lane == now) | (atomic.time < self.of_program[current])
        return np.where(then == current, here, heard)

    def times(self, lanes: Array) -> tuple[Array, Array]:
        """The time of each thread's program and of its warp."""
        return self.of_program[self.program(lanes)], self.of_warp[lanes // 32]

    def before(self, who: Array, lane: Array, time: Array, warp_time: Array, now: Array, together: int) -> Array:
        """Whether accesses by `who`, of which `lane` is one, at these times, come before what threads `now` do.

        `together`: ONE where each does it for itself, WARP or PROGRAM where it is all of them that do.
        """
        then, current = self.program(lane), self.program(now)
        here = then == current
        met = here & (who <= PROGRAM) & (time < self.of_program[current])
        warp_met = (
            (max(together, ONE) <= WARP)
            & (who <= WARP)
            & (lane // 32 == now // 32)
            & (warp_time < self.of_warp[now // 32])
        )
        own = (together == ONE) & (who <= ONE) & (lane == now)
        heard = ~here & (who <= PROGRAM) & (self.known[current, then] > time)
        if heard.any():  # by the thread that learnt, and, behind a barrier, by the others
            heard &= (self.learner[current, then] == now) | (self.learnt[current, then] < self.of_program[current])
        return (who == NOBODY) | met | warp_met | own | heard


@dataclass(frozen=True)
class Atomic:
    """A program's last atomic operation at a place."""

    lane: int  # -1: several threads', with nothing between them
    time: int
    size: int
    releases: bool


@dataclass
class Touched:
    """The last accesses of one kind, by place."""

    who: Array
    lane: Array
    time: Array
    warp_time: Array

    @classmethod
    def none(cls, places: int) -> Touched:
        """Nobody has been there."""
        return cls(np.zeros(places, np.int8), *(np.zeros(places, np.int32) for _ in range(3)))

    def finer(self, times: int) -> Touched:
        """The same for places of which this many were one."""
        return Touched(*(np.repeat(column, times) for column in (self.who, self.lane, self.time, self.warp_time)))

    def at(self, places: Array) -> tuple[Array, Array, Array, Array]:
        """What `Clocks.before` takes, of these places."""
        return self.who[places], self.lane[places], self.time[places], self.warp_time[places]


@dataclass(frozen=True)
class Accesses:
    """Threads that read or write `size` bytes each: where, and when."""

    lanes: Array
    offsets: Array
    size: int
    time: Array
    warp_time: Array
    together: int = ONE  # WARP, PROGRAM: what one thread stands for, others of these do with it

    @classmethod
    def now(cls, lanes: Array, offsets: Array, size: int, clocks: Clocks, together: int = ONE) -> Accesses:
        """At the threads' times."""
        return cls(lanes, offsets, size, *clocks.times(lanes), together)


class Watch:
    """Watches one memory: `size` bytes that threads share."""

    def __init__(self, size: int, clocks: Clocks) -> None:
        self.granule = GRANULE
        places = -(-size // GRANULE)
        self.clocks = clocks
        self.reads, self.writes = Touched.none(places), Touched.none(places)
        self.under_way = np.zeros(places, bool)  # where a copy goes that is not waited for yet
        self.being_read = np.zeros(places, bool)  # by a product that is not waited for yet

    def read(self, accesses: Accesses) -> None:
        """Threads read."""
        lanes, places, _ = self._spread(accesses)
        self._nothing_under_way(places)
        if not self.clocks.before(*self.writes.at(places), lanes, accesses.together).all():
            raise Fault("reads what another thread wrote, with nothing between them")
        self.note_reads(accesses)

    def note_reads(self, accesses: Accesses) -> None:
        """Remember reads, and beside them those before that nothing orders."""
        lanes, places, times = self._spread(accesses)
        earlier = self.reads.at(places)
        beside = ~self.clocks.before(*earlier, lanes, accesses.together)
        who = np.where(beside, np.maximum(earlier[0], self._together(earlier[1], lanes)), ONE)
        self._note(self.reads, lanes, places, times, np.maximum(who, accesses.together))

    def keep_reading(self, accesses: Accesses) -> None:
        """Threads go on with what they read until it is waited for."""
        self.being_read[self._spread(accesses)[1]] = True

    def end_read(self, accesses: Accesses) -> None:
        """Threads have waited for what they read."""
        self.note_reads(accesses)
        self.being_read[self._spread(accesses)[1]] = False

    def written(self, accesses: Accesses) -> bool:
        """Whether all that is accessed has been written."""
        return bool((self.writes.who[self._spread(accesses)[1]] != NOBODY).all())

    def write(self, accesses: Accesses) -> None:
        """Threads write; those that write one place at once write the same."""
        lanes, places, times = self._spread(accesses)
        self._nothing_under_way(places)
        self._may_write(lanes, places, accesses.together)
        self._note(self.writes, lanes, places, times, accesses.together)

    def begin_copy(self, accesses: Accesses) -> None:
        """Threads have begun copies; they may land at any time until they are waited for."""
        lanes, places, _ = self._spread(accesses)
        self._nothing_under_way(places)
        self._may_write(lanes, places, ONE)
        self.under_way[places] = True

    def end_copy(self, accesses: Accesses) -> None:
        """Threads have waited for their copies."""
        lanes, places, times = self._spread(accesses)
        self.under_way[places] = False
        self._note(self.writes, lanes, places, times, ONE)

    def add_atomically(self, accesses: Accesses) -> None:
        """A thread's atomic operation, which may meet others of its kind, and no plain access."""
        lanes, places, _ = self._spread(accesses)
        self._nothing_under_way(places)
        self._may_write(lanes, places, ONE)

    def _nothing_under_way(self, places: Array) -> None:
        if self.under_way[places].any():
            raise Fault("touches a place to which a copy is under way")

    def _may_write(self, lanes: Array, places: Array, together: int) -> None:
        if self.being_read[places].any():
            raise Fault("writes what a product reads that is not waited for")
        if not self.clocks.before(*self.writes.at(places), lanes, together).all():
            raise Fault("writes where another thread wrote, with nothing between them")
        if not self.clocks.before(*self.reads.at(places), lanes, together).all():
            raise Fault("writes where another thread reads, with nothing between them")

    def _note(
        self, touched: Touched, lanes: Array, places: Array, times: tuple[Array, Array], who: Array | int
    ) -> None:
        """Several threads may be at one place: one is remembered, and how far from it the others are."""
        touched.who[places] = NOBODY
        touched.lane[places] = lanes
        np.maximum.at(touched.who, places, np.maximum(who, self._together(touched.lane[places], lanes)).astype(np.int8))
        touched.time[places], touched.warp_time[places] = times

    def _together(self, one: Array, other: Array) -> Array:
        """The least of ONE, WARP, PROGRAM, SEVERAL that has both threads in it."""
        same_program = self.clocks.program(one) == self.clocks.program(other)
        wider = np.where(one // 32 == other // 32, WARP, np.where(same_program, PROGRAM, SEVERAL))
        return np.where(one == other, ONE, wider).astype(np.int8)

    def _spread(self, accesses: Accesses) -> tuple[Array, Array, tuple[Array, Array]]:
        """Threads, places and times, one entry for each granule of each access."""
        if accesses.size < self.granule:
            times = self.granule // accesses.size
            self.reads, self.writes = self.reads.finer(times), self.writes.finer(times)
            self.under_way, self.being_read = np.repeat(self.under_way, times), np.repeat(self.being_read, times)
            self.granule = accesses.size
        each = accesses.size // self.granule
        places = (accesses.offsets.astype(np.int64)[:, None] // self.granule + np.arange(each)).reshape(-1)
        columns = (accesses.lanes, accesses.time, accesses.warp_time)
        lanes, time, warp_time = columns if each == 1 else (np.repeat(column, each) for column in columns)
        return lanes, places, (time, warp_time)
