"""Audio that a client sends: any format that FFmpeg reads, decoded no further than is allowed."""

from __future__ import annotations

import io
import math
from typing import Any

import av
import numpy as np

from aloud.errors import AudioEmpty, AudioInvalid, AudioNotFinite, AudioRateInvalid, AudioTooLong, AudioUnreadable

OPTIONS = {"format_whitelist": "wav,w64,flac,mp3,ogg,matroska,webm,mov,mp4,aac,aiff,caf", "protocol_whitelist": "none"}
"""Only formats that hold their audio themselves: FFmpeg would also follow playlists to files and addresses."""
# Names and comments that are no UTF-8 are nothing to fail at; since PyAV 19 they never are.
LENIENT: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 8_000, 192_000


def decode_audio(data: bytes, sample_rate: int, max_seconds: float) -> np.ndarray:
    """The bytes of an audio file -> float32 [samples], mono.

    Decodes step by step and stops at the limit, so that a small file cannot become gigabytes.

    Raises `AudioUnreadable`, `AudioRateInvalid`, `AudioTooLong`, `AudioEmpty`, `AudioNotFinite`.
    """
    limit = math.floor(max_seconds * sample_rate)
    parts: list[np.ndarray] = []
    count = 0
    try:
        with av.open(io.BytesIO(data), options=OPTIONS, **LENIENT) as container:
            if not container.streams.audio:
                raise AudioUnreadable("There is no audio in what was sent.")
            resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
            for frame in container.decode(container.streams.audio[0]):
                if not MIN_SAMPLE_RATE <= frame.sample_rate <= MAX_SAMPLE_RATE:  # or one frame could become an hour
                    raise AudioRateInvalid(f"The audio has {frame.sample_rate} Hz. Send 8 to 192 kHz.")
                for converted in resampler.resample(frame):
                    part = converted.to_ndarray()[0]
                    parts.append(part)
                    count += len(part)
                if count > limit:
                    raise _too_long(max_seconds)
            for converted in resampler.resample(None):
                parts.append(converted.to_ndarray()[0])
    except AudioInvalid:
        raise
    except (av.error.FFmpegError, ValueError, EOFError) as error:
        raise AudioUnreadable(
            "What was sent is no audio that can be read. Send WAV, FLAC, MP3, Ogg, WebM or AAC."
        ) from error
    samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if len(samples) > limit:
        raise _too_long(max_seconds)
    if not len(samples):
        raise AudioEmpty("There are no samples in the audio.")
    if not np.isfinite(samples).all():
        raise AudioNotFinite("There are samples in the audio that are not finite.")
    return samples


def _too_long(max_seconds: float) -> AudioTooLong:
    return AudioTooLong(f"The audio is longer than {max_seconds:g} s. Send less of it.")
