"""The machine runs what is right and refuses what a GPU leaves undefined: small kernels, written by hand."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ptx_machine.launches import Chain
from ptx_machine.machine import Machine
from ptx_machine.order import Fault
from ptx_machine.program import parse

HEAD = """
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid {threads}
{{
    ld.param.b64 %rd1, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.lo.s32 %r3, %r2, {threads}, %r1;
    mul.wide.u32 %rd2, %r3, 4;
    add.s64 %rd3, %rd1, %rd2;      // this thread's number
    shl.b32 %r4, %r1, 2;
    mov.b32 %r5, global_smem;
    add.s32 %r6, %r5, %r4;         // this thread's place in shared memory
{body}
    ret;
}}
"""


@dataclass
class Run:
    """A machine that has run, and what it left."""

    machine: Machine
    values: torch.Tensor


@pytest.fixture
def run(seed: int):
    """A function: run lines of PTX on threads that each have a place in `values`, int32."""

    def run(
        body: str,
        *,
        threads: int = 64,
        programs: int = 1,
        values: torch.Tensor | None = None,
        shared_bytes: int | None = None,
    ) -> Run:
        values = torch.arange(threads * programs, dtype=torch.int32) if values is None else values
        program = parse(HEAD.format(threads=threads, body=body))
        given = [np.uint64(values.data_ptr())]
        generator = np.random.default_rng(seed)
        machine = Machine(
            program, (programs, 1, 1), shared_bytes or 4 * threads, given, [("values", values)], generator
        )
        machine.run()
        return Run(machine, values)

    return run


def refused(run, body: str, match: str, **options) -> None:
    """It must be refused, in these words."""
    with pytest.raises(Fault, match=match):
        run(body, **options)


def without(body: str, line: str) -> str:
    """The lines of `body` without this one, which must be there."""
    assert line in body
    return body.replace(line, "", 1)


LOAD = "ld.global.b32 { %r10 }, [ %rd3 + 0 ];\n"
STORE = "st.global.b32 [ %rd3 + 0 ], { %r10 };\n"


def test_each_thread_has_its_own_number(run) -> None:
    done = run(LOAD + "mul.lo.s32 %r10, %r10, -3;\n" + STORE, threads=96, programs=5)
    assert torch.equal(done.values, -3 * torch.arange(480, dtype=torch.int32))


# --- branches ---------------------------------------------------------------------------------------------------------


def test_threads_part_and_come_together_again(run) -> None:
    body = """
        mov.b32 %r10, 0;
        mov.b32 %r11, 0;
$again:
        setp.ge.s32 %p1, %r11, %r1;
        @%p1 bra $done;
        add.s32 %r10, %r10, %r11;
        add.s32 %r11, %r11, 1;
        bra.uni $again;
$done:
        bar.sync 0;
        shfl.sync.bfly.b32 %r12, %r10, 1, 31, -1;
        sub.s32 %r10, %r10, %r12;
    """
    sums = torch.arange(64).mul(torch.arange(64) - 1) // 2
    expected = sums - sums.view(-1, 2).flip(1).reshape(-1)
    assert torch.equal(run(body + STORE).values, expected.int())


def test_an_end_of_some_threads(run) -> None:
    refused(run, "setp.lt.s32 %p1, %r1, 4;\n@%p1 ret;\n", "not known here")


def test_a_shuffle_of_a_part_of_a_warp_is_refused(run) -> None:
    body = """
        setp.lt.s32 %p1, %r1, 40;
        mov.b32 %r10, 1;
        @%p1 bra $skip;
        shfl.sync.bfly.b32 %r10, %r10, 1, 31, -1;
$skip:
    """
    refused(run, body + STORE, "not all threads of a warp")
    run(body.replace("40", "32") + STORE)


def test_a_barrier_that_some_never_come_to(run) -> None:
    body = """
        setp.lt.s32 %p1, %r1, 32;
        @%p1 bra $elsewhere;
        bar.sync 0;
        bra.uni $done;
