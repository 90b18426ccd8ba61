"""A voice is not pickled or copied: the model would be with it, and no runtime would take the result."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest

from aloud import Segment, Voice
from live.quick import QuickSteps, quick_runtime


@pytest.mark.parametrize(
    "copied", [pickle.dumps, copy.copy, copy.deepcopy], ids=["pickle.dumps", "copy.copy", "copy.deepcopy"]
)
def test_a_voice_is_not_copied(copied: Callable[[Voice], object]) -> None:
    runtime = quick_runtime(QuickSteps(1), 1)
    voice = runtime.voice([Segment("Hi.")])
    with pytest.raises(TypeError, match=r"^A voice cannot be pickled or copied: .* keep its segments and call `voice`"):
        copied(voice)
    assert runtime.speak("Hello.", voice=voice).codes is not None
