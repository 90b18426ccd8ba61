"""Runtime: seeds, sampling, batches, guards, limits, the codec, and what goes wrong while it works."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aloud import Audio, Guards, Request, Runtime, Sampling, Segment, errors
from aloud.models.csm import Csm
from aloud.speech import Progress
from oracle import csm as oracle
from scripted import Frame, ScriptedModel, runtime_of, said

GENERATION = {
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 20,
    "depth_decoder_do_sample": True,
    "depth_decoder_temperature": 0.7,
    "depth_decoder_top_k": 10,
}


@dataclass(frozen=True)
class Pair:
    """One checkpoint, loaded by transformers and by Aloud."""

    theirs: Any
    ours: Runtime
    folder: Path


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    seed: int = request.config.getoption("--seed")
    model = oracle.random_model(oracle.small_config(positions=64), seed)
    folder = oracle.save(model, tmp_path_factory.mktemp("checkpoint"), **GENERATION)
    return Pair(model, Runtime.load(folder, device="cpu"), folder)


@pytest.fixture
def runtime(pair: Pair) -> Runtime:
    return pair.ours


def assert_same(audio: Audio, other: Audio) -> None:
    """Bit for bit."""
    np.testing.assert_array_equal(audio.codes, other.codes)
    np.testing.assert_array_equal(audio.samples, other.samples)


def spoken_codes(audio: Audio) -> list[int]:
    """The first codebook of what a scripted model said."""
    assert audio.codes is not None
    return audio.codes[:, 0].tolist()


# --- seeds and sampling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed_given", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_seed_repeats_a_run_exactly(runtime: Runtime, seed_given: int) -> None:
    first = runtime.speak("Hello.", seed=seed_given, max_seconds=0.4)
    assert first.seed == seed_given
    assert_same(first, runtime.speak("Hello.", seed=seed_given, max_seconds=0.4))


def test_seeds_that_differ_in_one_end_of_64_bits_differ(runtime: Runtime) -> None:
    seeds = [0, 1, 2**32, 2**63, 2**64 - 1]
    spoken = [runtime.speak("Hello.", seed=seed, temperature=1, max_seconds=0.4).codes for seed in seeds]
    assert len({codes.tobytes() for codes in spoken if codes is not None}) == len(seeds)


def test_without_a_seed_each_run_has_a_fresh_one_that_repeats_it(runtime: Runtime) -> None:
    first, second = (runtime.speak("Hello.", max_seconds=0.4) for _ in range(2))
    assert first.seed is not None
    assert first.seed != second.seed
    assert_same(first, runtime.speak("Hello.", seed=first.seed, max_seconds=0.4))


def test_the_checkpoint_says_how_it_is_sampled(runtime: Runtime, seed: int) -> None:
    assert runtime.sampling == Sampling(0.8, 20, 0.7, 10)
    by_default = runtime.speak("Hello.", seed=seed, max_seconds=0.8)
    in_full = runtime.speak(
        "Hello.", seed=seed, max_seconds=0.8, temperature=0.8, top_k=20, depth_temperature=0.7, depth_top_k=10
    )
    assert_same(by_default, in_full)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Sampling(0.8, 20, 0.7, 10)),
        ({"temperature": 0.5}, Sampling(0.5, 20, 0.5, 10)),
        ({"top_k": 5}, Sampling(0.8, 5, 0.7, 5)),
        ({"depth_temperature": 0.5}, Sampling(0.8, 20, 0.5, 10)),
        ({"depth_top_k": 5}, Sampling(0.8, 20, 0.7, 5)),
        ({"temperature": 0.5, "depth_temperature": 0.25}, Sampling(0.5, 20, 0.25, 10)),
        ({"top_k": 5, "depth_top_k": 3, "temperature": 0}, Sampling(0.0, 5, 0.0, 3)),
        ({"top_k": 0, "depth_temperature": 0}, Sampling(0.8, 0, 0.0, 0)),
    ],
    ids=str,
)
def test_what_is_given_for_the_whole_goes_for_both_decoders(given: dict[str, Any], expected: Sampling) -> None:
    model = ScriptedModel()
    runtime_of(model, Sampling(0.8, 20, 0.7, 10)).speak("Hello.", max_seconds=0.08, **given)
    assert [stream.sampling for stream in model.started] == [expected]


def test_greedy_needs_no_seed_to_repeat(runtime: Runtime) -> None:
    spoken = [runtime.speak("Hello.", temperature=0, seed=seed, max_seconds=0.8) for seed in (None, 0, 12)]
    assert_same(spoken[0], spoken[1])
    assert_same(spoken[0], spoken[2])


# --- batches and threads ----------------------------------------------------------------------------------------------


def mixed(seed: int) -> list[Request]:
    """Requests that share nothing but the model."""
    voice = [Segment("Hi there.", oracle.speech_like(0.7, seed), 1)]
    return [
        Request("Hello.", seed=1, max_seconds=0.8),
        Request("How are you today?", speaker=3, context=voice, seed=2, temperature=1.3, max_seconds=0.4),
        Request("I am fine.", context=[Segment("Well?"), *voice], temperature=0, max_seconds=1.2),
        Request("Thank you.", seed=2**64 - 1, top_k=3, depth_top_k=1, max_seconds=0.08),
        Request("And you?", seed=1, temperature=0.5, depth_temperature=2.0, max_seconds=0.96),
    ]


def test_a_batch_gives_each_request_what_it_gets_alone(runtime: Runtime, seed: int) -> None:
    requests = mixed(seed)
    together = runtime.speak_batch(requests)
    backwards = runtime.speak_batch(requests[::-1])[::-1]
    for request, one, other in zip(requests, together, backwards, strict=True):
        (alone,) = runtime.speak_batch([request])
        np.testing.assert_array_equal(one.codes, alone.codes)
        np.testing.assert_array_equal(other.codes, alone.codes)
        np.testing.assert_allclose(one.samples, alone.samples, atol=1e-4 * float(np.abs(alone.samples).max()))
        assert one.finish_reason == alone.finish_reason
        if request.seed is not None:
            assert one.seed == request.seed
        assert len(one.samples) <= round((request.max_seconds or 0) * 12.5) * 1920


def test_threads_that_share_a_runtime_get_their_own_speech(runtime: Runtime, seed: int) -> None:
    requests = mixed(seed)

    def speak(request: Request) -> list[np.ndarray | None]:
        return [runtime.speak_batch([request])[0].codes for _ in range(3)]

    expected = [runtime.speak_batch([request])[0].codes for request in requests]
    with ThreadPoolExecutor(len(requests)) as threads:
        for codes, spoken in zip(expected, threads.map(speak, requests), strict=True):
            for repeat in spoken:
                np.testing.assert_array_equal(repeat, codes)


# --- why it ended, guards, empty speech -------------------------------------------------------------------------------


def loud(count: int, first: int = 1) -> list[Frame]:
    return [said(first + index) for index in range(count)]


def silent(count: int, first: int = 500) -> list[Frame]:
    return [said(first + index, 0.0) for index in range(count)]


@pytest.mark.parametrize(
    ("script", "arguments", "reason", "frames"),
    [
        (loud(9), {}, "end", 9),
        (loud(9), {"max_seconds": 0.8}, "end", 9),
        (loud(9), {"max_seconds": 0.72}, "length", 9),
        (loud(9), {"max_seconds": 0.4}, "length", 5),
        (loud(500), {"text": "a"}, "text_length", 53),  # 4 s + 0.2 s for one letter
        (loud(500), {"text": "a", "max_seconds": 16.0}, "length", 200),
        (loud(500), {"text": "a", "max_seconds": 16.0, "guards": Guards()}, "text_length", 53),
        (loud(100), {"text": "a", "guards": Guards.off()}, "end", 100),
        (loud(3) + [said(7)] * 40, {}, "repeat", 3 + 13),
        (loud(3) + [said(7)] * 30, {"max_seconds": 8.0}, "end", 33),
        (loud(3) + silent(60), {"guards": Guards.off()}, "end", 63),
        (loud(3) + silent(60), {"max_seconds": 8.0}, "end", 63),
        (loud(3) + silent(60), {"text": "A text of some length."}, "silence", 3 + 2),
    ],
    ids=[
        "ends by itself", "ends before the length", "length, not looking for the end", "length", "text guard",
        "a length switches guards off", "unless they are asked for", "guards off", "repeating", "repeating is let go",
        "silence with guards off", "silence with a length", "silence",
    ],
)  # fmt: skip
def test_why_speech_ended(script: list[Frame], arguments: dict[str, Any], reason: str, frames: int) -> None:
    spoken = runtime_of(ScriptedModel({1: script})).speak(**{"text": "Hello.", "seed": 1, **arguments})
    assert spoken.finish_reason == reason
    assert spoken.codes is not None
    assert len(spoken.codes) == frames
    assert len(spoken.samples) == frames * 8


def test_a_silent_tail_is_trimmed_and_other_silence_is_kept() -> None:
    script = silent(5) + loud(3) + silent(6, 600) + loud(2, 50) + silent(9, 700)
    spoken = runtime_of(ScriptedModel({1: script})).speak("Hello.", seed=1)
    # 0.16 s of the tail stay, two frames.
    assert spoken_codes(spoken) == [int(frame.codes[0]) for frame in script[: 5 + 3 + 6 + 2 + 2]]
    np.testing.assert_array_equal(spoken.samples, torch.cat([frame.samples for frame in script[:18]]).numpy())
    assert spoken.finish_reason == "end"


def test_how_much_of_the_tail_is_kept_is_the_guards_to_say() -> None:
    script = loud(3) + silent(9)
    runtime = runtime_of(ScriptedModel({1: script}))
    for seconds, frames in ((0.0, 3), (0.08, 4), (0.1, 5), (10.0, 12)):
        assert len(spoken_codes(runtime.speak("Hello.", seed=1, guards=Guards(silence_kept_seconds=seconds)))) == frames
    assert len(spoken_codes(runtime.speak("Hello.", seed=1, guards=Guards(silence_seconds=None)))) == 12


@pytest.mark.parametrize("nothing", [[], silent(20), silent(60)], ids=["no frame", "silence, end", "silence, guard"])
@pytest.mark.parametrize(("first", "second"), [(5, 6), (2**64 - 1, 0)], ids=["next", "wraps"])
def test_empty_speech_is_tried_again_with_the_next_seed(nothing: list[Frame], first: int, second: int) -> None:
    model = ScriptedModel({first: nothing, second: loud(4)})
    spoken = runtime_of(model).speak("Hello.", seed=first)
    assert spoken.seed == second
    assert spoken_codes(spoken) == [1, 2, 3, 4]


@pytest.mark.parametrize("how", ["speak", "stream"])
@pytest.mark.parametrize(("first", "second"), [(5, 6), (2**64 - 1, 0)], ids=["next", "wraps"])
def test_nothing_spoken_twice_is_an_error_that_names_both_seeds(how: str, first: int, second: int) -> None:
    model = ScriptedModel({first: [], second: []})
    sentence = rf"The model said nothing, with seeds {first} and {second}\. Try another text, context or temperature\."
    with pytest.raises(errors.NothingSpoken, match=sentence):
        list(getattr(runtime_of(model), how)("Hello.", seed=first))
    assert len(model.ticks) == 2


@pytest.mark.parametrize("how", ["speak", "stream"])
def test_greedy_is_not_tried_again(how: str) -> None:
    model = ScriptedModel({5: [], 6: loud(4)})
    runtime = runtime_of(model)
    with pytest.raises(errors.NothingSpoken, match=r"with temperature 0 it would say the same again\."):
        list(getattr(runtime, how)("Hello.", seed=5, temperature=0))
    assert len(model.ticks) == 1
    assert runtime.speak("Hello.", seed=5, temperature=0, depth_temperature=0.5).seed == 6


def test_only_the_empty_ones_of_a_batch_are_tried_again() -> None:
    model = ScriptedModel({1: loud(3), 5: [], 6: loud(2, 40), 9: loud(4, 80)})
    first, second, third = runtime_of(model).speak_batch([Request("Hello.", seed=seed) for seed in (1, 5, 9)])
    assert [spoken_codes(audio) for audio in (first, second, third)] == [[1, 2, 3], [40, 41], [80, 81, 82, 83]]
    assert [audio.seed for audio in (first, second, third)] == [1, 6, 9]
    assert [stream.seed for stream in model.started] == [1, 5, 9, 6]


def test_a_checkpoint_that_ends_at_once_has_nothing_to_say(tmp_path: Path, seed: int) -> None:
    """With heads of zeros all logits are equal, and the lowest token, 0, ends the speech."""
    model = oracle.random_model(oracle.small_config(), seed)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.depth_decoder.codebooks_head.weight.zero_()
    runtime = Runtime.load(oracle.save(model, tmp_path), device="cpu")
    with pytest.raises(errors.NothingSpoken):
        runtime.speak("Hello.", temperature=0)


@pytest.mark.parametrize("part", ["backbone", "depth decoder"])
def test_weights_of_nan_are_an_error_and_no_token(part: str, tmp_path: Path, seed: int) -> None:
    model = oracle.random_model(oracle.small_config(), seed)
    with torch.no_grad():
        if part == "backbone":
            model.lm_head.weight[5] = torch.nan
        else:
            model.depth_decoder.codebooks_head.weight[1, 0, 5] = torch.nan
    runtime = Runtime.load(oracle.save(model, tmp_path), device="cpu")
    with pytest.raises(errors.LogitsNotFinite, match=r"not finite in frame 1\."):
        runtime.speak("Hello.", seed=seed)


def test_progress_is_written_to_stderr_in_seconds_of_audio(capsys: pytest.CaptureFixture[str]) -> None:
    runtime = runtime_of(ScriptedModel({1: loud(25)}))
    runtime.speak("Hello.", seed=1)
    assert capsys.readouterr() == ("", "")
    runtime.speak("Hello.", seed=1, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2.0 s of audio in 00:00, " in err
    assert "x real time" in err


def test_the_bar_counts_what_was_received() -> None:
    """Who breaks off has all that it showed."""
    received: list[Audio] = []
    with Progress(shown=True) as bar:
        for chunk in bar.over([Audio(np.zeros(1920, np.float32), 24_000)] * 3):
            assert bar.n == pytest.approx(0.08 * len(received))
            received.append(chunk)
        assert bar.n == pytest.approx(0.24)


# --- what the context leaves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 1, 7], ids=lambda left: f"{left} positions left")
def test_speech_fills_the_context_as_that_of_transformers_does(pair: Pair, left: int, seed: int) -> None:
    """`left` free positions are left + 1 frames, for the last frame is never read back."""
    limit = pair.theirs.config.max_position_embeddings
    text = "Hello from Aloud."

    def conversation(frames: int) -> list[tuple[int, str, np.ndarray | None]]:
        return [(1, "Hi.", oracle.speech_like(frames * 0.08, seed)), (0, text, None)]

    def positions(frames: int) -> int:
        return oracle.inputs(pair.folder, pair.theirs.config, conversation(frames)).input_ids.shape[1]

    frames = 1 + limit - left - positions(1)
    segments = conversation(frames)
    given = oracle.inputs(pair.folder, pair.theirs.config, segments)
    assert given.input_ids.shape[1] == limit - left
    expected = oracle.greedy_codes(pair.theirs, given, left + 1)
    context = [Segment("Hi.", segments[0][2], 1)]
    spoken = pair.ours.speak(text, context=context, temperature=0, guards=Guards.off())
    expected.assert_same(spoken.codes)
    assert spoken.codes is not None
    assert len(spoken.codes) == left + 1
    assert spoken.finish_reason == "length"
    with pytest.raises(errors.ContextTooLong, match=rf"up to {(left + 1) * 0.08:.2f} s would fit"):
        pair.ours.speak(text, context=context, temperature=0, max_seconds=(left + 2) * 0.08)


# --- codec and score --------------------------------------------------------------------------------------------------


def test_encode_and_decode_are_those_of_transformers(pair: Pair, seed: int) -> None:
    samples = oracle.speech_like(1.03, seed)
    codes = pair.ours.encode(samples)
    with torch.no_grad():
        expected = pair.theirs.codec_model.encode(torch.from_numpy(samples)[None, None], num_quantizers=4).audio_codes[
            0
        ]
        sound = pair.theirs.codec_model.decode(expected[None]).audio_values[0, 0].numpy()
    assert codes.dtype == np.int64
    np.testing.assert_array_equal(codes, expected.T.numpy())

    decoded = pair.ours.decode(codes)
    assert decoded.sample_rate == 24_000
    np.testing.assert_array_equal(decoded.codes, codes)
    np.testing.assert_allclose(decoded.samples, sound, atol=1e-4 * float(np.abs(sound).max()))
    assert_same(decoded, pair.ours.decode(torch.from_numpy(codes).to(torch.int32)))


def test_what_was_spoken_decodes_to_the_same_sound(runtime: Runtime, seed: int) -> None:
    spoken = runtime.speak("Hello.", seed=seed, max_seconds=2.0)
    assert spoken.codes is not None
    decoded = runtime.decode(spoken.codes)
    np.testing.assert_allclose(decoded.samples, spoken.samples, atol=1e-5 * float(np.abs(spoken.samples).max()))


def test_encode_takes_what_a_segment_takes(runtime: Runtime, seed: int, tmp_path: Path) -> None:
    samples = oracle.speech_like(0.5, seed)
    Audio(samples, 24_000).save(tmp_path / "a.wav")
    stored = np.round(samples * 32768).clip(-32768, 32767).astype(np.int16)
    expected = runtime.encode(stored)
    assert len(expected) == 7  # 6.25 frames
    for source in (tmp_path / "a.wav", (tmp_path / "a.wav").read_bytes(), (stored, 24_000), torch.from_numpy(stored)):
        np.testing.assert_array_equal(runtime.encode(source), expected)
    with pytest.raises(errors.AudioEmpty):
        runtime.encode(np.zeros(0, np.float32))


def test_few_codebooks_and_no_frames_decode(runtime: Runtime) -> None:
    assert len(runtime.decode(np.zeros((3, 1), np.int64)).samples) == 3 * 1920
    assert len(runtime.decode(np.zeros((0, 4), np.int64)).samples) == 0


@pytest.mark.parametrize(
    "codes",
    [
        np.zeros(4, np.int64),
        np.zeros((1, 2, 4), np.int64),
        np.zeros((2, 4), np.float32),
        np.zeros((2, 4), bool),
        np.zeros((2, 0), np.int64),
        np.zeros((2, 5), np.int64),
        np.full((2, 4), -1),
        np.full((2, 4), 64),
    ],
    ids=[
        "one axis",
        "three axes",
        "floats",
        "booleans",
        "no codebook",
        "too many codebooks",
        "-1",
        "beyond the codebook",
    ],
)
def test_codes_that_cannot_be_decoded_are_refused(runtime: Runtime, codes: np.ndarray) -> None:
    with pytest.raises(errors.CodesInvalid, match=r"^Codes .*(as `encode` returns them|leave out frames)"):
        runtime.decode(codes)


@pytest.mark.parametrize("codes", ["abc", None, [[1, 2], [3]], np.array([[None, 1]])], ids=str)
def test_codes_that_are_no_array_are_refused(runtime: Runtime, codes: object) -> None:
    with pytest.raises(errors.CodesInvalid, match="array of integers"):
        runtime.decode(codes)  # type: ignore[arg-type]


def test_a_score_needs_audio(runtime: Runtime) -> None:
    with pytest.raises(errors.RequestError, match=r"list of aloud\.Segment"):
        runtime.score(None)  # type: ignore[arg-type]
    for segments in ([], [Segment("Hello.")]):
        with pytest.raises(errors.RequestError, match="no segment has audio"):
            runtime.score(segments)


def test_a_score_refuses_wrong_segments(runtime: Runtime, seed: int) -> None:
    good = Segment("Hi.", oracle.speech_like(0.4, seed))
    for bad, error in (
        (Segment("a", speaker=-1), errors.SpeakerInvalid),
        (Segment(""), errors.TextEmpty),
        (Segment("a", np.zeros(0, np.float32)), errors.AudioEmpty),
        ("text", errors.RequestError),
    ):
        with pytest.raises(error):
            runtime.score([good, bad])  # type: ignore[list-item]


def test_a_score_may_fill_the_context_and_no_more(pair: Pair, seed: int) -> None:
    limit = pair.theirs.config.max_position_embeddings
    sound = oracle.speech_like(limit * 0.08, seed)
    given = oracle.inputs(pair.folder, pair.theirs.config, [(0, "Hi.", sound[:1920])])
    frames = limit - given.input_ids.shape[1] + 1
    (part,) = pair.ours.score([Segment("Hi.", sound[: frames * 1920])]).segments
    assert part is not None
    assert part.shape == (frames + 1, 4)
    assert np.isfinite(part).all()
    assert (part < 0).all()
    with pytest.raises(errors.ContextTooLong, match=rf"takes {limit + 1} positions, 1 more than the model's context"):
        pair.ours.score([Segment("Hi.", sound[: frames * 1920 + 1])])


# --- devices, memory, names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"device": "gpu"}, r"There is no device 'gpu'\. Choose \"auto\", \"cpu\", \"cuda\" or \"cuda:N\"\."),
        ({"device": "mps"}, r'Device "mps" is not supported\.'),
        ({"device": None}, r"There is no device None|not supported"),
        ({"device": "cuda"}, r'Device "cuda" was asked for, but torch sees 0 CUDA devices\. Choose "cpu"'),
        ({"device": "cuda:7"}, r'Device "cuda:7" was asked for, but torch sees 0 CUDA devices\.'),
        ({"device": torch.device("cuda", 1)}, r'Device "cuda:1" was asked for'),
        ({"device": "cpu", "dtype": "int8"}, r"There is no dtype 'int8' to run in\. Choose \"auto\", 'float32'"),
        ({"device": "cpu", "dtype": torch.int64}, r"There is no dtype torch\.int64"),
        ({"device": "cpu", "dtype": torch.float64}, r"There is no dtype torch\.float64"),
    ],
    ids=str,
)
def test_a_device_or_dtype_that_is_not_here(
    arguments: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(errors.DeviceInvalid, match=sentence):  # and not ModelNotFound: nothing was looked for yet
        Runtime.load("./there-is-no-such-folder", **arguments)


def test_what_a_runtime_is(pair: Pair) -> None:
    runtime = pair.ours
    assert (runtime.sample_rate, runtime.frame_rate) == (24_000, 12.5)
    assert (runtime.device, runtime.dtype) == (torch.device("cpu"), torch.float32)
    assert runtime.config.codebooks == 4
    assert runtime.name == pair.folder.name
    assert repr(runtime) == f"Runtime({pair.folder.name!r}, device='cpu', dtype='float32')"


def beyond_memory(*_: object) -> torch.Tensor:
    """torch's own failure to allocate."""
    return torch.empty(2**60, dtype=torch.uint8)


