"""Faults at every step of a schedule: no slot is leaked, and nobody else's speech changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import count, product

import numpy as np
import pytest
import torch

from aloud.engine.loop import Loop
from aloud.engine.stream import Job, Stream
from aloud.errors import LogitsNotFinite, OutOfMemory, StepFailed
from live.quick import Fault, QuickSteps, is_empty, quick_job
from scripted import CODEBOOKS, FRAME_RATE

ERRORS: tuple[type[Exception], ...] = (RuntimeError, MemoryError, torch.OutOfMemoryError)
SLOTS = 3
LIMIT_SECONDS = 20.0
"""How long a caller may wait before it is said to hang."""


@dataclass(frozen=True)
class Way:
    """How steps are made and read."""

    ahead: int
    together: bool
    rows: int


WAYS = [Way(*way) for way in product([0, 1, 2], [False, True], [SLOTS, 2]) if way[0] < 2 or way[2] == SLOTS]


class Schedule:
    """Jobs that come and are cancelled at given ticks, on a clock that goes 10 ms a tick; and what each says alone."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.comes = [0, 0, 0, 1, 3, 4, 4, 6, 9, 9, 9, 16]
        self.cancelled_at: dict[int, int] = {2: 5, 5: 8}
        prefix = self.read_alone(quick_job(100, positions=11, max_frames=0, keeps_cache=True)).prefix
        self.jobs = [
            quick_job(1, positions=20),
            quick_job(2, positions=3, lead_seconds=0.4),
            quick_job(3, positions=40),
            quick_job(4, prefix=prefix, keeps_cache=True),
            quick_job(5, lead_seconds=0.16, max_frames=6),
            quick_job(6, positions=33),
            quick_job(7, prefix=prefix),
            quick_job(8, positions=10, max_frames=0, keeps_cache=True),
            *(quick_job(seed) for seed in (9, 13, 14)),
            quick_job(10, lead_seconds=0.4),  # in the slot of one of those
        ]
        self.alone = [codes_of(self.read_alone(job)) for job in self.jobs]
        self.short = [quick_job(seed, positions=4, max_frames=2) for seed in range(50, 50 + SLOTS)]
        self.short_alone = [codes_of(self.read_alone(job)) for job in self.short]

    def read_alone(self, job: Job) -> Stream:
        loop = Loop(QuickSteps(1), 1, FRAME_RATE)
        stream = loop.submit(job)
        while not stream.is_over:
            loop.step()
        return stream

    def run(self, fault: Fault) -> tuple[QuickSteps, Loop, list[Stream], dict[int, int]]:
        """-> with it, whose job was in each slot of the step where the fault happened."""
        way, now = self.way, [0.0]
        steps = QuickSteps(SLOTS, ahead=way.ahead, prefill_together=way.together, most_rows=way.rows)
        loop = Loop(steps, SLOTS, FRAME_RATE, clock=lambda: now[0])
        streams: list[Stream] = []
        concerned: dict[int, int] = {}
        at = fault.at

        def seen(step: str, slots: list[int]) -> bool:
            owners = {slot: number for number, stream in enumerate(streams) for slot in [stream.slot] if slot >= 0}
            try:
                return at(step, slots)
            finally:
                if fault.happened and not concerned:
                    concerned.update({slot: owners[slot] for slot in slots if slot in owners})

        fault.at = seen  # type: ignore[method-assign, assignment]
        steps.fault = fault
        for tick in range(500):
            for job, comes in zip(self.jobs, self.comes, strict=True):
                if comes == tick:
                    streams.append(loop.submit(job))
            for number, cancelled in self.cancelled_at.items():
                if cancelled == tick:
                    loop.cancel(streams[number])
            pause = loop.step()
            now[0] += pause if pause else 0.01
            if tick > max(*self.comes, *self.cancelled_at.values()) and all(stream.is_over for stream in streams):
                break
        steps.fault = Fault()
        return steps, loop, streams, concerned


def codes_of(stream: Stream) -> np.ndarray:
    codes = []
    while (spoken := stream.take()) is not None:
        codes.append(spoken.codes)
    return np.array(codes, np.int64).reshape(-1, CODEBOOKS)


def assert_begins(codes: np.ndarray, expected: np.ndarray) -> None:
    assert np.array_equal(codes, expected[: len(codes)])


def assert_usable(loop: Loop, schedule: Schedule) -> None:
    """All slots are free and give what a fresh loop gives."""
    assert is_empty(loop)
    again = [loop.submit(job) for job in schedule.short]
    while not loop.is_idle:
        loop.step()
    for stream, expected in zip(again, schedule.short_alone, strict=True):
        assert np.array_equal(codes_of(stream), expected)
    assert is_empty(loop)


def check(schedule: Schedule, fault: Fault) -> int:
    """Run a schedule with a fault -> how many streams failed of it."""
    steps, loop, streams, concerned = schedule.run(fault)
    where = f"{schedule.way} {fault.step} {fault.call} {fault.error}"
    assert not steps.wrong, where
    assert all(stream.is_over for stream in streams), where
    failed = [number for number, stream in enumerate(streams) if stream.error is not None]
    for number, stream in enumerate(streams):
        codes = codes_of(stream)
        assert_begins(codes, schedule.alone[number])
        if stream.error is None and stream.finish_reason != "cancelled":
            assert len(codes) == len(schedule.alone[number]), where
        if stream.error is not None:
            words = {None: LogitsNotFinite, RuntimeError: StepFailed}.get(fault.error, OutOfMemory)
            assert type(stream.error) is words, where
    if fault.happened:
        if fault.step == "prefill" and len(concerned) > 1:
            assert not failed, where  # each prompt was read again by itself, and none was at fault
        elif fault.error is None:
            assert set(failed) <= {concerned[fault.slots[0]]}, where
        elif fault.step == "seconds":
            assert not failed, where  # only a measurement is lost
        elif fault.step in ("copy_stream", "copy_prefix") and fault.error is not RuntimeError:
            assert not failed, where  # it keeps its slot, or what it has read is not kept
        else:
            assert set(failed) <= set(concerned.values()), where
    assert_usable(loop, schedule)
    return len(failed)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_fault_in_any_step_fails_who_is_in_it_and_nobody_else(way: Way) -> None:
    schedule = Schedule(way)
    quiet = Fault()
    assert check(schedule, quiet) == 0
    injected: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    errors = (error for number in count() for error in [ERRORS[number % len(ERRORS)]])
    for step, calls in quiet.calls.items():
        for call in range(calls):
            for error in (next(errors), None) if step == "launch" else (next(errors),):
                fault = Fault(step, call, error)
                failed[step] += check(schedule, fault)
                injected[step] += fault.happened
    print(f"{way}: injected {sum(injected.values())}: {dict(injected)}; streams that failed: {dict(failed)}")
    assert set(injected) == {
        *("start", "prefill", "seconds", "launch", "read"),
        *("copy_prefix", "paste_prefix", "copy_stream", "paste_stream"),
    }
    assert sum(injected.values()) >= 99  # in each of ten ways, and hundreds more in test_faults_callers.py
    # A fault reached somebody, but where a shared prefill pass was done again, or there was another way.
    spared = ("prefill", "seconds", "copy_stream", "copy_prefix")
    assert all(failed[step] >= injected[step] / 4 for step in injected if step not in spared)
