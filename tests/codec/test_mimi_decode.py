"""Mimi's decoder on whole sequences, against transformers and the moshi package with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aloud.checkpoint.mimi import load_mimi
from aloud.codec.mimi import CHUNK_FRAMES, allocate_decoder_state, decode, decode_chunk
from aloud.errors import CodesInvalid
from oracle.mimi import MOSHI_VARIANTS, VARIANTS, Codec, DictTensors, full_size_codec, named_codec

FRAMES = 2 * CHUNK_FRAMES + 11
"""More than two chunks of `decode`, and many attention windows."""


def random_codes(codec: Codec, frames: int, generator: torch.Generator) -> Tensor:
    config = codec.model.config
    return torch.randint(config.codebook_size, (config.num_quantizers, frames), generator=generator)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_transformers(name: str, seed: int, generator: torch.Generator) -> None:
    codec = named_codec(name, seed)
    codes = random_codes(codec, FRAMES, generator)
    assert relative_error(decode(*codec.ours, codes), codec.decode(codes)) < 1e-5


@pytest.mark.parametrize("name", MOSHI_VARIANTS)
def test_equals_moshi(name: str, seed: int, generator: torch.Generator) -> None:
    codec = named_codec(name, seed)
    codes = random_codes(codec, FRAMES, generator)
    with torch.no_grad():
        expected = codec.moshi.decode(codes[None])[0, 0]
    assert relative_error(decode(*codec.ours, codes), expected) < 1e-5


@pytest.mark.parametrize("num_codebooks", [1, 2, 3, 4])
def test_fewer_codebooks_equal_transformers(num_codebooks: int, seed: int, generator: torch.Generator) -> None:
    codec = named_codec("two_semantic", seed)
    codes = random_codes(codec, 9, generator)[:num_codebooks]
    assert relative_error(decode(*codec.ours, codes), codec.decode(codes)) < 1e-5


def test_full_size_equals_transformers_and_moshi(seed: int, generator: torch.Generator) -> None:
    codec = full_size_codec(seed)
    codes = random_codes(codec, 6, generator)
    ours = decode(*codec.ours, codes)
    assert relative_error(ours, codec.decode(codes)) < 1e-5
    with torch.no_grad():
        assert relative_error(ours, codec.moshi.decode(codes[None])[0, 0]) < 1e-5


def test_bfloat16_is_as_near_as_transformers(seed: int, generator: torch.Generator) -> None:
    codec = named_codec("small", seed)
    codes = random_codes(codec, FRAMES, generator)
    reference = codec.decode(codes)
    config, _ = codec.ours
    weights = load_mimi(DictTensors(codec.tensors), config, "transformers", dtype=torch.bfloat16)
    ours = decode(config, weights, codes)

    theirs = type(codec.model)(codec.model.config).eval()
    theirs.load_state_dict(codec.model.state_dict())
    with torch.no_grad():
        same_dtype = theirs.to(torch.bfloat16).decode(codes[None]).audio_values[0, 0].float()
    assert ours.dtype == torch.float32
    assert (ours - reference).abs().max() <= 2 * (same_dtype - reference).abs().max()


def test_no_frames_no_samples(seed: int) -> None:
    codec = named_codec("small", seed)
    assert decode(*codec.ours, torch.empty(4, 0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    "codes",
    [
        pytest.param(torch.zeros(4, 3), id="float"),
        pytest.param(torch.zeros(4, dtype=torch.int64), id="one_dimension"),
        pytest.param(torch.zeros(5, 3, dtype=torch.int64), id="too_many_codebooks"),
        pytest.param(torch.zeros(0, 3, dtype=torch.int64), id="no_codebooks"),
        pytest.param(torch.full((4, 3), 64), id="entry_too_high"),
        pytest.param(torch.full((4, 3), -1), id="entry_negative"),
    ],
)
def test_codes_that_cannot_be_decoded_are_refused(codes: Tensor, seed: int) -> None:
    with pytest.raises(CodesInvalid, match="Codes to decode must be"):
        decode(*named_codec("small", seed).ours, codes)


def test_chunk_refuses_wrong_shapes_and_dtypes(seed: int) -> None:
    config, weights = named_codec("small", seed).ours
    state = allocate_decoder_state(config, 2)
    codes, slots = torch.zeros(2, 4, 1, dtype=torch.int64), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="codes must be"):
        decode_chunk(config, weights, state, codes[0], slots)
    with pytest.raises(ValueError, match="codes must be"):
        decode_chunk(config, weights, state, codes.int(), slots)
    with pytest.raises(ValueError, match="slots must be"):
        decode_chunk(config, weights, state, codes, slots[:1])
    with pytest.raises(ValueError, match="1 to 4 codebooks"):
        decode_chunk(config, weights, state, codes.repeat(1, 2, 1), slots)


def test_no_tensor_value_decides_what_is_launched(seed: int) -> None:
    """Tensors on the meta device have shapes and no values: reading one would raise."""
    codec = named_codec("small", seed)
    config, _ = codec.ours
    weights = load_mimi(DictTensors(codec.tensors), config, "transformers", device="meta")
    state = allocate_decoder_state(config, 3, device="meta")
    codes = torch.zeros(2, 4, 1, dtype=torch.int64, device="meta")
    slots = torch.zeros(2, dtype=torch.int64, device="meta")
    samples = decode_chunk(config, weights, state, codes, slots)
    assert samples.device.type == "meta"
    assert samples.shape == (2, config.frame_size)
