"""/openapi.json is true: every route has every status that it answers with, and answers look as it says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import httpx
import numpy as np
import pytest
from pydantic import TypeAdapter

from aloud import Engine
from aloud.errors import DeviceStuck, NothingSpoken, Overloaded
from aloud.live_speech import LiveSpeech
from aloud.server.encode import FORMATS
from aloud.server.sessions import EMPTY
from aloud.server.settings import Limits, Settings
from aloud.session import Session
from server.running import LONG, Running, asked, events_of, serving, wait_until, wav

KEY = "a-key"
SHUT = {401}
UNSAFE = {403}
ALWAYS = {413, 500}
READS = {400, 408}

# Written by hand, from the code of each.
STATUSES: dict[tuple[str, str], set[int]] = {
    ("POST", "/v1/audio/speech"): {200, 404, 409, 422, 429, 503} | READS | UNSAFE | SHUT,
    ("GET", "/v1/models"): {200} | SHUT,
    ("GET", "/v1/models/{model_id}"): {200, 404} | SHUT,
    ("GET", "/v1/audio/voices"): {200} | SHUT,
    ("POST", "/v1/audio/voices"): {201, 409} | READS | UNSAFE | SHUT,
    ("DELETE", "/v1/audio/voices/{name}"): {200, 400, 404} | UNSAFE | SHUT,
    ("GET", "/v1/sessions/{session_id}"): {200, 400, 404} | SHUT,
    ("PUT", "/v1/sessions/{session_id}"): {200, 404, 429, 503} | READS | UNSAFE | SHUT,
    ("DELETE", "/v1/sessions/{session_id}"): {204, 400, 404} | UNSAFE | SHUT,
    ("POST", "/v1/sessions/{session_id}/turns"): {200, 404, 409, 429, 503} | READS | UNSAFE | SHUT,
    ("GET", "/health/live"): {200},
    ("GET", "/health/ready"): {200, 503},
    ("GET", "/metrics"): {200} | SHUT,
    ("GET", "/"): {200} | SHUT,
}


@pytest.fixture(scope="module")
def locked(engine: Engine) -> Iterator[Running]:
    limits = Limits(body_bytes=200_000, sessions=2, read_seconds=2.0)
    with serving(engine, Settings(model="small", keys=(KEY,), limits=limits)) as running:
        yield running


@pytest.fixture(scope="module")
def document(locked: Running) -> dict[str, Any]:
    with locked.client(KEY) as client:
        found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_every_route_has_every_status(document: dict[str, Any]) -> None:
    described = {place: set(map(int, operation["responses"])) for place, operation in operations(document).items()}
    assert described == {place: statuses | ALWAYS for place, statuses in STATUSES.items()}


def test_without_keys_and_with_names(engine: Engine) -> None:
    """What the gate answers depends on the settings."""
    with serving(engine, Settings(model="small", hosts=("127.0.0.1",))) as running, running.client() as client:
        document = client.get("/openapi.json").json()
    for (_, path), operation in operations(document).items():
        assert "401" not in operation["responses"]
        assert ("403" in operation["responses"]) == (not path.startswith("/health/"))
        assert "security" not in operation
    assert "security" not in document


def test_the_key(document: dict[str, Any]) -> None:
    assert document["security"] == [{"bearer": []}, {"basic": []}]
    assert {scheme["scheme"] for scheme in document["components"]["securitySchemes"].values()} == {"bearer", "basic"}
    for (_, path), operation in operations(document).items():
        assert operation.get("security") == ([] if path.startswith("/health/") else None)


def test_errors_are_one_shape(document: dict[str, Any]) -> None:
    for operation in operations(document).values():
        for status, response in operation["responses"].items():
            assert response["headers"]["X-Request-ID"]["required"] is True
            if int(status) < 400:
                continue
            (content,) = response["content"].items()
            assert content == ("application/json", {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}})
            assert ("Retry-After" in response["headers"]) == (status in ("429", "503"))
    error = document["components"]["schemas"]["Error"]
    assert set(error["required"]) == {"message", "type", "param", "code"}


def test_references_lead_somewhere(document: dict[str, Any]) -> None:
    """And no shape is described that nothing has."""
    used = set()
    for part in json.dumps(document).split('"$ref": "')[1:]:
        used.add(part.partition('"')[0].removeprefix("#/components/schemas/"))
    assert used == set(document["components"]["schemas"])
    names = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(names)) == len(names)
    for operation in operations(document).values():
        for response in operation["responses"].values():
            for link in response.get("links", {}).values():
                assert link["operationId"] in names


def test_how_a_session_begins_is_said(document: dict[str, Any]) -> None:
    found = operations(document)
    assert json.dumps(EMPTY) in found["PUT", "/v1/sessions/{session_id}"]["description"]
    assert "begins one" in found["POST", "/v1/sessions/{session_id}/turns"]["description"]
    assert "the session's" in document["components"]["schemas"]["SpeechBody"]["properties"]["voice"]["description"]


def test_bodies(document: dict[str, Any]) -> None:
    found = operations(document)
    bodies = {place: operation["requestBody"] for place, operation in found.items() if "requestBody" in operation}
    kinds = {place: list(body["content"]) for place, body in bodies.items()}
    assert kinds == {
        ("POST", "/v1/audio/speech"): ["application/json"],
        ("POST", "/v1/audio/voices"): ["multipart/form-data"],
        ("PUT", "/v1/sessions/{session_id}"): ["application/json"],
        ("POST", "/v1/sessions/{session_id}/turns"): ["multipart/form-data"],
    }
    assert all(body["required"] for body in bodies.values())
    form = bodies["POST", "/v1/audio/voices"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]) == {"name", "consent", "text", "ref_text", "audio_sample"}
    assert form["properties"]["audio_sample"]["format"] == "binary"
    schemas = document["components"]["schemas"]
    assert {"text", "speaker", "audio"} == set(schemas["ContextTurn"]["properties"])
    assert schemas["SpeechBody"]["additionalProperties"] is False


# --- what is answered -------------------------------------------------------------------------------------------------


class Checked:
    """A client that holds every answer against the description."""

    def __init__(self, client: httpx.Client, document: dict[str, Any]) -> None:
        self._client = client
        self._operations = operations(document)
        self._schemas = document["components"]["schemas"]
        self.seen: set[tuple[str, str, int]] = set()

    def __call__(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        answer = self._client.request(method, path, **arguments)
        parts = path.split("/")
        if parts[1:3] == ["v1", "sessions"]:
            parts[3] = "{session_id}"
        if parts[1:4] == ["v1", "audio", "voices"] and len(parts) == 5:
            parts[4] = "{name}"
        if parts[1:3] == ["v1", "models"] and len(parts) > 3:
            parts[3:] = ["{model_id}"]
        place = "/".join(parts)
        response = self._operations[method, place]["responses"][str(answer.status_code)]
        kind = answer.headers.get("content-type", "").partition(";")[0]
        assert kind in response.get("content", {"": None}), (method, place, answer.status_code, kind)
        for name, header in response["headers"].items():
            if header["required"]:
                assert name in answer.headers
        if kind == "application/json":
            self._fits(answer.json(), response["content"][kind]["schema"])
        self.seen.add((method, place, answer.status_code))
        return answer

    def _fits(self, value: Any, schema: dict[str, Any]) -> None:
        """A part of JSON Schema, which is all that the description uses for answers."""
        if "$ref" in schema:
            self._fits(value, self._schemas[schema["$ref"].rpartition("/")[2]])
            return
        if "anyOf" in schema:
            assert any(self._is_fitting(value, choice) for choice in schema["anyOf"]), (value, schema)
            return
        if "const" in schema or "enum" in schema:
            assert value in schema.get("enum", [schema.get("const")])
        kinds: dict[str, Any] = {
            "object": dict, "array": list, "string": str, "integer": int, "number": float | int, "null": None,
            "boolean": bool,
        }  # fmt: skip
        TypeAdapter(kinds[schema["type"]]).validate_python(value, strict=True)
        if isinstance(value, dict):
            assert set(schema.get("required", ())) <= set(value)
            for name, part in value.items():
                inner = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
                assert inner is not None, f"{name} is not described"
                self._fits(part, inner)
        if isinstance(value, list):
            for part in value:
                self._fits(part, schema["items"])

    def _is_fitting(self, value: Any, schema: dict[str, Any]) -> bool:
        try:
            self._fits(value, schema)
        except (AssertionError, ValueError):
            return False
        return True


@pytest.fixture
def ask(locked: Running, document: dict[str, Any]) -> Iterator[Checked]:
    with locked.client(KEY) as client:
        yield Checked(client, document)


def raising(error: Exception) -> Callable[..., Any]:
    async def failing(*_: Any, **__: Any) -> Any:
        raise error

    return failing


def test_every_status_can_be_had(
    locked: Running, document: dict[str, Any], ask: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every one of the table, provoked, looks as it is described."""
    speech, voices, session, turns = (
        "/v1/audio/speech",
        "/v1/audio/voices",
        "/v1/sessions/one",
        "/v1/sessions/one/turns",
    )
    sample, hm = {"audio_sample": wav(np.zeros(2400))}, {"text": (None, "Hm.")}
    fields = {"name": "mine", "consent": "Yes."}
    empty: dict[str, Any] = {"version": 1, "voice": "alloy", "turns": []}
    foreign, large = {"origin": "http://elsewhere.example"}, b"x" * 200_001

    # What goes well.
    for path in ("/v1/models", "/v1/models/small", voices, "/health/live", "/health/ready", "/metrics", "/"):
        assert ask("GET", path).status_code == 200
    assert ask("POST", voices, data=fields, files=sample).status_code == 201
    assert ask("POST", speech, json=asked(session_id="one")).status_code == 200
    assert ask("POST", turns, files=hm).status_code == 200
    assert ask("PUT", session, json=ask("GET", session).json()).status_code == 200
    ask("GET", voices)

    # What is wrong with it.
    assert ask("POST", speech, json={}).status_code == 400
    assert ask("POST", speech, json=asked(voice="nobody")).status_code == 404
    assert ask("POST", speech, json=asked(session_id="one", voice="echo")).status_code == 409
    assert ask("GET", "/v1/models/large").status_code == ask("GET", "/v1/models/a/b").status_code == 404
    assert ask("POST", voices, data={}).status_code == 400
    assert ask("POST", voices, data=fields, files=sample).status_code == 409
    assert ask("PUT", session, json=[]).status_code == 400
    assert ask("PUT", session, json=empty | {"voice": "nobody"}).status_code == 404
    assert ask("PUT", "/v1/sessions/two", json=empty).status_code == 200
    assert ask("PUT", "/v1/sessions/three", json=empty).status_code == 429
    assert ask("POST", turns, files={"text": (None, "")}).status_code == 400
    assert ask("POST", "/v1/sessions/none/turns", files=hm).status_code == 404
    assert ask("GET", "/v1/sessions/!").status_code == ask("DELETE", "/v1/sessions/!").status_code == 400
    assert ask("GET", "/v1/sessions/none").status_code == ask("DELETE", "/v1/sessions/none").status_code == 404
    assert ask("DELETE", f"{voices}/!").status_code == 400
    assert ask("DELETE", f"{voices}/nobody").status_code == 404
    for method, path in STATUSES:
        place = path.replace("{name}", "mine").replace("{session_id}", "one").replace("{model_id}", "small")
        assert ask(method, place, content=large).status_code == 413
        if method not in ("GET", "HEAD"):
            assert ask(method, place, headers=foreign).status_code == 403
        if not path.startswith("/health/"):
            assert ask(method, place, headers={"authorization": "Bearer wrong"}).status_code == 401

    # What takes too long, or is too much, or breaks.
    def slowly() -> Iterator[bytes]:
        yield b"--x\r\n"
        over.wait(20)

    for method, path in (("POST", speech), ("POST", voices), ("PUT", session), ("POST", turns)):
        over = threading.Event()
        threading.Timer(4, over.set).start()
        headers = {"content-type": "multipart/form-data; boundary=x"}
        assert ask(method, path, content=slowly(), headers=headers).status_code == 408
    with (
        locked.client(KEY) as other,
        other.stream("POST", speech, json=asked(session_id="one", input=LONG, max_seconds=20)) as answer,
    ):
        parts = answer.iter_raw()  # to be kept: the connection ends with it
        next(parts)
        assert ask("POST", turns, files=hm).status_code == 409
    wait_until(lambda: ask("POST", turns, files=hm).status_code == 200)
    faults: dict[int, Exception] = {
        422: NothingSpoken("The model said nothing."),
        429: Overloaded("There is too much to do.", retry_after_seconds=2.2),
        503: DeviceStuck("The device hangs."),
        500: RuntimeError("A fault."),
    }
    for status, error in faults.items():
        with monkeypatch.context() as patch:
            patch.setattr(LiveSpeech, "__anext__", raising(error))
            assert ask("POST", speech, json=asked()).status_code == status
            if status != 422:
                patch.setattr(Session, "hear", raising(error))
                assert ask("POST", turns, files=hm).status_code == status
            if status in (500, 503):
                with monkeypatch.context() as restore:
                    restore.setattr(Session, "restore", lambda *_, error=error: (_ for _ in ()).throw(error))
                    content = ask("GET", session).json()
                    assert ask("PUT", session, json=content).status_code == status
    with monkeypatch.context() as patch:
        patch.setattr(locked.engine, "check_health", lambda: (_ for _ in ()).throw(DeviceStuck("It hangs.")))
        assert ask("GET", "/health/ready").status_code == 503
    assert ask("DELETE", session).status_code == 204
    assert ask("DELETE", f"{voices}/mine").status_code == 200

    of_all = {(method, path, status) for (method, path), statuses in STATUSES.items() for status in statuses | {413}}
    assert of_all - ask.seen == set()


