"""POST /v1/audio/speech: what it takes, and the engine's speech that is made of it."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from aloud.errors import AudioInvalid, AudioTooLong
from aloud.live import Engine, Pace
from aloud.live_speech import LiveSpeech
from aloud.prepare import MAX_SPEAKER, check_request
from aloud.request import MAX_TEMPERATURE, Request, Segment
from aloud.server.problems import Problem
from aloud.server.sessions import Sessions
from aloud.server.settings import Limits
from aloud.server.uploads import decode_audio
from aloud.server.voices import Registry
from aloud.text.csm import turn_text
from aloud.voice import Voice

WhenOver: TypeAlias = Callable[[], Awaitable[None]]
SAMPLING = ("temperature", "top_k", "depth_temperature", "depth_top_k")


def _number(value: object) -> object:
    """What JSON calls a number, and not what Python also takes for one."""
    if isinstance(value, (bool, str)):
        raise PydanticCustomError("number", "Input should be a number")
    return value


def _text(value: str) -> str:
    """What can be written as UTF-8; JSON also writes halves of characters."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("text", "Input should be text without halves of characters") from error
    return value


Text = Annotated[str, AfterValidator(_text)]
Whole = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]


class Strict(BaseModel):
    """Something with the fields that there are, and no others."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_few(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > len(cls.model_fields) + 1:  # one error is enough
            raise PydanticCustomError("fields", "Input should have no other fields than those that there are")
        return value


class VoiceId(Strict):
    """A voice, as OpenAI's clients may also name it."""

    id: str


def _voice(value: object) -> object:
    """A voice by its name or id; whatever else is one error, and not one for each way to name it."""
    if isinstance(value, dict):
        return VoiceId.model_validate(value)
    if not isinstance(value, (str, VoiceId)):
        raise PydanticCustomError("voice", "Input should be the name of a voice")
    return value


class ContextTurn(Strict):
    """A turn of the conversation so far."""

    text: Text = Field(description="What was said.")
    speaker: Whole = Field(0, ge=0, le=MAX_SPEAKER)
    audio: str | None = Field(None, description="How it sounded: an audio file in base64. Without it, text alone.")


class SpeechBody(Strict):
    """What POST /v1/audio/speech takes: OpenAI's fields, and the model's own."""

    input: Text = Field(min_length=1, json_schema_extra={"pattern": r"\S"})
    model: str = ""
    voice: Annotated[str | VoiceId, BeforeValidator(_voice)] = Field(
        "alloy", description="A kept voice, or one of the aliases. Left out in a session that is there: the session's."
    )
    instructions: str | None = Field(None, description="Ignored: the model takes no instructions.")
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = "mp3"
    speed: Number = Field(1.0, description="Only 1.0.", json_schema_extra={"minimum": 1, "maximum": 1})
    stream_format: Literal["audio", "sse"] = "audio"
    pace: Pace = Field(
        "realtime",
        description="`realtime`: for who listens meanwhile, sent at most some seconds ahead of being played. "
        "`full`: for a file, as fast as those who listen leave room; it may wait for them, also in the middle.",
    )
    seed: Whole | None = Field(None, ge=0, lt=2**64)
    temperature: Number | None = Field(None, ge=0, le=MAX_TEMPERATURE)
    top_k: Whole | None = Field(None, ge=0, lt=2**31)
    depth_temperature: Number | None = Field(None, ge=0, le=MAX_TEMPERATURE)
    depth_top_k: Whole | None = Field(None, ge=0, lt=2**31)
    speaker: Whole | None = Field(None, ge=0, le=MAX_SPEAKER)
    max_seconds: Number | None = Field(None, gt=0, le=3600)
    context: Annotated[list[ContextTurn], Field(fail_fast=True)] | None = Field(
        None, description="The conversation so far; not in a session."
    )
    session_id: str | None = Field(None, description="A conversation to go on with, or to begin.")


