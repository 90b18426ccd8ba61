"""config.json and generation_config.json: csm-1b in every spelling, what is refused by name, and default sampling."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CsmConfig as TransformersConfig
from transformers import LlamaConfig
from transformers.models.csm.modeling_csm import CsmRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from aloud.checkpoint import csm_config
from aloud.checkpoint.csm_config import is_sesame, read_csm_config, read_json, read_sampling
from aloud.checkpoint.mimi import KYUTAI_MIMI
from aloud.checkpoint.random import CONFIGS
from aloud.errors import ConfigInvalid, ConfigMissing, WrongModelType
from aloud.kernels.rope import Llama3Scaling, Rope, rope_frequencies
from aloud.models.csm import CsmConfig
from aloud.models.transformer import TransformerConfig
from aloud.request import Sampling
from oracle import sesame

THETA = 500_000.0
CSM_1B = CsmConfig(
    backbone=TransformerConfig(
        layers=16,
        hidden_size=2048,
        intermediate_size=8192,
        heads=32,
        kv_heads=8,
        head_dim=64,
        positions=2048,
        norm_eps=1e-5,
        rope=Rope(THETA, Llama3Scaling(factor=32, low_factor=0.125, high_factor=0.5, original_positions=1024)),
    ),
    depth=TransformerConfig(
        layers=4,
        hidden_size=1024,
        intermediate_size=8192,
        heads=8,
        kv_heads=2,
        head_dim=128,
        positions=33,
        norm_eps=1e-5,
        rope=Rope(
            THETA, Llama3Scaling(factor=32, low_factor=0.001953125, high_factor=0.0078125, original_positions=16)
        ),
    ),
    codec=KYUTAI_MIMI,
    codebooks=32,
    audio_vocabulary=2051,
    text_vocabulary=128_256,
    end_token=0,
)

# The hub's config.json, in the older spelling, and for both loaders.
HUB: dict[str, Any] = {
    "architectures": ["CsmForConditionalGeneration"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "audio_eos_token_id": 128003,
    "audio_token_id": 128002,
    "bos_token_id": 128000,
    "codebook_eos_token_id": 0,
    "codebook_pad_token_id": 2050,
    "codec_config": {
        "model_type": "mimi",
        "codebook_size": 2048,
        "frame_rate": 12.5,
        "num_quantizers": 32,
        "rope_theta": 10000.0,
        "sampling_rate": 24000,
        "sliding_window": 250,
    },
    "depth_decoder_config": {
        "attention_bias": False,
        "backbone_hidden_size": 2048,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 8192,
        "max_position_embeddings": 33,
        "mlp_bias": False,
        "model_type": "csm_depth_decoder_model",
        "num_attention_heads": 8,
        "num_codebooks": 32,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 0.0078125,
            "low_freq_factor": 0.001953125,
            "original_max_position_embeddings": 16,
            "rope_type": "llama3",
        },
        "rope_theta": 500000,
        "vocab_size": 2051,
    },
    "eos_token_id": None,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "csm",
    "num_attention_heads": 32,
    "num_codebooks": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pad_token_id": 128002,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 0.5,
        "low_freq_factor": 0.125,
        "original_max_position_embeddings": 1024,
        "rope_type": "llama3",
    },
    "rope_theta": 500000,
    "text_vocab_size": 128256,
    "tie_codebooks_embeddings": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_weights": "transformers.safetensors.index.json",
    "use_cache": True,
    "vocab_size": 2051,
    **sesame.CSM_1B,
}


def newer(raw: dict[str, Any]) -> dict[str, Any]:
    """The same with rope_parameters, in which theta is one of them."""
    raw = copy.deepcopy(raw)
    for stack in (raw, raw["depth_decoder_config"]):
        stack["rope_parameters"] = stack.pop("rope_scaling") | {"rope_theta": stack.pop("rope_theta")}
    return raw


SPELLINGS = {
    "as on the hub": HUB,
    "rope_parameters": newer(HUB),
    "Sesame's own": sesame.CSM_1B,
    "random checkpoint": CONFIGS["csm-1b"],
    "both ropes, the same": newer(HUB) | {"rope_scaling": HUB["rope_scaling"], "rope_theta": 500_000},
    "nothing in the older ones": newer(HUB) | {"rope_scaling": None, "rope_theta": None},
    "theta at top level": newer(HUB)
    | {
        "rope_theta": 500_000,
        "rope_parameters": {name: v for name, v in newer(HUB)["rope_parameters"].items() if name != "rope_theta"},
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_csm_1b(spelling: str) -> None:
    assert read_csm_config(SPELLINGS[spelling]) == CSM_1B
    assert is_sesame(SPELLINGS[spelling]) == (spelling == "Sesame's own")
    assert read_csm_config(SPELLINGS[spelling]).drawable == 2048


@pytest.mark.parametrize("raw", [{}, {"depth_decoder_config": {}, "codec_config": {}}], ids=["empty", "empty parts"])
def test_what_a_silent_config_means_is_what_transformers_means(raw: dict[str, Any]) -> None:
    ours, theirs = read_csm_config({"model_type": "csm"} | raw), TransformersConfig(**raw)
    for stack, config in ((ours.backbone, theirs), (ours.depth, theirs.depth_decoder_config)):
        assert (stack.layers, stack.hidden_size) == (config.num_hidden_layers, config.hidden_size)
        assert (stack.intermediate_size, stack.positions) == (config.intermediate_size, config.max_position_embeddings)
        assert (stack.heads, stack.kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
        assert (stack.head_dim, stack.norm_eps) == (config.head_dim, config.rms_norm_eps)
        assert config.rope_parameters["rope_type"] == "default"
        assert stack.rope == Rope(config.rope_parameters["rope_theta"])
    assert ours.codec == KYUTAI_MIMI
    assert (ours.codebooks, ours.audio_vocabulary) == (theirs.num_codebooks, theirs.vocab_size)
    assert (ours.text_vocabulary, ours.end_token) == (theirs.text_vocab_size, theirs.codebook_eos_token_id)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": HUB["rope_scaling"] | {"factor": 8.0}},
        {"rope_scaling": HUB["rope_scaling"] | {"factor": 8.0}, "rope_theta": 1e4},
        {"rope_scaling": None, "rope_theta": 1e4},
        {"rope_scaling": {}},
        {"rope_theta": 1e4},
        {"rope_parameters": None, "rope_theta": 1e4},
        {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "default"}},
    ],
    ids=json.dumps,
)
def test_two_ropes_that_disagree_read_as_in_transformers(changes: dict[str, Any]) -> None:
    raw = newer(HUB) | changes
    stack = read_csm_config(raw).backbone
    theirs = CsmRotaryEmbedding(TransformersConfig(**copy.deepcopy(raw)))
    torch.testing.assert_close(rope_frequencies(stack.rope, stack.head_dim), theirs.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": None}, {"head_dim": None}], ids=json.dumps)
def test_nulls_read_as_in_transformers(changes: dict[str, Any]) -> None:
    raw = {"hidden_size": 64, "num_attention_heads": 16, "depth_decoder_config": {"backbone_hidden_size": 64}} | changes
    ours, theirs = read_csm_config({"model_type": "csm"} | raw).backbone, TransformersConfig(**raw)
    assert (ours.kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)


@pytest.mark.parametrize("spelling", ["as on the hub", "rope_parameters"])
def test_frequencies_are_those_of_transformers_and_of_llama(spelling: str) -> None:
    """Both scalings are one curve, Llama 3.2's: 1 and 4 of 8192 positions."""
    theirs = TransformersConfig(**copy.deepcopy(SPELLINGS[spelling]))
    ours = read_csm_config(SPELLINGS[spelling])
    for stack, config in ((ours.backbone, theirs), (ours.depth, theirs.depth_decoder_config)):
        frequencies = rope_frequencies(stack.rope, stack.head_dim)
        torch.testing.assert_close(frequencies, CsmRotaryEmbedding(config).inv_freq, rtol=1e-6, atol=0)
        llama = LlamaConfig(
            hidden_size=stack.head_dim,
            num_attention_heads=1,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": THETA,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        )
        torch.testing.assert_close(frequencies, LlamaRotaryEmbedding(llama).inv_freq, rtol=1e-6, atol=0)


def test_other_sizes() -> None:
    raw = {
        "model_type": "csm",
        "num_codebooks": 5,
        "vocab_size": 40,
        "text_vocab_size": 77,
        "hidden_size": 48,
        "intermediate_size": 50,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 99,
        "rms_norm_eps": 1e-6,
        "codebook_eos_token_id": 7,
        "depth_decoder_config": {
            "num_codebooks": 5,
            "vocab_size": 40,
            "backbone_hidden_size": 48,
            "hidden_size": 24,
            "intermediate_size": 26,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 20,
            "max_position_embeddings": 6,
            "rope_theta": 1e4,
        },
        "codec_config": {"codebook_size": 32, "num_quantizers": 8},
    }
    config = read_csm_config(raw)
    assert config.backbone == TransformerConfig(3, 48, 50, 6, 3, 8, 99, 1e-6, Rope(THETA))
    assert config.depth == TransformerConfig(1, 24, 26, 2, 1, 20, 6, 1e-5, Rope(1e4))
    assert (config.codebooks, config.audio_vocabulary, config.text_vocabulary) == (5, 40, 77)
    assert (config.end_token, config.codec.codebook_size, config.drawable) == (7, 32, 32)


DEPTH = HUB["depth_decoder_config"]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "hidden_act": ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; only 'silu' can be run"),
    "attention_bias": ({"attention_bias": True}, "attention_bias is True; only False"),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias is True; only False"),
    "depth hidden_act": (
        {"depth_decoder_config": DEPTH | {"hidden_act": "relu"}},
        r"depth_decoder_config\.hidden_act is 'relu'",
    ),
    "yarn": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        'rope_scaling has rope_type "yarn"; "default" and',
    ),
    "depth yarn": (
        {"depth_decoder_config": DEPTH | {"rope_scaling": None, "rope_parameters": {"rope_type": "yarn"}}},
        r'depth_decoder_config\.rope_parameters has rope_type "yarn"',
    ),
    "llama3 without a factor": (
        {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        r"rope_scaling\.factor must be a number, 0 or more, got None",
    ),
    "llama3 with its factors the wrong way": (
        {"rope_scaling": HUB["rope_scaling"] | {"low_freq_factor": 4.0}},
        r"factor 32\.0, low_freq_factor 4\.0 and high_freq_factor 0\.5; the factor must be more than 0, and the high",
    ),
    "theta 0": ({"rope_theta": 0}, r"rope_scaling has rope_theta 0; it must be more than 0"),
    "rope not an object": ({"rope_scaling": "llama3"}, "rope_scaling must be an object"),
    "depth not an object": ({"depth_decoder_config": [1]}, "depth_decoder_config and codec_config must be objects"),
    "codec not an object": ({"codec_config": "mimi"}, "depth_decoder_config and codec_config must be objects"),
    "depth num_codebooks": (
        {"depth_decoder_config": DEPTH | {"num_codebooks": 16}},
        r"depth_decoder_config\.num_codebooks is 16, but the backbone's side says 32",
    ),
    "depth vocab_size": (
        {"depth_decoder_config": DEPTH | {"vocab_size": 2050}},
        r"depth_decoder_config\.vocab_size is 2050, but the backbone's side says 2051",
    ),
    "depth backbone_hidden_size": (
        {"depth_decoder_config": DEPTH | {"backbone_hidden_size": 1024}},
        r"depth_decoder_config\.backbone_hidden_size is 1024, but the backbone's side says 2048",
    ),
    "a word for a number": ({"hidden_size": "2048"}, r"config\.json's hidden_size must be a number, .*got '2048'"),
    "true for a number": ({"num_hidden_layers": True}, "num_hidden_layers must be a number"),
    "a list for a number": ({"codebook_eos_token_id": [0, 1]}, r"codebook_eos_token_id must be .* got \[0, 1\]"),
    "a fraction of a layer": (
        {"num_hidden_layers": 16.5},
        "num_hidden_layers must be a whole number, 1 or more, got 16",
    ),
    "an infinite size": ({"vocab_size": float("inf")}, "vocab_size must be a number, 0 or more, got inf"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number, 1 or more, got 0"),
    "no depth layers": (
        {"depth_decoder_config": DEPTH | {"num_hidden_layers": 0}},
        r"depth_decoder_config\.num_hidden_layers must be a whole number, 1 or more, got 0",
    ),
    "negative vocabulary": ({"text_vocab_size": -1}, "text_vocab_size must be a number, 0 or more, got -1"),
    "heads do not divide": ({"num_key_value_heads": 5}, "32 query heads must be a multiple of 5 key/value heads"),
    "odd head_dim": ({"head_dim": 63}, "head_dim 63 even"),
    "depth positions": (
        {"depth_decoder_config": DEPTH | {"max_position_embeddings": 31}},
        "32 codebooks and 31 positions of the depth decoder",
    ),
    "no positions": ({"max_position_embeddings": 0}, "max_position_embeddings must be a whole number, 1 or more"),
    "codec codebooks": ({"codec_config": {"num_quantizers": 16}}, "32 codebooks, but its codec has 16"),
    "end token": (
        {"codebook_eos_token_id": 2050},
        "codebook_eos_token_id is 2050; it must be a token that can be drawn",
    ),
    "codec value": ({"codec_config": {"use_causal_conv": False}}, "use_causal_conv = False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_cannot_be_run_are_named(case: str) -> None:
    changes, sentence = REFUSED[case]
    with pytest.raises(ConfigInvalid, match=sentence):
        read_csm_config(HUB | changes)


@pytest.mark.parametrize("model_type", ["llama", "mimi", None, 3])
def test_another_model_type(model_type: object) -> None:
    with pytest.raises(WrongModelType, match=rf'model_type "{model_type}".*sesame/csm-1b'):
        read_csm_config({"model_type": model_type})


def test_a_codec_of_another_kind() -> None:
    with pytest.raises(WrongModelType, match="codec's config has model_type 'encodec'"):
        read_csm_config(HUB | {"codec_config": {"model_type": "encodec"}})


@pytest.mark.parametrize("key", ["backbone_flavor", "decoder_flavor"])
def test_flavours_that_are_not_known(key: str) -> None:
    with pytest.raises(ConfigInvalid, match=f'{key} is "llama-8B"; known is llama-'):
        read_csm_config({"backbone_flavor": "llama-1B", "decoder_flavor": "llama-100M", key: "llama-8B"})


# --- files ------------------------------------------------------------------------------------------------------------


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ConfigMissing, match=r"no config\.json in .*beside its weights"):
        read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    for text in (b"{", b"", b"\xff\xfe{}", b"[" * 100_000):
        path.write_bytes(text)
        with pytest.raises(ConfigInvalid, match=r"cannot be read as JSON.*Download it again"):
            read_json(path)
    path.write_text("[1]")
    with pytest.raises(ConfigInvalid, match="is not a JSON object"):
        read_json(path)


SAMPLING: dict[str, tuple[dict[str, Any] | None, Sampling]] = {
    "no file": (None, Sampling(0.9, 50, 0.9, 50)),
    "empty": ({}, Sampling(0.9, 50, 0.9, 50)),
    "the hub's": (
        {
            "do_sample": True,
            "temperature": 0.96,
            "top_k": 50,
            "depth_decoder_do_sample": True,
            "depth_decoder_temperature": 0.9,
            "depth_decoder_top_k": 40,
        },
        Sampling(0.96, 50, 0.9, 40),
    ),
    "backbone's alone": ({"temperature": 0.5, "top_k": 7}, Sampling(0.5, 7, 0.9, 50)),
    "depth's alone": ({"depth_decoder_temperature": 0.5, "depth_decoder_top_k": 7}, Sampling(0.9, 50, 0.5, 7)),
    "greedy": (
        {"do_sample": False, "depth_decoder_do_sample": False, "temperature": 0.7, "top_k": 9},
        Sampling(0.0, 9, 0.0, 50),
    ),
    "greedy backbone": ({"do_sample": False}, Sampling(0.0, 50, 0.9, 50)),
    "greedy depth": ({"depth_decoder_do_sample": False}, Sampling(0.9, 50, 0.0, 50)),
    "nulls": ({"temperature": None, "top_k": None, "do_sample": None}, Sampling(0.9, 50, 0.9, 50)),
    "no top-k": ({"top_k": 0, "depth_decoder_top_k": 0}, Sampling(0.9, 0, 0.9, 0)),
}


@pytest.mark.parametrize("case", SAMPLING)
def test_sampling(case: str, tmp_path: Path) -> None:
    raw, expected = SAMPLING[case]
    if raw is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    assert read_sampling(tmp_path) == expected


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"temperature": "hot"}, "generation_config.json's temperature must be a number, 0 or more, got 'hot'"),
        ({"depth_decoder_top_k": [50]}, "generation_config.json's depth_decoder_top_k must be a number"),
        ({"temperature": -1.0}, "generation_config.json's temperature must be a number, 0 or more, got -1"),
        ({"depth_decoder_temperature": float("nan")}, "depth_decoder_temperature must be a number, 0 or more, got nan"),
        ({"top_k": -2}, "generation_config.json's top_k must be a number, 0 or more, got -2"),
        ({"top_k": 2.5}, "generation_config.json's top_k must be a whole number, 0 or more, got 2.5"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_sampling_that_cannot_be(raw: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigInvalid, match=re.escape(sentence)):
        read_sampling(tmp_path)


def test_flavours_are_the_sizes_of_csm_1b() -> None:
    assert {"llama-1B": CSM_1B.backbone} == csm_config.SESAME_BACKBONE
    assert {"llama-100M": CSM_1B.depth} == csm_config.SESAME_DECODER


@pytest.mark.parametrize("key", ["temperature", "depth_decoder_temperature"])
@pytest.mark.parametrize("value", [1e-4, 101.0])
def test_a_temperature_out_of_range_is_refused(tmp_path: Path, key: str, value: float) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(ConfigInvalid, match=f"generation_config.json's {key} must be 0"):
        read_sampling(tmp_path)
