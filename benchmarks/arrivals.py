"""Requests as they come: a Poisson process, each with a text of its own length that takes so long to say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FRAME_RATE = 12.5
LETTERS = (60.0, 0.7, 8, 400)
"""Lengths of texts: median and sigma of their lognormal distribution, least and most."""
SECONDS_PER_LETTER = 0.065
WORDS = "one voice among many that speak at the same time of their own things and do not wait for each other "
PERCENTILES = {"p50_ms": 50, "p95_ms": 95, "p99_ms": 99, "max_ms": 100}


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of arrivals within `seconds`, at least one."""
    generator = np.random.default_rng([seed, 1])
    times = np.cumsum(generator.exponential(1 / rate, int(rate * seconds + 8 * (rate * seconds) ** 0.5 + 8)))
    return [float(time) for time in times[times < seconds]] or [0.0]


def letters(count: int, seed: int) -> np.ndarray:
    """Lengths of texts -> int64 [count]."""
    median, sigma, least, most = LETTERS
    lengths = np.random.default_rng([seed, 2]).lognormal(np.log(median), sigma, count)
    return np.clip(lengths, least, most).astype(np.int64)


def text_of(length: int) -> str:
    """A text of so many letters."""
    return (WORDS * (length // len(WORDS) + 1))[:length]


def speech_frames(length: int) -> int:
    """Frames of a speech that says so many letters."""
    return max(1, round(length * SECONDS_PER_LETTER * FRAME_RATE))


def speech_seconds(lengths: np.ndarray) -> float:
    """How long texts of these lengths take to say on average."""
    return float(np.mean([speech_frames(int(length)) for length in lengths])) / FRAME_RATE


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float | None]:
    """p50, p95, p99 and the greatest, in milliseconds; None where nothing was heard."""
    if not seconds:
        return dict.fromkeys(PERCENTILES)
    found = np.percentile(seconds, list(PERCENTILES.values()), method="inverted_cdf")
    return {name: 1e3 * float(value) for name, value in zip(PERCENTILES, found, strict=True)}
