"""Decode attention and its output projection: Triton kernels against the reference and against brute force."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from aloud.kernels import attention
from aloud.kernels.attention import FUSED_ROWS, SPLIT, attention_output_reference, plan_attention_output
from aloud.kernels.decode_attention import decode_attention_reference, plan_decode_attention
from aloud.kernels.product import MATRIX_ROWS

NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {  # heads, kv_heads, head_dim, hidden_size
    "grouped": (4, 2, 32, 64),
    "group of 8": (8, 1, 16, 40),
    "ungrouped": (2, 2, 64, 48),
    "odd": (6, 2, 10, 37),
    "three heads": (3, 3, 24, 50),
}


def problem(
    shape: tuple[int, int, int, int],
    capacity: int,
    positions: list[int],
    dtype: torch.dtype,
    generator: torch.Generator,
    shared: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Arguments of `attention_output`; everything that no row may read is NaN."""
    heads, kv_heads, head_dim, hidden_size = shape
    rows = len(positions)
    slots = torch.randperm(rows + 3, generator=generator)[:rows]
    if shared:
        slots = slots[torch.randint(rows, (rows,), generator=generator)]
    cache = torch.full((2, rows + 3, kv_heads, capacity, head_dim), NAN, dtype=dtype)
    for slot in slots.unique():
        length = max(p for s, p in zip(slots, positions, strict=True) if s == slot) + 1
        cache[:, slot, :, :length] = torch.randn(2, kv_heads, length, head_dim, generator=generator).to(dtype)
    query = (2 * torch.randn(rows, heads, head_dim, generator=generator)).to(dtype)
    weight = (torch.randn(hidden_size, heads * head_dim, generator=generator) * (heads * head_dim) ** -0.5).to(dtype)
    residual = torch.randn(rows, hidden_size, generator=generator).to(dtype)
    return query, cache, slots, torch.tensor(positions), weight, residual


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each program own several outputs even of these small projections, as it does of csm-1b's."""
    monkeypatch.setattr(attention, "PROGRAMS", 4)


@pytest.fixture
def attend(device: torch.device, version: int) -> Callable[..., torch.Tensor]:
    """A function: run the launches behind `attention_output`."""

    def attend(*arguments: torch.Tensor) -> torch.Tensor:
        launches = plan_attention_output(*(argument.to(device) for argument in arguments), capability=version)
        for launch in launches:
            launch.run()
        return launches[-1].outputs[0].cpu()

    return attend


@pytest.fixture
def check(attend: Callable, assert_as_close: Callable) -> Callable[..., None]:
    """A function: compare the launches with the reference."""

    def check(*arguments: torch.Tensor) -> None:
        wide = [argument.float() if argument.is_floating_point() else argument for argument in arguments]
        assert_as_close(attend(*arguments), attention_output_reference(*arguments), attention_output_reference(*wide))

    return check


def some_positions(rows: int, edges: list[int], capacity: int, generator: torch.Generator) -> list[int]:
    """As many as `rows`: the edges first, random ones behind, in random order."""
    positions = [*edges, *torch.randint(capacity, (rows,), generator=generator).tolist()][: max(rows, 1)]
    return [positions[i] for i in torch.randperm(rows, generator=generator)]


@pytest.mark.parametrize("shape", SHAPES)
def test_short_cache(shape: str, dtype: torch.dtype, check: Callable, generator: torch.Generator) -> None:
    """One launch that attends and projects: every length of the depth decoder's that is at a block's edge."""
    for positions in ([0], [15, 16], [7, 1, 32], [31, 8, 14, 9]):
        arguments = problem(SHAPES[shape], 33, positions, dtype, generator)
        assert len(plan_attention_output(*arguments, capability=80)) == 1
        check(*arguments)


@pytest.mark.parametrize("rows", [FUSED_ROWS + 1, 7, 15, 16, 17, 64])
def test_short_cache_of_many_rows(dtype: torch.dtype, rows: int, check: Callable, generator: torch.Generator) -> None:
    positions = some_positions(rows, [0, 32, 15, 16, 31], 33, generator)
    arguments = problem(SHAPES["grouped"], 33, positions, dtype, generator)
    assert len(plan_attention_output(*arguments, capability=80)) == 2
    check(*arguments)


