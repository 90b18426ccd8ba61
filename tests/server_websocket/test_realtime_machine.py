"""A state machine against `/v1/realtime`: any event in any order; the model says what must come.

As with the other socket, behind each event goes a fence: an unknown event, which is answered by an error that names it.
"""

from __future__ import annotations

import base64
import json
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from server_websocket.quick_speech import LongFrames, Quick, quick_server
from server_websocket.socket_oracle import Manner, Oracle, Said, encoded
from server_websocket.test_socket_machine import entered, faults, frames, tasks_of

from aloud.server.connection import SocketLimits
from aloud.server.realtime import PLAYED_RESPONSES
from live.quick import until

SEED = 11
MOST_CHARACTERS = 400
MOST_PASTS = 16  # that may be at once: all are tried while nothing is read, and the server waits 30 s for a reader
LIMITS = SocketLimits(sockets=1, errors=10**6, buffered_events=1)
BEGIN = ["response.created", "response.output_item.added", "response.content_part.added"]
BEGIN += ["response.output_audio_transcript.delta"]
END = ["response.output_audio.done", "response.output_audio_transcript.done", "response.content_part.done"]
END += ["response.output_item.done", "response.done"]
DELTA = "response.output_audio.delta"
Event = dict[str, Any]

WRONG: list[tuple[str | bytes, str]] = [
    ("{", "invalid_message"),
    ("[]", "invalid_message"),
    (b"\x00", "invalid_message"),
    ('{"type": 1}', "invalid_message"),
    ("{}", "unknown_event"),
    ('{"type": "conversation.item.create"}', "item_missing"),
    ('{"type": "conversation.item.create", "item": {"content": []}}', "invalid_message"),
    ('{"type": "conversation.item.create", "item": {"content": [{"type": "text", "text": 5}]}}', "invalid_message"),
    ('{"type": "response.create", "response": {"input": [{"content": "Hello."}]}}', "invalid_message"),
    ('{"type": "response.cancel", "event_id": "\\ud800"}', "invalid_message"),
    ('{"type": "session.update", "session": {"audio": {"output": {"voice": "nobody"}}}}', "voice_not_found"),
    ('{"type": "session.update", "session": {"audio": {"output": {"speed": 1.5}}}}', "invalid_message"),
    ('{"type": "response.cancel", "response_id": "another"}', "response_cancel_not_active"),
]  # fmt: skip
TEXTS = st.sampled_from(
    ["Hello there, my friend.", "Yes. No. And so on, and so on.", "Well", "早上好。你好。", "x" * 90]
)


