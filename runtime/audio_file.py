"""Audio files: decode one without trusting its header, encode one, and write it whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import stat
from typing import Any, BinaryIO

import numpy as np
import soundfile

from aloud.errors import (
    AudioEmpty,
    AudioInvalid,
    AudioNotFinite,
    AudioRateInvalid,
    AudioShapeInvalid,
    AudioTooLong,
    AudioUnreadable,
    AudioUnwritable,
)

MIN_RATE, MAX_RATE = 8_000, 192_000  # Hz
MAX_CHANNELS = 8

# What a file name's ending means: the container and the sample format that players expect of it.
FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}

# Containers that are read. libsndfile knows more, old ones that nobody sends and whose readers nobody hardens.
_READABLE = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "AIFF")

_BLOCK_FRAMES = 1 << 17  # decoded at a time, so that the cap on length is also one on memory
_WRITE_FRAMES = 1 << 15  # encoded at a time: libsndfile's Vorbis encoder overflows the stack on very long writes
_STREAM_BYTES = 256 << 20  # at most this much is buffered of a source that cannot be measured beforehand
_UNKNOWN_FRAMES = 1 << 62  # libsndfile's frame count is above this where the header does not say
_MP3_FRAME = 1152  # samples; encoder delay makes an MP3's header and its samples disagree by less than one frame

# libsndfile reads a file that is cut short without complaint and only notes the two sizes in its log. Writers to a
# pipe cannot know the size and put a number near 2 or 4 GiB there, which is no sign of a cut.
_SIZE_NOTE = re.compile(r"^\s*(?:data|SSND|Riff size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)
_PLACEHOLDER_BYTES = 0x7FFF0000


def checked_rate(rate: Any, name: str) -> int:
    """The sample rate as an int, in Hz.

    Raises:
        AudioRateInvalid: it is not a whole number from 8,000 to 192,000.
    """
    try:
        number = float(rate)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = float("nan")
    if not (number.is_integer() and MIN_RATE <= number <= MAX_RATE):
        shown = f"{number:g} Hz" if number == number else f"{type(rate).__name__}"
        raise AudioRateInvalid(
            f"The sample rate of {name} is {shown}; it must be a whole number from {MIN_RATE} to {MAX_RATE} Hz."
        )
    return int(number)


def check_length(frames: int, rate: int, max_seconds: float | None, name: str) -> None:
    """Refuse audio of more than `max_seconds`.

    Raises:
        AudioTooLong: `frames` samples a channel at `rate` Hz are longer.
    """
    if max_seconds is not None and frames / rate > max_seconds:
        raise AudioTooLong(
            f"{_sentence(name)} is {frames / rate:.2f} s long and may be at most {max_seconds:.2f} s: "
            "give a shorter part."
        )


def check_finite(nans: int, infinities: int, name: str) -> None:
    """Refuse audio in which NaN or infinite samples were counted.

    Raises:
        AudioNotFinite: either count is above 0.
    """
    if nans or infinities:
        raise AudioNotFinite(
            f"{_sentence(name)} has {nans} NaN and {infinities} infinite samples (or too large for float32); "
            "every sample must be a number, in -1..1."
        )


def decode_path(path: str | os.PathLike[Any], max_seconds: float | None) -> tuple[np.ndarray, int]:
    """Mono samples (float32 [samples]) and rate (Hz) of the file at `path`; the errors of `decode`."""
    shown = repr(os.fsdecode(path))
    try:
        with open(path, "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return decode(file, shown, max_seconds)
            return decode(io.BytesIO(_read_all(file, shown)), shown, max_seconds)
    except FileNotFoundError as error:
        raise AudioUnreadable(f"There is no file {shown}; check the path.") from error
    except IsADirectoryError as error:
        raise AudioUnreadable(f"{shown} is a folder; name an audio file in it.") from error
    except PermissionError as error:
        raise AudioUnreadable(f"You have no permission to read {shown}; change it, or copy the file.") from error
    except AudioInvalid:  # they are ValueErrors too, and not to be wrapped
        raise
    except (OSError, ValueError) as error:
        raise AudioUnreadable(f"{shown} cannot be read: {error}.") from error


def decode_stream(file: BinaryIO, max_seconds: float | None) -> tuple[np.ndarray, int]:
    """Mono samples (float32 [samples]) and rate (Hz) of the rest of a binary file object; the errors of `decode`."""
    file_name = getattr(file, "name", None)
    name = f"the file object {file_name!r}" if isinstance(file_name, str) else "the file object"
    return decode(io.BytesIO(_read_all(file, name)), name, max_seconds)


def decode(file: BinaryIO, name: str, max_seconds: float | None) -> tuple[np.ndarray, int]:
    """Decode a seekable file in blocks, averaging its channels.

    Args:
        file: a whole file, read from its start.
        name: what messages call it.
        max_seconds: refuse a longer one, by its header, and by its samples whatever its header says.

    Returns:
        samples: float32 [samples].
        rate: Hz.

    Raises:
        AudioUnreadable: it is not audio, damaged, or cut short.
        AudioTooLong, AudioEmpty, AudioNotFinite, AudioRateInvalid, AudioShapeInvalid: as their sentences say.
    """
    source = _Source(file)
    try:
        with _Sequential(source) as audio:
            rate, frames = _check_header(audio, source, name, max_seconds)
            blocks: list[np.ndarray] = []
            count = nans = infinities = 0
            while len(block := audio.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
                count += len(block)
                if max_seconds is not None and count / rate > max_seconds:
                    raise AudioTooLong(
                        f"{_sentence(name)} is longer than its header says, and may be at most {max_seconds:.2f} s: "
                        "give a shorter part."
                    )
                nans += int(np.isnan(block).sum())
                infinities += int(np.isinf(block).sum())
                blocks.append(block[:, 0] if block.shape[1] == 1 else _average(block))
            slack = _MP3_FRAME if audio.format == "MP3" else 0
    except soundfile.SoundFileError as error:
        if getattr(error, "code", None) == 1:  # SF_ERR_UNRECOGNISED_FORMAT
            raise AudioUnreadable(f"{_sentence(name)} is not audio; give a WAV, FLAC, OGG or MP3 file.") from error
        raise AudioUnreadable(f"{_sentence(name)} is damaged or cut short; copy or download it again.") from error
    if source.error is not None:
        raise AudioUnreadable(f"{_sentence(name)} cannot be read: {source.error}.") from source.error
    if frames is not None and count + slack < frames:
        raise _cut_short(name)
    if count == 0:
        raise AudioEmpty(f"{_sentence(name)} has no samples; give audio of the text that was said.")
    check_finite(nans, infinities, name)
    return np.concatenate(blocks), rate


def encode(samples: np.ndarray, rate: int, format: str) -> bytes:
    """A whole audio file in memory.

    Args:
        samples: float [samples]; what is beyond -1..1 is clipped.
        rate: Hz.
        format: one of `FORMATS`. WAV and FLAC are 16-bit PCM (audio that was read from 16 bits is written back
            bit for bit), OGG is Vorbis.

    Raises:
        AudioNotFinite: a sample is NaN or infinite.
        AudioUnwritable: the format is none of those, or cannot hold this rate.
    """
    if format not in FORMATS:
        raise AudioUnwritable(f"Audio cannot be saved as {format!r}; use wav, flac, ogg or mp3.")
    check_finite(int(np.isnan(samples).sum()), int(np.isinf(samples).sum()), "the audio to save")
    container, subtype = FORMATS[format]
    data = to_int16(samples) if subtype == "PCM_16" else np.clip(samples, -1.0, 1.0).astype(np.float32)
    buffer = io.BytesIO()
    try:
        with soundfile.SoundFile(buffer, "w", rate, 1, subtype, format=container) as file:
            for start in range(0, len(data), _WRITE_FRAMES):
                file.write(data[start : start + _WRITE_FRAMES])
    except (soundfile.SoundFileError, ValueError) as error:
        raise AudioUnwritable(f"{container} cannot hold audio at {rate} Hz; save it as wav.") from error
    return buffer.getvalue()


def to_int16(samples: np.ndarray) -> np.ndarray:
    """16-bit PCM, int16 [samples], of finite float samples: 1/32768 a step, clipped at both ends."""
    return np.clip(np.rint(samples * np.float32(32768.0)), -32768, 32767).astype(np.int16)


def checked_target(path: str | os.PathLike[Any]) -> str:
    """Where a file of that name would be written: the path behind any links.

    Raises:
        AudioUnwritable: the folder is missing, it is a folder itself, or the file system would refuse.
    """
    shown = repr(os.fsdecode(path))
    try:
        target = os.path.realpath(os.fsdecode(path))
    except (OSError, ValueError) as error:
        raise AudioUnwritable(f"{shown} cannot be saved: {error}; save it elsewhere.") from error
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise AudioUnwritable(f"{shown} cannot be saved: there is no folder {folder!r}; make it first.")
    if os.path.isdir(target):
        raise AudioUnwritable(f"{shown} cannot be saved: it is a folder; add a file name.")
    if os.path.exists(target):
        if not os.access(target, os.W_OK):
            raise AudioUnwritable(f"{shown} cannot be saved: it is there and may not be written; save it elsewhere.")
    elif not os.access(folder, os.W_OK):
        raise AudioUnwritable(f"{shown} cannot be saved: {folder!r} may not be written; save it elsewhere.")
    return target


def write_whole(path: str | os.PathLike[Any], data: bytes) -> None:
    """Write a file under another name in the same folder, then rename it: a crash leaves the old file or the new one.

    Raises:
        AudioUnwritable: the folder is missing, or the file system refuses.
    """
    target = checked_target(path)  # a link stays a link: its target is replaced
    try:
        if os.path.exists(target) and not os.path.isfile(target):  # a pipe or a device: there is nothing to rename onto
            with open(target, "wb") as pipe:
                pipe.write(data)
            return
        part = os.path.join(os.path.dirname(target), f".aloud-{secrets.token_hex(8)}.part")
        try:
            with open(part, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise AudioUnwritable(f"{os.fsdecode(path)!r} cannot be saved: {reason}; save it elsewhere.") from error


def write_stream(file: BinaryIO, data: bytes) -> None:
    """Write all of `data` to a binary file object, buffered or not.

    Raises:
        AudioUnwritable: it takes no bytes, or fails.
    """
    rest = memoryview(data)
    try:
        while rest:
            written = file.write(rest)
            rest = rest[len(rest) if written is None else written :]
    except TypeError as error:
        raise AudioUnwritable("The file object takes text, not bytes; open it in binary mode ('wb').") from error
    except (OSError, ValueError) as error:
        raise AudioUnwritable(f"The file object cannot be written: {error}.") from error


class _Sequential(soundfile.SoundFile):
    """A file read from front to back: SoundFile.read() would seek after every block, which fails at unknown ends."""

    def seekable(self) -> bool:
        return False


class _Source:
    """A seekable file as libsndfile's callbacks need it: an exception in a callback would be printed and lost."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def read(self, size: int) -> bytes:
        try:
            return self.file.read(size)
        except OSError as error:
            self.error = error
            return b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        # A damaged file can ask for a negative position: the position stays, as after a failed lseek.
        with contextlib.suppress(OSError, ValueError):
            self.file.seek(offset, whence)
        return self.file.tell()

    def tell(self) -> int:
        return self.file.tell()

    def tail(self, size: int) -> bytes:
        """The last `size` bytes, or all; the position stays."""
        position = self.file.tell()
        end = self.file.seek(0, os.SEEK_END)
        self.file.seek(max(0, end - size))
        data = self.read(size)
        self.file.seek(position)
        return data


