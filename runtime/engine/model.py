"""What the engine asks of a family of models; adding a family leaves this folder as it is."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import torch

from aloud.request import Prompt, Sampling

State = TypeVar("State")


class FrameLike(Protocol):
    """One step's result for each row."""

    @property
    def codes(self) -> torch.Tensor:
        """int64 [rows, codebooks]; -1 where nothing could be drawn."""
        ...

    @property
    def samples(self) -> torch.Tensor:
        """float32 [rows, frame_size]."""
        ...

    @property
    def ended(self) -> torch.Tensor:
        """bool [rows]: this frame is the end of speech and no audio."""
        ...


class SpeechModel(Protocol, Generic[State]):
    """A family's computation over state that was allocated once."""

    @property
    def max_positions(self) -> int:
        """Positions that a stream can take."""
        ...

    @property
    def device(self) -> torch.device:
        """Where weights and state live."""
        ...

    def allocate(self, slots: int, positions: int) -> State:
        """Memory for `slots` streams of up to `positions` positions."""
        ...

    def start(self, state: State, slot: int, sampling: Sampling, seed: int) -> None:
        """Make a slot a new stream."""
        ...

    def prefill(self, state: State, slot: int, prompt: Prompt) -> None:
        """Read a prompt into a slot."""
        ...

    def frame(self, state: State, slots: torch.Tensor) -> FrameLike:
        """The next frame of each stream in slots int64 [rows]."""
        ...