class Realtime(RuleBasedStateMachine):
    """One socket after the other."""

    quick: Quick
    oracle: Oracle
    counts: Counter[str]
    tasks: list[str]

    @initialize()
    def enter(self) -> None:
        self.client = entered(self.quick, "/v1/realtime")
        assert self.client.receive()["type"] == "session.created"
        self.sent: deque[Event] = deque()
        self.fences = 0
        self.voice = 0
        self.items: list[str] = []  # that wait
        self.last_item: str | None = None
        self.pasts: tuple[tuple[Said, ...], ...] = ((),)
        self.has_spoken = False
        self.text: str | None = None  # of the response that is being spoken
        self.due: list[str] = []  # its events that must come still; deltas may come before the END
        self.audio = b""
        self.is_cancelled = False
        self.id = ""
        self.item_id: str | None = None  # of the response that is being spoken, from when it is told
        self.item_ids: list[str] = []  # of all responses
        self.sent_frames: list[int] = []  # of those that are over
        self.told: set[str] = set()  # types of ignored events

    # --- what is sent -------------------------------------------------------------------------------------------------

    def send(self, reads: bool, message: Event, wire: Any = None) -> None:
        self.fences += 1
        self.counts["messages"] += 2
        wire = message if wire is None else wire
        self.client.socket.send(wire if isinstance(wire, (str, bytes)) else json.dumps(wire))
        self.client.send("fence", event_id=f"fence-{self.fences}")
        self.sent.append(message | {"fence": f"fence-{self.fences}"})
        if reads or len(self.sent) > 10:
            self.read()

    @rule(text=TEXTS, reads=st.booleans())
    def item(self, text: str, reads: bool) -> None:
        content = [{"type": "input_text", "text": text}]
        self.send(reads, {"type": "conversation.item.create", "event_id": "mine", "item": {"content": content}})

    @rule(text=st.none() | TEXTS, reads=st.booleans())
    def respond(self, text: str | None, reads: bool) -> None:
        # Each response that is cancelled may have had one frame more than was heard.
        cancelled = sum(message["type"] == "response.cancel" for message in self.sent)
        if len(self.pasts) * 2**cancelled > MOST_PASTS:
            self.hear_a_whole_response()
        self.ask(text, reads)

    def ask(self, text: str | None, reads: bool) -> None:
        given = {} if text is None else {"input": [{"role": "user", "content": [{"type": "text", "text": text}]}]}
        self.send(reads, {"type": "response.create", "event_id": "mine", "response": given})

    @rule(reads=st.booleans())
    def cancel(self, reads: bool) -> None:
        self.send(reads, {"type": "response.cancel", "event_id": "mine"})

    @rule(
        heard=st.sampled_from([0, 40, 80, 81, 400, 10**6]),
        back=st.sampled_from([1, 1, 1, 2, 3, 100]),
        reads=st.booleans(),
    )
    def truncate(self, heard: int, back: int, reads: bool) -> None:
        """Tell how much was heard of the last response, which may still be spoken, or of one before it."""
        self.read()
        item_id = self.item_ids[-back] if back <= len(self.item_ids) else "another"
        given = {"item_id": item_id, "content_index": 0, "audio_end_ms": heard}
        self.send(reads, {"type": "conversation.item.truncate", "event_id": "mine", **given})

    @rule(text=TEXTS, milliseconds=st.sampled_from([0, 0, 1, 20, 60]))
    def interrupt(self, text: str, milliseconds: int) -> None:
        """Barge in on a response of which nothing was read."""
        self.respond(text, False)
        time.sleep(milliseconds / 1000)
        self.cancel(False)

    @rule(voice=st.sampled_from([0, 1]), reads=st.booleans())
    def update(self, voice: int, reads: bool) -> None:
        output = {"voice": ("alloy", "ash")[voice]}
        self.send(reads, {"type": "session.update", "event_id": "mine", "session": {"audio": {"output": output}}})

    @rule(wrong=st.sampled_from(WRONG), reads=st.booleans())
    def mistake(self, wrong: tuple[str | bytes, str], reads: bool) -> None:
        self.send(reads, {"type": "wrong", "code": wrong[1]}, wrong[0])

    @rule(action=st.sampled_from(["append", "commit"]), reads=st.booleans())
    def microphone(self, action: str, reads: bool) -> None:
        self.send(reads, {"type": f"input_audio_buffer.{action}", "event_id": "mine", "audio": ""})

    @rule(milliseconds=st.sampled_from([1, 5, 20]))
    def wait(self, milliseconds: int) -> None:
        time.sleep(milliseconds / 1000)

    @rule()
    def settle(self) -> None:
        self.read()
        while self.text is not None:
            self.heard(self.client.receive())

    def hear_a_whole_response(self) -> None:
        """Which tells what was said before it."""
        self.settle()
        self.ask("Well", True)
        self.settle()
        assert len(self.pasts) <= 2

    # --- what must come -----------------------------------------------------------------------------------------------

    def read(self) -> None:
        while self.sent:
            message, events = self.sent.popleft(), []
            while (event := self.client.receive())["type"] != "error" or event["error"]["event_id"] != message["fence"]:
                events.append(event)
            self.segment(message, events)

    def segment(self, message: Event, events: list[Event]) -> None:
        """An event that was sent, and all that came up to its fence."""
        errors = [event for event in events if event["type"] == "error"]
        assert len(errors) <= 1
        code = errors[0]["error"]["code"] if errors else None
        before = [event["type"] for event in (events[: events.index(errors[0])] if errors else events)]
        is_active, may_be_over = self.text is not None, "response.done" in before
        self.counts[message["type"] if code is None else code] += 1
        if code is not None and message["type"] != "wrong":
            assert errors[0]["error"]["event_id"] == "mine"
        match message["type"]:
            case "wrong":
                # With an id that is not given, a cancel is wrong whatever is being spoken.
                late = ["cannot_update_voice"] if message["code"] == "voice_not_found" and self.has_spoken else []
                assert code in (late or [message["code"]]), (message, errors)
            case "input_audio_buffer.append" | "input_audio_buffer.commit" as kind:
                assert code == (None if kind in self.told else "event_ignored")
                self.told.add(kind)
            case "conversation.item.create":
                (text,) = (part["text"] for part in message["item"]["content"])
                if sum(map(len, [*self.items, text])) + len(self.items) + 1 > MOST_CHARACTERS:
                    assert code == "input_too_long"
                    self.hear(events)
                    return
                assert code is None
                self.items.append(text)
                added, done = (event for event in events if event["type"].startswith("conversation.item."))
                assert (added["type"], done["type"]) == ("conversation.item.added", "conversation.item.done")
                assert added["item"]["content"][0]["text"] == text
            case "session.update":
                voice = ("alloy", "ash").index(message["session"]["audio"]["output"]["voice"])
                if self.has_spoken and voice != self.voice:
                    assert code == "cannot_update_voice"
                else:
                    assert code is None
                    self.voice = voice
                assert ("session.updated" in [event["type"] for event in events]) == (code is None)
            case "response.create":
                self._created(message, code, is_active=is_active, may_be_over=may_be_over, events=events)
            case "response.cancel":
                if code is None:
                    assert is_active, events
                    assert may_be_over, (self.due, events)
                    self.is_cancelled = True
                else:
                    assert code == "response_cancel_not_active"
                    assert not is_active or may_be_over, (self.due, events)
            case "conversation.item.truncate":
                self._truncated(message, code, is_active=is_active, events=events)
                return
        self.hear(events)

    def _truncated(self, message: Event, code: str | None, *, is_active: bool, events: list[Event]) -> None:
        """No more of a response stays than was heard, and nothing of those behind it, of which one may be spoken."""
        if message["item_id"] not in self.item_ids[-PLAYED_RESPONSES:]:
            assert code == "item_not_truncatable"
            self.hear(events)
            return
        assert code is None
        place, told = self.item_ids.index(message["item_id"]), ("item_id", "content_index", "audio_end_ms")
        is_spoken = is_active and message["item_id"] == self.item_id
        is_cut = is_spoken or message["audio_end_ms"] < 80 * self.sent_frames[place]
        kinds = [event["type"] for event in events]
        at = kinds.index("conversation.item.truncated")
        assert {name: events[at][name] for name in told} == {name: message[name] for name in told}
        if is_active and is_cut:
            assert "response.done" in kinds[:at]
            self.is_cancelled = True
        del events[at]
        self.hear(events)
        if not is_cut:
            return
        heard, pasts = -(-message["audio_end_ms"] // 80), []
        for past in self.pasts:
            cut, sent = past[place], self.sent_frames[place]
            if heard < (sent if cut.frames is None else cut.frames):
                cut = Said(cut.text, heard)
            pasts.append((*past[:place], cut, *(Said(said.text, 0) for said in past[place + 1 :])))
        self.pasts = tuple(dict.fromkeys(pasts))

    def hear(self, events: list[Event]) -> None:
        for event in events:
            self.heard(event)

    def _created(self, message: Event, code: str | None, *, is_active: bool, may_be_over: bool, events: Any) -> None:
        given = message["response"].get("input")
        if code == "conversation_already_has_active_response":
            assert is_active
            return
        assert not is_active or may_be_over
        if code == "nothing_to_say":
            assert given is None
            assert not self.items
            return
        assert code is None
        texts = self.items if given is None else [item["content"][0]["text"] for item in given]
        assert texts
        if given is None:
            self.items = []
        while self.text is not None:  # the response before it
            self.heard(events.pop(0))
        self.text, self.due, self.audio = " ".join(texts), [*BEGIN, *END], b""
        self.has_spoken, self.is_cancelled, self.item_id = True, False, None

    def heard(self, event: Event) -> None:
        """What comes of a response."""
        kind = event["type"]
        if not kind.startswith("response."):
            return
        self.counts[kind] += 1
        assert self.text is not None, event
        if kind == DELTA:
            assert self.due == END, "audio before its response"
            self.audio += base64.b64decode(event["delta"])
        else:
            assert kind == self.due.pop(0), (event, self.due)
        if kind == "response.created":
            self.id = event["response"]["id"]
        elif kind == "response.output_item.added":
            self.item_id = event["item"]["id"]
            self.item_ids.append(self.item_id)
        elif "response_id" in event:
            assert event["response_id"] == self.id
        if kind != "response.done":
            return
        response, text = event["response"], self.text
        self.text = None
        assert response["id"] == self.id
        assert response["output"][0]["content"][0]["transcript"] == text
        self.counts[response["status"]] += 1
        assert response["status"] == "completed" or self.is_cancelled
        sent = response["usage"]["output_tokens"]
        self.sent_frames.append(sent)
        assert sent == len(self.audio) / (2 * 1920)
        pasts: list[tuple[Said, ...]] = []
        for past in self.pasts:
            heard = tuple(said for said in past if said.frames != 0)
            chunks, _ = self.oracle.turn(Manner(self.voice, SEED), heard, text)
            if encoded("pcm", chunks[:sent], is_whole=True) != self.audio:
                continue
            if response["status"] == "completed":
                pasts += [(*past, Said(text))] if sent == len(chunks) else []
            else:  # one frame may have been on its way to a buffer that was full
                pasts += [(*past, Said(text, handed)) for handed in (sent, sent + 1)]
        assert pasts, ("not what the engine says", text, response)
        self.pasts = tuple(dict.fromkeys(pasts))

    def teardown(self) -> None:
        if not hasattr(self, "client"):
            return
        try:
            self.read()
            if len(self.items) % 2:
                self.settle()
        finally:
            self.client.socket.close()
        loop = self.quick.engine.loop
        until(lambda: loop.is_idle and loop.used_slots == 0 and loop.waiting == 0)
        until(lambda: len(tasks_of(self.quick)) <= len(self.tasks))
        assert not self.quick.steps.wrong


@pytest.fixture
def quick(seed: int) -> Iterator[Quick]:
    drawn = random.Random(seed)
    with quick_server(LIMITS, frames=frames, before_launch=lambda: time.sleep(drawn.choice([0, 0.002]))) as quick:
        yield quick


def test_realtime(quick: Quick, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = LongFrames(1)
    steps.length_of = frames
    session = quick.engine.session

    def seeded(**given: Any) -> Any:
        """A session whose turns have a seed, which Realtime has no field for."""
        made = session(**given)
        stream = made.stream
        made.stream = lambda text, **arguments: stream(text, seed=SEED, **arguments)  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(quick.engine, "session", seeded)
    given = {"quick": quick, "oracle": Oracle(steps), "counts": Counter(), "tasks": tasks_of(quick)}
    profile = settings(
        max_examples=60,
        stateful_step_count=40,
        deadline=None,
        phases=[Phase.reuse, Phase.generate],  # what depends on time is hardly found smaller
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    began = time.monotonic()
    with caplog.at_level(logging.ERROR):
        run_state_machine_as_test(type("Machine", (Realtime,), given), settings=profile)
    given["oracle"].close()  # type: ignore[attr-defined]
    print(f"{time.monotonic() - began:.0f} s", dict(given["counts"]))  # type: ignore[call-overload]
    assert faults(caplog) == []
