"""Safetensors files of a checkpoint: which ones hold the weights, and their tensors without a copy in memory."""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from ..errors import ConfigInvalid, PickleRefused, TensorsMismatch, WeightsCorrupt, WeightsMissing

INDEX_SUFFIX = ".index.json"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_LFS_POINTER = b"version https://git-lfs"


# --- which files ------------------------------------------------------------------------------------------------------


def weight_candidates(config: dict[str, object]) -> list[str]:
    """Names of the files that may hold the weights or index them, the preferred one first.

    Args:
        config: config.json of the checkpoint, as parsed.

    Raises:
        ConfigInvalid: `transformers_weights` is not the plain name of a safetensors file or of an index.
    """
    candidates = ["model.safetensors" + INDEX_SUFFIX, "model.safetensors"]
    named = config.get("transformers_weights")
    in_sesames_own_form = config.get("model_type") != "csm" and "backbone_flavor" in config
    if named is not None and not in_sesames_own_form:
        if not (isinstance(named, str) and _is_plain_name(named) and named.endswith((".safetensors", INDEX_SUFFIX))):
            raise ConfigInvalid(
                f"config.json names {named!r} as transformers_weights, which is neither a *.safetensors file nor a "
                f"*{INDEX_SUFFIX} beside it: correct it, or take the model from its source again."
            )
        candidates.insert(0, named)
    return candidates


def choose_weights(names: Collection[str], config: dict[str, object], where: str) -> str:
    """Of the files that a checkpoint has, the safetensors file or index to read.

    Args:
        names: the checkpoint's file names.
        config: config.json of the checkpoint, as parsed.
        where: what to call the checkpoint in an error.

    Raises:
        ConfigInvalid: see `weight_candidates`.
        PickleRefused: the only weights are pickles.
        WeightsMissing: there are no weights, or none under a name that says what they are.
    """
    candidates = weight_candidates(config)
    for candidate in candidates:
        if candidate in names:
            return candidate
    expected = " or ".join(candidates)
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if others:
        raise WeightsMissing(
            f"{where} has {_listed(others)} but not {expected}, which would say how the weights are stored: "
            "take that file from the model's source too."
        )
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        raise PickleRefused(
            f"{where} has its weights only as {_listed(pickles)}: that is a pickle, which can run any code when it is "
            "loaded, so it is refused. Ask the model's authors for safetensors, or load it where you trust it and save "
            "it with save_pretrained(folder, safe_serialization=True) of transformers."
        )
    raise WeightsMissing(f"{where} has no weights: put {expected} there, or take the model from its source again.")


def index_shards(index: Path) -> list[str]:
    """Names of the safetensors files that an index (`*.safetensors.index.json`) lists, sorted.

    Raises:
        WeightsCorrupt: it is no index, or a name in it leads out of its folder.
        PickleRefused: it lists pickles.
    """
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsCorrupt(f"{index} is not an index of safetensors files: download it again.") from error
    if not shards:
        raise WeightsCorrupt(f"{index} lists no files: download it again.")
    for shard in shards:
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise WeightsCorrupt(
                f"{index} lists {shard!r}, which is not a file name in its own folder: take it from a source you trust."
            )
        if shard.endswith(PICKLE_SUFFIXES):
            raise PickleRefused(
                f"{index} lists {shard}: that is a pickle, which can run any code when it is loaded, so it is refused. "
                "Take the model as safetensors."
            )
    return shards


def find_weights(folder: Path, config: dict[str, object]) -> list[Path]:
    """The safetensors files in `folder` that hold the weights, those that an index lists sorted by name.

    Looks for what config.json names in `transformers_weights`, then model.safetensors.index.json, then
    model.safetensors; a file of another layout beside the chosen one is left alone.

    Raises:
        ConfigInvalid, PickleRefused, WeightsMissing, WeightsCorrupt: see `choose_weights` and `index_shards`;
            WeightsMissing also names every file that the index lists and that is not there.
    """
    names = {path.name for path in folder.iterdir() if path.is_file()}
    chosen = choose_weights(names, config, str(folder))
    if not chosen.endswith(INDEX_SUFFIX):
        return [folder / chosen]
    shards = index_shards(folder / chosen)
    missing = [shard for shard in shards if shard not in names]
    if missing:
        raise WeightsMissing(f"{folder} lacks {_listed(missing)}, listed in {chosen}: download what is missing.")
    return [folder / shard for shard in shards]


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and not any(mark in name for mark in ("/", "\\", "\0"))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


# --- their tensors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One tensor: where its bytes are."""

    path: Path
    body: torch.Tensor  # the mapped file, uint8 [file bytes]
    dtype: str  # of safetensors: "F32", "BF16", ...
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    stop: int


