"""Mimi: samples to codes and codes to samples, by chunks of whole frames with carried state, or whole.

There is one path: `encode` and `decode` run chunk after chunk from a fresh state. Everything is causal, so how a stream
is cut into chunks does not change what comes out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aloud.codec.config import MimiConfig
from aloud.codec.convolution import Convolution, ConvolutionWeights, convolve, convolve_transposed
from aloud.codec.exact_convolutions import EXACT_CONVOLUTIONS
from aloud.codec.quantizer import QuantizerWeights, dequantize, quantize
from aloud.codec.seanet import Seanet, decoder_sizes, encoder_sizes, seanet_decode, seanet_encode
from aloud.codec.transformer import LayerWeights, transform
from aloud.errors import CodesInvalid
from aloud.kernels.check import check

__all__ = [
    "MimiConfig",
    "MimiState",
    "MimiWeights",
    "allocate_decoder_state",
    "allocate_encoder_state",
    "decode",
    "decode_chunk",
    "downsample_sizes",
    "encode",
    "encode_chunk",
    "of_slot",
    "reset",
    "upsample_sizes",
]

CHUNK_FRAMES = 32
"""Frames that the whole-sequence functions run at once: enough to be efficient, few enough to bound memory."""


@dataclass(frozen=True)
class MimiWeights:
    """Parameters of both sides, in one dtype but for the quantizer, which is float32."""

    encoder: Seanet[ConvolutionWeights]
    encoder_transformer: tuple[LayerWeights, ...]
    downsample: ConvolutionWeights
    semantic: QuantizerWeights
    acoustic: QuantizerWeights
    upsample: ConvolutionWeights
    decoder_transformer: tuple[LayerWeights, ...]
    decoder: Seanet[ConvolutionWeights]


@dataclass(frozen=True)
class MimiState:
    """What the streams of one side, encoding or decoding, carry from chunk to chunk; all zero in a fresh slot."""

    positions: Tensor
    """`[slots]` int64, transformer positions so far"""
    ring: Tensor
    """`[layers, 2, slots, num_key_value_heads, sliding_window, head_dim]`, the attention window"""
    resample: Tensor
    """`[slots, hidden_size, length]`, of the convolution between frames and positions"""
    seanet: Seanet[Tensor]
    """each `[slots, channels, length]`: tails of inputs, overlaps of transposed convolutions"""


def downsample_sizes(config: MimiConfig) -> Convolution:
    """Sizes of the convolution from positions to frames."""
    return Convolution(
        config.hidden_size,
        config.hidden_size,
        2 * config.downsample_ratio,
        stride=config.downsample_ratio,
        bias=False,
        replicate=True,
    )


def upsample_sizes(config: MimiConfig) -> Convolution:
    """Sizes of the transposed convolution from frames to positions."""
    return Convolution(
        config.hidden_size,
        config.hidden_size,
        2 * config.downsample_ratio,
        stride=config.downsample_ratio,
        groups=config.upsample_groups,
        bias=False,
        transposed=True,
    )


def _allocate(
    config: MimiConfig,
    seanet: Seanet[Convolution],
    resample: Convolution,
    slots: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> MimiState:
    def zeros(convolution: Convolution) -> Tensor:
        return torch.zeros(slots, *convolution.state_shape, device=device, dtype=dtype)

    ring = (config.num_hidden_layers, 2, slots, config.num_key_value_heads, config.sliding_window, config.head_dim)
    return MimiState(
        positions=torch.zeros(slots, device=device, dtype=torch.int64),
        ring=torch.zeros(ring, device=device, dtype=dtype),
        resample=zeros(resample),
        seanet=seanet.map(zeros),
    )


def allocate_encoder_state(
    config: MimiConfig, slots: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> MimiState:
    """Allocate the state of `slots` streams that encode, fresh; `dtype` is the weights' own."""
    return _allocate(config, encoder_sizes(config), downsample_sizes(config), slots, device, dtype)


