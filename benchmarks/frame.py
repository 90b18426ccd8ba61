"""A frame by batch size: what it takes whole, in parts, on the host, and against its floor; prompts; first audio.

The whole is timed as it is used: streams in the engine's loop, one frame launched ahead, every 80 ms taken at once.
The parts are timed by themselves, on a GPU as captured graphs, at the same rows and positions:

    backbone    the stack, over `--context` positions
    depth       the depth decoder's stack, once for each codebook but the first
    heads       projector, heads, draws and the embeddings of what was drawn
    state       a stream's numbers read and written, the sum of a frame's embeddings
    codec       codes to sound

On a GPU the codec runs beside the next frame's draw, so the whole can be less than the sum. `host` is the time that
the host is busy for a frame: the loop, the launches and the consumers, without waiting for the device. The floor is
the bytes that a frame has to read (weights, the context's keys and values, the codec's attention window) over the
bandwidth of a copy, read and written, measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aloud import Runtime
from aloud.engine.graphs import GraphSteps
from aloud.engine.loop import Loop
from aloud.engine.steps import EagerSteps, Steps
from aloud.engine.stream import Job
from aloud.kernels.frame_state import begin_frame, end_frame
from aloud.kernels.linear import norm_linear
from aloud.kernels.next_code import next_code
from aloud.memory import bytes_of
from aloud.models import transformer
from aloud.models.csm import Csm, CsmState
from aloud.prompt_block import Piece

from . import first_audio, workload
from .measure import circumstances, copy_bandwidth, time_calls
from .report import Column, plot_lines, reported, table

PARTS = ("backbone", "depth", "heads", "state", "codec")
PREFILL_POSITIONS = (16, 64, 128, 256, 300, 512)
TEXT_POSITIONS = 128
"""Room for a text behind a voice."""

COLUMNS = (
    Column("rows"),
    Column("frame_ms", "ms", ".3f"),
    *(Column(f"{part}_ms", "ms", ".3f") for part in PARTS),
    Column("sum_ms", "ms", ".3f"),
    Column("host_ms", "ms", ".3f"),
    Column("floor_ms", "ms", ".3f"),
    Column("floor_fraction", "", ".1%"),
    Column("frames_per_second", "1/s", ".0f"),
    Column("real_time", "x", ".2f"),
    Column("tokens_per_second", "1/s", ".0f"),
    Column("allocated_gb", "GB", ".2f"),
    Column("reserved_gb", "GB", ".2f"),
)
FIRST_AUDIO_COLUMNS = (
    Column("first_audio"),
    Column("calls"),
    Column("median_ms", "ms", ".2f"),
    Column("p99_ms", "ms", ".2f"),
)
PREFILL_COLUMNS = (Column("prompt_positions"), Column("prefill_ms", "ms", ".2f"))
COUNTERS = {
    "allocations": "allocation.all.allocated",
    "segments": "segment.all.allocated",
    "bytes": "allocated_bytes.all.allocated",
}


@dataclass(frozen=True)
class Measured:
    """Streams in the loop, in steady state."""

    frame_seconds: float  # from one frame of all rows to the next; median over the rounds
    host_seconds: float  # of it, that the host was busy
    frames: int  # that were timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own arguments."""
    cuda = torch.cuda.is_available()
    workload.add_arguments(parser)
    rows = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024] if cuda else [1, 2, 4]
    parser.add_argument("--rows", type=int, nargs="+", default=rows, help=f"batch sizes (default: {rows})")
    parser.add_argument(
        "--frames", type=int, default=64 if cuda else 4, help="frames of a round (default: 64 on a GPU, 4 on a CPU)"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=32 if cuda else 3,
        help="rounds, replays of a part, and calls for first audio (default: 32 on a GPU, 3 on a CPU)",
    )
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="after so long no new round of a batch size is begun (default: 6)"
    )
    parser.add_argument(
        "--frames-without-allocation",
        type=int,
        default=10_000 if cuda else 50,
        metavar="N",
        help="frames during which nothing may be allocated on a GPU (default: 10,000; 50 on a CPU, which has no "
        "counters); 0 leaves it out",
    )
    parser.add_argument(
        "--prefill",
        type=int,
        nargs="*",
        default=PREFILL_POSITIONS,
        help=f"positions of prompts to be read (default: {PREFILL_POSITIONS})",
    )
    parser.add_argument(
        "--voice", type=int, default=300, metavar="POSITIONS", help="positions of the cached voice (default: 300)"
    )
    parser.add_argument("--no-cold-start", action="store_true", help="leave out first audio in new processes")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Measure and print tables; the last line is one JSON document -> 1 when a frame allocated memory on the device."""
    if min(parsed.rows, default=0) < 1 or parsed.repeats < 1 or parsed.frames < 1 or parsed.context < 2:
        print("The suite frame needs 1 row or more, 1 frame, 1 repeat and 2 positions of context.", file=sys.stderr)
        return 1
    with workload.checkpoint(parsed.model, parsed.size, parsed.dtype) as folder, torch.no_grad():
        return measure(folder, parsed)


def measure(folder: Path, parsed: argparse.Namespace) -> int:
    """The suite on a checkpoint's folder."""
    longest = max(parsed.context, parsed.voice + TEXT_POSITIONS, *parsed.prefill)
    device = torch.device(parsed.device)
    runtime = Runtime.load(
        folder,
        device=device,
        dtype=parsed.dtype,
        max_streams=max(parsed.rows),
        max_positions=longest + parsed.frames + 2 * workload.MARGIN_FRAMES,
    )
    about, bandwidth = circumstances(device), copy_bandwidth(device)
    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}")
    print(f"copy {bandwidth / 1e12:.3f} TB/s; {parsed.dtype}, {parsed.context} positions of context")
    steps = runtime._running()[1]
    if max(parsed.rows) > steps.batch_sizes[-1]:
        print(f"One frame on {device} has at most {steps.batch_sizes[-1]} rows; ask for fewer.", file=sys.stderr)
        return 1

    results: list[dict[str, Any]] = []
    prefill: list[dict[str, Any]] = []
    audio: list[dict[str, Any]] = []
    starts: list[dict[str, Any]] = []
    allocations = None
    document: dict[str, Any] = {
        "suite": "frame",
        "about": about,
        "model": parsed.size if parsed.model is None else str(parsed.model),
        "dtype": parsed.dtype,
        "context": parsed.context,
        "copy_bytes_per_second": bandwidth,
        "results": results,
        "prefill_ms": {},
        "first_audio": audio,
        "starts": starts,
        "allocations": None,
    }
    with reported(document, parsed.json):
        with table(COLUMNS, results):
            for rows in sorted(set(parsed.rows)):
                print(f"measuring {rows} rows", file=sys.stderr)
                results.append(measure_rows(runtime, steps, rows, parsed, bandwidth))
        with table(PREFILL_COLUMNS, prefill):
            for positions in parsed.prefill:
                milliseconds = prefill_ms(runtime, steps, positions, parsed.repeats)
                prefill.append({"prompt_positions": positions, "prefill_ms": milliseconds})
                document["prefill_ms"][positions] = milliseconds
        print("measuring first audio", file=sys.stderr)
        with table(FIRST_AUDIO_COLUMNS, audio):
            first_audio.measure(runtime, folder, parsed, audio, starts)
        if parsed.frames_without_allocation:
            allocations = document["allocations"] = count_allocations(runtime, steps, min(parsed.rows), parsed)
            print(allocation_sentence(allocations))
        if parsed.plot is not None:
            keys = {"whole": "frame_ms", **{part: f"{part}_ms" for part in PARTS}}
            keys |= {"host": "host_ms", "floor": "floor_ms"}
            series = {name: [(result["rows"], result[key]) for result in results] for name, key in keys.items()}
            title = f"A frame, {parsed.dtype}, {parsed.context} positions, {about['device']}"
            plot_lines(parsed.plot, title, "rows", "ms", series, log_x=True)
    return 1 if allocations is not None and (allocations["counted"] or {}).get("allocations") else 0


