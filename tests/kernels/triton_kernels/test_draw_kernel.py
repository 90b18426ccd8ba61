"""The GPU twin of the draw against the C++ extension: the same token for the same logits, every time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from aloud import _sampler
from aloud.kernels.draw import draw, plan_draw

NAN, INF = float("nan"), float("inf")


def parameters(rows: int, vocabulary: int, generator: torch.Generator) -> dict:
    """Seeds with all 64 bits, frames beyond 32, every kind of temperature and of k, a codebook of 32 bits."""

    def pick(values: list) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]

    frame = torch.randint(0, 2000, (rows,), generator=generator)
    frame[::3] += 2**40
    frame[1::7] = -1
    return {
        "seed": torch.empty(rows, dtype=torch.int64).random_(-(2**63), None, generator=generator),
        "frame": frame,
        "codebook": int(torch.randint(2**32, (), generator=generator)),
        "temperature": pick([0.0, 1e-40, 1e-6, 0.1, 0.7, 0.9, 0.9, 0.9, 1.0, 1.0, 3.7, 1e6, 3e38]),
        "top_k": pick([-1, 0, 1, 2, 5, 50, 50, 50, vocabulary - 1, vocabulary, vocabulary + 1, 2**31 - 1]).int(),
    }


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "smooth": lambda logits: logits,
    "flat": lambda logits: logits * 1e-3,
    "equal": lambda logits: logits * 0,
    "ties": lambda logits: logits.round(),
    "masked": lambda logits: logits.masked_fill(logits > 2, -INF),
    "sparse": lambda logits: logits.masked_fill(logits < 5, -INF),
    "huge": lambda logits: logits * 1e37,
    "subnormal": lambda logits: logits * 1e-39,
}


@pytest.fixture
def draw_both(
    device: torch.device, version: int, interpreted: bool
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A function: tokens of the kernel and of the extension.

    Many rows a program make the interpreter fast, where they would keep the assembler busy for a minute.
    """

    def draw_both(
        logits: torch.Tensor, given: dict, rows_per_program: int = 64 if interpreted else 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        launch = plan_draw(logits.to(device), **moved, capability=version, rows_per_program=rows_per_program)
        launch.run()
        return launch.outputs[0].cpu(), draw(logits, **given)

    return draw_both


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 64, 333])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal(kind: str, vocabulary: int, draw_both: Callable, generator: torch.Generator) -> None:
    """5,120 draws in all."""
    rows = 128
    logits = KINDS[kind](3 * torch.randn(rows, vocabulary, generator=generator))
    ours, theirs = draw_both(logits, parameters(rows, vocabulary, generator))
    assert ours.dtype == torch.int64
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rows_per_program", [1, 4])
def test_sizes_of_csm(rows_per_program: int, draw_both: Callable, generator: torch.Generator) -> None:
    """Rows of 2,051 logits of which 2,048 are drawn, a number of rows that fills no program."""
    rows = 7
    logits = 3 * torch.randn(rows, 2051, generator=generator)
    given = parameters(rows, 2048, generator)
    ours, theirs = draw_both(logits[:, :2048], given, rows_per_program)
    assert torch.equal(ours, theirs)


@pytest.mark.full_size
@pytest.mark.parametrize(("vocabulary", "rows"), [(64, 60_000), (333, 25_000), (1024, 12_000), (2051, 4_000)])
def test_a_hundred_thousand_draws(
    vocabulary: int, rows: int, draw_both: Callable, generator: torch.Generator, record_property: Callable
) -> None:
    """101,000 draws in all; where two tokens differ, their scores would have to be equal but for rounding."""
    different = 0
    for kind in KINDS.values():
        logits = kind(3 * torch.randn(rows // len(KINDS), vocabulary, generator=generator))
        ours, theirs = draw_both(logits, parameters(len(logits), vocabulary, generator))
        different += int((ours != theirs).sum())
    record_property("draws", rows)
    record_property("different", different)
    print(f"{rows} draws of {vocabulary} tokens, {different} differ")
    assert different == 0


def test_rows_without_a_token(draw_both: Callable, generator: torch.Generator) -> None:
    logits = torch.randn(12, 40, generator=generator)
    given = parameters(12, 40, generator)
    given["temperature"] = torch.tensor([0.9, 0.0] * 6)
    logits[0, 3] = logits[1, 39] = NAN
    logits[2, 0] = logits[3, 7] = INF
    logits[4] = logits[5] = -INF
    logits[6, 5:] = -INF
    given["temperature"][7:10] = torch.tensor([-1.0, INF, NAN])
    ours, theirs = draw_both(logits, given, rows_per_program=4)
    assert torch.equal(ours, theirs)
    assert (ours[[0, 1, 2, 3, 4, 5, 7, 8, 9]] == -1).all()
    assert (ours[[6, 10, 11]] >= 0).all()


def test_rows_do_not_depend_on_their_place(draw_both: Callable, generator: torch.Generator) -> None:
    rows = 24
    logits = torch.randn(rows, 50, generator=generator)
    given = parameters(rows, 50, generator)
    ours, _ = draw_both(logits, given, rows_per_program=8)
    order = torch.randperm(rows, generator=generator)
    shuffled = {name: x[order] if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    again, _ = draw_both(logits[order], shuffled, rows_per_program=2)
    assert torch.equal(again, ours[order])


def test_nothing_beyond_the_vocabulary_is_read(draw_both: Callable, generator: torch.Generator) -> None:
    """Rows that are part of longer ones, full of NaN and of logits that would win."""
    wide = torch.full((5, 70), INF)
    wide[:, 37:50] = NAN
    wide[:, :37] = torch.randn(5, 37, generator=generator)
    given = parameters(5, 37, generator)
    ours, theirs = draw_both(wide[:, :37], given, rows_per_program=2)
    assert torch.equal(ours, theirs)
    assert (ours >= 0).all()


def test_the_oracle_is_the_extension(generator: torch.Generator) -> None:
    """What the kernel is compared with here is C++, not its own definition."""
    logits = torch.randn(3, 9, generator=generator)
    given = parameters(3, 9, generator)
    values = [x.numpy() if isinstance(x, torch.Tensor) else x for x in given.values()]
    assert draw(logits, **given).tolist() == _sampler.draw(logits.numpy(), *values).tolist()
