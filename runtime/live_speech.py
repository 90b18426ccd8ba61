"""Speech while it is made, for `async for` and for `for`: drives one utterance with its text, frames and errors."""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeAlias

from aloud.arrivals import Arrivals
from aloud.audio import Audio
from aloud.engine.loop import Loop
from aloud.engine.stream import Stream
from aloud.errors import EngineClosed, RequestError
from aloud.prepare import check_text, is_number
from aloud.request import Guards
from aloud.utterance import Utterance, Want

Text: TypeAlias = str | Iterable[str] | AsyncIterable[str]
"""A text, or its parts as they come."""
_END_OF_TEXT = object()


class LiveSpeech(AsyncIterator[Audio], Iterator[Audio]):
    """What `Engine.stream` returns: iterate for `Audio` chunks of one frame each, with `async for` or with `for`.

    It begins with the first chunk that is asked for. Leaving it, by `aclose`, `cancel`, a cancelled task or because
    nobody holds it any more, frees its slot within a frame. `finish_reason` is None until it is over.

    When it is over before its text is, the rest of the text is not asked for: waiting for an asynchronous part is
    cancelled, which ends a generator that waits; else the iterator stays as it is, for its owner to read on or close.
    """

    def __init__(
        self,
        loop: Loop,
        arrivals: Callable[[], Arrivals],
        text: Text,
        begin: Callable[[], Utterance],
        *,
        check_open: Callable[[], None],
        begin_in: Callable[[Callable[[], Utterance]], Awaitable[Utterance]] | None,
        seed: int,
        guards: Guards,
        when_over: Callable[[], None] = lambda: None,
        keep_heard: Callable[[object, float], None] = lambda mark, heard_seconds: None,
    ) -> None:
        """Of a function that makes the utterance.

        check_open: raises where none may begin any more; asked once, with the first chunk.
        begin_in: runs that where it may block, as long as it takes to encode audio; None where it does not.
        keep_heard: is told the mark of an utterance that is over, and how many seconds of it were heard.
        """
        self.seed = seed
        self.guards = guards
        self._loop = loop
        self._arrivals = arrivals
        self._begin = begin
        self._check_open = check_open
        self._begin_in = begin_in
        self._when_over = when_over
        self._keep_heard = keep_heard
        self._utterance: Utterance | None = None
        self._has_begun = False
        self._is_over = False
        self._is_closed = False  # the engine, before this was over
        self._told_over = threading.Lock()  # taken once
        self._reason_before: str | None = None  # it is over before it began
        self._parts: Iterator[str] | None = None
        self._async_parts: AsyncIterator[str] | None = None
        self._pulling: asyncio.Future[object] | None = None  # the next part of the text, on its way
        self._feeding: ThreadPoolExecutor | None = None  # of one thread, for an iterator that may block
        self._is_whole = isinstance(text, str)
        if isinstance(text, str):
            check_text(text)
            self._parts = iter((text,))
        elif isinstance(text, AsyncIterable):
            self._async_parts = aiter(text)
        elif isinstance(text, Iterable):
            self._parts = iter(text)
        else:
            raise RequestError(f"The text is a string or an iterator of strings, got {type(text).__name__}.")

    @property
    def finish_reason(self) -> str | None:
        """Why it ended: "end", "length", a guard's name, "cancelled" or "error"; None before."""
        if self._utterance is None:
            return self._reason_before
        return self._utterance.finish_reason

    @property
    def is_running(self) -> bool:
        """Whether it has begun and is not over."""
        return self._has_begun and not self._is_over

    @property
    def lateness_seconds(self) -> float:
        """The most that a frame came later than real time wants it, in the sentences that are over."""
        return 0.0 if self._utterance is None else self._utterance.lateness_seconds

    async def __anext__(self) -> Audio:
        """The next chunk."""
        try:
            while not self._is_over:
                if self._utterance is None:
                    self._first_asked()
                    self._started(self._begin() if self._begin_in is None else await self._begin_in(self._begin))
                    continue
                step = self._utterance.advance()
                if isinstance(step, Audio):
                    return step
                if step is Want.NOTHING:
                    self._end()
                elif isinstance(step, Stream):
                    await self._arrival(step)
                elif self._async_parts is not None:
                    await self._pull()
                elif self._is_whole:
                    self._feed(self._utterance)
                else:
                    await self._feed_in_thread(self._utterance)
        except BaseException as error:
            self._stop(_reason(error))
            raise
        raise StopAsyncIteration

    def __next__(self) -> Audio:
        """The next chunk; blocks until it is there."""
        if self._async_parts is not None:
            raise RequestError("Parts of text that come asynchronously can only be spoken with `async for`.")
        try:
            while not self._is_over:
                if self._utterance is None:
                    self._first_asked()
                    self._started(self._begin())
                    continue
                step = self._utterance.advance()
                if isinstance(step, Audio):
                    return step
                if step is Want.NOTHING:
                    self._end()
                elif isinstance(step, Stream):
                    self._loop.wait(step)
                else:
                    self._feed(self._utterance)
        except BaseException as error:
            self._stop(_reason(error))
            raise
        raise StopIteration

    def ready(self) -> Audio | None:
        """The next chunk if it is there already; raises what the iteration would."""
        if self._utterance is None or self._is_over:
            return None
        try:
            step = self._utterance.advance()
        except BaseException as error:
            self._stop(_reason(error))
            raise
        return step if isinstance(step, Audio) else None

    def cancel(self) -> None:
        """Stop at once; may be called from anywhere."""
        self._stop("cancelled")

    def interrupt(self, heard_seconds: float) -> None:
        """Stop at once, because the listener interrupts, who has heard so much; also when it is over, but still played.

        In a session, no more than that stays context for what follows; of the last sentence, all of its text does.

        Raises `RequestError` for what is no number of seconds, and `SessionBusy` when the session has gone on.
        """
        if not is_number(heard_seconds) or not 0 <= heard_seconds < math.inf:
            raise RequestError(f"heard_seconds must be a number of seconds, 0 or more, got {heard_seconds!r}.")
        self.cancel()
        if self._utterance is not None:
            self._keep_heard(self._utterance.mark, heard_seconds)

    async def aclose(self) -> None:
        """As `cancel`; what `contextlib.aclosing` calls."""
        self.cancel()

    def close(self) -> None:
        """As `cancel`; what `contextlib.closing` calls."""
        self.cancel()

    async def __aenter__(self) -> LiveSpeech:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def __enter__(self) -> LiveSpeech:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def engine_closed(self) -> None:
        """End the wait for text, which could not be spoken any more; whoever waits for a frame is told by it."""
        self._is_closed = True
        self._stop_pulling()

    def __del__(self) -> None:
        if not getattr(self, "_is_over", True):
            self.cancel()

    def _first_asked(self) -> None:
        if not self._has_begun:
            self._has_begun = True  # first: who drains either sees that it runs, or has said so before
            self._check_open()

    def _started(self, utterance: Utterance) -> None:
        self._utterance = utterance
        if self._is_over:  # cancelled while it was being made
            utterance.cancel()

    def _stop(self, reason: str) -> None:
        if not self._is_over:
            self._reason_before = reason
        self._is_over = True  # before all else: whoever makes the utterance or asks for text meanwhile sees it
        if self._utterance is not None:
            self._utterance.cancel(reason)
        self._end()

    def _end(self) -> None:
        self._is_over = True
        self._stop_pulling()
        if self._feeding is not None:
            self._feeding.shutdown(wait=False)
        if self._told_over.acquire(blocking=False):
            self._when_over()

    def _stop_pulling(self) -> None:
        pulling, self._pulling = self._pulling, None
        if pulling is not None:
            event_loop = pulling.get_loop()
            if not event_loop.is_closed():
                event_loop.call_soon_threadsafe(pulling.cancel)

    def _feed(self, utterance: Utterance) -> None:
        """Give the utterance the text that it wants, of an iterator that may block."""
        assert self._parts is not None
        for part in self._parts:
            utterance.feed(_checked(part))
            if utterance.has_pieces or self._is_over:
                return
        utterance.finish_text()

    async def _feed_in_thread(self, utterance: Utterance) -> None:
        """As `_feed`, in a thread of its own: an iterator may block for long, and the event loop's threads are few."""
        if self._feeding is None:
            self._feeding = ThreadPoolExecutor(1, thread_name_prefix="aloud-text")
        context = contextvars.copy_context()
        try:
            feeding = asyncio.get_running_loop().run_in_executor(self._feeding, context.run, self._feed, utterance)
        except RuntimeError:  # it was shut down by who cancelled this in another thread
            if not self._is_over:
                raise
            return
        await feeding

    async def _arrival(self, stream: Stream) -> None:
        """Wait for a stream, and take in a part of the text if one comes meanwhile."""
        if self._async_parts is None or self._utterance is None or not self._utterance.needs_text:
            await self._arrivals().wait(stream)
            return
        pulling = self._start_pulling(self._async_parts)
        frame = asyncio.ensure_future(self._arrivals().wait(stream))
        try:
            waited: set[asyncio.Future[Any]] = {frame, pulling}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if frame.done():
                frame.result()
        finally:
            if not frame.get_loop().is_closed():  # as it may be where this is collected, unfinished
                frame.cancel()
        if pulling.done() and not self._is_over:
            await self._pull()

    async def _pull(self) -> None:
        """Wait for the next part of the text."""
        if self._async_parts is None or self._utterance is None:
            return
        pulling = self._start_pulling(self._async_parts)
        await asyncio.wait({pulling})  # and not `await pulling`, which would cancel this task with it
        if self._is_over:
            return
        self._pulling = None
        if self._is_closed:
            raise EngineClosed("The engine was closed while it spoke. Make a new one, and ask again.")
        part = pulling.result()
        if part is _END_OF_TEXT:
            self._utterance.finish_text()
        else:
            self._utterance.feed(_checked(part))

    def _start_pulling(self, parts: AsyncIterator[str]) -> asyncio.Future[object]:
        if self._pulling is None:
            self._pulling = pulling = asyncio.ensure_future(_next_part(parts))
            if self._is_over or self._is_closed:
                pulling.cancel()
            return pulling
        return self._pulling


def _reason(error: BaseException) -> str:
    """Why speech ended that an error left."""
    return "error" if isinstance(error, Exception) else "cancelled"


async def _next_part(parts: AsyncIterator[str]) -> object:
    """The next part, or what no iterator gives by mistake."""
    return await anext(parts, _END_OF_TEXT)


def _checked(part: object) -> str:
    if not isinstance(part, str):
        raise RequestError(f"Parts of a text are strings, got {type(part).__name__}.")
    return part
