"""Audio: every way in, every way out, against scipy, the wave module and analytic sines."""

from __future__ import annotations

import base64
import io
import os
import struct
import subprocess
import sys
import threading
import types
import wave
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.io.wavfile
import scipy.signal
import soundfile
import torch

from aloud import audio_file, errors
from aloud.audio import Audio, read_audio

RATE = 24_000
RATES = (8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000)
FORMATS = ("wav", "flac", "ogg", "mp3")
MP3_STARTS = (b"ID3", b"\xff\xf2", b"\xff\xf3", b"\xff\xfa", b"\xff\xfb")  # a tag, or a frame of layer III


@pytest.fixture
def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def sine(seconds: float, rate: int = RATE, hertz: float = 440.0, amplitude: float = 0.5) -> np.ndarray:
    """float32 [samples]; its phase is 0.3 at time 0, so that it has no symmetry to hide behind."""
    times = np.arange(round(seconds * rate)) / rate
    return (amplitude * np.sin(2 * np.pi * hertz * times + 0.3)).astype(np.float32)


def file_bytes(samples: np.ndarray, rate: int = RATE, format: str = "WAV", subtype: str = "PCM_16") -> bytes:
    """A file written by soundfile; samples [n] or [n, channels]."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def saved(audio: Audio, format: str) -> bytes:
    buffer = io.BytesIO()
    audio.save(buffer, format=format)
    return buffer.getvalue()


def decibels(error: np.ndarray, reference: np.ndarray) -> float:
    """Level of the error against the reference's."""
    return float(10 * np.log10(np.mean(np.square(error)) / np.mean(np.square(reference))))


# --- the class --------------------------------------------------------------------------------------------------------


def test_samples_and_codes_are_kept_as_float32_and_int64() -> None:
    audio = Audio(np.linspace(-1, 1, 48_000), np.int64(RATE), codes=np.zeros((25, 32), dtype=np.int32))
    assert audio.samples.dtype == np.float32
    assert audio.codes is not None
    assert audio.codes.dtype == np.int64
    assert type(audio.sample_rate) is int
    assert audio.duration == 2.0


def test_repr_is_one_short_line_without_arrays() -> None:
    audio = Audio(np.zeros(76_800, np.float32), RATE, np.zeros((40, 32), np.int64), seed=7, finish_reason="end")
    assert repr(audio) == "Audio(3.20 s, 24000 Hz, 40 frames, seed=7, finish_reason='end')"
    assert repr(Audio(np.zeros(100, np.float32), 8_000)) == "Audio(0.01 s, 8000 Hz)"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((np.zeros((2, 4), np.float32), RATE), errors.AudioShapeInvalid),
        ((np.zeros(4, np.int16), RATE), errors.AudioShapeInvalid),
        (([0.0, 0.1], RATE), errors.AudioShapeInvalid),
        ((torch.zeros(4), RATE), errors.AudioShapeInvalid),
        ((np.zeros(4, np.float32), 0), errors.AudioRateInvalid),
        ((np.zeros(4, np.float32), 24e3), errors.AudioRateInvalid),
        ((np.zeros(4, np.float32), RATE, np.zeros(4, np.int64)), errors.CodesInvalid),
        ((np.zeros(4, np.float32), RATE, np.zeros((4, 2))), errors.CodesInvalid),
    ],
    ids=["two axes", "integers", "list", "tensor", "rate 0", "float rate", "codes of one axis", "float codes"],
)
def test_what_is_no_audio_is_refused(arguments: tuple, error: type[Exception]) -> None:
    with pytest.raises(error):
        Audio(*arguments)


def test_concatenate_joins_the_chunks_of_a_stream(random: np.random.Generator) -> None:
    samples = random.uniform(-1, 1, 5 * 1920).astype(np.float32)
    codes = random.integers(0, 2048, (5, 8))
    chunks = [Audio(samples[i * 1920 : (i + 1) * 1920], RATE, codes[i : i + 1], seed=3) for i in range(4)]
    chunks.append(Audio(samples[4 * 1920 :], RATE, codes[4:], seed=3, finish_reason="end"))
    whole = Audio.concatenate(chunks)
    np.testing.assert_array_equal(whole.samples, samples)
    np.testing.assert_array_equal(whole.codes, codes)
    assert (whole.seed, whole.finish_reason, whole.sample_rate) == (3, "end", RATE)

    mixed = Audio.concatenate([chunks[0], Audio(samples[:10], RATE, seed=4)])
    assert mixed.codes is None
    assert mixed.seed is None


def test_concatenate_refuses_nothing_and_two_rates() -> None:
    with pytest.raises(errors.AudioEmpty):
        Audio.concatenate([])
    with pytest.raises(errors.AudioRateInvalid, match=r"\[8000, 24000\]"):
        Audio.concatenate([Audio(sine(0.1), RATE), Audio(sine(0.1, 8_000), 8_000)])


# --- saving -----------------------------------------------------------------------------------------------------------


