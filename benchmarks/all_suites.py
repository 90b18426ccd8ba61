"""The suites frame, host, serving and peers on the same weights, one after the other; reports and plots in a folder."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

from . import frame, host, peers, serving, workload
from .report import reported

SUITES: dict[str, Any] = {"frame": frame, "host": host, "serving": serving, "peers": peers}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own arguments; whatever else a suite has is at its default."""
    workload.add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIRECTORY", help="where reports and plots go")
    parser.add_argument("--rows", type=int, nargs="+", help="batch sizes of frame and peers (default: their own)")
    parser.add_argument("--streams", type=int, nargs="+", help="of host and serving (default: their own)")
    parser.add_argument("--repeats", type=int, help="of frame and peers (default: their own)")
    parser.add_argument("--seconds", type=float, help="of serving (default: its own)")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled peer")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run every suite, also when one fails; the last line is one JSON document -> 1 when one did."""
    parsed.out.mkdir(parents=True, exist_ok=True)
    statuses: dict[str, int] = {}
    document = {"suite": "all", "folder": str(parsed.out), "statuses": statuses}
    with reported(document, parsed.json), workload.checkpoint(parsed.model, parsed.size, parsed.dtype) as folder:
        for name, suite in SUITES.items():
            print(f"\n== {name}", flush=True)
            parser = argparse.ArgumentParser()
            suite.add_arguments(parser)
            asked = parser.parse_args(arguments(name, folder, parsed))
            try:
                with (parsed.out / f"{name}.txt").open("w") as file, contextlib.redirect_stdout(Tee(sys.stdout, file)):
                    statuses[name] = int(asked.run(asked))
            except Exception:  # the others are still worth measuring
                traceback.print_exc()
                statuses[name] = 1
            peers.release()
        print("\n" + ", ".join(f"{name} {'failed' if status else 'ok'}" for name, status in statuses.items()))
    return max(statuses.values())


def arguments(name: str, folder: Path, parsed: argparse.Namespace) -> list[str]:
    """The command line of one suite."""
    given = ["--json", str(parsed.out / f"{name}.json"), "--plot", str(parsed.out / f"{name}.png")]
    if name != "host":
        given += ["--model", str(folder), "--device", parsed.device, "--dtype", parsed.dtype]
    if name in ("frame", "serving"):
        given += ["--context", str(parsed.context)]
    if name in ("frame", "peers"):
        given += _each("--rows", parsed.rows) + _each("--repeats", parsed.repeats)
    if name in ("host", "serving"):
        given += _each("--streams", parsed.streams)
    if name == "serving":
        given += _each("--seconds", parsed.seconds)
    if name == "peers" and parsed.no_compile:
        given.append("--no-compile")
    return given


def _each(option: str, value: Any) -> list[str]:
    if value is None:
        return []
    return [option, *map(str, value if isinstance(value, list) else [value])]


class Tee(io.TextIOBase):
    """Writes to several files at once; no terminal, whatever they are."""

    def __init__(self, *files: TextIO) -> None:
        """Of open files."""
        self.files = files

    def write(self, text: str) -> int:
        """Write to each."""
        for file in self.files:
            file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush each."""
        for file in self.files:
            file.flush()
