"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) with Llama 3's scaling of the frequencies.

A head's first half x1 and second half x2 are the two coordinates of head_dim / 2 planes; plane i is rotated by the
angle position * f_i:

    y1 = x1 cos - x2 sin
    y2 = x2 cos + x1 sin,      f_i = theta^(-2 i / head_dim)

Llama 3 slows frequencies whose wavelength 2 pi / f is longer than original_positions / low_factor by `factor`, keeps
those shorter than original_positions / high_factor, and blends linearly in between.

Angles are float32 from one table; the rotation is float32 and rounded once, to the dtype of x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from aloud.kernels.check import check
from aloud.kernels.launch import Launch, capability, require_rows
from aloud.kernels.product import (
    MAX_ROWS,
    norm_matrix_product,
    plan_product,
    row_block,
    split_pairs,
    vector_product,
    weight_slice,
    whole_gain,
)
from aloud.kernels.rms_norm import normed, rms_norm_reference
from aloud.kernels.row_product import row_product
from aloud.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's frequency scaling; wavelengths are compared with `original_positions` over the two factors."""

    factor: float
    low_factor: float
    high_factor: float
    original_positions: int


@dataclass(frozen=True)
class Rope:
    """How positions turn into angles."""

    theta: float
    scaling: Llama3Scaling | None = None


