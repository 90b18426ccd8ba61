"""The embedding kernels against their references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from aloud.kernels.embedding import (
    embed_code_reference,
    embed_prompt_reference,
    plan_embed_code,
    plan_embed_prompt,
)

NAN = float("nan")


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 15, 16, 17, 64])
def test_prompt_rows(rows: int, run: Callable, random: Callable, assert_as_close: Callable, generator) -> None:
    """Text and audio mixed; what a text row's codes or an audio row's token are, does not matter."""
    text_table, table = random(9, 72, dtype=torch.bfloat16), random(4 * 11, 72, dtype=torch.bfloat16)
    codes = torch.randint(-1, 11, (rows, 4), generator=generator)
    text_tokens = torch.randint(-9, 9, (rows,), generator=generator).clamp(min=-1)
    given = (text_tokens, codes, text_table, table)
    wide = embed_prompt_reference(text_tokens, codes, text_table.float(), table.float(), 11)
    assert_as_close(run(plan_embed_prompt, *given, 11), embed_prompt_reference(*given, 11), wide)


@pytest.mark.parametrize("hidden_size", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("codebooks", [1, 2, 5, 32])
def test_prompt_sizes(codebooks, hidden_size, dtype, run, random, assert_as_close, generator) -> None:
    """Tables whose last entries are NaN, so that a codebook or token too many would be seen; strided codes."""
    beyond = torch.full((7, hidden_size), NAN, dtype=dtype)
    table = torch.cat([random(codebooks * 7, hidden_size, dtype=dtype), beyond])
    text_table = torch.cat([random(5, hidden_size, dtype=dtype), beyond])
    codes = torch.randint(7, (codebooks, 4), generator=generator).T
    codes[0, 0] = -1
    text_tokens = torch.tensor([-1, 4, 0, -1])
    given = (text_tokens, codes, text_table, table)
    wide = embed_prompt_reference(text_tokens, codes, text_table.float(), table.float(), 7)
    ours = run(plan_embed_prompt, *given, 7)
    assert_as_close(ours, embed_prompt_reference(*given, 7), wide)
    assert torch.equal(ours[1:3], text_table[[4, 0]])


@pytest.mark.parametrize("hidden_size", [1, 24, 1023, 1025])
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_code(rows: int, hidden_size: int, dtype, run, random, generator) -> None:
    """Codes of one codebook lie a frame apart."""
    table = random(5 * 9, hidden_size, dtype=dtype)
    codes = torch.randint(-1, 9, (rows, 5), generator=generator)[:, 2]
    for codebook in (0, 4):
        ours = run(plan_embed_code, codes, table, 9, codebook)
        assert torch.equal(ours, embed_code_reference(codes, table, 9, codebook))
