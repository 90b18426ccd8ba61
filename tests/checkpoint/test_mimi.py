"""Reading Mimi's config and weights: both layouts, any float dtype, and values that are refused by name."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from aloud.checkpoint.mimi import KYUTAI_MIMI, expected_tensors, load_mimi, optional_tensors, read_mimi_config
from aloud.codec.mimi import MimiConfig, MimiWeights
from aloud.errors import ConfigInvalid, WrongModelType
from oracle.mimi import VARIANTS, DictTensors, named_codec, to_kyutai

KYUTAI_VARIANTS = [name for name in VARIANTS if name != "no_projections"]
"""Kyutai's layout always has projections."""

PUBLISHED_CONFIG = {
    "architectures": ["MimiModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "audio_channels": 1,
    "codebook_dim": 256,
    "codebook_size": 2048,
    "compress": 2,
    "dilation_growth_rate": 2,
    "frame_rate": 12.5,
    "head_dim": 64,
    "hidden_act": "gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "kernel_size": 7,
    "last_kernel_size": 3,
    "layer_scale_initial_scale": 0.01,
    "max_position_embeddings": 8000,
    "model_type": "mimi",
    "norm_eps": 1e-05,
    "normalize": False,
    "num_attention_heads": 8,
    "num_filters": 64,
    "num_hidden_layers": 8,
    "num_key_value_heads": 8,
    "num_quantizers": 32,
    "num_residual_layers": 1,
    "num_semantic_quantizers": 1,
    "pad_mode": "constant",
    "residual_kernel_size": 3,
    "rope_theta": 10000.0,
    "sampling_rate": 24000,
    "sliding_window": 250,
    "torch_dtype": "float32",
    "trim_right_ratio": 1.0,
    "upsample_groups": 512,
    "upsampling_ratios": [8, 6, 5, 4],
    "use_cache": False,
    "use_causal_conv": True,
    "use_conv_shortcut": False,
    "vector_quantization_hidden_dimension": 256,
}
"""A config.json in the older form, with `frame_rate` and `rope_theta` at top level."""


def flat(weights: Any) -> list[Tensor]:
    """All tensors of nested dataclasses and tuples, in order."""
    if isinstance(weights, Tensor):
        return [weights]
    if weights is None:
        return []
    parts = weights if isinstance(weights, tuple) else [getattr(weights, field.name) for field in fields(weights)]
    return [tensor for part in parts for tensor in flat(part)]


def assert_equal_weights(first: MimiWeights, second: MimiWeights) -> None:
    assert len(flat(first)) == len(flat(second))
    for ours, theirs in zip(flat(first), flat(second), strict=True):
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs)


# --- config -----------------------------------------------------------------------------------------------------------


def test_kyutais_codec_is_transformers_default() -> None:
    assert read_mimi_config(transformers.MimiConfig().to_dict()) == KYUTAI_MIMI
    assert read_mimi_config({}) == KYUTAI_MIMI


def test_older_form_reads_the_same() -> None:
    assert read_mimi_config(PUBLISHED_CONFIG) == KYUTAI_MIMI


def test_derived_sizes() -> None:
    assert KYUTAI_MIMI.frame_size == 1920
    assert KYUTAI_MIMI.frame_rate == 12.5
    assert KYUTAI_MIMI.num_acoustic_codebooks == 31


