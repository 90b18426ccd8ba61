"""A suite's report: a table on the terminal, one JSON document, and plots saved as PNG where matplotlib is there.

Tables and document are of what was measured, also where a suite is interrupted or fails: `table` and `reported` stand
around the measuring, which fills the rows and the document as it goes.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of its values in a row, their unit, and how `format()` writes one (".2f")."""

    name: str
    unit: str = ""
    format: str = ""


def print_table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print names, units (where there are any) and rows; numbers to the right, "-" where there is no value."""
    cells = [[_cell(row.get(column.name), column.format) for column in columns] for row in rows]
    heads = [[column.name.replace("_", " ") for column in columns]]
    if any(column.unit for column in columns):
        heads.append([column.unit for column in columns])
    widths = [max(map(len, column)) for column in zip(*heads, *cells, strict=True)]
    words = [any(isinstance(row.get(column.name), str) for row in rows) for column in columns]
    for line in heads + cells:
        padded = [
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(line, widths, words, strict=True)
        ]
        print("  ".join(padded).rstrip())


@contextlib.contextmanager
def table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], title: str = "") -> Iterator[None]:
    """Print a title, if any, and a table of the rows that are there when the block ends, however it ends."""
    try:
        yield
    finally:
        if rows:
            if title:
                print(title)
            print_table(columns, rows)


@contextlib.contextmanager
def reported(document: dict[str, Any], json_path: Path | None = None) -> Iterator[None]:
    """Emit a document when the block ends, with "interrupted" or the "error" in it where it did not end well.

    An interrupt raises `KeyboardInterrupt` in the block, once: those after it are ignored until the document is out.
    """
    with _interrupted_once():
        try:
            yield
        except KeyboardInterrupt:
            document["interrupted"] = True
            raise
        except Exception as error:
            document["error"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            emit(document, json_path)


@contextlib.contextmanager
def _interrupted_once() -> Iterator[None]:
    """Ignore all interrupts but the first; `timeout` sends two, one to the process and one to its group."""
    if threading.current_thread() is not threading.main_thread():  # others are never interrupted
        yield
        return

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document to a file, indented, into a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def emit(document: Mapping[str, Any], json_path: Path | None = None) -> None:
    """Print a document as one line, which has to be a suite's last, and write it to a file if asked to."""
    # Printed first: a file that cannot be written does not cost what was measured.
    print(json.dumps(document), flush=True)
    if json_path is not None:
        write_json(json_path, document)


def plot_lines(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    log_x: bool = False,
) -> bool:
    """Save lines through points (x, y), one line for each name -> False, and a line printed, without matplotlib.

    log_x: a logarithmic axis to base 2 with a tick at each x, for batch sizes.
    """
    made = _new_plot(path, title, x_label, y_label)
    if made is None:
        return False
    figure, axes = made
    for name, points in series.items():
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.plot(xs, ys, marker="o", markersize=4, label=name)
    if log_x:
        ticks = sorted({x for points in series.values() for x, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    return _save(path, figure, axes, names=len(series))


def plot_bars(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    stacked: bool = False,
) -> bool:
    """Save bars, one for each group and name, with its value on it -> False, and a line printed, without matplotlib.

    series: for each name a value for each of `groups`; None is no bar.
    stacked: the names of a group stand on each other, as parts of a whole, with the whole's value above.
    """
    made = _new_plot(path, title, x_label, y_label)
    if made is None:
        return False
    figure, axes = made
    width = 0.8 if stacked else 0.8 / max(len(series), 1)
    bottoms = [0.0] * len(groups)
    for index, (name, values) in enumerate(series.items()):
        heights = [value or 0.0 for value in values]
        shift = 0.0 if stacked else (index - (len(series) - 1) / 2) * width
        places = [group + shift for group in range(len(groups))]
        if stacked:
            axes.bar(places, heights, width, bottom=bottoms, label=name)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        else:
            bars = axes.bar(places, heights, width, label=name)
            axes.bar_label(bars, ["" if value is None else f"{value:.3g}" for value in values], fontsize=8)
    if stacked:
        for group, height in enumerate(bottoms):
            axes.annotate(f"{height:.3g}", (group, height), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(groups)), groups)
    return _save(path, figure, axes, names=len(series))


def _cell(value: object, written: str) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, written)


def _new_plot(path: Path, title: str, x_label: str, y_label: str) -> tuple[Figure, Axes] | None:
    """An empty plot; None, and a line printed, where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no plot at {path}: matplotlib is not installed (pip install 'aloud[plot]')")
        return None
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and pyplot with its global state stays out of it
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _save(path: Path, figure: Figure, axes: Axes, *, names: int) -> bool:
    axes.set_ylim(bottom=0)
    if names > 1:
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return True
