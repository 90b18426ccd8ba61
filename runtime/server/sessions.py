"""Conversations over many requests, by session id: kept for a while, exported, and rebuilt from what was exported.

With a folder, they are written there after each turn, and read from it when they are not here, or went on elsewhere.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from aloud.errors import RequestError
from aloud.live import Engine
from aloud.models.csm import CsmConfig
from aloud.prepare import check_prompt
from aloud.request import Prompt
from aloud.server import log
from aloud.server.problems import Problem
from aloud.server.session_files import SessionFiles
from aloud.server.settings import Settings
from aloud.server.voices import Registry
from aloud.session import Session

SWEEP_SECONDS = 60.0
SESSION_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
EMPTY = {"version": 1, "voice": "alloy", "turns": []}
"""What begins a session in which nothing was said yet."""


@dataclass
class Kept:
    """A session, how it was begun, when it was last asked for, and what of it is in its file."""

    session: Session
    voice: str
    last_asked: float  # seconds of time.monotonic
    stamp: int | None = None  # of the file; None: it was not written yet
    writing: threading.Lock = field(default_factory=threading.Lock)


class Sessions:
    """The sessions of all keys. Every method may be called from any thread, and may block."""

    def __init__(self, engine: Engine, registry: Registry, settings: Settings) -> None:
        self._engine = engine
        self._registry = registry
        self._limits = settings.limits
        folder = settings.sessions
        self._files = None if folder is None else SessionFiles(folder, settings.limits.session_seconds)
        self._swept = -SWEEP_SECONDS  # when, in seconds of time.monotonic
        self._kept: OrderedDict[tuple[str, str], Kept] = OrderedDict()
        self._lock = threading.RLock()

    def find(self, owner: str, session_id: str) -> Kept:
        """A session that is there."""
        kept = self._current(owner, session_id)
        if kept is None:
            raise _missing()
        return kept

    def open(self, owner: str, session_id: str, voice: str, *, is_chosen: bool) -> Kept:
        """A session that is there, or a new one; also the voice of one that is there must not have been deleted.

        is_chosen: whether the client named the voice, which must then be the session's; else it is for a new one alone.
        """
        kept = self._current(owner, session_id)
        if kept is not None and not is_chosen:
            voice = kept.voice
        self._registry.check(owner, voice)
        if kept is None:
            self._check_room(owner, session_id)  # before the work as well
            made = self._made(owner, voice)
            with self._lock:
                kept = self._kept.get((owner, session_id)) or self._keep(owner, session_id, made)
        if kept.voice != voice and is_chosen:
            message = f"The session speaks with the voice {kept.voice!r}; a voice cannot change. Leave voice out."
            raise Problem(409, message, "voice_differs", "voice")
        return kept

    def save(self, owner: str, session_id: str, kept: Kept) -> None:
        """Write a session whose turn is over, unless it was forgotten meanwhile."""
        kept.last_asked = time.monotonic()
        if self._files is None:
            return
        with kept.writing, _disk():
            if self._kept.get((owner, session_id)) is kept:
                kept.stamp = self._files.write(owner, session_id, _content(kept))

    def delete(self, owner: str, session_id: str) -> None:
        """Forget a session, also one that cannot be read."""
        check_id(session_id)
        with self._lock:
            self._forget_old()
            was_here = self._kept.pop((owner, session_id), None) is not None
        with _disk():
            was_kept = self._files is not None and self._files.stamp(owner, session_id) is not None
            if self._files is not None:
                self._files.delete(owner, session_id)
        if not was_here and not was_kept:
            raise _missing()

    def exported(self, owner: str, session_id: str) -> dict[str, Any]:
        """All that is needed to rebuild a session elsewhere: its voice's name, and its turns as tokens."""
        return _content(self.find(owner, session_id))

    def restore(self, owner: str, session_id: str, content: dict[str, Any]) -> Kept:
        """A session from what `exported` gave; replaces one of the same id."""
        check_id(session_id)
        self._check_room(owner, session_id)  # before the work as well
        kept = self._keep(owner, session_id, self._rebuilt(owner, content))
        self.save(owner, session_id, kept)
        return kept

    def _current(self, owner: str, session_id: str) -> Kept | None:
        """A session as it is now: the one that is here, or what another process has written of it since."""
        check_id(session_id)
        with self._lock:
            self._forget_old()
            kept = self._kept.get((owner, session_id))
        if kept is not None and self._is_current(owner, session_id, kept):
            return self._keep(owner, session_id, kept)
        read = self._read(owner, session_id)
        with self._lock:
            now = self._kept.get((owner, session_id))
            if now is not kept and now is not None:  # somebody else has just read it, or gone on
                return self._keep(owner, session_id, now)
            if read is None:
                self._kept.pop((owner, session_id), None)
                return None
            return self._keep(owner, session_id, read)

    def _is_current(self, owner: str, session_id: str, kept: Kept) -> bool:
        """Whether a session has neither gone on nor been deleted elsewhere."""
        if self._files is None or kept.session.is_busy:
            return True
        with kept.writing, _disk():
            return kept.stamp in (None, self._files.stamp(owner, session_id))

    def _read(self, owner: str, session_id: str) -> Kept | None:
        """A session from its file."""
        if self._files is None:
            return None
        try:
            with _disk():
                written = self._files.read(owner, session_id)
            if written is None:
                return None
            content, stamp = written
            kept = self._rebuilt(owner, content)
        except ValueError as error:
            raise _unreadable() from error
        except Problem as problem:
            raise _unreadable() if problem.code == "invalid_session" else problem from problem
        kept.stamp = stamp
        return kept

    def _rebuilt(self, owner: str, content: object) -> Kept:
        """A session from its content."""
        wrong = Problem(400, "A session is what GET /v1/sessions/ID gives.", "invalid_session")
        if not isinstance(content, dict) or content.get("version") != 1 or not isinstance(content.get("voice"), str):
            raise wrong
        if not isinstance(content.get("turns"), list):
            raise wrong
        turns: list[Prompt] = []
        room = self._engine.runtime.max_positions
        for turn in reversed(content["turns"]):  # what is older than there is room for would be dropped at once
            turns.append(_turn(self._engine.runtime.config, turn))
            room -= len(turns[-1])
            if room < 0:
                break
        kept = self._made(owner, content["voice"])
        kept.session.restore(turns[::-1])
        return kept

    def _made(self, owner: str, voice: str) -> Kept:
        read, speaker = self._registry.voice(owner, voice)
        return Kept(self._engine.session(voice=read, speaker=speaker), voice, time.monotonic())

    def _keep(self, owner: str, session_id: str, kept: Kept) -> Kept:
        with self._lock:
            if (owner, session_id) not in self._kept:
                self._check_room(owner, session_id)
            kept.last_asked = time.monotonic()
            self._kept[owner, session_id] = kept
            self._kept.move_to_end((owner, session_id))
        return kept

    def _check_room(self, owner: str, session_id: str) -> None:
        """Raise a `Problem` when one more session would be too many."""
        now = time.monotonic()
        if self._files is not None and now - self._swept > SWEEP_SECONDS:
            self._swept = now
            with _disk():
                self._files.sweep()
        with self._lock:
            self._forget_old()
            # Those that were written are counted by their files: another process may have deleted them.
            others = {key[1] for key, kept in self._kept.items() if key[0] == owner and kept.stamp is None}
        if self._files is not None:
            with _disk():
                others |= self._files.ids(owner)
        if len(others - {session_id}) >= self._limits.sessions:
            raise Problem(429, "There are too many sessions. Delete one.", "too_many_sessions", retry_after_seconds=60)

    def _forget_old(self) -> None:
        before = time.monotonic() - self._limits.session_seconds
        old = []
        for key, kept in self._kept.items():  # who was asked for last comes last
            if kept.last_asked >= before:
                break
            if not kept.session.is_busy:
                old.append(key)
        for key in old:
            del self._kept[key]