def test_every_size_is_read() -> None:
    config = {
        "sampling_rate": 16_000,
        "num_quantizers": 9,
        "num_semantic_quantizers": 2,
        "codebook_size": 128,
        "codebook_dim": 24,
        "vector_quantization_hidden_dimension": 24,
        "hidden_size": 48,
        "num_filters": 6,
        "num_residual_layers": 2,
        "upsampling_ratios": [5, 4],
        "kernel_size": 5,
        "last_kernel_size": 4,
        "residual_kernel_size": 2,
        "dilation_growth_rate": 3,
        "compress": 3,
        "use_conv_shortcut": True,
        "upsample_groups": 12,
        "num_hidden_layers": 3,
        "intermediate_size": 100,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "sliding_window": 17,
        "norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
        "frame_rate": 200.0,
    }
    read = read_mimi_config(config)
    assert read == MimiConfig(
        sample_rate=16_000,
        num_codebooks=9,
        num_semantic_codebooks=2,
        codebook_size=128,
        codebook_dim=24,
        hidden_size=48,
        num_filters=6,
        num_residual_layers=2,
        upsampling_ratios=(5, 4),
        kernel_size=5,
        last_kernel_size=4,
        residual_kernel_size=2,
        dilation_growth_rate=3,
        compress=3,
        use_conv_shortcut=True,
        downsample_ratio=4,
        upsample_groups=12,
        num_hidden_layers=3,
        intermediate_size=100,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        sliding_window=17,
        norm_eps=1e-3,
        rope_theta=77.0,
    )
    defaults = MimiConfig()
    for field in fields(MimiConfig):
        assert getattr(read, field.name) != getattr(defaults, field.name), f"{field.name} is not tried here"


def test_head_dim_follows_from_hidden_size() -> None:
    assert read_mimi_config({"num_attention_heads": 16, "num_key_value_heads": 16}).head_dim == 32


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_causal_conv", False),
        ("pad_mode", "reflect"),
        ("trim_right_ratio", 0.5),
        ("audio_channels", 2),
        ("hidden_act", "silu"),
        ("attention_bias", True),
        ("encoder_config", None),
        ("decoder_config", None),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}),
        ("rope_parameters", "default"),
        ("rope_theta", -1.0),
        ("norm_eps", "small"),
        ("frame_rate", 25.0),
        ("frame_rate", 10.0),
        ("_frame_rate", 11.0),
        ("frame_rate", 0),
        ("vector_quantization_hidden_dimension", 128),
        ("num_semantic_quantizers", 32),
        ("num_key_value_heads", 3),
        ("head_dim", 63),
        ("upsample_groups", 100),
        ("compress", 5),
        ("num_hidden_layers", 0),
        ("kernel_size", 7.5),
        ("residual_kernel_size", [3, 3]),
        ("codebook_size", True),
        ("upsampling_ratios", [8, 0]),
        ("upsampling_ratios", 8),
    ],
)
def test_what_is_not_supported_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigInvalid, match=rf"\b{key} = ") as caught:
        read_mimi_config({**PUBLISHED_CONFIG, key: value})
    assert key == "upsampling_ratios" or repr(value) in str(caught.value)


def test_another_model_type_is_refused() -> None:
    with pytest.raises(WrongModelType, match="'encodec'"):
        read_mimi_config({"model_type": "encodec"})


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_expects_what_transformers_saves(name: str, seed: int, tmp_path: Path) -> None:
    codec = named_codec(name, seed)
    codec.model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    config, _ = codec.ours
    expected, optional = expected_tensors(config, "transformers"), optional_tensors(config, "transformers")
    assert not expected.keys() & optional.keys()
    assert {**expected, **optional} == saved


@pytest.mark.parametrize("name", ["small", "grouped_heads", "two_semantic", "shortcuts", "residual_layers"])
def test_expects_what_moshi_has(name: str, seed: int) -> None:
    codec = named_codec(name, seed)
    moshi = {name: tuple(tensor.shape) for name, tensor in codec.moshi.state_dict().items()}
    config, _ = codec.ours
    expected = expected_tensors(config, "kyutai", present=moshi)
    assert {**expected, **optional_tensors(config, "kyutai")} == moshi

    published = {
        name.replace("in_projs.0.weight", "in_proj_weight").replace("out_projs.0.weight", "out_proj.weight")
        for name in expected
    }
    assert expected_tensors(config, "kyutai").keys() == published
    assert "encoder_transformer.transformer.layers.0.self_attn.in_proj_weight" in published
    assert "encoder_transformer.transformer.layers.0.self_attn.out_proj.weight" in published