def test_wav_is_16_bit_pcm_for_wave_and_scipy(tmp_path: Path, random: np.random.Generator) -> None:
    samples = random.uniform(-1, 1, 5_001).astype(np.float32)
    path = tmp_path / "a.wav"
    Audio(samples, RATE).save(path)

    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE)
        stored = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    assert np.abs(stored / 32768 - samples).max() <= 1 / 32768  # half a step, and a whole one just below +1
    rate, by_scipy = scipy.io.wavfile.read(path)
    assert rate == RATE
    np.testing.assert_array_equal(by_scipy, stored)
    np.testing.assert_array_equal(read_audio(path), (stored / 32768).astype(np.float32))


@pytest.mark.parametrize("format", ["wav", "flac"])
def test_every_16_bit_value_survives_unchanged(format: str) -> None:
    values = np.arange(-32768, 32768).astype(np.int16)
    data = saved(Audio(read_audio(values), RATE), format)
    stored, _ = soundfile.read(io.BytesIO(data), dtype="int16")
    np.testing.assert_array_equal(stored, values)
    np.testing.assert_array_equal(read_audio(data), values.astype(np.float32) / 32768)


@pytest.mark.parametrize("format", FORMATS)
def test_beyond_full_scale_is_clipped_not_wrapped(format: str) -> None:
    loud = sine(1.0, amplitude=4.0)
    got = read_audio(saved(Audio(loud, RATE), format))[: len(loud)]
    middle = slice(2_000, -2_000)
    error = decibels((got - np.clip(loud, -1, 1))[middle], loud[middle])
    assert error < {"wav": -90, "flac": -90, "ogg": -25, "mp3": -25}[format]  # a wrapped sample is an error of 2


@pytest.mark.parametrize("ending", [".wav", ".WAV", ".flac", ".ogg", ".Ogg", ".mp3"])
@pytest.mark.parametrize("rate", [16_000, RATE, 44_100])
def test_every_format_comes_back(ending: str, rate: int, tmp_path: Path) -> None:
    samples = sine(1.5, rate)
    path = tmp_path / f"a b é{ending}"
    Audio(samples, rate).save(str(path))

    kind = ending[1:].lower()
    assert path.read_bytes().startswith({"wav": b"RIFF", "flac": b"fLaC", "ogg": b"OggS", "mp3": MP3_STARTS}[kind])
    info = soundfile.info(path)
    assert info.samplerate == rate
    assert info.frames == len(samples)
    got = read_audio(path, sample_rate=rate)
    middle = slice(rate // 10, -rate // 10)
    limit = {"wav": -80, "flac": -80, "ogg": -30, "mp3": -30}[kind]
    assert decibels((got - samples)[middle], samples[middle]) < limit


def test_long_ogg_is_written_in_parts() -> None:
    samples = sine(400.0, 8_000)
    assert soundfile.info(io.BytesIO(saved(Audio(samples, 8_000), "ogg"))).frames == len(samples)


def test_file_objects_need_a_format_and_may_be_unbuffered(tmp_path: Path) -> None:
    audio = Audio(sine(0.5), RATE)
    expected = saved(audio, "wav")
    with open(tmp_path / "raw", "wb", buffering=0) as file:
        audio.save(file, format="wav")
    assert (tmp_path / "raw").read_bytes() == expected
    read_end, write_end = os.pipe()
    received: list[bytes] = []

    def receive() -> None:
        with open(read_end, "rb") as file:
            received.append(file.read())

    reader = threading.Thread(target=receive)
    reader.start()
    with open(write_end, "wb", buffering=0) as pipe:  # cannot seek, and takes 64 KiB at a time
        audio.save(pipe, format="WAV")
    reader.join(10)
    assert received == [expected]
    with pytest.raises(errors.AudioUnwritable, match="say format="):
        audio.save(io.BytesIO())
    with pytest.raises(errors.AudioUnwritable, match="binary mode"):
        audio.save(io.StringIO(), format="wav")  # type: ignore[arg-type]
    closed = io.BytesIO()
    closed.close()
    with pytest.raises(errors.AudioUnwritable, match="closed"):
        audio.save(closed, format="wav")
    with pytest.raises(errors.AudioUnwritable, match="not a NoneType"):
        audio.save(None, format="wav")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a.m4a", "a", "a.", ".wav", "a.wav.txt"])
def test_unknown_endings_name_those_that_work(name: str, tmp_path: Path) -> None:
    audio = Audio(sine(0.1), RATE)
    with pytest.raises(errors.AudioUnwritable, match=r"\.wav, \.flac, \.ogg, \.mp3"):
        audio.save(tmp_path / name)
    audio.save(tmp_path / name, format="wav")
    assert scipy.io.wavfile.read(tmp_path / name)[0] == RATE
    with pytest.raises(errors.AudioUnwritable, match="wav, flac, ogg or mp3"):
        audio.save(tmp_path / name, format="aac")


def test_what_cannot_be_saved_leaves_no_file(tmp_path: Path) -> None:
    audio = Audio(sine(0.1), RATE)
    with pytest.raises(errors.AudioUnwritable, match="there is no folder"):
        audio.save(tmp_path / "missing" / "a.wav")
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(errors.AudioUnwritable, match="it is a folder"):
        audio.save(tmp_path / "folder.wav")
    with pytest.raises(errors.AudioUnwritable, match="null"):
        audio.save(tmp_path / "a\0.wav")
    with pytest.raises(errors.AudioUnwritable, match="too long"):
        audio.save(tmp_path / f"{'a' * 300}.wav")
    with pytest.raises(errors.AudioUnwritable, match="MP3 cannot hold audio at 10000 Hz"):
        Audio(sine(0.1), 10_000).save(tmp_path / "a.mp3")
    with pytest.raises(errors.AudioEmpty):
        Audio(np.zeros(0, np.float32), RATE).save(tmp_path / "a.wav")
    with pytest.raises(errors.AudioNotFinite, match="1 NaN and 2 infinite"):
        Audio(np.array([0, np.nan, np.inf, -np.inf], np.float32), RATE).save(tmp_path / "a.wav")
    assert os.listdir(tmp_path) == ["folder.wav"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"old")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(errors.AudioUnwritable, match="No space left"):
        Audio(sine(0.1), RATE).save(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.wav"]


def test_saving_over_a_link_replaces_its_target_and_obeys_the_umask(tmp_path: Path) -> None:
    target, link = tmp_path / "target.wav", tmp_path / "link.wav"
    target.write_bytes(b"old")
    link.symlink_to(target)
    mask = os.umask(0o027)
    try:
        Audio(sine(0.1), RATE).save(link)
    finally:
        os.umask(mask)
    assert link.is_symlink()
    assert scipy.io.wavfile.read(target)[0] == RATE
    assert target.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_write_protected_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"old")
    path.chmod(0o444)
    with pytest.raises(errors.AudioUnwritable):
        Audio(sine(0.1), RATE).save(path)
    assert path.read_bytes() == b"old"


def test_saving_to_a_named_pipe_writes_into_it(tmp_path: Path) -> None:
    path = tmp_path / "pipe.wav"
    os.mkfifo(path)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(path.read_bytes()))
    reader.start()
    Audio(sine(0.1), RATE).save(path)
    reader.join(10)
    assert received == [saved(Audio(sine(0.1), RATE), "wav")]


