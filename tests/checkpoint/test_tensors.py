"""Safetensors files against the safetensors library: values, refusals, and memory."""

from __future__ import annotations

import gc
import json
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from aloud import errors
from aloud.checkpoint.tensors import TORCH_DTYPES, SafetensorsReader, find_weights


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    high = 2 if dtype == torch.bool else 256
    size = torch.empty(shape).numel() * dtype.itemsize
    return torch.randint(0, high, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_every_dtype_reads_as_the_library_reads_it(name: str, tmp_path: Path, generator: torch.Generator) -> None:
    dtype = TORCH_DTYPES[name]
    tensors = {
        "matrix": random_tensor((5, 3), dtype, generator),
        "scalar": random_tensor((), dtype, generator),
        "empty": torch.zeros((0, 4), dtype=dtype),
    }
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path)
    expected = safetensors.torch.load_file(path)
    with SafetensorsReader.open([path]) as reader:
        assert reader.names() == set(tensors)
        assert reader.nbytes == 16 * dtype.itemsize
        for key, tensor in expected.items():
            ours = reader.read(key)
            assert reader.dtype(key) == name
            assert ours.dtype == dtype
            assert reader.shape(key) == tuple(ours.shape) == tuple(tensor.shape)
            assert raw_bytes(ours) == raw_bytes(tensor) == raw_bytes(tensors[key])


def test_several_shards_are_one_set_of_tensors(tmp_path: Path, generator: torch.Generator) -> None:
    shards = [
        {f"tensor.{shard}.{i}": torch.randn(shard + 1, 7, generator=generator) for i in range(3)} for shard in (0, 1)
    ]
    paths = [tmp_path / f"model-{shard}.safetensors" for shard in (0, 1)]
    for path, tensors in zip(paths, shards, strict=True):
        safetensors.torch.save_file(tensors, path)
    with SafetensorsReader.open(paths) as reader:
        assert reader.names() == {*shards[0], *shards[1]}
        assert reader.nbytes == 3 * 7 * 4 + 3 * 14 * 4
        for name, tensor in (shards[0] | shards[1]).items():
            assert torch.equal(reader.read(name), tensor)


def test_a_tensor_outlives_the_reader(tmp_path: Path, generator: torch.Generator) -> None:
    expected = torch.randn(1000, 100, generator=generator)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": expected}, path)
    with SafetensorsReader.open([path]) as reader:
        tensor = reader.read("weight")
    del reader
    gc.collect()
    assert torch.equal(tensor, expected)


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(10)}, path)
    before = path.read_bytes()
    with SafetensorsReader.open([path]) as reader:
        reader.read("weight").zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("padding", range(8))
def test_any_alignment_of_the_data(padding: int, tmp_path: Path, generator: torch.Generator) -> None:
    expected = torch.randn(6, generator=generator)
    header = json.dumps({"weight": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}).encode() + b" " * padding
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(header, raw_bytes(expected)))
    with SafetensorsReader.open([path]) as reader:
        assert torch.equal(reader.read("weight"), expected)


