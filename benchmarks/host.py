"""What the loop costs the host for each frame step, with a model that computes nothing.

The loop is the real one, with its scheduler and guards, and so are the streams and those who take from them; the clock
is moved by hand, a frame a step, so that every stream runs in every step. What a GPU's launches cost the host is not in
it: the suite `frame` has that, as `host`.

Times depend on the machine. What does not: how many Python functions are called in a step, and how many more for each
stream more, and how many operations of torch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aloud import Guards
from aloud.engine.loop import Loop
from aloud.engine.steps import HostFrame, Launched, Reading
from aloud.engine.stream import Job, Stream
from aloud.prompt_block import Piece
from aloud.request import Prompt, Sampling

from . import workload
from .measure import circumstances
from .report import Column, plot_lines, reported, table

CODEBOOKS, FRAME_SIZE, FRAME_RATE = 32, 1920, 12.5
BOUNDS_US = {1: 100.0, 1500: 3000.0}
"""Microseconds of a frame step at numbers of streams."""
SETTLE_STEPS = 20
COLUMNS = (
    Column("pace"),
    Column("streams"),
    Column("step_us", "us", ".1f"),
    Column("taking_us", "us", ".1f"),
    Column("together_us", "us", ".1f"),
    Column("p99_us", "us", ".1f"),
    Column("bound_us", "us", ".0f"),
    Column("calls", "Python", ".1f"),
    Column("calls_taking", "Python", ".1f"),
    Column("torch_operations"),
)


@dataclass(frozen=True)
class _Nothing:
    """A frame that is there at once, and a prompt that took no time to read."""

    frame: HostFrame

    def read(self) -> HostFrame:
        return self.frame

    def seconds(self) -> float:
        return 0.001


class NullSteps:
    """Steps of a model that computes nothing: every frame is the same arrays."""

    prefill_sizes = (16, 64, 128, 256, 512)
    prefill_together = True
    ahead = 1

    def __init__(self, streams: int) -> None:
        """For up to `streams` streams at once."""
        self.batch_sizes = (streams,)
        self._frame = HostFrame(
            codes=np.ones((streams, CODEBOOKS), np.int64),
            samples=np.ones((streams, FRAME_SIZE), np.float32),
            power=np.ones(streams, np.float32),
            ended=np.zeros(streams, bool),
            seconds=0.01,
        )

    def start(self, slot: int, sampling: Sampling, seed: int, positions: int) -> None:
        """See `Steps.start`."""

    def prefill(self, pieces: Sequence[Piece]) -> Reading:
        """See `Steps.prefill`."""
        return _Nothing(self._frame)

    def copy_prefix(self, slot: int, positions: int) -> torch.Tensor:
        """See `Steps.copy_prefix`."""
        return torch.zeros(positions)

    def paste_prefix(self, slot: int, prefix: torch.Tensor, positions: int) -> None:
        """See `Steps.paste_prefix`."""

    def copy_stream(self, slot: int, positions: int) -> tuple[torch.Tensor, ...]:
        """See `Steps.copy_stream`."""
        return ()

    def paste_stream(self, slot: int, stream: tuple[torch.Tensor, ...]) -> None:
        """See `Steps.paste_stream`."""

    def launch(self, slots: np.ndarray) -> Launched:
        """See `Steps.launch`."""
        rows = len(slots)
        frame = self._frame
        if rows != len(frame.codes):
            frame = HostFrame(
                frame.codes[:rows], frame.samples[:rows], frame.power[:rows], frame.ended[:rows], frame.seconds
            )
        return _Nothing(frame)


class Setting:
    """`streams` streams that run in every step, and a clock that is moved by hand."""

    def __init__(self, streams: int, *, lead_seconds: float | None) -> None:
        """Streams in steady state; `lead_seconds` None is full pace."""
        self.now = 0.0
        self.loop = Loop(NullSteps(streams), streams, FRAME_RATE, clock=lambda: self.now)
        prompt = Prompt(torch.ones(1, dtype=torch.int64), torch.zeros(1, CODEBOOKS, dtype=torch.int64))
        # No guard ends a stream, since the null model says the same frame for ever; all are computed nevertheless.
        jobs = [
            Job(prompt, Sampling(), seed, 1 << 40, Guards.off(), None, lead_seconds=lead_seconds)
            for seed in range(streams)
        ]
        self.streams: list[Stream] = [self.loop.submit(job) for job in jobs]
        for _ in range(SETTLE_STEPS):
            self.loop.step()
            self.take()
            self.tick()

    def take(self) -> int:
        """Take every frame that is there."""
        return workload.take_all(self.loop, self.streams)

    def tick(self) -> None:
        """Let a frame's time pass."""
        self.now += 1 / FRAME_RATE


