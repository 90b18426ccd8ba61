"""A page of another site, in headless Chromium, which is who enforces what such pages may."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")

from playwright.sync_api import Browser, Page

from aloud import Engine
from aloud.server.settings import Settings
from server.running import Running, asked, serving

KEY = "sk-of-the-page"

SPEAK = """async ([url, key, body]) => {
  const headers = { authorization: `Bearer ${key}`, "content-type": "application/json", "x-stainless-lang": "js" };
  const answer = await fetch(`${url}/v1/audio/speech`, { method: "POST", headers, body: JSON.stringify(body) });
  const bytes = new Uint8Array(await answer.arrayBuffer());
  return { seed: answer.headers.get("x-aloud-seed"), audio: btoa(String.fromCharCode(...bytes)) };
}"""
# What OpenAI's clients do in browsers; the first thing that comes, or why nothing does.
OPEN_SOCKET = """([url, name, key, first]) => new Promise(resolve => {
  const socket = new WebSocket(url, [name, `openai-insecure-api-key.${key}`]);
  socket.onopen = () => first && socket.send(first);
  socket.onmessage = ({ data }) => resolve([socket.protocol, JSON.parse(data).type]);
  socket.onclose = () => resolve(["", "closed"]);
})"""
SOCKETS = {
    "aloud": ("/v1/audio/speech/stream", '{"type": "session.config"}', "session.configured"),
    "realtime": ("/v1/realtime?model=small", "", "session.created"),
}


class Blank(BaseHTTPRequestHandler):
    """A page with nothing on it."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>Another site</title>")

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


@pytest.fixture(scope="module")
def sites() -> Iterator[list[str]]:
    """Two other sites, as browsers see it."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Blank) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [f"http://localhost:{server.server_port}" for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def guarded(engine: Engine, sites: list[str]) -> Iterator[Running]:
    """A server with a key, where the first of the sites may ask."""
    with serving(engine, Settings(model="small", keys=(KEY,), origins=(sites[0],))) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.new_context() as visit:
        yield visit.new_page()


def test_a_site_that_is_named_speaks(page: Page, sites: list[str], guarded: Running) -> None:
    page.goto(sites[0])
    heard = page.evaluate(SPEAK, [guarded.url, KEY, asked()])
    with guarded.client(KEY) as client:
        assert base64.b64decode(heard["audio"]) == client.post("/v1/audio/speech", json=asked()).content
    assert heard["seed"] == "7"


def test_another_does_not(page: Page, sites: list[str], guarded: Running) -> None:
    page.goto(sites[1])
    with pytest.raises(Exception, match="Failed to fetch"):
        page.evaluate(SPEAK, [guarded.url, KEY, asked()])


@pytest.mark.parametrize("name", SOCKETS)
def test_sockets(page: Page, sites: list[str], guarded: Running, name: str) -> None:
    path, first, answer = SOCKETS[name]
    url = guarded.url.replace("http", "ws") + path
    page.goto(sites[0])
    assert page.evaluate(OPEN_SOCKET, [url, name, KEY, first]) == [name, answer]
    assert page.evaluate(OPEN_SOCKET, [url, name, KEY + "x", first]) == ["", "closed"]
    page.goto(sites[1])
    assert page.evaluate(OPEN_SOCKET, [url, name, KEY, first]) == ["", "closed"]
