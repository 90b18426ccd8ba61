"""One thing to say, piece by piece: what to wait for next, and what has been made; it waits for nothing itself.

Whoever drives it calls `advance` and does what the answer says: hand on a chunk, wait for a stream, fetch more text.
Each piece is conditioned on the pieces before it, as turns of the same speaker, so a text may be of any length.
"""

from __future__ import annotations

import enum
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from aloud.audio import Audio
from aloud.codec.config import MimiConfig
from aloud.conversation import Conversation
from aloud.engine.guards import text_limit_frames
from aloud.engine.loop import Loop
from aloud.engine.stream import Job, Prefix, Spoken, Stream
from aloud.errors import EngineClosed, NothingSpoken, TextEmpty
from aloud.prepare import check_text
from aloud.request import MAX_SECONDS, Guards, Prompt, Sampling
from aloud.text.split import Splitter

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / the golden ratio: steps of it spread the pieces' seeds over all numbers (Steele et al. 2014, SplitMix)."""
ROOM_SECONDS = 30.0
"""Room that is made in the context for a piece at most: one of `SplitLimits` takes half of it."""


class Want(enum.Enum):
    """What an utterance needs that is no stream's frame."""

    TEXT = "more text, or its end"
    NOTHING = "it is over"


@dataclass(frozen=True)
class Manner:
    """How an utterance is spoken: everything resolved."""

    sampling: Sampling
    seed: int
    guards: Guards
    max_frames: int | None  # of all pieces together
    lead_seconds: float | None  # None: as fast as it goes


