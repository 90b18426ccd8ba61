"""The gate: keys on every route, bodies bounded in size and time, readers and writers that are too slow, the log."""

from __future__ import annotations

import ast
import base64
import hmac
import json
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.routing import BaseRoute
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import aloud.server
from aloud import Engine
from aloud.errors import RequestError
from aloud.server import gate
from aloud.server.app import create_app
from aloud.server.serve import own_names
from aloud.server.settings import Limits, Settings, read_keys
from server.running import LONG, TEXT, Lines, Running, asked, assert_problem, is_idle, serving, wait_until

KEYS = ("key-of-one-" + secrets.token_hex(8), "key-of-two-" + secrets.token_hex(8))


@pytest.fixture(scope="module")
def locked(engine: Engine) -> Iterator[Running]:
    """A server with two keys."""
    with serving(engine, Settings(model="small", keys=KEYS)) as running:
        yield running


def routes(app: Any) -> list[tuple[str, str]]:
    """Every path and method, with something in the place of each parameter; WEBSOCKET is a method here."""
    found = []
    waiting: list[tuple[str, BaseRoute]] = [("", route) for route in app.routes]
    while waiting:
        prefix, route = waiting.pop()
        inner = getattr(route, "effective_route_contexts", None)
        if inner is not None:  # of newer FastAPI: an included router, whole
            contexts = [(context.path or context.original_route.path, context) for context in inner()]
            found += [(path, method) for path, context in contexts for method in methods(context)]
            continue
        found += [(prefix + route.path, method) for method in methods(route)]  # type: ignore[attr-defined]
    return [(path.replace("{", "").replace("}", ""), method) for path, method in found]


def methods(route: Any) -> list[str]:
    return sorted(getattr(route, "methods", None) or []) or ["WEBSOCKET"]


