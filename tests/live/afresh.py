"""What a conversation that is written down by hand makes a fresh loop say: the oracle of sessions and pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from aloud import Audio, Guards, Runtime, Sampling, Voice
from aloud.engine.loop import Loop
from aloud.engine.slots import Slots
from aloud.engine.steps import EagerSteps
from aloud.engine.stream import Job
from aloud.request import Prompt
from aloud.text.csm import Turn, build_prompt, turn_text


def never_ending(runtime: Runtime, sampling: Sampling, *, max_streams: int) -> Runtime:
    """The runtime, with a model that does not end its speech by chance, as random weights do.

    Its end token is one that the codec has no entry for, and that is never drawn.
    """
    config = runtime.config
    assert config.drawable < config.audio_vocabulary
    model = replace(runtime.model, config=replace(config, end_token=config.audio_vocabulary - 1))
    return Runtime(model, runtime.tokenizer, sampling, runtime.name, max_streams=max_streams)


@dataclass
class Transcript:
    """A conversation written down by hand, from what was said and what was heard."""

    runtime: Runtime
    turns: list[Turn] = field(default_factory=list)

    def add(self, speaker: int, text: str, codes: np.ndarray | None) -> None:
        self.turns.append(self._turn(speaker, text, codes))

    def prompt(self, text: str, speaker: int = 1) -> Prompt:
        """All of it, then the text to say."""
        return build_prompt(self.runtime.config, [*self.turns, self._turn(speaker, text, None)])

    def _turn(self, speaker: int, text: str, codes: np.ndarray | None) -> Turn:
        tokens = turn_text(self.runtime.tokenizer, speaker, text)
        return Turn(tokens, None if codes is None else torch.from_numpy(codes))


def codes_of(chunks: Sequence[Audio]) -> np.ndarray:
    """int64 [frames, codebooks]."""
    codes = [chunk.codes for chunk in chunks]
    assert all(part is not None for part in codes)
    return np.concatenate([part for part in codes if part is not None])


def samples_of(chunks: Sequence[Audio]) -> np.ndarray:
    return np.concatenate([chunk.samples for chunk in chunks])


def said_afresh(
    runtime: Runtime, prompt: Prompt, sampling: Sampling, seed: int, frames: int, voice: Voice | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and samples that a loop of its own, in fresh memory, makes of a prompt."""
    model = runtime.model
    steps = EagerSteps(model, Slots(model.allocate(2, model.max_positions), 1, model.max_positions))
    loop = Loop(steps, 1, 12.5)
    prefix = None if voice is None else voice.prefix
    stream = loop.submit(Job(prompt, sampling, seed, frames, Guards.off(), None, prefix))
    frames_made = list(iter(lambda: loop.next(stream), None))
    return np.stack([part.codes for part in frames_made]), np.concatenate([part.samples for part in frames_made])
