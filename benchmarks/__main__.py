"""The benchmarks' command: `python -m benchmarks SUITE` in the tree, `aloud bench SUITE` once installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import aot, kernels, load


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one suite -> exit status: 0, or 1 when a bound that the suite checks is broken."""
    parser = argparse.ArgumentParser(prog="aloud bench", description=__doc__)
    suites = parser.add_subparsers(required=True, metavar="SUITE")
    aot.add_arguments(suites.add_parser("aot", help=aot.__doc__.splitlines()[0]))
    kernels.add_arguments(suites.add_parser("kernels", help=kernels.__doc__.splitlines()[0]))
    load.add_arguments(suites.add_parser("load", help=load.__doc__))
    parsed = parser.parse_args(arguments)
    status: int = parsed.run(parsed)
    return status


if __name__ == "__main__":
    sys.exit(main())