def test_a_dtype_that_torch_lacks_is_listed_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({"weight": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, b"abc"))
    with SafetensorsReader.open([path]) as reader:
        assert reader.dtype("weight") == "F6_E2M3"
        with pytest.raises(errors.TensorsMismatch, match="weight F6_E2M3"):
            reader.read("weight")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_cut_anywhere_is_refused(tmp_path: Path, generator: torch.Generator) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({name: torch.randn(4, generator=generator) for name in ("first", "second")}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(errors.WeightsCorrupt, match=f"^{re.escape(str(path))} .*download it again"):
            SafetensorsReader.open([path])
    path.write_bytes(whole)
    assert SafetensorsReader.open([path]).names() == {"first", "second"}


def described(**changes: object) -> dict[str, object]:
    return {"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(struct.pack("<Q", 2**63) + b"{}", "header would be", id="header-length-huge"),
        pytest.param(struct.pack("<Q", 1000) + b"{}", "ends in its header", id="header-length-over-the-file"),
        pytest.param(file_of(b"not json"), "not JSON", id="header-not-json"),
        pytest.param(file_of(b"\xff\xfe"), "not JSON", id="header-not-text"),
        pytest.param(file_of(b"[" * 100_000), "not JSON", id="header-nested-too-deep"),
        pytest.param(file_of([1, 2]), "not a JSON object", id="header-a-list"),
        pytest.param(file_of({"weight": 3}), "does not describe tensor weight", id="tensor-a-number"),
        pytest.param(
            file_of({"weight": {"dtype": "F32"}}), "does not describe tensor weight", id="tensor-without-shape"
        ),
        pytest.param(file_of(described(shape=[-2]), bytes(8)), "does not describe tensor weight", id="shape-negative"),
        pytest.param(file_of(described(shape=["2"]), bytes(8)), "does not describe tensor weight", id="shape-text"),
        pytest.param(file_of(described(dtype=7), bytes(8)), "does not describe tensor weight", id="dtype-a-number"),
        pytest.param(file_of(described(shape=[3]), bytes(8)), "has 8 bytes", id="shape-over-the-data"),
        pytest.param(file_of(described(data_offsets=[8, 0]), bytes(8)), "has -8 bytes", id="offsets-backwards"),
        pytest.param(file_of(described(data_offsets=[4, 12]), bytes(12)), "leaves a gap", id="gap"),
        pytest.param(
            file_of({**described(), "other": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),
            "overlaps",
            id="overlap",
        ),
        pytest.param(file_of(described(), bytes(9)), "1 bytes follow", id="bytes-after-the-end"),
        pytest.param(b"PK\x03\x04" + bytes(200), "truncated or not a safetensors file", id="zip-of-a-pickle"),
        pytest.param(b"<!DOCTYPE html><html></html>", "truncated or not a safetensors file", id="web-page"),
    ],
)
def test_corrupt_files_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(path, "pt"):
        pass  # the library refuses it, too
    with pytest.raises(errors.WeightsCorrupt, match=f"{reason}.*download it again"):
        SafetensorsReader.open([path])


def test_a_damaged_header_never_reads_as_something_else(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"first": torch.ones(2, 3), "second": torch.ones(4, dtype=torch.bfloat16)}, path)
    whole = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    draw = random.Random(seed)
    refused = 0
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2))):
            damaged[draw.randrange(header_end)] = draw.randrange(256)
        path.write_bytes(damaged)
        expected: dict[str, tuple[str, list[int]]] | None = None
        try:
            with safetensors.safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dict
                expected = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        except (safetensors.SafetensorError, OSError):
            refused += 1
        try:
            with SafetensorsReader.open([path]) as reader:
                ours = {name: (reader.dtype(name), list(reader.shape(name))) for name in reader.names()}
        except errors.WeightsCorrupt:
            ours = None
        # What only the library refuses (such as a dtype it has never heard of) may be listed here.
        assert expected is None or ours == expected, bytes(damaged)
    assert refused > 100


def test_a_git_lfs_pointer_is_named_as_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 6210000000\n")
    with pytest.raises(errors.WeightsCorrupt, match="git lfs pull"):
        SafetensorsReader.open([path])


def test_the_same_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path in paths:
        safetensors.torch.save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(errors.WeightsCorrupt, match=r"Tensor weight is in .*one\.safetensors and again in .*two\."):
        SafetensorsReader.open(paths)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.WeightsMissing, match=r"gone\.safetensors is not there"):
        SafetensorsReader.open([tmp_path / "gone.safetensors"])


# --- which files ------------------------------------------------------------------------------------------------------

