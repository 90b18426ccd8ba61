"""Conversations over many requests, by session id: kept for a while, exported, and rebuilt from what was exported."""

from __future__ import annotations

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
from aloud.server.problems import Problem
from aloud.server.settings import Limits
from aloud.server.voices import Registry
from aloud.session import Session

SESSION_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass
class Kept:
    """A session, how it was begun, and when it was last asked for."""

    session: Session
    voice: str
    last_asked: float  # seconds of time.monotonic


class Sessions:
    """The sessions of all keys. Every method may be called from any thread."""

    def __init__(self, engine: Engine, registry: Registry, limits: Limits) -> None:
        self._engine = engine
        self._registry = registry
        self._limits = limits
        self._kept: OrderedDict[tuple[str, str], Kept] = OrderedDict()
        self._lock = threading.RLock()

    def find(self, owner: str, session_id: str) -> Kept:
        """A session that is there."""
        check_id(session_id)
        with self._lock:
            self._forget_old()
            kept = self._kept.get((owner, session_id))
            if kept is None:
                raise Problem(404, "There is no such session, or not any more.", "session_not_found", "session_id")
            kept.last_asked = time.monotonic()
            self._kept.move_to_end((owner, session_id))
            return kept

    def open(self, owner: str, session_id: str, voice: str) -> Kept:
        """A session that is there, or a new one; blocks while a voice is read."""
        check_id(session_id)
        with self._lock:
            self._make_room(owner, session_id)
            is_there = (owner, session_id) in self._kept
        made = None if is_there else self._made(owner, voice)
        with self._lock:
            if made is not None and (owner, session_id) not in self._kept:
                return self._keep(owner, session_id, made)
            kept = self.find(owner, session_id)
        if kept.voice != voice:
            raise Problem(
                409, f"The session speaks with the voice {kept.voice!r}; a voice cannot change.", "voice_differs"
            )
        return kept

    def delete(self, owner: str, session_id: str) -> None:
        """Forget a session."""
        with self._lock:
            self.find(owner, session_id)
            del self._kept[owner, session_id]

    def exported(self, owner: str, session_id: str) -> dict[str, Any]:
        """All that is needed to rebuild a session elsewhere: its voice's name, and its turns as tokens."""
        kept = self.find(owner, session_id)
        turns = [
            {"text_tokens": turn.text_tokens.tolist(), "codes": turn.codes[turn.text_tokens < 0].tolist()}
            for turn in kept.session.turns
        ]
        return {"version": 1, "voice": kept.voice, "turns": turns}

    def restore(self, owner: str, session_id: str, content: dict[str, Any]) -> Kept:
        """A session from what `exported` gave; replaces one of the same id."""
        check_id(session_id)
        config = self._engine.runtime.config
        if content.get("version") != 1 or not isinstance(content.get("voice"), str):
            raise Problem(400, "A session is what GET /v1/sessions/ID gives.", "invalid_session")
        turns = [_turn(config, turn) for turn in _list(content.get("turns"))]
        with self._lock:
            self._make_room(owner, session_id)
        kept = self._made(owner, content["voice"])
        kept.session.restore(turns)
        with self._lock:
            return self._keep(owner, session_id, kept)

    def _made(self, owner: str, voice: str) -> Kept:
        read, speaker = self._registry.voice(owner, voice)
        return Kept(self._engine.session(voice=read, speaker=speaker), voice, time.monotonic())

    def _keep(self, owner: str, session_id: str, kept: Kept) -> Kept:
        self._make_room(owner, session_id)
        kept.last_asked = time.monotonic()
        self._kept[owner, session_id] = kept
        self._kept.move_to_end((owner, session_id))
        return kept

    def _make_room(self, owner: str, session_id: str) -> None:
        """Forget what is old; raises a `Problem` when one more session would be too many."""
        self._forget_old()
        others = sum(key[0] == owner and key[1] != session_id for key in self._kept)
        if others >= self._limits.sessions and (owner, session_id) not in self._kept:
            raise Problem(429, "There are too many sessions. Delete one.", "too_many_sessions", retry_after_seconds=60)

    def _forget_old(self) -> None:
        before = time.monotonic() - self._limits.session_seconds
        while self._kept and next(iter(self._kept.values())).last_asked < before:
            self._kept.popitem(last=False)


def check_id(session_id: str) -> None:
    """Raise a `Problem` for what cannot be a session's id."""
    if SESSION_ID.fullmatch(session_id) is None:
        raise Problem(400, "A session's id is 1 to 64 of A-Z, a-z, 0-9, _ and -.", "invalid_session_id", "session_id")


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise Problem(400, "A session is what GET /v1/sessions/ID gives.", "invalid_session")
    return value


def _turn(config: CsmConfig, content: object) -> Prompt:
    """A turn's prompt, with every number in its range."""
    wrong = Problem(400, "A turn of the session has tokens that the model does not have.", "invalid_session")
    if not isinstance(content, dict):
        raise wrong
    try:
        text_tokens = torch.tensor(_list(content.get("text_tokens")), dtype=torch.int64)
        frames = torch.tensor(_list(content.get("codes")), dtype=torch.int64).reshape(-1, config.codebooks)
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
