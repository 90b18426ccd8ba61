"""What every test shares: a fresh seed printed on failure, poisoned uninitialised memory, the gpu marker."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

# Some virtual machines advertise AMX and then end the process at its first instruction; bfloat16 products meet it.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
# Without it, cuBLAS refuses to run under deterministic algorithms, which are asked for below.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined, so it is set before any is imported: kernels run in its interpreter,
    # or, where somebody has set it to 0, what they compile to runs in tests/ptx_machine.
    os.environ.setdefault("TRITON_INTERPRET", "1")
MACHINE = not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "0"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of the random inputs (default: fresh each run)")
    parser.addoption(
        "--compute-capability",
        type=int,
        default=90,
        help="what kernels are compiled for under TRITON_INTERPRET=0 (default: 90)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist: the seed is that of the whole run
        config.option.seed = config.workerinput["seed"]
    elif config.getoption("--seed") is None:
        config.option.seed = secrets.randbelow(2**31)
    # Memory from torch.empty is filled with NaN, so that an element left unwritten is seen.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    # Small models: threads cost more than they bring, and most of all where several processes test at once.
    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["seed"] = node.config.getoption("--seed")


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs: --seed {config.getoption('--seed')}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        # Markers, not keywords, which folders' names are too.
        is_gpus, is_machines = (item.get_closest_marker(name) is not None for name in ("gpu", "machine"))
        if (is_gpus and torch.cuda.is_available()) or (is_machines and MACHINE):
            continue
        if is_gpus:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif is_machines:
            item.add_marker(pytest.mark.skip(reason="of the machine in tests/ptx_machine: TRITON_INTERPRET=0"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """This run's seed for random inputs; repeat a run with `--seed N`."""
    value: int = request.config.getoption("--seed")
    print(f"random inputs: --seed {value}")
    return value


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A torch generator on the CPU, seeded with `seed`."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def chain(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the machine in tests/ptx_machine has run: every launch, where neither a GPU nor the interpreter does."""
    from aloud.kernels.launch import Launch
    from ptx_machine import launches

    chain = launches.Chain()
    if MACHINE:
        capability = request.config.getoption("--compute-capability")
        generator = np.random.default_rng(request.config.getoption("--seed"))
        monkeypatch.setattr(Launch, "run", lambda launch: chain.add(launches.run(launch, capability, generator)))
    return chain


@pytest.fixture
def act_as_on_a_gpu(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, chain: Any
) -> Iterator[Callable[[], None]]:
    """A function: from now on, operations take the way that they take on a GPU, and the machine runs their launches."""
    from aloud.kernels.launch import capability

    def act() -> None:
        assert MACHINE
        version = request.config.getoption("--compute-capability")
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(version, 10))

    capability.cache_clear()
    yield act
    capability.cache_clear()


@pytest.fixture(autouse=True)
def all_threads_at_full_size(request: pytest.FixtureRequest) -> Iterator[None]:
    """The full-size model gets every core."""
    if request.node.get_closest_marker("full_size") is None:
        yield
        return
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)
