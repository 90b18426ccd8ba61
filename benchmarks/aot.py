"""Compile every kernel as csm-1b launches it, for every architecture, with no GPU, and read the machine code.

A kernel fails when it does not compile, when it spills (registers kept in local memory), when it takes more shared
memory than a program can have, or when it streams weights with loads narrower than 16 bytes a thread. Loads of weights
are those on source lines that name a weight: the debug lines inside the binary say which line each machine instruction
comes from, and a kernel that reads weights takes them through a parameter with `weight` in its name. At least one such
load must be found, and all of them must be 16 bytes: LDG.E.128, or LDGSTS.128 (cp.async), or the copy engine's
(UTMALDG, UBLKCP). In a kernel that waits for the one before it, loads of weights must not stand on both sides of the
wait: that is a slice of weights meant to be under way before it, part of which the compiler has moved.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import groupby
from multiprocessing import get_context
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aloud.kernels.launch import Launch

from .aot_cases import CASES
from .machine_code import LOADS, Instruction, cuda_tool, read_instructions

CAPABILITIES = (80, 86, 89, 90, 100, 120)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (1, 2, 4, 8, 16, 32, 64)
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Shared memory that one program can have (CUDA C++ Programming Guide, technical specifications); more compiles, and
fails when it is launched."""
WIDE = 16
"""Bytes that one thread loads at once when weights stream well."""
TOGETHER = 16
"""Kernels that one process compiles and disassembles at once; more would leave the other processes idle at the end."""

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Report:
    """What one kernel became for one architecture; loads count instructions by their bytes a thread."""

    kernel: str
    capability: int
    registers: int  # a thread
    stack_bytes: int  # a thread, in local memory
    shared_bytes: int  # a program
    weight_loads: dict[int, int]
    other_loads: dict[int, int]
    weight_loads_after_wait: int  # 0 when the kernel has no wait
    order: str  # memory and dependency instructions in the order of the machine code
    faults: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Specialization:
    """All that decides a kernel's machine code, but for the architecture."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[tuple[int, bool], ...]  # by an argument's place, where Triton asks: whether it is a multiple of 16
    options: tuple[tuple[str, Any], ...]

    def compile(self, capability: int) -> Any:
        """What Triton makes of it for a compute capability (90 for 9.0).

        Raises whatever Triton raises when the kernel does not compile.
        """
        source = ASTSource(
            fn=self.kernel,
            signature=dict(self.signature),
            constexprs=dict(self.constants),
            # Also where there is nothing to say, as Triton itself does: a launch then finds this in Triton's cache.
            attrs={(place,): [["tt.divisibility", 16]] if is_so else [] for place, is_so in self.divisible},
        )
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(self.options))


def specialize(launch: Launch) -> Specialization:
    """What Triton would compile for this launch: it distinguishes 1, multiples of 16 and other numbers.

    Of tensors without memory: their allocations count as aligned.
    """
    signature, constants, divisible = {}, dict(launch.constants), []
    for place, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = parameter.annotation_type or _type(value)
        if not (parameter.do_not_specialize or isinstance(value, float)):
            divisible.append((place, not parameter.do_not_specialize_on_alignment and _multiple_of_16(value)))
    options: dict[str, Any] = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if launch.programmatic:
        options["launch_pdl"] = True
    return Specialization(
        launch.kernel,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
        tuple(options.items()),
    )


def compile_launches(launches: Sequence[Launch], capability: int) -> list[Report | str]:
    """Compile launches for one compute capability and read their machine code.

    Returns:
        For each a report, or in words why it does not compile or cannot be read.
    """
    compiled = [_compile(launch, capability) for launch in launches]
    try:
        read = iter(read_instructions([one.asm["cubin"] for one in compiled if not isinstance(one, str)], capability))
        return [
            one if isinstance(one, str) else _report(launch, capability, one, next(read))
            for launch, one in zip(launches, compiled, strict=True)
        ]
    except Exception as error:  # of the tools that read machine code: it is not known of these kernels
        return [one if isinstance(one, str) else _in_words(error) for one in compiled]


def _compile(launch: Launch, capability: int) -> Any:
    """What Triton makes of a launch, or in words why it does not compile."""
    if not isinstance(launch.kernel, triton.runtime.JITFunction):
        return "kernels were defined for Triton's interpreter; unset TRITON_INTERPRET to compile them"
    with triton.knobs.compilation.scope():
        # Never from the cache: that does not notice when a device function has moved to other lines.
        triton.knobs.compilation.always_compile = True
        try:
            return specialize(launch).compile(capability)
        except Exception as error:  # any failure of the compiler is this suite's finding
            return _in_words(error)


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _report(launch: Launch, capability: int, compiled: Any, instructions: Sequence[Instruction]) -> Report:
    usage = cuda_tool("cuobjdump", compiled.asm["cubin"], "--dump-resource-usage")
    resources = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if resources is None:
        raise RuntimeError(f"cuobjdump does not say what {launch.kernel.__name__} uses: {usage!r}")
    registers, stack, local = map(int, resources.groups())
    reads_weights = any("weight" in name for name in launch.arguments)
    name, shared = launch.kernel.__name__, compiled.metadata.shared
    return make_report(name, capability, registers, stack + local, shared, instructions, reads_weights)


def make_report(
    kernel: str,
    capability: int,
    registers: int,
    stack_bytes: int,
    shared_bytes: int,
    instructions: Sequence[Instruction],
    reads_weights: bool,
) -> Report:
    """Count the instructions and find what is wrong with them."""
    loads = [i for i in instructions if i.name in LOADS]
    weight_loads = Counter(i.bytes for i in loads if i.weight)
    names = [i.name for i in instructions]
    after = instructions[names.index("ACQBULK") :] if "ACQBULK" in names else []
    late = sum(i.weight for i in after)
    faults = []
    if stack_bytes or "LDL" in names or "STL" in names:
        faults.append(f"spills: {stack_bytes} bytes of local memory a thread")
    if shared_bytes > SHARED_BYTES[capability]:
        faults.append(f"{shared_bytes} bytes of shared memory, of {SHARED_BYTES[capability]}")
    if reads_weights and not weight_loads:
        faults.append("no load of weights found: write each on a line that names a weight")
    if narrow := {bytes: count for bytes, count in weight_loads.items() if bytes < WIDE}:
        faults.append(f"narrow loads of weights (bytes: instructions): {narrow}")
    if 0 < late < weight_loads.total():
        faults.append(f"{late} of {weight_loads.total()} loads of weights come after the wait")
    return Report(
        kernel=kernel,
        capability=capability,
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=shared_bytes,
        weight_loads=dict(weight_loads),
        other_loads=dict(Counter(i.bytes for i in loads if not i.weight)),
        weight_loads_after_wait=late,
        order=" ".join(f"{len(list(run))}x{name}" for name, run in groupby(map(str, instructions))),
        faults=tuple(faults),
    )


def _type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"a kernel's argument must be a tensor or a number, got {type(value).__name__}")


def _multiple_of_16(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        # Allocations are aligned, views start at an offset.
        return value.storage_offset() * value.element_size() % 16 == 0
    return type(value) is int and value % 16 == 0


@dataclass(frozen=True)
class Job:
    """One compilation, as plain data for a process of its own."""

    case: str
    launch: int  # which of the case's launches
    dtype: torch.dtype
    rows: int
    capability: int


@dataclass(frozen=True)
class Outcome:
    """A job and what became of it."""

    job: Job
    kernel: str
    report: Report | None
    error: str = ""

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong, in words; empty when nothing is."""
        return self.report.faults if self.report else (f"does not compile, or cannot be read: {self.error}",)


