"""Ask Triton's own binder what it would compile for csm-1b's launches; print how many, and those of other opinion."""

from __future__ import annotations

import json
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from aloud.benchmarks import aot
from aloud.benchmarks.aot_cases import CASES
from aloud.kernels.launch import Launch


def by_triton(launch: Launch, capability: int) -> list[tuple[str, Any]]:
    """Each parameter's type, and its value where that is constant, or "D" where it is divisible by 16, or "" where not.

    None where that is not asked: which of the two it is decides nothing of the machine code, but under what it is kept.
    """
    backend = make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    _, chosen, _ = bind(**launch.arguments, **launch.constants)
    return list(map(tuple, chosen))


def by_us(launch: Launch) -> list[tuple[str, Any]]:
    """The same of `specialize`."""
    special = aot.specialize(launch)
    constants, divisible = dict(special.constants), dict(special.divisible)
    keys = {True: "D", False: "", None: None}
    return [
        (kind, constants[name] if kind == "constexpr" else keys[divisible.get(place)])
        for place, (name, kind) in enumerate(special.signature)
    ]


count, differ = 0, []
for name, plan in CASES.items():
    for dtype in aot.DTYPES:
        for rows in (1, 2, 24):
            for capability in (80, 90):
                planned = plan(dtype, rows, capability)
                for launch in planned if isinstance(planned, tuple) else (planned,):
                    count += 1
                    if by_triton(launch, capability) != by_us(launch):
                        differ.append(f"{name}, {dtype}, {rows} rows, sm_{capability}: {launch.kernel.__name__}")
print(json.dumps([count, differ]))
