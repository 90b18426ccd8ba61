"""Every operation on the device against its reference, and the draws against the C++ sampler.

Under TRITON_INTERPRET=0, without a device, the machine of tests/ptx_machine runs what the operations compile to, and
the CPU a library's products, all but those of 16-bit numbers into float32, which torch has for a GPU only.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from aloud.kernels.attention import attention_output, attention_output_reference
from aloud.kernels.codebook_head import codebook_head, codebook_head_reference
from aloud.kernels.draw import draw
from aloud.kernels.embedding import embed_code, embed_code_reference, embed_prompt, embed_prompt_reference
from aloud.kernels.linear import (
    linear_residual,
    linear_residual_reference,
    norm_linear,
    norm_linear_reference,
    norm_swiglu,
    norm_swiglu_reference,
)
from aloud.kernels.next_code import allocate_scratch, next_code
from aloud.kernels.product import MAX_ROWS
from aloud.kernels.qkv import norm_qkv_rope, norm_qkv_rope_reference
from aloud.kernels.rms_norm import rms_norm, rms_norm_reference
from aloud.kernels.rope import Llama3Scaling, Rope, rope_table

pytestmark = pytest.mark.gpu
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

EPS = 1e-5
ROWS = (1, 2, 3, 7, 15, 16, 17, 64, 65, 200)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {  # hidden_size, intermediate_size, heads, kv_heads, head_dim, positions
    "backbone": (2048, 8192, 32, 8, 64, 2048),
    "depth": (1024, 8192, 8, 2, 128, 32),
    "odd": (300, 516, 6, 3, 40, 130),
}
Tensor = torch.Tensor


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value: torch.dtype = request.param
    return value


@pytest.fixture(params=ROWS, ids=lambda rows: f"rows-{rows}")
def rows(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


@pytest.fixture(params=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return SHAPES[request.param]


@pytest.fixture(autouse=True)
def by_the_machine(act_as_on_a_gpu: Callable[[], None]) -> None:
    """Without a GPU, the machine runs what the entries launch."""
    if not ON_GPU:
        act_as_on_a_gpu()


def assert_same(
    on_device: Callable[..., Tensor], reference: Callable[..., Tensor], *arguments: Tensor | float, dtype: torch.dtype
) -> None:
    """Within 1e-5 of the largest value in float32, else within twice what the reference is off in that dtype."""

    def to_device(argument: Tensor | float, wide: bool = False) -> Tensor | float:
        if not isinstance(argument, Tensor):
            return argument
        # Computed in that dtype on the device: the CPU may not have fast products of it.
        moved = argument.to(DEVICE, copy=True)
        return moved.float() if wide and moved.is_floating_point() else moved

    exact = reference(*(to_device(a, wide=True) for a in arguments)).double()
    ours = on_device(*map(to_device, arguments)).double()
    same_dtype = reference(*map(to_device, arguments)).double()
    assert ours.shape == exact.shape
    allowed = 2 * float((same_dtype - exact).abs().max()) + 1e-5 * float(exact.abs().max())
    assert float((ours - exact).abs().max()) <= allowed


@pytest.fixture
def new(generator: torch.Generator, dtype: torch.dtype) -> Callable[..., Tensor]:
    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    return random


@pytest.fixture(autouse=True)
def exact_products() -> None:
    """The references' float32 products in float32, not in TF32."""
    torch.set_float32_matmul_precision("highest")


def has_head(rows: int, dtype: torch.dtype) -> bool:
    """Whether there are products of that dtype into float32, which a library makes for many rows."""
    return ON_GPU or rows <= MAX_ROWS or dtype == torch.float32


@pytest.mark.machine
def test_products_and_norms(rows: int, shape: tuple[int, ...], dtype: torch.dtype, new: Callable[..., Tensor]) -> None:
    hidden, width, *_ = shape
    x, gain, wide = new(rows, hidden), 1 + new(hidden, scale=0.1), new(rows, width)
    weight, gate_up = new(hidden, hidden, scale=hidden**-0.5), new(2 * width, hidden, scale=hidden**-0.5)
    down, heads = new(hidden, width, scale=width**-0.5), new(2, 2051, hidden, scale=hidden**-0.5)
    assert_same(rms_norm, rms_norm_reference, x, gain, EPS, dtype=dtype)
    assert_same(norm_linear, norm_linear_reference, x, gain, EPS, weight, dtype=dtype)
    assert_same(norm_swiglu, norm_swiglu_reference, x, gain, EPS, gate_up, dtype=dtype)
    assert_same(linear_residual, linear_residual_reference, wide, down, x, dtype=dtype)
    if not has_head(rows, dtype):
        return
    assert_same(codebook_head, codebook_head_reference, x, gain, EPS, heads, 1, dtype=dtype)
    if rows > MAX_ROWS:  # a library's product: not rounded to the dtype, which the bound above would not see
        x, gain, heads = (tensor.to(DEVICE) for tensor in (x, gain, heads))
        logits = codebook_head(x, gain, EPS, heads, 1).double()
        exact = rms_norm(x, gain, EPS).double() @ heads[1].double().T
        assert float((logits - exact).abs().max()) <= 1e-5 * float(exact.abs().max())


