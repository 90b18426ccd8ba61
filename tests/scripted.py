"""A model that speaks from a script: it keeps the engine's protocol, and fails a test that breaks its rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NoReturn

import torch

from aloud import Runtime
from aloud.request import Prompt, Sampling

CODEBOOKS = 3
FRAME_SIZE = 8  # samples; at 100 Hz that is 80 ms, as the real codec's frames are
FRAME_RATE = 12.5
CONFIG = SimpleNamespace(
    codec=SimpleNamespace(frame_rate=FRAME_RATE, frame_size=FRAME_SIZE, sample_rate=100),
    codebooks=CODEBOOKS,
    end_token=0,
)


@dataclass(frozen=True)
class Frame:
    """One frame of the script, and the protocol's own when rows are stacked."""

    codes: torch.Tensor
    samples: torch.Tensor
    ended: torch.Tensor


def said(code: int, level: float = 0.5) -> Frame:
    """A frame of one code in every codebook and of samples that alternate between +level and -level."""
    samples = torch.full((FRAME_SIZE,), level)
    samples[1::2] *= -1
    return Frame(torch.full((CODEBOOKS,), code), samples, torch.tensor(False))


END = Frame(torch.zeros(CODEBOOKS, dtype=torch.int64), torch.zeros(FRAME_SIZE), torch.tensor(True))
NOT_FINITE = said(-1)


@dataclass
class Slot:
    """What one stream has been given so far."""

    seed: int
    sampling: Sampling
    prompt: Prompt | None = None
    frames: int = 0


@dataclass
class State:
    """Memory of some streams; only its size is real."""

    positions: int
    slots: list[Slot | None]


@dataclass
class ScriptedModel:
    """Says `script[seed]` frame by frame, then ends; a seed that is not in the script talks for ever."""

    script: Mapping[int, Sequence[Frame]] = field(default_factory=dict)
    max_positions: int = 2048
    ticks: list[list[int]] = field(default_factory=list)  # the slots of every call of frame()
    states: list[State] = field(default_factory=list)  # of every call of allocate()

    device = torch.device("cpu")
    config = CONFIG

    def allocate(self, slots: int, positions: int) -> State:
        assert 1 <= positions <= self.max_positions
        self.states.append(State(positions, [None] * slots))
        return self.states[-1]

    def start(self, state: State, slot: int, sampling: Sampling, seed: int) -> None:
        state.slots[slot] = Slot(seed, sampling)

    def prefill(self, state: State, slot: int, prompt: Prompt) -> None:
        stream = state.slots[slot]
        assert stream is not None, "prefill before start"
        assert 1 <= len(prompt) <= state.positions
        stream.prompt = prompt

    def frame(self, state: State, slots: torch.Tensor) -> Frame:
        self.ticks.append(slots.tolist())
        frames = [self._next(state, slot) for slot in slots.tolist()]
        parts = ("codes", "samples", "ended")
        return Frame(*(torch.stack([getattr(frame, part) for frame in frames]) for part in parts))

    def _next(self, state: State, slot: int) -> Frame:
        stream = state.slots[slot]
        assert stream is not None, "frame before start"
        assert stream.prompt is not None, "frame before prefill"
        stream.frames += 1
        # The first frame reads the prompt's last position, every further one a position more.
        assert len(stream.prompt) + stream.frames - 1 <= state.positions, "a frame beyond the memory asked for"
        script = self.script.get(stream.seed)
        if script is None:
            return said(1 + (stream.frames - 1) % 99)
        return script[stream.frames - 1] if stream.frames <= len(script) else END


class UntouchedModel:
    """A model for requests that must be refused before any work: it has the real codec's rates, and fails when run."""

    device = torch.device("cpu")
    config = SimpleNamespace(
        codec=SimpleNamespace(frame_rate=FRAME_RATE, frame_size=1920, sample_rate=24_000),
        codebooks=CODEBOOKS,
        end_token=0,
    )

    def __init__(self, max_positions: int = 60) -> None:
        self.max_positions = max_positions

    def __getattr__(self, name: str) -> NoReturn:
        raise AssertionError(f"the model's {name} was used")


class ByteTokenizer:
    """A token for every byte, and the two around a text."""

    begin, end = 256, 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def runtime_of(model: object, sampling: Sampling | None = None) -> Runtime:
    """A runtime that runs `model`; a prompt without context has as many positions as `prompt_positions` says."""
    return Runtime(model, ByteTokenizer(), sampling or Sampling(), "scripted")  # type: ignore[arg-type]


def prompt_positions(text: str, speaker: int = 0) -> int:
    """Positions that a turn's text takes with `ByteTokenizer`: its bytes, the speaker's mark and the tokens around."""
    return len(f"[{speaker}]{text}".encode()) + 2
