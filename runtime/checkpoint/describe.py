"""A checkpoint in words: its sizes, layout, parameter counts and the memory it needs, without reading a weight."""

from __future__ import annotations

import torch

from aloud import memory
from aloud.checkpoint.load import Summary, weight_bytes
from aloud.models.csm import CsmConfig, state_bytes
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
        positions = config.backbone.positions
        stream_bytes = state_bytes(config, 2, positions, dtype=dtype) - state_bytes(config, 1, positions, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        lines.append(f"  {name:<14}{_size(weight_bytes(config, dtype))}  {_size(stream_bytes)}")
    lines.append("streams that fit beside the weights, full context")
    lines += [_fitting(config, device) for device in devices()]
    return lines


def devices() -> list[torch.device]:
    """What this machine could run on."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def _fitting(config: CsmConfig, device: torch.device) -> str:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    positions = config.backbone.positions
    name, free = str(dtype).removeprefix("torch."), memory.free_bytes(device)
    if free is None:
        return f"  {device!s:<14}unknown: the system does not say how much memory is free"
    # The first slot is the scratch slot.
    one, two = (state_bytes(config, slots, positions, dtype=dtype) for slots in (1, 2))
    count = max(0, (free - weight_bytes(config, dtype) - one) // (two - one))
    return f"  {device!s:<14}{count:,} in {name}, of {free / 1e9:.1f} GB free now"


def _stack(stack: TransformerConfig) -> str:
    scaling = "llama3-scaled RoPE" if stack.rope.scaling else "RoPE"
    return (
        f"{stack.layers} layers of {stack.hidden_size}, feed-forward {stack.intermediate_size}, {stack.heads} query "
        f"and {stack.kv_heads} key/value heads of {stack.head_dim}, {scaling} theta {stack.rope.theta:g}"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:8.3f} GB" if count >= 1e8 else f"{count / 1e6:8.3f} MB"
