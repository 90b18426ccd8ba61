"""float32 convolutions in float32, where a GPU would round their inputs to 10 bits: a flag of the whole process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


class ExactConvolutions:
    """The first of several threads sets the flag, and the last puts it back as it was."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holding = 0
        self._before = ExitStack()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Until the block ends, in whatever thread."""
        with self._lock:
            if self._holding == 0:
                self._before.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
            self._holding += 1
        try:
            yield
        finally:
            with self._lock:
                self._holding -= 1
                if self._holding == 0:
                    self._before.close()


EXACT_CONVOLUTIONS = ExactConvolutions()
"""One, because the flag is one."""
