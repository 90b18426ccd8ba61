"""Matrix products of a decode step: few rows of x against a large weight, with what stands before and behind it.

    linear_residual   residual + x W^T
    norm_linear       rms_norm(x) W^T
    norm_swiglu       silu(g) * u, where [g, u] = rms_norm(x) [gate, up]^T      (Shazeer 2020, arXiv:2002.05202)

Weights are [outputs, inputs], rows of x are independent of each other, sums are in float32, and each product, silu and
sum is rounded to x's dtype, as the references round. How weights stream and how many a program owns: product.py; where
rows of a weight are long and too few to fill the chip: long_product.py. For more rows than these kernels take, the
products are cuBLAS's (`..._by_library`), with kernels before and behind them; it adds a residual before it rounds, and
where it splits a sum, it may round the parts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from aloud.kernels.check import check
from aloud.kernels.launch import ANY_ALIGNMENT, Launch, capability, require_rows
from aloud.kernels.long_product import plan_long_product
from aloud.kernels.product import (
    MAX_ROWS,
    choose_blocks,
    matrix_product,
    norm_matrix_product,
    pair_output,
    plan_product,
    row_block,
    split_pairs,
    vector_product,
    weight_slice,
    whole_gain,
)
from aloud.kernels.rms_norm import normed, rms_norm, rms_norm_reference
from aloud.kernels.row_product import row_product
from aloud.kernels.swiglu import rounded_swiglu, swiglu, swiglu_reference
from aloud.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton


def linear_residual_reference(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The definition of `linear_residual`."""
    return residual + row_product(x, weight)


def norm_linear_reference(x: torch.Tensor, gain: torch.Tensor, eps: float, weight: torch.Tensor) -> torch.Tensor:
    """The definition of `norm_linear`."""
    return row_product(rms_norm_reference(x, gain, eps), weight)