def measure_rows(
    runtime: Runtime, steps: Steps, rows: int, parsed: argparse.Namespace, bandwidth: float
) -> dict[str, Any]:
    """All figures of one batch size."""
    model, device = runtime._model, runtime.device
    measured = time_loop(runtime, steps, rows, parsed)
    parts = time_parts(runtime, steps, rows, parsed.context, parsed.repeats)
    read_bytes = frame_bytes(model, state_of(steps), rows, parsed.context)
    floor_seconds = sum(read_bytes.values()) / bandwidth
    cuda = device.type == "cuda"
    return {
        "rows": rows,
        "frames": measured.frames,
        "frame_ms": measured.frame_seconds * 1e3,
        **{f"{part}_ms": seconds * 1e3 for part, seconds in parts.items()},
        "sum_ms": sum(parts.values()) * 1e3,
        "host_ms": measured.host_seconds * 1e3,
        "read_bytes": read_bytes,
        "floor_ms": floor_seconds * 1e3,
        "floor_fraction": floor_seconds / measured.frame_seconds,
        "frames_per_second": rows / measured.frame_seconds,
        "real_time": 1 / runtime.frame_rate / measured.frame_seconds,  # of each stream
        "tokens_per_second": rows * model.codebooks / measured.frame_seconds,
        "allocated_gb": torch.cuda.memory_allocated(device) / 1e9 if cuda else None,
        "reserved_gb": torch.cuda.memory_reserved(device) / 1e9 if cuda else None,
    }


