"""What every benchmark suite reports with: the table, the document, the plots, and doing without matplotlib."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aloud.benchmarks import __main__ as command
from aloud.benchmarks import frame, host, kernels, measure, mechanics, peers, serving, summary
from aloud.benchmarks.report import Column, emit, plot_bars, plot_lines, print_table, reported, table, write_json

image = pytest.importorskip("matplotlib.image")
LINES = {"ours": [(1, 2.0), (8, 3.0), (64, 9.0)], "theirs": [(1, 20.0), (64, 90.0)]}


def test_table(capsys):
    columns = (Column("who"), Column("frame_ms", "ms", ".2f"), Column("rows"), Column("equal", "", ".0%"))
    rows = [{"who": "a", "frame_ms": 12.345, "rows": 1, "equal": 0.5}, {"who": "longer", "rows": 16, "other": 3}]
    print_table(columns, rows)
    assert capsys.readouterr().out.splitlines() == [
        "who     frame ms  rows  equal",
        "              ms",
        "a          12.35     1    50%",
        "longer         -    16      -",
    ]


def test_table_without_units_has_no_line_of_units(capsys):
    print_table((Column("a"), Column("b")), [{"a": 1, "b": 2}])
    assert capsys.readouterr().out.splitlines() == ["a  b", "1  2"]


def test_table_without_rows_has_its_heading(capsys):
    print_table((Column("a", "ms"),), [])
    assert capsys.readouterr().out.split() == ["a", "ms"]


def test_document_is_the_last_line_and_the_file(tmp_path, capsys):
    document = {"suite": "x", "results": [{"ms": 1.5, "none": None}]}
    path = tmp_path / "new" / "out.json"
    emit(document, path)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == document
    assert json.loads(path.read_text()) == document


def test_document_is_printed_although_its_file_cannot_be_written(tmp_path, capsys):
    with pytest.raises(OSError):
        emit({"suite": "x"}, tmp_path)
    assert json.loads(capsys.readouterr().out) == {"suite": "x"}


def test_write_json(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1]}


def colours(path: Path) -> int:
    """Colours of a picture that cover more than a hundred points."""
    pixels = (image.imread(path)[..., :3] * 255).astype(int).reshape(-1, 3)
    return int((np.unique(pixels, axis=0, return_counts=True)[1] > 100).sum())


@pytest.mark.parametrize("log_x", [False, True], ids=["linear", "logarithmic"])
def test_lines(log_x, tmp_path):
    path = tmp_path / "plots" / "lines.png"
    assert plot_lines(path, "title", "rows", "ms", LINES, log_x=log_x)
    assert path.read_bytes().startswith(b"\x89PNG")
    one = tmp_path / "one.png"
    plot_lines(one, "title", "rows", "ms", {"ours": LINES["ours"]}, log_x=log_x)
    assert colours(path) > colours(one)


@pytest.mark.parametrize("stacked", [False, True], ids=["side by side", "stacked"])
def test_bars(stacked, tmp_path):
    path, without = tmp_path / "bars.png", tmp_path / "without.png"
    plot_bars(path, "title", "rows", "ms", ["1", "2"], {"a": [1.0, 2.0], "b": [None, 4.0]}, stacked=stacked)
    plot_bars(without, "title", "rows", "ms", ["1", "2"], {"a": [1.0, 2.0], "b": [None, None]}, stacked=stacked)
    assert path.read_bytes() != without.read_bytes()
    assert colours(path) >= 3  # the ground and each name


def test_goes_on_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = tmp_path / "plot.png"
    assert not plot_lines(path, "title", "rows", "ms", LINES)
    assert not plot_bars(path, "title", "rows", "ms", ["1"], {"a": [1.0]})
    assert not path.exists()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("matplotlib is not installed" in line and str(path) in line for line in lines)


def test_pyplot_stays_out():
    """Its figures are global state, and it looks for a display."""
    source = Path(sys.modules[plot_bars.__module__].__file__ or "").read_text()
    assert "pyplot" not in [word for line in source.splitlines() if "import" in line for word in line.split(".")]


# --- what is left of a suite that ends before its end -----------------------------------------------------------------


def last_line(out: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(out.splitlines()[-1])
    return document


def test_a_document_is_out_however_its_block_ends(tmp_path, capsys):
    path = tmp_path / "out.json"
    with reported({"suite": "x"}, path):
        pass
    assert last_line(capsys.readouterr().out) == json.loads(path.read_text()) == {"suite": "x"}

    def measuring(error: BaseException) -> None:
        results: list[dict[str, Any]] = []
        with reported({"results": results}, path):
            results.append({"ms": 1})
            raise error

    with pytest.raises(KeyboardInterrupt):
        measuring(KeyboardInterrupt())
    document = last_line(capsys.readouterr().out)
    assert document == json.loads(path.read_text()) == {"results": [{"ms": 1}], "interrupted": True}
    with pytest.raises(ValueError, match="broken"):
        measuring(ValueError("broken"))
    document = last_line(capsys.readouterr().out)
    assert document == json.loads(path.read_text()) == {"results": [{"ms": 1}], "error": "ValueError: broken"}


def interrupt() -> None:
    """Interrupt this process, and wait until the interpreter has seen to it."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)


