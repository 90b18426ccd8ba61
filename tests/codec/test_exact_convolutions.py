"""One thread that leaves does not take the exactness from another that is still within."""

from __future__ import annotations

import pytest
import torch

from aloud.codec.exact_convolutions import EXACT_CONVOLUTIONS


@pytest.mark.parametrize("before", [True, False])
def test_the_last_puts_back_what_the_first_found(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    first, second = EXACT_CONVOLUTIONS.held(), EXACT_CONVOLUTIONS.held()
    first.__enter__()
    second.__enter__()
    assert not torch.backends.cudnn.allow_tf32
    first.__exit__(None, None, None)
    assert not torch.backends.cudnn.allow_tf32
    second.__exit__(None, None, None)
    assert torch.backends.cudnn.allow_tf32 is before


def test_an_error_within_puts_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with pytest.raises(ZeroDivisionError), EXACT_CONVOLUTIONS.held():
        raise ZeroDivisionError
    assert torch.backends.cudnn.allow_tf32
