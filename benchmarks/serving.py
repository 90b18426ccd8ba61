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
gone. Then the same requests come at the same times over HTTP: see `serving_http`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aloud import Request, Runtime, Segment
from aloud.engine.graphs import GraphSteps
from aloud.engine.loop import Loop
from aloud.engine.steps import EagerSteps, Steps
from aloud.engine.stream import Stream
from aloud.errors import Overloaded
from aloud.voice import Voice

from . import serving_http, workload
from .arrivals import (
    LETTERS,
    SECONDS_PER_LETTER,
    letters,
    percentiles_ms,
    poisson,
    speech_frames,
    speech_seconds,
    text_of,
)
from .measure import circumstances
from .report import Column, plot_lines, reported, table

LEAD_SECONDS = 0.4
START_SECONDS = 20.0
"""The longest to wait until all streams speak."""
SERVER_LEAD_SECONDS = 10.0
"""How far ahead of being played `aloud serve` lets a response run; the arrivals are served so without it, too."""

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
    Column("refused"),
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
    parser.add_argument("--no-http", action="store_true", help="measure the engine alone, not the server")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Measure and print tables; the last line is one JSON document."""
    numbers = [*parsed.rates, parsed.seconds]
    if min(parsed.streams, default=1) < 1 or not all(number > 0 and math.isfinite(number) for number in numbers):
        print("The suite serving needs 1 stream or more, rates and seconds above 0.", file=sys.stderr)
        return 1
    if parsed.context < 2:
        print("The suite serving needs 2 positions of context or more.", file=sys.stderr)
        return 1
    with workload.checkpoint(parsed.model, parsed.size, parsed.dtype) as folder, torch.no_grad():
        return measure(folder, parsed)


def measure(folder: Path, parsed: argparse.Namespace) -> int:
    """The suite on a checkpoint's folder."""
    document: dict[str, Any] = {
        "suite": "serving",
        "about": circumstances(torch.device(parsed.device)),
        "model": parsed.size if parsed.model is None else str(parsed.model),
        "dtype": parsed.dtype,
        "context": parsed.context,
        "voice": parsed.voice,
        "seconds": parsed.seconds,
        "seed": parsed.seed,
        "slots": None,
        "most_held": None,
        "held": [],
        "arrivals": [],
        "http": None,
    }
    with reported(document, parsed.json):
        segment, max_positions = measure_engine(folder, parsed, document)
        if segment is not None and not parsed.no_http:
            # The server loads a model of its own, and there is not always room for two.
            workload.release()
            engine = {row["rate"]: row for row in document["arrivals"]}
            http: list[dict[str, Any]] = []
            document["http"] = http
            serving_http.measure(folder, parsed, segment, document["slots"], max_positions, engine, http)
            document["http"] = http or None
    return 0


