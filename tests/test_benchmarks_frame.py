"""The suite of a frame: its parts are the frame and nothing else, its floor the bytes that there are, its counters."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from aloud import Runtime
from aloud.benchmarks import first_audio, frame, mechanics, workload
from aloud.checkpoint.random import CONFIGS, write_random
from aloud.models.csm import Csm


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


@pytest.fixture(scope="module")
def runtime(checkpoint: Path) -> Runtime:
    return Runtime.load(checkpoint, device="cpu", max_streams=4, max_positions=400)


@pytest.fixture(scope="module")
def model(runtime: Runtime) -> Csm:
    return runtime._model


def short(checkpoint: Path, *more: str) -> list[str]:
    given = ["--model", str(checkpoint), "--device", "cpu", "--dtype", "float32", "--context", "20", "--frames", "2"]
    return [*given, "--repeats", "1", "--voice", "60", "--prefill", "16", "30", *more]


def test_report(checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    json_path, plot_path = tmp_path / "frame.json", tmp_path / "frame.png"
    more = ["--rows", "1", "3", "--frames-without-allocation", "5", "--json", str(json_path), "--plot", str(plot_path)]
    assert run(frame, *short(checkpoint, *more)) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document == json.loads(json_path.read_text())
    assert plot_path.read_bytes().startswith(b"\x89PNG")
    assert [result["rows"] for result in document["results"]] == [1, 3]
    for result in document["results"]:
        rows = result["rows"]
        assert result["sum_ms"] == pytest.approx(sum(result[f"{part}_ms"] for part in frame.PARTS))
        assert 0 < result["host_ms"] < result["frame_ms"]
        # A frame is 80 ms of sound and, in the small model, 8 tokens.
        assert result["real_time"] == pytest.approx(80 / result["frame_ms"])
        assert result["tokens_per_second"] == pytest.approx(rows * 8000 / result["frame_ms"])
        assert result["floor_ms"] == pytest.approx(
            sum(result["read_bytes"].values()) / document["copy_bytes_per_second"] * 1e3
        )
        assert result["floor_fraction"] == pytest.approx(result["floor_ms"] / result["frame_ms"])
        assert result["frames"] == 2 * rows
    assert set(document["prefill_ms"]) == {"16", "30"}
    names = [row["first_audio"] for row in document["first_audio"]]
    assert names == [
        "first after load",
        "first after warm",
        "warm, text alone",
        "warm, voice of 60",
        "warm, context of 60",
    ]
    assert all(0 < row["median_ms"] <= row["p99_ms"] for row in document["first_audio"])
    assert [set(start["stages"]) for start in document["starts"]] == [{"find", "read"}, {"find", "read", "allocate"}]
    assert document["allocations"]["counted"] is None
    assert document["allocations"]["frames"] >= 5
    assert "a CPU has no counters" in out


def flops(call) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call()
    count: int = counter.get_total_flops()
    return count


@pytest.mark.parametrize("rows", [1, 3])
def test_the_parts_are_the_whole(rows, model):
    """The products of the parts together are those of a frame, no fewer and no more."""
    state, slots, context = model.allocate(5, 40), torch.arange(rows), 20
    for slot in range(rows):
        model.start(state, slot, workload.Sampling(), slot, context)
    state.backbone_cache.normal_()

    def whole() -> None:
        model.decode(state, model.draw(state, slots), slots)

    parts = frame.frame_parts(model, state, slots, context)
    counted = {name: flops(part) for name, part in parts.items()}
    assert set(counted) == set(frame.PARTS)
    assert sum(counted.values()) == flops(whole)

    # By hand, without attention, and the codec's are many.
    def stack(c):
        qkv = (c.heads + 2 * c.kv_heads) * c.head_dim
        return c.layers * c.hidden_size * (qkv + c.heads * c.head_dim + 3 * c.intermediate_size)

    config = model.config
    assert counted["backbone"] >= 2 * rows * stack(config.backbone)
    assert counted["depth"] >= 2 * rows * config.codebooks * stack(config.depth)
    assert counted["codec"] > 0
    assert counted["state"] == 0


def test_the_parts_leave_a_stream_where_it_stands(model):
    state, slots = model.allocate(3, 40), torch.arange(2)
    state.position[:] = 7
    for part in frame.frame_parts(model, state, slots, 20).values():
        with torch.no_grad():
            part()
    assert state.position.tolist() == [7, 7, 7]


def test_the_floor_counts_what_a_frame_reads(model):
    """Against the sizes that the checkpoint's configuration states."""
    raw = CONFIGS["small"]
    context, rows = 100, 3
    counted = frame.frame_bytes(model, model.allocate(4, 120), rows, context)

    def stack(c):
        hidden, heads, kv, width = (
            c["hidden_size"],
            c["num_attention_heads"],
            c["num_key_value_heads"],
            c["head_dim"],
        )
        layer = hidden * width * (2 * heads + 2 * kv) + 3 * hidden * c["intermediate_size"] + 2 * hidden
        return 4 * (c["num_hidden_layers"] * layer + hidden)

    depth = raw["depth_decoder_config"]
    assert counted["backbone"] == stack(raw)
    assert counted["depth"] == 7 * stack(depth)
    # Tokens that the codec has no entry for are never drawn, and their rows of the heads not read.
    assert counted["heads"] == 4 * (256 * raw["hidden_size"] + 7 * 256 * depth["hidden_size"] + 128 * 64)
    assert counted["context"] == rows * context * 4 * 2 * 3 * 2 * 16
    assert counted["codec_window"] == rows * 4 * 2 * 2 * 4 * 250 * 16
    assert 0 < counted["codec"] < 10e6