$elsewhere:
        bar.sync 0;
$done:
    """
    refused(run, body, "wait for ever")
    run(body.replace("bra.uni $done", "ret").replace("$elsewhere:\n        bar.sync 0;", "$elsewhere:"))


# --- registers --------------------------------------------------------------------------------------------------------


def test_a_register_that_nothing_was_written_to(run) -> None:
    refused(run, STORE, "%r10, to which nothing was written")


def test_an_unknown_instruction(run) -> None:
    refused(run, "sad.u32 %r10, %r1, %r1, %r1;\n", "not known here")
    refused(run, "add.sat.s32 %r10, %r1, %r1;\n", "not known here")
    refused(run, "ld.global.volatile.b32 { %r10 }, [ %rd3 + 0 ];\n", "not known here")


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_outside_of_a_tensor(run) -> None:
    refused(run, LOAD.replace("+ 0", "+ 4"), "outside of values")
    refused(run, "mov.b64 %rd3, 0;\n" + LOAD, "outside of every tensor")
    refused(run, "ld.shared.b32 %r10, [%r6+4];\n", "outside of the program's own", programs=2)


def test_addresses_that_are_not_aligned(run) -> None:
    refused(run, "ld.global.v2.b32 { %r10, %r11 }, [ %rd3 + 0 ];\n", "no multiple of")
    refused(run, "st.shared.b32 [%r5+2], %r1;\n", "no multiple of")


EXCHANGE = """
    st.shared.b32 [%r6], %r1;
    bar.sync 0;
    xor.b32 %r7, %r4, {distance};
    add.s32 %r8, %r5, %r7;
    ld.shared.b32 %r10, [%r8];
