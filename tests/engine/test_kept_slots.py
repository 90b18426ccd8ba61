"""Between two pieces of what is being played, the slot is kept: for no longer than it plays, and for nobody else."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from aloud.engine.admission import KEPT_SECONDS
from aloud.engine.loop import Loop
from aloud.engine.slots import allocate_slots
from aloud.engine.steps import EagerSteps
from aloud.engine.stream import Job, Stream
from aloud.errors import StepFailed
from aloud.request import Guards, Prompt, Sampling
from scripted import CODEBOOKS, FRAME_RATE, ScriptedModel, State, said

FRAMES = 3
PLAYS_SECONDS = (FRAMES + 1) / FRAME_RATE  # the end is taken for a frame


class Played:
    """A loop whose time stands still unless a test moves it; every stream says FRAMES frames."""

    def __init__(self, slots: int = 1, prefill_size: int = 64) -> None:
        self.seconds = 100.0
        self.model = ScriptedModel(
            {seed: [said(10 * seed + frame) for frame in range(FRAMES)] for seed in range(1, 30)}
        )
        steps: EagerSteps[State] = EagerSteps(
            self.model, allocate_slots(self.model, slots, None), batch_sizes=(1, 2, 3, 4)
        )
        steps.prefill_sizes = (prefill_size,)
        self.loop = Loop(steps, slots, FRAME_RATE, clock=lambda: self.seconds)
        self.text = object()

    def piece(self, seed: int, *, goes_on: bool = False, is_followed: bool = True, full_pace: bool = False) -> Stream:
        """A piece of the text that is played."""
        lead = None if full_pace else 60.0
        return self.submit(seed, lead, goes_on=goes_on, utterance=self.text, is_followed=is_followed)

    def other(self, seed: int, positions: int = 5) -> Stream:
        """Somebody else's."""
        return self.submit(seed, 60.0, positions=positions)

    def submit(self, seed: int, lead_seconds: float | None, *, positions: int = 5, **given: Any) -> Stream:
        prompt = Prompt(torch.arange(positions), torch.zeros(positions, CODEBOOKS, dtype=torch.int64))
        job = Job(prompt, Sampling(), seed, 100, Guards.off(), None, lead_seconds=lead_seconds, **given)
        return self.loop.submit(job)

    def run(self, steps: int = 10) -> None:
        for _ in range(steps):
            self.loop.step()


def test_the_next_piece_goes_before_all_who_wait() -> None:
    played = Played()
    first, other = played.piece(1), played.other(2)
    played.run()
    assert first.is_over
    assert other.slot < 0
    assert not other.is_over
    second = played.piece(3, goes_on=True, is_followed=False)
    played.run(2)
    assert second.slot == 0
    played.run(20)
    assert [stream.finish_reason for stream in (first, second, other)] == ["end"] * 3
    assert [stream.seed for stream in played.model.started] == [1, 3, 2]
    assert played.loop.is_idle


def test_others_have_the_slots_that_are_not_kept() -> None:
    played = Played(slots=2)
    played.piece(1)
    others = [played.other(seed) for seed in range(2, 6)]
    played.run(60)
    assert all(other.is_over for other in others)


def test_it_is_kept_for_as_long_as_is_played_and_half_a_second() -> None:
    played = Played()
    played.piece(1)
    other = played.other(2)
    played.run()
    played.seconds += PLAYS_SECONDS + KEPT_SECONDS - 0.001
    played.run()
    assert other.slot < 0
    assert not other.is_over
    assert played.loop.step() == pytest.approx(0.001)  # who drives comes back in time
    played.seconds += 0.002
    played.run()
    assert other.is_over
    late = played.piece(3, goes_on=True)  # now it is one of many
    played.run()
    assert late.is_over


def test_who_drives_in_a_thread_lets_it_go_in_time() -> None:
    model = ScriptedModel({seed: [said(10 * seed)] for seed in (1, 2)})
    steps: EagerSteps[State] = EagerSteps(model, allocate_slots(model, 1, None))
    loop = Loop(steps, 1, FRAME_RATE)
    until = threading.Event()
    thread = threading.Thread(target=loop.run, args=(until,))
    thread.start()
    prompt = Prompt(torch.arange(5), torch.zeros(5, CODEBOOKS, dtype=torch.int64))
    pieces = (Job(prompt, Sampling(), 1, 9, Guards.off(), None, None, 0.4, utterance=object(), is_followed=True),
              Job(prompt, Sampling(), 2, 9, Guards.off(), None, None, 0.4))  # fmt: skip
    first, other = [loop.submit(piece) for piece in pieces]
    assert loop.next(first) is not None
    assert loop.next(other) is not None  # nobody else wakes it
    until.set()
    loop.wake()
    thread.join(10)
    assert not thread.is_alive()


def test_it_is_let_go_when_nothing_more_comes() -> None:
    played = Played()
    played.piece(1)
    other = played.other(2)
    played.run()
    assert not other.is_over
    played.loop.let_go(played.text)
    played.run()
    assert other.is_over
    played.loop.let_go(played.text)  # of what has none
    played.loop.let_go(object())


