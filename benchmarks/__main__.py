"""The benchmarks' command: `python -m benchmarks SUITE` in the tree, `aloud bench SUITE` once installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import all_suites, aot, frame, host, kernels, load, mechanics, peers, serving

SUITES = {
    "aot": aot,
    "mechanics": mechanics,
    "kernels": kernels,
    "load": load,
    "frame": frame,
    "host": host,
    "serving": serving,
    "peers": peers,
    "all": all_suites,
}

INTERRUPTED = 130
"""The status of what an interrupt has ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one suite -> exit status: 0, 1 when a bound that the suite checks is broken, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="aloud bench", description=__doc__)
    suites = parser.add_subparsers(required=True, metavar="SUITE")
    for name, suite in SUITES.items():
        suite.add_arguments(suites.add_parser(name, help=(suite.__doc__ or "").splitlines()[0]))
    parsed = parser.parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return status


if __name__ == "__main__":
    sys.exit(main())
