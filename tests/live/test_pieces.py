"""Text that arrives in pieces and text of any length: the speech of the whole text, and it begins before the end."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aloud import Audio, Engine, Guards, LiveSpeech, Runtime, Sampling, errors
from aloud.conversation import Conversation
from aloud.engine.loop import Loop
from aloud.engine.stream import Stream
from aloud.models.csm import Csm, CsmState
from aloud.request import Prompt
from aloud.text.split import split
from aloud.utterance import Manner, Utterance, Want
from live.afresh import Transcript, codes_of, never_ending, said_afresh, samples_of
from live.quick import QuickSteps, quick_runtime, until
from oracle import csm as oracle
from scripted import CODEBOOKS, CONFIG, FRAME_RATE, ScriptedModel, runtime_of

LIMIT_SECONDS = 20.0
"""How long anything may be waited for."""
TEXT = (
    "Well, good morning, my friend. How are you today? I have read your letter; it was long, and it made me laugh. "
    '"Come at once!" you wrote. Mr. Smith came on May 3, 1999, at 10:30.\n\nAnd so did I.'
)
SCRIPTS = {
    "german": "Guten Tag, Herr Dr. Müller. Wie geht’s? Am 3. Mai fahre ich z. B. nach Köln.",
    "french": "Bonjour ! Comment allez-vous ? « Très bien », dit-elle.",
    "spanish": "¿Qué tal? ¡Muy bien! El Sr. Pérez llegó a las 10:30.",
    "greek": "Καλημέρα. Τι κάνεις; Είμαι καλά, ευχαριστώ.",
    "russian": "Здравствуйте, друзья. Как дела? Хорошо, спасибо.",
    "chinese": "你好，世界。今天天气很好！我们去公园吧？",
    "japanese": "こんにちは。「元気ですか？」と聞いた。はい、元気です。",
    "korean": "안녕하세요. 오늘은 날씨가 좋네요! 어디로 갈까요?",
    "arabic": "مرحبا، كيف حالك؟ أنا بخير، شكرا. إلى اللقاء.",
    "hebrew": "שלום, מה שלומך? אני בסדר. תודה רבה!",
    "hindi": "नमस्ते। आप कैसे हैं? मैं ठीक हूँ, धन्यवाद।",
    "thai": "สวัสดีครับ วันนี้อากาศดีมาก ไปเที่ยวกันไหม",
    "emoji": "Well done! 🎉👩‍👩‍👧 That was great 👍🏽. Bye!",
    "combining": "Cafe\u0301, s\u0327a va? Zalg\u0335o\u0338 comes.",
}
# Four frames of each piece, whatever its text.
FOUR_FRAMES = Guards(text_seconds=0.31, text_seconds_per_byte=1e-9, silence_seconds=None, repeat_seconds=None)
SAMPLING = Sampling(temperature=0.9, top_k=20, depth_temperature=0.8, depth_top_k=10)


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Over a small model with a context of 256 positions."""
    seed: int = request.config.getoption("--seed")
    config = oracle.small_config(codebooks=3, layers=1, rope=oracle.LLAMA3, positions=256)
    folder = oracle.save(oracle.random_model(config, seed), tmp_path_factory.mktemp("checkpoint"))
    runtime = never_ending(Runtime.load(folder, device="cpu"), SAMPLING, max_streams=2)
    with Engine(runtime) as made:
        yield made


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of all streams of the model, in order."""
    seeds: list[int] = []
    start = Csm.start

    def noted(self: Csm, state: CsmState, slot: int, sampling: Sampling, seed: int, positions: int) -> None:
        seeds.append(seed)
        start(self, state, slot, sampling, seed, positions)

    monkeypatch.setattr(Csm, "start", noted)
    return seeds


@pytest.fixture
def quick() -> Iterator[Engine]:
    """Over two slots of a model whose codes depend on all that it has read, and that costs next to nothing."""
    with Engine(quick_runtime(QuickSteps(2), 2)) as made:
        yield made


async def arriving(parts: Iterable[str]) -> AsyncIterator[str]:
    """Parts of a text, one at a time, with others having their turn between them."""
    for part in parts:
        await asyncio.sleep(0)
        yield part


async def heard(speech: LiveSpeech) -> list[Audio]:
    async def all_of() -> list[Audio]:
        return [chunk async for chunk in speech]

    return await asyncio.wait_for(all_of(), LIMIT_SECONDS)


def cut(text: str, places: Iterable[int]) -> list[str]:
    """A text in parts, cut at some places, of which some may be the same."""
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(edges)]


def words(text: str) -> list[str]:
    return [word + " " for word in text.split(" ")]


def assert_same(chunks: Sequence[Audio], expected: Sequence[Audio]) -> None:
    """Bit for bit, chunk by chunk."""
    assert len(chunks) == len(expected)
    np.testing.assert_array_equal(codes_of(chunks), codes_of(expected))
    assert samples_of(chunks).tobytes() == samples_of(expected).tobytes()


# --- the speech of the whole text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts_of",
    [lambda text: [text], words, list, lambda text: ["", *cut(text, [40]), "", " "], split],
    ids=["whole", "words", "characters", "empty-parts", "sentences"],
)
def test_pieces_say_what_the_whole_text_says(engine: Engine, parts_of: Callable[[str], list[str]], seed: int) -> None:
    manner = {"seed": seed, "guards": FOUR_FRAMES, "pace": "full"}
    expected = list(engine.stream(TEXT, **manner))  # type: ignore[arg-type]
    assert len(expected) == 4 * len(split(TEXT)) == 24
    parts = parts_of(TEXT) if parts_of is not split else [f"{piece} " for piece in split(TEXT)]
    text = "".join(parts).rstrip()
    if parts_of is split:
        expected = list(engine.stream(text, **manner))  # type: ignore[arg-type]
    assert_same(list(engine.stream(parts, **manner)), expected)  # type: ignore[arg-type]
    assert_same(asyncio.run(heard(engine.stream(arriving(parts), **manner))), expected)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([TEXT, *SCRIPTS.values(), " ".join(SCRIPTS.values())]),
    st.lists(st.integers(0, 10_000), max_size=30),
    st.integers(0, 2**64 - 1),
    st.sampled_from(["realtime", "full"]),
)
def test_any_cutting_says_the_same(text: str, places: list[int], seed: int, pace: str) -> None:
    parts = cut(text, places)
    assert "".join(parts) == text
    with Engine(quick_runtime(QuickSteps(2), 2)) as engine:
        expected = list(engine.stream(text, seed=seed, pace="full"))
        assert_same(list(engine.stream(iter(parts), seed=seed, pace="full")), expected)
        # A long lead, so that real time does not cost any.
        live = engine.stream(arriving(parts), seed=seed, pace=pace, lead_seconds=60)  # type: ignore[arg-type]
        assert_same(asyncio.run(heard(live)), expected)


def test_each_piece_is_conditioned_on_the_pieces_before(engine: Engine, started: list[int], seed: int) -> None:
    """As turns of the same speaker: the prompt of each is written by hand, and said by a fresh loop."""
    text = "Good morning, my friend. How are you today? I have read your letter."
    spoken = list(engine.stream(text, speaker=3, seed=seed, guards=FOUR_FRAMES, pace="full"))
    seeds = list(started)
    pieces = ["Good morning,", "my friend. How are you today?", "I have read your letter."]
    assert len(seeds) == len(pieces)
    transcript = Transcript(engine.runtime)
    for number, (piece, piece_seed) in enumerate(zip(pieces, seeds, strict=True)):
        codes, _ = said_afresh(engine.runtime, transcript.prompt(piece, 3), SAMPLING, piece_seed, 4)
        np.testing.assert_array_equal(codes_of(spoken[4 * number : 4 * number + 4]), codes)
        transcript.add(3, piece, codes)


def test_one_sentence_is_what_the_runtime_says(engine: Engine, seed: int) -> None:
    expected = engine.runtime.speak("Good morning.", seed=seed, max_seconds=0.4)
    spoken = list(engine.stream(["Good ", "morning."], seed=seed, max_seconds=0.4, pace="full"))
    np.testing.assert_array_equal(codes_of(spoken), expected.codes)
    assert samples_of(spoken).tobytes() == expected.samples.tobytes()


@pytest.mark.parametrize("script", SCRIPTS)
def test_text_in_every_script_is_spoken(engine: Engine, script: str, seed: int) -> None:
    text = SCRIPTS[script]
    session = engine.session(guards=FOUR_FRAMES)
    spoken = list(session.stream(list(text), seed=seed, pace="full"))
    pieces = split(text)
    assert len(spoken) == 4 * len(pieces)
    assert session.stats.turns + session.stats.dropped_turns == len(pieces)
    # What was read of each piece is the piece: its tokens without those around it, turned back into text.
    read = b"".join(_text_of(engine.runtime, turn) for turn in session.turns).decode()
    assert read == "".join(f"[0]{piece}" for piece in pieces[session.stats.dropped_turns :])


def _text_of(runtime: Runtime, turn: Prompt) -> bytes:
    tokens = turn.text_tokens[turn.text_tokens >= 0].tolist()
    assert (tokens[0], tokens[-1]) == (runtime.tokenizer.begin, runtime.tokenizer.end)
    return str(runtime.tokenizer._tokenizer.decode(tokens[1:-1])).encode()


# --- before the end of the text ---------------------------------------------------------------------------------------


def test_first_audio_comes_before_the_last_piece_is_sent(engine: Engine, seed: int) -> None:
    """An LLM that stops after the first clause until it has been heard."""

    async def speak() -> list[str]:
        happened: list[str] = []
        was_heard = asyncio.Event()

        async def llm() -> AsyncIterator[str]:
            yield "Well, good morning, "
            yield "my "  # with the next word's first letter, the clause is certain
            await was_heard.wait()
            happened.append("rest")
            yield "friend. How are you?"

        speech = engine.stream(llm(), seed=seed, guards=FOUR_FRAMES)
        async for _ in speech:
            happened.append("chunk")
            was_heard.set()
        return happened

    happened = asyncio.run(asyncio.wait_for(speak(), LIMIT_SECONDS))
    assert happened[0] == "chunk"
    assert "rest" in happened
    assert happened.count("chunk") == 4 * len(split("Well, good morning, my friend. How are you?")) == 8


@pytest.mark.parametrize("driver", ["for", "async-for"])
def test_an_iterator_is_asked_for_more_only_when_what_it_gave_was_said(engine: Engine, driver: str, seed: int) -> None:
    happened: list[str] = []

    def llm() -> Iterator[str]:
        for part in ("Well, good morning, ", "my ", "friend. ", "How are you? ", "Fine."):
            happened.append(part)
            yield part

    speech = engine.stream(llm(), seed=seed, guards=FOUR_FRAMES, pace="full")
    if driver == "for":
        for _ in speech:
            happened.append("chunk")
    else:

        async def listen() -> None:
            async for _ in speech:
                happened.append("chunk")

        asyncio.run(listen())
    # Three pieces: cut where the next word begins.
    said = ["chunk"] * 4
    assert happened == [
        "Well, good morning, ",
        "my ",
        *said,
        "friend. ",
        "How are you? ",
        "Fine.",
        *said,
        *said,
    ]


def test_pieces_come_while_others_are_said(engine: Engine, seed: int) -> None:
    """The text is taken in while speech is made, not only between the pieces."""

    async def speak() -> tuple[int, int]:
        taken: list[str] = []

        async def llm() -> AsyncIterator[str]:
            for part in words(TEXT):
                taken.append(part)
                yield part

        speech = engine.stream(llm(), seed=seed, guards=FOUR_FRAMES)
        await anext(speech)
        at_first = len(taken)
        for _ in range(3):  # of the first piece, too
            await asyncio.sleep(0.02)
            await anext(speech)
        speech.cancel()
        return at_first, len(taken)

    at_first, later = asyncio.run(asyncio.wait_for(speak(), LIMIT_SECONDS))
    assert 4 <= at_first <= later


# --- texts that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [[], [""], ["", "  ", "\n\n"], [" "] * 3], ids=["none", "empty", "blank", "spaces"])
@pytest.mark.parametrize("driver", ["for", "async-for"])
def test_a_text_that_ends_without_a_word(quick: Engine, parts: Iterable[str], driver: str) -> None:
    parts = list(parts)
    speech = quick.stream(arriving(parts) if driver == "async-for" else iter(parts))
    with pytest.raises(errors.TextEmpty, match=r"^There is no text to say\. Give at least one letter\.$"):
        asyncio.run(heard(speech)) if driver == "async-for" else list(speech)
    assert speech.finish_reason == "error"
    assert quick.stats().accepted == 0


@pytest.mark.parametrize(
    ("parts", "kind"),
    [([5], "int"), (["Hello there. ", "And ", None], "NoneType"), (b"Hello.", "int"), ([["Hi."]], "list")],
    ids=["number", "none-later", "bytes", "list"],
)
@pytest.mark.parametrize("driver", ["for", "async-for"])
def test_parts_that_are_no_strings(quick: Engine, parts: Iterable[str], kind: str, driver: str) -> None:
    speech = quick.stream(arriving(parts) if driver == "async-for" else iter(parts), pace="full")
    with pytest.raises(errors.RequestError, match=rf"^Parts of a text are strings, got {kind}\.$"):
        asyncio.run(heard(speech)) if driver == "async-for" else list(speech)
    assert speech.finish_reason == "error"
    assert list_after(speech, driver) == []
    assert quick.drain_sync(LIMIT_SECONDS)
    assert quick.stats().slots_used == 0


def list_after(speech: LiveSpeech, driver: str) -> list[Audio]:
    return asyncio.run(heard(speech)) if driver == "async-for" else list(speech)


@pytest.mark.parametrize("driver", ["for", "async-for"])
def test_a_part_that_is_half_a_character(quick: Engine, driver: str) -> None:
    parts = ["Hello there, my dear. ", "It is \ud83d", "\ude00 fine."]
    speech = quick.stream(arriving(parts) if driver == "async-for" else iter(parts), pace="full")
    with pytest.raises(errors.RequestError, match=r"half of a character or a byte that is not UTF-8"):
        asyncio.run(heard(speech)) if driver == "async-for" else list(speech)
    assert speech.finish_reason == "error"


@pytest.mark.parametrize("wrong", [None, 5, object()], ids=["none", "number", "object"])
def test_a_text_that_is_neither_string_nor_iterator(quick: Engine, wrong: object) -> None:
    with pytest.raises(errors.RequestError, match=rf"a string or an iterator of strings, got {type(wrong).__name__}"):
        quick.stream(wrong)  # type: ignore[arg-type]


# --- iterators that fail or are left ----------------------------------------------------------------------------------


class Broken(Exception):
    """What an LLM's client raises."""


