"""What can be wrong with a checkpoint, each with its class and its sentence, through `Runtime.load`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from aloud import Runtime, errors, memory
from aloud.checkpoint.load import KYUTAI_CODEC, weight_bytes
from oracle import csm as oracle
from oracle import sesame

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = oracle.random_model(oracle.small_config(), request.config.getoption("--seed"))
    return oracle.save(model, tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A checkpoint that loads, to break."""
    shutil.copytree(good, tmp_path / "model")
    Runtime.load(tmp_path / "model", device="cpu")
    return tmp_path / "model"


def raised(folder: Path, error: type[errors.CheckpointError], **options: Any) -> str:
    """Loading raises exactly this; its sentence."""
    with pytest.raises(errors.CheckpointError) as caught:
        Runtime.load(folder, device="cpu", **options)
    assert type(caught.value) is error
    return str(caught.value)


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


# --- config.json ------------------------------------------------------------------------------------------------------


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    sentence = raised(folder, errors.ConfigMissing)
    assert sentence == f"{folder} has no config.json: give the folder that holds the model's files."


@pytest.mark.parametrize("text", ["", '{"model_type": "csm"', "not json"])
def test_config_is_not_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    sentence = raised(folder, errors.ConfigInvalid)
    assert sentence.startswith(f"{folder / 'config.json'} cannot be read as JSON: ")
    assert sentence.endswith("Download it again.")


def test_another_model(folder: Path) -> None:
    change_config(folder, lambda config: config.update(model_type="llama"))
    assert raised(folder, errors.WrongModelType) == (
        'config.json says model_type "llama", and only "csm" can be run. Name a CSM checkpoint, '
        "for example sesame/csm-1b."
    )


def test_a_value_that_cannot_be_run(folder: Path) -> None:
    change_config(folder, lambda config: config["depth_decoder_config"].update(attention_bias=True))
    sentence = raised(folder, errors.ConfigInvalid)
    assert sentence == "config.json's depth_decoder_config.attention_bias is True; only False can be run."


def test_sampling_that_cannot_be(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"top_k": "fifty"}')
    assert raised(folder, errors.ConfigInvalid) == (
        "generation_config.json's top_k must be a number, 0 or more, got 'fifty'."
    )


# --- weights ----------------------------------------------------------------------------------------------------------


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    sentence = raised(folder, errors.WeightsMissing)
    assert sentence.startswith(f"{folder} has no weights: put model.safetensors.index.json or model.safetensors there")


