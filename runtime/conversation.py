"""A conversation as prompt positions: what has been said, and how much of it a cached prefix has read already."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from aloud.engine.stream import Prefix
from aloud.errors import ContextTooLong
from aloud.models.csm import CsmConfig
from aloud.request import Prompt
from aloud.text.csm import Turn, build_prompt
from aloud.voice import Voice


@dataclass(frozen=True)
class _Turn:
    """A turn, and what of it was spoken here: a text and frames, of one of the pieces of an utterance."""

    prompt: Prompt
    text_positions: int = 0
    frames: int = 0
    utterance: object = None  # that it is a piece of; None: it was heard


class Conversation:
    """Turns behind a voice. When they no longer fit, the oldest are dropped whole; the voice stays.

    So do turns that were pinned, which give a voice, too.

    dropped_turns: how many. rebuilds: how often the rest had to be read again, for that or by `forget_read`.
    """

    def __init__(
        self,
        config: CsmConfig,
        voice: Voice | None,
        max_positions: int,
        when_read: Callable[[Conversation], None] = lambda _: None,
    ) -> None:
        """Of nothing but a voice, for slots of `max_positions`. `when_read` is told when more of it has been cached."""
        self._config = config
        self._voice = None if voice is None else voice.prefix
        self._cached = self._voice
        self._caching = threading.Lock()  # held where that changes: another thread may let it go
        self._turns: list[_Turn] = []
        self._pinned = 0  # turns at the beginning
        self._dropped: tuple[object, int] = (None, 0)  # an utterance, and frames of it that were dropped
        self._max_positions = max_positions
        self._when_read = when_read
        self.dropped_turns = 0
        self.rebuilds = 0

    @property
    def positions(self) -> int:
        """Positions of the voice and all turns."""
        return _positions(self._voice) + sum(len(turn.prompt) for turn in self._turns)

    @property
    def cached_positions(self) -> int:
        """Of those, the ones that need not be read again."""
        return _positions(self._cached)

    @property
    def cached_bytes(self) -> int:
        """Bytes that it keeps on the device for them; the voice is not its own."""
        cached = self._cached
        return 0 if cached is None or cached is self._voice else cached.cache.nbytes

    @property
    def free_positions(self) -> int:
        """Positions that one turn can take at most, all others dropped."""
        return self._max_positions - _positions(self._voice)

    @property
    def turns(self) -> tuple[Prompt, ...]:
        """The turns that are still there, oldest first."""
        return tuple(turn.prompt for turn in self._turns)

    def add(self, turn: Prompt) -> None:
        """A turn that was heard."""
        self._turns.append(_Turn(turn))

    def pin(self) -> None:
        """Keep the turns that are there now for good."""
        self._pinned = len(self._turns)

    def take_back(self) -> None:
        """Forget the turn that was added last."""
        self._turns.pop()
        self._keep_read(self.positions)

    def add_spoken(self, text: Prompt, codes: torch.Tensor, read: Prefix | None, utterance: object) -> None:
        """A turn that was spoken here: its text, its codes int64 [frames, codebooks], and what has been read by then.

        `read` is of the prompt that `prompt_for` gave, with the text, and frames; None where nothing was kept.
        `utterance`: the same for all pieces of one text.
        """
        self._turns.append(self._spoken(text, codes, utterance))
        if read is not None:
            self.has_read(read)

    def keep_heard(self, utterance: object, frames: int) -> None:
        """Of an utterance that was spoken here, keep so many frames: the rest was never heard.

        Of a piece that was heard in part, the text stays whole. What follows the cut has to be read again.
        """
        if self._dropped[0] is utterance:
            frames = max(0, frames - self._dropped[1])
        turns: list[_Turn] = []
        unchanged: int | None = None  # positions up to the cut
        for turn in self._turns:
            kept = turn
            is_cut = turn.utterance is utterance and frames < turn.frames
            if is_cut:
                codes = turn.prompt.codes[turn.text_positions :][:frames]
                kept = self._spoken(turn.prompt[: turn.text_positions], codes, utterance)
                if unchanged is None:
                    before = sum(len(other.prompt) for other in turns)
                    unchanged = _positions(self._voice) + before + (kept.text_positions + frames if frames else 0)
            frames -= kept.frames if turn.utterance is utterance else 0
            if kept.frames or not is_cut:
                turns.append(kept)
        self._turns = turns
        if unchanged is not None:
            self._keep_read(unchanged)

    def _spoken(self, text: Prompt, codes: torch.Tensor, utterance: object) -> _Turn:
        audio = build_prompt(self._config, [Turn([], codes)])
        return _Turn(join([text, audio]), len(text), len(codes), utterance)

    def has_read(self, read: Prefix) -> None:
        """The voice and the turns up to now have been read, but for what may follow the prefix."""
        with self._caching:
            self._cached = read
        self._when_read(self)

    def _keep_read(self, positions: int) -> None:
        """Of what has been read, no more than the first positions: those behind them have changed."""
        with self._caching:
            cached = self._cached
            if cached is not None and cached.positions > positions:
                is_voice = positions <= _positions(self._voice)
                self._cached = self._voice if is_voice else replace(cached, positions=positions)

    def forget_read(self) -> None:
        """Keep nothing on the device but the voice, which is not its own; at any time, from any thread."""
        with self._caching:
            self._cached = self._voice
            self.rebuilds += 1

    def to_read(self) -> tuple[Prefix | None, Prompt | None]:
        """The cached prefix, and the positions of turns behind it, if there are any."""
        cached = self._cached  # once: another thread may let it go
        prompt = join(self.turns)[_positions(cached) - _positions(self._voice) :] if self._turns else None
        return cached, prompt if prompt is not None and len(prompt) else None

    def prompt_for(self, text: Prompt, frames: int) -> tuple[Prefix | None, Prompt]:
        """What to begin behind, and what to read before speaking a text of up to `frames` frames.

        Drops the oldest turns if need be. Raises `ContextTooLong` when voice and text alone do not fit.
        """
        least = self._kept_positions + len(text)
        if least > self._max_positions:
            raise ContextTooLong(
                f"Voice, context and text take {least} positions, {least - self._max_positions} more than there are. "
                "Use a shorter voice or context, or say less at once."
            )
        room = self._max_positions + 1 - len(text)  # the last frame is never read back
        wanted = min(frames, room - self._kept_positions)
        self._drop_until(room - wanted)
        cached, unread = self.to_read()
        return cached, text if unread is None else join([unread, text])

    def make_room(self) -> None:
        """Drop the oldest turns until the rest fits."""
        self._drop_until(self._max_positions)

    def room_frames(self, text: Prompt) -> int:
        """Frames that can be spoken now behind the text."""
        return self._max_positions + 1 - self.positions - len(text)

    def _drop_until(self, positions: int) -> None:
        total = self.positions
        if total <= positions:
            return
        kept = self._kept_positions
        target = kept + (positions - kept) // 2
        first = self._pinned
        while first < len(self._turns):
            is_last = first == len(self._turns) - 1  # which stays if it fits at all: it may just have been heard
            if total <= (positions if is_last else target):
                break
            total -= len(self._turns[first].prompt)
            first += 1
        self.dropped_turns += first - self._pinned
        for turn in self._turns[self._pinned : first]:
            before = self._dropped[1] if turn.utterance is self._dropped[0] else 0
            self._dropped = (turn.utterance, before + turn.frames)
        del self._turns[self._pinned : first]
        if self._cached is not self._voice:
            self.forget_read()

    @property
    def _kept_positions(self) -> int:
        """Positions of the voice and the pinned turns."""
        return _positions(self._voice) + sum(len(turn.prompt) for turn in self._turns[: self._pinned])


def join(prompts: Sequence[Prompt]) -> Prompt:
    """Prompts one after the other, at least one."""
    return Prompt(
        torch.cat([prompt.text_tokens for prompt in prompts]), torch.cat([prompt.codes for prompt in prompts])
    )


def _positions(prefix: Prefix | None) -> int:
    return 0 if prefix is None else prefix.positions
