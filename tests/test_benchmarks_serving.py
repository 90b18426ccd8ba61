"""The suites of serving and of the host: they drive the real loop; what does not depend on the machine is asserted."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aloud import Runtime
from aloud.benchmarks import __main__ as command
from aloud.benchmarks import all_suites, arrivals, host, serving, summary
from aloud.checkpoint.random import write_random
from aloud.engine.loop import Loop
from aloud.engine.slots import Slots
from aloud.engine.steps import EagerSteps
from aloud.models.csm import Csm, CsmState


def run(suite, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    suite.add_arguments(parser)
    parsed = parser.parse_args(arguments)
    status: int = parsed.run(parsed)
    return status


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_random(folder, "small", seed=5, dtype="float32")
    return folder


def short(checkpoint: Path, *more: str) -> list[str]:
    given = ["--model", str(checkpoint), "--device", "cpu", "--dtype", "float32", "--context", "20", "--voice", "60"]
    return [*given, "--seconds", "0.5", *more]


# --- serving ----------------------------------------------------------------------------------------------------------


def test_report(checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    json_path, plot_path = tmp_path / "serving.json", tmp_path / "serving.png"
    more = ["--streams", "1", "2", "--rates", "8", "--json", str(json_path), "--plot", str(plot_path)]
    assert run(serving, *short(checkpoint, *more)) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(json_path.read_text())
    assert plot_path.read_bytes().startswith(b"\x89PNG")
    assert [result["streams"] for result in document["held"]] == [1, 2]
    for result in document["held"]:
        assert result["error"] is None
        assert (result["held"] == "yes") == (result["late_frames"] == 0)
        # In real time: what half a second plays, and the lead; not what the machine could make.
        most = (result["start_seconds"] + 0.5 + serving.LEAD_SECONDS) * 12.5 + 4
        assert result["streams"] <= result["frames"] <= result["streams"] * most
        assert 0 < result["rows_a_tick"] <= result["streams"]
    (own,) = document["arrivals"]
    assert own["requests"] == len(arrivals.poisson(8, 0.5, 0)) >= 1
    if own["refused"] < own["requests"]:
        assert 0 < own["p50_ms"] <= own["p95_ms"] <= own["p99_ms"] <= own["max_ms"]
    assert own["frames"] >= own["requests"] - own["refused"]
    (http,) = document["http"]
    assert http["requests"] == own["requests"]
    assert http["failed"] == 0
    assert (http["engine_p50_ms"], http["engine_p99_ms"]) == (own["p50_ms"], own["p99_ms"])


def test_the_engine_alone(checkpoint, capsys):
    assert run(serving, *short(checkpoint, "--streams", "1", "--rates", "--no-http")) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["arrivals"], document["http"]) == ([], None)
    assert run(serving, *short(checkpoint, "--streams", "--rates", "8", "--no-http")) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["http"] is None
    assert "over HTTP" not in out


def test_the_servers_model_is_loaded_when_this_one_is_gone(checkpoint, capsys, monkeypatch):
    """Two would not always fit into the device's memory."""
    before = loaded()

    def serve(folder, parsed, segment, slots, max_positions, engine, rows):
        assert (folder, list(engine)) == (checkpoint, [2.0, 4.0])
        assert slots > 4 * 4  # requests a second, and seconds that they last
        assert max_positions > 60 + 400
        assert loaded() <= before
        rows.append({"rate": 2.0})

    monkeypatch.setattr(serving.serving_http, "measure", serve)
    assert run(serving, *short(checkpoint, "--seconds", "0.1", "--streams", "1", "--rates", "4", "2")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["http"] == [{"rate": 2.0}]


def loaded() -> set[tuple[str, int]]:
    """What there is of runtimes, and of what holds a model's memory."""
    kinds = (Runtime, Loop, EagerSteps, Slots, Csm, CsmState)
    return {(type(one).__name__, id(one)) for one in gc.get_objects() if type(one) in kinds}


def test_streams_that_do_not_begin_are_not_held(checkpoint, monkeypatch):
    monkeypatch.setattr(serving, "START_SECONDS", 0.0)
    runtime = Runtime.load(checkpoint, device="cpu", max_streams=2, max_positions=60)
    result = serving.hold(runtime, runtime._running()[1], 2, 20, 0.1)
    assert result["held"] == "no"
    assert "gave no frame" in result["error"]


def test_most_held_ends_at_the_first_that_was_late():
    def results(*held):
        return [{"streams": 10 * (i + 1), "held": word} for i, word in enumerate(held)]

    assert serving.most_held(results("yes", "yes", "no", "yes")) == 20
    assert serving.most_held(results("no", "yes")) == 0
    assert serving.most_held(results("yes")) == 10
    assert serving.most_held([]) == 0


def test_arrivals_are_a_poisson_process(seed):
    times = arrivals.poisson(50.0, 200.0, seed)
    assert times == arrivals.poisson(50.0, 200.0, seed)
    assert times == sorted(times)
    assert times[-1] < 200
    assert len(times) == pytest.approx(10_000, abs=5 * 100)  # five standard deviations
    gaps = np.diff(times)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)
    assert arrivals.poisson(1e-6, 1.0, seed) == [0.0]


