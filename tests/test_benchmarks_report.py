"""What every benchmark suite reports with: the table, the document, the plots, and doing without matplotlib."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from aloud.benchmarks.report import Column, emit, plot_bars, plot_lines, print_table, write_json

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
