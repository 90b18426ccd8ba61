"""A named checkpoint to a loaded model: find its files, check them, read them; and what can be told without reading."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aloud import memory
from aloud.checkpoint import csm, mimi
from aloud.checkpoint.csm_config import is_sesame, read_csm_config, read_json, read_sampling
from aloud.checkpoint.hub import Source, resolve, resolve_file
from aloud.checkpoint.tensors import SafetensorsReader, find_weights
from aloud.codec.mimi import MimiWeights
from aloud.errors import ModelNotFound, ModelOffline, WeightsMissing
from aloud.models.csm import Csm, CsmConfig, allocate_weights
from aloud.request import Sampling

# Where the codec of Sesame's layout comes from: Kyutai's own file, or the same weights in transformers' layout.
KYUTAI_CODEC = ("kyutai/moshiko-pytorch-bf16", "tokenizer-e351c8d8-checkpoint125.safetensors")
TRANSFORMERS_CODEC = ("kyutai/mimi", "model.safetensors")
CODEC_FOLDER = "mimi"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are here and whose configuration was read; its weights were not."""

    source: Source
    raw: dict[str, Any]  # config.json
    config: CsmConfig
    sampling: Sampling


@dataclass(frozen=True)
class Summary:
    """What can be told of a checkpoint before any weight is read."""

    checkpoint: Checkpoint
    layout: str
    parameters: dict[str, int]  # of each part


def find(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Checkpoint:
    """Bring a checkpoint here, with its weights or without, by hub name or folder, and read its configuration."""
    source = resolve(name, revision=revision, token=token, local_files_only=local_files_only, weights=weights)
    raw = read_json(source.folder / "config.json")
    return Checkpoint(source, raw, read_csm_config(raw), read_sampling(source.folder))


def load(
    checkpoint: Checkpoint, *, token: str | None, local_files_only: bool, device: torch.device, dtype: torch.dtype
) -> Csm:
    """Read a checkpoint's weights, and its codec's, which may have to be fetched."""
    source, config, raw = checkpoint.source, checkpoint.config, checkpoint.raw
    tied = is_sesame(raw) or bool(raw.get("tie_codebooks_embeddings", True))

    def fetch(repository: str, filename: str) -> Path:
        return resolve_file(repository, filename, token=token, local_files_only=local_files_only)

    with SafetensorsReader.open(find_weights(source.folder, raw)) as reader:
        layout = csm.detect_layout(reader)
        csm.check_tensors(config, reader, layout, str(source.folder), tied=tied)
        what, cure = "The weights take", _cure(dtype)
        memory.require(what, weight_bytes(config, dtype), device, cure)
        with memory.out_of_memory(what, device, cure):
            weights = csm.load_weights(config, reader, layout, device=device, dtype=dtype)
            codec = (
                csm.load_codec(config, reader, device=device)
                if layout == "transformers"
                else _load_separate_codec(config, source.folder, fetch, device)
            )
    return Csm(config, weights, codec)


def summarise(checkpoint: Checkpoint) -> Summary:
    """Count a checkpoint's parameters from its configuration, and tell its layout."""
    config = checkpoint.config
    weights = allocate_weights(config, device=torch.device("meta"), dtype=torch.float32)
    parameters = {
        "backbone": _count(weights.backbone),
        "depth decoder": _count(weights.depth) + weights.depth_projector.numel(),
        "text embedding": weights.text_embedding.numel(),
        "audio embedding": weights.audio_embedding.numel(),
        "heads": weights.backbone_head.numel() + weights.depth_heads.numel(),
        "codec": sum(math.prod(shape) for shape in mimi.expected_tensors(config.codec, "transformers").values()),
    }
    return Summary(checkpoint, _layout(checkpoint.source, checkpoint.raw), parameters)


def weight_bytes(config: CsmConfig, dtype: torch.dtype) -> int:
    """Bytes that the loaded weights take: the decoders' in `dtype`, the codec's in float32."""
    weights = allocate_weights(config, device=torch.device("meta"), dtype=dtype)
    codec = sum(math.prod(shape) for shape in mimi.expected_tensors(config.codec, "transformers").values())
    return memory.bytes_of(weights) + 4 * codec


def _load_separate_codec(
    config: CsmConfig, folder: Path, fetch: Callable[[str, str], Path], device: torch.device
) -> MimiWeights:
    """The codec of Sesame's layout: a file beside the model, Kyutai's file on the hub, or kyutai/mimi."""
    beside = [folder / KYUTAI_CODEC[1], folder / CODEC_FOLDER / "model.safetensors"]
    path = next((path for path in beside if path.is_file()), None)
    if path is None:
        try:
            path = fetch(*KYUTAI_CODEC)
        except (ModelOffline, ModelNotFound) as error:
            try:
                path = fetch(*TRANSFORMERS_CODEC)
            except (ModelOffline, ModelNotFound):
                raise type(error)(
                    f"The model is in Sesame's layout, whose codec is a file of its own, and that could not be had: "
                    f"{error} Or put {KYUTAI_CODEC[1]} into the model's folder."
                ) from error
    return csm.load_separate_codec(config, path, device=device)


def _layout(source: Source, raw: dict[str, Any]) -> str:
    """The layout in words: by the tensors' names where the weights are here, else by what config.json says."""
    try:
        paths = find_weights(source.folder, raw)
    except WeightsMissing:
        return "Sesame's" if is_sesame(raw) else "transformers', by its config.json"
    with SafetensorsReader.open(paths) as reader:
        name = "Sesame's" if csm.detect_layout(reader) == "sesame" else "transformers'"
        return f"{name}, {len(paths)} safetensors file{'s' if len(paths) > 1 else ''}, {reader.nbytes / 1e9:.3f} GB"


def _count(weights: object) -> int:
    """Parameters of a stack: its tensors but the RoPE table."""
    table = getattr(weights, "rope_table", None)
    return sum(tensor.numel() for tensor in memory.tensors_of(weights) if tensor is not table)


def _cure(dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return 'Load the model with dtype="bfloat16", which takes half, or free some memory.'
    return "Free some memory, or choose another device."
