"""SwiGLU of products that a library has made (Shazeer 2020, arXiv:2002.05202).

    y = silu(gate) * up,     [gate, up] = products,     silu(g) = g / (1 + exp(-g))

silu and y are rounded to the products' dtype. Where a kernel makes the products, it does this itself (linear.py).
"""

from __future__ import annotations

import torch

from aloud.kernels.check import check
from aloud.kernels.launch import PROGRAMMATIC_LAUNCH_CAPABILITY, Launch, capability, ceil_div, require_rows
from aloud.kernels.row_product import row_silu
from aloud.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton


def swiglu_reference(products: torch.Tensor) -> torch.Tensor:
    """The definition of `swiglu`."""
    gate, up = products.chunk(2, dim=-1)
    return row_silu(gate) * up


# --- launch table -----------------------------------------------------------------------------------------------------
# 8 columns for each of 128 threads: a load of 16 bytes of either half in bfloat16. Rows are many.

COLUMNS = 1024


# --- kernel -----------------------------------------------------------------------------------------------------------


@triton.jit
def rounded_swiglu(gate, up, dtype: tl.constexpr):
    """silu(gate) * up of float32, silu rounded to dtype as the reference rounds it -> float32."""
    return (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up


@triton.jit
def swiglu_kernel(products_ptr, y_ptr, stride_products_row, width, COLUMNS: tl.constexpr, PROGRAMMATIC: tl.constexpr):
    """One program makes COLUMNS columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    if PROGRAMMATIC:
        gdc_launch_dependents()
        gdc_wait()
    gate_ptrs = products_ptr + row * stride_products_row + column
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + width, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    tl.store(y_ptr + row * width + column, rounded_swiglu(gate, up, dtype).to(dtype), mask=inside)


# --- plan and entry ---------------------------------------------------------------------------------------------------


def plan_swiglu(products: torch.Tensor, *, capability: int) -> Launch:
    """Plan `swiglu` for a compute capability (90 for 9.0)."""
    require_rows(products=products)
    rows, width = products.shape[0], products.shape[1] // 2
    y = torch.empty(rows, width, device=products.device, dtype=products.dtype)
    programmatic = capability >= PROGRAMMATIC_LAUNCH_CAPABILITY
    return Launch(
        swiglu_kernel,
        grid=(rows, ceil_div(width, COLUMNS)),
        arguments={
            "products_ptr": products,
            "y_ptr": y,
            "stride_products_row": products.stride(0),
            "width": width,
        },
        constants={"COLUMNS": COLUMNS, "PROGRAMMATIC": programmatic},
        programmatic=programmatic,
        outputs=(y,),
    )


def swiglu(products: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: products [rows, 2 * width], the gates before the ups -> [rows, width]."""
    sizes: dict[str, int] = {}
    check("products", products, "rows twice_width", sizes)
    if sizes["twice_width"] % 2:
        raise ValueError(f"products must have an even number of columns, got {sizes['twice_width']}")
    if not products.is_cuda:
        return swiglu_reference(products)
    launch = plan_swiglu(products, capability=capability(products.device))
    launch.run()
    return launch.outputs[0]
