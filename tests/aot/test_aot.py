"""The ahead-of-time suite: what it reads in machine code, what it calls a fault, and what must hold of the kernels."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from aloud.benchmarks import aot
from aloud.benchmarks.machine_code import Instruction

ONE_ROW = [
    ["qkv.backbone", "bfloat16", 1, 90],
    ["qkv.depth", "float32", 1, 90],
    ["gate_up.backbone", "bfloat16", 1, 100],
    ["gate_up.depth", "bfloat16", 1, 120],
    ["down.depth", "float16", 1, 90],
    ["projector", "bfloat16", 1, 90],
]
STREAMED = [["gate_up.depth", "bfloat16", 16, 90], ["down.depth", "bfloat16", 64, 90]]
OTHERS = [*STREAMED, ["down.depth", "bfloat16", 1, 80], ["norm.backbone", "float16", 2, 90]]


@pytest.fixture(scope="module")
def reports(printed) -> dict:
    """Reports of a few compilations."""
    return printed("compile_some.py", json.dumps(ONE_ROW + OTHERS))


@pytest.mark.parametrize("job", ONE_ROW + OTHERS, ids=lambda job: " ".join(map(str, job)))
def test_kernels_have_no_faults(job, reports):
    report = reports[" ".join(map(str, job))]
    assert report["faults"] == []
    assert report["stack_bytes"] == 0
    assert 16 < report["registers"] <= 255


@pytest.mark.parametrize("job", ONE_ROW, ids=lambda job: " ".join(map(str, job)))
def test_one_row_has_its_weights_under_way_before_the_wait(job, reports):
    report = reports[" ".join(map(str, job))]
    assert set(report["weight_loads"]) == {"16"}
    assert report["weight_loads_after_wait"] == 0
    before, after = report["order"].split("1xACQBULK")
    assert before.startswith("1xPREEXIT")
    assert "(weight)" in before
    assert "LDG" in after
    assert "(weight)" not in after


def test_kernels_before_hopper_do_not_wait(reports):
    order = reports["down.depth bfloat16 1 80"]["order"]
    assert "ACQBULK" not in order
    assert "PREEXIT" not in order


@pytest.mark.parametrize("job", STREAMED, ids=lambda job: " ".join(map(str, job)))
def test_matrix_products_stream_through_shared_memory(job, reports):
    report = reports[" ".join(map(str, job))]
    assert "LDGSTS.128(weight)" in report["order"]
    assert report["shared_bytes"] > 16 * 1024


def test_unaligned_weights_are_found(reports):
    assert any("narrow loads of weights" in fault for fault in reports["shifted"]["faults"])


@pytest.mark.parametrize(("dtype", "capability"), [("bfloat16", 90), ("float16", 120), ("float32", 80)])
def test_everything_that_csm_1b_launches_is_compiled(printed, dtype, capability):
    """At its full size, with rows and slots on both sides of whatever its entries choose by."""
    launched, missing = printed("launch_all.py", dtype, str(capability))
    assert launched > 40
    assert missing == []


def test_what_decides_the_machine_code_is_what_triton_says(printed):
    """Its own binder, asked what it would compile for the same arguments."""
    launches, differ = printed("ask_triton.py")
    assert launches > 400
    assert differ == []


def test_rows_with_one_machine_code_are_compiled_once(reports):
    """`down.depth`: whole, and from 16 rows on in parts that a second launch adds."""
    assert reports["jobs"] == [[0, rows] for rows in (1, 2)] + [
        [place, rows] for rows in (16, 32, 64) for place in (0, 1)
    ]


WIDE = Instruction("LDG", 16, weight=True)
WAIT = Instruction("ACQBULK", 0, weight=False)


@pytest.mark.parametrize(
    ("stack", "instructions", "reads_weights", "fault"),
    [
        pytest.param(0, [WIDE, WAIT], True, None, id="fine"),
        pytest.param(0, [WAIT, WIDE], True, None, id="all after the wait"),
        pytest.param(0, [], False, None, id="no weights"),
        pytest.param(8, [WIDE], True, "spills: 8 bytes", id="stack"),
        pytest.param(0, [WIDE, Instruction("STL", 4, weight=False)], True, "spills", id="store to local memory"),
        pytest.param(0, [], True, "no load of weights found", id="no load of weights"),
        pytest.param(0, [WIDE, Instruction("LDG", 8, weight=True)], True, "narrow loads of weights", id="narrow"),
        pytest.param(0, [WIDE, WAIT, WIDE], True, "1 of 2 loads of weights come after the wait", id="sunk"),
    ],
)
def test_faults(stack, instructions, reads_weights, fault):
    report = aot.make_report("kernel", 90, 32, stack, 0, instructions, reads_weights)
    assert len(report.faults) == (fault is not None)
    assert fault is None or fault in report.faults[0]


@pytest.mark.parametrize(("capability", "most"), [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)])
def test_more_shared_memory_than_there_is(capability, most):
    """It compiles, and would fail at its first launch."""
    for more in (0, 1):
        report = aot.make_report("kernel", capability, 32, 0, most * 1024 + more, [WIDE], reads_weights=True)
        assert len(report.faults) == more
    assert "bytes of shared memory, of" in report.faults[0]


def test_what_cannot_be_read_is_said_of_each_kernel(monkeypatch):
    """And does not end the suite."""

    def other_format(*_):
        raise ValueError("a table of lines of DWARF 2 is read, not version 5")

    monkeypatch.setattr(aot, "read_instructions", other_format)
    compiled = iter([SimpleNamespace(asm={"cubin": b""}), "CompilationError: no"])
    monkeypatch.setattr(aot, "_compile", lambda *_: next(compiled))
    said = "ValueError: a table of lines of DWARF 2 is read, not version 5"
    assert aot.compile_launches([None, None], 90) == [said, "CompilationError: no"]


@pytest.mark.parametrize("broken", [False, True], ids=["fine", "a kernel does not compile"])
def test_exit_status_and_document(broken, capsys):
    job = aot.Job("case", 0, torch.bfloat16, 1, 90)
    outcomes = [aot.Outcome(job, "good", aot.make_report("good", 90, 32, 0, 0, [WIDE], True))]
    if broken:
        outcomes.append(aot.Outcome(job, "bad", None, "CompilationError: no"))
    assert aot.report(outcomes, seconds=1.0) == broken
    out, err = capsys.readouterr()
    document = json.loads(out.splitlines()[-1])
    assert document["suite"] == "aot"
    assert len(document["results"]) == len(outcomes)
    fault = "bad (case, bfloat16, 1 rows, sm_90): does not compile, or cannot be read: CompilationError: no"
    assert (fault in err) == broken
