"""Pages of other sites: what they may ask where `--allow-origin` names theirs, and what others may not."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterator

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from aloud import Engine
from aloud.errors import RequestError
from aloud.server.settings import Settings, read_origin
from server.running import Running, asked, assert_problem, serving

KEY = "key-" + secrets.token_hex(8)
SITE, OTHER = "https://app.example", "https://other.example"
SOCKETS = ("/v1/audio/speech/stream", "/v1/realtime")


@pytest.fixture(scope="module")
def locked(engine: Engine) -> Iterator[Running]:
    """A server with a key, whose page elsewhere may ask."""
    with serving(engine, Settings(model="small", keys=(KEY,), origins=(SITE, "http://localhost:3000"))) as running:
        yield running


def preflight(client: httpx.Client, origin: str, method: str = "POST", **headers: str) -> httpx.Response:
    """What a browser asks before a page's request, without any key."""
    asked_for = {"origin": origin, "access-control-request-method": method} | headers
    return client.options("/v1/audio/speech", headers=asked_for)


@pytest.mark.parametrize("origin", [SITE, "http://localhost:3000"])
def test_the_page_may_ask(locked: Running, origin: str) -> None:
    with locked.client() as client:
        # All that OpenAI's client sends; and Chromium, of servers in a private network.
        for method in ("GET", "POST", "PUT", "DELETE"):
            answer = preflight(
                client,
                origin,
                method,
                **{
                    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
                    "access-control-request-private-network": "true",
                },
            )
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == origin
            assert method in answer.headers["access-control-allow-methods"].split(", ")
            assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
            assert answer.headers["access-control-allow-private-network"] == "true"
            assert "access-control-allow-credentials" not in answer.headers
    with locked.client(KEY) as client:
        answer = client.post("/v1/audio/speech", json=asked(), headers={"origin": origin})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "Origin" in answer.headers["vary"]
        shown = answer.headers["access-control-expose-headers"]
        assert {"x-aloud-seed", "x-request-id"} <= set(shown.split(", ")) & set(answer.headers)


def test_the_page_can_read_what_went_wrong(locked: Running) -> None:
    with locked.client() as client:
        answer = client.post("/v1/audio/speech", json=asked(), headers={"origin": SITE})
        assert_problem(answer, 401)
        assert answer.headers["access-control-allow-origin"] == SITE
    with locked.client(KEY) as client:
        answer = client.post("/v1/audio/speech", json=asked(voice="nobody"), headers={"origin": SITE})
        assert_problem(answer, 404)
        assert answer.headers["access-control-allow-origin"] == SITE