def test_prefix_comes_before_every_name(seed: int) -> None:
    config, weights = named_codec("small", seed).ours
    for layout in ("transformers", "kyutai"):
        for list_tensors in (expected_tensors, optional_tensors):
            plain = list_tensors(config, layout)
            assert list_tensors(config, layout, "codec_model.") == {f"codec_model.{k}": v for k, v in plain.items()}
    prefixed = {f"codec_model.{name}": tensor for name, tensor in named_codec("small", seed).tensors.items()}
    assert_equal_weights(load_mimi(DictTensors(prefixed), config, "transformers", "codec_model."), weights)


@pytest.mark.parametrize("as_moshi_saves", [False, True], ids=["published_names", "moshi_names"])
@pytest.mark.parametrize("name", KYUTAI_VARIANTS)
def test_kyutais_layout_gives_the_same_weights(name: str, as_moshi_saves: bool, seed: int) -> None:
    codec = named_codec(name, seed)
    config, weights = codec.ours
    tensors = DictTensors(to_kyutai(codec.tensors, codec.config, as_moshi_saves=as_moshi_saves))
    assert tensors.names() >= expected_tensors(config, "kyutai", present=tensors.names()).keys()
    assert_equal_weights(load_mimi(tensors, config, "kyutai"), weights)


@pytest.mark.parametrize("layout", ["transformers", "kyutai"])
def test_reads_no_more_than_it_expects(layout: Any, seed: int) -> None:
    codec = named_codec("small", seed)
    config, weights = codec.ours
    tensors = codec.tensors if layout == "transformers" else to_kyutai(codec.tensors, codec.config)
    needed = {name: tensors[name] for name in expected_tensors(config, layout)}
    assert_equal_weights(load_mimi(DictTensors(needed), config, layout), weights)


@pytest.mark.parametrize("file_dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_float_dtype_is_read(file_dtype: torch.dtype, dtype: torch.dtype, seed: int) -> None:
    codec = named_codec("small", seed)
    config, _ = codec.ours
    # As wide as the file has it: usages near zero must not become zero, for entries are divided by them.
    stored = {name: tensor.to(file_dtype) for name, tensor in codec.tensors.items()}
    weights = load_mimi(DictTensors(stored), config, "transformers", dtype=dtype)
    quantizers = flat((weights.semantic, weights.acoustic))
    others = [tensor for tensor in flat(weights) if all(tensor is not part for part in quantizers)]
    assert {tensor.dtype for tensor in quantizers} == {torch.float32}
    assert {tensor.dtype for tensor in others} == {dtype}

    first = "acoustic_residual_vector_quantizer.layers.1.codebook"
    sums, usage = (stored[f"quantizer.{first}.{name}"].float() for name in ("embed_sum", "cluster_usage"))
    assert torch.equal(weights.acoustic.codebooks[1], sums / usage.clamp(min=1e-5)[:, None])
    name = "decoder_transformer.layers.1.mlp.fc1.weight"
    assert torch.equal(weights.decoder_transformer[1].fc1, stored[name].to(dtype))


def test_half_norms_are_half_the_squared_lengths(seed: int) -> None:
    _, weights = named_codec("small", seed).ours
    expected = weights.acoustic.codebooks.double().square().sum(dim=-1) / 2
    assert torch.allclose(weights.acoustic.half_norms.double(), expected, rtol=1e-6, atol=0)


def test_weights_do_not_share_memory_with_the_file(seed: int) -> None:
    codec = named_codec("small", seed)
    config, _ = codec.ours
    tensors = {name: tensor.clone() for name, tensor in codec.tensors.items()}
    weights = load_mimi(DictTensors(tensors), config, "transformers")
    before = [tensor.clone() for tensor in flat(weights)]
    for tensor in tensors.values():
        tensor.fill_(7)
    for tensor, old in zip(flat(weights), before, strict=True):
        assert torch.equal(tensor, old)