@pytest.mark.parametrize("driver", ["for", "async-for"])
@pytest.mark.parametrize("after", [0, 1, 4], ids=lambda after: f"after-{after}")
def test_what_an_iterator_raises_reaches_the_listener(quick: Engine, after: int, driver: str, seed: int) -> None:
    parts = words("Well, good morning, my friend. How are you today? I am fine.")
    broken = Broken("the connection was lost")

    def failing() -> Iterator[str]:
        yield from parts[:after]
        raise broken

    async def failing_later() -> AsyncIterator[str]:
        for part in failing():
            yield part

    session = quick.session()
    received: list[Audio] = []
    speech = session.stream(failing_later() if driver == "async-for" else failing(), seed=seed, pace="full")

    async def listen() -> None:
        async for chunk in speech:
            received.append(chunk)

    with pytest.raises(Broken) as raised:  # noqa: PT012
        if driver == "async-for":
            asyncio.run(asyncio.wait_for(listen(), LIMIT_SECONDS))
        else:
            received += speech
    assert raised.value is broken
    assert speech.finish_reason == "error"
    # What was handed out before is context, and the session goes on.
    assert sum(int((turn.text_tokens < 0).sum()) for turn in session.turns) == (len(received) + 1 if received else 0)
    assert len(list(session.stream("Sorry.", seed=seed, pace="full"))) > 0
    assert quick.drain_sync(LIMIT_SECONDS)
    assert quick.stats().slots_used == 0


