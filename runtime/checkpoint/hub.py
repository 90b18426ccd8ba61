"""A model's name to local files: a folder as it is, a repository on the hub through huggingface_hub's cache."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..errors import (
    AloudError,
    ConfigInvalid,
    ConfigMissing,
    DownloadFailed,
    ModelGated,
    ModelNotFound,
    ModelOffline,
    WeightsMissing,
)
from .tensors import INDEX_SUFFIX, choose_weights, index_shards, weight_candidates

CONFIG = "config.json"
OPTIONAL_FILES = ("generation_config.json", "tokenizer.json")

# Some versions of huggingface_hub go on after a cut connection by themselves; others leave what came in the cache and
# go on from there when they are called again.
ATTEMPTS = 3

BOTH_FORMS = 'a model is a local folder ("./my-model") or a name on the hub ("owner/name")'


@dataclass(frozen=True)
class Source:
    """Where a checkpoint's files are."""

    folder: Path
    """holds config.json, and the weights unless they were left out"""
    name: str
    """the name on the hub, or the folder's"""
    is_local: bool
    """whether the user gave a folder"""


def resolve(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Source:
    """Find a checkpoint, and bring what is needed of it here if it is on the hub.

    Of a repository only the configuration, the tokenizer and one layout of the weights are fetched, in safetensors;
    what the cache already has is not fetched again. When the hub cannot be reached, or refuses, the cache will do if
    it has all the files.

    Args:
        model: a folder, or "owner/name" on the hub. An existing folder comes first.
        revision: branch, tag or commit of a repository; None is its main branch.
        token: for a gated or private repository; None is the one that `hf auth login` has stored, if any.
        local_files_only: use the cache, and do not ask the hub.
        weights: whether to fetch the weights, too.

    Raises:
        ModelNotFound: no such folder, repository or revision.
        ModelGated: the hub wants an accepted licence or a token, or refused the one it got.
        ModelOffline: the hub cannot be reached, and not all files are in the cache.
        DownloadFailed: the hub answered, but a file could not be brought here whole.
        ConfigMissing, ConfigInvalid: no config.json there, or an unreadable one.
        WeightsMissing, PickleRefused, WeightsCorrupt: a repository has no weights that can be read.
    """
    text = os.fspath(model)
    folder = Path(os.path.expanduser(text))
    if text and os.path.isdir(folder):
        if revision is not None:
            raise ModelNotFound(f"{folder} is a folder, which has no revisions: leave out revision={revision!r}.")
        if not (folder / CONFIG).is_file():
            raise ConfigMissing(f"{folder} has no {CONFIG}: give the folder that holds the model's files.")
        return Source(folder, folder.resolve().name, is_local=True)
    if not isinstance(model, str) or folder.is_absolute() or text.startswith((".", "~")):
        what = "is a file, not a folder" if os.path.isfile(folder) else "does not exist"
        raise ModelNotFound(f"The folder {text!r} {what}: {BOTH_FORMS}.")
    _check_name(text)
    return _fetch(_connect(text, revision, token, local_files_only), weights)


def resolve_file(
    repository: str,
    filename: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """One file of a repository on the hub, fetched unless the cache has it.

    Raises:
        ModelNotFound, ModelGated, ModelOffline, DownloadFailed: see `resolve`; ModelNotFound also if the repository
            has no such file.
    """
    _check_name(repository)
    return _connect(repository, revision, token, local_files_only).fetch(filename)


def _check_name(name: str) -> None:
    sentence = f"{name!r} is not a folder here, and no name on the hub: {BOTH_FORMS}."
    if name.count("/") != 1:
        raise ModelNotFound(sentence)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ModelNotFound(sentence) from error


@dataclass(frozen=True)
class _Repository:
    """A repository at one revision, as far as the hub shows it."""

    name: str
    revision: str | None
    token: str | None
    files: frozenset[str] | None
    """all its files; None if only the cache can be used"""
    failure: Exception | None = None
    """why the hub did not say, if it was asked"""

    def fetch(self, filename: str, commit: str | None = None) -> Path:
        """Path of a file in the cache, downloaded if need be; of `commit` rather than the revision if given."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                # With the revision's own name the cache also notes its commit, and finds it again without the hub.
                path = hf_hub_download(
                    self.name,
                    filename,
                    revision=commit or self.revision,
                    token=self.token,
                    local_files_only=self.files is None,
                )
                return Path(path)
            except Exception as error:  # whatever the client and the libraries below it raise
                if self.files is None and isinstance(error, LocalEntryNotFoundError):
                    raise self.not_cached(filename) from (self.failure or error)
                if attempt == ATTEMPTS or not _is_broken_transfer(error):
                    raise self._explain(error, filename) from error
        raise AssertionError("the last attempt returns or raises")

    def not_cached(self, filename: str) -> AloudError:
        """The error when `filename` is not in the cache and the hub cannot help."""
        missing = f"The local cache lacks {filename} of {self.name}{self._at_revision()}"
        if self.failure is None:
            return ModelOffline(f"{missing}, and local_files_only forbids to download it: leave that out once.")
        if isinstance(self.failure, HfHubHTTPError):
            return self._explain(self.failure, filename)
        return ModelOffline(
            f"{missing}, and the hub cannot be reached ({_reason(self.failure)}): connect to the network, "
            "or copy the model's files here and give their folder."
        )

    def _explain(self, error: Exception, filename: str) -> AloudError:
        """The sentence for what huggingface_hub raised when it was asked for `filename`."""
        if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # the hub failed and the cache has nothing: the first half is the news
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        token_sent = response is not None and "authorization" in response.request.headers
        page = f"https://huggingface.co/{self.name}"
        if isinstance(error, GatedRepoError):
            if token_sent:
                return ModelGated(
                    f"{self.name} is gated, and the token that was sent may not read it: accept the licence at {page} "
                    "with the token's account, or use another one with `hf auth login` or token=. "
                    "A fine-grained token needs the permission to read gated repositories."
                )
            return ModelGated(
                f"{self.name} is gated: accept the licence at {page}, then log in with `hf auth login` or pass token=."
            )
        if isinstance(error, RevisionNotFoundError):
            return ModelNotFound(f"{self.name} has no revision {self.revision!r}: see {page}/commits for those it has.")
        if status == 401 and token_sent:
            return ModelGated(
                f"The hub refused the token that was sent for {self.name}: it is wrong or has expired. Make one at "
                "https://huggingface.co/settings/tokens and log in with `hf auth login`, or pass it as token=."
            )
        if isinstance(error, RepositoryNotFoundError) or status == 401:
            then = "the token that was sent may not see it" if token_sent else "no token was sent"
            return ModelNotFound(
                f"The hub has no {self.name}, or it is private and {then}: check the name, and log in with "
                f"`hf auth login` or pass token= if it is private ({BOTH_FORMS})."
            )
        if isinstance(error, EntryNotFoundError):
            return ModelNotFound(f"{self.name}{self._at_revision()} has no file {filename}: check the name at {page}.")
        if status == 403:
            return ModelGated(f"The hub forbids to read {self.name}: {_reason(error)}")
        if _is_full_disk(error):
            return DownloadFailed(
                f"The disk is full: {filename} of {self.name} does not fit into {constants.HF_HUB_CACHE}. Make room, "
                "or set HF_HOME to a folder on a larger disk."
            )
        if _is_refused_by_disk(error):
            return DownloadFailed(
                f"{filename} of {self.name} cannot be written to the cache ({_reason(error)}): make that folder "
                "writable, or set HF_HOME to another."
            )
        return DownloadFailed(f"{filename} of {self.name} could not be downloaded ({_reason(error)}): try again.")

    def _at_revision(self) -> str:
        return "" if self.revision is None else f" at revision {self.revision!r}"


def _connect(name: str, revision: str | None, token: str | None, local_files_only: bool) -> _Repository:
    """Ask the hub what the repository has; where that fails for a reason that may pass, leave it to the cache."""
    token = (token or "").strip() or None  # a token read from a file ends in a newline, which no header may hold
    cached = _Repository(name, revision, token, files=None)
    if local_files_only:
        return cached
    try:
        info = HfApi().model_info(name, revision=revision, token=token, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except RevisionNotFoundError as error:
        raise cached._explain(error, CONFIG) from error
    except Exception as error:  # not reached, or refused: each client version has its own classes for that
        return _Repository(name, revision, token, files=None, failure=error)
    files = frozenset(file.rfilename for file in info.siblings or ())
    return _Repository(name, revision, token, files)


def _fetch(repository: _Repository, weights: bool) -> Source:
    """Bring the needed files of a repository into the cache."""
    listed = repository.files
    if listed is not None and CONFIG not in listed:
        raise ConfigMissing(
            f"{repository.name} has no {CONFIG}: it is not a model that can be loaded here, take one that has it."
        )
    config_path = repository.fetch(CONFIG)
    folder = config_path.parent
    commit = folder.name  # the cache keeps snapshots/<commit>/<file>
    config = _read_config(config_path)
    available = listed if listed is not None else frozenset(path.name for path in folder.iterdir() if path.is_file())
    for filename in OPTIONAL_FILES:
        if filename in available:
            repository.fetch(filename, commit)
    chosen = next((name for name in weight_candidates(config) if name in available), None)
    if weights and chosen is None:
        if listed is None:
            raise repository.not_cached(weight_candidates(config)[0]) from repository.failure
        chosen = choose_weights(available, config, repository.name)  # says what is there instead
    if chosen is not None and chosen.endswith(INDEX_SUFFIX):
        shards = index_shards(repository.fetch(chosen, commit))
        missing = [shard for shard in shards if shard not in available]
        if weights and missing and listed is not None:
            raise WeightsMissing(
                f"{repository.name} lacks {', '.join(missing)}, listed in its {chosen}: try another revision."
            )
        if weights and missing:
            raise repository.not_cached(", ".join(missing)) from repository.failure
    else:
        shards = [] if chosen is None else [chosen]
    if weights:
        for shard in shards:
            repository.fetch(shard, commit)
    return Source(folder, repository.name, is_local=False)


def _read_config(path: Path) -> dict[str, object]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigInvalid(f"{path} is not JSON: download it again.") from error
    if not isinstance(config, dict):
        raise ConfigInvalid(f"{path} is not a JSON object: download it again.")
    return config


def _is_broken_transfer(error: Exception) -> bool:
    """Whether another attempt may go further: the hub has the file, and this machine has taken what came."""
    answered = isinstance(error, (HfHubHTTPError, EntryNotFoundError))
    return not answered and not _is_full_disk(error) and not _is_refused_by_disk(error)


def _is_full_disk(error: Exception) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    return any(isinstance(link, OSError) and link.errno in full for link in _chain(error))


def _is_refused_by_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.filename is not None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    """The first line of what an error says, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
