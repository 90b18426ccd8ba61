"""Sesame's CSM: a backbone that draws each frame's first codebook and a depth decoder that draws the others.

A frame is 80 ms: one token in each of `codebooks` codebooks. The backbone reads text tokens and, for each frame, the
sum of its embeddings; its output gives codebook 0. The depth decoder then runs over the codebooks of that one frame:
position 0 is the backbone's output, position i the token of codebook i - 1, and position i gives codebook i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aloud.codec import mimi
from aloud.kernels.embedding import embed_frame
from aloud.kernels.linear import norm_linear
from aloud.kernels.next_code import NextCodeScratch, allocate_scratch, next_code
from aloud.models import transformer
from aloud.models.transformer import TransformerConfig, TransformerWeights
from aloud.request import Prompt, Sampling

# What stands around every text of a prompt, as the tokenizer spells it.
BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"


@dataclass(frozen=True)
class CsmConfig:
    """Sizes of a CSM model; `codec` is the codec that its codebooks belong to."""

    backbone: TransformerConfig
    depth: TransformerConfig
    codec: mimi.MimiConfig
    codebooks: int
    audio_vocabulary: int
    text_vocabulary: int
    end_token: int  # a frame of nothing but this token ends the speech

    @property
    def drawable(self) -> int:
        """Tokens of a codebook that the codec has an entry for; those above are never drawn."""
        return min(self.audio_vocabulary, self.codec.codebook_size)


@dataclass(frozen=True)
class CsmWeights:
    """Everything that the two decoders read; matrices are [outputs, inputs]. The codec's weights are its own."""

    text_embedding: torch.Tensor  # [text_vocabulary, hidden_size]
    audio_embedding: torch.Tensor  # [codebooks * audio_vocabulary, hidden_size]
    backbone: TransformerWeights
    backbone_head: torch.Tensor  # [1, audio_vocabulary, hidden_size]
    depth_projector: torch.Tensor  # [depth hidden_size, hidden_size]
    depth_embedding: (
        torch.Tensor
    )  # [codebooks * audio_vocabulary, depth hidden_size]: as the depth decoder reads, projected
    depth: TransformerWeights
    depth_heads: torch.Tensor  # [codebooks - 1, audio_vocabulary, depth hidden_size]; row i is codebook i + 1


@dataclass(frozen=True)
class CsmState:
    """All memory of `slots` streams; functions write into it and never allocate it anew."""

    backbone_cache: torch.Tensor  # [layers, 2, slots, kv_heads, positions, head_dim]
    depth_cache: torch.Tensor  # [layers, 2, slots, kv_heads, codebooks, head_dim]; one frame's, overwritten by the next
    next_input: torch.Tensor  # [slots, hidden_size]: the embedding that the backbone reads next
    position: torch.Tensor  # int64 [slots]: where it stands
    frame: torch.Tensor  # int64 [slots]: frames drawn so far
    seed: torch.Tensor  # int64 [slots]
    temperature: torch.Tensor  # float32 [2, slots]: backbone, depth
    top_k: torch.Tensor  # int32 [2, slots]
    codec: mimi.MimiState
    scratch: NextCodeScratch  # of the draws, which follow each other


@dataclass(frozen=True)
class Frame:
    """What one step gives each row."""

    codes: torch.Tensor  # int64 [rows, codebooks]; -1 where the logits were not finite
    samples: torch.Tensor  # float32 [rows, frame_size]
    ended: torch.Tensor  # bool [rows]: this frame is the end of speech and no audio


def allocate_weights(config: CsmConfig, *, device: torch.device, dtype: torch.dtype) -> CsmWeights:
    """Uninitialised weights of the right shapes."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device=device, dtype=dtype)

    hidden, depth_hidden = config.backbone.hidden_size, config.depth.hidden_size
    return CsmWeights(
        text_embedding=empty(config.text_vocabulary, hidden),
        audio_embedding=empty(config.codebooks * config.audio_vocabulary, hidden),
        backbone=transformer.allocate_weights(config.backbone, device=device, dtype=dtype),
        backbone_head=empty(1, config.audio_vocabulary, hidden),
        depth_projector=empty(depth_hidden, hidden),
        depth_embedding=empty(config.codebooks * config.audio_vocabulary, depth_hidden),
        depth=transformer.allocate_weights(config.depth, device=device, dtype=dtype),
        depth_heads=empty(config.codebooks - 1, config.audio_vocabulary, depth_hidden),
    )


def allocate(config: CsmConfig, weights: CsmWeights, slots: int, positions: int) -> CsmState:
    """Memory for `slots` streams of up to `positions` positions each, on the weights' device."""
    device, dtype = weights.text_embedding.device, weights.text_embedding.dtype
    return CsmState(
        backbone_cache=transformer.allocate_cache(config.backbone, slots, positions, device=device, dtype=dtype),
        depth_cache=transformer.allocate_cache(config.depth, slots, config.codebooks, device=device, dtype=dtype),
        next_input=torch.zeros(slots, config.backbone.hidden_size, device=device, dtype=dtype),
        position=torch.zeros(slots, device=device, dtype=torch.int64),
        frame=torch.zeros(slots, device=device, dtype=torch.int64),
        seed=torch.zeros(slots, device=device, dtype=torch.int64),
        temperature=torch.zeros(2, slots, device=device, dtype=torch.float32),
        top_k=torch.zeros(2, slots, device=device, dtype=torch.int32),
        codec=mimi.allocate_decoder_state(config.codec, slots, device=device),
        scratch=allocate_scratch(config.drawable, device),
    )


