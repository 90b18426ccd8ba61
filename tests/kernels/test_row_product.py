"""A row's bits do not depend on how many rows there are, where it stands among them, or on the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from aloud.kernels.linear import norm_swiglu
from aloud.kernels.row_product import TOGETHER, row_product, row_silu


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, 2, 5, 17, TOGETHER - 1])
@pytest.mark.parametrize("inputs", [100, 512])
def test_each_row_is_what_it_is_alone(rows: int, inputs: int, generator: torch.Generator) -> None:
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(2 * 8192, inputs, generator=generator) / inputs**0.5
    gain = torch.randn(inputs, generator=generator)
    order = torch.randperm(rows, generator=generator)
    operations: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda rows_of: row_product(rows_of, weight),
        lambda rows_of: row_silu(row_product(rows_of, weight)),
        lambda rows_of: norm_swiglu(rows_of, gain, 1e-5, weight),
    ]
    for operation in operations:
        together = operation(x)
        assert torch.equal(operation(x[order]), together[order])
        for row in (0, rows // 2, rows - 1):
            assert torch.equal(operation(x[row : row + 1])[0], together[row])


def test_more_rows_are_multiplied_at_once(generator: torch.Generator) -> None:
    x, weight = torch.randn(TOGETHER, 40, generator=generator), torch.randn(30, 40, generator=generator)
    assert torch.equal(row_product(x, weight), torch.nn.functional.linear(x, weight))
    assert row_product(x[:0], weight).shape == (0, 30)
