"""Ask NVIDIA's disassembler itself for each kernel's instructions and lines; print how many, and those read otherwise.

Of a few of csm-1b's launches, for an architecture that is given.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator

import torch

from aloud.benchmarks.aot import specialize
from aloud.benchmarks.aot_cases import CASES
from aloud.benchmarks.machine_code import KEPT, cuda_tool, read_instructions, read_lines, row_at, sections_of

capability = int(sys.argv[1])
LAUNCHES = (
    ("qkv.backbone", torch.bfloat16, 1),
    ("attention.backbone", torch.float16, 8),
    ("gate_up.depth", torch.bfloat16, 64),
    ("next_code.backbone", torch.float32, 2),
)


def by_nvdisasm(cubin: bytes) -> Iterator[tuple[int, str, tuple[str, int]]]:
    """Address, name, and file and line of each instruction."""
    row = ("", 0)
    for text in cuda_tool("nvdisasm", cubin, "--print-line-info", "--print-code", "--no-dataflow").splitlines():
        if marker := re.search(r'//## File "([^"]*)", line (\d+)', text):
            row = (marker[1], int(marker[2]))
        elif code := re.match(r"\s*/\*([0-9a-f]+)\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_]*)", text):
            yield int(code[1], 16), code[2], row


cubins = []
for name, dtype, count in LAUNCHES:
    plan = CASES[name](dtype, count, capability)
    launch = plan[0] if isinstance(plan, tuple) else plan
    cubins.append(specialize(launch).compile(capability).asm["cubin"])

total, differ = 0, []
for (name, _, _), cubin, ours in zip(LAUNCHES, cubins, read_instructions(cubins, capability), strict=True):
    rows = read_lines(sections_of(cubin)[".debug_line"])
    theirs = list(by_nvdisasm(cubin))
    total += len(theirs)
    for address, instruction, line in theirs:
        row = row_at(rows, address)
        if row is None or (row.file, row.line) != line:
            differ.append(f"{name}: {instruction} at {address:#x}: {row}, not {line}")
    if [instruction for _, instruction, _ in theirs if instruction in KEPT] != [one.name for one in ours] or not ours:
        differ.append(f"{name}: other instructions")
print(json.dumps([total, differ]))