def embed_prompt(config: CsmConfig, weights: CsmWeights, prompt: Prompt) -> torch.Tensor:
    """What the backbone reads of a prompt -> [positions, hidden_size]."""
    device = weights.text_embedding.device
    text_tokens, codes = prompt.text_tokens.to(device), prompt.codes.to(device)
    text = weights.text_embedding[text_tokens.clamp(min=0)]
    audio = embed_frame(codes, weights.audio_embedding, config.audio_vocabulary)
    return torch.where((text_tokens >= 0)[:, None], text, audio)


def start(state: CsmState, slot: int, sampling: Sampling, seed: int) -> None:
    """Make `slot` a new stream: nothing of the stream before remains in what the next frames read."""
    state.position[slot] = 0
    state.frame[slot] = 0
    state.seed[slot] = seed if seed < 2**63 else seed - 2**64  # the same 64 bits, as int64 has them
    state.temperature[:, slot] = torch.tensor([sampling.temperature, sampling.depth_temperature])
    state.top_k[:, slot] = torch.tensor([sampling.top_k, sampling.depth_top_k], dtype=torch.int32)
    mimi.reset(state.codec, torch.tensor([slot], device=state.position.device))


def prefill(config: CsmConfig, weights: CsmWeights, state: CsmState, slot: int, prompt: Prompt) -> None:
    """Read a prompt into the cache of `slot`, but for its last position, which the next frame reads."""
    x = embed_prompt(config, weights, prompt)
    begin = int(state.position[slot])
    if x.shape[0] > 1:
        transformer.prefill(config.backbone, weights.backbone, state.backbone_cache, x[:-1], slot, begin)
    state.next_input[slot] = x[-1]
    state.position[slot] = begin + x.shape[0] - 1


def frame(
    config: CsmConfig, weights: CsmWeights, codec: mimi.MimiWeights, state: CsmState, slots: torch.Tensor
) -> Frame:
    """The next 80 ms of each stream in slots int64 [rows]: its codes, then its sound."""
    codes = draw_codes(config, weights, state, slots)
    samples = mimi.decode_chunk(config.codec, codec, state.codec, codes.clamp(min=0)[:, :, None], slots)
    return Frame(codes, samples, ended=(codes == config.end_token).all(dim=1))


def draw_codes(config: CsmConfig, weights: CsmWeights, state: CsmState, slots: torch.Tensor) -> torch.Tensor:
    """Draw the next frame of each stream in slots int64 [rows] and stand before the one after.

    -> int64 [rows, codebooks]
    """
    position, frame_index, seed = state.position[slots], state.frame[slots], state.seed[slots]
    temperature, top_k = state.temperature[:, slots], state.top_k[:, slots]  # [2, rows]: backbone, depth decoder
    codes: list[torch.Tensor] = []

    def draw_next(hidden: torch.Tensor) -> torch.Tensor:
        """Draw the next codebook's code from its decoder's output, and embed it for the step after."""
        codebook = len(codes)
        stack, stack_weights, heads, head, decoder = (
            (config.depth, weights.depth, weights.depth_heads, codebook - 1, 1)
            if codebook
            else (config.backbone, weights.backbone, weights.backbone_head, 0, 0)
        )
        code, embedded = next_code(
            hidden,
            stack_weights.norm,
            stack.norm_eps,
            heads,
            head,
            drawable=config.drawable,
            seed=seed,
            frame=frame_index,
            codebook=codebook,
            temperature=temperature[decoder],
            top_k=top_k[decoder],
            table=weights.depth_embedding,
            vocabulary=config.audio_vocabulary,
            scratch=state.scratch,
        )
        codes.append(code)
        return embedded

    hidden = transformer.step(
        config.backbone, weights.backbone, state.backbone_cache, state.next_input[slots], slots, position
    )
    first = norm_linear(hidden, weights.backbone.norm, config.backbone.norm_eps, weights.depth_projector)
    # The backbone's output and the first code go through the depth decoder together, as two rows of one slot.
    x, x_slots = torch.cat([first, draw_next(hidden)]), torch.cat([slots, slots])
    places = torch.arange(config.codebooks, device=slots.device).repeat_interleave(len(slots))
    for place in range(1, config.codebooks):
        x_places = places[(place + 1) * len(slots) - len(x) : (place + 1) * len(slots)]
        hidden = transformer.step(config.depth, weights.depth, state.depth_cache, x, x_slots, x_places)
        x, x_slots = draw_next(hidden[-len(slots) :]), slots

    drawn = torch.stack(codes, dim=1)
    state.next_input[slots] = embed_frame(drawn, weights.audio_embedding, config.audio_vocabulary)
    state.position[slots] = position + 1
    state.frame[slots] = frame_index + 1
    return drawn


@dataclass(frozen=True)
class Csm:
    """A loaded model: config, weights and codec together, as the engine steps it."""

    config: CsmConfig
    weights: CsmWeights
    codec: mimi.MimiWeights

    @property
    def max_positions(self) -> int:
        """Positions that a stream can take: the backbone's context."""
        return self.config.backbone.positions

    @property
    def device(self) -> torch.device:
        """Where weights and state live."""
        return self.weights.text_embedding.device

    def allocate(self, slots: int, positions: int) -> CsmState:
        """See `allocate`."""
        return allocate(self.config, self.weights, slots, positions)

    def start(self, state: CsmState, slot: int, sampling: Sampling, seed: int) -> None:
        """See `start`."""
        start(state, slot, sampling, seed)

    def prefill(self, state: CsmState, slot: int, prompt: Prompt) -> None:
        """See `prefill`."""
        prefill(self.config, self.weights, state, slot, prompt)

    def frame(self, state: CsmState, slots: torch.Tensor) -> Frame:
        """See `frame`."""
        return frame(self.config, self.weights, self.codec, state, slots)
