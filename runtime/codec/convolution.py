"""Causal convolution, and its transpose, chunk by chunk with carried state.

A convolution's output depends on its input's past alone, so a stream carries the tail of the input:

    y[t] = sum_k weight[k] x[t * stride + k * dilation - tail_length]
    tail_length = (kernel - 1) * dilation + 1 - stride

A transposed convolution's input reaches `kernel - stride` samples past its own chunk: a stream carries that overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Convolution:
    """Sizes of one causal convolution, or of a transposed one."""

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    bias: bool = True
    transposed: bool = False
    replicate: bool = False
    """Whether the input is padded by repeating its first and last values instead of with zeros."""

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """Shape of the weight, as PyTorch has it."""
        if self.transposed:
            return (self.in_channels, self.out_channels // self.groups, self.kernel_size)
        return (self.out_channels, self.in_channels // self.groups, self.kernel_size)

    @property
    def state_shape(self) -> tuple[int, int]:
        """What a stream carries, `[channels, length]`: the input's tail, or the output's overlap."""
        channels = self.out_channels if self.transposed else self.in_channels
        return (channels, (self.kernel_size - 1) * self.dilation + 1 - self.stride)


@dataclass(frozen=True)
class ConvolutionWeights:
    """Parameters of one convolution."""

    weight: Tensor
    """`Convolution.weight_shape`"""
    bias: Tensor | None
    """`[out_channels]`"""


def convolve(
    sizes: Convolution,
    weights: ConvolutionWeights,
    tails: Tensor,
    inputs: Tensor,
    slots: Tensor,
    *,
    is_first: Tensor | None = None,
) -> Tensor:
    """Convolve the next chunk of every row, and carry its tail.

    A length that is no multiple of the stride is padded on the right up to one, which is right for the last chunk of a
    stream only: the slot has to be reset after it.

    Args:
        sizes: the convolution's sizes.
        weights: its parameters.
        tails: `[slots, in_channels, tail_length]`, updated in place.
        inputs: `[rows, in_channels, length]`.
        slots: `[rows]` int64, each row's slot in `tails`, all different.
        is_first: `[rows]` bool, whether this is the first chunk of a row's stream; needed by `sizes.replicate` only.

    Returns:
        `[rows, out_channels, ceil(length / stride)]`.
    """
    tail_length = tails.shape[-1]
    if tail_length:
        tail = tails.index_select(0, slots)
        if is_first is not None:
            tail = torch.where(is_first[:, None, None], inputs[..., :1], tail)
        inputs = torch.cat([tail, inputs], dim=-1)
        tails.index_copy_(0, slots, inputs[..., -tail_length:])
    missing = -(inputs.shape[-1] - tail_length) % sizes.stride
    if missing:
        inputs = F.pad(inputs, (0, missing), mode="replicate" if sizes.replicate else "constant")
    return F.conv1d(
        inputs, weights.weight, weights.bias, stride=sizes.stride, dilation=sizes.dilation, groups=sizes.groups
    )


def convolve_transposed(
    sizes: Convolution, weights: ConvolutionWeights, overlaps: Tensor, inputs: Tensor, slots: Tensor
) -> Tensor:
    """Convolve the next chunk of every row with the transpose, and carry what reaches past the chunk.

    Args:
        sizes: the convolution's sizes.
        weights: its parameters.
        overlaps: `[slots, out_channels, kernel_size - stride]`, updated in place; without bias.
        inputs: `[rows, in_channels, length]`.
        slots: `[rows]` int64, each row's slot in `overlaps`, all different.

    Returns:
        `[rows, out_channels, length * stride]`.
    """
    outputs = F.conv_transpose1d(inputs, weights.weight, stride=sizes.stride, groups=sizes.groups)
    overlap = overlaps.shape[-1]
    if overlap:
        outputs[..., :overlap].add_(overlaps.index_select(0, slots))  # with +=, Python would write it back as well
        overlaps.index_copy_(0, slots, outputs[..., -overlap:])
        outputs = outputs[..., :-overlap]
    return outputs if weights.bias is None else outputs + weights.bias[:, None]
