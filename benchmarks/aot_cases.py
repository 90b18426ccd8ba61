"""The launches that csm-1b makes, planned from tensors without memory, for the ahead-of-time compiler.

A case is a function of (dtype, rows, compute capability) that returns a `Launch`, or a tuple of them when an operation
takes several.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from aloud.kernels.attention import plan_attention_output
from aloud.kernels.codebook_head import plan_codebook_head
from aloud.kernels.draw import plan_draw
from aloud.kernels.embedding import plan_embed_code, plan_embed_prompt
from aloud.kernels.frame_state import plan_begin_frame, plan_end_frame
from aloud.kernels.launch import Launch
from aloud.kernels.linear import plan_linear_residual, plan_norm_linear, plan_norm_swiglu
from aloud.kernels.next_code import allocate_scratch, plan_draw_embed, plan_next_code
from aloud.kernels.qkv import plan_norm_qkv_rope
from aloud.kernels.rms_norm import plan_rms_norm
from aloud.kernels.rope import plan_rotate_qkv
from aloud.kernels.swiglu import plan_swiglu

EPS = 1e-5
CODEBOOKS = 32
VOCABULARY = 2051
TEXT_VOCABULARY = 128_256
DRAWABLE = 2048
Case = Callable[[torch.dtype, int, int], Launch | tuple[Launch, ...]]


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that has a shape and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def rms_norm(hidden_size: int) -> Case:
    """A norm alone."""

    def plan(dtype: torch.dtype, rows: int, capability: int) -> Launch:
        x, gain = empty(rows, hidden_size, dtype=dtype), empty(hidden_size, dtype=dtype)
        return plan_rms_norm(x, gain, EPS, capability=capability)

    return plan


def linear_residual(inputs: int, outputs: int) -> Case:
    """A product and the residual."""

    def plan(dtype: torch.dtype, rows: int, capability: int) -> tuple[Launch, ...]:
        x, residual = empty(rows, inputs, dtype=dtype), empty(rows, outputs, dtype=dtype)
        return plan_linear_residual(x, empty(outputs, inputs, dtype=dtype), residual, capability=capability)

    return plan


def norm_linear(inputs: int, outputs: int) -> Case:
    """A norm and a product."""

    def plan(dtype: torch.dtype, rows: int, capability: int) -> Launch:
        x, gain = empty(rows, inputs, dtype=dtype), empty(inputs, dtype=dtype)
        return plan_norm_linear(x, gain, EPS, empty(outputs, inputs, dtype=dtype), capability=capability)

    return plan


def norm_swiglu(inputs: int, width: int) -> Case:
    """The first half of a feed-forward block."""

    def plan(dtype: torch.dtype, rows: int, capability: int) -> Launch:
        x, gain = empty(rows, inputs, dtype=dtype), empty(inputs, dtype=dtype)
        return plan_norm_swiglu(x, gain, EPS, empty(2 * width, inputs, dtype=dtype), capability=capability)

    return plan


def norm_qkv_rope(hidden_size: int, heads: int, kv_heads: int, head_dim: int, positions: int) -> Case:
    """The first part of an attention block, over the cache of 64 slots."""

    def plan(dtype: torch.dtype, rows: int, capability: int) -> Launch:
        x, gain = empty(rows, hidden_size, dtype=dtype), empty(hidden_size, dtype=dtype)
        weight = empty((heads + 2 * kv_heads) * head_dim, hidden_size, dtype=dtype)
        table = empty(2, positions, head_dim // 2, dtype=torch.float32)
        cache = empty(2, 64, kv_heads, positions, head_dim, dtype=dtype)
        indices = empty(rows, dtype=torch.int64)
        return plan_norm_qkv_rope(x, gain, EPS, weight, table, cache, indices, indices, capability=capability)

    return plan


def rotate_qkv(heads: int, kv_heads: int, head_dim: int, positions: int) -> Case:
    """The rotation behind a library's product, over the cache of 64 slots."""

    def plan(dtype: torch.dtype, rows: int, capability: int) -> Launch:
        products = empty(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
        table = empty(2, positions, head_dim // 2, dtype=torch.float32)
        cache = empty(2, 64, kv_heads, positions, head_dim, dtype=dtype)
        indices = empty(rows, dtype=torch.int64)
        return plan_rotate_qkv(products, table, cache, indices, indices, capability=capability)

    return plan


def swiglu(dtype: torch.dtype, rows: int, capability: int) -> Launch:
    """SwiGLU behind a library's product."""
    return plan_swiglu(empty(rows, 2 * 8192, dtype=dtype), capability=capability)


def attention_output(hidden_size: int, heads: int, kv_heads: int, head_dim: int, positions: int) -> Case:
    """The second part of an attention block, over the cache of 64 slots."""

    def plan(dtype: torch.dtype, rows: int, capability: int) -> tuple[Launch, ...]:
        query = empty(rows, heads, head_dim, dtype=dtype)
        cache = empty(2, 64, kv_heads, positions, head_dim, dtype=dtype)
        indices = empty(rows, dtype=torch.int64)
        weight, residual = empty(hidden_size, heads * head_dim, dtype=dtype), empty(rows, hidden_size, dtype=dtype)
        return plan_attention_output(query, cache, indices, indices, weight, residual, capability=capability)

    return plan


def sampling(rows: int) -> dict[str, torch.Tensor]:
    """What a draw takes beside logits."""
    integers = empty(rows, dtype=torch.int64)
    return {
        "seed": integers,
        "frame": integers,
        "temperature": empty(rows, dtype=torch.float32),
        "top_k": empty(rows, dtype=torch.int32),
    }


def codebook_head(hidden_size: int, heads: int) -> Case:
    """A codebook's head alone."""

    def plan(dtype: torch.dtype, rows: int, capability: int) -> Launch:
        x, gain = empty(rows, hidden_size, dtype=dtype), empty(hidden_size, dtype=dtype)
        weights = empty(heads, VOCABULARY, hidden_size, dtype=dtype)
        return plan_codebook_head(x, gain, EPS, weights, heads - 1, capability=capability)

    return plan


def draw(dtype: torch.dtype, rows: int, capability: int) -> Launch:
    """A draw alone."""
    logits = empty(rows, VOCABULARY, dtype=torch.float32)[:, :DRAWABLE]
    given = sampling(rows)
    return plan_draw(
        logits,
        seed=given["seed"],
        frame=given["frame"],
        codebook=3,
        temperature=given["temperature"],
        top_k=given["top_k"],
        capability=capability,
    )


def draw_embed(dtype: torch.dtype, rows: int, capability: int) -> Launch:
    """The draw and the gather behind a library's product."""
    logits, table = empty(rows, DRAWABLE, dtype=torch.float32), empty(CODEBOOKS * VOCABULARY, 1024, dtype=dtype)
    return plan_draw_embed(
        logits, codebook=3, table=table, vocabulary=VOCABULARY, capability=capability, **sampling(rows)
    )


def next_code(hidden_size: int, heads: int) -> Case:
    """Head, draw and next input, which is the depth decoder's in both."""

    def plan(dtype: torch.dtype, rows: int, capability: int) -> tuple[Launch, ...]:
        x, gain = empty(rows, hidden_size, dtype=dtype), empty(hidden_size, dtype=dtype)
        return plan_next_code(
            x,
            gain,
            EPS,
            empty(heads, VOCABULARY, hidden_size, dtype=dtype),
            heads - 1,
            drawable=DRAWABLE,
            codebook=heads - 1,
            table=empty((CODEBOOKS - 1) * VOCABULARY, 1024, dtype=dtype),
            vocabulary=VOCABULARY,
            scratch=allocate_scratch(DRAWABLE, torch.device("meta")),
            capability=capability,
            **sampling(rows),
        )

    return plan


def embed_prompt(dtype: torch.dtype, rows: int, capability: int) -> Launch:
    """The backbone's input at prompt positions."""
    tokens, codes = empty(rows, dtype=torch.int64), empty(CODEBOOKS, rows, dtype=torch.int64).T
    text_table, table = empty(TEXT_VOCABULARY, 2048, dtype=dtype), empty(CODEBOOKS * VOCABULARY, 2048, dtype=dtype)
    return plan_embed_prompt(tokens, codes, text_table, table, VOCABULARY, capability=capability)


def begin_frame(dtype: torch.dtype, rows: int, capability: int) -> Launch:
    """What a frame takes from its streams."""
    numbers = empty(rows + 1, dtype=torch.int64)
    return plan_begin_frame(
        empty(rows + 1, 2048, dtype=dtype),
        numbers,
        numbers,
        numbers,
        empty(2, rows + 1, dtype=torch.float32),
        empty(2, rows + 1, dtype=torch.int32),
        empty(rows, dtype=torch.int64),
        CODEBOOKS,
        capability=capability,
    )


def end_frame(dtype: torch.dtype, rows: int, capability: int) -> Launch:
    """What a frame leaves to its streams."""
    codes, table = empty(rows, CODEBOOKS, dtype=torch.int64), empty(CODEBOOKS * VOCABULARY, 2048, dtype=dtype)
    next_input, numbers = empty(rows + 1, 2048, dtype=dtype), empty(rows + 1, dtype=torch.int64)
    slots = empty(rows, dtype=torch.int64)
    return plan_end_frame(codes, table, VOCABULARY, next_input, numbers, numbers, slots, capability=capability)


def embed_code(dtype: torch.dtype, rows: int, capability: int) -> Launch:
    """The depth decoder's input, where it does not come from `next_code`."""
    codes = empty(rows, CODEBOOKS, dtype=torch.int64)[:, 3]
    table = empty((CODEBOOKS - 1) * VOCABULARY, 1024, dtype=dtype)
    return plan_embed_code(codes, table, VOCABULARY, 3, capability=capability)


CASES: dict[str, Case] = {
    "norm.backbone": rms_norm(2048),
    "norm.depth": rms_norm(1024),
    "qkv.backbone": norm_qkv_rope(2048, heads=32, kv_heads=8, head_dim=64, positions=2048),
    "qkv.depth": norm_qkv_rope(1024, heads=8, kv_heads=2, head_dim=128, positions=33),
    "attention.backbone": attention_output(2048, heads=32, kv_heads=8, head_dim=64, positions=2048),
    "attention.depth": attention_output(1024, heads=8, kv_heads=2, head_dim=128, positions=CODEBOOKS),
    "down.backbone": linear_residual(8192, 2048),
    "down.depth": linear_residual(8192, 1024),
    "projector": norm_linear(2048, 1024),
    "gate_up.backbone": norm_swiglu(2048, 8192),
    "gate_up.depth": norm_swiglu(1024, 8192),
    "head.backbone": codebook_head(2048, heads=1),
    "head.depth": codebook_head(1024, heads=CODEBOOKS - 1),
    "draw": draw,
    "next_code.backbone": next_code(2048, heads=1),
    "next_code.depth": next_code(1024, heads=CODEBOOKS - 1),
    "embed_prompt": embed_prompt,
    "begin_frame": begin_frame,
    "end_frame": end_frame,
    "embed_code": embed_code,
    "rotate.backbone": rotate_qkv(heads=32, kv_heads=8, head_dim=64, positions=2048),
    "rotate.depth": rotate_qkv(heads=8, kv_heads=2, head_dim=128, positions=CODEBOOKS),
    "swiglu": swiglu,
    "draw_embed": draw_embed,
}
"""By the name that the table shows."""