def test_an_iterator_that_is_waited_for_is_cancelled_with_its_speech(quick: Engine, seed: int) -> None:
    async def leave() -> list[str]:
        happened: list[str] = []

        async def llm() -> AsyncIterator[str]:
            try:
                yield "Well, good morning, my friend. "
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                happened.append("cancelled")
                raise
            finally:
                happened.append("closed")

        async with quick.stream(llm(), seed=seed, pace="full") as speech:
            await anext(speech)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(heard(speech), 0.2)
        await others_go_on()
        return happened

    assert asyncio.run(leave()) == ["cancelled", "closed"]


def test_an_iterator_that_is_not_waited_for_is_left_alone(quick: Engine, seed: int) -> None:
    """It may be read further: by who wants to show the words that nobody heard."""

    def rest_of(parts: Iterator[str]) -> list[str]:
        speech = quick.stream(parts, seed=seed, pace="full")
        next(speech)
        speech.cancel()
        return list(parts)

    assert rest_of(iter(words("Well, good morning, my friend."))) == ["friend. "]
    assert rest_of(word for word in words("Well, good morning, my friend.")) == ["friend. "]

    async def rest_of_an_async_one() -> list[str]:
        parts = arriving(words("Well, good morning, my friend."))
        speech = quick.stream(parts, seed=seed, pace="full")
        speech.cancel()  # before it began
        return [part async for part in parts]

    assert len(asyncio.run(rest_of_an_async_one())) == 5