def measure(streams: int, steps: int, *, lead_seconds: float | None) -> dict[str, Any]:
    """Times and counts of steps in which every stream gets a frame."""
    setting = Setting(streams, lead_seconds=lead_seconds)
    stepping, taking = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        setting.loop.step()
        middle = time.perf_counter()
        taken = setting.take()
        end = time.perf_counter()
        if taken != streams:
            raise RuntimeError(f"{taken} of {streams} streams were given a frame")
        stepping.append(middle - begin)
        taking.append(end - middle)
        setting.tick()
    together = [a + b for a, b in zip(stepping, taking, strict=True)]
    counts = count(setting)
    return {
        "pace": "full" if lead_seconds is None else "real time",
        "streams": streams,
        "step_us": statistics.median(stepping) * 1e6,
        "taking_us": statistics.median(taking) * 1e6,
        "together_us": statistics.median(together) * 1e6,
        "p99_us": float(np.percentile(together, 99, method="inverted_cdf")) * 1e6,
        "bound_us": BOUNDS_US.get(streams),
        **counts,
    }


COUNTED_STEPS = 10


def count(setting: Setting) -> dict[str, float]:
    """Python functions called and torch operations dispatched in a step, and by those who take; means of some steps."""
    calls = {"step": 0, "taking": 0}
    where = "step"

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            calls[where] += 1

    operations = _Operations()
    for _ in range(COUNTED_STEPS):
        with operations:
            where = "step"
            sys.setprofile(profile)
            setting.loop.step()
            where = "taking"
            workload.take_all(setting.loop, setting.streams)
            sys.setprofile(None)
        setting.tick()
    return {
        "calls": calls["step"] / COUNTED_STEPS,
        "calls_taking": calls["taking"] / COUNTED_STEPS,
        "torch_operations": operations.count / COUNTED_STEPS,
    }


class _Operations(TorchDispatchMode):
    """Counts the operations that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own arguments."""
    default = [1, 64, 256, 1500]
    parser.add_argument("--streams", type=int, nargs="+", default=default, help=f"default: {default}")
    parser.add_argument("--steps", type=int, default=300, help="steps of which the median is taken (default: 300)")
    parser.add_argument("--check", action="store_true", help="fail when a bound is broken")
    workload.add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Measure and print a table; the last line is one JSON document -> 1 with `--check` when a bound is broken."""
    if min(parsed.streams) < 1 or parsed.steps < 1:
        print("The suite host needs 1 stream or more, and 1 step or more.", file=sys.stderr)
        return 1
    about = circumstances(torch.device("cpu"))
    print(f"{about['device']}, Python {about['python']}, commit {about['commit']}")
    results: list[dict[str, Any]] = []
    with reported({"suite": "host", "about": about, "results": results}, parsed.json):
        counts = sorted(set(parsed.streams))
        with table(COLUMNS, results):
            for lead in (0.4, None):
                for streams in counts:
                    results.append(measure(streams, parsed.steps, lead_seconds=lead))
        for pace in ("real time", "full"):
            first, *_, last = [result for result in results if result["pace"] == pace] * 2
            if last["streams"] > first["streams"]:
                more = last["streams"] - first["streams"]
                for name in ("calls", "calls_taking"):
                    last[f"{name}_per_stream"] = (last[name] - first[name]) / more
                print(
                    f"{pace}: for each stream more, {last['calls_per_stream']:.2f} Python calls in the loop, "
                    f"{last['calls_taking_per_stream']:.2f} by those who take, "
                    f"{(last['together_us'] - first['together_us']) / more:.2f} us"
                )
        broken = [r for r in results if r["bound_us"] is not None and r["step_us"] > r["bound_us"]]
        for result in broken:
            print(
                f"{result['streams']} streams, {result['pace']}: {result['step_us']:.0f} us is over the bound of "
                f"{result['bound_us']:.0f} us",
                file=sys.stderr,
            )
        if parsed.plot is not None:
            series = {
                f"{name}, {pace}": [(r["streams"], r[key]) for r in results if r["pace"] == pace]
                for pace in ("real time", "full")
                for name, key in (("loop", "step_us"), ("with takers", "together_us"))
            }
            plot_lines(parsed.plot, "The host's part of a frame step", "streams", "us", series, log_x=True)
    return 1 if parsed.check and broken else 0
