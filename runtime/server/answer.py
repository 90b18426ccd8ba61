"""The answer that streams: audio or events as they are made, until they end or the client leaves or is too slow."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from aloud.audio import Audio
from aloud.live_speech import LiveSpeech
from aloud.server.encode import Encoder, Format
from aloud.server.metrics import Metrics
from aloud.server.problems import Problem, problem_of

EVENT_STREAM = "text/event-stream"


class ClientGone(Exception):
    """Nobody listens any more."""


@dataclass
class Progress:
    """How one speech is doing."""

    asked: float  # when, in seconds of time.monotonic
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


class SpeechAnswer(Response):
    """The response of one speech.

    Its status waits for the first audio, so that whatever fails before is an ordinary error. What fails later is one
    error event, or a connection that is cut: never silence passed off as speech.
    """

    def __init__(
        self,
        speech: LiveSpeech,
        format: Format,
        make_encoder: Callable[[], Encoder],
        metrics: Metrics,
        *,
        events: bool,
        write_seconds: float,
        input_tokens: int,
        log: dict[str, Any],
    ) -> None:
        self.background = None
        self._speech = speech
        self._format = format
        self._make_encoder = make_encoder
        self._metrics = metrics
        self._events = events
        self._write_seconds = write_seconds
        self._input_tokens = input_tokens
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Speak."""
        progress = Progress(time.monotonic())
        gone = asyncio.ensure_future(_wait_until_gone(receive))
        outcome = "failed"
        self._metrics.speaking += 1
        try:
            outcome = await self._answer(progress, gone, scope, receive, send)
        except ClientGone:
            outcome = "client_gone"
        finally:
            self._metrics.speaking -= 1
            self._speech.cancel()
            gone.cancel()
            self._count(progress, outcome)

    async def _answer(
        self, progress: Progress, gone: asyncio.Future[None], scope: Scope, receive: Receive, send: Send
    ) -> str:
        try:
            first = await _or_gone(anext(self._speech), gone)
        except ClientGone:
            raise
        except Exception as error:
            problem = problem_of(error)
            self._log["error"] = type(error).__name__
            await problem.response()(scope, receive, send)
            return "refused" if problem.status in (429, 503) else "failed"
        progress.made(first)
        content_type = EVENT_STREAM if self._events else self._format.content_type
        headers = [
            (b"content-type", content_type.encode()),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
            (b"x-aloud-seed", str(self._speech.seed).encode()),
        ]
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers}, gone)
        try:
            async for body in self._bodies(first, progress, gone):
                if body:
                    await self._send(send, {"type": "http.response.body", "body": body, "more_body": True}, gone)
        except (ClientGone, Problem):
            raise
        except Exception as error:
            self._log["error"] = type(error).__name__
            if not self._events:
                # Without a last message the server cuts the connection, and the client sees that something is missing.
                return "failed"
            event = {"type": "speech.audio.error", "error": problem_of(error).body["error"]}
            await self._send(send, {"type": "http.response.body", "body": _event(event), "more_body": False}, gone)
            return "failed"
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False}, gone)
        return "finished"

    async def _bodies(self, first: Audio, progress: Progress, gone: asyncio.Future[None]) -> AsyncIterator[bytes]:
        encoder = self._make_encoder()
        chunk: Audio | None = first
        frames = 0
        while chunk is not None:
            frames += 1
            yield self._wrapped(encoder.feed(chunk.samples))
            chunk = await _or_gone(anext(self._speech, None), gone)
            if chunk is not None:
                progress.made(chunk)
        yield self._wrapped(encoder.finish())
        if self._events:
            usage = {"input_tokens": self._input_tokens, "output_tokens": frames}
            usage["total_tokens"] = self._input_tokens + frames
            yield _event({"type": "speech.audio.done", "usage": usage, "finish_reason": self._speech.finish_reason})

    def _wrapped(self, data: bytes) -> bytes:
        if not self._events or not data:
            return data
        return _event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})

    async def _send(self, send: Send, message: Message, gone: asyncio.Future[None]) -> None:
        """Send, as long as the client reads; raises `ClientGone`."""
        try:
            await _or_gone(send(message), gone, self._write_seconds)
        except OSError:
            raise ClientGone from None

    def _count(self, progress: Progress, outcome: str) -> None:
        metrics = self._metrics
        metrics.requests.labels(outcome).inc()
        self._log["outcome"] = outcome
        if progress.first_audio is None:
            return
        waited = progress.first_audio - progress.asked
        metrics.first_audio.observe(waited)
        metrics.audio_seconds.inc(progress.audio_seconds)
        metrics.underrun_seconds.inc(progress.underrun_seconds)
        if outcome == "finished" and progress.audio_seconds > 0:
            metrics.real_time_factor.observe((time.monotonic() - progress.asked) / progress.audio_seconds)
        self._log |= {"first_audio_ms": round(1000 * waited, 1), "audio_s": round(progress.audio_seconds, 2)}


async def _wait_until_gone(receive: Receive) -> None:
    """Return when the client has left; its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _or_gone(awaitable: Any, gone: asyncio.Future[None], seconds: float | None = None) -> Any:
    """The awaitable's result, unless the client leaves first, or takes longer than it may: `ClientGone`."""
    # Not `asyncio.wait_for`, which before Python 3.12 can swallow a cancellation.
    task = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()
