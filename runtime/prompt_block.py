"""A block of prompt positions of one or several streams, in one tensor of fixed shape: what one prefill pass reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aloud.request import Prompt


@dataclass(frozen=True)
class Piece:
    """Positions `start` to `stop` of a prompt, which stand at `position` and after it in a slot."""

    slot: int
    prompt: Prompt
    start: int
    stop: int
    position: int  # in the slot, of the piece's first; differs from start where a cached prefix stands before

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends with this piece."""
        return self.stop == len(self.prompt)


@dataclass(frozen=True)
class PromptBlock:
    """Positions of prompts, each with its place; unused ones belong to the scratch slot."""

    data: torch.Tensor  # int64 [4 + codebooks, positions]: the rows are the properties below

    @property
    def text_tokens(self) -> torch.Tensor:
        """int64 [positions]; -1 where the position is audio."""
        return self.data[0]

    @property
    def slots(self) -> torch.Tensor:
        """int64 [positions]: whose position this is."""
        return self.data[1]

    @property
    def positions(self) -> torch.Tensor:
        """int64 [positions]: where in its slot."""
        return self.data[2]

    @property
    def next_slots(self) -> torch.Tensor:
        """int64 [positions]: the slot for which this position is its prompt's last one, else the scratch slot."""
        return self.data[3]

    @property
    def codes(self) -> torch.Tensor:
        """int64 [positions, codebooks]; all zero where the position is text."""
        return self.data[4:].T


def pack(pieces: Sequence[Piece], positions: int, scratch: int, *, pinned: bool = False) -> PromptBlock:
    """Pieces into a block of `positions` on the CPU, the rest of it filled up with text token 0 of the scratch slot."""
    codebooks = pieces[0].prompt.codes.shape[1]
    data = torch.zeros(4 + codebooks, positions, dtype=torch.int64, pin_memory=pinned)
    data[1] = data[3] = scratch
    place = 0
    for piece in pieces:
        length = piece.stop - piece.start
        part = data[:, place : place + length]
        part[0] = piece.prompt.text_tokens[piece.start : piece.stop]
        part[1] = piece.slot
        part[2] = torch.arange(piece.position, piece.position + length)
        if piece.is_last:
            part[3, -1] = piece.slot
        part[4:] = piece.prompt.codes[piece.start : piece.stop].T
        place += length
    return PromptBlock(data)