def test_an_iterator_that_is_no_generator_can_be_read_on(quick: Engine, seed: int) -> None:
    """Waiting for its next part was cancelled, and it lost none."""

    class Words:
        """An LLM's answer, as its client puts it into a queue."""

        def __init__(self) -> None:
            self.queue: asyncio.Queue[str] = asyncio.Queue()

        def __aiter__(self) -> AsyncIterator[str]:
            return self

        async def __anext__(self) -> str:
            return await self.queue.get()

    async def rest() -> list[str]:
        llm = Words()
        llm.queue.put_nowait("Well, good morning, my friend. ")
        speech = quick.stream(llm, seed=seed, pace="full")
        await anext(speech)
        await others_go_on()
        speech.cancel()
        await others_go_on()
        llm.queue.put_nowait("Are you there?")
        await others_go_on()
        return [await anext(llm)]

    assert asyncio.run(asyncio.wait_for(rest(), LIMIT_SECONDS)) == ["Are you there?"]


@pytest.mark.parametrize("way", ["length", "cancel", "close"])
def test_no_task_is_left_behind(quick: Engine, way: str, seed: int) -> None:
    """However speech ends before its text does, nobody waits for the text any more."""
    talking = Engine(runtime_of(ScriptedModel())) if way == "close" else quick  # it talks until it is closed

    async def speak() -> set[asyncio.Task[object]]:
        async def llm() -> AsyncIterator[str]:
            yield "Well, good morning, my friend. How are you? "
            await asyncio.sleep(3600)
            yield "Never."

        bound = 0.08 if way == "length" else None
        speech = talking.stream(llm(), seed=seed, max_seconds=bound, guards=Guards.off(), pace="full")
        await anext(speech)
        if way == "length":
            assert await heard(speech) == []
            assert speech.finish_reason == "length"
        elif way == "cancel":
            speech.cancel()
        else:
            await asyncio.to_thread(talking.close)
            with pytest.raises(errors.EngineClosed):
                await heard(speech)
        await others_go_on()
        task = asyncio.current_task()
        return {other for other in asyncio.all_tasks() if other is not task}

    assert asyncio.run(speak()) == set()


