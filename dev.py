#!/usr/bin/env python3
"""Everything to do in a clone, with nothing set up before: speak, test, check, interop.

    python3 dev.py speak TEXT -o FILE   say a text; without --model, on random weights made for it: noise
    python3 dev.py test [ARGUMENTS]     run the tests; arguments go to pytest
    python3 dev.py check                lint, format, types and the direction of imports
    python3 dev.py interop [ARGUMENTS]  run the tests with other people's clients: browsers, frameworks, Node, Ray

Each makes the virtual environment .venv, or for interop .venv-interop, builds the C++ extension and installs what is
needed, once. --cuda, before the command, lets pip install torch's CUDA packages on a machine without a GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
INTEROP_VENV = ROOT / ".venv-interop"  # apart: its clients pin other versions than the tests' oracles do
NODE_CLIENTS = ROOT / "tests" / "interop" / "node" / "package.json"
CPU_CONSTRAINTS = ROOT / "constraints-cpu.txt"
VERSIONS = ((3, 10), (3, 11), (3, 12))
# What an installed environment was made from; when it changes, the environment is brought up to date.
INGREDIENTS = (
    "pyproject.toml",
    "setup.py",
    "constraints.txt",
    "constraints-interop.txt",
    "constraints-cpu.txt",
    "dev.py",
    "csrc",
    "tests/interop/node/package.json",
)


def main(arguments: list[str]) -> int:
    """Run one command -> its exit status."""
    cuda = arguments[:1] == ["--cuda"]
    command, *rest = arguments[cuda:] or ["--help"]
    if command not in ("speak", "test", "check", "interop"):
        print(__doc__)
        return 0 if command in ("-h", "--help") else 2
    if sys.version_info[:2] not in VERSIONS:
        return _with_another_python(arguments)
    if command == "speak":
        install(VENV, "", cuda=cuda)
        return speak(rest)
    if command == "interop":
        install(INTEROP_VENV, "[interop]", cuda=cuda)
        return interop(rest)
    install(VENV, "[dev]", cuda=cuda)
    return test(rest) if command == "test" else check()


def speak(arguments: list[str]) -> int:
    """`aloud speak`, on a checkpoint of random weights unless one is named."""
    if not any(argument == "--model" or argument.startswith("--model=") for argument in arguments):
        checkpoint = VENV / "random-checkpoint"
        if not (checkpoint / "model.safetensors.index.json").exists():
            subprocess.run([program(VENV, "aloud"), "random", checkpoint], check=True)
        print("No trained voice comes with the project yet: this speaks with random weights, and is noise.")
        arguments = [*arguments, "--model", str(checkpoint)]
        if not any(argument.startswith("--max-seconds") for argument in arguments):
            arguments += ["--max-seconds", "3"]
    status = subprocess.run([program(VENV, "aloud"), "speak", *arguments]).returncode
    if status == 0:
        print("Done. For a real voice: --model sesame/csm-1b, after accepting its licence on the hub.")
    return status


def test(arguments: list[str]) -> int:
    """The tests."""
    return subprocess.run([program(VENV, "pytest"), *arguments], cwd=ROOT).returncode


def interop(arguments: list[str]) -> int:
    """The tests with other people's clients; what is not installed is skipped with a sentence: npm, chromium."""
    modules = INTEROP_VENV / "node"
    npm = shutil.which("npm")
    if npm and not (modules / "installed").exists():
        modules.mkdir(exist_ok=True)
        shutil.copy(NODE_CLIENTS, modules)
        command = [npm, "install", "--prefix", str(modules), "--no-package-lock", "--no-audit", "--no-fund", "--silent"]
        if subprocess.run(command).returncode:
            sys.exit("npm could not install what is needed; its message is above.")
        (modules / "installed").touch()
    return subprocess.run([program(INTEROP_VENV, "pytest"), "tests/interop", *arguments], cwd=ROOT).returncode