@pytest.mark.machine
def test_qkv_rope_and_attention(
    rows: int, shape: tuple[int, ...], dtype: torch.dtype, new: Callable[..., Tensor], generator: torch.Generator
) -> None:
    hidden, _, heads, kv_heads, head_dim, capacity = shape
    rope = Rope(500_000.0, Llama3Scaling(32.0, 0.125, 0.5, 1024))
    table = rope_table(rope, head_dim, capacity)
    x, gain = new(rows, hidden), 1 + new(hidden, scale=0.1)
    weight = new((heads + 2 * kv_heads) * head_dim, hidden, scale=hidden**-0.5)
    slots = torch.randperm(rows + 3, generator=generator)[:rows]
    positions = torch.randint(capacity, (rows,), generator=generator)
    cache = torch.full((2, rows + 3, kv_heads, capacity, head_dim), torch.nan, dtype=dtype)
    for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
        cache[:, slot, :, : position + 1] = new(2, kv_heads, position + 1, head_dim)

    def both(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The query, and what was written to the cache."""

        def run(*arguments: Tensor | float) -> Tensor:
            query = operation(*arguments)
            written = arguments[5]
            assert isinstance(written, Tensor)
            return torch.cat([query.flatten().float(), written[:, arguments[6], :, arguments[7]].flatten().float()])

        return run

    arguments = (x, gain, EPS, weight, table, cache, slots, positions)
    assert_same(both(norm_qkv_rope), both(norm_qkv_rope_reference), *arguments, dtype=dtype)
    query, output = new(rows, heads, head_dim), new(hidden, heads * head_dim, scale=(heads * head_dim) ** -0.5)
    arguments = (query, cache, slots, positions, output, x)
    assert_same(attention_output, attention_output_reference, *arguments, dtype=dtype)


@pytest.mark.machine
def test_embeddings(rows: int, dtype: torch.dtype, new: Callable[..., Tensor], generator: torch.Generator) -> None:
    table, text_table = new(32 * 67, 300), new(40, 300)
    codes = torch.randint(-1, 67, (rows, 32), generator=generator)
    text_tokens = torch.randint(-40, 40, (rows,), generator=generator).clamp(min=-1)
    assert_same(embed_prompt, embed_prompt_reference, text_tokens, codes, text_table, table, 67, dtype=dtype)
    assert_same(embed_code, embed_code_reference, codes[:, 5], table, 67, 5, dtype=dtype)


def parameters(rows: int, generator: torch.Generator, device: str) -> dict[str, Tensor]:
    values = {
        "seed": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        "frame": torch.randint(2**40, (rows,), generator=generator),
        "temperature": torch.tensor([0.0, 0.5, 0.9, 1.5])[torch.randint(4, (rows,), generator=generator)],
        "top_k": torch.tensor([0, 1, 5, 50, 4000], dtype=torch.int32)[torch.randint(5, (rows,), generator=generator)],
    }
    return {name: value.to(device) for name, value in values.items()}


def test_draws_are_those_of_the_cpp_sampler(generator: torch.Generator) -> None:
    """100,000 draws agree in all but float ties: where the two differ, their scores are within one float32 step."""
    rows = 100_000
    logits = torch.randn(rows, 2051, generator=generator) * 4
    given = parameters(rows, generator, "cpu")
    expected = draw(logits[:, :2048], codebook=7, **given)
    drawn = draw(logits.cuda()[:, :2048], codebook=7, **{k: v.cuda() for k, v in given.items()}).cpu()
    different = int((drawn != expected).sum())
    print(f"{different} of {rows} draws differ")
    assert different <= 5


@pytest.mark.machine
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 64, 80], indirect=True)
def test_next_code_is_its_parts(
    rows: int, dtype: torch.dtype, new: Callable[..., Tensor], generator: torch.Generator
) -> None:
    """Fused or not, the token is that of the head's logits; and scratch memory serves call after call."""
    if not has_head(rows, dtype):
        pytest.skip("torch has products of 16-bit numbers into float32 for a GPU only")
    x, gain, heads = new(rows, 1024), new(1024), new(3, 2051, 1024, scale=1 / 32)
    x, gain, heads, table = (tensor.to(DEVICE) for tensor in (x, gain, heads, new(4 * 2051, 1024)))
    scratch = allocate_scratch(2048, x.device)
    given = parameters(rows, generator, DEVICE)
    for codebook in (1, 2, 3):
        tokens, embedded = next_code(
            x, gain, EPS, heads, codebook - 1, drawable=2048, codebook=codebook, table=table, vocabulary=2051,
            scratch=scratch, **given,
        )  # fmt: skip
        logits = codebook_head(x, gain, EPS, heads[:, :2048], codebook - 1)
        assert torch.equal(tokens, draw(logits, codebook=codebook, **given))
        assert torch.equal(embedded, embed_code(tokens, table, 2051, codebook))
