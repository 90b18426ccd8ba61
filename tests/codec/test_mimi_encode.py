"""Mimi's encoder on whole recordings, against transformers and the moshi package with the same weights."""

from __future__ import annotations

import pytest
import torch

from aloud.codec.mimi import CHUNK_FRAMES, encode
from aloud.codec.quantizer import QuantizerWeights, dequantize, quantize
from oracle.mimi import (
    MOSHI_VARIANTS,
    VARIANTS,
    assert_same_codes,
    full_size_codec,
    named_codec,
    speech_like,
)

FRAMES = 2 * CHUNK_FRAMES + 11
"""More than two chunks of `encode`, and many attention windows."""


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_transformers(name: str, seed: int, generator: torch.Generator) -> None:
    codec = named_codec(name, seed)
    samples = speech_like(FRAMES * codec.frame_size, generator)
    theirs = codec.encode(samples)
    for codes in theirs:  # an oracle that says the same all the time would prove nothing
        assert len(codes.unique()) > 12
    assert_same_codes(encode(*codec.ours, samples), theirs, codec.model, samples)


@pytest.mark.parametrize("name", MOSHI_VARIANTS)
def test_equals_moshi(name: str, seed: int, generator: torch.Generator) -> None:
    codec = named_codec(name, seed)
    samples = speech_like(FRAMES * codec.frame_size, generator)
    with torch.no_grad():
        theirs = codec.moshi.encode(samples[None, None])[0]
    assert_same_codes(encode(*codec.ours, samples), theirs, codec.model, samples)


@pytest.mark.parametrize("name", ["small", "four_positions_a_frame", "kernels", "three_stages"])
def test_any_length_equals_transformers(name: str, seed: int, generator: torch.Generator) -> None:
    codec = named_codec(name, seed)
    frame, chunk = codec.frame_size, CHUNK_FRAMES * codec.frame_size
    lengths = [1, 2, 3, 5, 19, 23, frame // 2 - 1, frame // 2, frame // 2 + 1, frame - 1, frame, frame + 1]
    lengths += [7 * frame + 11, chunk - 1, chunk + 1, chunk + frame // 2 + 1]
    lengths += torch.randint(1, 3 * frame, (20,), generator=generator).tolist()
    for length in lengths:
        samples = speech_like(length, generator)
        assert_same_codes(encode(*codec.ours, samples), codec.encode(samples), codec.model, samples)


@pytest.mark.parametrize("num_codebooks", [2, 3, 5])
def test_fewer_codebooks_equal_transformers(num_codebooks: int, seed: int, generator: torch.Generator) -> None:
    codec = named_codec("two_semantic", seed)
    samples = speech_like(20 * codec.frame_size, generator)
    ours = encode(*codec.ours, samples, num_codebooks)
    assert_same_codes(ours, codec.encode(samples, num_codebooks), codec.model, samples)


def test_fewer_codebooks_than_semantic_ones_are_the_first_of_them(seed: int, generator: torch.Generator) -> None:
    codec = named_codec("two_semantic", seed)
    samples = speech_like(20 * codec.frame_size, generator)
    assert torch.equal(encode(*codec.ours, samples, 1), encode(*codec.ours, samples)[:1])


def test_full_size_equals_transformers_and_moshi(seed: int, generator: torch.Generator) -> None:
    codec = full_size_codec(seed)
    samples = speech_like(10 * codec.frame_size, generator)
    ours = encode(*codec.ours, samples)
    assert_same_codes(ours, codec.encode(samples), codec.model, samples)
    with torch.no_grad():
        assert_same_codes(ours, codec.moshi.encode(samples[None, None])[0], codec.model, samples)


def test_no_samples_no_frames(seed: int) -> None:
    assert encode(*named_codec("small", seed).ours, torch.empty(0)).shape == (4, 0)


@pytest.mark.parametrize("num_codebooks", [0, 5])
def test_refuses_codebooks_it_does_not_have(num_codebooks: int, seed: int) -> None:
    with pytest.raises(ValueError, match="num_codebooks must be from 1 to 4"):
        encode(*named_codec("small", seed).ours, torch.zeros(100), num_codebooks)


def test_the_lowest_of_equally_near_entries_is_taken() -> None:
    codebooks = torch.tensor([[[3.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    weights = QuantizerWeights(codebooks, codebooks.square().sum(-1) / 2, None, None)
    latents = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [9.0, 9.0], [1.5, -0.1]]])
    assert quantize(weights, latents, 1).tolist() == [[[1, 0, 0, 2]]]


def test_quantizer_loses_nothing_that_its_entries_can_say(generator: torch.Generator) -> None:
    """Latents that are sums of entries come back exactly, where the codebooks are far apart in size."""
    scales = torch.tensor([100.0, 10.0, 1.0])[:, None, None]
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)  # [16, 4]
    codebooks = scales * corners
    weights = QuantizerWeights(codebooks, codebooks.square().sum(-1) / 2, None, None)
    codes = torch.randint(16, (2, 3, 50), generator=generator)
    latents = dequantize(weights, codes)
    assert torch.equal(quantize(weights, latents, 3), codes)