# --- the whole --------------------------------------------------------------------------------------------------------


def frame_jobs(runtime: Runtime, rows: int, context: int, frames: int) -> list[Job]:
    """Streams that begin with `context` positions read."""
    model = runtime._model
    prefix = workload.noise_prefix(model, context - 1, seed=0)
    frames += workload.MARGIN_FRAMES
    return [workload.noise_job(model, runtime.sampling, prefix, frames, seed) for seed in range(rows)]


def time_loop(runtime: Runtime, steps: Steps, rows: int, parsed: argparse.Namespace) -> Measured:
    """Rounds of `--frames` frames of `rows` streams, each round from the same context."""
    timed = workload.TimedSteps(steps)
    loop = Loop(timed, max(parsed.rows), runtime.frame_rate)
    jobs = frame_jobs(runtime, rows, parsed.context, parsed.frames)
    end = time.perf_counter() + parsed.seconds
    frame_seconds: list[float] = []
    host_seconds: list[float] = []
    frames = 0
    while len(frame_seconds) < parsed.repeats and (len(frame_seconds) < 3 or time.perf_counter() < end):
        streams = [loop.submit(job) for job in jobs]
        workload.run_until_all_speak(loop, streams, limit_seconds=120)
        read, launched, taken = timed.read_seconds, timed.launch_seconds, 0
        begin = time.perf_counter()
        while taken < parsed.frames * rows:
            loop.step()
            taken += workload.take_all(loop, streams)
        seconds = time.perf_counter() - begin
        # On a CPU a launch is the computation itself.
        waited = timed.read_seconds - read + (0.0 if steps.ahead else timed.launch_seconds - launched)
        made = taken / rows
        frame_seconds.append(seconds / made)
        host_seconds.append((seconds - waited) / made)
        frames += taken
        workload.stop_all(loop, streams)
    return Measured(statistics.median(frame_seconds), statistics.median(host_seconds), frames)


# --- the parts --------------------------------------------------------------------------------------------------------


def state_of(steps: Steps) -> CsmState:
    """The streams' memory behind some steps."""
    assert isinstance(steps, (EagerSteps, GraphSteps))
    state: CsmState = steps._slots.state
    return state