def _content(kept: Kept) -> dict[str, Any]:
    """A session as JSON has it."""
    turns = [
        {"text_tokens": turn.text_tokens.tolist(), "codes": turn.codes[turn.text_tokens < 0].tolist()}
        for turn in kept.session.turns
    ]
    return {"version": 1, "voice": kept.voice, "turns": turns}


def _missing() -> Problem:
    message = (
        "There is no such session, or not any more. Begin one with session_id in POST /v1/audio/speech, or where the "
        f"user speaks first, PUT {json.dumps(EMPTY)} to /v1/sessions/ID."
    )
    return Problem(404, message, "session_not_found", "session_id")


def _unreadable() -> Problem:
    message = "The session's file cannot be read. Delete the session, or PUT it anew."
    return Problem(409, message, "session_unreadable", "session_id")


@contextmanager
def _disk() -> Iterator[None]:
    """A disk that fails is no session that is not there, which would be begun anew and written over."""
    try:
        yield
    except OSError as error:
        log.write_fault(error)
        message = "Sessions cannot be read or written now. Ask again."
        raise Problem(503, message, "sessions_unavailable", retry_after_seconds=5) from error


def check_id(session_id: str) -> None:
    """Raise a `Problem` for what cannot be a session's id."""
    if SESSION_ID.fullmatch(session_id) is None:
        raise Problem(400, "A session's id is 1 to 64 of A-Z, a-z, 0-9, _ and -.", "invalid_session_id", "session_id")


def _turn(config: CsmConfig, content: object) -> Prompt:
    """A turn's prompt, with every number in its range."""
    wrong = Problem(400, "A turn of the session has tokens that the model does not have.", "invalid_session")
    if not isinstance(content, dict):
        raise wrong
    try:
        text_tokens = torch.tensor(content.get("text_tokens"), dtype=torch.int64)
        frames = torch.tensor(content.get("codes"), dtype=torch.int64).reshape(-1, config.codebooks)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise wrong from error
    audio = text_tokens == -1
    if text_tokens.dim() != 1 or not len(text_tokens) or int(audio.sum()) != len(frames):
        raise wrong
    if bool((frames >= config.drawable).any()):  # which no session that was spoken here has
        raise wrong
    codes = torch.zeros(len(text_tokens), config.codebooks, dtype=torch.int64)
    codes[audio] = frames
    prompt = Prompt(text_tokens, codes)
    try:
        check_prompt(config, prompt)
    except RequestError as error:
        raise wrong from error
    return prompt
