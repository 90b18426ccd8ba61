"""From a decoder's output to its next input: a codebook's head, the draw of a token, and the token's embedding.

    logits   = rms_norm(x) heads[head]^T            codebook_head.py; only tokens below `drawable`
    token    = draw(logits)                         draw.py
    embedded = table[codebook * vocabulary + token] embedding.py; a row without a token, -1, embeds as token 0

The draw needs all of a row's logits, which many programs make. For one or two rows they leave them in scratch memory
and count themselves; the one that counts last draws and gathers, so that all of it is one launch. A token's noise does
not depend on its logit: each program makes that of its own tokens, so that its logarithms in double precision, slow on
many chips, are spread over all of them. For more rows, the head's launch, or a library's product, is one step and the
draw with the gather another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from aloud.kernels.check import check
from aloud.kernels.codebook_head import codebook_head_by_library, codebook_head_reference, plan_codebook_head
from aloud.kernels.draw import WORD, as_int32, draw, draw_rows, gumbel, warps_for_tokens
from aloud.kernels.embedding import embed_code_reference
from aloud.kernels.launch import (
    ANY_ALIGNMENT,
    PROGRAMMATIC_LAUNCH_CAPABILITY,
    Launch,
    capability,
    next_power_of_2,
    require_rows,
)
from aloud.kernels.product import MAX_ROWS, plan_product, row_block, vector_product, weight_slice, whole_gain
from aloud.kernels.rms_norm import normed
from aloud.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton


@dataclass(frozen=True)
class NextCodeScratch:
    """Memory of one `next_code` at a time; made once, it serves any number of calls that follow each other."""

    row_tokens: torch.Tensor  # float32 [2, rows, drawable]: logits and noise
    finished: torch.Tensor  # int32 [1]: programs that have finished; 0 between launches


def allocate_scratch(drawable: int, device: torch.device) -> NextCodeScratch:
    """Scratch memory for up to FUSED_ROWS rows."""
    row_tokens = torch.empty(2, FUSED_ROWS, drawable, dtype=torch.float32, device=device)
    return NextCodeScratch(row_tokens, torch.zeros(1, dtype=torch.int32, device=device))


def next_code_reference(
    x: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    heads: torch.Tensor,
    head: int,
    *,
    drawable: int,
    seed: torch.Tensor,
    frame: torch.Tensor,
    codebook: int,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    table: torch.Tensor,
    vocabulary: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `next_code`."""
    tokens = draw(
        codebook_head_reference(x, gain, eps, heads, head)[:, :drawable],
        seed=seed,
        frame=frame,
        codebook=codebook,
        temperature=temperature,
        top_k=top_k,
    )
    return tokens, embed_code_reference(tokens, table, vocabulary, codebook)


# --- launch table -----------------------------------------------------------------------------------------------------
# Up to FUSED_ROWS rows, one launch: its last program draws all rows at once, from registers, and a third and fourth row
# would take it longer than a second launch takes. Beyond, the head is one launch and one program a row draws in
# another. Programs of the first kind are those of `norm_linear` (product.py).

