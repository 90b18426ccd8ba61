"""The codebook head's kernel against its reference."""

from __future__ import annotations

import pytest
import torch

from aloud.kernels.codebook_head import codebook_head_reference, plan_codebook_head

NAN = float("nan")
EPS = 1e-5


def check(arguments, run, assert_as_close) -> None:
    """Logits are float32 in every dtype: they are held to the error of a product in the weights' dtype."""
    x, gain, eps, heads, codebook = arguments
    ours = run(plan_codebook_head, *arguments)
    assert ours.dtype == torch.float32
    wide = codebook_head_reference(x.float(), gain.float(), eps, heads[codebook].float()[None], 0)
    if x.dtype == torch.float32:
        assert_as_close(ours, codebook_head_reference(*arguments), wide)
    else:
        reference_error = (codebook_head_reference(*arguments) - wide).abs().max()
        assert (ours - wide).abs().max() <= 2 * reference_error


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 15, 16, 17, 64])
def test_row_counts(rows, dtype, run, random, assert_as_close) -> None:
    heads = torch.full((3, 37, 75), NAN, dtype=dtype)
    heads[1] = random(37, 75, dtype=dtype, scale=75**-0.5)
    check([random(rows, 75, dtype=dtype), random(75, dtype=dtype), EPS, heads, 1], run, assert_as_close)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize(("hidden_size", "vocabulary"), [(5, 40), (40, 65), (300, 33)])
def test_odd_sizes(hidden_size, vocabulary, rows, dtype, run, random, assert_as_close) -> None:
    x, gain = random(rows, hidden_size, dtype=dtype), random(hidden_size, dtype=dtype)
    heads = random(2, vocabulary, hidden_size, dtype=dtype, scale=hidden_size**-0.5)
    check([x, gain, EPS, heads, 0], run, assert_as_close)
    check([x, gain, EPS, heads[:, : vocabulary - 3], 1], run, assert_as_close)


@pytest.mark.parametrize("rows", [2, 18])
def test_last_rows_of_a_larger_tensor(rows, run, random, assert_as_close) -> None:
    """The depth decoder's first step makes two rows a stream and needs the second halves."""
    x, heads = random(2 * rows, 2, 40, dtype=torch.float32)[rows:, 1], random(1, 50, 40, dtype=torch.float32)
    check([x, random(40, dtype=torch.float32), EPS, heads, 0], run, assert_as_close)
