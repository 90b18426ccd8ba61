"""transformers' own CSM as the oracle: small random checkpoints written by `save_pretrained`, prompts, greedy codes."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from transformers import CsmConfig, CsmForConditionalGeneration, PreTrainedTokenizerFast
from transformers.generation.utils import logger as generation_logger

generation_logger.setLevel(logging.ERROR)

BEGIN, END, AUDIO, AUDIO_END = "<|begin_of_text|>", "<|end_of_text|>", "<|AUDIO|>", "<|audio_eos|>"
CORPUS = [
    "Hello from Aloud. How are you today? I am fine, thank you.",
    "The quick brown fox jumps over the lazy dog, and 12 345 wolves follow.",
    "¿Qué tal? Das ist schön. 你好，世界。 [0][1][2]",
]
TEXT_VOCABULARY = 420

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 32.0,
    "low_freq_factor": 0.125,
    "high_freq_factor": 0.5,
    "original_max_position_embeddings": 64,
}
DEPTH_LLAMA3 = {**LLAMA3, "low_freq_factor": 0.25, "high_freq_factor": 1.0, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 500_000.0}


def write_tokenizer(folder: Path) -> None:
    """A small byte-level BPE tokenizer with CSM's special tokens, as the real one has them, to tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=TEXT_VOCABULARY - 4,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([BEGIN, END, AUDIO, AUDIO_END])
    assert tokenizer.get_vocab_size() <= TEXT_VOCABULARY
    tokenizer.save(str(folder / "tokenizer.json"))


def small_config(
    *,
    codebooks: int = 4,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    vocabulary: int = 67,
    codebook_size: int = 64,
    rope: dict[str, Any] = PLAIN,
    depth_rope: dict[str, Any] = PLAIN,
    depth_heads: int = 4,
    depth_kv_heads: int = 1,
    depth_head_dim: int = 8,
    depth_hidden_size: int = 40,
    positions: int = 256,
    tied: bool = True,
) -> CsmConfig:
    """A CSM small enough to run everywhere, with a codec to match."""
    return CsmConfig(
        num_codebooks=codebooks,
        vocab_size=vocabulary,
        text_vocab_size=TEXT_VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        codebook_pad_token_id=vocabulary - 1,
        pad_token_id=TEXT_VOCABULARY - 2,
        bos_token_id=TEXT_VOCABULARY - 4,
        audio_token_id=TEXT_VOCABULARY - 2,
        audio_eos_token_id=TEXT_VOCABULARY - 1,
        initializer_range=0.15,
        rope_parameters=dict(rope),
        tie_codebooks_embeddings=tied,
        depth_decoder_config={
            "num_codebooks": codebooks,
            "backbone_hidden_size": hidden_size,
            "vocab_size": vocabulary,
            "hidden_size": depth_hidden_size,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": depth_heads,
            "num_key_value_heads": depth_kv_heads,
            "head_dim": depth_head_dim,
            "max_position_embeddings": codebooks + 1,
            "rope_parameters": dict(depth_rope),
            "initializer_range": 0.15,
        },
        codec_config={
            "model_type": "mimi",
            "hidden_size": 32,
            "num_filters": 4,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "codebook_size": codebook_size,
            "codebook_dim": 16,
            "vector_quantization_hidden_dimension": 16,
            "num_quantizers": codebooks,
            "upsample_groups": 32,
            "sliding_window": 16,
        },
    )


def random_model(config: CsmConfig, seed: int, dtype: torch.dtype = torch.float32) -> CsmForConditionalGeneration:
    """Random weights, with codebooks that quantise to many entries (transformers leaves them zero)."""
    torch.manual_seed(seed)
    model = CsmForConditionalGeneration(config).eval()
    for name, buffer in model.codec_model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_(std=0.3)
    return model.to(dtype)


def save(model: CsmForConditionalGeneration, folder: Path, **generation: Any) -> Path:
    """Write a checkpoint as users have it: config, generation config, weights, tokenizer."""
    model.save_pretrained(folder)
    write_tokenizer(folder)
    path = folder / "generation_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | generation))
    return folder


