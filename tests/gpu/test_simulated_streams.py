"""The simulated streams find what nothing orders, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gpu.simulated_streams import Order, Race, simulated_streams


@pytest.fixture
def order() -> Iterator[Order]:
    with simulated_streams() as order:
        yield order


def on_device(*shape: int) -> torch.Tensor:
    """Zeros that are there before anything is launched on a stream."""
    made = torch.zeros(*shape, device="cpu")
    torch.cuda.current_stream("cpu").synchronize()
    return made


@pytest.mark.parametrize("first", ["reads", "writes"])
@pytest.mark.parametrize("waits", [False, True])
def test_two_streams(order: Order, first: str, waits: bool) -> None:
    memory, event, streams = on_device(4), torch.cuda.Event(), [torch.cuda.Stream() for _ in range(2)]
    with torch.cuda.stream(streams[0]):
        memory + 1 if first == "reads" else memory.add_(1)
        event.record()
    if waits:
        streams[1].wait_event(event)
    with torch.cuda.stream(streams[1]):
        if waits:
            memory.add_(1)
            return
        with pytest.raises(Race, match=r"add_ on stream 3 may come before \w+ on stream 2"):
            memory.add_(1)


def test_reading_from_two_streams_is_no_race(order: Order) -> None:
    memory = on_device(4)
    for _ in range(2):
        with torch.cuda.stream(torch.cuda.Stream()):
            memory + 1


def test_what_comes_before_the_event_alone(order: Order) -> None:
    memory, event, streams = on_device(4), torch.cuda.Event(), [torch.cuda.Stream() for _ in range(2)]
    with torch.cuda.stream(streams[0]):
        event.record()
        memory.add_(1)
    streams[1].wait_event(event)
    with torch.cuda.stream(streams[1]), pytest.raises(Race):
        memory + 1


@pytest.mark.parametrize("waits", [False, True])
def test_pinned_memory_that_is_written_again(order: Order, waits: bool) -> None:
    """While the copy from it may be under way."""
    memory, pinned = on_device(4), torch.zeros(4, pin_memory=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        pinned[:2] = torch.tensor([1.0, 2.0])
        memory.copy_(pinned, non_blocking=True)
    if waits:
        stream.synchronize()
        pinned.fill_(2.0)
        return
    with pytest.raises(Race, match="fill_ on host may come before copy_ on stream 2"):
        pinned.fill_(2.0)


@pytest.mark.parametrize("waits", [False, True])
def test_what_the_host_reads(order: Order, waits: bool) -> None:
    memory, pinned, event = on_device(4), torch.zeros(4, pin_memory=True), torch.cuda.Event()
    with torch.cuda.stream(torch.cuda.Stream()):
        pinned.copy_(memory, non_blocking=True)
        event.record()
    if waits:
        event.synchronize()
        pinned.numpy()
        return
    with pytest.raises(Race, match="numpy on host may come before copy_ on stream 2"):
        pinned.numpy()


@pytest.mark.parametrize("how", ["a copy", "a number", "a number of the host"])
def test_the_host_waits_for_what_it_asks(order: Order, how: str) -> None:
    """And for nothing else."""
    memory, other, mine = on_device(4), on_device(4), torch.zeros(4)
    with torch.cuda.stream(torch.cuda.Stream()):
        memory.add_(1)
        if how == "a copy":
            mine.copy_(other)
        else:
            (other if how == "a number" else mine)[0].item()
    with torch.cuda.stream(torch.cuda.Stream()):
        if how != "a number of the host":
            memory.add_(1)
            return
        with pytest.raises(Race):
            memory.add_(1)
