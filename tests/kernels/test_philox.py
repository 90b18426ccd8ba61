"""Philox4x32-10 against the known answers of its authors, in C++ and in PyTorch."""

from __future__ import annotations

import random

import pytest
import torch

from aloud import _sampler
from aloud.kernels.draw import philox_reference

# Random123, tests/kat_vectors: philox4x32 10 <counter> <key> <answer>.
KNOWN_ANSWERS = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def in_pytorch(seed: int, counter: tuple[int, ...]) -> tuple[int, ...]:
    pattern = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    return tuple(int(word) for word in philox_reference(pattern, tuple(torch.tensor(word) for word in counter)))


@pytest.mark.parametrize("case", KNOWN_ANSWERS)
@pytest.mark.parametrize("philox", [_sampler.philox, in_pytorch], ids=["cpp", "pytorch"])
def test_known_answers(philox, case: str) -> None:
    counter, key, answer = map(words, KNOWN_ANSWERS[case])
    assert philox(key[0] | key[1] << 32, counter) == answer


def test_cpp_equals_pytorch_on_random_seeds_and_counters(seed: int) -> None:
    source = random.Random(seed)
    for _ in range(200):
        key, counter = source.getrandbits(64), tuple(source.getrandbits(32) for _ in range(4))
        assert _sampler.philox(key, counter) == in_pytorch(key, counter)


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_every_half_of_the_seed_matters(bit: int) -> None:
    counter = (1, 2, 3, 4)
    assert set(_sampler.philox(1 << bit, counter)).isdisjoint(_sampler.philox(0, counter))


@pytest.mark.parametrize(
    ("seed", "counter"),
    [(-1, (0, 0, 0, 0)), (2**64, (0, 0, 0, 0)), (0, (0, 0, 0)), (0, (0, 0, 0, 2**32)), (0, (0, 0, 0, -1))],
    ids=["negative_seed", "seed_over_64_bits", "three_words", "word_over_32_bits", "negative_word"],
)
def test_out_of_range_is_refused(seed: int, counter: tuple[int, ...]) -> None:
    with pytest.raises(TypeError):
        _sampler.philox(seed, counter)
