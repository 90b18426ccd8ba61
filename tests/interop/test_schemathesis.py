"""schemathesis over the OpenAPI description: what it says is what the server does, and nothing breaks or grows."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aloud import Engine
from aloud.server.settings import Settings
from server.running import Lines, Running, is_idle, logged, serving, wait_until

psutil = pytest.importorskip("psutil")
pytest.importorskip("schemathesis")

FOLDER = Path(__file__).parent
KEY = "a-key-of-the-test"
EXAMPLES = 8  # of each operation and phase
GROWTH_BYTES = 20_000_000  # of a round that repeats one before
MUST_ANSWER = {
    ("POST", "/v1/audio/speech", 200),
    ("POST", "/v1/audio/voices", 201),
    ("PUT", "/v1/sessions/", 200),
    ("DELETE", "/v1/audio/voices/", 200),
}
"""Without these, whatever passes says little."""


@pytest.fixture
def locked(engine: Engine) -> Iterator[Running]:
    with serving(engine, Settings(model="small", keys=(KEY,))) as running:
        yield running


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What is logged during a test."""
    with logged() as lines:
        yield lines


def run(running: Running, seed: int, folder: Path) -> str:
    """One round, in a process of its own -> what it prints, which is everything that is wrong."""
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(FOLDER / "schemathesis.toml"), "run"]
    command += [f"{running.url}/openapi.json", "--header", f"Authorization: Bearer {KEY}", "--no-color"]
    command += ["--seed", str(seed), "--max-examples", str(EXAMPLES)]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(FOLDER)}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def resident_bytes() -> int:
    gc.collect()
    size: int = psutil.Process().memory_info().rss
    return size


@pytest.mark.timeout(600)
def test_the_description_is_true(locked: Running, lines: Lines, seed: int, tmp_path: Path) -> None:
    """Every check, on requests made by rule, by chance and one after the other; then the same again, for the memory."""
    printed = run(locked, seed, tmp_path)
    for phase in ("Coverage", "Fuzzing", "Stateful"):
        assert f"✅ {phase}" in printed.replace("  ", " "), printed
    wait_until(lambda: is_idle(locked.engine))
    answered = {(line["method"], line["path"], line["status"]) for line in lines.requests}
    for method, path, status in MUST_ANSWER:
        assert any(found[0] == method and found[1].startswith(path) and found[2] == status for found in answered), (
            f"no {method} {path} was answered with {status}"
        )
    assert not lines.errors, lines.errors[:3]
    before = resident_bytes()
    run(locked, seed, tmp_path)
    wait_until(lambda: is_idle(locked.engine))
    assert resident_bytes() - before < GROWTH_BYTES
    assert not lines.errors, lines.errors[:3]
    assert locked.app.state.metrics.speaking == 0
    assert max(line["ms"] for line in lines.requests) < 20_000
