"""`create_app`: the routes over an engine; other servers can mount what it returns."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import compile_path

from aloud import __version__
from aloud.errors import AloudError
from aloud.live import Engine
from aloud.server import openapi
from aloud.server.answer import SpeechAnswer
from aloud.server.encode import FORMATS, Encoders
from aloud.server.gate import Gate, route_path
from aloud.server.metrics import Metrics
from aloud.server.origins import Origins
from aloud.server.problems import Problem, problem_of
from aloud.server.realtime import realtime_routes
from aloud.server.sessions import SESSION_ID, Sessions
from aloud.server.settings import Settings
from aloud.server.speech import SpeechBody, begin
from aloud.server.uploads import decode_audio
from aloud.server.voices import NAME, ListedVoice, Registry
from aloud.server.websocket import websocket_routes
from aloud.session import SessionStats

MAX_CONSENT_CHARACTERS = 2_000
MAX_PARTS = 8
MAX_SHOWN = 100  # characters of what a client sent, in a sentence about it
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
# Described, and checked where they are used.
VoiceName = Annotated[str, Path(json_schema_extra={"pattern": f"^{NAME.pattern}$"})]
SessionId = Annotated[str, Path(json_schema_extra={"pattern": f"^{SESSION_ID.pattern}$"})]


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The server's application; the engine stays the caller's to close."""
    settings = replace(settings, model=settings.model or engine.runtime.name)
    registry = Registry(engine.runtime, settings)
    registry.warn()
    sessions = Sessions(engine, registry, settings)
    metrics = Metrics(engine)
    encoders = Encoders(engine.runtime.sample_rate)

    app = FastAPI(title="Aloud", version=__version__, description=openapi.DESCRIPTION, docs_url=None, redoc_url=None)
    app.add_exception_handler(Problem, _answer_problem)
    app.add_exception_handler(AloudError, _answer_problem)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.state.metrics = metrics
    app.add_middleware(Gate, settings=settings)
    app.add_middleware(Origins, origins=settings.origins)
    app.include_router(_speech_routes(engine, settings, registry, sessions, metrics, encoders))
    app.include_router(_voice_routes(engine, settings, registry))
    app.include_router(_session_routes(engine, settings, sessions))
    app.include_router(_operator_routes(engine, settings, metrics))
    app.include_router(websocket_routes(engine, settings, registry, metrics, encoders))
    app.include_router(realtime_routes(engine, settings, registry, metrics))
    app.openapi_schema = openapi.completed(app.openapi(), settings)
    return app


def _speech_routes(
    engine: Engine, settings: Settings, registry: Registry, sessions: Sessions, metrics: Metrics, encoders: Encoders
) -> APIRouter:
    router = APIRouter(generate_unique_id_function=openapi.operation_id)
    refusals = openapi.refusals(400, 404, 408, 409, 422, 429, 503)
    described = {"id": settings.model, "object": "model", "created": int(time.time()), "owned_by": "aloud"}

    @router.post("/v1/audio/speech", response_class=Response, responses=openapi.SPEECH | refusals)
    async def speech(body: SpeechBody, request: Request) -> Response:
        """Say a text, streaming."""
        made, when_over = await begin(engine, registry, sessions, settings.limits, request.state.owner, body)
        format = FORMATS[body.response_format]
        request.state.log = log = {"format": format.name}
        return SpeechAnswer(
            made,
            format,
            encoders,
            metrics,
            events=body.stream_format == "sse",
            is_played=body.pace == "realtime",
            write_seconds=settings.limits.write_seconds,
            input_tokens=len(engine.runtime.tokenizer.encode(body.input)),
            log=log,
            when_over=when_over,
        )

    @router.get("/v1/models", responses=openapi.answer(openapi.ModelList))
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [described]}

    # Names on the hub have a slash.
    @router.get("/v1/models/{model_id:path}", responses=openapi.answer(openapi.ModelRecord) | openapi.refusals(404))
    async def model(model_id: str) -> dict[str, Any]:
        """The model, by its name."""
        if model_id != settings.model:
            message = "There is no model of that name. GET /v1/models says which there is."
            raise Problem(404, message, "model_not_found", "model")
        return described

    return router