@dataclass(frozen=True)
class Inputs:
    """What transformers' model takes for one conversation."""

    input_ids: torch.Tensor  # [1, positions]
    input_values: torch.Tensor | None  # [1, 1, samples]
    cutoffs: torch.Tensor | None  # [1, segments]


def inputs(
    folder: Path, config: CsmConfig, segments: Sequence[tuple[int, str, np.ndarray | None]], frame_size: int = 1920
) -> Inputs:
    """A conversation as the chat template of the real checkpoint writes it, tokenised by transformers."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    text = ""
    audios = []
    for speaker, words, audio in segments:
        text += f"{BEGIN}[{speaker}]{words}{END}"
        if audio is not None:
            text += AUDIO * -(-len(audio) // frame_size) + AUDIO_END
            audios.append(audio)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    # The small tokenizer's special tokens, where the config has them.
    for token, id_ in ((AUDIO, config.audio_token_id), (AUDIO_END, config.audio_eos_token_id)):
        ids[ids == tokenizer.convert_tokens_to_ids(token)] = id_
    if not audios:
        return Inputs(ids, None, None)
    values = torch.from_numpy(np.concatenate(audios))[None, None]
    return Inputs(ids, values, torch.tensor([[len(audio) for audio in audios]]).cumsum(-1))


def suppressed(config: CsmConfig) -> list[int]:
    """Tokens that the codec has no entry for."""
    return list(range(config.codec_config.codebook_size, config.vocab_size))


@dataclass(frozen=True)
class Greedy:
    """What transformers generated, without the end frame."""

    codes: np.ndarray  # int64 [frames, codebooks]
    # transformers stops when all codebooks but the last are the end token; the model has ended only if all are.
    stopped_by_its_own_rule: bool

    def first(self, frames: int) -> Greedy:
        """The same for at most `frames` frames."""
        return Greedy(self.codes[:frames], self.stopped_by_its_own_rule and len(self.codes) <= frames)

    def assert_same(self, codes: np.ndarray | None) -> None:
        """Ours are the same, and go on only where transformers' own rule stopped it."""
        assert codes is not None
        ours = codes[: len(self.codes)] if self.stopped_by_its_own_rule else codes
        np.testing.assert_array_equal(ours, self.codes)


@torch.no_grad()
def greedy_codes(model: CsmForConditionalGeneration, given: Inputs, frames: int) -> Greedy:
    """What transformers generates greedily in at most `frames` frames."""
    config = model.config
    tokens = suppressed(config)
    codes = model.generate(
        input_ids=given.input_ids,
        input_values=given.input_values,
        input_values_cutoffs=given.cutoffs,
        attention_mask=torch.ones_like(given.input_ids),
        max_new_tokens=frames,
        do_sample=False,
        suppress_tokens=tokens or None,
        depth_decoder_do_sample=False,
        depth_decoder_suppress_tokens=tokens or None,
    )[0]
    ends = (codes == config.codebook_eos_token_id).all(-1).nonzero()
    spoken = codes[: int(ends[0])] if len(ends) else codes
    last = spoken[-1] if len(spoken) else codes[0]
    by_rule = not len(ends) and bool((last[:-1] == config.codebook_eos_token_id).all())
    return Greedy(spoken.numpy(), by_rule)


def speech_like(seconds: float, seed: int, rate: int = 24_000) -> np.ndarray:
    """A voiced-sounding signal: a wandering pulse train through moving resonances, with noise -> float32 [samples]."""
    random = np.random.default_rng(seed)
    count = int(seconds * rate)
    time = np.arange(count) / rate
    pitch = 120 + 40 * np.sin(2 * np.pi * 1.3 * time + random.uniform(0, 6))
    phase = np.cumsum(2 * np.pi * pitch / rate)
    voiced = sum(
        np.sin(k * phase) / k * np.exp(-(((k * pitch - 700 - 300 * np.sin(9 * time)) / 500) ** 2)) for k in range(1, 25)
    )
    envelope = 0.5 + 0.5 * np.sin(2 * np.pi * 3 * time + random.uniform(0, 6))
    return (0.4 * envelope * voiced + 0.01 * random.standard_normal(count)).astype(np.float32)
