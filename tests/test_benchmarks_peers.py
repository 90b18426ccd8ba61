"""The suite that compares with transformers: its gate, that all sides do the same work, what it makes of failures."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aloud.benchmarks import peers
from aloud.checkpoint.random import write_random

pytest.importorskip("transformers")
FRAMES = 4


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    peers.add_arguments(parser)
    parsed = parser.parse_args(arguments)
    status: int = parsed.run(parsed)
    return status


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_random(folder, "small", seed=5, dtype="float32")
    return folder


def arguments(checkpoint: Path, *more: str) -> list[str]:
    given = ["--model", str(checkpoint), "--device", "cpu", "--dtype", "float32", "--frames", str(FRAMES)]
    return [*given, "--repeats", "1", "--no-compile", *more]


def test_report(checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    json_path, plot_path = tmp_path / "peers.json", tmp_path / "peers.png"
    more = ["--rows", "1", "2", "--json", str(json_path), "--plot", str(plot_path)]
    assert run(*arguments(checkpoint, *more)) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document == json.loads(json_path.read_text())
    assert plot_path.read_bytes().startswith(b"\x89PNG")
    assert "all codes equal" in out
    assert document["suite"] == "peers"
    assert document["gate"]["difference"] is None
    assert document["gate"]["rows"] == 2
    assert document["gate"]["sample_difference"] < 1e-4
    assert document["about"]["transformers"]

    results = {(result["peer"], result["rows"]): result for result in document["results"]}
    assert set(results) == {(peer, rows) for peer in (peers.EAGER, peers.OURS) for rows in (1, 2)}
    for (_, rows), result in results.items():
        assert result["error"] is None
        assert result["first_frame_equal"] == 1.0
        assert result["frame_ms"] > 0
        assert result["first_audio_ms"] > 0
        assert result["load_seconds"] > 0
        # A frame is 80 ms of sound and, in the small model, 8 tokens.
        assert result["real_time"] == pytest.approx(rows * 80 / result["frame_ms"])
        assert result["tokens_per_second"] == pytest.approx(rows * 8000 / result["frame_ms"])
    for ratio in document["ratios"]:
        theirs, ours = results[ratio["peer"], ratio["rows"]], results[peers.OURS, ratio["rows"]]
        assert ratio["frame"] == pytest.approx(theirs["frame_ms"] / ours["frame_ms"])
        assert ratio["first_audio"] == pytest.approx(theirs["first_audio_ms"] / ours["first_audio_ms"])
    assert [(ratio["peer"], ratio["rows"]) for ratio in document["ratios"]] == [(peers.EAGER, 1), (peers.EAGER, 2)]


def test_transformers_speaks_as_often_as_asked_with_either_cache(checkpoint):
    peer = peers.Transformers(checkpoint, torch.device("cpu"), torch.float32)
    eager = peer.speak(2, FRAMES)
    peer.use_static_caches(FRAMES, compile_on_cpu=False)
    for spoken in (eager, peer.speak(2, FRAMES)):
        assert [codes.shape for codes in spoken.codes] == [(FRAMES, 8)] * 2
        assert [len(samples) for samples in spoken.samples] == [FRAMES * peer.frame_samples] * 2
    assert not peer.is_compiled()
    first = peer.speak(1, 1)
    assert [len(samples) for samples in first.samples] == [1920]
    # Longer than the caches that the documentation has.
    peer.use_static_caches(peers.STATIC_POSITIONS, compile_on_cpu=False)
    assert peer.model.generation_config.max_length == peers.STATIC_POSITIONS + peer.input_ids.shape[1]


def test_codes_without_an_entry_are_suppressed_for_the_gate_alone(checkpoint):
    peer = peers.Transformers(checkpoint, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        # The head of codebook 0 likes a code best that the codec has no entry for.
        peer.model.lm_head.weight[256:] = 8 * peer.model.lm_head.weight[:3]
    assert any(int(code) >= 256 for code in peer.speak(1, 8).codes[0][:, 0])
    peer.suppress_codes_without_entry()
    assert all(int(codes.max()) < 256 for codes in peer.speak(1, 8).codes)


class Stub:
    """A peer that says what it is told to."""

    sample_rate, frame_samples = 24_000, 1920

    def __init__(self, code: int = 1, most: int = 1000) -> None:
        self.code, self.most = code, most

    def speak(self, rows: int, frames: int) -> peers.Spoken:
        made = min(frames, self.most)
        codes = torch.full((frames, 8), self.code)
        return peers.Spoken([codes] * rows, [np.zeros(made * self.frame_samples, np.float32)] * rows)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        pytest.param(
            "codes", "row 0 of aloud differs from transformers eager first in frame 0, codebook 0", id="codes"
        ),
        pytest.param("frames", "row 0 of aloud has codes [3, 8], transformers eager [4, 8]", id="frames"),
        pytest.param("samples", "row 0 of aloud has 5760 samples, transformers eager 7680", id="samples"),
    ],
)
def test_no_figure_where_codes_differ(broken, words, checkpoint, capsys, monkeypatch):
    truth = peers.Aloud.speak

    def speak(self, rows, frames):
        spoken = truth(self, rows, frames)
        if broken == "codes":
            spoken.codes[0][0, 0] += 1
        elif broken == "frames":
            spoken.codes[0] = spoken.codes[0][:-1]
        else:
            spoken.samples[0] = spoken.samples[0][:-1920]
        return spoken

    monkeypatch.setattr(peers.Aloud, "speak", speak)
    monkeypatch.setattr(peers, "measure", lambda *_: pytest.fail("was measured"))
    assert run(*arguments(checkpoint)) == 1
    out, err = capsys.readouterr()
    assert words in err
    document = json.loads(out.splitlines()[-1])
    assert words in document["gate"]["difference"]
    assert document["results"] == document["ratios"] == []


CPU = torch.device("cpu")


def test_a_speech_that_ends_early_has_no_figures():
    result = peers.measure_rows(Stub(most=3), 2, CPU, FRAMES, 1)
    assert result == {"error": "spoke 3 of 4 frames, so its figures would not compare"}


def test_one_frames_time_is_the_difference(monkeypatch):
    """A call that costs 0.5 s and 0.02 s a frame, has 20 ms a frame and 520 ms to first audio."""
    now = 0.0

    class Slow(Stub):
        def speak(self, rows: int, frames: int) -> peers.Spoken:
            nonlocal now
            now += 0.5 + 0.02 * frames
            return super().speak(rows, frames)

    monkeypatch.setattr(peers, "clock", lambda device: now)
    result = peers.measure_rows(Slow(), 3, CPU, 10, 5)
    assert result["frame_ms"] == pytest.approx(20)
    assert result["first_audio_ms"] == pytest.approx(520)
    assert result["speech_ms"] == pytest.approx(700)
    assert result["real_time"] == pytest.approx(12)
    assert result["tokens_per_second"] == pytest.approx(3 * 8 / 0.02)


def test_a_peer_that_fails_is_an_error_and_not_the_end():
    def load():
        raise RuntimeError("no such card\nand more")

    assert list(peers.measure("x", load, CPU, [1, 2], FRAMES, 1)) == [
        {"peer": "x", "rows": rows, "error": "RuntimeError: no such card"} for rows in (1, 2)
    ]

    class Full(Stub):
        def speak(self, rows: int, frames: int) -> peers.Spoken:
            if rows > 1:
                raise MemoryError
            return super().speak(rows, frames)

    results = list(peers.measure("x", Full, CPU, [2, 1], FRAMES, 1))
    assert [result["error"] for result in results] == ["MemoryError", None]


def test_ratios_are_to_aloud_at_the_same_rows():
    def result(peer, rows, milliseconds, codes):
        return {"peer": peer, "rows": rows, "frame_ms": milliseconds, "first_audio_ms": 9.0, "first_frame": codes}

    results = [
        result(peers.EAGER, 1, 30.0, [1, 2, 3, 4]),
        {"peer": peers.COMPILED, "rows": 1, "error": "it failed"},
        result(peers.OURS, 1, 3.0, [1, 2, 3, 5]),
        result(peers.OURS, 2, 4.0, [1, 2, 3, 5]),
    ]
    assert peers.add_ratios(results) == [{"peer": peers.EAGER, "rows": 1, "frame": 10.0, "first_audio": 1.0}]
    assert [r.get("first_frame_equal") for r in results] == [1.0, None, 0.75, None]


def test_says_so_without_transformers(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run() == 1
    assert "needs transformers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        pytest.param(["--frames", "1"], "2 frames or more", id="one frame"),
        pytest.param(["--rows", "0"], "1 row or more", id="no row"),
        pytest.param(["--model", "missing"], "no config.json", id="no model"),
    ],
)
def test_wrong_arguments(wrong, words, capsys):
    assert run(*wrong) == 1
    assert words in capsys.readouterr().err
