"""The first part of an attention block: norm, query/key/value product, rotation, write of key and value.

    [q, k, v] = rms_norm(x) [queries, keys, values]^T;   q, k rotated (rope.py);   k, v to the slot's cache

One launch: a program's share of the product is planes, the two coordinates of each, so that it can rotate what it has
made. How weights stream and how many planes a program owns: product.py. For more rows than these kernels take, the
product is cuBLAS's, between a norm and a rotation of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from aloud.kernels.check import check
from aloud.kernels.decode_attention import cache_strides
from aloud.kernels.launch import ANY_ALIGNMENT, Launch, capability, require_rows
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
from aloud.kernels.rms_norm import normed, rms_norm, rms_norm_reference
from aloud.kernels.rope import rotate_qkv, rotate_qkv_reference, store_rotated
from aloud.kernels.row_product import row_product
from aloud.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton


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
    products = row_product(rms_norm_reference(x, gain, eps), weight)
    return rotate_qkv_reference(products, table, cache, slots, positions)


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
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
    stride_cache_value: tl.int64,
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
    x1, x2 = split_pairs(products.to(y_ptr.dtype.element_ty).to(tl.float32))  # [planes, rows] each
    head, plane, inside = _planes(heads, kv_heads, head_dim, BLOCK_OUTPUTS)
    store_rotated(
        x1,
        x2,
        cos,
        sin,
        head,
        plane,
        inside & (row < rows)[None, :],
        y_ptr + row.to(tl.int64)[None, :] * (heads * head_dim),
        cache_ptr + cache_offset,
        stride_cache_value,
        stride_cache_head,
        heads,
        kv_heads,
        head_dim,
    )


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
        **cache_strides(cache),
        "slots_ptr": slots,
        "positions_ptr": positions,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
    }
    return plan_product(norm_qkv_rope_kernel, arguments, x, weight, query, capability=capability, paired=True)


def norm_qkv_rope_by_library(
    x: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    table: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """`norm_qkv_rope` of many rows, whose product is cuBLAS's."""
    return rotate_qkv(F.linear(rms_norm(x, gain, eps), weight), table, cache, slots, positions)


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
    if not x.is_cuda:
        return norm_qkv_rope_reference(*arguments)
    if sizes["rows"] > MAX_ROWS:
        return norm_qkv_rope_by_library(*arguments)
    launch = plan_norm_qkv_rope(*arguments, capability=capability(x.device))
    launch.run()
    return launch.outputs[0]
