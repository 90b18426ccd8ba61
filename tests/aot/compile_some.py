"""Compile cases, given as a JSON list of [case, dtype, rows, capability], and print reports as one JSON document.

A process of its own, as the other scripts here: under pytest, kernels are defined for Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch

from aloud.benchmarks.aot import Job, compile_launches, specializations, work
from aloud.kernels.linear import plan_linear_residual


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


reports: dict[str, Any] = {}
wanted = sorted(json.loads(sys.argv[1]), key=itemgetter(3))
for capability, group in groupby(wanted, key=itemgetter(3)):
    cases = list(group)
    outcomes = work([Job(name, 0, getattr(torch, dtype), rows, capability) for name, dtype, rows, _ in cases])
    for case, outcome in zip(cases, outcomes, strict=True):
        assert outcome.report, outcome.error
        reports[" ".join(map(str, case))] = asdict(outcome.report)

shifted = empty(1 + 256 * 1024)[1:].view(256, 1024)
(launch,) = plan_linear_residual(empty(1, 1024), shifted, empty(1, 256), capability=90)
(shifted_report,) = compile_launches([launch], 90)
assert not isinstance(shifted_report, str), shifted_report
reports["shifted"] = asdict(shifted_report)
of_down = specializations(["down.depth"], [90]).values()
reports["jobs"] = [(job.launch, job.rows) for job in of_down if job.dtype == torch.bfloat16]
print(json.dumps(reports))
