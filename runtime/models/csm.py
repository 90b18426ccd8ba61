"""Sesame's CSM: a backbone that draws each frame's first codebook and a depth decoder that draws the others.

A frame is 80 ms: one token in each of `codebooks` codebooks. The backbone reads text tokens and, for each frame, the
sum of its embeddings; its output gives codebook 0. The depth decoder then runs over the codebooks of that one frame:
position 0 is the backbone's output, position i the token of codebook i - 1, and position i gives codebook i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aloud import memory
from aloud.codec import mimi
from aloud.kernels import embedding
from aloud.kernels.frame_state import begin_frame, end_frame
from aloud.kernels.linear import norm_linear
from aloud.kernels.next_code import NextCodeScratch, allocate_scratch, next_code
from aloud.models import transformer
from aloud.models.transformer import TransformerConfig, TransformerWeights
from aloud.prompt_block import PromptBlock
from aloud.request import Sampling

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
    """All memory of `slots` streams; functions write into it and never allocate it anew.

    The last slot is the scratch slot, of rows that have no stream: it stands still, and what is in it means nothing.
    """

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
class Sound:
    """What a frame's codes are to a listener."""

    samples: torch.Tensor  # float32 [rows, frame_size]
    power: torch.Tensor  # float32 [rows]: the samples' mean square
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


def allocate(config: CsmConfig, slots: int, positions: int, *, device: torch.device, dtype: torch.dtype) -> CsmState:
    """Memory for `slots` streams, the scratch slot among them, of up to `positions` positions each."""
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


def state_bytes(config: CsmConfig, slots: int, positions: int, *, dtype: torch.dtype) -> int:
    """Bytes that `allocate` takes, without taking them."""
    return memory.bytes_of(allocate(config, slots, positions, device=torch.device("meta"), dtype=dtype))


