"""norm_qkv_rope's kernel against its reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from aloud.kernels.qkv import norm_qkv_rope_reference, plan_norm_qkv_rope
from aloud.kernels.rope import Llama3Scaling, Rope, rope_table

EPS = 1e-5
SLOTS, POSITIONS = 9, 11


@dataclass(frozen=True)
class Shape:
    """An attention block's sizes."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int


SHAPES = {
    "odd": Shape(heads=3, kv_heads=1, head_dim=10, hidden_size=75),
    "grouped": Shape(heads=6, kv_heads=2, head_dim=8, hidden_size=40),
    "ungrouped": Shape(heads=2, kv_heads=2, head_dim=32, hidden_size=130),
    "wide heads": Shape(heads=1, kv_heads=1, head_dim=128, hidden_size=96),
}


def make_arguments(shape: Shape, rows, dtype, random, generator):
    """Arguments with a poisoned cache; every row has a place of its own, some in the same slot."""
    outputs = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    places = torch.randperm(SLOTS * POSITIONS, generator=generator)[:rows]
    return [
        random(rows, shape.hidden_size, dtype=dtype),
        random(shape.hidden_size, dtype=dtype),
        EPS,
        random(outputs, shape.hidden_size, dtype=dtype, scale=shape.hidden_size**-0.5),
        rope_table(Rope(10_000.0, Llama3Scaling(32, 0.125, 0.5, 1024)), shape.head_dim, POSITIONS),
        torch.full((2, SLOTS, shape.kv_heads, POSITIONS, shape.head_dim), torch.nan, dtype=dtype),
        places // POSITIONS,
        places % POSITIONS,
    ]


def check(arguments, run, assert_as_close):
    """Run the kernel and compare queries and the whole cache, together, with the reference's."""
    same = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    wide = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in same]
    wide[5] = wide[5].clone()
    query_same, query_wide = norm_qkv_rope_reference(*same), norm_qkv_rope_reference(*wide)
    query, cache = run(plan_norm_qkv_rope, *arguments), arguments[5]
    written = ~wide[5].isnan()
    assert torch.equal(~cache.isnan(), written)
    made = ((query, cache), (query_same, same[5]), (query_wide, wide[5]))
    assert_as_close(*(torch.cat([query.flatten(), cache[written]]) for query, cache in made))


@pytest.mark.usefixtures("as_at_full_size")
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 15, 16, 17, 64])
def test_row_counts(rows, dtype, run, random, generator, assert_as_close):
    check(make_arguments(SHAPES["odd"], rows, dtype, random, generator), run, assert_as_close)


@pytest.mark.usefixtures("as_at_full_size")
@pytest.mark.parametrize("rows", [2, 17], ids="{} rows".format)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_shapes(shape, rows, dtype, run, random, generator, assert_as_close):
    check(make_arguments(shape, rows, dtype, random, generator), run, assert_as_close)


@pytest.mark.parametrize("rows", [3, 16], ids="{} rows".format)
def test_strided_arguments(rows, run, random, generator, assert_as_close):
    arguments = make_arguments(SHAPES["grouped"], rows, torch.float32, random, generator)
    shape = SHAPES["grouped"]
    arguments[0] = random(rows, 2, shape.hidden_size, dtype=torch.float32)[:, 1]
    arguments[3] = random(2 * len(arguments[3]), shape.hidden_size, dtype=torch.float32, scale=0.1)[::2]
    # One layer of several, with the positions outside the heads.
    cache = torch.full((2, SLOTS, 3, POSITIONS, shape.kv_heads, shape.head_dim), torch.nan)
    arguments[5] = cache[:, :, 1].transpose(2, 3)
    check(arguments, run, assert_as_close)
    assert cache[:, :, [0, 2]].isnan().all()


@pytest.mark.usefixtures("as_at_full_size")
@pytest.mark.parametrize("rows", [3, 16], ids="{} rows".format)
def test_values_are_not_rotated(rows, run, random, generator):
    arguments = make_arguments(SHAPES["odd"], rows, torch.float32, random, generator)
    arguments[4] = torch.full_like(arguments[4], torch.nan)
    query = run(plan_norm_qkv_rope, *arguments)
    cache, slots, positions = arguments[5:]
    assert query.isnan().all()
    assert cache[0, slots, :, positions].isnan().all()
    assert cache[1, slots, :, positions].isfinite().all()


def test_position_0_is_the_product_itself(run, random, generator):
    arguments = make_arguments(SHAPES["odd"], 1, torch.float32, random, generator)
    arguments[7] = torch.zeros(1, dtype=torch.int64)
    x, gain, eps, weight, _, cache, slots, _ = arguments
    query = run(plan_norm_qkv_rope, *arguments)
    normed = torch.nn.functional.rms_norm(x.double(), x.shape[1:], gain.double(), eps)
    whole = torch.cat([query[0].flatten(), cache[0, slots[0], :, 0].flatten(), cache[1, slots[0], :, 0].flatten()])
    torch.testing.assert_close(whole.double(), (normed @ weight.double().T)[0], rtol=1e-5, atol=1e-5)
