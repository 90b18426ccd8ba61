"""A session: a conversation whose context stays read from turn to turn, so that a turn costs only what is new in it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aloud.audio import Audio
from aloud.conversation import Conversation
from aloud.engine.stream import Job, Stream
from aloud.errors import EngineClosed, RequestError, SessionBusy
from aloud.live_speech import LiveSpeech, Text
from aloud.prepare import check_manner, check_prompt, check_text, read_turns, resolve_sampling
from aloud.request import AudioSource, Guards, Prompt, Request, Sampling, Segment

if TYPE_CHECKING:
    from aloud.live import Engine, Pace


@dataclass(frozen=True)
class SessionStats:
    """Where a session stands."""

    positions: int  # of the model's context, voice and turns
    cached_positions: int  # of those, the ones that the next turn need not read
    turns: int
    dropped_turns: int  # the oldest, dropped so that the rest fits
    rebuilds: int  # how often all but the voice had to be read again: for that, or to make room for other sessions


class Session:
    """A conversation over many turns; `Engine.session` makes it.

    It does one thing at a time: what is asked for while something runs raises `SessionBusy`. What was spoken and heard
    is context for what follows, also the part of a turn that was handed out before it was cancelled, or that part of it
    which was heard, if `LiveSpeech.interrupt` says so. When the model's context is full, the oldest turns are dropped
    whole; the voice stays.
    """

    def __init__(self, engine: Engine, manner: Request, conversation: Conversation) -> None:
        """Of a request that says how to speak; its text means nothing."""
        self._engine = engine
        self._manner = manner
        self._conversation = conversation
        self._working = threading.Lock()  # held while something runs

    @property
    def stats(self) -> SessionStats:
        """Where it stands."""
        conversation = self._conversation
        return SessionStats(
            positions=conversation.positions,
            cached_positions=conversation.cached_positions,
            turns=len(conversation.turns),
            dropped_turns=conversation.dropped_turns,
            rebuilds=conversation.rebuilds,
        )

    @property
    def is_busy(self) -> bool:
        """Whether it speaks or hears."""
        return self._working.locked()

    @property
    def turns(self) -> tuple[Prompt, ...]:
        """The turns that are still there, oldest first, as tokens: what `restore` takes."""
        return self._conversation.turns

    def restore(self, turns: Sequence[Prompt]) -> None:
        """Add turns of another session; they are read when the next turn begins.

        Raises a `RequestError` for what is no turn, and for tokens that the model does not have.
        """
        if not isinstance(turns, Sequence):
            raise RequestError(f"Turns are a list of those that `Session.turns` gave, got {type(turns).__name__}.")
        for turn in turns:
            if not isinstance(turn, Prompt):
                raise RequestError(f"Turns are a list of those that `Session.turns` gave, got {type(turn).__name__}.")
            check_prompt(self._engine.runtime.config, turn)
        with self._busy():
            for turn in turns:
                self._conversation.add(turn)
            self._conversation.make_room()

    async def hear(self, text: str, audio: AudioSource | None = None, speaker: int = 1) -> None:
        """Take in a turn of somebody else: its text, its sound if there is any, who spoke.

        Its context is read now, so that the next answer need not wait for it. Raises what `Engine.stream` does.
        """
        with self._busy(), self._engine.at_work():
            segment = Segment(text, audio, speaker)
            # In the background for its sound alone: waiting for a slot holds no thread.
            if audio is None:
                turn = self._turn(segment)
            else:
                turn = await self._engine.in_background(lambda: self._turn(segment))
            with self._reading(turn) as stream:
                if stream is not None:
                    await self._engine.wait(stream)

    def hear_sync(self, text: str, audio: AudioSource | None = None, speaker: int = 1) -> None:
        """As `hear`; blocks."""
        with self._busy(), self._engine.at_work(), self._reading(self._turn(Segment(text, audio, speaker))) as stream:
            if stream is not None:
                self._engine.loop.wait(stream)

    def stream(
        self,
        text: Text,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        depth_temperature: float | None = None,
        depth_top_k: int | None = None,
        seed: int | None = None,
        max_seconds: float | None = None,
        pace: Pace = "realtime",
        lead_seconds: float | None = None,
        is_taken: bool = False,
    ) -> LiveSpeech:
        """Say the next turn; the arguments are those of `Engine.stream`, the others were given to `Engine.session`.

        Sampling that is left out is the session's; what is given for the whole goes for both decoders.
        is_taken: whether the caller took the turn on before, so that it is spoken also while the engine drains.
        """
        if isinstance(text, str):
            check_text(text)
        turn = Request(
            text="",
            speaker=self._manner.speaker,
            temperature=temperature,
            top_k=top_k,
            depth_temperature=depth_temperature,
            depth_top_k=depth_top_k,
            seed=seed,
            max_seconds=max_seconds,
            guards=self._manner.guards,
        )
        check_manner(turn)
        of_session = resolve_sampling(self._engine.runtime.sampling, self._manner)
        request = replace(turn, **vars(resolve_sampling(of_session, turn)))
        release = self._claim()
        try:
            return self._engine.speech(
                text,
                request,
                pace,
                lead_seconds,
                lambda: self._conversation,
                keeps_context=True,
                is_taken=is_taken,
                when_over=release,
                keep_heard=self._keep_heard,
            )
        except BaseException:
            release()
            raise

    async def speak(
        self,
        text: Text,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        depth_temperature: float | None = None,
        depth_top_k: int | None = None,
        seed: int | None = None,
        max_seconds: float | None = None,
    ) -> Audio:
        """Say the next turn and return all of it."""
        speech = self.stream(
            text,
            temperature=temperature,
            top_k=top_k,
            depth_temperature=depth_temperature,
            depth_top_k=depth_top_k,
            seed=seed,
            max_seconds=max_seconds,
            pace="full",
        )
        return self._engine.joined([chunk async for chunk in speech], speech)

    def speak_sync(
        self,
        text: Text,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        depth_temperature: float | None = None,
        depth_top_k: int | None = None,
        seed: int | None = None,
        max_seconds: float | None = None,
    ) -> Audio:
        """As `speak`; blocks."""
        speech = self.stream(
            text,
            temperature=temperature,
            top_k=top_k,
            depth_temperature=depth_temperature,
            depth_top_k=depth_top_k,
            seed=seed,
            max_seconds=max_seconds,
            pace="full",
        )
        return self._engine.joined(list(speech), speech)

    def _keep_heard(self, utterance: object, heard_seconds: float) -> None:
        """Of one of its utterances, which is over, keep what was heard."""
        with self._busy():
            # A frame of which anything was heard counts as heard; no rounding adds one to a whole number of frames.
            frames = math.ceil(min(heard_seconds, 1e9) * self._engine.runtime.frame_rate - 1e-6)
            self._conversation.keep_heard(utterance, frames)

    def _turn(self, segment: Segment) -> Prompt:
        """A turn of somebody else as tokens."""
        runtime = self._engine.runtime
        (turn,) = read_turns(
            runtime.model, runtime.tokenizer, [segment], max_positions=self._conversation.free_positions
        )
        return turn

    @contextmanager
    def _reading(self, turn: Prompt) -> Iterator[Stream | None]:
        """Add a turn to the conversation and have it read: wait for the stream, or for nothing if there is none."""
        conversation = self._conversation
        conversation.add(turn)
        try:
            conversation.make_room()
            cached, unread = conversation.to_read()
            if unread is None:
                yield None
                return
            job = Job(
                prompt=unread,
                sampling=Sampling(),
                seed=0,
                max_frames=0,
                guards=Guards.off(),
                text_limit_frames=None,
                prefix=cached,
                keeps_cache=True,
            )
            stream = self._engine.submit(job)
            try:
                yield stream
            finally:
                self._engine.loop.cancel(stream)
            if stream.error is not None:
                raise stream.error
            if stream.finish_reason == "cancelled":
                raise EngineClosed("The engine was closed while it listened. Make a new one.")
            if stream.prefix is not None:  # else there was no memory to keep it, and the next turn reads it
                conversation.has_read(stream.prefix)
        except BaseException:  # who hears it again shall not have it twice
            conversation.take_back()
            raise

    def _claim(self) -> Callable[[], None]:
        """Be busy until the function that this returns is called."""
        if not self._working.acquire(blocking=False):
            raise SessionBusy("The session is still speaking or hearing. Wait for that, or cancel it.")
        released = threading.Lock()  # taken once: what was claimed later is not released with this

        def release() -> None:
            if released.acquire(blocking=False):
                self._working.release()

        return release

    @contextmanager
    def _busy(self) -> Iterator[None]:
        release = self._claim()
        try:
            yield
        finally:
            release()
