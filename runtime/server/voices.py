"""The registry of voices: a folder for each, with its sample, transcript, consent and digest; and which stay read.

    FOLDER/public/NAME/ or FOLDER/OWNER/NAME/:  sample.wav  voice.json

A voice belongs to the key that made it and is seen by no other; those in `public`, which the operator puts there, are
everybody's. Names are never paths.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from aloud.api import Runtime
from aloud.audio import Audio, read_audio
from aloud.request import Segment
from aloud.server import log
from aloud.server.gate import EVERYBODY
from aloud.server.problems import Problem
from aloud.server.settings import Settings
from aloud.voice import Voice

NAME = re.compile(r"[a-z0-9_-]{1,64}")
PUBLIC = "public"
SAMPLE, RECORD = "sample.wav", "voice.json"


@dataclass(frozen=True)
class VoiceRecord:
    """What is kept of a voice beside its sample."""

    name: str
    text: str  # what is said in the sample
    consent: str  # how the speaker agreed
    sha256: str  # of the sample file
    seconds: float
    created_at: int  # seconds since 1970


@dataclass(frozen=True)
class ListedVoice(VoiceRecord):
    """A voice as its clients see it, which is more than OpenAI's clients look for."""

    id: str
    object: Literal["audio.voice"]
    type: Literal["audio_sample"]
    is_public: bool  # of the operator; nobody's to delete


