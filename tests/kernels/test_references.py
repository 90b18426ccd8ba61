"""Every operation on the CPU, which is its definition, against other formulations: transformers' modules, torch's own.

Tolerance: float32 against float64 within a few units in the last place; half precision at most twice as far from
float64 as the other formulation is in the same dtype; and where it is known what rounds, half a unit in the last place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CsmConfig, CsmDepthDecoderConfig
from transformers.models.csm.modeling_csm import (
    CsmBackboneModelEmbeddings,
    CsmCodebooksHead,
    CsmMLP,
    CsmRMSNorm,
    CsmRotaryEmbedding,
    apply_rotary_pos_emb,
)

from aloud.kernels.attention import attention_output
from aloud.kernels.codebook_head import codebook_head
from aloud.kernels.embedding import embed_code, embed_prompt
from aloud.kernels.linear import linear_residual, norm_linear, norm_swiglu
from aloud.kernels.qkv import norm_qkv_rope
from aloud.kernels.rms_norm import rms_norm
from aloud.kernels.rope import Llama3Scaling, Rope, rope_frequencies, rope_table
from aloud.kernels.row_product import row_product

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = 1e-5

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


class Randoms:
    """Tensors of one dtype from one generator."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype) -> None:
        self._generator, self._dtype = generator, dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        # Of variance scale^2, and bounded: many are as large as the largest, so that no single one decides.
        return (scale * 12**0.5 * (torch.rand(shape, generator=self._generator) - 0.5)).to(self._dtype)

    def gain(self, size: int) -> Tensor:
        return (1 + 0.3 * torch.randn(size, generator=self._generator)).to(self._dtype)

    def weight(self, outputs: int, inputs: int) -> Tensor:
        return self(outputs, inputs, scale=inputs**-0.5)


def assert_accurate(ours: Tensor, exact: Tensor, other: Tensor) -> None:
    """`ours` is as near to `exact` (float64) as the module's tolerance asks; `other` is somebody else's result."""
    assert ours.shape == exact.shape == other.shape
    assert exact.dtype == torch.float64
    assert bool(ours.isfinite().all())
    error, scale = float((ours.double() - exact).abs().max()), float(exact.abs().max())
    if ours.dtype == torch.float32:
        assert error <= 2e-6 * scale, f"{error:.3g} of {scale:.3g}"
        return
    assert ours.dtype == other.dtype
    bound = 2 * float((other.double() - exact).abs().max())
    assert error <= bound, f"{error:.3g}, twice the other's error is {bound:.3g}"


def assert_rounded(ours: Tensor, exact: Tensor, *before: Tensor) -> None:
    """`ours` is `exact` (float64) but for float32's errors and half a unit in the last place of its dtype.

    `before`: sums of the absolute values that were themselves rounded to the dtype on the way, if any were.
    """
    assert ours.shape == exact.shape
    error, scale = (ours.double() - exact).abs(), float(exact.abs().max())
    rounded = exact.abs() + sum(before)
    assert bool((error <= 0.5 * torch.finfo(ours.dtype).eps * rounded + 2e-6 * scale).all())


def norm64(x: Tensor, gain: Tensor) -> Tensor:
    """RMSNorm from its equation, in float64."""
    wide = x.double()
    return gain.double() * wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()


def csm_norm(gain: Tensor) -> CsmRMSNorm:
    """transformers' module."""
    module = CsmRMSNorm(len(gain), EPS)
    module.weight = nn.Parameter(gain)
    return module


# --- RMSNorm ----------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
@pytest.mark.parametrize("shape", [(1, 64), (3, 72), (5, 2048)], ids=str)
@torch.no_grad()
def test_rms_norm(shape: tuple[int, int], scale: float, dtype: torch.dtype, generator: torch.Generator) -> None:
    random = Randoms(generator, dtype)
    x, gain = random(*shape, scale=scale), random.gain(shape[1])
    theirs = csm_norm(gain)(x)
    assert_accurate(rms_norm(x, gain, EPS), norm64(x, gain), theirs)
    assert torch.equal(rms_norm(x, gain, EPS), theirs)


@dtypes
def test_rms_norm_of_nothing_is_nothing(dtype: torch.dtype) -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 8, dtype=dtype), torch.ones(8, dtype=dtype), EPS), torch.zeros(2, 8))


# --- RoPE -------------------------------------------------------------------------------------------------------------


def llama3(low: float, high: float, original: int, theta: float = 500_000.0) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": 32.0,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


