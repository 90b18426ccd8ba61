"""What tests of whole steps share on a device: memory as it is for users, so that kernels overlap as theirs do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def unfilled_on_a_gpu() -> Iterator[None]:
    """Elsewhere torch fills what is allocated: by a kernel before each of ours, which then never begins early."""
    if not torch.cuda.is_available():
        yield
        return
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
