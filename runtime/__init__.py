"""Aloud: an inference runtime for speech language models that speak in Mimi codec tokens."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from aloud import errors
from aloud.errors import AloudError
from aloud.request import Guards, Request, Sampling, Segment

if TYPE_CHECKING:
    from aloud.api import Runtime, Score
    from aloud.audio import Audio, read_audio
    from aloud.engine_stats import EngineStats
    from aloud.live import Engine
    from aloud.live_speech import LiveSpeech
    from aloud.session import Session, SessionStats
    from aloud.speech import SpeechStream
    from aloud.voice import Voice

__all__ = [
    "AloudError",
    "Audio",
    "Engine",
    "EngineStats",
    "Guards",
    "LiveSpeech",
    "Request",
    "Runtime",
    "Sampling",
    "Score",
    "Segment",
    "Session",
    "SessionStats",
    "SpeechStream",
    "Voice",
    "errors",
    "read_audio",
]
__version__ = "0.1.0"

# Names whose modules import torch: they come when first asked for, so that `aloud --help` answers at once.
_LATE = {
    "Audio": "aloud.audio",
    "Engine": "aloud.live",
    "EngineStats": "aloud.engine_stats",
    "LiveSpeech": "aloud.live_speech",
    "Runtime": "aloud.api",
    "Score": "aloud.api",
    "Session": "aloud.session",
    "SessionStats": "aloud.session",
    "SpeechStream": "aloud.speech",
    "Voice": "aloud.voice",
    "read_audio": "aloud.audio",
}


def __getattr__(name: str) -> object:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module 'aloud' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
