"""`Engine`: a runtime's loop in a thread of its own, with many callers, async or not."""

from __future__ import annotations

import asyncio
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Literal, TypeAlias, TypeVar

from aloud import memory
from aloud.api import Runtime
from aloud.arrivals import Arrivals
from aloud.audio import Audio
from aloud.conversation import Conversation
from aloud.engine.driven import join
from aloud.engine.loop import Loop
from aloud.engine.stream import Job, Stream
from aloud.engine_stats import EngineStats, Rate, engine_stats
from aloud.errors import DeviceStuck, EngineClosed, RequestError
from aloud.live_speech import LiveSpeech, Text
from aloud.prepare import (
    check_manner,
    check_voice,
    is_number,
    is_whole,
    read_turns,
    resolve_guards,
    resolve_sampling,
    resolve_seed,
    text_prompt,
    whole_frames,
)
from aloud.request import Guards, Request, Segment
from aloud.session import Session
from aloud.session_caches import SessionCaches
from aloud.speech import joined
from aloud.utterance import Manner, Utterance
from aloud.voice import Voice

Pace: TypeAlias = Literal["realtime", "full"]
Result = TypeVar("Result")
LEAD_SECONDS = 0.4
"""How far a stream runs ahead of being played: what a network and a player may be late."""
MAX_WAITING = 64
DRAIN_POLL_SECONDS = 0.01
ENCODED_AT_ONCE = 2
"""Audio of callers that is encoded at the same time, beside the frames of those who listen."""
SESSION_BYTES = 2 * 1024**3
"""What counts as free where the system does not say what is."""
FAILED_STEPS = 3
"""So many steps that fail one after the other are no accident."""