def _voice_routes(engine: Engine, settings: Settings, registry: Registry) -> APIRouter:
    router = APIRouter(generate_unique_id_function=openapi.operation_id)

    text = _string(settings.limits.text_characters)
    fields = {
        "name": {"type": "string", "pattern": f"^{NAME.pattern}$"},
        "consent": _string(MAX_CONSENT_CHARACTERS)
        | {"pattern": r"\S", "description": "How the speaker agreed to be imitated."},
        "text": text | {"description": "What is said in the sample."},
        "ref_text": text | {"description": "Another name of text."},
        "audio_sample": openapi.BINARY | {"description": "An audio file."},
    }

    @router.get("/v1/audio/voices", responses=openapi.answer(openapi.VoiceList))
    async def voices(request: Request) -> dict[str, Any]:
        """The voices of this key, the public ones, and the names that stand for others."""
        found = await asyncio.to_thread(registry.listed, request.state.owner)
        return {"voices": [asdict(voice) for voice in found], "aliases": settings.aliases}

    @router.post(
        "/v1/audio/voices",
        status_code=201,
        responses=openapi.answer(ListedVoice, 201, {"delete_voice": "name=$response.body#/name"})
        | openapi.refusals(400, 408, 409),
        openapi_extra=openapi.form_body(
            ("name", "consent", "audio_sample"),
            fields,
        ),
    )
    async def add_voice(request: Request) -> dict[str, Any]:
        """Keep a voice: multipart fields name, audio_sample, consent, and text, what is said in the sample."""
        async with _form(request, fields) as form:
            name, consent = _text(form, "name", 64), _text(form, "consent", MAX_CONSENT_CHARACTERS)
            texts = {name: _text(form, name, settings.limits.text_characters, "") for name in ("text", "ref_text")}
            text = texts["ref_text" if "ref_text" in form else "text"]
            data = await _file(form, "audio_sample")
        if not consent.strip():
            raise Problem(400, "consent must say how the speaker agreed to be imitated.", "consent_missing", "consent")
        samples = await asyncio.to_thread(
            decode_audio, data, engine.runtime.sample_rate, settings.limits.sample_seconds
        )
        return asdict(await asyncio.to_thread(registry.add, request.state.owner, name, samples, text, consent))

    @router.delete(
        "/v1/audio/voices/{name}", responses=openapi.answer(openapi.VoiceDeleted) | openapi.refusals(400, 404)
    )
    async def delete_voice(name: VoiceName, request: Request) -> dict[str, Any]:
        """Forget a voice."""
        await asyncio.to_thread(registry.delete, request.state.owner, name)
        return {"id": name, "object": "audio.voice.deleted", "deleted": True}

    return router


def _session_routes(engine: Engine, settings: Settings, sessions: Sessions) -> APIRouter:
    router = APIRouter(generate_unique_id_function=openapi.operation_id)
    fields = {
        "text": _string(settings.limits.text_characters),
        "speaker": {"type": "string", "pattern": "^[0-9]{1,3}$", "default": "1"},
        "audio": openapi.BINARY | {"description": "An audio file."},
    }
    of_session = dict.fromkeys(("export_session", "hear", "delete_session"), "session_id=$request.path.session_id")

    @router.get(
        "/v1/sessions/{session_id}", responses=openapi.answer(openapi.SessionContent) | openapi.refusals(400, 404)
    )
    async def export_session(session_id: SessionId, request: Request) -> dict[str, Any]:
        """All that is needed to rebuild a session elsewhere."""
        return await asyncio.to_thread(sessions.exported, request.state.owner, session_id)

    @router.put(
        "/v1/sessions/{session_id}",
        responses=openapi.answer(SessionStats, links=of_session) | openapi.refusals(400, 404, 408, 429, 503),
        openapi_extra=openapi.json_body(openapi.SessionContent),
    )
    async def restore_session(session_id: SessionId, request: Request) -> dict[str, Any]:
        """Rebuild a session, in place of what there is of it.

        One in which the user speaks first begins with `{"version": 1, "voice": "alloy", "turns": []}`.
        """
        try:
            content = json.loads(await request.body())
            openapi.SessionContent.model_validate(content, strict=True)
        except ValidationError as error:
            raise Problem(400, "A session is what GET /v1/sessions/ID gives.", "invalid_session") from error
        except (ValueError, RecursionError) as error:
            raise Problem(400, "The body is not JSON.", "invalid_json") from error
        kept = await asyncio.to_thread(sessions.restore, request.state.owner, session_id, content)
        return asdict(kept.session.stats)

    @router.delete("/v1/sessions/{session_id}", status_code=204, responses=openapi.refusals(400, 404))
    async def delete_session(session_id: SessionId, request: Request) -> Response:
        """Forget a session."""
        await asyncio.to_thread(sessions.delete, request.state.owner, session_id)
        return Response(status_code=204)

    @router.post(
        "/v1/sessions/{session_id}/turns",
        responses=openapi.answer(SessionStats) | openapi.refusals(400, 404, 408, 409, 429, 503),
        openapi_extra=openapi.form_body(
            ("text",),
            fields,
        ),
    )
    async def hear(session_id: SessionId, request: Request) -> dict[str, Any]:
        """A turn of somebody else: multipart fields text, speaker, and audio, if there is any.

        The session must be there: `PUT /v1/sessions/{session_id}` begins one in which nothing was said yet.
        """
        async with _form(request, fields) as form:
            text = _text(form, "text", settings.limits.text_characters)
            speaker = _text(form, "speaker", 3, "1")
            data = await _file(form, "audio") if "audio" in form else None
        if not speaker.isdecimal():
            raise Problem(400, "speaker must be a whole number.", "invalid_speaker", "speaker")
        kept = await asyncio.to_thread(sessions.find, request.state.owner, session_id)
        audio = None
        if data is not None:
            audio = await asyncio.to_thread(
                decode_audio, data, engine.runtime.sample_rate, settings.limits.sample_seconds
            )
        await kept.session.hear(text, audio, int(speaker))
        await asyncio.to_thread(sessions.save, request.state.owner, session_id, kept)
        return asdict(kept.session.stats)

    return router