@pytest.mark.parametrize("shape", SHAPES)
def test_split_cache(shape: str, check: Callable, generator: torch.Generator) -> None:
    """Lengths at the edges of splits, and of the group of splits that is joined at once."""
    capacity = 5 * SPLIT + 3
    edges = [0, SPLIT - 2, SPLIT - 1, SPLIT, 4 * SPLIT - 1, 4 * SPLIT, capacity - 1]
    dtype = torch.float16 if shape == "ungrouped" else torch.float32 if shape == "odd" else torch.bfloat16
    for positions in (edges[4:5], edges):
        arguments = problem(SHAPES[shape], capacity, positions, dtype, generator)
        parts, _ = plan_attention_output(*arguments, capability=80)
        assert parts.grid[2] == 6
        check(*arguments)


@pytest.mark.parametrize("rows", [2, 3, 15, 16, 17, 64])
def test_long_cache_of_many_rows(rows: int, check: Callable, generator: torch.Generator) -> None:
    """Either side of the change from splits to whole rows, lengths at the edges of its blocks."""
    positions = some_positions(rows, [64, 63, 65, 0, 1, 127, 128, 129, 199, 31, 32, 33], 200, generator)
    arguments = problem((2, 1, 16, 24), 200, positions, torch.bfloat16, generator)
    parts, _ = plan_attention_output(*arguments, capability=80)
    assert parts.grid[2] == (2 if rows < MATRIX_ROWS else 1)
    check(*arguments)


@pytest.mark.parametrize("rows", [3, 7, 18])
@pytest.mark.parametrize("capacity", [33, 150])
def test_rows_that_share_a_slot(capacity: int, rows: int, check: Callable, generator: torch.Generator) -> None:
    positions = torch.randint(capacity, (rows,), generator=generator).tolist()
    arguments = problem(SHAPES["grouped"], capacity, positions, torch.float32, generator, shared=True)
    check(*arguments)


@pytest.mark.parametrize(("capacity", "rows"), [(33, 4), (33, 9), (300, 9), (300, 20)])
def test_rows_do_not_depend_on_each_other(
    capacity: int, rows: int, attend: Callable, generator: torch.Generator
) -> None:
    """A row alone among half as many gives the same bits as among all, by the same path."""
    positions = torch.randint(capacity, (rows,), generator=generator).tolist()
    query, cache, slots, places, weight, residual = problem(
        SHAPES["grouped"], capacity, positions, torch.bfloat16, generator
    )
    every = attend(query, cache, slots, places, weight, residual)
    some = torch.randperm(rows, generator=generator)[: max(rows - 3, 1)]
    fewer = attend(query[some], cache, slots[some], places[some], weight, residual[some])
    assert torch.equal(fewer, every[some])


@pytest.mark.parametrize("capacity", [33, 300])
def test_arguments_with_strides(capacity: int, attend: Callable, generator: torch.Generator) -> None:
    """A layer's slice of a larger cache, rows of larger tensors."""
    positions = [capacity - 1, 3]
    query, cache, slots, places, weight, residual = problem(
        SHAPES["odd"], capacity, positions, torch.float32, generator
    )
    wider = torch.full((2, 5, *cache.shape[1:3], capacity + 2, cache.shape[4] + 3), NAN)
    wider[:, 2, :, :, :capacity, : cache.shape[4]] = cache
    strided = wider[:, 2, :, :, :capacity, : cache.shape[4]]
    every_second = torch.full((2, 2, *query.shape[1:]), NAN)
    every_second[:, 1] = query
    wide_weight = torch.cat([torch.full_like(weight, NAN), weight], dim=1)[:, weight.shape[1] :]
    wide_residual = torch.cat([residual, torch.full_like(residual, NAN)], dim=1)[:, : residual.shape[1]]
    ours = attend(every_second[:, 1], strided, slots, places, wide_weight, wide_residual)
    expected = attention_output_reference(query, cache, slots, places, weight, residual)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