FUSED_ROWS = 2


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["codebook", "first_entry", "rows"], do_not_specialize_on_alignment=ANY_ALIGNMENT)
def next_code_kernel(
    x_ptr,
    gain_ptr,
    weight_ptr,
    y_ptr,
    finished_ptr,
    seed_ptr,
    frame_ptr,
    temperature_ptr,
    top_k_ptr,
    table_ptr,
    tokens_ptr,
    embedded_ptr,
    stride_x_row,
    stride_weight_row,
    stride_table_row,
    outputs,
    rows,
    inputs,
    eps,
    codebook,
    first_entry,
    embedding_size,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EMBEDDING: tl.constexpr,
    MATRIX: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One program makes the logits and noise of BLOCK_OUTPUTS tokens; the last of them draws. y is the scratch."""
    tl.static_assert(not MATRIX)
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    row = tl.arange(0, BLOCK_ROWS)
    exists = row < rows
    if PROGRAMMATIC:
        gdc_launch_dependents()
    weight = weight_slice(weight_ptr, stride_weight_row, output, outputs, inputs, BLOCK_INPUTS)
    gain = whole_gain(gain_ptr, inputs, BLOCK_INPUTS)
    if PROGRAMMATIC:
        gdc_wait()
    x = row_block(x_ptr, stride_x_row, row, rows, inputs, BLOCK_INPUTS)
    seed = tl.load(seed_ptr + row, mask=exists, other=0)
    frame = tl.load(frame_ptr + row, mask=exists, other=0)
    noise = gumbel(seed[:, None], frame[:, None], codebook, output[None, :])
    logits = vector_product(weight, normed(x, gain, eps, inputs, axis=2, dtype=weight.dtype))
    inside = exists[:, None] & (output < outputs)[None, :]
    place = row[:, None] * outputs + output[None, :]
    noise_ptr = y_ptr + rows * outputs
    tl.store(y_ptr + place, tl.trans(logits), mask=inside)
    tl.store(noise_ptr + place, noise, mask=inside)

    # One thread counts for its program. The barrier puts the stores of the program's other threads before the count;
    # its release makes all of them visible to whoever counts later, and the acquire, with the barrier that hands the
    # count to the other threads, puts their loads behind those stores. ".cg" loads from the level-2 cache: nothing of
    # an earlier launch can stand in the way.
    tl.debug_barrier()
    finished = tl.atomic_add(finished_ptr, 1, sem="acq_rel", scope="gpu")
    if finished == tl.num_programs(0) - 1:
        # All have counted, so nobody looks at the counter again: it is 0 for the next launch, which counts behind its
        # wait for this one.
        tl.store(finished_ptr, 0)
        token = tl.arange(0, BLOCK_TOKENS)[None, :]
        token_inside = exists[:, None] & (token < outputs)
        token_place = row[:, None] * outputs + token
        all_logits = tl.load(y_ptr + token_place, mask=token_inside, other=float("-inf"), cache_modifier=".cg")
        all_noise = tl.load(noise_ptr + token_place, mask=token_inside, other=0.0, cache_modifier=".cg")
        temperature = tl.load(temperature_ptr + row, mask=exists, other=0.0)
        top_k = tl.load(top_k_ptr + row, mask=exists, other=0)
        drawn = draw_rows(all_logits, all_noise, token, token_inside, temperature, top_k)
        tl.store(tokens_ptr + row, drawn.to(tl.int64), mask=exists)
        _gather(
            drawn, row, exists, table_ptr, embedded_ptr, stride_table_row, first_entry, embedding_size, BLOCK_EMBEDDING
        )


@triton.jit(do_not_specialize=["codebook", "first_entry"], do_not_specialize_on_alignment=ANY_ALIGNMENT)
def draw_embed_kernel(
    logits_ptr,
    seed_ptr,
    frame_ptr,
    temperature_ptr,
    top_k_ptr,
    table_ptr,
    tokens_ptr,
    embedded_ptr,
    stride_table_row,
    outputs,
    codebook,
    first_entry,
    embedding_size,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EMBEDDING: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One program draws one row's token and copies its embedding."""
    row = tl.program_id(0) + tl.arange(0, 1)
    token = tl.arange(0, BLOCK_TOKENS)[None, :]
    inside = token < outputs
    if PROGRAMMATIC:
        gdc_launch_dependents()
        gdc_wait()
    logits = tl.load(logits_ptr + row[:, None] * outputs + token, mask=inside, other=float("-inf"))
    noise = gumbel(tl.load(seed_ptr + row)[:, None], tl.load(frame_ptr + row)[:, None], codebook, token)
    drawn = draw_rows(logits, noise, token, inside, tl.load(temperature_ptr + row), tl.load(top_k_ptr + row))
    tl.store(tokens_ptr + row, drawn.to(tl.int64))
    _gather(
        drawn, row, row >= 0, table_ptr, embedded_ptr, stride_table_row, first_entry, embedding_size, BLOCK_EMBEDDING
    )


@triton.jit
def _gather(
    drawn,
    row,
    exists,
    table_ptr,
    embedded_ptr,
    stride_table_row,
    first_entry,
    embedding_size,
    BLOCK_EMBEDDING: tl.constexpr,
):
    """Copy the embeddings of the tokens `drawn` for rows `row` that `exists`."""
    column = tl.arange(0, BLOCK_EMBEDDING)[None, :]
    inside = exists[:, None] & (column < embedding_size)
    entry = (first_entry + tl.maximum(drawn, 0)).to(tl.int64)[:, None] * stride_table_row
    embedding = tl.load(table_ptr + entry + column, mask=inside)
    tl.store(embedded_ptr + row[:, None] * embedding_size + column, embedding, mask=inside)


# --- plan and entry ---------------------------------------------------------------------------------------------------


def plan_draw_embed(
    logits: torch.Tensor,
    *,
    seed: torch.Tensor,
    frame: torch.Tensor,
    codebook: int,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    table: torch.Tensor,
    vocabulary: int,
    capability: int,
) -> Launch:
    """The draw from logits float32 [rows, tokens] and the gather behind it, for any number of rows."""
    require_rows(logits=logits, table=table)
    rows, tokens = logits.shape
    arguments, outputs = _draw_arguments(rows, seed, frame, codebook, temperature, top_k, table, vocabulary)
    programmatic = capability >= PROGRAMMATIC_LAUNCH_CAPABILITY
    block_tokens = next_power_of_2(tokens)
    return Launch(
        draw_embed_kernel,
        grid=(rows,),
        arguments={"logits_ptr": logits.contiguous(), "outputs": tokens, **arguments},
        constants={
            "BLOCK_TOKENS": block_tokens,
            "BLOCK_EMBEDDING": next_power_of_2(table.shape[1]),
            "PROGRAMMATIC": programmatic,
        },
        num_warps=warps_for_tokens(block_tokens),
        programmatic=programmatic,
        outputs=outputs,
    )


def plan_next_code(
    x: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    heads: torch.Tensor,
    head: int,
    *,
    drawable: int,
    seed: torch.Tensor,
    frame: torch.Tensor,
    codebook: int,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    table: torch.Tensor,
    vocabulary: int,
    scratch: NextCodeScratch,
    capability: int,
) -> tuple[Launch, ...]:
    """The one or two launches behind `next_code`, for up to 64 rows; the last one's outputs are the results."""
    require_rows(x=x, gain=gain, heads=heads, table=table)
    rows = x.shape[0]
    if rows <= FUSED_ROWS:
        weight = heads[head, :drawable]
        arguments, outputs = _draw_arguments(rows, seed, frame, codebook, temperature, top_k, table, vocabulary)
        arguments |= {"gain_ptr": gain, "eps": eps, "finished_ptr": scratch.finished}
        launch = plan_product(next_code_kernel, arguments, x, weight, scratch.row_tokens, capability=capability)
        constants = {
            **launch.constants,
            "BLOCK_ROWS": next_power_of_2(rows),
            "BLOCK_TOKENS": next_power_of_2(drawable),
            "BLOCK_EMBEDDING": next_power_of_2(table.shape[1]),
        }
        return (replace(launch, constants=constants, outputs=outputs),)
    product = plan_codebook_head(x, gain, eps, heads[:, :drawable], head, capability=capability)
    return product, plan_draw_embed(
        product.outputs[0],
        seed=seed,
        frame=frame,
        codebook=codebook,
        temperature=temperature,
        top_k=top_k,
        table=table,
        vocabulary=vocabulary,
        capability=capability,
    )


def _draw_arguments(
    rows: int,
    seed: torch.Tensor,
    frame: torch.Tensor,
    codebook: int,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    table: torch.Tensor,
    vocabulary: int,
) -> tuple[dict[str, Any], tuple[torch.Tensor, torch.Tensor]]:
    """What both kernels take for the draw and the gather, and where they leave tokens and embeddings."""
    tokens = torch.empty(rows, dtype=torch.int64, device=table.device)
    embedded = torch.empty(rows, table.shape[1], dtype=table.dtype, device=table.device)
    arguments = {
        "seed_ptr": seed.contiguous(),
        "frame_ptr": frame.contiguous(),
        "temperature_ptr": temperature.contiguous(),
        "top_k_ptr": top_k.contiguous(),
        "table_ptr": table,
        "tokens_ptr": tokens,
        "embedded_ptr": embedded,
        "stride_table_row": table.stride(0),
        "codebook": as_int32(codebook),
        "first_entry": codebook * vocabulary,
        "embedding_size": table.shape[1],
    }
    return arguments, (tokens, embedded)


def next_code(
    x: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    heads: torch.Tensor,
    head: int,
    *,
    drawable: int,
    seed: torch.Tensor,
    frame: torch.Tensor,
    codebook: int,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    table: torch.Tensor,
    vocabulary: int,
    scratch: NextCodeScratch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw each row's token of one codebook and embed it -> tokens int64 [rows], embedded [rows, table_hidden_size].

    Args:
        x: `[rows, hidden_size]`, before the final norm with `gain` [hidden_size] and `eps`.
        heads: `[heads, at least drawable, hidden_size]`, of which `head` is the one.
        drawable: tokens from here on are never drawn.
        seed, frame, codebook, temperature, top_k: as in `draw`.
        table: `[at least (codebook + 1) * vocabulary, table_hidden_size]`; row c * vocabulary + t is codebook c's
            token t.
        scratch: of `allocate_scratch`, on a GPU. Calls with the same scratch must follow each other on one stream.
            Without it, each call makes its own, which takes one launch more.

    Raises:
        ValueError: a shape, dtype, device or layout is not as above.
    """
    sizes: dict[str, int] = {}
    check("x", x, "rows hidden_size", sizes)
    check("gain", gain, "hidden_size", sizes, dtype=x.dtype, device=x.device)
    check("heads", heads, "heads head_vocabulary hidden_size", sizes, dtype=x.dtype, device=x.device)
    check("seed", seed, "rows", sizes, dtype=torch.int64, device=x.device)
    check("frame", frame, "rows", sizes, dtype=torch.int64, device=x.device)
    check("temperature", temperature, "rows", sizes, dtype=torch.float32, device=x.device)
    check("top_k", top_k, "rows", sizes, dtype=torch.int32, device=x.device)
    check("table", table, "entries table_hidden_size", sizes, device=x.device)
    if not 0 <= head < sizes["heads"] or not 0 < drawable <= sizes["head_vocabulary"] or drawable > vocabulary:
        raise ValueError(f"there is no head {head} with {drawable} of {vocabulary} tokens to draw in {sizes}")
    if not 0 <= codebook <= WORD or (codebook + 1) * vocabulary > sizes["entries"]:
        raise ValueError(f"the table of {sizes['entries']} entries has no codebook {codebook} of {vocabulary} tokens")
    draw_of: dict[str, Any] = {
        "seed": seed,
        "frame": frame,
        "codebook": codebook,
        "temperature": temperature,
        "top_k": top_k,
        "table": table,
        "vocabulary": vocabulary,
    }
    if not x.is_cuda:
        return next_code_reference(x, gain, eps, heads, head, drawable=drawable, **draw_of)
    device_capability = capability(x.device)
    launches: tuple[Launch, ...]
    if sizes["rows"] > MAX_ROWS:
        logits = codebook_head_by_library(x, gain, eps, heads[:, :drawable], head)
        launches = (plan_draw_embed(logits, **draw_of, capability=device_capability),)
    else:
        scratch = scratch or allocate_scratch(drawable, x.device)
        launches = plan_next_code(
            x, gain, eps, heads, head, drawable=drawable, **draw_of, scratch=scratch, capability=device_capability
        )
    for launch in launches:
        launch.run()
    tokens, embedded = launches[-1].outputs
    return tokens, embedded