def handshake(running: Running, path: str, headers: str = "") -> str:
    """Ask for a WebSocket -> the status line."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}\r\nSec-WebSocket-Version: 13\r\n"
            f"{headers}\r\n".encode()
        )
        return connection.recv(4096).split(b"\r\n")[0].decode()


def test_every_route_but_health_needs_a_key(locked: Running) -> None:
    found = routes(locked.app)
    assert ("/v1/audio/speech", "POST") in found
    assert ("/metrics", "GET") in found
    assert ("/openapi.json", "GET") in found
    assert ("/health/ready", "GET") in found
    assert len(found) >= 15
    wrong = ["", "wrong", KEYS[0][:-1], KEYS[0] + "x", KEYS[0].upper()]
    with locked.client() as client:
        for path, method in found:
            if method == "WEBSOCKET":
                assert " 401 " in handshake(locked, path)
                assert " 401 " in handshake(locked, path, "Authorization: Bearer wrong\r\n")
            elif path.startswith("/health/"):
                assert client.request(method, path).status_code == 200
            else:
                for key in wrong:
                    headers = {"authorization": f"Bearer {key}"} if key else {}
                    answer = client.request(method, path, headers=headers)
                    assert answer.status_code == 401, (path, method, key)
                    if method != "HEAD":
                        assert_problem(answer, 401, "invalid_api_key")
        assert_problem(client.get("/no/such/path"), 401)


@pytest.mark.parametrize("path", ["/v1/audio/speech/stream", "/v1/realtime"])
def test_a_socket_without_a_key_is_told_so(locked: Running, lines: Lines, path: str) -> None:
    with pytest.raises(InvalidStatus) as refused, connect(f"ws://127.0.0.1:{locked.port}{path}"):
        pass
    response = refused.value.response
    assert json.loads(response.body)["error"]["code"] == "invalid_api_key"
    line = lines.request()
    assert (line["status"], line["request_id"]) == (401, response.headers["x-request-id"])
    wait_until(lambda: locked.is_idle)
    assert lines.errors == []


@pytest.mark.parametrize("path", ["/v1/audio/speech/stream", "/v1/realtime"])
def test_a_socket_that_is_let_in_is_logged_as_such(locked: Running, lines: Lines, path: str) -> None:
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    with connect(f"ws://127.0.0.1:{locked.port}{path}", additional_headers=headers):
        pass
    assert lines.request()["status"] == 101


def test_a_socket_that_there_is_not_is_logged_as_refused(locked: Running, lines: Lines) -> None:
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    url = f"ws://127.0.0.1:{locked.port}/v1/nothing"
    with pytest.raises(InvalidStatus) as refused, connect(url, additional_headers=headers):
        pass
    assert lines.request()["status"] == refused.value.response.status_code
    wait_until(lambda: locked.is_idle)
    assert lines.errors == []


@pytest.mark.parametrize("prefix", ["/tts", "/health", "/health/deep"])
def test_wherever_it_is_mounted_the_same_is_open(engine: Engine, prefix: str) -> None:
    whole, settings = FastAPI(), Settings(model="small", keys=KEYS)
    whole.state.metrics = (made := create_app(engine, settings)).state.metrics
    whole.mount(prefix, made)
    with serving(engine, settings, whole) as running, running.client() as client:
        assert client.get(f"{prefix}/health/live").status_code == 200
        assert_problem(client.get(f"{prefix}/v1/audio/voices"), 401)
        assert_problem(client.get(f"{prefix}/metrics"), 401)
    with serving(engine, settings, whole) as running, running.client(KEYS[0]) as client:
        assert client.get(f"{prefix}/v1/models").status_code == 200
        assert client.put(f"{prefix}/v1/models").headers["allow"] == "GET"


@pytest.mark.parametrize("path", ["//metrics", "/health/../metrics", "/health/%2e%2e/metrics", "/healthmetrics"])
def test_no_way_around(locked: Running, path: str) -> None:
    with socket.create_connection(("127.0.0.1", locked.port), timeout=10) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b" 401 " in answer.split(b"\r\n")[0] or b" 404 " in answer.split(b"\r\n")[0]
    assert b"aloud_slots" not in answer


@pytest.mark.parametrize("key", KEYS, ids=["one", "two"])
def test_a_key_opens(locked: Running, key: str) -> None:
    with locked.client(key) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.post("/v1/audio/speech", json=asked()).status_code == 200
    basic = base64.b64encode(f"anybody:{key}".encode()).decode()
    with locked.client() as client:
        assert client.get("/", headers={"authorization": f"Basic {basic}"}).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        b"Bearer",
        b"Basic",
        b"Basic !!!",
        b"Basic " + base64.b64encode(b"\xff"),
        b"Basic \xe9",
        b"Bearer \xe9",
        b"Digest x",
        b"",
    ],
)
def test_wrong_headers(locked: Running, header: bytes) -> None:
    with locked.client() as client:
        answer = client.get("/v1/models", headers=[(b"authorization", header)])
    assert_problem(answer, 401)
    assert answer.headers["www-authenticate"].startswith("Basic")


def test_an_empty_key_opens_nothing(engine: Engine) -> None:
    with serving(engine, Settings(model="small", keys=("",))) as running, running.client() as client:
        for headers in ({}, {"authorization": "Basic Og=="}, {"authorization": "Bearer"}):
            assert_problem(client.get("/v1/models", headers=headers), 401)


def test_the_keys_of_a_file(tmp_path: Path) -> None:
    """Neither blank lines nor comments, whose letters nobody minds, are keys."""
    file = tmp_path / "keys"
    file.write_text("# keys of the café\n\none\n  # two\n\t three#3 \n#four\n", encoding="utf-8")
    assert read_keys(file) == ("one", "three#3")
    file.write_text("# one\n \n", encoding="utf-8")
    with pytest.raises(RequestError, match="There is no key"):
        read_keys(file)


def test_keys_are_compared_in_constant_time(locked: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them, wholly, whichever fits."""
    compared: list[bytes] = []

    def counted(given: bytes, key: bytes) -> bool:
        compared.append(key)
        return hmac.compare_digest(given, key)

    class Counting:
        compare_digest = staticmethod(counted)

    monkeypatch.setattr(gate, "hmac", Counting)
    with locked.client(KEYS[0]) as client:
        assert client.get("/v1/models").status_code == 200
    assert compared == [key.encode() for key in KEYS]


# --- pages of other sites --------------------------------------------------------------------------------------------


def ask(running: Running, method: str, path: str, *lines: str) -> bytes:
    """Ask with these header lines and a small form -> the answer."""
    body = b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\nHm.\r\n--x--\r\n'
    given = [f"{method} {path} HTTP/1.1", *lines, "Connection: close", "Content-Type: multipart/form-data; boundary=x"]
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall("\r\n".join([*given, f"Content-Length: {len(body)}"]).encode() + b"\r\n\r\n" + body)
        return answer_of(connection)


FOREIGN = ["http://evil.example", "http://127.0.0.1:1", "http://localhost:{port}", "https://127.0.0.1", "null", "x", "",
           "http://127.0.0.1:{port}.evil.example", "http://127.0.0.1:{port}x", "http://[::1"]  # fmt: skip
OWN = ["http://127.0.0.1:{port}", "HTTP://127.0.0.1:{port}", "https://127.0.0.1:{port}"]


