"""Where a frame begins and ends: the kernels against their references."""

from __future__ import annotations

import pytest
import torch

from aloud.kernels.embedding import embed_frame_reference
from aloud.kernels.frame_state import (
    FrameRows,
    begin_frame,
    begin_frame_reference,
    end_frame,
    end_frame_reference,
    plan_begin_frame,
    plan_end_frame,
)

ROWS = pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 17, 65])


@pytest.fixture
def state(random, generator):
    """A function: the numbers of some slots; those that nobody may read are poisoned."""

    def state(slots: int, hidden_size: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        wide = torch.full((slots, hidden_size + 3), torch.nan, dtype=dtype)
        wide[:, :hidden_size] = random(slots, hidden_size, dtype=dtype)
        return {
            "next_input": wide[:, :hidden_size],
            "position": torch.randint(2048, (slots,), generator=generator),
            "frame": torch.randint(2**40, (slots,), generator=generator),
            "seed": torch.empty(slots, dtype=torch.int64).random_(-(2**63), None, generator=generator),
            "temperature": torch.rand(2, slots + 5, generator=generator)[:, 2 : slots + 2],
            "top_k": torch.randint(2048, (2, slots), generator=generator, dtype=torch.int32),
        }

    return state


def moved(values: dict[str, torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """A copy of each on a device, with its strides."""
    return [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=device).copy_(v) for v in values.values()]


@ROWS
@pytest.mark.parametrize(("codebooks", "hidden_size"), [(1, 1), (5, 72), (32, 1025)])
def test_begin(rows, codebooks, hidden_size, dtype, state, generator, device, version):
    """Each number of each row is its slot's, in slots out of order, some of them the same."""
    values = state(rows + 4, hidden_size, dtype)
    slots = torch.randint(rows + 4, (rows,), generator=generator)
    expected = begin_frame_reference(*values.values(), slots, codebooks)
    given = moved(values, device)
    launch = plan_begin_frame(*given, slots.to(device), codebooks, capability=version)
    launch.run()
    ours = FrameRows(*launch.outputs)
    for name, value in vars(expected).items():
        assert torch.equal(getattr(ours, name).cpu(), value), name
        assert getattr(ours, name).dtype == value.dtype
    for before, after in zip(values.values(), given, strict=True):
        assert torch.equal(before, after.cpu())


@ROWS
@pytest.mark.parametrize(("codebooks", "hidden_size"), [(1, 1), (5, 72), (32, 130)])
def test_end(rows, codebooks, hidden_size, dtype, state, random, generator, device, version, assert_as_close):
    """Rows' slots have their next input and stand one further, the scratch slot stands still, others are untouched."""
    values = state(rows + 4, hidden_size, dtype)
    values = {name: values[name] for name in ("next_input", "position", "frame")}
    scratch = rows + 3
    slots = torch.randperm(rows + 3, generator=generator)[:rows]
    slots[rows // 2 + 1 :] = scratch
    codes = torch.randint(-1, 11, (codebooks, rows), generator=generator).T
    table = random(codebooks * 11, hidden_size, dtype=dtype)
    given = moved(values, device)
    plan_end_frame(codes.to(device), table.to(device), 11, *given, slots.to(device), capability=version).run()
    next_input, position, frame = (tensor.cpu() for tensor in given)
    live = slots < scratch
    wide = embed_frame_reference(codes, table.float(), 11)
    assert_as_close(next_input[slots[live]], embed_frame_reference(codes, table, 11)[live], wide[live])
    step = torch.zeros(rows + 4, dtype=torch.int64)
    step[slots[live]] = 1
    assert torch.equal(position - values["position"], step)
    assert torch.equal(frame - values["frame"], step)
    others = step.bool().logical_not()
    assert torch.equal(next_input[others], values["next_input"][others])

    expected = moved(values, torch.device("cpu"))
    end_frame_reference(codes, table, 11, *expected, slots)
    assert_as_close(next_input[slots[live]], expected[0][slots[live]], wide[live])
    assert torch.equal(expected[0][others], values["next_input"][others])
    assert torch.equal(position, expected[1])
    assert torch.equal(frame, expected[2])


def test_what_does_not_fit_is_named(state):
    values = state(4, 8, torch.float32)
    slots, codes, table = torch.arange(3), torch.zeros(3, 5, dtype=torch.int64), torch.zeros(50, 8)
    begin_frame(**values, slots=slots, codebooks=5)
    for name, value in values.items():
        fewer = value[:-1] if name == "next_input" else value[..., :-1]
        with pytest.raises(ValueError, match=rf"^({name}|position) must be"):
            begin_frame(**values | {name: fewer}, slots=slots, codebooks=5)
    written = {name: values[name] for name in ("next_input", "position", "frame")}
    end_frame(codes, table, 10, **written, slots=slots)
    given = {"codes": codes, "table": table, **written, "slots": slots}
    for name, value in given.items():
        with pytest.raises(ValueError, match=" must be "):
            end_frame(**given | {name: value[..., :-1], "vocabulary": 10})
