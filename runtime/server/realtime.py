"""`/v1/realtime`: as much of OpenAI's Realtime as a voice needs, so that its clients can make this server speak.

There is no language model behind it: `response.create` speaks the texts of the conversation items that were created
since the last response, whatever their role, or those in its own `input`. The responses of one socket are turns of one
conversation. Audio is 16-bit little-endian mono at the model's rate, which is 24 kHz.

| from the client | what it does |
|---|---|
| `session.update` | sets the voice, before anything was spoken; instructions, tools and turn detection mean nothing |
| `conversation.item.create` | a message with text, to be spoken |
| `response.create` | speak: `response.created`, `response.output_audio.delta` for each 80 ms, `response.done` |
| `response.cancel` | stop at once; the `response.done` that follows says `cancelled` |
| `conversation.item.truncate` | of one of the last 16 responses, no more than `audio_end_ms` was heard: see below |

What was not heard is no context for what follows, but for the text of a sentence that was heard in part. Of a response
behind one that was cut nothing was heard, and what is being spoken then stops, as with `response.cancel`.

Of what else Realtime has, `input_audio_buffer.*`, `output_audio_buffer.clear` and `conversation.item.delete` and
`.retrieve` are answered by one `error` at the first of each type, and ignored from then on: a client may send its
microphone. Everything else is answered by one `error` each. After 100 messages that were wrong or refused, in all
(`SocketLimits.errors`), the socket is closed with code 1008.

When the server stops, the response that is being spoken is spoken to its end, everything new to say is answered by an
`error`, and the socket is closed with code 1012.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections import deque
from typing import Any

from fastapi import APIRouter, WebSocket
from pydantic import TypeAdapter

from aloud.live import Engine
from aloud.live_speech import LiveSpeech
from aloud.server.connection import Connection, Door, SocketLimits, accept
from aloud.server.encode import FORMATS, encoder
from aloud.server.metrics import Metrics, Progress
from aloud.server.problems import Problem, problem_of, refuse
from aloud.server.realtime_events import (
    EVENT,
    MAX_ITEMS,
    UNSERVED,
    EventHead,
    Item,
    ResponseFields,
    SessionAudio,
    SessionFields,
    Truncation,
)
from aloud.server.settings import Settings
from aloud.server.voices import Registry
from aloud.session import Session

PLAYED_RESPONSES = 16
"""Of a socket, the newest: audio is sent ahead of being played."""


def realtime_routes(
    engine: Engine, settings: Settings, registry: Registry, metrics: Metrics, limits: SocketLimits | None = None
) -> APIRouter:
    """The route of Realtime."""
    router = APIRouter()
    bounds = SocketLimits() if limits is None else limits
    door = Door(bounds, lambda: engine.is_draining)

    @router.websocket("/v1/realtime")
    async def realtime(websocket: WebSocket) -> None:
        """Speak, until the client leaves."""
        try:
            with door.entered(websocket):
                await accept(websocket, "realtime")
                await RealtimeSocket(websocket, engine, settings, registry, metrics, bounds).run()
        except Problem as problem:
            await refuse(websocket, problem)

    return router


class RealtimeSocket:
    """One client's socket and its conversation."""

    def __init__(
        self,
        websocket: WebSocket,
        engine: Engine,
        settings: Settings,
        registry: Registry,
        metrics: Metrics,
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
        self._id = _id("sess")
        self._voice = "alloy"
        self._session: Session | None = None  # from the first response on
        self._items: list[str] = []  # texts that wait to be spoken
        self._last_item: str | None = None  # id
        self._asked_by: str | None = None  # the event that is being answered
        self._ignored: set[str] = set()  # types of unserved events of which the client has been told
        self._response: Response | None = None
        self._spoken: deque[Response] = deque(maxlen=PLAYED_RESPONSES)  # that one, and what may still be played

    async def run(self) -> None:
        """Until the socket ends; nothing is left of it then."""
        await self._send("session.created", session=self._described())
        try:
            await self._connection.run(self._take, self._error, self._finish)
        finally:
            if self._response is not None:
                await self._response.stop()

    async def _finish(self) -> None:
        """Speak the response to its end."""
        if self._response is not None:
            await self._response.spoken()

    async def _take(self, text: str) -> None:
        """What one message asks for."""
        self._asked_by = None
        head = TypeAdapter(EventHead).validate_json(text)
        self._asked_by = head.event_id
        if head.type in UNSERVED:
            await self._ignore(head.type)
            return
        if head.type == "conversation.item.truncate":
            await self._truncate(TypeAdapter(Truncation).validate_json(text))
            return
        if head.type not in ("session.update", "conversation.item.create", "response.create", "response.cancel"):
            raise Problem(400, "This server only speaks: it does not know this event.", "unknown_event", "type")
        event = EVENT.validate_json(text)
        if event.type in ("conversation.item.create", "response.create"):
            self._connection.check_takes_work()
        match event.type:
            case "session.update":
                await self._update(event.session or SessionFields())
            case "conversation.item.create":
                await self._create_item(event.item)
            case "response.create":
                await self._respond(event.response or ResponseFields())
            case "response.cancel":
                if self._response is None or event.response_id not in (None, self._response.id):
                    raise Problem(400, "Nothing is being spoken.", "response_cancel_not_active")
                await self._response.stop()

    async def _ignore(self, event_type: str) -> None:
        """Say once that nothing is done with events of a type; it is no wrong message, of which there is a bound."""
        if event_type in self._ignored:
            return
        self._ignored.add(event_type)
        message = f"This server only speaks: it ignores {event_type}, and says so only once."
        await self._connection.send(self._error(Problem(400, message, "event_ignored", "type")))

    async def _update(self, fields: SessionFields) -> None:
        await self._set_voice(fields.audio)
        await self._send("session.updated", session=self._described())

    async def _set_voice(self, audio: SessionAudio | None) -> None:
        output = None if audio is None else audio.output
        if output is None:
            return
        rate = self._engine.runtime.sample_rate
        if output.format is not None and output.format.rate not in (None, rate):
            raise Problem(400, f"The audio has {rate:,} samples a second.", "rate_unsupported", "format.rate")
        if output.voice is None:
            return
        name = output.voice if isinstance(output.voice, str) else output.voice.id
        if self._session is not None and name != self._voice:
            raise Problem(400, "A voice cannot change once it has spoken.", "cannot_update_voice", "voice")
        await asyncio.to_thread(self._registry.voice, self._owner, name)  # so that it is there, or not
        self._voice = name

    async def _create_item(self, item: Item | None) -> None:
        if item is None:
            raise Problem(400, "The item is missing.", "item_missing", "item")
        if len(self._items) >= MAX_ITEMS:
            raise Problem(400, f"{MAX_ITEMS} items wait to be spoken. Create a response.", "too_many_items", "item")
        self._check_length([*self._items, item.text])
        self._items.append(item.text)
        before, self._last_item = self._last_item, item.id or _id("item")
        content = [{"type": part.type, "text": part.text} for part in item.content]
        described = _message(self._last_item, item.role, "completed", content)
        for name in ("conversation.item.added", "conversation.item.done"):
            await self._send(name, previous_item_id=before, item=described)

    async def _respond(self, fields: ResponseFields) -> None:
        if self._response is not None:
            raise Problem(400, "A response is being spoken.", "conversation_already_has_active_response")
        texts = self._items if fields.input is None else [item.text for item in fields.input]
        if not texts:
            raise Problem(400, "There is nothing to say: create an item first.", "nothing_to_say", "response")
        self._check_length(texts)
        await self._set_voice(fields.audio)
        if self._session is None:
            voice, speaker = await asyncio.to_thread(self._registry.voice, self._owner, self._voice)
            self._session = self._engine.session(voice=voice, speaker=speaker)
        if fields.input is None:
            self._items = []
        text = " ".join(texts)
        lead = self._settings.limits.lead_seconds
        speech = self._session.stream(text, lead_seconds=lead, is_taken=True)
        self._response = Response(self, speech, text)
        self._spoken.append(self._response)

    async def _truncate(self, truncation: Truncation) -> None:
        responses = list(self._spoken)
        while responses and responses[0].item_id != truncation.item_id:
            del responses[0]
        if not responses:
            message = f"Only the last {PLAYED_RESPONSES} things that were said can be cut to what was heard of them."
            raise Problem(400, message, "item_not_truncatable", "item_id")
        cut, *later = responses
        if cut is self._response or cut.lasts_longer_than(truncation.audio_end_ms):
            if self._response is not None:
                await self._response.stop()
            cut.keep_heard(truncation.audio_end_ms / 1000)
            for response in later:
                response.keep_heard(0.0)
        await self._send("conversation.item.truncated", **truncation.model_dump())

    def _check_length(self, texts: list[str]) -> None:
        most = self._settings.limits.text_characters
        if sum(map(len, texts)) + len(texts) > most:
            raise Problem(400, f"A response may have {most:,} characters.", "input_too_long", "text")

    # --- for its response ---------------------------------------------------------------------------------------------

    async def _send(self, event_type: str, **fields: Any) -> None:
        await self._connection.send({"type": event_type, "event_id": _id("event"), **fields})

    async def send_of_response(self, event_type: str, fields: dict[str, Any]) -> None:
        """Send an event of the response."""
        await self._send(event_type, **fields)

    def audio_format(self) -> dict[str, Any]:
        """How audio is described."""
        return {
            "output": {
                "format": {"type": "audio/pcm", "rate": self._engine.runtime.sample_rate},
                "voice": self._voice,
            }
        }

    def tokens(self, text: str) -> int:
        """How many a text has."""
        return len(self._engine.runtime.tokenizer.encode(text))

    @property
    def frame_rate(self) -> float:
        """Frames a second, in Hz."""
        return self._engine.runtime.frame_rate

    def begun(self) -> None:
        """The response is being spoken; `count` ends that."""
        self._metrics.speaking += 1

    def over(self, item_id: str) -> None:
        """The response has been spoken."""
        self._response, self._last_item = None, item_id

    def count(self, progress: Progress, outcome: str, error: BaseException | None) -> None:
        """For the metrics and the log."""
        self._metrics.speaking -= 1
        counted = self._metrics.count(progress, outcome)
        self._log["turns"] += 1
        self._log["audio_s"] = round(self._log["audio_s"] + counted.get("audio_s", 0.0), 2)
        if error is not None:
            self._log["error"] = type(error).__name__

    # ------------------------------------------------------------------------------------------------------------------

    def _described(self) -> dict[str, Any]:
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": self._id,
            "model": self._settings.model,
            "output_modalities": ["audio"],
            "audio": self.audio_format(),
        }

    def _error(self, problem: Problem) -> dict[str, Any]:
        described: Any = problem.body["error"]
        return {"type": "error", "event_id": _id("event"), "error": described | {"event_id": self._asked_by}}