# --- reading arrays ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "g"])
def test_float_arrays_are_taken_as_they_are(dtype: str, random: np.random.Generator) -> None:
    array = random.uniform(-1, 1, 1_000).astype(dtype)
    got = read_audio(array)
    assert got.dtype == np.float32
    assert got.dtype.isnative
    np.testing.assert_array_equal(got, array.astype(np.float32))
    got[:] = 9
    assert np.abs(array).max() <= 1, "the result shares the source's memory"


@pytest.mark.parametrize("dtype", ["i1", "i2", ">i2", "i4", "u1", "u2", "u4"])
def test_integers_are_scaled_by_their_range(dtype: str) -> None:
    limits = np.iinfo(dtype)
    half = 1 << (limits.bits - 1)
    middle = 0 if limits.min < 0 else half
    values = [limits.min, middle, middle + half // 2, middle - half // 4, limits.max]
    exact = [-1.0, 0.0, 0.5, -0.25, (half - 1) / half]
    np.testing.assert_array_equal(read_audio(np.array(values, dtype=dtype)), np.array(exact, np.float32))


@pytest.mark.parametrize("values", [np.arange(9), np.arange(9, dtype="u8"), torch.arange(9)], ids=["i8", "u8", "torch"])
def test_integers_of_64_bits_are_refused(values: np.ndarray | torch.Tensor) -> None:
    """NumPy makes them of a list of int16 samples, which would be silence by the range of their type."""
    with pytest.raises(errors.AudioShapeInvalid, match=r"u?int64") as caught:
        read_audio(values)
    assert "int16" in str(caught.value)


TORCH_DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
]  # fmt: skip


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_tensors_are_read_like_arrays(dtype: torch.dtype, generator: torch.Generator) -> None:
    tensor = (torch.rand(500, generator=generator) * 2 - 1) * (1 if dtype.is_floating_point else 100)
    tensor = tensor.abs().to(dtype) if dtype == torch.uint8 else tensor.to(dtype)
    if dtype.is_floating_point:
        np.testing.assert_array_equal(read_audio(tensor), tensor.float().numpy())
    else:
        np.testing.assert_array_equal(read_audio(tensor), read_audio(tensor.numpy()))
    stereo = torch.stack([tensor, tensor], dim=1)
    np.testing.assert_array_equal(read_audio(stereo.T), read_audio(tensor))
    np.testing.assert_array_equal(read_audio((stereo, RATE)), read_audio(tensor))


def test_parameters_and_tensors_with_gradients_are_read() -> None:
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 100))
    exact = torch.linspace(-1, 1, 100).numpy()
    np.testing.assert_array_equal(read_audio(parameter), exact)
    np.testing.assert_array_equal(read_audio(parameter * 0.5), exact / 2)


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
@pytest.mark.parametrize("samples", [8, 9, 1_000])
def test_the_shorter_axis_is_channels_and_is_averaged(channels: int, samples: int, random: np.random.Generator) -> None:
    array = random.uniform(-1, 1, (channels, samples)).astype(np.float32)
    expected = sum(channel.astype(np.float64) for channel in array) / channels
    np.testing.assert_allclose(read_audio(array), expected, atol=1e-7, rtol=0)
    np.testing.assert_array_equal(read_audio(np.asfortranarray(array)), read_audio(array))
    if channels != samples:  # a square array is [channels, samples] either way
        np.testing.assert_array_equal(read_audio(array.T), read_audio(array))


