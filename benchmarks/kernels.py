"""Each operation at csm-1b's shapes: microseconds, bytes a second over a copy's, beside torch eager and compiled.

`library` is the same operation with its product by cuBLAS, between kernels of ours: the way of rows beyond `MAX_ROWS`,
to see from how many rows on it is faster. Weights are cold: a timed graph goes through several copies of them, more
than any cache holds. Before anything is timed, the operation's result is compared with torch's; a difference is an
error, and no figure.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from aloud.kernels.attention import attention_output
from aloud.kernels.codebook_head import codebook_head, codebook_head_by_library
from aloud.kernels.embedding import embed_prompt
from aloud.kernels.linear import (
    linear_residual,
    linear_residual_by_library,
    norm_linear,
    norm_linear_by_library,
    norm_swiglu,
    norm_swiglu_by_library,
)
from aloud.kernels.product import MATRIX_ROWS, MAX_ROWS
from aloud.kernels.qkv import norm_qkv_rope, norm_qkv_rope_by_library
from aloud.kernels.rms_norm import rms_norm
from aloud.kernels.rope import Rope, rope_table

from .measure import circumstances, copies_for_cold_cache, copy_bandwidth, time_calls
from .report import reported

EPS = 1e-5
CONTEXT = 500
"""Positions of the backbone's cache that a row attends to."""
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
COMPILE_ROWS = [1, 64]
"""Compiling takes seconds for each number of rows."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Tensor = torch.Tensor


@dataclass(frozen=True)
class Stack:
    """The sizes of a decoder stack that its operations depend on."""

    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    attended: int  # positions that a row attends to
    vocabulary: int


FULL = {
    "backbone": Stack(2048, 8192, 32, 8, 64, 2048, CONTEXT, 2051),
    "depth": Stack(1024, 8192, 8, 2, 128, 33, 33, 2051),
}
SMALL = {"backbone": Stack(64, 96, 4, 2, 16, 48, 20, 67), "depth": Stack(32, 64, 2, 1, 16, 9, 9, 67)}


@dataclass(frozen=True)
class Case:
    """One operation on one set of inputs: as Aloud computes it, as torch does, and the bytes it has to move."""

    ours: Callable[[], Tensor]
    by_library: Callable[[], Tensor] | None  # where there is this other way
    theirs: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]  # of `theirs`
    moved_bytes: int  # each argument read once, the result written once
    weight_bytes: int  # what is kept out of the caches


class Inputs:
    """Random tensors of one device and dtype, which also counts their bytes."""

    def __init__(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> None:
        """Tensors come from `generator`, which is on `device`."""
        self.device, self.dtype, self.generator = device, dtype, generator

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal noise at `scale`."""
        noise = torch.randn(shape, device=self.device, generator=self.generator) * scale
        return noise.to(self.dtype)

    def weight(self, outputs: int, inputs: int) -> Tensor:
        """A matrix that keeps a vector's size."""
        return self.random(outputs, inputs, scale=inputs**-0.5)


def torch_rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """RMSNorm as torch has it."""
    return F.rms_norm(x, (x.shape[-1],), gain, EPS)


def norm_case(stack: Stack, rows: int, new: Inputs) -> Case:
    """RMSNorm alone."""
    x, gain = new.random(rows, stack.hidden_size), new.random(stack.hidden_size)
    return _case(lambda: rms_norm(x, gain, EPS), None, torch_rms_norm, (x, gain), weights=(gain,), outputs=x.numel())


