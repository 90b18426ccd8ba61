"""Instructions that are more than arithmetic: moves, loads, stores, atomic operations, copies, waits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import warp, warp_group
from .arithmetic import STORED, TYPES
from .order import Accesses, Fault
from .program import Address, Instruction, Name, Number, Operand, Register, Vector

if TYPE_CHECKING:
    from .machine import Machine

Array = Any
REGISTERS = {"%p": np.dtype(bool), "%rs": STORED[2], "%r": STORED[4], "%rd": STORED[8]}
"""What a register keeps, by how its name begins."""


@dataclass
class Copy:
    """Copies from tensors to shared memory (cp.async) that one instruction has begun."""

    lanes: Array
    addresses: Array
    data: Array  # [threads, bytes]
    group: Array  # of each thread's, the how manyth
    landed: Array


def _move(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """mov: a copy, or numbers joined to a longer one, or a longer one taken apart."""
    target, source = instruction.operands
    kind = instruction.opcode.split(".")[1]
    if isinstance(target, Vector):
        width = 8 * np.dtype(TYPES[kind]).itemsize // len(target.registers)
        value = machine.get(source, kind, lanes)
        for index, register in enumerate(target.registers):
            part = value >> value.dtype.type(width * index)
            machine.set(register, part.astype(STORED[width // 8]), lanes)
    elif isinstance(source, Vector):
        stored = STORED[np.dtype(TYPES[kind]).itemsize]
        width = 8 * stored.itemsize // len(source.registers)
        total = stored.type(0)
        for index, register in enumerate(source.registers):
            # Compilers join what they have with what nobody will look at: anything, then.
            known = not isinstance(register, Register) or register.name in machine.registers
            part = machine.get(register, f"b{width}", lanes) if known else machine.anything(STORED[width // 8])
            total = total | (part.astype(stored) << stored.type(width * index))
        machine.set(target, total, lanes)
    else:
        machine.set(target, machine.get(source, kind, lanes), lanes)


def _parameter(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """ld.param."""
    target, address = instruction.operands
    assert isinstance(address, Address)
    assert isinstance(address.base, Name)
    assert address.offset == 0
    value = machine.parameters[address.base.text]
    kind = np.dtype(TYPES[instruction.opcode.split(".")[-1]])
    if value.dtype.itemsize != kind.itemsize:
        raise Fault("reads a parameter of another size")
    machine.set(target, _widened(target, value.view(kind)), lanes)


def _widened(register: Operand, value: Array) -> Array:
    """What was read, as long as the register it goes to; a signed number keeps its sign."""
    assert isinstance(register, Register)
    stored = REGISTERS.get(register.name.rstrip("0123456789"), STORED[value.dtype.itemsize])
    return value.view(STORED[value.dtype.itemsize]) if value.dtype.kind == "f" else value.astype(stored)


def _access(opcode: str) -> tuple[str, Any, int]:
    """The space, the elements' type and number of a load or store."""
    parts = opcode.split(".")
    count = next((int(part[1:]) for part in parts if part in ("v2", "v4", "v8")), 1)
    if parts[1] not in ("global", "shared") or not set(parts[2:-1]) <= {"v2", "v4", "v8", "cg", "ca"}:
        raise Fault("an access that is not known here")
    return parts[1], STORED[np.dtype(TYPES[parts[-1]]).itemsize], count


