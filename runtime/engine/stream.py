"""One request in the loop: what is asked, what has been made of it and not yet been taken, and how it ended."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from aloud.engine.guards import Watch
from aloud.engine.steps import HostFrame
from aloud.request import Guards, Prompt, Sampling

BUFFERED_FRAMES = 64
"""Frames that may wait to be taken from a stream; then the stream waits, and no other."""


@dataclass(frozen=True)
class Prefix:
    """What a model has read already: positions that a prompt can begin behind."""

    positions: int
    cache: torch.Tensor  # of `copy_prefix`, of so many positions or more


@dataclass(frozen=True)
class Job:
    """One stream to run: everything resolved, nothing left to default."""

    prompt: Prompt  # what is to be read, behind the prefix
    sampling: Sampling
    seed: int
    max_frames: int  # 0: the prompt is read and nothing is spoken
    guards: Guards
    text_limit_frames: int | None
    prefix: Prefix | None = None
    lead_seconds: float | None = None  # how far to run ahead of playing in real time; None: as fast as it goes
    goes_on: bool = False  # whether it continues what has begun: it goes before all that have not
    plays_at: float | None = None  # by the loop's clock: when its first frame is due, if it continues what is played
    utterance: object | None = None  # which other jobs are pieces of as well, known by being the same object
    is_followed: bool = False  # whether another piece may come, for which a slot is kept while this one is played
    keeps_cache: bool = False  # whether what has been read is wanted in the end: `Stream.prefix`

    @property
    def positions(self) -> int:
        """Positions of prefix and prompt."""
        return len(self.prompt) + (0 if self.prefix is None else self.prefix.positions)


@dataclass(frozen=True)
class Suspended:
    """Where a stream stood that gave its slot away, and goes on in another one."""

    copy: tuple[torch.Tensor, ...]  # of `copy_stream`
    made_frames: int
    frames_to_launch: int
    watch: Watch


class Spoken(NamedTuple):
    """One frame of speech; thousands a second are made, and a named tuple costs least."""

    codes: np.ndarray  # int64 [codebooks]
    samples: np.ndarray  # float32 [frame_size]
    power: float  # the samples' mean square


class Stream:
    """A job on its way; the loop writes it, and whoever waits for it takes from it.

    finish_reason, error: one of them is set when it is over, which is before its last frames are taken.
    prefix: of a job that keeps its cache, once it is over: all positions that have certainly been read, which are the
        prompt's and those of the frames, but of the last one only where the model ended by itself. None where there was
        no memory for a copy.
    """

    def __init__(self, job: Job, *, is_refusable: bool = False) -> None:
        """Of a job that has not begun; one that is refusable fails with `Overloaded` if it cannot run in time."""
        self.job = job
        self.is_refusable = is_refusable
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.prefix: Prefix | None = None
        self.lateness_seconds = 0.0  # the most that a frame was late for playing in real time, once it is over
        self.slot = -1  # while it has one
        self.read_positions = 0  # of the prompt
        self.cancelled = False
        self.held = False  # whether it waits for its frames to be taken
        self.gives_slot = False  # whether it is to be suspended, once none of its frames is in flight
        self.keeps_slot = False  # whether it is never asked to: its copy found no memory
        self.suspended: Suspended | None = None  # while it waits for a slot again
        # Each is a list of one: a frame of several streams with the row of this one. `keep_own` may exchange it while
        # another thread takes it.
        self.frames: deque[list[tuple[HostFrame, int]]] = deque()

    @property
    def is_over(self) -> bool:
        """Whether no more frames will be made."""
        return self.finish_reason is not None or self.error is not None

    def keep_own(self) -> None:
        """Let go of the other rows of the newest frame: a batch's memory does not wait for who takes frames late."""
        try:
            entry = self.frames[-1]
        except IndexError:
            return
        frame, row = entry[0]
        if len(frame.codes) > 1:
            parts = (frame.codes, frame.samples, frame.power, frame.ended)
            codes, samples, power, ended = (part[row : row + 1].copy() for part in parts)
            entry[0] = HostFrame(codes, samples, power, ended, frame.seconds), 0

    def take(self) -> Spoken | None:
        """The oldest frame that nobody has taken, if there is one."""
        try:
            frame, row = self.frames.popleft()[0]
        except IndexError:
            return None
        # Copies: a row of the whole batch's frame would keep all of it in memory.
        return Spoken(frame.codes[row].copy(), frame.samples[row].copy(), float(frame.power[row]))
