"""`create_app`: the routes over an engine; other servers can mount what it returns."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from importlib.resources import files
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from aloud import __version__
from aloud.errors import AloudError
from aloud.live import Engine
from aloud.prepare import MAX_SPEAKER
from aloud.request import MAX_TEMPERATURE
from aloud.server.answer import SpeechAnswer
from aloud.server.encode import FORMATS, encoder
from aloud.server.gate import Gate
from aloud.server.metrics import Metrics
from aloud.server.problems import Problem, problem_of
from aloud.server.realtime import realtime_routes
from aloud.server.sessions import Sessions
from aloud.server.settings import Settings
from aloud.server.uploads import decode_audio
from aloud.server.voices import Registry
from aloud.server.websocket import websocket_routes

MAX_CONSENT_CHARACTERS = 2_000
MAX_PARTS = 8


class VoiceId(BaseModel):
    """A voice, as OpenAI's clients may also name it."""

    model_config = ConfigDict(extra="forbid")
    id: str


class SpeechBody(BaseModel):
    """What POST /v1/audio/speech takes: OpenAI's fields, and the model's own."""

    model_config = ConfigDict(extra="forbid")
    input: str = Field(min_length=1)
    model: str = ""
    voice: str | VoiceId = "alloy"
    instructions: str | None = Field(None, description="Ignored: the model takes no instructions.")
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = "mp3"
    speed: float = Field(1.0, description="Only 1.0.")
    stream_format: Literal["audio", "sse"] = "audio"
    seed: int | None = Field(None, ge=0, lt=2**64)
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    depth_temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE)
    depth_top_k: int | None = Field(None, ge=0, lt=2**31)
    speaker: int | None = Field(None, ge=0, le=MAX_SPEAKER)
    max_seconds: float | None = Field(None, gt=0, le=3600)
    session_id: str | None = None


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The server's application; the engine stays the caller's to close."""
    registry = Registry(engine.runtime, settings)
    sessions = Sessions(engine, registry, settings.limits)
    metrics = Metrics(engine)

    app = FastAPI(title="Aloud", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(Problem, _answer_problem)
    app.add_exception_handler(AloudError, _answer_problem)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.state.metrics = metrics
    app.add_middleware(Gate, settings=settings)
    app.include_router(_speech_routes(engine, settings, registry, sessions, metrics))
    app.include_router(_voice_routes(engine, settings, registry))
    app.include_router(_session_routes(engine, settings, sessions))
    app.include_router(_operator_routes(engine, settings, metrics))
    app.include_router(websocket_routes(engine, settings, registry, metrics))
    app.include_router(realtime_routes(engine, settings, registry, metrics))
    return app


def _speech_routes(
    engine: Engine, settings: Settings, registry: Registry, sessions: Sessions, metrics: Metrics
) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/audio/speech")
    async def speech(body: SpeechBody, request: Request) -> Response:
        """Say a text, streaming."""
        if len(body.input) > settings.limits.text_characters:
            raise Problem(
                400, f"input may have {settings.limits.text_characters:,} characters.", "input_too_long", "input"
            )
        if body.speed != 1.0:
            raise Problem(400, "speed must be 1.0: the model has one speed.", "speed_unsupported", "speed")
        owner, name = request.state.owner, body.voice if isinstance(body.voice, str) else body.voice.id
        given: dict[str, Any] = {"seed": body.seed, "max_seconds": body.max_seconds}
        sampling = {name: getattr(body, name) for name in ("temperature", "top_k", "depth_temperature", "depth_top_k")}
        lead = settings.limits.lead_seconds
        if body.session_id is None:
            voice, speaker = await asyncio.to_thread(registry.voice, owner, name)
            made = engine.stream(
                body.input,
                voice=voice,
                speaker=speaker if body.speaker is None else body.speaker,
                lead_seconds=lead,
                **given,
                **sampling,
            )
        else:
            if any(value is not None for value in (*sampling.values(), body.speaker)):
                raise Problem(400, "A session has its own sampling and speaker; leave them out.", "not_in_a_session")
            kept = await asyncio.to_thread(sessions.open, owner, body.session_id, name)
            made = kept.session.stream(body.input, lead_seconds=lead, **given)
        format = FORMATS[body.response_format]
        request.state.log = log = {"format": format.name}
        return SpeechAnswer(
            made,
            format,
            lambda: encoder(format, engine.runtime.sample_rate),
            metrics,
            events=body.stream_format == "sse",
            write_seconds=settings.limits.write_seconds,
            input_tokens=len(engine.runtime.tokenizer.encode(body.input)),
            log=log,
        )

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [{"id": settings.model, "object": "model", "owned_by": "aloud"}]}

    return router


def _voice_routes(engine: Engine, settings: Settings, registry: Registry) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/audio/voices")
    async def voices(request: Request) -> dict[str, Any]:
        """The voices of this key, the public ones, and the names that stand for others."""
        found = await asyncio.to_thread(registry.names, request.state.owner)
        return {"voices": [asdict(record) for record in found], "aliases": settings.aliases}

    @router.post("/v1/audio/voices", status_code=201)
    async def add_voice(request: Request) -> dict[str, Any]:
        """Keep a voice: multipart fields name, audio_sample, consent, and text, what is said in the sample."""
        async with request.form(max_files=1, max_fields=MAX_PARTS, max_part_size=100_000) as form:
            name, consent = _text(form, "name", 64), _text(form, "consent", MAX_CONSENT_CHARACTERS)
            text = _text(form, "ref_text" if "ref_text" in form else "text", settings.limits.text_characters, "")
            data = await _file(form, "audio_sample")
        if not consent.strip():
            raise Problem(400, "consent must say how the speaker agreed to be imitated.", "consent_missing", "consent")
        samples = await asyncio.to_thread(
            decode_audio, data, engine.runtime.sample_rate, settings.limits.sample_seconds
        )
        record = await asyncio.to_thread(registry.add, request.state.owner, name, samples, text, consent)
        return asdict(record)

    @router.delete("/v1/audio/voices/{name}", status_code=204)
    async def delete_voice(name: str, request: Request) -> Response:
        """Forget a voice."""
        await asyncio.to_thread(registry.delete, request.state.owner, name)
        return Response(status_code=204)

    return router


def _session_routes(engine: Engine, settings: Settings, sessions: Sessions) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/sessions/{session_id}")
    async def export(session_id: str, request: Request) -> dict[str, Any]:
        """All that is needed to rebuild a session elsewhere."""
        return sessions.exported(request.state.owner, session_id)

    @router.put("/v1/sessions/{session_id}")
    async def restore(session_id: str, request: Request) -> dict[str, Any]:
        """Rebuild a session."""
        try:
            content = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise Problem(400, "The body is not JSON.", "invalid_json") from error
        if not isinstance(content, dict):
            raise Problem(400, "A session is what GET /v1/sessions/ID gives.", "invalid_session")
        kept = await asyncio.to_thread(sessions.restore, request.state.owner, session_id, content)
        return asdict(kept.session.stats)

    @router.delete("/v1/sessions/{session_id}", status_code=204)
    async def delete(session_id: str, request: Request) -> Response:
        """Forget a session."""
        sessions.delete(request.state.owner, session_id)
        return Response(status_code=204)

    @router.post("/v1/sessions/{session_id}/turns")
    async def hear(session_id: str, request: Request) -> dict[str, Any]:
        """A turn of somebody else: multipart fields text, speaker, and audio, if there is any."""
        async with request.form(max_files=1, max_fields=MAX_PARTS, max_part_size=100_000) as form:
            text = _text(form, "text", settings.limits.text_characters)
            speaker = _text(form, "speaker", 3, "1")
            data = await _file(form, "audio") if "audio" in form else None
        if not speaker.isdecimal():
            raise Problem(400, "speaker must be a whole number.", "invalid_speaker", "speaker")
        kept = sessions.find(request.state.owner, session_id)
        audio = None
        if data is not None:
            audio = await asyncio.to_thread(
                decode_audio, data, engine.runtime.sample_rate, settings.limits.sample_seconds
            )
        await kept.session.hear(text, audio, int(speaker))
        return asdict(kept.session.stats)

    return router


def _operator_routes(engine: Engine, settings: Settings, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health/live")
    async def live() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "alive"}

    @router.get("/health/ready")
    async def ready() -> Response:
        """Whether new work is taken."""
        try:
            engine.check_health()
        except AloudError as error:
            return problem_of(error).response()
        if engine.stats().is_draining:
            return Problem(503, "The server is stopping.", "draining", retry_after_seconds=5).response()
        return JSONResponse({"status": "ready", "model": settings.model})

    @router.get("/metrics")
    async def prometheus() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """A page to hear it on."""
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
        content = files("aloud.server").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(content, headers={"content-security-policy": policy})

    return router


def _text(form: Any, name: str, most: int, default: str | None = None) -> str:
    value = form.get(name, default)
    if not isinstance(value, str):
        raise Problem(400, f"The field {name} is missing.", "field_missing", name)
    if len(value) > most:
        raise Problem(400, f"{name} may have {most:,} characters.", "field_too_long", name)
    return value


async def _file(form: Any, name: str) -> bytes:
    value = form.get(name)
    if value is None or isinstance(value, str):
        raise Problem(400, f"The file {name} is missing.", "field_missing", name)
    data: bytes = await value.read()
    return data


async def _answer_problem(_: Request, error: Exception) -> Response:
    return problem_of(error).response()


async def _answer_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    return Problem(400, f"{where}: {first['msg']}.", "invalid_request", where).response()


async def _answer_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, Problem):  # of the gate, met while the body was read
        return error.__cause__.response()
    return Problem(error.status_code, f"{error.detail}.", "http_error").response()
