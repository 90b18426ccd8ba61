"""A codebook's head: the final norm and the product with that codebook's own weight, in one.

    logits = rms_norm(x) heads[codebook]^T

Logits are float32 and are not rounded to the weights' dtype. The kernel is `norm_linear`'s, with float32 results; its
launch table is in product.py. For more rows than it takes, the product is cuBLAS's.
"""

from __future__ import annotations

import torch

from aloud.kernels.check import check
from aloud.kernels.launch import Launch, capability, require_rows
from aloud.kernels.linear import norm_linear_kernel
from aloud.kernels.product import MAX_ROWS, plan_product
from aloud.kernels.rms_norm import rms_norm, rms_norm_reference
from aloud.kernels.row_product import row_product


def codebook_head_reference(
    x: torch.Tensor, gain: torch.Tensor, eps: float, heads: torch.Tensor, codebook: int
) -> torch.Tensor:
    """The definition of `codebook_head`."""
    return row_product(rms_norm_reference(x, gain, eps).float(), heads[codebook].float())


def plan_codebook_head(
    x: torch.Tensor, gain: torch.Tensor, eps: float, heads: torch.Tensor, codebook: int, *, capability: int
) -> Launch:
    """The launch behind `codebook_head`, for up to 64 rows."""
    require_rows(x=x, gain=gain, heads=heads)
    weight = heads[codebook]
    logits = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    return plan_product(norm_linear_kernel, {"gain_ptr": gain, "eps": eps}, x, weight, logits, capability=capability)


def codebook_head_by_library(
    x: torch.Tensor, gain: torch.Tensor, eps: float, heads: torch.Tensor, codebook: int
) -> torch.Tensor:
    """`codebook_head` of many rows, whose product is cuBLAS's."""
    x, weight = rms_norm(x, gain, eps), heads[codebook]
    if not x.is_cuda or x.dtype == torch.float32:
        return x.float() @ weight.float().T
    return torch.mm(x, weight.T, out_dtype=torch.float32)


def codebook_head(x: torch.Tensor, gain: torch.Tensor, eps: float, heads: torch.Tensor, codebook: int) -> torch.Tensor:
    """Logits of one codebook: x [rows, hidden_size], gain [hidden_size], heads [codebooks, vocabulary, hidden_size].

    `codebook` counts from 0 among `heads`. -> float32 [rows, vocabulary]
    """
    sizes: dict[str, int] = {}
    check("x", x, "rows hidden_size", sizes)
    check("gain", gain, "hidden_size", sizes, dtype=x.dtype, device=x.device)
    check("heads", heads, "codebooks vocabulary hidden_size", sizes, dtype=x.dtype, device=x.device)
    if not 0 <= codebook < sizes["codebooks"]:
        raise ValueError(f"codebook must be 0 to {sizes['codebooks'] - 1}, got {codebook}")
    if not x.is_cuda:
        return codebook_head_reference(x, gain, eps, heads, codebook)
    if sizes["rows"] > MAX_ROWS:
        return codebook_head_by_library(x, gain, eps, heads, codebook)
    launch = plan_codebook_head(x, gain, eps, heads, codebook, capability=capability(x.device))
    launch.run()
    return launch.outputs[0]