def test_scores_in_the_hundreds(attend: Callable, generator: torch.Generator) -> None:
    """Scores of hundreds: the exponentials only stand because the maximum is taken away, in blocks and in the join."""
    for capacity in (33, 300):
        query, cache, slots, positions, weight, residual = problem(
            SHAPES["grouped"], capacity, [capacity - 1, 5], torch.float32, generator
        )
        query *= 100
        attended, terms = [], 0.0
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            keys, values = cache[:, slot, :, : position + 1].double()  # [kv_heads, positions, head_dim] each
            heads = query[row].double().view(keys.shape[0], -1, keys.shape[2]) * keys.shape[2] ** -0.5
            attended.append(((heads @ keys.transpose(1, 2)).softmax(-1) @ values).flatten())
            terms = max(terms, (heads.abs() @ keys.abs().transpose(1, 2)).max().item())
        expected = residual + torch.stack(attended) @ weight.double().T
        # A score's rounding grows with the terms that are summed, and where two scores are near each other, a share of
        # the softmax is wrong by as much.
        allowed = torch.finfo(torch.float32).eps * terms * expected.abs().max().item()
        error = (attend(query, cache, slots, positions, weight, residual) - expected).abs().max().item()
        assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"


# --- windows ----------------------------------------------------------------------------------------------------------


def brute_force(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One row in float64, head by head: query [heads, head_dim], keys and values [positions, kv_heads, head_dim]."""
    heads, head_dim = query.shape
    out = []
    for head in range(heads):
        kv_head = head // (heads // keys.shape[1])
        exponentials = [math.exp(query[head].double() @ key.double() / head_dim**0.5) for key in keys[:, kv_head]]
        parts = [e * value.double() for e, value in zip(exponentials, values[:, kv_head], strict=True)]
        out.append(torch.stack(parts).sum(dim=0) / sum(exponentials))
    return torch.cat(out)


@pytest.mark.parametrize("split", [None, 16], ids=["whole", "split"])
@pytest.mark.parametrize("window", [None, 1, 7, 16, 17, 40])
def test_window_over_a_ring(
    window: int | None, split: int | None, device: torch.device, version: int, generator: torch.Generator
) -> None:
    """Streams written position by position into a ring; what has left the window is NaN."""
    heads, kv_heads, head_dim, capacity = 4, 2, 8, 40
    last = [0, 6, 15, 16, 39] if window is None else [0, 6, 16, 39, 40, 41, 97]
    cache = torch.full((2, len(last), kv_heads, capacity, head_dim), NAN)
    query = torch.randn(len(last), heads, head_dim, generator=generator)
    expected = []
    for slot, position in enumerate(last):
        history = torch.randn(position + 1, 2, kv_heads, head_dim, generator=generator)
        attended = history if window is None else history[-window:]
        for p in range(position + 1 - len(attended), position + 1):
            cache[:, slot, :, p % capacity] = history[p]
        expected.append(brute_force(query[slot], attended[:, 0], attended[:, 1]))
    slots, positions = torch.arange(len(last)), torch.tensor(last)
    reference = decode_attention_reference(query, cache, slots, positions, window)
    torch.testing.assert_close(reference.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)

    moved = (argument.to(device) for argument in (query, cache, slots, positions))
    launch = plan_decode_attention(*moved, window, split, capability=version)
    launch.run()
    if split is None:
        ours = launch.outputs[0].cpu()
    else:
        parts, lse = (output.cpu() for output in launch.outputs)
        parts = parts.unflatten(2, (heads, head_dim))
        lengths = (positions + 1).clamp(max=window or capacity)
        written = torch.arange(parts.shape[1]) * split < lengths[:, None]  # [rows, splits]
        assert lse[written].isfinite().all()
        assert parts[~written].isnan().all(), "a split beyond the last position writes nothing"
        shares = lse.masked_fill(~written[:, :, None], -math.inf).softmax(dim=1)
        ours = (shares[..., None] * parts.nan_to_num()).sum(dim=1).flatten(1)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_window_beyond_the_cache_is_refused() -> None:
    query, cache, index = torch.zeros(1, 2, 8), torch.zeros(2, 1, 2, 4, 8), torch.zeros(1, dtype=torch.int64)
    for window in (0, 5):
        with pytest.raises(ValueError, match="window must be 1 to"):
            plan_decode_attention(query, cache, index, index, window, capability=80)
