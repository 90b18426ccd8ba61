"""Launch all that csm-1b launches, in a dtype and on a capability that are given, on a pretended GPU.

Prints how many launches differ in their machine code, and those of which `aloud bench aot` compiles none like it.
"""

from __future__ import annotations

import json
import sys

import torch

from aloud.benchmarks.aot import specializations, specialize
from aloud.benchmarks.aot_cases import CASES
from aloud.prompt_block import PromptBlock
from pretended_gpu import load, pretended_gpu

dtype, capability = getattr(torch, sys.argv[1]), int(sys.argv[2])
compiled = {special for special, _ in specializations(list(CASES), [capability])}
with pretended_gpu(capability) as asked:
    model = load("csm-1b", dtype)
    for slots in (64, 2048):  # strides of the cache beyond 32 bits are among these
        state = model.allocate(slots + 1, model.max_positions)
        for rows in (1, 2, 3, 8, 9, 24, 63, 64, 65):
            model.draw(state, torch.empty(rows, dtype=torch.int64, device="cuda"))
        for positions in (16, 64, 512):
            rows_of_block = 4 + model.codebooks
            model.prefill(state, PromptBlock(torch.empty(rows_of_block, positions, dtype=torch.int64, device="cuda")))
    launched = set(map(specialize, asked.launches))
print(json.dumps([len(launched), sorted(str(special) for special in launched - compiled)]))