@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_a_page_of_another_site_changes_nothing(server: Running, method: str, origin: str) -> None:
    """Browsers send what needs no preflight to every server that they reach, this machine's own included."""
    for path in ("/v1/sessions/one/turns", "/v1/audio/voices", "/health/live", "/nothing"):
        lines = (f"Host: 127.0.0.1:{server.port}", f"Origin: {origin.format(port=server.port)}")
        answer = ask(server, method, path, *lines)
        assert answer.startswith(b"HTTP/1.1 403 "), answer
        assert b'"code":"foreign_origin"' in answer
        assert b"access-control" not in answer.lower()


def test_its_key_does_not_help_it(locked: Running) -> None:
    """Browsers remember the password of basic authentication, and send it along."""
    basic = base64.b64encode(f"anybody:{KEYS[0]}".encode()).decode()
    lines = (f"Host: 127.0.0.1:{locked.port}", f"Authorization: Basic {basic}")
    assert ask(locked, "POST", "/v1/sessions/one/turns", *lines).startswith(b"HTTP/1.1 404 ")
    answer = ask(locked, "POST", "/v1/sessions/one/turns", *lines, "Origin: http://evil.example")
    assert answer.startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize("origin", OWN)
def test_its_own_page_may_ask(server: Running, origin: str) -> None:
    lines = (f"Host: 127.0.0.1:{server.port}", f"Origin: {origin.format(port=server.port)}")
    answer = ask(server, "POST", "/v1/sessions/one/turns", *lines)
    assert answer.startswith(b"HTTP/1.1 404 "), answer  # past the gate: there is no such session


@pytest.mark.parametrize(
    ("host", "origin", "is_own"),
    [
        ("speech.example", "https://speech.example", True),  # behind a proxy that passes Host on
        ("speech.example", "https://speech.example:443", True),
        ("speech.example:443", "https://speech.example", True),
        ("SPEECH.example", "https://speech.example", True),
        ("speech.example:80", "http://speech.example", True),
        ("speech.example:80", "https://speech.example", False),
        ("speech.example", "https://speech.example:8443", False),
        ("speech.example", "https://other.speech.example", False),
        ("[::1]:8000", "http://[::1]:8000", True),
        ("[::1]:8000", "http://[::2]:8000", False),
    ],
)
def test_ports_that_go_without_saying(server: Running, host: str, origin: str, is_own: bool) -> None:
    answer = ask(server, "POST", "/v1/sessions/one/turns", f"Host: {host}", f"Origin: {origin}")
    assert answer.startswith(b"HTTP/1.1 404 " if is_own else b"HTTP/1.1 403 "), answer


def test_two_origins_are_not_one(server: Running) -> None:
    own = f"127.0.0.1:{server.port}"
    for lines in ([f"Origin: http://{own}", "Origin: http://evil.example"], ["Origin: x", f"Origin: http://{own}"]):
        assert ask(server, "POST", "/v1/sessions/one/turns", f"Host: {own}", *lines).startswith(b"HTTP/1.1 403 ")


def test_what_changes_nothing_may_be_asked_for(server: Running) -> None:
    """A link to the page, an address opened from elsewhere: the browser keeps the answer from the other page."""
    answer = ask(server, "GET", "/v1/models", f"Host: 127.0.0.1:{server.port}", "Origin: http://evil.example")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"access-control" not in answer.lower()


@pytest.mark.parametrize("path", ["/v1/audio/speech/stream", "/v1/realtime"])
def test_sockets_of_other_sites(server: Running, path: str) -> None:
    """Browsers open them to every server, and let the page read them: `Origin` is all that tells."""
    own = f"Origin: http://127.0.0.1:{server.port}\r\n"
    assert " 403 " in handshake(server, path, own)  # the handshake's Host has no port
    assert " 403 " in handshake(server, path, "Origin: http://evil.example\r\n")
    assert " 101 " in handshake(server, path, "Origin: http://127.0.0.1\r\n")
    assert " 101 " in handshake(server, path)


