"""What the engine asks of a family of models; adding a family leaves this folder as it is."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch

from aloud.prompt_block import PromptBlock
from aloud.request import Sampling

State = TypeVar("State")


class SoundLike(Protocol):
    """What a frame's codes are to a listener."""

    @property
    def samples(self) -> torch.Tensor:
        """float32 [rows, frame_size]."""
        ...

    @property
    def power(self) -> torch.Tensor:
        """float32 [rows]: the samples' mean square."""
        ...

    @property
    def ended(self) -> torch.Tensor:
        """bool [rows]: this frame is the end of speech and no audio."""
        ...


class SpeechModel(Protocol[State]):
    """A family's computation over state that was allocated once.

    `draw` and `decode` are a frame's two halves; no value of a tensor decides what they launch, so that each can be
    captured for a number of rows, and one stream's decode can run beside the next draw.
    """

    @property
    def max_positions(self) -> int:
        """Positions that a stream can take."""
        ...

    @property
    def codebooks(self) -> int:
        """Tokens of a frame."""
        ...

    @property
    def device(self) -> torch.device:
        """Where weights and state live."""
        ...

    def allocate(self, slots: int, positions: int) -> State:
        """Memory for streams of up to `positions` positions; the last slot is for rows that have no stream."""
        ...

    def state_bytes(self, slots: int, positions: int) -> int:
        """Bytes that `allocate` takes."""
        ...

    def start(self, state: State, slot: int, sampling: Sampling, seed: int, positions: int) -> None:
        """Make a slot a new stream whose prompt takes `positions`: all of it that `prefill` and `draw` use."""
        ...

    def start_sound(self, state: State, slot: int) -> None:
        """The same of what `decode` uses, which is nothing that the others do."""
        ...

    def prefill(self, state: State, block: PromptBlock) -> None:
        """Read a block of prompt positions into the slots that it names."""
        ...

    def copy_prefix(self, state: State, slot: int, positions: int) -> torch.Tensor:
        """What reading a slot's first positions left, to be pasted into other slots."""
        ...

    def paste_prefix(self, state: State, slot: int, prefix: torch.Tensor, positions: int) -> None:
        """Put the first positions of what `copy_prefix` gave where a slot begins."""
        ...

    def copy_stream(self, state: State, slot: int, positions: int) -> tuple[torch.Tensor, ...]:
        """All that a slot's stream is, of whose context the first `positions` positions have been read."""
        ...

    def paste_stream(self, state: State, slot: int, stream: tuple[torch.Tensor, ...]) -> None:
        """Make a slot a stream that `copy_stream` gave; it goes on as if it had never been elsewhere."""
        ...

    def draw(self, state: State, slots: torch.Tensor) -> torch.Tensor:
        """The codes of the next frame of each stream in slots int64 [rows] -> int64 [rows, codebooks].

        -1 where none could be drawn.
        """
        ...

    def decode(self, state: State, codes: torch.Tensor, slots: torch.Tensor) -> SoundLike:
        """The sound of those codes."""
        ...
