"""One model in every layout that must load: the same weights, and the tokens that transformers generates from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CsmForConditionalGeneration

from aloud import Runtime, Segment, memory
from aloud.checkpoint import mimi
from aloud.checkpoint.load import KYUTAI_CODEC, TRANSFORMERS_CODEC
from oracle import csm as oracle
from oracle import sesame
from oracle.hub_server import HubServer, client_environment
from oracle.mimi import saved_name, to_kyutai

FRAMES = 4
BACKBONE_TABLE = "backbone_model.embed_tokens.embed_audio_tokens.weight"
DEPTH_TABLE = "depth_decoder.model.embed_tokens.weight"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGE = {"head_dim": 32, "rope": oracle.LLAMA3, "depth_rope": oracle.DEPTH_LLAMA3, "depth_head_dim": 16}


@dataclass(frozen=True)
class Saved:
    """A model that transformers saved, and what transformers makes of it."""

    folder: Path
    model: CsmForConditionalGeneration
    tensors: dict[str, Tensor]  # of its file
    config: dict[str, Any]  # config.json
    segments: list[tuple[int, str, np.ndarray | None]]
    codes: oracle.Greedy

    @property
    def sesame(self) -> dict[str, Tensor]:
        """The same weights in Sesame's layout."""
        return sesame.to_sesame(
            self.tensors, self.model.config.head_dim, self.model.config.depth_decoder_config.head_dim
        )

    @property
    def kyutai_codec(self) -> dict[str, Tensor]:
        """Its codec in Kyutai's layout."""
        return to_kyutai(sesame.codec_tensors(self.tensors), self.model.config.codec_config.to_dict())

    def copy(self, folder: Path, config: dict[str, Any] | None = None) -> Path:
        """A folder with everything but the weights."""
        folder.mkdir(exist_ok=True)
        for name in ("generation_config.json", "tokenizer.json"):
            shutil.copy(self.folder / name, folder)
        (folder / "config.json").write_text(json.dumps(self.config if config is None else config))
        return folder

    def speak(self, runtime: Runtime) -> np.ndarray:
        *context, (speaker, text, _) = self.segments
        segments = [Segment(words, audio, who) for who, words, audio in context]
        return runtime.speak(text, speaker=speaker, context=segments, temperature=0, max_seconds=FRAMES * 0.08).codes

    def assert_loads_the_same(self, folder: Path) -> None:
        """Its weights are those of the model, and it says what transformers' model says."""
        runtime = Runtime.load(folder, device="cpu")
        assert_weights(runtime, self.model)
        self.codes.assert_same(self.speak(runtime))


def saved_model(folder: Path, seed: int, **sizes: Any) -> Saved:
    model = oracle.random_model(oracle.small_config(**sizes), seed)
    oracle.save(model, folder)
    segments = [(1, "Hi there.", oracle.speech_like(0.4, seed)), (0, "How are you today?", None)]
    codes = oracle.greedy_codes(model, oracle.inputs(folder, model.config, segments), FRAMES)
    config = json.loads((folder / "config.json").read_text())
    return Saved(folder, model, load_file(folder / "model.safetensors"), config, segments, codes)


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return saved_model(tmp_path_factory.mktemp("saved"), request.config.getoption("--seed"), **LARGE)


