"""What is wrong with a request is said: a status, OpenAI's shape, a sentence. What fails later is cut."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest

from aloud.audio import Audio
from aloud.errors import DeviceStuck, NothingSpoken, OutOfMemory, Overloaded, StepFailed
from aloud.live_speech import LiveSpeech
from aloud.server.settings import Limits, Settings
from server.running import Lines, Running, asked, assert_problem, events_of, serving

SECRET = "xyzzy-4711"

REFUSED = {
    "unknown-field": ({"colour": "red"}, 400, "colour"),
    "nested-unknown-field": ({"voice": {"id": "alloy", "path": "/"}}, 400, "voice"),
    "speed-slow": ({"speed": 0.5}, 400, "speed"),
    "speed-fast": ({"speed": 4}, 400, "speed"),
    "unknown-voice": ({"voice": "nobody"}, 404, "voice"),
    "unknown-voice-id": ({"voice": {"id": "nobody"}}, 404, "voice"),
    "voice-a-number": ({"voice": 3}, 400, "voice"),
    "no-input": ({"input": None}, 400, "input"),
    "empty-input": ({"input": ""}, 400, "input"),
    "blank-input": ({"input": " \n"}, 400, None),
    "long-input": ({"input": "a" * 20_001}, 400, "input"),
    "input-a-list": ({"input": ["a"]}, 400, "input"),
    "format": ({"response_format": "mp4"}, 400, "response_format"),
    "stream-format": ({"stream_format": "websocket"}, 400, "stream_format"),
    "pace": ({"pace": "fast"}, 400, "pace"),
    "seed-negative": ({"seed": -1}, 400, "seed"),
    "seed-large": ({"seed": 2**64}, 400, "seed"),
    "seed-huge": ({"seed": 10**300}, 400, "seed"),
    "seed-fraction": ({"seed": 0.5}, 400, "seed"),
    "temperature-negative": ({"temperature": -0.1}, 400, "temperature"),
    "temperature-large": ({"temperature": 1e9}, 400, "temperature"),
    "depth-temperature": ({"depth_temperature": -1}, 400, "depth_temperature"),
    "top-k-negative": ({"top_k": -1}, 400, "top_k"),
    "top-k-large": ({"top_k": 2**31}, 400, "top_k"),
    "depth-top-k": ({"depth_top_k": 1.5}, 400, "depth_top_k"),
    "speaker-negative": ({"speaker": -1}, 400, "speaker"),
    "speaker-large": ({"speaker": 10**9}, 400, "speaker"),
    "no-seconds": ({"max_seconds": 0}, 400, "max_seconds"),
    "many-seconds": ({"max_seconds": 1e9}, 400, "max_seconds"),
    "session-id": ({"session_id": "../x"}, 400, "session_id"),
    "speaker-in-a-session": ({"session_id": "refused", "speaker": 3}, 400, "speaker"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(server: Running, case: str) -> None:
    body, status, parameter = REFUSED[case]
    answer = server.speech(**body)
    assert_problem(answer, status)
    given = answer.json()["error"]["param"]
    assert parameter is None or given.split(".")[0] == parameter


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"input": NaN}', b'{"input": "\\ud800"}', b"[" * 100_000],
    ids=["empty", "half", "list", "null", "string", "not-utf8", "nan", "surrogate", "deep"],
)
def test_bodies_that_are_no_request(server: Running, content: bytes) -> None:
    with server.client() as client:
        headers = {"content-type": "application/json"}
        assert_problem(client.post("/v1/audio/speech", content=content, headers=headers), 400)


@pytest.mark.parametrize("name", ["temperature", "max_seconds", "speed", "depth_temperature"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(server: Running, name: str, value: str) -> None:
    content = json.dumps(asked(**{name: "?"})).replace('"?"', value)
    with server.client() as client:
        headers = {"content-type": "application/json"}
        assert_problem(client.post("/v1/audio/speech", content=content, headers=headers), 400)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"input": "a", "context": [' + b"{}," * 300_000 + b"{}]}", 413),
        (b'{"input": "a", "context": [' + b"{}," * 90_000 + b"{}]}", 400),
        (b'{"input": "a"' + b"".join(b', "k%d": 1' % number for number in range(90_000)) + b"}", 400),
        (b'{"input": "a", "context": [{"text": "a"' + b', "b": 1' * 90_000 + b"}]}", 400),
        (b"[" * 150_000, 400),
    ],
    ids=["items without end", "many items", "many fields", "many fields of an item", "depth"],
)
def test_what_is_small_as_bytes_is_not_large_as_objects(server: Running, body: bytes, status: int) -> None:
    """Each of these took seconds of everybody's time, or hundreds of megabytes, or would have."""
    with server.client() as client:
        began = time.process_time()
        answer = client.post("/v1/audio/speech", content=body, headers={"content-type": "application/json"})
        assert_problem(answer, status)
        assert time.process_time() - began < 1.0
        assert len(answer.content) < 500


