"""csm-1b at its full size, on random weights: transformers' tokens from both layouts that must load.

The weights are stored in bfloat16 and run in float32 by both; one of the two models is in memory at a time.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CsmForConditionalGeneration, MimiConfig

from aloud import Runtime
from aloud.checkpoint.load import KYUTAI_CODEC
from aloud.checkpoint.random import write_random
from oracle import csm as oracle
from oracle import sesame
from oracle.mimi import to_kyutai

pytestmark = pytest.mark.full_size

FRAMES = 3
TEXT = "Hello from Aloud."
# The same every time: among fresh weights, one draw in some thousands is too near a tie for float32 to decide.
SEED = 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("csm-1b")
    write_random(folder, "csm-1b", seed=SEED, dtype="bfloat16")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> oracle.Greedy:
    """What transformers says; its model is gone afterwards."""
    model = CsmForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    codes = oracle.greedy_codes(model, oracle.inputs(checkpoint, model.config, [(0, TEXT, None)]), FRAMES)
    del model
    gc.collect()
    assert codes.codes.shape == (FRAMES, 32)
    assert len(np.unique(codes.codes)) > 80  # speech of many tokens, not of one
    return codes


def assert_says(folder: Path, expected: oracle.Greedy) -> None:
    runtime = Runtime.load(folder, device="cpu", dtype="float32", local_files_only=True)
    spoken = runtime.speak(TEXT, temperature=0, max_seconds=FRAMES * 0.08)
    del runtime
    gc.collect()
    expected.assert_same(spoken.codes)
    assert len(spoken.samples) == FRAMES * 1920
    assert np.isfinite(spoken.samples).all()


def test_transformers_layout(checkpoint: Path, expected: oracle.Greedy) -> None:
    assert len(list(checkpoint.glob("*.safetensors"))) > 3
    assert_says(checkpoint, expected)


@pytest.fixture
def sesame_checkpoint(checkpoint: Path, tmp_path: Path) -> Iterator[Path]:
    """Sesame's layout and config.json, and the codec in Kyutai's file beside it."""
    tensors = {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}
    own = sesame.to_sesame(tensors, head_dim=64, depth_head_dim=128)
    save_file({name: tensor.contiguous() for name, tensor in own.items()}, tmp_path / "model.safetensors")
    codec = to_kyutai(sesame.codec_tensors(tensors), MimiConfig().to_dict())
    save_file({name: tensor.contiguous() for name, tensor in codec.items()}, tmp_path / KYUTAI_CODEC[1])
    (tmp_path / "config.json").write_text(json.dumps(sesame.CSM_1B))
    shutil.copy(checkpoint / "tokenizer.json", tmp_path)
    assert set(own) > {"audio_head", "backbone.layers.15.attn.k_proj.weight", "decoder.layers.3.mlp.w3.weight"}
    assert len(own) == 187  # as many as the published file has
    del tensors, own, codec
    gc.collect()
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_sesames_layout(sesame_checkpoint: Path, expected: oracle.Greedy) -> None:
    assert_says(sesame_checkpoint, expected)
