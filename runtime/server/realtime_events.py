"""What is looked at in the events that a client of `/v1/realtime` sends; of what else they hold, nothing is."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, TypeAdapter

MAX_ITEMS = 256
"""Conversation items that may wait to be spoken."""
UNSERVED = frozenset(
    {
        "input_audio_buffer.append",
        "input_audio_buffer.clear",
        "input_audio_buffer.commit",
        "output_audio_buffer.clear",
        "conversation.item.delete",
        "conversation.item.retrieve",
    }
)
"""Events of Realtime that mean nothing here, and that a client with a microphone sends all the time."""


class VoiceId(BaseModel):
    """A voice as an object."""

    id: str


class OutputFormat(BaseModel):
    """What the audio is."""

    type: Literal["audio/pcm"] = "audio/pcm"
    rate: int | None = None


class Output(BaseModel):
    """How to speak."""

    voice: str | VoiceId | None = None
    format: OutputFormat | None = None
    speed: float | None = Field(default=None, ge=1, le=1)


class SessionAudio(BaseModel):
    """The audio part of a session."""

    output: Output | None = None


class SessionFields(BaseModel):
    """What is looked at in `session.update`."""

    type: Literal["realtime"] = "realtime"
    audio: SessionAudio | None = None


class Content(BaseModel):
    """A part of a message."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class Item(BaseModel):
    """A message with text."""

    type: Literal["message"] = "message"
    id: str | None = Field(default=None, max_length=64)
    role: Literal["user", "assistant", "system"] = "user"
    content: list[Content] = Field(min_length=1, max_length=64)

    @property
    def text(self) -> str:
        """What is to be spoken."""
        return " ".join(part.text for part in self.content)


class ResponseFields(BaseModel):
    """What is looked at in `response.create`."""

    input: list[Item] | None = Field(default=None, max_length=MAX_ITEMS)
    audio: SessionAudio | None = None


class ClientEvent(BaseModel):
    """What a client sends."""

    type: str
    event_id: str | None = Field(default=None, max_length=512)
    session: SessionFields | None = None
    item: Item | None = None
    response: ResponseFields | None = None
    response_id: str | None = None


EVENT: TypeAdapter[ClientEvent] = TypeAdapter(ClientEvent)


class Truncation(BaseModel):
    """What is looked at in `conversation.item.truncate`."""

    item_id: str
    content_index: Literal[0] = 0
    audio_end_ms: int = Field(ge=0, le=86_400_000, strict=True)


class EventHead(BaseModel):
    """Who an event is from and what it is, whatever else is wrong with it."""

    type: str = ""
    event_id: str | None = None
