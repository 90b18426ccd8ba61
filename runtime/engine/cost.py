"""What a step of some size costs: an estimate from measurements that is robust, and monotone in the size."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]

SAMPLES = 15
"""Measurements kept for each size; the median follows a lasting change after half of them."""
REFIT_SHARE = 0.02
"""A median that has moved by less since the last fit leaves the curve as it is."""


class MeasuredCost:
    """What a pass costs for each of some sizes, from measurements: robust, monotone in the size.

    The estimate of a size is the median of its last `SAMPLES` measurements. Neighbours that contradict the order are
    pooled and share one median (isotonic regression by pool-adjacent-violators, in the L1 sense: Barlow et al., 1972),
    so that one bad measurement of a small size cannot lift all larger ones. Between sizes seen it is linear; below the
    smallest it is flat; above the largest it goes on as steeply as the last two, or as all, whichever is steeper, and
    in proportion while only one size has been seen (a cost with a fixed part grows less than that: the safe side).
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = np.array(sizes, np.int64)
        self.largest = int(sizes[-1])
        self.measured = False
        self.curve: Seconds = np.zeros(len(sizes))  # seconds of a pass of each size
        self._samples: list[deque[float]] = [deque(maxlen=SAMPLES) for _ in sizes]
        self._medians: dict[int, float] = {}  # index of a size seen -> seconds
        # Index into [0, *curve] of the pass that takes 0 … largest.
        self._index = np.searchsorted(self.sizes, np.arange(self.largest + 1)) + 1
        self._index[0] = 0
        self._costs: Seconds = np.zeros(len(sizes) + 1)

    def observe(self, amount: int, seconds: float) -> None:
        """Take in one measured pass over `amount` rows or positions. A time that is not positive is left out.

        Raises `ValueError` when one pass cannot take `amount`.
        """
        if not 1 <= amount <= self.largest:
            raise ValueError(f"One pass takes 1 to {self.largest}, not {amount}.")
        if not 0 < seconds < math.inf:
            return
        index = int(self._index[amount]) - 1
        self._samples[index].append(seconds)
        middle = median(self._samples[index])
        if abs(middle - self._medians.get(index, math.inf)) <= REFIT_SHARE * middle:
            return
        self._medians[index] = middle
        self.measured = True
        self._fit()

    def size(self, amount: int) -> int:
        """The captured size that `amount`, at most the largest, is padded to; 0 for 0."""
        return int(self.sizes[self._index[amount] - 1]) if amount else 0

    def of(self, amount: int) -> float:
        """Seconds for `amount`, in as few passes as can be; 0 while nothing has been measured."""
        passes, rest = divmod(amount, self.largest)
        return float(passes * self._costs[-1] + self._costs[self._index[rest]])

    def of_each(self, first: int, last: int) -> Seconds:
        """`of(first)`, …, `of(last)`."""
        amounts = np.arange(first, last + 1)
        if last <= self.largest:
            return self._costs[self._index[first : last + 1]]
        passes, rest = np.divmod(amounts, self.largest)
        return passes * self._costs[-1] + self._costs[self._index[rest]]

    def _fit(self) -> None:
        blocks: list[tuple[list[int], float]] = []  # sizes that share one estimate
        for index in sorted(self._medians):
            members, seconds = [index], self._medians[index]
            while blocks and blocks[-1][1] > seconds:
                members = blocks.pop()[0] + members
                seconds = median([sample for member in members for sample in self._samples[member]])
            blocks.append((members, seconds))
        seen = self.sizes[[member for members, _ in blocks for member in members]].astype(np.float64)
        known = np.array([seconds for members, seconds in blocks for _ in members])
        self.curve = np.interp(self.sizes, seen, known)
        if len(seen) == 1:
            slope = known[0] / seen[0]
        else:
            slope = max((known[-1] - known[-2]) / (seen[-1] - seen[-2]), (known[-1] - known[0]) / (seen[-1] - seen[0]))
        self.curve += np.maximum(self.sizes - seen[-1], 0) * slope
        self._costs[1:] = self.curve