async def others_go_on() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


# --- long text --------------------------------------------------------------------------------------------------------


def test_a_long_text_runs_through_a_small_context(engine: Engine, seed: int) -> None:
    """2,000 words on 256 positions: the oldest pieces are dropped, the speech goes on."""
    random = np.random.default_rng(seed)
    vocabulary = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "12", "wolves", "follow"]
    sentences = []
    while sum(map(len, sentences)) < 2000:
        sentences.append([str(word) for word in random.choice(vocabulary, random.integers(8, 26))])
    text = " ".join(" ".join(sentence).capitalize() + "." for sentence in sentences)
    assert len(text.split()) >= 2000
    two_frames = Guards(text_seconds=0.15, text_seconds_per_byte=1e-9, silence_seconds=None, repeat_seconds=None)
    session = engine.session(guards=two_frames)
    spoken = list(session.stream(words(text), seed=seed, pace="full"))
    pieces = split(text)
    assert len(spoken) == 2 * len(pieces)
    stats = session.stats
    assert stats.positions <= 256 + 2  # the last frame and the end frame are read by the next piece
    assert stats.turns + stats.dropped_turns == len(pieces)
    assert 1 < stats.turns < 40
    assert stats.rebuilds > 10
    kept = b"".join(_text_of(engine.runtime, turn) for turn in session.turns).decode()
    assert kept == "".join(f"[0]{piece}" for piece in pieces[stats.dropped_turns :])
    assert engine.stats().slots_used == 0


