"""How much memory is free, and running out of it said in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from aloud.errors import OutOfMemory


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on a device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def require(what: str, needed_bytes: int, device: torch.device, cure: str) -> None:
    """Raise `OutOfMemory` now if `needed_bytes` are not free: the system might grant them and then end the process."""
    free = free_bytes(device)
    if free is not None and needed_bytes > free:
        raise OutOfMemory(f"{what} {_gigabytes(needed_bytes)} on {device}, where {_gigabytes(free)} are free. {cure}")


@contextmanager
def out_of_memory(what: str, device: torch.device, cure: str) -> Iterator[None]:
    """Turn every way in which an allocation fails into `OutOfMemory`."""
    try:
        yield
    except (
        MemoryError,
        RuntimeError,
    ) as error:  # torch.OutOfMemoryError is a RuntimeError; on the CPU it is a plain one
        plain = not isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if plain and "can't allocate memory" not in str(error):
            raise
        free = free_bytes(device)
        have = "" if free is None else f"; {_gigabytes(free)} are free"
        raise OutOfMemory(f"{what} more memory than {device} has{have}. {cure}") from error


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