@pytest.fixture(scope="module")
def local(engine: Engine) -> Iterator[Running]:
    """A server that answers to this machine's own names alone, as `aloud serve` does without keys."""
    with serving(engine, Settings(model="small", hosts=own_names("127.0.0.1"))) as running:
        yield running


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:{port}", True),
        ("localhost:{port}", True),
        ("LOCALHOST", True),
        ("[::1]:{port}", True),
        ("localhost:1", True),  # a port that something forwards
        ("evil.example", False),
        ("evil.example:{port}", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("127.0.0.1:{port}.evil.example", False),
        ("0.0.0.0:{port}", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_names_that_a_server_answers_to(local: Running, host: str, is_ours: bool) -> None:
    """A page whose name its owner makes point here is of one site with the server, to the browser."""
    for method, path in (("GET", "/v1/models"), ("GET", "/"), ("POST", "/v1/sessions/one/turns")):
        answer = ask(local, method, path, f"Host: {host.format(port=local.port)}")
        assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 404 ") if is_ours else b"HTTP/1.1 403 "), answer
        if not is_ours:
            assert b'"code":"foreign_host"' in answer
            assert b"key file" in answer
    assert ask(local, "GET", "/health/ready", f"Host: {host.format(port=local.port)}").startswith(b"HTTP/1.1 200 ")


def test_sockets_by_other_names(local: Running) -> None:
    asked_for = (
        "GET /v1/realtime HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    )
    key = base64.b64encode(bytes(16)).decode()
    for host, status in (("localhost", b" 101 "), ("evil.example", b" 403 ")):
        with socket.create_connection(("127.0.0.1", local.port), timeout=10) as connection:
            lines = f"Host: {host}\r\nOrigin: http://{host}\r\nSec-WebSocket-Key: {key}\r\n\r\n"
            connection.sendall((asked_for + lines).encode())
            assert status in connection.recv(4096).split(b"\r\n")[0]


def test_which_names_are_this_machines() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.9.1"):
        assert {"localhost", "127.0.0.1", "::1", host} == set(own_names(host))
    for host in ("0.0.0.0", "::", "192.168.1.2", "speech.example", "", "localhost.example"):
        assert own_names(host) == ()


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(engine: Engine) -> Iterator[Running]:
    """A server with small limits."""
    limits = Limits(body_bytes=100_000, read_seconds=0.5, write_seconds=1.0, lead_seconds=60.0)
    with serving(engine, Settings(model="small", limits=limits)) as running:
        yield running


@contextmanager
def connection_to(running: Running, head: str) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(f"{head}\r\nHost: 127.0.0.1\r\n\r\n".encode())
        yield connection


def head(path: str, *lines: str) -> str:
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines])


def answer_of(connection: socket.socket) -> bytes:
    """All that comes until the server ends the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


PATHS = ["/v1/audio/speech", "/v1/audio/voices", "/v1/sessions/one/turns"]
TYPES = {
    "/v1/audio/speech": "application/json",
    "/v1/audio/voices": "multipart/form-data; boundary=x",
    "/v1/sessions/one/turns": "multipart/form-data; boundary=x",
}


@pytest.mark.parametrize("path", PATHS)
def test_a_length_that_is_too_much_is_refused_unread(strict: Running, path: str) -> None:
    given = head(path, f"Content-Type: {TYPES[path]}", "Content-Length: 100001")
    with connection_to(strict, given) as connection:
        answer = answer_of(connection)  # not a byte of the body was sent
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"too_large"' in answer


@pytest.mark.parametrize("path", PATHS)
def test_a_chunked_body_is_counted(strict: Running, path: str) -> None:
    given = head(path, f"Content-Type: {TYPES[path]}", "Transfer-Encoding: chunked")
    start = (
        b'--x\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n'
        if "multipart" in TYPES[path]
        else b""
    )
    sent = 0
    with connection_to(strict, given) as connection:
        connection.settimeout(0.05)
        answer = b""
        while not answer and sent < 50_000_000:
            part = (start if sent == 0 else b"") + b"a" * 10_000
            try:
                connection.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                sent += len(part)
                answer = connection.recv(65536) if sent > 100_000 else b""
            except TimeoutError:
                continue
            except ConnectionError:
                break
    assert answer.startswith(b"HTTP/1.1 413 "), (sent, answer)
    assert sent < 2_000_000


@pytest.mark.parametrize("path", PATHS)
def test_a_writer_that_is_too_slow(strict: Running, path: str) -> None:
    given = head(path, f"Content-Type: {TYPES[path]}", "Content-Length: 1000")
    began = time.monotonic()
    with connection_to(strict, given) as connection:
        connection.sendall(b"--x\r\n" if "multipart" in TYPES[path] else b"{")
        answer = answer_of(connection)
    assert answer.startswith(b"HTTP/1.1 408 "), answer
    assert b'"code":"timeout"' in answer
    assert 0.4 < time.monotonic() - began < 5


def test_a_head_that_does_not_come(strict: Running) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/audio/speech HTTP/1.1\r\nHost: ")
        assert answer_of(connection) == b""


def test_a_reader_that_is_too_slow(strict: Running, lines: Lines) -> None:
    """Its speech ends, its slot is free, and its connection goes, though it never reads."""
    body = json.dumps(asked(input=LONG * 3, max_seconds=60, response_format="wav")).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", strict.port))
        given = head("/v1/audio/speech", "Content-Type: application/json", f"Content-Length: {len(body)}", "Host: x")
        for transport in [c.transport for c in strict.server.server_state.connections]:
            transport.set_write_buffer_limits(high=4096)
        connection.sendall(given.encode() + b"\r\n\r\n" + body)
        wait_until(lambda: strict.engine.stats().slots_used == 1)
        for held in list(strict.server.server_state.connections):
            held.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            held.transport.set_write_buffer_limits(high=4096)
        wait_until(lambda: is_idle(strict.engine), 30)
        assert lines.request()["outcome"] == "client_gone"
        assert lines.request()["audio_s"] < 59
        wait_until(lambda: not strict.server.server_state.connections, 10)


@pytest.mark.parametrize(
    ("fields", "files"),
    [
        ({f"f{number}": "x" for number in range(20)}, {}),
        ({"name": "a" * 99_000, "consent": "x"}, {}),
        ({"name": "a", "consent": "x" * 3000}, {"audio_sample": b"x"}),
        ({}, {"audio_sample": b"x", "other": b"y"}),
        ({"name": "a", "consent": "x"}, {}),
        ({"name": "a", "consent": " "}, {"audio_sample": b"x"}),
        ({"name": "a", "consent": "x", "audio_sample": "text"}, {"other": b"x"}),
    ],
    ids=["fields", "long-field", "long-consent", "files", "no-file", "no-consent", "file-as-text"],
)
def test_multipart_limits(strict: Running, fields: dict[str, str], files: dict[str, bytes]) -> None:
    with strict.client() as client:
        assert_problem(client.post("/v1/audio/voices", data=fields, files=files or {"unused": (None, "x")}), 400)


def test_a_field_over_the_part_limit(server: Running) -> None:
    with server.client() as client:
        fields = {"name": "a", "consent": "x" * 200_000}
        assert_problem(client.post("/v1/audio/voices", data=fields, files={"audio_sample": b"x"}), 400)


# --- the log ----------------------------------------------------------------------------------------------------------


def test_a_line_for_each_request_without_what_it_says(locked: Running, lines: Lines) -> None:
    private = "my-private-words"
    ids = []
    with locked.client(KEYS[0]) as client:
        for body in (asked(input=f"Say {private}."), asked(input=private, instructions=private), asked(voice="x")):
            ids.append(client.post("/v1/audio/speech", json=body).headers["x-request-id"])
        ids.append(client.get(f"/v1/models?q={private}").headers["x-request-id"])
        fields = {"name": "logged", "consent": private, "text": private}
        ids.append(client.post("/v1/audio/voices", data=fields, files={"audio_sample": b"x"}).headers["x-request-id"])
    wait_until(lambda: len(lines.requests) == 5)
    ours = "\n".join(record.getMessage() for record in lines.records if record.name.startswith("aloud"))
    assert private not in ours
    assert not any(key in lines.text for key in KEYS)
    assert [line["request_id"] for line in lines.requests] == ids
    assert [line["status"] for line in lines.requests] == [200, 200, 404, 200, 400]
    first = lines.requests[0]
    assert first["path"] == "/v1/audio/speech"
    assert first["method"] == "POST"
    assert first["outcome"] == "finished"
    assert first["format"] == "pcm"
    assert first["audio_s"] == 0.8
    assert 0 < first["first_audio_ms"] < first["ms"]


def test_a_refusal_at_the_gate_is_logged_too(locked: Running, lines: Lines) -> None:
    with locked.client("wrong") as client:
        answer = client.post("/v1/audio/speech", json=asked(input=TEXT))
    assert lines.request()["status"] == 401
    assert lines.request()["request_id"] == answer.headers["x-request-id"]


# --- the source -------------------------------------------------------------------------------------------------------


def test_nothing_that_runs_what_it_reads() -> None:
    forbidden = {"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle", "joblib"}
    for path in Path(aloud.server.__file__).parent.glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").partition(".")[0]]
            assert not forbidden & set(names), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile", "__import__", "torch.load", "np.load", "os.system"), (
                    path
                )
                assert not any(keyword.arg in ("allow_pickle", "shell") for keyword in node.keywords), path


def test_the_app_needs_no_server(engine: Engine) -> None:
    """`create_app` is a factory that leaves the engine alone."""
    before = engine.stats()
    assert create_app(engine, Settings(model="a")) is not create_app(engine, Settings(model="b"))
    assert engine.stats().accepted == before.accepted
