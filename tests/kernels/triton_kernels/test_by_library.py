"""Operations of many rows: a library's product between kernels of ours, against the operation's reference."""

from __future__ import annotations

from collections import Counter
from types import ModuleType

import pytest
import torch

from aloud.kernels import codebook_head, linear, next_code, qkv
from aloud.kernels.draw import draw_reference
from aloud.kernels.rms_norm import plan_rms_norm
from aloud.kernels.rope import Rope, plan_rotate_qkv, rope_table
from aloud.kernels.swiglu import plan_swiglu

EPS = 1e-5
PARTS = {"rms_norm": plan_rms_norm, "swiglu": plan_swiglu, "rotate_qkv": plan_rotate_qkv}
ROWS = pytest.mark.parametrize("rows", [65])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, version: int) -> Counter[str]:
    """How often each part has been launched; they are kernels, also where the entries would take the references."""
    counts: Counter[str] = Counter()

    def as_kernel(name, plan):
        def operation(*arguments):
            launch = plan(*arguments, capability=version)
            launch.run()
            counts[name] += 1
            return launch.outputs[0]

        return operation

    modules: tuple[ModuleType, ...] = (linear, qkv, codebook_head)
    for module in modules:
        for name, plan in PARTS.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, as_kernel(name, plan))
    return counts


@pytest.fixture
def same(device, assert_as_close):
    """A function: whether an operation is its reference, with its arguments on the device."""

    def same(operation, reference, *arguments, heavy_tailed=False):
        moved = [a.to(device, copy=True) if isinstance(a, torch.Tensor) else a for a in arguments]
        wide = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
        assert_as_close(operation(*moved).cpu(), reference(*arguments), reference(*wide), heavy_tailed)

    return same


@ROWS
def test_products(rows, dtype, random, same, launched):
    x, gain = random(rows, 75, dtype=dtype), random(75, dtype=dtype)
    weight, gate_up = random(37, 75, dtype=dtype, scale=0.1), random(88, 75, dtype=dtype, scale=0.1)
    residual = random(rows, 37, dtype=dtype)
    same(linear.linear_residual_by_library, linear.linear_residual_reference, x, weight, residual)
    assert not launched
    same(linear.norm_linear_by_library, linear.norm_linear_reference, x, gain, EPS, weight)
    is_rounded = dtype != torch.float32
    same(linear.norm_swiglu_by_library, linear.norm_swiglu_reference, x, gain, EPS, gate_up, heavy_tailed=is_rounded)
    assert launched == {"rms_norm": 2, "swiglu": 1}


def test_the_residual_is_added_where_it_lies(random):
    """By the product itself: a sum of its own would be one launch more."""
    x, weight, residual = (random(*shape, dtype=torch.float32) for shape in ((65, 75), (37, 75), (65, 37)))
    assert linear.linear_residual_by_library(x, weight, residual).data_ptr() == residual.data_ptr()


@ROWS
def test_qkv(rows, dtype, random, generator, same, launched, assert_as_close):
    x, gain, weight = random(rows, 75, dtype=dtype), random(75, dtype=dtype), random(80, 75, dtype=dtype, scale=0.1)
    table = rope_table(Rope(10_000.0), 10, 11)
    places = torch.randperm(33 * 11, generator=generator)[:rows]
    caches = []

    def with_cache(operation):
        def run(x, gain, weight, table, places):
            caches.append(torch.zeros(2, 33, 2, 11, 10, dtype=x.dtype, device=x.device))
            return operation(x, gain, EPS, weight, table, caches[-1], places // 11, places % 11)

        return run

    operations = qkv.norm_qkv_rope_by_library, qkv.norm_qkv_rope_reference
    same(*map(with_cache, operations), x, gain, weight, table, places)
    ours, same_dtype, wide = (cache.cpu() for cache in caches)
    assert_as_close(ours, same_dtype, wide)
    assert launched == {"rms_norm": 1, "rotate_qkv": 1}


@ROWS
def test_head(rows, dtype, random, device, launched):
    """Logits are float32 and not rounded: of what the norm leaves, which is, they are the exact products."""
    x, gain, heads = random(rows, 75, dtype=dtype), random(75, dtype=dtype), random(3, 67, 75, dtype=dtype, scale=0.1)
    x, gain = x.to(device), gain.to(device)
    logits = codebook_head.codebook_head_by_library(x, gain, EPS, heads.to(device), 1).cpu()
    assert launched == {"rms_norm": 1}
    expected = codebook_head.rms_norm(x, gain, EPS).cpu().double() @ heads[1].double().T
    assert logits.dtype == torch.float32
    assert float((logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_draw_and_gather(rows, random, generator, device, version):
    """From logits that somebody else has made: the reference's tokens, and their embeddings."""
    logits = random(rows, 67, dtype=torch.float32, scale=3.0)
    logits[0] = torch.nan
    table = random(3 * 67, 40, dtype=torch.bfloat16)
    given = {
        "seed": torch.empty(rows, dtype=torch.int64).random_(-(2**63), None, generator=generator),
        "frame": torch.randint(2**40, (rows,), generator=generator),
        "temperature": torch.tensor([0.9, 0.0, 1.3])[torch.randint(3, (rows,), generator=generator)],
        "top_k": torch.tensor([5, 0, 50])[torch.randint(3, (rows,), generator=generator)].int(),
    }
    expected = draw_reference(logits, codebook=2, **given)
    moved = {name: value.to(device) for name, value in given.items()}
    launch = next_code.plan_draw_embed(
        logits.to(device), codebook=2, table=table.to(device), vocabulary=67, capability=version, **moved
    )
    launch.run()
    tokens, embedded = (output.cpu() for output in launch.outputs)
    assert torch.equal(tokens, expected)
    assert tokens[0] == -1
    assert torch.equal(embedded, table[tokens.clamp(min=0) + 2 * 67])