def test_a_session_of_many_turns_is_restored_at_once(server: Running) -> None:
    turns = [{"text_tokens": [1], "codes": []}] * 30_000
    with server.client() as client:
        began = time.process_time()
        stats = client.put("/v1/sessions/many", json={"version": 1, "voice": "alloy", "turns": turns})
        assert stats.status_code == 200, stats.text
        assert stats.json()["positions"] <= server.engine.runtime.max_positions
        assert time.process_time() - began < 3.0
        client.delete("/v1/sessions/many")


def test_a_wrong_content_type(server: Running) -> None:
    with server.client() as client:
        assert_problem(client.post("/v1/audio/speech", data={"input": "Hello."}), 400)
        assert_problem(client.post("/v1/audio/speech", files={"input": b"Hello."}), 400)
        for kind in ("text/plain", "application/x-www-form-urlencoded", "text/json; charset=utf-8"):
            headers = {"content-type": kind}
            answer = client.post("/v1/audio/speech", content=json.dumps(asked()), headers=headers)
            said = assert_problem(answer, 400, "invalid_content_type")
            assert said == "The body is JSON: send it with content-type: application/json."
            assert answer.json()["error"]["param"] is None
        bare = client.post("/v1/audio/speech", content=json.dumps(asked()))
        if bare.status_code != 200:  # an older FastAPI takes it for JSON
            assert assert_problem(bare, 400, "invalid_content_type") == said


@pytest.mark.parametrize(("content", "position"), [(b'{"input": "a" "b"}', 14), (b"{", 1), (b"Hello.", 0)])
def test_what_is_not_json_is_told_where(server: Running, content: bytes, position: int) -> None:
    with server.client() as client:
        headers = {"content-type": "application/json"}
        answer = client.post("/v1/audio/speech", content=content, headers=headers)
    said = assert_problem(answer, 400, "invalid_json")
    assert said == f"The body is not JSON: it cannot be read on from position {position}."
    assert answer.json()["error"]["param"] is None


@pytest.mark.parametrize(
    ("voice", "parameter"),
    [
        (7, "voice"),
        ([], "voice"),
        (True, "voice"),
        ({}, "voice.id"),
        ({"id": 7}, "voice.id"),
        ({"id": "a", "b": 1}, "voice.b"),
    ],
    ids=str,
)
def test_a_voice_that_is_none(server: Running, voice: object, parameter: str) -> None:
    """It is named as the client knows it."""
    answer = server.speech(voice=voice)
    said = assert_problem(answer, 400, "invalid_request")
    assert answer.json()["error"]["param"] == parameter
    assert said.startswith(f"{parameter}: ")