@pytest.mark.parametrize("name", ["ckpt.pt", "pytorch_model.bin"])
def test_pickles_alone(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    sentence = raised(folder, errors.PickleRefused)
    assert f"has its weights only as {name}: that is a pickle, which can run any code" in sentence
    assert "Ask the model's authors for safetensors" in sentence


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_weights(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    sentence = raised(folder, errors.WeightsCorrupt)
    assert sentence.startswith(f"{path} is truncated or not a safetensors file (")
    assert sentence.endswith("download it again.")


def test_a_shard_is_missing(good: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(good / name, tmp_path)
    shutil.copy(good / "model.safetensors", tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert raised(tmp_path, errors.WeightsMissing) == (
        f"{tmp_path} lacks model-2.safetensors, listed in model.safetensors.index.json: download what is missing."
    )


def test_everything_wrong_with_tensors_is_listed_at_once_in_groups(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        del tensors["backbone_model.layers.1.mlp.up_proj.weight"]
        del tensors["codec_model.upsample.conv.weight"]
        tensors["backbone_model.layers.2.mlp.up_proj.weight"] = torch.zeros(3)
        tensors["lora.A"] = torch.zeros(3)
        tensors["backbone_model.norm.weight"] = torch.ones(65)
        tensors["depth_decoder.codebooks_head.weight"] = torch.ones(3, 67, 40)
        tensors["codec_model.downsample.conv.weight"] = torch.ones(1)
        tensors["depth_decoder.model.norm.weight"] = torch.ones(40, dtype=torch.int8)
        tensors["embed_text_tokens.weight"] = torch.ones(420, 64).to(torch.float8_e4m3fn)

    change_weights(folder, spoil)
    with pytest.raises(errors.TensorsMismatch) as caught:
        Runtime.load(folder, device="cpu")
    error = caught.value
    assert error.missing == (
        "backbone_model.layers.1.mlp.up_proj.weight",
        "codec_model.upsample.conv.weight",
        "lm_head.weight",
    )
    assert error.unexpected == ("backbone_model.layers.2.mlp.up_proj.weight", "lora.A")
    assert error.wrong_shape == (
        "backbone_model.norm.weight: [65] in the file, [64] by config.json",
        "codec_model.downsample.conv.weight: [1] in the file, [32, 32, 4] by config.json",
        "depth_decoder.codebooks_head.weight: [3, 67, 40] in the file, [3, 40, 67] by config.json",
    )
    assert error.wrong_dtype == ("depth_decoder.model.norm.weight: I8", "embed_text_tokens.weight: F8_E4M3")
    assert str(error) == "\n".join(
        [
            f"The tensors in {folder} do not fit its config.json:",
            "  missing (3):",
            *[f"    {name}" for name in error.missing],
            "  unexpected (2):",
            *[f"    {name}" for name in error.unexpected],
            "  wrong shape (3):",
            *[f"    {name}" for name in error.wrong_shape],
            "  not a floating-point dtype that can be read (2):",
            *[f"    {name}" for name in error.wrong_dtype],
            "Check that config.json and the weights are from the same model.",
        ]
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_missing_embeddings(tmp_path: Path, tied: bool, seed: int) -> None:
    """Tied, one table is enough; untied, each is missed by its own name."""
    backbone = "backbone_model.embed_tokens.embed_audio_tokens.weight"
    depth = "depth_decoder.model.embed_tokens.weight"
    oracle.save(oracle.random_model(oracle.small_config(tied=tied), seed), tmp_path)
    change_weights(tmp_path, lambda tensors: [tensors.pop(name, None) for name in (backbone, depth)])
    with pytest.raises(errors.TensorsMismatch) as caught:
        Runtime.load(tmp_path, device="cpu")
    assert set(caught.value.missing) == ({depth} if tied else {backbone, depth})


def test_sesames_layout_with_wrong_tensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    own = {name: tensor.contiguous() for name, tensor in sesame.to_sesame(tensors, 16, 8).items()}
    del own["codebook0_head.weight"]
    own["audio_head"] = own["audio_head"].transpose(1, 2).contiguous()
    own["decoder.output.weight"] = torch.zeros(1)
    save_file(own, folder / "model.safetensors")
    with pytest.raises(errors.TensorsMismatch) as caught:
        Runtime.load(folder, device="cpu", local_files_only=True)
    assert caught.value.missing == ("codebook0_head.weight",)
    assert caught.value.unexpected == ("decoder.output.weight",)
    assert caught.value.wrong_shape == ("audio_head: [3, 67, 40] in the file, [3, 40, 67] by config.json",)


def test_a_codec_beside_sesames_layout_that_does_not_fit(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    own = {name: tensor.contiguous() for name, tensor in sesame.to_sesame(tensors, 16, 8).items()}
    save_file(own, folder / "model.safetensors")
    codec = folder / KYUTAI_CODEC[1]
    save_file({"encoder.model.0.conv.conv.weight": torch.zeros(1)}, codec)
    with pytest.raises(errors.TensorsMismatch) as caught:
        Runtime.load(folder, device="cpu")
    assert str(caught.value).startswith(f"The tensors in {codec} do not fit")
    assert caught.value.wrong_shape == ("encoder.model.0.conv.conv.weight: [1] in the file, [4, 1, 7] by config.json",)
    assert "quantizer.rvq_first.vq.layers.0._codebook.embedding_sum" in caught.value.missing
    codec.write_bytes(b"cut")
    with pytest.raises(errors.WeightsCorrupt, match="is truncated or not a safetensors file"):
        Runtime.load(folder, device="cpu")


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert raised(folder, errors.TokenizerInvalid) == (
        f"There is no tokenizer.json in {folder}. Copy it from the repository that the model came from."
    )


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"type": "Unheard"}}', "\0"])
def test_a_corrupt_tokenizer(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    sentence = raised(folder, errors.TokenizerInvalid)
    assert sentence.startswith(f"{folder / 'tokenizer.json'} cannot be read as a tokenizer: ")
    assert sentence.endswith("Download it again.")


@pytest.mark.parametrize("lacking", [oracle.BEGIN, oracle.END])
def test_a_tokenizer_without_the_prompts_tokens(folder: Path, lacking: str) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.add_special_tokens([token for token in (oracle.BEGIN, oracle.END) if token != lacking])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert raised(folder, errors.TokenizerInvalid) == (
        f"{folder / 'tokenizer.json'} has no token {lacking}, which a prompt of this model needs. "
        "Use the tokenizer.json that belongs to the model."
    )


def test_a_tokenizer_of_a_larger_model(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    room = oracle.TEXT_VOCABULARY - size
    tokenizer.add_tokens([f"<{index}>" for index in range(room)])
    tokenizer.save(str(folder / "tokenizer.json"))
    Runtime.load(folder, device="cpu")  # exactly as many as there are embeddings
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert raised(folder, errors.TokenizerInvalid) == (
        f"{folder / 'tokenizer.json'} has tokens up to {oracle.TEXT_VOCABULARY}, but the model has embeddings for "
        f"{oracle.TEXT_VOCABULARY}. Use the tokenizer.json that belongs to the model."
    )


# --- memory -----------------------------------------------------------------------------------------------------------


def test_no_memory_to_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is allocated, with how much is needed, how much there is, and what helps."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 300_000)
    allocated = []
    monkeypatch.setattr("aloud.checkpoint.csm.load_weights", lambda *args, **kwargs: allocated.append(1))
    sentences = []
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(errors.OutOfMemory) as caught:
            Runtime.load(folder, device="cpu", dtype=dtype)
        sentences.append(str(caught.value))
    assert not allocated
    for sentence, cure in zip(sentences, ('dtype="bfloat16", which takes half', "choose another device"), strict=True):
        assert sentence.startswith("The weights take 0.00 GB on cpu, where 0.00 GB are free. ")
        assert cure in sentence


def test_memory_that_is_needed_is_what_the_weights_take(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime.load(folder, device="cpu", dtype="bfloat16")
    needed = weight_bytes(runtime.config, torch.bfloat16)
    held = sum(t.nbytes for part in (runtime._model.weights, runtime._model.codec) for t in memory.tensors_of(part))
    assert needed == pytest.approx(held, rel=0.02)  # the codec's norms and usage counts
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
    Runtime.load(folder, device="cpu", dtype="bfloat16")
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    with pytest.raises(errors.OutOfMemory):
        Runtime.load(folder, device="cpu", dtype="bfloat16")
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)  # a system that does not say
    Runtime.load(folder, device="cpu", dtype="bfloat16")


def test_no_memory_while_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"
        )

    monkeypatch.setattr("aloud.checkpoint.csm.load_weights", fail)
    with pytest.raises(
        errors.OutOfMemory, match=r"The weights take more memory than cpu has; .* GB are free"
    ) as caught:
        Runtime.load(folder, device="cpu")
    assert isinstance(caught.value.__cause__, RuntimeError)


def allocate_too_much() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def python_too_much() -> None:
    bytearray(2**62)


def raise_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize("failing", [allocate_too_much, python_too_much, raise_cuda])
def test_every_failed_allocation_is_out_of_memory(failing: Callable[[], None]) -> None:
    with pytest.raises(errors.OutOfMemory) as caught, memory.out_of_memory("The prompt takes", CPU, "Shorten it."):
        failing()
    assert str(caught.value).startswith("The prompt takes more memory than cpu has; ")
    assert str(caught.value).endswith(" GB are free. Shorten it.")
    assert isinstance(caught.value.__cause__, (MemoryError, RuntimeError))


@pytest.mark.parametrize(
    "other",
    [RuntimeError("The size of tensor a (3) must match"), ValueError("memory"), errors.TextEmpty("x"), KeyError("k")],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_stay_what_they_are(other: Exception) -> None:
    with pytest.raises(type(other)) as caught, memory.out_of_memory("This takes", CPU, ""):
        raise other
    assert caught.value is other


def test_required_memory() -> None:
    memory.require("This takes", 1, CPU, "")
    free = memory.free_bytes(CPU)
    assert free is not None
    assert free > 2**20
    sentence = r"^This takes 2000000\.00 GB on cpu, where .* GB are free\. Shorten it\.$"
    with pytest.raises(errors.OutOfMemory, match=sentence):
        memory.require("This takes", 2 * 10**15, CPU, "Shorten it.")
