"""What holds for the pieces of any text: nothing lost, limits kept, the same however it arrives, in linear time."""

from __future__ import annotations

import sys
import time
from itertools import accumulate, pairwise
from types import FrameType
from typing import Any

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aloud.text.split import SplitLimits, Splitter, split

# What the rules look at; a text of these is far denser in special cases than a text of any characters.
# fmt: off
WORDS = ["Dr", "No", "am", "der", "I", "U.S.", "e.g.", "z. B.", "3", "12", "1999", "3.14", "word", "Word", "a"]
STOPS = [".", ". ", ".\n", "..", "...", "!", "! ", "?", "…", ",", ", ", ";", ": ", "—", " – ", "-", "。", "，", "！？"]
SPACES = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b", "\u2029"]
QUOTES = ['"', "'", "“", "”", "«", "»", " » ", "「", "」", "(", ")", "*", "_"]
LETTERS = ["你", "好", "そ", "カ", "안", "ส", "ำ", "न", "म", "्", "ि", "م", "é", "e\u0301", "\u0301", "\u200d", "\ufe0f"]
SYMBOLS = ["🙂", "👍🏽", "👨\u200d👩\u200d👧\u200d👦", "🇩🇪", "🇫", "1️⃣", "\ud83d", "\ude00", "ᄀ", "ᅡ", "ᆨ"]
# fmt: on
FRAGMENTS = [*WORDS, *STOPS, *SPACES, *QUOTES, *LETTERS, *SYMBOLS]
TEXTS = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=60).map("".join),
    st.text(st.characters(exclude_categories=[]), max_size=60),
)
LIMITS = st.builds(
    lambda minimum, more, first: SplitLimits(minimum, minimum + more, first),
    st.integers(1, 30),
    st.integers(0, 40),
    st.integers(1, 40),
)
UNLIMITED = SplitLimits(min_characters=1, max_characters=10_000, first_min_characters=10_000)


def places(text: str, pieces: list[str]) -> list[tuple[int, int]]:
    """Where each piece begins and ends in the text, with only whitespace before and between them."""
    found, end = [], 0
    for piece in pieces:
        while text[end].isspace():
            end += 1
        assert text.startswith(piece, end)
        found.append((end, end + len(piece)))
        end += len(piece)
    return found


def has_word(text: str) -> bool:
    return any(character.isalnum() for character in text)


@given(TEXTS, LIMITS)
@settings(max_examples=500, deadline=None)
def test_pieces_are_the_text(text: str, limits: SplitLimits) -> None:
    pieces = split(text, limits)
    assert not text[max((end for _, end in places(text, pieces)), default=0) :].strip()
    assert "".join("".join(pieces).split()) == "".join(text.split())
    for piece in pieces:
        assert piece == piece.strip() != ""
        assert len(piece) <= limits.max_characters


