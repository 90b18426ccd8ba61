"""CUDA's streams, events and graphs on a CPU: everything is done when it is launched, and what orders it is kept.

A device may do the work of two streams in any order that no event forbids. So each access to a tensor's memory has to
come after those that it conflicts with: by its stream's order, by an event, or because the host had waited. One that
does not is an error here, whatever values came of it. A tensor's memory is one, so also where two streams use two slots
of it. Memory on the device is what is made with `device=`, or of such, and what is registered.

Not looked at: memory that is used again, by the allocator or in a pool of graphs, and the capture itself.

Source: vector clocks, as data races are found with them: Fidge 1988; Mattern 1989.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from aloud.engine.graphs import WARM_UPS, GraphSteps
from aloud.engine.slots import Slots
from aloud.memory import tensors_of
from aloud.models.csm import Csm, CsmState

HOST = "host"
Result = TypeVar("Result")


class Race(AssertionError):
    """Two accesses to the same memory that nothing orders, at least one of which writes."""


@dataclass
class Accesses:
    """Who has last written some memory, and who has read it since: line of work -> (time on it, operation)."""

    write: tuple[str, int, str] | None = None
    reads: dict[str, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What a step of a model reads and writes, by its memory."""

    reads: dict[int, torch.Tensor] = field(default_factory=dict)
    writes: dict[int, torch.Tensor] = field(default_factory=dict)


