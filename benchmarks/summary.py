"""The figures that decide, from a folder of reports, beside their goals on one H200 in bfloat16."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .report import Column, print_table

COLUMNS = (Column("figure"), Column("measured", "", ".4g"), Column("unit"), Column("goal"))
FRAME_MS, FIRST_AUDIO_MS, PREFILL_MS, START_SECONDS, HELD = 2.6, 8, 3, 10, 1500
RATIOS = {"transformers eager": 25, "transformers compiled": 8}


def figures(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of the table, from the reports that are there, and from what is there of a report that was cut short."""

    def row(figure: str, measured: float | None, unit: str, goal: str = "") -> dict[str, Any]:
        return {"figure": figure, "measured": measured, "unit": unit, "goal": goal}

    if mechanics := read(folder, "mechanics"):
        if copied := mechanics.get("copy_bytes_per_second"):
            yield row("copy", copied / 1e12, "TB/s")
        for result in mechanics.get("results", ()):
            yield row(f"step: {result['step']}", result["microseconds"], "us")
    if frame := read(folder, "frame"):
        for result in frame.get("results", ()):
            goal = f"<= {FRAME_MS}" if result["rows"] == 1 else ""
            yield row(f"frame, {result['rows']} rows", result["frame_ms"], "ms", goal)
        for audio in frame.get("first_audio", ()):
            goal = f"<= {FIRST_AUDIO_MS}" if "voice" in audio["first_audio"] else ""
            yield row(f"first audio, {audio['first_audio']}", audio["median_ms"], "ms", goal)
        if "300" in (prefill := frame.get("prefill_ms", {})):
            yield row("prefill of 300", prefill["300"], "ms", f"<= {PREFILL_MS}")
        for start in frame.get("starts", ()):
            yield row(f"start, {start['name']}", start["seconds"], "s", f"< {START_SECONDS}")
        if counted := (frame.get("allocations") or {}).get("counted"):
            yield row("allocations while replaying", counted["allocations"], "", "0")
    if host := read(folder, "host"):
        for result in host.get("results", ()):
            if result["bound_us"] is not None:
                name = f"host, {result['streams']} streams, {result['pace']}"
                yield row(name, result["together_us"], "us", f"<= {result['bound_us']:.0f}")
    if serving := read(folder, "serving"):
        if "most_held" in serving:
            yield row("real-time streams held", serving["most_held"], "", f">= {HELD}")
        for result in serving.get("arrivals", ()):
            yield row(f"first audio, p99 at {result['rate']:g}/s", result["p99_ms"], "ms")
        for result in serving.get("http") or ():
            yield row(f"first audio over HTTP, p99 at {result['rate']:g}/s", result["p99_ms"], "ms")
    if peers := read(folder, "peers"):
        for ratio in peers.get("ratios", ()):
            goal = f">= {RATIOS[ratio['peer']]}" if ratio["rows"] == 1 else ""
            yield row(f"{ratio['peer']}, {ratio['rows']} rows", ratio["frame"], "x ours", goal)
    for suite, report in {
        "mechanics": mechanics,
        "frame": frame,
        "host": host,
        "serving": serving,
        "peers": peers,
    }.items():
        if cut := "interrupted" if report.get("interrupted") else report.get("error"):
            yield row(f"{suite}, not whole: {cut}", None, "")


def read(folder: Path, suite: str) -> dict[str, Any]:
    """A suite's report; empty where there is none."""
    try:
        document = json.loads((folder / f"{suite}.json").read_text())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


if __name__ == "__main__":
    print_table(COLUMNS, list(figures(Path(sys.argv[1]))))