def rope_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Radians a position for each plane -> float32 [head_dim / 2]."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.scaling is None:
        return frequencies
    scaling = rope.scaling
    wavelengths = 2 * math.pi / frequencies
    # 0 at the longest wavelength that is blended, 1 at the shortest; outside, one of the two pure forms.
    keep = (scaling.original_positions / wavelengths - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
    slowed = frequencies / scaling.factor
    blended = (1 - keep) * slowed + keep * frequencies
    return torch.where(keep <= 0, slowed, torch.where(keep >= 1, frequencies, blended))


def rope_table(rope: Rope, head_dim: int, positions: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Cosines and sines of every position -> float32 [2, positions, head_dim / 2]."""
    if torch.device(device).type == "meta":
        return torch.empty(2, positions, head_dim // 2, device=device)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * rope_frequencies(rope, head_dim)
    return torch.stack([angles.cos(), angles.sin()]).to(device)


def rotate_reference(x: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate x [rows, heads, head_dim] by the angles of positions [rows] -> the same shape and dtype."""
    cos, sin = table[:, positions, None]  # [rows, 1, head_dim / 2] each
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


def norm_qkv_rope_reference(
    x: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    table: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """The definition of `norm_qkv_rope`."""
    kv_heads, head_dim = cache.shape[2], cache.shape[4]
    heads = row_product(rms_norm_reference(x, gain, eps), weight).unflatten(-1, (-1, head_dim))
    query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    cache[0, slots, :, positions] = rotate_reference(key, table, positions)
    cache[1, slots, :, positions] = value
    return rotate_reference(query, table, positions)


@triton.jit
def norm_qkv_rope_kernel(
    x_ptr,
    gain_ptr,
    weight_ptr,
    table_ptr,
    cache_ptr,
    slots_ptr,
    positions_ptr,
    y_ptr,
    stride_x_row,
    stride_weight_row,
    stride_table_sine,
    stride_table_position,
    stride_cache_value,
    stride_cache_slot,
    stride_cache_head,
    stride_cache_position,
    heads,
    kv_heads,
    head_dim,
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
    """One program norms x for itself and makes BLOCK_OUTPUTS / 2 planes of queries, keys and values."""
    half = head_dim // 2
    place = tl.arange(0, BLOCK_OUTPUTS)
    plane = tl.program_id(0) * (BLOCK_OUTPUTS // 2) + place % (BLOCK_OUTPUTS // 2)  # counted over all heads
    coordinate = place // (BLOCK_OUTPUTS // 2)  # 0 of every plane, then 1
    output = plane // half * head_dim + coordinate * half + plane % half
    output = tl.where(plane < outputs // 2, output, outputs)
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
        cache_offset, cos, sin = _places(
            table_ptr,
            slots_ptr,
            positions_ptr,
            stride_table_sine,
            stride_table_position,
            stride_cache_slot,
            stride_cache_position,
            heads,
            kv_heads,
            head_dim,
            row,
            rows,
            BLOCK_OUTPUTS,
        )
        _store_rotated(
            products,
            cos,
            sin,
            y_ptr,
            cache_ptr,
            cache_offset,
            stride_cache_value,
            stride_cache_head,
            heads,
            kv_heads,
            head_dim,
            row,
            rows,
            BLOCK_OUTPUTS,
        )
    else:
        weight = weight_slice(weight_ptr, stride_weight_row, output, outputs, inputs, BLOCK_INPUTS)
        gain = whole_gain(gain_ptr, inputs, BLOCK_INPUTS)
        if PROGRAMMATIC:
            gdc_wait()
        for start in range(0, rows, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            cache_offset, cos, sin = _places(
                table_ptr,
                slots_ptr,
                positions_ptr,
                stride_table_sine,
                stride_table_position,
                stride_cache_slot,
                stride_cache_position,
                heads,
                kv_heads,
                head_dim,
                row,
                rows,
                BLOCK_OUTPUTS,
            )
            x = row_block(x_ptr, stride_x_row, row, rows, inputs, BLOCK_INPUTS)
            products = vector_product(weight, normed(x, gain, eps, inputs, axis=2, dtype=weight.dtype))
            _store_rotated(
                products,
                cos,
                sin,
                y_ptr,
                cache_ptr,
                cache_offset,
                stride_cache_value,
                stride_cache_head,
                heads,
                kv_heads,
                head_dim,
                row,
                rows,
                BLOCK_OUTPUTS,
            )


@triton.jit
def _planes(heads, kv_heads, head_dim, BLOCK_OUTPUTS: tl.constexpr):
    """Of this program's planes [planes, 1]: the head, the first coordinate's place in it, and whether there is such."""
    plane = (tl.program_id(0) * (BLOCK_OUTPUTS // 2) + tl.arange(0, BLOCK_OUTPUTS // 2))[:, None]
    head = plane // (head_dim // 2)
    return head, plane % (head_dim // 2), head < heads + 2 * kv_heads


@triton.jit
def _places(
    table_ptr,
    slots_ptr,
    positions_ptr,
    stride_table_sine,
    stride_table_position,
    stride_cache_slot,
    stride_cache_position,
    heads,
    kv_heads,
    head_dim,
    row,
    rows,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """Where each row's keys begin in the cache [1, rows], and the cosines and sines of planes' angles [planes, rows].

    With few rows, loaded before the products, because nothing can hide the latency after.
    """
    exists = row < rows
    slot = tl.load(slots_ptr + row, mask=exists, other=0)[None, :]
    position = tl.load(positions_ptr + row, mask=exists, other=0)[None, :]
    head, place, _ = _planes(heads, kv_heads, head_dim, BLOCK_OUTPUTS)
    rotates = (head < heads + kv_heads) & exists[None, :]
    angle_ptrs = table_ptr + position * stride_table_position + place
    cos = tl.load(angle_ptrs, mask=rotates, other=1.0)
    sin = tl.load(angle_ptrs + stride_table_sine, mask=rotates, other=0.0)
    return slot * stride_cache_slot + position * stride_cache_position, cos, sin


@triton.jit
def _store_rotated(
    products,
    cos,
    sin,
    y_ptr,
    cache_ptr,
    cache_offset,
    stride_cache_value,
    stride_cache_head,
    heads,
    kv_heads,
    head_dim,
    row,
    rows,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """Round products [first coordinates of planes, then second; rows], rotate queries and keys, store all three."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    x1, x2 = split_pairs(products.to(dtype).to(tl.float32))  # [planes, rows] each
    head, place, inside = _planes(heads, kv_heads, head_dim, BLOCK_OUTPUTS)
    inside = inside & (row < rows)[None, :]
    rotates = head < heads + kv_heads
    y1 = tl.where(rotates, x1 * cos - x2 * sin, x1).to(dtype)
    y2 = tl.where(rotates, x2 * cos + x1 * sin, x2).to(dtype)
    y_ptrs = y_ptr + row.to(tl.int64)[None, :] * (heads * head_dim) + head * head_dim + place
    is_query = head < heads
    half = head_dim // 2
    tl.store(y_ptrs, y1, mask=inside & is_query)
    tl.store(y_ptrs + half, y2, mask=inside & is_query)
    is_value = (head >= heads + kv_heads).to(tl.int64)
    kv_head = ((head - heads) % kv_heads).to(tl.int64)
    cache_ptrs = cache_ptr + cache_offset + (is_value * stride_cache_value + kv_head * stride_cache_head + place)
    tl.store(cache_ptrs, y1, mask=inside & (head >= heads))
    tl.store(cache_ptrs + half, y2, mask=inside & (head >= heads))


def plan_norm_qkv_rope(
    x: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    table: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    capability: int,
) -> Launch:
    """Plan `norm_qkv_rope` for a compute capability (90 for 9.0)."""
    require_rows(x=x, gain=gain, weight=weight, table=table, cache=cache, slots=slots, positions=positions)
    kv_heads, head_dim = cache.shape[2], cache.shape[4]
    heads = weight.shape[0] // head_dim - 2 * kv_heads
    query = torch.empty(x.shape[0], heads, head_dim, device=x.device, dtype=x.dtype)
    arguments = {
        "gain_ptr": gain,
        "eps": eps,
        "table_ptr": table,
        "stride_table_sine": table.stride(0),
        "stride_table_position": table.stride(1),
        "cache_ptr": cache,
        "stride_cache_value": cache.stride(0),
        "stride_cache_slot": cache.stride(1),
        "stride_cache_head": cache.stride(2),
        "stride_cache_position": cache.stride(3),
        "slots_ptr": slots,
        "positions_ptr": positions,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
    }
    return plan_product(norm_qkv_rope_kernel, arguments, x, weight, query, capability=capability, paired=True)


def norm_qkv_rope(
    x: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    table: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """The first part of an attention block: norm, query/key/value product, rotation, and the write of key and value.

    x [rows, hidden_size], gain [hidden_size], weight [(heads + 2 * kv_heads) * head_dim, hidden_size] with the
    queries' rows first, then the keys', then the values'; table of `rope_table`; cache
    [2, slots, kv_heads, positions, head_dim] (0 keys, 1 values), slots and positions int64 [rows]: where each row's
    key and value are written. Several rows may share a slot at different positions.
    -> rotated queries [rows, heads, head_dim]
    """
    sizes: dict[str, int] = {}
    check("x", x, "rows hidden_size", sizes)
    check("gain", gain, "hidden_size", sizes, dtype=x.dtype, device=x.device)
    check("weight", weight, "qkv_size hidden_size", sizes, dtype=x.dtype, device=x.device)
    check("cache", cache, "2 slots kv_heads positions head_dim", sizes, dtype=x.dtype, device=x.device)
    check("table", table, "2 table_positions half_head_dim", sizes, dtype=torch.float32, device=x.device)
    check("slots", slots, "rows", sizes, dtype=torch.int64, device=x.device)
    check("positions", positions, "rows", sizes, dtype=torch.int64, device=x.device)
    if 2 * sizes["half_head_dim"] != sizes["head_dim"] or sizes["qkv_size"] % sizes["head_dim"]:
        raise ValueError(f"table and weight must fit head_dim {sizes['head_dim']} of the cache")
    arguments = (x, gain, eps, weight, table, cache, slots, positions)
    if x.device.type == "cpu" or sizes["rows"] > MAX_ROWS:
        return norm_qkv_rope_reference(*arguments)
    launch = plan_norm_qkv_rope(*arguments, capability=capability(x.device))
    launch.run()
    return launch.outputs[0]
