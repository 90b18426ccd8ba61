"""CSM's weights: both layouts, read straight from safetensors to their final, packed place.

Layout "transformers" has keys `backbone_model.…`, `depth_decoder.…` and the codec under `codec_model.…`. Layout
"sesame" has keys `backbone.…` and `decoder.…`, query and key rows in interleaved RoPE order (pairs 2i, 2i + 1; here and
in transformers the pairs are i, i + head_dim / 2), and no codec: that is a file of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from aloud.checkpoint import mimi
from aloud.checkpoint.tensors import SafetensorsReader
from aloud.codec.mimi import MimiWeights
from aloud.errors import TensorsMismatch
from aloud.models import csm
from aloud.models.csm import CsmConfig, CsmWeights
from aloud.models.transformer import TransformerConfig, TransformerWeights

READABLE = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class StackNames:
    """Where one layout keeps the tensors of a decoder stack."""

    prefix: str
    attention_norm: str
    qkv: tuple[str, str, str]
    output: str
    feed_forward_norm: str
    gate_up: tuple[str, str]
    down: str
    norm: str
    interleaved: bool


@dataclass(frozen=True)
class Names:
    """Where one layout keeps everything but the codec."""

    backbone: StackNames
    depth: StackNames
    text_embedding: str
    audio_embedding: tuple[str, ...]  # the first that is there
    depth_embedding: tuple[str, ...]  # the first that is there
    backbone_head: str
    depth_projector: str
    depth_heads: str


def _transformers_stack(prefix: str) -> StackNames:
    return StackNames(
        prefix=prefix,
        attention_norm="input_layernorm.weight",
        qkv=("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        output="self_attn.o_proj.weight",
        feed_forward_norm="post_attention_layernorm.weight",
        gate_up=("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        down="mlp.down_proj.weight",
        norm="norm.weight",
        interleaved=False,
    )


def _sesame_stack(prefix: str) -> StackNames:
    return StackNames(
        prefix=prefix,
        attention_norm="sa_norm.scale",
        qkv=("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"),
        output="attn.output_proj.weight",
        feed_forward_norm="mlp_norm.scale",
        gate_up=("mlp.w1.weight", "mlp.w3.weight"),
        down="mlp.w2.weight",
        norm="norm.scale",
        interleaved=True,
    )


_BACKBONE_TABLE = "backbone_model.embed_tokens.embed_audio_tokens.weight"
_DEPTH_TABLE = "depth_decoder.model.embed_tokens.weight"
Layout = Literal["transformers", "sesame"]
LAYOUTS: dict[Layout, Names] = {
    "transformers": Names(
        backbone=_transformers_stack("backbone_model."),
        depth=_transformers_stack("depth_decoder.model."),
        text_embedding="embed_text_tokens.weight",
        # Tied, either may be missing; untied, each finds its own first.
        audio_embedding=(_BACKBONE_TABLE, _DEPTH_TABLE),
        depth_embedding=(_DEPTH_TABLE, _BACKBONE_TABLE),
        backbone_head="lm_head.weight",
        depth_projector="depth_decoder.model.inputs_embeds_projector.weight",
        depth_heads="depth_decoder.codebooks_head.weight",
    ),
    "sesame": Names(
        backbone=_sesame_stack("backbone."),
        depth=_sesame_stack("decoder."),
        text_embedding="text_embeddings.weight",
        audio_embedding=("audio_embeddings.weight",),
        depth_embedding=("audio_embeddings.weight",),
        backbone_head="codebook0_head.weight",
        depth_projector="projection.weight",
        depth_heads="audio_head",
    ),
}
CODEC_PREFIX = "codec_model."


@dataclass(frozen=True)
class Placement:
    """One tensor of a file and where it goes: `destination` is a view in the file's order of elements."""

    name: str
    shape: tuple[int, ...]
    destination: torch.Tensor

    def copy_from(self, reader: SafetensorsReader) -> None:
        """Copy, converting the dtype on the way."""
        self.destination.copy_(reader.read(self.name).view(self.destination.shape))


def detect_layout(reader: SafetensorsReader) -> Layout:
    """Which layout a file's names are in."""
    return "sesame" if LAYOUTS["sesame"].text_embedding in reader.names() else "transformers"


