"""First audio: from the call of `Runtime.stream` to the first 80 ms on the host; and what a start takes, by stage.

Calls in a runtime that has spoken before: a text alone, a text behind a cached voice, and the same behind that voice's
turn as context, encoded and read for each call. In new processes: the first call after a load, which allocates,
compiles what no cache holds and captures; and the first after `Runtime.warm`. The warm start runs twice, and the second
is the one reported: by then everything that it captures is in Triton's cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from aloud import Runtime

from . import workload

TEXT = "Hello from Aloud, how are you?"
STAGES = (("find", "files"), ("read", "weights"), ("allocate", "memory"), ("capture", ("prefill", "frame")))
"""Stages of a start, each with the beginning of the names that progress is reported with."""


def measure(
    runtime: Runtime,
    folder: Path,
    parsed: argparse.Namespace,
    results: list[dict[str, Any]],
    starts: list[dict[str, Any]],
) -> None:
    """Add to `results` first audio in all its circumstances, to `starts` the stages of starts in new processes."""
    segment = workload.voice_segment(runtime, parsed.voice, seed=0)
    voice = runtime.voice([segment])
    ways: dict[str, dict[str, Any]] = {
        "warm, text alone": {},
        f"warm, voice of {voice.positions}": {"voice": voice},
        f"warm, context of {voice.positions}": {"context": [segment]},
    }
    for name, given in ways.items():
        seconds_of_first_audio(runtime, **given)  # captures what this prompt needs
        times = [seconds_of_first_audio(runtime, **given) for _ in range(parsed.repeats)]
        results.append(summary(name, times))
    if parsed.no_cold_start:
        return
    for place, (name, word) in enumerate((("load alone", "load"), ("load and warm", "warm"))):
        if word == "warm":
            start(folder, parsed, warm=True)
        begun = start(folder, parsed, warm=word == "warm")
        starts.append({"name": name, **begun})
        results.insert(place, summary(f"first after {word}", [begun["first_audio_seconds"]]))
        stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in begun["stages"].items())
        print(f"start, {name}: {stages}, together {begun['seconds']:.2f} s")


def seconds_of_first_audio(runtime: Runtime, **given: Any) -> float:
    """Seconds from the call to the first chunk's samples; the stream is closed then."""
    begin = time.perf_counter()
    with runtime.stream(TEXT, seed=0, max_seconds=1.0, **given) as stream:
        chunk = next(stream)
        seconds = time.perf_counter() - begin
    assert len(chunk.samples)
    return seconds


def summary(name: str, times: Sequence[float]) -> dict[str, Any]:
    """Median and 99th percentile of seconds, in milliseconds."""
    p99 = float(np.percentile(times, 99, method="inverted_cdf"))
    return {"first_audio": name, "calls": len(times), "median_ms": statistics.median(times) * 1e3, "p99_ms": p99 * 1e3}


def start(folder: Path, parsed: argparse.Namespace, *, warm: bool) -> dict[str, Any]:
    """Load in a new process, as a user would, and speak once."""
    command = [sys.executable, "-m", f"{__package__}.first_audio", str(folder), parsed.device, parsed.dtype]
    done = subprocess.run([*command, *(["--warm"] if warm else [])], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The start in a new process failed: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def start_here(folder: str, device: str, dtype: str, *, warm: bool) -> dict[str, Any]:
    """Load in this process, by stage, and time the first call."""
    marks: list[tuple[str, float]] = []

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter()))

    runtime = Runtime.load(folder, device=device, dtype=dtype, progress=mark)
    if warm:
        runtime.warm(mark)
    mark("end")
    stages: dict[str, float] = {}
    for (name, begin), (_, end) in pairwise(marks):
        stage = next((stage for stage, beginnings in STAGES if name.startswith(beginnings)), name)
        stages[stage] = stages.get(stage, 0.0) + end - begin
    return {
        "stages": stages,
        "seconds": sum(stages.values()),
        "first_audio_seconds": seconds_of_first_audio(runtime),
    }


def main() -> None:
    """In a new process: print what `start_here` finds as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("folder", "device", "dtype"):
        parser.add_argument(name)
    parser.add_argument("--warm", action="store_true")
    parsed = parser.parse_args()
    print(json.dumps(start_here(parsed.folder, parsed.device, parsed.dtype, warm=parsed.warm)))


if __name__ == "__main__":
    main()
