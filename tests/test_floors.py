"""What may be installed: no version with a known hole that a server's clients, or a checkpoint, can reach."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

KNOWN = [
    ("torch", "2.5.1", "CVE-2025-32434: weights_only does not hold"),
    ("starlette", "0.40.0", "CVE-2025-54121: a large upload stops the event loop"),
    ("starlette", "0.49.0", "CVE-2025-62727: ranges of a file in quadratic time"),
    ("starlette", "1.0.0", "CVE-2026-48710: a Host header changes the path that is checked"),
    ("starlette", "1.3.0", "CVE-2026-54283: forms without limits"),
    ("h11", "0.15.0", "CVE-2025-43859: smuggled requests"),
    ("python-multipart", "0.0.17", "CVE-2024-53981: endless boundaries"),
    ("python-multipart", "0.0.21", "CVE-2026-24486: files written anywhere"),
    ("python-multipart", "0.0.25", "CVE-2026-40347: large preambles"),
    ("python-multipart", "0.0.26", "CVE-2026-42561: endless headers of a part"),
    ("python-multipart", "0.0.29", "CVE-2026-53539"),
    ("av", "17.0.1", "CVE-2026-40962: FFmpeg's reader of MOV and MP4"),
]


def requirements() -> dict[str, Requirement]:
    """Of a server, by name."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["server"]]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


@pytest.mark.parametrize(("name", "last_with_it", "what"), KNOWN, ids=[f"{name} {last}" for name, last, _ in KNOWN])
def test_a_version_with_a_known_hole_cannot_be_installed(name: str, last_with_it: str, what: str) -> None:
    assert Version(last_with_it) not in requirements()[name].specifier, what


@pytest.mark.parametrize("name", sorted({name for name, _, _ in KNOWN}))
def test_what_is_installed_is_allowed(name: str) -> None:
    assert Version(version(name)) in requirements()[name].specifier
