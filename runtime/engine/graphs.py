"""Steps on a GPU: a frame is two captured graphs, its draw and its decode, and the host only replays them.

    main stream:   draw 1 | hand over | draw 2 | hand over | draw 3 ...
    side stream:                        decode 1 -> host     decode 2 -> host ...

A decode reads what its draw has handed over, so it runs beside the next draw; a draw never waits for a decode but to
hand over. Everything that a frame needs of the one before is on the device, so the host launches frame t + 1 before it
has read frame t. Graphs of one kind share a pool of memory, because they run one after the other; the two kinds have
a pool each, because they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from aloud.engine.model import SoundLike, SpeechModel, State
from aloud.engine.slots import Slots
from aloud.engine.steps import HostFrame, Launched, Reading, fitting_size
from aloud.prompt_block import Piece, PromptBlock, pack
from aloud.request import Sampling

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Rows that a frame is captured for, up to the number of streams: padding never doubles the work of large batches."""
PREFILL_SIZES = (16, 64, 128, 256, 512)
"""Positions that a prefill pass is captured for: from 512 on, products take their full speed."""
WARM_UPS = 2
"""Runs before a capture: kernels are compiled and libraries choose their ways in the first."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class FrameGraph:
    """A frame of a fixed number of rows: what is written before a replay, and what a replay writes."""

    draw: torch.cuda.CUDAGraph
    slots: torch.Tensor  # int64 [rows], in
    codes: torch.Tensor  # int64 [rows, codebooks], out
    decode: torch.cuda.CUDAGraph
    drawn_slots: torch.Tensor  # int64 [rows], in: a decode's own copies, since the next draw overwrites the others
    drawn_codes: torch.Tensor  # int64 [rows, codebooks], in
    sound: SoundLike  # out


@dataclass(frozen=True)
class PrefillGraph:
    """A prefill pass of a fixed number of positions."""

    prefill: torch.cuda.CUDAGraph
    block: PromptBlock  # in


@dataclass(frozen=True)
class Costs:
    """What each captured step takes, in streams without context."""

    frame_seconds: dict[int, float]  # by rows
    prefill_seconds: dict[int, float]  # by positions


@dataclass(frozen=True)
class _OnItsWay:
    """A frame whose copies to the host are under way."""

    parts: tuple[torch.Tensor, ...]  # pinned
    begin: torch.cuda.Event
    end: torch.cuda.Event
    before: torch.cuda.Event | None  # the end of the frame before

    def read(self) -> HostFrame:
        self.end.synchronize()
        codes, samples, power, ended = (part.numpy() for part in self.parts)
        took = self.begin.elapsed_time(self.end)
        if self.before is not None:  # where frames overlap, what one more of them takes is less than one alone
            took = min(took, self.before.elapsed_time(self.end))
        return HostFrame(codes, samples, power, ended, took / 1e3)


@dataclass(frozen=True)
class _Timed:
    """The time between two events, the second of which is over when it is asked for."""

    begin: torch.cuda.Event
    end: torch.cuda.Event

    def seconds(self) -> float:
        self.end.synchronize()
        return float(self.begin.elapsed_time(self.end)) / 1e3


class GraphSteps(Generic[State]):
    """Captured steps; see the module. Graphs are captured when they are first needed, or all at once by `capture`."""

    ahead = 1
    prefill_together = True
    prefill_sizes = PREFILL_SIZES

    def __init__(self, model: SpeechModel[State], slots: Slots[State]) -> None:
        """Of a model on a CUDA device."""
        self.batch_sizes = (*(size for size in BATCH_SIZES if size < slots.count), slots.count)
        self._model = model
        self._slots = slots
        self._device = model.device
        self._frames: dict[int, FrameGraph] = {}
        self._prefills: dict[int, PrefillGraph] = {}
        with torch.cuda.device(self._device):
            self._main, self._side = torch.cuda.Stream(), torch.cuda.Stream()
            # Captures have streams of their own. Pinned memory is copied on the others, and where a thread lets go of
            # some, the allocator records an event on them, which a capture does not allow.
            self._draw_capture, self._decode_capture = torch.cuda.Stream(), torch.cuda.Stream()
            self._draw_pool, self._decode_pool = torch.cuda.graph_pool_handle(), torch.cuda.graph_pool_handle()
            self._last_end: torch.cuda.Event | None = None
            self._decoded = torch.cuda.Event()  # the last on the side stream that used the codec's state
        # What was put into the streams' memory by others, such as its first zeros.
        for stream in (self._main, self._side):
            stream.wait_stream(torch.cuda.current_stream(self._device))

    def capture(self, progress: Callable[[str], None] = lambda _: None) -> Costs:
        """Capture everything, the largest first, so that the smaller find their memory there, and time each once.

        progress: called with the name of each step before it is captured.
        """
        scratch = np.array([self._slots.scratch])
        costs = Costs({}, {})
        for positions in reversed(self.prefill_sizes):
            progress(f"prefill of {positions}")
            graph = self._prefill_graph(positions)
            costs.prefill_seconds[positions] = self._time(graph.prefill)
        for rows in reversed(self.batch_sizes):
            progress(f"frame of {rows}")
            self._frame_graph(rows)
            for _ in range(2):  # the first brings the graph to the device
                frame = self.launch(np.repeat(scratch, rows)).read()
            costs.frame_seconds[rows] = frame.seconds
        return costs

    def _time(self, graph: torch.cuda.CUDAGraph) -> float:
        begin, end = self._timing_events()
        with torch.cuda.stream(self._main):
            graph.replay()  # the first brings it to the device
            begin.record()
            graph.replay()
            end.record()
        return _Timed(begin, end).seconds()

    @torch.no_grad()
    def start(self, slot: int, sampling: Sampling, seed: int, positions: int) -> None:
        """See `Steps.start`."""
        with torch.cuda.stream(self._main):
            self._model.start(self._slots.state, slot, sampling, seed, positions)
        with torch.cuda.stream(self._side):  # behind the decodes of the slot's last stream; no draw waits for them
            self._model.start_sound(self._slots.state, slot)
            self._decoded = torch.cuda.Event()
            self._decoded.record()

    @torch.no_grad()
    def prefill(self, pieces: Sequence[Piece]) -> Reading:
        """See `Steps.prefill`."""
        size = fitting_size(self.prefill_sizes, sum(piece.stop - piece.start for piece in pieces))
        graph = self._prefill_graph(size)
        begin, end = self._timing_events()
        with torch.cuda.stream(self._main):
            block = pack(pieces, size, self._slots.scratch, pinned=True)
            begin.record()
            graph.block.data.copy_(block.data, non_blocking=True)
            graph.prefill.replay()
            end.record()
        return _Timed(begin, end)

    @torch.no_grad()
    def copy_prefix(self, slot: int, positions: int) -> torch.Tensor:
        """See `Steps.copy_prefix`."""
        with torch.cuda.stream(self._main):
            return self._model.copy_prefix(self._slots.state, slot, positions)

    @torch.no_grad()
    def paste_prefix(self, slot: int, prefix: torch.Tensor, positions: int) -> None:
        """See `Steps.paste_prefix`."""
        with torch.cuda.stream(self._main):
            prefix.record_stream(self._main)
            self._model.paste_prefix(self._slots.state, slot, prefix, positions)

    @torch.no_grad()
    def copy_stream(self, slot: int, positions: int) -> tuple[torch.Tensor, ...]:
        """See `Steps.copy_stream`."""
        with torch.cuda.stream(self._main):
            self._main.wait_event(self._decoded)  # it writes the codec's part
            stream = self._model.copy_stream(self._slots.state, slot, positions)
        self._side.wait_stream(self._main)  # what comes next to the slot begins there
        return stream

    @torch.no_grad()
    def paste_stream(self, slot: int, stream: tuple[torch.Tensor, ...]) -> None:
        """See `Steps.paste_stream`."""
        with torch.cuda.stream(self._main):
            self._main.wait_event(self._decoded)  # it may still write the state of the slot's last stream
            self._model.paste_stream(self._slots.state, slot, stream)
        self._side.wait_stream(self._main)

    @torch.no_grad()
    def launch(self, slots: np.ndarray) -> Launched:
        """See `Steps.launch`."""
        rows = len(slots)
        graph = self._frame_graph(fitting_size(self.batch_sizes, rows))
        begin, end = self._timing_events()
        handed_over = torch.cuda.Event()
        with torch.cuda.stream(self._main):
            index = torch.full((graph.slots.shape[0],), self._slots.scratch, pin_memory=True)
            index[:rows] = torch.from_numpy(slots)
            begin.record()
            graph.slots.copy_(index, non_blocking=True)
            graph.draw.replay()
            self._main.wait_event(self._decoded)  # of the frame before, which may have the same places
            graph.drawn_codes.copy_(graph.codes)
            graph.drawn_slots.copy_(graph.slots)
            handed_over.record()
        with torch.cuda.stream(self._side):
            self._side.wait_event(handed_over)
            graph.decode.replay()
            outputs = (graph.drawn_codes, graph.sound.samples, graph.sound.power, graph.sound.ended)
            parts = tuple(_to_host(output[:rows]) for output in outputs)
            self._decoded = torch.cuda.Event()
            self._decoded.record()
            end.record()
        before, self._last_end = self._last_end, end
        return _OnItsWay(parts, begin, end, before)

    def _timing_events(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    @torch.no_grad()
    def _frame_graph(self, rows: int) -> FrameGraph:
        if rows not in self._frames:
            state = self._slots.state
            # Rows of the scratch slot: to compile and to capture changes no stream.
            with torch.cuda.stream(self._main):
                slots = torch.full((rows,), self._slots.scratch, device=self._device)
                drawn_slots = slots.clone()
            draw, codes = self._capture(lambda: self._model.draw(state, slots), self._draw_capture, self._draw_pool)
            with torch.cuda.stream(self._main):
                drawn_codes = torch.zeros_like(codes)
            decode, sound = self._capture(
                lambda: self._model.decode(state, drawn_codes, drawn_slots), self._decode_capture, self._decode_pool
            )
            self._frames[rows] = FrameGraph(draw, slots, codes, decode, drawn_slots, drawn_codes, sound)
        return self._frames[rows]

    @torch.no_grad()
    def _prefill_graph(self, positions: int) -> PrefillGraph:
        if positions not in self._prefills:
            state = self._slots.state
            with torch.cuda.stream(self._main):
                data = torch.zeros(4 + self._model.codebooks, positions, dtype=torch.int64, device=self._device)
                data[1] = data[3] = self._slots.scratch
            block = PromptBlock(data)
            graph, _ = self._capture(lambda: self._model.prefill(state, block), self._draw_capture, self._draw_pool)
            self._prefills[positions] = PrefillGraph(graph, block)
        return self._prefills[positions]

    def _capture(
        self, step: Callable[[], Result], stream: torch.cuda.Stream, pool: Any
    ) -> tuple[torch.cuda.CUDAGraph, Result]:
        """Capture a step -> the graph and the step's result, which every replay writes anew."""
        for before in (self._main, self._side):  # what is computed meanwhile uses the same scratch memory
            stream.wait_stream(before)
        return self._capture_on(step, stream, pool)

    def _capture_on(
        self, step: Callable[[], Result], stream: torch.cuda.Stream, pool: Any
    ) -> tuple[torch.cuda.CUDAGraph, Result]:
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Not `torch.cuda.graph`, which collects garbage and waits for the whole device each time. Other threads may
            # allocate meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = step()
            finally:
                graph.capture_end()
        return graph, result


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, on its way; the memory of those that nobody holds any more is used again."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
