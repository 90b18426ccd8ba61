"""Sessions: a turn reads only what is new in it, and says what a fresh prompt of the whole conversation says."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from aloud import Audio, Engine, Guards, LiveSpeech, Runtime, Sampling, Segment, Session, Voice, errors
from aloud.models.csm import Csm, CsmState
from aloud.prompt_block import PromptBlock
from aloud.request import Prompt
from aloud.text.csm import Turn, build_prompt, turn_text
from live.afresh import Transcript, codes_of, never_ending, said_afresh, samples_of
from live.quick import Held, QuickSteps, quick_runtime, run
from oracle import csm as oracle
from scripted import END, ByteTokenizer, ScriptedModel, prompt_positions, runtime_of, said

POSITIONS = 150
SAMPLING = Sampling(temperature=0.9, top_k=20, depth_temperature=0.8, depth_top_k=10)


@dataclass
class Made:
    """A model, an engine over two slots of it, and a voice."""

    runtime: Runtime
    engine: Engine
    voice: Voice
    voice_segments: list[Segment]

    def session(self, voice: Voice | None = None) -> Session:
        return self.engine.session(voice=voice, speaker=1)


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    seed: int = request.config.getoption("--seed")
    config = oracle.small_config(codebooks=3, layers=1, rope=oracle.LLAMA3, positions=POSITIONS)
    folder = oracle.save(oracle.random_model(config, seed), tmp_path_factory.mktemp("checkpoint"))
    runtime = never_ending(Runtime.load(folder, device="cpu"), SAMPLING, max_streams=2)
    segments = [Segment("Hi there.", oracle.speech_like(1.3, seed), 1)]
    with Engine(runtime) as engine:
        yield Made(runtime, engine, runtime.voice(segments), segments)


@pytest.fixture
def read_positions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions of prompts each prefill pass read."""
    passes: list[int] = []
    prefill = Csm.prefill

    def counted(self: Csm, state: CsmState, block: PromptBlock) -> None:
        passes.append(int((block.slots != state.position.shape[0] - 1).sum()))
        prefill(self, state, block)

    monkeypatch.setattr(Csm, "prefill", counted)
    return passes


def same_turns(turns: Sequence[Prompt], others: Sequence[Prompt]) -> bool:
    return len(turns) == len(others) and all(
        torch.equal(turn.text_tokens, other.text_tokens) and torch.equal(turn.codes, other.codes)
        for turn, other in zip(turns, others, strict=True)
    )


def say(session: Session, text: str, seed: int, frames: int) -> list[Audio]:
    return list(session.stream(text, seed=seed, max_seconds=frames * 0.08, pace="full"))


# --- what a turn reads, and what it says ------------------------------------------------------------------------------


@pytest.mark.parametrize("with_voice", [False, True], ids=["no-voice", "voice"])
def test_a_turn_reads_only_what_is_new(made: Made, read_positions: list[int], with_voice: bool, seed: int) -> None:
    session = made.session(made.voice if with_voice else None)
    tokenizer = made.runtime.tokenizer
    before = made.engine.stats().prefill_positions
    for number, text in enumerate(("Hello.", "And how are you?", "Fine.")):
        read_positions.clear()
        say(session, text, seed + number, 5)
        # Of the turn before: the last frame, which no step has read, and the end frame behind it.
        new = len(turn_text(tokenizer, 1, text)) + (2 if number else 0)
        assert read_positions == [new]
    session.hear_sync("I see.")
    assert read_positions[1:] == [2 + len(turn_text(tokenizer, 1, "I see."))]
    assert session.stats.cached_positions == session.stats.positions
    read_positions.clear()
    say(session, "Bye.", seed, 2)
    assert read_positions == [len(turn_text(tokenizer, 1, "Bye."))]
    counted = sum(
        len(turn_text(tokenizer, 1, text)) for text in ("Hello.", "And how are you?", "Fine.", "I see.", "Bye.")
    )
    assert made.engine.stats().prefill_positions - before == counted + 3 * 2


