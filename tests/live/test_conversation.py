"""A conversation as positions: cached prefix and prompt together are voice, turns and text, and they always fit."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aloud.conversation import Conversation, join
from aloud.engine.stream import Prefix
from aloud.errors import ContextTooLong
from aloud.request import Prompt
from aloud.voice import Voice

CODEBOOKS, END_TOKEN, POSITIONS = 2, 0, 40
CONFIG: Any = SimpleNamespace(codebooks=CODEBOOKS, end_token=END_TOKEN)


class Writer:
    """Makes prompts of numbers that never come twice."""

    def __init__(self) -> None:
        self.last = 0

    def text(self, positions: int) -> Prompt:
        tokens = self._numbers(positions)
        return Prompt(tokens, torch.zeros(positions, CODEBOOKS, dtype=torch.int64))

    def frames(self, count: int) -> torch.Tensor:
        return self._numbers(count)[:, None].expand(count, CODEBOOKS)

    def heard(self, words: int, frames: int) -> Prompt:
        return join([self.text(words), *audio(self.frames(frames))])

    def _numbers(self, count: int) -> torch.Tensor:
        self.last += count
        return torch.arange(self.last - count + 1, self.last + 1)


def audio(codes: torch.Tensor) -> list[Prompt]:
    """Frames and the end behind them, as positions; nothing for no frames."""
    if not len(codes):
        return []
    rows = torch.cat([codes, torch.full((1, CODEBOOKS), END_TOKEN)])
    return [Prompt(torch.full((len(rows),), -1), rows)]


def content(prompt: Prompt) -> list[tuple[int, ...]]:
    """What stands at each position: the text token, then the codes."""
    return [(token, *codes) for token, codes in zip(prompt.text_tokens.tolist(), prompt.codes.tolist(), strict=True)]


def cache_of(positions: list[tuple[int, ...]]) -> Prefix:
    """A cache that says what was read."""
    return Prefix(len(positions), torch.tensor(positions, dtype=torch.int64).reshape(-1, CODEBOOKS + 1))


def read_by(prefix: Prefix | None) -> list[tuple[int, ...]]:
    return [] if prefix is None else [tuple(row) for row in prefix.cache.tolist()][: prefix.positions]


@dataclass(frozen=True)
class Heard:
    """A turn of somebody else; `is_read` as `Session.hear` does, else only added, as what is restored."""

    words: int
    frames: int
    is_read: bool


@dataclass(frozen=True)
class Said:
    """A turn of one's own, of up to `bound` frames of which some are made.

    way: it ended by itself, was cut at a frame, or was cancelled with less handed out; or it ended, and then somebody
    interrupted who had heard half of it.
    """

    words: int
    bound: int
    share: float
    way: str


@dataclass(frozen=True)
class Forgotten:
    """What has been read must make room for another conversation."""


sizes = st.integers(1, 14)
turns = st.one_of(
    st.builds(Heard, sizes, st.integers(0, 8), st.booleans()),
    st.builds(Forgotten),
    st.builds(
        Said, sizes, st.integers(1, 60), st.floats(0, 1), st.sampled_from(["end", "cut", "cancelled", "interrupted"])
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 12), st.lists(sizes, max_size=2), st.lists(turns, max_size=14))
def test_it_is_its_voice_and_its_last_turns(
    voice_positions: int, context: list[int], script: list[Heard | Said | Forgotten]
) -> None:
    writer = Writer()
    voice_content = content(writer.text(voice_positions))
    voice = Voice(None, cache_of(voice_content)) if voice_positions else None  # type: ignore[arg-type]
    conversation = Conversation(CONFIG, voice, POSITIONS)
    pinned = [writer.text(words) for words in context]
    for prompt in pinned:
        conversation.add(prompt)
    conversation.pin()
    first = [content(prompt) for prompt in pinned]
    fixed = voice_positions + sum(context)  # positions that are never dropped
    everything: list[list[tuple[int, ...]]] = []  # every turn that ever was

    def kept() -> list[list[tuple[int, ...]]]:
        left = [*first, *everything[conversation.dropped_turns :]]
        assert [content(turn) for turn in conversation.turns] == left  # whole, and the youngest
        return left

    def flat(parts: list[list[tuple[int, ...]]]) -> list[tuple[int, ...]]:
        return [*voice_content, *(position for part in parts for position in part)]

    def check_dropped(before: int, most: int) -> None:
        """Nothing where it fitted; else the oldest, until no more than half is left, or one that fits."""
        if before <= most:
            assert conversation.dropped_turns == dropped
            return
        after = conversation.positions
        assert after <= most
        left = len(conversation.turns) - len(first)
        assert left <= 1 or after <= fixed + (most - fixed) // 2
        with_one_more = after + len(everything[conversation.dropped_turns - 1])
        assert with_one_more > (most if left == 0 else fixed + (most - fixed) // 2)

    for turn in script:
        dropped, rebuilds, cached_before = conversation.dropped_turns, conversation.rebuilds, conversation.to_read()[0]
        if isinstance(turn, Forgotten):
            conversation.forget_read()
            assert conversation.rebuilds == rebuilds + 1
            assert (conversation.cached_bytes, conversation.cached_positions) == (0, voice_positions)
            continue
        if isinstance(turn, Heard):
            prompt = writer.heard(turn.words, turn.frames)
            if fixed + len(prompt) > POSITIONS:
                continue  # refused before it comes here
            conversation.add(prompt)
            everything.append(content(prompt))
            before = conversation.positions
            conversation.make_room()
            check_dropped(before, POSITIONS)
            if turn.is_read:
                unread = conversation.to_read()[1]
                whole = read_by(conversation.to_read()[0]) + ([] if unread is None else content(unread))
                assert whole == flat(kept())
                conversation.has_read(cache_of(whole))
                assert conversation.to_read()[1] is None
                assert conversation.cached_positions == conversation.positions
        else:
            text = writer.text(turn.words)
            if fixed + turn.words > POSITIONS:
                with pytest.raises(ContextTooLong):
                    conversation.prompt_for(text, turn.bound)
                continue
            before = conversation.positions
            prefix, prompt = conversation.prompt_for(text, turn.bound)
            whole = read_by(prefix) + content(prompt)
            assert whole == flat(kept()) + content(text)
            room = conversation.room_frames(text)
            assert room == POSITIONS + 1 - len(whole) >= 1
            most = POSITIONS + 1 - turn.words - min(turn.bound, POSITIONS + 1 - turn.words - fixed)
            check_dropped(before, most)
            made = max(1, round(turn.share * min(turn.bound, room)))
            codes = writer.frames(made)
            spoken = join([text, *audio(codes)])
            rows = content(spoken)
            end = len(text) + made
            read = {"end": end, "cut": end - 1, "cancelled": None, "interrupted": end}[turn.way]
            if read is not None and whole and len(whole) - len(text) + read > POSITIONS:
                read = POSITIONS - len(whole) + len(text)  # it filled the slot: it was cut
            conversation.add_spoken(
                text,
                codes,
                None if read is None else cache_of(whole[: len(whole) - len(text)] + rows[:read]),
                utterance=turn,
            )
            if turn.way == "interrupted" and made > 1:
                everything.append(content(join([text, *audio(codes[: made // 2])])))
                cached, rebuilds = read_by(conversation.to_read()[0]), conversation.rebuilds
                conversation.keep_heard(turn, made // 2)
                assert conversation.rebuilds == rebuilds
                # All is kept that was read before the end of what was heard, and nothing of the other half.
                assert read_by(conversation.to_read()[0]) == cached[: len(flat(kept())) - 1]
                assert read_by(conversation.to_read()[0]) == flat(kept())[: conversation.cached_positions]
                conversation.keep_heard(turn, made)  # more than is there any more
                conversation.keep_heard(object(), 0)  # nobody's
                assert (kept(), conversation.rebuilds) == (kept(), rebuilds)
                continue
            everything.append(rows)
        kept()
        if conversation.dropped_turns == dropped or cached_before is (None if voice is None else voice.prefix):
            assert conversation.rebuilds == rebuilds
        else:
            assert conversation.rebuilds == rebuilds + 1
        assert conversation.cached_positions <= conversation.positions
        assert read_by(conversation.to_read()[0]) == flat(kept())[: conversation.cached_positions]
        assert conversation.positions == len(flat(kept()))


def test_voice_and_text_that_do_not_fit_are_refused_before_anything_is_dropped() -> None:
    writer = Writer()
    conversation = Conversation(CONFIG, None, 20)
    conversation.add(writer.heard(5, 2))
    with pytest.raises(ContextTooLong, match=r"^Voice, context and text take 23 positions, 3 more than there are"):
        conversation.prompt_for(writer.text(23), 1)
    assert len(conversation.turns) == 1
    prefix, prompt = conversation.prompt_for(writer.text(20), 9)
    assert prefix is None
    assert len(prompt) == 20
    assert conversation.room_frames(prompt) == 1
    assert conversation.dropped_turns == 1


@pytest.mark.parametrize(("heard", "left"), [(0, []), (6, []), (7, [1]), (12, [6]), (13, [6, 1]), (18, [6, 6])])
def test_what_was_heard_is_counted_from_the_beginning_of_an_utterance(heard: int, left: list[int]) -> None:
    """Also where its first pieces have been dropped meanwhile."""
    writer = Writer()
    conversation = Conversation(CONFIG, None, 20)
    utterance = object()
    for _ in range(3):
        text = writer.text(3)
        conversation.prompt_for(text, 6)
        conversation.add_spoken(text, writer.frames(6), None, utterance)
    while conversation.dropped_turns < 1:
        conversation.add(writer.heard(2, 0))
        conversation.make_room()
    assert conversation.dropped_turns == 1
    heard_turns = len(conversation.turns) - 2
    conversation.keep_heard(utterance, heard)
    frames = [int((turn.text_tokens < 0).sum()) - 1 for turn in conversation.turns]
    assert frames == [*left, *[-1] * heard_turns]


def test_what_is_taken_back_was_never_there() -> None:
    writer = Writer()
    conversation = Conversation(CONFIG, None, 20)
    first = writer.heard(3, 2)
    conversation.add(first)
    conversation.has_read(cache_of(content(first)))
    conversation.add(writer.heard(2, 0))
    conversation.take_back()
    assert conversation.to_read()[1] is None
    assert content(join(conversation.turns)) == content(first)


def test_an_eviction_that_comes_meanwhile_is_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread drops what was read, while a turn is taken back and the rest of it is to be kept."""
    writer = Writer()
    conversation = Conversation(CONFIG, None, POSITIONS)
    for _ in range(2):
        conversation.add(writer.text(5))
    conversation.has_read(cache_of(content(join(conversation.turns))))
    evicting = threading.Thread(target=conversation.forget_read)

    def replaced_late(prefix: Prefix, **changes: int) -> Prefix:
        evicting.start()
        evicting.join(timeout=0.2)  # it gets no further than the lock, or it is done before what it dropped comes back
        return dataclasses.replace(prefix, **changes)

    monkeypatch.setattr("aloud.conversation.replace", replaced_late)
    conversation.take_back()
    evicting.join(timeout=60)
    assert conversation.rebuilds == 1
    assert conversation.cached_bytes == 0