def test_an_array_has_the_rate_asked_for_unless_it_says() -> None:
    array = sine(0.5)
    np.testing.assert_array_equal(read_audio(array), array)
    np.testing.assert_array_equal(read_audio(array, sample_rate=16_000), array)
    assert len(read_audio((array, RATE), sample_rate=16_000)) == 8_000
    assert len(read_audio(Audio(array, RATE), sample_rate=16_000)) == 8_000
    np.testing.assert_array_equal(read_audio((array, np.float64(RATE))), array)


@pytest.mark.parametrize(
    ("source", "error", "sentence"),
    [
        (np.zeros(0), errors.AudioEmpty, "no samples"),
        (np.zeros((2, 0)), errors.AudioEmpty, "no samples"),
        (np.zeros((9, 9)), errors.AudioShapeInvalid, "at most 8"),
        (np.zeros((50, 9)), errors.AudioShapeInvalid, r"\(50, 9\)"),
        (np.zeros((1, 1, 50)), errors.AudioShapeInvalid, r"\(1, 1, 50\)"),
        (np.float32(0.5), errors.AudioUnreadable, "float32"),
        (np.array(0.5), errors.AudioShapeInvalid, r"\(\)"),
        (np.zeros(5, bool), errors.AudioShapeInvalid, "bool"),
        (np.zeros(5, complex), errors.AudioShapeInvalid, "complex"),
        (np.array(["a"]), errors.AudioShapeInvalid, "dtype"),
        (np.array([0.1], object), errors.AudioShapeInvalid, "object"),
        (torch.zeros(5, dtype=torch.bool), errors.AudioShapeInvalid, "bool"),
        (torch.zeros(5, device="meta"), errors.AudioShapeInvalid, "meta"),
        (torch.zeros(5).to_sparse(), errors.AudioShapeInvalid, "sparse"),
        (np.array([0, np.nan, np.inf, -np.inf, np.nan, np.nan]), errors.AudioNotFinite, "3 NaN and 2 infinite"),
        (np.array([[0, np.inf, 0], [0, -np.inf, 0]]), errors.AudioNotFinite, "0 NaN and 2 infinite"),
        (torch.tensor([0.0, float("nan")], dtype=torch.bfloat16), errors.AudioNotFinite, "1 NaN"),
        (np.array([0.0, 1e300]), errors.AudioNotFinite, "0 NaN and 1 infinite"),
        ((np.float32(3.4e38) * np.sign(sine(0.1, 48_000)), 48_000), errors.AudioNotFinite, "0 NaN"),
        ((np.zeros(9), 7_999), errors.AudioRateInvalid, "7999 Hz"),
        ((np.zeros(9), 192_001), errors.AudioRateInvalid, "192001 Hz"),
        ((np.zeros(9), 44_100.5), errors.AudioRateInvalid, "44100.5 Hz"),
        ((np.zeros(9), float("nan")), errors.AudioRateInvalid, "8000 to 192000"),
        ((np.zeros(9), None), errors.AudioRateInvalid, "NoneType"),
        ((np.zeros(9), "fast"), errors.AudioRateInvalid, "str"),
        ((RATE, np.zeros(9)), errors.AudioShapeInvalid, r"\(array, rate in Hz\), not \(int, ndarray\)"),
        ((np.zeros(9),), errors.AudioShapeInvalid, "tuple"),
        (("a.wav", RATE), errors.AudioShapeInvalid, "tuple"),
        ((np.zeros(1), 192_000), errors.AudioEmpty, "shorter than one sample"),
        ([0.0, 0.1], errors.AudioUnreadable, "list"),
        (None, errors.AudioUnreadable, "NoneType"),
        (7, errors.AudioUnreadable, "int"),
        (np.zeros(240_001), errors.AudioTooLong, r"10\.00 s long and may be at most 10\.00 s"),
        ((np.zeros((2, 480_001)), 48_000), errors.AudioTooLong, "at most"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_arrays_get_one_sentence(source: object, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence) as caught:
        read_audio(source, max_seconds=10)  # type: ignore[arg-type]
    assert caught.type is error
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_exactly_the_longest_length_is_allowed() -> None:
    assert len(read_audio(np.zeros(2_400), max_seconds=0.1)) == 2_400
    assert len(read_audio(file_bytes(np.zeros(4_410), 44_100), max_seconds=0.1)) == 2_400
    with pytest.raises(errors.AudioRateInvalid):
        read_audio(np.zeros(9), sample_rate=1)


# --- resampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("hertz", [100.0, 1_000.0, 3_300.0])
def test_a_resampled_sine_is_the_analytic_sine(rate: int, hertz: float) -> None:
    source = sine(1.0, rate, hertz)
    got = read_audio((source, rate))
    assert len(got) == RATE
    times = np.arange(RATE) / RATE
    exact = 0.5 * np.sin(2 * np.pi * hertz * times + 0.3)
    middle = slice(RATE // 10, -RATE // 10)
    assert decibels((got - exact)[middle], exact[middle]) < -120  # most are at -150, what float32 leaves


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate > 30_000])
def test_what_the_result_cannot_hold_is_removed_not_folded_back(rate: int) -> None:
    source = sine(1.0, rate, 13_500.0)  # would appear at 10,500 Hz
    got = read_audio((source, rate))
    assert decibels(got[2_400:-2_400], source) < -110


@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000, 96_000])
def test_resampled_noise_agrees_with_scipy(rate: int, random: np.random.Generator) -> None:
    noise = random.standard_normal(rate)
    spectrum = np.fft.rfft(noise)
    spectrum[int(0.4 * min(rate, RATE)) :] = 0  # one second: bins are Hz, and these are inside both pass bands
    noise = np.fft.irfft(spectrum) * scipy.signal.windows.tukey(rate, 0.5)  # silent ends: periodic or not is the same
    expected = scipy.signal.resample(noise, RATE)
    got = read_audio((noise, rate))
    assert decibels(got - expected, expected) < -120


