"""Audio: samples with their rate and codes, to save, play and show; and reading the audio that users give."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from aloud import audio_file
from aloud.audio_file import FORMATS, MAX_CHANNELS, check_finite, check_length, checked_rate
from aloud.errors import (
    AudioEmpty,
    AudioRateInvalid,
    AudioShapeInvalid,
    AudioUnreadable,
    AudioUnwritable,
    CodesInvalid,
    DeviceInvalid,
    MissingDependency,
)
from aloud.request import AudioSource

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Audio:
    """Mono sound and, when it was spoken here, where it came from.

    Two are equal only when they are the same object; compare `.samples` or `.codes` instead.

    Args:
        samples: float [samples], meant to be in -1..1; kept as float32.
        sample_rate: Hz.
        codes: the codec's tokens, int [frames, codebooks]; kept as int64.
        seed: the seed that was used.
        finish_reason: "end", "length", or the name of the guard that stopped it.

    Raises:
        AudioShapeInvalid: the samples are not a float NumPy array of one dimension.
        AudioRateInvalid: the sample rate is not a positive whole number.
        CodesInvalid: the codes are not an integer NumPy array of two dimensions.
    """

    samples: np.ndarray
    sample_rate: int
    codes: np.ndarray | None = None
    seed: int | None = None
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        samples, codes, rate = self.samples, self.codes, self.sample_rate
        if not isinstance(samples, np.ndarray) or samples.ndim != 1 or samples.dtype.kind != "f":
            raise AudioShapeInvalid(
                f"Audio holds a NumPy array of floats [samples], not {_describe(samples)}; read_audio() makes one."
            )
        if isinstance(rate, bool) or not isinstance(rate, (int, np.integer)) or rate < 1:
            raise AudioRateInvalid(f"The sample rate must be a positive whole number of Hz, not {rate!r}.")
        object.__setattr__(self, "samples", np.ascontiguousarray(samples, dtype=np.float32))
        object.__setattr__(self, "sample_rate", int(rate))
        if codes is not None:
            if not isinstance(codes, np.ndarray) or codes.ndim != 2 or codes.dtype.kind not in "iu":
                raise CodesInvalid(
                    f"The codes must be a NumPy array of integers [frames, codebooks], not {_describe(codes)}."
                )
            object.__setattr__(self, "codes", np.ascontiguousarray(codes, dtype=np.int64))

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.sample_rate

    @classmethod
    def concatenate(cls, parts: Sequence[Audio]) -> Audio:
        """One after the other, such as the chunks of a stream.

        Codes are kept if every part has as many codebooks, the seed if all have the same; the finish reason is the
        last one's.

        Raises:
            AudioEmpty: there are no parts.
            AudioRateInvalid: their sample rates differ.
        """
        parts = list(parts)
        if not parts:
            raise AudioEmpty("There are no parts to concatenate; give at least one Audio.")
        rates = sorted({part.sample_rate for part in parts})
        if len(rates) > 1:
            raise AudioRateInvalid(f"Parts at {rates} Hz cannot be concatenated; bring them to one rate first.")
        codes = [part.codes for part in parts if part.codes is not None]
        keep_codes = len(codes) == len(parts) and len({block.shape[1] for block in codes}) == 1
        return cls(
            samples=np.concatenate([part.samples for part in parts]),
            sample_rate=rates[0],
            codes=np.concatenate(codes) if keep_codes else None,
            seed=parts[0].seed if len({part.seed for part in parts}) == 1 else None,
            finish_reason=parts[-1].finish_reason,
        )

    def save(self, path: str | os.PathLike[Any] | BinaryIO, *, format: str | None = None) -> None:
        """Write a file: 16-bit PCM for .wav and .flac, Vorbis for .ogg, and .mp3.

        Samples beyond -1..1 are clipped. The file is whole or not there: it is written under another name in the same
        folder and renamed.

        Args:
            path: where; or a binary file object, which then needs `format`.
            format: "wav", "flac", "ogg" or "mp3"; None takes it from the file name's ending.

        Raises:
            AudioUnwritable: the format is none of those, or the folder is missing or refuses.
            AudioEmpty: there are no samples.
            AudioNotFinite: a sample is NaN or infinite.
        """
        if not isinstance(path, (str, os.PathLike)):
            if not hasattr(path, "write"):
                raise AudioUnwritable(f"Audio is saved to a path or a binary file object, not {_describe(path)}.")
            if format is None:
                raise AudioUnwritable("A file object has no ending to go by; say format='wav', 'flac', 'ogg' or 'mp3'.")
        elif format is None:
            format = _format_by_ending(path)
        if not len(self.samples):
            raise AudioEmpty("There are no samples to save.")
        data = audio_file.encode(self.samples, self.sample_rate, format.lower().lstrip("."))
        if isinstance(path, (str, os.PathLike)):
            audio_file.write_whole(path, data)
        else:
            audio_file.write_stream(path, data)

    def play(self) -> None:
        """Play on the default output device and wait until it ends; needs `pip install 'aloud[play]'`.

        Raises:
            MissingDependency: sounddevice, or the PortAudio library below it, is not installed.
            DeviceInvalid: there is no device to play on, or it refuses.
            AudioNotFinite: a sample is NaN or infinite.
        """
        check_finite(int(np.isnan(self.samples).sum()), int(np.isinf(self.samples).sum()), "the audio to play")
        try:
            import sounddevice
        except ImportError as error:
            raise MissingDependency("Playing needs sounddevice: pip install 'aloud[play]'.") from error
        except OSError as error:
            raise MissingDependency(
                "Playing needs the PortAudio library: apt install libportaudio2, or your system's like."
            ) from error
        try:
            sounddevice.play(np.clip(self.samples, -1.0, 1.0), self.sample_rate, blocking=True)
        except (sounddevice.PortAudioError, ValueError) as error:
            raise DeviceInvalid(f"No audio device here plays this: {error}; save it with .save('it.wav').") from error

    def plot(self) -> Figure:
        """Waveform and spectrogram over seconds, as a matplotlib figure; needs `pip install 'aloud[plot]'`.

        Raises:
            MissingDependency: matplotlib is not installed.
        """
        try:
            from aloud.audio_plot import plot
        except ImportError as error:
            raise MissingDependency("Plotting needs matplotlib: pip install 'aloud[plot]'.") from error
        return plot(self.samples, self.sample_rate)

    def _repr_html_(self) -> str:
        from aloud.audio_show import to_html

        return to_html(self.samples, self.sample_rate, repr(self))

    def __repr__(self) -> str:
        parts = [f"{self.duration:.2f} s", f"{self.sample_rate} Hz"]
        if self.codes is not None:
            parts.append(f"{len(self.codes)} frames")
        if self.seed is not None:
            parts.append(f"seed={self.seed}")
        if self.finish_reason is not None:
            parts.append(f"finish_reason={self.finish_reason!r}")
        return f"Audio({', '.join(parts)})"


def read_audio(source: AudioSource, *, sample_rate: int = 24_000, max_seconds: float | None = None) -> np.ndarray:
    """Mono float32 samples at `sample_rate` from whatever a user has.

    Args:
        source: a NumPy array or torch tensor at `sample_rate`, or a pair (array, rate in Hz); an `Audio`; a path; the
            bytes of a file; or a binary file object, read from where it stands to its end. Files are WAV, FLAC, OGG
            or MP3. Arrays are [samples], [channels, samples] or [samples, channels]: the shorter axis is channels, at
            most 8, and the first if both are equal. Floats are taken as they are (-1..1), integers of up to 32 bits
            are scaled by their type's range, unsigned ones about its middle. Channels are averaged.
        sample_rate: of the result, Hz.
        max_seconds: refuse longer audio, a file before it is decoded whole.

    Returns:
        float32 [samples], a copy; round(samples * sample_rate / rate) of them.

    Raises:
        AudioInvalid: one of its kinds: AudioEmpty, AudioNotFinite, AudioShapeInvalid, AudioRateInvalid,
            AudioUnreadable, AudioTooLong.
    """
    sample_rate = checked_rate(sample_rate, "the result")
    name = "the audio"
    if isinstance(source, Audio):
        source = (source.samples, source.sample_rate)
    if _is_array(source):
        samples, rate = _from_array(source, sample_rate, max_seconds), sample_rate
    elif isinstance(source, tuple):
        if len(source) != 2 or not _is_array(source[0]):
            given = ", ".join(type(part).__name__ for part in source)
            raise AudioShapeInvalid(f"A tuple of audio is (array, rate in Hz), not ({given}).")
        rate = checked_rate(source[1], "the array")
        samples = _from_array(source[0], rate, max_seconds)
    elif isinstance(source, (str, os.PathLike)):
        samples, rate = audio_file.decode_path(source, max_seconds)
        name = repr(os.fsdecode(source))
    elif isinstance(source, (bytes, bytearray, memoryview)):
        samples, rate = audio_file.decode(io.BytesIO(source), "the data", max_seconds)
    elif hasattr(source, "read"):
        samples, rate = audio_file.decode_stream(cast(BinaryIO, source), max_seconds)
    else:
        raise AudioUnreadable(
            f"Audio cannot be read from {_describe(source)}; give a path, bytes, a binary file object, a NumPy array "
            "or torch tensor, or (array, rate)."
        )
    return _resample(samples, rate, sample_rate, name)


def check_writable(path: str | os.PathLike[Any]) -> None:
    """Find out whether `Audio.save(path)` can write there, without writing.

    Raises:
        AudioUnwritable: the name's ending is no format, or the folder is missing or refuses.
    """
    _format_by_ending(path)
    audio_file.checked_target(path)


def _format_by_ending(path: str | os.PathLike[Any]) -> str:
    """The format that a file name's ending asks for, a key of `FORMATS`; raises `AudioUnwritable`."""
    ending = os.path.splitext(os.fsdecode(path))[1]
    if ending.lower().lstrip(".") not in FORMATS:
        shown = f"ends in {ending!r}" if ending else "has no ending"
        raise AudioUnwritable(f"{os.fsdecode(path)!r} {shown}; use one of .wav, .flac, .ogg, .mp3.")
    return ending.lower().lstrip(".")


