"""The same arrivals over HTTP: `aloud serve` in a process of its own, listeners in another, loopback between them.

Each request is a connection of its own that asks for pcm and is read as it comes. First audio is counted at the
listener, from when the request was due until its first bytes of sound: beside the engine's own, it is what HTTP costs.
An underrun is what a player hears that begins with the first bytes: it has played all, and the next are not there. Half
of the time nobody new comes: then whoever is still listening leaves.

The listeners' own lateness is in the report, too: where it is not small, it is their machine that is too busy.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import soundfile

from aloud import Segment, open_files

from .arrivals import FRAME_RATE, letters, percentiles_ms, poisson, speech_frames, speech_seconds, text_of
from .http_client import Ask, Plan
from .report import Column, table

SAMPLE_RATE = 24_000
BYTES_PER_SECOND = 2.0 * SAMPLE_RATE  # of pcm
VOICE = "bench"
START_SECONDS = 200.0
"""The longest that a server may take to load and capture."""
ANSWER_SECONDS = 60.0
"""The longest to wait for an answer after the last request was due."""
MAX_WAITING = 4096
"""As many may wait in the engine's own measurement."""
WARM_FRAMES = 25
FILES = 8192
"""Open files that thousands of listeners need."""
COLUMNS = (
    Column("rate", "1/s", "g"),
    Column("requests"),
    Column("refused"),
    Column("failed"),
    Column("p50_ms", "ms", ".1f"),
    Column("p95_ms", "ms", ".1f"),
    Column("p99_ms", "ms", ".1f"),
    Column("max_ms", "ms", ".1f"),
    Column("engine_p50_ms", "ms", ".1f"),
    Column("engine_p99_ms", "ms", ".1f"),
    Column("underruns"),
    Column("underrun_max_ms", "ms", ".1f"),
    Column("server_cores", "", ".2f"),
    Column("asked_late_ms", "ms", ".1f"),
)


class NoServer(Exception):
    """It cannot be measured; one sentence says why."""


def measure(
    folder: Path,
    parsed: argparse.Namespace,
    voice: Segment,
    slots: int,
    max_positions: int,
    engine: Mapping[float, Mapping[str, Any]],
    rows: list[dict[str, Any]],
) -> None:
    """Serve a checkpoint's folder, and print a table of the rows it adds to `rows`; a sentence where it cannot.

    engine: for each rate of arrivals, the engine's own row.
    """
    print("starting the server", file=sys.stderr)
    title = "the same arrivals over HTTP, from when a request was due to its listener's first bytes of sound"
    with table(COLUMNS, rows, title):
        try:
            with serving(folder, parsed.device, parsed.dtype, slots, max_positions) as server:
                server.add_voice(voice)
                server.say_once()
                for rate, own in engine.items():
                    print(f"measuring {rate:g} requests a second over HTTP", file=sys.stderr)
                    rows.append(serve_arrivals(server, rate, parsed.seconds, parsed.seed, own))
        except NoServer as error:
            print(f"not measured over HTTP: {error}")


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def ask(self, method: str, path: str, body: bytes | None = None, content_type: str = "") -> tuple[int, bytes]:
        """One request -> status and body. Raises `NoServer` when there is no answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        try:
            connection.request(method, path, body, {"Content-Type": content_type} if body is not None else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        except OSError as error:
            raise NoServer(self.last_words() or f"the server does not answer, {type(error).__name__}.") from error
        finally:
            connection.close()

    def add_voice(self, segment: Segment) -> None:
        """Register the voice that everybody asks for."""
        sound = io.BytesIO()
        soundfile.write(sound, segment.audio, SAMPLE_RATE, format="WAV")
        fields = {"name": VOICE.encode(), "consent": b"It is noise.", "text": segment.text.encode()}
        parts = [form_part(f'name="{name}"', value) for name, value in fields.items()]
        parts.append(form_part('name="audio_sample"; filename="voice.wav"', sound.getvalue()))
        body = b"".join(parts) + b"--part--\r\n"
        self._must(201, *self.ask("POST", "/v1/audio/voices", body, "multipart/form-data; boundary=part"))

    def say_once(self) -> None:
        """One request, after which the voice is read, every module loaded, and what a frame costs is known."""
        body = json.dumps(speech(text_of(40), WARM_FRAMES, 0)).encode()
        self._must(200, *self.ask("POST", "/v1/audio/speech", body, "application/json"))

    def wait_until_silent(self) -> None:
        """Until every answer is over."""
        end = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < end:
            _, text = self.ask("GET", "/metrics")
            if b"\naloud_requests_speaking 0.0\n" in text and b"\naloud_streams_running 0.0\n" in text:
                return
            time.sleep(0.05)
        raise NoServer("the server goes on although nobody listens.")

    def cpu_seconds(self) -> float | None:
        """Of the server's process; None where the system does not say."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def last_words(self) -> str:
        """What it ended with, if it has ended."""
        if self.process.poll() is None:
            return ""
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["the server ended without a word."]
        return next((line for line in reversed(lines) if line.startswith("aloud: ")), lines[-1]).removeprefix("aloud: ")

    def _must(self, expected: int, status: int, body: bytes) -> None:
        if status != expected:
            raise NoServer(f"the server answered {status}: {body[:300].decode(errors='replace')}")


