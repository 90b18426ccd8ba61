"""Names to files, against a local server that speaks the hub's endpoints to the real huggingface_hub."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import random
import re
import struct
import termios
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from aloud import errors
from aloud.checkpoint import hub
from oracle.hub_server import HubClient, HubServer

INDEX = "transformers.safetensors.index.json"
READER, STRANGER = "hf_reader", "hf_stranger"


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        server.tokens |= {READER, STRANGER}
        yield server


@pytest.fixture(scope="module")
def client(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubClient]:
    client = HubClient(server, tmp_path_factory.mktemp("hub_home"))
    yield client
    client.close()


@pytest.fixture
def name(request: pytest.FixtureRequest, server: HubServer) -> str:
    """A repository name of this test alone, so that all tests can share one cache."""
    server.forget_requests()
    return "owner/" + re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")


def as_json(**content: object) -> bytes:
    return json.dumps(content).encode()


def like_csm(seed: int) -> dict[str, bytes]:
    """The files of sesame/csm-1b, small."""
    large = random.Random(seed)
    return {
        "config.json": as_json(model_type="csm", backbone_flavor="llama-1B", transformers_weights=INDEX),
        "generation_config.json": as_json(temperature=0.9),
        "preprocessor_config.json": as_json(rate=24000),
        "tokenizer.json": as_json(model={}),
        "chat_template.jinja": b"{}",
        "README.md": b"# CSM",
        "prompts/conversational_a.wav": b"RIFF",
        "ckpt.pt": large.randbytes(100),
        "model.safetensors": large.randbytes(300_000),
        INDEX: as_json(weight_map={"a": "transformers-1.safetensors", "b": "transformers-2.safetensors"}),
        "transformers-1.safetensors": large.randbytes(200_000),
        "transformers-2.safetensors": large.randbytes(100_000),
    }


SMALL_FILES = ["config.json", "generation_config.json", "tokenizer.json", INDEX]
CSM_FILES = sorted([*SMALL_FILES, "transformers-1.safetensors", "transformers-2.safetensors"])


def assert_files(answer: dict, files: list[str], contents: dict[str, bytes]) -> None:
    assert answer.get("error") is None, answer
    assert answer["files"] == sorted(files)
    for file in files:
        assert (Path(answer["folder"]) / file).read_bytes() == contents[file]


def assert_error(answer: dict, error: str, sentence: str) -> None:
    assert answer.get("error") == error, answer
    assert re.search(sentence, answer["message"]), answer["message"]
    # The sentence is the last thing that a traceback says, and what led to it is kept.
    assert answer["traceback"].endswith(f"{error}: {answer['message']}\n")


# --- what is fetched --------------------------------------------------------------------------------------------------


def test_only_the_needed_files_are_fetched_and_only_once(
    server: HubServer, client: HubClient, name: str, seed: int
) -> None:
    contents = like_csm(seed)
    commit = server.commit(name, contents)
    answer = client.resolve(name)
    assert_files(answer, CSM_FILES, contents)
    assert server.downloads() == CSM_FILES
    assert Path(answer["folder"]).name == commit
    assert (answer["name"], answer["is_local"]) == (name, False)

    server.forget_requests()
    assert client.resolve(name)["folder"] == answer["folder"]
    assert server.downloads() == []
    assert len(server.requests) <= 2  # the list of files, and the revision of config.json

    server.forget_requests()
    assert_files(client.resolve(name, local_files_only=True), CSM_FILES, contents)
    assert server.requests == []

    server.stop()
    try:
        assert_files(client.resolve(name), CSM_FILES, contents)
        assert_files(client.resolve(name, revision=commit), CSM_FILES, contents)
    finally:
        server.start()


def test_without_weights_only_json_is_fetched(server: HubServer, client: HubClient, name: str, seed: int) -> None:
    contents = like_csm(seed)
    server.commit(name, contents)
    assert_files(client.resolve(name, weights=False), SMALL_FILES, contents)
    assert server.downloads() == sorted(SMALL_FILES)
    assert_files(client.resolve(name, weights=False, local_files_only=True), SMALL_FILES, contents)
    assert_error(
        client.resolve(name, local_files_only=True),
        "ModelOffline",
        rf"^The local cache lacks transformers-1\.safetensors, transformers-2\.safetensors of {name}, and local_f",
    )


SHARDED = {
    "model.safetensors.index.json": as_json(weight_map={"a": "model-1.safetensors", "b": "model-2.safetensors"}),
    "model-1.safetensors": b"first shard",
    "model-2.safetensors": b"second shard",
}


@pytest.mark.parametrize(
    ("files", "needed"),
    [
        pytest.param(SHARDED | {"unlisted.safetensors": b"other"}, list(SHARDED), id="sharded"),
        pytest.param(
            {"model.safetensors": b"whole", "pytorch_model.bin": b"pickle"}, ["model.safetensors"], id="single"
        ),
        pytest.param({"model.safetensors": b"layout 2", "ckpt.pt": b"pickle"}, ["model.safetensors"], id="sesame"),
    ],
)
def test_each_layout_fetches_its_own_files(
    files: dict[str, bytes], needed: list[str], server: HubServer, client: HubClient, name: str
) -> None:
    contents = {"config.json": as_json(backbone_flavor="llama-1B", of=name), **files}
    server.commit(name, contents)
    assert_files(client.resolve(name), ["config.json", *needed], contents)
    assert server.downloads() == sorted(["config.json", *needed])


def test_revisions(server: HubServer, client: HubClient, name: str) -> None:
    def contents(version: int) -> dict[str, bytes]:
        return {"config.json": as_json(version=version), "model.safetensors": f"weights {version}".encode()}

    first = server.commit(name, contents(1), references=("main", "v1.0"))
    second = server.commit(name, contents(2), references=("main", "refs/pr/1"))
    third = server.commit(name, contents(3), references=("try-out",))
    cases = {None: 2, "main": 2, "v1.0": 1, "refs/pr/1": 2, "try-out": 3, first: 1, second: 2, third: 3}
    for offline in (False, True):
        for revision, version in cases.items():
            answer = client.resolve(name, revision=revision, local_files_only=offline)
            assert_files(answer, ["config.json", "model.safetensors"], contents(version))
    for revision in ("v2.0", "0" * 40):
        assert_error(client.resolve(name, revision=revision), "ModelNotFound", f"{name} has no revision '{revision}'")


def test_a_single_file(server: HubServer, client: HubClient, name: str) -> None:
    contents = {"tokenizer-e351c8d8.safetensors": b"codec", "model.safetensors": b"not wanted"}
    server.commit(name, contents)
    for _ in range(2):
        answer = client.call("resolve_file", name, "tokenizer-e351c8d8.safetensors")
        assert Path(answer["folder"]).read_bytes() == b"codec"
    assert server.downloads() == ["tokenizer-e351c8d8.safetensors"]
    assert [request.method for request in server.requests if request.at_storage] == ["GET"]
    assert client.call("resolve_file", name, "tokenizer-e351c8d8.safetensors", local_files_only=True) == answer | {
        "seconds": pytest.approx(0, abs=5)
    }
    assert_error(client.call("resolve_file", name, "x.bin"), "ModelNotFound", f"{name} has no file x.bin")
    missing = client.call("resolve_file", name, "model.safetensors", local_files_only=True)
    assert_error(missing, "ModelOffline", f"The local cache lacks model.safetensors of {name}, and")


# --- transfers --------------------------------------------------------------------------------------------------------


def test_a_cut_connection_is_resumed(server: HubServer, client: HubClient, name: str, seed: int) -> None:
    # The client writes 10 MiB at a time, so that is where it goes on.
    contents = {"config.json": as_json(of=name), "model.safetensors": random.Random(seed).randbytes(12 * 2**20)}
    server.commit(name, contents)
    server.cut(contents["model.safetensors"], after_bytes=11 * 2**20 + 7)
    assert_files(client.resolve(name), list(contents), contents)
    assert [request.range for request in server.requests if request.at_storage] == [None, f"bytes={10 * 2**20}-"]


def test_a_transfer_that_stays_broken(server: HubServer, client: HubClient, name: str) -> None:
    contents = {"config.json": as_json(of=name), "model.safetensors": b"0123456789" * 1000}
    server.commit(name, contents)
    server.storage_status = 500
    try:
        assert_error(
            client.resolve(name), "DownloadFailed", rf"^model\.safetensors of {name} could not be downloaded \(.*500"
        )
    finally:
        server.storage_status = None
    assert_files(client.resolve(name), list(contents), contents)


def test_progress_bars_reach_a_terminal(server: HubServer, name: str, tmp_path: Path) -> None:
    server.commit(name, {"config.json": as_json(of=name), "model.safetensors": b"0123456789" * 1000})
    terminal, stderr = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # a new one is 0 columns wide
    client = HubClient(server, tmp_path, stderr=stderr)
    os.close(stderr)
    assert client.resolve(name).get("error") is None
    client.close()
    shown = b""
    try:
        while chunk := os.read(terminal, 65536):
            shown += chunk
    except OSError:  # how a terminal says that nobody writes to it any more
        pass
    finally:
        os.close(terminal)
    assert b"model.safetensors: 100%" in shown


# --- refusals of the hub ----------------------------------------------------------------------------------------------


def test_unknown_repository(server: HubServer, client: HubClient, name: str) -> None:
    assert_error(
        client.resolve(name),
        "ModelNotFound",
        rf"The hub has no {name}, or it is private and no token was sent.*hf auth login.*\./my-model.*owner/name",
    )
    known_here = client.resolve(name, token=STRANGER)
    assert_error(
        known_here, "ModelNotFound", f"has no {name}, or it is private and the token that was sent may not see it"
    )
    assert known_here["cause"] == "RepositoryNotFoundError"


def test_private_repository(server: HubServer, client: HubClient, name: str) -> None:
    contents = {"config.json": as_json(of=name), "model.safetensors": name.encode()}
    server.commit(name, contents)
    server.repositories[name].private = True
    server.repositories[name].readers = frozenset({READER})
    assert_error(client.resolve(name), "ModelNotFound", "or it is private and no token was sent")
    assert_files(client.resolve(name, token=READER + "\n"), list(contents), contents)


def test_gated_repository(server: HubServer, client: HubClient, name: str) -> None:
    contents = {"config.json": as_json(of=name), "model.safetensors": name.encode()}
    server.commit(name, contents)
    server.repositories[name].gated = True
    server.repositories[name].readers = frozenset({READER})
    page = f"https://huggingface.co/{name}"
    answer = client.resolve(name)
    assert_error(answer, "ModelGated", f"{name} is gated: accept the licence at {page}, then .*hf auth login.*token=")
    assert answer["cause"] == "GatedRepoError"
    assert_error(
        client.resolve(name, token=STRANGER),
        "ModelGated",
        f"is gated, and the token that was sent may not read it: accept the licence at {page}",
    )
    assert_error(client.resolve(name, token="hf_wrong"), "ModelGated", f"refused the token that was sent for {name}")
    assert server.downloads() == []
    assert_files(client.resolve(name, token=READER), list(contents), contents)
    assert {request.token for request in server.requests if request.at_storage} == {None}  # it belongs to the hub alone


def test_a_refusal_does_not_hide_what_is_cached(server: HubServer, client: HubClient, name: str) -> None:
    contents = {"config.json": as_json(of=name), "model.safetensors": name.encode()}
    server.commit(name, contents)
    client.resolve(name)
    assert_files(client.resolve(name, token="hf_expired"), list(contents), contents)


def test_a_broken_hub(server: HubServer, client: HubClient, name: str) -> None:
    server.commit(name, {"config.json": as_json(of=name), "model.safetensors": name.encode()})
    server.hub_status = 503
    try:
        assert_error(client.resolve(name), "DownloadFailed", rf"config\.json of {name} could not be downloaded \(.*503")
    finally:
        server.hub_status = None


def test_no_network(server: HubServer, client: HubClient, name: str, seed: int) -> None:
    server.commit(name, like_csm(seed))
    partly = name + "-partly"
    server.commit(partly, like_csm(seed + 1))
    client.resolve(partly, weights=False)
    server.stop()
    try:
        nothing, some = client.resolve(name), client.resolve(partly)
    finally:
        server.start()
    assert_error(
        nothing, "ModelOffline", rf"^The local cache lacks config\.json of {name}, and the hub cannot be reached"
    )
    assert nothing["cause"] == "ConnectError" or "Connection" in nothing["cause"]
    assert nothing["seconds"] < 5
    # Without the server's list the cached folder says what is missing.
    assert_error(
        some,
        "ModelOffline",
        rf"lacks transformers-1\.safetensors, transformers-2\.safetensors of {partly}, and the hub",
    )


@pytest.mark.parametrize(
    ("files", "error", "sentence"),
    [
        pytest.param({"model.safetensors": b"x"}, "ConfigMissing", "has no config.json", id="no-config"),
        pytest.param({"config.json": b"{"}, "ConfigInvalid", "is not JSON", id="config-cut"),
        pytest.param({"config.json": b"[]"}, "ConfigInvalid", "is not a JSON object", id="config-a-list"),
        pytest.param(
            {"config.json": b"{}", "ckpt.pt": b"x"}, "PickleRefused", "ckpt.pt.*run any code", id="only-a-pickle"
        ),
        pytest.param({"config.json": b"{ }"}, "WeightsMissing", "has no weights", id="no-weights"),
        pytest.param(
            {"config.json": b"{  }"} | {name: content for name, content in SHARDED.items() if "-1" not in name},
            "WeightsMissing",
            r"lacks model-1\.safetensors, listed in its model\.safetensors\.index\.json",
            id="no-shard",
        ),
        pytest.param(
            {"config.json": b"{   }", "model.safetensors.index.json": as_json(weight_map={"a": "../../a.safetensors"})},
            "WeightsCorrupt",
            r"'\.\./\.\./a\.safetensors'",
            id="index-leads-out",
        ),
    ],
)
def test_repositories_that_cannot_be_loaded(
    files: dict[str, bytes], error: str, sentence: str, server: HubServer, client: HubClient, name: str
) -> None:
    server.commit(name, files)
    assert_error(client.resolve(name), error, sentence)
    assert not [file for file in server.downloads() if file.endswith((".pt", ".safetensors"))]


# --- folders, and what happens on this side ---------------------------------------------------------------------------


def test_a_folder_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for model in (str(folder), folder, "models/mine", "./models/mine", "~/models/mine", Path("models/mine")):
        source = hub.resolve(model)
        assert source.folder.samefile(folder)
        assert (source.name, source.is_local) == ("mine", True)


@pytest.mark.parametrize(
    ("model", "error", "sentence"),
    [
        pytest.param("./gone", errors.ModelNotFound, r"folder './gone' does not exist.*owner/name", id="relative"),
        pytest.param("/gone/too", errors.ModelNotFound, "folder '/gone/too' does not exist", id="absolute"),
        pytest.param("~/gone", errors.ModelNotFound, "folder '~/gone' does not exist", id="home"),
        pytest.param(Path("gone/too"), errors.ModelNotFound, "folder 'gone/too' does not exist", id="path-object"),
        pytest.param("./file", errors.ModelNotFound, "'./file' is a file, not a folder", id="file"),
        pytest.param("./empty", errors.ConfigMissing, r"empty has no config\.json", id="no-config"),
        pytest.param(
            "csm-1b", errors.ModelNotFound, r"'csm-1b' is not a folder here.*\./my-model.*owner/name", id="bare"
        ),
        pytest.param("a/b/c", errors.ModelNotFound, "'a/b/c' is not a folder here", id="two-slashes"),
        pytest.param("sesame/csm-1b@main", errors.ModelNotFound, "is not a folder here", id="revision-in-name"),
        pytest.param(
            "https://huggingface.co/sesame/csm-1b", errors.ModelNotFound, "is not a folder here", id="address"
        ),
        pytest.param("", errors.ModelNotFound, "'' is not a folder here", id="empty"),
        pytest.param("owner/", errors.ModelNotFound, "'owner/' is not a folder here", id="no-name"),
        pytest.param("a\0/b", errors.ModelNotFound, "is not a folder here", id="null-character"),
    ],
)
def test_names_that_lead_nowhere(
    model: str | Path, error: type, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=sentence):
        hub.resolve(model)


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(errors.ModelNotFound, match="has no revisions: leave out revision='main'"):
        hub.resolve(tmp_path, revision="main")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("failure", "sentence", "attempts"),
    [
        pytest.param(OSError(errno.ENOSPC, "No space left"), "^The disk is full: model.safetensors of", 1, id="full"),
        pytest.param(
            caused(RuntimeError("writing failed"), OSError(errno.ENOSPC, "No space left")),
            "^The disk is full: model.safetensors of",
            1,
            id="full-below-the-transfer-library",
        ),
        pytest.param(
            PermissionError(errno.EACCES, "denied", "/cache"), "cannot be written to the cache", 1, id="denied"
        ),
        pytest.param(ConnectionResetError(errno.ECONNRESET, "cut"), "could not be downloaded .*cut", 3, id="cut"),
        pytest.param(RuntimeError("transfer error"), r"could not be downloaded \(transfer error\)", 3, id="transfer"),
    ],
)
def test_failures_on_this_side(
    failure: Exception, sentence: str, attempts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(_: str, filename: str, **__: object) -> str:
        asked.append(filename)
        if filename == "config.json":
            (tmp_path / filename).write_text("{}")
            return str(tmp_path / filename)
        raise failure

    files = [SimpleNamespace(rfilename=name) for name in ("config.json", "model.safetensors")]
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(errors.DownloadFailed, match=sentence) as raised:
        hub.resolve("owner/name")
    assert raised.value.__cause__ is not None
    assert asked == ["config.json", *["model.safetensors"] * attempts]
