"""From a `Launch` on tensors of the CPU to the machine: compile it for a GPU, and run what came out."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import triton

from aloud.benchmarks.aot import Specialization, specialize
from aloud.kernels.launch import Launch

from .machine import Machine
from .order import Fault
from .program import Program, parse

Array = Any


@cache
def compiled(special: Specialization, capability: int) -> tuple[Program, int]:
    """What Triton makes for a compute capability: the program, and how much shared memory it takes."""
    knobs = triton.knobs
    with TemporaryDirectory() as folder, knobs.runtime.scope(), knobs.cache.scope():
        knobs.runtime.add_stages_inspection_hook = _without_machine_code
        knobs.cache.dir = folder  # a cache of their own, so that nobody finds kernels without machine code
        result = special.compile(capability)
        return parse(result.asm["ptx"]), result.metadata.shared


def _without_machine_code(backend: Any, stages: dict[str, Any], *rest: Any) -> None:
    """PTX is enough; the assembler would take half of the time."""
    stages["cubin"] = lambda ptx, metadata: b""


class Chain:
    """Launches that follow each other, each of which may begin before the one before it has ended.

    Until its wait, a kernel runs beside any number of those before it: what it reads there must be what no kernel of
    the chain writes. Each waits, so that what is behind one's wait comes after all of those before.
    """

    def __init__(self) -> None:
        self.read_early: dict[int, Array] = {}  # by where a tensor's memory begins: for each byte, whether
        self.written: dict[int, Array] = {}
        self.names: dict[int, str] = {}

    def add(self, machine: Machine) -> None:
        """Remember what a launch has touched."""
        for noted, accesses in ((self.read_early, machine.read_early), (self.written, machine.written)):
            for region, offsets, size in accesses:
                self.names[region.start] = f"{region.name} of {machine.program.name}"
                touched = noted.setdefault(region.start, np.zeros(0, bool))
                if len(touched) < len(region.data):
                    touched = noted[region.start] = np.pad(touched, (0, len(region.data) - len(touched)))
                touched[offsets.astype(np.int64)[:, None] + np.arange(size)] = True

    def conflicts(self) -> list[str]:
        """Tensors of which a byte is read before a wait and written by a kernel."""
        found = []
        for start in self.read_early.keys() & self.written.keys():
            read, written = self.read_early[start], self.written[start]
            shortest = min(len(read), len(written))
            if (read[:shortest] & written[:shortest]).any():
                found.append(self.names[start])
        return found


def run(launch: Launch, capability: int, generator: np.random.Generator) -> Machine:
    """Run a launch -> the machine behind it, which knows what was touched.

    Raises:
        Fault: the kernel does what a GPU leaves undefined.
    """
    special = specialize(launch)
    program, shared_bytes = compiled(special, capability)
    types = dict(special.signature)
    constants = dict(special.constants)
    tensors, parameters = [], []
    for parameter in launch.kernel.params:
        name = parameter.name
        if name in constants:
            continue
        value = launch.arguments[name]
        if isinstance(value, torch.Tensor):
            tensors.append((name, value))
        parameters.append(_parameter(value, types[name]))
    # Behind a kernel's own, Triton passes two places for scratch memory, which these kernels do not have.
    parameters += [np.uint64(0)] * (len(program.parameters) - len(parameters))
    grid = (*launch.grid, 1, 1)[:3]
    machine = Machine(program, grid, shared_bytes, parameters, tensors, generator)
    try:
        machine.run()
        if launch.programmatic and not machine.waited.all():
            raise Fault("ends without a wait for the kernel before")
    except Fault as fault:
        raise Fault(f"{program.name} for sm_{capability} {fault}") from None
    return machine


def _parameter(value: Any, kind: str) -> Any:
    """A number as a kernel gets it."""
    if isinstance(value, torch.Tensor):
        return np.uint64(value.data_ptr())
    if kind == "fp32":
        return np.float32(value).view(np.uint32)
    return {"i32": np.int32, "i64": np.int64}[kind](value).view({"i32": np.uint32, "i64": np.uint64}[kind])