ROPES: dict[str, tuple[dict[str, Any], int, int]] = {  # parameters, head_dim, positions
    "default": ({"rope_type": "default", "rope_theta": 10_000.0}, 32, 2048),
    "llama3": (llama3(1.0, 4.0, 64, 10_000.0), 16, 2048),
    "csm-1b's backbone": (llama3(0.125, 0.5, 1024), 64, 2048),
    "csm-1b's depth decoder": (llama3(0.001953125, 0.0078125, 16), 128, 2048),
}


def rope_of(parameters: dict[str, Any]) -> Rope:
    if parameters["rope_type"] == "default":
        return Rope(parameters["rope_theta"])
    values = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return Rope(parameters["rope_theta"], Llama3Scaling(*(parameters[name] for name in values)))


def their_rope(parameters: dict[str, Any], head_dim: int, positions: int) -> CsmRotaryEmbedding:
    sizes = {"head_dim": head_dim, "max_position_embeddings": positions, "num_codebooks": 4}
    return CsmRotaryEmbedding(CsmDepthDecoderConfig(rope_parameters=dict(parameters), **sizes))


@pytest.mark.parametrize("name", ROPES)
def test_rope_table(name: str) -> None:
    parameters, head_dim, positions = ROPES[name]
    table = rope_table(rope_of(parameters), head_dim, positions)
    assert table.dtype == torch.float32
    theirs = their_rope(parameters, head_dim, positions)
    cos, sin = theirs(torch.zeros(1), torch.arange(positions)[None])
    half = head_dim // 2
    torch.testing.assert_close(rope_frequencies(rope_of(parameters), head_dim), theirs.inv_freq, rtol=3e-7, atol=0)
    torch.testing.assert_close(table, torch.stack([cos[0, :, :half], sin[0, :, :half]]), rtol=0, atol=2e-6)
    # An angle is a float32 product; at 2,048 radians it is known to 2^-13.
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * theirs.inv_freq.double()
    torch.testing.assert_close(table.double(), torch.stack([angles.cos(), angles.sin()]), rtol=0, atol=2.5e-4)


def test_llama3_scaling_by_its_definition() -> None:
    """Short waves stay, long ones are slowed 32 times, and those between are blended without a step."""
    rope = rope_of(llama3(1.0, 4.0, 8192))
    plain, scaled = rope_frequencies(Rope(500_000.0), 128), rope_frequencies(rope, 128)
    wavelengths = 2 * torch.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    assert torch.equal(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 32)
    between = ~short & ~long
    assert int(between.sum()) > 3
    ratio = scaled / plain
    assert bool((ratio[between] > 1 / 32).all())
    assert bool((ratio[between] < 1).all())
    assert bool((ratio.diff() <= 0).all())


@dtypes
@pytest.mark.parametrize("name", ROPES)
@torch.no_grad()
def test_norm_qkv_rope(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Rows that share slots, at other positions; the cache beside what they write is left alone."""
    parameters, head_dim, positions = ROPES[name]
    random = Randoms(generator, dtype)
    heads, kv_heads, hidden, slots, rows = 8, 4, 48, 4, 24
    x, gain = random(rows, hidden), random.gain(hidden)
    weight = random.weight((heads + 2 * kv_heads) * head_dim, hidden)
    ends = torch.tensor([0, positions - 1, 3 * positions - 1])  # of slots 0 and 2
    others = torch.randperm(slots * positions, generator=generator)
    places = torch.cat([ends, others[~torch.isin(others, ends)]])[:rows]
    row_slots, row_positions = places // positions, places % positions
    cache = torch.full((2, slots, kv_heads, positions, head_dim), torch.nan, dtype=dtype)
    table = rope_table(rope_of(parameters), head_dim, positions)
    query = norm_qkv_rope(x, gain, EPS, weight, table, cache, row_slots, row_positions)

    def formulation(normed: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> query, key, value [rows, heads, head_dim] with transformers' rotation."""
        parts = F.linear(normed, weight).split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
        query, key, value = (part.view(len(normed), -1, head_dim).transpose(0, 1)[None] for part in parts)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        return query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)

    rope = their_rope(parameters, head_dim, positions)
    cos, sin = (part.double() for part in rope(torch.zeros(1), row_positions[None]))
    exact = formulation(norm64(x, gain), weight.double(), cos, sin)
    theirs = formulation(csm_norm(gain)(x), weight, *rope(x, row_positions[None]))
    ours = query, cache[0, row_slots, :, row_positions], cache[1, row_slots, :, row_positions]
    assert_accurate(*(torch.cat([parts[0], parts[1]], dim=1) for parts in (ours, exact, theirs)))
    assert_accurate(ours[2], exact[2], theirs[2])
    cache[:, row_slots, :, row_positions] = torch.nan
    assert bool(cache.isnan().all())


