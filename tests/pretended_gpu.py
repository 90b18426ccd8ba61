"""A GPU that is not there: CUDA tensors of shapes without values, and all that a GPU would be asked for.

Torch's fake tensors know their device, so the entries of our operations take the way that they take on a GPU. It fails
on tensors of two devices, and where the host would have to wait for the device. Kernels are planned and kept, not run.
Torch's own operations are counted as they are called; what a library makes of one is its own affair.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aloud.checkpoint import csm as checkpoint
from aloud.checkpoint.csm_config import read_csm_config
from aloud.checkpoint.random import CONFIGS
from aloud.kernels import launch
from aloud.kernels.launch import Launch
from aloud.models.csm import Csm

GRID_LIMITS = (2**31 - 1, 2**16 - 1, 2**16 - 1)
"""Programs in each direction (CUDA C++ Programming Guide, technical specifications)."""
FREE = {"empty", "view", "_unsafe_view", "t", "transpose", "split", "split_with_sizes", "slice", "select", "unsqueeze"}
FREE |= {"expand", "detach", "alias", "unbind", "unflatten", "permute", "as_strided", "new_empty", "empty_strided"}
FREE |= {"device"}
"""Operations of torch that ask a device for nothing."""


class Asked(TorchDispatchMode):
    """What is asked since the last `clear`: launches of kernels, and torch's operations by name.

    on_host: of these, the ones whose result is on the host, from where a capture could not copy it.
    waits: copies to the device that the host waits for: of its ordinary memory, so also of a number that is assigned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.others: Counter[str] = Counter()
        self.on_host: Counter[str] = Counter()
        self.waits = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket._qualified_op_name.split("::")[1]
        if name not in FREE:
            self.others[name] += 1
        result = function(*args, **(kwargs or {}))
        is_read = any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in tree_leaves((args, kwargs)))
        assert not is_read or all(leaf.is_cuda for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)), (
            f"the host waits for {name}"
        )
        if name == "copy_" and args[0].is_cuda and not args[1].is_cuda:
            self.waits += not (args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking", False))
        if any(isinstance(leaf, torch.Tensor) and not leaf.is_cuda for leaf in tree_leaves(result)):
            self.on_host[name] += 1
        return result

    @property
    def kernels(self) -> Counter[str]:
        """Launches by the kernel's name."""
        return Counter(launch.kernel.__name__.removesuffix("_kernel") for launch in self.launches)

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor
    ) -> torch.Tensor:
        """Torch's attention as one operation: of which kernels it is made, the device decides."""
        assert attn_mask.device == query.device == key.device == value.device
        self.others["scaled_dot_product_attention"] += 1
        return query.new_empty(query.shape)

    def launch(self, launch: Launch) -> None:
        """Keep a launch, which must be one that a device could make."""
        tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
        assert {tensor.device for tensor in tensors} == {torch.device("cuda", 0)}, launch
        assert all(0 < programs <= most for programs, most in zip(launch.grid, GRID_LIMITS, strict=False)), launch.grid
        self.launches.append(launch)

    def clear(self) -> None:
        """Forget what has been asked."""
        self.launches.clear()
        self.others.clear()
        self.on_host.clear()
        self.waits = 0


@contextmanager
def pretended_gpu(capability: int = 90) -> Iterator[Asked]:
    """A GPU of a compute capability (90 for 9.0), of which nothing but questions is known."""
    asked = Asked()
    launch.capability.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Launch, "run", lambda launch: asked.launch(launch))  # a method: it is given the launch
            patch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10))
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", asked.attention)
            with _no_device_to_switch_to(), FakeTensorMode(), torch.no_grad(), asked:
                yield asked
    finally:
        launch.capability.cache_clear()


@contextmanager
def _no_device_to_switch_to() -> Iterator[None]:
    """Around some operations, torch makes a tensor's device the current one, by a guard that only its CUDA library has,
    and that wants a driver. That of meta tensors does nothing.
    """
    if torch.cuda.is_available():
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    cuda, meta = 1, 14  # c10::DeviceType
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[cuda]
    guards[cuda] = guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


class _Shapes:
    """Tensors of a checkpoint without values, read as from its files."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def names(self) -> set[str]:
        return set(self._shapes)

    def read(self, name: str) -> torch.Tensor:
        return torch.empty(self._shapes[name])


def load(size: str, dtype: torch.dtype) -> Csm:
    """A model of `CONFIGS` on the pretended GPU, loaded as a checkpoint is."""
    config = read_csm_config(CONFIGS[size])
    reader: Any = _Shapes(checkpoint.expected_tensors(config, "transformers", tied=False))
    device = torch.device("cuda", 0)
    weights = checkpoint.load_weights(config, reader, "transformers", device=device, dtype=dtype)
    return Csm(config, weights, checkpoint.load_codec(config, reader, device=device))