class Order:
    """What has been done to which memory, and what of it each line of work, a stream or the host, comes after."""

    def __init__(self) -> None:
        self.current = "default stream"
        self.is_watching = True
        self.step: Step | None = None  # that is being captured: all of it is the stream's, whatever a CPU does for it
        self.clocks: dict[str, Counter[str]] = {HOST: Counter(), self.current: Counter()}
        self._accesses: dict[int, Accesses] = {}
        self._on_host: set[int] = set()
        self._kept: list[torch.UntypedStorage] = []  # so that no address stands for two memories

    def take(self, tensor: torch.Tensor, *, on_host: bool = False) -> int:
        """A tensor's memory."""
        storage = tensor.untyped_storage()
        memory = storage.data_ptr()
        if memory not in self._accesses:
            self._kept.append(storage)
            self._accesses[memory] = Accesses()
        if on_host:
            self._on_host.add(memory)
        return memory

    def knows(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._accesses

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        return self.take(tensor) in self._on_host

    def access(self, line: str, name: str, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> None:
        """An operation on a line of work. Raises `Race`."""
        reads, writes = ([tensor for tensor in tensors if tensor.numel()] for tensors in (reads, writes))
        clock = self.clocks[line]
        clock |= self.clocks[HOST]  # what is launched comes after what the host has seen
        clock[line] += 1
        for tensor in (*reads, *writes):
            if (before := self._accesses[self.take(tensor)].write) is not None:
                self._require(line, name, *before)
        for tensor in writes:
            accesses = self._accesses[self.take(tensor)]
            for other, (when, operation) in accesses.reads.items():
                self._require(line, name, other, when, operation)
            accesses.write, accesses.reads = (line, clock[line], name), {}
        for tensor in reads:
            self._accesses[self.take(tensor)].reads[line] = (clock[line], name)

    def _require(self, line: str, name: str, other: str, when: int, operation: str) -> None:
        if self.clocks[line][other] < when:
            raise Race(f"{name} on {line} may come before {operation} on {other}")

    def host_waits_for(self, clock: Counter[str]) -> None:
        self.clocks[HOST] |= clock

    def capture(self, function: Callable[[], Result]) -> tuple[Step, Result]:
        """Compute a step, and keep what it accesses of the memory that there was before, and its result's."""
        before = set(self._accesses)
        step = self.step = Step()
        try:
            result = function()
        finally:
            self.step = None
        for kept in (step.reads, step.writes):
            for memory in kept.keys() - before:
                del kept[memory]
        step.writes.update({self.take(tensor): tensor for tensor in tensors_of(result)})
        return step, result

    @contextmanager
    def not_watching(self) -> Iterator[None]:
        """Operations meanwhile are nobody's."""
        before, self.is_watching = self.is_watching, False
        try:
            with _disable_current_modes():
                yield
        finally:
            self.is_watching = before

    def synchronize(self) -> None:
        """The host waits for everything."""
        for clock in list(self.clocks.values()):
            self.host_waits_for(clock)


class _Operations(TorchDispatchMode):
    """Every operation of torch is an access by the current stream, or by the host where all of it is on the host."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        self.order = order

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        schema, order = function._schema, self.order
        if any(output.alias_info is not None and not output.alias_info.is_write for output in schema.returns):
            return result  # a view
        reads: list[torch.Tensor] = []
        writes: list[torch.Tensor] = []
        given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
        for argument in schema.arguments:
            tensors = [leaf for leaf in tree_leaves(given.get(argument.name)) if isinstance(leaf, torch.Tensor)]
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            (writes if is_written else reads).extend(tensors)
        inputs = [*reads, *writes]
        for tensor in inputs:
            order.take(tensor, on_host=not order.knows(tensor))  # nobody made it here or registered it
        given_memory = set(map(order.take, inputs))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        made = [tensor for tensor in made if order.take(tensor) not in given_memory]  # nor what is given back
        if order.step is not None:
            order.step.reads.update({order.take(tensor): tensor for tensor in reads})
            order.step.writes.update({order.take(tensor): tensor for tensor in writes})
            return result
        is_host = bool(inputs) and all(map(order.is_on_host, inputs))
        for tensor in made:
            order.take(tensor, on_host=is_host)
        name = function.overloadpacket._qualified_op_name.split("::")[1]
        order.access(HOST if is_host else order.current, name, reads, [*writes, *made])
        if (name == "_local_scalar_dense" and not is_host) or (name == "copy_" and self._waits(args, kwargs)):
            order.host_waits_for(order.clocks[order.current])
        return result

    def _waits(self, args: Any, kwargs: Any) -> bool:
        is_blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return is_blocking and self.order.is_on_host(args[0]) != self.order.is_on_host(args[1])


class _HostMemory(TorchFunctionMode):
    """What is made without `device=` is the host's; reading memory as an array is the host's access."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        self.order = order

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.record_stream:
            return None
        kwargs.pop("pin_memory", None)
        if not self.order.is_watching or self.order.step is not None:
            return function(*args, **kwargs)
        if function is torch.Tensor.numpy:
            self.order.access(HOST, "numpy", [args[0]], [])
        is_made = not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs)))
        if not is_made or kwargs.get("device") is not None:
            return function(*args, **kwargs)
        with _disable_current_modes():
            result = function(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.order.take(leaf, on_host=True)
        return result


class _Event:
    def __init__(self, order: Order) -> None:
        self.order = order
        self.clock: Counter[str] = Counter()
        self.seconds = 0.0

    def record(self) -> None:
        self.clock = self.order.clocks[self.order.current] | self.order.clocks[HOST]
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        self.order.host_waits_for(self.clock)

    def elapsed_time(self, later: _Event) -> float:
        return 1e3 * (later.seconds - self.seconds)


class _Stream:
    def __init__(self, order: Order, name: str) -> None:
        self.order = order
        self.name = name
        order.clocks.setdefault(name, Counter())

    def wait_event(self, event: _Event) -> None:
        self.order.clocks[self.name] |= event.clock

    def wait_stream(self, other: _Stream) -> None:
        self.order.clocks[self.name] |= self.order.clocks[other.name] | self.order.clocks[HOST]

    def synchronize(self) -> None:
        self.order.host_waits_for(self.order.clocks[self.name])


@contextmanager
def simulated_streams() -> Iterator[Order]:
    """Streams and events as above, in place of CUDA's, for this thread."""
    order = Order()

    @contextmanager
    def current(stream: _Stream) -> Iterator[None]:
        before, order.current = order.current, stream.name
        try:
            yield
        finally:
            order.current = before

    stand_ins: dict[str, Any] = {
        "Stream": lambda: _Stream(order, f"stream {len(order.clocks)}"),
        "Event": lambda enable_timing=False: _Event(order),
        "current_stream": lambda device: _Stream(order, order.current),
        "stream": current,
        "device": lambda device: nullcontext(),
        "graph_pool_handle": object,
    }
    with pytest.MonkeyPatch.context() as patch, ExitStack() as modes:
        for name, stand_in in stand_ins.items():
            patch.setattr(torch.cuda, name, stand_in)
        modes.enter_context(_HostMemory(order))
        modes.enter_context(_Operations(order))
        yield order


@dataclass(frozen=True)
class _Graph:
    """A step that was captured: a replay computes it anew, and leaves its result where the first was."""

    order: Order
    name: str
    function: Callable[[], Any]
    step: Step
    result: Any

    def replay(self) -> None:
        with self.order.not_watching():  # what it accesses is known
            for place, value in zip(tensors_of(self.result), tensors_of(self.function()), strict=True):
                place.copy_(value)
        self.access()

    def access(self) -> None:
        """What the step reads and writes, on the current stream."""
        accessed = list(self.step.reads.values()), list(self.step.writes.values())
        self.order.access(self.order.current, self.name, *accessed)


class SimulatedGraphSteps(GraphSteps[CsmState]):
    """`GraphSteps` as it is, but for the capture itself."""

    def __init__(self, model: Csm, slots: Slots[CsmState], order: Order) -> None:
        super().__init__(model, slots)
        self._order = order
        for tensor in tensors_of((model.weights, model.codec, slots.state)):
            order.take(tensor)

    def _capture_on(self, step: Callable[[], Result], stream: Any, pool: Any) -> tuple[Any, Result]:
        with torch.cuda.stream(stream):
            with self._order.not_watching():
                for _ in range(WARM_UPS):
                    step()
            accessed, result = self._order.capture(step)
            graph = _Graph(self._order, f"a step on {stream.name}", step, accessed, result)
            graph.access()  # as the warm-ups did
            stream.synchronize()
        return graph, result
