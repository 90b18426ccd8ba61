"""The loop that steps a model: prefill every stream, then frame after frame until each has ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from aloud.engine.guards import Watch
from aloud.engine.model import SpeechModel
from aloud.errors import LogitsNotFinite
from aloud.request import Guards, Prompt, Sampling

State = TypeVar("State")


@dataclass(frozen=True)
class Job:
    """One stream to run: everything resolved, nothing left to default."""

    prompt: Prompt
    sampling: Sampling
    seed: int
    max_frames: int
    guards: Guards
    text_limit_frames: int | None


@dataclass(frozen=True)
class Spoken:
    """One frame of speech, on the CPU."""

    codes: torch.Tensor  # int64 [codebooks]
    samples: torch.Tensor  # float32 [frame_size]


@dataclass(frozen=True)
class Delivery:
    """What one tick gave one stream: a frame, or why there are no more, or both with the last frame."""

    job: int  # index among the jobs
    spoken: Spoken | None
    finish_reason: str | None


def run(model: SpeechModel[State], jobs: Sequence[Job], frame_rate_hz: float) -> Iterator[Delivery]:
    """Run some streams together, each with its own prompt, sampling, seed and end.

    Raises `LogitsNotFinite` when a stream's model computes NaN.
    """
    # The last frame is never read back, so a stream needs one position less than prompt and frames together.
    positions = max(len(job.prompt) + job.max_frames - 1 for job in jobs)
    state = model.allocate(len(jobs), positions)
    watches = []
    for slot, job in enumerate(jobs):
        model.start(state, slot, job.sampling, job.seed)
        model.prefill(state, slot, job.prompt)
        watches.append(Watch(job.guards, job.text_limit_frames, frame_rate_hz))

    active = list(range(len(jobs)))
    frames = 0
    while active:
        frame = model.frame(state, torch.tensor(active, device=model.device))
        frames += 1
        codes, samples, ended = frame.codes.cpu(), frame.samples.cpu(), frame.ended.tolist()
        still_active = []
        for row, slot in enumerate(active):
            if bool((codes[row] < 0).any()):
                raise LogitsNotFinite(
                    f"The model computed logits that are not finite in frame {frames} of request {slot}. "
                    "Load it in float32, or check the checkpoint."
                )
            if ended[row]:
                yield Delivery(slot, None, "end")
                continue
            reason = watches[slot].see(codes[row], samples[row])
            if reason is None and frames >= jobs[slot].max_frames:
                reason = "length"
            if reason is None:
                still_active.append(slot)
            yield Delivery(slot, Spoken(codes[row], samples[row]), reason)
        active = still_active