def test_behind_a_turn_that_ended_by_itself_only_its_end_frame_is_read(seed: int) -> None:
    model = ScriptedModel({seed: [said(5), said(6), END], seed + 1: [said(7), END]})
    with Engine(runtime_of(model)) as engine:
        session = engine.session()
        assert len(list(session.stream("Hello.", seed=seed))) == 2
        before = engine.stats().prefill_positions
        assert session.stats.positions == session.stats.cached_positions + 1
        assert len(list(session.stream("Yes?", seed=seed + 1))) == 1
        assert engine.stats().prefill_positions - before == 1 + prompt_positions("Yes?")
        assert engine.stats().prefix_hits == 1


@pytest.mark.parametrize("with_voice", [False, True], ids=["no-voice", "voice"])
def test_turns_say_what_a_fresh_prompt_of_all_before_says(made: Made, with_voice: bool, seed: int) -> None:
    """The prompt is built by hand, without a cache: the voice's audio, what was heard and what was said."""
    runtime = made.runtime
    session = made.session(made.voice if with_voice else None)
    transcript = Transcript(runtime)
    if with_voice:
        for segment in made.voice_segments:
            assert segment.audio is not None
            transcript.add(segment.speaker, segment.text, runtime.encode(segment.audio))
    question = oracle.speech_like(0.9, seed + 1)

    def speak(text: str, number: int, frames: int) -> None:
        codes = codes_of(say(session, text, seed + number, frames))
        assert codes.shape == (frames, 3)
        expected, _ = said_afresh(runtime, transcript.prompt(text), SAMPLING, seed + number, frames)
        np.testing.assert_array_equal(codes, expected)
        transcript.add(1, text, codes)

    speak("Hello.", 0, 7)
    session.hear_sync("How are you?", question, speaker=2)
    transcript.add(2, "How are you?", runtime.encode(question))
    speak("Fine, thank you.", 1, 6)
    speak("And you?", 2, 1)
    session.hear_sync("Never better.")
    session.hear_sync("Why?", speaker=3)
    transcript.add(1, "Never better.", None)
    transcript.add(3, "Why?", None)
    speak("Good.", 3, 5)
    assert session.stats.dropped_turns == 0
    assert session.stats.turns == 7


def test_each_turn_may_have_sampling_of_its_own(made: Made, seed: int) -> None:
    """What it leaves out is the session's, and what the session leaves out is the model's.

    What is given for the whole goes for both decoders, as everywhere.
    """
    session = made.engine.session(speaker=1, temperature=0.7, depth_temperature=0.6)
    of_session = replace(SAMPLING, temperature=0.7, depth_temperature=0.6)
    every = Sampling(temperature=1.3, top_k=40, depth_temperature=1.1, depth_top_k=30)
    transcript = Transcript(made.runtime)

    def say_with(given: dict[str, Any], expected: Sampling, number: int) -> None:
        chunks = list(session.stream("Well?", seed=seed + number, max_seconds=0.4, pace="full", **given))
        prompt = transcript.prompt("Well?")
        np.testing.assert_array_equal(
            codes_of(chunks), said_afresh(made.runtime, prompt, expected, seed + number, 5)[0], err_msg=str(given)
        )
        transcript.add(1, "Well?", codes_of(chunks))

    turns: list[tuple[dict[str, Any], Sampling]] = [
        (vars(every), every),
        ({"temperature": 0}, replace(of_session, temperature=0, depth_temperature=0)),
        ({"temperature": 0, "depth_temperature": 1.0}, replace(of_session, temperature=0, depth_temperature=1.0)),
        ({"depth_top_k": 3}, replace(of_session, depth_top_k=3)),
        ({}, of_session),
    ]
    for number, (given, expected) in enumerate(turns):
        say_with(given, expected, number)
    with pytest.raises(errors.SamplingInvalid):
        session.stream("Well?", temperature=-1.0)
    assert not session.is_busy
    again = made.engine.session(speaker=1, temperature=0.7, depth_temperature=0.6)
    whole = again.speak_sync("Well?", seed=seed, max_seconds=0.4, **vars(every))
    awaited = made.engine.session(speaker=1)
    other = asyncio.run(awaited.speak("Well?", seed=seed, max_seconds=0.4, **vars(every)))
    expected_codes, _ = said_afresh(made.runtime, Transcript(made.runtime).prompt("Well?"), every, seed, 5)
    np.testing.assert_array_equal(whole.codes, expected_codes)
    np.testing.assert_array_equal(other.codes, expected_codes)


