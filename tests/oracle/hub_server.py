"""A hub on this machine: the real hub's endpoints over HTTP for the real client, which runs in its own process."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".pt", ".bin")


@dataclass(frozen=True)
class Request:
    """One request as the server saw it."""

    method: str
    path: str
    range: str | None
    token: str | None
    at_storage: bool  # asked of the storage host, where the hub redirects large files
    file: str | None  # the file of a repository that was asked for, if one was


@dataclass
class Repository:
    """Commits of one repository, and who may see it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit hash -> file name -> content
    references: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit hash
    gated: bool = False  # everybody sees the list of files, and only `readers` the files
    private: bool = False  # only `readers` see that it exists
    readers: frozenset[str] = frozenset()  # tokens


class HubServer:
    """Serves repositories on 127.0.0.1 as the hub does; a context manager.

    Large files are redirected to a second port, as the hub redirects them to its storage.

    Attributes:
        requests: everything asked so far, in order.
        tokens: the tokens that the hub knows.
        hub_status: if set, the hub answers everything with this status.
        storage_status: the same for the storage.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: set[str] = set()
        self.requests: list[Request] = []
        self.hub_status: int | None = None
        self.storage_status: int | None = None
        self._cuts: dict[bytes, int] = {}
        self._servers: list[ThreadingHTTPServer] = []
        self._ports = [0, 0]

    def commit(self, name: str, files: dict[str, bytes], *, references: tuple[str, ...] = ("main",)) -> str:
        """Add a commit that has exactly `files`, point the branches or tags at it, and return its hash."""
        repository = self.repositories.setdefault(name, Repository())
        commit = hashlib.sha1(f"{name} {len(repository.commits)}".encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.references.update(dict.fromkeys(references, commit))
        return commit

    def cut(self, content: bytes, after_bytes: int) -> None:
        """Break the connection once, after so many bytes of the file with this content."""
        self._cuts[content] = after_bytes

    def take_cut(self, content: bytes) -> int | None:
        """Where to break the connection while sending this content, at most once."""
        return self._cuts.pop(content, None)

    def stored(self, digest: str) -> tuple[str | None, bytes]:
        """Name and content of the large file with this SHA-256."""
        for repository in self.repositories.values():
            for files in repository.commits.values():
                for file, content in files.items():
                    if hashlib.sha256(content).hexdigest() == digest:
                        return file, content
        return None, b""

    def forget_requests(self) -> None:
        """Start a new record of requests."""
        self.requests.clear()

    def downloads(self) -> list[str]:
        """Files whose content was asked for since the record began, sorted."""
        return sorted({request.file for request in self.requests if request.method == "GET" and request.file})

    @property
    def endpoint(self) -> str:
        """The hub's address, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def storage(self) -> str:
        """The storage's address."""
        return f"http://127.0.0.1:{self._ports[1]}"

    def start(self) -> None:
        """Listen, on the same ports as before if it has run before."""
        for index, port in enumerate(self._ports):
            handler = type("Handler", (_Handler,), {"hub": self, "is_storage": index == 1})
            server = ThreadingHTTPServer(("127.0.0.1", port), handler)
            self._ports[index] = server.server_address[1]
            self._servers.append(server)
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers.clear()

    def __enter__(self) -> HubServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Handler(BaseHTTPRequestHandler):
    """One request; one connection carries one request, so that a stopped server is really gone."""

    hub: HubServer
    is_storage: bool
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        match = re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", path)
        file = self.hub.stored(path[1:])[0] if self.is_storage else match and unquote(match[1])
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), token, self.is_storage, file))
        broken = self.hub.storage_status if self.is_storage else self.hub.hub_status
        if broken is not None:
            self._fail(broken, None, "Internal Error")
        elif self.is_storage:
            self._storage(path)
        elif token is not None and token not in self.hub.tokens:
            self._fail(401, None, "Invalid credentials in Authorization header")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+)|/tree/([^/]+))?", path):
            self._api(match[1], unquote(match[2] or match[3] or "main"), token, tree=match[3] is not None)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], unquote(match[2]), unquote(match[3]), token)
        else:
            self._fail(404, None, "Not Found")

    def _commit(self, name: str, revision: str, token: str | None) -> tuple[Repository, str] | None:
        """The repository and commit asked for, if the token may know of them; otherwise the answer is sent."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and token not in repository.readers):
            if token is None:
                self._fail(401, None, "Invalid username or password.")
            else:
                self._fail(404, "RepoNotFound", "Repository not found")
            return None
        commit = repository.references.get(revision, revision)
        if commit not in repository.commits:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    def _api(self, name: str, revision: str, token: str | None, *, tree: bool) -> None:
        found = self._commit(name, revision, token)
        if found is None:
            return
        repository, commit = found
        files = repository.commits[commit]
        answer: object = {
            "_id": "0",
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": file} for file in files],
        }
        if tree:
            answer = [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for file, content in files.items()
            ]
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json", "X-Repo-Commit": commit})

    def _file(self, name: str, revision: str, file: str, token: str | None) -> None:
        found = self._commit(name, revision, token)
        if found is None:
            return
        repository, commit = found
        if repository.gated and token not in repository.readers:
            self._fail(401 if token is None else 403, "GatedRepo", f"Access to model {name} is restricted.")
            return
        content = repository.commits[commit].get(file)
        if content is None:
            self._fail(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file.endswith(LFS_SUFFIXES):
            digest = hashlib.sha256(content).hexdigest()
            headers |= {
                "X-Linked-Size": str(len(content)),
                "X-Linked-ETag": f'"{digest}"',
                "Location": f"{self.hub.storage}/{digest}",
            }
            self._send(302, b"Found", headers)
        else:
            self._send_file(file, content, headers | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _storage(self, path: str) -> None:
        file, content = self.hub.stored(path[1:])
        if file is None:
            self._fail(404, None, "Not Found")
        else:
            self._send_file(file, content, {"ETag": f'"{path[1:]}"', "Accept-Ranges": "bytes"})

    def _send_file(self, file: str, content: bytes, headers: dict[str, str]) -> None:
        headers["Content-Disposition"] = f"inline; filename*=UTF-8''{file}; filename=\"{file}\";"
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if match is None:
            self._send(200, content, headers, self.hub.take_cut(content) if self.command == "GET" else None)
            return
        start = int(match[1])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206, content[start:], headers)

    def _fail(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Message": message, "Content-Type": "application/json"} | (headers or {})
        if code is not None:
            headers["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut_after: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if cut_after is None else body[:cut_after])


# What the client's process runs: one JSON call a line in, one JSON answer a line out.
_CLIENT = """
import json, sys, time, traceback
from pathlib import Path
from aloud.checkpoint import hub
for line in sys.stdin:
    function, arguments, options = json.loads(line)
    answer = {}
    start = time.monotonic()
    try:
        result = getattr(hub, function)(*arguments, **options)
    except Exception as error:
        cause = error.__cause__
        answer = {"error": type(error).__name__, "message": str(error), "cause": cause and type(cause).__name__,
                  "traceback": "".join(traceback.format_exception(error))}
    else:
        folder = result if isinstance(result, Path) else result.folder
        paths = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
        answer = {"folder": str(folder), "files": [str(path.relative_to(folder)) for path in paths],
                  "name": getattr(result, "name", None), "is_local": getattr(result, "is_local", None)}
    answer["seconds"] = time.monotonic() - start
    print(json.dumps(answer), flush=True)
"""


def client_environment(server: HubServer, home: Path) -> dict[str, str]:
    """Environment of a process whose hub is `server`, with its cache and stored token in `home`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and not name.lower().endswith("_proxy") and name != "HUGGING_FACE_HUB_TOKEN"
    }
    return kept | {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}


class HubClient:
    """`aloud.checkpoint.hub` in a process of its own, because huggingface_hub reads its environment when imported."""

    def __init__(self, server: HubServer, home: Path, *, stderr: int = subprocess.DEVNULL, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CLIENT],
            env=client_environment(server, home) | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def call(self, function: str, *arguments: str, **options: object) -> dict:
        """Call a function of the module; its answer, or `error` and `message`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([function, arguments, options]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def resolve(self, *arguments: str, **options: object) -> dict:
        """Call `resolve`."""
        return self.call("resolve", *arguments, **options)

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=30)
