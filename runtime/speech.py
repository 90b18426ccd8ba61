"""From a loop's frames to what a caller hears: chunks as they are made, or the whole, trimmed; empty speech retried."""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from aloud import memory
from aloud.audio import Audio
from aloud.engine.guards import is_silent
from aloud.engine.loop import Delivery, Job, Spoken, run
from aloud.errors import NothingSpoken
from aloud.models.csm import Csm


class SpeechStream(Iterator[Audio]):
    """Speech as it is made: iterate for `Audio` chunks of one frame each; `close()` stops it.

    `finish_reason` is None until the stream is over; a chunk has one if it was known to be the last, which it is not
    when the model ends by itself. A silent tail is not trimmed: it has been heard already.
    """

    def __init__(self, model: Csm, job: Job, *, progress: bool) -> None:
        """Of `Runtime.stream`."""
        self.finish_reason: str | None = None
        self._model = model
        self._job = job
        self._chunks = self._iterate(progress)

    @property
    def seed(self) -> int:
        """The seed in use; where the first speech was empty, the next one."""
        return self._job.seed

    def __next__(self) -> Audio:
        """The next chunk."""
        return next(self._chunks)

    def close(self) -> None:
        """Stop speaking and free the stream's memory."""
        self._chunks.close()

    def __enter__(self) -> SpeechStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _iterate(self, progress: bool) -> Generator[Audio, None, None]:
        spoken = False
        for attempt in (1, 2):
            with closing(deliver(self._model, [self._job], progress=progress)) as deliveries:
                for delivery in deliveries:
                    if delivery.spoken is not None:
                        spoken = True
                        yield _audio(self._model, self._job, [delivery.spoken], delivery.finish_reason)
            if spoken:
                self.finish_reason = delivery.finish_reason
                return
            self._job = next_attempt(self._job, attempt)


def speak(model: Csm, jobs: Sequence[Job], *, progress: bool) -> list[Audio]:
    """Run jobs together to their ends; raises `NothingSpoken` when one says nothing twice."""
    spoken = _speak_once(model, jobs, progress=progress)
    for index, job in enumerate(jobs):
        for attempt in (1, 2):
            if len(spoken[index].samples):
                break
            job = next_attempt(job, attempt)
            spoken[index] = _speak_once(model, [job], progress=progress)[0]
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


def deliver(model: Csm, jobs: Sequence[Job], *, progress: bool) -> Generator[Delivery, None, None]:
    """The loop's deliveries, with a bar on stderr if asked for, and with running out of memory said in words."""
    rate = model.config.codec.frame_rate
    cure = "Ask for fewer seconds or fewer requests together, shorten the context, or free some memory."
    with (
        memory.out_of_memory("Speaking needs", model.device, cure),
        _Progress(disable=not progress, file=sys.stderr, bar_format=_Progress.FORMAT) as bar,
    ):
        for delivery in run(model, jobs, rate):
            if delivery.spoken is not None:
                bar.update(1 / rate)
            yield delivery


class _Progress(tqdm):
    """A bar without an end, in seconds of audio."""

    FORMAT = "{n:.1f} s of audio in {elapsed}, {speed:.2f} x real time"

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the bar's format can name: tqdm's own, and the mean speed, which is 0 before the first frame."""
        values: dict[str, Any] = super().format_dict
        return values | {"speed": values["n"] / values["elapsed"] if values["elapsed"] else 0.0}


def _speak_once(model: Csm, jobs: Sequence[Job], *, progress: bool) -> list[Audio]:
    received: list[list[Spoken]] = [[] for _ in jobs]
    reasons: list[str | None] = [None] * len(jobs)
    for delivery in deliver(model, jobs, progress=progress):
        reasons[delivery.job] = delivery.finish_reason
        if delivery.spoken is not None:
            received[delivery.job].append(delivery.spoken)
    return [
        _audio(model, job, _trim(model, job, parts), reason)
        for job, parts, reason in zip(jobs, received, reasons, strict=True)
    ]


def _trim(model: Csm, job: Job, parts: list[Spoken]) -> list[Spoken]:
    """Leave out the silent tail but for a short rest; everything, if nothing was ever heard."""
    if job.guards.silence_seconds is None:
        return parts
    heard = max(
        (index + 1 for index, part in enumerate(parts) if not is_silent(job.guards, part.samples)),
        default=None,
    )
    if heard is None:
        return []
    return parts[: heard + math.ceil(job.guards.silence_kept_seconds * model.config.codec.frame_rate)]


def _audio(model: Csm, job: Job, parts: Sequence[Spoken], finish_reason: str | None) -> Audio:
    config = model.config
    samples = torch.cat([part.samples for part in parts]) if parts else torch.zeros(0)
    codes = torch.stack([part.codes for part in parts]) if parts else torch.zeros(0, config.codebooks).long()
    return Audio(samples.numpy(), config.codec.sample_rate, codes.numpy(), seed=job.seed, finish_reason=finish_reason)