def test_max_seconds_bounds_the_whole(engine: Engine, seed: int) -> None:
    for max_seconds, frames in ((0.16, 2), (0.8, 10), (0.96, 12)):
        speech = engine.stream(TEXT, seed=seed, guards=FOUR_FRAMES, max_seconds=max_seconds, pace="full")
        assert len(list(speech)) == frames
        assert speech.finish_reason == "length"
    speech = engine.stream(TEXT, seed=seed, guards=FOUR_FRAMES, max_seconds=60, pace="full")
    assert len(list(speech)) == 24
    assert speech.finish_reason == "text_length"


def test_max_seconds_bounds_a_text_that_never_ends(quick: Engine, seed: int) -> None:
    def talk() -> Iterator[str]:
        while True:
            yield "And so on. "

    speech = quick.stream(talk(), seed=seed, max_seconds=20, pace="full")
    assert len(list(speech)) == 250
    assert speech.finish_reason == "length"


def test_seeds_of_pieces_are_stable_and_differ(engine: Engine, started: list[int], seed: int) -> None:
    for _ in range(2):
        list(engine.stream(TEXT, seed=seed, guards=FOUR_FRAMES, pace="full"))
    first, second = started[:6], started[6:]
    assert first == second
    assert first[0] == seed
    assert len(set(first)) == 6
    assert all(0 <= piece < 2**64 for piece in first)
    # Whoever counts his seeds up meets none of another's pieces.
    started.clear()
    list(engine.stream(TEXT, seed=seed + 1, guards=FOUR_FRAMES, pace="full"))
    assert not set(started) & set(first)
    started.clear()
    list(engine.stream(TEXT, seed=2**64 - 1, guards=FOUR_FRAMES, pace="full"))
    assert all(0 <= piece < 2**64 for piece in started)