async def begin(
    engine: Engine, registry: Registry, sessions: Sessions, limits: Limits, owner: str, body: SpeechBody
) -> tuple[LiveSpeech, WhenOver | None]:
    """The speech that is asked for, which begins when its first chunk is, and what is to be done once it is over.

    Raises a `Problem` or a `RequestError`.
    """
    _check(body, limits)
    given: dict[str, Any] = {name: getattr(body, name) for name in (*SAMPLING, "seed", "max_seconds")}
    check_request(Request(text=body.input, **given))  # before a session is begun for it
    name = body.voice if isinstance(body.voice, str) else body.voice.id
    given |= {"pace": body.pace, "lead_seconds": limits.lead_seconds}
    if body.session_id is not None:
        is_chosen = "voice" in body.model_fields_set
        kept = await asyncio.to_thread(sessions.open, owner, body.session_id, name, is_chosen=is_chosen)
        save = partial(asyncio.to_thread, sessions.save, owner, body.session_id, kept)
        return kept.session.stream(body.input, **given), save
    voice, speaker = await asyncio.to_thread(registry.voice, owner, name)
    context = await asyncio.to_thread(read_context, engine, voice, body.context, limits) if body.context else []
    speech = engine.stream(
        body.input,
        voice=voice,
        speaker=speaker if body.speaker is None else body.speaker,
        context=context,
        **given,
    )
    return speech, None


def read_context(engine: Engine, voice: Voice | None, turns: list[ContextTurn], limits: Limits) -> list[Segment]:
    """The turns of a conversation, decoded; blocks. Raises a `Problem` that names the turn."""
    runtime, codec = engine.runtime, engine.runtime.config.codec
    free_samples = math.floor(limits.context_seconds * codec.sample_rate)
    free_positions = runtime.max_positions - (0 if voice is None else voice.positions)
    segments = []
    for number, turn in enumerate(turns):
        where, samples = f"context.{number}.audio", None
        if turn.audio is not None:
            try:
                data = base64.b64decode(turn.audio, validate=True)
                # Half a sample more, against rounding.
                samples = decode_audio(data, codec.sample_rate, (free_samples + 0.5) / codec.sample_rate)
            except AudioTooLong as error:
                message = f"The audio of a context may be {limits.context_seconds:g} s long in all. Send less of it."
                raise Problem(400, message, "AudioTooLong", where) from error
            except AudioInvalid as error:
                raise Problem(400, str(error), type(error).__name__, where) from error
            except ValueError as error:
                raise Problem(400, "The audio of a turn is a file in base64.", "invalid_base64", where) from error
            free_samples -= len(samples)
            free_positions -= math.ceil(len(samples) / codec.frame_size) + 1  # a frame behind them ends them
        elif not turn.text.strip():
            raise Problem(400, "A turn has neither text nor audio. Leave it out.", "TextEmpty", f"context.{number}")
        free_positions -= len(turn_text(runtime.tokenizer, turn.speaker, turn.text))
        if free_positions < 0:
            message = f"Voice and context take more than the {runtime.max_positions} positions that there are."
            what = "text" if turn.audio is None else "audio"
            raise Problem(
                400, f"{message} Leave out turns, or parts of them.", "ContextTooLong", f"context.{number}.{what}"
            )
        segments.append(Segment(turn.text, samples, turn.speaker))
    return segments


def _check(body: SpeechBody, limits: Limits) -> None:
    """Raise a `Problem` for what can be seen without reading anything."""
    if len(body.input) > limits.text_characters:
        raise Problem(400, f"input may have {limits.text_characters:,} characters.", "input_too_long", "input")
    if body.speed != 1.0:
        raise Problem(400, "speed must be 1.0: the model has one speed.", "speed_unsupported", "speed")
    context = body.context or []
    if len(context) > limits.context_turns:
        raise Problem(400, f"context may have {limits.context_turns:,} turns.", "context_too_long", "context")
    if sum(len(turn.text) for turn in context) > limits.text_characters:
        message = f"The text of a context may have {limits.text_characters:,} characters in all."
        raise Problem(400, message, "context_too_long", "context")
    if body.session_id is None:
        return
    if body.context is not None:
        raise Problem(400, "A session has a context of its own; leave context out.", "not_in_a_session", "context")
    if body.speaker is not None:
        raise Problem(400, "A session has a speaker of its own; leave speaker out.", "not_in_a_session", "speaker")