def test_awaited_turns_are_the_same(made: Made, seed: int) -> None:
    expected = made.session(made.voice)
    first = expected.speak_sync("Hello.", seed=seed, max_seconds=0.4)
    expected.hear_sync("How are you?", oracle.speech_like(0.5, seed))
    second = expected.speak_sync("Fine.", seed=seed, max_seconds=0.4)

    async def converse() -> tuple[Audio, Audio]:
        session = made.session(made.voice)
        hello = await session.speak("Hello.", seed=seed, max_seconds=0.4)
        await session.hear("How are you?", oracle.speech_like(0.5, seed))
        return hello, await session.speak("Fine.", seed=seed, max_seconds=0.4)

    for spoken, other in zip(asyncio.run(converse()), (first, second), strict=True):
        np.testing.assert_array_equal(spoken.codes, other.codes)
        np.testing.assert_array_equal(spoken.samples, other.samples)
        assert spoken.seed == seed
        assert spoken.finish_reason == other.finish_reason == "length"


# --- when the context is full -----------------------------------------------------------------------------------------


def test_the_oldest_turns_are_dropped_whole_and_the_voice_stays(made: Made, seed: int) -> None:
    session = made.session(made.voice)
    everything: list[Prompt] = []
    rebuilds = 0
    for number in range(7):
        text, frames = f"This is turn {number}.", 15 + number
        before = session.stats
        spoken = say(session, text, seed + number, frames)
        stats = session.stats
        everything.append(session.turns[-1])
        kept = everything[stats.dropped_turns :]
        assert same_turns(session.turns, kept)
        assert stats.positions == made.voice.positions + sum(map(len, kept)) <= POSITIONS + 2  # its end is unread
        # Behind the same voice, the same turns read at once say the same, bit for bit where they were read at once.
        transcript = build_prompt(
            made.runtime.config, [Turn(turn_text(made.runtime.tokenizer, 1, text))]
        )  # the text alone
        prompt = Prompt(
            torch.cat([*(turn.text_tokens for turn in kept[:-1]), transcript.text_tokens]),
            torch.cat([*(turn.codes for turn in kept[:-1]), transcript.codes]),
        )
        codes, samples = said_afresh(made.runtime, prompt, SAMPLING, seed + number, frames, made.voice)
        np.testing.assert_array_equal(codes_of(spoken), codes)
        if stats.rebuilds > before.rebuilds:
            assert stats.rebuilds == before.rebuilds + 1
            assert stats.dropped_turns > before.dropped_turns
            np.testing.assert_array_equal(samples_of(spoken), samples)
            rebuilds += 1
        else:
            assert stats.dropped_turns == before.dropped_turns
    assert rebuilds >= 2
    assert session.stats.turns == len(session.turns) == 7 - session.stats.dropped_turns


