"""A voice: a conversation that a model has read once, for any number of requests to begin behind."""

from __future__ import annotations

from dataclasses import dataclass

from aloud.engine.stream import Prefix
from aloud.models.csm import Csm


@dataclass(frozen=True, eq=False)
class Voice:
    """What `Runtime.voice` returns: the cached beginning of a prompt.

    A request with it starts from a copy of the cache, so its first audio does not wait for the voice to be read again.
    """

    model: Csm  # whose it is
    prefix: Prefix

    @property
    def positions(self) -> int:
        """Positions of the model's context that it takes."""
        return self.prefix.positions

    def __repr__(self) -> str:
        return f"Voice({self.positions} positions, {self.prefix.cache.nbytes / 1e6:.1f} MB)"
