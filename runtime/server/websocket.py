"""`/v1/audio/speech/stream`: text in pieces, audio out as it is made, several contexts on one WebSocket.

A context is a conversation: what it has spoken is what its next words follow on. Messages are JSON objects with a
`type`; those marked * may leave `context_id` out, which is then "default".

| from the client | fields | what it does |
|---|---|---|
| `session.config` | `voice`, `speaker`, `response_format` (pcm; or wav, mp3, opus, aac, flac), `audio` (base64 or binary), `seed`, `temperature`, `top_k`, `depth_temperature`, `depth_top_k`, `max_seconds` of a turn | holds for contexts that begin later; what is left out takes its default |
| `input.text` * | `text` | more of the context's text; it is spoken as soon as a clause is whole |
| `input.flush` * | | the turn's text is complete: all of it is spoken, and what comes next is a new turn |
| `input.done` * | | as flush, and the context ends with it |
| `input.cancel` * | `heard_seconds` since `audio.start`, if it is known how far it was played | stop at once and forget the text not yet spoken (barge-in); the context stays, with what was heard, or without `heard_seconds`, with all that was sent |
| `session.close` | | end at once |

| from the server | fields | when |
|---|---|---|
| `session.configured` | `sample_rate` | a `session.config` holds |
| `audio.start` | `context_id`, `response_format`, `content_type`, `sample_rate` | before a context's first audio, and its first after `audio.done` or `audio.cancelled`: a new stream of bytes |
| `audio.delta` | `context_id`, `audio` in base64; or `bytes`, and the next message is binary and has as many | each 80 ms of speech |
| `audio.flushed` | `context_id`, `finish_reason`, `audio_seconds` of the turn | all audio of a flushed turn was sent; formats with frames may hold back their last until `audio.done` |
| `audio.done` | the same | all audio of the context was sent, and it is forgotten |
| `audio.cancelled` | `context_id`, `audio_seconds` of the turn that were sent | the answer to each `input.cancel`; no audio follows |
| `error` | `error` as over HTTP, `retry_after_seconds`, `context_id` if it is a context's | one for each wrong message, and one for a turn that failed: its further text is dropped until flush, done or cancel, which are answered as always |

A page has no other way to send a key than among the subprotocols: `aloud` and `openai-insecure-api-key.KEY`, where KEY
has no `/`, `=` or other sign that names of subprotocols may not have. In `/v1/realtime` the first is `realtime`.

After 100 messages that were answered by an `error`, in all (`SocketLimits.errors`), the socket is closed with code 1008.

When a socket has as many contexts as it may, a new one takes the place of the one that has been silent for longest.

When the server stops, text that comes is refused with an `error`, and it is as if `input.done` had come for every
context: what was given is spoken to its end. Then the socket is closed with code 1012.
"""  # noqa: E501

from __future__ import annotations

import asyncio
import base64
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, WebSocket

from aloud.audio import Audio
from aloud.live import Engine
from aloud.live_speech import LiveSpeech
from aloud.server.connection import Connection, Door, SocketLimits, accept
from aloud.server.encode import FORMATS, Encoder, Encoders
from aloud.server.metrics import Metrics, Progress
from aloud.server.problems import Problem, problem_of, refuse
from aloud.server.settings import Settings
from aloud.server.voices import Registry
from aloud.server.websocket_messages import (
    MESSAGES,
    InputCancel,
    InputDone,
    InputFlush,
    InputText,
    SessionClose,
    SessionConfig,
)
from aloud.session import Session

PLAYED_TURNS = 16
"""Turns of which a listener may still hear some: what is sent is seconds ahead, and turns are at least a frame."""


def websocket_routes(
    engine: Engine,
    settings: Settings,
    registry: Registry,
    metrics: Metrics,
    encoders: Encoders,
    limits: SocketLimits | None = None,
) -> APIRouter:
    """The route of speech over a WebSocket."""
    router = APIRouter()
    bounds = SocketLimits() if limits is None else limits
    door = Door(bounds, lambda: engine.is_draining)

    @router.websocket("/v1/audio/speech/stream")
    async def speech_socket(websocket: WebSocket) -> None:
        """Speak, until the client leaves."""
        try:
            with door.entered(websocket):
                await accept(websocket, "aloud")
                await SpeechSocket(websocket, engine, settings, registry, metrics, encoders, bounds).run()
        except Problem as problem:
            await refuse(websocket, problem)

    return router


