"""The Ray Serve application of deploy/, on a small cluster of this machine's."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from aloud.checkpoint.random import write_random
from oracle.csm import speech_like
from server.running import wait_until, wav

ray = pytest.importorskip("ray", reason="needs ray[serve]")
serve = pytest.importorskip("ray.serve", reason="needs ray[serve]")
httpx = pytest.importorskip("httpx")
psutil = pytest.importorskip("psutil")

DEPLOY = Path(__file__).parents[2] / "deploy"


def ray_serve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ray_serve", DEPLOY / "ray_serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ray_serve"] = module
    spec.loader.exec_module(module)
    return module


def test_a_replica_takes_as_many_requests_as_it_has_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    deployment = serve.deployment

    def kept(**arguments: Any) -> Any:
        given.update(arguments)
        return deployment(**arguments)

    monkeypatch.setattr(serve, "deployment", kept)
    ray_serve().app({"max_streams": "8", "gpus": "0"})
    assert given["max_ongoing_requests"] == 8
    assert given["autoscaling_config"].target_ongoing_requests <= 8


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An HTTP client of two replicas."""
    # On a busy machine a proxy takes longer to start than the 5 s after which Ray would kill it.
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    for folder in ("model", "voices", "sessions"):
        (tmp_path / folder).mkdir()
    write_random(tmp_path / "model", "small", seed=1, dtype="float32")
    module = ray_serve()
    ray.cloudpickle.register_pickle_by_value(module)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    try:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        folders = {name: str(tmp_path / name) for name in ("model", "voices", "sessions")}
        replicas = {"min_replicas": "2", "max_replicas": "2", "max_streams": "4", "device": "cpu", "gpus": "0"}
        serve.run(module.app(folders | replicas))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            yield client
    finally:
        serve.shutdown()
        ray.shutdown()


def speak(client: Any, session_id: str, text: str) -> bytes:
    """What a session says next, in Ann's voice."""
    body = {"input": text, "session_id": session_id, "voice": "ann", "seed": 1}
    answer = client.post(
        "/v1/audio/speech",
        json=body | {"response_format": "pcm", "max_seconds": 0.4},
        headers={"x-session-id": session_id},
    )
    assert answer.status_code == 200, answer.text
    return bytes(answer.content)


def replicas() -> list[Any]:
    """The processes of this cluster's replicas; each was started with the folder that is this cluster's own."""
    own, found = ray._private.worker._global_node.get_session_dir_path(), []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            parent = process.parent()
            is_own = parent is not None and any(own in part for part in parent.cmdline())
            if is_own and process.name().startswith("ray::ServeRepl"):
                found.append(process)
    return found


def test_a_session_goes_on_when_its_replica_is_killed(client: Any, seed: int) -> None:
    """Whichever it was: both are killed, one after the other, the second once there is a third."""
    sample = {"audio_sample": wav(speech_like(0.5, seed))}
    assert client.post("/v1/audio/voices", data={"name": "ann", "consent": "Yes."}, files=sample).status_code == 201
    for number in range(4):
        speak(client, "one", f"Turn {number}.")
    kept = client.get("/v1/sessions/one").json()
    assert (kept["voice"], len(kept["turns"])) == ("ann", 4)
    client.put("/v1/sessions/other", json=kept)
    expected = [speak(client, "other", text) for text in ("And on.", "And on again.")]
    assert expected[0] != expected[1]

    for process, text, said in zip(replicas(), ("And on.", "And on again."), expected, strict=True):
        process.kill()
        process.wait(10)
        assert speak(client, "one", text) == said
        wait_until(lambda: len(replicas()) == 2, 60)
