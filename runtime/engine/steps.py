"""What the loop asks of a model over slots: begin a stream, read its prompt, launch a frame, read it later."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol

import numpy as np
import torch

from aloud.engine.model import SpeechModel, State
from aloud.engine.slots import Slots
from aloud.kernels.row_product import TOGETHER
from aloud.prompt_block import Piece, pack
from aloud.request import Sampling

CPU_BATCH = 16
"""Rows of a frame on a CPU at most: two for each go through the depth decoder together, still less than
`row_product.TOGETHER`, so that a stream does not depend on the others."""
CPU_PREFILL = 256
"""Positions of a prompt that are read at once on a CPU."""


@dataclass(frozen=True)
class HostFrame:
    """A frame of some streams, on the CPU."""

    codes: np.ndarray  # int64 [rows, codebooks]; -1 where none could be drawn
    samples: np.ndarray  # float32 [rows, frame_size]
    power: np.ndarray  # float32 [rows]: the samples' mean square
    ended: np.ndarray  # bool [rows]: this frame is the end of speech and no audio
    seconds: float  # that the device took for it


class Launched(Protocol):
    """A frame on its way."""

    def read(self) -> HostFrame:
        """Wait for the frame."""
        ...


class Reading(Protocol):
    """A prefill pass on its way."""

    def seconds(self) -> float:
        """What the device took for it; asked after a frame that was launched later has been read."""
        ...


class Steps(Protocol):
    """The steps of one model over its slots, each done in the order of the calls."""

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Rows that a launch can have, ascending; fewer rows cost what the next size costs."""
        ...

    @property
    def prefill_sizes(self) -> tuple[int, ...]:
        """Positions that a prefill pass can have, ascending."""
        ...

    @property
    def prefill_together(self) -> bool:
        """Whether one pass may read several prompts."""
        ...

    @property
    def ahead(self) -> int:
        """Frames to launch before the oldest one is read."""
        ...

    def start(self, slot: int, sampling: Sampling, seed: int, positions: int) -> None:
        """Make a slot a new stream whose prompt takes `positions`."""
        ...

    def prefill(self, pieces: Sequence[Piece]) -> Reading:
        """Read pieces of prompts, together at most the largest of `prefill_sizes`."""
        ...

    def copy_prefix(self, slot: int, positions: int) -> torch.Tensor:
        """What reading a slot's first positions left."""
        ...

    def paste_prefix(self, slot: int, prefix: torch.Tensor, positions: int) -> None:
        """Put the first positions of what `copy_prefix` gave where a slot begins."""
        ...

    def copy_stream(self, slot: int, positions: int) -> tuple[torch.Tensor, ...]:
        """All that a slot's stream is, none of whose frames is in flight, behind its first `positions` positions."""
        ...

    def paste_stream(self, slot: int, stream: tuple[torch.Tensor, ...]) -> None:
        """Make a slot a stream that `copy_stream` gave."""
        ...

    def launch(self, slots: np.ndarray) -> Launched:
        """Begin the next frame of the streams in slots int64 [rows], at most the largest of `batch_sizes`."""
        ...


def fitting_size(sizes: Sequence[int], needed: int) -> int:
    """The smallest of ascending `sizes` that holds `needed`."""
    return next(size for size in sizes if size >= needed)


@dataclass(frozen=True)
class _Done:
    """A step that was over when its call returned."""

    frame: HostFrame | None
    took_seconds: float

    def read(self) -> HostFrame:
        assert self.frame is not None
        return self.frame

    def seconds(self) -> float:
        return self.took_seconds


class EagerSteps(Generic[State]):
    """Steps that are computed when they are called: on a CPU.

    A launch of fewer rows than a batch size is filled up with rows of the scratch slot, as a captured one is.
    """

    prefill_together = False  # a prompt alone: its bits do not depend on what else is to be read
    prefill_sizes = (CPU_PREFILL,)

    def __init__(
        self,
        model: SpeechModel[State],
        slots: Slots[State],
        *,
        batch_sizes: tuple[int, ...] = tuple(range(1, CPU_BATCH + 1)),
        ahead: int = 0,
    ) -> None:
        """`batch_sizes` and `ahead`: as a GPU would have them, to try that here."""
        if 2 * batch_sizes[-1] >= TOGETHER:
            raise ValueError(f"a batch of {batch_sizes[-1]} rows would not keep its streams apart on a CPU")
        self.batch_sizes = batch_sizes
        self.ahead = ahead
        self._model = model
        self._slots = slots

    @torch.no_grad()
    def start(self, slot: int, sampling: Sampling, seed: int, positions: int) -> None:
        """See `Steps.start`."""
        self._model.start(self._slots.state, slot, sampling, seed, positions)
        self._model.start_sound(self._slots.state, slot)

    @torch.no_grad()
    def prefill(self, pieces: Sequence[Piece]) -> Reading:
        """See `Steps.prefill`."""
        begin = time.perf_counter()
        positions = sum(piece.stop - piece.start for piece in pieces)
        self._model.prefill(self._slots.state, pack(pieces, positions, self._slots.scratch))
        return _Done(None, time.perf_counter() - begin)

    @torch.no_grad()
    def copy_prefix(self, slot: int, positions: int) -> torch.Tensor:
        """See `Steps.copy_prefix`."""
        return self._model.copy_prefix(self._slots.state, slot, positions)

    @torch.no_grad()
    def paste_prefix(self, slot: int, prefix: torch.Tensor, positions: int) -> None:
        """See `Steps.paste_prefix`."""
        self._model.paste_prefix(self._slots.state, slot, prefix, positions)

    @torch.no_grad()
    def copy_stream(self, slot: int, positions: int) -> tuple[torch.Tensor, ...]:
        """See `Steps.copy_stream`."""
        return self._model.copy_stream(self._slots.state, slot, positions)

    @torch.no_grad()
    def paste_stream(self, slot: int, stream: tuple[torch.Tensor, ...]) -> None:
        """See `Steps.paste_stream`."""
        self._model.paste_stream(self._slots.state, slot, stream)

    @torch.no_grad()
    def launch(self, slots: np.ndarray) -> Launched:
        """See `Steps.launch`."""
        begin = time.perf_counter()
        rows = len(slots)
        index = torch.full((fitting_size(self.batch_sizes, rows),), self._slots.scratch)
        index[:rows] = torch.from_numpy(slots)
        codes = self._model.draw(self._slots.state, index)
        sound = self._model.decode(self._slots.state, codes, index)
        outputs = (codes, sound.samples, sound.power, sound.ended)
        codes_host, samples, power, ended = (part[:rows].numpy() for part in outputs)
        return _Done(HostFrame(codes_host, samples, power, ended, time.perf_counter() - begin), 0.0)