def measure_engine(folder: Path, parsed: argparse.Namespace, document: dict[str, Any]) -> tuple[Segment | None, int]:
    """Add to the document what a runtime does, which is gone then -> the voice, if needed, and the most positions."""
    device = torch.device(parsed.device)
    # Slots: of requests, twice as many as are expected at once at the highest rate.
    expected = max(parsed.rates, default=0.0) * float(letters(1000, parsed.seed).mean()) * SECONDS_PER_LETTER
    held_positions = parsed.context + ramp_frames(parsed.seconds)
    asked_positions = parsed.voice + LETTERS[3] + 16 + speech_frames(LETTERS[3])
    runtime = Runtime.load(
        folder,
        device=device,
        dtype=parsed.dtype,
        max_streams=max(4, *parsed.streams, int(2 * expected)),
        max_positions=max(held_positions if parsed.streams else 1, asked_positions if parsed.rates else 1),
    )
    about = document["about"]
    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}")
    print("warming", file=sys.stderr)
    runtime.warm()
    steps = runtime._running()[1]
    document["slots"] = runtime_slots(steps)

    held, arrivals = document["held"], document["arrivals"]
    with table(HELD_COLUMNS, held, f"{parsed.dtype}, {parsed.context} positions of context, {parsed.seconds:g} s"):
        for streams in sorted(set(parsed.streams)):
            print(f"measuring {streams} streams", file=sys.stderr)
            held.append(hold(runtime, steps, streams, parsed.context, parsed.seconds))
            document["most_held"] = most_held(held)
            if held[-1]["error"] is not None:
                print(f"{streams} streams: {held[-1]['error']}", file=sys.stderr)
    kept = document["most_held"] = most_held(held)
    if held:
        print(f"no frame late: {kept}")
    segment = workload.voice_segment(runtime, parsed.voice, parsed.seed) if parsed.rates else None
    voice = None if segment is None else runtime.voice([segment])
    heading = f"first audio under Poisson arrivals, behind a cached voice of {parsed.voice} positions"
    with table(ARRIVAL_COLUMNS, arrivals, heading):
        for rate in sorted(set(parsed.rates)):
            assert voice is not None
            print(f"measuring {rate:g} requests a second", file=sys.stderr)
            arrivals.append(serve_arrivals(runtime, steps, voice, rate, parsed.seconds, parsed.seed))
    if parsed.plot is not None and arrivals:
        heard = [row for row in arrivals if row["p50_ms"] is not None]
        series = {name: [(row["rate"], row[f"{name}_ms"]) for row in heard] for name in ("p50", "p99")}
        title = f"First audio, {parsed.dtype}, {about['device']}; {kept} real-time streams held"
        plot_lines(parsed.plot, title, "requests a second", "ms", series)
    return segment, runtime.max_positions


def runtime_slots(steps: Steps) -> int:
    """How many streams there is room for."""
    assert isinstance(steps, (EagerSteps, GraphSteps))
    return steps._slots.count


def new_loop(runtime: Runtime, steps: Steps) -> Loop:
    """A loop of its own, so with statistics of its own, that knows what the captured steps cost."""
    loop = Loop(steps, runtime_slots(steps), runtime.frame_rate)
    if isinstance(steps, GraphSteps):
        costs = steps.capture()
        for rows, seconds in costs.frame_seconds.items():
            loop.scheduler.observe_frame(rows, seconds)
        for positions, seconds in costs.prefill_seconds.items():
            loop.scheduler.observe_prefill(positions, seconds)
    return loop


@dataclass
class Driver:
    """A loop, those who take from its streams, and what its ticks were."""

    loop: Loop
    ticks: int = 0  # that handed out frames
    frames: int = 0
    busy_seconds: float = 0.0

    def tick(self, streams: Sequence[Stream], *, most_seconds: float) -> None:
        """One tick; then take everything, and sleep if there is nothing to do, for `most_seconds` at most."""
        begin = time.monotonic()
        pause = self.loop.step()
        taken = workload.take_all(self.loop, streams)
        self.busy_seconds += time.monotonic() - begin
        self.ticks += taken > 0
        self.frames += taken
        pause = most_seconds if pause is None else min(pause, most_seconds)
        if pause > 0:
            time.sleep(pause)


# --- how many are held ------------------------------------------------------------------------------------------------


def ramp_frames(seconds: float) -> int:
    """Frames that a stream makes that begins with the first, may have to wait for the last, and plays for so long."""
    return int((START_SECONDS + seconds + LEAD_SECONDS) * 12.5) + workload.MARGIN_FRAMES


