"""Frames and prompts of more than 64 rows: products by a library, sums in the residual's place, the same values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from aloud import Runtime, Sampling
from aloud.kernels import attention, codebook_head, linear, next_code, qkv
from aloud.models import csm, transformer
from aloud.models.csm import CsmState
from aloud.prompt_block import Piece, pack
from aloud.request import Prompt
from oracle import csm as oracle

CODEBOOKS = 5
BY_LIBRARY = {
    (transformer, "norm_qkv_rope"): qkv.norm_qkv_rope_by_library,
    (attention, "linear_residual_reference"): linear.linear_residual_by_library,
    (transformer, "norm_swiglu"): linear.norm_swiglu_by_library,
    (transformer, "linear_residual"): linear.linear_residual_by_library,
    (csm, "norm_linear"): linear.norm_linear_by_library,
    (next_code, "codebook_head_reference"): codebook_head.codebook_head_by_library,
}
"""What each operation calls on a CPU, and what it calls on a GPU for many rows."""


@contextmanager
def by_library() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), operation in BY_LIBRARY.items():
            patch.setattr(module, name, operation)
        yield


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    config = oracle.small_config(layers=3, codebooks=CODEBOOKS)
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    return Runtime.load(oracle.save(oracle.random_model(config, seed=3), folder), device="cpu")


def streams(runtime: Runtime, rows: int) -> CsmState:
    """Some that differ, with ten positions of noise behind them."""
    model, generator = runtime._model, torch.Generator().manual_seed(rows)
    state = model.allocate(rows + 1, model.max_positions)
    for memory in (state.backbone_cache, state.depth_cache, state.next_input):
        memory.normal_(generator=generator)
    for slot in range(rows):
        model.start(state, slot, Sampling(0.9, 5, 0.9, 5), slot, 10)
    return state


@pytest.mark.parametrize("rows", [1, 70])
def test_a_frame(runtime: Runtime, rows: int) -> None:
    slots = torch.arange(rows)
    ours, expected = (streams(runtime, rows) for _ in range(2))
    expected_codes = runtime._model.draw(expected, slots)
    with by_library():
        codes = runtime._model.draw(ours, slots)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(ours.position, expected.position)
    assert torch.equal(ours.frame, expected.frame)
    torch.testing.assert_close(ours.next_input, expected.next_input, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("positions", [3, 70])
def test_a_prompt(runtime: Runtime, positions: int) -> None:
    model = runtime._model
    ours, expected = (model.allocate(3, 128) for _ in range(2))
    prompt = Prompt(torch.arange(positions) % 5, torch.zeros(positions, CODEBOOKS, dtype=torch.int64))
    block = pack([Piece(1, prompt, 0, positions, 0)], positions, 2)
    with by_library():
        model.prefill(ours, block)
    model.prefill(expected, block)
    assert torch.equal(ours.next_input[1], expected.next_input[1])
    read = (slice(None), slice(None), 1, slice(None), slice(positions))
    torch.testing.assert_close(ours.backbone_cache[read], expected.backbone_cache[read], rtol=1e-4, atol=1e-5)
