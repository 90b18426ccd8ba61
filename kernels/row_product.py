"""The product x W^T in PyTorch, as the references use it: a row's bits do not depend on the other rows.

A library chooses its way through a product by the number of rows, and sums in another order with it: a stream would
then sound a last bit different in other company. On a CPU, fewer than TOGETHER rows, which belong to different streams,
are therefore multiplied in blocks whose shape never changes. More rows are one stream's, and are multiplied at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK = 4
"""Rows of a block on a CPU; the last one is filled up with zeros. One row then costs about half as much again as
alone, four cost the same."""
TOGETHER = 64
"""From this many rows on, all are of one stream: the steps of different streams are made for fewer at a time."""


def row_silu(x: torch.Tensor) -> torch.Tensor:
    """silu of x [rows, columns], each row alone where `row_product` keeps rows apart.

    A library takes the exponential of most elements many at a time and of the last few one by one, with other bits.
    """
    if x.is_cuda or x.shape[0] >= TOGETHER or x.shape[0] == 0:
        return F.silu(x)
    return torch.stack([F.silu(row) for row in x])


def row_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [rows, inputs], weight [outputs, inputs] -> [rows, outputs]."""
    rows = x.shape[0]
    if x.is_cuda or rows >= TOGETHER or rows == 0:
        return F.linear(x, weight)
    padded = F.pad(x, (0, 0, 0, -rows % BLOCK))
    blocks = [F.linear(block, weight) for block in padded.split(BLOCK)]
    return blocks[0][:rows] if len(blocks) == 1 else torch.cat(blocks)[:rows]