def test_percentiles_are_of_what_was_heard():
    seconds = [number / 1000 for number in range(1, 201)]
    assert arrivals.percentiles_ms(seconds) == {"p50_ms": 100, "p95_ms": 190, "p99_ms": 198, "max_ms": 200}
    assert set(arrivals.percentiles_ms([]).values()) == {None}


def test_texts_have_lengths_of_their_own(seed):
    lengths = arrivals.letters(2000, seed)
    median, _, least, most = arrivals.LETTERS
    assert np.median(lengths) == pytest.approx(median, rel=0.15)
    assert least <= lengths.min() < lengths.max() <= most
    for length in (1, 97, 400):
        assert len(arrivals.text_of(length)) == length
    assert arrivals.speech_frames(60) == round(60 * 0.065 * 12.5)


# --- host -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead_seconds", [0.4, None], ids=["real time", "full pace"])
def test_what_a_step_calls(lead_seconds):
    """Python calls grow by a few with each stream, and no operation of torch is there."""
    few, many = (host.count(host.Setting(streams, lead_seconds=lead_seconds)) for streams in (100, 1500))
    assert few["torch_operations"] == many["torch_operations"] == 0
    assert (many["calls"] - few["calls"]) / 1400 <= 4
    assert (many["calls_taking"] - few["calls_taking"]) / 1400 <= 6
    assert few["calls"] - 4 * 100 <= 150


def test_every_stream_is_given_a_frame_in_every_step():
    for lead_seconds in (0.4, None):
        setting = host.Setting(7, lead_seconds=lead_seconds)
        for _ in range(5):
            setting.loop.step()
            assert setting.take() == 7
            setting.tick()


def test_operations_are_counted():
    operations = host._Operations()
    with operations:
        torch.ones(3) + 1
    assert operations.count == 2


def test_host_report(tmp_path, capsys):
    json_path = tmp_path / "host.json"
    assert run(host, "--streams", "1", "30", "--steps", "5", "--json", str(json_path)) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document == json.loads(json_path.read_text())
    assert [(r["pace"], r["streams"]) for r in document["results"]] == [
        (pace, streams) for pace in ("real time", "full") for streams in (1, 30)
    ]
    assert "for each stream more" in out


def test_a_broken_bound_fails_only_a_check(capsys, monkeypatch):
    monkeypatch.setattr(host, "BOUNDS_US", {3: 0.0})
    assert run(host, "--streams", "3", "--steps", "2") == 0
    assert run(host, "--streams", "3", "--steps", "2", "--check") == 1
    assert "is over the bound of 0 us" in capsys.readouterr().err
    monkeypatch.setattr(host, "BOUNDS_US", {3: 1e9})
    assert run(host, "--streams", "3", "--steps", "2", "--check") == 0


# --- all --------------------------------------------------------------------------------------------------------------