def test_a_second_interrupt_does_not_cost_the_report(capsys):
    """`timeout` sends two: to the process, and to its group."""

    def measuring() -> None:
        with reported({"suite": "x"}):
            try:
                interrupt()
            finally:
                interrupt()

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        measuring()
    assert last_line(capsys.readouterr().out) == {"suite": "x", "interrupted": True}
    assert signal.getsignal(signal.SIGINT) is before


def test_a_job_in_the_background_can_be_interrupted(capsys):
    """Where a shell has started it so, interrupts are ignored when it begins."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), reported({"suite": "x"}):
            interrupt()
    finally:
        signal.signal(signal.SIGINT, before)
    assert last_line(capsys.readouterr().out)["interrupted"]


def test_a_table_is_of_what_is_there(capsys):
    rows: list[dict[str, Any]] = []
    with table((Column("a"),), rows, "title"):
        assert capsys.readouterr().out == ""
    assert capsys.readouterr().out == ""
    rows.append({"a": 1})
    with pytest.raises(KeyboardInterrupt), table((Column("a"),), rows, "title"):
        raise KeyboardInterrupt
    assert capsys.readouterr().out.splitlines() == ["title", "a", "1"]


def interrupted_after(count: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which an interrupt ends when it is called for one time more."""
    calls = iter(range(count))

    def interrupted(*arguments: Any, **given: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return call(*arguments, **given)

    return interrupted


MODEL = ["--size", "small", "--device", "cpu", "--dtype", "float32"]
FRAME = [*MODEL, "--context", "20", "--frames", "2", "--repeats", "1", "--voice", "60", "--no-cold-start"]
SERVING = [*MODEL, "--context", "20", "--voice", "60", "--seconds", "0.1", "--no-http"]
PEERS = [*MODEL, "--frames", "2", "--repeats", "1", "--no-compile"]
KERNELS = ["--device", "cpu", "--dtype", "float32", "--small", "--repeats", "1", "--compile-rows"]


@pytest.mark.parametrize(
    ("suite", "stopped", "count", "options", "measured"),
    [
        pytest.param(
            frame, "measure_rows", 1, [*FRAME, "--rows", "1", "2"], {"results": 1, "first_audio": 0}, id="frame"
        ),
        pytest.param(
            frame,
            "prefill_ms",
            1,
            [*FRAME, "--rows", "1", "--prefill", "16", "20"],
            {"results": 1, "prefill_ms": 1, "first_audio": 0},
            id="frame, at prompts",
        ),
        pytest.param(
            frame.first_audio,
            "summary",
            2,
            [*FRAME, "--rows", "1", "--prefill", "16"],
            {"results": 1, "prefill_ms": 1, "first_audio": 2},
            id="frame, at first audio",
        ),
        pytest.param(serving, "hold", 1, [*SERVING, "--streams", "1", "2"], {"held": 1, "arrivals": 0}, id="serving"),
        pytest.param(
            serving,
            "serve_arrivals",
            1,
            [*SERVING, "--streams", "1", "--rates", "20", "30"],
            {"held": 1, "arrivals": 1},
            id="serving, at arrivals",
        ),
        pytest.param(peers, "measure_rows", 1, [*PEERS, "--rows", "1", "2"], {"results": 1}, id="peers"),
        pytest.param(
            peers, "measure_rows", 3, [*PEERS, "--rows", "1", "2"], {"results": 3, "ratios": 1}, id="peers, at ours"
        ),
        pytest.param(
            kernels,
            "measure",
            1,
            [*KERNELS, "--rows", "1", "--cases", "norm.depth", "head.depth"],
            {"results": 1},
            id="kernels",
        ),
        pytest.param(host, "measure", 1, ["--streams", "1", "2", "--steps", "2"], {"results": 1}, id="host"),
        pytest.param(mechanics, "time_calls", 2, ["--device", "cpu", "--repeats", "1"], {"results": 1}, id="mechanics"),
    ],
)
def test_an_interrupted_suite_reports_what_it_has_measured(
    suite, stopped, count, options, measured, tmp_path, capsys, monkeypatch
):
    if suite is peers:
        pytest.importorskip("transformers")
    monkeypatch.setattr(suite, stopped, interrupted_after(count, getattr(suite, stopped)))
    name = "frame" if suite is frame.first_audio else suite.__name__.rpartition(".")[2]
    path = tmp_path / f"{name}.json"
    assert command.main([name, *options, "--json", str(path)]) == 130
    out, err = capsys.readouterr()
    document = last_line(out)
    assert document == json.loads(path.read_text())
    assert document["interrupted"]
    assert (document["suite"], document["about"]["torch"]) == (name, measure.torch.__version__)
    assert {key: len(document[key]) for key in measured} == measured
    assert len(out.splitlines()) >= 4, "the table of it, besides what it was measured on"
    assert err.splitlines()[-1] == "interrupted"
    figures = {row["figure"] for row in summary.figures(tmp_path)}
    assert (f"{name}, not whole: interrupted" in figures) == (name != "kernels")


def test_kernels_write_their_document(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    assert command.main(["kernels", *KERNELS, "--rows", "2", "--cases", "norm.depth", "--json", str(path)]) == 0
    document = last_line(capsys.readouterr().out)
    assert document == json.loads(path.read_text())
    assert "interrupted" not in document
    assert [(result["case"], result["rows"], result["correct"]) for result in document["results"]] == [
        ("norm.depth", 2, True)
    ]


@pytest.mark.parametrize("name", ["mechanics", "frame", "host", "serving", "peers"])
def test_summary_of_a_document_that_was_cut_short(name, tmp_path):
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps({"suite": name, "interrupted": True}))
    assert [row["figure"] for row in summary.figures(tmp_path)] == [f"{name}, not whole: interrupted"]
    path.write_text(json.dumps({"suite": name, "error": "RuntimeError: no such card"}))
    assert [row["figure"] for row in summary.figures(tmp_path)] == [f"{name}, not whole: RuntimeError: no such card"]


def test_a_copy_of_the_package_says_what_it_is_a_copy_of(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "measure.py"))
    assert measure.circumstances(measure.torch.device("cpu"))["commit"] is None
    (tmp_path / "COMMIT").write_text("abc1234+\n")
    assert measure.circumstances(measure.torch.device("cpu"))["commit"] == "abc1234+"
    (tmp_path / "COMMIT").write_text("\n")
    assert measure.circumstances(measure.torch.device("cpu"))["commit"] is None
