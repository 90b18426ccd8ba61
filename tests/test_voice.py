"""Voices: the speech of the same turns given as context, without reading them again."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from aloud import Audio, Request, Runtime, Segment, errors
from aloud.models.csm import Csm, CsmState
from aloud.prepare import read_segments
from aloud.prompt_block import PromptBlock
from oracle import csm as oracle


@pytest.fixture(scope="module")
def runtime(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    seed: int = request.config.getoption("--seed")
    model = oracle.random_model(oracle.small_config(rope=oracle.LLAMA3), seed)
    return Runtime.load(oracle.save(model, tmp_path_factory.mktemp("checkpoint")), device="cpu")


@pytest.fixture
def turns(seed: int) -> list[Segment]:
    return [
        Segment("Hi there.", oracle.speech_like(1.3, seed), 1),
        Segment("And hello to you.", oracle.speech_like(0.7, seed + 1), 0),
    ]


@pytest.fixture
def read_positions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each prefill pass read."""
    passes: list[int] = []
    prefill = Csm.prefill

    def counted(self: Csm, state: CsmState, block: PromptBlock) -> None:
        passes.append(int((block.slots != state.position.shape[0] - 1).sum()))
        prefill(self, state, block)

    monkeypatch.setattr(Csm, "prefill", counted)
    return passes


def assert_same_speech(spoken: Audio, expected: Audio) -> None:
    assert spoken.codes is not None
    np.testing.assert_array_equal(spoken.codes, expected.codes)
    np.testing.assert_allclose(spoken.samples, expected.samples, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])
def test_a_voice_is_its_turns_as_context(runtime: Runtime, turns: list[Segment], temperature: float, seed: int) -> None:
    given = {"speaker": 1, "temperature": temperature, "seed": seed, "max_seconds": 1.2}
    expected = runtime.speak("How are you today?", context=turns, **given)  # type: ignore[arg-type]
    voice = runtime.voice(turns)
    for _ in range(2):
        assert_same_speech(runtime.speak("How are you today?", voice=voice, **given), expected)  # type: ignore[arg-type]
    begun = runtime.voice(turns[:1])
    spoken = runtime.speak("How are you today?", voice=begun, context=turns[1:], **given)  # type: ignore[arg-type]
    assert_same_speech(spoken, expected)
    chunks = list(runtime.stream("How are you today?", voice=voice, **given))  # type: ignore[arg-type]
    assert_same_speech(Audio.concatenate(chunks), expected)


def test_first_audio_reads_the_text_alone(
    runtime: Runtime, turns: list[Segment], read_positions: list[int], seed: int
) -> None:
    short = runtime.voice(turns[:1])
    long = runtime.voice([*turns, Segment("More.", oracle.speech_like(12.0, seed), 1)])
    assert long.positions > short.positions + 150
    work = []
    for voice in (short, long):
        read_positions.clear()
        with runtime.stream("Hello.", voice=voice, max_seconds=0.4) as stream:
            next(stream)
        work.append(list(read_positions))
    assert work[0] == work[1]
    assert len(work[0]) == 1
    assert work[0][0] < 20


def test_voices_of_a_batch_do_not_mix(runtime: Runtime, turns: list[Segment], seed: int) -> None:
    voices = [None, runtime.voice(turns), runtime.voice(turns[1:]), None]
    requests = [
        Request("Hello.", voice=voice, seed=seed + number, max_seconds=0.8) for number, voice in enumerate(voices)
    ]
    for request, spoken in zip(requests, runtime.speak_batch(requests), strict=True):
        assert_same_speech(spoken, runtime.speak_batch([request])[0])


def test_what_is_wrong_with_a_voice(
    runtime: Runtime, turns: list[Segment], tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Runtime.load(oracle.save(oracle.random_model(oracle.small_config(), 1), tmp_path_factory.mktemp("other")))
    with pytest.raises(errors.RequestError, match=r"made by another runtime\. Make it with `voice` of the one that"):
        runtime.speak("Hello.", voice=other.voice(turns))
    with pytest.raises(errors.RequestError, match=r"^voice is what `Runtime\.voice` returns, got str\.$"):
        runtime.speak("Hello.", voice="anna")  # type: ignore[arg-type]
    with pytest.raises(errors.RequestError, match="at least one"):
        runtime.voice([])
    with pytest.raises(errors.RequestError, match=r"list of aloud\.Segment, got str in it"):
        runtime.voice(["anna"])  # type: ignore[list-item]


def test_voice_and_text_together_fit_the_slots(runtime: Runtime, turns: list[Segment]) -> None:
    small = Runtime(runtime._model, runtime._tokenizer, runtime.sampling, "small", max_streams=1, max_positions=100)
    voice = small.voice(turns)
    text, _ = read_segments(small._model, small._tokenizer, [Segment("Hello.")], max_positions=100)
    left = 100 - voice.positions - len(text)
    assert small.speak("Hello.", voice=voice, max_seconds=(left + 1) * 0.08).duration <= (left + 1) * 0.08
    with pytest.raises(
        errors.ContextTooLong, match=rf"of 100 positions, so max_seconds=.* up to {(left + 1) * 0.08:.2f}"
    ):
        small.speak("Hello.", voice=voice, max_seconds=(left + 2) * 0.08)
    with pytest.raises(errors.ContextTooLong, match="the model's context of 100"):
        small.voice([*turns, *turns, *turns])


def test_a_voice_that_nobody_holds_is_forgotten(runtime: Runtime, turns: list[Segment]) -> None:
    voice = runtime.voice(turns)
    runtime.speak("Hello.", voice=voice, max_seconds=0.16)
    cache = weakref.ref(voice.prefix.cache)
    del voice
    gc.collect()
    assert cache() is None


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"max_streams": 0}, "max_streams must be a whole number from 1 to"),
        ({"max_streams": 2.5}, "max_streams must be a whole number from 1 to"),
        ({"max_streams": True}, "max_streams must be a whole number from 1 to"),
        ({"max_positions": 0}, "max_positions must be from 1 to the model's"),
        ({"max_positions": 10**6}, "max_positions must be from 1 to the model's"),
    ],
    ids=str,
)
def test_slots_that_cannot_be(runtime: Runtime, given: dict[str, int], sentence: str) -> None:
    with pytest.raises(errors.DeviceInvalid, match=sentence):
        Runtime(runtime._model, runtime._tokenizer, runtime.sampling, "small", **given)


def test_slots_beyond_the_memory_are_refused_at_once(runtime: Runtime) -> None:
    many = Runtime(runtime._model, runtime._tokenizer, runtime.sampling, "small", max_streams=4096)
    many._model = HugeModel(runtime._model)  # type: ignore[assignment]
    with pytest.raises(
        errors.OutOfMemory, match=r"^Room for 4096 streams of \d+ positions takes .* are free\. Load with"
    ):
        many.warm()


class HugeModel:
    """A model whose streams take a terabyte each, and that fails when it is asked for one."""

    def __init__(self, model: Csm) -> None:
        self.device, self.max_positions = model.device, model.max_positions

    def state_bytes(self, slots: int, positions: int) -> int:
        return slots * 10**12


def test_without_memory_for_a_voice_that_is_said(
    runtime: Runtime, turns: list[Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Csm, "copy_prefix", fails)
        with pytest.raises(errors.OutOfMemory, match=r"no memory to keep a voice of \d+ positions\. Make it shorter"):
            runtime.voice(turns)
    assert runtime.voice(turns).positions > 0
