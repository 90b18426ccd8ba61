"""What the suites that run the engine share: a checkpoint, a loaded runtime, prompts of noise, streams to be driven."""

from __future__ import annotations

import argparse
import contextlib
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from aloud import Guards, Runtime, Segment
from aloud.engine.loop import Loop
from aloud.engine.steps import HostFrame, Launched, Reading, Steps
from aloud.engine.stream import Job, Prefix, Stream
from aloud.errors import RequestError
from aloud.models.csm import Csm
from aloud.prompt_block import Piece
from aloud.request import Prompt, Sampling
from aloud.text.csm import turn_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VOICE_TEXT = "This is how it sounds."
MARGIN_FRAMES = 8
"""Frames that a stream may make beyond those that are timed: to get going, and in flight at the end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every suite that runs a model."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint (default: random weights)")
    parser.add_argument(
        "--size",
        default="csm-1b" if cuda else "small",
        choices=("small", "csm-1b"),
        help="size of the random weights (default: csm-1b on a GPU, small on a CPU)",
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="default: cuda if any")
    parser.add_argument(
        "--dtype",
        default="bfloat16" if cuda else "float32",
        choices=DTYPES,
        help="default: bfloat16 on a GPU, float32 on a CPU",
    )
    parser.add_argument("--context", type=int, default=500, help="positions of context of each stream (default: 500)")
    add_output_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Where a suite's report goes besides the terminal."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON document to a file, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save a plot as PNG")


@contextlib.contextmanager
def checkpoint(model: Path | None, size: str, dtype: str) -> Iterator[Path]:
    """The checkpoint's folder; random weights are written for the time being where no `model` is named."""
    if model is not None:
        yield model
        return
    from aloud.checkpoint.random import write_random

    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), size, seed=0, dtype=dtype)
        yield Path(folder)


def noise_prompt(model: Csm, positions: int, seed: int) -> Prompt:
    """A prompt of random frames, none of them an end of speech."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1, model.config.drawable, (positions, model.config.codebooks), generator=generator)
    return Prompt(torch.full((positions,), -1), codes)


def noise_prefix(model: Csm, positions: int, seed: int) -> Prefix:
    """A prefix whose keys and values are noise: to stand at a position without having read what is before."""
    sizes = model.config.backbone
    generator = torch.Generator(model.device).manual_seed(seed)
    shape = (sizes.layers, 2, sizes.kv_heads, positions, sizes.head_dim)
    cache = torch.randn(shape, device=model.device, generator=generator).to(model.weights.text_embedding.dtype)
    if model.device.type == "cuda":  # steps have streams of their own, which do not wait for this one
        torch.cuda.synchronize(model.device)
    return Prefix(positions, cache)


def noise_job(
    model: Csm, sampling: Sampling, prefix: Prefix, frames: int, seed: int, lead_seconds: float | None = None
) -> Job:
    """A stream of `frames` frames that begins one position behind `prefix`."""
    return Job(
        noise_prompt(model, 1, seed),
        sampling,
        seed,
        frames,
        Guards.off(),
        None,
        prefix=prefix,
        lead_seconds=lead_seconds,
    )


def voice_segment(runtime: Runtime, positions: int, seed: int) -> Segment:
    """A turn, of noise, that takes so many positions of the context. Raises `RequestError` when its text takes more."""
    text = len(turn_text(runtime._tokenizer, 0, VOICE_TEXT))
    frames = positions - text - 1  # behind the frames stands one that ends them
    if frames < 1:
        raise RequestError(f"A voice of {positions} positions has no room for sound behind the {text} of its text.")
    size = runtime.config.codec.frame_size
    noise = np.random.default_rng(seed).standard_normal(frames * size)
    return Segment(VOICE_TEXT, (0.1 * noise).astype(np.float32))


class TimedSteps:
    """Steps that count how long the host was in them: launching, and waiting for frames to read."""

    def __init__(self, steps: Steps) -> None:
        """Of other steps."""
        self._steps = steps
        self.batch_sizes = steps.batch_sizes
        self.prefill_sizes = steps.prefill_sizes
        self.prefill_together = steps.prefill_together
        self.ahead = steps.ahead
        self.launch_seconds = 0.0
        self.read_seconds = 0.0

    def start(self, slot: int, sampling: Sampling, seed: int, positions: int) -> None:
        """See `Steps.start`."""
        self._steps.start(slot, sampling, seed, positions)

    def prefill(self, pieces: Sequence[Piece]) -> Reading:
        """See `Steps.prefill`."""
        return self._steps.prefill(pieces)

    def copy_prefix(self, slot: int, positions: int) -> torch.Tensor:
        """See `Steps.copy_prefix`."""
        return self._steps.copy_prefix(slot, positions)

    def paste_prefix(self, slot: int, prefix: torch.Tensor, positions: int) -> None:
        """See `Steps.paste_prefix`."""
        self._steps.paste_prefix(slot, prefix, positions)

    def copy_stream(self, slot: int, positions: int) -> tuple[torch.Tensor, ...]:
        """See `Steps.copy_stream`."""
        return self._steps.copy_stream(slot, positions)

    def paste_stream(self, slot: int, stream: tuple[torch.Tensor, ...]) -> None:
        """See `Steps.paste_stream`."""
        self._steps.paste_stream(slot, stream)

    def launch(self, slots: np.ndarray) -> Launched:
        """See `Steps.launch`."""
        begin = time.perf_counter()
        launched = self._steps.launch(slots)
        self.launch_seconds += time.perf_counter() - begin
        return _TimedFrame(self, launched)


@dataclass(frozen=True)
class _TimedFrame:
    """A frame on its way, the wait for which is counted."""

    steps: TimedSteps
    launched: Launched

    def read(self) -> HostFrame:
        begin = time.perf_counter()
        frame = self.launched.read()
        self.steps.read_seconds += time.perf_counter() - begin
        return frame


def release() -> None:
    """Free what is no longer referred to, the GPU's memory included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def take_all(loop: Loop, streams: Sequence[Stream]) -> int:
    """Take every frame that is there, as consumers do that never lag -> how many. Raises a stream's error."""
    taken = 0
    for stream in streams:
        while loop.take(stream) is not None:
            taken += 1
        if stream.error is not None:
            raise stream.error
    return taken


def run_until_all_speak(loop: Loop, streams: Sequence[Stream], *, limit_seconds: float) -> int:
    """Drive the loop until each stream has given a frame -> how many were taken. Raises `TimeoutError`."""
    end = time.perf_counter() + limit_seconds
    silent, taken = list(streams), 0
    while silent:
        pause = loop.step()
        speaking = [stream for stream in silent if stream.frames or stream.is_over]
        taken += take_all(loop, streams)
        silent = [stream for stream in silent if stream not in speaking]
        if silent and pause != 0.0:
            time.sleep(0.001 if pause is None else min(pause, 0.001))
        if time.perf_counter() > end:
            raise TimeoutError(f"{len(silent)} of {len(streams)} streams gave no frame in {limit_seconds:g} s.")
    return taken


def stop_all(loop: Loop, streams: Sequence[Stream]) -> None:
    """Cancel streams, and read what is still in flight."""
    for stream in streams:
        loop.cancel(stream)
    while loop.step() == 0.0:
        pass
