"""How things are timed: CUDA graphs replayed between events on a GPU, the clock elsewhere; and what a copy reaches."""

from __future__ import annotations

import contextlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

COPY_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}
COLD_BYTES = {"cuda": 400 << 20, "cpu": 0}
"""Weights that a timed loop goes through before it meets the first again: several times any level-2 cache."""


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy within the device's memory, read and written counted."""
    source = torch.randint(-128, 127, (COPY_BYTES[device.type],), dtype=torch.int8, device=device)
    destination = torch.empty_like(source)
    seconds = time_calls([lambda: destination.copy_(source)], device, repeats=20)
    return 2 * source.numel() / seconds


def copies_for_cold_cache(bytes_each: int, device: torch.device) -> int:
    """How many copies of an operation's weights to rotate through, so that none is still in a cache."""
    return max(1, min(128, -(-COLD_BYTES[device.type] // max(bytes_each, 1))))


def time_calls(calls: Sequence[Callable[[], object]], device: torch.device, *, repeats: int) -> float:
    """Seconds that one of `calls` takes when all are made one after the other; the median over `repeats`.

    On a GPU the calls are captured in one graph, so that neither Python nor launches are measured.
    """
    if device.type != "cuda":
        for call in calls:
            call()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for call in calls:
                call()
            times.append((time.perf_counter() - start) / len(calls))
        return statistics.median(times)

    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and settles the allocator
            for call in calls:
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        for _ in range(3):
            graph.replay()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start_event, end_event in events:
            start_event.record(stream)
            graph.replay()
            end_event.record(stream)
        stream.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3 / len(calls)


def circumstances(device: torch.device) -> dict[str, Any]:
    """When, on what, and of which commit a measurement is."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": name,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
    }


def _commit() -> str | None:
    """The commit of the tree that this file is in, "+" behind it when the tree has changes; None outside a clone.

    A copy of the package says in a file beside this one, COMMIT, what it is a copy of.
    """
    folder = Path(__file__).resolve().parent
    with contextlib.suppress(OSError):
        return (folder / "COMMIT").read_text().strip() or None
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")
