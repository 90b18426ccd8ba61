"""Every way a request can be wrong: its class and its sentence, before the model is touched; and what just fits."""

from __future__ import annotations

import inspect
import io
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from aloud import Guards, Request, Runtime, Segment, errors
from aloud.prepare import check_request
from scripted import FRAME_SIZE, ScriptedModel, UntouchedModel, prompt_positions, runtime_of

CALLS = ["speak", "stream", "speak_batch"]


def call(runtime: Runtime, how: str, arguments: dict[str, Any]) -> object:
    """The same request by each way in; a stream is only made, not read."""
    arguments = {"text": "Hello.", **arguments}
    if how == "speak_batch":
        return runtime.speak_batch([Request(**arguments)])
    return getattr(runtime, how)(**arguments)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "empty text": ({"text": ""}, errors.TextEmpty, r"There is no text to say\. Give at least one letter\."),
    "blank text": ({"text": " \t\n\u2003"}, errors.TextEmpty, r"There is no text to say\."),
    "text is bytes": ({"text": b"hi"}, errors.TextEmpty, r"The text to say must be a string, got bytes\."),
    "text is None": ({"text": None}, errors.TextEmpty, r"must be a string, got NoneType\."),
    "text is half a character": ({"text": "a\ud800"}, errors.RequestError, r"'\\ud800' at character 1.*UTF-8"),
    "speaker -1": ({"speaker": -1}, errors.SpeakerInvalid, r"speaker must be a whole number from 0 to 999, got -1\."),
    "speaker 1000": ({"speaker": 1000}, errors.SpeakerInvalid, r"from 0 to 999, got 1000\."),
    "speaker 1.5": ({"speaker": 1.5}, errors.SpeakerInvalid, r"got 1\.5\."),
    "speaker True": ({"speaker": True}, errors.SpeakerInvalid, r"got True\."),
    "speaker string": ({"speaker": "0"}, errors.SpeakerInvalid, r"got '0'\."),
    "temperature negative": (
        {"temperature": -0.1},
        errors.SamplingInvalid,
        r"^temperature must be 0 \(greedy\) or from 0\.001 to 100, got -0\.1\.",
    ),
    "temperature NaN": ({"temperature": float("nan")}, errors.SamplingInvalid, r"^temperature must be.*got nan\."),
    "temperature infinite": ({"temperature": float("inf")}, errors.SamplingInvalid, r"^temperature must be.*got inf\."),
    "temperature too large": ({"temperature": 100.5}, errors.SamplingInvalid, r"^temperature must be.*got 100\.5\."),
    "temperature too small": ({"temperature": 1e-6}, errors.SamplingInvalid, r"^temperature must be.*got 1e-06\."),
    "temperature in words": (
        {"temperature": "hot"},
        errors.SamplingInvalid,
        r"^temperature must be a number, got 'hot'",
    ),
    "temperature True": ({"temperature": True}, errors.SamplingInvalid, r"^temperature must be a number, got True"),
    "depth_temperature": ({"depth_temperature": -1}, errors.SamplingInvalid, r"^depth_temperature must be 0"),
    "top_k negative": (
        {"top_k": -1},
        errors.SamplingInvalid,
        r"^top_k must be a whole number, 1 or more, or 0 to keep every token; got -1\.",
    ),
    "top_k 1.5": ({"top_k": 1.5}, errors.SamplingInvalid, r"^top_k must be a whole number.*got 1\.5\."),
    "top_k too large": ({"top_k": 2**31}, errors.SamplingInvalid, r"^top_k must be a whole number"),
    "depth_top_k": ({"depth_top_k": False}, errors.SamplingInvalid, r"^depth_top_k must be a whole number.*got False"),
    "seed -1": ({"seed": -1}, errors.SamplingInvalid, r"seed must be a whole number from 0 to 2\^64 - 1, got -1\."),
    "seed 2^64": ({"seed": 2**64}, errors.SamplingInvalid, r"got 18446744073709551616\."),
    "seed 1.5": ({"seed": 1.5}, errors.SamplingInvalid, r"got 1\.5\."),
    "seed True": ({"seed": True}, errors.SamplingInvalid, r"got True\."),
    "max_seconds 0": ({"max_seconds": 0}, errors.SamplingInvalid, r"max_seconds must be above 0 .*got 0\."),
    "max_seconds negative": (
        {"max_seconds": -0.5},
        errors.SamplingInvalid,
        r"max_seconds must be above 0.*got -0\.5\.",
    ),
    "max_seconds NaN": ({"max_seconds": float("nan")}, errors.SamplingInvalid, r"max_seconds must be.*got nan\."),
    "max_seconds infinite": ({"max_seconds": float("inf")}, errors.SamplingInvalid, r"max_seconds must be.*got inf\."),
    "max_seconds near the largest float": ({"max_seconds": 1.7e308}, errors.SamplingInvalid, r"at most 86,400, a day"),
    "max_seconds larger than any float": ({"max_seconds": 10**400}, errors.SamplingInvalid, r"at most 86,400, a day"),
    "max_seconds in words": ({"max_seconds": "2s"}, errors.SamplingInvalid, r"a number of seconds, got '2s'\."),
    "guards False": ({"guards": False}, errors.SamplingInvalid, r"must be aloud\.Guards, .*Guards\.off\(\), got False"),
    "a guard NaN": (
        {"guards": Guards(silence_seconds=float("nan"))},
        errors.SamplingInvalid,
        r"silence_seconds of guards must be a finite number, and not negative, got nan\.",
    ),
    "a guard negative": ({"guards": Guards(repeat_seconds=-1)}, errors.SamplingInvalid, r"repeat_seconds of guards"),
    "a guard None that has no off": (
        {"guards": Guards(text_seconds=None)},  # type: ignore[arg-type]
        errors.SamplingInvalid,
        r"text_seconds of guards",
    ),
    "context is one segment": ({"context": Segment("a")}, errors.RequestError, r"context is a list .*got Segment\."),
    "context is a generator": (
        {"context": (Segment("a") for _ in range(1))},
        errors.RequestError,
        r"context is a list of aloud\.Segment, got generator\.",
    ),
    "context of tuples": ({"context": [(0, "a")]}, errors.RequestError, r"list of aloud\.Segment, got tuple in it\."),
    "context speaker": ({"context": [Segment("a", speaker=-2)]}, errors.SpeakerInvalid, r"got -2\."),
    "context text": ({"context": [Segment(7)]}, errors.TextEmpty, r"A segment's text must be a string, got int"),  # type: ignore[arg-type]
    "context of nothing": ({"context": [Segment("  ")]}, errors.TextEmpty, r"has neither text nor audio\. Give it one"),
    "context audio missing": (
        {"context": [Segment("a", "/nowhere/intro.wav")]},
        errors.AudioUnreadable,
        r"There is no file '/nowhere/intro\.wav'",
    ),
    "context audio no audio": (
        {"context": [Segment("a", io.BytesIO(b"RIFFnothing"))]},
        errors.AudioUnreadable,
        r"is not audio|damaged",
    ),
    "context audio empty": ({"context": [Segment("a", np.zeros(0, np.float32))]}, errors.AudioEmpty, r"no samples"),
    "context audio NaN": (
        {"context": [Segment("a", np.array([0, np.nan], np.float32))]},
        errors.AudioNotFinite,
        r"1 NaN and 0 infinite",
    ),
    "context audio infinite": (
        {"context": [Segment("a", torch.tensor([0.0, -torch.inf]))]},
        errors.AudioNotFinite,
        r"0 NaN and 1 infinite",
    ),
    "context audio of three axes": (
        {"context": [Segment("a", np.zeros((1, 1, 99), np.float32))]},
        errors.AudioShapeInvalid,
        r"\(1, 1, 99\)",
    ),
    "context audio at 7 kHz": (
        {"context": [Segment("a", (np.zeros(99, np.float32), 7_000))]},
        errors.AudioRateInvalid,
        r"7000 Hz",
    ),
}


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("case", list(WRONG))
def test_a_wrong_request_is_refused_in_words_before_any_work(case: str, how: str) -> None:
    arguments, error, sentence = WRONG[case]
    with pytest.raises(errors.RequestError, match=sentence) as caught:
        call(runtime_of(UntouchedModel()), how, arguments)
    assert type(caught.value) is error
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "case", [case for case, (_, error, _) in WRONG.items() if not issubclass(error, errors.AudioInvalid)]
)
def test_all_but_the_audio_is_checked_without_a_model(case: str) -> None:
    arguments, error, sentence = WRONG[case]
    with pytest.raises(error, match=sentence):
        check_request(Request(**{"text": "Hello.", **arguments}))


