"""`aloud serve` that cannot start, or is stopped at once: one sentence, and no model is loaded for it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from aloud import Runtime
from aloud.checkpoint.random import write_random
from aloud.cli import _parser, main
from aloud.errors import RequestError
from aloud.server.gate import EVERYBODY
from aloud.server.serve import bind, serve
from aloud.server.sessions import EMPTY
from aloud.server.settings import Limits, Settings
from aloud.server.voices import PUBLIC
from server.running import wait_until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("starts") / "model"
    write_random(folder, "small", seed=0, dtype="float32")
    return str(folder)


def test_ctrl_c_ends_it(model: str, tmp_path: Path) -> None:
    """It says where it serves, answers to this machine's names alone, and goes without a traceback."""
    command = [sys.executable, "-m", "aloud.cli", "serve", model, "--device", "cpu", "--port", "0"]
    command += ["--allow-origin", "https://app.example/"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    printed = tmp_path / "printed"
    with printed.open("w") as file:
        running = subprocess.Popen([*command, "--max-streams", "1"], stderr=file, stdout=file, env=environment)
    try:
        wait_until(lambda: "Serving on http://127.0.0.1:" in printed.read_text() or running.poll() is not None, 60)
        url = printed.read_text().partition("Serving on ")[2].split()[0]
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            (named,) = client.get("/v1/models").json()["data"]
            assert named["id"] == Path(model).name
            assert client.get("/health/ready").json()["model"] == Path(model).name
            foreign = {"host": "speech.example"}
            assert client.get("/v1/models", headers=foreign).json()["error"]["code"] == "foreign_host"
            assert client.get("/health/live", headers=foreign).status_code == 200
            answer = client.get("/v1/models", headers={"origin": "https://app.example"})
            assert answer.headers["access-control-allow-origin"] == "https://app.example"
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 0
    finally:
        running.kill()
        running.wait()
    assert "(Ctrl-C ends it at once; SIGTERM lets what runs finish)" in printed.read_text()
    assert "Traceback" not in printed.read_text()


def wrong_start(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run `aloud serve` in this process -> the one sentence that it says."""
    capsys.readouterr()
    assert main(["serve", "nobody/no-such-model", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("aloud: ")
    assert err.count("\n") == 1
    assert "fault of the program" not in err
    return err


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes so far as to load a model has not checked enough before."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Runtime, "load", load)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--port", "99999"), "There is no port 99999"),
        (("--port", "-1"), "There is no port -1"),
        (("--api-key-file", "{folder}/missing"), "missing: No such file"),
        (("--api-key-file", "{folder}"), "Is a directory"),
        (("--api-key-file", "{folder}/binary"), "not text"),
        (("--api-key-file", "{folder}/empty"), "no key"),
        (("--voices", "{folder}/empty"), "--voices is a folder, and"),
        (("--sessions", "{folder}/empty"), "--sessions is a folder, and"),
        (("--voices", "{folder}/empty/below"), "Not a directory"),
        (("--alias", "alloy=../anna"), "--alias alloy: a voice's name"),
        (("--allow-origin", "*"), "A site is named as https://app.example"),
        (("--max-streams", "0"), "--max-streams is 1 or more"),
        (("--max-streams", "-3"), "--max-streams is 1 or more"),
        (("--max-waiting", "-1"), "--max-waiting is 0 or more"),
        (("--drain-seconds", "nan"), "--drain-seconds is from 0"),
        (("--drain-seconds", "-1"), "--drain-seconds is from 0"),
        (("--host", "300.1.2.3"), "300.1.2.3 port 8000 cannot be had"),
        (("--host", "a..b"), "a..b port 8000 cannot be had"),
    ],
)
def test_wrong_starts(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, before a model is loaded."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("\n")
    assert said in wrong_start(capsys, *(argument.format(folder=tmp_path) for argument in arguments))


@pytest.mark.usefixtures("no_model")
def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1 port {port} cannot be had" in wrong_start(capsys, "--port", str(port))
    (made,) = bind("127.0.0.1", port)  # and one that is free again can be had at once
    made.close()


def test_health_is_answered_while_the_model_is_loaded(caplog: pytest.LogCaptureFixture) -> None:
    """And so is everything else, with when to come again; what goes wrong with loading is raised in the end."""
    is_asked, ended = threading.Event(), []

    def load() -> Runtime:
        is_asked.wait(30)
        raise RequestError("There is no such model.")

    (bound,) = bind("127.0.0.1", 0)
    port = bound.getsockname()[1]

    def run() -> None:
        try:
            settings = Settings(model="small", keys=("a/b",), origins=("https://app.example",))
            serve(load, settings, [bound], drain_seconds=1, max_waiting=1)
        except RequestError as error:
            ended.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            assert client.get("/health/live").json() == {"status": "alive"}
            for path in ("/health/ready", "/v1/models", "/nowhere"):
                answer = client.get(path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "warming")
                assert answer.headers["retry-after"] == "5"
            answer = client.get("/v1/models", headers={"origin": "https://app.example"})
            assert answer.headers["access-control-allow-origin"] == "https://app.example"
            assert "access-control-allow-origin" not in client.get("/v1/models", headers={"origin": "x"}).headers
        with pytest.raises(InvalidStatus) as refused, connect(f"ws://127.0.0.1:{port}/v1/realtime"):
            pass
        assert refused.value.response.status_code == 503
    finally:
        is_asked.set()
        thread.join(30)
    assert ended == ["There is no such model."]
    assert "Pages cannot send every key with a WebSocket" in caplog.text


SLOW = """
import time
from aloud.server.serve import bind, serve
from aloud.server.settings import Settings
sockets = bind("127.0.0.1", 0)
print(sockets[0].getsockname()[1], flush=True)
serve(lambda: time.sleep(60), Settings(model="slow"), sockets, drain_seconds=60, max_waiting=1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_while_the_model_is_loaded(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        url = f"http://127.0.0.1:{running.stdout.readline().strip()}"
        try:
            with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
                assert client.get("/health/live").status_code == 200
            running.send_signal(number)
            assert running.wait(10) == -number
        finally:
            running.kill()


def test_the_readme_says_what_serving_does() -> None:
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split())
    assert f"sent at most {Limits().lead_seconds:g} s ahead of being played" in readme
    assert f"`PUT` `{json.dumps(EMPTY)}` begins one" in readme
    assert f"`voices/{PUBLIC}/NAME` is everybody's" in readme
    assert f"`voices/{EVERYBODY}` without keys" in readme


def test_aliases_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    parsed = _parser().parse_args(["serve", "--alias", "alloy=anna", "--alias", "nova=7"])
    assert parsed.alias == [("alloy", "anna"), ("nova", 7)]
    for wrong in ("alloy", "=anna", "alloy=", "alloy=1000", "alloy=٣"):
        with pytest.raises(SystemExit):
            _parser().parse_args(["serve", "--alias", wrong])
        assert "argument --alias: " in capsys.readouterr().err


def test_an_existing_folder_is_used_and_a_new_one_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise RequestError("So far so good.")

    monkeypatch.setattr(Runtime, "load", load)
    for _ in range(2):
        said = wrong_start(capsys, "--port", "0", "--voices", str(tmp_path / "new" / "voices"), "--max-streams", "1")
        assert said == "aloud: So far so good.\n"
        assert (tmp_path / "new" / "voices").is_dir()