class Turn:
    """One turn's text on its way in."""

    def __init__(self) -> None:
        self.characters = 0
        self.sent_seconds = 0.0
        self.starts_at = 0.0  # in seconds of audio since `audio.start`
        self.speech: LiveSpeech | None = None
        self.ending: Literal["flushed", "done"] | None = None
        self.progress = Progress(time.monotonic())
        self.has_ended = asyncio.Event()
        self._parts: asyncio.Queue[str | None] = asyncio.Queue()

    def add(self, text: str) -> None:
        """More text."""
        self.characters += len(text)
        self._parts.put_nowait(text)

    def end(self, ending: Literal["flushed", "done"]) -> None:
        """There is no more."""
        self.ending = ending
        self.has_ended.set()
        self._parts.put_nowait(None)

    async def parts(self) -> AsyncIterator[str]:
        """The text, as it comes."""
        while (part := await self._parts.get()) is not None:
            yield part


class Context:
    """One conversation of a socket: its turns are spoken one after the other by a task of its own."""

    def __init__(
        self,
        context_id: str,
        session: Session,
        config: SessionConfig,
        encoders: Encoders,
        sample_rate: int,
        lead_seconds: float,
    ) -> None:
        self.id = context_id
        self.session = session
        self.config = config
        self.format = FORMATS[config.response_format]
        self.lead_seconds = lead_seconds
        self.encoder: Encoder | None = None  # of the bytes since `audio.start`
        self.turns: list[Turn] = []  # the first is being spoken, the last takes text until it has an ending
        self.spoken: deque[Turn] = deque(maxlen=PLAYED_TURNS)  # since `audio.start`; the newest may still be played
        self.task: asyncio.Task[None] | None = None
        self._encoders = encoders
        self._sample_rate = sample_rate

    @property
    def is_ending(self) -> bool:
        """Whether no more text is taken."""
        return bool(self.turns) and self.turns[-1].ending == "done"

    def open_turn(self, most: int) -> Turn:
        """The turn that takes text."""
        if not self.turns or self.turns[-1].ending is not None:
            if len(self.turns) >= most:
                raise Problem(429, "Too many turns wait to be spoken.", "too_many_turns", retry_after_seconds=1)
            self.turns.append(Turn())
        return self.turns[-1]

    def finish(self) -> None:
        """Take no more text, as after `input.done`."""
        if not self.is_ending:
            self.open_turn(len(self.turns) + 1).end("done")

    def begins(self, turn: Turn, speech: LiveSpeech) -> None:
        """A turn begins to be spoken."""
        turn.speech = speech
        turn.starts_at = self.spoken[-1].starts_at + self.spoken[-1].sent_seconds if self.spoken else 0.0
        self.spoken.append(turn)

    def interrupt(self, heard_seconds: float) -> None:
        """Forget what was sent and not heard: nobody hears it any more."""
        for turn in self.spoken:
            heard = heard_seconds - turn.starts_at
            if turn.speech is not None and heard < turn.sent_seconds:
                turn.speech.interrupt(max(0.0, heard))

    async def encoded(self, chunk: Audio) -> tuple[dict[str, Any] | bytes, ...]:
        """The events of a chunk."""
        if self.encoder is not None:
            return self._delta(await self._encoders.feed(self.encoder, chunk.samples))
        self.encoder = self._encoders.new(self.format)
        start = {
            "type": "audio.start",
            "context_id": self.id,
            "response_format": self.format.name,
            "content_type": self.format.content_type,
            "sample_rate": self._sample_rate,
        }
        return start, *self._delta(await self._encoders.feed(self.encoder, chunk.samples))

    def ended(self) -> tuple[dict[str, Any] | bytes, ...]:
        """The events of the last bytes."""
        last, self.encoder = self.encoder, None
        return () if last is None else self._delta(last.finish())

    def _delta(self, data: bytes) -> tuple[dict[str, Any] | bytes, ...]:
        if not data:
            return ()
        event: dict[str, Any] = {"type": "audio.delta", "context_id": self.id}
        if self.config.audio == "binary":
            return event | {"bytes": len(data)}, data
        return (event | {"audio": base64.b64encode(data).decode()},)


