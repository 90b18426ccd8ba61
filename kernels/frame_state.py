"""Where a frame begins and ends: what it takes from its streams' slots, and what it leaves there.

    begin_frame   each row's numbers and next input, gathered from its slot; the depth decoder's places
    end_frame     the sum of the frame's embeddings as the slot's next input; position and frame number one on

The last slot is the scratch slot, of rows that have no stream: it stands still, and several rows may have it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aloud.kernels.check import check
from aloud.kernels.embedding import FRAME_COLUMNS, embed_frame_reference, sum_embeddings
from aloud.kernels.launch import (
    PROGRAMMATIC_LAUNCH_CAPABILITY,
    Launch,
    capability,
    ceil_div,
    next_power_of_2,
    require_rows,
)
from aloud.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton


@dataclass(frozen=True)
class FrameRows:
    """What a frame's steps are given, by row."""

    x: torch.Tensor  # [rows, hidden_size]
    position: torch.Tensor  # int64 [rows]
    frame: torch.Tensor  # int64 [rows]
    seed: torch.Tensor  # int64 [rows]
    temperature: torch.Tensor  # float32 [2, rows]
    top_k: torch.Tensor  # int32 [2, rows]
    slots_twice: torch.Tensor  # int64 [2 * rows]: of the depth decoder's first step, which has two rows a stream
    places: torch.Tensor  # int64 [codebooks * rows]: the depth decoder's positions, 0 for each row, 1 for each row, ...


def begin_frame_reference(
    next_input: torch.Tensor,
    position: torch.Tensor,
    frame: torch.Tensor,
    seed: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    slots: torch.Tensor,
    codebooks: int,
) -> FrameRows:
    """The definition of `begin_frame`."""
    return FrameRows(
        x=next_input[slots],
        position=position[slots],
        frame=frame[slots],
        seed=seed[slots],
        temperature=temperature[:, slots],
        top_k=top_k[:, slots],
        slots_twice=slots.repeat(2),
        places=torch.arange(codebooks, device=slots.device).repeat_interleave(len(slots)),
    )


