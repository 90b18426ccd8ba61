"""Mimi by others: small random transformers and moshi codecs with the same weights, and audio that resembles speech.

Default initialisation would hide errors: a LayerScale of 0.01 silences the transformers, and empty codebooks quantise
everything to entry 0. Here every part of the codec matters, and every codebook is fitted to what it has to quantise.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import scipy.signal
import torch
import transformers
from torch import Tensor

from aloud.checkpoint.mimi import load_mimi, read_mimi_config
from aloud.codec.mimi import MimiConfig, MimiWeights

SMALL = {
    "hidden_size": 32,
    "num_filters": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "codebook_size": 64,
    "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16,
    "num_quantizers": 4,
    "upsample_groups": 32,
    "sliding_window": 10,
    "upsampling_ratios": [5, 4, 3, 2],
}
"""A codec with frames of 240 samples, and a window of 5 frames."""

VARIANTS: dict[str, dict[str, Any]] = {
    "small": {},
    "grouped_heads": {"num_key_value_heads": 2},
    "wide_heads": {"head_dim": 10},
    "no_projections": {"codebook_dim": 32, "vector_quantization_hidden_dimension": 32},
    "two_semantic": {"num_semantic_quantizers": 2, "num_quantizers": 5},
    "residual_layers": {"num_residual_layers": 3, "compress": 4, "dilation_growth_rate": 3},
    "shortcuts": {"use_conv_shortcut": True},
    "kernels": {"kernel_size": 5, "last_kernel_size": 4, "residual_kernel_size": 2},
    "groups": {"upsample_groups": 4, "norm_eps": 1e-2, "rope_parameters": {"rope_type": "default", "rope_theta": 3e2}},
    "four_positions_a_frame": {"frame_rate": 50.0, "sliding_window": 7},
    "three_stages": {"upsampling_ratios": [3, 2, 4], "sampling_rate": 16_000},
}
"""Codecs that differ from `SMALL` in every size that a configuration can vary."""

MOSHI_VARIANTS = ("small", "grouped_heads", "two_semantic", "residual_layers", "shortcuts", "kernels", "three_stages")
"""Those that the moshi package can express."""


class DictTensors:
    """Tensors in memory, read as from a file."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def names(self) -> set[str]:
        return set(self.tensors)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass
