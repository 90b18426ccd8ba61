"""Embeddings of text tokens and codebook tokens.

    embed_prompt   a text token's embedding, or the sum of a frame's embeddings, one a codebook: the backbone's input
    embed_code     one codebook's embedding: the depth decoder's input

Text tokens have a table of their own; codebook tokens have one in which codebook c's token t is row c * vocabulary + t.
Codebook tokens below 0 mark rows from which nothing could be drawn; they embed as token 0.
"""

from __future__ import annotations

import torch

from aloud.kernels.check import check
from aloud.kernels.launch import PROGRAMMATIC_LAUNCH_CAPABILITY, Launch, capability, ceil_div, next_power_of_2
from aloud.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton


def embed_frame_reference(codes: torch.Tensor, table: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The sum of the embeddings of codes [rows, codebooks] -> [rows, hidden_size]."""
    offsets = torch.arange(codes.shape[1], device=codes.device) * vocabulary
    return table[codes.clamp(min=0) + offsets].float().sum(dim=1).to(table.dtype)


def embed_prompt_reference(
    text_tokens: torch.Tensor, codes: torch.Tensor, text_table: torch.Tensor, table: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """The definition of `embed_prompt`."""
    text = text_table[text_tokens.clamp(min=0)]
    return torch.where((text_tokens >= 0)[:, None], text, embed_frame_reference(codes, table, vocabulary))


def embed_code_reference(codes: torch.Tensor, table: torch.Tensor, vocabulary: int, codebook: int) -> torch.Tensor:
    """The definition of `embed_code`."""
    return table[codes.clamp(min=0) + codebook * vocabulary]


# --- launch table -----------------------------------------------------------------------------------------------------
# In a frame, nothing here fills a chip; what counts is that every load of a program is under way at once. A frame's 32
# embeddings are read 64 columns a program (one warp, 16 bytes a thread and row: 32 programs for the 2,048 columns of
# csm-1b), a single embedding 1,024 columns a program.

FRAME_COLUMNS = 64
CODE_COLUMNS = 1024


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def sum_embeddings(
    codes_ptr,
    table_ptr,
    stride_codes_codebook,
    stride_table_row,
    codebooks,
    vocabulary,
    column,
    column_inside,
    CODEBOOKS: tl.constexpr,
):
    """Sum the embeddings of one frame, whose codes begin at `codes_ptr` -> float32 [columns].

    codebooks: how many are there, at most CODEBOOKS; 0 gives 0
    """
    codebook = tl.arange(0, CODEBOOKS)
    code = tl.maximum(tl.load(codes_ptr + codebook * stride_codes_codebook, mask=codebook < codebooks, other=0), 0)
    entry = (code + codebook * vocabulary)[:, None] * stride_table_row  # int64, as the codes are
    inside = (codebook < codebooks)[:, None] & column_inside[None, :]
    embeddings = tl.load(table_ptr + entry + column[None, :], mask=inside, other=0.0)
    return tl.sum(embeddings.to(tl.float32), axis=0)


@triton.jit(do_not_specialize=["vocabulary", "stride_codes_row", "stride_codes_codebook"])
def embed_prompt_kernel(
    text_tokens_ptr,
    codes_ptr,
    text_table_ptr,
    table_ptr,
    out_ptr,
    stride_codes_row,
    stride_codes_codebook,
    stride_text_table_row,
    stride_table_row,
    codebooks,
    vocabulary,
    hidden_size,
    CODEBOOKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One program makes COLUMNS columns of one row, from its text token or from its codes."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden_size
    if PROGRAMMATIC:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.load(text_tokens_ptr + row)
    text = tl.load(text_table_ptr + token * stride_text_table_row + column, mask=inside & (token >= 0), other=0.0)
    codebooks = tl.where(token >= 0, 0, codebooks)
    audio = sum_embeddings(
        codes_ptr + row * stride_codes_row,
        table_ptr,
        stride_codes_codebook,
        stride_table_row,
        codebooks,
        vocabulary,
        column,
        inside,
        CODEBOOKS,
    )
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + row * hidden_size + column, tl.where(token >= 0, text, audio.to(dtype)), mask=inside)


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


def plan_embed_prompt(
    text_tokens: torch.Tensor,
    codes: torch.Tensor,
    text_table: torch.Tensor,
    table: torch.Tensor,
    vocabulary: int,
    *,
    capability: int,
) -> Launch:
    """The launch behind `embed_prompt`."""
    rows, codebooks = codes.shape
    hidden_size = table.shape[1]
    text_table, table = text_table.contiguous(), table.contiguous()
    out = torch.empty(rows, hidden_size, dtype=table.dtype, device=codes.device)
    programmatic = capability >= PROGRAMMATIC_LAUNCH_CAPABILITY
    return Launch(
        embed_prompt_kernel,
        grid=(rows, ceil_div(hidden_size, FRAME_COLUMNS)),
        arguments={
            "text_tokens_ptr": text_tokens.contiguous(),
            "codes_ptr": codes,
            "text_table_ptr": text_table,
            "table_ptr": table,
            "out_ptr": out,
            "stride_codes_row": codes.stride(0),
            "stride_codes_codebook": codes.stride(1),
            "stride_text_table_row": text_table.stride(0),
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


def embed_prompt(
    text_tokens: torch.Tensor, codes: torch.Tensor, text_table: torch.Tensor, table: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """Embed each row's text token, or its frame of codebook tokens where text_tokens is -1 -> [rows, hidden_size].

    text_tokens int64 [rows], codes int64 [rows, codebooks], text_table [text_vocabulary, hidden_size], table
    [codebooks * vocabulary, hidden_size]
    """
    sizes: dict[str, int] = {}
    check("text_tokens", text_tokens, "rows", sizes, dtype=torch.int64)
    check("codes", codes, "rows codebooks", sizes, dtype=torch.int64, device=text_tokens.device)
    check("table", table, f"{sizes['codebooks'] * vocabulary} hidden_size", sizes, device=codes.device)
    check("text_table", text_table, "text_vocabulary hidden_size", sizes, dtype=table.dtype, device=codes.device)
    if not codes.is_cuda:
        return embed_prompt_reference(text_tokens, codes, text_table, table, vocabulary)
    version = capability(codes.device)
    launch = plan_embed_prompt(text_tokens, codes, text_table, table, vocabulary, capability=version)
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
