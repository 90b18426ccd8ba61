"""Instructions that a warp's 32 threads run together: shuffles, reductions, matrices.

Layouts of matrices are those of the PTX ISA, "Warp-level matrix instructions". A fragment of 8 by 8 elements of 16
bits: thread t has row t / 4, columns 2 (t mod 4) and the next.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import halves, joined, read
from .order import WARP, Fault
from .program import Address, Instruction, Vector

if TYPE_CHECKING:
    from .machine import Machine

Array = Any
LANE = np.arange(32)
ROW, COLUMN = LANE // 4, 2 * (LANE % 4)


def whole_warps(machine: Machine, lanes: Array | None) -> Array:
    """The threads as warps [warps, 32].

    Raises:
        Fault: threads of a warp are missing.
    """
    lanes = machine.everybody if lanes is None else lanes
    warps = lanes.reshape(-1, 32) if len(lanes) % 32 == 0 else None
    if warps is None or not (warps == warps[:, :1] // 32 * 32 + LANE).all():
        raise Fault("not all threads of a warp run this together")
    return warps


def shuffle(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """shfl.sync: each thread's value from another of its warp."""
    mode = instruction.opcode.split(".")[2]
    target, value, place, clamp, members = instruction.operands
    whole_warps(machine, lanes)
    values, places = (machine.every(x, "u32", lanes).reshape(-1, 32) for x in (value, place))
    if (machine.every(members, "u32", lanes) != 0xFFFFFFFF).any() or (machine.every(clamp, "u32", lanes) != 31).any():
        raise Fault("a shuffle of a part of a warp is not known here")
    if mode not in ("bfly", "idx"):
        raise Fault(f"a shuffle {mode!r} is not known here")
    source = LANE ^ places if mode == "bfly" else places % 32
    machine.set(target, np.take_along_axis(values, source.astype(np.int64), 1).reshape(-1), lanes)


def reduce(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """redux.sync: one value of all of a warp."""
    _, _, how, kind = instruction.opcode.split(".")
    target, value, members = instruction.operands
    whole_warps(machine, lanes)
    if (machine.every(members, "u32", lanes) != 0xFFFFFFFF).any():
        raise Fault("a reduction of a part of a warp is not known here")
    values = read(machine.every(value, kind, lanes), kind).reshape(-1, 32)
    combine = {"add": np.add, "max": np.maximum, "min": np.minimum}[how]
    result = combine.reduce(values, axis=1, dtype=values.dtype)
    machine.set(target, np.repeat(result, 32).view(np.uint32), lanes)


def _addresses_of_matrices(machine: Machine, address: Address, lanes: Array | None, count: int) -> Array:
    """Where the rows of ldmatrix and stmatrix lie: [warps, matrices, 8]."""
    return machine.address(address, lanes).reshape(-1, 32)[:, : 8 * count].reshape(-1, count, 8)


def _matrices(opcode: str) -> int:
    shape = re.fullmatch(r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(?:\.trans)?\.shared\.b16", opcode)
    if shape is None:
        raise Fault("matrices that are not known here")
    return int(shape[1])


def load_matrix(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """ldmatrix: 8 by 8 fragments from shared memory; each address is of a row of 16 bytes."""
    target, address = instruction.operands
    count = _matrices(instruction.opcode)
    warps = whole_warps(machine, lanes)
    rows = _addresses_of_matrices(machine, address, lanes, count)
    # All of a warp's threads get what is read, so that each of the addresses is the warp's.
    readers = np.broadcast_to(warps[:, None, :8], rows.shape)
    data = machine.load_shared(readers.reshape(-1), rows.reshape(-1), np.dtype(np.uint16), 8, WARP)
    data = data.reshape(len(warps), count, 8, 8)
    if ".trans" in instruction.opcode:
        data = data.swapaxes(2, 3)
    for index, register in enumerate(target.registers):
        machine.set(register, joined(data[:, index, ROW, COLUMN], data[:, index, ROW, COLUMN + 1]).reshape(-1), lanes)


def store_matrix(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """stmatrix: the opposite of ldmatrix."""
    address, source = instruction.operands
    count = _matrices(instruction.opcode)
    warps = whole_warps(machine, lanes)
    rows = _addresses_of_matrices(machine, address, lanes, count)
    data = np.zeros((len(warps), count, 8, 8), np.uint16)
    for index, register in enumerate(source.registers):
        low, high = halves(machine.every(register, "b32", lanes).reshape(-1, 32))
        data[:, index, ROW, COLUMN], data[:, index, ROW, COLUMN + 1] = low, high
    if ".trans" in instruction.opcode:
        data = data.swapaxes(2, 3)
    writers = np.broadcast_to(warps[:, None, :8], rows.shape)
    machine.store_shared(writers.reshape(-1), rows.reshape(-1), data.reshape(-1, 8), WARP)


def multiply(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """mma.sync.m16n8k16: d [16, 8] = a [16, 16] b [16, 8] + c, in float32."""
    shape = re.fullmatch(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.\1\.f32", instruction.opcode)
    if shape is None:
        raise Fault("a product of matrices that is not known here")
    target, a_operand, b_operand, c_operand = instruction.operands
    warps = len(whole_warps(machine, lanes))

    def fragments(operand: Vector) -> list[tuple[Array, Array]]:
        parts = (halves(machine.every(register, "b32", lanes).reshape(-1, 32)) for register in operand.registers)
        return [
            (read(low, shape[1]).astype(np.float32), read(high, shape[1]).astype(np.float32)) for low, high in parts
        ]

    a, b, c = (np.zeros((warps, *size), np.float32) for size in ((16, 16), (16, 8), (16, 8)))
    for (low, high), (row, column) in zip(fragments(a_operand), ((0, 0), (8, 0), (0, 8), (8, 8)), strict=True):
        a[:, ROW + row, COLUMN + column], a[:, ROW + row, COLUMN + column + 1] = low, high
    for (low, high), row in zip(fragments(b_operand), (0, 8), strict=True):
        b[:, COLUMN + row, ROW], b[:, COLUMN + row + 1, ROW] = low, high
    places = ((0, 0), (0, 1), (8, 0), (8, 1))
    for register, (row, column) in zip(c_operand.registers, places, strict=True):
        c[:, ROW + row, COLUMN + column] = machine.every(register, "b32", lanes).reshape(-1, 32).view(np.float32)
    d = a @ b + c
    for register, (row, column) in zip(target.registers, places, strict=True):
        machine.set(register, d[:, ROW + row, COLUMN + column].reshape(-1).view(np.uint32), lanes)