def expected_tensors(
    config: CsmConfig, layout: Layout, *, tied: bool, present: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint must hold, with its shape; of two tied tables, the one among `present` names."""
    names = LAYOUTS[layout]
    on_meta = csm.allocate_weights(config, device=torch.device("meta"), dtype=torch.float32)
    expected = {placement.name: placement.shape for placement in _placements(config, on_meta, names)}
    for candidates in (names.audio_embedding, names.depth_embedding):
        name = _first(candidates, present) if tied else candidates[0]
        expected[name] = tuple(on_meta.audio_embedding.shape)
    if tied and len(names.audio_embedding) > 1 and not set(names.audio_embedding) & set(present):
        del expected[names.audio_embedding[0]]  # one is enough, and this is the one that is usually left out
    if layout == "transformers":
        expected |= mimi.expected_tensors(config.codec, layout, CODEC_PREFIX)
    return expected


def check_tensors(config: CsmConfig, reader: SafetensorsReader, layout: Layout, where: str, *, tied: bool) -> None:
    """Raise `TensorsMismatch` with everything that is missing, unexpected or wrong, before anything is read."""
    names, present = LAYOUTS[layout], reader.names()
    optional = {*names.audio_embedding, *names.depth_embedding} if tied else set()
    if layout == "transformers":
        optional |= set(mimi.optional_tensors(config.codec, layout, CODEC_PREFIX))
    compare(reader, expected_tensors(config, layout, tied=tied, present=present), optional, where)


def compare(reader: SafetensorsReader, expected: dict[str, tuple[int, ...]], optional: set[str], where: str) -> None:
    """Raise `TensorsMismatch` unless the file has exactly the expected tensors, and perhaps the optional ones."""
    present = reader.names()
    found = sorted(set(expected) & present)
    wrong_shape = [
        f"{name}: {list(reader.shape(name))} in the file, {list(expected[name])} by config.json"
        for name in found
        if reader.shape(name) != tuple(expected[name])
    ]
    wrong_dtype = [f"{name}: {reader.dtype(name)}" for name in found if reader.dtype(name) not in READABLE]
    missing = sorted(set(expected) - present)
    # Buffers that old checkpoints saved and that are computed here.
    unexpected = sorted(n for n in present - set(expected) - optional if not n.endswith("rotary_emb.inv_freq"))
    if missing or unexpected or wrong_shape or wrong_dtype:
        raise TensorsMismatch(
            where, missing=missing, unexpected=unexpected, wrong_shape=wrong_shape, wrong_dtype=wrong_dtype
        )


def load_weights(
    config: CsmConfig,
    reader: SafetensorsReader,
    layout: Layout,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> CsmWeights:
    """Read all weights, converted to `dtype`, to `device`; no second copy of more than one codebook's rows is held."""
    names, present = LAYOUTS[layout], reader.names()
    weights = csm.allocate_weights(config, device=device, dtype=dtype)
    for placement in _placements(config, weights, names):
        placement.copy_from(reader)
    weights.audio_embedding.copy_(reader.read(_first(names.audio_embedding, present)))
    _project_depth_embedding(config, weights, reader.read(_first(names.depth_embedding, present)))
    return weights


def load_codec(config: CsmConfig, reader: SafetensorsReader, *, device: torch.device) -> MimiWeights:
    """The codec inside a checkpoint in transformers' layout."""
    return mimi.load_mimi(reader, config.codec, "transformers", CODEC_PREFIX, device=device)


def load_separate_codec(config: CsmConfig, path: Path, *, device: torch.device) -> MimiWeights:
    """A codec in a file of its own, in Kyutai's layout or transformers'."""
    with SafetensorsReader.open([path]) as reader:
        layout: mimi.Layout = (
            "kyutai" if any(name.startswith("encoder.model.") for name in reader.names()) else "transformers"
        )
        expected = mimi.expected_tensors(config.codec, layout, present=reader.names())
        compare(reader, expected, set(mimi.optional_tensors(config.codec, layout)), str(path))
        return mimi.load_mimi(reader, config.codec, layout, device=device)


def _project_depth_embedding(config: CsmConfig, weights: CsmWeights, table: torch.Tensor) -> None:
    """Push the embeddings that the depth decoder reads through its input projector, once, a codebook at a time.

    table [codebooks * audio_vocabulary, hidden_size], on the CPU, in the file's dtype.
    """
    vocabulary = config.audio_vocabulary
    projector = weights.depth_projector
    for begin in range(0, config.codebooks * vocabulary, vocabulary):
        rows = slice(begin, begin + vocabulary)
        # Rounded to the model's dtype first, as the model without the table would read them; summed in float32.
        chunk = table[rows].to(projector.device, projector.dtype)
        weights.depth_embedding[rows] = F.linear(chunk.float(), projector.float()).to(projector.dtype)


def _placements(config: CsmConfig, weights: CsmWeights, names: Names) -> Iterator[Placement]:
    """Every tensor but the audio embedding and the codec."""
    yield from _stack_placements(config.backbone, weights.backbone, names.backbone)
    yield from _stack_placements(config.depth, weights.depth, names.depth)
    yield _whole(names.text_embedding, weights.text_embedding)
    yield _whole(names.backbone_head, weights.backbone_head[0])
    yield _whole(names.depth_projector, weights.depth_projector)
    yield _whole(names.depth_heads, weights.depth_heads.transpose(1, 2))


def _stack_placements(config: TransformerConfig, weights: TransformerWeights, names: StackNames) -> Iterator[Placement]:
    head_counts = (config.heads, config.kv_heads, config.kv_heads)
    for index, layer in enumerate(weights.layers):
        prefix = f"{names.prefix}layers.{index}."
        yield _whole(prefix + names.attention_norm, layer.attention_norm)
        parts = layer.qkv.split([heads * config.head_dim for heads in head_counts])
        for kind, part, name, heads in zip("qkv", parts, names.qkv, head_counts, strict=True):
            destination = part
            if names.interleaved and kind != "v":
                destination = part.unflatten(0, (heads, 2, config.head_dim // 2)).transpose(1, 2)
            yield Placement(prefix + name, tuple(part.shape), destination)
        yield _whole(prefix + names.output, layer.output)
        yield _whole(prefix + names.feed_forward_norm, layer.feed_forward_norm)
        for part, name in zip(layer.gate_up.chunk(2), names.gate_up, strict=True):
            yield _whole(prefix + name, part)
        yield _whole(prefix + names.down, layer.down)
    yield _whole(names.prefix + names.norm, weights.norm)


def _whole(name: str, destination: torch.Tensor) -> Placement:
    return Placement(name, tuple(destination.shape), destination)


def _first(candidates: tuple[str, ...], present: Collection[str]) -> str:
    return next((name for name in candidates if name in present), candidates[0])
