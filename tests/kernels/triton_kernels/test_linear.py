"""The kernels of linear.py against their references."""

from __future__ import annotations

from itertools import product as product_of

import pytest
import torch

from aloud.kernels import linear, product
from aloud.kernels.linear import (
    linear_residual_reference,
    norm_linear_reference,
    norm_swiglu_reference,
    plan_linear_residual,
    plan_norm_linear,
    plan_norm_swiglu,
)
from aloud.kernels.product import MATRIX_ROWS, SHARED_BYTES, choose_blocks

EPS = 1e-5
OPERATIONS = {
    "linear_residual": (plan_linear_residual, linear_residual_reference),
    "norm_linear": (plan_norm_linear, norm_linear_reference),
    "norm_swiglu": (plan_norm_swiglu, norm_swiglu_reference),
}


def make_arguments(name, rows, inputs, outputs, dtype, random):
    """Arguments of an operation that makes `outputs` columns."""
    x = random(rows, inputs, dtype=dtype)
    weight = random((2 if name == "norm_swiglu" else 1) * outputs, inputs, dtype=dtype, scale=inputs**-0.5)
    if name == "linear_residual":
        return [x, weight, random(rows, outputs, dtype=dtype)]
    return [x, random(inputs, dtype=dtype), EPS, weight]


def check(name, arguments, run, assert_as_close):
    """Run an operation's kernel and compare it with the reference."""
    plan, reference = OPERATIONS[name]
    wide = [a.float() if isinstance(a, torch.Tensor) else a for a in arguments]
    # silu(gate) * up is a product of two normal numbers: one element in hundreds has most of the error.
    heavy_tailed = name == "norm_swiglu" and arguments[0].dtype != torch.float32
    assert_as_close(run(plan, *arguments), reference(*arguments), reference(*wide), heavy_tailed)


@pytest.mark.usefixtures("as_at_full_size")
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 15, 16, 17, 64])
def test_row_counts(rows, name, dtype, run, random, assert_as_close):
    check(name, make_arguments(name, rows, 75, 37, dtype, random), run, assert_as_close)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("rows", [1, 3, 16], ids="{} rows".format)
@pytest.mark.parametrize(("inputs", "outputs"), [(40, 24), (128, 33), (300, 1), (1, 40), (257, 5)])
def test_odd_sizes(inputs, outputs, rows, name, run, random, assert_as_close):
    check(name, make_arguments(name, rows, inputs, outputs, torch.float32, random), run, assert_as_close)


@pytest.mark.usefixtures("as_at_full_size")
@pytest.mark.parametrize("rows", [2, 16], ids="{} rows".format)
@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [
        pytest.param("norm_swiglu", 64, 200, id="gate_up"),  # more outputs than inputs
        pytest.param("linear_residual", 1024, 72, id="down"),  # more inputs than outputs
        pytest.param("norm_linear", 128, 64, id="projector"),
    ],
)
def test_csm_shapes_in_small(name, inputs, outputs, rows, dtype, run, random, assert_as_close):
    check(name, make_arguments(name, rows, inputs, outputs, dtype, random), run, assert_as_close)


@pytest.mark.parametrize("rows", [2, 5], ids="{} rows".format)
@pytest.mark.parametrize("name", OPERATIONS)
def test_long_rows(name, rows, dtype, run, random, assert_as_close, monkeypatch):
    # As of a large weight: a program owns several outputs, and more threads take them.
    for module in (product, linear):
        monkeypatch.setattr(
            module, "choose_blocks", lambda rows, outputs, *rest, **options: choose_blocks(rows, 2048, *rest, **options)
        )
    arguments = make_arguments(name, rows, 5000, 6, dtype, random)
    planned = OPERATIONS[name][0](*arguments, capability=80)
    launch = planned[0] if isinstance(planned, tuple) else planned
    assert launch.constants["BLOCK_OUTPUTS"] == (2 if dtype == torch.float32 else 4)
    assert launch.num_warps == 8
    check(name, arguments, run, assert_as_close)


@pytest.mark.usefixtures("as_at_full_size")
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("rows", [3, 17], ids="{} rows".format)
def test_strided_rows(rows, name, run, random, assert_as_close):
    arguments = make_arguments(name, rows, 75, 37, torch.float32, random)
    for place, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor) and argument.dim() == 2:
            apart = torch.full((argument.shape[0], argument.shape[1] + 5), torch.nan)
            apart[:, : argument.shape[1]] = argument
            arguments[place] = apart[:, : argument.shape[1]]
    check(name, arguments, run, assert_as_close)


@pytest.mark.usefixtures("as_at_full_size")
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("rows", [3, 17], ids="{} rows".format)
def test_rows_are_independent(rows, name, run, random):
    plan, _ = OPERATIONS[name]
    arguments = make_arguments(name, rows, 75, 37, torch.bfloat16, random)
    alone = run(plan, *arguments)
    arguments[0] = arguments[0].clone()
    arguments[0][1:] = torch.nan
    beside_nan = run(plan, *arguments)
    assert torch.equal(alone[0], beside_nan[0])
    assert beside_nan[1:].isnan().all()


@pytest.mark.usefixtures("as_at_full_size")
@pytest.mark.parametrize("rows", [3, 17], ids="{} rows".format)
@pytest.mark.parametrize("name", ["norm_linear", "norm_swiglu"])
def test_float16_gain_beyond_its_range(name, rows, run, random, assert_as_close):
    # x * gain reaches 10^6, where float16 ends at 65504; the norm of x, and so the result, does not.
    arguments = make_arguments(name, rows, 75, 37, torch.float16, random)
    arguments[0], arguments[1] = arguments[0] * 8000, arguments[1] * 8
    assert (arguments[0].float() * arguments[1].float()).abs().max() > 65504
    check(name, arguments, run, assert_as_close)


@pytest.mark.parametrize("rows", [1, 4, 15, 16, 33, 64])
@pytest.mark.parametrize("element_size", [2, 4])
def test_blocks(element_size, rows):
    shapes = ((3072, 2048), (16384, 1024), (2048, 8192), (1, 1), (5000, 40_000), (100_000, 8192))
    for (outputs, inputs), plain in product_of(shapes, (False, True)):
        blocks = choose_blocks(rows, outputs, inputs, element_size, paired=True, plain=plain)
        assert blocks.outputs % 2 == 0
        assert blocks.matrix == (rows >= MATRIX_ROWS)
        if blocks.matrix:
            assert blocks.rows >= rows
            assert blocks.outputs >= 16
            assert blocks.num_stages >= 3
            stage_bytes = (blocks.rows + blocks.outputs) * blocks.inputs * element_size
            assert blocks.num_stages * stage_bytes <= SHARED_BYTES
            assert blocks.parts == 1 or plain
        else:
            assert blocks.inputs >= inputs
            weights_a_thread = blocks.outputs * blocks.inputs * element_size / (32 * blocks.num_warps)
            assert weights_a_thread <= 256 or blocks.num_warps == 32


@pytest.mark.parametrize("rows", [2, 4, MATRIX_ROWS - 1])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize(("outputs", "inputs"), [(1024, 8192), (2048, 8192), (1024, 2048), (3072, 2048), (1536, 1024)])
def test_a_program_owns_enough_to_read_x_for(outputs, inputs, element_size, rows):
    blocks = choose_blocks(rows, outputs, inputs, element_size)
    assert blocks.outputs >= 4 or blocks.outputs * inputs * element_size == 64 * 1024
    assert outputs >= 256 * blocks.outputs
