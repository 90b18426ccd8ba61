"""A Wyoming server, as Home Assistant's voice assistants use it: speaks while the text is still coming.

    pip install aloud wyoming
    python wyoming_server.py --model sesame/csm-1b --uri tcp://0.0.0.0:10200

It holds the engine itself. Wyoming has no keys: let it listen only where everybody may come.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.error import Error
from wyoming.event import Event
from wyoming.info import Attribution, Describe, Info, TtsProgram, TtsVoice
from wyoming.server import AsyncEventHandler, AsyncServer
from wyoming.tts import Synthesize, SynthesizeChunk, SynthesizeStart, SynthesizeStop, SynthesizeStopped

from aloud import AloudError, Engine, Runtime, __version__

SPEAKERS = 10
"""The model's speakers 0 to 9 are the voices "0" to "9"."""


class Handler(AsyncEventHandler):
    """One client."""

    def __init__(self, engine: Engine, *given: Any) -> None:
        super().__init__(*given)
        self._engine = engine
        self._parts: asyncio.Queue[str | None] | None = None  # of a text that is coming
        self._speaking: asyncio.Task[None] | None = None

    async def handle_event(self, event: Event) -> bool:
        """Answer one event."""
        if Describe.is_type(event.type):
            await self.write_event(info().event())
        elif SynthesizeStart.is_type(event.type):
            await self.disconnect()
            self._parts = asyncio.Queue()
            voice = SynthesizeStart.from_event(event).voice
            self._speaking = asyncio.create_task(self._speak(_parts(self._parts), voice, is_streaming=True))
        elif SynthesizeChunk.is_type(event.type) and self._parts is not None:
            self._parts.put_nowait(SynthesizeChunk.from_event(event).text)
        elif SynthesizeStop.is_type(event.type) and self._parts is not None:
            self._parts.put_nowait(None)
            self._parts = None
        elif Synthesize.is_type(event.type) and (self._speaking is None or self._speaking.done()):
            # Clients send this beside a streamed text too, for servers that cannot stream: then it is not for us.
            synthesize = Synthesize.from_event(event)
            self._speaking = asyncio.create_task(self._speak(synthesize.text, synthesize.voice, is_streaming=False))
        return True

    async def disconnect(self) -> None:
        """The client has left, or wants something else: stop speaking."""
        if self._speaking is not None:
            self._speaking.cancel()
            await asyncio.wait({self._speaking})

    async def _speak(self, text: str | AsyncIterable[str], voice: Any, *, is_streaming: bool) -> None:
        rate = self._engine.runtime.sample_rate
        name = "0" if voice is None or voice.name is None else voice.name
        try:
            if not name.isdecimal() or int(name) >= SPEAKERS:
                await self.write_event(Error(text=f"There is no voice {name}.", code="voice_not_found").event())
                return
            await self.write_event(AudioStart(rate=rate, width=2, channels=1).event())
            async with self._engine.stream(text, speaker=int(name), lead_seconds=10) as speech:
                async for chunk in speech:
                    data = (chunk.samples.clip(-1, 1) * 32767).round().astype("<i2").tobytes()
                    await self.write_event(AudioChunk(rate=rate, width=2, channels=1, audio=data).event())
        except AloudError as error:
            await self.write_event(Error(text=str(error), code=type(error).__name__).event())
        await self.write_event(AudioStop().event())
        if is_streaming:
            await self.write_event(SynthesizeStopped().event())


async def _parts(queue: asyncio.Queue[str | None]) -> AsyncIterator[str]:
    while (part := await queue.get()) is not None:
        yield part


def info() -> Info:
    """What this server is."""
    about: dict[str, Any] = {
        "attribution": Attribution(name="Aloud", url=""),
        "installed": True,
        "description": "Aloud",
        "version": __version__,
    }
    voices = [TtsVoice(name=str(number), languages=["en"], **about) for number in range(SPEAKERS)]
    return Info(tts=[TtsProgram(name="aloud", voices=voices, supports_synthesize_streaming=True, **about)])


async def serve(engine: Engine, uri: str) -> None:
    """Serve until cancelled."""
    await AsyncServer.from_uri(uri).run(lambda reader, writer: Handler(engine, reader, writer))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="sesame/csm-1b")
    parser.add_argument("--uri", default="tcp://127.0.0.1:10200")
    parsed = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    with Engine(Runtime.load(parsed.model)) as running:
        asyncio.run(serve(running, parsed.uri))
