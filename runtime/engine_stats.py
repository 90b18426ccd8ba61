"""What an engine does and has done, as plain numbers."""

from __future__ import annotations

import time
from dataclasses import dataclass

from aloud.engine.loop import Loop
from aloud.session_caches import SessionCaches


@dataclass(frozen=True)
class EngineStats:
    """What an engine does, as plain numbers; lateness is of frames of real-time streams, since the engine began."""

    slots: int
    slots_used: int
    streams_waiting: int
    accepted: int
    refused: int
    finished: int
    cancelled: int
    failed: int
    prefix_hits: int  # streams that began behind a cached voice or session
    session_bytes: int  # that sessions keep read on the device
    sessions_evicted: int  # times that one lost what it had read, for others
    suspensions: int  # times that a stream of full pace gave its slot to one of real time, and waited for another
    prefill_positions: int  # positions of prompts that were read
    frames: int
    frames_per_second: float  # over the last 10 s
    steps: int
    rows_per_step: float
    realtime_frames: int
    late_frames: int
    lateness_p50_seconds: float
    lateness_p99_seconds: float
    lateness_max_seconds: float
    is_draining: bool
    stuck_seconds: float  # how long the step that runs now has taken


class Rate:
    """How fast a number grows, over the last ten seconds."""

    SECONDS = 10

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = []  # (when, how many by then), one a second
        self._now = 0

    def count(self, total: int) -> None:
        """How many there are by now."""
        self._now = total
        now = time.monotonic()
        if not self._marks or now - self._marks[-1][0] >= 1:
            self._marks = [*self._marks[-self.SECONDS :], (now, total)]

    def per_second(self) -> float:
        """The growth a second since the oldest mark that is not older than ten seconds."""
        now = time.monotonic()
        marks = [mark for mark in self._marks if now - mark[0] <= self.SECONDS]
        return (self._now - marks[0][1]) / (now - marks[0][0]) if marks and now > marks[0][0] else 0.0


def engine_stats(loop: Loop, caches: SessionCaches, rates: Rate, *, is_draining: bool) -> EngineStats:
    """Of an engine's parts, as they are now."""
    counts, lateness = loop.counts, loop.scheduler.statistics()
    return EngineStats(
        slots=loop.slots,
        slots_used=loop.used_slots,
        streams_waiting=loop.waiting,
        accepted=counts.accepted,
        refused=counts.refused,
        finished=counts.finished,
        cancelled=counts.cancelled,
        failed=counts.failed,
        prefix_hits=counts.with_prefix,
        session_bytes=caches.used_bytes,
        sessions_evicted=caches.evicted,
        suspensions=counts.suspended,
        prefill_positions=counts.read_positions,
        frames=lateness.frames,
        frames_per_second=rates.per_second(),
        steps=counts.steps,
        rows_per_step=counts.rows / counts.steps if counts.steps else 0.0,
        realtime_frames=lateness.realtime_frames,
        late_frames=lateness.late_frames,
        lateness_p50_seconds=lateness.lateness_p50,
        lateness_p99_seconds=lateness.lateness_p99,
        lateness_max_seconds=lateness.lateness_max,
        is_draining=is_draining,
        stuck_seconds=loop.stuck_seconds,
    )
