"""Guards: what each one counts, where it stops, and that each can be off, on hand-made frames."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from aloud import Guards
from aloud.engine.guards import REASONS, Watches, is_silent, text_limit_frames

RATE = 12.5
FRAME_SIZE = 1920
ONLY = {
    "text": Guards(silence_seconds=None, repeat_seconds=None),
    "silence": Guards(text_seconds_per_byte=None, repeat_seconds=None),
    "repeat": Guards(text_seconds_per_byte=None, silence_seconds=None),
}


def level(dbfs: float) -> torch.Tensor:
    """A frame of a 1 kHz sine (80 whole periods) whose root mean square is `dbfs` below full scale."""
    time = torch.arange(FRAME_SIZE) / 24_000
    return 10 ** (dbfs / 20) * math.sqrt(2) * torch.sin(2 * torch.pi * 1000 * time)


LOUD, SILENT = level(-20.0), torch.zeros(FRAME_SIZE)


def power(samples: torch.Tensor) -> float:
    return float(samples.square().mean())


class Watch:
    """One stream in a slot between others that get other frames."""

    def __init__(self, guards: Guards, text_limit: int | None) -> None:
        self._watches = Watches(3, RATE)
        self._watches.start(0, Guards.off(), None)
        self._watches.start(2, Guards.off(), None)
        self._watches.start(1, guards, text_limit)
        self._frames = 0

    def see(self, codes: list[int], samples: torch.Tensor) -> str | None:
        self._frames += 1
        others = [self._frames, 0]
        reasons = self._watches.see(
            np.array([2, 1, 0]), np.array([others, codes, others]), np.array([1.0, power(samples), 0.0], np.float32)
        )
        assert reasons[0] == reasons[2] == 0
        return REASONS[reasons[1]]


def stop(guards: Guards, frames: Iterable[tuple[int, torch.Tensor]], text_limit: int | None = None) -> tuple:
    """(frames seen when a guard stopped the stream, its name), or (frames, None) at the end."""
    watch = Watch(guards, text_limit)
    count = 0
    for count, (code, samples) in enumerate(frames, 1):
        reason = watch.see([code, 7], samples)
        if reason is not None:
            return count, reason
    return count, None


# --- how long a text may take -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("a", 4.2),
        ("Hello there.", 4 + 12 * 0.2),
        ("Jahr 2024", 4 + (5 + 4 * 6) * 0.2),  # a digit is six letters
        ("schön", 4 + 6 * 0.2),
        ("你好", 4 + 6 * 0.2),
        ("٣", 4 + 6 * 0.2),  # a digit in any script
    ],
    ids=["one letter", "ascii", "digits", "two bytes", "three bytes", "arabic digit"],
)
def test_the_text_limit_is_the_documented_sum(text: str, seconds: float) -> None:
    frames = text_limit_frames(Guards(), text, RATE)
    assert frames is not None
    assert seconds <= frames / RATE + 1e-9 < seconds + 1 / RATE + 1e-9


def test_the_text_limit_follows_its_settings() -> None:
    assert text_limit_frames(Guards(text_seconds=1.0, text_seconds_per_byte=0.08), "abcde", RATE) == 18  # 12.5 + 5
    assert text_limit_frames(Guards(text_seconds_per_byte=None), "abcde", RATE) is None
    assert text_limit_frames(Guards.off(), "abcde", RATE) is None


def test_the_text_guard_stops_at_its_frame() -> None:
    endless = ((code, LOUD) for code in range(1, 1000))
    assert stop(ONLY["text"], endless, text_limit=18) == (18, "text_length")


# --- silence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dbfs", "silent"), [(-20, False), (-49.9, False), (-50.1, True), (-80, True)], ids=lambda value: str(value)
)
def test_a_frame_is_silent_below_the_threshold(dbfs: float, silent: bool) -> None:
    assert is_silent(Guards(), power(level(dbfs))) is silent
    assert is_silent(Guards(silence_dbfs=-50 + 30), power(level(dbfs + 30))) is silent


def test_digital_silence_is_silent_and_one_click_is_not() -> None:
    click = torch.zeros(FRAME_SIZE)
    click[100] = 0.5
    assert is_silent(Guards(), power(SILENT))
    assert not is_silent(Guards(), power(click))


def test_silence_stops_after_a_whole_run_of_it() -> None:
    # 3 s are 37.5 frames, so 38; leading and inner silence that is shorter goes on.
    frames = [(code, SILENT) for code in range(1, 38)]  # 37 of them
    frames += [(50, LOUD)]
    frames += [(code, SILENT) for code in range(100, 140)]
    assert stop(ONLY["silence"], frames) == (37 + 1 + 38, "silence")


def test_sound_within_the_run_starts_it_anew() -> None:
    frames = [(code, LOUD if code % 30 == 0 else SILENT) for code in range(1, 300)]
    assert stop(ONLY["silence"], frames) == (299, None)


# --- repetition -------------------------------------------------------------------------------------------------------


def test_a_repeating_frame_stops_after_a_second_of_it() -> None:
    frames = [(1, LOUD), (2, LOUD)] + [(3, LOUD)] * 40
    assert stop(ONLY["repeat"], frames) == (2 + 13, "repeat")  # 12.5 frames a second, so 13


def test_frames_that_alternate_or_differ_in_one_codebook_are_no_repetition() -> None:
    assert stop(ONLY["repeat"], [(1 + index % 2, LOUD) for index in range(200)]) == (200, None)
    watch = Watch(ONLY["repeat"], None)
    reasons = [watch.see([5, index % 2], LOUD) for index in range(200)]
    assert reasons == [None] * 200


def test_a_break_starts_the_repetition_anew() -> None:
    frames = ([(1, LOUD)] * 12 + [(2, LOUD)]) * 5
    assert stop(ONLY["repeat"], frames) == (65, None)


@pytest.mark.parametrize("seconds", [0.0, 0.01], ids=["zero", "less than a frame"])
def test_a_run_of_less_than_a_frame_is_one_frame(seconds: float) -> None:
    assert stop(Guards(text_seconds_per_byte=None, silence_seconds=seconds), [(1, SILENT)]) == (1, "silence")


# --- all together -----------------------------------------------------------------------------------------------------


def test_no_guard_stops_what_all_would_stop() -> None:
    frames = [(1, SILENT)] * 300
    assert stop(Guards(), frames, text_limit=200) == (13, "repeat")
    assert stop(Guards.off(), frames) == (300, None)


@pytest.mark.parametrize("name", ["text", "silence", "repeat"])
def test_a_guard_alone_says_its_own_name(name: str) -> None:
    limit = 100 if name == "text" else None
    expected = {"text": (100, "text_length"), "silence": (38, "silence"), "repeat": (13, "repeat")}
    assert stop(ONLY[name], [(1, SILENT)] * 300, text_limit=limit) == expected[name]


def test_ordinary_speech_is_left_alone(generator: torch.Generator) -> None:
    """Six seconds with a pause of two, for a sentence of 60 letters."""
    codes = torch.randint(1, 2048, (75,), generator=generator).tolist()
    frames = [(code, SILENT if 30 <= index < 55 else LOUD) for index, code in enumerate(codes)]
    assert stop(Guards(), frames, text_limit=text_limit_frames(Guards(), "x" * 60, RATE)) == (75, None)


def test_a_slot_that_is_used_again_remembers_nothing() -> None:
    watches = Watches(1, RATE)
    slots, silent = np.array([0]), np.zeros(1, np.float32)
    for count in (12, 13):
        watches.start(0, ONLY["repeat"], None)
        reasons = [REASONS[int(watches.see(slots, np.array([[3, 3]]), silent)[0])] for _ in range(count)]
    assert reasons == [None] * 12 + ["repeat"]
