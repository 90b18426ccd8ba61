"""What a client of `/v1/audio/speech/stream` must see, written from the protocol's description alone.

Behind each message goes a *fence*, a message of a type that does not exist: it is answered by one error that names it,
and messages are answered in order. So the events before a fence's error, up to the last fence's, are all that its
message was answered with, and speech that came meanwhile. Where speech in the background decides what is right (is the
context still there, has a turn's place become free?) the model takes either answer, if the events so far allow it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from server_websocket.socket_oracle import Chunk, Manner, Oracle, Said, encoded

FRAME_SECONDS = 0.08
Event = dict[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True)
class Bounds:
    """The limits that the server has."""

    contexts: int
    turns: int
    characters: int


@dataclass
class Config:
    """What `session.config` says, for contexts that begin later."""

    manner: Manner = field(default_factory=Manner)
    format: str = "pcm"


@dataclass
class Turn:
    """A turn that was not answered yet."""

    config: Config | None  # of a new context, which begins with this turn
    text: str = ""
    ending: str | None = None
    has_failed: bool = False

    @property
    def fails(self) -> bool:
        return bool(self.text) and not self.text.strip()


@dataclass(frozen=True)
class Past:
    """A context as it may be: the turns behind, and the frames of the stream of bytes since `audio.start`."""

    said: tuple[Said, ...] = ()
    frames: tuple[Chunk, ...] = ()


@dataclass
class Context:
    """What a context has been asked for."""

    config: Config
    turns: list[Turn] = field(default_factory=list)
    pasts: tuple[Past, ...] = (Past(),)
    heard: bytes = b""  # since `audio.start`
    has_started: bool = False
    last_used: int = 0

    @property
    def is_ending(self) -> bool:
        return bool(self.turns) and self.turns[-1].ending == "done"

    @property
    def takes_text(self) -> bool:
        return bool(self.turns) and self.turns[-1].ending is None


class Model:
    """Of one socket."""

    def __init__(self, oracle: Oracle, bounds: Bounds, counts: Counter[str]) -> None:
        self.oracle = oracle
        self.bounds = bounds
        self.counts = counts
        self.config = Config()
        self.contexts: dict[str, Context] = {}
        self._clock = 0

    @property
    def waits(self) -> bool:
        """Whether turns are to be answered still."""
        return any(turn.ending for context in self.contexts.values() for turn in context.turns)

    def segment(self, message: Message, events: list[Event]) -> None:
        """A message that was sent, and the events up to its fence."""
        answers = [event for event in events if is_answer(event)]
        assert len(answers) <= 1, (message, answers)
        answer = answers[0] if answers else None
        code = answer["error"]["code"] if answer is not None and answer["type"] == "error" else None
        name = message.get("context_id", "default")
        ended = [event["context_id"] for event in events if event["type"] == "audio.done"]
        is_gone = name in ended  # the context ended meanwhile, before the message or behind it
        if answer is not None and code is not None:
            before = [event["context_id"] for event in events[: events.index(answer)] if event["type"] == "audio.done"]
            assert code in self.refusals(message, is_gone=name in before), (message, answer, self.contexts.get(name))
            self.counts[code] += 1
            if code == "too_many_turns":
                self._use(self.contexts[name])
        else:
            self.take(message, answer, events, is_gone=is_gone)
        for event in events:
            self.event(event)
        if code is None and message["type"] == "input.text":
            self._evict(name)

    def refusals(self, message: Message, *, is_gone: bool) -> set[str]:
        """The errors that may answer a message; none if it must be taken."""
        if "wrong" in message:
            return set(message["wrong"])
        kind, context = message["type"], self.contexts.get(message.get("context_id", "default"))
        if kind in ("session.config", "input.cancel"):
            return set()
        codes: set[str] = set()
        is_new = context is None or (context.is_ending and is_gone)
        if context is not None and context.is_ending:
            codes.add("context_done")
        if is_new and kind != "input.text":
            codes.add("context_not_found")
        if kind == "input.text" and (is_new or not codes):
            held = context.turns[-1].text if context is not None and context.takes_text else ""
            if len(held) + len(message["text"]) > self.bounds.characters:
                codes.add("input_too_long")
            elif context is None and len(self.contexts) >= self.bounds.contexts and not self._silent():
                codes.add("too_many_contexts")
        if context is None or context.is_ending or context.takes_text:
            return codes
        if len(context.turns) >= self.bounds.turns and not codes:
            codes.add("too_many_turns")
        return codes

    def take(self, message: Message, answer: Event | None, events: list[Event], *, is_gone: bool) -> None:
        """A message that was not refused."""
        assert "wrong" not in message, (message, events)
        kind, name = message["type"], message.get("context_id", "default")
        refusals = self.refusals(message, is_gone=is_gone)
        if kind == "session.config":
            assert answer == {"type": "session.configured", "sample_rate": 24_000}
            self.config = message["config"]
            return
        if kind == "input.cancel":
            assert answer is not None
            assert (answer["type"], answer["context_id"]) == ("audio.cancelled", name)
            return
        assert answer is None
        context = self.contexts.get(name)
        if "context_done" in refusals:
            assert is_gone, ("taken by a context that is done", message)
        assert "input_too_long" not in refusals or is_gone, message
        assert "too_many_contexts" not in refusals, message
        if "too_many_turns" in refusals:
            assert any(event["type"] == "audio.flushed" and event["context_id"] == name for event in events), message
        if kind != "input.text":
            assert context is not None
            assert not context.is_ending
        if context is None:
            context = self.contexts[name] = Context(self.config)
        config = self.config if context.is_ending else None
        if not context.takes_text:
            context.turns.append(Turn(config))
        self._use(context)
        if kind == "input.text":
            context.turns[-1].text += message["text"]
        else:
            context.turns[-1].ending = "flushed" if kind == "input.flush" else "done"

    def event(self, event: Event) -> None:
        """What the server says, on its own account or as an answer."""
        if event["type"] in ("session.configured",) or (event["type"] == "error" and "context_id" not in event):
            return
        name = event["context_id"]
        context = self.contexts.get(name)
        self.counts[event["type"]] += 1
        if event["type"] == "audio.cancelled":
            self._cancelled(context, event)
            return
        assert context is not None, ("of a context that is not there", event)
        assert context.turns, ("with nothing to say", event)
        turn = context.turns[0]
        match event["type"]:
            case "audio.start":
                assert not context.has_started, event
                assert turn.text.strip(), event
                assert event["response_format"] == context.config.format
                assert event["sample_rate"] == 24_000
                context.has_started = True
            case "audio.delta":
                assert context.has_started, "bytes before audio.start"
                # What a format with frames has held back of the turns before comes when the context ends.
                is_held_back = turn.ending == "done" and context.config.format not in ("pcm", "wav")
                assert is_held_back or not turn.has_failed
                context.heard += event["data"]
            case "error":
                assert turn.fails, event
                assert not turn.has_failed, event
                assert event["error"]["code"] == "TextEmpty"
                turn.has_failed = True
            case "audio.flushed" | "audio.done":
                assert event["type"] == f"audio.{turn.ending}", (event, turn)
                self._answered(name, context, turn, event)
            case _:
                raise AssertionError(event)

    def _answered(self, name: str, context: Context, turn: Turn, event: Event) -> None:
        is_done = turn.ending == "done"
        if not turn.text.strip():
            assert turn.fails == turn.has_failed, "its error did not come"
            assert event["finish_reason"] == ("error" if turn.fails else None), event
            assert event["audio_seconds"] == 0
            pasts = tuple(past for past in context.pasts if self._fits(context, past, (), is_whole=is_done))
        else:
            pasts = self._spoken(context, turn, event, is_done=is_done)
        assert pasts, ("not what the engine says", turn, event, context.config, len(context.heard), context.pasts)
        context.pasts = pasts
        del context.turns[0]
        if not is_done:
            return
        del self.contexts[name]
        if context.turns:  # which were taken by a new context, of the same name
            config = context.turns[0].config
            assert config is not None
            self.contexts[name] = Context(config, context.turns, last_used=context.last_used)

    def _spoken(self, context: Context, turn: Turn, event: Event, *, is_done: bool) -> tuple[Past, ...]:
        manner, found = context.config.manner, []
        for past in context.pasts:
            if manner.seed is None:
                found.append(Past((*past.said, Said(turn.text)), ()))
                continue
            frames, reason = self.oracle.turn(manner, past.said, turn.text)
            if event["finish_reason"] != reason or event["audio_seconds"] != round(len(frames) * FRAME_SECONDS, 3):
                continue
            if self._fits(context, past, frames, is_whole=is_done):
                found.append(Past((*past.said, Said(turn.text)), past.frames + frames))
                self.counts["frames"] += len(frames)
        return tuple(found)

    def _cancelled(self, context: Context | None, event: Event) -> None:
        if context is None:
            assert event["audio_seconds"] == 0
            return
        turn = context.turns[0] if context.turns else None
        sent = round(event["audio_seconds"] / FRAME_SECONDS)
        assert turn is not None or sent == 0
        pasts: list[Past] = []
        for past in context.pasts:
            if turn is None or not turn.text.strip() or context.config.manner.seed is None:
                pasts.append(Past(past.said))
                continue
            frames, _ = self.oracle.turn(context.config.manner, past.said, turn.text)
            if not self._fits(context, past, frames[:sent], is_whole=False):
                continue
            # One frame may have been on its way to a buffer that was full.
            for handed in (sent, sent + 1):
                pasts.append(Past((*past.said, Said(turn.text, handed)) if handed else past.said))
        assert pasts, ("not what the engine says", turn, event, context.config, len(context.heard))
        context.pasts, context.turns, context.heard, context.has_started = tuple(dict.fromkeys(pasts)), [], b"", False

    def _fits(self, context: Context, past: Past, frames: tuple[Chunk, ...], *, is_whole: bool) -> bool:
        if context.config.manner.seed is None:
            return True
        return encoded(context.config.format, past.frames + frames, is_whole=is_whole) == context.heard

    def _use(self, context: Context) -> None:
        self._clock += 1
        context.last_used = self._clock

    def _silent(self) -> list[str]:
        return [name for name, context in self.contexts.items() if not context.turns]

    def _evict(self, new: str) -> None:
        if len(self.contexts) > self.bounds.contexts:
            silent = [name for name in self._silent() if name != new]
            del self.contexts[min(silent, key=lambda name: self.contexts[name].last_used)]
            self.counts["evicted"] += 1


def is_answer(event: Event) -> bool:
    """Whether an event is the answer to one message, and not speech."""
    kind = event["type"]
    return kind in ("session.configured", "audio.cancelled") or (kind == "error" and "context_id" not in event)
