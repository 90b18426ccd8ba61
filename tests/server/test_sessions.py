"""Conversations over HTTP: continued, heard, exported, rebuilt elsewhere, forgotten."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from aloud import Engine
from aloud.server import sessions as sessions_module
from aloud.server.settings import Limits, Settings
from oracle.csm import speech_like
from server.running import LONG, Running, asked, assert_problem, is_idle, serving, wait_until, wav

KEYS = ("one", "two")
GREEDY = {"max_seconds": 0.4}


@pytest.fixture(scope="module")
def strict(engine: Engine) -> Iterator[Running]:
    """A server with two keys and few sessions."""
    with serving(engine, Settings(model="small", keys=KEYS, limits=Limits(sessions=3))) as running:
        yield running


def say(client: httpx.Client, session_id: str, **body: object) -> httpx.Response:
    return client.post("/v1/audio/speech", json=asked(session_id=session_id, **{**GREEDY, **body}))


def test_the_context_continues(server: Running) -> None:
    with server.client() as client:
        first = say(client, "talk")
        assert first.status_code == 200
        wait_until(lambda: is_idle(server.engine))
        before = server.engine.stats()
        second = say(client, "talk")
        after = server.engine.stats()
        alone = server.speech(**GREEDY)
        assert first.content == alone.content != second.content, "the second turn must hear the first"
        exported = client.get("/v1/sessions/talk").json()
    assert exported["voice"] == "alloy"
    assert [len(turn["codes"]) for turn in exported["turns"]] == [6, 6]  # the last says that the audio is over
    text = len([token for token in exported["turns"][1]["text_tokens"] if token >= 0])
    positions = sum(len(turn["text_tokens"]) for turn in exported["turns"])
    read = after.prefill_positions - before.prefill_positions
    assert after.prefix_hits == before.prefix_hits + 1
    assert text <= read <= text + 3 < positions, "the first turn was read again"


def test_each_turn_may_have_sampling_of_its_own(server: Running) -> None:
    """And a turn without it does not have that of the turn before."""
    hot = {"temperature": 1.5, "top_k": 0, "depth_temperature": 1.2, "depth_top_k": 9}
    alone = server.speech(**GREEDY).content
    with server.client() as client:
        assert say(client, "hot", **hot).content == server.speech(**GREEDY, **hot).content != alone
        then = say(client, "hot").content
        exported = client.get("/v1/sessions/hot").json()
        exported["turns"].pop()
        assert client.put("/v1/sessions/cold", json=exported).status_code == 200
        assert say(client, "cold").content == then
        assert say(client, "cold", **hot).content != then
        refused = say(client, "cold", speaker=3)
        assert_problem(refused, 400, "not_in_a_session")
        assert refused.json()["error"]["param"] == "speaker"


def test_what_is_refused_begins_no_session(server: Running) -> None:
    """Whose voice could not be changed any more."""
    with server.client() as client:
        for wrong in ({"temperature": 0.0005}, {"input": " "}):
            assert_problem(say(client, "refused", voice="nova", **wrong), 400)
            assert_problem(client.get("/v1/sessions/refused"), 404)
        assert say(client, "refused", voice="echo").status_code == 200


def test_a_voice_cannot_change(server: Running) -> None:
    with server.client() as client:
        assert say(client, "voice", voice="echo").status_code == 200
        assert_problem(say(client, "voice", voice="nova"), 409, "voice_differs")
        assert say(client, "voice", voice="echo").status_code == 200


def test_a_voice_that_is_left_out_is_the_sessions(server: Running) -> None:
    with server.client() as client:
        first = say(client, "left-out", voice="echo")
        assert first.status_code == 200
        assert say(client, "left-out").status_code == 200
        refused = say(client, "left-out", voice="alloy")  # which it is by default, and which was asked for
        assert_problem(refused, 409, "voice_differs")
        assert refused.json()["error"]["param"] == "voice"
        exported = client.get("/v1/sessions/left-out").json()
        assert (exported["voice"], len(exported["turns"])) == ("echo", 2)
        assert say(client, "default").status_code == 200
        assert client.get("/v1/sessions/default").json()["voice"] == "alloy"


def test_the_user_may_speak_first(server: Running) -> None:
    """As the error says that whoever tries without a session gets."""
    with server.client() as client:
        turns = {"text": (None, "Hello?")}
        said = assert_problem(client.post("/v1/sessions/first/turns", files=turns), 404, "session_not_found")
        content = re.search(r"PUT (\{.*\}) to /v1/sessions/ID", said)
        assert content is not None
        assert client.put("/v1/sessions/first", content=content[1]).json()["turns"] == 0
        assert client.post("/v1/sessions/first/turns", files=turns).json()["turns"] == 1
        assert say(client, "first").status_code == 200
        assert len(client.get("/v1/sessions/first").json()["turns"]) == 2


def test_a_voice_that_was_deleted_is_not_there(server: Running, seed: int) -> None:
    """Also for a session that was begun with it, which still has what it was told of it."""
    with server.client() as client:
        form = {"name": "eve", "consent": "I agree.", "text": "Hello."}
        sample = {"audio_sample": ("s.wav", wav(speech_like(0.5, seed)), "audio/wav")}
        assert client.post("/v1/audio/voices", data=form, files=sample).status_code == 201
        assert say(client, "eves", voice="eve").status_code == 200
        assert say(client, "eves", voice="eve").status_code == 200
        assert client.delete("/v1/audio/voices/eve").status_code == 200
        assert_problem(server.speech(voice="eve"), 404, "voice_not_found")
        assert_problem(say(client, "eves", voice="eve"), 404, "voice_not_found")
        assert_problem(say(client, "eves", voice="nova"), 409, "voice_differs")
        assert_problem(say(client, "eves"), 404, "voice_not_found")
        assert client.delete("/v1/sessions/eves").status_code == 204


def test_one_thing_at_a_time(server: Running) -> None:
    with server.client() as client, server.client() as other:
        body = asked(session_id="busy", input=LONG, max_seconds=20)
        with client.stream("POST", "/v1/audio/speech", json=body) as answer:
            parts = answer.iter_raw()  # to be kept: the connection ends with it
            next(parts)
            assert_problem(say(other, "busy"), 409, "session_busy")
            assert_problem(other.post("/v1/sessions/busy/turns", files={"text": (None, "Hm.")}), 409, "session_busy")
        wait_until(lambda: is_idle(server.engine))
        wait_until(lambda: say(other, "busy").status_code == 200)  # the disconnect gave it back


def test_a_turn_that_failed_leaves_it_free(server: Running) -> None:
    with server.client() as client:
        assert_problem(say(client, "free", input=" "), 400)
        assert_problem(say(client, "free", max_seconds=-1), 400)
        assert say(client, "free").status_code == 200


def test_hearing(server: Running, seed: int) -> None:
    with server.client() as client:
        assert_problem(client.post("/v1/sessions/ear/turns", files={"text": (None, "Hm.")}), 404, "session_not_found")
        say(client, "ear")
        before = len(client.get("/v1/sessions/ear").json()["turns"])
        fields = {"text": "What did you say?", "speaker": "1"}
        files = {"audio": ("a.flac", wav(speech_like(0.8, seed), format="FLAC"), "audio/flac")}
        stats = client.post("/v1/sessions/ear/turns", data=fields, files=files)
        assert stats.status_code == 200
        assert stats.json()["turns"] == before + 1
        assert stats.json()["cached_positions"] == stats.json()["positions"]
        exported = client.get("/v1/sessions/ear").json()
        assert len(exported["turns"][-1]["codes"]) == 10 + 1  # the last says that the audio is over
        for fields in ({"text": "Hm.", "speaker": "x"}, {"text": "Hm.", "speaker": "1000"}, {"speaker": "1"}):
            assert_problem(client.post("/v1/sessions/ear/turns", data=fields), 400)
        broken = {"audio": ("a.flac", b"no audio", "audio/flac")}
        assert_problem(client.post("/v1/sessions/ear/turns", data={"text": "Hm."}, files=broken), 400)
        assert client.get("/v1/sessions/ear").json() == exported


def test_rebuilt_on_another_server(server: Running, engine: Engine) -> None:
    with server.client() as client, serving(engine) as other, other.client() as there:
        say(client, "move")
        exported = client.get("/v1/sessions/move").json()
        restored = there.put("/v1/sessions/moved", json=exported)
        assert restored.status_code == 200
        assert restored.json()["turns"] == 1
        wait_until(lambda: is_idle(engine))
        expected = say(client, "move", seed=3)
        wait_until(lambda: is_idle(engine))
        assert say(there, "moved", seed=3).content == expected.content
        assert there.get("/v1/sessions/moved").json() == client.get("/v1/sessions/move").json()
        assert_problem(there.get("/v1/sessions/move"), 404)


WRONG = {
    "empty": {},
    "version": {"version": 2, "voice": "alloy", "turns": []},
    "voice": {"version": 1, "voice": 3, "turns": []},
    "turns": {"version": 1, "voice": "alloy", "turns": {}},
    "turn": {"version": 1, "voice": "alloy", "turns": [1]},
    "tokens": {"version": 1, "voice": "alloy", "turns": [{"text_tokens": "abc", "codes": []}]},
    "token": {"version": 1, "voice": "alloy", "turns": [{"text_tokens": [10**9], "codes": []}]},
    "token-huge": {"version": 1, "voice": "alloy", "turns": [{"text_tokens": [10**30], "codes": []}]},
    "token-negative": {"version": 1, "voice": "alloy", "turns": [{"text_tokens": [-2], "codes": []}]},
    "codes": {"version": 1, "voice": "alloy", "turns": [{"text_tokens": [-1], "codes": [[10**6] * 8]}]},
    "codes-few": {"version": 1, "voice": "alloy", "turns": [{"text_tokens": [-1, -1], "codes": [[1] * 8]}]},
    "codes-ragged": {"version": 1, "voice": "alloy", "turns": [{"text_tokens": [-1], "codes": [[1], [1, 2]]}]},
    "no-tokens": {"version": 1, "voice": "alloy", "turns": [{"text_tokens": [], "codes": []}]},
    "nested": {"version": 1, "voice": "alloy", "turns": [{"text_tokens": [[1, 2]], "codes": []}]},
}


@pytest.mark.parametrize("case", WRONG)
def test_imports_that_are_no_session(server: Running, case: str) -> None:
    """Refused; and what was there before stays."""
    with server.client() as client:
        say(client, "kept")
        before = client.get("/v1/sessions/kept").json()
        assert_problem(client.put("/v1/sessions/kept", json=WRONG[case]), 400, "invalid_session")
        assert client.get("/v1/sessions/kept").json() == before
        unknown = {"version": 1, "voice": "nobody", "turns": []}
        assert_problem(client.put("/v1/sessions/kept", json=unknown), 404, "voice_not_found")
        assert client.get("/v1/sessions/kept").json() == before


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 200_000, b"[]", b"3"])
def test_imports_that_are_no_object(server: Running, content: bytes) -> None:
    with server.client() as client:
        assert_problem(client.put("/v1/sessions/x", content=content), 400)


def test_an_import_longer_than_the_context(server: Running) -> None:
    turns = [{"text_tokens": [5] * 60, "codes": []}] * 20
    with server.client() as client:
        stats = client.put("/v1/sessions/long", json={"version": 1, "voice": "alloy", "turns": turns})
        assert stats.status_code == 200
        assert 1 <= stats.json()["turns"] <= 512 // 60
        assert say(client, "long").status_code == 200


def test_sessions_are_their_keys_own(strict: Running) -> None:
    with strict.client("one") as one, strict.client("two") as two:
        first = say(one, "same")
        assert say(two, "same").content == first.content, "the other key's session was continued"
        assert one.get("/v1/sessions/same").status_code == 200
        say(one, "mine")
        for answer in (
            two.get("/v1/sessions/mine"),
            two.delete("/v1/sessions/mine"),
            two.post("/v1/sessions/mine/turns", files={"text": (None, "Hm.")}),
        ):
            assert_problem(answer, 404, "session_not_found")
        assert one.delete("/v1/sessions/same").status_code == 204
        assert_problem(one.get("/v1/sessions/same"), 404)
        assert two.get("/v1/sessions/same").status_code == 200
        assert two.delete("/v1/sessions/same").status_code == 204
        assert one.delete("/v1/sessions/mine").status_code == 204


def test_a_key_has_so_many(strict: Running) -> None:
    empty = {"version": 1, "voice": "alloy", "turns": []}
    with strict.client("one") as one, strict.client("two") as two:
        for number in range(3):
            assert one.put(f"/v1/sessions/s{number}", json=empty).status_code == 200
        refused = say(one, "s3")
        assert_problem(refused, 429, "too_many_sessions")
        assert refused.headers["retry-after"] == "60"
        assert_problem(one.put("/v1/sessions/s3", json=empty), 429)
        assert one.put("/v1/sessions/s0", json=empty).status_code == 200
        assert two.put("/v1/sessions/s3", json=empty).status_code == 200
        for number in range(3):
            assert one.delete(f"/v1/sessions/s{number}").status_code == 204


def test_they_expire(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]

    class Clock:
        monotonic = staticmethod(lambda: now[0])

    monkeypatch.setattr(sessions_module, "time", Clock)
    with serving(server.engine) as fresh, fresh.client() as client:
        say(client, "old")
        say(client, "older")
        now[0] += 800
        assert client.get("/v1/sessions/old").status_code == 200
        now[0] += 200
        assert client.get("/v1/sessions/old").status_code == 200
        assert_problem(client.get("/v1/sessions/older"), 404)
        now[0] += 901
        assert_problem(client.get("/v1/sessions/old"), 404)


def test_many_at_once_make_one(server: Running) -> None:
    """Of requests that open the same session at the same time, one speaks and the others are refused."""
    with server.client() as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: say(client, "race", max_seconds=0.8).status_code, range(8)))
        assert set(answers) <= {200, 409}
        assert 200 in answers
        turns = client.get("/v1/sessions/race").json()["turns"]
    assert len(turns) == answers.count(200)