@pytest.mark.parametrize(
    "content",
    [
        b'{"\\ud800": 1, "input": "a"}',
        b'{"voice": "\\ud800", "input": "a"}',
        b'{"voice": {"id": "\\udfff"}, "input": "a"}',
        b'{"session_id": "\\ud800", "input": "a"}',
        b'{"session_id": "a\\u0000b", "input": "a"}',
        b'{"voice": "\\u0000", "input": "a"}',
        b'{"response_format": "\\ud800", "input": "a"}',
        b'{"context": [{"text": "\\ud800"}], "input": "a"}',
        b'{"input": "a", "context": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"input": "a", "voice": ' + b'{"id":' * 900 + b"1" + b"}" * 900 + b"}",
        b'{"input": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"input": "a", "top_k": 1e400}',
        b'{"input": "a", "speaker": -1e400}',
        b'{"input": "a", "seed": 1.5e300}',
        b'{"input": "a", "seed": "7"}',
        b'{"input": "a", "speaker": true}',
        b'{"input": "a", "temperature": false}',
        b'{"input": "a", "' + b"f" * 100_000 + b'": 1}',
        b'{"input": "a"}' * 2,
        b"\xef\xbb\xbf{",
        b'"\\ud800"',
    ],
)
def test_bodies_that_break_what_is_careless(server: Running, lines: Lines, content: bytes) -> None:
    """Halves of characters, depths, numbers that no one has: refused in a few words."""
    with server.client() as client:
        headers = {"content-type": "application/json"}
        answer = client.post("/v1/audio/speech", content=content, headers=headers)
        assert answer.status_code in (400, 404)
        assert_problem(answer, answer.status_code)
        assert len(answer.content) < 1000
        session = client.put("/v1/sessions/odd", content=content, headers=headers)
        assert_problem(session, 400)
    assert not lines.errors


@pytest.mark.parametrize(
    "turns",
    [
        "[NaN]",
        "[Infinity]",
        "[1e400]",
        f"[{'9' * 4000}]",
        f"[{'9' * 5000}]",
        "[true]",
        "[1.5]",
        "[null]",
        '["\\ud800"]',
        "[{}]",
        "[[1]]",
        "[" * 900 + "]" * 900,
        "{}",
        '"ab"',
    ],
)
def test_tokens_that_are_none(server: Running, lines: Lines, turns: str) -> None:
    """In an import: as text tokens and as codes."""
    with server.client() as client:
        for tokens, codes in ((turns, "[]"), ("[-1]", turns), (turns, turns), ("[-1]", f"[{turns}]")):
            content = f'{{"version": 1, "voice": "alloy", "turns": [{{"text_tokens": {tokens}, "codes": {codes}}}]}}'
            assert_problem(client.put("/v1/sessions/odd", content=content.encode()), 400)
    assert not lines.errors


@pytest.mark.parametrize("path", ["/v1/audio/voices", "/v1/sessions/one/turns"])
def test_forms_that_are_none(server: Running, lines: Lines, path: str) -> None:
    text = b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n'
    kinds: dict[str, bytes] = {
        "": b"text=a",
        "application/json": b"{}",
        "application/x-www-form-urlencoded": b"&".join([b"text=a"] * 100_000),
        "multipart/form-data": text + b"a\r\n--x--",
        "multipart/form-data; boundary=": text + b"a\r\n--x--",
        "multipart/form-data; boundary=x": b"nothing",
        "multipart/form-data; boundary=x;": text,
        "multipart/form-data; boundary=x; charset=undefined": text + b"a\r\n--x--",
        "multipart/form-data; boundary=x; charset=utf-7": text + b"+2AA-\r\n--x--",
        "multipart/form-data; boundary=x; charset=unicode_escape": text + b"\\ud800\r\n--x--",
        "multipart/form-data; boundary=x; a=b": text.replace(b'"text"', b'"text\xff"') + b"a\r\n--x--",
        "multipart/form-data; boundary=x; b=c": (text + b"a\r\n") * 2 + b"--x--",
        "multipart/form-data; boundary=x; c=d": text.replace(b'"text"', b'"other"') + b"a\r\n--x--",
        "multipart/form-data; boundary=x; d=e": b"--x\r\n" + b"X: y\r\n" * 10_000 + b"\r\na\r\n--x--",
    }
    with server.client() as client:
        client.put("/v1/sessions/one", json={"version": 1, "voice": "alloy", "turns": []})
        for kind, content in kinds.items():
            answer = client.post(path, content=content, headers={"content-type": kind})
            assert answer.status_code == 400, (kind, answer.text)
            assert_problem(answer, 400)
    assert not lines.errors


