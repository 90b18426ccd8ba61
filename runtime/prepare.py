"""A request to a job that can be run: checks, defaults, context audio to codes, the prompt; raises before any work."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from aloud import memory
from aloud.audio import read_audio
from aloud.codec import mimi
from aloud.engine.guards import text_limit_frames
from aloud.engine.stream import Job
from aloud.errors import ContextTooLong, RequestError, SamplingInvalid, SpeakerInvalid, TextEmpty
from aloud.models.csm import Csm, CsmConfig
from aloud.request import MAX_SECONDS, MAX_TEMPERATURE, MIN_TEMPERATURE, Guards, Prompt, Request, Sampling, Segment
from aloud.text.csm import Turn, build_prompt, turn_text
from aloud.text.tokenizer import Tokenizer
from aloud.voice import Voice

MAX_ASKED_SECONDS = 86_400
"""A day: what a caller asks for beyond it is a mistake."""
MAX_SPEAKER = 999
OPTIONAL_GUARDS = ("text_seconds_per_byte", "silence_seconds", "repeat_seconds")


def check_request(request: Request) -> None:
    """Raise a `RequestError` for whatever is wrong with a request that can be seen without a model or its audio."""
    check_text(request.text)
    check_manner(request)


def check_text(text: str) -> None:
    """Raise a `RequestError` unless there is something to say."""
    _check_text("The text to say", text)
    if not text.strip():
        raise TextEmpty("There is no text to say. Give at least one letter.")


def check_manner(request: Request) -> None:
    """As `check_request`, for everything but the text, which is still to come."""
    _check_speaker(request.speaker)
    if not isinstance(request.context, Sequence):
        raise RequestError(f"The context is a list of aloud.Segment, got {type(request.context).__name__}.")
    for segment in request.context:
        _check_segment(segment)
    _check_temperature("temperature", request.temperature)
    _check_temperature("depth_temperature", request.depth_temperature)
    _check_top_k("top_k", request.top_k)
    _check_top_k("depth_top_k", request.depth_top_k)
    _check_seed(request.seed)
    _check_max_seconds(request.max_seconds)
    _check_guards(request.guards)


def prepare(
    model: Csm, tokenizer: Tokenizer, defaults: Sampling, requests: Sequence[Request], *, max_positions: int
) -> list[Job]:
    """Resolve requests to be run together, in slots of `max_positions`.

    Raises a `RequestError` for any of them before anything is encoded.
    """
    if not isinstance(requests, Sequence) or not all(isinstance(request, Request) for request in requests):
        raise RequestError("A batch is a list of aloud.Request. Give each text as Request(text).")
    for request in requests:
        check_request(request)
    rate = model.config.codec.frame_rate
    lengths = [whole_frames(request.max_seconds, rate) for request in requests]
    for request in requests:
        check_voice(model, request.voice)
    conversations = []
    for request, asked in zip(requests, lengths, strict=True):
        parts = _read(
            model, tokenizer, [*request.context, Segment(request.text, speaker=request.speaker)], max_positions
        )
        before = 0 if request.voice is None else request.voice.positions
        _check_fits(before + _positions(parts), asked or 1, max_positions, model.config.codec.frame_rate)
        conversations.append(parts)
    return [
        _job(model, defaults, request, asked, _encode_conversation(model, conversation), max_positions)
        for request, asked, conversation in zip(requests, lengths, conversations, strict=True)
    ]


def read_segments(
    model: Csm, tokenizer: Tokenizer, segments: Sequence[Segment], *, max_positions: int
) -> tuple[Prompt, list[int | None]]:
    """A conversation's prompt with its audio encoded, and the frames of each segment's audio, None for text alone.

    Raises what is wrong with a segment, and `ContextTooLong`, both before anything is encoded.
    """
    conversation = _read(model, tokenizer, segments, max_positions)
    _check_fits(_positions(conversation), 0, max_positions, model.config.codec.frame_rate)
    return _encode_conversation(model, conversation), [part.frames for part in conversation]


def read_turns(model: Csm, tokenizer: Tokenizer, segments: Sequence[Segment], *, max_positions: int) -> list[Prompt]:
    """The prompt of each segment by itself; raises as `read_segments` does, for all of them together."""
    conversation = _read(model, tokenizer, segments, max_positions)
    _check_fits(_positions(conversation), 0, max_positions, model.config.codec.frame_rate)
    return [_encode_conversation(model, [part]) for part in conversation]


def text_prompt(model: Csm, tokenizer: Tokenizer, speaker: int, text: str) -> Prompt:
    """The prompt of a text to say."""
    return build_prompt(model.config, [Turn(turn_text(tokenizer, speaker, text))])


def resolve_guards(request: Request) -> Guards:
    """The request's guards; by default all, or none where it says how long to speak."""
    if request.guards is not None:
        return request.guards
    return Guards() if request.max_seconds is None else Guards.off()


