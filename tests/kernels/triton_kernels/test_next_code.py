"""Head, draw and next input as one operation, against the three references one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from aloud.kernels.codebook_head import codebook_head_reference
from aloud.kernels.draw import draw_reference
from aloud.kernels.next_code import FUSED_ROWS, NextCodeScratch, allocate_scratch, next_code, plan_next_code

NAN = float("nan")


def problem(
    rows: int,
    dtype: torch.dtype,
    random: Callable,
    generator: torch.Generator,
    *,
    hidden_size: int = 48,
    drawable: int = 61,
    vocabulary: int = 64,
    table_hidden_size: int = 40,
) -> dict:
    """Arguments by name; the head's rows from `drawable` on are NaN."""
    heads = random(3, vocabulary, hidden_size, dtype=dtype, scale=3 * hidden_size**-0.5)
    heads[:, drawable:] = NAN
    return {
        "x": random(rows, hidden_size, dtype=dtype),
        "gain": random(hidden_size, dtype=dtype),
        "eps": 1e-5,
        "heads": heads,
        "head": 1,
        "drawable": drawable,
        "seed": torch.empty(rows, dtype=torch.int64).random_(-(2**63), None, generator=generator),
        "frame": torch.randint(2**40, (rows,), generator=generator),
        "codebook": 2,
        "temperature": torch.tensor([0.9, 0.0, 1.3])[torch.randint(3, (rows,), generator=generator)],
        "top_k": torch.tensor([5, 0, 50])[torch.randint(3, (rows,), generator=generator)].int(),
        "table": random(3 * vocabulary, table_hidden_size, dtype=dtype),
        "vocabulary": vocabulary,
    }


@pytest.fixture
def run_next(device: torch.device, version: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A function: run the launches behind `next_code`."""

    def run_next(given: dict, scratch: NextCodeScratch | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        scratch = scratch or allocate_scratch(given["drawable"], device)
        for launch in plan_next_code(**moved, scratch=scratch, capability=version):
            launch.run()
        tokens, embedded = launch.outputs
        return tokens.cpu(), embedded.cpu()

    return run_next


def check(tokens: torch.Tensor, embedded: torch.Tensor, given: dict) -> None:
    """The token must win the draw from the reference's logits, or come as close as logits may differ."""
    logits = codebook_head_reference(given["x"], given["gain"], given["eps"], given["heads"], given["head"])
    logits = logits[:, : given["drawable"]]
    names = ("seed", "frame", "codebook", "temperature", "top_k")
    expected = draw_reference(logits, **{name: given[name] for name in names})
    entries = tokens.clamp(min=0) + given["codebook"] * given["vocabulary"]
    assert torch.equal(embedded, given["table"][entries])
    assert ((tokens >= 0) & (tokens < given["drawable"])).all()
    for row in (tokens != expected).nonzero().flatten().tolist():
        # Logits differ in their last bits, so that a near tie may fall the other way: nudged, the reference agrees.
        # The tie is in the draw, or at the edge of the top k, which the token that it expected has then left.
        error = 1e-4 * logits.abs().max() if given["x"].dtype == torch.float32 else 0.05
        alone = {name: given[name] if name == "codebook" else given[name][row : row + 1] for name in names}
        agreed = []
        for token, change in ((tokens[row], error), (expected[row], -error)):
            nudged = logits[row : row + 1].clone()
            nudged[0, token] += change
            agreed.append(draw_reference(nudged, **alone).item())
        assert tokens[row].item() in agreed, f"row {row}"
    assert (tokens != expected).sum() <= 1 + len(tokens) // 8


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        *((rows, torch.bfloat16) for rows in (1, 2, 3, 7, 15, 16, 17, 64)),
        *((rows, torch.float32) for rows in (1, 7, 16)),
        *((rows, torch.float16) for rows in (2, 3, 17)),
    ],
    ids=str,
)
def test_row_counts(rows, dtype, run_next, random, generator, device, version) -> None:
    given = problem(rows, dtype, random, generator)
    launches = plan_next_code(**given, scratch=allocate_scratch(61, torch.device("cpu")), capability=version)
    assert len(launches) == (1 if rows <= FUSED_ROWS else 2)
    check(*run_next(given), given)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (75, 130, 130, 3), (33, 2, 9, 257)], ids=str)
def test_odd_sizes(sizes, rows, run_next, random, generator) -> None:
    names = ("hidden_size", "drawable", "vocabulary", "table_hidden_size")
    given = problem(rows, torch.float32, random, generator, **dict(zip(names, sizes, strict=True)))
    check(*run_next(given), given)


@pytest.mark.parametrize("rows", [1, 2])
def test_twice_with_the_same_scratch(rows, run_next, random, generator, device) -> None:
    """The counter is 0 again after every launch, and nothing of the last draw is left over."""
    scratch = allocate_scratch(61, device)
    for _ in range(2):
        given = problem(rows, torch.float32, random, generator)
        check(*run_next(given, scratch), given)
        assert scratch.finished.item() == 0
        scratch.row_tokens.fill_(NAN)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_rows_without_a_token(rows, run_next, random, generator) -> None:
    given = problem(rows, torch.float32, random, generator)
    given["x"][0] = NAN
    tokens, embedded = run_next(given)
    assert tokens[0] == -1
    assert (tokens[1:] >= 0).all()
    assert torch.equal(embedded[0], given["table"][2 * given["vocabulary"]])


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_entry_on_the_cpu(rows, random, generator) -> None:
    given = problem(rows, torch.float32, random, generator)
    tokens, embedded = next_code(**given)
    check(tokens, embedded, given)


def test_wrong_arguments(random, generator) -> None:
    given = problem(1, torch.float32, random, generator)
    for wrong in (
        {"head": 3},
        {"drawable": 65},
        {"drawable": 0},
        {"vocabulary": 60},
        {"codebook": 3},
        {"codebook": -1},
    ):
        with pytest.raises(ValueError, match=r"there is no head|has no codebook"):
            next_code(**given | wrong)