def test_headers_that_are_there_twice(server: Running, lines: Lines) -> None:
    content = json.dumps(asked(max_seconds=0.08)).encode()
    json_type, form_type = (b"content-type", b"application/json"), (b"content-type", b"multipart/form-data; boundary=x")
    with server.client() as client:
        for headers in (
            [json_type, form_type],
            [form_type, json_type],
            [json_type] * 2,
            [(b"authorization", b"a")] * 2,
        ):
            for path in ("/v1/audio/speech", "/v1/sessions/one/turns", "/v1/audio/voices"):
                answer = client.post(path, content=content, headers=headers)
                assert answer.status_code in (200, 400), (headers, path)
    assert not lines.errors


@pytest.mark.parametrize(
    "name", ["%00", "a%00b", "%ED%A0%80", "%FF", "a" * 5000, "..", "%2e%2e", "a%2fb", "%0d%0a", "a b"]
)
def test_ids_that_are_none(server: Running, lines: Lines, name: str) -> None:
    with server.client() as client:
        for method, path in (
            ("GET", "sessions"),
            ("PUT", "sessions"),
            ("DELETE", "sessions"),
            ("DELETE", "audio/voices"),
        ):
            content = b'{"version": 1, "voice": "alloy", "turns": []}'
            assert client.request(method, f"/v1/{path}/{name}", content=content).status_code in (400, 404, 405)
        assert client.post(f"/v1/sessions/{name}/turns", files={"text": (None, "Hm.")}).status_code in (400, 404, 405)
    assert not lines.errors


def test_other_paths_and_methods(server: Running) -> None:
    with server.client() as client:
        assert_problem(client.get("/v1/nothing"), 404)
        assert_problem(client.get("/v1/audio/speech"), 405)
        assert_problem(client.put("/v1/models"), 405)


def test_a_refusal_says_nothing_of_the_text(server: Running, lines: Lines) -> None:
    for body in ({"temperature": -1}, {"voice": "nobody"}, {"speed": 2}, {"input": SECRET * 3000}, {"top_k": SECRET}):
        answer = server.speech(**{"input": SECRET, **body})
        assert answer.status_code in (400, 404)
        assert SECRET not in answer.text
    assert SECRET not in lines.text


def fail_after(monkeypatch: pytest.MonkeyPatch, frames: int, error: Exception) -> None:
    """Every speech fails in place of its chunk `frames`."""
    made: dict[int, int] = {}
    original = LiveSpeech.__anext__

    async def failing(self: LiveSpeech) -> Audio:
        made[id(self)] = made.get(id(self), 0) + 1
        if made[id(self)] > frames:
            self.cancel()
            raise error
        return await original(self)

    monkeypatch.setattr(LiveSpeech, "__anext__", failing)


FAULTS: dict[str, tuple[Exception, int, dict[str, str]]] = {
    "overloaded": (Overloaded("There is too much to do.", retry_after_seconds=2.2), 429, {"retry-after": "3"}),
    "nothing-spoken": (NothingSpoken("The model said nothing."), 422, {}),
    "stuck": (DeviceStuck(f"The device {SECRET} hangs."), 503, {"retry-after": "30"}),
    "step": (StepFailed(f"In {SECRET}."), 500, {}),
    "memory": (OutOfMemory(f"In {SECRET}."), 500, {}),
    "fault": (RuntimeError(f"at /home/{SECRET}/model.py"), 500, {}),
    "key": (KeyError(SECRET), 500, {}),
}