@contextmanager
def serving(folder: Path, device: str, dtype: str, slots: int, max_positions: int) -> Iterator[Server]:
    """`aloud serve` on a free port, ready, until the block ends. Raises `NoServer`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    open_files.allow(FILES)
    command = [sys.executable, "-m", "aloud.cli", "serve", str(folder), "--port", str(port)]
    command += ["--device", device, "--dtype", dtype, "--max-waiting", str(MAX_WAITING)]
    command += ["--max-streams", str(slots), "--max-positions", str(max_positions)]
    with tempfile.TemporaryDirectory() as temporary:
        log = Path(temporary) / "log"
        with log.open("w") as file:
            server = Server(port, start(command, file), log)
        try:
            wait_until_ready(server)
            yield server
        finally:
            server.process.kill()
            server.process.wait()


def start(command: list[str], log: TextIO) -> subprocess.Popen[bytes]:
    """Start a process that writes into a file."""
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def wait_until_ready(server: Server) -> None:
    """Until new work is taken. Raises `NoServer` when the process ends instead."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise NoServer(server.last_words())
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        try:
            connection.request("GET", "/health/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass  # not yet
        finally:
            connection.close()
        time.sleep(0.1)
    raise NoServer(f"the server was not ready after {START_SECONDS:g} s.")


def form_part(disposition: str, content: bytes) -> bytes:
    """A part of a form, behind the boundary `part`."""
    return f"--part\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode() + content + b"\r\n"


def speech(text: str, frames: int, seed: int) -> dict[str, Any]:
    """A request's body."""
    return {
        "input": text,
        "voice": VOICE,
        "response_format": "pcm",
        "seed": seed,
        "max_seconds": frames / FRAME_RATE,
    }


def serve_arrivals(server: Server, rate: float, seconds: float, seed: int, own: Mapping[str, Any]) -> dict[str, Any]:
    """Ask as the engine was asked, and listen for as long again after the last could come -> the table's row."""
    times = poisson(rate, seconds, seed)
    lengths = letters(len(times), seed)
    asks = [
        Ask(at, speech(text_of(int(length)), speech_frames(int(length)), number))
        for number, (at, length) in enumerate(zip(times, lengths, strict=True))
    ]
    plan = Plan(server.port, asks, BYTES_PER_SECOND, most_seconds=seconds + ANSWER_SECONDS, hears_until=2 * seconds)
    server.wait_until_silent()
    begin, cpu = time.monotonic(), server.cpu_seconds()
    answer = listen(plan)
    elapsed, after = time.monotonic() - begin, server.cpu_seconds()
    heard = answer["heard"]
    spoken = [one for one in heard if one["first_audio_seconds"] is not None]
    refused = [one for one in heard if one["status"] == 429 and int(one["headers"]["retry-after"]) >= 1]
    cut = [one for one in spoken if not one["is_whole"] and not one["left"]]
    underruns = [one["underrun_seconds"] for one in spoken if one["underrun_seconds"] > 0]
    return {
        "rate": rate,
        "requests": len(heard),
        "refused": len(refused),
        "failed": len(heard) - len(refused) - len(spoken) + len(cut),
        "speech_seconds": speech_seconds(lengths),
        **percentiles_ms([one["first_audio_seconds"] for one in spoken]),
        "engine_p50_ms": own["p50_ms"],
        "engine_p99_ms": own["p99_ms"],
        "underruns": len(underruns),
        "underrun_max_ms": 1e3 * max(underruns, default=0.0),
        "audio_seconds": sum(one["bytes"] for one in spoken) / BYTES_PER_SECOND,
        "seconds": elapsed,
        "server_cpu_seconds": None if cpu is None or after is None else after - cpu,
        "server_cores": None if cpu is None or after is None else (after - cpu) / elapsed,
        "listeners_cpu_seconds": answer["cpu_seconds"],
        "asked_late_ms": 1e3 * max((one["asked_seconds"] or 0.0 for one in heard), default=0.0),
    }


def listen(plan: Plan) -> dict[str, Any]:
    """Carry out a plan in a process of its own."""
    # By its path and without what surrounds it: it starts at once, and this folder's names do not hide Python's own.
    command = [sys.executable, "-I", str(Path(__file__).with_name("http_client.py"))]
    done = subprocess.run(command, input=json.dumps(asdict(plan)).encode(), stdout=subprocess.PIPE)
    if done.returncode:
        raise NoServer(f"the listeners ended with status {done.returncode}.")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
