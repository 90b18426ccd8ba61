"""Listeners: many requests for speech over HTTP, each on a connection of its own, and what each of them heard and when.

Run as a program in a process of its own, so that it takes none of the server's interpreter: a plan comes as JSON on
standard input, and what was heard goes as JSON to standard output. It needs nothing but Python.

    {"port": 8000, "requests": [{"at": 0.0, "body": {...}}, ...], "bytes_per_second": 48000, ...}    see `Plan`, `Ask`
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ask:
    """A request."""

    at: float  # when it is due, in seconds since the beginning
    body: dict[str, Any]
    leave_after_bytes: int | None = None  # of audio
    leave_after_seconds: float | None = None  # since it was due


@dataclass(frozen=True)
class Plan:
    """Requests, and how to listen."""

    port: int
    requests: list[Ask]
    bytes_per_second: float  # of audio as it is played
    host: str = "127.0.0.1"
    path: str = "/v1/audio/speech"
    headers: dict[str, str] = field(default_factory=dict)
    keeps_audio: bool = False
    most_seconds: float = 120.0  # from the beginning; who has no answer by then gives up
    hears_until: float | None = None  # from then on whoever has heard its first audio leaves


@dataclass
class Heard:
    """What came of a request; times in seconds since it was due."""

    status: int | None = None  # None: no answer
    headers: dict[str, str] = field(default_factory=dict)
    asked_seconds: float | None = None  # until it was sent: what the client itself was late
    first_audio_seconds: float | None = None
    seconds: float = 0.0  # until it was over
    bytes: int = 0
    underrun_seconds: float = 0.0  # a player that begins with the first audio had nothing to play
    is_whole: bool = False  # the answer came to its end
    left: bool = False  # by the listener's own will
    text: str = ""  # of an answer that is no speech
    audio: str = ""  # in base64, where it is kept


class Listener(asyncio.Protocol):
    """One request and its answer."""

    def __init__(self, plan: Plan, ask: Ask, due: float) -> None:
        """Due at a time of `time.monotonic`."""
        self.heard = Heard()
        self._plan = plan
        self._ask = ask
        self._due = due
        self._buffer = bytearray()
        self._audio = bytearray()
        self._length: int | None = None  # of a body with Content-Length
        self._first = 0.0
        self._is_leaving = False  # as soon as something has been heard
        self._is_over = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        body = json.dumps(self._ask.body).encode()
        head = [f"POST {self._plan.path} HTTP/1.1", f"Host: {self._plan.host}:{self._plan.port}"]
        head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        head += [f"{name}: {value}" for name, value in self._plan.headers.items()]
        transport.write("\r\n".join([*head, "", ""]).encode() + body)
        self.heard.asked_seconds = time.monotonic() - self._due

    def data_received(self, data: bytes) -> None:
        """Read on."""
        self._buffer += data
        if self.heard.status is None and not self._read_head():
            return
        if self._length is not None:
            if len(self._buffer) >= self._length:
                self._part(bytes(self._buffer[: self._length]))
                self._end(is_whole=True)
            return
        while not self._is_over.done():
            end = self._buffer.find(b"\r\n")
            if end < 0:
                return
            size = int(self._buffer[:end].partition(b";")[0], 16)
            if len(self._buffer) < end + 2 + size + 2:
                return
            part = bytes(self._buffer[end + 2 : end + 2 + size])
            del self._buffer[: end + 2 + size + 2]
            if size:
                self._part(part)
            else:
                self._end(is_whole=True)

    def connection_lost(self, error: Exception | None) -> None:
        """The server has closed it, or this side has."""
        self._end(is_whole=False)

    def leave(self) -> None:
        """Hear no more."""
        if not self._is_over.done():
            self.heard.left = True
            self._end(is_whole=False)

    async def listen(self) -> None:
        """Until it is over, or it is time to leave."""
        limit, until = self._plan.most_seconds - self._ask.at, self._plan.hears_until
        if self._ask.leave_after_seconds is not None:
            limit = min(limit, self._ask.leave_after_seconds)
        if until is not None and not await self._over_by(min(limit, until - self._ask.at)):
            self._is_leaving = True
        has_heard = self.heard.first_audio_seconds is not None
        if (self._is_leaving and has_heard) or not await self._over_by(limit):
            self.leave()

    async def _over_by(self, seconds: float) -> bool:
        """Wait until it is over, for so long since it was due -> whether it is."""
        await asyncio.wait({self._is_over}, timeout=max(0.0, self._due + seconds - time.monotonic()))
        return self._is_over.done()

    def _read_head(self) -> bool:
        head, gap, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        if not gap:
            return False
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        self.heard.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self.heard.status = int(first.split()[1])
        if "content-length" in self.heard.headers:
            self._length = int(self.heard.headers["content-length"])
        self._buffer = bytearray(rest)
        return True

    def _part(self, data: bytes) -> None:
        heard, now = self.heard, time.monotonic()
        if heard.status != 200:
            heard.text += data.decode(errors="replace")
            return
        if heard.first_audio_seconds is None:
            self._first = now
            heard.first_audio_seconds = now - self._due
        played = heard.bytes / self._plan.bytes_per_second
        heard.underrun_seconds += max(0.0, now - self._first - played - heard.underrun_seconds)
        heard.bytes += len(data)
        if self._plan.keeps_audio:
            self._audio += data
        most = self._ask.leave_after_bytes
        if self._is_leaving or (most is not None and heard.bytes >= most):
            self.leave()

    def _end(self, *, is_whole: bool) -> None:
        if self._is_over.done():
            return
        self.heard.is_whole = is_whole
        self.heard.seconds = time.monotonic() - self._due
        self.heard.audio = base64.b64encode(self._audio).decode()
        self._is_over.set_result(None)
        if self._transport is not None:
            self._transport.abort() if self.heard.left else self._transport.close()


async def listen_to_all(plan: Plan) -> list[Heard]:
    """Ask when each is due -> what was heard, in the order of the requests."""
    event_loop = asyncio.get_running_loop()
    begin = time.monotonic()

    async def one(ask: Ask) -> Heard:
        await asyncio.sleep(max(0.0, begin + ask.at - time.monotonic()))
        listener = Listener(plan, ask, begin + ask.at)
        try:
            await event_loop.create_connection(lambda: listener, plan.host, plan.port)
        except OSError as error:
            listener.heard.text = type(error).__name__
            return listener.heard
        await listener.listen()
        return listener.heard

    return list(await asyncio.gather(*map(one, plan.requests)))


def main() -> None:
    """Carry out the plan on standard input."""
    given = json.load(sys.stdin)
    plan = Plan(**{**given, "requests": [Ask(**ask) for ask in given["requests"]]})
    heard = asyncio.run(listen_to_all(plan))
    json.dump({"cpu_seconds": time.process_time(), "heard": [asdict(one) for one in heard]}, sys.stdout)


if __name__ == "__main__":
    main()
