"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) with Llama 3's scaling of the frequencies.

A head's first half x1 and second half x2 are the two coordinates of head_dim / 2 planes; plane i is rotated by the
angle position * f_i:

    y1 = x1 cos - x2 sin
    y2 = x2 cos + x1 sin,      f_i = theta^(-2 i / head_dim)

Llama 3 slows frequencies whose wavelength 2 pi / f is longer than original_positions / low_factor by `factor`, keeps
those shorter than original_positions / high_factor, and blends linearly in between.

Angles are float32 from one table; the rotation is float32 and rounded once, to the dtype of x.

`rotate_qkv` rotates products that a library has made; where a kernel makes them, it rotates them itself (qkv.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from aloud.kernels.check import check
from aloud.kernels.decode_attention import cache_strides
from aloud.kernels.launch import (
    ANY_ALIGNMENT,
    PROGRAMMATIC_LAUNCH_CAPABILITY,
    Launch,
    capability,
    ceil_div,
    next_power_of_2,
    require_rows,
)
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


def rotate_qkv_reference(
    products: torch.Tensor, table: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The definition of `rotate_qkv`."""
    kv_heads, head_dim = cache.shape[2], cache.shape[4]
    heads = products.unflatten(-1, (-1, head_dim))
    query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    cache[0, slots, :, positions] = rotate_reference(key, table, positions)
    cache[1, slots, :, positions] = value
    return rotate_reference(query, table, positions)


# --- launch table -----------------------------------------------------------------------------------------------------
# A row's heads are spread over programs of about 512 planes, 8 for each of 64 threads: two loads of 16 bytes in
# bfloat16. Rows are many (this stands behind a library's product), so programs are more than enough.

PLANES = 512
ROTATE_WARPS = 2


# --- kernel -----------------------------------------------------------------------------------------------------------


@triton.jit
def store_rotated(
    x1,
    x2,
    cos,
    sin,
    head,
    plane,
    inside,
    query_ptr,
    cache_ptr,
    stride_cache_value,
    stride_cache_head,
    heads,
    kv_heads,
    head_dim,
):
    """Rotate queries and keys and store them and values: two blocks of planes, in any layout.

    x1, x2: coordinates, float32, already rounded to the dtype they are stored in
    head, plane: of each element; all heads are counted, queries', keys', values'
    query_ptr: where a row's queries begin; cache_ptr: where its keys begin in the cache; of one row or a block of rows
    """
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    rotates = head < heads + kv_heads
    y1 = tl.where(rotates, x1 * cos - x2 * sin, x1).to(dtype)
    y2 = tl.where(rotates, x2 * cos + x1 * sin, x2).to(dtype)
    half = head_dim // 2
    query_ptrs = query_ptr + head * head_dim + plane
    is_query = head < heads
    tl.store(query_ptrs, y1, mask=inside & is_query)
    tl.store(query_ptrs + half, y2, mask=inside & is_query)
    is_value = (head >= heads + kv_heads).to(tl.int64)
    kv_head = ((head - heads) % kv_heads).to(tl.int64)
    cache_ptrs = cache_ptr + (is_value * stride_cache_value + kv_head * stride_cache_head + plane)
    tl.store(cache_ptrs, y1, mask=inside & (head >= heads))
    tl.store(cache_ptrs + half, y2, mask=inside & (head >= heads))


@triton.jit(do_not_specialize_on_alignment=ANY_ALIGNMENT)
def rotate_qkv_kernel(
    products_ptr,
    table_ptr,
    cache_ptr,
    slots_ptr,
    positions_ptr,
    query_ptr,
    stride_products_row,
    stride_table_sine,
    stride_table_position,
    stride_cache_value: tl.int64,
    stride_cache_slot,
    stride_cache_head,
    stride_cache_position,
    heads,
    kv_heads,
    head_dim,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One program takes HEADS heads of one row: queries to their place, keys and values to the cache."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    plane = tl.arange(0, HALF)[None, :]
    half = head_dim // 2
    inside = (head < heads + 2 * kv_heads) & (plane < half)
    if PROGRAMMATIC:
        gdc_launch_dependents()
        gdc_wait()
    slot, position = tl.load(slots_ptr + row), tl.load(positions_ptr + row)
    angle_ptrs = table_ptr + position * stride_table_position + plane
    cos = tl.load(angle_ptrs, mask=plane < half, other=1.0)
    sin = tl.load(angle_ptrs + stride_table_sine, mask=plane < half, other=0.0)
    product_ptrs = products_ptr + row * stride_products_row + head * head_dim + plane
    x1 = tl.load(product_ptrs, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(product_ptrs + half, mask=inside, other=0.0).to(tl.float32)
    store_rotated(
        x1,
        x2,
        cos,
        sin,
        head,
        plane,
        inside,
        query_ptr + row * (heads * head_dim),
        cache_ptr + slot * stride_cache_slot + position * stride_cache_position,
        stride_cache_value,
        stride_cache_head,
        heads,
        kv_heads,
        head_dim,
    )


# --- plan and entry ---------------------------------------------------------------------------------------------------


def plan_rotate_qkv(
    products: torch.Tensor,
    table: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    capability: int,
) -> Launch:
    """Plan `rotate_qkv` for a compute capability (90 for 9.0)."""
    require_rows(products=products, table=table, cache=cache, slots=slots, positions=positions)
    rows, qkv_size = products.shape
    _, _, kv_heads, _, head_dim = cache.shape
    all_heads = qkv_size // head_dim
    query = torch.empty(rows, all_heads - 2 * kv_heads, head_dim, device=products.device, dtype=products.dtype)
    half = next_power_of_2(head_dim // 2)
    block = min(max(PLANES // half, 1), next_power_of_2(all_heads))
    programmatic = capability >= PROGRAMMATIC_LAUNCH_CAPABILITY
    return Launch(
        rotate_qkv_kernel,
        grid=(rows, ceil_div(all_heads, block)),
        arguments={
            "products_ptr": products,
            "table_ptr": table,
            "cache_ptr": cache,
            "slots_ptr": slots,
            "positions_ptr": positions,
            "query_ptr": query,
            "stride_products_row": products.stride(0),
            "stride_table_sine": table.stride(0),
            "stride_table_position": table.stride(1),
            **cache_strides(cache),
            "heads": all_heads - 2 * kv_heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
        },
        constants={"HEADS": block, "HALF": half, "PROGRAMMATIC": programmatic},
        num_warps=ROTATE_WARPS,
        programmatic=programmatic,
        outputs=(query,),
    )


def rotate_qkv(
    products: torch.Tensor, table: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Rotate queries and keys, and write keys and values to the cache.

    products [rows, (heads + 2 * kv_heads) * head_dim]: the queries' heads, then the keys', then the values'; table of
    `rope_table`; cache [2, slots, kv_heads, positions, head_dim] (0 keys, 1 values); slots, positions int64 [rows]:
    where each row's key and value are written -> rotated queries [rows, heads, head_dim]
    """
    sizes: dict[str, int] = {}
    check("products", products, "rows qkv_size", sizes)
    check("cache", cache, "2 slots kv_heads positions head_dim", sizes, dtype=products.dtype, device=products.device)
    check("table", table, "2 table_positions half_head_dim", sizes, dtype=torch.float32, device=products.device)
    check("slots", slots, "rows", sizes, dtype=torch.int64, device=products.device)
    check("positions", positions, "rows", sizes, dtype=torch.int64, device=products.device)
    if 2 * sizes["half_head_dim"] != sizes["head_dim"] or sizes["qkv_size"] % sizes["head_dim"]:
        raise ValueError(f"table and products must fit head_dim {sizes['head_dim']} of the cache")
    if not products.is_cuda:
        return rotate_qkv_reference(products, table, cache, slots, positions)
    launch = plan_rotate_qkv(products, table, cache, slots, positions, capability=capability(products.device))
    launch.run()
    return launch.outputs[0]
