"""Attention of one position a row over the slot cache, with grouped queries (Ainslie et al. 2023, arXiv:2305.13245).

Query head h reads key/value head h // (heads / kv_heads). For a row at position p of its slot:

    out_h = softmax(q_h K^T / sqrt(head_dim)) V,     K, V = positions 0 .. p of the slot

Scores, softmax and sums are float32. Nothing beyond a row's own position is read.

With a window, K and V are the last `window` positions up to p, and the cache is a ring: position p lives at place
p % capacity, so that a stream may go on for ever.

A program runs over blocks of positions with a running maximum m and sum s (Milakov & Gimelshein 2018,
arXiv:1805.02867). Where one row is too little work, its positions are split among programs, and each leaves its part
and the logarithm of its sum, lse = m + log s. Parts join without overflow by

    out = sum_i exp(lse_i - max lse) out_i / sum_i exp(lse_i - max lse)
"""

from __future__ import annotations

import torch

from aloud.kernels.launch import (
    ANY_ALIGNMENT,
    PROGRAMMATIC_LAUNCH_CAPABILITY,
    Launch,
    ceil_div,
    next_power_of_2,
    require_rows,
)
from aloud.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton


def decode_attention_reference(
    query: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """One position a row: query [rows, heads, head_dim] -> [rows, heads * head_dim]; the rest as `attention_output`.

    With a window, a row attends to its last `window` positions (at most the capacity), and the cache is a ring.
    """
    rows, _, head_dim = query.shape
    kv_heads, capacity = cache.shape[2], cache.shape[3]
    out = torch.empty(rows, kv_heads, query.shape[1] // kv_heads, head_dim, dtype=query.dtype, device=query.device)
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        first = 0 if window is None else max(position + 1 - window, 0)
        places = torch.arange(first, position + 1, device=cache.device) % capacity
        keys, values = cache[:, slot, :, places].float()  # [kv_heads, attended positions, head_dim] each
        scores = query[row].float().view(kv_heads, -1, head_dim) @ keys.transpose(1, 2) * head_dim**-0.5
        out[row] = (scores.softmax(-1) @ values).to(query.dtype)
    return out.view(rows, -1)


# --- launch table -----------------------------------------------------------------------------------------------------
# One program is a row and a key/value head, with all of the query heads that read it, so that keys and values are read
# once. Whole: blocks of 64 positions, one after the other. Split: one block that holds the split, so that all of a
# program's keys and values are under way at once. A thread makes 64 of a block's products of query and key, as far as
# 8 warps go.

WHOLE_BLOCK = 64


def attention_warps(group: int, block: int, head_dim: int) -> int:
    """Warps of a program of `group` query heads that attends to `block` positions at once."""
    return min(max(group * block * head_dim // (64 * 32), 1), 8)


# --- kernel -----------------------------------------------------------------------------------------------------------


@triton.jit
def attend_block(query, keys, values, inside, maximum, total, attended):
    """Take a block of positions into a running softmax; maximum starts at -inf, total and attended at 0.

    query float32 [heads, 1, head_dim], scaled; keys, values [heads or 1, positions, head_dim], 0 where not `inside`
    [positions], which at least one is; maximum, total [heads]; attended [heads, head_dim], not yet over total.
    """
    scores = tl.sum(query * keys.to(tl.float32), axis=2)
    scores = tl.where(inside[None, :], scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    shares = tl.exp(scores - new_maximum[:, None])
    rescale = tl.exp(maximum - new_maximum)
    total = total * rescale + tl.sum(shares, axis=1)
    attended = attended * rescale[:, None] + tl.sum(shares[:, :, None] * values.to(tl.float32), axis=1)
    return new_maximum, total, attended


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def decode_attention_kernel(
    query_ptr,
    cache_ptr,
    slots_ptr,
    positions_ptr,
    out_ptr,
    lse_ptr,
    stride_cache_value: tl.int64,
    stride_cache_slot,
    stride_cache_head,
    stride_cache_position,
    kv_heads,
    group,
    head_dim,
    capacity,
    window,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    SPLIT: tl.constexpr,
    RING: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One row, one key/value head with its group of query heads, and SPLIT positions (0: all of them).

    out [rows, splits, heads, head_dim] and, where positions are split, lse [rows, splits, heads].
    """
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    member, dim = tl.arange(0, GROUP), tl.arange(0, HEAD_DIM)
    head = kv_head * group + member
    inside_head = (member < group)[:, None] & (dim < head_dim)[None, :]
    head_place = head[:, None] * head_dim + dim[None, :]
    if PROGRAMMATIC:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slots_ptr + row).to(tl.int64)
    position = tl.load(positions_ptr + row).to(tl.int32)
    query = tl.load(query_ptr + row * (kv_heads * group * head_dim) + head_place, mask=inside_head, other=0.0)
    query = query.to(tl.float32)[:, None, :] * scale
    keys_ptr = cache_ptr + slot * stride_cache_slot + kv_head.to(tl.int64) * stride_cache_head + dim[None, None, :]

    begin = tl.maximum(position + 1 - window, 0) if RING else 0
    end = position + 1
    if SPLIT > 0:
        begin += split * SPLIT
        end = tl.minimum(end, begin + SPLIT)
    maximum = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    attended = tl.zeros([GROUP, HEAD_DIM], tl.float32)
    for start in range(begin, end, BLOCK_POSITIONS):
        at = start + tl.arange(0, BLOCK_POSITIONS)
        inside = (at < end)[None, :, None] & (dim < head_dim)[None, None, :]
        place = at % capacity if RING else at
        places = keys_ptr + place[None, :, None] * stride_cache_position
        keys = tl.load(places, mask=inside, other=0.0)
        values = tl.load(places + stride_cache_value, mask=inside, other=0.0)
        maximum, total, attended = attend_block(query, keys, values, at < end, maximum, total, attended)

    if begin < end:  # a split beyond the row's last position leaves nothing, and the join does not read it
        part = (row * tl.num_programs(2) + split) * (kv_heads * group)
        out = (attended / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + part * head_dim + head_place, out, mask=inside_head)
        if SPLIT > 0:
            tl.store(lse_ptr + part + head, maximum + tl.log(total), mask=member < group)


# --- plan -------------------------------------------------------------------------------------------------------------


def cache_strides(cache: torch.Tensor) -> dict[str, int]:
    """Distances in elements, by the kernels' parameter names.

    The kernels take the first in 64 bits always: beyond about 2,000 slots it needs them, and that would be another
    kernel.
    """
    value, slot, head, position, _ = cache.stride()
    return {
        "stride_cache_value": value,
        "stride_cache_slot": slot,
        "stride_cache_head": head,
        "stride_cache_position": position,
    }


def plan_decode_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    window: int | None = None,
    split: int | None = None,
    *,
    capability: int,
) -> Launch:
    """One launch that does what `decode_attention_reference` does.

    With `split`, a power of two, each program takes as many positions, and the outputs are the parts, float32 [rows,
    splits, heads * head_dim], and their lse, float32 [rows, splits, heads]: only those of splits up to a row's last
    position are written. How many splits there are follows from the capacity alone, so that one captured graph serves
    all lengths.
    """
    require_rows(cache=cache)
    rows, heads, head_dim = query.shape
    _, _, kv_heads, capacity, _ = cache.shape
    if window is not None and not 0 < window <= capacity:
        raise ValueError(f"window must be 1 to the cache's {capacity} positions, got {window}")
    query = query.contiguous()
    longest = capacity if window is None else window
    group = heads // kv_heads
    if split:
        out = torch.empty(rows, ceil_div(longest, split), heads * head_dim, dtype=torch.float32, device=query.device)
        lse = torch.empty(rows, ceil_div(longest, split), heads, dtype=torch.float32, device=query.device)
        outputs: tuple[torch.Tensor, ...] = (out, lse)
    else:
        out = lse = torch.empty(rows, heads * head_dim, dtype=query.dtype, device=query.device)
        outputs = (out,)
    block_dim = next_power_of_2(head_dim)
    block = split or min(WHOLE_BLOCK, next_power_of_2(longest))
    programmatic = capability >= PROGRAMMATIC_LAUNCH_CAPABILITY
    return Launch(
        decode_attention_kernel,
        grid=(rows, kv_heads, ceil_div(longest, split) if split else 1),
        arguments={
            "query_ptr": query,
            "cache_ptr": cache,
            "slots_ptr": slots,
            "positions_ptr": positions,
            "out_ptr": out,
            "lse_ptr": lse,
            **cache_strides(cache),
            "kv_heads": kv_heads,
            "group": group,
            "head_dim": head_dim,
            "capacity": capacity,
            "window": window or capacity,
            "scale": head_dim**-0.5,
        },
        constants={
            "GROUP": next_power_of_2(group),
            "HEAD_DIM": block_dim,
            "BLOCK_POSITIONS": block,
            "SPLIT": split or 0,
            "RING": window is not None,
            "PROGRAMMATIC": programmatic,
        },
        num_warps=attention_warps(next_power_of_2(group), block, block_dim),
        programmatic=programmatic,
        outputs=outputs,
    )
