"""transformers' CSM, eager and compiled, and Aloud on the same weights: the same text, the same number of frames.

The peers are what transformers' documentation shows for CSM (docs/source/en/model_doc/csm.md, read as of 5.0.0rc1 and
of commit 01c03197, where it says the same): "Usage Tips" for the eager one, `generate(..., output_audio=True)`, and
"Making The Model Go Brrr" for the compiled one: `max_length = 250`, `max_new_tokens = None` and
`cache_implementation = "static"` for the model and its depth decoder, which makes `generate` compile both by itself
with mode "reduce-overhead"; greedy, both temperatures 1.0. It compiles on GPUs only; on a CPU the same is asked for by
name. Two things are added, and neither costs a peer time: a stopping criterion, so that a speech has as many frames as
asked for while the caches keep their size, and codes that the codec has no entry for, which random weights do draw, are
replaced by its last entry before they are decoded.

That page promises full graphs. transformers 4.57.6 makes two, one a decoder; in 5.17 and 5.23 torch.compile has to
break the depth decoder's, at a `torch.arange` over a length that is a tensor. The report says how often graphs broke: a
ratio to such a version is not one to what transformers can do.

Before anything is timed, all speak greedily in float32 on the CPU; if their codes differ, there is no figure. A peer is
loaded, warmed up, timed and freed before the next. Timed is a call from text (Aloud) or token ids (transformers) to
PCM on the host. Milliseconds a frame are the median over the repeats of (time of N frames - time of one frame) /
(N - 1), so that prefill and whatever a call costs once drop out; first audio is the median time of a speech of one
frame. transformers runs the codec in the model's dtype, Aloud always in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
import torch

from aloud import Request, Runtime

from .measure import circumstances
from .report import Column, plot_bars, reported, table

EAGER, COMPILED, OURS = "transformers eager", "transformers compiled", "aloud"
TEXT = "Each of them says the same words, for the same number of frames."
GATE_FRAMES = 4
GATE_ROWS = 2
"""At most; as many as there are rows to be timed, if that is fewer."""
STATIC_POSITIONS = 250
"""Positions of transformers' static cache, as its documentation has it; more where the frames asked for need more."""
WARM_UPS = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

COLUMNS = (
    Column("peer"),
    Column("rows"),
    Column("frame_ms", "ms", ".3f"),
    Column("ratio", "x aloud", ".2f"),
    Column("first_audio_ms", "ms", ".2f"),
    Column("real_time", "x", ".2f"),
    Column("tokens_per_second", "1/s", ".0f"),
    Column("memory_gb", "GB", ".2f"),
    Column("load_seconds", "s", ".2f"),
    Column("warm_up_seconds", "s", ".2f"),
    Column("first_frame_equal", "of eager", ".0%"),
)


@dataclass(frozen=True)
class Spoken:
    """A speech of each row: codes int64 [frames, codebooks], and samples [samples] on the host."""

    codes: list[torch.Tensor]
    samples: list[np.ndarray]


class Peer(Protocol):
    """Something loaded that speaks."""

    sample_rate: int  # Hz
    frame_samples: int  # of one row

    def speak(self, rows: int, frames: int) -> Spoken:
        """Say `TEXT` in every row, greedily, for so many frames."""


class Aloud:
    """Aloud through its public face."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, *, rows: int) -> None:
        """Load from a checkpoint's folder, with memory for so many rows."""
        self.runtime = Runtime.load(folder, device=device, dtype=dtype, max_streams=rows)
        self.sample_rate = self.runtime.sample_rate
        self.frame_samples = round(self.sample_rate / self.runtime.frame_rate)

    def speak(self, rows: int, frames: int) -> Spoken:
        """Say `TEXT` in every row."""
        seconds = frames / self.runtime.frame_rate
        request = Request(TEXT, temperature=0, depth_temperature=0, seed=0, max_seconds=seconds)
        speeches = self.runtime.speak_batch([request] * rows)
        return Spoken(
            codes=[torch.as_tensor(speech.codes) for speech in speeches],
            samples=[speech.samples for speech in speeches],
        )


