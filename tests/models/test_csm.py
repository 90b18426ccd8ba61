"""CSM against transformers: greedy codes token for token, logits, sampled determinism, batches, prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aloud import Request, Runtime, Segment
from oracle import csm as oracle

CONFIGS: dict[str, dict[str, Any]] = {
    "codebooks-2, head_dim 32, one kv head": {"codebooks": 2, "head_dim": 32, "kv_heads": 1, "depth_head_dim": 32},
    "codebooks-8, head_dim 64, llama3": {
        "codebooks": 8,
        "head_dim": 64,
        "rope": oracle.LLAMA3,
        "depth_rope": oracle.DEPTH_LLAMA3,
    },
    "codebooks-32, head_dim 128, grouped": {
        "codebooks": 32,
        "head_dim": 128,
        "heads": 6,
        "kv_heads": 3,
        "depth_heads": 4,
        "depth_kv_heads": 2,
        "depth_head_dim": 64,
        "rope": oracle.LLAMA3,
        "depth_rope": oracle.DEPTH_LLAMA3,
    },
    "ungrouped, untied": {"heads": 4, "kv_heads": 4, "depth_heads": 2, "depth_kv_heads": 2, "tied": False},
    "llama3 in the backbone only, odd sizes": {
        "rope": oracle.LLAMA3,
        "hidden_size": 72,
        "intermediate_size": 100,
        "depth_hidden_size": 44,
        "layers": 3,
        "vocabulary": 83,
    },
    "vocabulary of the codec exactly": {"vocabulary": 64, "codebook_size": 64, "depth_kv_heads": 4},
}
FRAMES = 8


class Pair:
    """One checkpoint, loaded by transformers and by Aloud."""

    def __init__(self, theirs: Any, ours: Runtime, folder: Path) -> None:
        self.theirs, self.ours, self.folder = theirs, ours, folder
        self._expected: dict[str, oracle.Greedy] = {}

    def expected(self, conversation: str, seed: int) -> oracle.Greedy:
        """What transformers generates greedily in `FRAMES` frames; fewer frames are the beginning of these."""
        if conversation not in self._expected:
            given = oracle.inputs(self.folder, self.theirs.config, conversations(seed)[conversation])
            self._expected[conversation] = oracle.greedy_codes(self.theirs, given, FRAMES)
        return self._expected[conversation]


@pytest.fixture(scope="module", params=list(CONFIGS), ids=list(CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    seed: int = request.config.getoption("--seed")
    model = oracle.random_model(oracle.small_config(**CONFIGS[request.param]), seed)
    folder = oracle.save(model, tmp_path_factory.mktemp("checkpoint"))
    return Pair(model, Runtime.load(folder, device="cpu"), folder)


def request_of(segments: list[tuple[int, str, np.ndarray | None]], seconds: float = FRAMES * 0.08) -> Request:
    *context, (speaker, text, _) = segments
    return Request(
        text,
        speaker=speaker,
        context=[Segment(words, audio, who) for who, words, audio in context],
        temperature=0,
        max_seconds=seconds,
    )


def conversations(seed: int) -> dict[str, list[tuple[int, str, np.ndarray | None]]]:
    """No context, one segment with audio of no whole number of frames, several by several speakers, text alone."""
    return {
        "no context": [(0, "Hello from Aloud.", None)],
        "one segment": [(1, "Hi there.", oracle.speech_like(1.03, seed)), (0, "How are you today?", None)],
        "several": [
            (0, "One.", oracle.speech_like(0.96, seed + 1)),
            (1, "Two, then.", oracle.speech_like(0.5, seed + 2)),
            (12, "Text alone; nobody heard it.", None),
            (0, "Three!", oracle.speech_like(0.31, seed + 3)),
            (1, "你好，世界 42.", None),
        ],
    }


@pytest.mark.parametrize("conversation", ["no context", "one segment", "several"])
def test_greedy_codes_are_those_of_transformers(pair: Pair, conversation: str, seed: int) -> None:
    spoken = pair.ours.speak_batch([request_of(conversations(seed)[conversation])])[0]
    pair.expected(conversation, seed).assert_same(spoken.codes)
    assert len(spoken.samples) == 1920 * len(spoken.codes)
    assert spoken.finish_reason == ("length" if len(spoken.codes) == FRAMES else "end")


def test_sound_is_that_of_transformers_codec(pair: Pair, seed: int) -> None:
    spoken = pair.ours.speak_batch([request_of(conversations(seed)["one segment"])])[0]
    with torch.no_grad():
        expected = pair.theirs.codec_model.decode(torch.from_numpy(spoken.codes.T.copy())[None]).audio_values[0, 0]
    np.testing.assert_allclose(spoken.samples, expected.numpy(), atol=1e-4 * float(expected.abs().max()))


def test_batch_of_different_lengths(pair: Pair, seed: int) -> None:
    frames = {"no context": 8, "one segment": 3, "several": 5}
    requests = [request_of(conversations(seed)[name], count * 0.08) for name, count in frames.items()]
    for (name, count), spoken in zip(frames.items(), pair.ours.speak_batch(requests), strict=True):
        pair.expected(name, seed).first(count).assert_same(spoken.codes)


def test_losses_are_those_of_transformers(pair: Pair, seed: int) -> None:
    segments = conversations(seed)["several"][:-1]
    given = oracle.inputs(pair.folder, pair.theirs.config, segments)
    config = pair.theirs.config
    is_audio = (given.input_ids == config.audio_token_id) | (given.input_ids == config.audio_eos_token_id)
    labels = torch.where(is_audio, given.input_ids, -100)
    with torch.no_grad():
        out = pair.theirs(given.input_ids, given.input_values, input_values_cutoffs=given.cutoffs, labels=labels)
    score = pair.ours.score([Segment(text, audio, speaker) for speaker, text, audio in segments])
    assert [None if part is None else part.shape for part in score.segments] == [
        None if audio is None else (-(-len(audio) // 1920) + 1, config.num_codebooks) for _, _, audio in segments
    ]
    assert score.backbone_loss == pytest.approx(float(out.backbone_loss), rel=1e-5)
    assert score.depth_loss == pytest.approx(float(out.depth_decoder_loss), rel=1e-5)
    assert score.loss == pytest.approx(float(out.loss), rel=1e-5)


def test_a_drawn_token_is_always_one_that_the_codec_has(tmp_path: Path, seed: int) -> None:
    """A head that wants the tokens above the codec's entries, most of all, draws them never."""
    config = oracle.small_config(vocabulary=80, codebook_size=64)
    model = oracle.random_model(config, seed)
    with torch.no_grad():
        model.depth_decoder.codebooks_head.weight[:, :, 64:] *= 50
        model.lm_head.weight[64:] *= 50
    runtime = Runtime.load(oracle.save(model, tmp_path), device="cpu")
    for temperature, top_k in ((0.0, 0), (1.0, 0), (1.0, 5)):
        codes = runtime.speak("Hello.", temperature=temperature, top_k=top_k, seed=seed, max_seconds=0.8).codes
        assert codes.max() < 64