# --- reading files ----------------------------------------------------------------------------------------------------

CONTAINERS = [
    ("WAV", "PCM_U8", -30), ("WAV", "PCM_16", -80), ("WAV", "PCM_24", -120), ("WAV", "PCM_32", -140),
    ("WAV", "FLOAT", -140), ("WAV", "DOUBLE", -140), ("WAV", "ULAW", -30), ("WAV", "IMA_ADPCM", -25),
    ("WAVEX", "PCM_16", -80), ("RF64", "PCM_16", -80), ("AIFF", "PCM_16", -80),
    ("FLAC", "PCM_16", -80), ("FLAC", "PCM_24", -120),
    ("OGG", "VORBIS", -30), ("OGG", "OPUS", -25), ("MP3", "MPEG_LAYER_III", -30),
]  # fmt: skip


@pytest.mark.parametrize(("format", "subtype", "limit"), CONTAINERS, ids=lambda value: str(value))
def test_every_container_mono_and_stereo(format: str, subtype: str, limit: int) -> None:
    rate = 48_000
    left, right = sine(1.0, rate, 440.0), sine(1.0, rate, 1_000.0, 0.25)
    middle = slice(2_400, -2_400)
    for data, exact in (
        (file_bytes(left, rate, format, subtype), sine(1.0)),
        (
            file_bytes(np.stack([left, right], 1), rate, format, subtype),
            (sine(1.0) + sine(1.0, RATE, 1_000.0, 0.25)) / 2,
        ),
    ):
        got = read_audio(data, max_seconds=1.1)
        assert abs(len(got) - RATE) <= 600
        assert decibels((got[:RATE][: len(exact)] - exact[: len(got)])[middle], exact[middle]) < limit


def test_a_wav_of_scipy_and_one_of_wave_are_read(tmp_path: Path, random: np.random.Generator) -> None:
    values = random.integers(-32768, 32768, (3_000, 2)).astype(np.int16)
    scipy.io.wavfile.write(tmp_path / "a.wav", RATE, values)
    expected = values.astype(np.float64).mean(axis=1) / 32768
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), expected, atol=1e-7, rtol=0)
    with wave.open(str(tmp_path / "b.wav"), "wb") as file:
        file.setparams((2, 2, RATE, 0, "NONE", "none"))
        file.writeframes(values.tobytes())
    np.testing.assert_array_equal(read_audio(tmp_path / "b.wav"), read_audio(tmp_path / "a.wav"))


