"""LiveKit Agents: text from the language model goes to the server word by word, speech comes back as it is made.

    pip install livekit-agents websockets
    aloud serve sesame/csm-1b

    session = AgentSession(stt=..., llm=..., tts=AloudTTS(voice="alloy"))

LiveKit closes the stream when the agent is interrupted; the socket closes with it, and the server stops at once.
"""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from typing import Any

from livekit.agents import APIConnectionError, APIError, APIStatusError, tts
from livekit.agents.types import DEFAULT_API_CONNECT_OPTIONS, APIConnectOptions
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

SAMPLE_RATE = 24_000


class AloudTTS(tts.TTS):
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
        super().__init__(capabilities=tts.TTSCapabilities(streaming=True), sample_rate=SAMPLE_RATE, num_channels=1)
        self.url = url
        self.headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.config = {"type": "session.config", "voice": voice, **(config or {})}

    @property
    def provider(self) -> str:
        """For LiveKit's metrics."""
        return "aloud"

    def synthesize(
        self, text: str, *, conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS
    ) -> tts.ChunkedStream:
        """Speak a whole text."""
        return self._synthesize_with_stream(text, conn_options=conn_options)

    def stream(self, *, conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS) -> tts.SynthesizeStream:
        """Speak a text that comes in pieces."""
        return AloudStream(tts=self, conn_options=conn_options)


class AloudStream(tts.SynthesizeStream):
    """One text, on a socket of its own."""

    _tts: AloudTTS

    async def _run(self, output_emitter: tts.AudioEmitter) -> None:
        request_id = uuid.uuid4().hex
        output_emitter.initialize(
            request_id=request_id, sample_rate=SAMPLE_RATE, num_channels=1, mime_type="audio/pcm", stream=True
        )
        try:
            timeout = self._conn_options.timeout
            async with connect(self._tts.url, additional_headers=self._tts.headers, open_timeout=timeout) as socket:
                await socket.send(json.dumps(self._tts.config))
                sending = asyncio.create_task(self._send(socket))
                try:
                    output_emitter.start_segment(segment_id=request_id)
                    await self._receive(socket, output_emitter)
                    output_emitter.end_segment()
                finally:
                    sending.cancel()
        except InvalidStatus as error:
            raise APIStatusError("The speech server refuses.", status_code=error.response.status_code) from error
        except (OSError, asyncio.TimeoutError, ConnectionClosed) as error:
            raise APIConnectionError("The speech server cannot be reached.") from error

    async def _send(self, socket: ClientConnection) -> None:
        has_text = False
        async for part in self._input_ch:
            if isinstance(part, str):
                self._mark_started()
                await socket.send(json.dumps({"type": "input.text", "text": part}))
                has_text = True
            elif has_text:
                await socket.send(json.dumps({"type": "input.flush"}))
        await socket.send(json.dumps({"type": "input.done"} if has_text else {"type": "session.close"}))

    async def _receive(self, socket: ClientConnection, output_emitter: tts.AudioEmitter) -> None:
        async for message in socket:
            event = json.loads(message)
            if event["type"] == "audio.delta":
                output_emitter.push(base64.b64decode(event["audio"]))
            elif event["type"] == "audio.flushed":
                output_emitter.flush()
            elif event["type"] == "audio.done":
                return
            elif event["type"] == "error":
                raise APIError(event["error"]["message"], retryable="retry_after_seconds" in event)