def test_a_password_that_the_browser_remembers_is_not_the_pages_to_use(locked: Running) -> None:
    """It is sent with what needs no preflight, if the page asks for it, and with WebSockets of the same site."""
    basic = {"authorization": "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()}
    form = {"text": (None, "Hm.")}
    with locked.client() as client:
        path = "/v1/sessions/one/turns"
        assert_problem(client.post(path, files=form, headers=basic), 404)  # past the gate: there is no such session
        assert_problem(client.post(path, files=form, headers=basic | {"origin": locked.url}), 404)
        assert_problem(client.post(path, files=form, headers=basic | {"origin": SITE}), 401)
        bearer = {"authorization": f"Bearer {KEY}"}
        assert_problem(client.post(path, files=form, headers=bearer | {"origin": SITE}), 404)
    for path in SOCKETS:
        url = locked.url.replace("http", "ws") + path
        with pytest.raises(InvalidStatus) as refused, connect(url, origin=SITE, additional_headers=basic):
            pass
        assert refused.value.response.status_code == 401
        with connect(url, origin=locked.url, additional_headers=basic):
            pass


@pytest.mark.parametrize("origin", [OTHER, "null", "http://app.example", "https://app.example:8443", SITE + ".evil"])
def test_others_may_not(locked: Running, origin: str) -> None:
    with locked.client(KEY) as client:
        answer = preflight(client, origin)
        assert "--allow-origin" in assert_problem(answer, 403, "foreign_origin")
        assert "access-control-allow-origin" not in answer.headers
        answer = client.post("/v1/audio/speech", json=asked(), headers={"origin": origin})
        assert_problem(answer, 403, "foreign_origin")
        assert "access-control-allow-origin" not in answer.headers
        # Nothing is changed by it, and the browser keeps it from the page.
        answer = client.get("/v1/models", headers={"origin": origin})
        assert "access-control-allow-origin" not in answer.headers


def test_one_that_is_allowed_does_not_cover_for_another(locked: Running) -> None:
    with locked.client(KEY) as client:
        answer = client.post("/v1/audio/speech", json=asked(), headers=[("origin", SITE), ("origin", OTHER)])
        assert_problem(answer, 403, "foreign_origin")


def test_without_the_option_nothing_is_said_of_it(server: Running) -> None:
    with server.client() as client:
        assert_problem(preflight(client, SITE), 403, "foreign_origin")
        answer = client.get("/v1/models", headers={"origin": SITE})
        assert not any(name.startswith("access-control") or name == "vary" for name in answer.headers)


@pytest.mark.parametrize("path", SOCKETS)
def test_its_sockets_bring_the_key_among_the_subprotocols(locked: Running, path: str) -> None:
    """A page cannot send headers with them; browsers want one of the subprotocols to be chosen."""
    url, name = locked.url.replace("http", "ws") + path, "realtime" if "realtime" in path else "aloud"
    with connect(url, origin=SITE, subprotocols=[name, f"openai-insecure-api-key.{KEY}"]) as socket:
        assert socket.subprotocol == name
    for origin, key, status in ((OTHER, KEY, 403), (SITE, KEY + "x", 401), (SITE, "", 401)):
        with (
            pytest.raises(InvalidStatus) as refused,
            connect(url, origin=origin, subprotocols=[name, f"openai-insecure-api-key.{key}"]),
        ):
            pass
        assert refused.value.response.status_code == status


@pytest.mark.parametrize("path", SOCKETS)
def test_the_key_that_the_page_sends_is_the_one(locked: Running, path: str) -> None:
    """Whatever the browser, or a proxy, sends beside it."""
    url, stale = locked.url.replace("http", "ws") + path, base64.b64encode(b"me:another-key").decode()
    beside = {"authorization": f"Basic {stale}"}
    for origin in (SITE, locked.url):
        with connect(
            url, origin=origin, subprotocols=[f"openai-insecure-api-key.{KEY}"], additional_headers=beside
        ) as socket:
            assert socket.subprotocol is None


def test_keys_among_the_subprotocols_open_sockets_alone(locked: Running) -> None:
    with locked.client() as client:
        headers = {"sec-websocket-protocol": f"aloud, openai-insecure-api-key.{KEY}"}
        assert_problem(client.get("/v1/models", headers=headers), 401)


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("https://app.example", "https://app.example"),
        (" HTTPS://App.Example/ ", "https://app.example"),
        ("https://app.example:443", "https://app.example"),
        ("http://app.example:443", "http://app.example:443"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("http://[0:0::1]:3000", "http://[::1]:3000"),
        ("http://127.0.0.1:080/", "http://127.0.0.1"),
        ("http://studio", "http://studio"),
        ("https://xn--bcher-kva.example", "https://xn--bcher-kva.example"),
    ],
)
def test_sites_are_named_as_browsers_name_them(given: str, origin: str) -> None:
    assert read_origin(given) == origin


@pytest.mark.parametrize(
    "given",
    ["*", "null", "", "app.example", "https://", "https://*.example", "ftp://app.example", "https://app.example/page",
     "https://me@app.example", "https://app.example:port", "https://app.example?a", "https://[::1", "https://bücher.de",
     "http://127.1", "http://300.1.1.1", "http://[::x]", "http://...", "http://ap\np.example", "http://a.example:0",
     "http://a.example:65536", "http://a.example:"],
)  # fmt: skip
def test_what_is_no_site_is_a_sentence(given: str) -> None:
    with pytest.raises(RequestError, match=r"A site is named as https://app\.example"):
        read_origin(given)
