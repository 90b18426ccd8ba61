"""A voice: a conversation that a model has read once, for any number of requests to begin behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

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

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied: the whole model would be, and a voice of that one is no voice of this."""
        raise TypeError(
            "A voice cannot be pickled or copied: it belongs to the model that read it. Use the same one everywhere; "
            "to make it anew elsewhere, keep its segments and call `voice` of the Runtime there."
        )

    def __repr__(self) -> str:
        return f"Voice({self.positions} positions, {self.prefix.cache.nbytes / 1e6:.1f} MB)"