class Utterance:
    """A text on its way to speech.

    mark: what its turns in the conversation are known by.
    keeps_context: whether what was spoken is wanted in the conversation afterwards, as in a session.
    """

    def __init__(
        self,
        loop: Loop,
        codec: MimiConfig,
        conversation: Conversation,
        manner: Manner,
        prompt_of: Callable[[str], Prompt],
        *,
        keeps_context: bool,
        clock: Callable[[], float] | None = None,
        submit: Callable[..., Stream] | None = None,
    ) -> None:
        """`prompt_of` makes the prompt of one piece of text; `submit` is `Loop.submit`, or does more than that."""
        self.finish_reason: str | None = None
        self.lateness_seconds = 0.0  # the most that a frame of the pieces that are over was late
        self._loop = loop
        self._codec = codec
        self._conversation = conversation
        self._manner = manner
        self._prompt_of = prompt_of
        self._keeps_context = keeps_context
        self._clock = clock or loop.now
        self._run_job = submit or loop.submit
        self._changing = threading.RLock()  # it may be cancelled from another thread than the one that advances it
        self.mark = object()
        self._splitter = Splitter()
        self._pieces: deque[str] = deque()
        self._text_is_over = False
        self._began = 0  # pieces
        self._frames = 0  # of all pieces
        self._last_reason: str | None = None  # of the last piece; "length" once one was cut off, for it is missing
        self._plays_from: float | None = None  # frame n is played n frames later; None: nothing plays
        # Of the piece that is being spoken:
        self._stream: Stream | None = None
        self._piece = ""
        self._text: Prompt | None = None
        self._codes: list[np.ndarray] = []
        self._is_second_attempt = False

    @property
    def needs_text(self) -> bool:
        """Whether more text may still come."""
        return not self._text_is_over

    @property
    def has_pieces(self) -> bool:
        """Whether there is text that waits to be spoken."""
        return bool(self._pieces)

    def feed(self, text: str) -> None:
        """More of the text. Raises `RequestError` for characters that no UTF-8 has."""
        if text.strip():
            check_text(text)
        self._pieces.extend(self._splitter.feed(text))

    def finish_text(self) -> None:
        """There is no more text."""
        if not self._text_is_over:
            self._text_is_over = True
            self._pieces.extend(self._splitter.finish())

    def advance(self) -> Audio | Stream | Want:
        """The next chunk of one frame; or the stream to wait for; or what else is missing.

        Raises what went wrong; the utterance is over then.
        """
        with self._changing:
            return self._advance()

    def cancel(self, reason: str = "cancelled") -> None:
        """Stop; what has been handed out stays in the conversation."""
        with self._changing:
            stream, self._stream = self._stream, None
            if stream is not None:
                self._loop.cancel(stream)
                self._remember(None)  # what has been read may be more than what was handed out
            if self.finish_reason is None:
                self._be_over(reason)

    def _advance(self) -> Audio | Stream | Want:
        while True:
            stream = self._stream
            if stream is None:
                if self.finish_reason is not None:
                    return Want.NOTHING
                if self._pieces:
                    self._begin(self._pieces.popleft())
                elif self._text_is_over:
                    self._end()
                else:
                    return Want.TEXT
                continue
            spoken = self._loop.take(stream)
            if spoken is not None:
                return self._chunk(spoken)
            if not stream.is_over:
                return stream
            if not stream.frames:
                self._end_piece(stream)

    def _begin(self, piece: str) -> None:
        self._text = self._prompt_of(piece)
        self._codes = []
        self._submit(piece, _piece_seed(self._manner.seed, self._began))
        self._piece = piece
        self._began += 1
        self._is_second_attempt = False

    def _submit(self, piece: str, seed: int) -> None:
        assert self._text is not None
        manner, rate = self._manner, self._codec.frame_rate
        limit = text_limit_frames(manner.guards, piece, rate)
        left = None if manner.max_frames is None else manner.max_frames - self._frames
        bounds = [frames for frames in (limit, left, round(MAX_SECONDS * rate)) if frames is not None]
        # Not all that it may take at most: what it will hardly use is not worth the turns that would go for it.
        prefix, prompt = self._conversation.prompt_for(self._text, min([*bounds, round(ROOM_SECONDS * rate)]))
        room = self._conversation.room_frames(self._text)
        is_followed = not self._text_is_over or bool(self._pieces)
        job = Job(
            prompt=prompt,
            sampling=manner.sampling,
            seed=seed,
            max_frames=min([*bounds, room]),
            guards=manner.guards,
            text_limit_frames=limit,
            prefix=prefix,
            lead_seconds=manner.lead_seconds,
            plays_at=self._plays_at(),
            goes_on=self._began > 0,
            utterance=self.mark,
            is_followed=is_followed,
            keeps_cache=self._keeps_context or is_followed,
        )
        self._stream = self._run_job(job, is_refusable=self._began == 0)

    def _plays_at(self) -> float | None:
        """When the next frame is due, if frames before it are being played."""
        if self._manner.lead_seconds is None or self._plays_from is None:
            return None
        due = self._plays_from + self._frames / self._codec.frame_rate
        if due > self._clock():
            return due
        self._plays_from = None  # the listener has nothing left: playing begins anew with the next frame
        return None

    def _chunk(self, spoken: Spoken) -> Audio:
        if self._plays_from is None:
            self._plays_from = self._clock() - self._frames / self._codec.frame_rate
        self._codes.append(spoken.codes)
        self._frames += 1
        return Audio(spoken.samples, self._codec.sample_rate, spoken.codes[None], seed=self._manner.seed)

    def _end_piece(self, stream: Stream) -> None:
        self._stream = None
        self.lateness_seconds = max(self.lateness_seconds, stream.lateness_seconds)
        if stream.error is not None:
            self._be_over("error")
            self._remember(None)
            raise stream.error
        reason = stream.finish_reason
        if reason == "cancelled":  # not by `cancel`, which forgets the stream
            self._be_over("error")
            self._remember(None)
            raise EngineClosed("The engine was closed while it spoke. Make a new one, and ask again.")
        if not self._codes and reason == "end" and not self._is_second_attempt and self._draws():
            self._is_second_attempt = True
            self._submit(self._piece, (stream.job.seed + 1) % 2**64)
            return
        self._remember(stream.prefix)
        if self._last_reason != "length":
            self._last_reason = reason
        if self._manner.max_frames is not None and self._frames >= self._manner.max_frames:
            self._be_over("length")
        elif not self._pieces and self._text_is_over:
            self._end()

    def _end(self) -> None:
        """All pieces have been spoken."""
        has_spoken = self._frames > 0
        self._be_over((self._last_reason or "end") if has_spoken else "error")
        if self._began == 0:
            raise TextEmpty("There is no text to say. Give at least one letter.")
        if not has_spoken:
            raise NothingSpoken("The model said nothing, twice. Try another text, seed, context or temperature.")

    def _be_over(self, reason: str) -> None:
        """Nothing more is said, and no slot need be kept for it."""
        self.finish_reason = reason
        self._loop.let_go(self.mark)

    def _remember(self, read: Prefix | None) -> None:
        """Put the piece and what was handed out of it into the conversation."""
        if self._text is not None and self._codes:
            codes = torch.from_numpy(np.stack(self._codes))
            self._conversation.add_spoken(self._text, codes, read, self.mark)
        self._text, self._codes = None, []

    def _draws(self) -> bool:
        sampling = self._manner.sampling
        return sampling.temperature > 0 or sampling.depth_temperature > 0


def _piece_seed(seed: int, piece: int) -> int:
    """The seed of a piece: the utterance's own for the first, and others far from it and from each other."""
    return (seed + piece * GOLDEN) % 2**64
