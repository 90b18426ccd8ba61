"""Conversations over many requests, by session id: kept for a while, exported, and rebuilt from what was exported.

With a folder, they are written there after each turn, and read from it when they are not here, or went on elsewhere.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from aloud.errors import RequestError
from aloud.live import Engine
from aloud.models.csm import CsmConfig
from aloud.prepare import check_prompt
from aloud.request import Prompt
from aloud.server.gate import REQUEST_ID
from aloud.server.problems import Problem
from aloud.server.session_files import SessionFiles
from aloud.server.settings import Settings
from aloud.server.voices import Registry
from aloud.session import Session

logger = logging.getLogger("aloud.server")

SESSION_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass
class Kept:
    """A session, how it was begun, when it was last asked for, and what of it is in its file."""

    session: Session
    voice: str
    last_asked: float  # seconds of time.monotonic
    stamp: int | None = None  # of the file; None: it was not written yet


class Sessions:
    """The sessions of all keys. Every method may be called from any thread, and may block."""

    def __init__(self, engine: Engine, registry: Registry, settings: Settings) -> None:
        self._engine = engine
        self._registry = registry
        self._limits = settings.limits
        folder = settings.sessions
        self._files = None if folder is None else SessionFiles(folder, settings.limits.session_seconds)
        self._kept: OrderedDict[tuple[str, str], Kept] = OrderedDict()
        self._lock = threading.RLock()

    def find(self, owner: str, session_id: str) -> Kept:
        """A session that is there."""
        kept = self._current(owner, session_id)
        if kept is None:
            raise Problem(404, "There is no such session, or not any more.", "session_not_found", "session_id")
        return kept

    def open(self, owner: str, session_id: str, voice: str) -> Kept:
        """A session that is there, or a new one."""
        kept = self._current(owner, session_id)
        if kept is None:
            self._check_room(owner, session_id)  # before the work as well
            made = self._made(owner, voice)
            with self._lock:
                kept = self._kept.get((owner, session_id)) or self._keep(owner, session_id, made)
        if kept.voice != voice:
            raise Problem(
                409, f"The session speaks with the voice {kept.voice!r}; a voice cannot change.", "voice_differs"
            )
        return kept

    def save(self, owner: str, session_id: str, kept: Kept) -> None:
        """Write a session whose turn is over, unless it was forgotten meanwhile."""
        if self._files is None:
            return
        with self._lock:
            if self._kept.get((owner, session_id)) is kept:
                kept.stamp = self._files.write(owner, session_id, _content(kept))

    def delete(self, owner: str, session_id: str) -> None:
        """Forget a session."""
        self.find(owner, session_id)
        with self._lock:
            self._kept.pop((owner, session_id), None)
            if self._files is not None:
                self._files.delete(owner, session_id)

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
            if self._files is not None:
                stamp = self._files.stamp(owner, session_id)
                if kept is not None and kept.stamp not in (None, stamp):  # it went on, or was deleted, elsewhere
                    del self._kept[owner, session_id]
                    kept = None
            if kept is not None:
                return self._keep(owner, session_id, kept)
        read = self._read(owner, session_id)
        if read is None:
            return None
        with self._lock:
            kept = self._kept.get((owner, session_id))
            if kept is None or kept.stamp != read.stamp:  # or somebody else has just read it, too
                kept = read
            return self._keep(owner, session_id, kept)

    def _read(self, owner: str, session_id: str) -> Kept | None:
        """A session from its file."""
        if self._files is None:
            return None
        try:
            written = self._files.read(owner, session_id)
            if written is None:
                return None
            content, stamp = written
            kept = self._rebuilt(owner, content)
        except (ValueError, Problem) as error:
            line = {"request_id": REQUEST_ID.get(), "fault": "SessionUnreadable", "session": session_id}
            logger.error(json.dumps(line | {"problem": error.code if isinstance(error, Problem) else "invalid_json"}))
            return None
        kept.stamp = stamp
        return kept

    def _rebuilt(self, owner: str, content: object) -> Kept:
        """A session from its content."""
        wrong = Problem(400, "A session is what GET /v1/sessions/ID gives.", "invalid_session")
        if not isinstance(content, dict) or content.get("version") != 1 or not isinstance(content.get("voice"), str):
            raise wrong
        if not isinstance(content.get("turns"), list):
            raise wrong
        turns = [_turn(self._engine.runtime.config, turn) for turn in content["turns"]]
        kept = self._made(owner, content["voice"])
        kept.session.restore(turns)
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
        with self._lock:
            self._forget_old()
            # Those that were written are counted by their files: another process may have deleted them.
            others = {key[1] for key, kept in self._kept.items() if key[0] == owner and kept.stamp is None}
        if self._files is not None:
            others |= self._files.ids(owner)
        if len(others - {session_id}) >= self._limits.sessions:
            raise Problem(429, "There are too many sessions. Delete one.", "too_many_sessions", retry_after_seconds=60)

    def _forget_old(self) -> None:
        before = time.monotonic() - self._limits.session_seconds
        while self._kept and next(iter(self._kept.values())).last_asked < before:
            self._kept.popitem(last=False)


def _content(kept: Kept) -> dict[str, Any]:
    """A session as JSON has it."""
    turns = [
        {"text_tokens": turn.text_tokens.tolist(), "codes": turn.codes[turn.text_tokens < 0].tolist()}
        for turn in kept.session.turns
    ]
    return {"version": 1, "voice": kept.voice, "turns": turns}


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
