"""A Pipecat service: an agent's sentences in, speech out as it is made, and silence at once when it is interrupted.

    pip install pipecat-ai websockets
    aloud serve sesame/csm-1b

    pipeline = Pipeline([transport.input(), stt, llm, AloudTTSService(voice="alloy"), transport.output()])

All of an agent's sentences are turns of one conversation on one socket, so each is spoken in the tone of those before.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator
from typing import Any

from pipecat.frames.frames import CancelFrame, EndFrame, ErrorFrame, Frame, StartFrame, TTSAudioRawFrame
from pipecat.services.settings import TTSSettings
from pipecat.services.tts_service import TTSService
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

SAMPLE_RATE = 24_000


class AloudTTSService(TTSService):
    """Speech from an Aloud server's WebSocket."""

    def __init__(
        self,
        *,
        url: str = "ws://127.0.0.1:8000/v1/audio/speech/stream",
        voice: str = "alloy",
        api_key: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        """`config`: more fields of the server's `session.config`, as `temperature` or `seed`."""
        settings = TTSSettings(model="aloud", voice=voice, language=None)
        super().__init__(sample_rate=SAMPLE_RATE, push_start_frame=True, push_stop_frames=True, settings=settings)
        self._url = url
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._config = {"type": "session.config", "voice": voice, **(config or {})}
        self._socket: ClientConnection | None = None
        self._cancels = 0  # that have not been acknowledged

    def can_generate_metrics(self) -> bool:
        """Time to first byte, and characters."""
        return True

    async def start(self, frame: StartFrame) -> None:
        """Connect."""
        await super().start(frame)
        try:
            await self._connected()
        except OSError as error:
            await self.push_error(error_msg=f"The speech server cannot be reached: {error}")

    async def stop(self, frame: EndFrame) -> None:
        """Disconnect."""
        await super().stop(frame)
        await self._disconnect()

    async def cancel(self, frame: CancelFrame) -> None:
        """Disconnect; whatever is being spoken ends with it."""
        await super().cancel(frame)
        await self._disconnect()

    async def run_tts(self, text: str, context_id: str) -> AsyncGenerator[Frame | None, None]:
        """Speak; a generator that is left early, which is what an interruption does, stops the speech."""
        is_over = False
        try:
            socket = await self._connected()
            await self._send(socket, type="input.text", text=text)
            await self._send(socket, type="input.flush")
            await self.start_tts_usage_metrics(text)
            while not is_over:
                event = json.loads(await socket.recv())
                if self._cancels:  # what is left of speech that was interrupted
                    self._cancels -= event["type"] == "audio.cancelled"
                elif event["type"] == "audio.delta":
                    await self.stop_ttfb_metrics()
                    yield TTSAudioRawFrame(base64.b64decode(event["audio"]), SAMPLE_RATE, 1, context_id=context_id)
                elif event["type"] == "error":
                    yield ErrorFrame(error=event["error"]["message"])
                is_over = event["type"] == "audio.flushed" and not self._cancels
        except (OSError, ConnectionClosed) as error:
            is_over, self._socket = True, None
            yield ErrorFrame(error=f"The speech server is gone: {error}")
        finally:
            if not is_over and self._socket is not None:
                self._cancels += 1
                await self._send(self._socket, type="input.cancel")

    async def _connected(self) -> ClientConnection:
        if self._socket is None:
            self._cancels = 0
            # The server pauses while nobody reads; a long queue here would be heard after an interruption.
            self._socket = await connect(self._url, additional_headers=self._headers, max_queue=4)
            await self._send(self._socket, **self._config)
            answer = json.loads(await self._socket.recv())
            if answer["type"] == "error":
                await self._disconnect()
                raise OSError(answer["error"]["message"])
        return self._socket

    async def _disconnect(self) -> None:
        socket, self._socket = self._socket, None
        if socket is not None:
            await socket.close()

    async def _send(self, socket: ClientConnection, **message: Any) -> None:
        await socket.send(json.dumps(message))
