"""The token draw: C++ against its definition, against softmax, and against everything it must not depend on."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch

from aloud import _sampler
from aloud.kernels.draw import draw, draw_reference, gumbel_reference

NAN, INF = float("nan"), float("inf")


def parameters(
    rows: int, generator: torch.Generator, *, temperature: float = 0.9, top_k: int = 50, codebook: int = 3
) -> dict:
    """Everything of a draw but its logits: fresh seeds with all 64 bits, frames within a long stream."""
    return {
        "seed": torch.empty(rows, dtype=torch.int64).random_(-(2**63), None, generator=generator),
        "frame": torch.randint(0, 2000, (rows,), generator=generator),
        "codebook": codebook,
        "temperature": torch.full((rows,), float(temperature)),
        "top_k": torch.full((rows,), top_k, dtype=torch.int32),
    }


def select(given: dict, rows: torch.Tensor | slice) -> dict:
    return {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in given.items()}


# --- against the definition -------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "smooth": lambda logits: logits,
    "ties": lambda logits: logits.round(),
    "masked": lambda logits: logits.masked_fill(logits > 2, -INF),
    "sparse": lambda logits: logits.masked_fill(logits < 5, -INF),
    "huge": lambda logits: logits * 1e37,
    "subnormal": lambda logits: logits * 1e-39,
}


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 333, 2051])
@pytest.mark.parametrize("kind", KINDS)
def test_cpp_equals_reference(kind: str, vocabulary: int, generator: torch.Generator) -> None:
    rows = 192
    logits = KINDS[kind](3 * torch.randn(rows, vocabulary, generator=generator))
    given = parameters(rows, generator)
    temperatures = torch.tensor([0, 1e-40, 1e-6, 0.1, 0.9, 1, 3.7, 1e6, 3e38])
    top_ks = torch.tensor([-1, 0, 1, 2, 5, 50, vocabulary - 1, vocabulary, vocabulary + 1, 2**31 - 1])
    given["temperature"] = temperatures[torch.randint(len(temperatures), (rows,), generator=generator)]
    given["top_k"] = top_ks[torch.randint(len(top_ks), (rows,), generator=generator)].int()
    given["frame"][::3] += 2**40
    given["frame"][1::7] = -1
    given["codebook"] = int(torch.randint(2**32, (), generator=generator))
    tokens = draw(logits, **given)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == draw_reference(logits, **given).tolist()
    assert (tokens >= -1).all()
    assert (tokens < vocabulary).all()


def test_cpp_noise_equals_reference_to_the_last_bit(generator: torch.Generator) -> None:
    """Two tokens whose scores differ by about one unit in the last place, so that one wrong bit of noise is seen."""
    rows = 30_000
    given = parameters(rows, generator, temperature=1.0, top_k=0)
    noise = gumbel_reference(given["seed"], given["frame"], given["codebook"], 2)
    at_the_tie = noise[:, 0] - noise[:, 1]
    below, above = (at_the_tie.nextafter(torch.tensor(side)) for side in (-INF, INF))
    near_the_tie = torch.stack([below, at_the_tie, above])[torch.arange(rows) % 3, torch.arange(rows)]
    logits = torch.stack([torch.zeros(rows), near_the_tie], dim=1)
    tokens = draw(logits, **given)
    assert 0.01 < tokens.float().mean() < 0.99
    assert tokens.equal(draw_reference(logits, **given))


@pytest.mark.parametrize("logarithm", ["inner", "outer"])
def test_noise_is_the_same_on_every_platform(logarithm: str) -> None:
    """No u has a logarithm so near a float32 rounding boundary that a few units in the last place of double matter."""
    argument = ((torch.arange(2**23).float() + 0.5) * 2**-23).double()
    if logarithm == "outer":
        argument = -argument.log().float().double()
    exact = argument.log().abs().numpy()
    rounded = exact.astype(np.float32)
    boundaries = [
        (rounded.astype(np.float64) + np.nextafter(rounded, np.float32(side)).astype(np.float64)) / 2
        for side in (-np.inf, np.inf)
    ]
    margin = np.minimum(exact - boundaries[0], boundaries[1] - exact) / np.spacing(exact)
    assert margin.min() > 16  # units in the last place; a library's double log errs by less than 2


# --- against softmax --------------------------------------------------------------------------------------------------

DRAWS = 200_000


def softmax_of_kept(logits: torch.Tensor, temperature: float, top_k: int) -> np.ndarray:
    """The distribution that draws must have, in float64, by sorting."""
    z = logits.double().numpy() / temperature
    order = np.argsort(-z)[: top_k or None]
    probability = np.zeros_like(z)
    probability[order] = np.exp(z[order] - z.max())
    return probability / probability.sum()


def p_value(counts: np.ndarray, probability: np.ndarray) -> float:
    """Chi-square of counts against probabilities; the rarest cells are taken together until 10 draws are expected."""
    counts, expected = counts.ravel(), probability.ravel() * counts.sum()
    assert counts[expected == 0].sum() == 0, "a token outside the distribution was drawn"
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order]
    together = max(np.searchsorted(expected, 10), np.searchsorted(expected.cumsum(), 10) + 1)
    cells = np.maximum(np.arange(len(counts)) - together + 1, 0)
    return float(scipy.stats.chisquare(np.bincount(cells, counts), np.bincount(cells, expected)).pvalue)


def draw_counts(logits: torch.Tensor, draws: int, **given: object) -> np.ndarray:
    return np.bincount(draw(logits.expand(draws, -1), **given).numpy(), minlength=logits.shape[0])


@pytest.mark.parametrize("top_k", [0, 2, 5, 50])
@pytest.mark.parametrize("temperature", [0.3, 0.9, 2.5])
def test_draws_follow_softmax(temperature: float, top_k: int, generator: torch.Generator) -> None:
    logits = 4 * torch.rand(96, generator=generator)
    given = parameters(DRAWS, generator, temperature=temperature, top_k=top_k)
    assert p_value(draw_counts(logits, DRAWS, **given), softmax_of_kept(logits, temperature, top_k)) > 1e-6


def test_draws_of_one_request_follow_softmax(generator: torch.Generator) -> None:
    """A single seed whose frames count up, at the real vocabulary: the counter alone makes good noise."""
    logits = 2 * torch.randn(2048, generator=generator)
    given = parameters(DRAWS // 4, generator)
    given["seed"][:] = 42
    given["frame"] = torch.arange(DRAWS // 4)
    assert p_value(draw_counts(logits, DRAWS // 4, **given), softmax_of_kept(logits, 0.9, 50)) > 1e-6


@pytest.mark.parametrize("wrong", ["temperature", "top_k", "noise"])
def test_wrong_draws_do_not_pass_for_softmax(wrong: str, generator: torch.Generator) -> None:
    """The same check sees a temperature 5 % off, a top-k one short, and noise that is normal instead of Gumbel."""
    logits = 4 * torch.rand(96, generator=generator)
    temperature, top_k = 0.9, 50
    given = parameters(DRAWS, generator, temperature=temperature, top_k=top_k)
    if wrong == "temperature":
        counts = draw_counts(logits, DRAWS, **given | {"temperature": given["temperature"] * 1.05})
    elif wrong == "top_k":
        counts = draw_counts(logits, DRAWS, **given | {"top_k": given["top_k"] - 1})
    else:
        best = logits.topk(top_k)
        noise = torch.randn(DRAWS, top_k, generator=generator) * (np.pi / 6**0.5)  # the Gumbel's variance
        tokens = best.indices[(best.values / temperature + noise).argmax(dim=1)]
        counts = np.bincount(tokens.numpy(), minlength=len(logits))
    assert p_value(counts, softmax_of_kept(logits, temperature, top_k)) < 1e-6


# --- what draws depend on, and what they do not -----------------------------------------------------------------------


def test_same_seed_same_tokens(generator: torch.Generator) -> None:
    logits, given = torch.randn(64, 2048, generator=generator), parameters(64, generator)
    assert draw(logits, **given).equal(draw(logits.clone(), **given))


def test_order_count_and_company_of_rows_change_nothing(generator: torch.Generator) -> None:
    logits, given = 3 * torch.randn(64, 2048, generator=generator), parameters(64, generator)
    given["temperature"] = torch.rand(64, generator=generator)
    given["temperature"][::5] = 0
    given["top_k"] = torch.randint(0, 2048, (64,), generator=generator, dtype=torch.int32)
    logits[7] = NAN
    together = draw(logits, **given)
    permutation = torch.randperm(64, generator=generator)
    assert draw(logits[permutation], **select(given, permutation)).equal(together[permutation])
    alone = [draw(logits[row : row + 1], **select(given, slice(row, row + 1))) for row in range(64)]
    assert torch.cat(alone).equal(together)
    assert draw(logits[40:], **select(given, slice(40, None))).equal(together[40:])


@pytest.mark.parametrize(
    "change", ["frame", "frame_high", "codebook", "seed", "seed_high", "seed_top_bit", "nothing_changed"]
)
def test_draws_are_independent(change: str, generator: torch.Generator) -> None:
    """Joint counts of two draws that differ in one thing are the product of their distributions."""
    logits = torch.randn(8, generator=generator)
    first = parameters(DRAWS, generator, temperature=1.0, top_k=0)
    second = dict(first)
    match change:
        case "frame":
            second["frame"] = first["frame"] + 1
        case "frame_high":
            second["frame"] = first["frame"] + 2**32
        case "codebook":
            second["codebook"] += 1
        case "seed":
            second["seed"] = first["seed"] + 1
        case "seed_high":
            second["seed"] = first["seed"] ^ 1 << 32
        case "seed_top_bit":
            second["seed"] = first["seed"] ^ -(2**63)
    pairs = draw(logits.expand(DRAWS, -1), **first) * 8 + draw(logits.expand(DRAWS, -1), **second)
    probability = softmax_of_kept(logits, 1.0, 0)
    p = p_value(np.bincount(pairs.numpy(), minlength=64), (probability[:, None] * probability).ravel() + 1e-300)
    assert p < 1e-6 if change == "nothing_changed" else p > 1e-6


# --- edges of the parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [0, 1, 50, 2048])
def test_temperature_zero_is_greedy_lowest_index_on_ties(top_k: int, generator: torch.Generator) -> None:
    logits = torch.randn(64, 2048, generator=generator).round()
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert draw(logits, **parameters(64, generator, temperature=0, top_k=top_k)).tolist() == expected


@pytest.mark.parametrize(
    ("temperature", "top_k"), [(0.9, 1), (1e-6, 0), (1e-30, 50)], ids=["k=1", "temperature=1e-6", "temperature=1e-30"]
)
def test_narrow_draws_equal_greedy(temperature: float, top_k: int, generator: torch.Generator) -> None:
    logits = torch.randn(64, 2048, generator=generator)
    best = logits.argmax(dim=1)
    logits[torch.arange(64), best] += 0.01  # clear of the second, by far more than the noise at these temperatures
    assert draw(logits, **parameters(64, generator, temperature=temperature, top_k=top_k)).equal(best)


def test_top_k_of_zero_negative_and_vocabulary_or_more_keep_all(generator: torch.Generator) -> None:
    logits = torch.randn(64, 300, generator=generator)
    given = parameters(64, generator, temperature=5.0, top_k=0)
    everything = draw(logits, **given)
    for top_k in (-5, 300, 301, 2**31 - 1):
        assert draw(logits, **given | {"top_k": torch.full((64,), top_k, dtype=torch.int32)}).equal(everything)


def test_large_temperature_is_uniform_over_kept(generator: torch.Generator) -> None:
    logits = torch.randn(64, generator=generator)
    given = parameters(DRAWS, generator, temperature=1e4, top_k=10)
    uniform = np.zeros(64)
    uniform[logits.topk(10).indices] = 0.1
    assert p_value(draw_counts(logits, DRAWS, **given), uniform) > 1e-6


def test_ties_at_the_threshold_are_kept(generator: torch.Generator) -> None:
    logits = torch.tensor([-9.0, 1.0, 2.0, 1.0, 0.5, 1.0, -9.0])
    given = parameters(DRAWS, generator, temperature=1.0, top_k=2)
    weights = np.array([0, np.e, np.e**2, np.e, 0, np.e, 0])
    assert p_value(draw_counts(logits, DRAWS, **given), weights / weights.sum()) > 1e-6


@pytest.mark.parametrize("temperature", [0, 1e-40, 0.9, 1e30])
@pytest.mark.parametrize("top_k", [0, 5, 50])
def test_minus_infinity_is_never_drawn(temperature: float, top_k: int, generator: torch.Generator) -> None:
    logits = torch.full((256, 128), -INF)
    allowed = torch.randint(128, (256, 9), generator=generator)  # repeats: one to nine tokens a row
    logits.scatter_(1, allowed, torch.randn(256, 9, generator=generator) - 5)
    tokens = draw(logits, **parameters(256, generator, temperature=temperature, top_k=top_k))
    assert (tokens[:, None] == allowed).any(dim=1).all()


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("bad", ["nan", "negative_nan", "plus_infinity", "both_infinities", "nothing"])
def test_bad_logits_yield_no_token_in_their_row_only(bad: str, temperature: float, generator: torch.Generator) -> None:
    logits, given = torch.randn(16, 2051, generator=generator), parameters(16, generator, temperature=temperature)
    expected = draw(logits, **given)
    assert (expected >= 0).all()
    where = int(torch.randint(2051, (), generator=generator))
    match bad:
        case "nan":
            logits[5, where] = NAN
        case "negative_nan":
            logits[5, where] = -torch.tensor(NAN)
        case "plus_infinity":
            logits[5, where] = INF
        case "both_infinities":
            logits[5] = -INF
            logits[5, where] = INF
        case "nothing":
            logits[5] = -INF
    expected[5] = -1
    assert draw(logits, **given).equal(expected)
    assert draw_reference(logits, **given).equal(expected)


@pytest.mark.parametrize("temperature", [-1.0, NAN, INF, -INF])
def test_temperature_out_of_range_yields_no_token(temperature: float, generator: torch.Generator) -> None:
    logits, given = torch.randn(3, 20, generator=generator), parameters(3, generator)
    given["temperature"][1] = temperature
    for tokens in (draw(logits, **given), draw_reference(logits, **given)):
        assert (tokens == -1).tolist() == [False, True, False]


# --- layout and contracts ---------------------------------------------------------------------------------------------


def test_strided_rows_are_read_in_place(generator: torch.Generator) -> None:
    wide, given = torch.randn(32, 2051, generator=generator), parameters(32, generator)
    wide[:, 2048:] = 1e9  # drawn at once if a row is read past its end
    expected = draw(wide[:, :2048].contiguous(), **given)
    assert draw(wide[:, :2048], **given).equal(expected)
    reversed_rows = wide.flip(0)
    assert draw(reversed_rows[:, :2048], **select(given, torch.arange(31, -1, -1))).equal(expected.flip(0))
    assert draw(wide[::2, :2048], **select(given, slice(None, None, 2))).equal(expected[::2])
    assert draw(wide[:1, :2048].expand(32, -1), **given)[0] == expected[0]


def test_parameters_may_be_strided_and_logits_may_require_grad(generator: torch.Generator) -> None:
    logits, given = torch.randn(32, 64, generator=generator), parameters(32, generator)
    strided = {
        name: torch.stack([value, value - 1], dim=1)[:, 0] if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }
    assert draw(logits.requires_grad_(), **strided).equal(draw(logits, **given))


def test_no_rows(generator: torch.Generator) -> None:
    assert draw(torch.empty(0, 2048), **parameters(0, generator)).shape == (0,)


def test_tokens_are_written_to_fresh_memory(generator: torch.Generator) -> None:
    logits, given = torch.randn(8, 64, generator=generator), parameters(8, generator)
    first = draw(logits, **given)
    kept = first.clone()
    draw(-logits, **given)
    assert first.equal(kept)


WRONG = {
    "logits_float64": ("logits", lambda value: value.double()),
    "logits_bfloat16": ("logits", lambda value: value.bfloat16()),
    "logits_one_dimension": ("logits", lambda value: value[0]),
    "logits_transposed": ("logits", lambda value: value.T.contiguous().T),
    "logits_every_other": ("logits", lambda value: value[:, ::2]),
    "seed_int32": ("seed", lambda value: value.int()),
    "seed_short": ("seed", lambda value: value[:-1]),
    "frame_float": ("frame", lambda value: value.float()),
    "frame_two_dimensions": ("frame", lambda value: value[:, None]),
    "temperature_float64": ("temperature", lambda value: value.double()),
    "temperature_scalar": ("temperature", lambda value: value[0]),
    "top_k_int64": ("top_k", lambda value: value.long()),
    "top_k_long": ("top_k", lambda value: value.repeat(2)),
    "codebook_negative": ("codebook", lambda value: -1),
    "codebook_over_32_bits": ("codebook", lambda value: 2**32),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_raise(case: str, generator: torch.Generator) -> None:
    name, spoil = WRONG[case]
    given = {"logits": torch.randn(4, 10, generator=generator), **parameters(4, generator)}
    draw(**given)
    with pytest.raises(ValueError, match=name):
        draw(**given | {name: spoil(given[name])})


@pytest.mark.parametrize("case", sorted(WRONG.keys() - {"logits_bfloat16"}))  # NumPy has no bfloat16
def test_extension_checks_for_itself(case: str, generator: torch.Generator) -> None:
    name, spoil = WRONG[case]
    given = {"logits": torch.randn(4, 10, generator=generator), **parameters(4, generator)}
    given |= {name: spoil(given[name])}
    arrays = {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    with pytest.raises((TypeError, ValueError)):
        _sampler.draw(**arrays)


# --- the GIL ----------------------------------------------------------------------------------------------------------


def longest_pause_of_others(call: Callable[[], object]) -> float:
    """The longest time within `call` in which another Python thread did not run, as a fraction of the call's."""
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        begin = time.perf_counter()
        call()
        end = time.perf_counter()
    finally:
        stop.set()
        ticker.join()
    moments = [begin, *(moment for moment in ticks if begin < moment < end), end]
    return max(after - before for before, after in itertools.pairwise(moments)) / (end - begin)


def test_other_threads_run_during_a_draw(generator: torch.Generator) -> None:
    rows = 12_000
    logits, given = torch.randn(1, 2048, generator=generator), parameters(rows, generator, top_k=0)
    arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    assert longest_pause_of_others(lambda: _sampler.draw(logits.expand(rows, -1).numpy(), **arrays)) < 0.5


def test_pause_is_seen_when_the_gil_is_held() -> None:
    assert longest_pause_of_others(lambda: sum(range(20_000_000))) > 0.5