def _load(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """ld.global, ld.shared."""
    target, address = instruction.operands
    assert isinstance(address, Address)
    space, element, count = _access(instruction.opcode)
    load = machine.load_shared if space == "shared" else machine.load_global
    who = machine.everybody if lanes is None else lanes
    values = load(who, machine.address(address, lanes), element, count)
    registers = target.registers if isinstance(target, Vector) else (target,)
    kind = TYPES[instruction.opcode.split(".")[-1]]
    for index, register in enumerate(registers):
        machine.set(register, _widened(register, values[:, index].view(kind)), lanes)


def _store(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """st.global, st.shared."""
    address, source = instruction.operands
    assert isinstance(address, Address)
    space, element, count = _access(instruction.opcode)
    registers = source.registers if isinstance(source, Vector) else (source,)
    kind = f"b{8 * element.itemsize}"
    values = np.stack([machine.every(register, kind, lanes) for register in registers], 1)
    assert values.shape[1] == count
    store = machine.store_shared if space == "shared" else machine.store_global
    who = machine.everybody if lanes is None else lanes
    store(who, machine.address(address, lanes), np.ascontiguousarray(values, element))


def _atomic(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """atom.add, one thread after another, in an order that nobody may rely on."""
    kind = re.fullmatch(r"atom\.global\.gpu\.(relaxed|acq_rel)\.add\.([us](32|64))", instruction.opcode)
    if kind is None:
        raise Fault("an atomic operation that is not known here")
    target, address, value = instruction.operands
    assert isinstance(address, Address)
    who = machine.everybody if lanes is None else lanes
    addresses, values = machine.address(address, lanes), machine.every(value, kind[2], lanes)
    result = np.zeros_like(values)
    for index in machine.clocks.generator.permutation(len(who)):
        result[index] = machine.add_atomically(int(who[index]), int(addresses[index]), values[index], kind[1])
    machine.set(target, result, lanes)


def _copy(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """cp.async: a copy to shared memory that lands some time before it is waited for, or zeros."""
    target, address, size, *rest = instruction.operands
    assert isinstance(target, Address)
    assert isinstance(address, Address)
    assert isinstance(size, Number)
    who = machine.everybody if lanes is None else lanes
    length = machine.every(rest[0] if rest else size, "u32", lanes)
    sources, data = machine.address(address, lanes), np.zeros((len(who), size.bits), np.uint8)
    if not ((length == 0) | (length == size.bits)).all():
        raise Fault("a copy of a part is not known here")
    some = np.flatnonzero(length)
    if len(some):
        words = machine.load_global(who[some], sources[some], np.dtype(np.uint32), size.bits // 4)
        data[some] = words.view(np.uint8)
    addresses = machine.shared.offsets(
        machine.in_shared(who, machine.address(target, lanes), size.bits), np.dtype(np.uint8), size.bits
    )
    order = np.argsort(addresses, kind="stable")
    twice = addresses[order][1:] == addresses[order][:-1]
    if (data[order][1:][twice] != data[order][:-1][twice]).any():
        raise Fault("several threads copy different data to one place")
    machine.shared.watched().begin_copy(Accesses.now(who, addresses, size.bits, machine.clocks))
    group = machine.groups_begun[who].copy()
    machine.copies.append(Copy(who, addresses, data, group, np.zeros(len(who), bool)))


def _commit(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """cp.async.commit_group: the copies begun until here are a group."""
    machine.groups_begun[machine.everybody if lanes is None else lanes] += 1


def _wait(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """cp.async.wait_group n: all but each thread's last n groups have landed."""
    (pending,) = instruction.operands
    assert isinstance(pending, Number)
    waits = np.zeros(len(machine.everybody), bool)
    waits[machine.everybody if lanes is None else lanes] = True
    for copy in machine.copies:
        lands = waits[copy.lanes] & (copy.group < machine.groups_begun[copy.lanes] - pending.bits) & ~copy.landed
        if lands.any():
            where, size = copy.addresses[lands], copy.data.shape[1]
            machine.shared.data[where[:, None] + np.arange(size)] = copy.data[lands]
            machine.shared.watched().end_copy(Accesses.now(copy.lanes[lands], where, size, machine.clocks))
            copy.landed |= lands
    machine.copies = [copy for copy in machine.copies if not copy.landed.all()]


def _warp_barrier(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """bar.warp.sync."""
    if instruction.operands not in ((Number(-1),), (Number(0xFFFFFFFF),)):
        raise Fault("a barrier of some threads is not known here")
    machine.clocks.warp_barrier(warp.whole_warps(machine, lanes)[:, 0] // 32)


def _grid_wait(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """griddepcontrol.wait: from here on, the kernel before has ended."""
    machine.waited[machine.everybody if lanes is None else lanes] = True


def _nothing(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """What is of no consequence here: everything is done in order, and seen at once."""


HANDLERS: dict[str, Callable[[Machine, Instruction, Array | None], None]] = {
    "mov.": _move,
    "ld.param.": _parameter,
    "ld.": _load,
    "st.": _store,
    "atom.": _atomic,
    "cp.async.commit_group": _commit,
    "cp.async.wait_group": _wait,
    "cp.async.cg.shared.global": _copy,
    "cp.async.ca.shared.global": _copy,
    "bar.warp.sync": _warp_barrier,
    "griddepcontrol.wait": _grid_wait,
    "griddepcontrol.launch_dependents": _nothing,
    "fence.proxy.async.shared::cta": _nothing,
    "wgmma.fence.sync.aligned": warp_group.fence,
    "wgmma.commit_group.sync.aligned": warp_group.commit,
    "wgmma.wait_group.sync.aligned": warp_group.wait,
    "wgmma.mma_async.": warp_group.multiply,
    "mma.sync.": warp.multiply,
    "ldmatrix.": warp.load_matrix,
    "stmatrix.": warp.store_matrix,
    "shfl.sync.": warp.shuffle,
    "redux.sync.": warp.reduce,
}
"""By how an opcode begins; the first that fits."""