def test_a_seed_that_nobody_gave_is_on_every_chunk(engine: Engine) -> None:
    speech = engine.stream(TEXT, guards=FOUR_FRAMES, pace="full")
    chunks = list(speech)
    assert {chunk.seed for chunk in chunks} == {speech.seed}
    assert_same(list(engine.stream(TEXT, guards=FOUR_FRAMES, seed=speech.seed, pace="full")), chunks)


# --- real time --------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


class Played:
    """An utterance in real time, over a loop of one slot whose frames take 4 ms of virtual time."""

    def __init__(self, seed: int, lead_seconds: float) -> None:
        self.clock = Clock()
        steps = QuickSteps(1)
        steps.before_launch = lambda: self.clock.pass_by(0.004)
        self.loop = Loop(steps, 1, FRAME_RATE, clock=self.clock)
        codec: SimpleNamespace = CONFIG.codec
        self.utterance = Utterance(
            self.loop,
            codec,  # type: ignore[arg-type]
            Conversation(CONFIG, None, 2048),  # type: ignore[arg-type]
            Manner(Sampling(), seed, Guards.off(), None, lead_seconds),
            _bytes_prompt,
            keeps_context=False,
            clock=self.clock,
        )
        self.arrived: list[float] = []

    def listen(self, until: Want) -> None:
        """Take each chunk when it is there, until the utterance wants something else."""
        for _ in range(100_000):
            step = self.utterance.advance()
            if isinstance(step, Audio):
                self.arrived.append(self.clock.now)
            elif isinstance(step, Stream):
                pause = self.loop.step()
                assert pause is not None
                self.clock.pass_by(pause)
            else:
                assert step is until
                return
        raise AssertionError("it does not end")


def _bytes_prompt(piece: str) -> Prompt:
    tokens = torch.tensor(list(piece.encode()))
    return Prompt(tokens, torch.zeros(len(tokens), CODEBOOKS, dtype=torch.int64))


@pytest.mark.parametrize("lead_seconds", [0.24, 0.4, 1.0])
def test_the_lead_of_all_pieces_together_is_that_of_one(lead_seconds: float, seed: int) -> None:
    """However many pieces: speech is never later than it is played, and no more than a frame beyond the lead early."""
    played = Played(seed, lead_seconds)
    played.utterance.feed("This is one of many sentences that follow. " * 60)
    played.utterance.finish_text()
    played.listen(Want.NOTHING)
    arrived = np.array(played.arrived)
    assert len(arrived) > 200
    lead = np.arange(1, len(arrived) + 1) / FRAME_RATE - (arrived - arrived[0])
    assert lead.max() <= lead_seconds + 1 / FRAME_RATE + 1e-9
    assert lead.min() >= 1 / FRAME_RATE - 1e-9  # each was there when it was to be played
    assert np.median(lead) >= lead_seconds / 2
    assert played.utterance.lateness_seconds == 0.0


def test_who_is_slow_to_write_makes_no_frame_late(seed: int) -> None:
    """When all that there was has been played, playing begins anew with what comes next, with its lead."""
    played = Played(seed, 0.4)
    for _ in range(5):
        before = len(played.arrived)
        played.utterance.feed("This is one of many sentences that follow. " * 2 + "And ")
        played.listen(Want.TEXT)
        arrived = np.array(played.arrived[before:])
        assert len(arrived) > 1
        lead = np.arange(1, len(arrived) + 1) / FRAME_RATE - (arrived - arrived[0])
        assert 1 / FRAME_RATE - 1e-9 <= lead.min() <= lead.max() <= 0.4 + 1 / FRAME_RATE + 1e-9
        played.clock.pass_by(30.0)
    statistics = played.loop.scheduler.statistics()
    assert statistics.realtime_frames >= len(played.arrived)  # ends are frames as well
    assert statistics.late_frames == 0
    assert played.utterance.lateness_seconds == 0.0


