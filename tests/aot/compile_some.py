"""Compile cases, given as a JSON list of [case, dtype, rows, capability], and print reports as one JSON document.

A process of its own, as the other scripts here: under pytest, kernels are defined for Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import torch

from aloud.benchmarks.aot import Job, compile_launch, specializations, work
from aloud.kernels.linear import plan_linear_residual


def compiled(case: str, dtype: str, rows: int, capability: int) -> dict[str, Any]:
    outcome = work(Job(case, 0, getattr(torch, dtype), rows, capability))
    assert outcome.report, outcome.error
    return asdict(outcome.report)


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


reports: dict[str, Any] = {" ".join(map(str, job)): compiled(*job) for job in json.loads(sys.argv[1])}
shifted = empty(1 + 256 * 1024)[1:].view(256, 1024)
(launch,) = plan_linear_residual(empty(1, 1024), shifted, empty(1, 256), capability=90)
reports["shifted"] = asdict(compile_launch(launch, 90))
jobs = specializations(["down.depth"], [90]).values()
reports["jobs"] = [(job.launch, job.rows) for job in jobs if job.dtype == torch.bfloat16]
print(json.dumps(reports))
