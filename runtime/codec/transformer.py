"""Mimi's transformer: causal attention over a sliding window, chunk by chunk with carried keys and values.

    hidden += scale * attention(layer_norm(hidden));    hidden += scale * fc2(gelu(fc1(layer_norm(hidden))))

A stream carries, for every layer, the last `sliding_window` keys and values in a ring: position p lies at index
p mod sliding_window, so one counter of positions says what every place of the ring holds.

Sources: RoPE, Su et al. 2021; LayerScale, Touvron et al. 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aloud.codec.config import MimiConfig


@dataclass(frozen=True)
class LayerWeights:
    """Parameters of one layer."""

    attention_norm_weight: Tensor
    """`[hidden_size]`"""
    attention_norm_bias: Tensor
    """`[hidden_size]`"""
    query_key_value: Tensor
    """`[(num_attention_heads + 2 * num_key_value_heads) * head_dim, hidden_size]`, RoPE in half-split order"""
    attention_output: Tensor
    """`[hidden_size, num_attention_heads * head_dim]`"""
    attention_scale: Tensor
    """`[hidden_size]`"""
    mlp_norm_weight: Tensor
    """`[hidden_size]`"""
    mlp_norm_bias: Tensor
    """`[hidden_size]`"""
    fc1: Tensor
    """`[intermediate_size, hidden_size]`"""
    fc2: Tensor
    """`[hidden_size, intermediate_size]`"""
    mlp_scale: Tensor
    """`[hidden_size]`"""


def rotation(config: MimiConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE's angles.

    Args:
        config: the codec's sizes.
        positions: int64, of any shape.

    Returns:
        Two of `[*positions, head_dim / 2]` float32.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents  # rounded here as everywhere: far out, an ulp turns the angle
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate queries and keys `[rows, heads, positions, head_dim]` by angles `[rows, positions, head_dim / 2]`."""
    first, second = vectors.float().chunk(2, dim=-1)
    cosine, sine = cosine[:, None], sine[:, None]
    rotated = [
        torch.addcmul(first * cosine, second, sine, value=-1),
        torch.addcmul(second * cosine, first, sine),
    ]
    return torch.cat(rotated, dim=-1).to(vectors.dtype)


def visible(config: MimiConfig, seen: Tensor, length: int) -> Tensor:
    """Which keys each new position attends to: those of `(position - sliding_window, position]`.

    Args:
        config: the codec's sizes.
        seen: `[rows]` int64, positions before this chunk.
        length: new positions.

    Returns:
        `[rows, 1, length, sliding_window + length]` bool; keys are the ring's places, then the new positions.
    """
    window = config.sliding_window
    places = torch.arange(window, device=seen.device)
    last = seen[:, None] - 1
    ring = last - (last - places) % window  # the newest position before this chunk that belongs in a place
    new = seen[:, None] + torch.arange(length, device=seen.device)
    keys = torch.cat([ring, new], dim=1)[:, None, None]
    queries = new[:, None, :, None]
    return (keys >= 0) & (keys <= queries) & (keys > queries - window)


def transform(
    config: MimiConfig,
    layers: Sequence[LayerWeights],
    ring: Tensor,
    seen: Tensor,
    hidden: Tensor,
    slots: Tensor,
) -> Tensor:
    """Run all layers on the next positions of every row, and carry their keys and values.

    Args:
        config: the codec's sizes.
        layers: parameters of each layer.
        ring: `[layers, 2, slots, num_key_value_heads, sliding_window, head_dim]` keys and values, updated in place.
        seen: `[rows]` int64, positions before this chunk.
        hidden: `[rows, positions, hidden_size]`.
        slots: `[rows]` int64, each row's slot in `ring`, all different.

    Returns:
        `[rows, positions, hidden_size]`.
    """
    rows, length, _ = hidden.shape
    window, head_dim, kv_heads = config.sliding_window, config.head_dim, config.num_key_value_heads
    heads_per_kv_head = config.num_attention_heads // kv_heads

    positions = seen[:, None] + torch.arange(length, device=seen.device)
    cosine, sine = rotation(config, positions)
    bias = torch.where(visible(config, seen, length), 0.0, float("-inf")).to(hidden.dtype)  # once, not in each layer
    kept = min(length, window)  # only the newest `window` of the new positions still matter afterwards
    places = positions[:, -kept:] % window

    for layer, layer_ring in zip(layers, ring, strict=True):
        normed = F.layer_norm(
            hidden, (config.hidden_size,), layer.attention_norm_weight, layer.attention_norm_bias, config.norm_eps
        )
        heads = F.linear(normed, layer.query_key_value).view(rows, length, -1, head_dim).transpose(1, 2)
        rotating, value = heads.split([config.num_attention_heads + kv_heads, kv_heads], dim=1)
        query, key = rotate(rotating, cosine, sine).split([config.num_attention_heads, kv_heads], dim=1)

        # Keys and values together: [2, rows, kv_heads, positions, head_dim].
        new = torch.stack([key, value])
        keys, values = torch.cat([layer_ring.index_select(1, slots), new], dim=3)
        layer_ring[:, slots[:, None], :, places] = new[:, :, :, -kept:].permute(1, 3, 0, 2, 4)
        if heads_per_kv_head > 1:
            keys = keys.repeat_interleave(heads_per_kv_head, dim=1)
            values = values.repeat_interleave(heads_per_kv_head, dim=1)

        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias)
        attended = F.linear(attended.transpose(1, 2).reshape(rows, length, -1), layer.attention_output)
        hidden = torch.addcmul(hidden, layer.attention_scale, attended)

        normed = F.layer_norm(
            hidden, (config.hidden_size,), layer.mlp_norm_weight, layer.mlp_norm_bias, config.norm_eps
        )
        hidden = torch.addcmul(hidden, layer.mlp_scale, F.linear(F.gelu(F.linear(normed, layer.fc1)), layer.fc2))
    return hidden