class Pipe(io.RawIOBase):
    """A binary stream that cannot seek and gives a few bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self.rest = data

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), 777, len(self.rest))
        buffer[:count] = self.rest[:count]
        self.rest = self.rest[count:]
        return count


@pytest.mark.parametrize("format", FORMATS)
def test_one_file_in_every_wrapping_is_the_same(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{format}"
    Audio(sine(1.0, 44_100), 44_100).save(path)
    data = path.read_bytes()
    expected = read_audio(path)
    assert abs(len(expected) - RATE) <= 1
    sources = [str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), Pipe(data)]
    for source in sources:
        np.testing.assert_array_equal(read_audio(source), expected)
    with open(path, "rb") as file:
        np.testing.assert_array_equal(read_audio(file), expected)
    after_other_bytes = io.BytesIO(b"other bytes" + data)
    after_other_bytes.seek(11)
    np.testing.assert_array_equal(read_audio(after_other_bytes), expected)
    renamed = tmp_path / "no_ending"
    renamed.write_bytes(data)
    np.testing.assert_array_equal(read_audio(renamed), expected)


def test_a_named_pipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    data = saved(Audio(sine(1.0), RATE), "wav")
    writer = threading.Thread(target=lambda: path.write_bytes(data))
    writer.start()
    np.testing.assert_array_equal(read_audio(path), read_audio(data))
    writer.join(10)


@pytest.mark.parametrize("size", [0x7FFFF000, 0xFFFFFFFF - 36, 0xFFFFFFFF], ids=hex)
def test_a_wav_from_a_pipe_whose_size_was_unknown_is_read(size: int) -> None:
    data = bytearray(file_bytes(sine(0.5)))
    assert data[36:40] == b"data"
    struct.pack_into("<I", data, 4, min(size + 36, 0xFFFFFFFF))
    struct.pack_into("<I", data, 40, size)
    np.testing.assert_allclose(read_audio(bytes(data)), sine(0.5), atol=1 / 32768)


@pytest.mark.parametrize(("format", "subtype", "limit"), CONTAINERS, ids=lambda value: str(value))
@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.8])
def test_a_file_cut_short_is_refused(format: str, subtype: str, limit: int, part: float) -> None:
    data = file_bytes(sine(2.0), RATE, format, subtype)
    with pytest.raises(errors.AudioUnreadable, match=r"^The data "):
        read_audio(data[: int(len(data) * part)])


def test_what_is_no_audio_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.AudioUnreadable, match=r"There is no file '.*absent.wav'"):
        read_audio(tmp_path / "absent.wav")
    with pytest.raises(errors.AudioUnreadable, match="is a folder"):
        read_audio(tmp_path)
    with pytest.raises(errors.AudioUnreadable, match="null"):
        read_audio("a\0.wav")
    with pytest.raises(errors.AudioUnreadable, match="too long"):
        read_audio("a" * 5_000)
    text = tmp_path / "text.wav"
    text.write_text("not audio at all, whatever its name says\n" * 20)
    with pytest.raises(errors.AudioUnreadable, match=r"text.wav' is not audio; give a WAV, FLAC, OGG or MP3"):
        read_audio(text)
    with pytest.raises(errors.AudioUnreadable, match="is AU audio; give a WAV"):
        read_audio(file_bytes(sine(0.1), format="AU"))
    with pytest.raises(errors.AudioUnreadable, match="binary mode"):
        read_audio(io.StringIO("text"))  # type: ignore[arg-type]
    closed = io.BytesIO()
    closed.close()
    with pytest.raises(errors.AudioUnreadable, match="closed"):
        read_audio(closed)


def test_a_file_object_that_fails_is_reported() -> None:
    class Failing:
        name = "socket"

        def read(self, size: int = -1) -> bytes:
            raise RuntimeError("connection reset")

    with pytest.raises(errors.AudioUnreadable, match="file object 'socket' cannot be read: connection reset"):
        read_audio(Failing())  # type: ignore[arg-type]


def test_a_disk_that_fails_is_reported() -> None:
    class FailingDisk(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 50_000:
                raise OSError(5, "Input/output error")
            return super().read(size)

    with pytest.raises(errors.AudioUnreadable, match="Input/output error"):
        audio_file.decode(FailingDisk(file_bytes(sine(5.0))), "the disk", None)


def test_no_permission_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(errors.AudioUnreadable, match="permission"):
        read_audio(tmp_path / "a.wav")


def test_files_with_bad_contents_are_refused(tmp_path: Path) -> None:
    broken = np.array([0.0, np.nan, np.inf, np.nan])
    soundfile.write(tmp_path / "a.wav", broken, RATE, subtype="FLOAT")
    with pytest.raises(errors.AudioNotFinite, match=r"a.wav' has 2 NaN and 1 infinite"):
        read_audio(tmp_path / "a.wav")
    with pytest.raises(errors.AudioEmpty):
        read_audio(file_bytes(np.zeros(0)))
    with pytest.raises(errors.AudioRateInvalid, match="4000 Hz"):
        read_audio(file_bytes(np.zeros(9), 4_000))
    with pytest.raises(errors.AudioShapeInvalid, match="9 channels"):
        read_audio(file_bytes(np.zeros((9, 9))))
    assert len(read_audio(file_bytes(np.zeros((9, 8))))) == 9


# --- length and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_long_file_is_refused_with_both_lengths(format: str) -> None:
    data = saved(Audio(sine(12.0), RATE), format)
    with pytest.raises(errors.AudioTooLong, match=r"12\.00 s long and may be at most 10\.00 s"):
        read_audio(data, max_seconds=10)
    assert len(read_audio(data, max_seconds=12.5)) == 12 * RATE


def with_flac_frames(data: bytes, frames: int) -> bytes:
    """The FLAC file with another number of samples in its header (36 bits, the low ones of bytes 18 to 25)."""
    (packed,) = struct.unpack_from(">Q", data, 18)
    return data[:18] + struct.pack(">Q", packed >> 36 << 36 | frames) + data[26:]


@pytest.mark.parametrize("frames", [0, 2_400], ids=["unknown", "a lie"])
def test_a_bomb_is_not_decoded_whole(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = with_flac_frames(file_bytes(np.zeros(RATE * 600, np.int16), format="FLAC"), frames)
    assert len(bomb) < 200_000
    decoded = 0
    read = soundfile.SoundFile.read

    def counting_read(self: soundfile.SoundFile, *arguments: object, **named: object) -> np.ndarray:
        nonlocal decoded
        block = read(self, *arguments, **named)
        decoded += len(block)
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counting_read)
    try:
        got = read_audio(bomb, max_seconds=10)
    except errors.AudioTooLong:
        pass
    else:
        assert len(got) <= 10 * RATE
    assert 0 < decoded <= 20 * RATE


def test_a_header_of_unknown_length_is_read_to_the_end() -> None:
    data = file_bytes(sine(3.0), format="FLAC")
    np.testing.assert_array_equal(read_audio(with_flac_frames(data, 0)), read_audio(data))


def test_a_header_that_promises_too_much_is_refused_before_decoding() -> None:
    data = with_flac_frames(file_bytes(sine(1.0), format="FLAC"), (1 << 36) - 1)
    with pytest.raises(errors.AudioTooLong, match=r"2863311\.53 s long"):
        read_audio(data, max_seconds=90)
    with pytest.raises(errors.AudioUnreadable):
        read_audio(data)


def test_an_endless_stream_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless:
        given = 0

        def read(self, size: int = -1) -> bytes:
            self.given += size
            return bytes(size)

    monkeypatch.setattr(audio_file, "_STREAM_BYTES", 8 << 20)
    stream = Endless()
    with pytest.raises(errors.AudioUnreadable, match="more than 8 MiB; give the path"):
        read_audio(stream)  # type: ignore[arg-type]
    assert stream.given <= 10 << 20
    with pytest.raises(errors.AudioUnreadable, match="more than 8 MiB"):
        read_audio("/dev/zero")


# --- anything at all --------------------------------------------------------------------------------------------------

ANY_ARRAY = st.one_of(
    hypothesis.extra.numpy.arrays(
        dtype=st.one_of(
            hypothesis.extra.numpy.scalar_dtypes(),
            hypothesis.extra.numpy.floating_dtypes(endianness="?"),
            hypothesis.extra.numpy.integer_dtypes(endianness="?"),
        ),
        shape=hypothesis.extra.numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=12),
    )
)


def finite_mono_or_refused(source: object, max_seconds: float | None = 5.0) -> None:
    try:
        got = read_audio(source, max_seconds=max_seconds)  # type: ignore[arg-type]
    except errors.AudioInvalid:
        return
    assert got.dtype == np.float32
    assert got.ndim == 1
    assert len(got) > 0
    assert np.isfinite(got).all()


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(array=ANY_ARRAY, rate=st.one_of(st.none(), st.integers(7_990, 200_000), st.floats()))
def test_any_array_is_read_or_refused(array: np.ndarray, rate: float | None) -> None:
    finite_mono_or_refused(array if rate is None else (array, rate))


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    value=st.recursive(
        st.none() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=99), st.tuples
    )
)
def test_any_python_value_is_read_or_refused(value: object) -> None:
    finite_mono_or_refused(value)


@pytest.mark.parametrize("format", ["wav", "flac", "ogg"])
def test_damaged_files_are_read_or_refused(
    format: str, random: np.random.Generator, capfd: pytest.CaptureFixture
) -> None:
    whole = saved(Audio(sine(0.5), RATE), format)
    for _ in range(150):
        data = bytearray(whole)
        for place in random.integers(0, min(len(data), 100), random.integers(1, 6)):
            data[place] = random.integers(256)
        finite_mono_or_refused(bytes(data[: random.integers(len(data) // 2, len(data) + 1)]))
    assert "Traceback" not in capfd.readouterr().err


# --- showing and playing ----------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Every tag's attributes, and that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: dict[str, dict[str, str | None]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.found[tag] = dict(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag] = dict(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_notebook_plays_the_samples_and_shows_their_waveform() -> None:
    samples = np.concatenate([np.zeros(RATE), sine(1.0, amplitude=0.5), sine(1.0, amplitude=1.5)]).astype(np.float32)
    html = Audio(samples, RATE, seed=1, finish_reason="<b>&")._repr_html_()
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert tags.open == []
    assert "b" not in tags.found
    kind, data = (tags.found["audio"]["src"] or "").split(",")
    assert kind == "data:audio/wav;base64"
    assert "controls" in tags.found["audio"]
    rate, stored = scipy.io.wavfile.read(io.BytesIO(base64.b64decode(data)))
    assert rate == RATE
    assert np.abs(stored / 32768 - np.clip(samples, -1, 1)).max() <= 1 / 32768

    root = ElementTree.fromstring(html)
    svg = "{http://www.w3.org/2000/svg}"
    figure = root.find(f"{svg}svg")
    assert figure is not None
    width, height = (float(number) for number in figure.attrib["viewBox"].split()[2:])
    strokes = [stroke.split("V") for stroke in figure.find(f"{svg}path").attrib["d"].split("M")[1:]]  # type: ignore[union-attr]
    across = np.array([float(top.split()[0]) for top, _ in strokes])
    extent = np.array([float(bottom) - float(top.split()[1]) for top, bottom in strokes])
    assert (np.diff(across) > 0).all()
    assert 0 < across[0] < across[-1] < width
    third = len(strokes) // 3
    np.testing.assert_allclose(extent[5 : third - 5], 1, atol=0.2)  # silence: a thin line
    np.testing.assert_allclose(extent[third + 5 : 2 * third - 5], 0.5 * height, rtol=0.05)
    np.testing.assert_allclose(extent[2 * third + 5 : -5], height, rtol=0.05)


@pytest.mark.parametrize("samples", [[], [0.1], [np.nan, np.inf, -np.inf]], ids=["none", "one", "not finite"])
def test_the_notebook_shows_odd_audio_too(samples: list[float]) -> None:
    html = Audio(np.array(samples, np.float32), RATE)._repr_html_()
    assert ElementTree.fromstring(html).tag == "div"


def test_the_plot_has_seconds_kilohertz_and_the_tone_in_its_place() -> None:
    pytest.importorskip("matplotlib")
    from aloud.audio_plot import spectrogram

    pyplot_was_there = "matplotlib.pyplot" in sys.modules
    figure = Audio(sine(2.0, 16_000, 3_000.0, 1.0), 16_000).plot()
    wave_axes, spectrum_axes = figure.axes[:2]
    assert wave_axes.get_xlim() == spectrum_axes.get_xlim() == (0.0, 2.0)
    assert "(s)" in spectrum_axes.get_xlabel()
    assert "(kHz)" in spectrum_axes.get_ylabel()
    assert spectrum_axes.get_ylim() == (0.0, 8.0)
    line = wave_axes.get_lines()[0]
    np.testing.assert_allclose(line.get_xdata()[-1], 2.0 - 1 / 16_000)
    (image,) = spectrum_axes.get_images()
    levels = np.asarray(image.get_array())
    left, right, low, high = image.get_extent()
    row, column = 384 // 2, levels.shape[1] // 2  # bin 192 of 1024 at 16 kHz is 3 kHz
    assert levels[:, column].argmax() == row
    np.testing.assert_allclose(low + (row + 0.5) * (high - low) / len(levels), 3.0)
    np.testing.assert_allclose(levels[row, column], 0.0, atol=0.01)
    np.testing.assert_allclose(left + (column + 0.5) * (right - left) / levels.shape[1], column * 256 / 16_000)

    for picture in (io.BytesIO(), io.BytesIO(figure._repr_png_())):  # type: ignore[attr-defined]
        if not picture.getvalue():
            figure.savefig(picture, format="png")
        assert picture.getvalue().startswith(b"\x89PNG\r\n")
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_was_there

    _, _, expected = scipy.signal.stft(
        sine(0.5), RATE, "hann", 1024, 768, boundary="zeros", padded=True, scaling="spectrum"
    )
    magnitudes = 20 * np.log10(np.maximum(2 * np.abs(expected.T), 1e-5))
    ours = spectrogram(sine(0.5))
    count = min(len(ours), len(magnitudes)) - 3
    np.testing.assert_allclose(ours[:count], magnitudes[:count], atol=0.5)


@pytest.mark.parametrize("samples", [[], [0.1], [np.nan, np.inf]], ids=["none", "one", "not finite"])
def test_odd_audio_is_plotted_too(samples: list[float]) -> None:
    pytest.importorskip("matplotlib")
    figure = Audio(np.array(samples, np.float32), RATE).plot()
    figure.savefig(io.BytesIO(), format="png")


@pytest.mark.parametrize(("package", "call"), [("matplotlib", "plot"), ("sounddevice", "play")])
def test_a_missing_package_is_named_with_its_command(package: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package or name == "aloud.audio_plot"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("aloud.audio_plot", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(errors.MissingDependency, match=rf"{package}: pip install 'aloud\[{call}\]'"):
        getattr(Audio(sine(0.1), RATE), call)()


def test_play_gives_clipped_samples_to_the_device_and_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[np.ndarray, int, bool]] = []
    device = types.ModuleType("sounddevice")
    device.PortAudioError = type("PortAudioError", (Exception,), {})  # type: ignore[attr-defined]
    device.play = lambda samples, rate, blocking: calls.append((samples, rate, blocking))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    audio = Audio(sine(0.1, amplitude=2.0), RATE)
    audio.play()
    ((samples, rate, blocking),) = calls
    np.testing.assert_array_equal(samples, np.clip(audio.samples, -1, 1))
    assert (rate, blocking) == (RATE, True)
    with pytest.raises(errors.AudioNotFinite):
        Audio(np.array([np.nan], np.float32), RATE).play()

    def no_device(*arguments: object, **named: object) -> None:
        raise device.PortAudioError("Error querying device -1")  # type: ignore[attr-defined]

    device.play = no_device  # type: ignore[attr-defined]
    with pytest.raises(errors.DeviceInvalid, match=r"Error querying device -1.*\.save"):
        audio.play()


def test_a_missing_portaudio_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')")
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(errors.MissingDependency, match="PortAudio"):
        Audio(sine(0.1), RATE).play()


def test_reading_an_array_imports_nothing_that_only_plotting_and_playing_need() -> None:
    program = (
        "import sys, numpy; from aloud.audio import read_audio, Audio; "
        "a = Audio(read_audio((numpy.zeros(4800, 'i2'), 48000)), 24000); a._repr_html_(); "
        "print([name for name in ('matplotlib', 'sounddevice') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
