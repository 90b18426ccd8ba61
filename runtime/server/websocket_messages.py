"""What a client may send on `/v1/audio/speech/stream`; what each message does is told in `websocket`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from aloud.prepare import MAX_SPEAKER
from aloud.request import MAX_TEMPERATURE


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SessionConfig(_Message):
    """How contexts that begin later speak."""

    type: Literal["session.config"] = "session.config"
    voice: str = "alloy"
    speaker: int | None = Field(default=None, ge=0, le=MAX_SPEAKER)
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = "pcm"
    audio: Literal["base64", "binary"] = "base64"
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    temperature: float | None = Field(default=None, ge=0, le=MAX_TEMPERATURE)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    depth_temperature: float | None = Field(default=None, ge=0, le=MAX_TEMPERATURE)
    depth_top_k: int | None = Field(default=None, ge=0, lt=2**31)
    max_seconds: float | None = Field(default=None, gt=0, le=3600)


class _OfContext(_Message):
    context_id: str = Field("default", pattern=r"^[A-Za-z0-9_-]{1,64}$")


class InputText(_OfContext):
    """More text."""

    type: Literal["input.text"]
    text: str = Field(min_length=1)


class InputFlush(_OfContext):
    """The end of a turn's text."""

    type: Literal["input.flush"]


class InputDone(_OfContext):
    """The end of a context's text."""

    type: Literal["input.done"]


class InputCancel(_OfContext):
    """Stop."""

    type: Literal["input.cancel"]
    heard_seconds: float | None = Field(None, ge=0, allow_inf_nan=False)


class SessionClose(_Message):
    """Leave."""

    type: Literal["session.close"]


MESSAGES: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        SessionConfig | InputText | InputFlush | InputDone | InputCancel | SessionClose, Field(discriminator="type")
    ]
)
