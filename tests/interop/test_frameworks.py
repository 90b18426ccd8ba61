"""The frameworks' own clients, and the examples for them, against the real server."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from aloud import Engine
from aloud.audio_file import to_int16
from server.running import Running, is_idle, wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = "Hello there, my friend."
CONFIG = {"seed": 3, "max_seconds": 0.8}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic and dataclasses look their modules up
    spec.loader.exec_module(module)
    return module


def needs(*modules: str) -> None:
    for module in modules:
        pytest.importorskip(module, reason=f"needs {module}: pip install 'aloud[interop]'", exc_type=ImportError)


def expected(engine: Engine, *texts: str) -> list[bytes]:
    """What a session says of texts one after the other."""
    session = engine.session(speaker=0)
    return [
        b"".join(to_int16(chunk.samples).tobytes() for chunk in session.stream(text, **CONFIG))  # type: ignore[arg-type]
        for text in texts
    ]


def socket_url(served: Running) -> str:
    """Where its WebSocket is."""
    return f"ws://127.0.0.1:{served.port}/v1/audio/speech/stream"


def wait_until_free(engine: Engine) -> float:
    """Until nothing is spoken and nothing waits -> seconds."""
    return wait_until(lambda: is_idle(engine))


def run(job: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(job(), 60))


class TestPipecat:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        needs("pipecat.tests.utils", "pipecat.services.openai.tts", "websockets")

    def test_its_own_openai_service(self, served: Running) -> None:
        from pipecat.frames.frames import ErrorFrame, TTSAudioRawFrame, TTSSpeakFrame
        from pipecat.services.openai.tts import OpenAITTSService
        from pipecat.tests.utils import run_test

        async def job() -> None:
            service = OpenAITTSService(
                api_key="none", base_url=f"{served.url}/v1", settings=OpenAITTSService.Settings(voice="nova")
            )
            down, up = await run_test(service, frames_to_send=[TTSSpeakFrame(TEXT)])
            assert not [frame for frame in up if isinstance(frame, ErrorFrame)]
            audio = b"".join(frame.audio for frame in down if isinstance(frame, TTSAudioRawFrame))
            assert len(audio) > 1000
            assert any(audio)

        run(job)

    def test_our_example_speaks_as_the_engine_does(self, served: Running, engine: Engine) -> None:
        from pipecat.frames.frames import ErrorFrame, TTSAudioRawFrame, TTSSpeakFrame
        from pipecat.tests.utils import run_test

        service = example("pipecat_service").AloudTTSService

        async def job() -> None:
            tts = service(url=socket_url(served), config=CONFIG)
            down, up = await run_test(tts, frames_to_send=[TTSSpeakFrame(TEXT), TTSSpeakFrame("And more.")])
            assert not [frame for frame in up if isinstance(frame, ErrorFrame)]
            audio = b"".join(frame.audio for frame in down if isinstance(frame, TTSAudioRawFrame))
            assert audio == b"".join(expected(engine, TEXT, "And more."))

        run(job)

    def test_our_example_is_silent_when_interrupted_and_speaks_again(self, served: Running) -> None:
        module = example("pipecat_service")

        async def job() -> None:
            tts = module.AloudTTSService(url=socket_url(served))
            speech = tts.run_tts("A long text. " * 30, "first")
            first = await anext(speech)
            assert first.audio
            await speech.aclose()
            await asyncio.to_thread(wait_until_free, served.engine)
            frames = [frame async for frame in tts.run_tts("Yes.", "second")]
            assert frames
            assert {frame.context_id for frame in frames} == {"second"}
            await tts._disconnect()

        run(job)

    def test_our_example_is_interrupted_by_pipecat(self, served: Running) -> None:
        from pipecat.frames.frames import InterruptionFrame, TTSSpeakFrame
        from pipecat.tests.utils import SleepFrame, run_test

        module = example("pipecat_service")

        async def job() -> None:
            tts = module.AloudTTSService(url=socket_url(served))
            asked = [
                TTSSpeakFrame("A long text. " * 30),
                SleepFrame(sleep=0.5),
                InterruptionFrame(),
                SleepFrame(sleep=0.3),
            ]
            await run_test(tts, frames_to_send=asked)

        run(job)
        assert wait_until_free(served.engine) < 2


class TestLiveKit:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        needs("livekit.agents", "livekit.plugins.openai", "websockets")

    @pytest.mark.parametrize("form", [None, "pcm", "opus", "flac", "wav", "aac"])
    def test_its_own_openai_plugin(self, served: Running, form: str | None) -> None:
        from livekit.plugins import openai

        async def job() -> None:
            given: dict[str, Any] = {} if form is None else {"response_format": form}
            tts = openai.TTS(base_url=f"{served.url}/v1", api_key="none", voice="nova", **given)
            async with tts, tts.synthesize(TEXT) as stream:
                frame = await stream.collect()
            assert frame.sample_rate == 24_000
            assert frame.duration > 0.05
            assert any(frame.data)

        run(job)

    @pytest.mark.parametrize("streams", [False, True], ids=["whole", "in pieces"])
    def test_our_example_speaks_as_the_engine_does(self, served: Running, engine: Engine, streams: bool) -> None:
        module = example("livekit_tts")

        async def job() -> None:
            tts = module.AloudTTS(url=socket_url(served), config=CONFIG)
            async with tts:
                if streams:
                    async with tts.stream() as stream:
                        for word in TEXT.split(" "):
                            stream.push_text(word if word == "Hello" else " " + word)
                        stream.end_input()
                        data = b"".join([bytes(event.frame.data) async for event in stream])
                else:
                    async with tts.synthesize(TEXT) as chunks:
                        data = b"".join([bytes(event.frame.data) async for event in chunks])
            (said,) = expected(engine, TEXT)
            assert data.startswith(said)
            assert not any(data[len(said) :])  # LiveKit ends with a moment of silence

        run(job)

    def test_our_example_stops_with_its_stream(self, served: Running) -> None:
        module = example("livekit_tts")

        async def job() -> None:
            async with module.AloudTTS(url=socket_url(served)) as tts:
                stream = tts.stream()
                stream.push_text("A long text. " * 30)
                await anext(stream)
                await stream.aclose()

        run(job)
        assert wait_until_free(served.engine) < 2

    def test_our_example_raises_what_the_server_refuses(self, served: Running) -> None:
        from livekit.agents import APIError

        module = example("livekit_tts")

        async def job() -> None:
            url = socket_url(served)
            async with module.AloudTTS(url=url, voice="nobody") as tts:
                with pytest.raises(APIError, match="no voice"):
                    async with tts.synthesize(TEXT) as stream:
                        await stream.collect()

        run(job)


class TestWyoming:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        needs("wyoming")

    def serving(self, engine: Engine, job: Callable[[Any], Awaitable[None]]) -> None:
        """Run a job with a client of the example's server."""
        from wyoming.client import AsyncTcpClient

        module = example("wyoming_server")

        async def everything() -> None:
            server = await asyncio.start_server(lambda *given: module.Handler(engine, *given).run(), "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            async with server, AsyncTcpClient("127.0.0.1", port) as client:
                await job(client)

        run(everything)

    def test_it_describes_itself(self, engine: Engine) -> None:
        from wyoming.info import Describe, Info

        async def job(client: Any) -> None:
            await client.write_event(Describe().event())
            (program,) = Info.from_event(await client.read_event()).tts
            assert program.supports_synthesize_streaming
            assert program.voices

        self.serving(engine, job)

    def test_streamed_and_whole_text(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        from wyoming.audio import AudioChunk
        from wyoming.tts import Synthesize, SynthesizeChunk, SynthesizeStart, SynthesizeStop

        stream = engine.stream
        given = {**CONFIG, "pace": "full", "speaker": 0}
        monkeypatch.setattr(engine, "stream", lambda text, **_: stream(text, **given))
        samples = [chunk.samples.clip(-1, 1) for chunk in stream(TEXT, **given)]
        said = b"".join((32767 * part).round().astype("<i2").tobytes() for part in samples)

        async def heard(client: Any, last: str) -> bytes:
            data, kinds = b"", []
            while not kinds or kinds[-1] != last:
                event = await client.read_event()
                kinds.append(event.type)
                if AudioChunk.is_type(event.type):
                    data += AudioChunk.from_event(event).audio
            assert kinds[0] == "audio-start"
            return data

        async def job(client: Any) -> None:
            await client.write_event(Synthesize(TEXT).event())
            assert await heard(client, "audio-stop") == said
            await client.write_event(SynthesizeStart().event())
            for part in ("Hello there,", " my", " friend."):
                await client.write_event(SynthesizeChunk(part).event())
            await client.write_event(Synthesize(TEXT).event())  # for servers that cannot stream
            await client.write_event(SynthesizeStop().event())
            assert await heard(client, "synthesize-stopped") == said

        self.serving(engine, job)

    def test_it_stops_when_the_client_leaves(self, served: Running, engine: Engine) -> None:
        from wyoming.tts import Synthesize

        async def job(client: Any) -> None:
            await client.write_event(Synthesize("A long text. " * 30).event())
            for _ in range(3):
                await client.read_event()
            await client.disconnect()
            await asyncio.to_thread(wait_until_free, served.engine)

        self.serving(engine, job)