def resolve_seed(request: Request) -> int:
    """The request's seed, or a fresh one."""
    return secrets.randbits(63) if request.seed is None else int(request.seed)


def whole_frames(max_seconds: float | None, frame_rate_hz: float) -> int | None:
    """The nearest whole number of frames, at least one; half a frame is rounded up."""
    return None if max_seconds is None else max(1, math.floor(float(max_seconds) * frame_rate_hz + 0.5))


def check_prompt(config: CsmConfig, prompt: Prompt) -> None:
    """Raise a `RequestError` unless every token of a prompt is one that the model has."""
    texts, codes = prompt.text_tokens, prompt.codes
    shapes_fit = texts.dim() == 1 and codes.shape == (len(texts), config.codebooks)
    if not shapes_fit or texts.dtype != torch.int64 or codes.dtype != torch.int64:
        raise RequestError(
            f"A prompt is int64 text_tokens [positions] and codes [positions, {config.codebooks}], "
            f"got {list(texts.shape)} and {list(codes.shape)}."
        )
    if bool((texts < -1).any() or (texts >= config.text_vocabulary).any()):
        raise RequestError(f"Text tokens of a prompt are from -1 to {config.text_vocabulary - 1}.")
    if bool((codes < 0).any() or (codes >= config.audio_vocabulary).any()):
        raise RequestError(f"Codes of a prompt are from 0 to {config.audio_vocabulary - 1}.")


def check_voice(model: Csm, voice: Voice | None) -> None:
    """Raise a `RequestError` unless a voice is one of this model."""
    if voice is not None and not isinstance(voice, Voice):
        raise RequestError(f"voice is what `Runtime.voice` returns, got {type(voice).__name__}.")
    if voice is not None and voice.model is not model:
        raise RequestError("The voice was made by another runtime. Make it with `voice` of the one that speaks.")


def encode(model: Csm, samples: np.ndarray) -> torch.Tensor:
    """float32 [samples] at the codec's rate -> int64 [frames, codebooks] on the CPU."""
    with memory.out_of_memory("Encoding audio needs", model.device, "Free some memory, or load on another device."):
        codes = mimi.encode(model.config.codec, model.codec, torch.from_numpy(samples), model.config.codebooks)
    return codes.T.cpu()


def resolve_sampling(defaults: Sampling, request: Request) -> Sampling:
    """The request's sampling over the checkpoint's; what is given for the whole goes for both decoders."""
    return Sampling(
        temperature=float(_first(request.temperature, defaults.temperature)),
        top_k=int(_first(request.top_k, defaults.top_k)),
        depth_temperature=float(_first(request.depth_temperature, request.temperature, defaults.depth_temperature)),
        depth_top_k=int(_first(request.depth_top_k, request.top_k, defaults.depth_top_k)),
    )


@dataclass(frozen=True)
class _Part:
    """A segment that was read: its text as tokens, its audio at the codec's rate, if any, and the frames of that."""

    text: list[int]
    samples: np.ndarray | None
    frames: int | None


def _read(model: Csm, tokenizer: Tokenizer, segments: Sequence[Segment], max_positions: int) -> list[_Part]:
    """Read a conversation's segments; audio that alone is longer than the context is not read to its end."""
    codec = model.config.codec
    parts = []
    for segment in segments:
        _check_segment(segment)
        text = turn_text(tokenizer, segment.speaker, segment.text)
        if segment.audio is None:
            parts.append(_Part(text, None, None))
            continue
        samples = read_audio(segment.audio, sample_rate=codec.sample_rate, max_seconds=max_positions / codec.frame_rate)
        parts.append(_Part(text, samples, math.ceil(len(samples) / codec.frame_size)))
    return parts


def _positions(parts: Sequence[_Part]) -> int:
    """Positions of a conversation's prompt: behind the frames of a segment's audio stands one that ends it."""
    return sum(len(part.text) + (0 if part.frames is None else part.frames + 1) for part in parts)


def _encode_conversation(model: Csm, parts: Sequence[_Part]) -> Prompt:
    turns = [Turn(part.text, None if part.samples is None else encode(model, part.samples)) for part in parts]
    return build_prompt(model.config, turns)


