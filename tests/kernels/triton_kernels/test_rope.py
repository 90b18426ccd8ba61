"""rotate_qkv's kernel against its reference."""

from __future__ import annotations

import pytest
import torch

from aloud.kernels.rope import Llama3Scaling, Rope, plan_rotate_qkv, rope_table, rotate_qkv, rotate_qkv_reference

SLOTS, POSITIONS = 31, 11
SHAPES = {  # heads, kv_heads, head_dim
    "odd": (3, 1, 10),
    "grouped": (6, 2, 8),
    "ungrouped": (2, 2, 32),
    "backbone": (32, 8, 64),
    "depth": (8, 2, 128),
}


def make_arguments(shape, rows, dtype, random, generator):
    """Arguments with a poisoned cache; every row has a place of its own, some in the same slot."""
    heads, kv_heads, head_dim = shape
    places = torch.randperm(SLOTS * POSITIONS, generator=generator)[:rows]
    return [
        random(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype),
        rope_table(Rope(10_000.0, Llama3Scaling(32, 0.125, 0.5, 1024)), head_dim, POSITIONS),
        torch.full((2, SLOTS, kv_heads, POSITIONS, head_dim), torch.nan, dtype=dtype),
        places // POSITIONS,
        places % POSITIONS,
    ]


def check(arguments, run, assert_as_close):
    """Run the kernel and compare queries and the whole cache with the reference's."""
    same = [argument.clone() for argument in arguments]
    wide = [argument.float() if argument.is_floating_point() else argument for argument in same]
    wide[2] = wide[2].clone()
    query_same, query_wide = rotate_qkv_reference(*same), rotate_qkv_reference(*wide)
    assert_as_close(run(plan_rotate_qkv, *arguments), query_same, query_wide)
    written = ~wide[2].isnan()
    assert torch.equal(~arguments[2].isnan(), written)
    for kind in (0, 1):
        where = written[kind]
        assert_as_close(arguments[2][kind][where], same[2][kind][where], wide[2][kind][where])
    assert torch.equal(arguments[2][1][written[1]], same[2][1][written[1]])  # values are copied


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_matches_reference(shape, rows, dtype, run, random, generator, assert_as_close):
    check(make_arguments(shape, rows, dtype, random, generator), run, assert_as_close)


def test_strided_arguments(run, random, generator, assert_as_close):
    arguments = make_arguments(SHAPES["grouped"], 66, torch.float32, random, generator)
    _, kv_heads, head_dim = SHAPES["grouped"]
    products = torch.full((66, 2, arguments[0].shape[1] + 3), torch.nan)
    products[:, 1, :-3] = arguments[0]
    arguments[0] = products[:, 1, :-3]
    cache = torch.full((2, SLOTS, 3, POSITIONS, kv_heads, head_dim), torch.nan)  # one layer of several
    arguments[2] = cache[:, :, 1].transpose(2, 3)
    check(arguments, run, assert_as_close)
    assert cache[:, :, [0, 2]].isnan().all()


def test_what_does_not_fit_is_refused(random, generator):
    arguments = make_arguments(SHAPES["odd"], 3, torch.float32, random, generator)
    with pytest.raises(ValueError, match="must fit head_dim 10 of the cache"):
        rotate_qkv(arguments[0][:, :-1], *arguments[1:])
    with pytest.raises(ValueError, match="must fit head_dim 10 of the cache"):
        rotate_qkv(arguments[0], arguments[1][:, :, :-1], *arguments[2:])
