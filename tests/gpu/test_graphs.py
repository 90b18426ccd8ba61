"""Captured steps give what the model gives, whatever the batch, the slot, the order of capture and who else speaks.

Where there is no GPU, the same tests run with steps on a CPU, in the batch sizes and one frame ahead as captured ones
are, and with the captured steps' own code but for the capture, over simulated streams, which find what nothing orders.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aloud import Guards, Runtime, Sampling, Segment
from aloud.benchmarks.frame import allocator_counters
from aloud.engine.graphs import BATCH_SIZES, GraphSteps
from aloud.engine.loop import Loop
from aloud.engine.slots import Slots
from aloud.engine.steps import EagerSteps, fitting_size
from aloud.engine.stream import Job, Stream
from aloud.errors import LogitsNotFinite
from aloud.memory import tensors_of
from aloud.models.csm import Csm, CsmState
from aloud.prompt_block import Piece, PromptBlock, pack
from aloud.request import Prompt
from gpu.simulated_streams import Order, SimulatedGraphSteps, simulated_streams
from oracle import csm as oracle

pytestmark = pytest.mark.usefixtures("unfilled_on_a_gpu")
SLOTS, POSITIONS, CODEBOOKS = 8, 720, 3
JOBS = 10
Steps = EagerSteps[CsmState] | GraphSteps[CsmState]
Speech = tuple[np.ndarray, np.ndarray]  # codes [frames, codebooks], samples


@dataclass(repr=False)
class Machine:
    """A model on one device, some jobs of it, and what each says when nothing is captured and it is alone."""

    runtime: Runtime
    jobs: list[Job]
    alone: list[Speech] = field(default_factory=list)
    is_simulated: bool = False
    order: Order | None = None  # what is found of the simulated streams

    @property
    def model(self) -> Csm:
        return self.runtime._model

    @property
    def is_cuda(self) -> bool:
        return self.model.device.type == "cuda"

    def steps(self, slots: int = SLOTS) -> tuple[Steps, CsmState]:
        state = self.model.allocate(slots + 1, POSITIONS)
        allocated = Slots(state, slots, POSITIONS)
        if self.is_cuda:
            return GraphSteps(self.model, allocated), state
        if self.order is not None:
            return SimulatedGraphSteps(self.model, allocated, self.order), state
        sizes = (*(size for size in BATCH_SIZES if size < slots), slots)
        return EagerSteps(self.model, allocated, batch_sizes=sizes, ahead=1), state

    def loop(self, slots: int = SLOTS) -> tuple[Loop, CsmState]:
        steps, state = self.steps(slots)
        return Loop(steps, slots, self.runtime.frame_rate), state

    def of(self, job: Job) -> Speech:
        """What a job says alone, as `alone` has it."""
        with self.order.not_watching() if self.order else nullcontext():
            return alone(self.model, job)

    def assert_same(self, received: Speech, expected: Speech) -> None:
        """The same codes; samples bit for bit on a CPU, and within float32's rounding where libraries choose."""
        np.testing.assert_array_equal(received[0], expected[0])
        assert received[1].shape == expected[1].shape
        atol = 1e-4 * float(np.abs(expected[1]).max(initial=0.0)) if self.is_cuda else 0.0
        np.testing.assert_allclose(received[1], expected[1], rtol=0, atol=atol)


def noise_prompt(positions: int, generator: torch.Generator) -> Prompt:
    """Text and frames in turn."""
    text = torch.randint(0, 100, (positions,), generator=generator)
    codes = torch.randint(1, 60, (positions, CODEBOOKS), generator=generator)
    is_audio = torch.rand(positions, generator=generator) < 0.7
    return Prompt(torch.where(is_audio, -1, text), torch.where(is_audio[:, None], codes, 0))


@torch.no_grad()
def alone(model: Csm, job: Job) -> Speech:
    """The job by the model's own functions: no slots but its own, no graphs, no loop."""
    state = model.allocate(2, POSITIONS)
    model.start(state, 0, job.sampling, job.seed, job.positions)
    block = pack([Piece(0, job.prompt, 0, len(job.prompt), 0)], len(job.prompt), 1)
    model.prefill(state, PromptBlock(block.data.to(model.device)))
    slots = torch.zeros(1, dtype=torch.int64, device=model.device)
    codes, samples = [], []
    for _ in range(job.max_frames):
        codes.append(model.draw(state, slots))
        sound = model.decode(state, codes[-1], slots)
        assert not bool(sound.ended)
        samples.append(sound.samples[0])
    return torch.cat(codes).cpu().numpy(), torch.cat(samples).cpu().numpy()


