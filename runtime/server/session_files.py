"""Sessions as files, a folder for each key, so that another process can go on with them.

    FOLDER/OWNER/SESSION_ID.json:  what `GET /v1/sessions/ID` gives

Several servers may share the folder, a session being asked for at one of them at a time; the last to write wins.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from aloud.server.gate import EVERYBODY

BUILDING = ".session-"
"""What the name of a file begins with that is being written."""
OWN = re.compile(rf"({EVERYBODY}|[0-9a-f]{{16}})/({re.escape(BUILDING)}.*|[A-Za-z0-9_-]{{1,64}}\.json)")
"""The files that are written here."""


class SessionFiles:
    """All sessions of a folder. Every method blocks; owners and ids are no paths."""

    def __init__(self, folder: Path, keep_seconds: float) -> None:
        """keep_seconds: without a turn, after which a session is forgotten."""
        self._folder = folder
        self._keep_seconds = keep_seconds

    def stamp(self, owner: str, session_id: str) -> int | None:
        """What changes whenever a session is written; None where there is none, or not any more. Raises `OSError`."""
        try:
            written_ns = self._path(owner, session_id).stat().st_mtime_ns
        except FileNotFoundError:
            return None
        return written_ns if self._is_fresh(written_ns) else None

    def read(self, owner: str, session_id: str) -> tuple[Any, int] | None:
        """What was written, and its stamp, if it is not too old.

        Raises `ValueError` for a file that is no JSON, and `OSError`.
        """
        try:
            with self._path(owner, session_id).open(encoding="utf-8") as file:
                written_ns = os.fstat(file.fileno()).st_mtime_ns
                return (json.load(file), written_ns) if self._is_fresh(written_ns) else None
        except FileNotFoundError:
            return None
        except RecursionError as error:
            raise ValueError("The file is nested too deeply.") from error

    def write(self, owner: str, session_id: str, content: dict[str, Any]) -> int:
        """Put a session in place of what there is of it, at once and whole -> its stamp."""
        path = self._path(owner, session_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        number, building = tempfile.mkstemp(prefix=BUILDING, dir=path.parent)  # for nobody else's eyes
        try:
            with os.fdopen(number, "w", encoding="utf-8") as file:
                json.dump(content, file, separators=(",", ":"))
                file.flush()
                written_ns = os.fstat(file.fileno()).st_mtime_ns
            os.replace(building, path)
        except BaseException:
            Path(building).unlink(missing_ok=True)
            raise
        return written_ns

    def delete(self, owner: str, session_id: str) -> None:
        """Forget a session."""
        self._path(owner, session_id).unlink(missing_ok=True)

    def ids(self, owner: str) -> set[str]:
        """The sessions of an owner."""
        return {path.stem for path in (self._folder / owner).glob("*.json") if self.stamp(owner, path.stem) is not None}

    def sweep(self) -> None:
        """Delete what is too old, of all owners: sessions, and what was left of a write that did not end.

        Whatever else there is in the folder stays.
        """
        for path in self._folder.glob("*/*"):
            if OWN.fullmatch(f"{path.parent.name}/{path.name}") is None:
                continue
            with suppress(FileNotFoundError):  # another process sweeps, too
                if not self._is_fresh(path.stat().st_mtime_ns):
                    path.unlink()

    def _path(self, owner: str, session_id: str) -> Path:
        return self._folder / owner / f"{session_id}.json"

    def _is_fresh(self, written_ns: int) -> bool:
        return time.time() - written_ns / 1e9 <= self._keep_seconds
