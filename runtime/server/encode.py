"""Samples to the bytes of an audio format, chunk by chunk, so that a listener hears each as soon as it is made."""

from __future__ import annotations

import asyncio
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, cast

import av
import numpy as np

from aloud.audio_file import to_int16

STREAM_SIZE = 0xFFFFFFFF
"""The length in a WAV header of a stream whose end is not known: players read on until the connection ends."""


class Encoder(Protocol):
    """Bytes of one audio stream."""

    def feed(self, samples: np.ndarray) -> bytes:
        """The bytes that float32 [samples] complete."""
        ...

    def finish(self) -> bytes:
        """The bytes that are left."""
        ...


NO_TAGS = (("write_xing", "0"), ("id3v2_version", "0"))
# The encoders' own defaults take up to twice as long, for speech that is no nearer to what went in.
FAST_MP3, FAST_OPUS, FAST_AAC = (("compression_level", "7"),), (("compression_level", "5"),), (("aac_coder", "fast"),)


@dataclass(frozen=True)
class Format:
    """An audio format that speech can be asked for in."""

    name: str
    content_type: str
    container: str | None = None  # of FFmpeg; None: raw samples, with a WAV header or without
    codec: str = ""
    sample_format: str = ""
    bit_rate: int | None = None
    options: tuple[tuple[str, str], ...] = ()  # of the container
    codec_options: tuple[tuple[str, str], ...] = ()


FORMATS = {
    format.name: format
    for format in (
        Format("pcm", "audio/pcm"),
        Format("wav", "audio/wav"),
        # No Xing header: it would be written into the beginning once the end is known.
        Format("mp3", "audio/mpeg", "mp3", "libmp3lame", "fltp", 128_000, NO_TAGS, FAST_MP3),
        # A page for each chunk, in microseconds; FFmpeg would hold back a second.
        Format("opus", "audio/opus", "ogg", "libopus", "flt", 64_000, (("page_duration", "20000"),), FAST_OPUS),
        Format("aac", "audio/aac", "adts", "aac", "fltp", 128_000, (), FAST_AAC),
        Format("flac", "audio/flac", "flac", "flac", "s16"),
    )
}


def encoder(format: Format, sample_rate: int) -> Encoder:
    """An encoder of one mono stream."""
    if format.container is None:
        return RawEncoder(sample_rate if format.name == "wav" else None)
    return ContainerEncoder(format, sample_rate)


class Encoders:
    """The encoders of a server; those that compress work in threads, as it takes longer than all else of an answer."""

    def __init__(self, sample_rate: int) -> None:
        self._sample_rate = sample_rate
        self._threads = ThreadPoolExecutor(os.cpu_count(), "aloud-encode")

    def new(self, format: Format) -> Encoder:
        """An encoder of one stream."""
        return encoder(format, self._sample_rate)

    async def feed(self, encoder: Encoder, samples: np.ndarray) -> bytes:
        """See `Encoder.feed`; a stream's are fed one after the other."""
        if isinstance(encoder, RawEncoder):
            return encoder.feed(samples)
        return await asyncio.get_running_loop().run_in_executor(self._threads, encoder.feed, samples)


class RawEncoder:
    """16-bit little-endian samples, after a WAV header if there is a sample rate for one."""

    def __init__(self, wav_sample_rate: int | None) -> None:
        self._header = b"" if wav_sample_rate is None else wav_header(wav_sample_rate)

    def feed(self, samples: np.ndarray) -> bytes:
        """See `Encoder.feed`."""
        header, self._header = self._header, b""
        return header + to_int16(samples).astype("<i2").tobytes()

    def finish(self) -> bytes:
        """See `Encoder.finish`."""
        return self.feed(np.zeros(0, np.float32))


def wav_header(sample_rate: int) -> bytes:
    """The header of a WAV stream of mono 16-bit samples that goes on until the connection ends."""
    riff = struct.pack("<4sI4s", b"RIFF", STREAM_SIZE, b"WAVE")
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    return riff + form + struct.pack("<4sI", b"data", STREAM_SIZE)


class ContainerEncoder:
    """A format that FFmpeg writes, flushed after every packet."""

    def __init__(self, format: Format, sample_rate: int) -> None:
        self._out = _Collector()
        options = {**dict(format.options), "flush_packets": "1"}
        self._container: Any = av.open(self._out, mode="w", format=format.container, container_options=options)
        self._stream = cast(
            Any,
            self._container.add_stream(
                format.codec, rate=sample_rate, layout="mono", options=dict(format.codec_options)
            ),
        )
        self._stream.codec_context.format = format.sample_format
        if format.bit_rate is not None:
            self._stream.bit_rate = format.bit_rate
        self._sample_rate = sample_rate
        self._resampler = av.AudioResampler(format=format.sample_format, layout="mono", rate=sample_rate)
        self._position = 0

    def feed(self, samples: np.ndarray) -> bytes:
        """See `Encoder.feed`."""
        if len(samples):
            frame = av.AudioFrame.from_ndarray(to_int16(samples)[None], format="s16", layout="mono")
            frame.sample_rate = self._sample_rate
            frame.pts, frame.time_base = self._position, Fraction(1, self._sample_rate)
            self._position += len(samples)
            for converted in self._resampler.resample(frame):
                self._container.mux(self._stream.encode(converted))
        return self._out.take()

    def finish(self) -> bytes:
        """See `Encoder.finish`."""
        for converted in self._resampler.resample(None):
            self._container.mux(self._stream.encode(converted))
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._out.take()


class _Collector:
    """A file that can only be written to, from which the bytes are taken as they come."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        data, self._parts = b"".join(self._parts), []
        return data
