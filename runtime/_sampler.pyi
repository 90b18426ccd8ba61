"""Types of the C++ extension built from csrc/."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def draw(
    logits: NDArray[np.float32],
    seed: NDArray[np.int64],
    frame: NDArray[np.int64],
    codebook: int,
    temperature: NDArray[np.float32],
    top_k: NDArray[np.int32],
) -> NDArray[np.int64]:
    """Draw one token a row: int64 [rows], -1 where a row has none; logits is [rows, vocabulary], the others [rows]."""

def philox(seed: int, counter: Sequence[int]) -> tuple[int, int, int, int]:
    """The four words of Philox4x32-10 for a 64-bit seed and a counter of four words."""
