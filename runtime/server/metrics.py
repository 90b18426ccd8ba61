"""What is counted, for Prometheus; names and meanings follow those that speech servers use."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from aloud.audio import Audio
from aloud.live import Engine

FIRST_AUDIO_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
FACTOR_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 1, 1.5, 3, 10)


@dataclass
class Progress:
    """How one speech is doing."""

    asked: float  # when, in seconds of time.monotonic
    is_played: bool = True  # while it is made; nobody waits for the parts of a file
    first_audio: float | None = None
    audio_seconds: float = 0.0
    underrun_seconds: float = 0.0

    def made(self, chunk: Audio) -> None:
        """A chunk is there: if those before have all been played by now, the player waited for it."""
        now = time.monotonic()
        if self.first_audio is None:
            self.first_audio = now
        self.underrun_seconds += max(0.0, now - self.first_audio - self.audio_seconds - self.underrun_seconds)
        self.audio_seconds += chunk.duration


class Metrics:
    """Of one server, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "aloud_requests", "Requests for speech by how they ended.", ["outcome"], registry=self._registry
        )
        self.first_audio = Histogram(
            "aloud_time_to_first_audio_seconds",
            "From the request to its first audio, of what is paced.",
            buckets=FIRST_AUDIO_BUCKETS,
            registry=self._registry,
        )
        self.real_time_factor = Histogram(
            "aloud_real_time_factor",
            "Seconds of a paced answer, waiting included, for a second of its audio; long ones are near 1.",
            buckets=FACTOR_BUCKETS,
            registry=self._registry,
        )
        self.audio_seconds = Counter("aloud_audio_seconds", "Audio that was made.", registry=self._registry)
        self.underrun_seconds = Counter(
            "aloud_audio_underrun_seconds",
            "How long players that began with the first audio had none left, of what is paced.",
            registry=self._registry,
        )
        self.played_seconds = Counter(
            "aloud_audio_played_seconds", "Audio that was made at the pace of playing.", registry=self._registry
        )
        self.speaking = 0  # requests whose answer is not over, a number for the event loop's thread to change
        speaking = Gauge("aloud_requests_speaking", "Requests whose answer is not over.", registry=self._registry)
        speaking.set_function(lambda: self.speaking)
        self._registry.register(_EngineCollector(engine))

    def count(self, progress: Progress, outcome: str) -> dict[str, float]:
        """One speech that is over -> what the log says of it."""
        self.requests.labels(outcome).inc()
        if progress.first_audio is None:
            return {}
        waited = progress.first_audio - progress.asked
        self.audio_seconds.inc(progress.audio_seconds)
        if progress.is_played:
            self.first_audio.observe(waited)
            self.underrun_seconds.inc(progress.underrun_seconds)
            self.played_seconds.inc(progress.audio_seconds)
        return {"first_audio_ms": round(1000 * waited, 1), "audio_s": round(progress.audio_seconds, 2)}

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector:
    """The engine's own numbers, as they are when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Each number as a gauge."""
        stats = self._engine.stats()
        for name, what, value in (
            ("aloud_streams_running", "Streams that have a slot.", stats.slots_used),
            ("aloud_streams_waiting", "Streams that wait for a slot.", stats.streams_waiting),
            ("aloud_slots", "Slots.", stats.slots),
            ("aloud_frames_per_second", "Frames a second, over ten seconds.", stats.frames_per_second),
            ("aloud_rows_per_step", "Streams a step, since the start.", stats.rows_per_step),
            ("aloud_late_frames", "Frames later than real time, since the start.", stats.late_frames),
            ("aloud_lateness_p99_seconds", "Lateness that 1 in 100 frames exceeds.", stats.lateness_p99_seconds),
            ("aloud_prefix_hits", "Streams that began behind a cached prefix.", stats.prefix_hits),
            ("aloud_session_bytes", "Bytes that sessions keep read.", stats.session_bytes),
            ("aloud_sessions_evicted", "Sessions that lost what they had read.", stats.sessions_evicted),
            ("aloud_suspensions", "Times that full pace gave its slot to real time.", stats.suspensions),
            ("aloud_step_running_seconds", "How long the present step has taken.", stats.stuck_seconds),
        ):
            yield GaugeMetricFamily(name, what, value)