# --- attention --------------------------------------------------------------------------------------------------------

HEADS = {"one kv head": (4, 1), "groups of 2": (4, 2), "groups of 3": (6, 2), "ungrouped": (3, 3)}


def attention64(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """query [heads, head_dim] over keys, values [kv_heads, positions, head_dim], head after head, in float64."""
    group = len(query) // len(keys)
    outputs = []
    for head, row in enumerate(query.double()):
        scores = keys[head // group].double() @ row / len(row) ** 0.5
        weights = (scores - scores.max()).exp()
        outputs.append(weights @ values[head // group].double() / weights.sum())
    return torch.cat(outputs)


@dtypes
@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize("heads", HEADS)
def test_decode_attention(heads: str, head_dim: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Rows of several slots, some sharing one at different positions; what lies behind a row's position is NaN."""
    query_heads, kv_heads = HEADS[heads]
    random = Randoms(generator, dtype)
    lengths = {0: 1, 2: 300, 4: 77, 5: 2}  # the other slots hold nothing at all
    cache = torch.full((2, 6, kv_heads, 320, head_dim), torch.nan, dtype=dtype)
    for slot, length in lengths.items():
        cache[:, slot, :, :length] = random(2, kv_heads, length, head_dim)
    places = [(4, 76), (0, 0), (5, 1), (2, 299), *((2, position) for position in range(60))]
    slots, positions = (torch.tensor(part) for part in zip(*places, strict=True))
    query = random(len(places), query_heads, head_dim)
    size = query_heads * head_dim
    attended = attention_output(
        query, cache, slots, positions, torch.eye(size, dtype=dtype), torch.zeros(len(places), size, dtype=dtype)
    )
    before = [(row, *cache[:, slot, :, : position + 1]) for row, (slot, position) in zip(query, places, strict=True)]
    assert_rounded(attended, torch.stack([attention64(*parts) for parts in before]))

    weight, residual = random.weight(56, size), random(len(places), 56)
    projected = attention_output(query, cache, slots, positions, weight, residual)
    assert torch.equal(projected, residual + row_product(attended, weight))


def test_attention_of_large_scores_is_finite(generator: torch.Generator) -> None:
    """Scores of hundreds, where exp alone overflows."""
    random = Randoms(generator, torch.float16)
    cache, query = random(2, 1, 1, 9, 64, scale=20), random(1, 2, 64, scale=20)
    zero = torch.zeros(1, 128, dtype=torch.float16)
    where = torch.tensor([0]), torch.tensor([8])
    ours = attention_output(query, cache, *where, torch.eye(128, dtype=torch.float16), zero)
    exact = attention64(query[0], *cache[:, 0])
    assert bool(ours.isfinite().all())
    assert float((ours[0].double() - exact).abs().max()) < 1e-3 * float(exact.abs().max())


# --- products ---------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 64), (7, 100, 33), (3, 1024, 300)])
@torch.no_grad()
def test_linear_residual(rows: int, inputs: int, outputs: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    random = Randoms(generator, dtype)
    x, weight, residual = random(rows, inputs), random.weight(outputs, inputs), random(rows, outputs)
    module = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    module.weight.copy_(weight)
    theirs = residual + module(x)
    exact = residual.double() + module.double()(x.double())
    assert_accurate(linear_residual(x, weight, residual), exact, theirs)


@dtypes
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 64), (7, 100, 33), (3, 1024, 300)])
@torch.no_grad()
def test_norm_linear(rows: int, inputs: int, outputs: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    random = Randoms(generator, dtype)
    x, gain, weight = random(rows, inputs, scale=3), random.gain(inputs), random.weight(outputs, inputs)
    exact = norm64(x, gain) @ weight.double().T
    assert_accurate(norm_linear(x, gain, EPS, weight), exact, F.linear(csm_norm(gain)(x), weight))


@dtypes
@pytest.mark.parametrize(("rows", "hidden", "width"), [(1, 64, 96), (7, 100, 31), (3, 256, 1024)])
@torch.no_grad()
def test_norm_swiglu(rows: int, hidden: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Against transformers' feed-forward module, whose down projection is made the identity."""
    random = Randoms(generator, dtype)
    x, gain = random(rows, hidden), random.gain(hidden)
    gate, up = random.weight(width, hidden), random.weight(width, hidden)
    config = CsmConfig(hidden_size=hidden, intermediate_size=width, num_attention_heads=1, num_key_value_heads=1)
    module = CsmMLP(config)
    module.gate_proj.weight, module.up_proj.weight = nn.Parameter(gate), nn.Parameter(up)
    module.down_proj = nn.Identity()
    theirs = module(csm_norm(gain)(x))
    exact = module.double()(norm64(x, gain))
    assert_accurate(norm_swiglu(x, gain, EPS, torch.cat([gate, up])), exact, theirs)


# --- embeddings and heads ---------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(("rows", "codebooks", "vocabulary"), [(1, 2, 67), (5, 32, 83), (3, 8, 2051)])
@torch.no_grad()
def test_embed_prompt(
    rows: int, codebooks: int, vocabulary: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    random = Randoms(generator, dtype)
    table, text_table = random(codebooks * vocabulary, 24), random(9, 24)
    codes = torch.randint(0, vocabulary, (rows, codebooks), generator=generator)
    codes[0, 0], codes[-1, -1] = vocabulary - 1, 0
    config = CsmConfig(num_codebooks=codebooks, vocab_size=vocabulary, hidden_size=24, num_attention_heads=1)
    module = CsmBackboneModelEmbeddings(config)
    module.embed_audio_tokens.weight = nn.Parameter(table)
    theirs = module(codes[None])[0]
    exact = module.double()(codes[None])[0]
    audio = torch.full((rows,), -1)
    assert_accurate(embed_prompt(audio, codes, text_table, table, vocabulary), exact, theirs)
    text_tokens = torch.randint(9, (rows,), generator=generator)
    assert torch.equal(embed_prompt(text_tokens, codes, text_table, table, vocabulary), text_table[text_tokens])


@dtypes
def test_embed_code(dtype: torch.dtype, generator: torch.Generator) -> None:
    table = Randoms(generator, dtype)(5 * 19, 12)
    codes = torch.randint(0, 19, (7,), generator=generator)
    for codebook, part in enumerate(table.split(19)):
        assert torch.equal(embed_code(codes, table, 19, codebook), F.embedding(codes, part))


def test_rows_from_which_nothing_was_drawn_embed_as_token_0(generator: torch.Generator) -> None:
    table = Randoms(generator, torch.float32)(3 * 10, 4)
    nothing, zero = torch.tensor([[-1, 3, -1]]), torch.tensor([[0, 3, 0]])
    given = (table[:5], table, 10)
    assert torch.equal(embed_prompt(nothing[0, :1], nothing, *given), embed_prompt(nothing[0, :1], zero, *given))
    for codebook in range(3):
        assert torch.equal(embed_code(nothing[0], table, 10, codebook), embed_code(zero[0], table, 10, codebook))


@dtypes
@pytest.mark.parametrize(("rows", "codebooks", "vocabulary"), [(1, 2, 67), (4, 8, 2051)])
@torch.no_grad()
def test_codebook_head(
    rows: int, codebooks: int, vocabulary: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Against transformers' module; logits are float32 whatever the dtype, and not rounded to it on the way."""
    random = Randoms(generator, dtype)
    x, gain = random(rows, 40), random.gain(40)
    heads = random(codebooks - 1, vocabulary, 40, scale=40**-0.5)
    module = CsmCodebooksHead(40, codebooks, vocabulary)
    module.weight = nn.Parameter(heads.transpose(1, 2).double())
    normed = csm_norm(gain)(x).double()  # rounded once, before the product
    every = module(normed[:, None].expand(-1, codebooks - 1, -1), torch.arange(1, codebooks))
    for codebook in range(codebooks - 1):
        logits = codebook_head(x, gain, EPS, heads, codebook)
        assert logits.dtype == torch.float32
        assert_accurate(logits, every[:, codebook], every[:, codebook])


# --- wrong arguments --------------------------------------------------------------------------------------------------


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def indices(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


CACHE = (2, 4, 2, 10, 8)
CALLS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "rms_norm": (rms_norm, {"x": zeros(3, 16), "gain": zeros(16), "eps": EPS}),
    "linear_residual": (linear_residual, {"x": zeros(3, 16), "weight": zeros(20, 16), "residual": zeros(3, 20)}),
    "norm_linear": (norm_linear, {"x": zeros(3, 16), "gain": zeros(16), "eps": EPS, "weight": zeros(20, 16)}),
    "norm_swiglu": (norm_swiglu, {"x": zeros(3, 16), "gain": zeros(16), "eps": EPS, "gate_up": zeros(20, 16)}),
    "norm_qkv_rope": (
        norm_qkv_rope,
        {
            "x": zeros(3, 16),
            "gain": zeros(16),
            "eps": EPS,
            "weight": zeros(64, 16),
            "table": zeros(2, 10, 4),
            "cache": zeros(*CACHE),
            "slots": indices(3),
            "positions": indices(3),
        },
    ),
    "attention_output": (
        attention_output,
        {
            "query": zeros(3, 4, 8),
            "cache": zeros(*CACHE),
            "slots": indices(3),
            "positions": indices(3),
            "weight": zeros(16, 32),
            "residual": zeros(3, 16),
        },
    ),
    "embed_prompt": (
        embed_prompt,
        {
            "text_tokens": indices(3),
            "codes": indices(3, 5),
            "text_table": zeros(7, 8),
            "table": zeros(50, 8),
            "vocabulary": 10,
        },
    ),
    "embed_code": (embed_code, {"codes": indices(3), "table": zeros(50, 8), "vocabulary": 10, "codebook": 4}),
    "codebook_head": (
        codebook_head,
        {"x": zeros(3, 16), "gain": zeros(16), "eps": EPS, "heads": zeros(4, 30, 16), "codebook": 3},
    ),
}
ARGUMENTS = [
    pytest.param(call, name, id=f"{call}-{name}")
    for call, (_, arguments) in CALLS.items()
    for name, value in arguments.items()
    if isinstance(value, Tensor)
]


@pytest.mark.parametrize("call", CALLS)
def test_right_arguments_are_taken(call: str) -> None:
    function, arguments = CALLS[call]
    assert len(function(**arguments)) == 3


@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_wrong_rank_names_the_argument(call: str, name: str) -> None:
    function, arguments = CALLS[call]
    with pytest.raises(ValueError, match=rf"^{name} must be \["):
        function(**(arguments | {name: arguments[name][None]}))


@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_wrong_dtype_names_the_argument(call: str, name: str) -> None:
    """A table of embeddings alone may be of any dtype; where two differ, the one met last is named."""
    function, arguments = CALLS[call]
    if call.startswith("embed") and name == "table":
        return
    names = [key for key, value in arguments.items() if isinstance(value, Tensor)]
    named = names[1] if name == names[0] and arguments[name].is_floating_point() else name
    with pytest.raises(ValueError, match=rf"^{named} must be torch\.\w+"):
        function(**(arguments | {name: arguments[name].to(torch.float64)}))


@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_every_wrong_size_is_refused(call: str, name: str) -> None:
    """A size one larger than the other arguments say, in any dimension that they say."""
    function, arguments = CALLS[call]
    tensor = arguments[name]
    free = {
        ("linear_residual", "x"): (),
        ("norm_qkv_rope", "table"): (1,),  # more positions than are used
        ("embed_code", "codes"): (0,),
        ("rms_norm", "x"): (0,),
        ("norm_linear", "x"): (0,),
        ("codebook_head", "x"): (0,),
        ("norm_swiglu", "x"): (0,),
        ("norm_linear", "weight"): (0,),
        ("embed_code", "table"): (0, 1),
        ("embed_prompt", "text_table"): (0,),
        ("norm_qkv_rope", "cache"): (1, 2, 3),  # more key/value heads are fewer query heads
        ("attention_output", "cache"): (1, 3),
        ("codebook_head", "heads"): (0, 1),
    }.get((call, name), ())
    for dimension in set(range(tensor.dim())) - set(free):
        shape = list(tensor.shape)
        shape[dimension] += 1
        with pytest.raises(ValueError, match=r"must|got|no codebook"):
            function(**(arguments | {name: torch.zeros(shape, dtype=tensor.dtype)}))


@pytest.mark.parametrize("codebook", [-1, 4])
def test_a_codebook_that_is_not_there(codebook: int) -> None:
    function, arguments = CALLS["codebook_head"]
    with pytest.raises(ValueError, match=f"codebook must be 0 to 3, got {codebook}"):
        function(**(arguments | {"codebook": codebook}))


@pytest.mark.parametrize("codebook", [-1, 5])
def test_an_embedding_of_a_codebook_that_is_not_there(codebook: int) -> None:
    function, arguments = CALLS["embed_code"]
    with pytest.raises(ValueError, match=f"no codebook {codebook} of 10 tokens"):
        function(**(arguments | {"codebook": codebook}))
