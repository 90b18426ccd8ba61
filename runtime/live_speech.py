"""Speech while it is made, for `async for` and for `for`: drives one utterance with its text, frames and errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeAlias

from aloud.arrivals import Arrivals
from aloud.audio import Audio
from aloud.engine.loop import Loop
from aloud.engine.stream import Stream
from aloud.errors import RequestError
from aloud.prepare import check_text
from aloud.request import Guards
from aloud.utterance import Utterance, Want

Text: TypeAlias = str | Iterable[str] | AsyncIterable[str]
"""A text, or its parts as they come."""


class LiveSpeech(AsyncIterator[Audio], Iterator[Audio]):
    """What `Engine.stream` returns: iterate for `Audio` chunks of one frame each, with `async for` or with `for`.

    It begins with the first chunk that is asked for. Leaving it, by `aclose`, `cancel`, a cancelled task or because
    nobody holds it any more, frees its slot within a frame. `finish_reason` is None until it is over.
    """

    def __init__(
        self,
        loop: Loop,
        arrivals: Callable[[], Arrivals],
        text: Text,
        begin: Callable[[], Utterance],
        *,
        begin_blocks: bool,
        seed: int,
        guards: Guards,
        when_over: Callable[[], None] = lambda: None,
    ) -> None:
        """Of a function that makes the utterance, and may block for long, to encode audio."""
        self.seed = seed
        self.guards = guards
        self._loop = loop
        self._arrivals = arrivals
        self._begin = begin
        self._begin_blocks = begin_blocks
        self._when_over = when_over
        self._utterance: Utterance | None = None
        self._is_over = False
        self._parts: Iterator[str] | None = None
        self._async_parts: AsyncIterator[str] | None = None
        self._pulling: asyncio.Future[str | None] | None = None  # the next part of the text, on its way
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
        return None if self._utterance is None else self._utterance.finish_reason

    @property
    def lateness_seconds(self) -> float:
        """The most that a frame came later than real time wants it, in the sentences that are over."""
        return 0.0 if self._utterance is None else self._utterance.lateness_seconds

    async def __anext__(self) -> Audio:
        """The next chunk."""
        try:
            while not self._is_over:
                if self._utterance is None:
                    self._utterance = await asyncio.to_thread(self._begin) if self._begin_blocks else self._begin()
                self._feed_at_hand(self._utterance)
                step = self._utterance.advance()
                if isinstance(step, Audio):
                    return step
                if step is Want.NOTHING:
                    self._end()
                elif isinstance(step, Stream):
                    await self._arrival(step)
                else:
                    await self._pull()
        except BaseException:
            self.cancel()
            raise
        raise StopAsyncIteration

    def __next__(self) -> Audio:
        """The next chunk; blocks until it is there."""
        if self._async_parts is not None:
            raise RequestError("Parts of text that come asynchronously can only be spoken with `async for`.")
        try:
            while not self._is_over:
                if self._utterance is None:
                    self._utterance = self._begin()
                self._feed_at_hand(self._utterance)
                step = self._utterance.advance()
                if isinstance(step, Audio):
                    return step
                if step is Want.NOTHING:
                    self._end()
                elif isinstance(step, Stream):
                    self._loop.wait(step)
        except BaseException:
            self.cancel()
            raise
        raise StopIteration

    def cancel(self) -> None:
        """Stop at once; may be called from anywhere."""
        if self._utterance is not None:
            self._utterance.cancel()
        if self._pulling is not None:
            event_loop = self._pulling.get_loop()
            if not event_loop.is_closed():
                event_loop.call_soon_threadsafe(self._pulling.cancel)
            self._pulling = None
        self._end()

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

    def __del__(self) -> None:
        if not getattr(self, "_is_over", True):
            self.cancel()

    def _end(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._when_over()

    def _feed_at_hand(self, utterance: Utterance) -> None:
        """Give the utterance the text that it wants, as far as that is there without waiting for anybody."""
        if self._parts is not None and utterance.needs_text and not utterance.has_pieces:
            for part in self._parts:
                utterance.feed(_checked(part))
                if utterance.has_pieces:
                    return
            utterance.finish_text()

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
            frame.cancel()
        if pulling.done():
            await self._pull()

    async def _pull(self) -> None:
        """Wait for the next part of the text."""
        if self._async_parts is None or self._utterance is None:
            return
        part = await asyncio.shield(self._start_pulling(self._async_parts))
        self._pulling = None
        if part is None:
            self._utterance.finish_text()
        else:
            self._utterance.feed(_checked(part))

    def _start_pulling(self, parts: AsyncIterator[str]) -> asyncio.Future[str | None]:
        if self._pulling is None:
            self._pulling = asyncio.ensure_future(_next_or_none(parts))
        return self._pulling


async def _next_or_none(parts: AsyncIterator[str]) -> str | None:
    return await anext(parts, None)


def _checked(part: object) -> str:
    if not isinstance(part, str):
        raise RequestError(f"Parts of a text are strings, got {type(part).__name__}.")
    return part