def test_turns_are_dropped_when_they_do_not_fit_and_half_of_them_at_once(made: Made, seed: int) -> None:
    """A turn that just fits drops nothing; one frame more, and no more than half of the positions are kept."""
    text = "Bye."
    words = len(turn_text(made.runtime.tokenizer, 1, text))
    for more in (0, 1):
        session = made.session()
        for number in range(4):
            say(session, "Hello there.", seed + number, 9)
        lengths = [len(turn) for turn in session.turns]
        # The last frame is never read back: it takes no position.
        frames = POSITIONS + 1 - sum(lengths) - words + more
        assert len(say(session, text, seed, frames)) == frames
        room = sum(lengths) - more
        kept = max(count for count in range(1, 5) if sum(lengths[-count:]) <= (room // 2 if more else room))
        assert kept == (4 if more == 0 else 1)
        assert session.stats.turns == kept + 1
        assert session.stats.dropped_turns == 4 - kept
        assert session.stats.rebuilds == more


def test_what_is_heard_drops_the_oldest_and_stays_itself(made: Made, seed: int) -> None:
    """Also where it is longer than half of the context."""
    session = made.session(made.voice)
    say(session, "Hello.", seed, 30)
    say(session, "Hello again.", seed + 1, 15)
    sound = oracle.speech_like(3.5, seed)
    session.hear_sync("A long story.", sound)
    stats = session.stats
    assert stats.dropped_turns == 2
    assert stats.rebuilds == 1
    assert stats.cached_positions == stats.positions <= POSITIONS
    heard = build_prompt(
        made.runtime.config,
        [Turn(turn_text(made.runtime.tokenizer, 1, "A long story."), torch.from_numpy(made.runtime.encode(sound)))],
    )
    assert same_turns(session.turns, [heard])


def test_a_turn_too_long_for_the_context_is_refused_and_nothing_is_lost(made: Made, seed: int) -> None:
    session = made.session(made.voice)
    say(session, "Hello.", seed, 4)
    before, turns = session.stats, session.turns
    with pytest.raises(errors.AudioTooLong, match=r"20\.00 s long and may be at most"):
        session.hear_sync("A very long story.", oracle.speech_like(20.0, seed))
    with pytest.raises(errors.ContextTooLong, match="positions"):
        session.hear_sync("word " * 90)
    assert session.stats == before
    assert same_turns(session.turns, turns)
    assert len(say(session, "Bye.", seed, 3)) == 3


def test_a_voice_as_long_as_the_context_leaves_no_room(made: Made, seed: int) -> None:
    voice = made.runtime.voice([Segment("Long.", oracle.speech_like(11.0, seed), 1)])
    assert POSITIONS - 8 <= voice.positions <= POSITIONS
    session = made.session(voice)
    with pytest.raises(errors.ContextTooLong, match=r"^Voice, context and text take \d+ positions, \d+ more than"):
        list(session.stream("Hello, how are you today?"))
    with pytest.raises(errors.ContextTooLong):
        session.hear_sync("Hello, how are you today?")
    assert session.stats.turns == 0


# --- a turn that is left ----------------------------------------------------------------------------------------------


def leave_by_cancel(session: Session, seed: int) -> list[Audio]:
    speech = session.stream("A long answer.", seed=seed, max_seconds=4, pace="full")
    received = [next(speech) for _ in range(4)]
    speech.cancel()
    assert speech.finish_reason == "cancelled"
    assert list(speech) == []
    return received


def leave_by_forgetting(session: Session, seed: int) -> list[Audio]:
    speech = session.stream("A long answer.", seed=seed, max_seconds=4, pace="full")
    received = [next(speech) for _ in range(4)]
    del speech
    gc.collect()
    return received


def leave_by_cancelled_task(session: Session, seed: int) -> list[Audio]:
    async def listen(received: list[Audio]) -> None:
        async for chunk in session.stream("A long answer.", seed=seed, max_seconds=4, pace="realtime"):
            received.append(chunk)
            if len(received) == 4:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()  # takes effect where it waits for the next chunk

    async def interrupted() -> list[Audio]:
        received: list[Audio] = []
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(listen(received))
        return received

    return asyncio.run(interrupted())


@pytest.mark.parametrize(
    "leave", [leave_by_cancel, leave_by_forgetting, leave_by_cancelled_task], ids=lambda leave: leave.__name__
)
def test_what_was_handed_out_of_a_turn_that_was_left_is_context(
    made: Made, leave: Callable[[Session, int], list[Audio]], seed: int
) -> None:
    session = made.session()
    transcript = Transcript(made.runtime)
    transcript.add(1, "Hello.", codes_of(say(session, "Hello.", seed, 5)))
    received = leave(session, seed + 1)
    assert len(received) >= 4
    transcript.add(1, "A long answer.", codes_of(received))
    codes = codes_of(say(session, "As I said.", seed + 2, 6))
    expected, _ = said_afresh(made.runtime, transcript.prompt("As I said."), SAMPLING, seed + 2, 6)
    np.testing.assert_array_equal(codes, expected)
    assert session.stats.turns == 3


@pytest.mark.parametrize("is_over", [False, True], ids=["while-it-is-made", "while-it-is-played"])
@pytest.mark.parametrize(
    ("heard_seconds", "frames"), [(0.0, 0), (0.05, 1), (0.16, 2), (0.17, 3), (0.48, 6), (9.0, 6), (10**400, 6)]
)
def test_what_was_heard_before_an_interruption_is_context(
    made: Made, heard_seconds: float, frames: int, is_over: bool, seed: int
) -> None:
    session = made.session(made.voice)
    transcript = Transcript(made.runtime)
    transcript.add(1, "Hello.", codes_of(say(session, "Hello.", seed, 5)))
    speech = session.stream("A long answer.", seed=seed, max_seconds=0.48 if is_over else 4, pace="full")
    received = [next(speech) for _ in range(6)]
    if is_over:
        assert list(speech) == []
    speech.interrupt(heard_seconds)
    if frames:
        transcript.add(1, "A long answer.", codes_of(received[:frames]))
    stats = session.stats
    assert stats.turns == 1 + bool(frames)
    assert not session.is_busy
    # What was read before the cut stays read: all but the end of the speech, or all of the turn before.
    assert stats.rebuilds == 0
    assert stats.cached_positions >= (stats.positions - 2 if is_over else made.voice.positions + 5)
    codes = codes_of(say(session, "As I said.", seed + 2, 6))
    prompt = transcript.prompt("As I said.")
    expected, _ = said_afresh(made.runtime, prompt, SAMPLING, seed + 2, 6, made.voice)
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize(
    ("heard_frames", "left"), [(0, []), (3, [3]), (4, [4]), (6, [4, 2]), (12, [4, 4, 4]), (99, [4] * 3)]
)
def test_an_interruption_in_an_earlier_sentence(heard_frames: int, left: list[int], seed: int) -> None:
    """Each sentence is a turn of its own: those that were not heard are no context at all."""
    steps = QuickSteps(2)
    steps.length_of = lambda _: 4
    with Engine(quick_runtime(steps, 2)) as engine:
        session, other = engine.session(), engine.session()
        assert len(list(session.stream("Before.", seed=seed, pace="full"))) == 4
        text = " ".join(f"{count} is said at such a length that it is no part of another one." for count in range(3))
        speech = session.stream(text, seed=seed, pace="full")
        received = list(speech)
        assert len(received) == 12
        session.hear_sync("Wait!")
        before = session.turns
        speech.interrupt(heard_frames * 0.08)
        turns = session.turns
        frames = [int((turn.text_tokens < 0).sum()) - 1 for turn in turns]
        assert frames == [4, *left, -1]
        assert same_turns([turns[0], turns[-1]], [before[0], before[-1]])
        assert session.stats.rebuilds == 0
        assert session.stats.cached_positions >= len(turns[0])
        for kept, whole in zip(turns[1:-1], before[1:-1], strict=False):
            assert same_turns([kept[: len(kept) - 1]], [whole[: len(kept) - 1]])  # all but the frame that ends it
        for turn in turns:
            other._conversation.add(turn)
        after = [codes_of(list(one.stream("Go on.", seed=seed, pace="full"))) for one in (session, other)]
        np.testing.assert_array_equal(*after)
    assert not steps.wrong


def test_an_interruption_of_a_turn_that_is_long_over(made: Made, seed: int) -> None:
    session = made.session()
    first = session.stream("One.", seed=seed, max_seconds=0.4, pace="full")
    assert len(list(first)) == 5
    running = session.stream("Two.", seed=seed, max_seconds=0.4, pace="full")
    next(running)
    with pytest.raises(errors.SessionBusy):
        first.interrupt(0.1)
    assert len(list(running)) == 4
    first.interrupt(0.1)
    audio = [int((turn.text_tokens < 0).sum()) - 1 for turn in session.turns]
    assert audio == [2, 5]


def test_an_interruption_outside_of_a_session_is_an_end(made: Made, seed: int) -> None:
    speech = made.engine.stream("Hello.", seed=seed, max_seconds=4, pace="full")
    next(speech)
    speech.interrupt(0.02)
    assert (speech.finish_reason, list(speech)) == ("cancelled", [])


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf"), "1", None, True])
def test_what_is_no_number_of_seconds_is_refused(made: Made, wrong: object, seed: int) -> None:
    speech = made.session().stream("Hello.", seed=seed, max_seconds=0.16, pace="full")
    with pytest.raises(errors.RequestError, match="heard_seconds must be a number of seconds"):
        speech.interrupt(wrong)  # type: ignore[arg-type]
    assert len(list(speech)) == 2


def test_a_turn_that_was_left_before_its_first_chunk_was_never_said(made: Made, seed: int) -> None:
    session = made.session()
    say(session, "Hello.", seed, 3)
    turns = session.turns
    session.stream("Never begun.").cancel()
    speech = session.stream("Begun.", seed=seed)
    speech.close()
    assert same_turns(session.turns, turns)
    assert len(say(session, "Bye.", seed, 2)) == 2


# --- one thing at a time ----------------------------------------------------------------------------------------------


def assert_busy(session: Session) -> None:
    with pytest.raises(errors.SessionBusy, match=r"^The session is still speaking or hearing\. Wait for that"):
        session.stream("And?")
    with pytest.raises(errors.SessionBusy):
        session.hear_sync("And?")
    with pytest.raises(errors.SessionBusy):
        session.restore([])


def test_a_session_does_one_thing_at_a_time(made: Made, seed: int) -> None:
    session = made.session()
    speech = session.stream("Hello.", seed=seed, max_seconds=0.4)
    assert_busy(session)
    next(speech)
    assert_busy(session)
    assert len(list(speech)) == 4
    speech.cancel()  # again, when it is over
    say(session, "Hello.", seed, 1)

    async def at_once() -> list[object]:
        return await asyncio.gather(
            session.speak("One.", seed=seed, max_seconds=0.16),
            session.speak("Two.", seed=seed, max_seconds=0.16),
            session.hear("Three."),
            return_exceptions=True,
        )

    first, *others = asyncio.run(at_once())
    assert isinstance(first, Audio)
    assert all(isinstance(other, errors.SessionBusy) for other in others)
    assert session.stats.turns == 3


def test_an_old_turn_that_is_collected_late_does_not_free_the_session(made: Made, seed: int) -> None:
    session = made.session()
    old: list[LiveSpeech] = []
    with pytest.raises(errors.RequestError, match="got int"):
        session.stream(5)  # type: ignore[arg-type]
    speech = session.stream("One.", seed=seed, max_seconds=0.16, pace="full")
    old.append(speech)
    assert len(list(speech)) == 2
    running = session.stream("Two.", seed=seed, max_seconds=0.16, pace="full")
    speech.cancel()
    old.clear()
    del speech
    gc.collect()
    assert_busy(session)
    assert len(list(running)) == 2


def test_a_refused_turn_leaves_the_session_free(made: Made, seed: int) -> None:
    """Also where what was raised is kept: with it, the turn that could not begin lives on, and ends later."""
    session = made.session()
    refused = []
    for wrong in (5, None, b"bytes are numbers"):
        try:
            list(session.stream(wrong, seed=seed))  # type: ignore[arg-type]
        except errors.RequestError as error:
            refused.append(error)
    assert len(refused) == 3
    running = session.stream("Two.", seed=seed, max_seconds=0.16, pace="full")
    refused.clear()
    gc.collect()
    assert_busy(session)
    assert len(list(running)) == 2


@pytest.mark.parametrize(
    ("heard", "error", "sentence"),
    [
        (("",), errors.TextEmpty, "neither text nor audio"),
        ((5,), errors.TextEmpty, "must be a string, got int"),
        (("Hi.", np.zeros(0, np.float32)), errors.AudioEmpty, "no samples"),
        (("Hi.", np.full(2400, np.nan, np.float32)), errors.AudioNotFinite, "not finite|NaN"),
        (("Hi.", None, -1), errors.SpeakerInvalid, "from 0 to 999"),
        (("Hi.", "no/such/file.wav"), errors.AudioUnreadable, "file.wav"),
    ],
    ids=["empty", "no-string", "no-samples", "nan", "speaker", "no-file"],
)
def test_what_is_wrong_with_what_is_heard(
    made: Made, heard: tuple[object, ...], error: type[Exception], sentence: str
) -> None:
    session = made.session()
    with pytest.raises(error, match=sentence):
        session.hear_sync(*heard)  # type: ignore[arg-type]
    assert session.stats.turns == 0
    session.hear_sync("Hi.")


def test_what_could_not_be_heard_is_not_remembered(made: Made, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """So that hearing it again, as the error says, does not make it two turns."""
    session = made.session()
    session.hear_sync("Hi.")

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Csm, "prefill", broken)
    with pytest.raises(errors.StepFailed, match="Ask again"):
        session.hear_sync("How are you?")
    with pytest.raises(errors.StepFailed, match="Ask again"):
        say(session, "Fine.", seed, 3)
    monkeypatch.undo()
    assert session.stats.turns == 1
    session.hear_sync("How are you?")
    transcript = Transcript(made.runtime)
    transcript.add(1, "Hi.", None)
    transcript.add(1, "How are you?", None)
    expected, _ = said_afresh(made.runtime, transcript.prompt("Fine."), SAMPLING, seed, 3)
    np.testing.assert_array_equal(codes_of(say(session, "Fine.", seed, 3)), expected)


def test_hearing_when_the_engine_is_closed(seed: int) -> None:
    engine = Engine(runtime_of(ScriptedModel()))
    session = engine.session()
    session.hear_sync("Hello.")
    engine.close()
    with pytest.raises(errors.EngineClosed):
        session.hear_sync("Hello?")
    with pytest.raises(errors.EngineClosed):
        session.stream("Hello?")
    assert session.stats.turns == 1


def test_the_engine_is_closed_while_a_session_waits_to_hear(seed: int) -> None:
    runtime = Runtime(ScriptedModel(), ByteTokenizer(), Sampling(), "scripted", max_streams=1)  # type: ignore[arg-type]
    engine = Engine(runtime)
    speech = engine.stream("For ever.", seed=seed, guards=Guards.off(), pace="realtime")
    next(speech)  # and no more: the only slot is taken
    session = engine.session()
    raised: list[BaseException] = []

    def hear() -> None:
        try:
            session.hear_sync("Hello?")
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=hear)
    thread.start()
    end = time.monotonic() + 20
    while engine.stats().streams_waiting == 0 and time.monotonic() < end:
        time.sleep(0.001)
    engine.close()
    thread.join(timeout=20)
    assert [type(error) for error in raised] == [errors.EngineClosed]
    assert session.stats.turns == 0


# --- many sessions ----------------------------------------------------------------------------------------------------


def test_many_sessions_over_few_slots_do_not_mix(made: Made, seed: int) -> None:
    """Seven over two slots: each says, bit for bit, what it says alone."""

    def script(number: int) -> list[tuple[str, int]]:
        return [(f"I am number {number}.", 3 + number), ("Who are you?", 5), (f"{number}!", 2 + number % 3)]

    def voice(number: int) -> Voice | None:
        return made.voice if number % 2 else None

    async def converse(number: int) -> list[Audio]:
        session = made.session(voice(number))
        spoken = []
        for turn, (text, frames) in enumerate(script(number)):
            spoken.append(await session.speak(text, seed=seed + 10 * number + turn, max_seconds=frames * 0.08))
            await session.hear(f"Heard, {number}.")
        return spoken

    async def together() -> list[list[Audio]]:
        return await asyncio.gather(*(converse(number) for number in range(7)))

    alone = [asyncio.run(converse(number)) for number in range(7)]
    for spoken, expected in zip(asyncio.run(together()), alone, strict=True):
        for turn, other in zip(spoken, expected, strict=True):
            np.testing.assert_array_equal(turn.codes, other.codes)
            np.testing.assert_array_equal(turn.samples, other.samples)
    assert made.engine.stats().slots_used == 0


def test_a_session_that_nobody_holds_is_forgotten(made: Made, seed: int) -> None:
    session = made.session(made.voice)
    session.hear_sync("Hello.")
    say(session, "Hello.", seed, 3)
    cached = session._conversation.to_read()[0]
    assert cached is not None
    assert cached is not made.voice.prefix
    cache = weakref.ref(cached.cache)
    ended, left = weakref.ref(session), session.stream("Left.", seed=seed, pace="full")
    next(left)
    del cached, session, left  # without a collector: nothing of it hangs in a circle
    assert ended() is None
    say(made.session(), "Others go on.", seed, 1)
    assert cache() is None


def test_only_the_last_cache_of_a_session_is_kept(made: Made, seed: int) -> None:
    session = made.session()
    caches = []
    for number in range(4):
        say(session, "Hello.", seed + number, 3)
        cached = session._conversation.to_read()[0]
        assert cached is not None
        caches.append(weakref.ref(cached.cache))
        del cached
    assert [cache() is not None for cache in caches] == [False, False, False, True]


def test_a_restored_session_goes_on(made: Made, read_positions: list[int], seed: int) -> None:
    session = made.session(made.voice)
    say(session, "Hello.", seed, 6)
    session.hear_sync("How are you?", oracle.speech_like(0.4, seed))
    turns = session.turns
    expected = say(session, "Fine.", seed + 1, 6)
    other = made.session(made.voice)
    other.restore(turns)
    assert other.stats.turns == 2
    assert other.stats.cached_positions == made.voice.positions
    read_positions.clear()
    np.testing.assert_array_equal(codes_of(say(other, "Fine.", seed + 1, 6)), codes_of(expected))
    assert read_positions == [sum(map(len, turns)) + len(turn_text(made.runtime.tokenizer, 1, "Fine."))]
    assert same_turns(other.turns, session.turns)


def test_who_hears_while_all_slots_are_taken_holds_no_thread_and_is_refused_in_the_end() -> None:
    held = Held(1)
    held.talk_for(1000)

    async def job() -> None:
        async with Engine(held.runtime, max_waiting=20) as engine:
            async with engine.stream("Much to say.", seed=1, max_seconds=60) as speaking:
                await anext(speaking)
                hearing = [asyncio.ensure_future(engine.session().hear("Well.")) for _ in range(40)]
                while len([heard for heard in hearing if heard.done()]) < 20:
                    await asyncio.sleep(0.001)
                refused = [heard.exception() for heard in hearing if heard.done()]
                assert all(isinstance(error, errors.Overloaded) for error in refused)
                began = time.monotonic()
                await asyncio.to_thread(lambda: None)  # there are threads left, for everything else that needs one
                assert time.monotonic() - began < 1
            results = await asyncio.gather(*hearing, return_exceptions=True)
            assert sum(result is None for result in results) == 20

    run(job())


def test_hearing_that_is_left_leaves_nothing() -> None:
    held = Held(1)
    held.talk_for(1000)

    async def job() -> None:
        async with Engine(held.runtime) as engine:
            session = engine.session()
            async with engine.stream("Much to say.", seed=1, max_seconds=60) as speaking:
                await anext(speaking)
                hearing = asyncio.ensure_future(session.hear("Well."))
                while not session.is_busy:
                    await asyncio.sleep(0)
                hearing.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await hearing
                assert (session.is_busy, session.stats.turns) == (False, 0)
            await session.hear("Well.")
            assert session.stats.turns == 1
            assert engine.stats().streams_waiting == 0

    run(job())
