"""A product whose weight has long rows, and few of them: in parts of k, so that all of the chip reads the weight.

    part[p, r, n] = sum over k in the p-th part of weight[n, k] * x[r, k]
    y[r, n]       = residual[r, n] + sum over p of part[p, r, n]        which is `linear_residual`, linear.py

Two launches: programs that own some rows of the weight and one part of them leave float32 sums, and as many programs as
there is work for add them, in the order of k, so that the result is the same each time. For 16 to 64 rows of x, on
tensor cores; how many parts: product.py. Counting finished programs would save the second launch, but of 1024 outputs
16 programs would then add 64 rows of 8 parts, while 116 multiprocessors wait for them.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from aloud.kernels.launch import ANY_ALIGNMENT, PROGRAMMATIC_LAUNCH_CAPABILITY, Launch, ceil_div, next_power_of_2
from aloud.kernels.product import Blocks, matrix_product, plan_product
from aloud.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton

SUMMED_OUTPUTS = 256
"""Of one row, by a program of two warps: 4 of each thread's are one load of 16 bytes for each part."""


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def part_product_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    stride_x_row,
    stride_weight_row,
    outputs,
    rows,
    inputs,
    part_inputs,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    MATRIX: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One program makes BLOCK_OUTPUTS columns of one part. y is float32 [parts, rows, outputs]."""
    tl.static_assert(MATRIX)
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    part = tl.program_id(1)
    row = tl.arange(0, BLOCK_ROWS)
    first_input = part * part_inputs
    if PROGRAMMATIC:
        gdc_launch_dependents()
        gdc_wait()
    products = matrix_product(
        x_ptr,
        weight_ptr,
        stride_x_row,
        stride_weight_row,
        output,
        row,
        outputs,
        rows,
        first_input,
        tl.minimum(first_input + part_inputs, inputs),
        BLOCK_INPUTS,
    )
    place = (part * rows + row)[None, :] * outputs + output[:, None]
    tl.store(y_ptr + place, products, mask=(output < outputs)[:, None] & (row < rows)[None, :])


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def sum_parts_kernel(
    parts_ptr,
    residual_ptr,
    y_ptr,
    stride_residual_row,
    rows,
    outputs,
    PARTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One program adds BLOCK_OUTPUTS columns of one row."""
    row = tl.program_id(1)
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    inside = output < outputs
    if PROGRAMMATIC:
        gdc_launch_dependents()
        gdc_wait()
    residual = tl.load(residual_ptr + row.to(tl.int64) * stride_residual_row + output, mask=inside, other=0.0)
    total = tl.zeros([BLOCK_OUTPUTS], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + (part * rows + row) * outputs + output, mask=inside, other=0.0)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    y = residual.to(tl.float32) + total.to(dtype).to(tl.float32)
    tl.store(y_ptr + row * outputs + output, y.to(dtype), mask=inside)


def plan_long_product(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, blocks: Blocks, *, capability: int
) -> tuple[Launch, Launch]:
    """Plan x [rows, inputs], weight [outputs, inputs], residual [rows, outputs] -> y [rows, outputs]."""
    rows, inputs = x.shape
    outputs = weight.shape[0]
    blocks_of_k = ceil_div(inputs, blocks.inputs)
    part_blocks = ceil_div(blocks_of_k, blocks.parts)
    blocks = replace(blocks, parts=ceil_div(blocks_of_k, part_blocks))  # none in which nothing is left
    arguments = {"part_inputs": part_blocks * blocks.inputs}
    parts = torch.empty(blocks.parts, rows, outputs, device=x.device, dtype=torch.float32)
    product = plan_product(part_product_kernel, arguments, x, weight, parts, capability=capability, blocks=blocks)
    y = torch.empty(rows, outputs, device=x.device, dtype=x.dtype)
    block_outputs = min(SUMMED_OUTPUTS, next_power_of_2(outputs))
    programmatic = capability >= PROGRAMMATIC_LAUNCH_CAPABILITY
    total = Launch(
        sum_parts_kernel,
        grid=(ceil_div(outputs, block_outputs), rows),
        arguments={
            "parts_ptr": parts,
            "residual_ptr": residual,
            "y_ptr": y,
            "stride_residual_row": residual.stride(0),
            "rows": rows,
            "outputs": outputs,
        },
        constants={"PARTS": blocks.parts, "BLOCK_OUTPUTS": block_outputs, "PROGRAMMATIC": programmatic},
        num_warps=2,
        programmatic=programmatic,
        outputs=(y,),
    )
    return product, total
