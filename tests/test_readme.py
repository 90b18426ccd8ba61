"""The README is true: its commands and Python run, and its tree is the tree."""

from __future__ import annotations

import asyncio
import re
import shlex
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

import aloud
from aloud.checkpoint.random import write_random

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_it_begins_with_the_two_commands() -> None:
    first = re.search(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert first is not None
    speak, test = first.group(1).splitlines()
    assert speak.startswith("python3 dev.py speak ")
    assert speak.endswith("-o hello.wav")
    assert test == "python3 dev.py test"


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, but for the model, which is random weights, and the length."""
    write_random(tmp_path / "noise", "small", seed=0, dtype="float32")
    soundfile.write(tmp_path / "me.wav", 0.1 * np.sin(np.arange(24_000) / 20), 24_000)
    monkeypatch.chdir(tmp_path)
    code, live, _ = blocks("python")
    assert '"sesame/csm-1b"' in code
    assert "seed=7" in code
    code = code.replace("sesame/csm-1b", str(tmp_path / "noise")).replace("seed=7", "seed=7, max_seconds=0.4")
    names: dict[str, object] = {}
    exec(code, names)
    spoken = names["audio"]
    assert isinstance(spoken, aloud.Audio)
    assert spoken.seed == 7
    assert soundfile.info(tmp_path / "hello.wav").frames == 5 * 1920

    async def words_of_an_llm() -> AsyncIterator[str]:
        for word in ("Well, ", "hello ", "there. ", "How ", "are ", "you?"):
            yield word

    soundfile.write(tmp_path / "question.wav", 0.1 * np.sin(np.arange(12_000) / 20), 24_000)
    played: list[np.ndarray] = []
    names |= {"words_of_an_llm": words_of_an_llm, "play": played.append}
    assert 'thank you.")' in live
    lines = textwrap.indent(live.replace('thank you.")', 'thank you.", max_seconds=0.4)'), "    ")
    exec(f"async def example():\n{lines}\n    return answer", names)
    answer = asyncio.run(names["example"]())  # type: ignore[operator]
    assert len(played) > 2
    assert {len(samples) for samples in played} == {1920}
    assert len(answer.samples) <= 5 * 1920


def test_the_server_serves(tmp_path: Path) -> None:
    """As written, but for the model, the port and the length."""
    write_random(tmp_path / "noise", "small", seed=0, dtype="float32")
    (serving,) = [block for block in blocks("sh") if "aloud serve" in block]
    serve, curl = serving.splitlines()
    *_, client = blocks("python")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = shlex.split(serve.replace("sesame/csm-1b", str(tmp_path / "noise")))[1:]
    command = [sys.executable, "-m", "aloud.cli", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/health/ready")
        there = curl.replace("8000", str(port)).replace('"nova"', '"nova", "max_seconds": 0.8')
        subprocess.run(["bash", "-c", there], cwd=tmp_path, check=True, capture_output=True)
        assert soundfile.info(tmp_path / "hello.mp3").frames > 0
        (tmp_path / "hello.mp3").unlink()
        here = client.replace("8000", str(port)).replace(
            'input="Hello."', 'input="Hello.", extra_body={"max_seconds": 0.8}'
        )
        subprocess.run([sys.executable, "-c", here], cwd=tmp_path, check=True)
        assert soundfile.info(tmp_path / "hello.mp3").frames > 0
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0


def wait_for(address: str) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{address} did not answer")


def test_the_guards_numbers_are_the_defaults() -> None:
    guards = aloud.Guards()
    text = " ".join(README.split())
    assert f"{guards.text_seconds:g} s and {guards.text_seconds_per_byte:g} s for each byte" in text
    assert f"{guards.silence_seconds:g} s of silence below {guards.silence_dbfs:g} dBFS" in text
    assert f"one frame repeated for {guards.repeat_seconds:g} s" in text
    assert f"trimmed to {guards.silence_kept_seconds:g} s" in text


def test_the_tree_is_the_tree() -> None:
    """Every path that the README names is there, and every room and every module of the package is named."""
    (tree,) = blocks("text")
    folder, named = "", set()
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith("  "):
            named.add(folder + name)
        else:
            folder = name
            named.add(name)
    for name in named:
        path = ROOT / name
        assert path.is_dir() if name.endswith("/") else path.is_file(), name
    rooms = {
        path.name + "/" for path in ROOT.iterdir() if path.is_dir() and any(path.rglob("*.py")) and path.name[0] != "."
    }
    assert rooms - {"build/", "aloud.egg-info/"} <= named
    packages = {f"runtime/{path.parent.name}/" for path in (ROOT / "runtime").glob("*/__init__.py")}
    assert packages <= named
