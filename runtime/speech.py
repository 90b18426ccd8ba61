"""From the loop's frames to what is heard: chunks as they are made, or the whole, trimmed; empty speech retried."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from aloud.audio import Audio
from aloud.codec.config import MimiConfig
from aloud.engine.guards import is_silent
from aloud.engine.loop import Loop
from aloud.engine.stream import Job, Spoken, Stream
from aloud.errors import EngineClosed, NothingSpoken
from aloud.request import Guards


class SpeechStream(Iterator[Audio]):
    """Speech as it is made: iterate for `Audio` chunks of one frame each; `close()` stops it.

    `finish_reason` is None until the stream is over; a chunk has one if it was known to be the last, which it is not
    when the model ends by itself. A silent tail is not trimmed: it has been heard already.
    """

    def __init__(self, loop: Loop, codec: MimiConfig, job: Job, *, progress: bool) -> None:
        """Of `Runtime.stream`."""
        self.finish_reason: str | None = None
        self._loop = loop
        self._codec = codec
        self._job = job
        self._stream: Stream | None = None  # from the first chunk that is asked for until the last
        self._attempt = 1
        self._has_spoken = False
        self._is_closed = False
        self._bar = Progress(shown=progress)

    @property
    def seed(self) -> int:
        """The seed in use; where the first speech was empty, the next one."""
        return self._job.seed

    def __next__(self) -> Audio:
        """The next chunk."""
        try:
            while not self._is_closed:
                if self._stream is None:
                    self._stream = self._loop.submit(self._job)
                part = self._loop.next(self._stream)
                if part is not None:
                    self._has_spoken = True
                    self._bar.update(1 / self._codec.frame_rate)
                    return _audio(self._codec, self._job, [part], _reason_with_last_frame(self._stream))
                _check_whole(self._stream)
                if self._has_spoken:
                    self.finish_reason = self._stream.finish_reason
                    self.close()
                else:
                    self._job = next_attempt(self._job, self._attempt)
                    self._stream, self._attempt = None, self._attempt + 1
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def close(self) -> None:
        """Stop speaking and free the stream's slot."""
        self._is_closed = True
        self._bar.close()
        if self._stream is not None:
            self._loop.cancel(self._stream)

    def __enter__(self) -> SpeechStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _check_whole(stream: Stream) -> None:
    """Raise when others have ended a stream."""
    if stream.finish_reason == "cancelled":
        raise EngineClosed("The engine was closed while this was spoken. Ask again.")


def _reason_with_last_frame(stream: Stream) -> str | None:
    """Why a stream ended, if the frame just taken was known to be its last when it was made."""
    if stream.finish_reason == "end" or stream.frames:
        return None
    return stream.finish_reason


def speak(loop: Loop, codec: MimiConfig, jobs: Sequence[Job], *, progress: bool) -> list[Audio]:
    """Run jobs together to their ends; raises `NothingSpoken` when one says nothing twice."""
    with Progress(shown=progress) as bar:
        spoken = _speak_once(loop, codec, jobs, bar)
        for index, job in enumerate(jobs):
            for attempt in (1, 2):
                if len(spoken[index].samples):
                    break
                job = next_attempt(job, attempt)
                spoken[index] = _speak_once(loop, codec, [job], bar)[0]
    return spoken


def next_attempt(job: Job, attempt: int) -> Job:
    """The job with the next seed, after its `attempt`-th try said nothing; raises `NothingSpoken` after the second."""
    if attempt > 1:
        raise NothingSpoken(
            f"The model said nothing, with seeds {(job.seed - 1) % 2**64} and {job.seed}. "
            "Try another text, context or temperature."
        )
    if job.sampling.temperature == 0 and job.sampling.depth_temperature == 0:
        raise NothingSpoken(
            "The model said nothing, and with temperature 0 it would say the same again. Set a temperature above 0."
        )
    return replace(job, seed=(job.seed + 1) % 2**64)


class Progress(tqdm):
    """A bar without an end on stderr, in seconds of audio."""

    FORMAT = "{n:.1f} s of audio in {elapsed}, {speed:.2f} x real time"

    def __init__(self, *, shown: bool) -> None:
        super().__init__(disable=not shown, file=sys.stderr, bar_format=self.FORMAT)

    def over(self, chunks: Iterable[Audio]) -> Iterator[Audio]:
        """The chunks, each counted when the next is asked for: what the bar shows is in its receiver's hands."""
        for chunk in chunks:
            yield chunk
            self.update(chunk.duration)

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the bar's format can name: tqdm's own, and the mean speed, which is 0 before the first frame."""
        values: dict[str, Any] = super().format_dict
        return values | {"speed": values["n"] / values["elapsed"] if values["elapsed"] else 0.0}


def _speak_once(loop: Loop, codec: MimiConfig, jobs: Sequence[Job], bar: Progress) -> list[Audio]:
    received: list[list[Spoken]] = [[] for _ in jobs]
    streams = [loop.submit(job) for job in jobs]
    try:
        for parts, stream in zip(received, streams, strict=True):
            while (spoken := loop.next(stream)) is not None:
                parts.append(spoken)
                bar.update(1 / codec.frame_rate)
                # Waiting for one makes frames of all, and none of them shall have to wait for room.
                for other_parts, other in zip(received, streams, strict=True):
                    while other is not stream and (spoken := loop.take(other)) is not None:
                        other_parts.append(spoken)
                        bar.update(1 / codec.frame_rate)
            _check_whole(stream)
    finally:
        for stream in streams:
            loop.cancel(stream)
    return [
        _audio(codec, job, _heard(codec, job, parts), stream.finish_reason)
        for job, parts, stream in zip(jobs, received, streams, strict=True)
    ]


def _heard(codec: MimiConfig, job: Job, parts: list[Spoken]) -> list[Spoken]:
    return parts[: _kept_frames(job.guards, codec.frame_rate, [part.power for part in parts])]


def _kept_frames(guards: Guards, frame_rate_hz: float, powers: Sequence[float]) -> int:
    """Frames, of which `powers` are the samples' mean squares, without a silent tail but for a short rest.

    0 if nothing was ever heard; all of them where the guards do not watch for silence.
    """
    if guards.silence_seconds is None:
        return len(powers)
    heard = max((index + 1 for index, power in enumerate(powers) if not is_silent(guards, power)), default=None)
    if heard is None:
        return 0
    return min(len(powers), heard + math.ceil(guards.silence_kept_seconds * frame_rate_hz))


def joined(codec: MimiConfig, chunks: Sequence[Audio], guards: Guards, finish_reason: str | None) -> Audio:
    """Chunks of one frame each as one piece of audio, without a silent tail where the guards watch for one."""
    whole = Audio.concatenate(chunks)
    kept = _kept_frames(guards, codec.frame_rate, [float(np.square(chunk.samples).mean()) for chunk in chunks])
    assert whole.codes is not None
    if not kept:
        raise NothingSpoken("The model said nothing that could be heard. Try another text, seed or context.")
    return Audio(
        whole.samples[: kept * codec.frame_size],
        codec.sample_rate,
        whole.codes[:kept],
        seed=whole.seed,
        finish_reason=finish_reason,
    )


def _audio(codec: MimiConfig, job: Job, parts: Sequence[Spoken], finish_reason: str | None) -> Audio:
    samples = np.concatenate([part.samples for part in parts]) if parts else np.zeros(0, np.float32)
    codes = np.stack([part.codes for part in parts]) if parts else np.zeros((0, job.prompt.codes.shape[1]), np.int64)
    return Audio(samples, codec.sample_rate, codes, seed=job.seed, finish_reason=finish_reason)