@pytest.fixture(autouse=True)
def exact_products() -> None:
    """Products in float32, not in TF32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


EAGER, SIMULATED = pytest.param("cpu", id="eager"), pytest.param("simulated", id="simulated")
CAPTURED = pytest.param("cuda", id="captured", marks=pytest.mark.gpu)
of_a_runtime = pytest.mark.parametrize("any_machine", [EAGER, CAPTURED], indirect=True, scope="module")
"""A runtime chooses its steps by its device."""
on_a_gpu = pytest.mark.parametrize("any_machine", [CAPTURED], indirect=True, scope="module")
"""A CPU does not count its allocations."""


@pytest.fixture(scope="module", params=[EAGER, SIMULATED, CAPTURED])
def any_machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """One for all tests of a kind."""
    device = "cuda" if request.param == "cuda" else "cpu"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    seed: int = request.config.getoption("--seed")
    config = oracle.small_config(
        codebooks=CODEBOOKS, rope=oracle.LLAMA3, depth_rope=oracle.DEPTH_LLAMA3, positions=POSITIONS
    )
    folder: Path = oracle.save(oracle.random_model(config, seed), tmp_path_factory.mktemp("checkpoint"))
    runtime = Runtime.load(folder, device=device, dtype="float32", max_streams=SLOTS)
    generator, jobs = torch.Generator().manual_seed(seed), []
    for number in range(JOBS):
        sampling = Sampling(0.9, 20, 0.8, 0) if number % 2 else Sampling(0.0, 0, 0.7, 5)
        prompt = noise_prompt((3, 40, 17, 150)[number % 4], generator)
        jobs.append(Job(prompt, sampling, seed + number, 5 + number % 6, Guards.off(), None))
    made = Machine(runtime, jobs, is_simulated=request.param == "simulated")
    made.alone = [alone(made.model, job) for job in jobs]
    return made


@pytest.fixture
def machine(any_machine: Machine) -> Iterator[Machine]:
    if not any_machine.is_simulated:
        yield any_machine
        return
    with simulated_streams() as order:
        yield replace(any_machine, order=order)


def all_of(loop: Loop, stream: Stream) -> Speech:
    codes, samples = [], []
    while (spoken := loop.next(stream)) is not None:
        codes.append(spoken.codes)
        samples.append(spoken.samples)
    if not codes:
        return np.zeros((0, CODEBOOKS), np.int64), np.zeros(0, np.float32)
    return np.stack(codes), np.concatenate(samples)


def wait_for_device(machine: Machine) -> None:
    """Until what was launched is done: before and after a test reaches into the state."""
    if machine.is_cuda:
        torch.cuda.synchronize()
    if machine.order is not None:
        machine.order.synchronize()


def poison(machine: Machine, state: CsmState, slot: int) -> None:
    """Fill everything that a slot owns with NaN, or with numbers that no stream has."""
    wait_for_device(machine)
    shared = tensors_of(state.scratch)
    for tensor in tensors_of(state):
        if any(tensor is other for other in shared):
            continue
        by_decoder = tensor is state.temperature or tensor is state.top_k
        dimension = 2 if tensor.dim() == 6 else 1 if by_decoder else 0
        assert tensor.shape[dimension] == state.position.shape[0]
        tensor.select(dimension, slot).fill_(torch.nan if tensor.is_floating_point() else 77)
    wait_for_device(machine)


@pytest.mark.parametrize("count", range(1, SLOTS + 1))
def test_together_as_alone(machine: Machine, count: int) -> None:
    loop, _ = machine.loop()
    streams = [loop.submit(job) for job in machine.jobs[:count]]
    for stream, expected in zip(streams, machine.alone, strict=False):
        machine.assert_same(all_of(loop, stream), expected)
    assert loop.is_idle


def test_rows_that_come_and_go(machine: Machine, seed: int) -> None:
    """More jobs than slots, each begun at any tick, every third of them cancelled."""
    random = np.random.default_rng(seed)
    loop, _ = machine.loop(slots=5)
    begins = {number: int(random.integers(0, 12)) for number in range(JOBS)}
    lasts = {number: int(random.integers(1, 6)) for number in range(0, JOBS, 3)}
    streams: dict[int, Stream] = {}
    for tick in range(40):
        for number, begin in begins.items():
            if tick == begin:
                streams[number] = loop.submit(machine.jobs[number])
            if number in lasts and tick == begin + lasts[number]:
                loop.cancel(streams[number])
        loop.step()
    for number, stream in streams.items():
        codes, samples = all_of(loop, stream)
        expected = machine.alone[number]
        if stream.finish_reason == "cancelled":
            expected = expected[0][: len(codes)], expected[1][: len(samples)]
        machine.assert_same((codes, samples), expected)
    assert sum(stream.finish_reason != "cancelled" for stream in streams.values()) >= JOBS - len(lasts)
    assert loop.is_idle


def test_nothing_of_the_stream_before_remains(machine: Machine) -> None:
    loop, state = machine.loop(slots=1)
    for job, expected in zip(machine.jobs[:4], machine.alone, strict=False):
        poison(machine, state, 0)
        machine.assert_same(all_of(loop, loop.submit(job)), expected)
        machine.assert_same(all_of(loop, loop.submit(job)), expected)  # and after an ordinary stream, the same one


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_the_order_of_capture_does_not_matter(machine: Machine, order: str) -> None:
    """Descending is what `capture` does; ascending is what streams that come one after the other lead to."""
    steps, _ = machine.steps()
    sizes = steps.batch_sizes if order == "ascending" else steps.batch_sizes[::-1]
    for size in sizes:
        steps.launch(np.full(size, SLOTS)).read()
    loop = Loop(steps, SLOTS, machine.runtime.frame_rate)
    streams = [loop.submit(job) for job in machine.jobs]
    for stream, expected in zip(streams, machine.alone, strict=True):
        machine.assert_same(all_of(loop, stream), expected)


def test_a_row_is_the_same_in_every_batch_size(machine: Machine) -> None:
    """One stream, and rows of the scratch slot around it."""
    job, expected = machine.jobs[3], machine.alone[3]
    for size in range(1, SLOTS + 1):
        steps, _ = machine.steps()
        steps.start(2, job.sampling, job.seed, job.positions)
        steps.prefill([Piece(2, job.prompt, 0, len(job.prompt), 0)])
        row = size // 2
        slots = np.full(size, SLOTS)
        slots[row] = 2
        frames = [steps.launch(slots).read() for _ in range(job.max_frames)]
        codes = np.stack([frame.codes[row] for frame in frames])
        machine.assert_same((codes, np.concatenate([frame.samples[row] for frame in frames])), expected)


def test_a_frame_is_read_after_later_ones_were_launched(machine: Machine) -> None:
    """What a launch leaves is its own: the next ones do not overwrite it."""
    steps, _ = machine.steps()
    job, expected = machine.jobs[2], machine.alone[2]
    steps.start(0, job.sampling, job.seed, job.positions)
    steps.prefill([Piece(0, job.prompt, 0, len(job.prompt), 0)])
    launched = [steps.launch(np.array([0])) for _ in range(job.max_frames)]
    frames = [launch.read() for launch in launched]
    codes = np.concatenate([frame.codes for frame in frames])
    machine.assert_same((codes, np.concatenate([frame.samples[0] for frame in frames])), expected)


def test_a_stream_is_copied_behind_its_last_launch(machine: Machine) -> None:
    """Its frame may still be under way: the copy goes on as the stream does, in another slot."""
    steps, _ = machine.steps()
    job, expected = machine.jobs[2], machine.alone[2]
    steps.start(0, job.sampling, job.seed, job.positions)
    steps.prefill([Piece(0, job.prompt, 0, len(job.prompt), 0)])
    launched = [steps.launch(np.array([0])) for _ in range(2)]
    stream = steps.copy_stream(0, job.positions + 2)
    steps.launch(np.array([0]))  # which goes on for nobody
    steps.paste_stream(1, stream)
    launched += [steps.launch(np.array([1])) for _ in range(2, job.max_frames)]
    frames = [launch.read() for launch in launched]
    codes = np.concatenate([frame.codes for frame in frames])
    machine.assert_same((codes, np.concatenate([frame.samples[0] for frame in frames])), expected)


def test_a_slot_begins_anew_where_a_stream_was_copied_or_pasted(machine: Machine) -> None:
    """At once, before anything is launched."""
    steps, _ = machine.steps()
    first, job, expected = machine.jobs[2], machine.jobs[5], machine.alone[5]

    def speak_anew() -> None:
        steps.start(0, job.sampling, job.seed, job.positions)
        steps.prefill([Piece(0, job.prompt, 0, len(job.prompt), 0)])
        frames = [steps.launch(np.array([0])).read() for _ in range(job.max_frames)]
        codes = np.concatenate([frame.codes for frame in frames])
        machine.assert_same((codes, np.concatenate([frame.samples[0] for frame in frames])), expected)

    steps.start(0, first.sampling, first.seed, first.positions)
    steps.prefill([Piece(0, first.prompt, 0, len(first.prompt), 0)])
    for _ in range(2):
        steps.launch(np.array([0]))
    stream = steps.copy_stream(0, first.positions + 2)
    speak_anew()
    steps.start(0, job.sampling, job.seed, job.positions)
    steps.paste_stream(0, stream)
    speak_anew()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 255, 256, 257, 511, 512, 513, 700])
def test_prompts_of_any_length(machine: Machine, length: int, generator: torch.Generator) -> None:
    job = replace(machine.jobs[1], prompt=noise_prompt(length, generator), max_frames=4)
    loop, _ = machine.loop(slots=3)
    streams = [loop.submit(job) for _ in range(3)]  # their prompts share passes
    expected = machine.of(job)
    for stream in streams:
        machine.assert_same(all_of(loop, stream), expected)


@of_a_runtime
def test_a_voice_is_its_context(machine: Machine, seed: int) -> None:
    runtime = machine.runtime
    segments = [Segment("Hi there.", oracle.speech_like(0.9, seed), speaker=1), Segment("And more.", speaker=0)]
    given = {"temperature": 0.9, "seed": seed, "max_seconds": 0.8}
    expected = runtime.speak("Hello from Aloud.", context=segments, **given)
    voice = runtime.voice(segments)
    for _ in range(2):
        spoken = runtime.speak("Hello from Aloud.", voice=voice, **given)
        machine.assert_same((spoken.codes, spoken.samples), (expected.codes, expected.samples))


@of_a_runtime
def test_threads_share_a_runtime(machine: Machine, seed: int) -> None:
    runtime = machine.runtime
    texts = ["One.", "Two, and a little more of it.", "Three!"]

    def speak(number: int) -> Speech:
        spoken = runtime.speak(texts[number], seed=seed + number, max_seconds=0.4 + 0.4 * number)
        return spoken.codes, spoken.samples

    expected = [speak(number) for number in range(3)]
    received: dict[int, list[Speech]] = {number: [] for number in range(3)}

    def run(number: int) -> None:
        for _ in range(3):
            received[number].append(speak(number))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    for number, speeches in received.items():
        assert len(speeches) == 3
        for speech in speeches:
            machine.assert_same(speech, expected[number])


def test_an_error_in_one_stream_is_its_own(machine: Machine) -> None:
    loop, state = machine.loop(slots=3)
    jobs = [replace(machine.jobs[number], max_frames=12) for number in (4, 5, 6)]
    expected = [machine.of(job) for job in jobs]
    streams = [loop.submit(job) for job in jobs]
    while not all(stream.frames for stream in streams):
        loop.step()
    wait_for_device(machine)
    state.backbone_cache[:, :, streams[1].slot] = torch.nan
    wait_for_device(machine)
    with pytest.raises(LogitsNotFinite):
        all_of(loop, streams[1])
    for number in (0, 2):
        machine.assert_same(all_of(loop, streams[number]), expected[number])
    machine.assert_same(all_of(loop, loop.submit(jobs[1])), expected[1])  # in the slot that failed
    assert loop.is_idle


def test_suspended_as_if_it_had_not_been(machine: Machine) -> None:
    """A stream of full pace gives its slot away in the middle, and goes on in the same one or in another."""
    for slots in (1, 2):
        loop, _ = machine.loop(slots)
        jobs = [replace(job, lead_seconds=60.0) for job in machine.jobs]
        longest = max(range(len(jobs)), key=lambda number: jobs[number].max_frames)
        slow = [loop.submit(machine.jobs[longest]) for _ in range(slots)]
        while not all(len(stream.frames) >= 2 for stream in slow):
            loop.step()
        live = [loop.submit(job) for job in jobs]
        for stream, expected in zip(live, machine.alone, strict=True):
            machine.assert_same(all_of(loop, stream), expected)
        for stream in slow:
            machine.assert_same(all_of(loop, stream), machine.alone[longest])
        assert loop.counts.suspended == slots
        assert loop.is_idle


# --- everything captured ----------------------------------------------------------------------------------------------


def assert_no_allocation(machine: Machine, loop: Loop, jobs: Sequence[Job], frames: int) -> None:
    """Speak all jobs, over and over, until so many frames of them have been made."""
    device = machine.model.device
    before, made, rounds = allocator_counters(device), 0, 0
    while made < frames:
        streams = [loop.submit(job) for job in jobs]
        for stream, job in zip(streams, jobs, strict=True):
            codes, _ = all_of(loop, stream)
            assert len(codes) == job.max_frames
            made += len(codes)
        rounds += 1
    print(f"{made} frames in {rounds} rounds")
    assert allocator_counters(device) == before


def captured_loop(machine: Machine) -> Loop:
    """A loop over steps that have all been captured."""
    steps, _ = machine.steps()
    if isinstance(steps, GraphSteps):
        costs = steps.capture()
        assert set(costs.frame_seconds) == set(steps.batch_sizes)
        assert set(costs.prefill_seconds) == set(steps.prefill_sizes)
        assert all(seconds > 0 for seconds in (*costs.frame_seconds.values(), *costs.prefill_seconds.values()))
    return Loop(steps, SLOTS, machine.runtime.frame_rate)


def test_all_captured_at_once(machine: Machine) -> None:
    loop = captured_loop(machine)
    for job, expected in zip(machine.jobs[:3], machine.alone, strict=False):
        machine.assert_same(all_of(loop, loop.submit(job)), expected)


@on_a_gpu
@pytest.mark.parametrize("rows", [65, 130])
def test_a_large_batch_is_captured_as_it_is_computed(machine: Machine, rows: int, tmp_path: Path, seed: int) -> None:
    """Rows whose products are a library's: what is replayed is what the same rows draw when nothing is captured.

    In bfloat16, where a head is a product with results of another dtype.
    """
    config = oracle.small_config(codebooks=CODEBOOKS, rope=oracle.LLAMA3, positions=64)
    folder = oracle.save(oracle.random_model(config, seed), tmp_path)
    model = Runtime.load(folder, device="cuda", dtype="bfloat16", max_streams=1).model
    generator = torch.Generator().manual_seed(seed)
    pieces = [Piece(slot, noise_prompt(3, generator), 0, 3, 0) for slot in range(rows)]
    captured, eager = (model.allocate(rows + 1, 64) for _ in range(2))
    steps = GraphSteps(model, Slots(captured, rows, 64))
    for piece in pieces:
        steps.start(piece.slot, Sampling(), seed % 2**32 + piece.slot, 3)
        model.start(eager, piece.slot, Sampling(), seed % 2**32 + piece.slot, 3)
    for some in (pieces[:65], pieces[65:]):
        if not some:
            continue
        size = fitting_size(steps.prefill_sizes, 3 * len(some))
        steps.prefill(some)
        with torch.no_grad():
            model.prefill(eager, PromptBlock(pack(some, size, rows).data.cuda()))
    slots = torch.arange(rows, device="cuda")
    for frame in range(4):
        codes = steps.launch(np.arange(rows)).read().codes
        with torch.no_grad():
            expected = model.draw(eager, slots).cpu().numpy()
        assert (codes >= 0).all()
        # A library may sum in another order when it is captured; rows in which that was felt go apart.
        assert (codes == expected).all(axis=1).mean() > 0.95 - 0.05 * frame


@on_a_gpu
@pytest.mark.parametrize("count", [1, SLOTS])
def test_frames_allocate_nothing(machine: Machine, count: int) -> None:
    jobs = [replace(job, max_frames=250) for job in machine.jobs[:count]]
    assert_no_allocation(machine, captured_loop(machine), jobs, 1000 * count)


@on_a_gpu
def test_prompts_allocate_nothing(machine: Machine, generator: torch.Generator) -> None:
    lengths = [1, 2, 15, 16, 17, 100, 255, 256, 300, 512, 513, 700]
    jobs = [replace(machine.jobs[1], prompt=noise_prompt(length, generator), max_frames=3) for length in lengths]
    assert_no_allocation(machine, captured_loop(machine), jobs, 100)