def time_parts(runtime: Runtime, steps: Steps, rows: int, context: int, repeats: int) -> dict[str, float]:
    """Seconds of each of `PARTS` at so many rows, each row with `context` positions."""
    prefix = workload.noise_prefix(runtime._model, context, seed=1)
    for slot in range(rows):
        steps.paste_prefix(slot, prefix.cache, prefix.positions)
    parts = frame_parts(runtime._model, state_of(steps), torch.arange(rows, device=runtime.device), context)
    if runtime.device.type == "cuda":  # the parts run on a stream that waits for no other
        torch.cuda.synchronize(runtime.device)
    return {name: time_calls([part], runtime.device, repeats=repeats) for name, part in parts.items()}


def frame_parts(model: Csm, state: CsmState, slots: torch.Tensor, context: int) -> dict[str, Callable[[], object]]:
    """What `Csm.draw` and `Csm.decode` compute, each of `PARTS` by itself, on inputs of noise."""
    config, weights, device, rows = model.config, model.weights, model.device, len(slots)
    dtype = weights.text_embedding.dtype
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    # Steps of many rows add to x in place, which piles up from call to call and takes no time.
    x, depth_x = noise(rows, config.backbone.hidden_size), noise(2 * rows, config.depth.hidden_size)
    positions = torch.full_like(slots, context - 1)
    places = torch.arange(config.codebooks, device=device)[:, None].expand(-1, rows).flatten()
    twice = torch.cat([slots, slots])
    seed, frame_index = torch.arange(rows, device=device), torch.zeros_like(slots)
    temperature = torch.full((rows,), 0.9, device=device)
    top_k = torch.full((rows,), 50, dtype=torch.int32, device=device)
    codes = [
        torch.randint(1, config.drawable, (rows,), device=device, generator=generator) for _ in range(config.codebooks)
    ]
    drawn_codes = torch.stack(codes, dim=1)
    moving = torch.zeros(2, len(state.position), dtype=torch.int64, device=device)  # the streams' own stand still

    def backbone() -> object:
        return transformer.step(config.backbone, weights.backbone, state.backbone_cache, x, slots, positions)

    def depth() -> object:
        hidden, its_slots = depth_x, twice
        for place in range(1, config.codebooks):
            its_places = places[(place + 1) * rows - len(hidden) : (place + 1) * rows]
            out = transformer.step(config.depth, weights.depth, state.depth_cache, hidden, its_slots, its_places)
            hidden, its_slots = depth_x[:rows], slots
        return out

    def heads() -> object:
        norm_linear(x, weights.backbone.norm, config.backbone.norm_eps, weights.depth_projector)
        for codebook in range(config.codebooks):
            stack, its_weights, tables, head, hidden = (
                (config.depth, weights.depth, weights.depth_heads, codebook - 1, depth_x[:rows])
                if codebook
                else (config.backbone, weights.backbone, weights.backbone_head, 0, x)
            )
            last = next_code(
                hidden,
                its_weights.norm,
                stack.norm_eps,
                tables,
                head,
                drawable=config.drawable,
                seed=seed,
                frame=frame_index,
                codebook=codebook,
                temperature=temperature,
                top_k=top_k,
                table=weights.depth_embedding,
                vocabulary=config.audio_vocabulary,
                scratch=state.scratch,
            )
        return last

    def state_part() -> object:
        begun = begin_frame(
            state.next_input,
            state.position,
            state.frame,
            state.seed,
            state.temperature,
            state.top_k,
            slots,
            config.codebooks,
        )
        drawn = torch.stack(codes, dim=1)
        table, vocabulary = weights.audio_embedding, config.audio_vocabulary
        end_frame(drawn, table, vocabulary, state.next_input, moving[0], moving[1], slots)
        return begun

    def codec() -> object:
        return model.decode(state, drawn_codes, slots)

    return {"backbone": backbone, "depth": depth, "heads": heads, "state": state_part, "codec": codec}


