"""What every tensor of a Mimi checkpoint is called, in transformers' layout and in Kyutai's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from aloud.codec.config import MimiConfig
from aloud.codec.seanet import ResidualBlock, Seanet, Stage

Layout = Literal["transformers", "kyutai"]


@dataclass(frozen=True)
class LayerNames:
    """Names of one transformer layer; `query_key_value` has one packed name or three."""

    attention_norm: str
    query_key_value: tuple[str, ...]
    attention_output: str
    attention_scale: str
    mlp_norm: str
    fc1: str
    fc2: str
    mlp_scale: str


@dataclass(frozen=True)
class HalfNames:
    """Names of one half of the quantizer; those of a codebook have its index for `{}`."""

    input_projection: str
    output_projection: str
    entry_sums: str
    usage: str
    initialized: str


def _seanet_names(config: MimiConfig, steps: str, convolution: str, transposed: str | None) -> Seanet[str]:
    """Names, without `.weight` and `.bias`, of one side's convolutions; the encoder has no transposed ones.

    Both layouts number the steps of the network in a row, ELUs included.
    """
    index = 1
    stages = []
    for _ in config.upsampling_ratios:
        if transposed is not None:
            resample = f"{steps}.{index + 1}.{transposed}"
            index += 2
        blocks = []
        for _ in range(config.num_residual_layers):
            block = f"{steps}.{index}"
            shortcut = f"{block}.shortcut.{convolution}" if config.use_conv_shortcut else None
            blocks.append(ResidualBlock(f"{block}.block.1.{convolution}", f"{block}.block.3.{convolution}", shortcut))
            index += 1
        if transposed is None:
            resample = f"{steps}.{index + 1}.{convolution}"
            index += 2
        stages.append(Stage(resample, tuple(blocks)))
    return Seanet(f"{steps}.0.{convolution}", tuple(stages), f"{steps}.{index + 1}.{convolution}")


@dataclass(frozen=True)
class Names:
    """Names of all tensors of a codec in one layout."""

    encoder: Seanet[str]
    encoder_transformer: tuple[LayerNames, ...]
    downsample: str
    semantic: HalfNames
    acoustic: HalfNames
    upsample: str
    decoder_transformer: tuple[LayerNames, ...]
    decoder: Seanet[str]
    projected: bool
    interleaved: bool
    """Whether RoPE turns neighbours (2i, 2i + 1) instead of (i, i + head_dim / 2)."""


def _transformers_layer(prefix: str) -> LayerNames:
    return LayerNames(
        attention_norm=f"{prefix}.input_layernorm",
        query_key_value=tuple(f"{prefix}.self_attn.{part}_proj.weight" for part in "qkv"),
        attention_output=f"{prefix}.self_attn.o_proj.weight",
        attention_scale=f"{prefix}.self_attn_layer_scale.scale",
        mlp_norm=f"{prefix}.post_attention_layernorm",
        fc1=f"{prefix}.mlp.fc1.weight",
        fc2=f"{prefix}.mlp.fc2.weight",
        mlp_scale=f"{prefix}.mlp_layer_scale.scale",
    )


def _transformers_names(config: MimiConfig, prefix: str) -> Names:
    def layers(side: str) -> tuple[LayerNames, ...]:
        return tuple(_transformers_layer(f"{prefix}{side}.layers.{i}") for i in range(config.num_hidden_layers))

    def half(name: str) -> HalfNames:
        half = f"{prefix}quantizer.{name}_residual_vector_quantizer"
        return HalfNames(
            input_projection=f"{half}.input_proj.weight",
            output_projection=f"{half}.output_proj.weight",
            entry_sums=f"{half}.layers.{{}}.codebook.embed_sum",
            usage=f"{half}.layers.{{}}.codebook.cluster_usage",
            initialized=f"{half}.layers.{{}}.codebook.initialized",
        )

    return Names(
        encoder=_seanet_names(config, f"{prefix}encoder.layers", "conv", None),
        encoder_transformer=layers("encoder_transformer"),
        downsample=f"{prefix}downsample.conv",
        semantic=half("semantic"),
        acoustic=half("acoustic"),
        upsample=f"{prefix}upsample.conv",
        decoder_transformer=layers("decoder_transformer"),
        decoder=_seanet_names(config, f"{prefix}decoder.layers", "conv", "conv"),
        projected=config.codebook_dim != config.hidden_size,
        interleaved=False,
    )


def _kyutai_layer(prefix: str, present: Collection[str]) -> LayerNames:
    # The published file has the first of each pair; the moshi package saves the second, and loads both.
    packed, packed_in_list = f"{prefix}.self_attn.in_proj_weight", f"{prefix}.self_attn.in_projs.0.weight"
    output, output_in_list = f"{prefix}.self_attn.out_proj.weight", f"{prefix}.self_attn.out_projs.0.weight"
    return LayerNames(
        attention_norm=f"{prefix}.norm1",
        query_key_value=(packed_in_list if packed_in_list in present else packed,),
        attention_output=output_in_list if output_in_list in present else output,
        attention_scale=f"{prefix}.layer_scale_1.scale",
        mlp_norm=f"{prefix}.norm2",
        fc1=f"{prefix}.linear1.weight",
        fc2=f"{prefix}.linear2.weight",
        mlp_scale=f"{prefix}.layer_scale_2.scale",
    )


def _kyutai_names(config: MimiConfig, prefix: str, present: Collection[str]) -> Names:
    def layers(side: str) -> tuple[LayerNames, ...]:
        return tuple(
            _kyutai_layer(f"{prefix}{side}.transformer.layers.{i}", present) for i in range(config.num_hidden_layers)
        )

    def half(name: str) -> HalfNames:
        half = f"{prefix}quantizer.rvq_{name}"
        return HalfNames(
            input_projection=f"{half}.input_proj.weight",
            output_projection=f"{half}.output_proj.weight",
            entry_sums=f"{half}.vq.layers.{{}}._codebook.embedding_sum",
            usage=f"{half}.vq.layers.{{}}._codebook.cluster_usage",
            initialized=f"{half}.vq.layers.{{}}._codebook._initialized",
        )

    return Names(
        encoder=_seanet_names(config, f"{prefix}encoder.model", "conv.conv", None),
        encoder_transformer=layers("encoder_transformer"),
        downsample=f"{prefix}downsample.conv.conv.conv",
        semantic=half("first"),
        acoustic=half("rest"),
        upsample=f"{prefix}upsample.convtr.convtr.convtr",
        decoder_transformer=layers("decoder_transformer"),
        decoder=_seanet_names(config, f"{prefix}decoder.model", "conv.conv", "convtr.convtr"),
        projected=True,
        interleaved=True,
    )


def tensor_names(config: MimiConfig, layout: Layout, prefix: str, present: Collection[str]) -> Names:
    """Name all tensors of a codec; `present`, the names a file has, decides where a layout knows two."""
    if layout == "transformers":
        return _transformers_names(config, prefix)
    return _kyutai_names(config, prefix, present)
