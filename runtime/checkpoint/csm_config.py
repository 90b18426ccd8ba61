"""CSM's config.json and generation_config.json, in transformers' form and in Sesame's, to frozen dataclasses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aloud.checkpoint.mimi import read_mimi_config
from aloud.codec.mimi import MimiConfig
from aloud.errors import ConfigInvalid, ConfigMissing, WrongModelType
from aloud.kernels.rope import Llama3Scaling, Rope
from aloud.models.csm import CsmConfig
from aloud.models.transformer import TransformerConfig
from aloud.request import MAX_TEMPERATURE, MIN_TEMPERATURE, Sampling

ROPE_THETA = 500_000.0

# What transformers assumes where a config is silent: csm-1b's own sizes.
BACKBONE_DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
DEPTH_DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 1024,
    "intermediate_size": 8192,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 33,
}
# Values that change the computation and are the only ones computed here.
FIXED: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

# Sesame's two flavours; the scalings are the ones transformers' conversion of csm-1b wrote.
SESAME_BACKBONE = {
    "llama-1B": TransformerConfig(
        16, 2048, 8192, 32, 8, 64, 2048, 1e-5, Rope(ROPE_THETA, Llama3Scaling(32.0, 0.125, 0.5, 1024))
    ),
}
SESAME_DECODER = {
    "llama-100M": TransformerConfig(
        4, 1024, 8192, 8, 2, 128, 33, 1e-5, Rope(ROPE_THETA, Llama3Scaling(32.0, 0.001953125, 0.0078125, 16))
    ),
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `ConfigMissing` or `ConfigInvalid`."""
    if not path.is_file():
        raise ConfigMissing(
            f"There is no {path.name} in {path.parent}. A checkpoint folder holds it beside its weights."
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigInvalid(f"{path} cannot be read as JSON: {error}. Download it again.") from error
    if not isinstance(value, dict):
        raise ConfigInvalid(f"{path} is not a JSON object. Download it again.")
    return value


def is_sesame(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is in Sesame's form alone."""
    return "model_type" not in raw and "backbone_flavor" in raw


def read_csm_config(raw: Mapping[str, Any]) -> CsmConfig:
    """Read config.json; raises `WrongModelType`, or `ConfigInvalid` naming the key that cannot be run."""
    config = _read_sesame(raw) if is_sesame(raw) else _read_transformers(raw)
    _validate(config)
    return config


def read_sampling(folder: Path) -> Sampling:
    """A checkpoint's own sampling: Sesame's defaults, overridden by generation_config.json where there is one."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return Sampling()
    raw = read_json(path)
    temperature, top_k = _read_sampling(raw, "", Sampling.temperature, Sampling.top_k)
    depth_temperature, depth_top_k = _read_sampling(
        raw, "depth_decoder_", Sampling.depth_temperature, Sampling.depth_top_k
    )
    return Sampling(temperature, top_k, depth_temperature, depth_top_k)


def _read_sampling(raw: Mapping[str, Any], prefix: str, temperature: float, top_k: int) -> tuple[float, int]:
    """Temperature and top-k of one decoder, over the defaults given; no sampling at all is temperature 0."""
    temperature = _number(raw, f"{prefix}temperature", temperature, file="generation_config.json")
    if not (temperature == 0 or MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE):
        raise ConfigInvalid(
            f"generation_config.json's {prefix}temperature must be 0 (greedy) or from {MIN_TEMPERATURE} to "
            f"{MAX_TEMPERATURE:g}, got {temperature!r}."
        )
    top_k = _count(raw, f"{prefix}top_k", top_k, least=0, file="generation_config.json")
    return (0.0 if raw.get(f"{prefix}do_sample") is False else temperature), top_k


def _read_transformers(raw: Mapping[str, Any]) -> CsmConfig:
    model_type = raw.get("model_type")
    if model_type != "csm":
        raise WrongModelType(
            f'config.json says model_type "{model_type}", and only "csm" can be run. Name a CSM checkpoint, '
            "for example sesame/csm-1b."
        )
    depth_raw = raw.get("depth_decoder_config") or {}
    codec_raw = raw.get("codec_config") or {}
    if not isinstance(depth_raw, Mapping) or not isinstance(codec_raw, Mapping):
        raise ConfigInvalid("config.json's depth_decoder_config and codec_config must be objects.")
    codebooks = _count(raw, "num_codebooks", 32)
    vocabulary = _count(raw, "vocab_size", 2051)
    hidden_size = _count(raw, "hidden_size", BACKBONE_DEFAULTS["hidden_size"])
    for key, default, expected in (
        ("num_codebooks", 32, codebooks),
        ("vocab_size", 2051, vocabulary),
        ("backbone_hidden_size", 2048, hidden_size),
    ):
        value = _count(depth_raw, key, default)
        if value != expected:
            raise ConfigInvalid(
                f"config.json's depth_decoder_config.{key} is {value}, but the backbone's side says {expected}. "
                "They must be equal."
            )
    return CsmConfig(
        backbone=_read_stack(raw, BACKBONE_DEFAULTS, ""),
        depth=_read_stack(depth_raw, DEPTH_DEFAULTS, "depth_decoder_config."),
        codec=read_mimi_config(dict(codec_raw)),
        codebooks=codebooks,
        audio_vocabulary=vocabulary,
        text_vocabulary=_count(raw, "text_vocab_size", 128_256),
        end_token=_count(raw, "codebook_eos_token_id", 0, least=0),
    )


def _read_sesame(raw: Mapping[str, Any]) -> CsmConfig:
    stacks = []
    for key, flavours in (("backbone_flavor", SESAME_BACKBONE), ("decoder_flavor", SESAME_DECODER)):
        flavour = raw.get(key)
        if flavour not in flavours:
            raise ConfigInvalid(f'config.json\'s {key} is "{flavour}"; known is {", ".join(flavours)}.')
        stacks.append(flavours[flavour])
    return CsmConfig(
        backbone=stacks[0],
        depth=stacks[1],
        codec=MimiConfig(),
        codebooks=_count(raw, "audio_num_codebooks", 32),
        audio_vocabulary=_count(raw, "audio_vocab_size", 2051),
        text_vocabulary=_count(raw, "text_vocab_size", 128_256),
        end_token=0,
    )


def _read_stack(raw: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> TransformerConfig:
    for key, value in FIXED.items():
        if raw.get(key, value) != value:
            raise ConfigInvalid(f"config.json's {where}{key} is {raw[key]!r}; only {value!r} can be run.")
    size = {key: _count(raw, key, default, where) for key, default in defaults.items()}
    heads = size["num_attention_heads"]
    return TransformerConfig(
        layers=size["num_hidden_layers"],
        hidden_size=size["hidden_size"],
        intermediate_size=size["intermediate_size"],
        heads=heads,
        # Absent it is csm-1b's; null it is the query heads', as in transformers.
        kv_heads=heads if raw.get("num_key_value_heads", 0) is None else size["num_key_value_heads"],
        head_dim=_count(raw, "head_dim", size["hidden_size"] // heads, where),
        positions=size["max_position_embeddings"],
        norm_eps=_number(raw, "rms_norm_eps", 1e-5, where),
        rope=_read_rope(raw, where),
    )


def _read_rope(raw: Mapping[str, Any], where: str) -> Rope:
    """`rope_parameters` (newer), or `rope_theta` and `rope_scaling` (older), which counts where there are both."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    values = raw.get(key) or {}
    if not isinstance(values, Mapping):
        raise ConfigInvalid(f"config.json's {where}{key} must be an object.")
    theta = _number(values, "rope_theta", _number(raw, "rope_theta", ROPE_THETA, where), f"{where}{key}.")
    if theta <= 0:
        raise ConfigInvalid(f"config.json's {where}{key} has rope_theta {theta}; it must be more than 0.")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind != "llama3":
        raise ConfigInvalid(f'config.json\'s {where}{key} has rope_type "{kind}"; "default" and "llama3" can be run.')
    factor, low, high = (
        _number(values, name, None, f"{where}{key}.") for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    if factor <= 0 or high <= low:
        raise ConfigInvalid(
            f"config.json's {where}{key} has factor {factor}, low_freq_factor {low} and high_freq_factor {high}; "
            "the factor must be more than 0, and the high one more than the low one."
        )
    original = _count(values, "original_max_position_embeddings", None, f"{where}{key}.")
    return Rope(theta, Llama3Scaling(factor, low, high, original))


def _number(
    raw: Mapping[str, Any], key: str, default: float | None = None, where: str = "", file: str = "config.json"
) -> float:
    """A finite number that is not negative; an absent or null one is `default`."""
    value = raw.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ConfigInvalid(f"{file}'s {where}{key} must be a number, 0 or more, got {value!r}.")
    return value


def _count(
    raw: Mapping[str, Any],
    key: str,
    default: int | None = None,
    where: str = "",
    *,
    least: int = 1,
    file: str = "config.json",
) -> int:
    """A whole number, `least` or more; an absent or null one is `default`."""
    value = _number(raw, key, default, where, file)
    if value != int(value) or value < least:
        raise ConfigInvalid(f"{file}'s {where}{key} must be a whole number, {least} or more, got {value!r}.")
    return int(value)


def _validate(config: CsmConfig) -> None:
    for name, stack in (("backbone", config.backbone), ("depth decoder", config.depth)):
        if stack.heads % stack.kv_heads or stack.head_dim % 2:
            raise ConfigInvalid(
                f"config.json's {name} has sizes that do not fit: {stack.heads} query heads must be a multiple of "
                f"{stack.kv_heads} key/value heads, and head_dim {stack.head_dim} even."
            )
    if config.codebooks < 2 or config.depth.positions < config.codebooks:
        raise ConfigInvalid(
            f"config.json asks for {config.codebooks} codebooks and {config.depth.positions} positions of the depth "
            "decoder; there must be at least 2 codebooks and a position for each."
        )
    if config.codec.num_codebooks < config.codebooks:
        raise ConfigInvalid(
            f"config.json asks for {config.codebooks} codebooks, but its codec has {config.codec.num_codebooks}."
        )
    if not 0 <= config.end_token < config.drawable:
        raise ConfigInvalid(
            f"config.json's codebook_eos_token_id is {config.end_token}; it must be a token that can be drawn, "
            f"0 to {config.drawable - 1}."
        )
