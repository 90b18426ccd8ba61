"""Threads that stand: all but those of pools, which are bounded, and made when they are first needed."""

from __future__ import annotations

import threading

POOLS = ("asyncio_", "aloud-encode")


def standing_threads() -> int:
    """How many there are."""
    return sum(not thread.name.startswith(POOLS) for thread in threading.enumerate())
