#!/usr/bin/env python3
"""Everything to do in a clone, with nothing set up before: speak, test, check.

    python3 dev.py speak TEXT -o FILE   say a text; without --model, on random weights made for it: noise
    python3 dev.py test [ARGUMENTS]     run the tests; arguments go to pytest
    python3 dev.py check                lint, format, types and the direction of imports

Each makes the virtual environment .venv, builds the C++ extension and installs what is needed, once. --cuda, before the
command, lets pip install torch's CUDA packages on a machine without a GPU.
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
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
CONSTRAINTS = ROOT / "constraints.txt"
CPU_CONSTRAINTS = ROOT / "constraints-cpu.txt"
VERSIONS = ((3, 10), (3, 11), (3, 12))
# What an installed environment was made from; when it changes, the environment is brought up to date.
INGREDIENTS = ("pyproject.toml", "setup.py", "constraints.txt", "constraints-cpu.txt", "dev.py", "csrc")


def main(arguments: list[str]) -> int:
    """Run one command -> its exit status."""
    cuda = arguments[:1] == ["--cuda"]
    command, *rest = arguments[cuda:] or ["--help"]
    if command not in ("speak", "test", "check"):
        print(__doc__)
        return 0 if command in ("-h", "--help") else 2
    if sys.version_info[:2] not in VERSIONS:
        return _with_another_python(arguments)
    if command == "speak":
        install("", cuda=cuda)
        return speak(rest)
    install("[dev]", cuda=cuda)
    return test(rest) if command == "test" else check()


def speak(arguments: list[str]) -> int:
    """`aloud speak`, on a checkpoint of random weights unless one is named."""
    if not any(argument == "--model" or argument.startswith("--model=") for argument in arguments):
        checkpoint = VENV / "random-checkpoint"
        if not (checkpoint / "model.safetensors.index.json").exists():
            subprocess.run([BIN / "aloud", "random", checkpoint], check=True)
        print("No trained voice comes with the project yet: this speaks with random weights, and is noise.")
        arguments = [*arguments, "--model", str(checkpoint)]
        if not any(argument.startswith("--max-seconds") for argument in arguments):
            arguments += ["--max-seconds", "3"]
    status = subprocess.run([BIN / "aloud", "speak", *arguments]).returncode
    if status == 0:
        print("Done. For a real voice: --model sesame/csm-1b, after accepting its licence on the hub.")
    return status


def test(arguments: list[str]) -> int:
    """The tests."""
    return subprocess.run([BIN / "pytest", *arguments], cwd=ROOT).returncode


def check() -> int:
    """Lint, format, types and imports; the last two on a clean install, where packages are where users have them."""
    installed = VENV / "installed"
    shutil.rmtree(installed, ignore_errors=True)
    pip("install", "--no-deps", "--no-build-isolation", "--target", str(installed), str(ROOT))
    environment = os.environ | {"PYTHONPATH": str(installed), "MYPYPATH": str(installed)}
    statuses = [
        subprocess.run([BIN / "ruff", "check", "."], cwd=ROOT).returncode,
        subprocess.run([BIN / "ruff", "format", "--check", "."], cwd=ROOT).returncode,
        # From another folder, so that the tree's own folders are not taken for packages.
        subprocess.run(
            [BIN / "mypy", "--config-file", ROOT / "pyproject.toml", "-p", "aloud"], cwd=installed, env=environment
        ).returncode,
        subprocess.run(
            [BIN / "lint-imports", "--config", ROOT / "pyproject.toml", "--no-cache"], cwd=installed, env=environment
        ).returncode,
    ]
    return max(statuses)


def install(extra: str, *, cuda: bool) -> None:
    """Make .venv hold the project with `extra`, unless it does already."""
    stamp = VENV / f"installed{extra}.txt"
    made_from = fingerprint()
    if stamp.exists() and stamp.read_text() == made_from:
        return
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        sys.exit("A C++ compiler is needed for the sampler: install g++ or clang++ (Debian: apt-get install g++).")
    if not (BIN / "python").exists():
        print("Making the virtual environment .venv", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    constraints = ["--constraint", str(CONSTRAINTS)]
    if not cuda_packages(constraints, wanted=cuda):
        constraints += ["--constraint", str(CPU_CONSTRAINTS)]
    print("Installing the project and what it needs; this takes a few minutes the first time", flush=True)
    pip("install", *constraints, "--editable", f"{ROOT}{extra}")
    if extra:
        # An oracle of the tests, whose own pins are older than what is tested here; what it imports is in [dev].
        pip("install", *constraints, "--no-deps", "moshi")
    stamp.write_text(made_from)


def fingerprint() -> str:
    """A digest of everything that an installed environment depends on."""
    digest = hashlib.sha256(f"{sys.version} {sysconfig.get_platform()}".encode())
    for name in INGREDIENTS:
        path = ROOT / name
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def cuda_packages(constraints: list[str], *, wanted: bool) -> list[str]:
    """The CUDA packages that pip would install with torch.

    Stops before gigabytes of them are downloaded to a machine that has no use for them, unless they are `wanted`.
    """
    ask = ["install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-", *constraints, "torch"]
    answer = subprocess.run([BIN / "python", "-m", "pip", *ask], stdout=subprocess.PIPE, text=True)
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


def pip(*arguments: str) -> None:
    """Run the environment's pip; stops with its message when it fails."""
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if subprocess.run([BIN / "python", "-m", "pip", "--quiet", *arguments], env=environment).returncode:
        sys.exit("pip could not install what is needed; its message is above.")


def _with_another_python(arguments: list[str]) -> int:
    for major, minor in reversed(VERSIONS):
        other = shutil.which(f"python{major}.{minor}")
        if other and subprocess.run([other, "--version"], capture_output=True).returncode == 0:
            return subprocess.run([other, str(Path(__file__).resolve()), *arguments]).returncode
    return sys.exit("Python 3.10, 3.11 or 3.12 is needed, and none is on the PATH.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
