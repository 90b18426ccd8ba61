"""Residual vector quantisation, split in a semantic and an acoustic half; always in float32.

Each half projects the latent on its own, then each of its codebooks takes the entry nearest to what the codebooks
before it left over:

    code_i = argmin_j |residual_i - entry_ij|,    residual_(i+1) = residual_i - entry_i,code_i

and the latent is, for each half, the sum of the chosen entries projected back.

Source: Zeghidour et al., "SoundStream", 2021; the split, as in Mimi (see `config.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

USAGE_FLOOR = 1e-5
"""Least cluster usage that an entry is divided by; it belongs to the checkpoints, which store sums and usages."""


@dataclass(frozen=True)
class QuantizerWeights:
    """Parameters of one half, all float32."""

    codebooks: Tensor
    """`[codebooks, codebook_size, codebook_dim]` entries: sum of the members / usage"""
    half_norms: Tensor
    """`[codebooks, codebook_size]` half the squared length of each entry"""
    input_projection: Tensor | None
    """`[codebook_dim, hidden_size]`, or None where both sizes are one"""
    output_projection: Tensor | None
    """`[hidden_size, codebook_dim]`, or None where both sizes are one"""


def quantize(weights: QuantizerWeights, latents: Tensor, num_codebooks: int) -> Tensor:
    """Latents to codes of one half.

    Args:
        weights: the half's parameters.
        latents: `[rows, frames, hidden_size]` float32.
        num_codebooks: how many of the half's codebooks to use.

    Returns:
        `[rows, num_codebooks, frames]` int64; among equally near entries the lowest index.
    """
    residual = latents if weights.input_projection is None else F.linear(latents, weights.input_projection)
    codes = []
    for entries, half_norms in zip(weights.codebooks[:num_codebooks], weights.half_norms[:num_codebooks], strict=True):
        # |residual - entry|^2 / 2 without |residual|^2 / 2, which is the same for all entries
        nearest = (half_norms - F.linear(residual, entries)).argmin(dim=-1)
        residual = residual - F.embedding(nearest, entries)
        codes.append(nearest)
    if not codes:
        return torch.empty(latents.shape[0], 0, latents.shape[1], dtype=torch.int64, device=latents.device)
    return torch.stack(codes, dim=1)


def dequantize(weights: QuantizerWeights, codes: Tensor) -> Tensor:
    """Codes of one half to its part of the latents.

    Args:
        weights: the half's parameters.
        codes: `[rows, codebooks, frames]` int64, of the half's first codebooks.

    Returns:
        `[rows, frames, hidden_size]` float32.
    """
    num_codebooks = codes.shape[1]
    size = weights.codebooks.shape[1]
    offsets = torch.arange(num_codebooks, device=codes.device)[:, None] * size
    latents = F.embedding(codes + offsets, weights.codebooks.flatten(0, 1)).sum(dim=1)
    return latents if weights.output_projection is None else F.linear(latents, weights.output_projection)
