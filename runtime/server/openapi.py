"""/openapi.json as the server is: what bodies hold, every status that a route answers with, and errors in one shape."""

from __future__ import annotations

from typing import Any, Literal

from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter

from aloud.server.encode import FORMATS
from aloud.server.gate import OPEN_PREFIX, SAFE_METHODS
from aloud.server.settings import Settings
from aloud.server.voices import ListedVoice
from aloud.session import SessionStats

REASONS = {
    400: "Something of the request is wrong; the message says what, `param` where.",
    401: "A key is needed.",
    403: "A page of another site asks, or the server does not answer to the name in Host.",
    404: "There is no such voice, session or model.",
    408: "The body did not come in time.",
    409: "It is there already, it is busy, or it is another than was asked for.",
    413: "The body is too large.",
    422: "The model said nothing.",
    429: "There is too much to do. Come again after so many seconds as Retry-After says.",
    500: "A fault of the server.",
    503: "The server is stopping, or its device does not answer.",
}
REFERENCE = "#/components/schemas/{model}"
DESCRIPTION = (
    "Besides, there are two WebSockets, which OpenAPI cannot describe: `/v1/audio/speech/stream` takes text in pieces, "
    "and `/v1/realtime` is as much of OpenAI's Realtime as speaking takes."
)


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error, in OpenAI's shape."""

    error: Error


class ModelRecord(BaseModel):
    """A model."""

    id: str
    object: Literal["model"]
    created: int  # when it was loaded, in seconds since 1970
    owned_by: str


class ModelList(BaseModel):
    """The one model."""

    object: Literal["list"]
    data: list[ModelRecord]


class VoiceList(BaseModel):
    """Voices, and names that stand for others or for a speaker of the model."""

    voices: list[ListedVoice]
    aliases: dict[str, str | int]


class VoiceDeleted(BaseModel):
    """A voice is forgotten."""

    id: str
    object: Literal["audio.voice.deleted"]
    deleted: Literal[True]


class SessionTurn(BaseModel):
    """A turn: a token for each position of its text, -1 for each frame of audio, and that frame's codes."""

    text_tokens: list[int]
    codes: list[list[int]]


class SessionContent(BaseModel):
    """All that is needed to rebuild a session."""

    version: Literal[1]
    voice: str
    turns: list[SessionTurn]


class Alive(BaseModel):
    """The process answers."""

    status: Literal["alive"]


class Ready(BaseModel):
    """New work is taken."""

    status: Literal["ready"]
    model: str


class SpeechUsage(BaseModel):
    """Tokens of the text, and frames of speech."""

    input_tokens: int
    output_tokens: int
    total_tokens: int


class SpeechDelta(BaseModel):
    """An event: audio in base64."""

    type: Literal["speech.audio.delta"]
    audio: str


class SpeechDone(BaseModel):
    """The last event."""

    type: Literal["speech.audio.done"]
    usage: SpeechUsage
    finish_reason: str


class SpeechFailed(BaseModel):
    """The last event, where speech could not go on."""

    type: Literal["speech.audio.error"]
    error: Error


EVENTS = (SpeechDelta, SpeechDone, SpeechFailed)
SHAPES: tuple[type, ...] = (
    ErrorAnswer, ModelRecord, ModelList, VoiceList, ListedVoice, VoiceDeleted, SessionContent, SessionStats, Alive,
    Ready, *EVENTS
)  # fmt: skip
BINARY = {"type": "string", "format": "binary"}
SEED = {"description": "The seed that was used.", "schema": {"type": "string", "pattern": "^[0-9]+$"}, "required": True}
REQUEST_ID = {"description": "As in the log.", "schema": {"type": "string", "pattern": "^[0-9a-f]{16}$"}}
RETRY = {
    "Retry-After": {"required": True, "schema": {"type": "string", "pattern": "^[1-9][0-9]*$"}},
    "X-Should-Retry": {"required": True, "schema": {"type": "string", "enum": ["true"]}},
}
EVENT = {  # each of a stream, in the words of OpenAPI 3.2
    "type": "object",
    "required": ["data"],
    "properties": {
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"oneOf": [{"$ref": REFERENCE.format(model=shape.__name__)} for shape in EVENTS]},
        }
    },
}
SPEECH: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Speech, sent while it is made: as audio, or as events of base64.",
        "headers": {"X-Aloud-Seed": SEED},
        "content": {format.content_type: {"schema": BINARY} for format in FORMATS.values()}
        | {"text/event-stream": {"itemSchema": EVENT}},
    }
}
TEXT: dict[int | str, dict[str, Any]] = {
    200: {"description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


def answer(shape: type, status: int = 200, links: dict[str, str] | None = None) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers with JSON of a shape.

    links: routes that take what this one made, by their functions' names, each with the parameter and where it is.
    """
    schema = {"$ref": REFERENCE.format(model=shape.__name__)}
    made: dict[str, Any] = {"description": _doc(shape), "content": {"application/json": {"schema": schema}}}
    if links:
        made["links"] = {
            name: {"operationId": name, "parameters": dict([given.split("=")])} for name, given in links.items()
        }
    return {status: made}


def operation_id(route: APIRoute) -> str:
    """What generated clients call a route: its function's name."""
    return route.name


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that refuses with these."""
    content = {"application/json": {"schema": {"$ref": REFERENCE.format(model=ErrorAnswer.__name__)}}}
    return {
        status: {"description": REASONS[status], "content": content}
        | ({"headers": RETRY} if status in (429, 503) else {})
        for status in statuses
    }


def json_body(shape: type) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads JSON of a shape."""
    schema = {"$ref": REFERENCE.format(model=shape.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def form_body(required: tuple[str, ...], fields: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads a form."""
    schema = {"type": "object", "required": list(required), "properties": fields, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def completed(document: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The document that FastAPI makes of the routes, with the shapes they name and what the gate does around each."""
    _, shapes = TypeAdapter.json_schemas(
        [(shape.__name__, "serialization", TypeAdapter(shape)) for shape in SHAPES], ref_template=REFERENCE
    )
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas |= shapes["$defs"]
    for name in ("HTTPValidationError", "ValidationError"):  # of FastAPI, which answers otherwise here
        schemas.pop(name, None)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            _describe(path, method.upper(), operation, settings)
    if settings.keys:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "basic": {"type": "http", "scheme": "basic", "description": "The key as the password of any name."},
        }
        document["security"] = [{"bearer": []}, {"basic": []}]
    return document


def _describe(path: str, method: str, operation: dict[str, Any], settings: Settings) -> None:
    """Add to a route's description what the gate does around it."""
    responses, is_open = operation["responses"], path.startswith(OPEN_PREFIX)
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    gate = [413, 500]
    if settings.keys and not is_open:
        gate.append(401)
    if method not in SAFE_METHODS or (settings.hosts and not is_open):
        gate.append(403)
    for status, response in refusals(*gate).items():
        responses.setdefault(str(status), response)
    for response in responses.values():
        response["headers"] = {**response.get("headers", {}), "X-Request-ID": REQUEST_ID | {"required": True}}
    if settings.keys and is_open:
        operation["security"] = []
    operation["responses"] = dict(sorted(responses.items()))


def _doc(shape: type) -> str:
    return (shape.__doc__ or "").strip().splitlines()[0]