CSM = {"model_type": "csm", "transformers_weights": "transformers.safetensors.index.json"}
SESAME = {"backbone_flavor": "llama-1B", "decoder_flavor": "llama-100M"}
HUB_FILES = {
    "ckpt.pt": b"",
    "model.safetensors": b"",
    "transformers.safetensors.index.json": {"a": "transformers-2.safetensors", "b": "transformers-1.safetensors"},
    "transformers-1.safetensors": b"",
    "transformers-2.safetensors": b"",
}
SHARDED = {
    "model.safetensors.index.json": {
        "a": "model-1.safetensors",
        "b": "model-2.safetensors",
        "c": "model-1.safetensors",
    },
    "model-1.safetensors": b"",
    "model-2.safetensors": b"",
}


def write_files(folder: Path, files: dict) -> None:
    for name, content in files.items():
        is_index = isinstance(content, dict)
        (folder / name).write_bytes(json.dumps({"weight_map": content}).encode() if is_index else content)


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        pytest.param(CSM, HUB_FILES, ["transformers-1.safetensors", "transformers-2.safetensors"], id="named-index"),
        pytest.param(
            {"model_type": "csm", "transformers_weights": "other.safetensors"},
            {"other.safetensors": b"", "model.safetensors": b""},
            ["other.safetensors"],
            id="named-file",
        ),
        pytest.param(CSM, {"model.safetensors": b""}, ["model.safetensors"], id="named-index-not-there"),
        pytest.param({}, SHARDED, ["model-1.safetensors", "model-2.safetensors"], id="index"),
        pytest.param(
            {}, SHARDED | {"model.safetensors": b""}, ["model-1.safetensors", "model-2.safetensors"], id="index-first"
        ),
        pytest.param({}, {"model.safetensors": b"", "x.bin": b""}, ["model.safetensors"], id="single"),
        pytest.param(SESAME, {"model.safetensors": b"", "ckpt.pt": b""}, ["model.safetensors"], id="sesame"),
        pytest.param(SESAME, SHARDED, ["model-1.safetensors", "model-2.safetensors"], id="sesame-index"),
        pytest.param(CSM | SESAME, HUB_FILES, ["transformers-1.safetensors", "transformers-2.safetensors"], id="both"),
    ],
)
def test_find_weights(config: dict, files: dict, expected: list[str], tmp_path: Path) -> None:
    write_files(tmp_path, files)
    assert find_weights(tmp_path, config) == [tmp_path / name for name in expected]


@pytest.mark.parametrize("name", ["ckpt.pt", "pytorch_model.bin", "model.pth", "last.ckpt"])
def test_a_pickle_is_refused(name: str, tmp_path: Path) -> None:
    write_files(tmp_path, {name: b"", "config.json": b"{}"})
    with pytest.raises(errors.PickleRefused, match=rf"{re.escape(name)}.*run any code.*safetensors"):
        find_weights(tmp_path, CSM)