def _is_array(source: object) -> bool:
    """Whether it is a NumPy array or a torch tensor; there is no tensor where torch is not imported."""
    torch_module = sys.modules.get("torch")
    return isinstance(source, np.ndarray) or (torch_module is not None and isinstance(source, torch_module.Tensor))


def _from_array(source: Any, rate: int, max_seconds: float | None) -> np.ndarray:
    """Mono float32 [samples] of an array or tensor in any layout that `read_audio` names."""
    array = np.asarray(source) if isinstance(source, np.ndarray) else _to_numpy(source)
    if array.ndim not in (1, 2):
        raise AudioShapeInvalid(
            f"The array has shape {array.shape}; it must be [samples], [channels, samples] or [samples, channels]."
        )
    if 0 in array.shape:
        raise AudioEmpty(f"The array has shape {array.shape}, which is no samples; give audio.")
    if array.ndim == 2 and min(array.shape) > MAX_CHANNELS:
        raise AudioShapeInvalid(
            f"The array has shape {array.shape}; its shorter axis is its channels, at most {MAX_CHANNELS}."
        )
    check_length(max(array.shape), rate, max_seconds, "the array")
    kind = array.dtype.kind
    if kind in "iu" and array.dtype.itemsize > 4:  # what NumPy makes of a list; scaled by that range it is silence
        raise AudioShapeInvalid(
            f"The array has dtype {array.dtype}, which nobody records in; give the type that the samples had, "
            "such as int16, or floats in -1..1."
        )
    if kind in "iu":
        half = 2.0 ** (8 * array.dtype.itemsize - 1)  # int16: 32,768 steps to 1.0
        array = array / half - (1.0 if kind == "u" else 0.0)
    elif kind != "f":
        raise AudioShapeInvalid(f"The array has dtype {array.dtype}; samples are floats in -1..1 or integers.")
    check_finite(int(np.isnan(array).sum()), int(np.isinf(array).sum()), "the array")
    if array.ndim == 2:
        array = array.mean(axis=0 if array.shape[0] <= array.shape[1] else 1, dtype=np.float64)
    with np.errstate(over="ignore"):  # float64 beyond float32 is counted next
        samples = array.astype(np.float32)
    check_finite(int(np.isnan(samples).sum()), int(np.isinf(samples).sum()), "the array")
    return samples


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same numbers as a NumPy array; bfloat16 and smaller floats, which NumPy lacks, as float32."""
    try:
        tensor = tensor.detach().cpu()
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize < 4:
            tensor = tensor.float()
        return tensor.numpy()
    except Exception as error:  # sparse, quantized, meta, packed: torch has an error of its own for each
        raise AudioShapeInvalid(
            f"A {tensor.layout} tensor of {tensor.dtype} on {tensor.device} is no array of samples; "
            "give a dense float or integer one."
        ) from error


def _resample(samples: np.ndarray, rate: int, sample_rate: int, name: str) -> np.ndarray:
    """Band-limited resampling of float32 [samples] by soxr at its very high quality."""
    if rate != sample_rate:
        import soxr

        samples = soxr.resample(samples, rate, sample_rate, quality="VHQ")
        check_finite(int(np.isnan(samples).sum()), int(np.isinf(samples).sum()), name)
        if not len(samples):
            raise AudioEmpty(f"{name[0].upper()}{name[1:]} is shorter than one sample at {sample_rate} Hz.")
    return np.ascontiguousarray(samples)


def _describe(value: object) -> str:
    """What a value is, shortly, for a message."""
    shape = getattr(value, "shape", None)
    if shape is None:
        return f"a {type(value).__name__}"
    return f"a {type(value).__name__} of shape {tuple(shape)} and dtype {getattr(value, 'dtype', None)}"