class Response:
    """One response while it is spoken."""

    def __init__(self, socket: RealtimeSocket, speech: LiveSpeech, text: str) -> None:
        self.id = _id("resp")
        self.item_id = _id("item")
        self._socket = socket
        self._speech = speech
        self._text = text
        self._frames = 0
        self._is_stopped = False
        self._speaking: asyncio.Future[None] | None = None
        self._task = asyncio.ensure_future(self._run())

    async def stop(self) -> None:
        """Stop speaking, and say so; as the socket ends, nobody hears it.

        Only speaking is cancelled: of the events around it, each is sent, also to a client that is behind with reading.
        """
        self._is_stopped = True
        self._speech.cancel()
        if self._speaking is not None:
            self._speaking.cancel()
        await asyncio.wait({self._task})

    def keep_heard(self, seconds: float) -> None:
        """Forget what was not heard; it is no longer being spoken."""
        self._speech.interrupt(seconds)

    def lasts_longer_than(self, milliseconds: int) -> bool:
        """Whether more was sent of it."""
        return self._frames * 1000 > milliseconds * self._socket.frame_rate

    async def spoken(self) -> None:
        """Return when all of it was said."""
        await asyncio.wait({self._task})

    async def _run(self) -> None:
        status = "failed"
        details: dict[str, Any] | None = None
        progress, outcome, failure = Progress(time.monotonic()), "client_gone", None
        where = {"response_id": self.id, "item_id": self.item_id, "output_index": 0, "content_index": 0}
        self._socket.begun()
        try:
            await self._begin(where)
            self._speaking = asyncio.ensure_future(self._speak(where, progress))
            if self._is_stopped:
                self._speaking.cancel()
            await asyncio.wait({self._speaking})
            self._speaking.result()
            status, outcome = "completed", "finished"
            if self._speech.finish_reason == "length":
                status, details = "incomplete", {"type": "incomplete", "reason": "max_output_tokens"}
        except asyncio.CancelledError:
            status, details = "cancelled", {"type": "cancelled", "reason": "client_cancelled"}
        except Exception as error:
            failure, problem = error, problem_of(error)
            outcome = "refused" if problem.status in (429, 503) else "failed"
            kind = "invalid_request_error" if problem.status < 500 else "server_error"
            details = {"type": "failed", "error": {"type": kind, "code": problem.code, "message": problem.message}}
        finally:
            self._socket.count(progress, outcome, failure)
        await self._end(where, status, details)

    async def _speak(self, where: dict[str, Any], progress: Progress) -> None:
        encoded = encoder(FORMATS["pcm"], 0)
        async with self._speech:
            async for chunk in self._speech:
                progress.made(chunk)
                delta = base64.b64encode(encoded.feed(chunk.samples)).decode()
                await self._socket.send_of_response("response.output_audio.delta", where | {"delta": delta})
                self._frames += 1

    async def _begin(self, where: dict[str, Any]) -> None:
        send, item = self._socket.send_of_response, _message(self.item_id, "assistant", "in_progress", [])
        await send("response.created", {"response": self._described("in_progress", None, [])})
        await send("response.output_item.added", {"response_id": self.id, "output_index": 0, "item": item})
        await send("response.content_part.added", where | {"part": {"type": "audio", "transcript": ""}})
        await send("response.output_audio_transcript.delta", where | {"delta": self._text})

    async def _end(self, where: dict[str, Any], status: str, details: dict[str, Any] | None) -> None:
        send = self._socket.send_of_response
        content = [{"type": "output_audio", "transcript": self._text}]
        item = _message(self.item_id, "assistant", "completed" if status == "completed" else "incomplete", content)
        await send("response.output_audio.done", where)
        await send("response.output_audio_transcript.done", where | {"transcript": self._text})
        await send("response.content_part.done", where | {"part": {"type": "audio", "transcript": self._text}})
        await send("response.output_item.done", {"response_id": self.id, "output_index": 0, "item": item})
        await send("response.done", {"response": self._described(status, details, [item])})
        self._socket.over(self.item_id)

    def _described(self, status: str, details: dict[str, Any] | None, output: list[Any]) -> dict[str, Any]:
        described: dict[str, Any] = {
            "object": "realtime.response",
            "id": self.id,
            "status": status,
            "status_details": details,
            "output": output,
            "output_modalities": ["audio"],
            "audio": self._socket.audio_format(),
        }
        if status != "in_progress":
            read = self._socket.tokens(self._text)
            described["usage"] = {
                "input_tokens": read,
                "output_tokens": self._frames,
                "total_tokens": read + self._frames,
            }
        return described


def _message(item_id: str, role: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "object": "realtime.item",
        "id": item_id,
        "type": "message",
        "status": status,
        "role": role,
        "content": content,
    }


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(10)}"
