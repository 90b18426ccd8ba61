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
    with pytest.MonkeyPatch.context() as patch:
        torch.use_deterministic_algorithms(False)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        yield
    torch.use_deterministic_algorithms(True)