class Codec:
    """A transformers codec, and its state dict and config as `save_pretrained` writes them."""

    model: transformers.MimiModel
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @property
    def frame_size(self) -> int:
        """Samples a frame; transformers' own `frame_size` takes two positions a frame for granted."""
        return round(self.model.config.sampling_rate / self.model.config.frame_rate)

    @cached_property
    def ours(self) -> tuple[MimiConfig, MimiWeights]:
        """The same codec, read by the code under test."""
        config = read_mimi_config(self.config)
        return config, load_mimi(DictTensors(self.tensors), config, "transformers")

    @cached_property
    def moshi(self) -> Any:
        """The same codec in the moshi package."""
        return moshi_codec(self)

    @torch.no_grad()
    def encode(self, samples: Tensor, num_codebooks: int | None = None) -> Tensor:
        """`[samples]` to codes `[codebooks, frames]`."""
        return self.model.encode(samples[None, None], num_quantizers=num_codebooks).audio_codes[0]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[codebooks, frames]` to `[samples]`."""
        return self.model.decode(codes[None]).audio_values[0, 0]


def speech_like(num_samples: int, generator: torch.Generator, sample_rate: int = 24_000) -> Tensor:
    """Synthesise `[num_samples]` float32: a pulse train and noise through moving formants, in syllables."""
    random = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    block = sample_rate // 100
    blocks = num_samples // block + 1
    time = np.arange(blocks * block) / sample_rate

    pitch = 120 * 2 ** (0.5 * np.sin(2 * np.pi * random.uniform(0.5, 2) * time + random.uniform(0, 6)))
    phase = np.cumsum(pitch) / sample_rate + random.uniform()
    pulses = np.diff(np.floor(phase), prepend=0.0)
    voiced = np.repeat(random.random(blocks // 15 + 1) < 0.7, 15 * block)[: len(time)]
    signal = np.where(voiced, pulses, 0.1 * random.standard_normal(len(time)))

    targets = random.uniform([250, 800, 2200], [800, 2200, 3500], size=(blocks // 10 + 2, 3))
    formants = np.stack([np.interp(np.arange(blocks) / 10, np.arange(len(targets)), row) for row in targets.T], axis=1)
    for index in range(3):
        carried = np.zeros(2)
        for start in range(blocks):
            radius = np.exp(-np.pi * 80 * (index + 1) / sample_rate)
            angle = 2 * np.pi * formants[start, index] / sample_rate
            poles = [1, -2 * radius * np.cos(angle), radius**2]
            part = slice(start * block, (start + 1) * block)
            signal[part], carried = scipy.signal.lfilter([1 - radius], poles, signal[part], zi=carried)
    signal *= 0.3 + 0.7 * np.sin(np.pi * 4 * time + random.uniform(0, 6)) ** 2
    signal += 0.002 * random.standard_normal(len(signal))
    return torch.from_numpy(0.5 * signal / np.abs(signal).max()).float()[:num_samples]


def random_codec(generator: torch.Generator, *, fit_frames: int = 400, **overrides: Any) -> Codec:
    """Build a random transformers codec, `SMALL` but for `overrides`, in float32.

    `fit_frames` is the length of the audio that the codebooks are fitted to; 0 leaves them random.
    """
    settings = {**SMALL, **overrides}
    config = transformers.MimiConfig(**settings, attn_implementation="eager")
    model = transformers.MimiModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("scale.scale"):
                parameter.copy_(0.3 + 0.1 * noise)
            elif "layernorm" in name:
                parameter.copy_(0.1 * noise + (1 if name.endswith("weight") else 0))
            elif name.endswith("bias"):
                parameter.copy_(0.05 * noise)
            elif parameter.dim() == 2:
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
            elif "upsample" in name:
                parameter.copy_(0.7 * noise)
            elif "shortcut" in name or ".block." in name:
                parameter.copy_(noise / (parameter.shape[1] * parameter.shape[2]) ** 0.5)
            else:  # about as much out as in, on either side of a stride
                fan_in = parameter.shape[0] * 2 if ".decoder" in name else parameter.shape[1] * parameter.shape[2]
                parameter.copy_(1.2 * noise / fan_in**0.5)
        _fit_codebooks(model, generator, fit_frames)
    tensors = {saved_name(name): tensor for name, tensor in model.state_dict().items()}
    return Codec(model, tensors, config.to_dict())


@cache
def named_codec(name: str, seed: int) -> Codec:
    """One of `VARIANTS`, built once a run."""
    generator = torch.Generator().manual_seed(seed)
    return random_codec(generator, **VARIANTS[name])


@cache
def full_size_codec(seed: int) -> Codec:
    """Kyutai's published sizes, with random weights, built once a run."""
    generator = torch.Generator().manual_seed(seed)
    return random_codec(generator, fit_frames=20, **transformers.MimiConfig().to_dict())


def _fit_codebooks(model: transformers.MimiModel, generator: torch.Generator, frames: int) -> None:
    """Make each codebook of what the one before it left over, so that all of them have something to choose.

    Together they leave about a sixteenth: enough at every level for float32 to tell the entries apart.
    """
    config = model.config
    latents = torch.randn(1, config.hidden_size, 64, generator=generator)
    if frames:
        audio = speech_like(round(frames * config.sampling_rate / config.frame_rate), generator)
        latents = model.encoder(audio[None, None]).latents
    quantizer = model.quantizer
    for half in (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer):
        projected = latents if half.input_proj is None else half.input_proj(latents)
        residual = projected[0].T
        taken = 1 - 0.5 ** (4 / config.num_quantizers)
        for layer in half.layers:
            chosen = torch.randint(len(residual), (config.codebook_size,), generator=generator)
            noise = torch.randn(config.codebook_size, residual.shape[1], generator=generator)
            mean = residual.mean(dim=0)
            entries = mean + taken * (residual[chosen] - mean + 0.5 * residual.std(dim=0) * noise)
            usage = 0.1 + 50 * torch.rand(config.codebook_size, generator=generator)
            usage[0] = 0.0  # an entry that was never used is divided by a floor
            layer.codebook.cluster_usage.copy_(usage)
            layer.codebook.embed_sum.copy_(entries * usage.clamp(min=1e-5)[:, None])
            layer.codebook._embed = None
            residual = residual - layer.codebook.decode(layer.codebook.encode(residual))


def saved_name(name: str) -> str:
    """Name, in a saved checkpoint, of a tensor of transformers' `MimiModel.state_dict()`."""
    name = re.sub(r"^(en|de)coder\.(en|de)coder_seanet\.", r"\1coder.", name)
    return re.sub(r"^(en|de)coder\.((en|de)coder_transformer|downsample|upsample)\.", r"\2.", name)


def to_kyutai(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, as_moshi_saves: bool = False
) -> dict[str, Tensor]:
    """Rename and reorder a saved transformers checkpoint into Kyutai's layout.

    `as_moshi_saves`: with the names that the moshi package's `state_dict()` has, instead of the published file's.
    """
    head_dim = config["head_dim"]
    in_proj, out_proj = (
        ("in_projs.0.weight", "out_projs.0.weight") if as_moshi_saves else ("in_proj_weight", "out_proj.weight")
    )
    renames = (
        (r"^decoder\.layers\.(\d+)\.conv\.", r"decoder.model.\1.conv.conv."),
        (r"^encoder\.layers\.(\d+)\.conv\.", r"encoder.model.\1.conv.conv."),
        (r"^(en|de)coder\.layers\.(\d+)\.(block\.\d|shortcut)\.conv\.", r"\1coder.model.\2.\3.conv.conv."),
        (r"^downsample\.conv\.", "downsample.conv.conv.conv."),
        (r"^upsample\.conv\.", "upsample.convtr.convtr.convtr."),
        (r"_transformer\.layers\.", "_transformer.transformer.layers."),
        (r"\.input_layernorm\.", ".norm1."),
        (r"\.post_attention_layernorm\.", ".norm2."),
        (r"\.mlp\.fc(\d)\.", r".linear\1."),
        (r"\.self_attn_layer_scale\.", ".layer_scale_1."),
        (r"\.mlp_layer_scale\.", ".layer_scale_2."),
        (r"\.self_attn\.o_proj\.weight", f".self_attn.{out_proj}"),
        (r"\.semantic_residual_vector_quantizer\.layers", ".rvq_first.vq.layers"),
        (r"\.acoustic_residual_vector_quantizer\.layers", ".rvq_rest.vq.layers"),
        (r"\.semantic_residual_vector_quantizer\.", ".rvq_first."),
        (r"\.acoustic_residual_vector_quantizer\.", ".rvq_rest."),
        (r"\.codebook\.embed_sum", "._codebook.embedding_sum"),
        (r"\.codebook\.cluster_usage", "._codebook.cluster_usage"),
        (r"\.codebook\.initialized", "._codebook._initialized"),
    )
    strided = {f"decoder.layers.{name.split('.')[2]}." for name, shape in _transposed(tensors, config) if shape}
    result = {}
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            parts[:2] = [_interleave(part, head_dim) for part in parts[:2]]
            tensor, name = torch.cat(parts), name.replace("q_proj.weight", in_proj)
        kyutai = name
        for pattern, replacement in renames:
            kyutai = re.sub(pattern, replacement, kyutai)
        if any(name.startswith(prefix) for prefix in strided):
            kyutai = kyutai.replace(".conv.conv.", ".convtr.convtr.")
        result[kyutai] = tensor
    return result


def _transposed(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Which of the decoder's plain convolutions are transposed: all between the first and the last."""
    plain = [name for name in tensors if re.match(r"decoder\.layers\.\d+\.conv\.weight", name)]
    last = max(int(name.split(".")[2]) for name in plain)
    return [(name, 0 < int(name.split(".")[2]) < last) for name in plain]


def _interleave(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder rows `[heads * head_dim, hidden]` from half-split RoPE order to neighbours."""
    halves = rows.view(-1, 2, head_dim // 2, rows.shape[1])
    return torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(rows.shape)


def moshi_codec(codec: Codec) -> Any:
    """Build the moshi package's codec with the weights of a transformers one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from moshi.models.loaders import get_mimi

    config = codec.config
    seanet = {
        "channels": 1,
        "dimension": config["hidden_size"],
        "causal": True,
        "n_filters": config["num_filters"],
        "n_residual_layers": config["num_residual_layers"],
        "activation": "ELU",
        "compress": config["compress"],
        "dilation_base": config["dilation_growth_rate"],
        "disable_norm_outer_blocks": 0,
        "kernel_size": config["kernel_size"],
        "residual_kernel_size": config["residual_kernel_size"],
        "last_kernel_size": config["last_kernel_size"],
        "norm": "none",
        "pad_mode": "constant",
        "ratios": config["upsampling_ratios"],
        "true_skip": not config["use_conv_shortcut"],
    }
    transformer = {
        "d_model": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "kv_repeat": config["num_attention_heads"] // config["num_key_value_heads"],
        "num_layers": config["num_hidden_layers"],
        "causal": True,
        "layer_scale": 0.01,
        "context": config["sliding_window"],
        "conv_layout": True,
        "max_period": config["rope_parameters"]["rope_theta"],
        "gating": "none",
        "norm": "layer_norm",
        "positional_embedding": "rope",
        "dim_feedforward": config["intermediate_size"],
        "input_dimension": config["hidden_size"],
        "output_dimensions": [config["hidden_size"]],
    }
    quantizer = {
        "dimension": config["codebook_dim"],
        "n_q": config["num_quantizers"],
        "n_q_semantic": config["num_semantic_quantizers"],
        "bins": config["codebook_size"],
        "input_dimension": config["hidden_size"],
        "output_dimension": config["hidden_size"],
    }
    settings = {
        "sample_rate": config["sampling_rate"],
        "channels": 1,
        "frame_rate": config["sampling_rate"] / codec.frame_size,
        "seanet": seanet,
        "quantizer": quantizer,
        "transformer": transformer,
    }
    with torch.device("meta"):  # saves drawing random weights that are not used
        model = get_mimi(None, settings, device="meta", num_codebooks=config["num_quantizers"])
    model.load_state_dict(to_kyutai(codec.tensors, config), assign=True)
    return model


def assert_same_codes(ours: Tensor, theirs: Tensor, model: transformers.MimiModel, samples: Tensor) -> None:
    """Assert that codes `[codebooks, frames]` are equal but for near ties.

    Where two codes differ, the two entries' distances to what is left over, recomputed here in float64 from
    transformers' latents, must differ by less than 1e-4 relative: then float32 cannot tell them apart. Such a flip
    changes what the codebooks after it get to see, so the rest of that half's frame is not compared; fewer than 0.1 %
    of all codes, or one, may be a flip.
    """
    assert ours.shape == theirs.shape
    if torch.equal(ours, theirs):
        return
    with torch.no_grad():
        latents = model.encoder(samples[None, None]).latents
    quantizer = model.quantizer
    num_semantic = model.config.num_semantic_quantizers
    flips = 0
    halves = (
        (quantizer.semantic_residual_vector_quantizer, ours[:num_semantic], theirs[:num_semantic]),
        (quantizer.acoustic_residual_vector_quantizer, ours[num_semantic:], theirs[num_semantic:]),
    )
    for half, our_codes, their_codes in halves:
        with torch.no_grad():
            projected = (latents if half.input_proj is None else half.input_proj(latents))[0].T.double()
        for frame in range(our_codes.shape[1]):
            residual = projected[frame]
            for layer, our, their in zip(half.layers, our_codes[:, frame], their_codes[:, frame], strict=False):
                entries = layer.codebook.embed.double()
                if our != their:
                    distances = [float((residual - entries[code]).norm()) for code in (our, their)]
                    gap = abs(distances[0] - distances[1]) / max(distances)
                    assert gap < 1e-4, f"frame {frame}: codes {int(our)} and {int(their)}, distances {distances}"
                    flips += 1
                    break
                residual = residual - entries[our]
    assert flips <= max(1, 0.001 * ours.numel()), f"{flips} near ties among {ours.numel()} codes"
