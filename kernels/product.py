"""Products of a few rows with a large weight, inside a kernel: on vector units and on tensor cores.

    products[n, r] = sum over k of weight[n, k] * x[r, k]

A decode step reads each weight once, so a program owns whole rows of the weight and serves all rows of x with them.

Below 16 rows, the program's whole slice of the weight is loaded into registers before the wait for the kernel
before: the memory is busy while that one ends. Sums are float32 products on vector units.

From 16 rows on, the slice streams through shared memory, several blocks of k under way at once, into tensor
cores. There the norm of x is taken in the same pass, because it is linear: dot(x * gain, weight) and sum(x^2) are
accumulated together and the one scaled by the other at the end. x * gain is rounded once, to the weights' dtype, where
the reference rounds x / rms(x) and then its product with gain. In float16 x * gain could overflow, so there the squares
are summed in a pass of their own, over x alone, and x is normed, with the reference's roundings, before its product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from aloud.kernels.launch import PROGRAMMATIC_LAUNCH_CAPABILITY, Launch, ceil_div, next_power_of_2
from aloud.kernels.triton_language import tl, triton

MATRIX_ROWS = 16
"""From this many rows on, products are on tensor cores."""
MAX_ROWS = 64
"""Up to this many rows, products are by these kernels; more are cuBLAS's, between smaller kernels of ours."""
LONG_INPUTS = 4096
"""Rows of the weight of this length may be split. The sum of parts is a launch of its own, about 2 us: shorter rows do
not take much longer than that."""
MAX_PARTS = 8
PROGRAMS = 128
"""One for each multiprocessor of a large GPU, or nearly."""
SHARED_BYTES = 96 * 1024
"""Of a program, at most: what every architecture has."""


@dataclass(frozen=True)
class Blocks:
    """How a product is divided among programs, and their launch."""

    outputs: int  # rows of the weight that a program owns
    rows: int  # rows of x at once
    inputs: int  # of a row, at once
    matrix: bool  # on tensor cores
    num_warps: int
    num_stages: int = 1
    parts: int = 1  # of each row of the weight; more than one are long_product.py's


def choose_blocks(
    rows: int, outputs: int, inputs: int, element_size: int, *, paired: bool = False, plain: bool = False
) -> Blocks:
    """The launch table: blocks for x of `rows` rows and a weight of `outputs` rows of `inputs` elements.

    `paired`: a program owns an even number of outputs. `plain`: x is multiplied as it is, without a norm.
    """
    if rows >= MATRIX_ROWS:
        return _matrix_blocks(rows, outputs, inputs, element_size, plain)
    return _vector_blocks(rows, outputs, inputs, element_size, paired)