@pytest.mark.parametrize("stream_format", ["audio", "sse"])
@pytest.mark.parametrize("format", FORMATS)
def test_speech(ask: Checked, document: dict[str, Any], format: str, stream_format: Literal["audio", "sse"]) -> None:
    answer = ask("POST", "/v1/audio/speech", json=asked(response_format=format, stream_format=stream_format))
    content = operations(document)["POST", "/v1/audio/speech"]["responses"]["200"]["content"]
    assert set(content) == {kind.content_type for kind in FORMATS.values()} | {"text/event-stream"}
    if stream_format == "audio":
        assert content[answer.headers["content-type"]]["schema"]["format"] == "binary"
        return
    events = content["text/event-stream"]["itemSchema"]["properties"]["data"]["contentSchema"]["oneOf"]
    for event in events_of(answer.text):
        assert sum(ask._is_fitting(event, schema) for schema in events) == 1


def test_what_a_path_takes_is_said(ask: Checked, locked: Running) -> None:
    """In `Allow`, with the error; of all routes of the path, not of one."""
    with locked.client(KEY) as client:
        for path, allowed in {
            "/v1/audio/speech": {"POST"},
            "/v1/audio/voices": {"GET", "POST"},
            "/v1/audio/voices/one": {"DELETE"},
            "/v1/sessions/one": {"GET", "PUT", "DELETE"},
            "/v1/sessions/one/turns": {"POST"},
            "/openapi.json": {"GET"},
            "/": {"GET"},
        }.items():
            answer = client.patch(path)
            assert answer.status_code == 405
            assert set(answer.headers["allow"].split(", ")) - {"HEAD"} == allowed
            assert answer.json()["error"]["code"] == "http_error"