class SafetensorsReader:
    """The tensors of one or several safetensors files, as views of the mapped files.

    `read` copies nothing: pages come from the file when they are touched and belong to the page cache, so copying a
    tensor to its place needs no memory but that place. A tensor that was read stays valid after `close`.
    """

    def __init__(self, entries: dict[str, _Entry]) -> None:
        self._entries = entries
        self._nbytes = sum(entry.stop - entry.start for entry in entries.values())

    @classmethod
    def open(cls, paths: Sequence[Path]) -> SafetensorsReader:
        """Map the files and read their headers.

        Raises:
            WeightsMissing: a file is not there.
            WeightsCorrupt: a file is truncated or no safetensors file, or two files hold the same tensor.
        """
        entries: dict[str, _Entry] = {}
        for path in paths:
            for name, entry in _read_header(Path(path)).items():
                if name in entries:
                    raise WeightsCorrupt(
                        f"Tensor {name} is in {entries[name].path} and again in {path}: keep the files of one model "
                        "together, or download it again."
                    )
                entries[name] = entry
        return cls(entries)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors calls it: "F32", "BF16", "F16", ..."""
        return self._entries[name].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return self._nbytes

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, `[*shape]` in the file's dtype: a view of the mapped file.

        Writing to it changes neither the file nor what other processes see.

        Raises:
            TensorsMismatch: torch has no such dtype.
        """
        entry = self._entries[name]
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            raise TensorsMismatch(entry.path.name, wrong_dtype=[f"{name} {entry.dtype}"])
        if entry.start == entry.stop:
            return torch.zeros(entry.shape, dtype=dtype)
        data = entry.body[entry.start : entry.stop]
        if entry.start % dtype.itemsize:
            data = data.clone()  # the format does not promise alignment; writers keep it, so this is rare
        return data.view(dtype).reshape(entry.shape)

    def close(self) -> None:
        """Let go of the files; each mapping ends with the last tensor read from it."""
        self._entries = {}

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _read_header(path: Path) -> dict[str, _Entry]:
    """The tensors of one file; the format is 8 bytes of header length, a JSON header, and the bytes of the tensors."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(len(_LFS_POINTER))
            if start == _LFS_POINTER:
                raise WeightsCorrupt(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder.")
            if size < 8:
                raise _corrupt(path, f"it has {size} bytes")
            (header_bytes,) = struct.unpack("<Q", start[:8])
            if header_bytes > _MAX_HEADER_BYTES:
                raise _corrupt(path, f"its header would be {header_bytes} bytes long")
            if 8 + header_bytes > size:
                raise _corrupt(path, f"it ends in its header, after {size} bytes")
            file.seek(8)
            header = file.read(header_bytes)
            # A private mapping, so that torch may hold it as writable memory; nothing is ever written to it.
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except FileNotFoundError as error:
        raise WeightsMissing(f"{path} is not there: download it.") from error
    except OSError as error:
        raise WeightsCorrupt(f"{path} cannot be read ({error}): check the file, or download it again.") from error
    return _parse_header(path, header, torch.frombuffer(mapped, dtype=torch.uint8))


def _parse_header(path: Path, header: bytes, body: torch.Tensor) -> dict[str, _Entry]:
    """Read the header, and check that its tensors cover what follows it exactly."""
    try:
        tensors = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, "its header is not JSON") from error
    if not isinstance(tensors, dict):
        raise _corrupt(path, "its header is not a JSON object")
    tensors.pop("__metadata__", None)
    data_start = 8 + len(header)
    entries: dict[str, _Entry] = {}
    for name, tensor in tensors.items():
        try:
            dtype, shape, (start, stop) = tensor["dtype"], tuple(tensor["shape"]), tensor["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise _corrupt(path, f"its header does not describe tensor {name}") from error
        numbers = (*shape, start, stop)
        if not isinstance(dtype, str) or any(type(number) is not int or number < 0 for number in numbers):
            raise _corrupt(path, f"its header does not describe tensor {name}")
        known = TORCH_DTYPES.get(dtype)  # of a dtype that torch lacks, the size is not known here
        if known is not None and stop - start != math.prod(shape) * known.itemsize:
            raise _corrupt(path, f"tensor {name} has {stop - start} bytes, which do not fit its shape and dtype")
        entries[name] = _Entry(path, body, dtype, shape, data_start + start, data_start + stop)
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position or entry.stop < entry.start:
            raise _corrupt(path, f"tensor {name} overlaps another, or leaves a gap")
        position = entry.stop
    if position > len(body):
        raise _corrupt(path, f"it has {len(body)} of {position} bytes")
    if position < len(body):
        raise _corrupt(path, f"{len(body) - position} bytes follow its last tensor")
    return entries


def _corrupt(path: Path, what: str) -> WeightsCorrupt:
    return WeightsCorrupt(f"{path} is truncated or not a safetensors file ({what}): download it again.")
