"""What csm-1b, at its full size, asks of a GPU: kernels, a library's products, and next to nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from aloud.codec import mimi
from aloud.kernels.product import MAX_ROWS
from aloud.models.csm import Csm, CsmState
from aloud.prompt_block import PromptBlock
from aloud.request import Sampling
from pretended_gpu import Asked, load, pretended_gpu

LAYERS, DEPTH_LAYERS, CODEBOOKS = 16, 4, 32
PASSED = LAYERS + DEPTH_LAYERS * (CODEBOOKS - 1)
"""Layers that a frame passes."""
SLOTS = 257
CUDA = torch.device("cuda", 0)


@pytest.fixture
def asked() -> Iterator[Asked]:
    """All that the test asks of the GPU, on which it runs."""
    with pretended_gpu() as asked:
        yield asked


@pytest.fixture
def model(asked: Asked) -> Csm:
    return load("csm-1b", torch.bfloat16)


@pytest.fixture
def state(asked: Asked, model: Csm) -> CsmState:
    state = model.allocate(SLOTS, model.max_positions)
    asked.clear()
    return state


def of_slots(rows: int) -> torch.Tensor:
    return torch.empty(rows, dtype=torch.int64, device=CUDA)


def test_a_frame_of_one_stream(asked: Asked, model: Csm, state: CsmState) -> None:
    """Four launches a layer, five in the backbone, whose attention is split; one between two codebooks."""
    codes = model.draw(state, of_slots(1))
    assert (codes.shape, codes.device) == ((1, CODEBOOKS), CUDA)
    assert asked.kernels == {
        "begin_frame": 1,
        "norm_qkv_rope": PASSED,
        "decode_attention": LAYERS,
        "join_output": LAYERS,
        "short_attention_output": PASSED - LAYERS,
        "norm_swiglu": PASSED,
        "linear_residual": PASSED,
        "norm_linear": 1,
        "next_code": CODEBOOKS,
        "end_frame": 1,
    }
    assert asked.kernels.total() == 611
    assert not asked.on_host
    assert asked.others == {"cat": 1, "stack": 1}


def test_a_frame_of_many_streams(asked: Asked, model: Csm, state: CsmState) -> None:
    """Nine a layer, of which four are a library's products; three between two codebooks."""
    model.draw(state, of_slots(MAX_ROWS + 1))
    assert asked.kernels == {
        "begin_frame": 1,
        "rms_norm": 2 * PASSED + 1 + CODEBOOKS,
        "rotate_qkv": PASSED,
        "decode_attention": PASSED,
        "swiglu": PASSED,
        "draw_embed": CODEBOOKS,
        "end_frame": 1,
    }
    assert asked.kernels.total() == 767
    assert not asked.on_host
    assert asked.others == {"mm": 2 * PASSED + 1 + CODEBOOKS, "addmm_": 2 * PASSED, "cat": 1, "stack": 1}


def test_a_frame_of_sixteen_streams(asked: Asked, model: Csm, state: CsmState) -> None:
    """Five launches a layer, six in the depth decoder, whose long product is split; two between two codebooks."""
    model.draw(state, of_slots(16))
    assert asked.kernels == {
        "begin_frame": 1,
        "norm_qkv_rope": PASSED,
        "decode_attention": PASSED,
        "norm_swiglu": PASSED,
        "linear_residual": 2 * LAYERS + PASSED - LAYERS,
        "part_product": PASSED - LAYERS,
        "sum_parts": PASSED - LAYERS,
        "norm_linear": 1 + CODEBOOKS,
        "draw_embed": CODEBOOKS,
        "end_frame": 1,
    }
    assert asked.kernels.total() == 891
    assert not asked.on_host


@pytest.mark.parametrize("rows", [3, 16, 33, MAX_ROWS])
def test_a_frame_is_kernels_and_two_copies(asked: Asked, model: Csm, state: CsmState, rows: int) -> None:
    """Up to 64 rows; the depth decoder's first step has two rows a stream, and is a library's from 33 streams on."""
    model.draw(state, of_slots(rows))
    products = {"mm": 2 * DEPTH_LAYERS, "addmm_": 2 * DEPTH_LAYERS} if 2 * rows > MAX_ROWS else {}
    assert asked.others == {"cat": 1, "stack": 1} | products


@pytest.mark.parametrize("positions", [3, MAX_ROWS, 512])
def test_a_prompt_is_kernels_and_one_copy(asked: Asked, model: Csm, state: CsmState, positions: int) -> None:
    """Each prompt's last position is its stream's next input."""
    model.prefill(state, PromptBlock(torch.empty(4 + CODEBOOKS, positions, dtype=torch.int64, device=CUDA)))
    products = {"mm": 2 * LAYERS, "addmm_": 2 * LAYERS} if positions > MAX_ROWS else {}
    assert asked.others == {"index_put_": 1} | products
    assert asked.kernels["embed_prompt"] == 1
    assert not asked.on_host


def test_a_frames_sound(asked: Asked, model: Csm, state: CsmState) -> None:
    """The codec is torch's own operations, no more than there are now; nothing in it waits for the device."""
    rows = 3
    sound = model.decode(state, torch.empty(rows, CODEBOOKS, dtype=torch.int64, device=CUDA), of_slots(rows))
    assert {part.device for part in (sound.samples, sound.power, sound.ended)} == {CUDA}
    assert sound.samples.shape == (rows, 1920)
    assert not asked.launches
    assert asked.others.total() <= 279
    assert not asked.on_host


def test_streams_and_prefixes_stay_on_the_device(asked: Asked, model: Csm, state: CsmState) -> None:
    """To begin a stream, to put it aside and to take it up, with prefixes: numbers go there, and none comes back."""
    model.start(state, 1, Sampling(0.9, 50, 0.9, 50), 2**63 + 5, 100)
    model.start_sound(state, 1)
    prefix = model.copy_prefix(state, 1, 100)
    model.paste_prefix(state, 2, prefix, 60)
    stream = model.copy_stream(state, 1, 100)
    model.paste_stream(state, 3, stream)
    assert {part.device for part in (prefix, *stream)} == {CUDA}
    assert not asked.launches
    assert asked.waits == 0


def test_audio_is_encoded_on_the_device(asked: Asked, model: Csm) -> None:
    """Samples come from the host; codes are the device's."""
    asked.clear()
    codes = mimi.encode(model.config.codec, model.codec, torch.empty(5000), CODEBOOKS)
    assert (codes.shape, codes.device) == ((CODEBOOKS, 3), CUDA)
    assert not asked.launches
