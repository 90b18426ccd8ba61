"""What a conversation's turns sound like: said again, from the beginning, by an engine that knows no server."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from server_websocket.quick_speech import RATE, LongFrames, long_runtime

from aloud import Engine
from aloud.server.encode import FORMATS, encoder

Chunk = bytes  # float32 samples of a frame


@dataclass(frozen=True)
class Manner:
    """How a context speaks."""

    speaker: int = 0
    seed: int | None = None
    max_seconds: float | None = None


@dataclass(frozen=True)
class Said:
    """A turn of a context's past: its text, and how many of its frames were heard; None for all."""

    text: str
    frames: int | None = None


class Oracle:
    """Says what is asked for, and remembers what it has said."""

    def __init__(self, steps: LongFrames) -> None:
        """Steps of one slot, which make frames as the server's do."""
        self.engine = Engine(long_runtime(steps, 1))
        self.turn = lru_cache(maxsize=4096)(self._turn)

    def close(self) -> None:
        self.engine.close()

    def _turn(self, manner: Manner, before: tuple[Said, ...], text: str) -> tuple[tuple[Chunk, ...], str | None]:
        """The frames of a turn behind others, and why it ended."""
        session = self.engine.session(speaker=manner.speaker)
        given = {"seed": manner.seed, "max_seconds": manner.max_seconds, "pace": "full"}
        for said in before:
            with session.stream(said.text, **given) as speech:  # type: ignore[arg-type]
                for number, _ in enumerate(speech, start=1):
                    if number == said.frames:
                        break
        speech = session.stream(text, **given)  # type: ignore[arg-type]
        return tuple(chunk.samples.astype(np.float32).tobytes() for chunk in speech), speech.finish_reason


def encoded(name: str, chunks: tuple[Chunk, ...], *, is_whole: bool) -> bytes:
    """The bytes of a stream of frames in a format, up to its last frame or its end."""
    encoding = encoder(FORMATS[name], RATE)
    data = b"".join(encoding.feed(np.frombuffer(chunk, np.float32)) for chunk in chunks)
    return data + encoding.finish() if is_whole and chunks else data
