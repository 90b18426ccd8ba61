"""What ends speech that does not end by itself: too long for its text, silent, or repeating a frame."""

from __future__ import annotations

import math

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
"""What `Watches.see` answers with is an index of these."""
NEVER = 2**62


class Watches:
    """The guards of all slots: they see every frame and say which streams to stop."""

    def __init__(self, slots: int, frame_rate_hz: float) -> None:
        """For streams in slots 0 to `slots` - 1."""
        self._frame_rate_hz = frame_rate_hz
        self._silence_power = np.zeros(slots)
        self._silence_limit, self._repeat_limit, self._text_limit = (np.full(slots, NEVER) for _ in range(3))
        self._spoken, self._silent, self._repeated = (np.zeros(slots, np.int64) for _ in range(3))
        self._last: np.ndarray | None = None  # int64 [slots, codebooks], once it is known how many

    def start(self, slot: int, guards: Guards, text_limit: int | None) -> None:
        """Watch a new stream; `text_limit` in frames, of `text_limit_frames`."""
        self._silence_power[slot] = silence_power(guards)
        self._silence_limit[slot] = _frames(guards.silence_seconds, self._frame_rate_hz)
        self._repeat_limit[slot] = _frames(guards.repeat_seconds, self._frame_rate_hz)
        self._text_limit[slot] = NEVER if text_limit is None else text_limit
        self._spoken[slot] = self._silent[slot] = self._repeated[slot] = 0

    def see(self, slots: np.ndarray, codes: np.ndarray, power: np.ndarray) -> np.ndarray:
        """Take in a frame of each stream in slots int64 [rows]: codes int64 [rows, codebooks], power float32 [rows].

        -> [rows] of indexes into `REASONS`: the guard that stops the stream
        """
        if self._last is None:
            self._last = np.zeros((len(self._spoken), codes.shape[1]), np.int64)
        same = (codes == self._last[slots]).all(axis=1) & (self._spoken[slots] > 0)
        self._last[slots] = codes
        self._spoken[slots] += 1
        self._silent[slots] = np.where(power < self._silence_power[slots], self._silent[slots] + 1, 0)
        self._repeated[slots] = np.where(same, self._repeated[slots] + 1, 1)
        reasons = np.where(self._spoken[slots] >= self._text_limit[slots], 3, 0)
        reasons[self._repeated[slots] >= self._repeat_limit[slots]] = 2
        reasons[self._silent[slots] >= self._silence_limit[slots]] = 1
        return reasons


def _frames(seconds: float | None, frame_rate_hz: float) -> int:
    return NEVER if seconds is None else max(1, math.ceil(seconds * frame_rate_hz))