def _check_header(audio: Any, source: _Source, name: str, max_seconds: float | None) -> tuple[int, int | None]:
    """Rate (Hz) and frames (None where the header does not say) of an opened file that may be decoded."""
    if audio.format not in _READABLE:
        raise AudioUnreadable(f"{_sentence(name)} is {audio.format} audio; give a WAV, FLAC, OGG or MP3 file.")
    if audio.channels > MAX_CHANNELS:
        raise AudioShapeInvalid(
            f"{_sentence(name)} has {audio.channels} channels and may have at most {MAX_CHANNELS}: mix it down first."
        )
    rate = checked_rate(audio.samplerate, name)
    frames = audio.frames if 0 <= audio.frames < _UNKNOWN_FRAMES else None
    if frames is not None:
        check_length(frames, rate, max_seconds, name)
    for said, there in _SIZE_NOTE.findall(audio.extra_info):
        if int(there) < int(said) < _PLACEHOLDER_BYTES:
            raise _cut_short(name)
    if audio.format == "OGG" and _ends_inside_a_page(source.tail(1 << 17)):
        raise _cut_short(name)
    return rate, frames


def _ends_inside_a_page(tail: bytes) -> bool:
    """Whether an Ogg file ends before its last page does (RFC 3533, section 6; a page has at most 65,307 bytes)."""
    start = tail.rfind(b"OggS")
    page = tail[start:]
    if start < 0 or len(page) < 27:
        return True
    segments = page[26]
    return len(page) < 27 + segments + sum(page[27 : 27 + segments])


