"""benchmarks/gpu_pass.sh, over a tree of stand-ins: what it prints and keeps after each stage, how a build fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SUITE = """
import argparse, json, time
from pathlib import Path
from . import measure, report

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("suite")
    parser.add_argument("--json", type=Path)
    parsed, _ = parser.parse_known_args()
    document = {"suite": parsed.suite, "commit": measure._commit(), "results": []}
    with report.reported(document, parsed.json):
        print("measuring", parsed.suite)
        Path("before.txt").write_text(Path("summary.txt").read_text())
        if parsed.suite == "host":
            document["results"].append({"streams": 1, "pace": "full", "together_us": 55.0, "bound_us": 100.0})
        elif parsed.suite == "mechanics":
            time.sleep(60)
        else:
            raise RuntimeError("no such card")

if __name__ == "__main__":
    main()
"""
FILES = {
    "setup.py": "",
    "runtime/__init__.py": "",
    "runtime/_sampler.py": "",
    "runtime/api.py": "",
    "runtime/checkpoint/__init__.py": "",
    "runtime/checkpoint/random.py": "",
    "kernels/__init__.py": "",
    "benchmarks/__init__.py": "",
    "benchmarks/__main__.py": SUITE,
    "beside/torch.py": "__version__ = '0'",
    "beside/triton.py": "__version__ = '0'",
    "beside/safetensors.py": "",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with the real script and what writes reports, and stand-ins for the rest."""
    root = tmp_path / "tree"
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("gpu_pass.sh", "measure.py", "report.py", "summary.py"):
        shutil.copy(BENCHMARKS / name, root / "benchmarks")
    return root


def gpu_pass(tree: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PYTHONPATH": str(tree / "beside"), **settings}
    command = [str(tree / "benchmarks" / "gpu_pass.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def kept(folder: Path) -> list[str]:
    """Names in the archive."""
    with tarfile.open(folder / "pass.tgz") as archive:
        return sorted(archive.getnames())


def test_stages_are_told_and_kept_one_by_one(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = gpu_pass(tree, str(folder), "host", "kernels", COMMIT="abc1234")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["stage", "result"],
        ["build", "ok"],
        ["host", "ok"],
        ["kernels", "failed"],
    ]
    assert lines[2].split()[2:4] == ["measuring", "host"]
    assert "RuntimeError: no such card" in lines[3]
    assert any(line.split() == ["host,", "1", "streams,", "full", "55", "us", "<=", "100"] for line in lines)
    # As it was while the last stage ran, and as it is.
    before, after = (folder / "before.txt").read_text(), (folder / "summary.txt").read_text()
    assert [line.split()[:2] for line in before.splitlines()[:3]] == [
        ["build", "ok"],
        ["host", "ok"],
        ["kernels", "-"],
    ]
    assert "no such card" not in before
    assert "no such card" in after
    for text in (before, after):
        assert "host, 1 streams, full" in text
    names = kept(folder)
    for name in ("host.json", "host.log", "host.done", "kernels.json", "kernels.log", "build.log", "summary.txt"):
        assert f"./{name}" in names
    assert not any("site" in name or "pass.tgz" in name for name in names)
    report = json.loads((folder / "kernels.json").read_text())
    assert (report["error"], report["commit"]) == ("RuntimeError: no such card", "abc1234")

    # What is done is not done again, and what is not, is.
    again = gpu_pass(tree, str(folder), "host", "kernels", COMMIT="def5678")
    assert [line.split()[:2] for line in again.stdout.splitlines()[1:4]] == [
        ["build", "ok"],
        ["host", "ok"],
        ["kernels", "failed"],
    ]
    assert json.loads((folder / "host.json").read_text())["commit"] == "abc1234"
    assert json.loads((folder / "kernels.json").read_text())["commit"] == "def5678"


def test_a_stage_at_its_limit_leaves_its_report(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = gpu_pass(tree, str(folder), "mechanics", LIMIT="3")
    assert done.returncode == 1
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("mechanics  "))
    assert line.split()[1] == "failed"
    assert line.endswith("s, its limit)")
    report = json.loads((folder / "mechanics.json").read_text())
    assert report == {"suite": "mechanics", "commit": None, "results": [], "interrupted": True}
    assert "mechanics, not whole: interrupted" in done.stdout
    assert "./mechanics.json" in kept(folder)


def test_the_build_names_what_is_missing(tree: Path, tmp_path: Path) -> None:
    """As soundfile does without cffi, that the runtime's own modules need: no stage is begun."""
    (tree / "runtime" / "api.py").write_text("import _cffi_backend_that_is_missing")
    folder = tmp_path / "out"
    done = gpu_pass(tree, str(folder), "host")
    assert done.returncode == 1
    assert "No module named '_cffi_backend_that_is_missing'" in done.stdout
    assert not (folder / "host.log").exists()


def test_reports_name_the_clones_commit(tree: Path, tmp_path: Path) -> None:
    """With a folder of reports in the clone, which is no change of the tree."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tree), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    (tree / ".gitignore").write_text("__pycache__\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "tree")
    commit = git("rev-parse", "--short", "HEAD")
    for expected, folder in ((commit, tree / "out"), (f"{commit}+", tmp_path / "changed")):
        if expected != commit:
            (tree / "runtime" / "new.py").write_text("")
        assert gpu_pass(tree, str(folder), "host").returncode == 0
        assert json.loads((folder / "host.json").read_text())["commit"] == expected