@pytest.mark.parametrize(
    "arguments",
    [
        {"speaker": 0, "seed": 0, "top_k": 0, "temperature": 0},
        {"speaker": 999, "seed": 2**64 - 1, "top_k": 2**31 - 1, "temperature": 100.0},
        {"temperature": 1e-3, "depth_temperature": 0.0, "max_seconds": 1e-9},
        {"speaker": np.int64(3), "seed": np.uint64(2**64 - 1), "top_k": np.int32(5), "temperature": np.float32(0.5)},
        {"guards": Guards(None, 0, None, -200, 0, None)},
        {"context": (Segment("text alone"),)},
    ],
    ids=["lowest", "highest", "smallest", "NumPy's numbers", "guards of zero", "tuple of segments"],
)
def test_the_ends_of_every_range_are_taken(arguments: dict[str, Any]) -> None:
    arguments = {"max_seconds": 0.08, **arguments}
    spoken = runtime_of(ScriptedModel()).speak("Hello.", **arguments)
    assert len(spoken.samples) == FRAME_SIZE


def test_a_batch_is_requests() -> None:
    runtime = runtime_of(UntouchedModel())
    assert runtime.speak_batch([]) == []
    for wrong in (["Hello."], "Hello.", None, Request("Hello.")):
        with pytest.raises(errors.RequestError, match=r"list of aloud\.Request"):
            runtime.speak_batch(wrong)  # type: ignore[arg-type]
    with pytest.raises(errors.TextEmpty):  # the second is wrong, and the first is not begun
        runtime.speak_batch([Request("Hello."), Request("")])


