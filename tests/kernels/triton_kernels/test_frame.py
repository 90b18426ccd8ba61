"""A whole frame of a small CSM with every operation as its kernel: the reference's tokens, greedy and drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aloud import Runtime, Sampling, Segment
from aloud.kernels import attention, frame_state, linear, next_code, qkv
from aloud.kernels.launch import Launch
from aloud.models import csm, transformer
from aloud.models.csm import CsmState
from aloud.prepare import read_segments
from aloud.prompt_block import Piece, pack
from oracle import csm as oracle
from ptx_machine.launches import Chain

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a device")
OPERATIONS: dict[str, tuple[tuple[Any, ...], Callable[..., Launch | tuple[Launch, ...]]]] = {
    "norm_qkv_rope": ((transformer,), qkv.plan_norm_qkv_rope),
    "attention_output": ((transformer,), attention.plan_attention_output),
    "norm_swiglu": ((transformer,), linear.plan_norm_swiglu),
    "linear_residual": ((transformer,), linear.plan_linear_residual),
    "norm_linear": ((csm,), linear.plan_norm_linear),
    "next_code": ((csm,), next_code.plan_next_code),
    "begin_frame": ((csm,), frame_state.plan_begin_frame),
    "end_frame": ((csm,), frame_state.plan_end_frame),
}


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    config = oracle.small_config(codebooks=4, rope=oracle.LLAMA3, depth_rope=oracle.DEPTH_LLAMA3, positions=100)
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    return Runtime.load(oracle.save(oracle.random_model(config, seed=3), folder), device="cpu")


def prefilled(runtime: Runtime, sampling: list[Sampling]) -> tuple[CsmState, torch.Tensor]:
    """Some streams with prompts of different lengths, in slots out of order."""
    model = runtime._model
    rows = len(sampling)
    state = model.allocate(rows + 2, model.max_positions)  # the first is nobody's, the last the scratch slot
    for cache in (state.backbone_cache, state.depth_cache):
        cache.fill_(torch.nan)  # nothing that was not written may be read
    slots = torch.arange(rows, 0, -1)
    for row, (slot, how) in enumerate(zip(slots.tolist(), sampling, strict=True)):
        segments = [Segment("Hello. " * (row + 1), speaker=row)]
        prompt, _ = read_segments(model, runtime._tokenizer, segments, max_positions=model.max_positions)
        model.start(state, slot, how, 100 + row, len(prompt))
        model.prefill(state, pack([Piece(slot, prompt, 0, len(prompt), 0)], len(prompt), rows + 1))
    return state, slots


@pytest.mark.parametrize("rows", [1, 3])
def test_a_frame_of_kernels_draws_the_references_tokens(
    runtime: Runtime, rows: int, version: int, interpreted: bool, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = Sampling(0.0, 0, 0.0, 0)
    sampling = [greedy, Sampling(0.9, 20, 0.8, 10), replace(greedy, depth_temperature=1.0)][:rows]
    config, weights = runtime._model.config, runtime._model.weights
    expected_state, slots = prefilled(runtime, sampling)
    expected = csm.draw_codes(config, weights, expected_state, slots)
    state, slots = prefilled(runtime, sampling)
    launched: Counter[str] = Counter()

    def as_kernel(name: str, plan: Callable[..., Launch | tuple[Launch, ...]]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            planned = plan(*arguments, **options, capability=version)
            launches = planned if isinstance(planned, tuple) else (planned,)
            for launch in launches:
                launch.run()
            launched[name] += 1
            outputs = launches[-1].outputs
            if name == "begin_frame":
                return frame_state.FrameRows(*outputs)
            return outputs[0] if len(outputs) == 1 else outputs

        return operation

    for name, (modules, plan) in OPERATIONS.items():
        for module in modules:
            monkeypatch.setattr(module, name, as_kernel(name, plan))
    codes = csm.draw_codes(config, weights, state, slots)
    assert torch.equal(codes, expected)
    assert (codes >= 0).all()
    assert set(launched) == set(OPERATIONS)
    if not interpreted:
        assert chain.written
        assert bool(chain.read_early) == (version >= 90)  # weights, before the wait for the kernel before
    assert not chain.conflicts()
    torch.testing.assert_close(state.next_input, expected_state.next_input, rtol=1e-5, atol=1e-6)
    assert torch.equal(state.position, expected_state.position)
    assert torch.equal(state.frame, expected_state.frame)