def frame_bytes(model: Csm, state: CsmState, rows: int, context: int) -> dict[str, int]:
    """Bytes that a frame has to read, of each kind of memory."""
    config, weights, codec = model.config, model.weights, model.codec
    heads = (weights.backbone_head[:, : config.drawable], weights.depth_heads[:, : config.drawable])
    cache = weights.text_embedding.element_size() * 2 * config.backbone.layers
    cache *= config.backbone.kv_heads * config.backbone.head_dim * context
    projections = (codec.semantic.output_projection, codec.acoustic.output_projection)
    return {
        "backbone": bytes_of((weights.backbone.layers, weights.backbone.norm)),
        "depth": (config.codebooks - 1) * bytes_of((weights.depth.layers, weights.depth.norm)),
        "heads": bytes_of((*heads, weights.depth_projector)),
        "codec": bytes_of((codec.upsample, codec.decoder_transformer, codec.decoder, projections)),
        "context": rows * cache,
        "codec_window": rows * state.codec.ring.nbytes // state.codec.ring.shape[2],
    }


# --- prompts, allocations ---------------------------------------------------------------------------------------------


def prefill_ms(runtime: Runtime, steps: Steps, positions: int, repeats: int) -> float:
    """Milliseconds that the device takes to read a prompt, in as few passes as it can have; the median."""
    prompt = workload.noise_prompt(runtime._model, positions, seed=2)
    largest = steps.prefill_sizes[-1]
    times = []
    for _ in range(repeats + 1):
        steps.start(0, runtime.sampling, 0, positions)
        seconds = 0.0
        for begin in range(0, positions, largest):
            piece = Piece(0, prompt, begin, min(begin + largest, positions), begin)
            seconds += steps.prefill([piece]).seconds()
        times.append(seconds)
    return statistics.median(times[1:]) * 1e3  # the first may compile and capture


def allocator_counters(device: torch.device) -> dict[str, int] | None:
    """How often the device's allocator was asked, since the process began; None for a CPU, which does not count."""
    if device.type != "cuda":
        return None
    counted = torch.cuda.memory_stats(device)
    return {name: int(counted[key]) for name, key in COUNTERS.items()}


def count_allocations(runtime: Runtime, steps: Steps, rows: int, parsed: argparse.Namespace) -> dict[str, Any]:
    """Replay frames, with streams that end and begin, and count what the device's allocator did meanwhile."""
    loop = Loop(steps, max(parsed.rows), runtime.frame_rate)
    jobs = frame_jobs(runtime, rows, parsed.context, parsed.frames)
    streams = [loop.submit(job) for job in jobs]
    workload.run_until_all_speak(loop, streams, limit_seconds=120)
    before = allocator_counters(runtime.device)
    taken, begin = 0, time.perf_counter()
    while taken < rows * parsed.frames_without_allocation:
        loop.step()
        taken += workload.take_all(loop, streams)
        streams = [loop.submit(stream.job) if stream.is_over else stream for stream in streams]
    seconds = time.perf_counter() - begin
    after = allocator_counters(runtime.device)
    workload.stop_all(loop, streams)
    counted = None if before is None or after is None else {name: after[name] - before[name] for name in after}
    frames = taken // rows
    return {"frames": frames, "rows": rows, "seconds": seconds, "before": before, "after": after, "counted": counted}


def allocation_sentence(allocations: dict[str, Any]) -> str:
    """What the counters say, in words."""
    frames = f"{allocations['frames']} frames of {allocations['rows']} rows"
    counted = allocations["counted"]
    if counted is None:
        return f"{frames}: a CPU has no counters of allocations"
    figures = ", ".join(f"{value} {name}" for name, value in counted.items())
    return f"{frames}: {'ALLOCATED on the device: ' if counted['allocations'] else 'nothing allocated: '}{figures}"