@pytest.mark.parametrize("how", ["it is the last", "full pace", "cancelled", "failed"])
def test_nothing_is_kept_for_what_does_not_go_on(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played()
    piece = played.piece(1, is_followed=how != "it is the last", full_pace=how == "full pace")
    played.run(2)
    if how == "cancelled":
        played.loop.cancel(piece)
    if how == "failed":
        monkeypatch.setattr(played.model, "draw", lambda *_: 1 / 0)
        played.run(1)
        monkeypatch.undo()
        assert isinstance(piece.error, StepFailed)
    other = played.other(2)
    played.run(20)
    assert piece.is_over
    assert other.finish_reason == "end"


@pytest.mark.parametrize("how", ["before it is seen", "before it has the slot", "all of them"])
def test_a_next_piece_that_is_cancelled_leaves_the_slot_to_others(how: str) -> None:
    played = Played()
    played.piece(1)
    played.run()
    second, other = played.piece(3, goes_on=True), played.other(2)
    if how == "all of them":
        played.loop.cancel_all()
        other = played.other(4)
    else:
        if how == "before it has the slot":
            played.loop._take_inbox()
        played.loop.cancel(second)
        played.loop.let_go(played.text)
    played.run()
    assert second.finish_reason == "cancelled"
    assert other.finish_reason == "end"
    assert played.loop.is_idle


def test_a_next_piece_that_is_cancelled_while_it_is_taken_in_has_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played()
    played.piece(1)
    played.run()
    second, other = played.piece(3, goes_on=True), played.other(2)

    def refusal(_: Stream) -> None:  # another thread, at this moment
        played.loop.cancel(second)

    monkeypatch.setattr(played.loop, "_refusal", refusal)
    other.is_refusable = True
    played.run()
    assert (second.finish_reason, second.slot) == ("cancelled", -1)
    assert other.finish_reason == "end"
    assert len(played.loop._free) == 1


def test_nothing_is_kept_of_what_is_cancelled_as_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played()
    first, other = played.piece(1), played.other(2)

    def plays_until(slot: int, now: float) -> float:  # another thread, before there is anything to let go
        first.cancelled = True
        played.loop.let_go(played.text)
        return now + 100.0

    monkeypatch.setattr(played.loop.scheduler, "plays_until", plays_until)
    played.run(20)
    assert first.is_over
    assert other.finish_reason == "end"


def test_an_interrupt_frees_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(slots=2)
    played.piece(1)
    played.run()
    played.other(2)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(played.model, "draw", interrupt)
        with pytest.raises(KeyboardInterrupt):
            played.run()
    others = [played.other(seed) for seed in (4, 5)]
    played.run(1)
    assert played.loop.used_slots == 2
    played.run()
    assert [other.finish_reason for other in others] == ["end", "end"]


def test_a_kept_slot_is_no_stream_that_runs_and_counts_for_those_who_ask() -> None:
    played = Played(slots=40)
    for rows, seconds in ((1, 0.04), (2, 0.06), (3, 0.078), (4, 0.096)):
        played.loop.scheduler.observe_frame(rows, seconds)
    played.piece(1)
    played.run()
    assert (played.loop.is_idle, played.loop.used_slots, played.loop.waiting) == (True, 0, 0)

    def asked(seed: int) -> Stream:
        prompt = Prompt(torch.arange(5), torch.zeros(5, CODEBOOKS, dtype=torch.int64))
        job = Job(prompt, Sampling(), seed, 100, Guards.off(), None, lead_seconds=60.0)
        stream = played.loop.submit(job, is_refusable=True)
        played.loop._take_inbox()
        return stream

    assert [asked(seed).error is None for seed in (2, 3)] == [True, False]  # 2 in 0.072 s a frame, and 3 not
    played.loop.let_go(played.text)
    assert asked(4).error is None


def test_the_prompt_of_what_is_played_is_read_before_those_of_newcomers(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(slots=4, prefill_size=4)
    monkeypatch.setattr(played.loop, "_time_passes", played.loop._passes.clear)  # so there is one pass a tick
    played.piece(1)
    played.run()
    newcomers = [played.other(seed, positions=40) for seed in (2, 3)]
    played.run(2)
    assert all(newcomer.slot >= 0 for newcomer in newcomers)
    second = played.piece(4, goes_on=True)
    played.run(2)
    assert second.read_positions == 5
    assert [newcomer.read_positions < 40 for newcomer in newcomers] == [True, True]
    played.run(60)
    assert [stream.finish_reason for stream in (second, *newcomers)] == ["end"] * 3


def test_who_was_cancelled_while_its_prompt_waited_counts_for_nobody_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(slots=40)
    for rows, seconds in ((1, 0.04), (2, 0.06), (3, 0.078), (4, 0.096)):
        played.loop.scheduler.observe_frame(rows, seconds)
    monkeypatch.setattr(played.loop.scheduler, "prefill_positions", lambda *_: 0)
    streams = [played.other(seed) for seed in range(1, 10)]
    played.run(1)
    for stream in streams:
        played.loop.cancel(stream)
    prompt = Prompt(torch.arange(5), torch.zeros(5, CODEBOOKS, dtype=torch.int64))
    job = Job(prompt, Sampling(), 20, 100, Guards.off(), None, lead_seconds=60.0)
    asked = [played.loop.submit(job, is_refusable=True) for _ in range(3)]
    played.loop._take_inbox()
    assert [stream.error is None for stream in asked] == [True, True, False]


def test_how_much_of_what_is_played_waits_to_be_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(slots=9)
    said: list[int] = []
    given = iter([0, 0, 3, 64, 64])

    def prefill_positions(now: float, planned: Sequence[int], urgent: int) -> int:
        said.append(urgent)
        return 0 if planned else next(given)

    monkeypatch.setattr(played.loop.scheduler, "prefill_positions", prefill_positions)
    played.other(1, positions=40)
    played.run(1)
    cancelled, *_ = [played.submit(seed, 60.0, goes_on=True, positions=7) for seed in (2, 3, 4)]
    played.run(1)
    played.submit(5, None, goes_on=True)  # nobody plays it
    played.loop.cancel(cancelled)
    played.run(2)
    assert said == [0, 21, 14, 14, 7, 7]  # a pass and a look at a second one, in each of the last two steps
