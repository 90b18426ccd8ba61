"""The second part of an attention block: attention of one position a row, output projection, residual.

    out = residual + attention(query, cache) W^T

The attention is `decode_attention`'s, rounded to the weights' dtype. Rows may be positions of one slot: once all have
written their keys and values, each attends to those up to its own.
"""

from __future__ import annotations

import torch

from aloud.kernels.check import check
from aloud.kernels.decode_attention import (
    attend_block,
    cache_strides,
    decode_attention_reference,
    plan_decode_attention,
)
from aloud.kernels.launch import (
    ANY_ALIGNMENT,
    PROGRAMMATIC_LAUNCH_CAPABILITY,
    Launch,
    capability,
    ceil_div,
    next_power_of_2,
    require_rows,
)
from aloud.kernels.linear import linear_residual, linear_residual_reference, plan_linear_residual
from aloud.kernels.product import MATRIX_ROWS, MAX_ROWS, PROGRAMS
from aloud.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton


def attention_output_reference(
    query: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
) -> torch.Tensor:
    """The definition of `attention_output`."""
    return linear_residual_reference(decode_attention_reference(query, cache, slots, positions), weight, residual)


# --- launch table -----------------------------------------------------------------------------------------------------
# A step between dependent kernels costs about 2 us, so one launch is better than two wherever the work allows it.
#
# Short caches (the depth decoder's 32 positions hold 32 KB of keys and values): every program of the output projection
# attends for itself, up to FUSED_ROWS rows; beyond, repeating each row's attention in about 128 programs costs more
# than the step that it saves. Blocks of 16 positions (8 in float32): one is enough in half of the depth decoder's
# steps.
#
# Long caches, below MATRIX_ROWS rows: splits of 128 positions, so that one row of 500 positions and 8 key/value heads
# is 32 programs, joined by every program of the output projection. A row's result does not depend on how many rows
# there are.
#
# Otherwise rows * kv_heads programs fill the chip, each runs over all positions of its row, and the projection is
# `linear_residual`.

FUSED_CAPACITY = 64
FUSED_ROWS = 4
FUSED_BLOCK_BYTES = 32
SPLIT = 128
JOINED = 4
"""Parts that the output projection reads at once: 512 positions."""
MAX_WEIGHT_BYTES = 2**15
"""A program's slice of the weight, in registers: 32 of each of 256 threads, 64 once they are float32."""


