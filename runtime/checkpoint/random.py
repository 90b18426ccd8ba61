"""A checkpoint of random weights, written from a seed: the same noise everywhere, to try things and to measure.

It is in transformers' layout, sharded, with a tokenizer that has one token a byte; only its sound is useless.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file

from aloud.checkpoint import csm
from aloud.checkpoint.csm_config import read_csm_config
from aloud.models.csm import BEGIN_OF_TEXT, END_OF_TEXT

SHARD_BYTES = 1_000_000_000

_ROPE = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0}
_BACKBONE_ROPE = {"low_freq_factor": 0.125, "high_freq_factor": 0.5, "original_max_position_embeddings": 1024}
_DEPTH_ROPE = {"low_freq_factor": 0.001953125, "high_freq_factor": 0.0078125, "original_max_position_embeddings": 16}

CONFIGS: dict[str, dict[str, Any]] = {
    # The sizes of sesame/csm-1b.
    "csm-1b": {
        "model_type": "csm",
        "num_codebooks": 32,
        "vocab_size": 2051,
        "text_vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _ROPE | _BACKBONE_ROPE,
        "codebook_eos_token_id": 0,
        "tie_codebooks_embeddings": True,
        "depth_decoder_config": {
            "num_codebooks": 32,
            "backbone_hidden_size": 2048,
            "vocab_size": 2051,
            "hidden_size": 1024,
            "intermediate_size": 8192,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 33,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _ROPE | _DEPTH_ROPE,
        },
        "codec_config": {"model_type": "mimi"},
    },
    # The same shape of model in a few megabytes; frames are 80 ms of 24 kHz here, too.
    "small": {
        "model_type": "csm",
        "num_codebooks": 8,
        "vocab_size": 259,
        "text_vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _ROPE | _BACKBONE_ROPE,
        "codebook_eos_token_id": 0,
        "tie_codebooks_embeddings": True,
        "depth_decoder_config": {
            "num_codebooks": 8,
            "backbone_hidden_size": 128,
            "vocab_size": 259,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 9,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _ROPE | _DEPTH_ROPE,
        },
        "codec_config": {
            "model_type": "mimi",
            "hidden_size": 64,
            "num_filters": 8,
            "num_hidden_layers": 2,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "codebook_size": 256,
            "codebook_dim": 32,
            "vector_quantization_hidden_dimension": 32,
            "num_quantizers": 8,
            "upsample_groups": 64,
        },
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write_random(folder: Path, size: str, *, seed: int, dtype: str) -> None:
    """Write random weights: `size` of `CONFIGS`, `dtype` of `DTYPES`, into `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = CONFIGS[size] | {"torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    sampling = {"do_sample": True, "temperature": 0.9, "top_k": 50}
    sampling |= {f"depth_decoder_{key}": value for key, value in sampling.items()}
    (folder / "generation_config.json").write_text(json.dumps(sampling, indent=2) + "\n")
    _byte_tokenizer().save(str(folder / "tokenizer.json"))

    generator = torch.Generator().manual_seed(seed)
    # Both names of the tied embedding: not every version of transformers finds one under the other's.
    shapes = csm.expected_tensors(read_csm_config(raw), "transformers", tied=False)
    tied = csm.LAYOUTS["transformers"].audio_embedding
    shards = _shards(shapes, DTYPES[dtype].itemsize)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        filename = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            own = torch.Generator().manual_seed(seed) if name in tied else generator
            tensors[name] = _random_tensor(name, shapes[name], own).to(DTYPES[dtype])
        save_file(tensors, folder / filename, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, filename)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """One tensor at a scale that keeps activations of order one -> float32."""
    if name.endswith("cluster_usage") or (len(shape) == 1 and "norm" in name and name.endswith("weight")):
        return torch.ones(shape)
    if name.endswith("layer_scale.scale"):
        return torch.full(shape, 0.1)
    if name.endswith("bias"):
        return torch.zeros(shape)
    noise = torch.randn(shape, generator=generator)
    if name.endswith("embed_sum"):
        return noise
    if "embed" in name and "projector" not in name:
        return noise * 0.1
    if "codebooks_head" in name:
        return noise * shape[1] ** -0.5  # [codebooks, hidden_size, vocabulary]
    return noise * math.prod(shape[1:]) ** -0.5


def _byte_tokenizer() -> tokenizers.Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([BEGIN_OF_TEXT, END_OF_TEXT])
    return tokenizer


def _shards(shapes: dict[str, tuple[int, ...]], itemsize: int) -> list[list[str]]:
    """Names in order, in groups of at most `SHARD_BYTES` (or of one tensor that is larger)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if filled and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