class Transformers:
    """transformers' model, eager; `use_static_caches` makes it the compiled one."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        """Load from a checkpoint's folder."""
        from transformers import CsmForConditionalGeneration

        self.device = device
        self.model = CsmForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.model.generation_config.max_length = STATIC_POSITIONS
        self.model.generation_config.max_new_tokens = None
        codec = self.model.config.codec_config
        self.sample_rate = int(codec.sampling_rate)
        self.frame_samples = round(self.sample_rate / codec.frame_rate)
        self.entries = int(codec.codebook_size)
        self.suppressed: list[int] = []
        self.compiles = False

        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        text = f"<|begin_of_text|>[0]{TEXT}<|end_of_text|>"
        self.input_ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids], device=device)

        decode = self.model.codec_model.decode
        last_entry = self.entries - 1
        self.model.codec_model.decode = lambda codes: decode(codes.clamp(max=last_entry))

    def suppress_codes_without_entry(self) -> None:
        """Draw no code that the codec has no entry for, as Aloud never does; costs time, so it is for the gate only."""
        self.suppressed = list(range(self.entries, self.model.config.vocab_size))

    def use_static_caches(self, frames: int, *, compile_on_cpu: bool) -> None:
        """What the documentation sets so that `generate` compiles, with room for so many frames."""
        from transformers import CompileConfig

        self.compiles = self.device.type != "cpu" or compile_on_cpu
        positions = max(STATIC_POSITIONS, self.input_ids.shape[1] + frames)
        self.model.generation_config.max_length = positions
        for part in (self.model, self.model.depth_decoder):
            part.generation_config.cache_implementation = "static"
            if compile_on_cpu:
                part.generation_config.compile_config = CompileConfig()
                part.generation_config.compile_config._compile_all_devices = True

    def is_compiled(self) -> bool:
        """Whether `generate` did compile both decoders."""
        return all(hasattr(part, "_compiled_call") for part in (self.model, self.model.depth_decoder))

    @torch.no_grad()
    def speak(self, rows: int, frames: int) -> Spoken:
        """Say `TEXT` in every row."""
        from transformers.generation import MaxLengthCriteria, StoppingCriteriaList

        input_ids = self.input_ids.expand(rows, -1).contiguous()
        given = self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(input_ids.shape[1] + frames)]),
            output_audio=True,
            return_dict_in_generate=True,
            do_sample=False,
            depth_decoder_do_sample=False,
            temperature=1.0,
            depth_decoder_temperature=1.0,
            suppress_tokens=self.suppressed or None,
            depth_decoder_suppress_tokens=self.suppressed or None,
        )
        return Spoken(
            codes=list(given.sequences.cpu()), samples=[samples.float().cpu().numpy() for samples in given.audio]
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own arguments."""
    parser.add_argument("--model", type=Path, help="a checkpoint folder in transformers' layout (default: random)")
    parser.add_argument(
        "--size", default="csm-1b", choices=("small", "csm-1b"), help="size of the random weights (default: csm-1b)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="default: bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="batch sizes (default: 1)")
    parser.add_argument("--frames", type=int, default=50, help="frames of a speech, 2 or more (default: 50)")
    parser.add_argument("--repeats", type=int, default=5, help="speeches of which the median is taken (default: 5)")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled peer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON document to a file, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save a plot as PNG")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Compare, measure, print a table; the last line is one JSON document -> 1 if codes differ or a peer fails."""
    if importlib.util.find_spec("transformers") is None:
        print("The suite peers needs transformers: pip install 'aloud[dev]'.", file=sys.stderr)
        return 1
    if parsed.frames < 2 or parsed.repeats < 1 or min(parsed.rows) < 1:
        print("The suite peers needs 2 frames or more, 1 repeat or more, and 1 row or more.", file=sys.stderr)
        return 1
    if parsed.model is not None and not (parsed.model / "config.json").is_file():
        print(f"{parsed.model} is no checkpoint's folder: it has no config.json.", file=sys.stderr)
        return 1
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        folder = parsed.model
        if folder is None:
            from aloud.checkpoint.random import write_random

            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_random(folder, parsed.size, seed=0, dtype=parsed.dtype)
        return compare_and_measure(folder, parsed)


def compare_and_measure(folder: Path, parsed: argparse.Namespace) -> int:
    """The suite on a checkpoint's folder."""
    import transformers

    about = circumstances(torch.device(parsed.device)) | {"transformers": transformers.__version__}
    document: dict[str, Any] = {
        "suite": "peers",
        "about": about,
        "model": parsed.size if parsed.model is None else str(parsed.model),
        "dtype": parsed.dtype,
        "frames": parsed.frames,
        "repeats": parsed.repeats,
        "gate": None,
        "results": [],
        "ratios": [],
    }
    print(f"{about['device']}, torch {about['torch']}, transformers {about['transformers']}, commit {about['commit']}")
    with reported(document, parsed.json):
        return gate_and_measure(folder, parsed, document)


def gate_and_measure(folder: Path, parsed: argparse.Namespace, document: dict[str, Any]) -> int:
    """Add to the document how codes compare and, where they are equal, what was measured -> the exit status."""
    device, dtype = torch.device(parsed.device), DTYPES[parsed.dtype]
    rows = min(GATE_ROWS, max(parsed.rows))
    difference, sample_difference = gate(folder, rows)
    document["gate"] = {
        "frames": GATE_FRAMES,
        "rows": rows,
        "difference": difference,
        "sample_difference": sample_difference,
    }
    if difference is not None:
        print(f"float32 on the CPU, greedy: {difference}; so nothing is timed", file=sys.stderr)
        return 1
    print(
        f"float32 on the CPU, greedy, {GATE_FRAMES} frames, {rows} rows: all codes equal, "
        f"samples within {sample_difference:.1e}"
    )

    def compiled() -> Transformers:
        peer = Transformers(folder, device, dtype)
        peer.use_static_caches(parsed.frames, compile_on_cpu=device.type == "cpu")
        return peer

    loaders: dict[str, Callable[[], Peer]] = {EAGER: lambda: Transformers(folder, device, dtype)}
    if not parsed.no_compile:
        loaders[COMPILED] = compiled
    loaders[OURS] = lambda: Aloud(folder, device, dtype, rows=max(parsed.rows))
    results: list[dict[str, Any]] = document["results"]
    title = f"{parsed.dtype}, {parsed.frames} frames, medians of {parsed.repeats}; ratio: frame ms over aloud's"
    with table(COLUMNS, results, title):
        for name, load in loaders.items():
            print(f"measuring {name}", file=sys.stderr)
            for result in measure(name, load, device, parsed.rows, parsed.frames, parsed.repeats):
                results.append(result)
                document["ratios"] = add_ratios(results)
            release()
    failed = [result for result in results if result["error"] is not None]
    for result in failed:
        print(f"{result['peer']}, {result['rows']} rows: {result['error']}", file=sys.stderr)
    for result in results:
        if result.get("graph_breaks"):
            print(f"{result['peer']}, {result['rows']} rows: torch.compile broke graphs {result['graph_breaks']} times")
    if parsed.plot is not None:
        names, groups = list(loaders), sorted(set(parsed.rows))
        bars = {name: [figure(results, name, rows, "frame_ms") for rows in groups] for name in names}
        title = f"CSM, {document['model']}, {parsed.dtype}, {document['about']['device']}"
        plot_bars(parsed.plot, title, "rows", "ms a frame", [str(rows) for rows in groups], bars)
    return 1 if failed else 0


def gate(folder: Path, rows: int) -> tuple[str | None, float]:
    """Greedy codes of all peers in float32 on the CPU -> what differs first, if any, and how far samples are apart."""
    cpu = torch.device("cpu")
    peer = Transformers(folder, cpu, torch.float32)
    peer.suppress_codes_without_entry()
    expected = peer.speak(rows, GATE_FRAMES)
    peer.use_static_caches(GATE_FRAMES, compile_on_cpu=False)
    given = {"transformers with static caches": peer.speak(rows, GATE_FRAMES)}
    del peer
    release()
    given[OURS] = Aloud(folder, cpu, torch.float32, rows=rows).speak(rows, GATE_FRAMES)
    release()
    differences = [first_difference(name, spoken, expected) for name, spoken in given.items()]
    found = next((difference for difference in differences if difference is not None), None)
    apart = 0.0
    for spoken in given.values():
        for ours, theirs in zip(spoken.samples, expected.samples, strict=True):
            length = min(len(ours), len(theirs))
            apart = max(apart, float(np.abs(ours[:length] - theirs[:length]).max(initial=0.0)))
    return found, apart


def first_difference(name: str, spoken: Spoken, expected: Spoken) -> str | None:
    """Where codes, or the number of samples, first differ from those of transformers eager; None if nowhere."""
    for row, (codes, theirs) in enumerate(zip(spoken.codes, expected.codes, strict=True)):
        if codes.shape != theirs.shape:
            return f"row {row} of {name} has codes {list(codes.shape)}, transformers eager {list(theirs.shape)}"
        places = (codes != theirs).nonzero().tolist()
        if places:
            frame, codebook = places[0]
            return (
                f"row {row} of {name} differs from transformers eager first in frame {frame}, codebook {codebook}: "
                f"{int(codes[frame, codebook])} for {int(theirs[frame, codebook])}"
            )
        samples, their_samples = len(spoken.samples[row]), len(expected.samples[row])
        if samples != their_samples:
            return f"row {row} of {name} has {samples} samples, transformers eager {their_samples}"
    return None


def measure(
    name: str, load: Callable[[], Peer], device: torch.device, row_counts: Sequence[int], frames: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Load a peer and time it at each number of rows; whatever fails is an "error" in its result, not the end."""
    try:
        start = clock(device)
        peer = load()
        load_seconds = clock(device) - start
    except Exception as error:  # others' software may fail in any way: the rest is still worth measuring
        yield from [{"peer": name, "rows": rows, "error": sentence(error)} for rows in row_counts]
        return
    for rows in row_counts:
        result: dict[str, Any] = {"peer": name, "rows": rows, "load_seconds": load_seconds, "error": None}
        # Another batch size is compiled anew, for itself: not as one graph for several shapes.
        release()
        try:
            result |= measure_rows(peer, rows, device, frames, repeats)
        except Exception as error:  # as above: the other numbers of rows are still worth measuring
            result["error"] = sentence(error)
        yield result


def measure_rows(peer: Peer, rows: int, device: torch.device, frames: int, repeats: int) -> dict[str, Any]:
    """Figures of a peer at one number of rows."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    breaks_before, start = graph_breaks(), clock(device)
    for _ in range(WARM_UPS):
        spoken = peer.speak(rows, frames)
        peer.speak(rows, 1)
    broken, warm_up_seconds = graph_breaks() - breaks_before, clock(device) - start

    all_seconds: list[float] = []
    first_seconds: list[float] = []
    for _ in range(repeats):
        for asked, times in ((1, first_seconds), (frames, all_seconds)):
            seconds, spoken = timed(peer, rows, asked, device)
            times.append(seconds)
            # A speech that ended early is as long as its sound, whatever follows in its codes.
            shortest = min(map(len, spoken.samples))
            if shortest != asked * peer.frame_samples:
                spoken_frames = shortest / peer.frame_samples
                return {"error": f"spoke {spoken_frames:g} of {asked} frames, so its figures would not compare"}
    if isinstance(peer, Transformers) and peer.compiles and not peer.is_compiled():
        return {"error": "transformers did not compile the model"}
    differences = [all_ - first for all_, first in zip(all_seconds, first_seconds, strict=True)]
    frame_seconds = statistics.median(differences) / (frames - 1)
    codebooks = spoken.codes[0].shape[1]
    return {
        "frame_ms": frame_seconds * 1e3,
        "first_audio_ms": statistics.median(first_seconds) * 1e3,
        "speech_ms": statistics.median(all_seconds) * 1e3,
        # Seconds of sound a second, all rows together.
        "real_time": rows * peer.frame_samples / peer.sample_rate / frame_seconds,
        "tokens_per_second": rows * codebooks / frame_seconds,
        "memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
        # What is compiled or captured when it is first needed is in here.
        "warm_up_seconds": warm_up_seconds,
        "first_frame": spoken.codes[0][0].tolist(),
        "graph_breaks": broken,
    }


def timed(peer: Peer, rows: int, frames: int, device: torch.device) -> tuple[float, Spoken]:
    """Seconds of one call, and what it gave."""
    start = clock(device)
    spoken = peer.speak(rows, frames)
    return clock(device) - start, spoken


def clock(device: torch.device) -> float:
    """Seconds, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def graph_breaks() -> int:
    """Places at which torch.compile could not go on with a graph, since the process began."""
    counted: int = sum(torch._dynamo.utils.counters["graph_break"].values())
    return counted


def release() -> None:
    """Free what is no longer referred to, compiled code and the GPU's memory included."""
    gc.collect()
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sentence(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def figure(results: Sequence[dict[str, Any]], peer: str, rows: int, key: str) -> Any:
    """A value of a peer's result at a number of rows; None where there is none."""
    return next((r.get(key) for r in results if r["peer"] == peer and r["rows"] == rows), None)


def add_ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each result how it stands to Aloud's and to eager's at its rows -> the ratios alone."""
    ratios = []
    for result in results:
        peer, rows = result["peer"], result["rows"]
        first_frame, eager_frame = result.get("first_frame"), figure(results, EAGER, rows, "first_frame")
        if first_frame is not None and eager_frame is not None:
            equal = [ours == theirs for ours, theirs in zip(first_frame, eager_frame, strict=True)]
            result["first_frame_equal"] = sum(equal) / len(equal)
        milliseconds, ours = result.get("frame_ms"), figure(results, OURS, rows, "frame_ms")
        first_audio, our_first_audio = result.get("first_audio_ms"), figure(results, OURS, rows, "first_audio_ms")
        if peer == OURS or milliseconds is None or ours is None:
            continue
        result["ratio"] = milliseconds / ours
        first_audio_ratio = first_audio / our_first_audio
        ratios.append({"peer": peer, "rows": rows, "frame": result["ratio"], "first_audio": first_audio_ratio})
    return ratios


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings and bars out of the report."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
