"""RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467).

    y = gain * x / sqrt(mean(x^2) + eps)

The mean is over the last dimension and is taken in float32; the normed value is rounded to x's dtype before it meets
the gain, as transformers rounds.
"""

from __future__ import annotations

from typing import Any

import torch

from aloud.kernels.check import check
from aloud.kernels.launch import (
    PROGRAMMATIC_LAUNCH_CAPABILITY,
    Launch,
    capability,
    next_power_of_2,
    require_rows,
)
from aloud.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton


def rms_norm_reference(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition of `rms_norm`."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return gain * normed.to(x.dtype)


@triton.jit
def normed(x, gain, eps, size, axis: tl.constexpr, dtype: tl.constexpr):
    """Norm float32 x of `size` elements along `axis`, 0 beyond, with the reference's roundings -> float32."""
    inverse = tl.math.rsqrt(tl.sum(x * x, axis=axis, keep_dims=True) / size + eps)
    return ((x * inverse).to(dtype).to(tl.float32) * gain.to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def rms_norm_kernel(
    x_ptr,
    gain_ptr,
    y_ptr,
    stride_x_row,
    stride_y_row,
    hidden_size,
    eps,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One program norms one row."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < hidden_size
    if PROGRAMMATIC:
        gdc_launch_dependents()
    gain = tl.load(gain_ptr + place, mask=inside, other=0.0)
    if PROGRAMMATIC:
        gdc_wait()
    x = tl.load(x_ptr + row * stride_x_row + place, mask=inside, other=0.0)
    y = normed(x.to(tl.float32), gain, eps, hidden_size, axis=0, dtype=x.dtype)
    tl.store(y_ptr + row * stride_y_row + place, y.to(x.dtype), mask=inside)


def plan_rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float, *, capability: int) -> Launch:
    """Plan `rms_norm` for a compute capability (90 for 9.0)."""
    require_rows(x=x, gain=gain)
    rows, hidden_size = x.shape
    y = torch.empty(rows, hidden_size, device=x.device, dtype=x.dtype)
    arguments: dict[str, Any] = {"x_ptr": x, "gain_ptr": gain, "y_ptr": y}
    arguments |= {"stride_x_row": x.stride(0), "stride_y_row": y.stride(0), "hidden_size": hidden_size, "eps": eps}
    block = next_power_of_2(hidden_size)
    programmatic = capability >= PROGRAMMATIC_LAUNCH_CAPABILITY
    return Launch(
        kernel=rms_norm_kernel,
        grid=(rows,),
        arguments=arguments,
        constants={"BLOCK": block, "PROGRAMMATIC": programmatic},
        # 16 elements a thread: at 2,048, two loads of 16 bytes in bfloat16.
        num_warps=min(max(block // (16 * 32), 1), 16),
        programmatic=programmatic,
        outputs=(y,),
    )


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm each row: x [rows, hidden_size], gain [hidden_size], both of one dtype -> [rows, hidden_size]."""
    sizes: dict[str, int] = {}
    check("x", x, "rows hidden_size", sizes)
    check("gain", gain, "hidden_size", sizes, dtype=x.dtype, device=x.device)
    if x.device.type == "cpu":
        return rms_norm_reference(x, gain, eps)
    launch = plan_rms_norm(x, gain, eps, capability=capability(x.device))
    launch.run()
    return launch.outputs[0]
