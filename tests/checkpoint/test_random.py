"""The checkpoint of random weights: repeatable, sharded, and one that transformers loads too."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CsmForConditionalGeneration, PreTrainedTokenizerFast

from aloud import Runtime, Segment
from aloud.checkpoint import random
from aloud.checkpoint.random import DTYPES, write_random
from oracle import csm as oracle


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def test_a_seed_is_a_checkpoint(tmp_path: Path, seed: int) -> None:
    for name, number in (("first", seed), ("second", seed), ("other", seed + 1)):
        write_random(tmp_path / "made" / name, "small", seed=number, dtype="float32")
        torch.manual_seed(number)  # whatever torch's own generator does meanwhile
    first, second, other = (digests(tmp_path / "made" / name) for name in ("first", "second", "other"))
    assert first == second
    assert set(first) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
    }
    assert {name for name in first if first[name] != other[name]} == {"model-00001-of-00001.safetensors"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_loads_in_every_dtype(tmp_path: Path, dtype: str, seed: int) -> None:
    write_random(tmp_path, "small", seed=seed, dtype=dtype)
    assert {tensor.dtype for tensor in stored(tmp_path).values()} == {DTYPES[dtype]}
    for name, runtime_dtype in DTYPES.items():
        runtime = Runtime.load(tmp_path, device="cpu", dtype=name)
        assert runtime.dtype == runtime_dtype
        codes = runtime.speak("Hello.", seed=seed, max_seconds=0.16, temperature=1.0).codes
        assert 0 <= codes.min() <= codes.max() < 256


def test_dtypes_round_the_same_noise(tmp_path: Path, seed: int) -> None:
    for dtype in DTYPES:
        write_random(tmp_path / dtype, "small", seed=seed, dtype=dtype)
    exact = stored(tmp_path / "float32")
    for dtype in ("bfloat16", "float16"):
        rounded = stored(tmp_path / dtype)
        assert rounded.keys() == exact.keys()
        assert all(torch.equal(rounded[name], exact[name].to(DTYPES[dtype])) for name in exact)


def test_sharded(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random(tmp_path / "whole", "small", seed=seed, dtype="float32")
    monkeypatch.setattr(random, "SHARD_BYTES", 300_000)
    write_random(tmp_path / "sharded", "small", seed=seed, dtype="float32")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 5
    assert [path.name for path in shards] == [
        f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))
    ]
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    for path in shards:
        tensors = load_file(path)
        assert {name for name, shard in index["weight_map"].items() if shard == path.name} == set(tensors)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 300_000
    whole, sharded = stored(tmp_path / "whole"), stored(tmp_path / "sharded")
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_transformers_loads_it_and_says_the_same(tmp_path: Path, seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    write_random(tmp_path, "small", seed=seed, dtype="float32")
    theirs, report = CsmForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    theirs.eval()
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    # The backbone's table is the depth decoder's; `initialized` is the training's own note.
    assert all(key.endswith("initialized") or "embed_audio_tokens" in key for key in report["missing_keys"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    config = theirs.config
    config.audio_token_id, config.audio_eos_token_id = 318, 319  # where the small tokenizer has nothing
    ours = Runtime.load(tmp_path, device="cpu")
    audio = oracle.speech_like(0.5, seed)
    codes = torch.from_numpy(ours.encode(audio))
    ids = [
        *tokenizer(f"{oracle.BEGIN}[1]Hi.{oracle.END}", add_special_tokens=False)["input_ids"],
        *[318] * len(codes),
        319,
        *tokenizer(f"{oracle.BEGIN}[0]Hello from Aloud.{oracle.END}", add_special_tokens=False)["input_ids"],
    ]
    given = oracle.Inputs(torch.tensor([ids]), torch.from_numpy(audio)[None, None], torch.tensor([[len(audio)]]))
    expected = oracle.greedy_codes(theirs, given, 6)
    spoken = ours.speak("Hello from Aloud.", context=[Segment("Hi.", audio, 1)], temperature=0, max_seconds=6 * 0.08)
    expected.assert_same(spoken.codes)
    assert len(np.unique(spoken.codes)) > 8  # noise, not one token
    with torch.no_grad():
        sound = theirs.codec_model.decode(torch.from_numpy(spoken.codes.T.copy())[None]).audio_values[0, 0].numpy()
    np.testing.assert_allclose(spoken.samples, sound, atol=1e-4 * np.abs(sound).max())


def test_its_sampling_is_what_it_says(tmp_path: Path, seed: int) -> None:
    write_random(tmp_path, "small", seed=seed, dtype="bfloat16")
    sampling = Runtime.load(tmp_path, device="cpu").sampling
    assert (sampling.temperature, sampling.top_k) == (0.9, 50)
    assert (sampling.depth_temperature, sampling.depth_top_k) == (0.9, 50)


def test_tokenizer_has_one_token_a_byte(tmp_path: Path, seed: int) -> None:
    write_random(tmp_path, "small", seed=seed, dtype="bfloat16")
    runtime = Runtime.load(tmp_path, device="cpu")
    for text in ("Hello.", "¿Qué tal?", "你好 🙂", "<|end_of_text|>"):
        assert len(runtime._tokenizer.encode(text)) == len(text.encode())


def test_activations_are_of_order_one(tmp_path: Path, seed: int) -> None:
    """Random weights at any depth neither die out nor blow up: logits that sampling can tell apart."""
    write_random(tmp_path, "small", seed=seed, dtype="float32")
    model = CsmForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[256, 20, 30, 40, 257]])).logits
    assert 0.3 < float(logits.std()) < 3
