"""Mimi's checkpoints: config.json to `MimiConfig`, and tensors in transformers' or Kyutai's layout to `MimiWeights`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from aloud.checkpoint.mimi_names import HalfNames, LayerNames, Layout, Names, tensor_names
from aloud.codec.config import MimiConfig
from aloud.codec.convolution import Convolution, ConvolutionWeights
from aloud.codec.mimi import MimiWeights, downsample_sizes, upsample_sizes
from aloud.codec.quantizer import USAGE_FLOOR, QuantizerWeights
from aloud.codec.seanet import decoder_sizes, encoder_sizes
from aloud.codec.transformer import LayerWeights
from aloud.errors import ConfigInvalid, WrongModelType

KYUTAI_MIMI = MimiConfig()
"""What Kyutai's published file holds, which has no config: `tokenizer-e351c8d8-checkpoint125.safetensors`."""


class Tensors(Protocol):
    """Where tensors are read from."""

    def names(self) -> Collection[str]:
        """Return the names of all tensors there."""

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU in the dtype of the file, possibly memory-mapped."""


# --- config.json ------------------------------------------------------------------------------------------------------

_RENAMED = {
    "sampling_rate": "sample_rate",
    "num_quantizers": "num_codebooks",
    "num_semantic_quantizers": "num_semantic_codebooks",
}
_SAME_NAME = (
    *("codebook_size", "codebook_dim", "hidden_size", "num_filters", "num_residual_layers", "kernel_size"),
    *("last_kernel_size", "residual_kernel_size", "dilation_growth_rate", "compress", "upsample_groups"),
    *("num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "sliding_window"),
)
_ONLY: dict[str, tuple[object, ...]] = {
    "audio_channels": (1,),
    "use_causal_conv": (True,),
    "pad_mode": ("constant",),
    "trim_right_ratio": (1, 1.0),
    "hidden_act": ("gelu",),
    "attention_bias": (False,),
}


def read_mimi_config(config: Mapping[str, Any]) -> MimiConfig:
    """Read transformers' configuration of a Mimi codec.

    Args:
        config: the content of `config.json` of a Mimi checkpoint, or `codec_config` of a model that includes one. Keys
            that do not change the computation are ignored; missing keys have transformers' defaults.

    Raises:
        WrongModelType: it is the configuration of another kind of model.
        ConfigInvalid: a value is not one that can be run here.
    """
    if config.get("model_type", "mimi") != "mimi":
        raise WrongModelType(
            f"The codec's config has model_type {config['model_type']!r}, only 'mimi' can be run here; "
            "use a checkpoint whose codec is Mimi."
        )
    for key, allowed in _ONLY.items():
        if key in config and config[key] not in allowed:
            raise _invalid(key, config[key], f"only {allowed[0]!r} is supported")
    for key in ("encoder_config", "decoder_config"):
        if key in config and config[key] is None:
            raise _invalid(key, None, "a codec without one of its sides is not supported")

    values: dict[str, Any] = {}
    for key in (*_RENAMED, *_SAME_NAME):
        if config.get(key) is not None:
            values[_RENAMED.get(key, key)] = _positive_integer(key, config[key])
    if config.get("upsampling_ratios"):
        ratios = config["upsampling_ratios"]
        if not isinstance(ratios, (list, tuple)):
            raise _invalid("upsampling_ratios", ratios, "it must be a list of integers")
        values["upsampling_ratios"] = tuple(_positive_integer("upsampling_ratios", ratio) for ratio in ratios)
    values["use_conv_shortcut"] = bool(config.get("use_conv_shortcut", False))
    values["norm_eps"] = _positive_number("norm_eps", config.get("norm_eps", MimiConfig.norm_eps))
    values["rope_theta"] = _rope_theta(config)
    result = MimiConfig(**values)

    head_dim = config.get("head_dim") or result.hidden_size // result.num_attention_heads
    values["head_dim"] = _positive_integer("head_dim", head_dim)
    values["downsample_ratio"] = _downsample_ratio(config, result)
    result = MimiConfig(**values)
    _check_sizes(config, result)
    return result


def _invalid(key: str, value: object, reason: str) -> ConfigInvalid:
    return ConfigInvalid(f"The codec's config has {key} = {value!r}: {reason}; use a checkpoint that fits.")


def _positive_integer(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _invalid(key, value, "it must be a positive integer")
    return value


def _positive_number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise _invalid(key, value, "it must be a positive number")
    return float(value)


def _rope_theta(config: Mapping[str, Any]) -> float:
    theta = config.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        parameters = config.get(key) or {}
        supported = isinstance(parameters, Mapping) and (
            parameters.get("rope_type", parameters.get("type", "default")) == "default"
        )
        if not supported:
            raise _invalid(key, parameters, "only the default RoPE is supported")
        theta = parameters.get("rope_theta", theta)
    return _positive_number("rope_theta", MimiConfig.rope_theta if theta is None else theta)


def _downsample_ratio(config: Mapping[str, Any], sizes: MimiConfig) -> int:
    """Transformer positions a frame, which configs tell by the frame rate if at all."""
    key = "frame_rate" if config.get("_frame_rate") is None else "_frame_rate"
    frame_rate = config.get(key)
    if frame_rate is None:
        return MimiConfig.downsample_ratio
    hop = math.prod(sizes.upsampling_ratios)
    ratio = sizes.sample_rate / hop / _positive_number(key, frame_rate)
    if round(ratio) < 2 or abs(ratio - round(ratio)) > 1e-3:
        raise _invalid(
            key, frame_rate, f"it must be a half, a third, ... of sampling_rate / {hop} = {sizes.sample_rate / hop}"
        )
    return round(ratio)


def _check_sizes(config: Mapping[str, Any], sizes: MimiConfig) -> None:
    hidden = config.get("vector_quantization_hidden_dimension", 256)
    if hidden != sizes.codebook_dim:
        raise _invalid(
            "vector_quantization_hidden_dimension", hidden, f"it must equal codebook_dim = {sizes.codebook_dim}"
        )
    if sizes.num_semantic_codebooks >= sizes.num_codebooks:
        raise _invalid(
            "num_semantic_quantizers",
            sizes.num_semantic_codebooks,
            f"it must be less than num_quantizers = {sizes.num_codebooks}",
        )
    if sizes.num_attention_heads % sizes.num_key_value_heads:
        raise _invalid(
            "num_key_value_heads",
            sizes.num_key_value_heads,
            f"it must divide num_attention_heads = {sizes.num_attention_heads}",
        )
    if sizes.head_dim % 2:
        raise _invalid("head_dim", sizes.head_dim, "it must be even")
    if sizes.hidden_size % sizes.upsample_groups:
        raise _invalid("upsample_groups", sizes.upsample_groups, f"it must divide hidden_size = {sizes.hidden_size}")
    if sizes.num_filters % sizes.compress:
        raise _invalid("compress", sizes.compress, f"it must divide num_filters = {sizes.num_filters}")


# --- what a file must hold --------------------------------------------------------------------------------------------


def expected_tensors(
    config: MimiConfig, layout: Layout, prefix: str = "", present: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this layout must hold, with its shape.

    Args:
        config: the codec's sizes.
        layout: `transformers`: as `MimiModel.save_pretrained` names them; `kyutai`: as in Kyutai's published file.
        prefix: what comes before every name, such as `codec_model.`.
        present: names that the file has; where Kyutai's layout has two names for a tensor, the one present is listed.

    Returns:
        Names to shapes.
    """
    names = tensor_names(config, layout, prefix, present)
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, sizes: Convolution) -> None:
        shapes[f"{name}.weight"] = sizes.weight_shape
        if sizes.bias:
            shapes[f"{name}.bias"] = (sizes.out_channels,)

    for name, sizes in zip(names.encoder.leaves(), encoder_sizes(config).leaves(), strict=True):
        convolution(name, sizes)
    for name, sizes in zip(names.decoder.leaves(), decoder_sizes(config).leaves(), strict=True):
        convolution(name, sizes)
    convolution(names.downsample, downsample_sizes(config))
    convolution(names.upsample, upsample_sizes(config))

    hidden, query, key_value = config.hidden_size, *_attention_widths(config)
    for layer in (*names.encoder_transformer, *names.decoder_transformer):
        for norm in (layer.attention_norm, layer.mlp_norm):
            shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (hidden,)
        widths = (query + 2 * key_value,) if len(layer.query_key_value) == 1 else (query, key_value, key_value)
        for name, width in zip(layer.query_key_value, widths, strict=True):
            shapes[name] = (width, hidden)
        shapes[layer.attention_output] = (hidden, query)
        shapes[layer.attention_scale] = shapes[layer.mlp_scale] = (hidden,)
        shapes[layer.fc1] = (config.intermediate_size, hidden)
        shapes[layer.fc2] = (hidden, config.intermediate_size)

    for half, codebooks in _halves(config, names):
        if names.projected:
            shapes[half.input_projection] = (config.codebook_dim, hidden, 1)
            shapes[half.output_projection] = (hidden, config.codebook_dim, 1)
        for index in range(codebooks):
            shapes[half.entry_sums.format(index)] = (config.codebook_size, config.codebook_dim)
            shapes[half.usage.format(index)] = (config.codebook_size,)
    return shapes


