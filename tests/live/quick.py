"""Steps of a model that costs microseconds: what it says depends on all that its slot was given: a mix-up shows.

A slot reads tokens, prompt and own frames alike, into one number; a frame's codes are drawn from that number, the seed
and the frame's index. Nothing depends on the slot, on its neighbours or on the time. Calls that the engine must never
make are written down in `QuickSteps.wrong`, because an error that is raised here is only one more failing step to it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from aloud import Audio, Runtime
from aloud.engine.loop import Loop
from aloud.engine.steps import HostFrame
from aloud.engine.stream import Job, Prefix
from aloud.prompt_block import Piece
from aloud.request import Guards, Prompt, Sampling
from scripted import CODEBOOKS, FRAME_RATE, FRAME_SIZE, ByteTokenizer, ScriptedModel

PRIME = 2**61 - 1
LIMIT_SECONDS = 20.0
"""How long a caller may wait before it is said to hang."""
MOST_FRAMES = 9
"""Speech ends by itself after 1 to so many frames."""


def mixed(digest: int, *numbers: int) -> int:
    """One number of several, each of which changes it."""
    for number in numbers:
        digest = (digest * 1_000_003 + number + 7) % PRIME
    return digest


@dataclass
class Slot:
    """A stream's memory: what it has read, token by token, and what it was told."""

    seed: int
    temperature: float
    positions: int  # of the prompt
    read: list[int] = field(default_factory=list)
    frames: int = 0
    flying: int = 0  # frames that were launched and not read
    length: int = 0  # frames, once the first is drawn
    last: int = 0  # the frame to be read by the next step
    digest: int = 1  # of all that was read

    def take(self, tokens: list[int]) -> None:
        self.read += tokens
        self.digest = mixed(self.digest, *tokens)


class Fault:
    """Raises, or spoils, at the n-th call of one step; 0 is the first, None for never."""

    def __init__(self, step: str = "", call: int | None = None, error: type[Exception] | None = RuntimeError) -> None:
        """error: None spoils the first row of a launch: its codes are -1."""
        self.step, self.call, self.error = step, call, error
        self.calls: Counter[str] = Counter()
        self.slots: list[int] = []  # that were in the step where it happened
        self.happened = 0

    def at(self, step: str, slots: Sequence[int]) -> bool:
        """Count a step -> whether to spoil it."""
        count = self.calls[step]
        self.calls[step] += 1
        if step != self.step or count != self.call:
            return False
        self.happened += 1
        self.slots = list(slots)
        if self.error is not None:
            raise self.error(f"injected into {step} {count}")
        return True


@dataclass(frozen=True)
class Timed:
    """A pass that was over at once."""

    before: Callable[[], object] = lambda: None

    def seconds(self) -> float:
        self.before()
        return 1e-4


@dataclass(frozen=True)
class Flying:
    """A frame on its way."""

    frame: HostFrame
    before: Callable[[], object]

    def read(self) -> HostFrame:
        self.before()
        return self.frame