def _job(
    model: Csm, defaults: Sampling, request: Request, asked: int | None, prompt: Prompt, max_positions: int
) -> Job:
    """`asked` frames at most; None: as many as fit."""
    rate = model.config.codec.frame_rate
    guards = resolve_guards(request)
    prefix = None if request.voice is None else request.voice.prefix
    room = max_positions + 1 - len(prompt) - (0 if prefix is None else prefix.positions)
    return Job(
        prompt=prompt,
        sampling=resolve_sampling(defaults, request),
        seed=resolve_seed(request),
        max_frames=min(room, round(MAX_SECONDS * rate)) if asked is None else asked,
        guards=guards,
        text_limit_frames=text_limit_frames(guards, request.text, rate),
        prefix=prefix,
    )


def _check_fits(prompt_positions: int, frames: int, limit: int, rate: float) -> None:
    """A frame more fits than there are positions left: the last one is never read back."""
    if prompt_positions > limit:
        raise ContextTooLong(
            f"The prompt takes {prompt_positions} positions, {prompt_positions - limit} more than the model's context "
            f"of {limit}. Leave out {(prompt_positions - limit) / rate:.2f} s of context audio, or as many words."
        )
    room = limit + 1 - prompt_positions
    if frames > room:
        raise ContextTooLong(
            f"The prompt takes {prompt_positions} of {limit} positions, so max_seconds={frames / rate:.2f} is "
            f"{(frames - room) / rate:.2f} s too long; up to {room / rate:.2f} s would fit. Ask for less, or shorten "
            "the context."
        )


def _check_text(name: str, text: str) -> None:
    if not isinstance(text, str):
        raise TextEmpty(f"{name} must be a string, got {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} holds {text[error.start]!r} at character {error.start}, which is half of a character or a byte "
            "that is not UTF-8. Give it as UTF-8 text."
        ) from error


def _check_speaker(speaker: int) -> None:
    if not is_whole(speaker) or not 0 <= speaker <= MAX_SPEAKER:
        raise SpeakerInvalid(f"speaker must be a whole number from 0 to {MAX_SPEAKER}, got {speaker!r}.")


def _check_segment(segment: Segment) -> None:
    if not isinstance(segment, Segment):
        raise RequestError(f"The context is a list of aloud.Segment, got {type(segment).__name__} in it.")
    _check_speaker(segment.speaker)
    _check_text("A segment's text", segment.text)
    if segment.audio is None and not segment.text.strip():
        raise TextEmpty("A segment has neither text nor audio. Give it one, or leave it out.")


def _check_temperature(name: str, value: float | None) -> None:
    if value is None:
        return
    if not is_number(value):
        raise SamplingInvalid(f"{name} must be a number, got {value!r}.")
    if not (value == 0 or MIN_TEMPERATURE <= value <= MAX_TEMPERATURE):
        raise SamplingInvalid(
            f"{name} must be 0 (greedy) or from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}, got {value!r}."
        )


def _check_top_k(name: str, value: int | None) -> None:
    if value is not None and not (is_whole(value) and 0 <= value < 2**31):
        raise SamplingInvalid(f"{name} must be a whole number, 1 or more, or 0 to keep every token; got {value!r}.")


def _check_seed(seed: int | None) -> None:
    if seed is not None and not (is_whole(seed) and 0 <= seed < 2**64):
        raise SamplingInvalid(f"seed must be a whole number from 0 to 2^64 - 1, got {seed!r}.")


def _check_max_seconds(max_seconds: float | None) -> None:
    if max_seconds is None:
        return
    if not is_number(max_seconds):
        raise SamplingInvalid(f"max_seconds must be a number of seconds, got {max_seconds!r}.")
    if not 0 < max_seconds <= MAX_ASKED_SECONDS:
        raise SamplingInvalid(
            f"max_seconds must be above 0 and at most {MAX_ASKED_SECONDS:,}, a day, got {max_seconds!r}."
        )


def _check_guards(guards: Guards | None) -> None:
    if guards is None:
        return
    if not isinstance(guards, Guards):
        raise SamplingInvalid(f"guards must be aloud.Guards, for example Guards.off(), got {guards!r}.")
    for name, value in asdict(guards).items():
        if value is None and name in OPTIONAL_GUARDS:
            continue
        if not is_number(value) or not math.isfinite(value) or (value < 0 and name != "silence_dbfs"):
            raise SamplingInvalid(f"{name} of guards must be a finite number, and not negative, got {value!r}.")


def is_number(value: object) -> bool:
    """Whether a value is a real number, Python's or NumPy's; truth values are none."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, Python's or NumPy's; truth values are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _first(*values: float | int | None) -> float | int:
    """The first value that is given; the last one always is."""
    return next(value for value in values if value is not None)