def beyond_python(*_: object) -> bytes:
    raise MemoryError


def on_a_gpu(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("fail", [beyond_memory, beyond_python, on_a_gpu], ids=["torch", "Python", "CUDA"])
@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("allocate", r"^Room for \d+ streams of \d+ positions takes more memory than cpu has.*smaller max_streams or"),
        ("start", r"^There was not enough memory for a step.*smaller max_streams or max_positions\.$"),
        ("prefill", r"^There was not enough memory for a step"),
        ("draw", r"^There was not enough memory for a step"),
        ("decode", r"^There was not enough memory for a step"),
    ],
)
@pytest.mark.parametrize("how", ["speak", "stream"])
def test_running_out_of_memory_is_said_in_words(
    pair: Pair, how: str, what: str, sentence: str, fail: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime.load(pair.folder, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        patch.setattr(Csm, what, fail)
        with pytest.raises(errors.OutOfMemory, match=sentence):
            list(getattr(runtime, how)("Hello.", max_seconds=0.08))
    assert len(runtime.speak("Hello.", max_seconds=0.08).samples) == 1920  # and it goes on


def test_encoding_that_runs_out_of_memory_says_so(runtime: Runtime, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr("aloud.codec.mimi.allocate_encoder_state", lambda *_, **__: beyond_memory())
    sound = oracle.speech_like(0.2, seed)
    for call in (lambda: runtime.encode(sound), lambda: runtime.speak("Hello.", context=[Segment("Hi.", sound)])):
        with pytest.raises(errors.OutOfMemory, match=r"^Encoding audio needs more memory than cpu has"):
            call()


def test_another_fault_is_not_called_memory(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    with monkeypatch.context() as patch:
        patch.setattr(Csm, "draw", fail)
        with pytest.raises(errors.StepFailed, match="size of tensor a"):
            runtime.speak("Hello.", max_seconds=0.08)
    runtime.speak("Hello.", max_seconds=0.08)


@pytest.mark.parametrize("model", [None, 5, b"folder", ["folder"]], ids=repr)
def test_a_model_is_a_name_or_a_folder(model: Any) -> None:
    with pytest.raises(errors.ModelNotFound, match=rf"^A model is a name on .* got {type(model).__name__}\. Give"):
        Runtime.load(model)