def allocate_decoder_state(
    config: MimiConfig, slots: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> MimiState:
    """Allocate the state of `slots` streams that decode, fresh; `dtype` is the weights' own."""
    return _allocate(config, decoder_sizes(config), upsample_sizes(config), slots, device, dtype)


def reset(state: MimiState, slot: int) -> None:
    """Make a slot fresh, so that nothing is left of the stream it held.

    Args:
        state: of either side, changed in place.
        slot: the slot; a number and not a tensor, so that nothing has to be copied to the device first.
    """
    # Zeros, not only a counter: what attention masks out still meets a weight of 0, and 0 * NaN is NaN.
    for carried in of_slot(state, slot):
        carried.zero_()


def of_slot(state: MimiState, slot: int) -> tuple[Tensor, ...]:
    """Views of everything that a slot's stream carries from chunk to chunk."""
    carried = (state.resample, *state.seanet.leaves())
    return (state.positions[slot], state.ring[:, :, slot], *(tensor[slot] for tensor in carried))


def encode_chunk(
    config: MimiConfig,
    weights: MimiWeights,
    state: MimiState,
    samples: Tensor,
    slots: Tensor,
    num_codebooks: int | None = None,
) -> Tensor:
    """Encode the next chunk of every row's stream.

    The last chunk of a stream may have any number of samples; every other, whole frames. A partial frame is completed
    as transformers does it: each convolution pads its own input, with zeros (the downsampling, with its last value).
    The moshi package pads the samples instead, which gives other codes in that one frame.

    Args:
        config: the codec's sizes.
        weights: its parameters.
        state: of `allocate_encoder_state`, updated in place where `slots` says; other slots stand still.
        samples: `[rows, samples]` floating-point, nominally within [-1, 1].
        slots: `[rows]` int64, each row's slot, all different.
        num_codebooks: how many codebooks to compute, from the first; None: all.

    Returns:
        Codes `[rows, num_codebooks, ceil(samples / frame_size)]` int64.
    """
    sizes: dict[str, int] = {}
    check("samples", samples, "rows samples", sizes)
    check("slots", slots, "rows", sizes, dtype=torch.int64)
    num_codebooks = config.num_codebooks if num_codebooks is None else num_codebooks
    if not 1 <= num_codebooks <= config.num_codebooks:
        raise ValueError(f"num_codebooks must be from 1 to {config.num_codebooks}, got {num_codebooks}")

    with EXACT_CONVOLUTIONS.held():
        return _encode_chunk(config, weights, state, samples, slots, num_codebooks)


def _encode_chunk(
    config: MimiConfig, weights: MimiWeights, state: MimiState, samples: Tensor, slots: Tensor, num_codebooks: int
) -> Tensor:
    seen = state.positions.index_select(0, slots)
    hidden = seanet_encode(config, weights.encoder, state.seanet, samples.to(state.ring.dtype), slots)
    hidden = transform(config, weights.encoder_transformer, state.ring, seen, hidden.transpose(1, 2), slots)
    state.positions.index_copy_(0, slots, seen + hidden.shape[1])
    latents = convolve(
        downsample_sizes(config), weights.downsample, state.resample, hidden.transpose(1, 2), slots, is_first=seen == 0
    )
    latents = latents.transpose(1, 2).float()
    num_semantic = min(num_codebooks, config.num_semantic_codebooks)
    semantic = quantize(weights.semantic, latents, num_semantic)
    acoustic = quantize(weights.acoustic, latents, num_codebooks - num_semantic)
    return torch.cat([semantic, acoustic], dim=1)


def decode_chunk(config: MimiConfig, weights: MimiWeights, state: MimiState, codes: Tensor, slots: Tensor) -> Tensor:
    """Decode the next frames of every row's stream.

    No value of a tensor decides what is launched, so a call of fixed shapes can be captured in a CUDA graph; codes are
    therefore not checked here. On a CPU each row is decoded by itself: the library's convolutions and products round
    in another way when there are other rows.

    Args:
        config: the codec's sizes.
        weights: its parameters.
        state: of `allocate_decoder_state`, updated in place where `slots` says; other slots stand still.
        codes: `[rows, codebooks, frames]` int64 within the codebooks, of the first 1 to `num_codebooks` codebooks.
        slots: `[rows]` int64, each row's slot, all different.

    Returns:
        Samples `[rows, frames * frame_size]` float32.
    """
    sizes: dict[str, int] = {}
    check("codes", codes, "rows codebooks frames", sizes, dtype=torch.int64)
    check("slots", slots, "rows", sizes, dtype=torch.int64)
    if not 1 <= sizes["codebooks"] <= config.num_codebooks:
        raise ValueError(f"codes must have 1 to {config.num_codebooks} codebooks, got {sizes['codebooks']}")
    if not codes.is_cuda and sizes["rows"] > 1:
        alone = zip(codes.split(1), slots.split(1), strict=True)
        return torch.cat([decode_chunk(config, weights, state, row, slot) for row, slot in alone])

    with EXACT_CONVOLUTIONS.held():
        return _decode_chunk(config, weights, state, codes, slots, sizes["codebooks"])


def _decode_chunk(
    config: MimiConfig, weights: MimiWeights, state: MimiState, codes: Tensor, slots: Tensor, codebooks: int
) -> Tensor:
    latents = dequantize(weights.semantic, codes[:, : config.num_semantic_codebooks])
    if codebooks > config.num_semantic_codebooks:
        latents = latents + dequantize(weights.acoustic, codes[:, config.num_semantic_codebooks :])
    latents = latents.to(state.ring.dtype).transpose(1, 2)

    seen = state.positions.index_select(0, slots)
    hidden = convolve_transposed(upsample_sizes(config), weights.upsample, state.resample, latents, slots)
    hidden = transform(config, weights.decoder_transformer, state.ring, seen, hidden.transpose(1, 2), slots)
    state.positions.index_copy_(0, slots, seen + hidden.shape[1])
    return seanet_decode(config, weights.decoder, state.seanet, hidden.transpose(1, 2), slots).float()


def encode(config: MimiConfig, weights: MimiWeights, samples: Tensor, num_codebooks: int | None = None) -> Tensor:
    """Encode a whole recording from a fresh state.

    Args:
        config: the codec's sizes.
        weights: its parameters.
        samples: `[samples]` floating-point, any number of them, nominally within [-1, 1].
        num_codebooks: how many codebooks to compute, from the first; None: all.

    Returns:
        Codes `[num_codebooks, ceil(samples / frame_size)]` int64.
    """
    check("samples", samples, "samples", {})
    device, dtype = weights.downsample.weight.device, weights.downsample.weight.dtype
    state = allocate_encoder_state(config, 1, device=device, dtype=dtype)
    slots = torch.zeros(1, device=device, dtype=torch.int64)
    chunks = [
        encode_chunk(config, weights, state, chunk.to(device)[None], slots, num_codebooks)[0]
        for chunk in samples.split(CHUNK_FRAMES * config.frame_size)
        if len(chunk)
    ]
    if not chunks:
        return torch.empty(num_codebooks or config.num_codebooks, 0, device=device, dtype=torch.int64)
    return torch.cat(chunks, dim=-1)


def decode(config: MimiConfig, weights: MimiWeights, codes: Tensor) -> Tensor:
    """Decode a whole recording from a fresh state.

    Args:
        config: the codec's sizes.
        weights: its parameters.
        codes: `[codebooks, frames]` int64, of the first 1 to `num_codebooks` codebooks.

    Returns:
        Samples `[frames * frame_size]` float32.

    Raises:
        CodesInvalid: the shape or dtype is another, or an entry is outside its codebook.
    """
    if codes.dtype != torch.int64 or codes.dim() != 2 or not 1 <= codes.shape[0] <= config.num_codebooks:
        raise CodesInvalid(
            f"Codes to decode must be int64 [codebooks, frames] with 1 to {config.num_codebooks} codebooks, "
            f"these are {codes.dtype} {list(codes.shape)}; give them as `encode` returns them."
        )
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < config.codebook_size:
        raise CodesInvalid(
            f"Codes to decode must be from 0 to {config.codebook_size - 1}, these are from {int(codes.min())} to "
            f"{int(codes.max())}; leave out frames with tokens that the codec has no entry for."
        )
    device, dtype = weights.upsample.weight.device, weights.upsample.weight.dtype
    state = allocate_decoder_state(config, 1, device=device, dtype=dtype)
    slots = torch.zeros(1, device=device, dtype=torch.int64)
    chunks = [
        decode_chunk(config, weights, state, chunk.to(device)[None], slots)[0]
        for chunk in codes.split(CHUNK_FRAMES, dim=1)
        if chunk.shape[1]
    ]
    return torch.cat(chunks) if chunks else torch.empty(0, device=device)