def _operator_routes(engine: Engine, settings: Settings, metrics: Metrics) -> APIRouter:
    router = APIRouter(generate_unique_id_function=openapi.operation_id)

    @router.get("/health/live", responses=openapi.answer(openapi.Alive))
    async def live() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "alive"}

    @router.get("/health/ready", responses=openapi.answer(openapi.Ready) | openapi.refusals(503))
    async def ready() -> Response:
        """Whether new work is taken."""
        try:
            engine.check_health()
        except AloudError as error:
            return problem_of(error).response()
        if engine.stats().is_draining:
            return Problem(503, "The server is stopping.", "draining", retry_after_seconds=5).response()
        return JSONResponse({"status": "ready", "model": settings.model})

    @router.get("/metrics", response_class=Response, responses=openapi.TEXT)
    async def prometheus() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """A page to hear it on."""
        content = files("aloud.server").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(content, headers={"content-security-policy": PAGE_POLICY})

    return router


def _string(most: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": most}


@asynccontextmanager
async def _form(request: Request, fields: Collection[str]) -> AsyncIterator[FormData]:
    """A form in parts, of these fields; the other kind of form has no bounds while it is read."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise Problem(400, "The body is a form: send it as multipart/form-data.", "invalid_content_type")
    try:
        form = await request.form(max_files=1, max_fields=MAX_PARTS, max_part_size=100_000)
    except UnicodeError as error:
        raise Problem(400, "The form's charset does not fit what was sent. Send UTF-8.", "invalid_charset") from error
    try:
        if len(form.multi_items()) != len(form) or not set(form) <= set(fields):
            raise Problem(400, f"The form has each of these fields once at most: {', '.join(fields)}.", "unknown_field")
        yield form
    finally:
        await form.close()


def _text(form: Any, name: str, most: int, default: str | None = None) -> str:
    value = form.get(name, default)
    if not isinstance(value, str):
        raise Problem(400, f"The field {name} is missing.", "field_missing", name)
    if len(value) > most:
        raise Problem(400, f"{name} may have {most:,} characters.", "field_too_long", name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Problem(400, f"{name} holds half of a character. Send UTF-8.", "invalid_charset", name) from error
    return value


async def _file(form: Any, name: str) -> bytes:
    value = form.get(name)
    if value is None or isinstance(value, str):
        raise Problem(400, f"The file {name} is missing.", "field_missing", name)
    data: bytes = await value.read()
    return data


async def _answer_problem(_: Request, error: Exception) -> Response:
    return problem_of(error).response()


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        message = f"The body is not JSON: it cannot be read on from position {first['loc'][-1]}."
        return Problem(400, message, "invalid_json").response()
    if first["loc"] == ("body",) and not _is_json(request.headers.get("content-type", "")):
        message = "The body is JSON: send it with content-type: application/json."
        return Problem(400, message, "invalid_content_type").response()
    where = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    where = where[:MAX_SHOWN].encode(errors="replace").decode()  # fields that there are not are named by the client
    return Problem(400, f"{where}: {first['msg']}.", "invalid_request", where).response()


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, Problem):  # of the gate, met while the body was read
        return error.__cause__.response()
    response = Problem(error.status_code, f"{error.detail.rstrip('.')}.", "http_error").response()
    if error.status_code == 405:
        response.headers["allow"] = ", ".join(_methods(request)) or (error.headers or {}).get("Allow", "")
    return response


def _methods(request: Request) -> list[str]:
    """What can be done with a path; the routes themselves each know only their own."""
    described: dict[str, dict[str, Any]] = request.app.openapi()["paths"]
    found = [methods for path, methods in described.items() if compile_path(path)[0].match(route_path(request.scope))]
    return [method.upper() for methods in found for method in methods]