def test_an_allocation_is_a_failure(checkpoint, capsys, monkeypatch):
    counters = iter([{"allocations": 7, "segments": 2, "bytes": 100}, {"allocations": 9, "segments": 2, "bytes": 612}])
    monkeypatch.setattr(frame, "allocator_counters", lambda _: next(counters))
    more = ["--rows", "1", "--no-cold-start", "--frames-without-allocation", "3"]
    assert run(frame, *short(checkpoint, *more)) == 1
    out = capsys.readouterr().out
    assert "ALLOCATED on the device: 2 allocations, 0 segments, 512 bytes" in out
    assert json.loads(out.splitlines()[-1])["allocations"]["counted"]["allocations"] == 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        pytest.param(["--rows", "0"], "1 row or more", id="no row"),
        pytest.param(["--rows", "17"], "at most 16 rows", id="more rows than a frame has"),
        pytest.param(["--context", "1"], "2 positions of context", id="no context"),
    ],
)
def test_wrong_arguments(wrong, words, checkpoint, capsys):
    assert run(frame, *short(checkpoint), *wrong) == 1
    assert words in capsys.readouterr().err


def test_a_voice_takes_as_many_positions_as_asked(runtime):
    assert runtime.voice([workload.voice_segment(runtime, 77, seed=0)]).positions == 77
    with pytest.raises(ValueError, match="no room for sound"):
        workload.voice_segment(runtime, 5, seed=0)


def test_first_audio_percentiles():
    row = first_audio.summary("x", [0.003, 0.001, *[0.002] * 198])
    assert row["calls"] == 200
    assert row["median_ms"] == pytest.approx(2.0)
    assert row["p99_ms"] == pytest.approx(2.0)
    assert first_audio.summary("x", [0.001] * 9 + [0.5])["p99_ms"] == pytest.approx(500.0)


# --- mechanics --------------------------------------------------------------------------------------------------------

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a device")


@interpreted
def test_mechanics_report(capsys):
    assert run(mechanics, "--device", "cpu", "--repeats", "1") == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [result["step"] for result in document["results"]] == ["empty", "dependent", "barrier"]
    assert all(math.isfinite(result["microseconds"]) for result in document["results"])


@interpreted
@pytest.mark.parametrize("links", [1, 2, 5])
def test_chains_count_their_links(links):
    chains = mechanics.Chains.on(torch.device("cpu"))
    chains.run_relay(links, programmatic=False)
    assert chains.is_right(links)
    assert not chains.is_right(links + 1)
    chains.run_barrier(links)
    assert chains.is_right(links)
    assert chains.arrived.item() == links


@interpreted
def test_several_programs_hand_on_to_their_neighbours(generator):
    """A program writes one more than its neighbour had: not than it had itself."""
    values = torch.randint(0, 100, (2, 3, mechanics.BLOCK), generator=generator, dtype=torch.int32)
    chains = mechanics.Chains(torch.device("cpu"), 3, values.clone(), torch.zeros(1, dtype=torch.int32))
    chains.plan_relay(0, programmatic=False).run()
    assert torch.equal(chains.values[1], values[0].roll(-1, dims=0) + 1)


@interpreted
def test_a_wrong_chain_has_no_figure(capsys, monkeypatch):
    monkeypatch.setattr(mechanics.Chains, "run_barrier", lambda self, links: self.values.fill_(links - 1))
    assert run(mechanics, "--device", "cpu", "--repeats", "1") == 1
    out, err = capsys.readouterr()
    assert "barrier: a chain of 2 links came out wrong" in err
    results = {result["step"]: result for result in json.loads(out.splitlines()[-1])["results"]}
    assert results["barrier"]["microseconds"] is None
    assert results["dependent"]["microseconds"] is not None
