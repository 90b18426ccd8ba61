"""Launching Triton kernels: what one launch is, and the one place that asks which GPU this is.

An operation's `plan_…` function turns its tensors into a `Launch`, without running anything: the entry runs it, and the
ahead-of-time compiler compiles it from tensors on the "meta" device, so that what is checked is what runs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

PROGRAMMATIC_LAUNCH_CAPABILITY = 90
"""From this compute capability on, a kernel may start before the one before it has ended."""
ANY_ALIGNMENT = (
    "rows",
    "slots_ptr",
    "positions_ptr",
    "seed_ptr",
    "frame_ptr",
    "temperature_ptr",
    "top_k_ptr",
)
"""Parameters whose divisibility by 16 Triton need not know: they are read number by number, or only counted. It would
compile a kernel again for 24 rows beside 32, and for places that begin 8 bytes behind a multiple of 16."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch, not yet run.

    arguments: by parameter name, in the kernel's order: tensors and numbers
    constants: the kernel's constexpr parameters
    """

    kernel: Any  # a triton.jit function
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    programmatic: bool = False  # whether the kernel waits for the one before it by itself
    outputs: tuple[torch.Tensor, ...] = field(default=())

    def run(self) -> None:
        """Launch on the current stream of the current device, which must be the arguments'."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.programmatic:
            options["launch_pdl"] = True
        self.kernel[self.grid](**self.arguments, **self.constants, **options)


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device as one number: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`: a Triton block's length."""
    return 1 << (size - 1).bit_length()


def ceil_div(size: int, block: int) -> int:
    """How many blocks it takes to cover `size`."""
    return -(-size // block)


def require_rows(**tensors: torch.Tensor) -> None:
    """Raise `ValueError` unless the last dimension of each tensor lies side by side in memory."""
    for name, tensor in tensors.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, got strides {tensor.stride()}")
