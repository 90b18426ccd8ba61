"""What one asks of a model: segments of a conversation, sampling, guards, a whole request; plain data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import torch

    from aloud.audio import Audio
    from aloud.voice import Voice

    # What `aloud.read_audio` takes.
    AudioSource: TypeAlias = (
        Audio
        | np.ndarray
        | torch.Tensor
        | tuple[np.ndarray | torch.Tensor, int]
        | str
        | os.PathLike[Any]
        | bytes
        | bytearray
        | memoryview
        | BinaryIO
    )
else:
    AudioSource = Any


@dataclass(frozen=True)
class Segment:
    """A turn of the conversation so far: what was said, by whom, and how it sounded.

    `audio` is anything that `aloud.read_audio` takes; an array is 24 kHz unless given as (array, rate). Without audio
    the segment is context as text alone.
    """

    text: str
    audio: AudioSource | None = None
    speaker: int = 0


MAX_SECONDS = 90.0
"""The longest that a text is spoken, or a piece of a longer one, when nothing else bounds it."""
MIN_TEMPERATURE = 1e-3
"""The smallest temperature that is not greedy; below it, logits would overflow float32."""
MAX_TEMPERATURE = 100.0


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: by the backbone (codebook 0) and by the depth decoder (the other codebooks).

    Temperature 0 is greedy. A top-k of 0 keeps every token.
    """

    temperature: float = 0.9
    top_k: int = 50
    depth_temperature: float = 0.9
    depth_top_k: int = 50


@dataclass(frozen=True)
class Guards:
    """What ends speech that does not end by itself; None switches a guard off.

    text_seconds_per_byte, text_seconds: speech longer than `text_seconds` + `text_seconds_per_byte` for each UTF-8
        byte of the text (six of them for a digit, which is read as a word) ends with "text_length". Fast speech needs
        about 0.06 s a letter; the default is more than three times that.
    silence_seconds: a run of this much silence ends with "silence"; a frame is silent below `silence_dbfs`. Silence
        at the end is trimmed to `silence_kept_seconds`, however the speech ended.
    repeat_seconds: the same frame repeated for this long ends with "repeat".
    """

    text_seconds_per_byte: float | None = 0.2
    text_seconds: float = 4.0
    silence_seconds: float | None = 3.0
    silence_dbfs: float = -50.0
    silence_kept_seconds: float = 0.16
    repeat_seconds: float | None = 1.0

    @staticmethod
    def off() -> Guards:
        """No guard: speech ends by the model's end of speech or by its length."""
        return Guards(text_seconds_per_byte=None, silence_seconds=None, repeat_seconds=None)


@dataclass(frozen=True)
class Request:
    """One thing to say; the fields are the arguments of `Runtime.speak`."""

    text: str
    speaker: int = 0
    context: Sequence[Segment] = ()
    temperature: float | None = None
    top_k: int | None = None
    depth_temperature: float | None = None
    depth_top_k: int | None = None
    seed: int | None = None
    max_seconds: float | None = None
    guards: Guards | None = None
    voice: Voice | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it: at each position either a text token or a frame of audio.

    text_tokens: int64 [positions], -1 where the position is audio
    codes: int64 [positions, codebooks], all zero where the position is text
    """

    text_tokens: torch.Tensor
    codes: torch.Tensor

    def __len__(self) -> int:
        """Positions of the context that the prompt takes."""
        return int(self.text_tokens.shape[0])

    def __getitem__(self, positions: slice) -> Prompt:
        """A run of its positions."""
        return Prompt(self.text_tokens[positions], self.codes[positions])