def check() -> int:
    """Lint, format, types and imports; the last two on a clean install, where packages are where users have them."""
    installed = VENV / "installed"
    shutil.rmtree(installed, ignore_errors=True)
    pip(VENV, "install", "--no-deps", "--no-build-isolation", "--target", str(installed), str(ROOT))
    environment = os.environ | {"PYTHONPATH": str(installed), "MYPYPATH": str(installed)}
    statuses = [
        subprocess.run([program(VENV, "ruff"), "check", "."], cwd=ROOT).returncode,
        subprocess.run([program(VENV, "ruff"), "format", "--check", "."], cwd=ROOT).returncode,
        # From another folder, so that the tree's own folders are not taken for packages.
        subprocess.run(
            [program(VENV, "mypy"), "--config-file", ROOT / "pyproject.toml", "-p", "aloud"],
            cwd=installed,
            env=environment,
        ).returncode,
        subprocess.run(
            [program(VENV, "lint-imports"), "--config", ROOT / "pyproject.toml", "--no-cache"],
            cwd=installed,
            env=environment,
        ).returncode,
    ]
    return max(statuses)


def install(venv: Path, extra: str, *, cuda: bool) -> None:
    """Make a virtual environment hold the project with `extra`, unless it does already."""
    stamp = venv / f"installed{extra}.txt"
    made_from = fingerprint()
    if stamp.exists() and stamp.read_text() == made_from:
        return
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        sys.exit("A C++ compiler is needed for the sampler: install g++ or clang++ (Debian: apt-get install g++).")
    if not program(venv, "python").exists():
        print(f"Making the virtual environment {venv.name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pins = "constraints-interop.txt" if venv == INTEROP_VENV else "constraints.txt"
    constraints = ["--constraint", str(ROOT / pins)]
    if not cuda_packages(venv, constraints, wanted=cuda):
        constraints += ["--constraint", str(CPU_CONSTRAINTS)]
    print("Installing the project and what it needs; this takes a few minutes the first time", flush=True)
    pip(venv, "install", *constraints, "--editable", f"{ROOT}{extra}")
    if extra == "[dev]":
        # An oracle of the tests, whose own pins are older than what is tested here; what it imports is in [dev].
        pip(venv, "install", *constraints, "--no-deps", "moshi")
    (venv / "node" / "installed").unlink(missing_ok=True)
    stamp.write_text(made_from)


def fingerprint() -> str:
    """A digest of everything that an installed environment depends on."""
    digest = hashlib.sha256(f"{sys.version} {sysconfig.get_platform()}".encode())
    for name in INGREDIENTS:
        path = ROOT / name
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def cuda_packages(venv: Path, constraints: list[str], *, wanted: bool) -> list[str]:
    """The CUDA packages that pip would install with torch.

    Stops before gigabytes of them are downloaded to a machine that has no use for them, unless they are `wanted`.
    """
    ask = ["install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-", *constraints, "torch"]
    answer = subprocess.run([program(venv, "python"), "-m", "pip", *ask], stdout=subprocess.PIPE, text=True)
    if answer.returncode:
        sys.exit("pip found no torch to install; its message is above.")
    names = [entry["metadata"]["name"] for entry in json.loads(answer.stdout)["install"]]
    heavy = [name for name in names if name.startswith(("nvidia-", "cuda-"))]
    if heavy and not wanted and not shutil.which("nvidia-smi") and not Path("/dev/nvidia0").exists():
        sys.exit(
            f"This machine has no NVIDIA GPU, but pip would install torch with {len(heavy)} CUDA packages, several\n"
            "gigabytes. Point pip to torch's CPU build: set PIP_EXTRA_INDEX_URL to the address that pytorch.org shows\n"
            "under Get Started for pip and CPU, and run this again. To install them all the same: dev.py --cuda."
        )
    return heavy


def pip(venv: Path, *arguments: str) -> None:
    """Run an environment's pip; stops with its message when it fails."""
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if subprocess.run([program(venv, "python"), "-m", "pip", "--quiet", *arguments], env=environment).returncode:
        sys.exit("pip could not install what is needed; its message is above.")


def program(venv: Path, name: str) -> Path:
    """A program of a virtual environment."""
    return venv / ("Scripts" if os.name == "nt" else "bin") / name


def _with_another_python(arguments: list[str]) -> int:
    for major, minor in reversed(VERSIONS):
        other = shutil.which(f"python{major}.{minor}")
        if other and subprocess.run([other, "--version"], capture_output=True).returncode == 0:
            return subprocess.run([other, str(Path(__file__).resolve()), *arguments]).returncode
    return sys.exit("Python 3.10, 3.11 or 3.12 is needed, and none is on the PATH.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
