"""Triton's names, as kernels use them; without Triton (macOS, Windows), kernels are defined and never run.

There, tensors are on the CPU and every operation is its reference, so nothing is lost; only the definitions of kernels
must not fail.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:

    class _Absent:
        """Whatever is asked of it, decorators included, it is itself."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return self

    triton = tl = gdc_launch_dependents = gdc_wait = _Absent()

__all__ = ["gdc_launch_dependents", "gdc_wait", "tl", "triton"]