def qkv_case(stack: Stack, rows: int, new: Inputs) -> Case:
    """Norm, query/key/value product, rotation, cache write; torch's side does not write the cache."""
    width = (stack.heads + 2 * stack.kv_heads) * stack.head_dim
    x, gain = new.random(rows, stack.hidden_size), new.random(stack.hidden_size)
    weight = new.weight(width, stack.hidden_size)
    table = rope_table(Rope(500_000.0), stack.head_dim, stack.positions, new.device)
    # Written to and never read, so that it needs no more places than that, and no numbers.
    size = (2, rows, stack.kv_heads, stack.attended, stack.head_dim)
    cache = torch.empty(size, device=new.device, dtype=new.dtype)
    slots = torch.arange(rows, device=new.device)
    positions = torch.full((rows,), stack.attended - 1, device=new.device)
    given = (x, gain, EPS, weight, table, cache, slots, positions)

    def theirs(x: Tensor, gain: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = F.linear(torch_rms_norm(x, gain), weight).view(rows, -1, stack.head_dim)
        query, rest = heads.split([stack.heads + stack.kv_heads, stack.kv_heads], dim=1)
        first, second = query.float().chunk(2, dim=-1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
        return torch.cat([rotated, rest], dim=1)[:, : stack.heads].flatten(1)

    cos, sin = table[:, positions, None]
    return _case(
        lambda: norm_qkv_rope(*given).flatten(1),
        lambda: norm_qkv_rope_by_library(*given).flatten(1),
        theirs,
        (x, gain, weight, cos, sin),
        weights=(gain, weight),
        outputs=rows * width,
    )


def attention_case(stack: Stack, rows: int, new: Inputs) -> Case:
    """Attention of one position a row over the cache, output projection, residual."""
    width = stack.heads * stack.head_dim
    query = new.random(rows, stack.heads, stack.head_dim)
    cache = new.random(2, rows, stack.kv_heads, stack.positions, stack.head_dim)
    weight, residual = new.weight(stack.hidden_size, width), new.random(rows, stack.hidden_size)
    slots = torch.arange(rows, device=new.device)
    positions = torch.full((rows,), stack.attended - 1, device=new.device)

    def ours() -> Tensor:
        return attention_output(query, cache, slots, positions, weight, residual)

    def theirs(query: Tensor, keys: Tensor, values: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True)
        return residual + F.linear(attended.flatten(1), weight)

    keys, values = cache[0, :, :, : stack.attended], cache[1, :, :, : stack.attended]
    arguments = (query, keys, values, weight, residual)
    return _case(ours, None, theirs, arguments, weights=(weight, cache), outputs=residual.numel())


def swiglu_case(stack: Stack, rows: int, new: Inputs) -> Case:
    """Norm, gate/up product, SwiGLU."""
    x, gain = new.random(rows, stack.hidden_size), new.random(stack.hidden_size)
    gate_up = new.weight(2 * stack.intermediate_size, stack.hidden_size)

    def theirs(x: Tensor, gain: Tensor, gate_up: Tensor) -> Tensor:
        gate, up = F.linear(torch_rms_norm(x, gain), gate_up).chunk(2, dim=-1)
        return F.silu(gate) * up

    outputs = rows * stack.intermediate_size
    return _case(
        lambda: norm_swiglu(x, gain, EPS, gate_up),
        lambda: norm_swiglu_by_library(x, gain, EPS, gate_up),
        theirs,
        (x, gain, gate_up),
        weights=(gain, gate_up),
        outputs=outputs,
    )


def output_case(stack: Stack, rows: int, new: Inputs) -> Case:
    """Output projection and residual, where attention is a launch of its own."""
    return _residual_case(stack.heads * stack.head_dim, stack, rows, new)


def down_case(stack: Stack, rows: int, new: Inputs) -> Case:
    """Down projection and residual."""
    return _residual_case(stack.intermediate_size, stack, rows, new)


def _residual_case(inputs: int, stack: Stack, rows: int, new: Inputs) -> Case:
    x, weight = new.random(rows, inputs), new.weight(stack.hidden_size, inputs)
    residual = new.random(rows, stack.hidden_size)

    def theirs(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return residual + F.linear(x, weight)

    arguments = (x, weight, residual)  # what a library adds in place piles up from call to call, which takes no time
    return _case(
        lambda: linear_residual(*arguments),
        lambda: linear_residual_by_library(*arguments),
        theirs,
        arguments,
        weights=(weight,),
        outputs=residual.numel(),
    )


def projector_case(stack: Stack, rows: int, new: Inputs) -> Case:
    """Norm and a product with half as many outputs: the backbone's output to the depth decoder's input."""
    x, gain = new.random(rows, stack.hidden_size), new.random(stack.hidden_size)
    weight = new.weight(stack.hidden_size // 2, stack.hidden_size)

    def theirs(x: Tensor, gain: Tensor, weight: Tensor) -> Tensor:
        return F.linear(torch_rms_norm(x, gain), weight)

    outputs = rows * stack.hidden_size // 2
    return _case(
        lambda: norm_linear(x, gain, EPS, weight),
        lambda: norm_linear_by_library(x, gain, EPS, weight),
        theirs,
        (x, gain, weight),
        weights=(gain, weight),
        outputs=outputs,
    )


def head_case(stack: Stack, rows: int, new: Inputs) -> Case:
    """Final norm and one codebook's head, logits in float32."""
    x, gain = new.random(rows, stack.hidden_size), new.random(stack.hidden_size)
    heads = new.weight(stack.vocabulary, stack.hidden_size)[None]

    def theirs(x: Tensor, gain: Tensor, head: Tensor) -> Tensor:
        return F.linear(torch_rms_norm(x, gain), head).float()

    outputs = 4 * rows * stack.vocabulary // new.dtype.itemsize
    arguments = (x, gain, heads[0])
    return _case(
        lambda: codebook_head(x, gain, EPS, heads, 0),
        lambda: codebook_head_by_library(x, gain, EPS, heads, 0),
        theirs,
        arguments,
        weights=(gain, heads),
        outputs=outputs,
    )


def embed_case(stack: Stack, rows: int, new: Inputs) -> Case:
    """The sum of a frame's 32 embeddings."""
    codebooks = 32
    text_tokens, text_table = torch.full((rows,), -1, device=new.device), new.random(1, stack.hidden_size)
    table = new.random(codebooks * stack.vocabulary, stack.hidden_size)
    codes = torch.randint(stack.vocabulary, (rows, codebooks), device=new.device, generator=new.generator)
    offsets = torch.arange(codebooks, device=new.device) * stack.vocabulary

    def theirs(codes: Tensor, table: Tensor) -> Tensor:
        return table[codes + offsets].sum(dim=1)

    read_bytes = rows * codebooks * stack.hidden_size * table.element_size()
    moved_bytes = read_bytes + rows * stack.hidden_size * table.element_size()
    ours = functools.partial(embed_prompt, text_tokens, codes, text_table, table, stack.vocabulary)
    return Case(ours, None, theirs, (codes, table), moved_bytes, read_bytes)


MAKERS: dict[str, tuple[str, Callable[[Stack, int, Inputs], Case]]] = {
    "norm.backbone": ("backbone", norm_case),
    "norm.depth": ("depth", norm_case),
    "qkv.backbone": ("backbone", qkv_case),
    "qkv.depth": ("depth", qkv_case),
    "attention.backbone": ("backbone", attention_case),
    "attention.depth": ("depth", attention_case),
    "output.backbone": ("backbone", output_case),
    "output.depth": ("depth", output_case),
    "gate_up.backbone": ("backbone", swiglu_case),
    "gate_up.depth": ("depth", swiglu_case),
    "down.backbone": ("backbone", down_case),
    "down.depth": ("depth", down_case),
    "projector": ("backbone", projector_case),
    "head.backbone": ("backbone", head_case),
    "head.depth": ("depth", head_case),
    "embed.backbone": ("backbone", embed_case),
}


def _case(
    ours: Callable[[], Tensor],
    by_library: Callable[[], Tensor] | None,
    theirs: Callable[..., Tensor],
    arguments: tuple[Tensor, ...],
    *,
    weights: tuple[Tensor, ...],
    outputs: int,
) -> Case:
    """A case whose result has `outputs` elements of the first argument's dtype."""
    read_bytes = sum(tensor.numel() * tensor.element_size() for tensor in arguments)
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    moved_bytes = read_bytes + outputs * arguments[0].element_size()
    return Case(ours, by_library, theirs, arguments, moved_bytes, weight_bytes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own arguments."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="default: bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="default: 1 to 1024")
    parser.add_argument(
        "--compile-rows",
        type=int,
        nargs="*",
        default=COMPILE_ROWS,
        help="compare with torch.compile (default: 1 64)",
    )
    parser.add_argument("--cases", nargs="+", default=list(MAKERS), choices=MAKERS, metavar="CASE", help="default: all")
    parser.add_argument("--small", action="store_true", help="small shapes, to try the suite on a CPU")
    parser.add_argument("--repeats", type=int, default=50, help="replays of which the median is taken (default: 50)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON document to a file, too")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Measure and print a table; the last line printed is one JSON document. Exits with 1 if a result is wrong."""
    if min(parsed.rows) < 1 or parsed.repeats < 1:
        print("The suite kernels needs 1 row or more, and 1 repeat or more.", file=sys.stderr)
        return 1
    device, dtype = torch.device(parsed.device), DTYPES[parsed.dtype]
    about, bandwidth = circumstances(device), copy_bandwidth(device)
    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}")
    print(f"copy {bandwidth / 1e12:.3f} TB/s; {parsed.dtype}; microseconds")
    columns = f"{'case':<20}{'rows':>5}{'MB':>9}{'ours':>10}{'of copy':>9}{'library':>10}{'eager':>10}{'compiled':>10}"
    print(f"{columns}{'vs best':>9}")
    results: list[dict[str, Any]] = []
    document = {"suite": "kernels", "about": about, "copy_bytes_per_second": bandwidth, "results": results}
    with reported(document, parsed.json):
        for name in parsed.cases:
            for rows in parsed.rows:
                try:
                    result = measure(name, rows, device, dtype, parsed)
                except torch.OutOfMemoryError:
                    results.append({"case": name, "rows": rows, "dtype": parsed.dtype, "error": "not enough memory"})
                    print(f"{name:<20}{rows:>5}  not enough memory on this device")
                    continue
                result["copy_fraction"] = result["moved_bytes"] / result["seconds"] / bandwidth
                results.append(result)
                if not result["correct"]:
                    print(f"{name:<20}{rows:>5}  WRONG: differs from torch by {result['difference']:.3g}")
                    continue
                best = min(result["eager_seconds"], result["compiled_seconds"] or result["eager_seconds"])
                mark = "" if result["compiled_seconds"] else " (eager)"
                print(
                    f"{name:<20}{rows:>5}{result['moved_bytes'] / 1e6:>9.2f}{_microseconds(result['seconds'])}"
                    f"{result['copy_fraction']:>9.1%}{_microseconds(result['library_seconds'])}"
                    f"{_microseconds(result['eager_seconds'])}{_microseconds(result['compiled_seconds'])}"
                    f"{best / result['seconds']:>9.2f}{mark}"
                )
        wrong = [result for result in results if not result.get("correct", True)]
        if wrong:
            print(f"{len(wrong)} of {len(results)} results are wrong", file=sys.stderr)
    return 1 if wrong else 0


def _microseconds(seconds: float | None) -> str:
    return f"{'-':>10}" if seconds is None else f"{seconds * 1e6:>10.2f}"


def measure(
    name: str, rows: int, device: torch.device, dtype: torch.dtype, parsed: argparse.Namespace
) -> dict[str, Any]:
    """Compare one case with torch, then time it and torch."""
    stack_name, make = MAKERS[name]
    stack = (SMALL if parsed.small else FULL)[stack_name]
    inputs = Inputs(device, dtype, torch.Generator(device).manual_seed(0))
    first = make(stack, rows, inputs)
    count = copies_for_cold_cache(first.weight_bytes, device)
    cases = [first, *(make(stack, rows, inputs) for _ in range(count - 1))]

    # The bound on the difference: twice what torch itself is off in this dtype, and one rounding, because torch's fused
    # norm rounds once where transformers, and so Aloud, round twice.
    theirs = first.theirs(*first.arguments).float()
    wide = [a.float() if a.is_floating_point() else a for a in first.arguments]
    exact = first.theirs(*wide).float()  # before the others, one of which may write into its arguments
    ways = [first.ours]
    if first.by_library is not None and MATRIX_ROWS <= rows <= MAX_ROWS:  # beyond, it is ours
        ways.append(first.by_library)
    difference = max(float((way().float() - exact).abs().max()) for way in ways)
    allowed = 2 * float((theirs - exact).abs().max()) + max(torch.finfo(dtype).eps, 1e-5) * float(exact.abs().max())

    def seconds(calls: list[Callable[[], Tensor]]) -> float:
        return time_calls(calls, device, repeats=parsed.repeats)

    library_seconds = compiled_seconds = None
    if len(ways) > 1:
        library_seconds = seconds([case.by_library for case in cases if case.by_library is not None])
    if rows in parsed.compile_rows:
        torch._dynamo.reset()  # what was compiled for other shapes counts towards its limit
        compiled = torch.compile(first.theirs, dynamic=False)
        compiled_seconds = seconds([functools.partial(compiled, *case.arguments) for case in cases])
    return {
        "case": name,
        "rows": rows,
        "dtype": parsed.dtype,
        "copies": count,
        "moved_bytes": first.moved_bytes,
        "difference": difference,
        "allowed": allowed,
        "correct": difference <= allowed,
        "seconds": seconds([case.ours for case in cases]),
        "library_seconds": library_seconds,
        "eager_seconds": seconds([functools.partial(case.theirs, *case.arguments) for case in cases]),
        "compiled_seconds": compiled_seconds,
    }