def _read_all(file: BinaryIO, name: str) -> bytes:
    """What is left in a file object that may have no end."""
    buffer = bytearray()
    try:
        while chunk := file.read(1 << 20):
            if isinstance(chunk, str):
                raise AudioUnreadable(f"{_sentence(name)} gives text, not bytes; open it in binary mode ('rb').")
            buffer += chunk
            if len(buffer) > _STREAM_BYTES:
                raise AudioUnreadable(
                    f"{_sentence(name)} holds more than {_STREAM_BYTES >> 20} MiB; give the path of a file instead."
                )
    except AudioUnreadable:
        raise
    except Exception as error:  # a user's object can fail in any way it likes
        raise AudioUnreadable(f"{_sentence(name)} cannot be read: {error}.") from error
    return bytes(buffer)


def _average(block: np.ndarray) -> np.ndarray:
    """float32 [samples] of [samples, channels]; NaN and infinities were counted before."""
    with np.errstate(invalid="ignore", over="ignore"):
        return block.mean(axis=1, dtype=np.float64).astype(np.float32)


def _cut_short(name: str) -> AudioUnreadable:
    return AudioUnreadable(f"{_sentence(name)} is cut short: its header promises more; copy or download it again.")


def _sentence(name: str) -> str:
    """The name at the start of a sentence."""
    return name[0].upper() + name[1:]