@given(TEXTS, LIMITS, st.data())
@settings(max_examples=500, deadline=None)
def test_however_it_arrives(text: str, limits: SplitLimits, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    splitter = Splitter(limits)
    pieces = [piece for start, end in pairwise([0, *cuts, len(text)]) for piece in splitter.feed(text[start:end])]
    pieces += splitter.finish()
    assert pieces == split(text, limits)


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_a_piece_comes_with_the_next_words_first_character(text: str) -> None:
    splitter = Splitter(UNLIMITED)
    found = [(index, piece) for index, character in enumerate(text) for piece in splitter.feed(character)]
    pieces = [piece for _, piece in found] + splitter.finish()
    for (index, _), (_, end) in zip(found, places(text, pieces), strict=False):
        assert text[index].isalnum()
        assert not has_word(text[end:index])
    if has_word(text):
        assert all(map(has_word, pieces))


@given(TEXTS, LIMITS)
@settings(max_examples=300, deadline=None)
def test_no_more_is_held_than_two_pieces(text: str, limits: SplitLimits) -> None:
    splitter = Splitter(limits)
    pieces: list[str] = []
    for index, character in enumerate(text):
        pieces += splitter.feed(character)
        end = max((end for _, end in places(text, pieces)), default=0)
        assert len(text[end : index + 1].strip()) <= 2 * limits.max_characters


SENTENCES = st.lists(
    st.builds(
        lambda words, end: " ".join(words).capitalize() + end,
        st.lists(st.text("bcdfghklmnaeiou", min_size=5, max_size=9), min_size=1, max_size=6),
        st.sampled_from([".", "!", "?", '."', "?”", ".)", "!»", "?!", "... ?", ". 🙂"]),
    ),
    min_size=1,
    max_size=8,
)


@given(SENTENCES, st.sampled_from([" ", "  ", "\n", "\n\n"]))
@settings(max_examples=200, deadline=None)
def test_sentences_come_out_as_they_went_in(sentences: list[str], between: str) -> None:
    assert split(between.join(sentences), UNLIMITED) == sentences


@given(SENTENCES, st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_short_sentences_are_joined_with_the_next(sentences: list[str], minimum: int, first: int) -> None:
    expected = [""]
    for sentence in sentences:
        if len(expected[-1]) >= (min(minimum, first) if len(expected) == 1 else minimum):
            expected.append(sentence)
        else:
            expected[-1] = f"{expected[-1]} {sentence}".strip()
    assert split(" ".join(sentences), SplitLimits(minimum, 10_000, first)) == expected


CLUSTERS = st.sampled_from(
    [
        "🙂",
        "👍🏽",
        "👨‍👩‍👧‍👦",
        "🇩🇪",
        "e\u0301",
        "a\u0300\u0323",
        "नि",
        "한",
        "ᄀ\u1161\u11a8",
        "นำ",
        "กี่",
        "x",
        "क्ष",
        "好",
        "☝🏿",
        "❤️‍🔥",
        "🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    ]
)


@given(st.lists(CLUSTERS, max_size=80), st.integers(8, 20))
@settings(max_examples=300, deadline=None)
@example(["🇩🇪"] * 30, 9)
@example(["👨‍👩‍👧‍👦"] * 20, 12)
def test_no_cut_inside_of_a_grapheme_cluster(clusters: list[str], maximum: int) -> None:
    """A cluster has at most eight characters here, and none joins with the next: regex finds an end there too."""
    whole = set(accumulate(map(len, clusters)))
    text = "".join(clusters)
    assert whole <= set(accumulate(map(len, regex.findall(r"\X", text))))
    for _, cut in places(text, split(text, SplitLimits(1, maximum, maximum))):
        assert cut in whole


HOSTILE = {
    "dots": ".",
    "spaces": " ",
    "quotes": '"',
    "digits": "7",
    "letters": "a",
    "letters and dots": "a.",
    "initials": "A. ",
    "clauses": "a,b, ",
    "closing and opening": "a. » « ",
    "questions between spaces": "a ! ? ",
    "lines": "a\n",
    "blank lines": "\n \n",
    "windows lines": "a \r\n\t",
    "no-break spaces": "\u00a0",
    "ideographs": "好",
    "ideographic stops": "好。",
    "combining marks": "\u0301",
    "joiners": "\u200d",
    "families": "👨‍👩‍👧‍👦",
    "half a flag": "🇩",
    "jamo": "ᅡ",
    "surrogates": "\ud83d",
    "viramas": "न्",
}
# The default, and pieces so long that whatever is done anew for each of their characters is felt.
WORK_LIMITS = [SplitLimits(), SplitLimits(min_characters=1_200, max_characters=1_500)]
TIME_LIMITS = [SplitLimits(), SplitLimits(min_characters=40_000, max_characters=50_000)]


def calls(text: str, limits: SplitLimits) -> int:
    """How many functions are called, Python's and C's, to split a text that arrives character by character."""
    count = 0

    def profile(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    splitter = Splitter(limits)
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        for character in text:
            splitter.feed(character)
        splitter.finish()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("limits", WORK_LIMITS, ids=["default limits", "long pieces"])
@pytest.mark.parametrize("name", HOSTILE)
def test_work_is_linear(name: str, limits: SplitLimits) -> None:
    """Twice the text takes twice the calls, and not many a character, whatever stands before the repetition."""
    for start in ["", "Word. "]:
        text = HOSTILE[name] * (12_000 // len(HOSTILE[name]))
        half, whole = (calls(start + text[: len(text) // parts], limits) for parts in (2, 1))
        assert whole <= 2.3 * half
        assert whole <= 40 * len(text)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("start", ["", "a", "Word. "])
def test_hostile_text_is_not_held(name: str, start: str) -> None:
    limits = SplitLimits(min_characters=1, max_characters=50)
    text = start + HOSTILE[name] * 200
    splitter = Splitter(limits)
    pieces = splitter.feed(text)
    end = max((end for _, end in places(text, pieces)), default=0)
    assert len(text[end:].strip()) <= 2 * limits.max_characters
    splitter.finish()


@pytest.mark.parametrize("limits", TIME_LIMITS, ids=["default limits", "long pieces"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_of_100_000_characters(name: str, limits: SplitLimits) -> None:
    """Character by character: some 0.3 s where time is linear, much more where each character takes a look at all."""
    text = HOSTILE[name] * (100_000 // len(HOSTILE[name]))
    start = time.perf_counter()
    splitter = Splitter(limits)
    pieces = [piece for character in text for piece in splitter.feed(character)] + splitter.finish()
    assert time.perf_counter() - start < 10
    places(text, pieces)
    assert all(0 < len(piece) <= limits.max_characters for piece in pieces)


def test_a_megabyte_character_by_character() -> None:
    text = "It was a long text, said Dr. Smith, with many clauses: e.g. this one. And “another”! " * 12_000
    start = time.perf_counter()
    splitter = Splitter()
    pieces = [piece for character in text for piece in splitter.feed(character)] + splitter.finish()
    assert time.perf_counter() - start < 60
    assert len(text) > 1_000_000
    assert pieces[1:4] == [
        "said Dr. Smith, with many clauses: e.g. this one.",
        "And “another”! It was a long text, said Dr. Smith, with many clauses: e.g. this one.",
        "And “another”! It was a long text, said Dr. Smith, with many clauses: e.g. this one.",
    ]
