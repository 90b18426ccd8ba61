"""The decoder stack of Llama-style models: config, weights, key/value cache, step.

    x = x + attention(rms_norm(x));   x = x + swiglu(rms_norm(x));   the last norm belongs to whatever reads x

A cache is [layers, 2, slots, kv_heads, positions, head_dim]. Functions write into it and return the stack's output
before the last norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aloud.kernels.attention import attention_output
from aloud.kernels.linear import linear_residual, norm_swiglu
from aloud.kernels.qkv import norm_qkv_rope
from aloud.kernels.rope import Rope, rope_table


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of one decoder stack."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    norm_eps: float
    rope: Rope


@dataclass(frozen=True)
class LayerWeights:
    """One layer; matrices are [outputs, inputs]."""

    attention_norm: torch.Tensor  # [hidden_size]
    qkv: torch.Tensor  # [(heads + 2 * kv_heads) * head_dim, hidden_size]
    output: torch.Tensor  # [hidden_size, heads * head_dim]
    feed_forward_norm: torch.Tensor  # [hidden_size]
    gate_up: torch.Tensor  # [2 * intermediate_size, hidden_size]
    down: torch.Tensor  # [hidden_size, intermediate_size]


@dataclass(frozen=True)
class TransformerWeights:
    """A whole stack; `norm` is applied by whatever reads the stack's output."""

    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden_size]
    rope_table: torch.Tensor  # float32 [2, positions, head_dim / 2]


def allocate_weights(config: TransformerConfig, *, device: torch.device, dtype: torch.dtype) -> TransformerWeights:
    """Uninitialised weights of the right shapes; the RoPE table is computed."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device=device, dtype=dtype)

    hidden, query_size = config.hidden_size, config.heads * config.head_dim
    layers = tuple(
        LayerWeights(
            attention_norm=empty(hidden),
            qkv=empty(query_size + 2 * config.kv_heads * config.head_dim, hidden),
            output=empty(hidden, query_size),
            feed_forward_norm=empty(hidden),
            gate_up=empty(2 * config.intermediate_size, hidden),
            down=empty(hidden, config.intermediate_size),
        )
        for _ in range(config.layers)
    )
    return TransformerWeights(layers, empty(hidden), rope_table(config.rope, config.head_dim, config.positions, device))


def allocate_cache(
    config: TransformerConfig, slots: int, positions: int, *, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Keys and values for `positions` positions of `slots` streams, uninitialised."""
    shape = (config.layers, 2, slots, config.kv_heads, positions, config.head_dim)
    return torch.empty(shape, device=device, dtype=dtype)


def step(
    config: TransformerConfig,
    weights: TransformerWeights,
    cache: torch.Tensor,
    x: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """One position for each row: x [rows, hidden_size] at positions [rows] of slots [rows] -> [rows, hidden_size].

    Rows that share a slot see each other's keys and values up to their own position: a prompt's positions go together.
    x is given up: the result may lie in its place.
    """
    for layer, layer_cache in zip(weights.layers, cache, strict=True):
        query = norm_qkv_rope(
            x, layer.attention_norm, config.norm_eps, layer.qkv, weights.rope_table, layer_cache, slots, positions
        )
        x = attention_output(query, layer_cache, slots, positions, layer.output, residual=x)
        x = _feed_forward(config, layer, x)
    return x


def _feed_forward(config: TransformerConfig, layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    """x [rows, hidden_size] -> x + swiglu(rms_norm(x)) [rows, hidden_size]."""
    gated = norm_swiglu(x, layer.feed_forward_norm, config.norm_eps, layer.gate_up)
    return linear_residual(gated, layer.down, residual=x)
