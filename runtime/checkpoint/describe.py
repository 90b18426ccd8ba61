"""A checkpoint in words: its sizes, layout, parameter counts and the memory it needs, without reading a weight."""

from __future__ import annotations

import torch

from aloud.checkpoint.load import Summary, tensors_of, weight_bytes
from aloud.models.csm import allocate, allocate_weights
from aloud.models.transformer import TransformerConfig


def describe(summary: Summary) -> list[str]:
    """The lines that `aloud inspect` prints."""
    source, config, sampling = summary.checkpoint.source, summary.checkpoint.config, summary.checkpoint.sampling
    codec = config.codec
    lines = [
        f"model           {source.name} (csm)",
        f"files           {source.folder}",
        f"layout          {summary.layout}",
        f"backbone        {_stack(config.backbone)}",
        f"depth decoder   {_stack(config.depth)}",
        f"codebooks       {config.codebooks} of {config.audio_vocabulary} tokens, {config.drawable} of them drawable",
        f"text            {config.text_vocabulary} tokens",
        f"codec           Mimi, {codec.sample_rate} Hz, {codec.frame_rate:g} frames/s of {codec.frame_size} samples, "
        f"{codec.num_codebooks} codebooks of {codec.codebook_size}",
        f"context         {config.backbone.positions} positions, "
        f"{config.backbone.positions / codec.frame_rate:.0f} s of audio",
        f"sampling        temperature {sampling.temperature:g}, top-k {sampling.top_k}; depth decoder: "
        f"temperature {sampling.depth_temperature:g}, top-k {sampling.depth_top_k}",
        "parameters",
    ]
    lines += [f"  {part:<14}{count:>15,}" for part, count in summary.parameters.items()]
    lines += [
        f"  {'total':<14}{sum(summary.parameters.values()):>15,}",
        "memory          weights     a stream, full context",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        weights = allocate_weights(config, device=torch.device("meta"), dtype=dtype)
        stream = allocate(config, weights, slots=1, positions=config.backbone.positions)
        stream_bytes = sum(tensor.nbytes for tensor in tensors_of(stream))
        name = str(dtype).removeprefix("torch.")
        lines.append(f"  {name:<14}{_size(weight_bytes(config, dtype))}  {_size(stream_bytes)}")
    return lines


def _stack(stack: TransformerConfig) -> str:
    scaling = "llama3-scaled RoPE" if stack.rope.scaling else "RoPE"
    return (
        f"{stack.layers} layers of {stack.hidden_size}, feed-forward {stack.intermediate_size}, {stack.heads} query "
        f"and {stack.kv_heads} key/value heads of {stack.head_dim}, {scaling} theta {stack.rope.theta:g}"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:8.3f} GB" if count >= 1e8 else f"{count / 1e6:8.3f} MB"
