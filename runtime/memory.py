"""How much memory things take and how much is free, and running out of it said in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from aloud.errors import OutOfMemory


def tensors_of(value: object) -> list[torch.Tensor]:
    """Every tensor in a dataclass of tensors, tuples and dataclasses."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [tensor for name in value.__dataclass_fields__ for tensor in tensors_of(getattr(value, name))]
    return []


def bytes_of(value: object) -> int:
    """Bytes of every tensor in it, as `tensors_of` finds them."""
    return sum(tensor.nbytes for tensor in tensors_of(value))


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
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        free = free_bytes(device)
        have = "" if free is None else f"; {_gigabytes(free)} are free"
        raise OutOfMemory(f"{what} more memory than {device} has{have}. {cure}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had: on the CPU torch raises a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