class QuickSteps:
    """See `aloud.engine.steps.Steps`.

    before_launch: called by every launch, so that a test can make one wait. length_of: frames of speech, of a number
        that depends on all that was read.
    """

    def __init__(
        self,
        slots: int,
        *,
        ahead: int = 0,
        prefill_together: bool = False,
        prefill_size: int = 16,
        most_rows: int | None = None,
        codebooks: int = CODEBOOKS,
    ) -> None:
        self.batch_sizes = tuple(range(1, (most_rows or slots) + 1))
        self.prefill_sizes = (prefill_size,)
        self.prefill_together = prefill_together
        self.ahead = ahead
        self.fault = Fault()
        self.before_launch: Callable[[], object] = lambda: None
        self.length_of: Callable[[int], int] = lambda digest: 1 + digest % MOST_FRAMES
        self.wrong: list[str] = []
        self.launches = 0
        self.launched_rows: Counter[int] = Counter()  # of each seed
        self._slots: list[Slot | None] = [None] * slots
        self._copies: list[Slot] = []  # of each stream that was suspended
        self._codebooks = codebooks

    def start(self, slot: int, sampling: Sampling, seed: int, positions: int) -> None:
        self.fault.at("start", [slot])
        self._slots[slot] = Slot(seed, sampling.temperature, positions)

    def prefill(self, pieces: Sequence[Piece]) -> Timed:
        slots = [piece.slot for piece in pieces]
        self._check(sum(piece.stop - piece.start for piece in pieces) <= self.prefill_sizes[-1], "a pass too large")
        self._check(self.prefill_together or len(pieces) == 1, "prompts read together")
        self.fault.at("prefill", slots)
        for piece in pieces:
            stream = self._stream(piece.slot)
            self._check(piece.position == len(stream.read), "positions read out of order")
            part = piece.prompt[slice(piece.start, piece.stop)]
            stream.take((part.text_tokens * 31 + part.codes.sum(dim=1)).tolist())
        return Timed(lambda: self.fault.at("seconds", slots))

    def copy_prefix(self, slot: int, positions: int) -> torch.Tensor:
        self.fault.at("copy_prefix", [slot])
        stream = self._stream(slot)
        self._check(positions <= len(stream.read), "a copy of what has not been read")
        return torch.tensor(stream.read[:positions])

    def paste_prefix(self, slot: int, prefix: torch.Tensor, positions: int) -> None:
        self.fault.at("paste_prefix", [slot])
        stream = self._stream(slot)
        self._check(not stream.read, "a prefix pasted over what was read")
        stream.take(prefix[:positions].tolist())

    def copy_stream(self, slot: int, positions: int) -> tuple[torch.Tensor, ...]:
        self.fault.at("copy_stream", [slot])
        stream = self._stream(slot)
        self._check(stream.flying == 0, "a copy of a stream that has a frame in flight")
        self._check(positions == len(stream.read), "a copy of more or less than what was read")
        self._slots[slot] = None
        self._copies.append(stream)
        return (torch.tensor(len(self._copies) - 1),)

    def paste_stream(self, slot: int, stream: tuple[torch.Tensor, ...]) -> None:
        self.fault.at("paste_stream", [slot])
        copied = self._copies[int(stream[0])]
        self._slots[slot] = replace(copied, read=list(copied.read))

    def launch(self, slots: np.ndarray) -> Flying:
        self.before_launch()
        self.launches += 1
        streams = [self._stream(slot) for slot in slots.tolist()]
        self._check(0 < len(set(slots.tolist())) == len(slots) <= self.batch_sizes[-1], "rows that cannot be")
        spoilt = self.fault.at("launch", slots.tolist())
        codes = np.stack([self._next(stream) for stream in streams])
        ended = np.array([stream.frames > stream.length for stream in streams])
        codes[ended] = 0
        if spoilt:
            codes[0] = -1
        samples = np.repeat(codes[:, :1], FRAME_SIZE, axis=1).astype(np.float32) / 2048
        self.launched_rows.update(stream.seed for stream in streams)
        frame = HostFrame(codes, samples, np.square(samples).mean(axis=1), ended, 1e-4)
        for stream in streams:
            stream.flying += 1

        def read() -> None:
            for stream in streams:
                stream.flying -= 1
            self.fault.at("read", slots.tolist())

        return Flying(frame, read)

    def _next(self, stream: Slot) -> np.ndarray:
        """The codes int64 [codebooks] of the next frame, or whatever behind the end."""
        self._check(len(stream.read) >= stream.positions, "a frame before the whole prompt was read")
        if stream.frames:
            stream.take([stream.last])
        digest = mixed(stream.digest, stream.seed, round(stream.temperature * 1000))
        if not stream.frames:
            stream.length = self.length_of(digest)
        stream.frames += 1
        codes = np.array([1 + mixed(digest, 7919 * book**2) % 2000 for book in range(self._codebooks)])
        # As a turn of the conversation it is read as the engine writes it: token -1, and the sum of the codes.
        stream.last = int(codes.sum()) - 31
        return codes

    def _stream(self, slot: int) -> Slot:
        stream = self._slots[slot]
        if stream is None:
            self.wrong.append("a slot without a stream")
            raise AssertionError(self.wrong[-1])
        return stream

    def _check(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.wrong.append(otherwise)


def quick_runtime(steps: QuickSteps, slots: int, *, max_positions: int = 2048) -> Runtime:
    """A runtime over such steps."""
    model = ScriptedModel(max_positions=max_positions)
    runtime = Runtime(model, ByteTokenizer(), Sampling(), "quick")  # type: ignore[arg-type]
    runtime._parts = Loop(steps, slots, FRAME_RATE), steps  # type: ignore[assignment]
    return runtime


def quick_job(
    seed: int,
    *,
    positions: int = 9,
    max_frames: int = 20,
    lead_seconds: float | None = None,
    prefix: Prefix | None = None,
    keeps_cache: bool = False,
) -> Job:
    """A job whose prompt depends on the seed."""
    tokens = (torch.arange(positions) * (seed + 3)) % 251
    prompt = Prompt(tokens, torch.zeros(positions, CODEBOOKS, dtype=torch.int64))
    return Job(
        prompt,
        Sampling(),
        seed,
        max_frames,
        Guards.off(),
        text_limit_frames=None,
        prefix=prefix,
        lead_seconds=lead_seconds,
        keeps_cache=keeps_cache,
    )


def is_empty(loop: Loop) -> bool:
    """Whether nothing of any stream is left in a loop."""
    statistics = loop.scheduler.statistics()
    streams = statistics.running_realtime + statistics.running_full + statistics.held
    return loop.is_idle and loop.used_slots == 0 and loop.waiting == 0 and streams == 0


def until(condition: Callable[[], bool], limit_seconds: float = 10.0) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + limit_seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.0005)


class Held:
    """Steps whose launches wait for as long as it is closed."""

    def __init__(self, slots: int = 4, **given: Any) -> None:
        self.steps = QuickSteps(slots, **given)
        self.open = threading.Event()
        self.open.set()
        self.steps.before_launch = lambda: self.open.wait(LIMIT_SECONDS)
        self.runtime = quick_runtime(self.steps, slots)
        self.steps_alone = QuickSteps(1)
        self.alone = quick_runtime(self.steps_alone, 1)

    def talk_for(self, frames: int) -> None:
        """Each piece of text, instead of a few frames."""
        self.steps.length_of = self.steps_alone.length_of = lambda _: frames

    def expected(self, text: str, seed: int) -> np.ndarray:
        """The codes of a text of one piece, from a runtime without an engine."""
        codes = self.alone.speak(text, seed=seed).codes
        assert codes is not None
        return codes


def codes_of(chunks: list[Audio]) -> np.ndarray:
    return np.concatenate([chunk.codes for chunk in chunks if chunk.codes is not None])


def run(work: Any) -> Any:
    """In an event loop; what takes too long hangs."""

    async def limited() -> Any:
        return await asyncio.wait_for(work, LIMIT_SECONDS)

    return asyncio.run(limited())
