"""Instructions between registers of one thread: what each makes of its operands' bits.

Registers are NumPy arrays of unsigned integers, or of booleans, over threads; a type in an opcode says how their bits
are read. bfloat16 is computed in float32 and rounded to nearest even.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any  # of NumPy, or one of its scalars

STORED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
TYPES = {
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "b32": np.uint32,
    "b64": np.uint64,
    "u16": np.uint16,
    "u32": np.uint32,
    "u64": np.uint64,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
}


def bits(value: Array) -> Array:
    """A value as what a register keeps."""
    return value if value.dtype == bool else value.view(STORED[value.dtype.itemsize])


def from_bfloat16(stored: Array) -> Array:
    """uint16 -> float32."""
    return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(value: Array) -> Array:
    """float32 -> uint16, to nearest even; what is not a number stays that."""
    stored = value.view(np.uint32)
    rounded = (stored + np.uint32(0x7FFF) + ((stored >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def halves(stored: Array) -> tuple[Array, Array]:
    """The low and the high half of unsigned numbers."""
    half = STORED[stored.dtype.itemsize // 2]
    return stored.astype(half), (stored >> stored.dtype.type(8 * half.itemsize)).astype(half)


def joined(low: Array, high: Array) -> Array:
    """The opposite of `halves`."""
    whole = STORED[2 * low.dtype.itemsize]
    return low.astype(whole) | (high.astype(whole) << whole.type(8 * low.dtype.itemsize))


def flushed(value: Array) -> Array:
    """float32 without subnormal numbers, as .ftz says."""
    return np.where(np.abs(value) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), value), value)


def read(stored: Array, type_name: str) -> Array:
    """A register's bits as a number of this type; bfloat16 as float32."""
    return from_bfloat16(stored) if type_name == "bf16" else stored.view(TYPES[type_name])


def written(value: Array, type_name: str) -> Array:
    """The opposite of `read`."""
    return to_bfloat16(value) if type_name == "bf16" else bits(value)


def _fma(a: Array, b: Array, c: Array) -> Array:
    if a.dtype == np.float32:  # its product is exact in float64
        return (a.astype(np.float64) * b + c).astype(np.float32)
    if a.dtype == np.float16:
        return (a.astype(np.float64) * b + c).astype(np.float16)
    return (a.astype(np.longdouble) * b + c).astype(np.float64)


