"""Serving: how many streams play in real time with no frame late, and how soon a request among others is heard.

Both run the engine's own loop and scheduler, by one driver without threads: it makes a tick, takes what is there, and
sleeps when the loop says so.

Held: n streams at once, each behind `--context` positions (their keys and values are noise; the computation is the
same), ask together and play in real time with the default lead, for `--seconds` from when all speak. A frame is late
when it is there after it is due, the first one being due when it comes. No late frame is allowed, those at the start
included.

First audio: requests come as a Poisson process, each with a text of its own length behind one cached voice, and speak
as long as that text takes. Counted is from when a request was due to arrive until its first 80 ms are on the host:
tokenizing, the wait for the tick under way, the prompt, the frame. Before each rate the streams of the one before are
gone.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aloud import Request, Runtime
from aloud.engine.graphs import GraphSteps
from aloud.engine.loop import Loop
from aloud.engine.steps import Steps
from aloud.engine.stream import Stream
from aloud.voice import Voice

from . import workload
from .measure import circumstances
from .report import Column, emit, plot_lines, print_table

LEAD_SECONDS = 0.4
START_SECONDS = 60.0
"""The longest to wait until all streams speak."""
LETTERS = (60.0, 0.7, 8, 400)
"""Lengths of texts: median and sigma of their lognormal distribution, least and most."""
SECONDS_PER_LETTER = 0.065
WORDS = "one voice among many that speak at the same time of their own things and do not wait for each other ".split()

HELD_COLUMNS = (
    Column("streams"),
    Column("held"),
    Column("late_frames"),
    Column("late_at_start"),
    Column("late_p50_ms", "ms", ".1f"),
    Column("late_p99_ms", "ms", ".1f"),
    Column("late_max_ms", "ms", ".1f"),
    Column("frames_per_second", "1/s", ".0f"),
    Column("rows_a_tick", "", ".1f"),
    Column("tick_ms", "ms", ".2f"),
    Column("busy", "", ".0%"),
    Column("start_seconds", "s", ".2f"),
)
ARRIVAL_COLUMNS = (
    Column("rate", "1/s", "g"),
    Column("requests"),
    Column("speech_seconds", "s", ".1f"),
    Column("p50_ms", "ms", ".1f"),
    Column("p95_ms", "ms", ".1f"),
    Column("p99_ms", "ms", ".1f"),
    Column("max_ms", "ms", ".1f"),
    Column("most_streams"),
    Column("late_frames"),
    Column("late_max_ms", "ms", ".1f"),
    Column("rows_a_tick", "", ".1f"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own arguments."""
    cuda = torch.cuda.is_available()
    workload.add_arguments(parser)
    streams, rates = ([64, 256, 512, 1024, 1500], [10.0, 50.0, 100.0, 200.0]) if cuda else ([1, 2, 4], [1.0, 3.0])
    seconds = 10.0 if cuda else 2.0
    parser.add_argument("--streams", type=int, nargs="*", default=streams, help=f"in real time (default: {streams})")
    parser.add_argument("--rates", type=float, nargs="*", default=rates, help=f"requests a second (default: {rates})")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"of each measurement (default: {seconds:g})")
    parser.add_argument(
        "--voice", type=int, default=300, metavar="POSITIONS", help="positions of the cached voice (default: 300)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and texts (default: 0)")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Measure and print tables; the last line is one JSON document."""
    if min(parsed.streams, default=1) < 1 or min(parsed.rates, default=1) <= 0 or parsed.seconds <= 0:
        print("The suite serving needs 1 stream or more, rates and seconds above 0.", file=sys.stderr)
        return 1
    if parsed.context < 2:
        print("The suite serving needs 2 positions of context or more.", file=sys.stderr)
        return 1
    with workload.checkpoint(parsed.model, parsed.size, parsed.dtype) as folder, torch.no_grad():
        return measure(folder, parsed)


def measure(folder: Path, parsed: argparse.Namespace) -> int:
    """The suite on a checkpoint's folder."""
    device = torch.device(parsed.device)
    arrivals = {rate: poisson(rate, parsed.seconds, parsed.seed) for rate in parsed.rates}
    # Of requests, as many as are expected at once at the highest rate, and as many again.
    expected = max(parsed.rates, default=0.0) * float(np.mean(letters(1000, parsed.seed))) * SECONDS_PER_LETTER
    slots = max(4, *parsed.streams, int(2 * expected))
    frames = int((parsed.seconds + LEAD_SECONDS) * 12.5) + 1
    spoken = int(LETTERS[3] * SECONDS_PER_LETTER * 12.5)
    positions = max(parsed.context + 8 * frames, parsed.voice + int(LETTERS[3]) + 16 + spoken)
    runtime = Runtime.load(folder, device=device, dtype=parsed.dtype, max_streams=slots)
    runtime = Runtime.load(
        folder,
        device=device,
        dtype=parsed.dtype,
        max_streams=slots,
        max_positions=min(positions, runtime.max_positions),
    )
    return 0
