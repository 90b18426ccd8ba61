"""Voices: kept, used, listed, deleted; their owner's alone; names that are never paths."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from aloud import Engine, Segment, read_audio
from aloud.audio_file import to_int16
from aloud.server.app import create_app
from aloud.server.settings import Limits, Settings
from oracle.csm import speech_like
from server.running import TEXT, Lines, Running, asked, assert_problem, serving, wav

KEYS = ("one", "two")
BAD_NAMES = [
    "..", ".", "../x", "..%2fx", "/etc/passwd", "a/b", "a\\b", "..\\x", "a.b", ".hidden", "A", "a b", "é", "a\n", "a\0",
    "x" * 65, "%2e%2e", "~", "$HOME", "a;b", "con:", "‮x", "public/x", "a" + "/.." * 10,
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "voices"


@pytest.fixture
def kept(engine: Engine, folder: Path) -> Iterator[Running]:
    """A server with two keys that keeps its voices, three for each."""
    settings = Settings(model="small", keys=KEYS, voices=folder, limits=Limits(voices=3, sample_seconds=2.0))
    with serving(engine, settings) as running:
        yield running


def add(client: httpx.Client, name: str, data: bytes, **fields: str) -> httpx.Response:
    form = {"name": name, "consent": "I agree.", "text": "Hello.", **fields}
    return client.post("/v1/audio/voices", data=form, files={"audio_sample": ("s.wav", data, "audio/wav")})


def say(client: httpx.Client, voice: object, **body: object) -> httpx.Response:
    return client.post("/v1/audio/speech", json=asked(voice=voice, max_seconds=0.4, **body))


def test_a_voice_is_kept_and_speaks(kept: Running, folder: Path, seed: int) -> None:
    sample = wav(speech_like(1.0, seed))
    with kept.client("one") as client:
        plain = say(client, "alloy")
        made = add(client, "mine", sample)
        assert made.status_code == 201
        record = made.json()
        assert (record["name"], record["text"], record["consent"], record["seconds"]) == (
            "mine",
            "Hello.",
            "I agree.",
            1,
        )
        spoken = say(client, "mine")
        assert spoken.status_code == 200
        assert spoken.content != plain.content
        assert say(client, {"id": "mine"}).content == spoken.content
        listed = client.get("/v1/audio/voices").json()
        assert listed["voices"] == [record]
        assert (record["id"], record["object"], record["is_public"]) == ("mine", "audio.voice", False)
        assert listed["aliases"]["alloy"] == 0
        assert len(listed["aliases"]) == 13

        (owner,) = folder.iterdir()
        assert "one" not in owner.name
        stored = owner / "mine" / "sample.wav"
        assert hashlib.sha256(stored.read_bytes()).hexdigest() == record["sha256"]
        assert json.loads((owner / "mine" / "voice.json").read_text()).items() < record.items()
        voice = kept.engine.runtime.voice([Segment("Hello.", read_audio(stored, sample_rate=24_000), speaker=0)])
        alone = kept.engine.speak_sync("Hello there, nice to hear you.", voice=voice, seed=7, max_seconds=0.4)
        assert to_int16(alone.samples).astype("<i2").tobytes()[:1000] == spoken.content[:1000]

        forgotten = client.delete("/v1/audio/voices/mine").json()
        assert forgotten == {"id": "mine", "object": "audio.voice.deleted", "deleted": True}
        assert not (owner / "mine").exists()
        assert_problem(say(client, "mine"), 404, "voice_not_found")
        assert_problem(client.delete("/v1/audio/voices/mine"), 404)


def warnings(lines: Lines) -> list[str]:
    found = [json.loads(record.getMessage()) for record in lines.records if record.name == "aloud.server"]
    return [line["warning"] for line in found if "warning" in line]


RECORDS = {
    "cut": "{",
    "list": "[]",
    "other": '{"nonsense": 1}',
    "bytes": b"\xff",
    "nested": "[" * 200_000,
    "none": None,
}


@pytest.mark.parametrize("content", RECORDS.values(), ids=RECORDS)
def test_a_record_that_cannot_be_read_is_told_once(
    kept: Running, folder: Path, lines: Lines, content: str | bytes | None
) -> None:
    broken = folder / "public" / "anna"
    broken.mkdir(parents=True)
    if content is not None:
        (broken / "voice.json").write_bytes(content.encode() if isinstance(content, str) else content)
    (folder / "public" / "notes").write_text("a file, and no voice")
    with kept.client("one") as client:
        for _ in range(2):
            assert client.get("/v1/audio/voices").json()["voices"] == []
            assert_problem(say(client, "anna"), 404, "voice_not_found")
            assert_problem(say(client, "nobody"), 404, "voice_not_found")
    (warning,) = warnings(lines)
    assert warning.startswith(f"The voice in {broken} cannot be read: voice.json: ")


@pytest.mark.parametrize("keys", [(), KEYS], ids=["open", "keys"])
def test_aliases_without_a_voice_are_told_at_the_start(
    engine: Engine, folder: Path, lines: Lines, keys: tuple[str, ...], seed: int
) -> None:
    made = Settings(model="small", voices=folder)
    with serving(engine, made) as running, running.client() as client:
        for name in ("anna", "ben"):
            assert add(client, name, wav(speech_like(0.1, seed))).status_code == 201
    (folder / "public").mkdir()
    (folder / "everybody" / "anna").rename(folder / "public" / "anna")
    (folder / "public" / "broken").mkdir()
    assert warnings(lines) == []
    aliases: dict[str, str | int] = {"alloy": "anna", "ash": "ben", "nova": 3, "echo": "nobody"}
    create_app(engine, Settings(model="small", keys=keys, voices=folder, aliases=aliases))
    broken, *told = warnings(lines)
    assert "broken cannot be read" in broken
    of_nobody = "The alias {} stands for the voice {}, and there is none at public/{} in the folder of voices."
    expected = [("echo", "nobody")] if not keys else [("ash", "ben"), ("echo", "nobody")]  # no key has ben
    assert told == [of_nobody.format(alias, voice, voice) for alias, voice in expected]


def test_the_field_that_a_wrong_voice_was_in_is_said(kept: Running, seed: int) -> None:
    with kept.client("one") as client:
        session = {"version": 1, "voice": "A!", "turns": []}
        for answer, field in (
            (say(client, "A!"), "voice"),
            (say(client, "nobody"), "voice"),
            (say(client, {"id": "A!"}), "voice"),
            (say(client, "A!", session_id="one"), "voice"),
            (client.put("/v1/sessions/one", json=session), "voice"),
            (add(client, "A!", wav(speech_like(0.1, seed))), "name"),
            (client.delete("/v1/audio/voices/A!"), "name"),
            (client.delete("/v1/audio/voices/nobody"), "name"),
        ):
            assert answer.json()["error"]["param"] == field, answer.text


def test_a_voice_whose_record_cannot_be_read_is_not_lost(kept: Running, folder: Path, seed: int) -> None:
    sample = wav(speech_like(0.5, seed))
    with kept.client("one") as client:
        add(client, "mine", sample)
        (owner,) = folder.iterdir()
        (owner / "mine" / "voice.json").write_text("{")
        assert_problem(add(client, "mine", sample), 409, "name_taken")
        assert (owner / "mine" / "sample.wav").exists()
        assert client.delete("/v1/audio/voices/mine").status_code == 200
        assert add(client, "mine", sample).status_code == 201


def test_an_alias_is_another_name_of_a_voice(engine: Engine, folder: Path, seed: int) -> None:
    settings = Settings(model="small", voices=folder, aliases={"alloy": "mine", "nova": 3, "echo": "nobody"})
    with serving(engine, settings) as running, running.client() as client:
        said = assert_problem(say(client, "alloy"), 404, "voice_not_found")
        assert said.startswith("alloy stands for the voice mine, and there is none of that name.")
        assert assert_problem(say(client, "alloy", session_id="aliased"), 404, "voice_not_found") == said
        add(client, "mine", wav(speech_like(0.5, seed)))
        assert say(client, "alloy").content == say(client, "mine").content
        assert say(client, "nova").content == engine_says(engine, speaker=3)
        assert_problem(say(client, "echo"), 404, "voice_not_found")
        said = assert_problem(say(client, "ash"), 404, "voice_not_found")
        assert said.startswith("There is no voice ash.")


def engine_says(engine: Engine, speaker: int) -> bytes:
    given: dict[str, Any] = {"seed": 7, "max_seconds": 0.4, "speaker": speaker}
    return b"".join(to_int16(chunk.samples).tobytes() for chunk in engine.stream(TEXT, **given))


def test_they_are_there_after_a_restart(engine: Engine, folder: Path, seed: int) -> None:
    settings = Settings(model="small", voices=folder)
    with serving(engine, settings) as running, running.client() as client:
        add(client, "mine", wav(speech_like(0.5, seed)))
        spoken = say(client, "mine").content
    with serving(engine, settings) as running, running.client() as client:
        assert say(client, "mine").content == spoken


def test_a_voice_of_another_key_is_not_there(kept: Running, seed: int) -> None:
    """Neither listed nor used nor deleted nor in the way; nor is what was read of it."""
    with kept.client("one") as one, kept.client("two") as two:
        add(one, "shared-name", wav(speech_like(0.5, seed)))
        add(one, "private", wav(speech_like(0.5, seed + 1)))
        ones = say(one, "shared-name").content
        say(one, "private")  # is read, and stays read
        assert two.get("/v1/audio/voices").json()["voices"] == []
        hits = kept.engine.stats().prefix_hits
        for answer in (
            say(two, "private"),
            say(two, {"id": "private"}),
            say(two, "private", session_id="steal"),
            two.delete("/v1/audio/voices/private"),
            two.put("/v1/sessions/steal", json={"version": 1, "voice": "private", "turns": []}),
        ):
            assert_problem(answer, 404, "voice_not_found")
        assert kept.engine.stats().prefix_hits == hits
        assert add(two, "shared-name", wav(speech_like(0.5, seed + 2))).status_code == 201
        assert say(two, "shared-name").content != ones
        assert say(one, "shared-name").content == ones
        assert two.delete("/v1/audio/voices/shared-name").status_code == 200
        assert say(one, "shared-name").content == ones


def test_the_same_sample_is_read_for_each_key(kept: Running, seed: int) -> None:
    """Who has the same recording cannot tell from the time it takes that another has it, too."""
    sample = wav(speech_like(0.5, seed))
    with kept.client("one") as one, kept.client("two") as two:
        for client in (one, two):
            add(client, "same", sample)
            before = kept.engine.stats().prefill_positions
            say(client, "same")
            first = kept.engine.stats().prefill_positions - before
            say(client, "same")
            assert kept.engine.stats().prefill_positions - before - first < first


def test_public_voices_are_everybodys_and_nobodys_to_delete(kept: Running, folder: Path, seed: int) -> None:
    with kept.client("one") as one, kept.client("two") as two:
        add(one, "narrator", wav(speech_like(0.5, seed)))
        (owner,) = folder.iterdir()
        (folder / "public").mkdir()
        os.rename(owner / "narrator", folder / "public" / "narrator")
        assert say(one, "narrator").content == say(two, "narrator").content
        (listed,) = two.get("/v1/audio/voices").json()["voices"]
        assert (listed["name"], listed["is_public"]) == ("narrator", True)
        assert_problem(one.delete("/v1/audio/voices/narrator"), 404)


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_names_are_never_paths(kept: Running, folder: Path, name: str, seed: int) -> None:
    (folder.parent / "x").mkdir()
    before = sorted(folder.parent.rglob("*"))
    with kept.client("one") as client:
        assert_problem(add(client, name, wav(speech_like(0.1, seed))), 400)
        answer = say(client, name)
        assert_problem(answer, 400)
        assert str(folder) not in answer.text
        assert_problem(say(client, {"id": name}), 400)
        path = "".join(f"%{byte:02x}" for byte in name.encode())
        assert client.delete(f"/v1/audio/voices/{path}").status_code in (400, 404)
        assert client.get(f"/v1/sessions/{path}").status_code in (400, 404)
    assert sorted(folder.parent.rglob("*")) == before


def test_what_cannot_be_added(kept: Running, seed: int) -> None:
    sample = wav(speech_like(0.2, seed))
    with kept.client("one") as client:
        assert_problem(add(client, "alloy", sample), 409, "name_taken")
        assert_problem(add(client, "long", wav(speech_like(2.1, seed))), 400, "AudioTooLong")
        assert_problem(add(client, "none", wav(speech_like(0.0, seed))), 400, "AudioEmpty")
        assert_problem(add(client, "mute", sample, consent=""), 400)
        assert client.get("/v1/audio/voices").json()["voices"] == []
        for name in ("a", "b", "c"):
            assert add(client, name, sample).status_code == 201
        assert_problem(add(client, "a", sample), 409, "name_taken")
        assert_problem(add(client, "d", sample), 409, "too_many_voices")
        assert client.delete("/v1/audio/voices/a").status_code == 200
        assert add(client, "d", sample, ref_text="Hello again.").json()["text"] == "Hello again."
    with kept.client("two") as client:
        assert add(client, "a", sample).status_code == 201