def norm_swiglu_reference(x: torch.Tensor, gain: torch.Tensor, eps: float, gate_up: torch.Tensor) -> torch.Tensor:
    """The definition of `norm_swiglu`."""
    return swiglu_reference(row_product(rms_norm_reference(x, gain, eps), gate_up))


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def linear_residual_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    y_ptr,
    stride_x_row,
    stride_weight_row,
    stride_residual_row,
    outputs,
    rows,
    inputs,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    MATRIX: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One program makes BLOCK_OUTPUTS columns of y."""
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    if PROGRAMMATIC:
        gdc_launch_dependents()
    if MATRIX:
        if PROGRAMMATIC:
            gdc_wait()
        row = tl.arange(0, BLOCK_ROWS)
        residual = _load_residual(residual_ptr, stride_residual_row, output, row, outputs, rows)
        products = matrix_product(
            x_ptr, weight_ptr, stride_x_row, stride_weight_row, output, row, outputs, rows, 0, inputs, BLOCK_INPUTS
        )
        y = residual + products.to(y_ptr.dtype.element_ty).to(tl.float32)
        _store(y, y_ptr, output, row, outputs, rows)
    else:
        weight = weight_slice(weight_ptr, stride_weight_row, output, outputs, inputs, BLOCK_INPUTS)
        if PROGRAMMATIC:
            gdc_wait()
        for start in range(0, rows, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            x = row_block(x_ptr, stride_x_row, row, rows, inputs, BLOCK_INPUTS)
            residual = _load_residual(residual_ptr, stride_residual_row, output, row, outputs, rows)
            products = vector_product(weight, x)
            y = residual + products.to(weight.dtype).to(tl.float32)
            _store(y, y_ptr, output, row, outputs, rows)


@triton.jit
def _load_residual(residual_ptr, stride_residual_row, output, row, outputs, rows):
    """Load the residual -> float32 [outputs, rows], before the products: nothing can hide its latency after."""
    row = row.to(tl.int64)[None, :]
    output = output[:, None]
    inside = (output < outputs) & (row < rows)
    return tl.load(residual_ptr + row * stride_residual_row + output, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def norm_linear_kernel(
    x_ptr,
    gain_ptr,
    weight_ptr,
    y_ptr,
    stride_x_row,
    stride_weight_row,
    outputs,
    rows,
    inputs,
    eps,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    MATRIX: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One program norms x for itself and makes BLOCK_OUTPUTS columns of y."""
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    if PROGRAMMATIC:
        gdc_launch_dependents()
    if MATRIX:
        if PROGRAMMATIC:
            gdc_wait()
        row = tl.arange(0, BLOCK_ROWS)
        products = norm_matrix_product(
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
            BLOCK_INPUTS,
        )
        _store(products, y_ptr, output, row, outputs, rows)
    else:
        weight = weight_slice(weight_ptr, stride_weight_row, output, outputs, inputs, BLOCK_INPUTS)
        gain = whole_gain(gain_ptr, inputs, BLOCK_INPUTS)
        if PROGRAMMATIC:
            gdc_wait()
        for start in range(0, rows, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            x = row_block(x_ptr, stride_x_row, row, rows, inputs, BLOCK_INPUTS)
            products = vector_product(weight, normed(x, gain, eps, inputs, axis=2, dtype=weight.dtype))
            _store(products, y_ptr, output, row, outputs, rows)


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def norm_swiglu_kernel(
    x_ptr,
    gain_ptr,
    weight_ptr,
    y_ptr,
    stride_x_row,
    stride_weight_row,
    outputs,
    rows,
    inputs,
    eps,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    MATRIX: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One program norms x for itself and makes BLOCK_OUTPUTS / 2 columns of y, from the gate's rows and the up's."""
    output = pair_output(tl.program_id(0), outputs, BLOCK_OUTPUTS)
    if PROGRAMMATIC:
        gdc_launch_dependents()
    if MATRIX:
        if PROGRAMMATIC:
            gdc_wait()
        row = tl.arange(0, BLOCK_ROWS)
        products = norm_matrix_product(
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
            BLOCK_INPUTS,
        )
        _store_swiglu(products, y_ptr, row, outputs, rows)
    else:
        weight = weight_slice(weight_ptr, stride_weight_row, output, outputs, inputs, BLOCK_INPUTS)
        gain = whole_gain(gain_ptr, inputs, BLOCK_INPUTS)
        if PROGRAMMATIC:
            gdc_wait()
        for start in range(0, rows, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            x = row_block(x_ptr, stride_x_row, row, rows, inputs, BLOCK_INPUTS)
            products = vector_product(weight, normed(x, gain, eps, inputs, axis=2, dtype=weight.dtype))
            _store_swiglu(products, y_ptr, row, outputs, rows)


@triton.jit
def _store_swiglu(products, y_ptr, row, outputs, rows):
    """Store silu(gate) * up of products [gates, then ups; rows], rounding the products, silu and y."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    gate, up = split_pairs(products.to(dtype).to(tl.float32))
    output = tl.program_id(0) * gate.shape[0] + tl.arange(0, gate.shape[0])
    _store(rounded_swiglu(gate, up, dtype), y_ptr, output, row, outputs // 2, rows)


@triton.jit
def _store(y, y_ptr, output, row, outputs, rows):
    """Store y [outputs, rows] as [rows, outputs]."""
    row = row.to(tl.int64)[None, :]
    output = output[:, None]
    tl.store(y_ptr + row * outputs + output, y.to(y_ptr.dtype.element_ty), mask=(output < outputs) & (row < rows))


def plan_linear_residual(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, *, capability: int
) -> tuple[Launch, ...]:
    """Plan `linear_residual` for a compute capability (90 for 9.0): the last launch's output is the result."""
    require_rows(x=x, weight=weight, residual=residual)
    (rows, inputs), outputs = x.shape, weight.shape[0]
    blocks = choose_blocks(rows, outputs, inputs, weight.element_size(), plain=True)
    if blocks.parts > 1:
        return plan_long_product(x, weight, residual, blocks, capability=capability)
    y = torch.empty(rows, outputs, device=x.device, dtype=x.dtype)
    arguments = {"residual_ptr": residual, "stride_residual_row": residual.stride(0)}
    return (plan_product(linear_residual_kernel, arguments, x, weight, y, capability=capability, blocks=blocks),)


def plan_norm_linear(
    x: torch.Tensor, gain: torch.Tensor, eps: float, weight: torch.Tensor, *, capability: int
) -> Launch:
    """Plan `norm_linear` for a compute capability (90 for 9.0)."""
    require_rows(x=x, gain=gain, weight=weight)
    y = torch.empty(x.shape[0], weight.shape[0], device=x.device, dtype=x.dtype)
    return plan_product(norm_linear_kernel, {"gain_ptr": gain, "eps": eps}, x, weight, y, capability=capability)


def plan_norm_swiglu(
    x: torch.Tensor, gain: torch.Tensor, eps: float, gate_up: torch.Tensor, *, capability: int
) -> Launch:
    """Plan `norm_swiglu` for a compute capability (90 for 9.0)."""
    require_rows(x=x, gain=gain, gate_up=gate_up)
    y = torch.empty(x.shape[0], gate_up.shape[0] // 2, device=x.device, dtype=x.dtype)
    arguments = {"gain_ptr": gain, "eps": eps}
    return plan_product(norm_swiglu_kernel, arguments, x, gate_up, y, capability=capability, paired=True)


def linear_residual_by_library(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """`linear_residual` of many rows, whose product is cuBLAS's, which adds it to the residual where that lies."""
    return residual.addmm_(x, weight.T)


def norm_linear_by_library(x: torch.Tensor, gain: torch.Tensor, eps: float, weight: torch.Tensor) -> torch.Tensor:
    """`norm_linear` of many rows, whose product is cuBLAS's."""
    return F.linear(rms_norm(x, gain, eps), weight)


def norm_swiglu_by_library(x: torch.Tensor, gain: torch.Tensor, eps: float, gate_up: torch.Tensor) -> torch.Tensor:
    """`norm_swiglu` of many rows, whose products are cuBLAS's."""
    return swiglu(F.linear(rms_norm(x, gain, eps), gate_up))


def linear_residual(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """residual + x W^T: x [rows, inputs], weight [outputs, inputs], residual [rows, outputs] -> [rows, outputs].

    The residual is given up: the result may lie in its place.
    """
    sizes: dict[str, int] = {}
    check("x", x, "rows inputs", sizes)
    check("weight", weight, "outputs inputs", sizes, dtype=x.dtype, device=x.device)
    check("residual", residual, "rows outputs", sizes, dtype=x.dtype, device=x.device)
    if not x.is_cuda:
        return linear_residual_reference(x, weight, residual)
    if x.shape[0] > MAX_ROWS:
        return linear_residual_by_library(x, weight, residual)
    launches = plan_linear_residual(x, weight, residual, capability=capability(x.device))
    for launch in launches:
        launch.run()
    return launches[-1].outputs[0]


def norm_linear(x: torch.Tensor, gain: torch.Tensor, eps: float, weight: torch.Tensor) -> torch.Tensor:
    """rms_norm(x) W^T: x [rows, inputs], gain [inputs], weight [outputs, inputs] -> [rows, outputs]."""
    sizes: dict[str, int] = {}
    check("x", x, "rows inputs", sizes)
    check("gain", gain, "inputs", sizes, dtype=x.dtype, device=x.device)
    check("weight", weight, "outputs inputs", sizes, dtype=x.dtype, device=x.device)
    if not x.is_cuda:
        return norm_linear_reference(x, gain, eps, weight)
    if x.shape[0] > MAX_ROWS:
        return norm_linear_by_library(x, gain, eps, weight)
    launch = plan_norm_linear(x, gain, eps, weight, capability=capability(x.device))
    launch.run()
    return launch.outputs[0]


def norm_swiglu(x: torch.Tensor, gain: torch.Tensor, eps: float, gate_up: torch.Tensor) -> torch.Tensor:
    """The first half of a feed-forward block.

    x [rows, inputs], gain [inputs], gate_up [2 * width, inputs] -> [rows, width]. The first `width` rows of `gate_up`
    are the gate's, the others the up projection's.
    """
    sizes: dict[str, int] = {}
    check("x", x, "rows inputs", sizes)
    check("gain", gain, "inputs", sizes, dtype=x.dtype, device=x.device)
    check("gate_up", gate_up, "twice_width inputs", sizes, dtype=x.dtype, device=x.device)
    if sizes["twice_width"] % 2:
        raise ValueError(f"gate_up must have an even number of rows, got {sizes['twice_width']}")
    if not x.is_cuda:
        return norm_swiglu_reference(x, gain, eps, gate_up)
    if x.shape[0] > MAX_ROWS:
        return norm_swiglu_by_library(x, gain, eps, gate_up)
    launch = plan_norm_swiglu(x, gain, eps, gate_up, capability=capability(x.device))
    launch.run()
    return launch.outputs[0]
