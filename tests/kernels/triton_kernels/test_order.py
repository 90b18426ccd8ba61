"""What keeps a kernel's threads in order is needed, and the machine in tests/ptx_machine sees where it is missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from triton import knobs

from aloud.benchmarks.aot import specialize
from aloud.kernels.launch import Launch
from aloud.kernels.linear import plan_norm_swiglu
from aloud.kernels.next_code import allocate_scratch, plan_next_code
from ptx_machine import launches
from ptx_machine.order import Fault
from ptx_machine.program import Program

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or knobs.runtime.interpret, reason="of the machine: TRITON_INTERPRET=0"
)


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
    x, gain, weight = (random(*shape, dtype=torch.bfloat16) for shape in ((16, 512), (512,), (1024, 512)))
    return plan_norm_swiglu(x, gain, 1e-5, weight, capability=version)


def without(program: Program, place: int) -> Program:
    """The program without what one instruction is there for."""
    instructions = list(program.instructions)
    relaxed = instructions[place].opcode.replace("acq_rel", "relaxed")
    changed = relaxed != instructions[place].opcode
    nothing = {"opcode": "griddepcontrol.launch_dependents", "operands": (), "guard": None}
    instructions[place] = replace(instructions[place], **({"opcode": relaxed} if changed else nothing))
    return replace(program, instructions=tuple(instructions))


@pytest.mark.parametrize("plan", [head_and_draw, gate_up])
def test_what_is_left_out_is_missed(plan, random, version, monkeypatch, seed) -> None:
    """Barriers between the first copies, which write to fresh memory, are Triton's habit and needed by nobody."""
    program, shared_bytes = launches.compiled(specialize(plan(random, version)), version)
    needed = re.compile(r"bar\.|cp\.async\.wait_group|griddepcontrol\.wait|atom\..*acq_rel")
    places = [place for place, item in enumerate(program.instructions) if needed.match(item.opcode)]
    first_wait = next((p for p in places if program.instructions[p].opcode == "cp.async.wait_group"), 0)
    unseen = []
    for place in places:
        changed = without(program, place)
        monkeypatch.setattr(launches, "compiled", lambda *_, changed=changed: (changed, shared_bytes))
        try:
            launches.run(plan(random, version), version, np.random.default_rng(seed))
        except Fault:
            continue
        unseen.append(place)
    assert len(places) > 5
    assert all(place < first_wait and program.instructions[place].opcode == "bar.sync" for place in unseen)
