"""What keeps a kernel's threads in order is needed, and the machine in tests/ptx_machine sees where it is missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from aloud.benchmarks.aot import specialize
from aloud.kernels.launch import Launch
from aloud.kernels.linear import norm_swiglu_reference, plan_linear_residual, plan_norm_swiglu
from aloud.kernels.next_code import allocate_scratch, plan_next_code
from ptx_machine import launches
from ptx_machine.order import Fault
from ptx_machine.program import Program

pytestmark = pytest.mark.machine


def head_and_draw(random: Callable[..., torch.Tensor], version: int) -> Launch:
    """The launch whose last program draws from what all of them made."""
    number = torch.zeros(1, dtype=torch.int64)
    bfloat16: dict[str, Any] = {"dtype": torch.bfloat16}
    (launch,) = plan_next_code(
        random(1, 256, **bfloat16),
        random(256, **bfloat16),
        1e-5,
        random(1, 300, 256, **bfloat16),
        0,
        drawable=290,
        seed=number,
        frame=number,
        codebook=0,
        temperature=torch.ones(1),
        top_k=torch.full((1,), 50, dtype=torch.int32),
        table=random(300, 64, **bfloat16),
        vocabulary=300,
        scratch=allocate_scratch(290, torch.device("cpu")),
        capability=version,
    )
    return launch


def gate_up(random: Callable[..., torch.Tensor], version: int) -> Launch:
    """A product that streams its weight through shared memory."""
    return plan_norm_swiglu(*of_gate_up(random, rows=16, outputs=1024), capability=version)


def wide_gate_up(random: Callable[..., torch.Tensor], version: int) -> Launch:
    """One as large as four warps multiply together on Hopper."""
    if version // 10 == 10:
        pytest.skip("the machine does not know tcgen05")
    return plan_norm_swiglu(*of_gate_up(random, rows=64, outputs=16_384), capability=version)


def part_of_down(random: Callable[..., torch.Tensor], version: int) -> Launch:
    """A product in parts, of which Hopper has one block of k under way while the next one's is begun."""
    if version // 10 == 10:
        pytest.skip("the machine does not know tcgen05")
    x, weight, residual = (random(*shape, dtype=torch.bfloat16) for shape in ((64, 5000), (64, 5000), (64, 64)))
    part, _ = plan_linear_residual(x, weight * 5000**-0.5, residual, capability=version)
    return part


def of_gate_up(random: Callable[..., torch.Tensor], rows: int, outputs: int) -> tuple[Any, ...]:
    """What norm_swiglu takes: as much of k as all of the stages do not hold at once."""
    x, gain, weight = (random(*shape, dtype=torch.bfloat16) for shape in ((rows, 640), (640,), (outputs, 640)))
    return x, gain, 1e-5, weight * 640**-0.5


def without(program: Program, places: list[int]) -> Program:
    """The program without what instructions are there for."""
    instructions = list(program.instructions)
    for place in places:
        relaxed = instructions[place].opcode.replace("acq_rel", "relaxed")
        changed = relaxed != instructions[place].opcode
        nothing = {"opcode": "griddepcontrol.launch_dependents", "operands": (), "guard": None}
        instructions[place] = replace(instructions[place], **({"opcode": relaxed} if changed else nothing))
    return replace(program, instructions=tuple(instructions))


def test_products_of_warp_groups(random, version, assert_as_close) -> None:
    launch = wide_gate_up(random, version)
    launch.run()
    x, gain, weight = (launch.arguments[f"{name}_ptr"] for name in ("x", "gain", "weight"))
    same, wide = (norm_swiglu_reference(x.to(t), gain.to(t), 1e-5, weight.to(t)) for t in (x.dtype, torch.float32))
    assert_as_close(launch.outputs[0], same, wide)
    program, _ = launches.compiled(specialize(launch), version)
    assert any(item.opcode.startswith("wgmma.mma_async.") for item in program.instructions) == (version // 10 == 9)


@pytest.mark.parametrize("plan", [head_and_draw, gate_up, wide_gate_up, part_of_down])
def test_what_is_left_out_is_missed(plan, random, version, monkeypatch, seed) -> None:
    """Barriers between the first copies, which write to fresh memory, are Triton's habit and needed by nobody.

    In the widest product, others that nobody misses stand in for each other.
    """
    program, shared_bytes = launches.compiled(specialize(plan(random, version)), version)
    needed = re.compile(r"bar\.|cp\.async\.wait_group|wgmma\.(wait|commit)_group|griddepcontrol\.wait|atom\..*acq_rel")
    places = [place for place, item in enumerate(program.instructions) if needed.match(item.opcode)]
    first_wait = next((p for p in places if program.instructions[p].opcode == "cp.async.wait_group"), 0)

    def is_missed(left_out: list[int]) -> bool:
        monkeypatch.setattr(launches, "compiled", lambda *_: (without(program, left_out), shared_bytes))
        try:
            launches.run(plan(random, version), version, np.random.default_rng(seed))
        except Fault:
            return True
        return False

    unseen = [place for place in places if not is_missed([place])]
    assert len(places) > 3
    assert all(program.instructions[place].opcode == "bar.sync" for place in unseen)
    later = [place for place in unseen if place > first_wait]
    assert not later or plan is wide_gate_up
    assert all(any(is_missed([place, other]) for other in later if other != place) for place in later)
