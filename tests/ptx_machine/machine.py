"""The machine: the threads of all programs of a launch, side by side.

All threads that are at one instruction run it at once; of several groups of threads, the one goes on that is the least
far in the text, so that what a branch has taken apart comes together again behind it. A register is an array over
threads, or one number where all have the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from .arithmetic import STORED, TYPES, operation
from .instructions import HANDLERS, REGISTERS, Copy
from .memory import Global, Region
from .order import ONE, Accesses, Clocks, Fault
from .program import Address, Instruction, Name, Number, Operand, Program, Register
from .warp import whole_warps
from .warp_group import Product

Array = Any


class Machine:
    """One launch of a program."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        shared_bytes: int,
        parameters: Sequence[Any],
        tensors: Sequence[tuple[str, torch.Tensor]],
        generator: np.random.Generator,
    ) -> None:
        """`parameters`: a NumPy number for each of the program's."""
        self.program = program
        self.parameters = dict(zip(program.parameters, parameters, strict=True))
        self.programs = int(np.prod(grid))
        self.everybody = np.arange(self.programs * program.threads)
        clocks = Clocks(self.programs, program.threads, generator)
        self.clocks = clocks
        self.tensors = Global(tensors, clocks)
        # Each program has its own; they stand side by side here, filled with what nobody should read.
        self.shared_bytes = -(-shared_bytes // 16) * 16
        self.shared = Region("shared memory", 0, np.full(self.programs * self.shared_bytes, 0xFF, np.uint8), clocks)
        place, index = self.everybody % program.threads, self.everybody // program.threads
        numbers = {"%tid.x": place, "%tid.y": 0 * place, "%tid.z": 0 * place, "%laneid": place % 32}
        for axis, size in zip("xyz", grid, strict=True):
            numbers[f"%ctaid.{axis}"], index = index % size, index // size
            numbers[f"%nctaid.{axis}"] = np.full_like(place, size)
        numbers["%ntid.x"] = np.full_like(place, program.threads)
        self.registers: dict[str, Array] = {name: value.astype(np.uint32) for name, value in numbers.items()}
        self.copies: list[Copy] = []
        self.products: list[Product] = []
        # Of copies and of products, the groups that each thread has committed.
        self.groups_begun, self.batches_begun = (np.zeros(len(self.everybody), np.int64) for _ in range(2))
        self.waited = np.zeros(len(self.everybody), bool)
        self.programmatic = any(i.opcode == "griddepcontrol.wait" for i in program.instructions)
        # Which bytes of tensors were written, and which were read before the wait for the kernel before.
        self.written: list[tuple[Region, Array, int]] = []
        self.read_early: list[tuple[Region, Array, int]] = []

    # --- registers ----------------------------------------------------------------------------------------------------

    def get(self, operand: Operand, kind: str, lanes: Array | None) -> Array:
        """An operand's bits: an array over `lanes`, or one number."""
        if isinstance(operand, Register):
            if self._is_under_way(operand, lanes):
                raise Fault(f"reads {operand.name}, which a product under way adds to")
            try:
                value = self.registers[operand.name]
            except KeyError:
                raise Fault(f"reads {operand.name}, to which nothing was written") from None
            value = value if lanes is None or value.ndim == 0 else value[lanes]
            return value.astype(np.uint32) if kind == "u32" and value.dtype == np.uint16 else value
        if isinstance(operand, Number):
            if kind == "pred":
                return np.bool_(operand.bits != 0)
            size = 2 if kind == "bf16" else np.dtype(TYPES[kind]).itemsize
            return STORED[size].type(operand.bits & ((1 << 8 * size) - 1))
        if isinstance(operand, Name) and operand.text == "global_smem":
            return np.uint32(0)
        raise Fault(f"has an operand that is not known here: {operand}")

    def _is_under_way(self, register: Register, lanes: Array | None) -> bool:
        lanes = self.everybody if lanes is None else lanes
        return any(product.is_under_way(register.name, lanes) for product in self.products)

    def every(self, operand: Operand, kind: str, lanes: Array | None) -> Array:
        """As `get`, always an array over `lanes`."""
        value = self.get(operand, kind, lanes)
        return np.broadcast_to(value, self.count(lanes)) if value.ndim == 0 else value

    def set(self, register: Operand, value: Array, lanes: Array | None) -> None:
        """Write a register's bits."""
        assert isinstance(register, Register)
        assert np.shape(value) in ((), (self.count(lanes),))
        if register.name == "_":
            return
        if self._is_under_way(register, lanes):
            raise Fault(f"writes {register.name}, which a product under way adds to")
        dtype = REGISTERS.get(register.name.rstrip("0123456789"), value.dtype)  # some have a name, for a few lines
        if lanes is None:
            self.registers[register.name] = value.astype(dtype)
            return
        old = self.registers.get(register.name)
        if old is None or old.ndim == 0:
            # What other threads have in it is nothing to rely on.
            anything = self.clocks.generator.integers(0, 256, len(self.everybody) * dtype.itemsize, np.uint8)
            anything = anything > 127 if dtype.kind == "b" else anything.view(dtype)
            old = anything if old is None else np.full(len(self.everybody), old)
            self.registers[register.name] = old
        old[lanes] = value

    def anything(self, dtype: Any) -> Array:
        """A number that nobody may rely on."""
        return self.clocks.generator.integers(np.iinfo(dtype).max, dtype=dtype, endpoint=True)

    def count(self, lanes: Array | None) -> int:
        """How many threads."""
        return len(self.everybody) if lanes is None else len(lanes)

    # --- memory -------------------------------------------------------------------------------------------------------

    def address(self, address: Address, lanes: Array | None) -> Array:
        """Where an operand points, for each thread."""
        start = self.every(address.base, "b64", lanes)
        return start.astype(np.int64) + address.offset

    def in_shared(self, lanes: Array, addresses: Array, size: int) -> Array:
        """Where addresses of shared memory lie among those of all programs; raises a `Fault` outside of the own."""
        if ((addresses < 0) | (addresses + size > self.shared_bytes)).any():
            raise Fault("touches shared memory outside of the program's own")
        return addresses + self.clocks.program(lanes) * self.shared_bytes

    def load_shared(self, lanes: Array, addresses: Array, element: Any, count: int, together: int = ONE) -> Array:
        """Read shared memory -> [threads, count]."""
        addresses = self.in_shared(lanes, addresses, element.itemsize * count)
        watch, offsets = self.shared.watched(), self.shared.offsets(addresses, element, count)
        values = self.shared.load(lanes, addresses, element, count, together)
        if not watch.written(Accesses.now(lanes, offsets, element.itemsize * count, self.clocks)):
            raise Fault("reads shared memory that nothing was written to")
        return values

    def store_shared(self, lanes: Array, addresses: Array, values: Array, together: int = ONE) -> None:
        """Write values [threads, count] to shared memory."""
        addresses = self.in_shared(lanes, addresses, values.dtype.itemsize * values.shape[1])
        self.shared.store(lanes, addresses, values, together)

    def load_global(self, lanes: Array, addresses: Array, element: Any, count: int) -> Array:
        """Read tensors -> [threads, count]."""
        result = np.empty((len(lanes), count), element)
        for region, part in self.tensors.parts(addresses):
            result[part] = region.load(lanes[part], addresses[part], element, count)
            early = part[~self.waited[lanes[part]]] if self.programmatic else part[:0]
            if len(early):
                self.read_early.append((region, addresses[early] - region.start, element.itemsize * count))
        return result

    def store_global(self, lanes: Array, addresses: Array, values: Array) -> None:
        """Write values [threads, count] to tensors."""
        self._has_waited(lanes)
        for region, part in self.tensors.parts(addresses):
            region.store(lanes[part], addresses[part], values[part])
            self.written.append((region, addresses[part] - region.start, values.dtype.itemsize * values.shape[1]))

    def add_atomically(self, lane: int, address: int, value: Array, meaning: str) -> Array:
        """One thread adds to a number; "acq_rel" releases what its program has written, acquires what others have."""
        self._has_waited(np.array([lane]))
        ((region, _),) = self.tensors.parts(np.array([address]))
        self.written.append((region, np.array([address - region.start]), value.dtype.itemsize))
        return region.add_atomically(lane, address, value, ordered=meaning == "acq_rel")

    def _has_waited(self, lanes: Array) -> None:
        if self.programmatic and not self.waited[lanes].all():
            raise Fault("writes to a tensor before the wait for the kernel before")

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run all threads to their end.

        Raises:
            Fault: one of them does what a GPU leaves undefined; the message says where.
        """
        groups: dict[int, Array] = {0: self.everybody}
        parked: dict[int, Array] = {}
        alive = np.full(self.programs, self.program.threads)
        with np.errstate(all="ignore"):
            while groups:
                place = min(groups)
                lanes = groups.pop(place)
                following = min(groups, default=len(self.program.instructions) + 1)
                for next_place, some in self._run_until(place, following, lanes, parked, alive):
                    groups[next_place] = _merged(groups.get(next_place), some)
                for next_place, some in self._released(parked, alive):
                    groups[next_place] = _merged(groups.get(next_place), some)
        if parked:
            raise Fault(f"threads wait for ever at {self.program.instructions[min(parked) - 1]}")

    def _run_until(
        self, place: int, following: int, lanes: Array, parked: dict[int, Array], alive: Array
    ) -> list[tuple[int, Array]]:
        """Run threads from one place until they part, wait, end, or come where others are -> where they go on."""
        whole = len(lanes) == len(self.everybody)
        while place != following:
            instruction = self.program.instructions[place]
            active = None if whole else lanes
            try:
                if instruction.guard is not None:
                    holds = self.every(instruction.guard, "pred", active)
                    holds = ~holds if instruction.unless else holds
                    if instruction.opcode in ("bra", "bra.uni"):
                        return self._parted(instruction, place, lanes, holds)
                    if not holds.all():
                        active = lanes[holds]
                if instruction.opcode in ("bra", "bra.uni"):
                    target = instruction.operands[0]
                    assert isinstance(target, Name)
                    return [(self.program.labels[target.text], lanes)]
                if instruction.opcode == "ret" and instruction.guard is not None:
                    raise Fault("an end of some threads is not known here")
                if instruction.opcode == "ret":
                    np.subtract.at(alive, self.clocks.program(lanes), 1)
                    return []
                if instruction.opcode == "bar.sync":
                    if instruction.operands != (Number(0),) or instruction.guard is not None:
                        raise Fault("a barrier of some threads is not known here")
                    whole_warps(self, active)
                    parked[place + 1] = _merged(parked.get(place + 1), lanes)
                    return []
                if active is None or len(active):
                    _handler(instruction)(self, instruction, active)
            except Fault as fault:
                raise Fault(f"{fault}: {instruction}") from None
            place += 1
        return [(place, lanes)]

    def _parted(self, instruction: Instruction, place: int, lanes: Array, holds: Array) -> list[tuple[int, Array]]:
        target = instruction.operands[0]
        assert isinstance(target, Name)
        sides = ((self.program.labels[target.text], lanes[holds]), (place + 1, lanes[~holds]))
        return [(where, some) for where, some in sides if len(some)]

    def _released(self, parked: dict[int, Array], alive: Array) -> list[tuple[int, Array]]:
        """Threads at barriers that all of their program have come to."""
        released = []
        for place, lanes in list(parked.items()):
            program = self.clocks.program(lanes)
            complete = np.bincount(program, minlength=self.programs) == alive
            complete &= alive > 0
            if complete.any():
                goes = complete[program]
                for index in np.flatnonzero(complete):
                    self.clocks.barrier(index)
                released.append((place, lanes[goes]))
                if goes.all():
                    del parked[place]
                else:
                    parked[place] = lanes[~goes]
        return released


def _merged(one: Array | None, other: Array) -> Array:
    return other if one is None else np.sort(np.concatenate([one, other]))


@cache
def _handler(instruction: Instruction) -> Callable[[Machine, Instruction, Array | None], None]:
    """What runs an instruction.

    Raises:
        Fault: nothing here does.
    """
    for beginning, handler in HANDLERS.items():
        if instruction.opcode.startswith(beginning):
            return handler
    try:
        kinds, compute = operation(instruction.opcode)
    except KeyError:
        raise Fault("an instruction that is not known here") from None
    target, *sources = instruction.operands
    if len(sources) != len(kinds):
        raise Fault("an instruction with operands that are not known here")

    def run(machine: Machine, _: Instruction, lanes: Array | None) -> None:
        values = (machine.get(source, kind, lanes) for source, kind in zip(sources, kinds, strict=True))
        machine.set(target, compute(*values), lanes)

    return run
