"""Embeddings of codebook tokens from one table in which codebook c's token t is row c * vocabulary + t.

    embed_frame   the sum of a frame's embeddings, one a codebook: the backbone's input
    embed_code    one codebook's embedding: the depth decoder's input

Tokens below 0 mark rows from which nothing could be drawn; they embed as token 0.
"""

from __future__ import annotations

import torch

from aloud.kernels.check import check
from aloud.kernels.launch import PROGRAMMATIC_LAUNCH_CAPABILITY, Launch, capability, ceil_div, next_power_of_2
from aloud.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton


def embed_frame_reference(codes: torch.Tensor, table: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The definition of `embed_frame`."""
    offsets = torch.arange(codes.shape[1], device=codes.device) * vocabulary
    return table[codes.clamp(min=0) + offsets].float().sum(dim=1).to(table.dtype)


def embed_code_reference(codes: torch.Tensor, table: torch.Tensor, vocabulary: int, codebook: int) -> torch.Tensor:
    """The definition of `embed_code`."""
    return table[codes.clamp(min=0) + codebook * vocabulary]


# --- launch table -----------------------------------------------------------------------------------------------------
# Nothing here fills a chip; what counts is that every load of a program is under way at once. A frame's 32 embeddings
# are read 64 columns a program (one warp, 16 bytes a thread and row: 32 programs for csm-1b's 2,048 columns), a single
# embedding 1,024 columns a program.

FRAME_COLUMNS = 64
CODE_COLUMNS = 1024


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["vocabulary", "stride_codes_row", "stride_codes_codebook"])
def embed_frame_kernel(
    codes_ptr,
    table_ptr,
    out_ptr,
    stride_codes_row,
    stride_codes_codebook,
    stride_table_row,
    codebooks,
    vocabulary,
    hidden_size,
    CODEBOOKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One program sums COLUMNS columns of one row's embeddings; CODEBOOKS is the next power of two of `codebooks`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    codebook = tl.arange(0, CODEBOOKS)
    if PROGRAMMATIC:
        gdc_launch_dependents()
        gdc_wait()
    codes = codes_ptr + row * stride_codes_row + codebook * stride_codes_codebook
    code = tl.maximum(tl.load(codes, mask=codebook < codebooks, other=0), 0)
    entry = (code + codebook * vocabulary)[:, None] * stride_table_row  # int64, as the codes are
    inside = (codebook < codebooks)[:, None] & (column < hidden_size)[None, :]
    embeddings = tl.load(table_ptr + entry + column[None, :], mask=inside, other=0.0)
    total = tl.sum(embeddings.to(tl.float32), axis=0)
    out = out_ptr + row * hidden_size + column
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=column < hidden_size)


@triton.jit(do_not_specialize=["first_entry", "stride_codes_row"])
def embed_code_kernel(
    codes_ptr,
    table_ptr,
    out_ptr,
    stride_codes_row,
    stride_table_row,
    first_entry,
    hidden_size,
    COLUMNS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One program copies COLUMNS columns of one row's embedding."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if PROGRAMMATIC:
        gdc_launch_dependents()
        gdc_wait()
    code = tl.maximum(tl.load(codes_ptr + row * stride_codes_row), 0)
    entry = table_ptr + (code + first_entry) * stride_table_row  # int64, as the codes are
    embedding = tl.load(entry + column, mask=column < hidden_size)
    tl.store(out_ptr + row * hidden_size + column, embedding, mask=column < hidden_size)


def plan_embed_frame(codes: torch.Tensor, table: torch.Tensor, vocabulary: int, *, capability: int) -> Launch:
    """The launch behind `embed_frame`."""
    rows, codebooks = codes.shape
    hidden_size = table.shape[1]
    table = table.contiguous()
    out = torch.empty(rows, hidden_size, dtype=table.dtype, device=codes.device)
    programmatic = capability >= PROGRAMMATIC_LAUNCH_CAPABILITY
    return Launch(
        embed_frame_kernel,
        grid=(rows, ceil_div(hidden_size, FRAME_COLUMNS)),
        arguments={
            "codes_ptr": codes,
            "table_ptr": table,
            "out_ptr": out,
            "stride_codes_row": codes.stride(0),
            "stride_codes_codebook": codes.stride(1),
            "stride_table_row": table.stride(0),
            "codebooks": codebooks,
            "vocabulary": vocabulary,
            "hidden_size": hidden_size,
        },
        constants={"CODEBOOKS": next_power_of_2(codebooks), "COLUMNS": FRAME_COLUMNS, "PROGRAMMATIC": programmatic},
        num_warps=1,
        programmatic=programmatic,
        outputs=(out,),
    )


def plan_embed_code(
    codes: torch.Tensor, table: torch.Tensor, vocabulary: int, codebook: int, *, capability: int
) -> Launch:
    """The launch behind `embed_code`."""
    rows, hidden_size = codes.shape[0], table.shape[1]
    table = table.contiguous()
    out = torch.empty(rows, hidden_size, dtype=table.dtype, device=codes.device)
    programmatic = capability >= PROGRAMMATIC_LAUNCH_CAPABILITY
    return Launch(
        embed_code_kernel,
        grid=(rows, ceil_div(hidden_size, CODE_COLUMNS)),
        arguments={
            "codes_ptr": codes,
            "table_ptr": table,
            "out_ptr": out,
            "stride_codes_row": codes.stride(0),
            "stride_table_row": table.stride(0),
            "first_entry": codebook * vocabulary,
            "hidden_size": hidden_size,
        },
        constants={"COLUMNS": CODE_COLUMNS, "PROGRAMMATIC": programmatic},
        programmatic=programmatic,
        outputs=(out,),
    )


def embed_frame(codes: torch.Tensor, table: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """codes int64 [rows, codebooks], table [codebooks * vocabulary, hidden_size] -> [rows, hidden_size]."""
    sizes: dict[str, int] = {}
    check("codes", codes, "rows codebooks", sizes, dtype=torch.int64)
    check("table", table, f"{sizes['codebooks'] * vocabulary} hidden_size", sizes, device=codes.device)
    if not codes.is_cuda:
        return embed_frame_reference(codes, table, vocabulary)
    launch = plan_embed_frame(codes, table, vocabulary, capability=capability(codes.device))
    launch.run()
    return launch.outputs[0]


def embed_code(codes: torch.Tensor, table: torch.Tensor, vocabulary: int, codebook: int) -> torch.Tensor:
    """Embed codes int64 [rows] of one codebook -> [rows, hidden_size].

    table [at least (codebook + 1) * vocabulary, hidden_size]
    """
    sizes: dict[str, int] = {}
    check("codes", codes, "rows", sizes, dtype=torch.int64)
    check("table", table, "entries hidden_size", sizes, device=codes.device)
    if codebook < 0 or (codebook + 1) * vocabulary > sizes["entries"]:
        raise ValueError(f"the table of {sizes['entries']} entries has no codebook {codebook} of {vocabulary} tokens")
    if not codes.is_cuda:
        return embed_code_reference(codes, table, vocabulary, codebook)
    launch = plan_embed_code(codes, table, vocabulary, codebook, capability=capability(codes.device))
    launch.run()
    return launch.outputs[0]
