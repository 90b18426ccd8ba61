"""What ends speech that does not end by itself: too long for its text, silent, or repeating a frame."""

from __future__ import annotations

import math

import torch

from aloud.request import Guards

DIGIT_WEIGHT = 6
"""A digit is read as a word; it counts as this many letters."""


def text_limit_frames(guards: Guards, text: str, frame_rate_hz: float) -> int | None:
    """The longest that `text` may plausibly take to say, in frames; None when the guard is off."""
    if guards.text_seconds_per_byte is None:
        return None
    weight = sum(DIGIT_WEIGHT if letter.isdigit() else len(letter.encode()) for letter in text)
    return math.ceil((guards.text_seconds + guards.text_seconds_per_byte * weight) * frame_rate_hz)


def is_silent(guards: Guards, samples: torch.Tensor) -> bool:
    """Whether a frame's root mean square, samples [frame_size] of full scale 1, is below the guards' threshold."""
    return float(samples.square().mean().sqrt()) < 10 ** (guards.silence_dbfs / 20)


class Watch:
    """One stream's guards: sees every frame and says when to stop."""

    def __init__(self, guards: Guards, text_limit: int | None, frame_rate_hz: float) -> None:
        """`text_limit` in frames, of `text_limit_frames`."""
        self._guards = guards
        self._text_limit = text_limit
        self._silence_limit = _frames(guards.silence_seconds, frame_rate_hz)
        self._repeat_limit = _frames(guards.repeat_seconds, frame_rate_hz)
        self._spoken = 0
        self._silent = 0
        self._repeated = 0
        self._last: torch.Tensor | None = None

    def see(self, codes: torch.Tensor, samples: torch.Tensor) -> str | None:
        """Take in a frame, codes [codebooks] and samples [frame_size] -> the guard that stops the stream, or None."""
        self._spoken += 1
        self._silent = self._silent + 1 if is_silent(self._guards, samples) else 0
        self._repeated = self._repeated + 1 if self._last is not None and torch.equal(codes, self._last) else 1
        self._last = codes
        if self._silence_limit is not None and self._silent >= self._silence_limit:
            return "silence"
        if self._repeat_limit is not None and self._repeated >= self._repeat_limit:
            return "repeat"
        if self._text_limit is not None and self._spoken >= self._text_limit:
            return "text_length"
        return None


def _frames(seconds: float | None, frame_rate_hz: float) -> int | None:
    return None if seconds is None else max(1, math.ceil(seconds * frame_rate_hz))
