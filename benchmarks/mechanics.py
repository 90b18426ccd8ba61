"""What launches cost on this GPU: the numbers that decide how a frame is divided into kernels.

    copy        bytes a second of a large copy, read and written
    empty       one more node in a captured graph: a kernel of one program that does nothing
    dependent   one more kernel on every multiprocessor that reads what all of the one before have written
    programmatic  the same, launched while the one before still runs, and waiting for it (programmatic launch)
    barrier     the same dependency inside one kernel: all multiprocessors wait for each other

Each is the difference between a long and a short chain, so that what a replay costs once drops out. The chains compute
something, and nothing is reported when it comes out wrong. On a CPU the kernels run in Triton's interpreter, one
program each: that is to try the suite, and its times mean nothing.
"""

# Kernels have no types: Triton gives them theirs.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aloud.kernels.launch import PROGRAMMATIC_LAUNCH_CAPABILITY, Launch, capability
from aloud.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton

from .measure import circumstances, copy_bandwidth, time_calls
from .report import Column, reported, table

BLOCK = 128
"""Numbers that a program hands to the next: one for each of its threads."""
CHAINS = {"cuda": (200, 1000), "cpu": (2, 6)}
"""Links of the short and of the long chain."""


@triton.jit
def empty_kernel():
    """Does nothing."""


@triton.jit
def relay_kernel(from_ptr, to_ptr, programs, BLOCK: tl.constexpr, PROGRAMMATIC: tl.constexpr):
    """Program p writes one more than what program p + 1 wrote in the launch before."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if PROGRAMMATIC:
        gdc_launch_dependents()
        gdc_wait()
    neighbour = (program + 1) % programs
    value = tl.load(from_ptr + neighbour * BLOCK + lane)
    tl.store(to_ptr + program * BLOCK + lane, value + 1)


@triton.jit
def barrier_kernel(values_ptr, arrived_ptr, programs, LINKS: tl.constexpr, BLOCK: tl.constexpr):
    """As LINKS launches of `relay_kernel`, between two rows of values in turn; `arrived` must be 0 at the start."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    neighbour = (program + 1) % programs
    row = programs * BLOCK
    for link in range(LINKS):
        read_ptr = values_ptr + (link % 2) * row
        write_ptr = values_ptr + ((link + 1) % 2) * row
        # From the level-2 cache: a level-1 cache does not see what others have written meanwhile.
        value = tl.load(read_ptr + neighbour * BLOCK + lane, cache_modifier=".cg")
        tl.store(write_ptr + program * BLOCK + lane, value + 1)
        tl.debug_barrier()  # all threads' stores before the count
        tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
        while tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu") < (link + 1) * programs:
            pass
        tl.debug_barrier()


@dataclass(frozen=True)
class Chains:
    """The chains' memory on one device, a program for each of its multiprocessors."""

    device: torch.device
    programs: int
    values: torch.Tensor  # int32 [2, programs, BLOCK]
    arrived: torch.Tensor  # int32 [1]

    @staticmethod
    def on(device: torch.device) -> Chains:
        """Allocate for a device."""
        count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        return Chains(
            device,
            count,
            torch.zeros(2, count, BLOCK, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )

    def plan_empty(self) -> Launch:
        """One empty kernel."""
        return Launch(empty_kernel, (1,), {}, {}, num_warps=1)

    def plan_relay(self, link: int, *, programmatic: bool) -> Launch:
        """One link of a chain of launches."""
        arguments = {"from_ptr": self.values[link % 2], "to_ptr": self.values[(link + 1) % 2]}
        return Launch(
            relay_kernel,
            (self.programs,),
            {**arguments, "programs": self.programs},
            {"BLOCK": BLOCK, "PROGRAMMATIC": programmatic},
            programmatic=programmatic,
        )

    def plan_barrier(self, links: int) -> Launch:
        """A chain in one launch."""
        arguments = {"values_ptr": self.values, "arrived_ptr": self.arrived}
        constants = {"LINKS": links, "BLOCK": BLOCK}
        return Launch(barrier_kernel, (self.programs,), {**arguments, "programs": self.programs}, constants)

    def run_empty(self, links: int) -> None:
        """A chain of empty kernels."""
        for _ in range(links):
            self.plan_empty().run()

    def run_relay(self, links: int, *, programmatic: bool) -> None:
        """A chain of launches."""
        self.values.zero_()
        for link in range(links):
            self.plan_relay(link, programmatic=programmatic).run()

    def run_barrier(self, links: int) -> None:
        """A chain in one launch; refused, and not hung, where not all programs fit at once."""
        self.values.zero_()
        self.arrived.zero_()
        launch = self.plan_barrier(links)
        options = {"launch_cooperative_grid": True} if self.device.type == "cuda" else {}
        launch.kernel[launch.grid](**launch.arguments, **launch.constants, num_warps=launch.num_warps, **options)

    def is_right(self, links: int) -> bool:
        """Whether the chain that ran last has counted its links."""
        return bool((self.values[links % 2] == links).all())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own arguments."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    parser.add_argument("--repeats", type=int, default=30, help="replays of which the median is taken (default: 30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON document to a file, too")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Measure and print a table; the last line is one JSON document -> 1 when a chain came out wrong."""
    if parsed.repeats < 1:
        print("The suite mechanics needs 1 repeat or more.", file=sys.stderr)
        return 1
    device = torch.device(parsed.device)
    if device.type != "cuda" and isinstance(relay_kernel, triton.runtime.JITFunction):
        print("The suite mechanics needs a GPU; TRITON_INTERPRET=1 tries it without one.", file=sys.stderr)
        return 1
    about, bandwidth = circumstances(device), copy_bandwidth(device)
    chains = Chains.on(device)
    programmatic = device.type == "cuda" and capability(device) >= PROGRAMMATIC_LAUNCH_CAPABILITY
    kinds: dict[str, tuple[Callable[[int], None], bool]] = {
        "empty": (chains.run_empty, False),
        "dependent": (lambda links: chains.run_relay(links, programmatic=False), True),
        "barrier": (chains.run_barrier, True),
    }
    if programmatic:
        kinds["programmatic"] = (lambda links: chains.run_relay(links, programmatic=True), True)

    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}")
    print(f"copy {bandwidth / 1e12:.3f} TB/s; {chains.programs} programs")
    short, long = CHAINS[device.type]
    results: list[dict[str, Any]] = []
    document = {
        "suite": "mechanics",
        "about": about,
        "programs": chains.programs,
        "copy_bytes_per_second": bandwidth,
        "results": results,
    }
    with reported(document, parsed.json), table((Column("step"), Column("microseconds", "us", ".3f")), results):
        for name, (chain, computes) in kinds.items():
            wrong = [links for links in (short, long) if computes and not comes_out_right(chains, chain, links)]
            if wrong:
                results.append({"step": name, "microseconds": None, "error": f"a chain of {wrong[0]} came out wrong"})
                print(f"{name}: a chain of {wrong[0]} links came out wrong", file=sys.stderr)
                continue
            seconds = {
                links: time_calls([partial(chain, links)], device, repeats=parsed.repeats) for links in (short, long)
            }
            each = (seconds[long] - seconds[short]) / (long - short)
            results.append({"step": name, "microseconds": each * 1e6, "error": None})
    return 1 if any(result["error"] for result in results) else 0


def comes_out_right(chains: Chains, chain: Callable[[int], None], links: int) -> bool:
    """Whether a chain counts its links, twice in a row."""
    for _ in range(2):
        chains.values.fill_(-1)
        chain(links)
        if not chains.is_right(links):
            return False
    return True
