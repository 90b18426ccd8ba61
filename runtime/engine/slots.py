"""The memory of all streams, allocated once: how many fit, and what one costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

import torch

from aloud import memory
from aloud.engine.model import SpeechModel, State

FREE_SHARE = 0.5
"""The part of the free memory that streams take when nobody says how many: the rest is for others on the device, and
for what a frame computes with."""
MOST_STREAMS = {"cuda": 256, "cpu": 16}
"""Streams when nobody says how many, where memory does not set the limit."""


@dataclass(frozen=True)
class Slots(Generic[State]):
    """State of `count` streams of up to `positions` positions, and of the scratch slot behind them."""

    state: State
    count: int
    positions: int

    @property
    def scratch(self) -> int:
        """The slot of rows that have no stream."""
        return self.count


def slot_bytes(model: SpeechModel[State], positions: int) -> int:
    """Bytes that one stream of up to `positions` positions takes on the device."""
    return model.state_bytes(2, positions) - model.state_bytes(1, positions)


def fitting_slots(model: SpeechModel[State], positions: int, free_bytes: int | None) -> int:
    """How many streams to make room for in a device's free memory; at least one."""
    most = MOST_STREAMS[model.device.type]
    if free_bytes is None:
        return most
    room = FREE_SHARE * free_bytes - model.state_bytes(1, positions)  # the scratch slot's
    return max(1, min(most, int(room / slot_bytes(model, positions))))


def allocate_slots(model: SpeechModel[State], max_streams: int | None, max_positions: int | None) -> Slots[State]:
    """Allocate the streams' memory.

    max_streams: by default as many as `fitting_slots` says. max_positions: by default the model's whole context.

    Raises `OutOfMemory` when it is not there.
    """
    positions = model.max_positions if max_positions is None else max_positions
    free = memory.free_bytes(model.device)
    count = fitting_slots(model, positions, free) if max_streams is None else max_streams
    what = f"Room for {count} streams of {positions} positions takes"
    cure = "Load with a smaller max_streams or max_positions, or free some memory."
    memory.require(what, model.state_bytes(count + 1, positions), model.device, cure)
    with memory.out_of_memory(what, model.device, cure), torch.no_grad():
        return Slots(model.allocate(count + 1, positions), count, positions)
