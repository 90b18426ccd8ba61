"""What a GPU is asked to do for a frame and for a prompt: kernels, a library's products, and next to nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from aloud import Runtime, Sampling
from aloud.kernels import (
    attention,
    codebook_head,
    decode_attention,
    embedding,
    frame_state,
    linear,
    next_code,
    qkv,
    rms_norm,
    rope,
    swiglu,
)
from aloud.kernels.product import MAX_ROWS
from aloud.models import csm, transformer
from aloud.models.csm import CsmState
from aloud.prompt_block import Piece, pack
from aloud.request import Prompt
from oracle import csm as oracle

LAYERS, DEPTH_LAYERS, CODEBOOKS = 3, 2, 5
FREE = {"empty", "view", "_unsafe_view", "t", "transpose", "split", "split_with_sizes", "slice", "select", "unsqueeze"}
FREE |= {"expand", "detach", "alias", "unbind", "unflatten", "permute", "as_strided", "new_empty", "empty_strided"}
"""Operations of torch that ask a device for nothing."""


class Asked(TorchDispatchMode):
    """Counts kernels by the operation that plans them, and whatever else torch is asked for by its own name."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket._qualified_op_name.split("::")[1]
        if name not in FREE:
            self.others[name] += 1
        return function(*args, **(kwargs or {}))

    def kernel(self, name: str, plan: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
        """An operation whose launches are planned and counted, and not run."""

        def operation(*arguments: Any, **options: Any) -> Any:
            planned = plan(*arguments, **options, capability=90)
            self.launches[name] += len(planned) if isinstance(planned, tuple) else 1
            options.pop("scratch", None)
            with _disable_current_modes():
                return reference(*arguments, **options)

        return operation


@contextmanager
def on_a_gpu(asked: Asked) -> Iterator[None]:
    """The models' operations, each call as its entry would have it on a GPU, by its rows: what the entries say there,
    said again, because they ask the tensors where they are.
    """

    def planned(module: Any, name: str) -> Callable[..., Any]:
        return asked.kernel(name, getattr(module, f"plan_{name}"), getattr(module, f"{name}_reference"))

    attention_alone = planned(decode_attention, "decode_attention")
    draw_embed = asked.kernel("draw_embed", next_code.plan_draw_embed, draw_embed_reference)

    def attention_output_by_library(
        query: torch.Tensor,
        cache: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor,
    ) -> torch.Tensor:
        attended = attention_alone(query, cache, slots, positions).flatten(1)
        return linear.linear_residual_by_library(attended, weight, residual)

    def next_code_by_library(
        x: torch.Tensor,
        gain: torch.Tensor,
        eps: float,
        heads: torch.Tensor,
        head: int,
        *,
        drawable: int,
        scratch: Any,
        **given: Any,
    ) -> Any:
        logits = codebook_head.codebook_head_by_library(x, gain, eps, heads[:, :drawable], head)
        return draw_embed(logits, **given)

    def by_rows(module: Any, name: str, by_library: Callable[..., Any]) -> Callable[..., Any]:
        few = planned(module, name)

        def operation(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            return (by_library if x.shape[0] > MAX_ROWS else few)(x, *arguments, **options)

        return operation

    operations: dict[str, tuple[Any, Any, Callable[..., Any]]] = {
        "norm_qkv_rope": (transformer, qkv, qkv.norm_qkv_rope_by_library),
        "attention_output": (transformer, attention, attention_output_by_library),
        "norm_swiglu": (transformer, linear, linear.norm_swiglu_by_library),
        "linear_residual": (transformer, linear, linear.linear_residual_by_library),
        "norm_linear": (csm, linear, linear.norm_linear_by_library),
        "next_code": (csm, next_code, next_code_by_library),
    }
    parts = {"rms_norm": rms_norm, "rotate_qkv": rope, "swiglu": swiglu}
    with pytest.MonkeyPatch.context() as patch:
        for name, (user, module, by_library) in operations.items():
            patch.setattr(user, name, by_rows(module, name, by_library))
        for name, module in parts.items():
            for user in (linear, qkv, codebook_head):
                if hasattr(user, name):
                    patch.setattr(user, name, planned(module, name))
        for name in ("begin_frame", "end_frame"):
            patch.setattr(csm, name, planned(frame_state, name))
        patch.setattr(embedding, "embed_prompt", planned(embedding, "embed_prompt"))
        with asked:
            yield


def draw_embed_reference(
    logits: torch.Tensor, *, table: torch.Tensor, vocabulary: int, codebook: int, **given: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = next_code.draw(logits, codebook=codebook, **given)
    return tokens, embedding.embed_code_reference(tokens, table, vocabulary, codebook)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    config = oracle.small_config(layers=LAYERS, codebooks=CODEBOOKS)
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


@pytest.fixture
def frame(runtime: Runtime) -> Callable[[int], Asked]:
    """A function: what is asked for a frame of so many streams, which must be the frame that a CPU makes."""

    def frame(rows: int) -> Asked:
        slots, asked = torch.arange(rows), Asked()
        ours, expected = (streams(runtime, rows) for _ in range(2))
        expected_codes = runtime._model.draw(expected, slots)
        with on_a_gpu(asked):
            codes = runtime._model.draw(ours, slots)
        assert torch.equal(codes, expected_codes)
        assert torch.equal(ours.position, expected.position)
        assert torch.equal(ours.frame, expected.frame)
        torch.testing.assert_close(ours.next_input, expected.next_input, rtol=1e-5, atol=1e-6)
        return asked

    return frame


@pytest.mark.parametrize("rows", [1, 3, 17, 32, 33, 64, 65, 130])
def test_a_frame_is_kernels_and_two_copies(frame: Callable[[int], Asked], rows: int) -> None:
    """And, where rows are many, a library's products."""
    others = frame(rows).others
    if rows > MAX_ROWS // 2:  # the depth decoder's first step has two rows a stream
        assert others.pop("mm") > 0
        assert others.pop("addmm_") > 0
    assert others == {"cat": 1, "stack": 1}


def test_launches_of_one_stream(frame: Callable[[int], Asked]) -> None:
    """Four a layer, five where attention is split; one between two codebooks."""
    depth_layers = DEPTH_LAYERS * (CODEBOOKS - 1)
    layers = LAYERS + depth_layers
    assert frame(1).launches == {
        "begin_frame": 1,
        "norm_qkv_rope": layers,
        "attention_output": 2 * LAYERS + depth_layers,
        "norm_swiglu": layers,
        "linear_residual": layers,
        "norm_linear": 1,
        "next_code": CODEBOOKS,
        "end_frame": 1,
    }


def test_launches_of_many_streams(frame: Callable[[int], Asked]) -> None:
    """Nine a layer, of which four are a library's products; three between two codebooks."""
    layers = LAYERS + DEPTH_LAYERS * (CODEBOOKS - 1)
    asked = frame(65)
    assert asked.launches == {
        "begin_frame": 1,
        "rms_norm": 2 * layers + 1 + CODEBOOKS,
        "rotate_qkv": layers,
        "decode_attention": layers,
        "swiglu": layers,
        "draw_embed": CODEBOOKS,
        "end_frame": 1,
    }
    assert asked.others["mm"] == 2 * layers + 1 + CODEBOOKS
    assert asked.others["addmm_"] == 2 * layers


@pytest.mark.parametrize("positions", [3, 70])
def test_a_prompt_is_kernels_and_one_copy(runtime: Runtime, positions: int) -> None:
    """Each prompt's last position is its stream's next input."""
    model = runtime._model
    ours, expected = (model.allocate(3, 128) for _ in range(2))
    prompt = Prompt(torch.arange(positions) % 5, torch.zeros(positions, CODEBOOKS, dtype=torch.int64))
    block, asked = pack([Piece(1, prompt, 0, positions, 0)], positions, 2), Asked()
    with on_a_gpu(asked):
        model.prefill(ours, block)
    model.prefill(expected, block)
    assert torch.equal(ours.next_input[1], expected.next_input[1])
    read = (slice(None), slice(None), 1, slice(None), slice(positions))
    torch.testing.assert_close(ours.backbone_cache[read], expected.backbone_cache[read], rtol=1e-4, atol=1e-5)
    products = {"mm": 2 * LAYERS, "addmm_": 2 * LAYERS} if positions > MAX_ROWS else {}
    assert asked.others == {"index_put_": 1} | products
    assert asked.launches["embed_prompt"] == 1