class Stub:
    """A suite that takes its arguments as it would, and does as it is told."""

    def __init__(self, suite, status):
        self.suite, self.status, self.asked = suite, status, None

    def add_arguments(self, parser):
        self.suite.add_arguments(parser)
        parser.set_defaults(run=self.run)

    def run(self, parsed):
        self.asked = parsed
        assert not sys.stdout.isatty()  # libraries ask it
        print("measured")
        if isinstance(self.status, BaseException):
            raise self.status
        return self.status


def test_all_suites_are_given_the_same_options(tmp_path, capsys, monkeypatch):
    stubs = {name: Stub(suite, 0) for name, suite in all_suites.SUITES.items()}
    monkeypatch.setattr(all_suites, "SUITES", stubs)
    options = ["--size", "small", "--device", "cpu", "--dtype", "float32", "--context", "30", "--rows", "2"]
    assert command.main(["all", "--out", str(tmp_path / "out"), *options, "--streams", "3", "--no-compile"]) == 0
    folders = {stubs[name].asked.model for name in ("frame", "serving", "peers")}
    assert len(folders) == 1
    for name in ("frame", "serving", "peers"):
        assert (stubs[name].asked.device, stubs[name].asked.dtype) == ("cpu", "float32")
    assert stubs["frame"].asked.context == stubs["serving"].asked.context == 30
    assert stubs["frame"].asked.rows == stubs["peers"].asked.rows == [2]
    assert stubs["host"].asked.streams == stubs["serving"].asked.streams == [3]
    assert stubs["peers"].asked.no_compile
    for name, stub in stubs.items():
        assert stub.asked.json == tmp_path / "out" / f"{name}.json"
        assert stub.asked.plot == tmp_path / "out" / f"{name}.png"
        assert (tmp_path / "out" / f"{name}.txt").read_text() == "measured\n"
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["statuses"] == dict.fromkeys(stubs, 0)


def test_a_suite_that_fails_does_not_end_the_others(tmp_path, capsys, monkeypatch):
    stubs = {
        "frame": Stub(all_suites.SUITES["frame"], RuntimeError("broken")),
        "host": Stub(host, 0),
        "serving": Stub(serving, 1),
    }
    monkeypatch.setattr(all_suites, "SUITES", stubs)
    assert command.main(["all", "--out", str(tmp_path), "--size", "small", "--device", "cpu"]) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["statuses"] == {"frame": 1, "host": 0, "serving": 1}


def test_an_interrupt_ends_all_suites(tmp_path, capsys, monkeypatch):
    stubs = {"host": Stub(host, 0), "serving": Stub(serving, KeyboardInterrupt()), "frame": Stub(serving, 0)}
    monkeypatch.setattr(all_suites, "SUITES", stubs)
    assert command.main(["all", "--out", str(tmp_path), "--size", "small", "--device", "cpu"]) == 130
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["statuses"], document["interrupted"]) == ({"host": 0}, True)
    assert stubs["frame"].asked is None


# --- summary ----------------------------------------------------------------------------------------------------------


def test_summary_of_a_folder(tmp_path, capsys):
    """Of the reports that are there, whole ones; the goals stand beside what they are goals of."""
    assert list(summary.figures(tmp_path)) == []
    (tmp_path / "peers.json").write_text('{"half a rep')
    assert run(host, "--streams", "1", "--steps", "2", "--json", str(tmp_path / "host.json")) == 0
    arrivals = [{"rate": 50.0, "p99_ms": 12.5}]
    serving_report = {"most_held": 1024, "arrivals": arrivals, "http": [{"rate": 50.0, "p99_ms": 14.5}]}
    (tmp_path / "serving.json").write_text(json.dumps(serving_report))
    rows = {row["figure"]: row for row in summary.figures(tmp_path)}
    assert set(rows) == {
        "host, 1 streams, real time",
        "host, 1 streams, full",
        "real-time streams held",
        "first audio, p99 at 50/s",
        "first audio over HTTP, p99 at 50/s",
    }
    assert (rows["real-time streams held"]["measured"], rows["real-time streams held"]["goal"]) == (1024, ">= 1500")
    assert rows["host, 1 streams, full"]["goal"] == "<= 100"