class Registry:
    """All voices. Every method may be called from any thread; those that read or write files block."""

    def __init__(self, runtime: Runtime, settings: Settings) -> None:
        self._runtime = runtime
        self._settings = settings
        self._temporary = tempfile.TemporaryDirectory(prefix="aloud-voices-") if settings.voices is None else None
        self._folder = Path(self._temporary.name) if self._temporary else settings.voices
        self._lock = threading.RLock()
        self._reading: dict[tuple[str, str, str], threading.Lock] = {}
        self._read: OrderedDict[tuple[str, str, str], Voice] = OrderedDict()  # by owner, name and digest
        self._warned: set[str] = set()

    def warn(self) -> None:
        """Log which aliases stand for voices that not everybody has, and which of everybody's cannot be read."""
        places = (PUBLIC,) if self._settings.keys else (PUBLIC, EVERYBODY)
        there = {record.name for place in places for record in self._records(place)}
        for name, target in self._settings.aliases.items():
            if isinstance(target, str) and target not in there:
                where = f"{PUBLIC}/{target} in the folder of voices"
                log.warn(f"The alias {name} stands for the voice {target}, and there is none at {where}.")

    def listed(self, owner: str) -> list[ListedVoice]:
        """The voices that an owner can use."""
        found = {}
        for place in (PUBLIC, owner):
            for record in self._records(place):
                found[record.name] = _listed(record, is_public=place == PUBLIC)
        return list(found.values())

    def add(self, owner: str, name: str, samples: np.ndarray, text: str, consent: str) -> ListedVoice:
        """Keep a new voice."""
        check_name(name)
        if name in self._settings.aliases:
            raise Problem(409, f"{name!r} is a name that stands for another voice. Choose another.", "name_taken")
        with self._lock:
            folder = self._place(owner)
            if (folder / name).exists():
                raise Problem(409, f"There is a voice {name!r} already. Delete it first.", "name_taken")
            others = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
            if len(others) >= self._settings.limits.voices:
                raise Problem(409, f"There are {self._settings.limits.voices} voices already.", "too_many_voices")
            folder.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=".", dir=folder))
            try:
                Audio(samples, self._runtime.sample_rate).save(building / SAMPLE)
                digest = hashlib.sha256((building / SAMPLE).read_bytes()).hexdigest()
                seconds = round(len(samples) / self._runtime.sample_rate, 3)
                record = VoiceRecord(name, text, consent, digest, seconds, int(time.time()))
                (building / RECORD).write_text(json.dumps(asdict(record), ensure_ascii=False), encoding="utf-8")
                building.rename(folder / name)
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
        return _listed(record, is_public=False)

    def delete(self, owner: str, name: str) -> None:
        """Forget a voice of an owner's."""
        check_name(name)
        with self._lock:
            if not (self._place(owner) / name).is_dir():
                raise _unknown(name, "name")
            leaving = Path(tempfile.mkdtemp(prefix=".", dir=self._place(owner)))
            (self._place(owner) / name).rename(leaving / name)  # at once, or a crash would leave half of it
            shutil.rmtree(leaving)
            for key in [key for key in self._read if key[:2] == (owner, name)]:
                del self._read[key]

    def voice(self, owner: str, name: str) -> tuple[Voice | None, int]:
        """What to speak with: a voice that has been read, or none, and the speaker's number."""
        target = self._settings.aliases.get(name, name)
        if isinstance(target, int):
            return None, target
        place, record = self._found(owner, name, target)
        key = (place, target, record.sha256)
        with self._lock:
            reading = self._reading.setdefault(key, threading.Lock())
        with reading:  # of this voice alone: encoding takes long
            with self._lock:
                voice = self._read.get(key)
            if voice is None:
                samples = read_audio(self._place(place) / target / SAMPLE, sample_rate=self._runtime.sample_rate)
                voice = self._runtime.voice([Segment(record.text, samples, speaker=0)])
        with self._lock:
            self._reading.pop(key, None)
            if self._record(place, target) == record:  # it was not deleted meanwhile
                self._read[key] = voice
                self._read.move_to_end(key)
            while len(self._read) > self._settings.limits.cached_voices:
                self._read.popitem(last=False)
        return voice, 0

    def check(self, owner: str, name: str) -> None:
        """Raise a `Problem` when there is no such voice, or not any more."""
        target = self._settings.aliases.get(name, name)
        if isinstance(target, str):
            self._found(owner, name, target)

    def _found(self, owner: str, name: str, target: str) -> tuple[str, VoiceRecord]:
        """The place and the record of the voice that a name stands for."""
        check_name(target, "voice")
        for place in (owner, PUBLIC):
            record = self._record(place, target)
            if record is not None:
                return place, record
        raise _unknown(name, "voice") if name == target else _unknown_target(name, target)

    def _place(self, owner: str) -> Path:
        assert self._folder is not None
        return self._folder / owner

    def _records(self, owner: str) -> Iterator[VoiceRecord]:
        """The records of an owner that can be read, in the order of their names."""
        folder = self._place(owner)
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            record = self._record(owner, path.name)
            if record is not None:
                yield record

    def _record(self, owner: str, name: str) -> VoiceRecord | None:
        if NAME.fullmatch(name) is None:
            return None
        folder = self._place(owner) / name
        try:
            return VoiceRecord(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            if folder.is_dir():  # else there is no such voice, or not any more
                self._warn_once(f"The voice in {folder} cannot be read: {RECORD}: {type(error).__name__}: {error}")
            return None

    def _warn_once(self, warning: str) -> None:
        """Log it, but not at each request."""
        with self._lock:
            if warning in self._warned:
                return
            self._warned.add(warning)
        log.warn(warning)


def check_name(name: str, parameter: str = "name") -> None:
    """Raise a `Problem` for what cannot be a voice's name, with the field that it was given in."""
    if NAME.fullmatch(name) is None:
        raise Problem(400, "A voice's name is 1 to 64 of a-z, 0-9, _ and -.", "invalid_name", parameter)


def _listed(record: VoiceRecord, *, is_public: bool) -> ListedVoice:
    return ListedVoice(**asdict(record), id=record.name, object="audio.voice", type="audio_sample", is_public=is_public)


def _unknown(name: str, parameter: str) -> Problem:
    shown = name if NAME.fullmatch(name) else "of that name"
    return Problem(404, f"There is no voice {shown}. GET /v1/audio/voices lists them.", "voice_not_found", parameter)


def _unknown_target(name: str, target: str) -> Problem:
    message = f"{name} stands for the voice {target}, and there is none of that name. GET /v1/audio/voices lists them."
    return Problem(404, message, "voice_not_found", "voice")
