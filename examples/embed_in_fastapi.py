"""Speech in your own FastAPI app: one engine for all, sound sent while it is made, stopped when nobody listens.

pip install fastapi uvicorn
python embed_in_fastapi.py sesame/csm-1b
curl localhost:8000/speech -H "content-type: application/json" -d '{"text": "Hello."}' | aplay -f S16_LE -r 24000
"""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import Body, FastAPI, HTTPException
from fastapi.responses import StreamingResponse

from aloud import Audio, Engine, Runtime
from aloud.errors import Overloaded, RequestError


def pcm(chunk: Audio) -> bytes:
    """80 ms as 16-bit samples, little-endian."""
    return (chunk.samples.clip(-1, 1) * 32767).astype("<i2").tobytes()


def create_app(model: str) -> FastAPI:
    """An app that speaks with a checkpoint: POST /speech {"text": ...} answers raw 24 kHz mono PCM."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Engine(Runtime.load(model)) as app.state.engine:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/speech")
    async def speech(text: str = Body(embed=True)) -> StreamingResponse:
        try:
            speech = app.state.engine.stream(text)
            first = await anext(speech)  # what is wrong shows by then, when a status can still be sent
        except RequestError as error:
            raise HTTPException(422, str(error)) from error
        except Overloaded as error:
            raise HTTPException(503, str(error), {"retry-after": str(math.ceil(error.retry_after_seconds))}) from error

        async def sound() -> AsyncIterator[bytes]:
            async with speech:  # left when the listener is: its slot is free at once
                yield pcm(first)
                async for chunk in speech:
                    yield pcm(chunk)

        return StreamingResponse(sound(), media_type="audio/pcm")

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(sys.argv[1]))
