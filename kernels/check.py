"""One-line contracts for the tensors that enter an operation: shape by names, dtype, device.

    rows, hidden = check("x", x, "rows hidden", {}, dtype=torch.float32)

Sizes are words. A word met for the first time is bound; met again it must be the same size, so that one dictionary
shared by several calls ties the arguments of an operation together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def check(
    name: str,
    tensor: torch.Tensor,
    shape: str,
    sizes: dict[str, int],
    *,
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> tuple[int, ...]:
    """Check one tensor against a shape in words and return its sizes.

    `shape` is words separated by spaces: a number is that size, a word is a size shared through `sizes`.
    Raises `ValueError` naming the argument: these are programming errors, not a user's.
    """
    words = shape.split()
    if tensor.dim() != len(words):
        raise ValueError(f"{name} must be [{', '.join(words)}], got shape {list(tensor.shape)}")
    for word, size in zip(words, tensor.shape, strict=True):
        expected = int(word) if word.isdigit() else sizes.setdefault(word, size)
        if size != expected:
            raise ValueError(
                f"{name} must be [{', '.join(words)}] with {word} = {expected}, got shape {list(tensor.shape)}"
            )
    if dtype is not None:
        allowed = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
        if tensor.dtype not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(str, allowed))}, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, is on {tensor.device}")
    return tuple(tensor.shape)
