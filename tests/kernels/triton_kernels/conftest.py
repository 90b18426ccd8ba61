"""Kernels against their references: in Triton's interpreter on the CPU, or, where there is one, on the GPU.

tests/conftest.py turns the interpreter on, before any kernel is defined, where there is no CUDA device. With
TRITON_INTERPRET=0 set there, kernels are compiled for `--compute-capability`, and tests/ptx_machine runs the code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

from aloud.kernels import linear, product
from aloud.kernels.launch import Launch, capability
from ptx_machine.launches import Chain

ON_GPU = torch.cuda.is_available()
INTERPRETED = not ON_GPU and knobs.runtime.interpret
INTERPRETER_CAPABILITY = 80  # the interpreter knows no programmatic launches
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        is_machines = item.get_closest_marker("machine") is not None
        if ON_GPU and Path(__file__).parent in item.path.parents and not is_machines:
            item.add_marker("gpu")


@pytest.fixture(autouse=True, scope="session")
def faithful_interpreter() -> Iterator[None]:
    """Mend Triton 3.6's interpreter where it differs from a GPU.

    bfloat16: it cuts off bits where a GPU rounds to nearest even, and `tl.dot` multiplies the bit patterns as integers.
    Loops to a number that is an argument: it converts an array of one element to an int, which NumPy 2.4 refuses.
    """
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot, patch_tensor = builder.cast_impl, builder.create_dot, interpreter._patch_lang_tensor

    def rounding_cast(self: Any, source: Any, to: Any) -> Any:
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, to)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return handle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def widening_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    def patch_tensor_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "cast_impl", rounding_cast)
        patch.setattr(builder, "create_dot", widening_dot)
        patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_with_index)
        yield


@pytest.fixture(autouse=True)
def run_by_the_machine(chain: Chain) -> None:
    """Launches are the machine's, where neither a GPU nor the interpreter runs them."""


@pytest.fixture
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return INTERPRETED


@pytest.fixture
def version(device: torch.device, request: pytest.FixtureRequest) -> int:
    """The compute capability to plan for."""
    if ON_GPU:
        return capability(device)
    return INTERPRETER_CAPABILITY if INTERPRETED else request.config.getoption("--compute-capability")


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype that weights may have."""
    value: torch.dtype = request.param
    return value


@pytest.fixture
def run(device: torch.device, version: int) -> Callable[..., torch.Tensor]:
    """A function: plan one launch or several, run them, return the last one's first output on the CPU."""

    def run(plan: Callable[..., Launch | tuple[Launch, ...]], *arguments: object) -> torch.Tensor:
        moved = [argument.to(device) if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        planned = plan(*moved, capability=version)
        for launch in planned if isinstance(planned, tuple) else (planned,):
            launch.run()
        for before, after in zip(arguments, moved, strict=True):
            if isinstance(before, torch.Tensor) and before.device != device:
                before.copy_(after)  # what the kernel wrote into its arguments
        return launch.outputs[0].cpu()

    return run


@pytest.fixture
def random(generator: torch.Generator) -> Callable[..., torch.Tensor]:
    """A function: normal numbers of a shape and dtype, on the CPU."""

    def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    return random


@pytest.fixture
def as_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give programs 8 rows of the weight each, which small weights would not have, in the kernels on vector units."""
    choose = product.choose_blocks

    def choose_more(*arguments: int, **options: bool) -> product.Blocks:
        blocks = choose(*arguments, **options)
        return blocks if blocks.matrix else dataclasses.replace(blocks, outputs=8)

    for module in (product, linear):
        monkeypatch.setattr(module, "choose_blocks", choose_more)


@pytest.fixture
def assert_as_close() -> Callable[..., None]:
    """A function of (ours, the reference in the same dtype, the reference in float32).

    float32 must be within 1e-5 of the largest magnitude, or of 0.05 where all of it cancels: inputs are about 1, and so
    is what an error is made of. The largest error in bfloat16 and float16 within twice that which PyTorch makes in that
    dtype; if `heavy_tailed`, the root of the mean square of the errors within twice PyTorch's.
    """

    def assert_as_close(
        ours: torch.Tensor, same_dtype: torch.Tensor, wide: torch.Tensor, heavy_tailed: bool = False
    ) -> None:
        assert ours.shape == wide.shape
        assert ours.dtype == same_dtype.dtype
        assert wide.isfinite().all()
        order = 2 if heavy_tailed else torch.inf
        error = (ours.float() - wide).norm(order).item()
        if ours.dtype == torch.float32:
            allowed = 1e-5 * max(wide.norm(order).item(), 0.05)
        else:
            allowed = 2 * (same_dtype.float() - wide).norm(order).item()
        assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"

    return assert_as_close