@pytest.mark.parametrize(
    ("config", "files", "error", "sentence"),
    [
        pytest.param(
            CSM, {}, errors.WeightsMissing, "no weights: put transformers.safetensors.index.json or", id="none"
        ),
        pytest.param(
            {},
            {"model-1.safetensors": b""},
            errors.WeightsMissing,
            "model-1.safetensors but not",
            id="shard-without-index",
        ),
        pytest.param(
            {},
            {"model.safetensors.index.json": {"a": "s-1.safetensors", "b": "s-2.safetensors", "c": "s-3.safetensors"}}
            | {"s-2.safetensors": b""},
            errors.WeightsMissing,
            "lacks s-1.safetensors, s-3.safetensors, listed in model.safetensors.index.json",
            id="shards-missing",
        ),
        pytest.param(
            {},
            {"model.safetensors.index.json": {"a": "../x.safetensors"}},
            errors.WeightsCorrupt,
            "'../x",
            id="index-up",
        ),
        pytest.param({}, {"model.safetensors.index.json": {"a": ".."}}, errors.WeightsCorrupt, "'..'", id="index-dots"),
        pytest.param(
            {},
            {"model.safetensors.index.json": {"a": "/etc/x"}},
            errors.WeightsCorrupt,
            "'/etc/x'",
            id="index-absolute",
        ),
        pytest.param(
            {},
            {"model.safetensors.index.json": {"a": "b\\c"}},
            errors.WeightsCorrupt,
            "own folder",
            id="index-backslash",
        ),
        pytest.param({}, {"model.safetensors.index.json": {"a": 3}}, errors.WeightsCorrupt, "3", id="index-number"),
        pytest.param(
            {}, {"model.safetensors.index.json": {}}, errors.WeightsCorrupt, "lists no files", id="index-empty"
        ),
        pytest.param({}, {"model.safetensors.index.json": b"{"}, errors.WeightsCorrupt, "not an index", id="index-cut"),
        pytest.param(
            {}, {"model.safetensors.index.json": b"[]"}, errors.WeightsCorrupt, "not an index", id="index-list"
        ),
        pytest.param(
            {},
            {"model.safetensors.index.json": {"a": "x.bin"}},
            errors.PickleRefused,
            "lists x.bin",
            id="index-of-pickles",
        ),
        pytest.param(
            {"transformers_weights": "../a.safetensors"}, {}, errors.ConfigInvalid, "'../a.safetensors'", id="named-up"
        ),
        pytest.param({"transformers_weights": ["a"]}, {}, errors.ConfigInvalid, r"\['a'\]", id="named-list"),
        pytest.param({"transformers_weights": "ckpt.pt"}, {}, errors.ConfigInvalid, "'ckpt.pt'", id="named-pickle"),
    ],
)
def test_find_weights_refuses(config: dict, files: dict, error: type, sentence: str, tmp_path: Path) -> None:
    write_files(tmp_path, files)
    with pytest.raises(error, match=sentence):
        find_weights(tmp_path, config)


# --- memory -----------------------------------------------------------------------------------------------------------

MEMORY_PROBE = """
import re, sys, threading
from pathlib import Path
import torch
from aloud.checkpoint.tensors import SafetensorsReader

def anonymous_bytes():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
torch.ones(1000).bfloat16()  # what torch allocates once
path = Path(sys.argv[1])
before = peak = anonymous_bytes()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous_bytes())

threading.Thread(target=watch, daemon=True).start()
with SafetensorsReader.open([path]) as reader:
    places = {name: torch.empty(reader.shape(name), dtype=torch.bfloat16) for name in sorted(reader.names())}
    for name, place in places.items():
        place.copy_(reader.read(name))
done.set()
peak = max(peak, anonymous_bytes())
ends = [place[-1, -1].item() for place in places.values()]
print(peak - before, sum(place.nbytes for place in places.values()), *ends)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon of Linux")
def test_copying_out_needs_no_memory_but_the_place(tmp_path: Path, seed: int) -> None:
    shapes = {"first": (16384, 2048), "second": (4096, 4096), "third": (4096, 4096)}  # 128 + 64 + 64 MiB in float32
    header: dict[str, object] = {}
    position = 0
    for name, (rows, columns) in shapes.items():
        header[name] = {
            "dtype": "F32",
            "shape": [rows, columns],
            "data_offsets": [position, position + 4 * rows * columns],
        }
        position += 4 * rows * columns
    path = tmp_path / "model.safetensors"
    block = random.Random(seed).randbytes(2**20 - 4) + struct.pack("<f", 0.5)
    with path.open("wb") as file:
        file.write(file_of(header))
        for _ in range(position // len(block)):
            file.write(block)
    probe = subprocess.run([sys.executable, "-c", MEMORY_PROBE, path], capture_output=True, text=True, check=False)
    path.unlink()
    assert probe.returncode == 0, probe.stderr
    grown, placed, *last = probe.stdout.split()
    print(f"RssAnon grew by {int(grown) / 2**20:.1f} MiB for {int(placed) / 2**20:.1f} MiB of bfloat16")
    assert int(placed) == position // 2
    assert [float(value) for value in last] == [0.5] * 3
    assert int(placed) <= int(grown) < 1.1 * int(placed)