def assert_weights(runtime: Runtime, model: CsmForConditionalGeneration) -> None:
    """Every weight is transformers' own, packed, in the runtime's dtype; the codec is float32."""
    weights, dtype = runtime._model.weights, runtime.dtype

    def same(ours: Tensor, *theirs: Tensor) -> None:
        assert ours.dtype == dtype
        assert torch.equal(ours, torch.cat(theirs).to(dtype))

    table = model.depth_decoder.model.embed_tokens.weight
    projector = model.depth_decoder.model.inputs_embeds_projector.weight
    same(weights.text_embedding, model.embed_text_tokens.weight)
    same(weights.audio_embedding, model.backbone_model.embed_tokens.embed_audio_tokens.weight)
    same(weights.backbone_head[0], model.lm_head.weight)
    same(weights.depth_heads.transpose(1, 2), model.depth_decoder.codebooks_head.weight)
    same(weights.depth_projector, projector)
    for ours, theirs in ((weights.backbone, model.backbone_model), (weights.depth, model.depth_decoder.model)):
        same(ours.norm, theirs.norm.weight)
        for layer, module in zip(ours.layers, theirs.layers, strict=True):
            attention, mlp = module.self_attn, module.mlp
            same(layer.attention_norm, module.input_layernorm.weight)
            same(layer.qkv, attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
            same(layer.output, attention.o_proj.weight)
            same(layer.feed_forward_norm, module.post_attention_layernorm.weight)
            same(layer.gate_up, mlp.gate_proj.weight, mlp.up_proj.weight)
            same(layer.down, mlp.down_proj.weight)
    # Projected once and rounded once: half a unit in the last place of the dtype, and what float32 sums differ by.
    read = table[: len(weights.depth_embedding)]
    exact = read.to(dtype).double() @ projector.to(dtype).double().T
    error = (weights.depth_embedding.double() - exact).abs()
    assert bool((error <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-5).all())
    codec = {name: t.float() for name, t in model.codec_model.state_dict().items()}
    expected = mimi.load_mimi(_Tensors(codec), runtime.config.codec, "transformers")
    for ours, theirs in zip(memory.tensors_of(runtime._model.codec), memory.tensors_of(expected), strict=True):
        assert torch.equal(ours, theirs)


class _Tensors:
    """A codec's state dict, by the names of a saved checkpoint."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = {saved_name(name): tensor for name, tensor in tensors.items()}

    def names(self) -> set[str]:
        return set(self._tensors)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


# --- transformers' layout ---------------------------------------------------------------------------------------------


def test_one_file(saved: Saved) -> None:
    assert (saved.folder / "model.safetensors").is_file()
    saved.assert_loads_the_same(saved.folder)


def test_sharded(saved: Saved, tmp_path: Path) -> None:
    saved.model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert not (tmp_path / "model.safetensors").exists()
    saved.assert_loads_the_same(saved.copy(tmp_path))


@pytest.mark.parametrize("runtime_dtype", DTYPES)
@pytest.mark.parametrize("file_dtype", DTYPES)
def test_any_dtype_of_the_file_in_any_dtype(saved: Saved, tmp_path: Path, file_dtype: str, runtime_dtype: str) -> None:
    stored = {name: tensor.to(DTYPES[file_dtype]) for name, tensor in saved.tensors.items()}
    save_file(stored, saved.copy(tmp_path) / "model.safetensors", metadata={"format": "pt"})
    theirs = CsmForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = Runtime.load(tmp_path, device="cpu", dtype=runtime_dtype)
    assert_weights(ours, theirs)
    if runtime_dtype == "float32":
        expected = oracle.greedy_codes(theirs, oracle.inputs(tmp_path, theirs.config, saved.segments), FRAMES)
        expected.assert_same(saved.speak(ours))


def test_mixed_dtypes_in_one_file(saved: Saved, tmp_path: Path) -> None:
    """Norms in float32 beside matrices in bfloat16, as some fine-tunes are saved."""
    stored = {name: t if "norm" in name else t.to(torch.bfloat16) for name, t in saved.tensors.items()}
    save_file(stored, saved.copy(tmp_path) / "model.safetensors")
    model = CsmForConditionalGeneration.from_pretrained(saved.folder).eval()
    model.load_state_dict(
        {name: t if "norm" in name else t.bfloat16().float() for name, t in model.state_dict().items()}
    )
    assert_weights(Runtime.load(tmp_path, device="cpu"), model)


def test_named_as_on_the_hub_beside_sesames_own_file(saved: Saved, tmp_path: Path, seed: int) -> None:
    """config.json names the index in transformers_weights; model.safetensors is another layout (and, here, model)."""
    saved.model.save_pretrained(tmp_path, max_shard_size="800KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / "model.safetensors.index.json").unlink()
    for shard in set(index["weight_map"].values()):
        (tmp_path / shard).rename(tmp_path / shard.replace("model-", "transformers-"))
    index["weight_map"] = {name: s.replace("model-", "transformers-") for name, s in index["weight_map"].items()}
    (tmp_path / "transformers.safetensors.index.json").write_text(json.dumps(index))
    generator = torch.Generator().manual_seed(seed)
    decoy = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in saved.sesame.items()}
    save_file(decoy, tmp_path / "model.safetensors")
    both = sesame.CSM_1B | saved.config | {"transformers_weights": "transformers.safetensors.index.json"}
    saved.assert_loads_the_same(saved.copy(tmp_path, both))


@pytest.mark.parametrize("kept", [(BACKBONE_TABLE,), (DEPTH_TABLE,), (BACKBONE_TABLE, DEPTH_TABLE)], ids=len)
def test_tied_embedding_in_one_place_or_two(saved: Saved, tmp_path: Path, kept: tuple[str, ...]) -> None:
    tensors = {name: t for name, t in saved.tensors.items() if name not in (BACKBONE_TABLE, DEPTH_TABLE)}
    table = saved.model.depth_decoder.model.embed_tokens.weight.detach()
    tensors |= {name: table.clone() for name in kept}
    save_file(tensors, saved.copy(tmp_path) / "model.safetensors")
    saved.assert_loads_the_same(tmp_path)


def test_untied_embeddings(tmp_path: Path, seed: int) -> None:
    untied = saved_model(tmp_path, seed, tied=False)
    assert {BACKBONE_TABLE, DEPTH_TABLE} <= set(untied.tensors)
    assert not torch.equal(untied.tensors[BACKBONE_TABLE], untied.tensors[DEPTH_TABLE])
    untied.assert_loads_the_same(tmp_path)


def older(stack: dict[str, Any], type_key: str) -> dict[str, Any]:
    """A stack's config with rope_theta and rope_scaling instead of rope_parameters."""
    stack = dict(stack)
    rope = dict(stack.pop("rope_parameters"))
    stack["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    return stack | {"rope_scaling": None if kind == "default" else {type_key: kind, **rope}}


@pytest.mark.parametrize("rope", ["llama3", "default"])
@pytest.mark.parametrize("type_key", ["rope_type", "type"])
def test_older_spelling_of_the_rope(saved: Saved, tmp_path: Path, rope: str, type_key: str, seed: int) -> None:
    if rope == "default":
        saved = saved_model(tmp_path, seed)
    config = older(saved.config, type_key)
    config["depth_decoder_config"] = older(config["depth_decoder_config"], type_key)
    folder = saved.copy(tmp_path / "older", config)
    shutil.copy(saved.folder / "model.safetensors", folder)
    saved.assert_loads_the_same(folder)


def test_buffers_of_old_checkpoints_are_ignored(saved: Saved, tmp_path: Path) -> None:
    extra = {"backbone_model.rotary_emb.inv_freq": torch.zeros(16)}
    initialized = [f"{name.removesuffix('embed_sum')}initialized" for name in saved.tensors if "embed_sum" in name]
    tensors = {name: t for name, t in saved.tensors.items() if name not in initialized}
    save_file(tensors | extra, saved.copy(tmp_path) / "model.safetensors")
    assert len(tensors) < len(saved.tensors)
    saved.assert_loads_the_same(tmp_path)


# --- Sesame's layout --------------------------------------------------------------------------------------------------


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Neighbours (2i, 2i + 1) of x [..., head_dim] turned by angles [head_dim / 2], as complex numbers."""
    planes = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(planes * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def test_interleaved_rope_on_reordered_rows_is_half_split_rope(generator: torch.Generator) -> None:
    """The oracle's own reordering, on a small example: the same scores of any two positions."""
    heads, head_dim, hidden = 3, 8, 5
    query_rows, key_rows = torch.randn(2, heads * head_dim, hidden, generator=generator, dtype=torch.float64)
    x, y = torch.randn(2, hidden, generator=generator, dtype=torch.float64)
    frequencies = torch.tensor([1.0, 0.3, 0.05, 0.002], dtype=torch.float64)

    def half_split(vector: Tensor, angles: Tensor) -> Tensor:
        first, second = vector.chunk(2, dim=-1)
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
        )

    for here, there in ((0, 0), (7, 2), (113, 40)):
        query, key = ((w @ v).view(heads, head_dim) for w, v in ((query_rows, x), (key_rows, y)))
        expected = half_split(query, here * frequencies) * half_split(key, there * frequencies)
        query, key = (
            (sesame.interleaved_rows(w, head_dim) @ v).view(heads, head_dim)
            for w, v in ((query_rows, x), (key_rows, y))
        )
        scores = rotated(query, here * frequencies) * rotated(key, there * frequencies)
        torch.testing.assert_close(scores.sum(-1), expected.sum(-1))
        if here:
            assert not torch.allclose(half_split(query, here * frequencies), rotated(query, here * frequencies))


def write_sesame(saved: Saved, folder: Path, codec: str) -> Path:
    """Sesame's layout with the codec in `codec`'s form beside it."""
    saved.copy(folder)
    save_file({name: tensor.contiguous() for name, tensor in saved.sesame.items()}, folder / "model.safetensors")
    if codec == "kyutai":
        save_file({n: t.contiguous() for n, t in saved.kyutai_codec.items()}, folder / KYUTAI_CODEC[1])
    if codec == "transformers":
        (folder / "mimi").mkdir()
        save_file(sesame.codec_tensors(saved.tensors), folder / "mimi" / "model.safetensors")
    return folder


@pytest.mark.parametrize("codec", ["kyutai", "transformers"])
def test_sesames_layout_with_its_codec_beside_it(saved: Saved, tmp_path: Path, codec: str) -> None:
    saved.assert_loads_the_same(write_sesame(saved, tmp_path, codec))


def test_sesames_layout_alone_where_config_names_other_weights(saved: Saved, tmp_path: Path) -> None:
    """The hub's config.json names transformers' index, which somebody who took one file does not have."""
    write_sesame(saved, tmp_path, "kyutai")
    config = saved.config | {"transformers_weights": "transformers.safetensors.index.json"}
    saved.assert_loads_the_same(saved.copy(tmp_path, config))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sesames_layout_in_other_dtypes(saved: Saved, tmp_path: Path, dtype: str) -> None:
    write_sesame(saved, tmp_path, "kyutai")
    assert_weights(Runtime.load(tmp_path, device="cpu", dtype=dtype), saved.model)


_SPEAKER = """
import json, sys
from aloud import AloudError, Runtime
for line in sys.stdin:
    folder = json.loads(line)
    try:
        runtime = Runtime.load(folder, device="cpu")
        answer = runtime.speak("How are you today?", temperature=0, max_seconds=0.32).codes.tolist()
    except AloudError as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps(answer), flush=True)
"""


def test_codec_from_its_own_repository(saved: Saved, tmp_path: Path) -> None:
    """Kyutai's file from the hub; where the hub does not have it, or is not there, kyutai/mimi; else a sentence."""
    folder = write_sesame(saved, tmp_path / "model", "none")
    expected = (
        Runtime.load(saved.folder, device="cpu").speak("How are you today?", temperature=0, max_seconds=0.32).codes
    )
    given = oracle.inputs(saved.folder, saved.model.config, [(0, "How are you today?", None)])
    oracle.greedy_codes(saved.model, given, FRAMES).assert_same(expected)
    kyutai, transformers = tmp_path / "kyutai.safetensors", tmp_path / "transformers.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in saved.kyutai_codec.items()}, kyutai)
    save_file(sesame.codec_tensors(saved.tensors), transformers)

    with HubServer() as server:
        environment = client_environment(server, tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", _SPEAKER],
            env=environment,
            cwd=os.fspath(tmp_path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None

        def load() -> list[Any]:
            server.forget_requests()
            process.stdin.write(json.dumps(str(folder)) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        kind, sentence = load()
        assert kind == "ModelNotFound"
        assert "codec is a file of its own" in sentence
        assert f"put {KYUTAI_CODEC[1]} into the model's folder" in sentence

        others = {"README.md": b"codec", "config.json": b"{}", "other.safetensors": b"not wanted"}
        server.commit(TRANSFORMERS_CODEC[0], others | {"model.safetensors": transformers.read_bytes()})
        assert load() == expected.tolist()
        assert server.downloads() == ["model.safetensors"]

        server.commit(KYUTAI_CODEC[0], others | {KYUTAI_CODEC[1]: kyutai.read_bytes()})
        assert load() == expected.tolist()
        assert server.downloads() == [KYUTAI_CODEC[1]]

        server.stop()  # from the cache now
        try:
            assert load() == expected.tolist()
        finally:
            server.start()
        process.communicate(timeout=60)
