"""CSM on the device: greedy codes equal to transformers' in float32, bfloat16 logits within transformers' own noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aloud import Runtime, Segment
from aloud.checkpoint.random import write_random
from aloud.engine.graphs import GraphSteps
from aloud.engine.slots import Slots
from aloud.kernels.codebook_head import codebook_head
from aloud.kernels.launch import Launch
from aloud.models import transformer
from aloud.models.csm import Csm, embed_prompt
from aloud.prepare import read_segments
from aloud.prompt_block import Piece
from aloud.request import Prompt, Sampling
from oracle import csm as oracle

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("unfilled_on_a_gpu")]


@pytest.fixture(autouse=True)
def exact_products() -> None:
    """transformers' float32 products in float32, not in TF32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("codebooks", [2, 8, 32])
def test_small_models_speak_the_same_on_both_devices(codebooks: int, tmp_path: Path, seed: int) -> None:
    config = oracle.small_config(codebooks=codebooks, rope=oracle.LLAMA3, depth_rope=oracle.DEPTH_LLAMA3)
    folder = oracle.save(oracle.random_model(config, seed), tmp_path)
    on_cpu, on_gpu = Runtime.load(folder, device="cpu"), Runtime.load(folder, device="cuda", dtype="float32")
    context = [Segment("Hi there.", oracle.speech_like(0.7, seed), speaker=1)]
    for temperature in (0.0, 0.9):
        given = {"context": context, "temperature": temperature, "seed": seed, "max_seconds": 2.0}
        expected, spoken = on_cpu.speak("Hello from Aloud.", **given), on_gpu.speak("Hello from Aloud.", **given)
        np.testing.assert_array_equal(spoken.codes, expected.codes)
        np.testing.assert_allclose(spoken.samples, expected.samples, atol=1e-4 * np.abs(expected.samples).max())


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("csm-1b")
    write_random(folder, "csm-1b", seed=1, dtype="float32")
    return folder


def load_theirs(folder: Path, dtype: torch.dtype, attention: str) -> oracle.CsmForConditionalGeneration:
    model = oracle.CsmForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.eval().cuda()


def test_full_size_greedy_codes(full_size: Path) -> None:
    text, frames = "Hello from Aloud.", 12
    theirs = load_theirs(full_size, torch.float32, "sdpa")
    given = oracle.inputs(full_size, theirs.config, [(0, text, None)])
    expected = oracle.greedy_codes(theirs, oracle.Inputs(given.input_ids.cuda(), None, None), frames)
    del theirs
    torch.cuda.empty_cache()
    spoken = Runtime.load(full_size, device="cuda", dtype="float32").speak(
        text, temperature=0, max_seconds=frames * 0.08
    )
    expected.assert_same(spoken.codes)


@torch.no_grad()
def drawn(model: Csm, rows: int, seed: int) -> np.ndarray:
    """Eight frames of so many streams, each behind a prompt of three random frames -> [frames, rows, codebooks]."""
    state = model.allocate(rows + 1, 32)
    steps = GraphSteps(model, Slots(state, rows, 32))
    codes = torch.randint(1, model.config.drawable, (3, rows, model.codebooks), generator=torch.manual_seed(seed))
    for slot in range(rows):
        steps.start(slot, Sampling(0.9, 50, 0.9, 50), seed + slot, 3)
        steps.prefill([Piece(slot, Prompt(torch.full((3,), -1), codes[:, slot]), 0, 3, 0)])
    return np.stack([steps.launch(np.arange(rows)).read().codes for _ in range(8)])


@pytest.mark.parametrize("rows", [1, 2, 4, 16, 64])
def test_kernels_that_begin_early_change_nothing(
    full_size: Path, rows: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice with programmatic launches, and once where each kernel begins when the one before has ended."""
    model = Runtime.load(full_size, device="cuda", dtype="bfloat16", max_streams=1).model
    early = [drawn(model, rows, seed) for _ in range(2)]
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: run(replace(launch, programmatic=False)))
    in_turn = drawn(model, rows, seed)
    assert (in_turn >= 0).all()
    for codes in early:
        np.testing.assert_array_equal(codes, in_turn)


def test_full_size_bfloat16_logits(full_size: Path) -> None:
    """Our distance from transformers (sdpa) is no more than twice that of transformers' two attentions."""
    text = "The quick brown fox jumps over the lazy dog, and then it does so once more."
    logits = {}
    with torch.no_grad():
        for attention in ("sdpa", "eager"):
            theirs = load_theirs(full_size, torch.bfloat16, attention)
            ids = oracle.inputs(full_size, theirs.config, [(0, text, None)]).input_ids.cuda()
            hidden = theirs.backbone_model(inputs_embeds=theirs.embed_text_tokens(ids)).last_hidden_state
            logits[attention] = theirs.lm_head(hidden)[0].float()
            del theirs
            torch.cuda.empty_cache()
    runtime = Runtime.load(full_size, device="cuda", dtype="bfloat16")
    model = runtime._model
    prompt, _ = read_segments(model, runtime._tokenizer, [Segment(text)], max_positions=model.max_positions)
    assert torch.equal(prompt.text_tokens.cuda(), ids[0])
    x = embed_prompt(model.config, model.weights, prompt.text_tokens.cuda(), prompt.codes.cuda())
    cache = transformer.allocate_cache(model.config.backbone, 1, len(prompt), device=model.device, dtype=x.dtype)
    steps = []
    for position in range(len(prompt)):  # the decode path, a position at a time
        place = torch.tensor([position], device=model.device)
        hidden = transformer.step(
            model.config.backbone,
            model.weights.backbone,
            cache,
            x[position : position + 1],
            torch.zeros_like(place),
            place,
        )
        norm, eps = model.weights.backbone.norm, model.config.backbone.norm_eps
        steps.append(codebook_head(hidden, norm, eps, model.weights.backbone_head, 0))
    ours = torch.cat(steps)
    noise = (logits["eager"] - logits["sdpa"]).abs().max()
    difference = (ours - logits["sdpa"]).abs().max()
    print(f"ours - sdpa {float(difference):.4f}, eager - sdpa {float(noise):.4f}")
    assert float(difference) <= 2 * float(noise)
