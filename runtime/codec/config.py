"""What varies between Mimi codecs: one frozen configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MimiConfig:
    """Sizes of a Mimi codec; the defaults are Kyutai's published one.

    The convolutions (SEANet) go between samples and hidden states at `sample_rate / prod(upsampling_ratios)` (25 Hz), a
    transformer runs at that rate, and one strided convolution goes between it and the frame rate (12.5 Hz).

    Source: Défossez et al., "Moshi: a speech-text foundation model for real-time dialogue", 2024, section 3.3.
    """

    sample_rate: int = 24_000
    """Samples a second of the one audio channel, in Hz."""
    num_codebooks: int = 32
    """Codebooks a frame, semantic ones first."""
    num_semantic_codebooks: int = 1
    codebook_size: int = 2048
    """Entries of every codebook."""
    codebook_dim: int = 256
    hidden_size: int = 512

    num_filters: int = 64
    """Channels of the convolutions at the sample rate; they double with every stage."""
    num_residual_layers: int = 1
    """Residual blocks of every stage."""
    upsampling_ratios: tuple[int, ...] = (8, 6, 5, 4)
    """Strides of the decoder's stages, in the decoder's order."""
    kernel_size: int = 7
    last_kernel_size: int = 3
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    compress: int = 2
    """How much narrower a residual block is inside."""
    use_conv_shortcut: bool = False
    """Whether a residual block's skip connection is a pointwise convolution instead of the identity."""
    downsample_ratio: int = 2
    """Transformer positions a frame."""
    upsample_groups: int = 512
    """Groups of the transposed convolution from frames to positions; as many as channels makes it depthwise."""

    num_hidden_layers: int = 8
    """Layers of each of the two transformers."""
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 64
    sliding_window: int = 250
    """Positions that a position attends to, itself included."""
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    @property
    def frame_size(self) -> int:
        """Samples a frame."""
        return math.prod(self.upsampling_ratios) * self.downsample_ratio

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.sample_rate / self.frame_size

    @property
    def num_acoustic_codebooks(self) -> int:
        """Codebooks that are not semantic."""
        return self.num_codebooks - self.num_semantic_codebooks