def end_frame_reference(
    codes: torch.Tensor,
    table: torch.Tensor,
    vocabulary: int,
    next_input: torch.Tensor,
    position: torch.Tensor,
    frame: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """The definition of `end_frame`."""
    live = slots < len(position) - 1
    next_input[slots] = torch.where(live[:, None], embed_frame_reference(codes, table, vocabulary), next_input[slots])
    step = live.long()
    position[slots] = position[slots] + step
    frame[slots] = frame[slots] + step


# --- launch table -----------------------------------------------------------------------------------------------------
# Neither fills a chip; what counts is that every load of a program is under way at once. A row's first program moves
# its numbers, and each copies or sums some of its columns: 1,024 of the next input, which is read, and as many as
# embedding.py says of the one that is made.

COPIED_COLUMNS = 1024


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["stride_temperature_decoder", "stride_top_k_decoder", "rows"])
def begin_frame_kernel(
    slots_ptr,
    next_input_ptr,
    position_ptr,
    frame_ptr,
    seed_ptr,
    temperature_ptr,
    top_k_ptr,
    x_ptr,
    row_position_ptr,
    row_frame_ptr,
    row_seed_ptr,
    row_temperature_ptr,
    row_top_k_ptr,
    slots_twice_ptr,
    places_ptr,
    stride_input_slot,
    stride_temperature_decoder,
    stride_top_k_decoder,
    rows,
    codebooks,
    hidden_size,
    CODEBOOKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One program copies COLUMNS columns of one row's input; a row's first program also copies its numbers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden_size
    if PROGRAMMATIC:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slots_ptr + row)
    x = tl.load(next_input_ptr + slot * stride_input_slot + column, mask=inside)
    tl.store(x_ptr + row * hidden_size + column, x, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(row_position_ptr + row, tl.load(position_ptr + slot))
        tl.store(row_frame_ptr + row, tl.load(frame_ptr + slot))
        tl.store(row_seed_ptr + row, tl.load(seed_ptr + slot))
        decoder = tl.arange(0, 2)
        temperature = tl.load(temperature_ptr + decoder * stride_temperature_decoder + slot)
        top_k = tl.load(top_k_ptr + decoder * stride_top_k_decoder + slot)
        tl.store(row_temperature_ptr + decoder * rows + row, temperature)
        tl.store(row_top_k_ptr + decoder * rows + row, top_k)
        tl.store(slots_twice_ptr + decoder * rows + row, slot)
        codebook = tl.arange(0, CODEBOOKS)
        tl.store(places_ptr + codebook * rows + row, codebook.to(tl.int64), mask=codebook < codebooks)


@triton.jit(do_not_specialize=["vocabulary", "stride_codes_row", "stride_codes_codebook", "streams"])
def end_frame_kernel(
    slots_ptr,
    codes_ptr,
    table_ptr,
    next_input_ptr,
    position_ptr,
    frame_ptr,
    stride_codes_row,
    stride_codes_codebook,
    stride_table_row,
    stride_input_slot,
    streams,
    codebooks,
    vocabulary,
    hidden_size,
    CODEBOOKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One program sums COLUMNS columns of one row's embeddings; a row's first program also moves its stream on."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden_size
    if PROGRAMMATIC:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slots_ptr + row)
    live = slot < streams
    total = sum_embeddings(
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
    next_input = total.to(next_input_ptr.dtype.element_ty)
    tl.store(next_input_ptr + slot * stride_input_slot + column, next_input, mask=inside & live)
    if (tl.program_id(1) == 0) & live:
        # A load is every thread's and a store one's, which might come first; this is one thread's alone.
        tl.atomic_add(position_ptr + slot, 1, sem="relaxed")
        tl.atomic_add(frame_ptr + slot, 1, sem="relaxed")


# --- plans and entries ------------------------------------------------------------------------------------------------


def plan_begin_frame(
    next_input: torch.Tensor,
    position: torch.Tensor,
    frame: torch.Tensor,
    seed: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    slots: torch.Tensor,
    codebooks: int,
    *,
    capability: int,
) -> Launch:
    """The launch behind `begin_frame`; its outputs are the fields of `FrameRows`."""
    require_rows(next_input=next_input, position=position, frame=frame, seed=seed, temperature=temperature, top_k=top_k)
    rows, hidden_size = len(slots), next_input.shape[1]

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=slots.device)

    taken = {
        "x_ptr": empty(rows, hidden_size, dtype=next_input.dtype),
        "row_position_ptr": empty(rows),
        "row_frame_ptr": empty(rows),
        "row_seed_ptr": empty(rows),
        "row_temperature_ptr": empty(2, rows, dtype=torch.float32),
        "row_top_k_ptr": empty(2, rows, dtype=torch.int32),
        "slots_twice_ptr": empty(2 * rows),
        "places_ptr": empty(codebooks * rows),
    }
    programmatic = capability >= PROGRAMMATIC_LAUNCH_CAPABILITY
    return Launch(
        begin_frame_kernel,
        grid=(rows, ceil_div(hidden_size, COPIED_COLUMNS)),
        arguments={
            "slots_ptr": slots.contiguous(),
            "next_input_ptr": next_input,
            "position_ptr": position,
            "frame_ptr": frame,
            "seed_ptr": seed,
            "temperature_ptr": temperature,
            "top_k_ptr": top_k,
            **taken,
            "stride_input_slot": next_input.stride(0),
            "stride_temperature_decoder": temperature.stride(0),
            "stride_top_k_decoder": top_k.stride(0),
            "rows": rows,
            "codebooks": codebooks,
            "hidden_size": hidden_size,
        },
        constants={"CODEBOOKS": next_power_of_2(codebooks), "COLUMNS": COPIED_COLUMNS, "PROGRAMMATIC": programmatic},
        programmatic=programmatic,
        outputs=tuple(taken.values()),
    )


def plan_end_frame(
    codes: torch.Tensor,
    table: torch.Tensor,
    vocabulary: int,
    next_input: torch.Tensor,
    position: torch.Tensor,
    frame: torch.Tensor,
    slots: torch.Tensor,
    *,
    capability: int,
) -> Launch:
    """The launch behind `end_frame`, which writes into the state."""
    require_rows(table=table, next_input=next_input, position=position, frame=frame)
    rows, codebooks = codes.shape
    hidden_size = table.shape[1]
    programmatic = capability >= PROGRAMMATIC_LAUNCH_CAPABILITY
    return Launch(
        end_frame_kernel,
        grid=(rows, ceil_div(hidden_size, FRAME_COLUMNS)),
        arguments={
            "slots_ptr": slots.contiguous(),
            "codes_ptr": codes,
            "table_ptr": table,
            "next_input_ptr": next_input,
            "position_ptr": position,
            "frame_ptr": frame,
            "stride_codes_row": codes.stride(0),
            "stride_codes_codebook": codes.stride(1),
            "stride_table_row": table.stride(0),
            "stride_input_slot": next_input.stride(0),
            "streams": len(position) - 1,
            "codebooks": codebooks,
            "vocabulary": vocabulary,
            "hidden_size": hidden_size,
        },
        constants={"CODEBOOKS": next_power_of_2(codebooks), "COLUMNS": FRAME_COLUMNS, "PROGRAMMATIC": programmatic},
        num_warps=1,
        programmatic=programmatic,
    )


def begin_frame(
    next_input: torch.Tensor,
    position: torch.Tensor,
    frame: torch.Tensor,
    seed: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    slots: torch.Tensor,
    codebooks: int,
) -> FrameRows:
    """What the steps of a frame are given, for the streams in slots int64 [rows].

    By slot: next_input [slots, hidden_size], what is read next; position, frame, seed int64 [slots], contiguous;
    temperature float32 [2, slots] and top_k int32 [2, slots], of the backbone and the depth decoder
    """
    sizes: dict[str, int] = {}
    device = next_input.device
    check("next_input", next_input, "slots hidden_size", sizes)
    for name, numbers in (("position", position), ("frame", frame), ("seed", seed)):
        check(name, numbers, "slots", sizes, dtype=torch.int64, device=device)
    check("temperature", temperature, "2 slots", sizes, dtype=torch.float32, device=device)
    check("top_k", top_k, "2 slots", sizes, dtype=torch.int32, device=device)
    check("slots", slots, "rows", sizes, dtype=torch.int64, device=device)
    given = (next_input, position, frame, seed, temperature, top_k, slots, codebooks)
    if not next_input.is_cuda:
        return begin_frame_reference(*given)
    launch = plan_begin_frame(*given, capability=capability(device))
    launch.run()
    return FrameRows(*launch.outputs)


def end_frame(
    codes: torch.Tensor,
    table: torch.Tensor,
    vocabulary: int,
    next_input: torch.Tensor,
    position: torch.Tensor,
    frame: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Make the sum of a frame's embeddings its stream's next input, and move the stream one position and frame on.

    codes int64 [rows, codebooks], table [codebooks * vocabulary, hidden_size] as in `embed_prompt`; written into:
    next_input [slots, hidden_size], position and frame int64 [slots], contiguous; slots int64 [rows]
    """
    sizes: dict[str, int] = {}
    device = codes.device
    check("codes", codes, "rows codebooks", sizes, dtype=torch.int64)
    check("table", table, f"{sizes['codebooks'] * vocabulary} hidden_size", sizes, device=device)
    check("next_input", next_input, "slots hidden_size", sizes, dtype=table.dtype, device=device)
    check("position", position, "slots", sizes, dtype=torch.int64, device=device)
    check("frame", frame, "slots", sizes, dtype=torch.int64, device=device)
    check("slots", slots, "rows", sizes, dtype=torch.int64, device=device)
    given = (codes, table, vocabulary, next_input, position, frame, slots)
    if not codes.is_cuda:
        end_frame_reference(*given)
        return
    plan_end_frame(*given, capability=capability(device)).run()
