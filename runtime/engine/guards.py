"""What ends speech that does not end by itself: too long for its text, silent, or repeating a frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from aloud.request import Guards

DIGIT_WEIGHT = 6
"""A digit is read as a word; it counts as this many letters."""


def text_limit_frames(guards: Guards, text: str, frame_rate_hz: float) -> int | None:
    """The longest that `text` may plausibly take to say, in frames; None when the guard is off."""
    if guards.text_seconds_per_byte is None:
        return None
    weight = sum(DIGIT_WEIGHT if letter.isdigit() else len(letter.encode()) for letter in text)
    return math.ceil((guards.text_seconds + guards.text_seconds_per_byte * weight) * frame_rate_hz)


def is_silent(guards: Guards, power: float) -> bool:
    """Whether a frame whose samples' mean square is `power`, at full scale 1, is below the guards' threshold."""
    return power < silence_power(guards)


def silence_power(guards: Guards) -> float:
    """The mean square below which a frame is silent."""
    return float(10 ** (guards.silence_dbfs / 10))


REASONS = (None, "silence", "repeat", "text_length")
"""What `Watches.see` answers with is an index of these; where several are true, it is the first."""
NEVER = 2**62
NO_CODE = -2


@dataclass(frozen=True)
class Watch:
    """What has been seen of one stream."""

    silence_power: float
    counts: np.ndarray  # int64 [3]
    limits: np.ndarray  # int64 [3]
    last: np.ndarray | None  # int64 [codebooks]


class Watches:
    """The guards of all slots: they see every frame and say which streams to stop."""

    def __init__(self, slots: int, frame_rate_hz: float) -> None:
        """For streams in slots 0 to `slots` - 1."""
        self._frame_rate_hz = frame_rate_hz
        self._silence_power = np.zeros(slots)
        # Rows: frames of silence until now, the same frame until now, all frames; one guard each, as in REASONS.
        self._counts = np.zeros((3, slots), np.int64)
        self._limits = np.full((3, slots), NEVER)
        self._last: np.ndarray | None = None  # int64 [slots, codebooks], once it is known how many

    def start(self, slot: int, guards: Guards, text_limit: int | None) -> None:
        """Watch a new stream; `text_limit` in frames, of `text_limit_frames`."""
        self._silence_power[slot] = silence_power(guards)
        silence, repeat = (_frames(s, self._frame_rate_hz) for s in (guards.silence_seconds, guards.repeat_seconds))
        self._limits[:, slot] = silence, repeat, NEVER if text_limit is None else text_limit
        self._counts[:, slot] = 0
        if self._last is not None:
            self._last[slot] = NO_CODE

    def copy(self, slot: int) -> Watch:
        """What has been seen of a slot's stream."""
        last = None if self._last is None else self._last[slot].copy()
        return Watch(float(self._silence_power[slot]), self._counts[:, slot].copy(), self._limits[:, slot].copy(), last)

    def paste(self, slot: int, watch: Watch) -> None:
        """Go on watching a stream, now in this slot."""
        self._silence_power[slot] = watch.silence_power
        self._counts[:, slot], self._limits[:, slot] = watch.counts, watch.limits
        if self._last is not None:
            self._last[slot] = NO_CODE if watch.last is None else watch.last

    def see(self, slots: np.ndarray, codes: np.ndarray, power: np.ndarray) -> np.ndarray:
        """Take in a frame of each stream in slots int64 [rows]: codes int64 [rows, codebooks], power float32 [rows].

        -> [rows] of indexes into `REASONS`: the guard that stops the stream
        """
        if self._last is None:
            self._last = np.full((self._counts.shape[1], codes.shape[1]), NO_CODE)
        is_same = (codes == self._last[slots]).all(axis=1)
        self._last[slots] = codes
        counts = self._counts[:, slots]
        counts += 1
        counts[0] *= power < self._silence_power[slots]
        counts[1][~is_same] = 1
        self._counts[:, slots] = counts
        stops = counts >= self._limits[:, slots]
        if not stops.any():
            return np.zeros(len(slots), np.int64)
        return np.where(stops.any(axis=0), stops.argmax(axis=0) + 1, 0)


def _frames(seconds: float | None, frame_rate_hz: float) -> int:
    return NEVER if seconds is None else max(1, math.ceil(seconds * frame_rate_hz))
