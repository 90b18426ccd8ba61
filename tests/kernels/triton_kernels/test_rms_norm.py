"""RMSNorm's kernel against its reference."""

from __future__ import annotations

import pytest
import torch

from aloud.kernels.rms_norm import plan_rms_norm, rms_norm_reference

EPS = 1e-5


@pytest.mark.parametrize("hidden_size", [1, 40, 75, 128, 300, 1000])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 17, 64])
def test_matches_reference(rows, hidden_size, dtype, run, random, assert_as_close):
    x, gain = random(rows, hidden_size, dtype=dtype), random(hidden_size, dtype=dtype)
    ours = run(plan_rms_norm, x, gain, EPS)
    assert_as_close(ours, rms_norm_reference(x, gain, EPS), rms_norm_reference(x.float(), gain.float(), EPS))


def test_rounds_as_the_reference(dtype, run, random):
    # Away from ties the only difference is the order of one float32 sum: nearly every element is the same number.
    x, gain = random(64, 300, dtype=dtype), random(300, dtype=dtype)
    same = run(plan_rms_norm, x, gain, EPS) == rms_norm_reference(x, gain, EPS)
    assert same.float().mean() > (0.4 if dtype == torch.float32 else 0.995)


def test_strided_rows(dtype, run, random, assert_as_close):
    x, gain = random(7, 3, 75, dtype=dtype)[:, 1], random(75, dtype=dtype)
    assert not x.is_contiguous()
    ours = run(plan_rms_norm, x, gain, EPS)
    assert_as_close(ours, rms_norm_reference(x, gain, EPS), rms_norm_reference(x.float(), gain.float(), EPS))


def test_eps_counts(run, random):
    x, gain = torch.zeros(2, 40), random(40, dtype=torch.float32)
    assert torch.equal(run(plan_rms_norm, x, gain, EPS), torch.zeros(2, 40))


def test_scattered_elements_are_refused(random):
    x = random(40, 7, dtype=torch.float32).T
    with pytest.raises(ValueError, match="x's last dimension must be contiguous"):
        plan_rms_norm(x, random(40, dtype=torch.float32), EPS, capability=80)