def _vector_blocks(rows: int, outputs: int, inputs: int, element_size: int, paired: bool) -> Blocks:
    """Blocks on vector units.

    A single row of x is taken alone, and 128 threads keep 32 KB of weights in registers: 64 each, 16 loads of 16 bytes
    under way. More rows go together in twos and fours, as far as their registers allow, because each step of the loop
    over rows waits for x; half as many weights leave room for that and for the weights in float32. But of long rows,
    too, a program owns four, or as many as 64 KB hold, with a single row's weights in each thread: every program reads
    all of x again, widens it and sums over its threads, and for one output that is most of the work. 8 rows of 8192 in
    bfloat16 are 128 KB: programs of one output would read eight times as much of x as of weights, those of four read
    twice as much, in 60 % of the instructions. With the same weights in more threads there would be more sums, and too
    few registers for normed rows of x. Fewer outputs where that leaves less than about two programs for each of a large
    GPU's multiprocessors: with 256, an H200's 132 are busy for 97 % of the time.
    """
    block_inputs = next_power_of_2(inputs)
    row_bytes = block_inputs * element_size
    program_bytes = 32 * 1024 if rows == 1 else max(16 * 1024, min(4 * row_bytes, 64 * 1024))
    block_outputs = 2 if paired else 1
    while 2 * block_outputs * row_bytes <= program_bytes and outputs >= 256 * 2 * block_outputs:
        block_outputs *= 2
    num_warps = min(max(4, block_outputs * row_bytes // (8 * 1024)), 32)
    together = max(1, 64 * 32 * num_warps // block_inputs)  # up to 64 registers a thread for x in float32
    return Blocks(
        block_outputs, min(together, 4, next_power_of_2(rows)), block_inputs, matrix=False, num_warps=num_warps
    )


def _matrix_blocks(rows: int, outputs: int, inputs: int, element_size: int, plain: bool) -> Blocks:
    """Blocks on tensor cores.

    They take 16 rows of weight at least; more of them read x less often from the level-2 cache, but leave
    multiprocessors idle where outputs are few: as many as leave 256 programs, and no more than 32 or the rows of x,
    with which x is half of what a program reads.

    Long rows of a plain product are split where a program for as many of them as x has rows would not fill the chip:
    64 rows of x against 1024 outputs of 8192 inputs are 16 programs for 8 parts each, which read 17 MB of x for the 17
    MB of weights, where 64 programs of 16 outputs, on half of the chip, read 67.

    Blocks of k are 256 bytes long where x is normed on its way, and so goes through registers; a plain product's are
    long enough for the 32 KB of weights under way in a program of a split one. Four stages, or what SHARED_BYTES hold.
    float32 goes to vector units here too, in smaller blocks.
    """
    is_wide = element_size >= 4
    block_rows = next_power_of_2(rows)
    block_outputs = 16 if is_wide else block_rows
    parts = min(next_power_of_2(ceil_div(PROGRAMS, ceil_div(outputs, block_outputs))), MAX_PARTS)
    if not plain or inputs < LONG_INPUTS:
        parts = 1
    if parts == 1 and not is_wide:
        block_outputs = max(16, min(next_power_of_2(outputs) // 256, max(32, block_rows)))
    block_inputs = 32 if is_wide else 8192 // max(block_outputs, block_rows) if plain else 128
    stage_bytes = (block_outputs + block_rows) * block_inputs * element_size
    return Blocks(
        block_outputs,
        block_rows,
        block_inputs,
        matrix=True,
        num_warps=8 if block_rows > 32 and not is_wide else 4,
        num_stages=min(4, SHARED_BYTES // stage_bytes),
        parts=parts,
    )


def plan_product(
    kernel: Any,
    arguments: dict[str, Any],
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    *,
    capability: int,
    paired: bool = False,
    blocks: Blocks | None = None,
) -> Launch:
    """Plan a kernel that makes products of x [rows, inputs] and weight [outputs, inputs], and y of them.

    The kernel takes `arguments` and x_ptr, weight_ptr, y_ptr, stride_x_row, stride_weight_row, outputs, rows, inputs.
    `blocks`: those of `choose_blocks`, where the caller has chosen.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    blocks = blocks or choose_blocks(rows, outputs, inputs, weight.element_size(), paired=paired)
    programmatic = capability >= PROGRAMMATIC_LAUNCH_CAPABILITY
    return Launch(
        kernel=kernel,
        grid=(ceil_div(outputs, blocks.outputs), blocks.parts),
        arguments={
            "x_ptr": x,
            "weight_ptr": weight,
            "y_ptr": y,
            "stride_x_row": x.stride(0),
            "stride_weight_row": weight.stride(0),
            "outputs": outputs,
            "rows": rows,
            "inputs": inputs,
            **arguments,
        },
        constants={
            "BLOCK_OUTPUTS": blocks.outputs,
            "BLOCK_ROWS": blocks.rows,
            "BLOCK_INPUTS": blocks.inputs,
            "MATRIX": blocks.matrix,
            "PROGRAMMATIC": programmatic,
        },
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        programmatic=programmatic,
        outputs=(y,),
    )


@triton.jit
def weight_slice(weight_ptr, stride_weight_row, output, outputs, inputs, BLOCK_INPUTS: tl.constexpr):
    """Load whole rows of the weight -> [outputs, 1, inputs], 0 beyond either."""
    k = tl.arange(0, BLOCK_INPUTS)[None, None, :]
    output = output[:, None, None]
    weight_ptrs = weight_ptr + output.to(tl.int64) * stride_weight_row + k
    return tl.load(weight_ptrs, mask=(output < outputs) & (k < inputs), other=0.0)


@triton.jit
def whole_gain(gain_ptr, inputs, BLOCK_INPUTS: tl.constexpr):
    """Load the norm's gain -> [1, 1, inputs], 0 beyond it."""
    k = tl.arange(0, BLOCK_INPUTS)[None, None, :]
    return tl.load(gain_ptr + k, mask=k < inputs, other=0.0)


@triton.jit
def row_block(x_ptr, stride_x_row, row, rows, inputs, BLOCK_INPUTS: tl.constexpr):
    """Load whole rows of x -> float32 [1, rows, inputs], 0 beyond either."""
    k = tl.arange(0, BLOCK_INPUTS)[None, None, :]
    row = row[None, :, None]
    x_ptrs = x_ptr + row.to(tl.int64) * stride_x_row + k
    return tl.load(x_ptrs, mask=(row < rows) & (k < inputs), other=0.0).to(tl.float32)


@triton.jit
def vector_product(weight, x):
    """Compute products of weight [outputs, 1, inputs] and float32 x [1, rows, inputs] -> float32 [outputs, rows].

    All three have three dimensions from their loads on, so that weights stay in the registers that they were loaded to.
    """
    return tl.sum(weight.to(tl.float32) * x, axis=2)


@triton.jit
def matrix_product(
    x_ptr,
    weight_ptr,
    stride_x_row,
    stride_weight_row,
    output,
    row,
    outputs,
    rows,
    first_input,
    inputs,
    BLOCK_INPUTS: tl.constexpr,
):
    """Compute products of weight rows `output` and x rows `row` on tensor cores -> float32 [outputs, rows].

    Over k from first_input to inputs.
    """
    total = tl.zeros([output.shape[0], row.shape[0]], tl.float32)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * stride_x_row
    weight_ptrs = weight_ptr + output.to(tl.int64)[:, None] * stride_weight_row
    for start in range(first_input, inputs, BLOCK_INPUTS):
        k = start + tl.arange(0, BLOCK_INPUTS)
        inside = (k < inputs)[None, :]
        weight = tl.load(weight_ptrs + k[None, :], mask=(output < outputs)[:, None] & inside, other=0.0)
        x = tl.load(x_ptrs + k[None, :], mask=(row < rows)[:, None] & inside, other=0.0)
        total = tl.dot(weight, tl.trans(x), total, input_precision="ieee")
    return total


@triton.jit
def inverse_norm(x_ptr, stride_x_row, eps, row, rows, inputs, BLOCK_INPUTS: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of x rows `row`, by a pass of its own -> float32 [rows]."""
    squares = tl.zeros([row.shape[0], BLOCK_INPUTS], tl.float32)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * stride_x_row
    for start in range(0, inputs, BLOCK_INPUTS):
        k = start + tl.arange(0, BLOCK_INPUTS)
        x = tl.load(x_ptrs + k[None, :], mask=(row < rows)[:, None] & (k < inputs)[None, :], other=0.0).to(tl.float32)
        squares += x * x
    return tl.math.rsqrt(tl.sum(squares, axis=1) / inputs + eps)


@triton.jit
def norm_matrix_product(
    x_ptr,
    gain_ptr,
    weight_ptr,
    stride_x_row,
    stride_weight_row,
    output,
    row,
    outputs,
    rows,
    inputs,
    eps,
    BLOCK_INPUTS: tl.constexpr,
):
    """Compute products of weight rows `output` and normed x rows `row` on tensor cores -> float32 [outputs, rows]."""
    total = tl.zeros([output.shape[0], row.shape[0]], tl.float32)
    squares = tl.zeros([row.shape[0], BLOCK_INPUTS], tl.float32)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * stride_x_row
    weight_ptrs = weight_ptr + output.to(tl.int64)[:, None] * stride_weight_row
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    norm_first: tl.constexpr = dtype == tl.float16
    if norm_first:
        inverse = inverse_norm(x_ptr, stride_x_row, eps, row, rows, inputs, BLOCK_INPUTS)
    k = tl.arange(0, BLOCK_INPUTS)[None, :]
    gain = tl.load(gain_ptr + k, mask=k < inputs, other=0.0)
    for start in range(0, inputs, BLOCK_INPUTS):
        k = start + tl.arange(0, BLOCK_INPUTS)[None, :]
        weight = tl.load(weight_ptrs + k, mask=(output < outputs)[:, None] & (k < inputs), other=0.0)
        x = tl.load(x_ptrs + k, mask=(row < rows)[:, None] & (k < inputs), other=0.0).to(tl.float32)
        if norm_first:
            scaled = (x * inverse[:, None]).to(dtype).to(tl.float32) * gain.to(tl.float32)
        else:
            squares += x * x
            scaled = x * gain.to(tl.float32)
        # A gain's row is too small to go through shared memory, so the next block's is loaded a step ahead by hand.
        gain = tl.load(gain_ptr + k + BLOCK_INPUTS, mask=k + BLOCK_INPUTS < inputs, other=0.0)
        total = tl.dot(weight, tl.trans(scaled.to(dtype)), total, input_precision="ieee")
    if not norm_first:
        total *= tl.math.rsqrt(tl.sum(squares, axis=1) / inputs + eps)[None, :]
    return total


@triton.jit
def pair_output(program, outputs, BLOCK_OUTPUTS: tl.constexpr):
    """Rows of a weight in whose two halves row i pairs with row i + outputs / 2, for one program.

    BLOCK_OUTPUTS / 2 of the first half, then their partners; those beyond either half are `outputs`, no row of it.
    """
    pairs: tl.constexpr = BLOCK_OUTPUTS // 2
    place = tl.arange(0, BLOCK_OUTPUTS)
    first = program * pairs + place % pairs
    return tl.where(first < outputs // 2, first + place // pairs * (outputs // 2), outputs)


@triton.jit
def split_pairs(products):
    """Take products [2 * pairs, rows] apart -> of the firsts and of their partners, [pairs, rows] each."""
    pairs: tl.constexpr = products.shape[0] // 2
    return tl.split(tl.permute(tl.reshape(products, (2, pairs, products.shape[1])), (1, 2, 0)))
