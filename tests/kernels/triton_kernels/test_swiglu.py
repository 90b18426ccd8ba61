"""SwiGLU's kernel against its reference."""

from __future__ import annotations

import pytest
import torch

from aloud.kernels.swiglu import plan_swiglu, swiglu, swiglu_reference


@pytest.mark.parametrize("width", [1, 75, 1024, 1031])
@pytest.mark.parametrize("rows", [1, 3, 66])
def test_matches_reference(rows, width, dtype, run, random, assert_as_close):
    products = random(rows, 2 * width, dtype=dtype, scale=3.0)
    assert_as_close(run(plan_swiglu, products), swiglu_reference(products), swiglu_reference(products.float()), True)


def test_rounds_as_the_reference(dtype, run, random):
    products = random(70, 1200, dtype=dtype, scale=3.0)
    same = run(plan_swiglu, products) == swiglu_reference(products)
    # An exponential may be a last bit off, which float32 shows and a rounding mostly hides.
    assert same.float().mean() > (0.4 if dtype == torch.float32 else 0.99)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_extremes(run):
    products = torch.tensor([[-1e30, 1e30, -100.0, 0.0, 2.0, 2.0, 2.0, 2.0]])
    torch.testing.assert_close(run(plan_swiglu, products), torch.tensor([[0.0, 2e30, 0.0, 0.0]]), rtol=1e-5, atol=0)


def test_strided_rows_and_nothing_beyond(dtype, run, random, assert_as_close):
    apart = torch.full((66, 3, 2 * 75 + 2), torch.nan, dtype=dtype)
    apart[:, 1, : 2 * 75] = random(66, 2 * 75, dtype=dtype)
    products = apart[:, 1, : 2 * 75]
    assert_as_close(run(plan_swiglu, products), swiglu_reference(products), swiglu_reference(products.float()), True)


def test_an_odd_number_of_columns_is_refused():
    with pytest.raises(ValueError, match="even number of columns, got 7"):
        swiglu(torch.zeros(2, 7))
