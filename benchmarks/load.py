"""Loading a checkpoint: seconds, and peak anonymous memory against the bytes of the weights."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

BOUND = 1.2
"""Peak anonymous memory while loading, over the bytes of the weights in the dtype asked for, at full size."""
SAMPLE_SECONDS = 0.002
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own arguments."""
    parser.add_argument("--model", type=Path, help="a checkpoint folder (default: random weights, made for the run)")
    parser.add_argument(
        "--size", default="csm-1b", choices=("small", "csm-1b"), help="size of the random weights (default: csm-1b)"
    )
    parser.add_argument(
        "--file-dtype", default="float32", choices=DTYPES, help="dtype of the random weights' files (default: float32)"
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES, help="to load in")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Measure each dtype in a process of its own; the last line printed is one JSON document."""
    if parsed.model is not None:
        return report(parsed.model, parsed.dtypes)
    from aloud.checkpoint.random import write_random

    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), parsed.size, seed=0, dtype=parsed.file_dtype)
        return report(Path(folder), parsed.dtypes)


def report(model: Path, dtypes: list[str]) -> int:
    """Print a table and the JSON document -> 1 if a full-size model breaks the bound."""
    results = []
    print(f"{'dtype':<10} {'weights':>10} {'RssAnon before':>15} {'peak':>10} {'peak/weights':>13} {'seconds':>8}")
    for dtype in dtypes:
        command = [sys.executable, __file__, str(model), dtype]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            print(process.stderr, end="", file=sys.stderr)
            return 1
        result = json.loads(process.stdout.splitlines()[-1])
        results.append(result)
        print(
            f"{dtype:<10} {result['weight_bytes'] / 1e9:>7.3f} GB {result['anonymous_before_bytes'] / 1e9:>12.3f} GB "
            f"{result['anonymous_peak_bytes'] / 1e9:>7.3f} GB {result['peak_ratio']:>13.3f} {result['seconds']:>8.2f}"
        )
    # Below a gigabyte, the interpreter and torch themselves are most of what is measured.
    broken = [r for r in results if r["weight_bytes"] > 1e9 and r["peak_ratio"] > BOUND]
    for result in broken:
        print(f"{result['dtype']}: {result['peak_ratio']:.3f} is over the bound of {BOUND}", file=sys.stderr)
    print(json.dumps({"suite": "load", "bound": BOUND, "results": results}))
    return 1 if broken else 0


def measure(model: str, dtype: str) -> dict[str, float | int | str]:
    """Load in this process while a thread watches /proc/self/status."""
    from aloud import Runtime
    from aloud.checkpoint.load import weight_bytes

    before = anonymous_bytes()
    peak = before
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        runtime = Runtime.load(model, device="cpu", dtype=dtype)
    finally:
        done.set()
        watcher.join()
    seconds = time.perf_counter() - start
    peak = max(peak, anonymous_bytes())
    weights = weight_bytes(runtime.config, runtime.dtype)
    return {
        "dtype": dtype,
        "weight_bytes": weights,
        "anonymous_before_bytes": before,
        "anonymous_peak_bytes": peak,
        "peak_ratio": peak / weights,
        "seconds": seconds,
    }


def anonymous_bytes() -> int:
    """RssAnon of this process: resident memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say how much of a process's memory is anonymous (no RssAnon)")


if __name__ == "__main__":
    from aloud.errors import AloudError

    try:
        print(json.dumps(measure(sys.argv[1], sys.argv[2])))
    except AloudError as error:
        sys.exit(str(error))