def embed_prompt(
    config: CsmConfig, weights: CsmWeights, text_tokens: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """What the backbone reads at prompt positions: text_tokens int64 [positions], -1 where codes int64 [positions,
    codebooks] stand -> [positions, hidden_size]
    """
    tables = weights.text_embedding, weights.audio_embedding
    return embedding.embed_prompt(text_tokens, codes, *tables, config.audio_vocabulary)


def start(state: CsmState, slot: int, sampling: Sampling, seed: int, positions: int) -> None:
    """Make `slot` a new stream whose prompt takes `positions`, but for its sound, see `start_sound`.

    Each number is filled in: one that is assigned would be a tensor on the host, and the host would wait for its copy.
    """
    state.position[slot].fill_(positions - 1)  # the prompt's last position is read by the first frame
    state.frame[slot].fill_(0)
    state.seed[slot].fill_(seed if seed < 2**63 else seed - 2**64)  # the same 64 bits, as int64 has them
    state.temperature[0, slot].fill_(sampling.temperature)
    state.temperature[1, slot].fill_(sampling.depth_temperature)
    state.top_k[0, slot].fill_(sampling.top_k)
    state.top_k[1, slot].fill_(sampling.depth_top_k)


def start_sound(state: CsmState, slot: int) -> None:
    """Make a slot's sound that of a new stream; nothing of the stream before remains in it."""
    mimi.reset(state.codec, slot)


def prefill(config: CsmConfig, weights: CsmWeights, state: CsmState, block: PromptBlock) -> None:
    """Read a block of prompt positions into their slots' caches; a prompt's last one is the next frame's input."""
    x = embed_prompt(config, weights, block.text_tokens, block.codes)
    state.next_input[block.next_slots] = x  # before the step, which x is given up to
    transformer.step(config.backbone, weights.backbone, state.backbone_cache, x, block.slots, block.positions)


def copy_prefix(state: CsmState, slot: int, positions: int) -> torch.Tensor:
    """The keys and values of a slot's first positions -> [layers, 2, kv_heads, positions, head_dim]."""
    return state.backbone_cache[:, :, slot, :, :positions].clone()


def paste_prefix(state: CsmState, slot: int, prefix: torch.Tensor, positions: int) -> None:
    """Put the first keys and values of `copy_prefix` where a slot begins, as if its positions had been read."""
    state.backbone_cache[:, :, slot, :, :positions] = prefix[:, :, :, :positions]


def copy_stream(state: CsmState, slot: int, positions: int) -> tuple[torch.Tensor, ...]:
    """All that a slot's stream is, of whose context the first `positions` positions have been read."""
    return tuple(part.clone() for part in _of_slot(state, slot, positions))


def paste_stream(state: CsmState, slot: int, stream: tuple[torch.Tensor, ...]) -> None:
    """Make a slot a stream that `copy_stream` gave."""
    for part, copied in zip(_of_slot(state, slot, stream[0].shape[3]), stream, strict=True):
        part.copy_(copied)


def _of_slot(state: CsmState, slot: int, positions: int) -> tuple[torch.Tensor, ...]:
    """Views of everything that a slot's stream carries from frame to frame; the depth decoder carries nothing."""
    return (
        state.backbone_cache[:, :, slot, :, :positions],
        *(tensor[slot] for tensor in (state.next_input, state.position, state.frame, state.seed)),
        state.temperature[:, slot],
        state.top_k[:, slot],
        *mimi.of_slot(state.codec, slot),
    )


def decode(
    config: CsmConfig, codec: mimi.MimiWeights, state: CsmState, codes: torch.Tensor, slots: torch.Tensor
) -> Sound:
    """The sound of a frame's codes int64 [rows, codebooks] of the streams in slots int64 [rows]."""
    samples = mimi.decode_chunk(config.codec, codec, state.codec, codes.clamp(min=0)[:, :, None], slots)
    return Sound(samples, samples.square().mean(dim=1), ended=(codes == config.end_token).all(dim=1))


def draw_codes(config: CsmConfig, weights: CsmWeights, state: CsmState, slots: torch.Tensor) -> torch.Tensor:
    """Draw the next frame of each stream in slots int64 [rows] and stand before the one after.

    -> int64 [rows, codebooks]; -1 where the logits were not finite
    """
    rows = begin_frame(
        state.next_input,
        state.position,
        state.frame,
        state.seed,
        state.temperature,
        state.top_k,
        slots,
        config.codebooks,
    )
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
            seed=rows.seed,
            frame=rows.frame,
            codebook=codebook,
            temperature=rows.temperature[decoder],
            top_k=rows.top_k[decoder],
            table=weights.depth_embedding,
            vocabulary=config.audio_vocabulary,
            scratch=state.scratch,
        )
        codes.append(code)
        return embedded

    hidden = transformer.step(config.backbone, weights.backbone, state.backbone_cache, rows.x, slots, rows.position)
    first = norm_linear(hidden, weights.backbone.norm, config.backbone.norm_eps, weights.depth_projector)
    # The backbone's output and the first code go through the depth decoder together, as two rows of one slot.
    x, x_slots = torch.cat([first, draw_next(hidden)]), rows.slots_twice
    for place in range(1, config.codebooks):
        x_places = rows.places[(place + 1) * len(slots) - len(x) : (place + 1) * len(slots)]
        hidden = transformer.step(config.depth, weights.depth, state.depth_cache, x, x_slots, x_places)
        x, x_slots = draw_next(hidden[-len(slots) :]), slots

    drawn = torch.stack(codes, dim=1)
    end_frame(
        drawn, weights.audio_embedding, config.audio_vocabulary, state.next_input, state.position, state.frame, slots
    )
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
    def codebooks(self) -> int:
        """Tokens of a frame."""
        return self.config.codebooks

    @property
    def device(self) -> torch.device:
        """Where weights and state live."""
        return self.weights.text_embedding.device

    def allocate(self, slots: int, positions: int) -> CsmState:
        """See `allocate`."""
        return allocate(self.config, slots, positions, device=self.device, dtype=self.weights.text_embedding.dtype)

    def state_bytes(self, slots: int, positions: int) -> int:
        """Bytes that `allocate` takes."""
        return state_bytes(self.config, slots, positions, dtype=self.weights.text_embedding.dtype)

    def start(self, state: CsmState, slot: int, sampling: Sampling, seed: int, positions: int) -> None:
        """See `start`."""
        start(state, slot, sampling, seed, positions)

    def start_sound(self, state: CsmState, slot: int) -> None:
        """See `start_sound`."""
        start_sound(state, slot)

    def prefill(self, state: CsmState, block: PromptBlock) -> None:
        """See `prefill`."""
        prefill(self.config, self.weights, state, block)

    def copy_prefix(self, state: CsmState, slot: int, positions: int) -> torch.Tensor:
        """See `copy_prefix`."""
        return copy_prefix(state, slot, positions)

    def paste_prefix(self, state: CsmState, slot: int, prefix: torch.Tensor, positions: int) -> None:
        """See `paste_prefix`."""
        paste_prefix(state, slot, prefix, positions)

    def copy_stream(self, state: CsmState, slot: int, positions: int) -> tuple[torch.Tensor, ...]:
        """See `copy_stream`."""
        return copy_stream(state, slot, positions)

    def paste_stream(self, state: CsmState, slot: int, stream: tuple[torch.Tensor, ...]) -> None:
        """See `paste_stream`."""
        paste_stream(state, slot, stream)

    def draw(self, state: CsmState, slots: torch.Tensor) -> torch.Tensor:
        """See `draw_codes`."""
        return draw_codes(self.config, self.weights, state, slots)

    def decode(self, state: CsmState, codes: torch.Tensor, slots: torch.Tensor) -> Sound:
        """See `decode`."""
        return decode(self.config, self.codec, state, codes, slots)