def hold(runtime: Runtime, steps: Steps, count: int, context: int, seconds: float) -> dict[str, Any]:
    """Play `count` streams in real time."""
    driver = Driver(new_loop(runtime, steps))
    prefix = workload.noise_prefix(runtime._model, context - 1, seed=0)
    streams = [
        driver.loop.submit(
            workload.noise_job(
                runtime._model, runtime.sampling, prefix, ramp_frames(seconds), seed, lead_seconds=LEAD_SECONDS
            )
        )
        for seed in range(count)
    ]
    begin = time.monotonic()
    try:
        workload.run_until_all_speak(driver.loop, streams, limit_seconds=START_SECONDS)
    except TimeoutError as error:
        workload.stop_all(driver.loop, streams)
        return {"streams": count, "held": "no", "late_frames": None, "error": str(error)}
    started = time.monotonic()
    at_start = driver.loop.scheduler.statistics()
    while time.monotonic() < started + seconds:
        driver.tick(streams, most_seconds=0.02)
    elapsed = time.monotonic() - started
    statistics = driver.loop.scheduler.statistics()
    workload.stop_all(driver.loop, streams)
    return {
        "streams": count,
        "error": None,
        "held": "yes" if statistics.late_frames == 0 else "no",
        "frames": statistics.realtime_frames,
        "late_frames": statistics.late_frames,
        "late_at_start": at_start.late_frames,
        "late_p50_ms": statistics.lateness_p50 * 1e3,
        "late_p99_ms": statistics.lateness_p99 * 1e3,
        "late_max_ms": statistics.lateness_max * 1e3,
        "frames_per_second": driver.frames / elapsed,
        "rows_a_tick": driver.frames / max(driver.ticks, 1),
        "tick_ms": driver.busy_seconds / max(driver.ticks, 1) * 1e3,
        "busy": driver.busy_seconds / elapsed,
        "start_seconds": started - begin,
    }


def most_held(held: Sequence[dict[str, Any]]) -> int:
    """The most streams of an ascending ramp with no late frame, nor at any step before; 0 if there are none."""
    most = 0
    for result in held:
        if result["held"] == "no":
            break
        most = int(result["streams"])
    return most


# --- first audio under load -------------------------------------------------------------------------------------------


@dataclass
class Asked:
    """A request among others."""

    at: float  # when it was due to arrive
    stream: Stream
    first_audio_seconds: float | None = None


def serve_arrivals(
    runtime: Runtime, steps: Steps, voice: Voice, rate: float, seconds: float, seed: int
) -> dict[str, Any]:
    """Serve requests that come at random for `seconds`, until the last of them has been heard."""
    loop = new_loop(runtime, steps)
    times = poisson(rate, seconds, seed)
    lengths = letters(len(times), seed)
    begin = time.monotonic()
    waiting = deque((begin + at, int(length)) for at, length in zip(times, lengths, strict=True))
    asked: list[Asked] = []
    running: list[Asked] = []
    most = ticks = frames = refused = 0
    while waiting or any(one.first_audio_seconds is None for one in running):
        while waiting and waiting[0][0] <= time.monotonic():
            at, length = waiting.popleft()
            request = Request(
                text_of(length), seed=len(asked), max_seconds=speech_frames(length) / runtime.frame_rate, voice=voice
            )
            job = dataclasses.replace(runtime._prepare([request])[0], lead_seconds=SERVER_LEAD_SECONDS)
            running.append(Asked(at, loop.submit(job, is_refusable=True)))
            asked.append(running[-1])
        most = max(most, len(running))
        pause = loop.step()
        refused += sum(isinstance(one.stream.error, Overloaded) for one in running)
        running = [one for one in running if not isinstance(one.stream.error, Overloaded)]
        # The new ones first: they are whom a listener waits for.
        taken = 0
        for one in running:
            if one.first_audio_seconds is None and one.stream.frames:
                taken += workload.take_all(loop, [one.stream])
                one.first_audio_seconds = time.monotonic() - one.at
        taken += workload.take_all(loop, [one.stream for one in running])
        ticks, frames = ticks + (taken > 0), frames + taken
        running = [one for one in running if not one.stream.is_over]
        if pause != 0.0:
            until = waiting[0][0] - time.monotonic() if waiting else 0.02
            time.sleep(max(0.0, min(0.02, until, 0.02 if pause is None else pause)))
    statistics = loop.scheduler.statistics()
    workload.stop_all(loop, [one.stream for one in running])
    heard = [one.first_audio_seconds for one in asked if one.first_audio_seconds is not None]
    return {
        "rate": rate,
        "requests": len(asked),
        "refused": refused,
        "speech_seconds": speech_seconds(lengths),
        **percentiles_ms(heard),
        "most_streams": most,
        "late_frames": statistics.late_frames,
        "late_max_ms": statistics.lateness_max * 1e3,
        "frames": statistics.realtime_frames,
        "rows_a_tick": frames / max(ticks, 1),
    }
