"""Memory that threads share: a program's own, and tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .order import ONE, Accesses, Atomic, Clocks, Fault, Watch

Array = Any


def _nearly_equal(ours: Array, theirs: Array) -> bool:
    """Whether two arrays of bits are the same, or numbers that differ as sums in another order do.

    Threads that share a sum may have it in different roundings: what one adds to its product, another has rounded.
    """
    if np.array_equal(ours, theirs):
        return True
    if ours.dtype == np.uint32:
        numbers = ours.view(np.float32), theirs.view(np.float32)
        subnormal = sum((x != 0) & (np.abs(x) < np.finfo(np.float32).tiny) for x in numbers) > 0  # integers, rather
        return bool(
            np.where(subnormal, ours == theirs, np.isclose(*numbers, rtol=1e-3, atol=1e-5, equal_nan=True)).all()
        )
    apart = ours.astype(np.int64) - theirs.astype(np.int64)  # neighbours, of numbers of 16 bits
    return ours.dtype == np.uint16 and bool((np.abs(apart) <= 1).all())


@dataclass
class Region:
    """Bytes that lie side by side, from `start` on."""

    name: str
    start: int
    data: Array  # uint8
    clocks: Clocks
    watch: Watch | None = None  # made at the first write: reads alone need no order
    reads: list[Accesses] = field(default_factory=list)  # until then
    atomics: dict[int, dict[int, Atomic]] = field(default_factory=dict)  # by offset and program

    def load(self, lanes: Array, addresses: Array, element: Any, count: int, together: int = ONE) -> Array:
        """Read `count` elements side by side for each thread -> [threads, count]."""
        offsets = self.offsets(addresses, element, count)
        accesses = Accesses.now(lanes, offsets, element.itemsize * count, self.clocks, together)
        self._behind_atomics(accesses)
        if self.watch is not None:
            self.watch.read(accesses)
        else:
            self.reads.append(accesses)
        return self._elements(offsets, element, count)

    def store(self, lanes: Array, addresses: Array, values: Array, together: int = ONE) -> None:
        """Write values [threads, count]."""
        element, count = values.dtype, values.shape[1]
        offsets = self.offsets(addresses, element, count)
        accesses = Accesses.now(lanes, offsets, element.itemsize * count, self.clocks, together)
        self._behind_atomics(accesses)
        self.watched().write(accesses)
        places = offsets[:, None] // element.itemsize + np.arange(count)
        view = self.data.view(element)
        # Where several write to one place, any of them may be the last.
        order = self.clocks.generator.permutation(len(lanes))
        view[places[order]] = values[order]
        if not _nearly_equal(view[places], values):
            raise Fault("several threads write different values to one place")

    def add_atomically(self, lane: int, address: int, value: Array, *, ordered: bool) -> Array:
        """Add for one thread -> what was there; `ordered`: it releases and acquires."""
        lanes, addresses = np.array([lane]), np.array([address])
        offsets = self.offsets(addresses, value.dtype, 1)
        if ordered:
            self.clocks.acquire_release(lane, address)
        self.watched().add_atomically(Accesses.now(lanes, offsets, value.dtype.itemsize, self.clocks))
        program = lane // self.clocks.threads
        atomic = Atomic(lane, int(self.clocks.of_program[program]), value.dtype.itemsize, ordered)
        earlier = self.atomics.setdefault(int(offsets[0]), {}).get(program)
        if earlier is not None and not self.clocks.after_atomic(program, earlier, lanes).all():
            atomic = Atomic(-1, atomic.time, max(atomic.size, earlier.size), releases=False)
        self.atomics[int(offsets[0])][program] = atomic
        view, place = self.data.view(value.dtype), offsets[0] // value.dtype.itemsize
        old = view[place]
        view[place] = old + value
        return old

    def _behind_atomics(self, accesses: Accesses) -> None:
        """A plain access comes after every atomic operation at its place, or there is none."""
        for place, by_program in self.atomics.items():
            for program, atomic in by_program.items():
                there = (accesses.offsets < place + atomic.size) & (place < accesses.offsets + accesses.size)
                if not self.clocks.after_atomic(program, atomic, accesses.lanes[there]).all():
                    raise Fault("touches a place beside another thread's atomic operation, with nothing between them")

    def watched(self) -> Watch:
        """Its watch, from now on if there was none."""
        if self.watch is None:
            self.watch = Watch(len(self.data), self.clocks)
            for reads in self.reads:
                self.watch.note_reads(reads)
            self.reads = []
        return self.watch

    def offsets(self, addresses: Array, element: Any, count: int) -> Array:
        """Where addresses lie in it; they must be aligned to what is accessed there."""
        offsets = addresses.astype(np.int64) - self.start
        size = element.itemsize * count
        if ((addresses % size) != 0).any():
            raise Fault(f"touches {size} bytes of {self.name} at an address that is no multiple of them")
        if ((offsets < 0) | (offsets + size > len(self.data))).any():
            raise Fault(f"touches memory outside of {self.name}")
        return offsets

    def _elements(self, offsets: Array, element: Any, count: int) -> Array:
        return self.data.view(element)[offsets[:, None] // element.itemsize + np.arange(count)]


class Global:
    """The tensors that a launch was given; whatever else is touched is a fault."""

    def __init__(self, tensors: Sequence[tuple[str, torch.Tensor]], clocks: Clocks) -> None:
        regions = {}
        for name, tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                regions.setdefault(storage.data_ptr(), Region(name, storage.data_ptr(), whole.numpy(), clocks))
        self.regions = [regions[start] for start in sorted(regions)]
        self.starts = np.array([region.start for region in self.regions], np.int64)

    def parts(self, addresses: Array) -> Iterator[tuple[Region, Array]]:
        """The regions that these addresses lie in, and which of them lie there."""
        found = np.searchsorted(self.starts, addresses.astype(np.int64), "right") - 1
        for index in np.unique(found):
            if index < 0:
                raise Fault("touches memory outside of every tensor")
            yield self.regions[index], np.flatnonzero(found == index)
