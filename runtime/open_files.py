"""How many files this process may have open: each connection is one."""

from __future__ import annotations

from contextlib import suppress


def allow(count: int) -> None:
    """Let this process, and those that it starts, have so many files open, if the system lets it."""
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