class Engine:
    """Many live streams over one runtime.

    Use it as a context manager, `with` or `async with`, or `close` it. Several event loops and threads may share one.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        max_waiting: int = MAX_WAITING,
        session_bytes: int | None = None,
        stuck_after_seconds: float = 60.0,
    ) -> None:
        """Allocate, compile and capture what the runtime has not yet, and start the thread.

        max_waiting: requests that may wait for a slot; more are refused with `Overloaded`. Those that play in real time
            wait for each other alone, the others for all.
        session_bytes: what sessions may keep read on the device between their turns, by default half of what is free
            there now. Where it is not enough, the session that spoke longest ago reads its turns again.
        stuck_after_seconds: a step that takes longer is taken for a device that does not answer, and those who wait
            are told so.
        """
        if not is_whole(max_waiting) or max_waiting < 0:
            raise RequestError(f"max_waiting must be a whole number, 0 or more, got {max_waiting!r}.")
        if not is_number(stuck_after_seconds) or not 0 < stuck_after_seconds <= 86_400:
            raise RequestError(f"stuck_after_seconds must be above 0 and at most 86,400, got {stuck_after_seconds!r}.")
        if session_bytes is not None and (not is_whole(session_bytes) or session_bytes < 0):
            raise RequestError(f"session_bytes must be a whole number, 0 or more, got {session_bytes!r}.")
        if not isinstance(runtime, Runtime):
            raise RequestError(
                f"An Engine is made of a Runtime, got {type(runtime).__name__}: Engine(Runtime.load(...))."
            )
        runtime.loop.check_here()
        if runtime.loop.is_run:
            raise RequestError("The runtime has an engine already. Use that one, or close it first.")
        runtime.warm()
        self.runtime = runtime
        self.loop: Loop = runtime.loop
        self.loop.max_waiting = max_waiting
        self.loop.stuck_after_seconds = stuck_after_seconds
        self._arrivals: dict[asyncio.AbstractEventLoop, Arrivals] = {}
        self._speeches: weakref.WeakSet[LiveSpeech] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._is_draining = False
        self._at_work = 0  # what runs and is no speech
        self._rates = Rate()
        if session_bytes is None:
            free = memory.free_bytes(runtime.model.device)
            session_bytes = (SESSION_BYTES if free is None else free) // 2
        self._caches = SessionCaches(session_bytes)
        self._encoders: list[threading.Thread] = []
        self._background = ThreadPoolExecutor(
            ENCODED_AT_ONCE,
            thread_name_prefix="aloud-encode",
            initializer=lambda threads: threads.append(threading.current_thread()),
            initargs=(self._encoders,),
        )
        self._stop = threading.Event()
        self.loop.listen(self._after_step)
        self._thread = threading.Thread(target=self._run, name="aloud-engine", daemon=True)
        self._thread.start()

    def stream(
        self,
        text: Text,
        *,
        speaker: int = 0,
        voice: Voice | None = None,
        context: Sequence[Segment] = (),
        temperature: float | None = None,
        top_k: int | None = None,
        depth_temperature: float | None = None,
        depth_top_k: int | None = None,
        seed: int | None = None,
        max_seconds: float | None = None,
        guards: Guards | None = None,
        pace: Pace = "realtime",
        lead_seconds: float | None = None,
    ) -> LiveSpeech:
        """Say a text and hand out each 80 ms as it is made: `async for chunk in ...`, or `for chunk in ...`.

        text: of any length, or its parts as they come, from an iterator or an async iterator. It is cut into sentences,
            the first at its first clause, and each is spoken behind those before it.
        pace: "realtime" keeps `lead_seconds` (default 0.4) ahead of being played, then lets others run; "full" is as
            fast as can be, with what real-time streams leave: where all slots are taken, it waits while one of those
            has its own, and goes on later.

        The other arguments are those of `Runtime.speak`. What is wrong with them is raised here; `Overloaded`, and
        whatever goes wrong later, by the iteration.
        """
        request = Request(
            text="",
            speaker=speaker,
            context=context,
            temperature=temperature,
            top_k=top_k,
            depth_temperature=depth_temperature,
            depth_top_k=depth_top_k,
            seed=seed,
            max_seconds=max_seconds,
            guards=guards,
            voice=voice,
        )
        check_voice(self.runtime.model, voice)
        return self.speech(text, request, pace, lead_seconds, lambda: self._conversation(request), keeps_context=False)

    async def speak(
        self,
        text: Text,
        *,
        speaker: int = 0,
        voice: Voice | None = None,
        context: Sequence[Segment] = (),
        temperature: float | None = None,
        top_k: int | None = None,
        depth_temperature: float | None = None,
        depth_top_k: int | None = None,
        seed: int | None = None,
        max_seconds: float | None = None,
        guards: Guards | None = None,
    ) -> Audio:
        """Say a text and return all of it, at full pace; the arguments are those of `stream`."""
        speech = self.stream(
            text,
            speaker=speaker,
            voice=voice,
            context=context,
            temperature=temperature,
            top_k=top_k,
            depth_temperature=depth_temperature,
            depth_top_k=depth_top_k,
            seed=seed,
            max_seconds=max_seconds,
            guards=guards,
            pace="full",
        )
        return self.joined([chunk async for chunk in speech], speech)

    def speak_sync(
        self,
        text: Text,
        *,
        speaker: int = 0,
        voice: Voice | None = None,
        context: Sequence[Segment] = (),
        temperature: float | None = None,
        top_k: int | None = None,
        depth_temperature: float | None = None,
        depth_top_k: int | None = None,
        seed: int | None = None,
        max_seconds: float | None = None,
        guards: Guards | None = None,
    ) -> Audio:
        """As `speak`; blocks."""
        speech = self.stream(
            text,
            speaker=speaker,
            voice=voice,
            context=context,
            temperature=temperature,
            top_k=top_k,
            depth_temperature=depth_temperature,
            depth_top_k=depth_top_k,
            seed=seed,
            max_seconds=max_seconds,
            guards=guards,
            pace="full",
        )
        return self.joined(list(speech), speech)

    def session(
        self,
        *,
        voice: Voice | None = None,
        speaker: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        depth_temperature: float | None = None,
        depth_top_k: int | None = None,
        guards: Guards | None = None,
    ) -> Session:
        """A conversation whose context stays read from turn to turn."""
        manner = Request(
            text="",
            speaker=speaker,
            temperature=temperature,
            top_k=top_k,
            depth_temperature=depth_temperature,
            depth_top_k=depth_top_k,
            guards=guards,
            voice=voice,
        )
        check_manner(manner)
        check_voice(self.runtime.model, voice)
        return Session(self, manner, self._conversation(manner, self._caches.keep))

    def stats(self) -> EngineStats:
        """What it does now and has done."""
        return engine_stats(self.loop, self._caches, self._rates, is_draining=self._is_draining)

    @property
    def is_draining(self) -> bool:
        """Whether no new work is taken."""
        return self._is_draining

    def check_health(self) -> None:
        """Raise what keeps the engine from working: `EngineClosed`, or `DeviceStuck`."""
        self.loop.check_here()
        if self._stop.is_set() or not self._thread.is_alive():
            raise EngineClosed("The engine is closed. Make a new one.")
        self.loop.check_stuck()
        if self.loop.failed_in_a_row >= FAILED_STEPS:
            raise DeviceStuck(f"The last {self.loop.failed_in_a_row} steps failed. Restart the process.")

    async def drain(self, limit_seconds: float | None = None) -> bool:
        """Take no new work and wait until all that runs has ended -> whether it has, within the limit."""
        is_late = self._begin_drain(limit_seconds)
        while not (is_drained := self._is_drained()) and not is_late():
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        return is_drained

    def drain_sync(self, limit_seconds: float | None = None) -> bool:
        """As `drain`; blocks."""
        is_late = self._begin_drain(limit_seconds)
        while not (is_drained := self._is_drained()) and not is_late():
            time.sleep(DRAIN_POLL_SECONDS)
        return is_drained

    def _begin_drain(self, limit_seconds: float | None) -> Callable[[], bool]:
        """Take no new work -> whether to wait no longer: the limit is over, or the engine was closed meanwhile."""
        if limit_seconds is not None and not (is_number(limit_seconds) and limit_seconds >= 0):
            raise RequestError(f"limit_seconds must be a number of seconds, 0 or more, got {limit_seconds!r}.")
        self.loop.check_here()
        self._is_draining = True
        end = math.inf if limit_seconds is None else time.monotonic() + limit_seconds
        return lambda: self._stop.is_set() or time.monotonic() > end

    def _is_drained(self) -> bool:
        """Whether nothing runs, if only between two pieces of its text or before its context is encoded."""
        with self._lock:
            if self._at_work:
                return False
            speeches = list(self._speeches)
        return not any(speech.is_running for speech in speeches) and self.loop.is_idle

    def close(self) -> None:
        """End all streams and the threads; the runtime can be used further."""
        self._is_draining = True
        self._stop.set()
        self.loop.wake()
        self._background.shutdown(wait=False)  # what waits there finds the engine closed
        end = time.monotonic() + self.loop.stuck_after_seconds
        for thread in (self._thread, *self._encoders):
            join(thread, max(0.0, end - time.monotonic()))

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # In a thread of its own: those that the event loop lends may all wait for texts.
        closer = ThreadPoolExecutor(1, thread_name_prefix="aloud-close")
        try:
            await asyncio.get_running_loop().run_in_executor(closer, self.close)
        finally:
            closer.shutdown(wait=False)

    def _run(self) -> None:
        """What the thread does; in the end nobody is left waiting, also where a device was stuck until then."""
        try:
            self.loop.run(self._stop)
        finally:
            self._stop.set()
            if not self.loop.is_gone:  # else the process ends, and with it those who wait
                self._tell_closed()

    def _tell_closed(self) -> None:
        """End what runs, from the thread that drove it."""
        with suppress(DeviceStuck):  # as those who wait are told
            self.loop.cancel_all()
        self.loop.stop_listening(self._after_step)
        self._after_step()
        with self._lock:
            speeches = list(self._speeches)
        for speech in speeches:
            speech.engine_closed()

    # --- for sessions -------------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> Stream:
        """Let a job run, if there is room for it; its frames or its end say whether there was."""
        return self._go_on(job, is_refusable=True)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While this is held something runs, which `drain` waits for. Raises `EngineClosed`."""
        with self._lock:
            self._at_work += 1
        try:
            self._check_open()
            yield
        finally:
            with self._lock:
                self._at_work -= 1

    async def in_background(self, work: Callable[[], Result]) -> Result:
        """Do what blocks, to encode audio, in a thread; a few at once, so that frames keep their time."""
        self.loop.check_here()

        def work_if_open() -> Result:
            self._check_not_closed()  # it may have waited for others
            return work()

        try:
            doing = asyncio.get_running_loop().run_in_executor(self._background, work_if_open)
        except RuntimeError as error:  # it has been shut down
            raise EngineClosed("The engine is closed. Make a new one.") from error
        return await doing

    async def wait(self, stream: Stream) -> None:
        """Return when a stream has a frame or is over. Raises `DeviceStuck`."""
        await self._arrivals_here().wait(stream)

    def speech(
        self,
        text: Text,
        request: Request,
        pace: Pace,
        lead_seconds: float | None,
        conversation: Callable[[], Conversation],
        *,
        keeps_context: bool,
        is_taken: bool = False,
        when_over: Callable[[], None] = lambda: None,
        keep_heard: Callable[[object, float], None] = lambda mark, heard_seconds: None,
    ) -> LiveSpeech:
        """Speech of a text behind a conversation, which is asked for when it begins."""
        self._check_open(is_taken)
        check_manner(request)
        model, tokenizer = self.runtime.model, self.runtime.tokenizer
        codec = model.config.codec
        manner = Manner(
            sampling=resolve_sampling(self.runtime.sampling, request),
            seed=resolve_seed(request),
            guards=resolve_guards(request),
            max_frames=whole_frames(request.max_seconds, codec.frame_rate),
            lead_seconds=_lead(pace, lead_seconds),
        )

        def begin() -> Utterance:
            return Utterance(
                self.loop,
                codec,
                conversation(),
                manner,
                lambda piece: text_prompt(model, tokenizer, request.speaker, piece),
                keeps_context=keeps_context,
                submit=self._go_on,
            )

        speech = LiveSpeech(
            self.loop,
            self._arrivals_here,
            text,
            begin,
            check_open=lambda: self._check_open(is_taken),
            begin_in=self.in_background if any(segment.audio is not None for segment in request.context) else None,
            seed=manner.seed,
            guards=manner.guards,
            when_over=when_over,
            keep_heard=keep_heard,
        )
        with self._lock:
            self._speeches.add(speech)
        return speech

    def joined(self, chunks: Sequence[Audio], speech: LiveSpeech) -> Audio:
        """All chunks of a speech as one, without its silent tail."""
        return joined(self.runtime.config.codec, chunks, speech.guards, speech.finish_reason)

    def _conversation(
        self, request: Request, when_read: Callable[[Conversation], None] = lambda _: None
    ) -> Conversation:
        runtime = self.runtime
        conversation = Conversation(runtime.config, request.voice, runtime.max_positions, when_read)
        if request.context:
            left = conversation.free_positions
            for turn in read_turns(runtime.model, runtime.tokenizer, request.context, max_positions=left):
                conversation.add(turn)
            conversation.pin()
        return conversation

    def _go_on(self, job: Job, *, is_refusable: bool = False) -> Stream:
        """Let a job run, also while the engine drains: it may be the next piece of what runs."""
        stream = self.loop.submit(job, is_refusable=is_refusable)
        if self._stop.is_set():  # and `close` may have looked before
            self.loop.cancel(stream)
            raise EngineClosed("The engine is closed. Make a new one.")
        return stream

    def _check_not_closed(self) -> None:
        self.loop.check_here()
        if self._stop.is_set():
            raise EngineClosed("The engine is closed. Make a new one.")

    def _check_open(self, is_taken: bool = False) -> None:
        self._check_not_closed()
        if self._is_draining and not is_taken:
            raise EngineClosed("The engine is draining: it finishes what runs and takes no new work.")

    def _arrivals_here(self) -> Arrivals:
        """Of the event loop that runs in this thread."""
        self.loop.check_here()
        event_loop = asyncio.get_running_loop()
        with self._lock:
            if event_loop not in self._arrivals:
                for other in [other for other, arrivals in self._arrivals.items() if arrivals.is_closed]:
                    del self._arrivals[other]
                self._arrivals[event_loop] = Arrivals(self.loop, event_loop)
            return self._arrivals[event_loop]

    def _after_step(self) -> None:
        self._rates.count(self.loop.scheduler.frames)
        with self._lock:
            everywhere = list(self._arrivals.values())
        for arrivals in everywhere:
            arrivals.announce()


def _lead(pace: Pace, lead_seconds: float | None) -> float | None:
    if pace not in ("realtime", "full"):
        raise RequestError(f'pace must be "realtime" or "full", got {pace!r}.')
    lead = LEAD_SECONDS if lead_seconds is None else lead_seconds
    if not is_number(lead) or not 0.08 <= lead <= 60:
        raise RequestError(f"lead_seconds must be from 0.08 to 60, got {lead_seconds!r}.")
    return None if pace == "full" else float(lead)