class SpeechSocket:
    """One client's socket and its contexts."""

    def __init__(
        self,
        websocket: WebSocket,
        engine: Engine,
        settings: Settings,
        registry: Registry,
        metrics: Metrics,
        encoders: Encoders,
        limits: SocketLimits,
    ) -> None:
        self._owner: str = websocket.scope["state"]["owner"]
        self._log: dict[str, Any] = {"turns": 0, "audio_s": 0.0}
        websocket.scope["state"]["log"] = self._log
        self._connection = Connection(websocket, limits, lambda: engine.is_draining)
        self._engine = engine
        self._settings = settings
        self._registry = registry
        self._metrics = metrics
        self._encoders = encoders
        self._limits = limits
        self._config = SessionConfig()
        self._contexts: OrderedDict[str, Context] = OrderedDict()  # the one that was used last is last

    async def run(self) -> None:
        """Until the socket ends; nothing is left of it then."""
        try:
            await self._connection.run(self._take, lambda problem: _error(problem, None), self._finish)
        finally:
            tasks = {context.task for context in self._contexts.values() if context.task is not None}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    async def _finish(self) -> None:
        """Speak all that was given to its end, and take no more."""
        for context in self._contexts.values():
            context.finish()
            self._speak(context)
        while tasks := {
            context.task for context in self._contexts.values() if context.task is not None and not context.task.done()
        }:
            await asyncio.wait(tasks)

    async def _take(self, text: str) -> None:
        """What one message asks for."""
        message = MESSAGES.validate_json(text)
        match message:
            case SessionConfig():
                await asyncio.to_thread(self._registry.voice, self._owner, message.voice)  # so that it is there, or not
                self._config = message
                await self._connection.send(
                    {"type": "session.configured", "sample_rate": self._engine.runtime.sample_rate}
                )
            case InputText():
                await self._text(message)
            case InputFlush():
                self._end_turn(message.context_id, "flushed")
            case InputDone():
                self._end_turn(message.context_id, "done")
            case InputCancel():
                await self._cancel(message.context_id, message.heard_seconds)
            case SessionClose():
                await self._connection.close()

    async def _text(self, message: InputText) -> None:
        self._connection.check_takes_work()
        most = self._settings.limits.text_characters
        context = self._contexts.get(message.context_id)
        waiting = 0
        if context is not None:
            self._check_takes_text(context)
            waiting = context.turns[-1].characters if context.turns and context.turns[-1].ending is None else 0
        if waiting + len(message.text) > most:
            raise Problem(400, f"A turn may have {most:,} characters. Flush it.", "input_too_long", "text")
        if context is None:
            context = await self._begin(message.context_id)
        self._contexts.move_to_end(context.id)
        context.open_turn(self._limits.turns).add(message.text)
        self._speak(context)

    def _end_turn(self, context_id: str, ending: Literal["flushed", "done"]) -> None:
        context = self._contexts.get(context_id)
        if context is None:
            raise Problem(404, "There is no such context: nothing was said in it.", "context_not_found", "context_id")
        if context.is_ending and self._engine.is_draining:
            return  # the server has ended it already
        self._check_takes_text(context)
        self._contexts.move_to_end(context.id)
        context.open_turn(self._limits.turns).end(ending)
        self._speak(context)

    async def _cancel(self, context_id: str, heard_seconds: float | None) -> None:
        """Stop a context. One that is over already is as stopped as can be: who interrupts cannot know."""
        context, seconds = self._contexts.get(context_id), 0.0
        if context is not None:
            turn = context.turns[0] if context.turns else None
            await _stop(context)
            seconds = turn.sent_seconds if turn is not None else 0.0
            if heard_seconds is not None:
                context.interrupt(heard_seconds)
            context.turns, context.encoder = [], None
            context.spoken.clear()
        await self._connection.send(
            {"type": "audio.cancelled", "context_id": context_id, "audio_seconds": round(seconds, 3)}
        )

    async def _begin(self, context_id: str) -> Context:
        config = self._config
        voice, speaker = await asyncio.to_thread(self._registry.voice, self._owner, config.voice)
        if len(self._contexts) >= self._limits.contexts:
            silent = next((context for context in self._contexts.values() if not context.turns), None)
            if silent is None:
                raise Problem(429, "There are too many contexts that speak.", "too_many_contexts", "context_id", 1)
            del self._contexts[silent.id]
        session = self._engine.session(
            voice=voice,
            speaker=speaker if config.speaker is None else config.speaker,
            temperature=config.temperature,
            top_k=config.top_k,
            depth_temperature=config.depth_temperature,
            depth_top_k=config.depth_top_k,
        )
        sample_rate, lead_seconds = self._engine.runtime.sample_rate, self._settings.limits.lead_seconds
        context = Context(context_id, session, config, self._encoders, sample_rate, lead_seconds)
        self._contexts[context_id] = context
        return context

    def _check_takes_text(self, context: Context) -> None:
        if context.is_ending:
            raise Problem(
                409, "The context is done. Wait for audio.done, or take another.", "context_done", "context_id"
            )

    def _speak(self, context: Context) -> None:
        """Let the context's task run, if it does not."""
        if context.task is None or context.task.done():
            context.task = asyncio.ensure_future(self._speak_turns(context))

    async def _speak_turns(self, context: Context) -> None:
        """Speak what there is to say, turn by turn."""
        while context.turns:
            turn = context.turns[0]
            reason = await self._speak_turn(context, turn)
            await turn.has_ended.wait()  # speech may be over before its text: at its longest, or because it failed
            is_done = turn.ending == "done"
            event = {
                "type": f"audio.{turn.ending}",
                "context_id": context.id,
                "finish_reason": reason,
                "audio_seconds": round(turn.sent_seconds, 3),
            }
            await self._connection.send(*(context.ended() if is_done else ()), event)
            del context.turns[0]
            if is_done:
                del self._contexts[context.id]

    async def _speak_turn(self, context: Context, turn: Turn) -> str | None:
        """Speak one turn -> why it ended; one without text ends for no reason."""
        if turn.characters == 0:
            return None
        outcome, config = "client_gone", context.config
        self._metrics.speaking += 1
        try:
            speech = context.session.stream(
                turn.parts(),
                seed=config.seed,
                max_seconds=config.max_seconds,
                lead_seconds=context.lead_seconds,
                is_taken=True,
            )
            context.begins(turn, speech)
            async with speech:
                async for chunk in speech:
                    turn.progress.made(chunk)
                    await self._connection.send(*await context.encoded(chunk))
                    turn.sent_seconds += chunk.duration
            outcome = "finished"
            return speech.finish_reason
        except Exception as error:
            problem = problem_of(error)
            outcome = "refused" if problem.status in (429, 503) else "failed"
            self._log["error"] = type(error).__name__
            await self._connection.send(_error(problem, context.id))
            return "error"
        finally:
            self._metrics.speaking -= 1
            counted = self._metrics.count(turn.progress, outcome)
            self._log["turns"] += 1
            self._log["audio_s"] = round(self._log["audio_s"] + counted.get("audio_s", 0.0), 2)


async def _stop(context: Context) -> None:
    """End the context's task; its slot is free afterwards."""
    task, context.task = context.task, None
    if task is not None:
        task.cancel()
        await asyncio.wait({task})


def _error(problem: Problem, context_id: str | None) -> dict[str, Any]:
    event: dict[str, Any] = {"type": "error", **problem.body}
    if problem.retry_after_seconds is not None:
        event["retry_after_seconds"] = problem.retry_after_seconds
    return event if context_id is None else event | {"context_id": context_id}