@pytest.mark.parametrize("stream_format", ["audio", "sse"])
@pytest.mark.parametrize("case", FAULTS)
def test_before_the_first_audio_it_is_an_ordinary_error(
    server: Running, monkeypatch: pytest.MonkeyPatch, lines: Lines, case: str, stream_format: str
) -> None:
    error, status, headers = FAULTS[case]
    fail_after(monkeypatch, 0, error)
    answer = server.speech(stream_format=stream_format)
    assert_problem(answer, status)
    assert SECRET not in answer.text + str(answer.headers)
    assert {name: answer.headers.get(name) for name in headers} == headers
    assert answer.headers.get("x-should-retry") == ("true" if headers else None)
    assert lines.request()["error"] == type(error).__name__
    assert lines.request()["request_id"] == answer.headers["x-request-id"]
    assert SECRET not in lines.text


@pytest.mark.parametrize("format", ["pcm", "wav", "mp3", "opus"])
def test_after_it_the_connection_is_cut(
    server: Running, monkeypatch: pytest.MonkeyPatch, lines: Lines, format: str
) -> None:
    fail_after(monkeypatch, 3, RuntimeError(SECRET))
    with (
        server.client() as client,
        client.stream("POST", "/v1/audio/speech", json=asked(response_format=format)) as answer,
    ):
        assert answer.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            for _ in answer.iter_raw():
                pass
    assert lines.request()["outcome"] == "failed"
    assert SECRET not in lines.text


def test_after_it_events_end_with_one_error(server: Running, monkeypatch: pytest.MonkeyPatch, lines: Lines) -> None:
    fail_after(monkeypatch, 3, RuntimeError(SECRET))
    answer = server.speech(stream_format="sse")
    *deltas, last = events_of(answer.text)
    assert [delta["type"] for delta in deltas] == ["speech.audio.delta"] * 3
    assert last["type"] == "speech.audio.error"
    assert last["error"]["type"] == "server_error"
    assert SECRET not in answer.text + lines.text


def test_a_fault_of_the_server_itself(server: Running, monkeypatch: pytest.MonkeyPatch, lines: Lines) -> None:
    """No path, no message, no traceback: a sentence, and a line that says where, without the exception's text."""

    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"/home/{SECRET}/secret.py")

    monkeypatch.setattr(type(server.engine), "stream", failing)
    answer = server.speech()
    assert_problem(answer, 500, "internal")
    assert lines.request()["status"] == 500
    assert SECRET not in answer.text + lines.text
    (fault,) = [json.loads(line) for line in lines.errors]
    assert fault["fault"] == "RuntimeError"
    assert fault["request_id"] == answer.headers["x-request-id"]
    assert any(place.startswith("app.py:") for place in fault["at"])


def test_limits_are_the_settings(server: Running) -> None:
    limits = Limits(text_characters=10)
    with serving(server.engine, Settings(model="small", limits=limits)) as strict:
        assert strict.speech(input="a" * 10, max_seconds=0.08).status_code == 200
        assert_problem(strict.speech(input="a" * 11), 400, "input_too_long")


def test_a_full_engine_is_overloaded(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own admission: no slot, and no room to wait."""
    monkeypatch.setattr(server.engine.loop, "max_waiting", 0)
    monkeypatch.setattr(server.engine.loop.scheduler, "retry_after", lambda *_: None)  # a busy machine refuses none
    held = [server.engine.stream("Hello there.", max_seconds=20) for _ in range(4)]
    try:
        for speech in held:
            next(speech)
        answer = server.speech()
        assert_problem(answer, 429, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["x-should-retry"] == "true"
        with server.client() as client:
            assert client.get("/health/ready").status_code == 200
            assert client.get("/health/live").status_code == 200
    finally:
        for speech in held:
            speech.cancel()