def specializations(names: list[str], capabilities: list[int]) -> dict[tuple[Specialization, int], Job]:
    """All that csm-1b's launches compile to, by what decides the machine code and the compute capability."""
    found: dict[tuple[Specialization, int], Job] = {}
    for name in names:
        for dtype in DTYPES:
            for rows in ROWS:
                for capability in capabilities:
                    for place, launch in enumerate(_launches(name, dtype, rows, capability)):
                        found.setdefault((specialize(launch), capability), Job(name, place, dtype, rows, capability))
    return found


def work(jobs: Sequence[Job]) -> list[Outcome]:
    """Compile jobs, all of one compute capability."""
    launches = [_launches(job.case, job.dtype, job.rows, job.capability)[job.launch] for job in jobs]
    names = [launch.kernel.__name__ for launch in launches]
    return [
        Outcome(job, name, None, made) if isinstance(made, str) else Outcome(job, name, made)
        for job, name, made in zip(jobs, names, compile_launches(launches, jobs[0].capability), strict=True)
    ]


def _launches(name: str, dtype: torch.dtype, rows: int, capability: int) -> tuple[Launch, ...]:
    plan: Callable[[torch.dtype, int, int], Launch | tuple[Launch, ...]] = CASES[name]
    planned = plan(dtype, rows, capability)
    return planned if isinstance(planned, tuple) else (planned,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own arguments."""
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE", help="default: all")
    parser.add_argument(
        "--capabilities", nargs="+", type=int, default=CAPABILITIES, choices=CAPABILITIES, help="default: all"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="compiling at once (default: all cores)")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Compile everything and print a table for each kernel; the last line printed is one JSON document."""
    if parsed.processes < 1:
        print("The suite aot needs 1 process or more.", file=sys.stderr)
        return 1
    start = time.perf_counter()
    todo = list(specializations(parsed.cases, parsed.capabilities).values())
    chunks = []
    for capability in sorted({job.capability for job in todo}):
        jobs = [job for job in todo if job.capability == capability]
        chunks += [jobs[first : first + TOGETHER] for first in range(0, len(jobs), TOGETHER)]
    # New processes, not forks: torch has started threads in this one.
    with ProcessPoolExecutor(parsed.processes, mp_context=get_context("spawn")) as pool:
        outcomes = {outcome.job: outcome for done in pool.map(work, chunks) for outcome in done}
    return report([outcomes[job] for job in todo], time.perf_counter() - start)


def report(outcomes: list[Outcome], seconds: float) -> int:
    """Print the tables, the faults and the JSON document -> 1 if there is a fault."""
    outcomes = sorted(outcomes, key=lambda outcome: outcome.kernel)
    head = f"{'case':<24}{'dtype':<10}{'rows':>4}{'sm':>5}{'regs':>6}{'stack':>6}{'shared':>8}"
    for kernel, group in groupby(outcomes, key=lambda outcome: outcome.kernel):
        print(f"\n{kernel}\n  {head}  loads of weights; others")
        for outcome in group:
            print(f"  {_line(outcome)}")
    broken = [outcome for outcome in outcomes if outcome.faults]
    for outcome in broken:
        print(f"{outcome.kernel} ({_job_name(outcome.job)}): {'; '.join(outcome.faults)}", file=sys.stderr)
    print(f"\n{len(outcomes)} compiled in {seconds:.0f} s, {len(broken)} with faults")
    results = [_as_json(outcome) for outcome in outcomes]
    print(json.dumps({"suite": "aot", "triton": triton.__version__, "seconds": seconds, "results": results}))
    return 1 if broken else 0


def _line(outcome: Outcome) -> str:
    job, report = outcome.job, outcome.report
    dtype = str(job.dtype).removeprefix("torch.")
    head = f"{job.case:<24}{dtype:<10}{job.rows:>4}{job.capability:>5}"
    if report is None:
        return f"{head}  {outcome.error}"
    weights = ", ".join(f"{count} x {bytes} B" for bytes, count in report.weight_loads.items()) or "none"
    if report.weight_loads and "ACQBULK" in report.order:
        weights += " after the wait" if report.weight_loads_after_wait else " before the wait"
    others = ", ".join(f"{count} x {bytes} B" for bytes, count in report.other_loads.items()) or "none"
    return f"{head}{report.registers:>6}{report.stack_bytes:>6}{report.shared_bytes:>8}  {weights}; {others}"


def _job_name(job: Job) -> str:
    return f"{job.case}, {str(job.dtype).removeprefix('torch.')}, {job.rows} rows, sm_{job.capability}"


def _as_json(outcome: Outcome) -> dict[str, Any]:
    job = asdict(outcome.job) | {"dtype": str(outcome.job.dtype).removeprefix("torch.")}
    report = asdict(outcome.report) if outcome.report else {"kernel": outcome.kernel}
    return job | report | {"faults": outcome.faults}
