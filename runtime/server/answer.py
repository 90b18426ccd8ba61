"""The answer that streams: audio or events as they are made, until they end or the client leaves or is too slow."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from aloud.audio import Audio
from aloud.errors import NothingSpoken
from aloud.live_speech import LiveSpeech
from aloud.server.encode import Encoders, Format
from aloud.server.metrics import Metrics, Progress
from aloud.server.problems import problem_of

EVENT_STREAM = "text/event-stream"
MAX_TOGETHER = 12
"""Chunks that are sent as one, about a second: nobody else waits long for them to be encoded."""


class ClientGone(Exception):
    """Nobody listens any more."""


class SpeechAnswer(Response):
    """The response of one speech.

    Its status waits for the first audio, so that whatever fails before is an ordinary error. What fails later is one
    error event, or a connection that is cut: never silence passed off as speech.
    """

    def __init__(
        self,
        speech: LiveSpeech,
        format: Format,
        encoders: Encoders,
        metrics: Metrics,
        *,
        events: bool,
        is_played: bool,
        write_seconds: float,
        input_tokens: int,
        log: dict[str, Any],
        when_over: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Of a speech; `when_over` is awaited once it is over, before the client is told.

        is_played: somebody listens while it is made, so how long they wait is counted.
        """
        self.background = None
        self._speech = speech
        self._format = format
        self._encoders = encoders
        self._metrics = metrics
        self._events = events
        self._write_seconds = write_seconds
        self._input_tokens = input_tokens
        self._log = log
        self._when_over = when_over
        self._ending: asyncio.Future[None] | None = None  # `when_over`
        self._failed: Exception | None = None  # what is to be raised behind the chunks that were there before it
        self._progress = Progress(time.monotonic(), is_played)
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Speak."""

        async def watched(message: Message) -> None:
            self._sending_since = time.monotonic()
            try:
                await send(message)
            except OSError:
                raise ClientGone from None
            finally:
                self._sending_since = None

        # One task for all of the answer, and not one for each chunk to be ended when the client leaves.
        answering = asyncio.ensure_future(self._answer(scope, receive, watched))
        gone = asyncio.ensure_future(_wait_until_gone(receive))
        outcome = "failed"
        self._metrics.speaking += 1
        try:
            outcome = await self._outcome(answering, gone)
        except ClientGone:
            outcome = "client_gone"
        finally:
            self._metrics.speaking -= 1
            self._speech.cancel()
            for task in (answering, gone):
                task.cancel()
            await asyncio.gather(answering, return_exceptions=True)  # what it raised was told, or nobody is there
            self._log |= {"outcome": outcome} | self._metrics.count(self._progress, outcome)
            is_timed = outcome == "finished" and self._progress.is_played  # a socket's depends on its text's time
            if is_timed and self._progress.audio_seconds > 0:
                taken = time.monotonic() - self._progress.asked
                self._metrics.real_time_factor.observe(taken / self._progress.audio_seconds)
            await self._over()

    async def _outcome(self, answering: asyncio.Future[str], gone: asyncio.Future[None]) -> str:
        """How the answer ends; raises `ClientGone` when nobody reads it any more."""
        while True:
            since = self._sending_since
            left = self._write_seconds if since is None else since + self._write_seconds - time.monotonic()
            if left > 0:
                waited: set[asyncio.Future[Any]] = {answering, gone}
                await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result()
            if gone.done() or left <= 0:
                raise ClientGone

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> str:
        try:
            first = await self._chunks()
            if not first:
                raise NothingSpoken("Nothing was spoken. Ask again.")
        except Exception as error:
            problem = problem_of(error)
            self._log["error"] = type(error).__name__
            await problem.response()(scope, receive, send)
            return "refused" if problem.status in (429, 503) else "failed"
        content_type = EVENT_STREAM if self._events else self._format.content_type
        headers = [
            (b"content-type", content_type.encode()),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
            (b"x-aloud-seed", str(self._speech.seed).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for body in self._bodies(first):
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        except ClientGone:
            raise
        except Exception as error:
            self._log["error"] = type(error).__name__
            problem = problem_of(error)
            if not self._events:
                # Without a last message the server cuts the connection, and the client sees that something is missing.
                return "failed"
            event = {"type": "speech.audio.error", "error": problem.body["error"]}
            await send({"type": "http.response.body", "body": _event(event), "more_body": False})
            return "failed"
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return "finished"

    async def _bodies(self, chunks: list[Audio]) -> AsyncIterator[bytes]:
        encoder = self._encoders.new(self._format)
        frames = 0
        while chunks:
            frames += len(chunks)
            samples = chunks[0].samples if len(chunks) == 1 else np.concatenate([chunk.samples for chunk in chunks])
            yield self._wrapped(await self._encoders.feed(encoder, samples))
            chunks = await self._chunks()
        await self._over()
        yield self._wrapped(encoder.finish())
        if self._events:
            usage = {"input_tokens": self._input_tokens, "output_tokens": frames}
            usage["total_tokens"] = self._input_tokens + frames
            yield _event({"type": "speech.audio.done", "usage": usage, "finish_reason": self._speech.finish_reason})

    async def _chunks(self) -> list[Audio]:
        """The next chunk, and those that are there already, as they are where many are answered; none at the end."""
        if self._failed is not None:
            raise self._failed
        chunks: list[Audio] = []
        chunk = await anext(self._speech, None)
        while chunk is not None:
            self._progress.made(chunk)
            chunks.append(chunk)
            try:
                chunk = self._speech.ready() if len(chunks) < MAX_TOGETHER else None
            except Exception as error:
                self._failed, chunk = error, None
        return chunks

    async def _over(self) -> None:
        if self._when_over is not None:
            if self._ending is None:
                self._ending = asyncio.ensure_future(self._when_over())
            await asyncio.shield(self._ending)  # also where the client leaves meanwhile

    def _wrapped(self, data: bytes) -> bytes:
        if not self._events or not data:
            return data
        return _event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})


async def _wait_until_gone(receive: Receive) -> None:
    """Return when the client has left; its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()
