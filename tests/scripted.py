"""A model that speaks from a script: it keeps the engine's protocol, and fails a test that breaks its rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NoReturn

import torch

from aloud import Runtime
from aloud.models.csm import Sound
from aloud.prompt_block import PromptBlock
from aloud.request import Sampling

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
    """One frame of the script."""

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
    prompt_positions: int
    read: dict[int, int] = field(default_factory=dict)  # text token at each position that was read
    frames: int = 0


@dataclass
class State:
    """Memory of some streams, the last one the scratch slot; only its size is real."""

    positions: int
    slots: list[Slot | None]
    drawn: dict[int, Frame] = field(default_factory=dict)  # of each slot, to be decoded


@dataclass
class ScriptedModel:
    """Says `script[seed]` frame by frame, then ends; a seed that is not in the script talks for ever."""

    script: Mapping[int, Sequence[Frame]] = field(default_factory=dict)
    max_positions: int = 2048
    ticks: list[list[int]] = field(default_factory=list)  # the slots of every call of draw()
    states: list[State] = field(default_factory=list)  # of every call of allocate()
    started: list[Slot] = field(default_factory=list)  # every stream, in order
    copied: list[Slot] = field(default_factory=list)  # of every call of copy_stream()

    device = torch.device("cpu")
    config = CONFIG
    codebooks = CODEBOOKS

    def state_bytes(self, slots: int, positions: int) -> int:
        return slots * positions

    def allocate(self, slots: int, positions: int) -> State:
        assert 1 <= positions <= self.max_positions
        self.states.append(State(positions, [None] * slots))
        return self.states[-1]

    def start(self, state: State, slot: int, sampling: Sampling, seed: int, positions: int) -> None:
        assert 0 <= slot < len(state.slots) - 1, "the scratch slot is nobody's"
        assert 1 <= positions <= state.positions
        state.slots[slot] = stream = Slot(seed, sampling, positions)
        self.started.append(stream)

    def start_sound(self, state: State, slot: int) -> None:
        assert state.slots[slot] is not None, "sound before start"

    def prefill(self, state: State, block: PromptBlock) -> None:
        columns = zip(block.slots.tolist(), block.positions.tolist(), block.text_tokens.tolist(), strict=True)
        for slot, position, token in columns:
            if slot == len(state.slots) - 1:
                continue
            stream = state.slots[slot]
            assert stream is not None, "prefill before start"
            assert position not in stream.read, "a position is read once"
            stream.read[position] = token

    def copy_prefix(self, state: State, slot: int, positions: int) -> torch.Tensor:
        stream = state.slots[slot]
        assert stream is not None
        return torch.tensor([stream.read.get(position, -1) for position in range(positions)])

    def paste_prefix(self, state: State, slot: int, prefix: torch.Tensor, positions: int) -> None:
        stream = state.slots[slot]
        assert stream is not None
        stream.read = dict(enumerate(prefix[:positions].tolist()))

    def copy_stream(self, state: State, slot: int, positions: int) -> tuple[torch.Tensor, ...]:
        stream = state.slots[slot]
        assert stream is not None
        assert positions == stream.prompt_positions + max(0, stream.frames - 1), "not all that has been read"
        self.copied.append(stream)
        return (torch.tensor(len(self.copied) - 1),)

    def paste_stream(self, state: State, slot: int, stream: tuple[torch.Tensor, ...]) -> None:
        state.slots[slot] = self.copied[int(stream[0])]

    def draw(self, state: State, slots: torch.Tensor) -> torch.Tensor:
        self.ticks.append(slots.tolist())
        for slot in slots.tolist():
            state.drawn[slot] = END if slot == len(state.slots) - 1 else self._next(state, slot)
        return torch.stack([state.drawn[slot].codes for slot in slots.tolist()])

    def decode(self, state: State, codes: torch.Tensor, slots: torch.Tensor) -> Sound:
        frames = [state.drawn[slot] for slot in slots.tolist()]
        samples = torch.stack([frame.samples for frame in frames])
        return Sound(samples, samples.square().mean(dim=1), torch.stack([frame.ended for frame in frames]))

    def _next(self, state: State, slot: int) -> Frame:
        stream = state.slots[slot]
        assert stream is not None, "frame before start"
        assert sorted(stream.read) == list(range(stream.prompt_positions)), "frame before the whole prompt was read"
        stream.frames += 1
        # The first frame reads the prompt's last position, every further one a position more.
        assert stream.prompt_positions + stream.frames - 1 <= state.positions, "a frame beyond the memory of a slot"
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