def optional_tensors(config: MimiConfig, layout: Layout, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Tensors that a checkpoint may hold and that are not read: the training's notes that a codebook was set up.

    Args and result are those of `expected_tensors`.
    """
    names = tensor_names(config, layout, prefix, ())
    return {
        half.initialized.format(index): (1,) for half, codebooks in _halves(config, names) for index in range(codebooks)
    }


def _attention_widths(config: MimiConfig) -> tuple[int, int]:
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim


def _halves(config: MimiConfig, names: Names) -> tuple[tuple[HalfNames, int], tuple[HalfNames, int]]:
    return (names.semantic, config.num_semantic_codebooks), (names.acoustic, config.num_acoustic_codebooks)


# --- loading ----------------------------------------------------------------------------------------------------------


def load_mimi(
    tensors: Tensors,
    config: MimiConfig,
    layout: Layout,
    prefix: str = "",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MimiWeights:
    """Read a codec's weights, each tensor straight to its final place.

    Args:
        tensors: where to read; it holds `expected_tensors(config, layout, prefix, tensors.names())`.
        config: the codec's sizes.
        layout: how the tensors are named and ordered.
        prefix: what comes before every name.
        device: where the weights are to be.
        dtype: of all weights but the quantizer's, which are float32.
    """
    names = tensor_names(config, layout, prefix, tensors.names())
    loader = _Loader(tensors, config, names, torch.device(device), dtype)
    return MimiWeights(
        encoder=names.encoder.map(loader.convolution),
        encoder_transformer=tuple(loader.layer(layer) for layer in names.encoder_transformer),
        downsample=loader.convolution(names.downsample, bias=False),
        semantic=loader.half(names.semantic, config.num_semantic_codebooks),
        acoustic=loader.half(names.acoustic, config.num_acoustic_codebooks),
        upsample=loader.convolution(names.upsample, bias=False),
        decoder_transformer=tuple(loader.layer(layer) for layer in names.decoder_transformer),
        decoder=names.decoder.map(loader.convolution),
    )


@dataclass(frozen=True)
class _Loader:
    """Reads one codec."""

    tensors: Tensors
    config: MimiConfig
    names: Names
    device: torch.device
    dtype: torch.dtype

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=dtype or self.dtype)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        source = self.tensors.read(name)
        return self.empty(*source.shape, dtype=dtype).copy_(source)

    def convolution(self, name: str, bias: bool = True) -> ConvolutionWeights:
        return ConvolutionWeights(self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias") if bias else None)

    def layer(self, names: LayerNames) -> LayerWeights:
        return LayerWeights(
            attention_norm_weight=self.tensor(f"{names.attention_norm}.weight"),
            attention_norm_bias=self.tensor(f"{names.attention_norm}.bias"),
            query_key_value=self.query_key_value(names.query_key_value),
            attention_output=self.tensor(names.attention_output),
            attention_scale=self.tensor(names.attention_scale),
            mlp_norm_weight=self.tensor(f"{names.mlp_norm}.weight"),
            mlp_norm_bias=self.tensor(f"{names.mlp_norm}.bias"),
            fc1=self.tensor(names.fc1),
            fc2=self.tensor(names.fc2),
            mlp_scale=self.tensor(names.mlp_scale),
        )

    def query_key_value(self, names: tuple[str, ...]) -> Tensor:
        """Pack query, key and value, with the rows of queries and keys in half-split RoPE order."""
        query, key_value = _attention_widths(self.config)
        packed = self.empty(query + 2 * key_value, self.config.hidden_size)
        targets = packed.split([query, key_value, key_value])
        sources = [self.tensors.read(name) for name in names]
        if len(sources) == 1:
            sources = list(sources[0].split([query, key_value, key_value]))
        for index, (target, source) in enumerate(zip(targets, sources, strict=True)):
            if self.names.interleaved and index < 2:
                pairs = (-1, self.config.head_dim // 2, 2, self.config.hidden_size)
                source = source.view(pairs).transpose(1, 2)
                target = target.view(source.shape)
            target.copy_(source)
        return packed

    def half(self, names: HalfNames, num_codebooks: int) -> QuantizerWeights:
        size, dim = self.config.codebook_size, self.config.codebook_dim
        codebooks = self.empty(num_codebooks, size, dim, dtype=torch.float32)
        half_norms = self.empty(num_codebooks, size, dtype=torch.float32)
        for index in range(num_codebooks):
            sums = self.tensors.read(names.entry_sums.format(index)).float()
            usage = self.tensors.read(names.usage.format(index)).float()
            entries = sums / usage.clamp(min=USAGE_FLOOR)[:, None]
            codebooks[index].copy_(entries)
            half_norms[index].copy_(entries.double().square().sum(dim=1) / 2)
        if not self.names.projected:
            return QuantizerWeights(codebooks, half_norms, None, None)
        input_projection = self.tensor(names.input_projection, torch.float32).squeeze(-1)
        output_projection = self.tensor(names.output_projection, torch.float32).squeeze(-1)
        return QuantizerWeights(codebooks, half_norms, input_projection, output_projection)
