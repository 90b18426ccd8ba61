"""Sessions in a folder: two servers over it are one, for those who ask them one after the other."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from aloud import Engine
from aloud.server.session_files import SessionFiles
from aloud.server.settings import Limits, Settings
from server.running import LONG, Lines, Running, asked, assert_problem, is_idle, serving, wait_until

OWNER = "everybody"
TURNS = ("Hello there.", "And how are you?", "Fine, thank you.", "Good to hear.")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sessions"


@pytest.fixture
def pair(engine: Engine, folder: Path) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """Clients of two servers that share the folder."""
    settings = Settings(model="small", sessions=folder, limits=Limits(sessions=3))
    with (
        serving(engine, settings) as first,
        serving(engine, settings) as second,
        first.client() as one,
        second.client() as other,
    ):
        yield one, other


def say(client: httpx.Client, session_id: str, text: str, **body: object) -> bytes:
    answer = client.post(
        "/v1/audio/speech", json=asked(session_id=session_id, input=text, **{"max_seconds": 0.4, **body})
    )
    assert answer.status_code == 200, answer.text
    return answer.content


def hear(client: httpx.Client, session_id: str) -> None:
    assert client.post(f"/v1/sessions/{session_id}/turns", files={"text": (None, "Well,")}).status_code == 200


@pytest.fixture
def expected(server: Running) -> list[bytes]:
    """What one server without a folder says, turn by turn, with one that it hears after the second."""
    with server.client() as client:
        client.delete("/v1/sessions/reference")
        said = [say(client, "reference", text) for text in TURNS[:2]]
        hear(client, "reference")
        return said + [say(client, "reference", text) for text in TURNS[2:]]


def test_it_goes_on_at_the_other_and_comes_back(
    pair: tuple[httpx.Client, httpx.Client], expected: list[bytes], engine: Engine
) -> None:
    one, other = pair
    said = [say(one, "talk", TURNS[0]), say(other, "talk", TURNS[1])]
    hear(one, "talk")
    said += [say(other, "talk", TURNS[2]), say(one, "talk", TURNS[3])]
    assert said == expected
    assert len(set(said)) == 4
    turns = [client.get("/v1/sessions/talk").json()["turns"] for client in pair]
    assert turns[0] == turns[1]
    assert len(turns[0]) == 5


def test_it_is_not_read_again_where_it_went_on(pair: tuple[httpx.Client, httpx.Client], engine: Engine) -> None:
    one, _ = pair
    say(one, "talk", TURNS[0])
    before = engine.stats().prefix_hits
    say(one, "talk", TURNS[1])
    assert engine.stats().prefix_hits == before + 1


def test_what_is_deleted_or_put_at_one_is_so_at_the_other(
    pair: tuple[httpx.Client, httpx.Client], expected: list[bytes]
) -> None:
    one, other = pair
    say(one, "talk", TURNS[0])
    kept = one.get("/v1/sessions/talk").json()
    say(other, "talk", TURNS[1])
    assert one.put("/v1/sessions/talk", json=kept).json()["turns"] == 1
    assert say(other, "talk", TURNS[1]) == expected[1]
    assert other.delete("/v1/sessions/talk").status_code == 204
    for client in pair:
        assert_problem(client.get("/v1/sessions/talk"), 404, "session_not_found")
    assert say(one, "talk", TURNS[0]) == expected[0]


def test_the_turn_is_kept_before_its_client_is_told_that_it_is_over(
    pair: tuple[httpx.Client, httpx.Client], folder: Path
) -> None:
    for number in range(1, 6):
        say(pair[0], "talk", "More.")
        assert len(json.loads((folder / OWNER / "talk.json").read_text())["turns"]) == number


def test_what_a_client_heard_before_it_left_is_kept(
    pair: tuple[httpx.Client, httpx.Client], engine: Engine, folder: Path
) -> None:
    one, other = pair
    say(one, "talk", TURNS[0])
    with one.stream("POST", "/v1/audio/speech", json=asked(session_id="talk", input=LONG, max_seconds=20)) as answer:
        parts = answer.iter_raw()
        next(parts)
    wait_until(lambda: is_idle(engine))
    wait_until(lambda: len(json.loads((folder / OWNER / "talk.json").read_text())["turns"]) == 2)
    assert len(other.get("/v1/sessions/talk").json()["turns"]) == 2


def test_the_bound_is_on_both_together(pair: tuple[httpx.Client, httpx.Client]) -> None:
    one, other = pair
    for client, name in ((one, "a"), (other, "b"), (one, "c")):
        say(client, name, TURNS[0])
    for client in pair:
        assert_problem(client.post("/v1/audio/speech", json=asked(session_id="d")), 429, "too_many_sessions")
        say(client, "b", TURNS[1])
    assert one.delete("/v1/sessions/b").status_code == 204
    say(other, "d", TURNS[0])


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"version": 1}', "[" * 100_000], ids=lambda text: text[:9])
def test_a_file_that_cannot_be_read_is_not_written_over(
    pair: tuple[httpx.Client, httpx.Client], folder: Path, expected: list[bytes], content: str
) -> None:
    (folder / OWNER).mkdir(parents=True)
    (folder / OWNER / "talk.json").write_text(content)
    assert_problem(pair[0].get("/v1/sessions/talk"), 409, "session_unreadable")
    assert_problem(pair[0].post("/v1/audio/speech", json=asked(session_id="talk")), 409, "session_unreadable")
    assert (folder / OWNER / "talk.json").read_text() == content
    assert pair[1].delete("/v1/sessions/talk").status_code == 204
    assert say(pair[0], "talk", TURNS[0]) == expected[0]


def test_a_disk_that_fails_is_no_session_that_is_not_there(
    pair: tuple[httpx.Client, httpx.Client],
    folder: Path,
    expected: list[bytes],
    lines: Lines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    say(pair[0], "talk", TURNS[0])
    kept = (folder / OWNER / "talk.json").read_bytes()
    stat_of = Path.stat

    def failing(path: Path, **given: Any) -> os.stat_result:
        if path.name == "talk.json":
            raise OSError(24, "Too many open files")
        return stat_of(path, **given)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "stat", failing)
        answers = [client.post("/v1/audio/speech", json=asked(session_id="talk")) for client in pair]
    # The other has nothing to compare a file with: it reads it, and may.
    assert_problem(answers[0], 503, "sessions_unavailable")
    assert answers[0].headers["retry-after"] == "5"
    written = json.loads(lines.errors[0])
    assert (written["fault"], written["request_id"]) == ("OSError", answers[0].headers["x-request-id"])
    (folder / OWNER / "talk.json").write_bytes(kept)
    assert say(pair[0], "talk", TURNS[1]) == expected[1]


def test_a_session_that_speaks_is_not_forgotten(engine: Engine, folder: Path) -> None:
    limits = Limits(session_seconds=0.5, lead_seconds=0.4)
    with (
        serving(engine, Settings(model="small", sessions=folder, limits=limits)) as running,
        running.client() as client,
    ):
        body = asked(session_id="long", input=LONG, max_seconds=2)
        with client.stream("POST", "/v1/audio/speech", json=body) as answer:
            parts = answer.iter_raw()
            next(parts)
            time.sleep(0.7)
            with running.client() as other:
                assert_problem(other.post("/v1/audio/speech", json=body), 409, "session_busy")
            for _ in parts:
                pass
        assert len(client.get("/v1/sessions/long").json()["turns"]) == 1
        assert len(json.loads((folder / OWNER / "long.json").read_text())["turns"]) == 1


def test_a_client_that_leaves_in_the_last_moment_loses_nothing(
    pair: tuple[httpx.Client, httpx.Client], folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, write = threading.Event(), threading.Event(), SessionFiles.write

    def slowly(*given: Any) -> int:
        begun.set()
        go_on.wait(10)
        return write(*given)

    monkeypatch.setattr(SessionFiles, "write", slowly)
    body = asked(session_id="talk", max_seconds=0.4)
    with pair[0].stream("POST", "/v1/audio/speech", json=body) as answer:
        parts = answer.iter_raw()
        next(parts)
        assert begun.wait(10)
    time.sleep(0.1)
    go_on.set()
    wait_until((folder / OWNER / "talk.json").exists)
    assert len(json.loads((folder / OWNER / "talk.json").read_text())["turns"]) == 1


def test_what_is_too_old_is_forgotten(folder: Path) -> None:
    files = SessionFiles(folder, keep_seconds=0.2)
    stamp = files.write(OWNER, "old", {"turns": []})
    assert files.stamp(OWNER, "old") == stamp
    assert files.read(OWNER, "old") == ({"turns": []}, stamp)
    assert files.ids(OWNER) == {"old"}
    wait_until(lambda: files.stamp(OWNER, "old") is None)
    assert files.read(OWNER, "old") is None
    assert files.ids(OWNER) == set()
    key = "0123456789abcdef"
    strangers = ("photos/old.json", f"{OWNER}/notes.txt", f"{key}/.hidden", "notes.json")
    for name in (f"{OWNER}/.session-left-by-a-crash", f"{key}/older.json", *strangers):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
        os.utime(folder / name, (1, 1))
    files.write(key, "new", {})
    files.sweep()
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left == {f"{key}/new.json", *strangers}


def test_a_write_that_fails_leaves_what_there_was(folder: Path) -> None:
    files = SessionFiles(folder, keep_seconds=60)
    stamp = files.write(OWNER, "talk", {"turns": [1]})
    with pytest.raises(TypeError):
        files.write(OWNER, "talk", {"turns": [object()]})
    assert files.read(OWNER, "talk") == ({"turns": [1]}, stamp)
    assert [path.name for path in (folder / OWNER).iterdir()] == ["talk.json"]


def test_it_is_for_nobody_elses_eyes(folder: Path) -> None:
    SessionFiles(folder, keep_seconds=60).write(OWNER, "talk", {})
    assert stat.S_IMODE((folder / OWNER / "talk.json").stat().st_mode) == 0o600