def _quotient(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    wide, divisor = a.astype(np.int64), np.where(b == 0, 1, b).astype(np.int64)
    return (np.sign(wide) * np.sign(divisor) * (np.abs(wide) // np.abs(divisor))).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return (a - _quotient(a, b) * b).astype(a.dtype)


def _shifted(shift: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    def far(a: Array, amount: Array) -> Array:
        width = 8 * a.dtype.itemsize
        near = shift(a, np.minimum(amount, width - 1).astype(a.dtype))
        beyond = near if a.dtype.kind == "i" else a.dtype.type(0)
        return np.where(amount >= width, beyond, near)

    return far


def _maximum(a: Array, b: Array) -> Array:
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


def _minimum(a: Array, b: Array) -> Array:
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": _fma,
    "div": _quotient,
    "rem": _remainder,
    "max": _maximum,
    "min": _minimum,
    "neg": lambda a: -a,
    "abs": lambda a: np.abs(a),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "ex2": lambda a: np.exp2(a),
    "rsqrt": lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype),
    "sqrt": lambda a: np.sqrt(a),
    "rcp": lambda a: 1 / a,
}
"""The same type in and out."""

PROPAGATING: dict[str, Callable[..., Array]] = {"max": np.maximum, "min": np.minimum}
"""With .NaN: of a number and none, none."""

COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & ~_unordered(a, b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: (a == b) | _unordered(a, b),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~_unordered(a, b),
    "nan": lambda a, b: _unordered(a, b),
}


def _unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(np.shape(a), bool)


def operation(opcode: str) -> tuple[tuple[str, ...], Callable[..., Array]]:
    """An opcode between registers -> the types of its sources, and a function of their bits to the result's.

    Raises:
        KeyError: it is none, or not known here.
    """
    name, *modifiers = opcode.split(".")
    kind = modifiers[-1] if modifiers else ""
    if name == "setp" and len(modifiers) == 2:
        compare = COMPARISONS[modifiers[0]]
        return (kind, kind), lambda a, b: compare(read(a, kind), read(b, kind))
    if name == "selp":
        return (kind, kind, "pred"), lambda a, b, choice: np.where(choice, a, b)
    if name == "cvt":
        return _conversion(modifiers)
    if name in ("mul", "mad") and modifiers[0] in ("lo", "hi", "wide") and len(modifiers) == 2:
        return _integer_product(name, modifiers[0], kind)
    if name in ("shl", "shr"):
        shift = _shifted(np.left_shift if name == "shl" else np.right_shift)
        return (kind, "u32"), lambda a, amount: bits(shift(read(a, kind), amount))
    if name == "bfe" and kind in ("u32", "s32", "u64"):
        return (kind, "u32", "u32"), lambda a, place, length: _field(a, place, length, signed=kind == "s32")
    if name == "popc":
        return (kind,), lambda a: np.bitwise_count(a).astype(np.uint32)
    if name == "prmt" and kind == "b32":
        return ("b32", "b32", "b32"), _permuted_bytes
    if kind == "pred":
        compute = {**ELEMENTWISE, "not": np.logical_not}[name]
        return ("pred",) * sources_of(name), compute
    if not set(modifiers[:-1]) <= {"rn", "ftz", "approx", "full", "NaN"}:
        raise KeyError(opcode)
    if (name in ("div", "rem") and kind == "u64") or ("ftz" in modifiers and kind in ("f16", "bf16", "f16x2")):
        raise KeyError(opcode)
    compute = PROPAGATING[name] if "NaN" in modifiers else ELEMENTWISE[name]
    if kind.endswith("x2"):
        half = kind.removesuffix("x2")
        return ("b64" if half == "f32" else "b32",) * sources_of(name), _in_halves(compute, half)
    if kind != "bf16":
        TYPES[kind]  # or it is not known here
    kinds = (kind,) * sources_of(name)
    if "ftz" in modifiers and kind == "f32":
        return kinds, lambda *stored: bits(flushed(compute(*(flushed(read(source, kind)) for source in stored))))
    return kinds, lambda *stored: written(compute(*(read(source, kind) for source in stored)), kind)


def sources_of(name: str) -> int:
    """How many sources an elementwise instruction has."""
    if name == "fma":
        return 3
    return 1 if name in ("neg", "abs", "not", "ex2", "rsqrt", "sqrt", "rcp") else 2


def _in_halves(compute: Callable[..., Array], kind: str) -> Callable[..., Array]:
    def both(*sources: Array) -> Array:
        lows, highs = zip(*(halves(source) for source in sources), strict=True)
        return joined(*(written(compute(*(read(half, kind) for half in side)), kind) for side in (lows, highs)))

    return both


def _conversion(modifiers: list[str]) -> tuple[tuple[str, ...], Callable[..., Array]]:
    to, source = modifiers[-2:]
    if modifiers[:-2] not in ([], ["rn"]):
        raise KeyError(modifiers)
    if to in ("bf16x2", "f16x2"):
        half = to.removesuffix("x2")
        narrow = (lambda a: to_bfloat16(a)) if half == "bf16" else (lambda a: bits(a.astype(np.float16)))
        # The first source is the upper half.
        return (source, source), lambda a, b: joined(narrow(read(b, source)), narrow(read(a, source)))
    if to == "bf16" and source == "f32":
        return (source,), lambda a: to_bfloat16(read(a, source))
    target = TYPES[to]
    width = 2 if source == "bf16" else np.dtype(TYPES[source]).itemsize  # registers may be longer
    return (source,), lambda a: bits(read(a.astype(STORED[width]), source).astype(target))


WIDER = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}


def _integer_product(name: str, part: str, kind: str) -> tuple[tuple[str, ...], Callable[..., Array]]:
    def product(a: Array, b: Array, *addend: Array) -> Array:
        a, b = read(a, kind), read(b, kind)
        if part == "lo":
            result = a * b
        else:
            result = a.astype(WIDER[kind]) * b.astype(WIDER[kind])
            if part == "hi":
                result = (result >> result.dtype.type(8 * a.dtype.itemsize)).astype(a.dtype)
        stored: Array = bits(result)
        return stored + addend[0] if addend else stored

    if part != "lo" and kind not in WIDER:
        raise KeyError(kind)
    third = {"wide": kind[0] + str(2 * int(kind[1:]))}.get(part, kind)
    return ((kind, kind, third) if name == "mad" else (kind, kind)), product


def _field(a: Array, place: Array, length: Array, *, signed: bool) -> Array:
    wide = a.astype(np.uint64) >> place.astype(np.uint64)
    field = wide & ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1))
    if signed:
        top = np.uint64(1) << (length.astype(np.uint64) - np.uint64(1))
        field = (field ^ top) - top
    return field.astype(a.dtype)


def _permuted_bytes(a: Array, b: Array, selector: Array) -> Array:
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.uint32(0)
    for place in range(4):
        chosen = (selector >> np.uint32(4 * place)) & np.uint32(0xF)
        byte = (both >> ((chosen & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
        sign = np.where(byte >> np.uint64(7), np.uint64(0xFF), np.uint64(0))
        byte = np.where(chosen & np.uint32(8), sign, byte)
        result = result | (byte.astype(np.uint32) << np.uint32(8 * place))
    return result
