"""Every error leaves a process as it is: pickled and copied with its message and its fields."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from aloud import errors

GIVEN: dict[type[Exception], tuple[tuple[Any, ...], dict[str, Any]]] = {
    errors.Overloaded: (("All slots are taken.",), {"retry_after_seconds": 1.5}),
    errors.TensorsMismatch: (
        ("model.safetensors",),
        {"missing": ["a.weight", "b.weight"], "unexpected": ["c"], "wrong_shape": ["d [2]"], "wrong_dtype": ["e"]},
    ),
}
"""What those are made of that take more than a message."""


def kinds(base: type[errors.AloudError] = errors.AloudError) -> Iterator[type[errors.AloudError]]:
    yield base
    for kind in base.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield from kinds(kind)


def made(kind: type[errors.AloudError]) -> errors.AloudError:
    arguments, named = GIVEN.get(kind, (("It does not work. Do something else.",), {}))
    return kind(*arguments, **named)


def assert_same(error: BaseException, expected: BaseException) -> None:
    assert type(error) is type(expected)
    assert error is not expected
    assert str(error) == str(expected)
    assert error.args == expected.args
    assert vars(error) == vars(expected)


@pytest.mark.parametrize("kind", list(kinds()), ids=lambda kind: kind.__name__)
def test_an_error_is_copied_with_all_it_says(kind: type[errors.AloudError]) -> None:
    expected = made(kind)
    vars(expected)["note"] = "seen by nobody"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert_same(pickle.loads(pickle.dumps(expected, protocol)), expected)
    assert_same(copy.copy(expected), expected)
    assert_same(copy.deepcopy(expected), expected)


def test_fields_come_through() -> None:
    assert pickle.loads(pickle.dumps(made(errors.Overloaded))).retry_after_seconds == 1.5
    mismatch = pickle.loads(pickle.dumps(made(errors.TensorsMismatch)))
    assert mismatch.missing == ("a.weight", "b.weight")
    assert str(mismatch).count("do not fit its config.json") == 1