"""


def test_an_exchange_in_shared_memory_needs_a_barrier(run) -> None:
    body = EXCHANGE.format(distance=4 * 33)
    assert torch.equal(run(body + STORE, programs=2).values[:64], (torch.arange(64) ^ 33).int())
    refused(run, without(body, "bar.sync 0;"), "reads what another thread wrote", programs=2)
    refused(run, body.replace("bar.sync 0", "bar.warp.sync -1"), "reads what another thread wrote")


def test_a_barrier_of_the_warp_is_enough_in_a_warp(run) -> None:
    body = EXCHANGE.format(distance=4 * 3).replace("bar.sync 0", "bar.warp.sync -1")
    assert torch.equal(run(body + STORE).values, (torch.arange(64) ^ 3).int())
    refused(run, without(body, "bar.warp.sync -1;"), "reads what another thread wrote")


AGAIN = "bar.sync 0;\nst.shared.b32 [%r6], %r10;\n"


def test_writes_behind_reads_need_a_barrier_too(run) -> None:
    body = EXCHANGE.format(distance=4 * 33) + AGAIN
    run(body)
    refused(run, body.removesuffix(AGAIN) + without(AGAIN, "bar.sync 0;"), "writes where another thread reads")


def test_several_threads_write_one_place(run) -> None:
    run("mov.b32 %r10, 7;\nst.global.b32 [ %rd1 + 0 ], { %r10 };\n")
    refused(run, "st.global.b32 [ %rd1 + 0 ], { %r1 };\n", "different values")
    body = "mov.b32 %r10, 7;\nsetp.eq.s32 %p1, %r2, 0;\n@%p1 st.global.b32 [ %rd1 + 0 ], { %r10 };\n"
    refused(run, body + body.replace("eq", "ne"), "writes where another thread wrote", programs=2)


def test_reads_before_the_first_write_count(run) -> None:
    """Every thread reads the first number, then the first thread writes it: a slower one would read what it wrote."""
    body = """
        ld.global.b32 { %r10 }, [ %rd1 + 0 ];
        bar.sync 0;
        setp.eq.s32 %p1, %r1, 0;
        @%p1 st.global.b32 [ %rd1 + 0 ], { %r10 };
    """
    run(body)
    refused(run, without(body, "bar.sync 0;"), "writes where another thread reads")
    refused(run, body, "writes where another thread", programs=2)


def test_shared_memory_that_nothing_was_written_to(run) -> None:
    refused(run, "ld.shared.b32 %r10, [%r6];\n", "nothing was written to")


def test_matrices_are_the_whole_warps(run) -> None:
    """Threads get other threads' rows: only a barrier of the warp is between them."""
    body = """
        shl.b32 %r7, %r1, 4;
        add.s32 %r8, %r5, %r7;
        st.shared.v4.b32 [%r8], {%r1, %r1, %r1, %r1};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r8];
    """
    assert torch.equal(run(body + STORE, threads=32, shared_bytes=512).values, torch.arange(32).int() // 4)
    refused(run, without(body, "bar.warp.sync -1;"), "reads what another", threads=32, shared_bytes=512)
    refused(run, body + "st.shared.b32 [%r8], %r10;\n", "writes where another", threads=32, shared_bytes=512)


# --- copies to shared memory ------------------------------------------------------------------------------------------

COPIES = """
    shl.b32 %r7, %r1, 4;
    add.s32 %r8, %r5, %r7;
    cvt.u64.u32 %rd5, %r7;
    add.s64 %rd6, %rd1, %rd5;
    setp.lt.s32 %p1, %r1, 16;
    @%p1 cp.async.cg.shared.global [ %r8 + 0 ], [ %rd6 + 0 ], 0x10, {size};
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    ld.shared.b32 %r10, [%r6];
    add.s32 %r10, %r10, 1;
"""


def test_copies_must_be_waited_for(run) -> None:
    body = COPIES.replace("{size}", "16")
    assert torch.equal(run(body + "bar.sync 0;\n" + STORE).values, torch.arange(64).int() + 1)
    assert torch.equal(run(COPIES.replace("{size}", "0") + STORE).values, torch.ones(64).int())
    refused(run, without(body, "cp.async.wait_group 0;"), "a copy is under way")
    refused(run, body.replace("wait_group 0", "wait_group 1"), "a copy is under way")
    refused(run, without(body, "cp.async.commit_group;"), "a copy is under way")
    refused(run, without(body, "bar.sync 0;"), "reads what another thread wrote")
    refused(run, body.replace("[ %r8 + 0 ]", "[ %r5 + 8 ]"), "no multiple of")
    refused(run, body.replace("[ %r8 + 0 ]", "[ %r5 + 0 ]"), "different data")


# --- programs ---------------------------------------------------------------------------------------------------------

LAST = """
    st.global.b32 [ %rd3 + 0 ], { %r2 };
    bar.sync 0;
    setp.eq.s32 %p1, %r1, 0;
    mov.b32 %r11, 1;
    mov.b32 %r12, 0;
    @%p1 atom.global.gpu.acq_rel.add.u32 %r12, [ %rd1 + 1024 ], %r11;
    @%p1 st.shared.b32 [%r5], %r12;
    bar.sync 0;
    ld.shared.b32 %r12, [%r5];
    setp.ne.s32 %p2, %r12, 3;
    @%p2 bra $done;
    add.s64 %rd4, %rd1, %rd2;
    ld.global.b32 { %r13 }, [ %rd1 + 0 ];
    ld.global.b32 { %r14 }, [ %rd1 + 256 ];
    ld.global.b32 { %r15 }, [ %rd1 + 512 ];
    ld.global.b32 { %r16 }, [ %rd1 + 768 ];
    add.s32 %r13, %r13, %r14;
    add.s32 %r13, %r13, %r15;
    add.s32 %r13, %r13, %r16;
    @%p1 st.global.b32 [ %rd1 + 1028 ], { %r13 };
    mov.b32 %r17, 0;
    @%p1 st.global.b32 [ %rd1 + 1024 ], { %r17 };  // the counter, for the next launch
$done:
"""


def test_the_last_program_may_read_what_the_others_wrote(run) -> None:
    def values() -> torch.Tensor:
        return torch.zeros(258, dtype=torch.int32)

    assert run(LAST, programs=4, values=values()).values[-2:].tolist() == [0, 6]
    for wrong in (
        LAST.replace("acq_rel", "relaxed"),
        without(LAST, "bar.sync 0;"),  # the others' stores may come behind the count
        without(LAST, "@%p2 bra $done;"),  # every program
    ):
        refused(run, wrong, "reads what another thread wrote", programs=4, values=values())
    for who in ("%p1", "%p2"):  # a thread of each program, before and behind its own count
        reset = f"mov.b32 %r17, 0;\n@{who} st.global.b32 [ %rd1 + 1024 ], {{ %r17 }};\n"
        refused(run, LAST.replace("@%p2 bra", reset + "@%p2 bra"), "another thread", programs=4, values=values())


def test_a_barrier_tells_nothing_of_another_programs_count(run) -> None:
    body = """
        mov.b32 %r11, 1;
        setp.eq.s32 %p1, %r3, 0;
        @%p1 atom.global.gpu.relaxed.add.u32 %r12, [ %rd1 + 0 ], %r11;
        bar.sync 0;
        setp.eq.s32 %p2, %r3, 64;
        @%p2 ld.global.b32 { %r10 }, [ %rd1 + 0 ];
    """
    refused(run, body, "beside another thread's atomic", programs=2)
    run(body.replace("%r3, 64", "%r3, 40"), programs=2)
    twice = body.replace("bar.sync 0;", "setp.eq.s32 %p1, %r3, 40;\n" + body.splitlines()[3])
    refused(run, twice.replace("%r3, 64", "%r3, 40"), "beside another thread's atomic")


def test_reads_by_several_programs_come_before_a_write_of_none(run) -> None:
    """Also where the one that writes is the one that read last, and has had a barrier since."""
    body = """
        ld.global.b32 { %r10 }, [ %rd1 + 0 ];
        bar.sync 0;
        setp.eq.s32 %p1, %r3, 64;
        mov.b32 %r11, 1;
        @%p1 st.global.b32 [ %rd1 + 0 ], { %r11 };
    """
    refused(run, body, "writes where another thread reads", programs=2)
    run(body.replace("64", "0"))


# --- programmatic launches --------------------------------------------------------------------------------------------


def test_writes_before_the_wait_are_refused(run) -> None:
    wait = "griddepcontrol.wait;\n"
    run(LOAD + wait + STORE)
    refused(run, LOAD + STORE + wait, "before the wait")


def test_what_is_read_early_must_not_be_written_by_the_chain(run) -> None:
    early = LOAD + "griddepcontrol.wait;\n"
    constant, given = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    chain = Chain()
    chain.add(run(early, values=constant).machine)
    chain.add(run("griddepcontrol.wait;\n" + LOAD + STORE, values=given).machine)
    assert chain.conflicts() == []
    chain.add(run(early, values=given).machine)
    assert chain.conflicts() == ["values of kernel"]


# --- parsing ----------------------------------------------------------------------------------------------------------


def test_faults_name_the_line_of_the_kernel(run) -> None:
    with pytest.raises(Fault, match=re.escape("`ld.global.b32 { %r10 }, [ %rd3 + 8 ]` of rope.py:12:3")):
        run(".loc 1 12 3 // rope.py:12:3\n" + LOAD.replace("+ 0", "+ 8"))


def test_text_that_is_no_kernel() -> None:
    with pytest.raises(ValueError, match="no kernel"):
        parse(".version 8.7\n")
    with pytest.raises(ValueError, match="not an instruction"):
        parse(HEAD.format(threads=32, body="what is this"))