def test_a_slow_text_does_not_hold_the_slot(quick: Engine, seed: int) -> None:
    """While an LLM thinks between two sentences, others use the slots."""

    async def speak() -> None:
        thought = asyncio.Event()

        async def llm() -> AsyncIterator[str]:
            yield "Well, good morning. I "
            await thought.wait()
            yield "think so."

        first = quick.stream(llm(), seed=seed, pace="full")
        task = asyncio.create_task(heard(first))
        while quick.stats().finished < 1:
            await asyncio.sleep(0.001)
        assert quick.stats().slots_used == 0
        others = [quick.stream("Others speak.", seed=seed + number, pace="full") for number in range(4)]
        for speech in await asyncio.gather(*(heard(other) for other in others)):
            assert len(speech) > 0
        thought.set()
        expected = list(quick.stream("Well, good morning. I think so.", seed=seed, pace="full"))
        assert_same(await task, expected)

    asyncio.run(asyncio.wait_for(speak(), LIMIT_SECONDS))


def test_a_sync_text_may_block_in_another_thread(quick: Engine, seed: int) -> None:
    """The first chunk comes while the text's iterator has not given its second sentence."""
    was_heard = threading.Event()
    received: list[Audio] = []

    def llm() -> Iterator[str]:
        yield "Well, good morning. I "
        assert was_heard.wait(LIMIT_SECONDS)
        yield "think so."

    def listen() -> None:
        for chunk in quick.stream(llm(), seed=seed, pace="full"):
            received.append(chunk)

    thread = threading.Thread(target=listen)
    thread.start()
    until(lambda: bool(received) or not thread.is_alive(), LIMIT_SECONDS)
    assert len(received) > 0
    was_heard.set()
    thread.join(LIMIT_SECONDS)
    assert_same(received, list(quick.stream("Well, good morning. I think so.", seed=seed, pace="full")))


def test_texts_that_block_keep_no_other_from_being_spoken(quick: Engine, seed: int) -> None:
    """More of them than the event loop lends threads."""

    async def speak() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        thought = threading.Event()
        where = contextvars.ContextVar("where", default="nowhere")
        seen: list[str] = []

        def llm() -> Iterator[str]:
            yield "Well, good morning. I "
            assert thought.wait(LIMIT_SECONDS)
            seen.append(where.get())
            yield "think so."

        where.set("here")
        blocked = [asyncio.create_task(heard(quick.stream(llm(), seed=seed, pace="full"))) for _ in range(5)]
        while quick.stats().finished < 5:
            await asyncio.sleep(0.001)
        before = threading.active_count()
        assert len(await heard(quick.stream(iter(["Others ", "speak."]), seed=seed, pace="full"))) > 0
        thought.set()
        expected = list(quick.stream("Well, good morning. I think so.", seed=seed, pace="full"))
        for chunks in await asyncio.gather(*blocked):
            assert_same(chunks, expected)
        assert seen == ["here"] * 5
        while threading.active_count() > before - 5:  # their threads end with them
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(speak(), LIMIT_SECONDS))


def test_a_text_that_is_cancelled_as_it_is_asked_for_is_just_over(quick: Engine, seed: int) -> None:
    async def speak() -> None:
        speech = quick.stream(iter(["Well, good morning."]), seed=seed, pace="full")
        submit = ThreadPoolExecutor.submit

        def cancelled(executor: ThreadPoolExecutor, *work: Any, **given: Any) -> object:
            thread = threading.Thread(target=speech.cancel)
            thread.start()
            thread.join(LIMIT_SECONDS)
            return submit(executor, *work, **given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ThreadPoolExecutor, "submit", cancelled)
            assert await heard(speech) == []
        assert speech.finish_reason == "cancelled"

    asyncio.run(asyncio.wait_for(speak(), LIMIT_SECONDS))
