"""Instructions between registers, and matrices, against PyTorch and plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx_machine.arithmetic import operation

INTEGERS = np.array([0, 1, 2, 3, 31, 32, 33, 2**31 - 1, 2**31, 2**32 - 1, 0x12345678, 0xFEDCBA98], np.uint32)


def signed(value: int, width: int = 32) -> int:
    return value - 2**width if value >= 2 ** (width - 1) else value


def truncated(a: int, b: int) -> int:
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


EXPECTED = {
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "mul.wide.s32": lambda a, b: signed(a) * signed(b),
    "mul.wide.u32": lambda a, b: a * b,
    "min.u32": min,
    "max.s32": lambda a, b: max(signed(a), signed(b)),
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32": lambda a, b: signed(a) >> min(b, 31),
    "xor.b32": lambda a, b: a ^ b,
    "div.s32": lambda a, b: truncated(signed(a), signed(b)) if b else None,
    "rem.s32": lambda a, b: signed(a) - truncated(signed(a), signed(b)) * signed(b) if b else None,
    "setp.lt.s32": lambda a, b: signed(a) < signed(b),
    "setp.lt.u32": lambda a, b: a < b,
    "setp.ne.b32": lambda a, b: a != b,
}


@pytest.mark.parametrize("opcode", EXPECTED)
def test_integers(opcode: str) -> None:
    _, compute = operation(opcode)
    a, b = (side.reshape(-1) for side in np.meshgrid(INTEGERS, INTEGERS))
    with np.errstate(all="ignore"):
        ours = compute(a, b)
    for x, y, result in zip(a.tolist(), b.tolist(), ours.tolist(), strict=True):
        expected = EXPECTED[opcode](x, y)
        if expected is not None:
            assert result == expected % 2 ** (8 * ours.itemsize), (x, y)


def test_fields_and_bytes() -> None:
    word = np.array([0x89ABCDEF], np.uint32)
    assert operation("bfe.u32")[1](word, np.uint32(4), np.uint32(8)) == 0xDE
    assert operation("bfe.s32")[1](word, np.uint32(4), np.uint32(8)) == 0xFFFFFFDE
    assert (
        operation("bfe.u64")[1](np.array([0x123456789ABCDEF0], np.uint64), np.uint32(8), np.uint32(40)) == 0x56789ABCDE
    )
    assert operation("popc.b32")[1](word) == 20
    permute = operation("prmt.b32")[1]
    other = np.array([0x01234567], np.uint32)
    assert permute(word, other, np.uint32(0x5410)) == 0x4567CDEF
    assert permute(word, other, np.uint32(0x3F74)) == 0x89000167
    assert operation("mad.wide.s32")[1](np.uint32([2**32 - 1]), np.uint32(8), np.uint64(20)) == 12
    assert operation("cvt.s64.s32")[1](np.uint32(2**32 - 1)) == 2**64 - 1
    assert operation("cvt.u64.u32")[1](np.uint32(2**32 - 1)) == 2**32 - 1


def test_registers_may_be_longer_than_what_is_converted() -> None:
    word = np.array([0x1FF80], np.uint32)
    assert operation("cvt.s32.s8")[1](word) == 0xFFFFFF80
    assert operation("cvt.u32.u16")[1](word) == 0xFF80


NUMBERS = torch.tensor([0.0, -0.0, 1.0, -2.5, 3e-39, 65504.0, 7e4, 3e38, torch.inf, -torch.inf, torch.nan, 1 + 2**-8])


def stored(values: torch.Tensor) -> np.ndarray:
    """A tensor's bits."""
    unsigned = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[values.element_size()]
    return values.view(unsigned).numpy()


def same(ours: np.ndarray, expected: torch.Tensor) -> None:
    """Equal, or both no number."""
    torch.testing.assert_close(torch.from_numpy(ours).view(expected.dtype), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)], ids=str)
def test_short_numbers(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    wide = torch.cat([NUMBERS, torch.randn(10_000, generator=generator) * 100])
    with np.errstate(all="ignore"):
        short = operation(f"cvt.rn.{name}.f32")[1](stored(wide))
        same(short, wide.to(dtype))
        same(operation(f"cvt.f32.{name}")[1](short), wide.to(dtype).float())
        a, b = wide.to(dtype), wide.to(dtype).flip(0)
        for how, expected in (("mul", a * b), ("add", a + b), ("sub", a - b)):
            same(operation(f"{how}.{name}")[1](stored(a), stored(b)), expected)
        pairs = operation(f"cvt.rn.{name}x2.f32")[1](stored(wide), stored(wide.flip(0)))  # the first is the upper half
        same(pairs.view(np.uint16), torch.stack([b, a], 1).reshape(-1))
        product = operation(f"mul.{name}x2")[1](pairs, pairs)
        same(product.view(np.uint16), torch.stack([b * b, a * a], 1).reshape(-1))


def test_floats(generator: torch.Generator) -> None:
    a = torch.cat([NUMBERS, torch.randn(1000, generator=generator)])
    b, c = a.roll(1), a.roll(2)
    with np.errstate(all="ignore"):
        exact = (a.double() * b.double() + c.double()).float()
        same(operation("fma.rn.f32")[1](*map(stored, (a, b, c))), exact)
        same(operation("max.f32")[1](stored(a), stored(b)), torch.fmax(a, b))
        same(operation("max.NaN.f32")[1](stored(a), stored(b)), torch.maximum(a, b))
        same(operation("add.ftz.f32")[1](stored(a), stored(torch.zeros_like(a))), torch.where(a == 3e-39, 0.0, a + 0))
        pairs = [
            np.ascontiguousarray(np.stack([stored(x), stored(y)], 1)).view(np.uint64)[:, 0] for x, y in ((a, b), (b, c))
        ]
        products = operation("mul.f32x2")[1](*pairs)
        same(products.view(np.uint32), torch.stack([a * b, b * c], 1).reshape(-1))
        for name, expected in (("eq", a == b), ("ne", (a != b) & ~(a.isnan() | b.isnan())), ("neu", a != b)):
            assert np.array_equal(operation(f"setp.{name}.f32")[1](stored(a), stored(b)), expected.numpy())
        for name, expected in (("lt", a < b), ("ltu", ~(a >= b)), ("nan", a.isnan() | b.isnan())):
            assert np.array_equal(operation(f"setp.{name}.f32")[1](stored(a), stored(b)), expected.numpy())


def test_what_is_not_known_is_refused() -> None:
    for opcode in (
        "sad.u32",
        "add.sat.f32",
        "cvt.rz.f16.f32",
        "mul.hi.s64",
        "setp.lt.and.s32",
        "add.f8",
        "mad.hi.sat.s32",
        "bfe.s64",
    ):
        with pytest.raises(KeyError):
            operation(opcode)
