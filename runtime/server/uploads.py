"""Audio that a client sends: any format that FFmpeg reads, decoded no further than is allowed."""

from __future__ import annotations

import io
import math

import av
import numpy as np

from aloud.errors import AudioEmpty, AudioNotFinite, AudioTooLong, AudioUnreadable


def decode_audio(data: bytes, sample_rate: int, max_seconds: float) -> np.ndarray:
    """The bytes of an audio file -> float32 [samples], mono.

    Decodes step by step and stops at the limit, so that a small file cannot become gigabytes.

    Raises `AudioUnreadable`, `AudioTooLong`, `AudioEmpty`, `AudioNotFinite`.
    """
    limit = math.floor(max_seconds * sample_rate)
    parts: list[np.ndarray] = []
    count = 0
    try:
        with av.open(io.BytesIO(data), metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise AudioUnreadable("There is no audio in what was sent.")
            resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
            for frame in container.decode(container.streams.audio[0]):
                for converted in resampler.resample(frame):
                    part = converted.to_ndarray()[0]
                    parts.append(part)
                    count += len(part)
                if count > limit:
                    raise AudioTooLong(f"The audio is longer than {max_seconds:g} s. Send less of it.")
            for converted in resampler.resample(None):
                parts.append(converted.to_ndarray()[0])
    except (av.error.FFmpegError, ValueError, EOFError) as error:
        raise AudioUnreadable(
            "What was sent is no audio that can be read. Send WAV, FLAC, MP3, Ogg, WebM or AAC."
        ) from error
    samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if not len(samples):
        raise AudioEmpty("There are no samples in the audio.")
    if not np.isfinite(samples).all():
        raise AudioNotFinite("There are samples in the audio that are not finite.")
    return samples
