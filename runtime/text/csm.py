"""CSM's prompt: a conversation's segments, then the text to say, as text tokens and frames of audio.

    <|begin_of_text|>[S]text<|end_of_text|> frame frame ... frame end      for each segment with audio
    <|begin_of_text|>[S]text<|end_of_text|>                                for a segment of text alone, and at the end

S is the speaker's number, `end` a frame of nothing but the end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aloud.models.csm import CsmConfig
from aloud.request import Prompt
from aloud.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Turn:
    """A segment as tokens: its text of `turn_text`, and its audio as codes int64 [frames, codebooks], if it has any."""

    text: list[int]
    codes: torch.Tensor | None = None


def turn_text(tokenizer: Tokenizer, speaker: int, text: str) -> list[int]:
    """The text tokens of one turn."""
    return [tokenizer.begin, *tokenizer.encode(f"[{speaker}]{text}"), tokenizer.end]


def build_prompt(config: CsmConfig, turns: Sequence[Turn]) -> Prompt:
    """The positions of some turns in order; to speak, the last turn is the text to say, without codes."""
    text_tokens: list[torch.Tensor] = []
    codes: list[torch.Tensor] = []
    for turn in turns:
        text_tokens.append(torch.tensor(turn.text, dtype=torch.int64))
        codes.append(torch.zeros(len(turn.text), config.codebooks, dtype=torch.int64))
        if turn.codes is not None:
            text_tokens.append(torch.full((len(turn.codes) + 1,), -1))
            codes += [turn.codes, torch.full((1, config.codebooks), config.end_token)]
    return Prompt(torch.cat(text_tokens), torch.cat(codes))