def output_block(hidden_size: int, row_bytes: int) -> int:
    """Rows of the output projection's weight, each of `row_bytes`, that one program owns: a power of two.

    No more programs than PROGRAMS: what stands before the projection is repeated in each.
    """
    block = 1
    while 2 * block * PROGRAMS <= hidden_size and 2 * block * row_bytes <= MAX_WEIGHT_BYTES:
        block *= 2
    return block


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def output_weight(
    weight_ptr, stride_weight_row, n, hidden_size, heads, head_dim, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Load whole rows `n` of the output projection's weight -> [outputs, HEADS * HEAD_DIM], 0 where there is none."""
    k = tl.arange(0, HEADS * HEAD_DIM)
    head, dim = k // HEAD_DIM, k % HEAD_DIM
    inside = (n < hidden_size)[:, None] & ((head < heads) & (dim < head_dim))[None, :]
    place = n.to(tl.int64)[:, None] * stride_weight_row + (head * head_dim + dim)[None, :]
    return tl.load(weight_ptr + place, mask=inside, other=0.0)


@triton.jit
def project_row(attended, weight, residual_ptr, stride_residual_row, out_ptr, row, n, hidden_size):
    """residual + attended weight^T for one row and outputs `n`, rounded as the reference rounds."""
    dtype: tl.constexpr = weight.dtype
    attended = tl.reshape(attended.to(dtype), [weight.shape[1]])
    projected = tl.sum(weight.to(tl.float32) * attended.to(tl.float32)[None, :], axis=1)
    residual = tl.load(residual_ptr + row * stride_residual_row + n, mask=n < hidden_size, other=0.0)
    out = residual.to(tl.float32) + projected.to(dtype).to(tl.float32)
    tl.store(out_ptr + row * hidden_size + n, out.to(dtype), mask=n < hidden_size)


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def short_attention_output_kernel(
    query_ptr,
    cache_ptr,
    slots_ptr,
    positions_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    stride_cache_value: tl.int64,
    stride_cache_slot,
    stride_cache_head,
    stride_cache_position,
    stride_weight_row,
    stride_residual_row,
    rows,
    heads,
    group,
    head_dim,
    hidden_size,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Attention of all heads of each row, then BLOCK_N outputs of the projection.

    Heads are spread over threads and warps and positions are not, so that nearly no sum crosses warps; that each query
    head loads its own copy of the keys and values that it shares costs less.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if PROGRAMMATIC:
        gdc_launch_dependents()
    weight = output_weight(weight_ptr, stride_weight_row, n, hidden_size, heads, head_dim, HEADS, HEAD_DIM)
    if PROGRAMMATIC:
        gdc_wait()
    head, dim = tl.arange(0, HEADS)[:, None, None], tl.arange(0, HEAD_DIM)[None, None, :]
    head_inside = (head < heads) & (dim < head_dim)
    for row in range(rows):
        slot = tl.load(slots_ptr + row).to(tl.int64)
        position = tl.load(positions_ptr + row).to(tl.int32)
        query = tl.load(query_ptr + (row * heads + head) * head_dim + dim, mask=head_inside, other=0.0)
        query = query.to(tl.float32) * scale
        keys_ptr = cache_ptr + slot * stride_cache_slot + head // group * stride_cache_head + dim
        maximum = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        attended = tl.zeros([HEADS, HEAD_DIM], tl.float32)
        for start in range(0, position + 1, BLOCK_POSITIONS):
            at = start + tl.arange(0, BLOCK_POSITIONS)
            inside = head_inside & (at <= position)[None, :, None]
            places = keys_ptr + at[None, :, None] * stride_cache_position
            keys = tl.load(places, mask=inside, other=0.0)
            values = tl.load(places + stride_cache_value, mask=inside, other=0.0)
            maximum, total, attended = attend_block(query, keys, values, at <= position, maximum, total, attended)
        attended = attended / total[:, None]
        project_row(attended, weight, residual_ptr, stride_residual_row, out_ptr, row, n, hidden_size)


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def join_output_kernel(
    parts_ptr,
    lse_ptr,
    positions_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    stride_weight_row,
    stride_residual_row,
    rows,
    splits,
    heads,
    head_dim,
    hidden_size,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    JOINED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Join the parts of each row's attention, JOINED at once, then BLOCK_N outputs of the projection."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if PROGRAMMATIC:
        gdc_launch_dependents()
    weight = output_weight(weight_ptr, stride_weight_row, n, hidden_size, heads, head_dim, HEADS, HEAD_DIM)
    if PROGRAMMATIC:
        gdc_wait()
    head, dim = tl.arange(0, HEADS), tl.arange(0, HEAD_DIM)
    inside = (head < heads)[:, None] & (dim < head_dim)[None, :]
    for row in range(rows):
        used = tl.load(positions_ptr + row).to(tl.int32) // SPLIT + 1
        # Heads that only fill up the block have no lse: 0 keeps them from -inf - -inf, and their sums are not stored.
        maximum = tl.where(head < heads, float("-inf"), 0.0)
        total = tl.zeros([HEADS], tl.float32)
        attended = tl.zeros([HEADS, HEAD_DIM], tl.float32)
        for start in range(0, used, JOINED):
            for step in tl.static_range(JOINED):
                split = start + step
                place = (row * splits + split) * heads + head
                lse = tl.load(lse_ptr + place, mask=(head < heads) & (split < used), other=float("-inf"))
                part_ptr = parts_ptr + place[:, None] * head_dim + dim[None, :]
                part = tl.load(part_ptr, mask=inside & (split < used), other=0.0)
                new_maximum = tl.maximum(maximum, lse)
                share = tl.exp(lse - new_maximum)
                rescale = tl.exp(maximum - new_maximum)
                total = total * rescale + share
                attended = attended * rescale[:, None] + share[:, None] * part
                maximum = new_maximum
        attended = attended / tl.where(head < heads, total, 1.0)[:, None]
        project_row(attended, weight, residual_ptr, stride_residual_row, out_ptr, row, n, hidden_size)


# --- plans ------------------------------------------------------------------------------------------------------------


def plan_attention_output(
    query: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    *,
    capability: int,
) -> tuple[Launch, ...]:
    """The one to three launches behind `attention_output`; the last one's output is the result."""
    rows, capacity = query.shape[0], cache.shape[3]
    query = query.contiguous()
    require_rows(cache=cache, weight=weight, residual=residual)
    if capacity <= FUSED_CAPACITY and rows <= FUSED_ROWS:
        return (_plan_short(query, cache, slots, positions, weight, residual, capability),)
    if capacity <= FUSED_CAPACITY or rows >= MATRIX_ROWS:
        attention = plan_decode_attention(query, cache, slots, positions, capability=capability)
        return attention, *plan_linear_residual(attention.outputs[0], weight, residual, capability=capability)
    attention = plan_decode_attention(query, cache, slots, positions, split=SPLIT, capability=capability)
    return attention, _plan_join(attention, positions, weight, residual, query.shape[1], capability)


def _plan_short(
    query: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    capability: int,
) -> Launch:
    rows, heads, head_dim = query.shape
    hidden_size = weight.shape[0]
    out = torch.empty(rows, hidden_size, dtype=query.dtype, device=query.device)
    constants = {"HEADS": next_power_of_2(heads), "HEAD_DIM": next_power_of_2(head_dim)}
    row_bytes = constants["HEADS"] * constants["HEAD_DIM"] * weight.element_size()
    programmatic = capability >= PROGRAMMATIC_LAUNCH_CAPABILITY
    block = output_block(hidden_size, row_bytes)
    return Launch(
        short_attention_output_kernel,
        grid=(ceil_div(hidden_size, block),),
        arguments={
            "query_ptr": query,
            "cache_ptr": cache,
            "slots_ptr": slots,
            "positions_ptr": positions,
            "weight_ptr": weight,
            "residual_ptr": residual,
            "out_ptr": out,
            **cache_strides(cache),
            "stride_weight_row": weight.stride(0),
            "stride_residual_row": residual.stride(0),
            "rows": rows,
            "heads": heads,
            "group": heads // cache.shape[2],
            "head_dim": head_dim,
            "hidden_size": hidden_size,
            "scale": head_dim**-0.5,
        },
        constants={
            **constants,
            "BLOCK_POSITIONS": FUSED_BLOCK_BYTES // weight.element_size(),
            "BLOCK_N": block,
            "PROGRAMMATIC": programmatic,
        },
        num_warps=8,
        programmatic=programmatic,
        outputs=(out,),
    )


def _plan_join(
    attention: Launch,
    positions: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    heads: int,
    capability: int,
) -> Launch:
    parts, lse = attention.outputs
    rows, splits, attended_size = parts.shape
    hidden_size, head_dim = weight.shape[0], attended_size // heads
    out = torch.empty(rows, hidden_size, dtype=weight.dtype, device=weight.device)
    constants = {"HEADS": next_power_of_2(heads), "HEAD_DIM": next_power_of_2(head_dim)}
    row_bytes = constants["HEADS"] * constants["HEAD_DIM"] * weight.element_size()
    programmatic = capability >= PROGRAMMATIC_LAUNCH_CAPABILITY
    block = output_block(hidden_size, row_bytes)
    return Launch(
        join_output_kernel,
        grid=(ceil_div(hidden_size, block),),
        arguments={
            "parts_ptr": parts,
            "lse_ptr": lse,
            "positions_ptr": positions,
            "weight_ptr": weight,
            "residual_ptr": residual,
            "out_ptr": out,
            "stride_weight_row": weight.stride(0),
            "stride_residual_row": residual.stride(0),
            "rows": rows,
            "splits": splits,
            "heads": heads,
            "head_dim": head_dim,
            "hidden_size": hidden_size,
        },
        constants={
            **constants,
            "SPLIT": SPLIT,
            "JOINED": min(JOINED, next_power_of_2(splits)),
            "BLOCK_N": block,
            "PROGRAMMATIC": programmatic,
        },
        num_warps=8,
        programmatic=programmatic,
        outputs=(out,),
    )


# --- entries ----------------------------------------------------------------------------------------------------------


def attention_output(
    query: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
) -> torch.Tensor:
    """The second part of an attention block: attention of one position a row, output projection, residual.

    query [rows, heads, head_dim]; cache [2, slots, kv_heads, positions, head_dim]; slots, positions int64 [rows]:
    row r attends to positions 0 .. positions[r] of slot slots[r]; weight [hidden_size, heads * head_dim];
    residual [rows, hidden_size], which is given up: the result may lie in its place -> [rows, hidden_size]
    """
    sizes: dict[str, int] = {}
    check("query", query, "rows heads head_dim", sizes)
    check("cache", cache, "2 slots kv_heads positions head_dim", sizes, dtype=query.dtype, device=query.device)
    check("slots", slots, "rows", sizes, dtype=torch.int64, device=query.device)
    check("positions", positions, "rows", sizes, dtype=torch.int64, device=query.device)
    check("weight", weight, "hidden_size attended_size", sizes, dtype=query.dtype, device=query.device)
    check("residual", residual, "rows hidden_size", sizes, dtype=query.dtype, device=query.device)
    if sizes["heads"] % sizes["kv_heads"] or sizes["attended_size"] != sizes["heads"] * sizes["head_dim"]:
        raise ValueError(f"heads must be a multiple of kv_heads and weight fit both, got {sizes}")
    if not query.is_cuda:
        return attention_output_reference(query, cache, slots, positions, weight, residual)
    if sizes["rows"] > MAX_ROWS:
        attention = plan_decode_attention(query, cache, slots, positions, capability=capability(query.device))
        attention.run()
        return linear_residual(attention.outputs[0], weight, residual)
    launches = plan_attention_output(
        query, cache, slots, positions, weight, residual, capability=capability(query.device)
    )
    for launch in launches:
        launch.run()
    return launches[-1].outputs[0]
