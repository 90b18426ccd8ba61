"""Products of four warps (wgmma), which are under way until they are waited for.

Layouts are those of the PTX ISA, "Asynchronous warpgroup level matrix instructions".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import read
from .order import PROGRAM, Accesses, Fault
from .program import Instruction, Number, Register
from .warp import COLUMN, ROW, whole_warps

if TYPE_CHECKING:
    from .machine import Machine

Array = Any
THREADS = 128


@dataclass
class Product:
    """Products of some groups that one instruction has begun."""

    groups: Array  # each group's first thread
    registers: frozenset[str]  # to which they are added
    tiles: tuple[Accesses, ...]  # shared memory that they read; each place by a group's first thread
    batch: Array  # of each group's, the how manyth
    done: Array

    def is_under_way(self, register: str, lanes: Array) -> bool:
        """Whether it may still write what one of these threads has in a register."""
        return register in self.registers and np.isin(lanes // THREADS * THREADS, self.groups[~self.done]).any()


def whole_groups(machine: Machine, lanes: Array | None) -> Array:
    """Each group's first thread.

    Raises:
        Fault: threads of a group are missing.
    """
    warps = whole_warps(machine, lanes)
    if len(warps) % 4 or (warps.reshape(-1, THREADS) != warps[::4, :1] // THREADS * THREADS + np.arange(THREADS)).any():
        raise Fault("not all four warps of a group run this together")
    return warps[::4, 0]


def multiply(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """wgmma.mma_async: d [64, n] (+)= a [64, 16] b [n, 16]^T, both from shared memory, in float32."""
    shape = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(b?f16)\.\2", instruction.opcode)
    target, a_operand, b_operand, keep, *signs = instruction.operands
    if shape is None or [sign.bits for sign in signs] != [1, 1, 0, 0] or not isinstance(a_operand, Register):
        raise Fault("a product of matrices that is not known here")
    first, columns = whole_groups(machine, lanes), int(shape[1])
    registers = frozenset(register.name for register in target.registers)
    # One product adds to what another leaves in the same registers; anything else waits.
    earlier = [product for product in machine.products if product.registers == registers]
    machine.products = [product for product in machine.products if product.registers != registers]
    (a, of_a), (b, of_b) = (
        _described(machine, machine.every(operand, "b64", lanes).reshape(-1, THREADS), first, rows, shape[2])
        for operand, rows in ((a_operand, 64), (b_operand, columns))
    )
    d = a @ b.swapaxes(1, 2)
    kept = machine.every(keep, "pred", lanes).reshape(-1, THREADS)[:, :1, None]
    row = 16 * np.arange(4)[:, None] + ROW  # [warps, 32]
    for block in range(columns // 8):
        for index, (down, right) in enumerate(((0, 0), (0, 1), (8, 0), (8, 1))):
            register = target.registers[4 * block + index]
            values = d[:, row + down, 8 * block + COLUMN + right]  # [groups, warps, 32]
            before = machine.every(register, "b32", lanes).view(np.float32).reshape(len(first), 4, 32)
            total = np.where(kept, before, np.float32(0)) + values
            machine.set(register, total.astype(np.float32).reshape(-1).view(np.uint32), lanes)
    batch = machine.batches_begun[first]
    machine.products += [*earlier, Product(first, registers, (of_a, of_b), batch, np.zeros(len(first), bool))]


def fence(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """wgmma.fence: what it orders is done in order here; whether it is there is not checked."""
    whole_groups(machine, lanes)


def commit(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """wgmma.commit_group: the products begun until here are a batch."""
    machine.batches_begun[whole_groups(machine, lanes)] += 1


def wait(machine: Machine, instruction: Instruction, lanes: Array | None) -> None:
    """wgmma.wait_group n: all but each group's last n batches are done."""
    (pending,) = instruction.operands
    assert isinstance(pending, Number)
    waits = whole_groups(machine, lanes)
    watch = machine.shared.watched()
    for product in machine.products:
        ends = np.isin(product.groups, waits) & ~product.done
        ends &= product.batch < machine.batches_begun[product.groups] - pending.bits
        product.done |= ends
        for tile in product.tiles:
            of_these = np.isin(tile.lanes, product.groups[ends])
            if of_these.any():
                where = tile.lanes[of_these], tile.offsets[of_these]
                watch.end_read(Accesses.now(*where, tile.size, machine.clocks, PROGRAM))
    machine.products = [product for product in machine.products if not product.done.all()]
    for product in machine.products:  # which may read what one that is done has read
        for tile in product.tiles:
            of_others = np.isin(tile.lanes, product.groups[~product.done])
            where = tile.lanes[of_others], tile.offsets[of_others]
            watch.keep_reading(Accesses.now(*where, tile.size, machine.clocks, PROGRAM))


def _described(machine: Machine, descriptors: Array, first: Array, rows: int, kind: str) -> tuple[Array, Accesses]:
    """The matrix [groups, rows, 16] that descriptors of shared memory name ("Matrix descriptor format"), and where."""
    if (descriptors != descriptors[:, :1]).any():
        raise Fault("threads of a group name different matrices")
    descriptor = descriptors[:, 0].astype(np.int64)
    start, stride = (descriptor & 0x3FFF) * 16, (descriptor >> 32 & 0x3FFF) * 16
    base_offset, swizzle = descriptor >> 49 & 7, descriptor >> 62 & 3
    if (base_offset != 0).any() or (swizzle != swizzle[0]).any() or swizzle[0] == 0:
        raise Fault("a layout of matrices that is not known here")
    row_bytes = {1: 128, 2: 64, 3: 32}[int(swizzle[0])]
    row = np.arange(rows)[None, :, None]
    piece = np.arange(2)[None, None, :]  # of 16 bytes, which stay together
    address = start[:, None, None] + row // 8 * stride[:, None, None] + row % 8 * row_bytes + 16 * piece
    bits = {128: 7, 64: 3, 32: 1}[row_bytes]
    address ^= (address >> 7 & bits) << 4
    readers = np.broadcast_to(first[:, None, None], address.shape).reshape(-1)
    data = machine.load_shared(readers, address.reshape(-1), np.dtype(np.uint16), 8, PROGRAM)
    offsets = address.reshape(-1) + machine.clocks.program(readers) * machine.shared_bytes
    tile = Accesses.now(readers, offsets, 16, machine.clocks, PROGRAM)
    machine.shared.watched().keep_reading(tile)
    return read(data.reshape(len(first), rows, 16), kind).astype(np.float32), tile
