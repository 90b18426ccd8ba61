"""A clean install, not editable: what it puts where, that it speaks, and that it puts nothing else at top level."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "kernels", "runtime", "benchmarks")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the project installed from a copy of its sources."""
    pytest.importorskip("pip")
    copy, site = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("site")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
            )
        else:
            shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(site), str(copy)], check=True)
    return site


def run(site: Path, folder: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(site)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout


def test_only_aloud_is_installed(site: Path) -> None:
    """transformers takes a package named `kernels` for another one, so none may be there."""
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert names - {"bin", "__pycache__"} == {"aloud"}
    installed = {path.name for path in (site / "aloud").iterdir()}
    assert {"kernels", "benchmarks", "engine", "models", "codec", "checkpoint", "text", "py.typed"} <= installed
    assert any(name.startswith("_sampler") and not name.endswith(".pyi") for name in installed)


def test_every_module_of_the_tree_is_installed(site: Path) -> None:
    for package, folder in (("", "runtime"), ("kernels", "kernels"), ("benchmarks", "benchmarks")):
        for path in (ROOT / folder).rglob("*.py"):
            assert (site / "aloud" / package / path.relative_to(ROOT / folder)).is_file(), path


def test_it_speaks(site: Path, tmp_path: Path) -> None:
    where = run(site, tmp_path, "-c", "import aloud, aloud._sampler; print(aloud._sampler.__file__)")
    assert str(site) in where
    run(site, tmp_path, "-m", "aloud.cli", "random", "noise")
    run(site, tmp_path, "-m", "aloud.cli", "speak", "Hi.", "--model", "./noise", "--max-seconds", "0.4", "-o", "hi.wav")
    with wave.open(str(tmp_path / "hi.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (24_000, 1, 5 * 1920)
