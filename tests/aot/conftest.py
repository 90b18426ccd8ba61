"""Scripts that compile are run in processes of their own: under pytest, kernels are defined for the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent


@pytest.fixture(scope="session")
def printed() -> Callable[..., Any]:
    """What a script of this folder prints, by its name and arguments."""

    def run(script: str, *arguments: str) -> Any:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parent), environment.get("PYTHONPATH", "")])
        command = [sys.executable, FOLDER / script, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
