"""The server's log: a JSON object a line, with the request's id, and nothing of anybody's text."""

from __future__ import annotations

import json
import logging
import traceback
from contextvars import ContextVar
from pathlib import Path
from typing import Any

logger = logging.getLogger("aloud.server")

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that is being answered, also in a thread or task that works for it."""


def write(**line: Any) -> None:
    """What happened."""
    logger.info(json.dumps({"request_id": REQUEST_ID.get()} | line))


def warn(warning: str, **line: Any) -> None:
    """What whoever runs the server should see to, in a sentence."""
    logger.warning(json.dumps({"request_id": REQUEST_ID.get(), "warning": warning} | line))


def write_fault(error: BaseException, **line: Any) -> None:
    """What went wrong: its kind and where, innermost last, but not its message, which may quote a text."""
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    fault = {"fault": type(error).__name__, "at": places[-8:]}
    logger.error(json.dumps({"request_id": REQUEST_ID.get()} | fault | line))