def test_a_request_has_the_arguments_of_speak_and_of_stream() -> None:
    wanted = {field.name: field.default for field in fields(Request)}
    for method in (Runtime.speak, Runtime.stream):
        parameters = dict(inspect.signature(method).parameters)
        del parameters["self"]
        assert parameters.pop("progress").default is False
        assert {name: parameter.default for name, parameter in parameters.items() if name != "text"} == {
            name: default for name, default in wanted.items() if name != "text"
        }
        assert next(iter(parameters)) == "text"


# --- what fits --------------------------------------------------------------------------------------------------------

LIMIT = 60


def text_of(positions: int) -> str:
    """A text whose prompt takes that many positions."""
    text = "a" * (positions - prompt_positions(""))
    assert prompt_positions(text) == positions
    return text


@pytest.mark.parametrize("left", [0, 1, 2, 30], ids=lambda left: f"{left} positions left")
def test_without_a_length_speech_may_fill_the_context(left: int) -> None:
    """The last frame is never read back: of `left` free positions come left + 1 frames."""
    model = ScriptedModel(max_positions=LIMIT)
    spoken = runtime_of(model).speak(text_of(LIMIT - left), guards=Guards.off(), seed=5)
    assert len(spoken.samples) == (left + 1) * FRAME_SIZE
    assert spoken.finish_reason == "length"
    assert [state.positions for state in model.states] == [LIMIT]


def test_without_a_length_speech_is_at_most_90_seconds() -> None:
    model = ScriptedModel(max_positions=100_000)
    spoken = runtime_of(model).speak("Hello.", guards=Guards.off())
    assert spoken.duration == 90.0
    assert spoken.finish_reason == "length"


@pytest.mark.parametrize("left", [0, 1, 30], ids=lambda left: f"{left} positions left")
def test_a_length_fits_to_the_frame(left: int) -> None:
    runtime = runtime_of(ScriptedModel(max_positions=LIMIT))
    text, room = text_of(LIMIT - left), left + 1
    fits, asked = room * 0.08, (room + 1) * 0.08
    assert len(runtime.speak(text, max_seconds=fits).samples) == room * FRAME_SIZE
    refusing = runtime_of(UntouchedModel(LIMIT))
    with pytest.raises(
        errors.ContextTooLong,
        match=rf"takes {LIMIT - left} of {LIMIT} positions, so max_seconds={asked:.2f} is 0\.08 s too long; "
        rf"up to {fits:.2f} s would fit\. Ask for less, or shorten the context\.",
    ):
        refusing.speak(text, max_seconds=asked)


def test_a_length_far_too_long_says_by_how_much() -> None:
    runtime = runtime_of(UntouchedModel(LIMIT))
    with pytest.raises(errors.ContextTooLong, match=r"is 95\.92 s too long; up to 4\.08 s would fit"):
        runtime.speak(text_of(10), max_seconds=100)


@pytest.mark.parametrize("max_seconds", [None, 0.08], ids=["no length", "one frame"])
@pytest.mark.parametrize("over", [1, 40])
def test_a_prompt_alone_too_long_says_by_how_much(over: int, max_seconds: float | None) -> None:
    with pytest.raises(
        errors.ContextTooLong,
        match=rf"takes {LIMIT + over} positions, {over} more than the model's context of {LIMIT}\. "
        rf"Leave out {over * 0.08:.2f} s of context audio, or as many words\.",
    ):
        runtime_of(UntouchedModel(LIMIT)).speak(text_of(LIMIT + over), max_seconds=max_seconds)


def test_context_counts_its_text_its_frames_and_an_end() -> None:
    """And its audio is not encoded before it is known to fit."""
    runtime = runtime_of(UntouchedModel(LIMIT))
    # 44 for the text to say, 6 for "[7]a", and 4 + 1 for its audio of 4 frames: 55, so that 6 frames would fit.
    context = [Segment("a", np.zeros(4 * 1920 - 5, np.float32), speaker=7)]
    with pytest.raises(errors.ContextTooLong, match=r"takes 55 of 60 positions.*up to 0\.48 s would fit"):
        runtime.speak(text_of(44), context=context, max_seconds=0.56)


def test_audio_longer_than_the_whole_context_is_refused_with_both_lengths() -> None:
    runtime = runtime_of(UntouchedModel(LIMIT))
    with pytest.raises(errors.AudioTooLong, match=r"is 5\.00 s long and may be at most 4\.80 s"):
        runtime.speak("Hello.", context=[Segment("a", np.zeros(5 * 24_000, np.float32))])


@pytest.mark.parametrize(
    ("max_seconds", "frames"),
    [(1e-9, 1), (0.039, 1), (0.04, 1), (0.08, 1), (0.119, 1), (0.12, 2), (0.121, 2), (0.8, 10), (1, 13), (1.03, 13)],
)
def test_a_length_is_rounded_to_whole_frames_and_at_least_one(max_seconds: float, frames: int) -> None:
    spoken = runtime_of(ScriptedModel()).speak("Hello.", max_seconds=max_seconds)
    assert len(spoken.samples) == frames * FRAME_SIZE
