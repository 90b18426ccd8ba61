"""The kernels of long_product.py against `linear_residual`'s reference, and which products are theirs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aloud.kernels import linear, product
from aloud.kernels.linear import linear_residual_reference, plan_linear_residual
from aloud.kernels.product import LONG_INPUTS, MATRIX_ROWS, PROGRAMS, choose_blocks


def make_arguments(rows, inputs, outputs, dtype, random):
    """x, weight and residual."""
    x, weight = random(rows, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype, scale=inputs**-0.5)
    return [x, weight, random(rows, outputs, dtype=dtype)]


def check(arguments, run, assert_as_close):
    """Run the kernels and compare the result with the reference."""
    assert len(plan_linear_residual(*arguments, capability=80)) == 2
    wide = [argument.float() for argument in arguments]
    ours = run(plan_linear_residual, *arguments)
    assert_as_close(ours, linear_residual_reference(*arguments), linear_residual_reference(*wide))


@pytest.mark.parametrize("rows", [16, 17, 33, 64], ids="{} rows".format)
def test_row_counts(rows, dtype, run, random, assert_as_close, version):
    if version // 10 == 10 and rows > 32 and dtype != torch.float32 and not torch.cuda.is_available():
        pytest.skip("the machine does not know tcgen05")
    check(make_arguments(rows, LONG_INPUTS, 72, dtype, random), run, assert_as_close)


@pytest.mark.parametrize(("inputs", "outputs"), [(4100, 37), (5001, 24), (4097, 1), (4608, 300)])
def test_odd_sizes(inputs, outputs, run, random, assert_as_close):
    """Among them are parts that end in the middle of a block, and fewer parts than there might be."""
    arguments = make_arguments(16, inputs, outputs, torch.bfloat16, random)
    _, total = plan_linear_residual(*arguments, capability=80)
    assert choose_blocks(16, outputs, inputs, 2, plain=True).parts == 8
    assert total.constants["PARTS"] == 5  # of two blocks of 512, the last of less
    check(arguments, run, assert_as_close)


def test_strided_rows(run, random, assert_as_close):
    arguments = make_arguments(17, 4100, 37, torch.float32, random)
    for place, argument in enumerate(arguments):
        apart = torch.full((argument.shape[0], argument.shape[1] + 5), torch.nan)
        apart[:, : argument.shape[1]] = argument
        arguments[place] = apart[:, : argument.shape[1]]
    check(arguments, run, assert_as_close)


def test_rows_are_independent(run, random):
    arguments = make_arguments(17, LONG_INPUTS, 37, torch.bfloat16, random)
    alone = run(plan_linear_residual, *arguments)
    arguments[0] = arguments[0].clone()
    arguments[0][1:] = torch.nan
    beside_nan = run(plan_linear_residual, *arguments)
    assert torch.equal(alone[0], beside_nan[0])
    assert beside_nan[1:].isnan().all()


def test_parts_are_added_before_anything_is_rounded(run, random, monkeypatch):
    """Parts of bfloat16 numbers that cancel: 1 is left of 2^20, which rounded parts would lose."""
    x, weight = torch.ones(16, LONG_INPUTS, dtype=torch.bfloat16), torch.zeros(20, LONG_INPUTS, dtype=torch.bfloat16)
    weight[:, :2] = torch.tensor([2.0**20, 1.0])
    weight[:, -1] = -(2.0**20)
    residual = random(16, 20, dtype=torch.bfloat16)
    assert torch.equal(run(plan_linear_residual, x, weight, residual), residual + 1)

    def whole(*sizes, **options):
        return replace(choose_blocks(*sizes, **options), parts=1)

    monkeypatch.setattr(linear, "choose_blocks", whole)
    assert len(plan_linear_residual(x, weight, residual, capability=80)) == 1
    assert torch.equal(run(plan_linear_residual, x, weight, residual), residual + 1)


def test_each_launch_waits_for_the_one_before(random, run, version, interpreted, chain):
    """Twice in a row, as layers follow each other: the second's x lies in what the first has made."""
    if interpreted:
        pytest.skip("of compiled code")
    x, weight, residual = make_arguments(16, LONG_INPUTS, 320, torch.bfloat16, random)
    first = run(plan_linear_residual, x, weight, residual)
    run(plan_linear_residual, first.as_strided((16, LONG_INPUTS), (64, 1)), weight, first)
    assert chain.written
    assert not chain.conflicts()


@pytest.mark.parametrize("rows", [16, 17, 32, 48, 64])
@pytest.mark.parametrize("element_size", [2, 4])
def test_long_rows_are_split_until_the_chip_is_full(element_size, rows):
    for outputs, inputs in ((1024, 8192), (2048, 8192), (1024, 4096)):
        blocks = choose_blocks(rows, outputs, inputs, element_size, plain=True)
        assert PROGRAMS <= -(-outputs // blocks.outputs) * blocks.parts < 2 * PROGRAMS
        assert inputs // blocks.parts >= blocks.inputs * (blocks.num_stages - 1)  # as much as is under way at once


def test_others_are_not_split():
    for rows, outputs, inputs, plain in (
        (MATRIX_ROWS - 1, 1024, 8192, True),  # on vector units
        (64, 1024, 8192, False),  # with a norm
        (64, 2048, 2048, True),  # short
        (64, 16_384, 8192, True),  # many
        (16, 2048, 8192, True),  # 128 programs of 16
    ):
        assert product.choose_blocks(rows, outputs, inputs, 2, plain=plain).parts == 1
