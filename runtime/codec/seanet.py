"""SEANet: the convolutions between samples and hidden states, on both sides of Mimi.

    encoder: convolution, then stages of (residual blocks, strided convolution), then convolution
    decoder: convolution, then stages of (transposed convolution, residual blocks), then convolution

with an ELU before every convolution but the first. One tree, `Seanet`, has the sizes, the weights and the state of all
convolutions as its leaves.

Source: Tagliasacchi et al., "SEANet: a multi-modal speech enhancement network", 2020, as in Mimi (see `config.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

import torch.nn.functional as F
from torch import Tensor

from aloud.codec.config import MimiConfig
from aloud.codec.convolution import Convolution, ConvolutionWeights, convolve, convolve_transposed

Leaf = TypeVar("Leaf")
Other = TypeVar("Other")


@dataclass(frozen=True)
class ResidualBlock(Generic[Leaf]):
    """A dilated convolution, a pointwise one, and the skip connection (`None`: the identity)."""

    dilated: Leaf
    pointwise: Leaf
    shortcut: Leaf | None


@dataclass(frozen=True)
class Stage(Generic[Leaf]):
    """One change of the rate, and the residual blocks at the higher of the two rates."""

    resample: Leaf
    residual_blocks: tuple[ResidualBlock[Leaf], ...]


@dataclass(frozen=True)
class Seanet(Generic[Leaf]):
    """Something for every convolution of one side, the encoder's or the decoder's."""

    first: Leaf
    stages: tuple[Stage[Leaf], ...]
    last: Leaf

    def map(self, function: Callable[[Leaf], Other]) -> Seanet[Other]:
        """Return the same tree with `function` of every leaf."""
        return Seanet(
            first=function(self.first),
            stages=tuple(
                Stage(
                    resample=function(stage.resample),
                    residual_blocks=tuple(
                        ResidualBlock(
                            dilated=function(block.dilated),
                            pointwise=function(block.pointwise),
                            shortcut=None if block.shortcut is None else function(block.shortcut),
                        )
                        for block in stage.residual_blocks
                    ),
                )
                for stage in self.stages
            ),
            last=function(self.last),
        )

    def leaves(self) -> Iterator[Leaf]:
        """Iterate over all leaves, in an order that only the tree's form decides."""
        yield self.first
        for stage in self.stages:
            yield stage.resample
            for block in stage.residual_blocks:
                yield block.dilated
                yield block.pointwise
                if block.shortcut is not None:
                    yield block.shortcut
        yield self.last


def _residual_blocks(config: MimiConfig, channels: int) -> tuple[ResidualBlock[Convolution], ...]:
    inner = channels // config.compress
    return tuple(
        ResidualBlock(
            dilated=Convolution(
                channels, inner, config.residual_kernel_size, dilation=config.dilation_growth_rate**index
            ),
            pointwise=Convolution(inner, channels, 1),
            shortcut=Convolution(channels, channels, 1) if config.use_conv_shortcut else None,
        )
        for index in range(config.num_residual_layers)
    )


@cache
def encoder_sizes(config: MimiConfig) -> Seanet[Convolution]:
    """Sizes of the encoder's convolutions."""
    stages = []
    channels = config.num_filters
    for ratio in reversed(config.upsampling_ratios):
        resample = Convolution(channels, 2 * channels, 2 * ratio, stride=ratio)
        stages.append(Stage(resample, _residual_blocks(config, channels)))
        channels *= 2
    return Seanet(
        first=Convolution(1, config.num_filters, config.kernel_size),
        stages=tuple(stages),
        last=Convolution(channels, config.hidden_size, config.last_kernel_size),
    )


@cache
def decoder_sizes(config: MimiConfig) -> Seanet[Convolution]:
    """Sizes of the decoder's convolutions."""
    stages = []
    channels = config.num_filters * 2 ** len(config.upsampling_ratios)
    first = Convolution(config.hidden_size, channels, config.kernel_size)
    for ratio in config.upsampling_ratios:
        resample = Convolution(channels, channels // 2, 2 * ratio, stride=ratio, transposed=True)
        channels //= 2
        stages.append(Stage(resample, _residual_blocks(config, channels)))
    return Seanet(first, tuple(stages), last=Convolution(channels, 1, config.last_kernel_size))


def _residual_block(
    sizes: ResidualBlock[Convolution],
    weights: ResidualBlock[ConvolutionWeights],
    state: ResidualBlock[Tensor],
    hidden: Tensor,
    slots: Tensor,
) -> Tensor:
    inner = convolve(sizes.dilated, weights.dilated, state.dilated, F.elu(hidden), slots)
    inner = convolve(sizes.pointwise, weights.pointwise, state.pointwise, F.elu(inner), slots)
    if sizes.shortcut is not None and weights.shortcut is not None and state.shortcut is not None:
        hidden = convolve(sizes.shortcut, weights.shortcut, state.shortcut, hidden, slots)
    return hidden + inner


def seanet_encode(
    config: MimiConfig, weights: Seanet[ConvolutionWeights], state: Seanet[Tensor], samples: Tensor, slots: Tensor
) -> Tensor:
    """Samples to hidden states, for the next chunk of every row.

    Args:
        config: the codec's sizes.
        weights: parameters of the encoder's convolutions.
        state: tails `[slots, channels, tail_length]`, updated in place.
        samples: `[rows, length]`; see `convolve` for a length that does not divide.
        slots: `[rows]` int64, each row's slot.

    Returns:
        `[rows, hidden_size, ceil(length / prod(upsampling_ratios))]`.
    """
    sizes = encoder_sizes(config)
    hidden = convolve(sizes.first, weights.first, state.first, samples[:, None], slots)
    for stage, stage_weights, stage_state in zip(sizes.stages, weights.stages, state.stages, strict=True):
        for block in zip(
            stage.residual_blocks, stage_weights.residual_blocks, stage_state.residual_blocks, strict=True
        ):
            hidden = _residual_block(*block, hidden, slots)
        hidden = convolve(stage.resample, stage_weights.resample, stage_state.resample, F.elu(hidden), slots)
    return convolve(sizes.last, weights.last, state.last, F.elu(hidden), slots)


def seanet_decode(
    config: MimiConfig, weights: Seanet[ConvolutionWeights], state: Seanet[Tensor], hidden: Tensor, slots: Tensor
) -> Tensor:
    """Hidden states to samples, for the next chunk of every row.

    Args:
        config: the codec's sizes.
        weights: parameters of the decoder's convolutions.
        state: tails and overlaps `[slots, channels, length]`, updated in place.
        hidden: `[rows, hidden_size, positions]`.
        slots: `[rows]` int64, each row's slot.

    Returns:
        `[rows, positions * prod(upsampling_ratios)]`.
    """
    sizes = decoder_sizes(config)
    hidden = convolve(sizes.first, weights.first, state.first, hidden, slots)
    for stage, stage_weights, stage_state in zip(sizes.stages, weights.stages, state.stages, strict=True):
        hidden = convolve_transposed(stage.resample, stage_weights.resample, stage_state.resample, F.elu(hidden), slots)
        for block in zip(
            stage.residual_blocks, stage_weights.residual_blocks, stage_state.residual_blocks, strict=True
        ):
            hidden = _residual_block(*block, hidden, slots)
    return convolve(sizes.last, weights.last, state.last, F.elu(hidden), slots)[:, 0]
