"""CSM in Sesame's own layout, made from transformers' tensors: other names, and interleaved RoPE rows.

Both layouts rotate the same head_dim / 2 planes. Half-split RoPE keeps plane i's two coordinates in rows i and
i + head_dim / 2 of a head, interleaved RoPE in rows 2i and 2i + 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

RENAMES = (
    (r"^embed_text_tokens\.weight$", "text_embeddings.weight"),
    (r"^backbone_model\.embed_tokens\.embed_audio_tokens\.weight$", "audio_embeddings.weight"),
    (r"^depth_decoder\.model\.embed_tokens\.weight$", "audio_embeddings.weight"),
    (r"^depth_decoder\.model\.inputs_embeds_projector\.weight$", "projection.weight"),
    (r"^lm_head\.weight$", "codebook0_head.weight"),
    (r"^depth_decoder\.codebooks_head\.weight$", "audio_head"),
    (r"^backbone_model\.", "backbone."),
    (r"^depth_decoder\.model\.", "decoder."),
    (r"\.input_layernorm\.weight$", ".sa_norm.scale"),
    (r"\.post_attention_layernorm\.weight$", ".mlp_norm.scale"),
    (r"\.norm\.weight$", ".norm.scale"),
    (r"\.self_attn\.o_proj\.", ".attn.output_proj."),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"\.mlp\.down_proj\.", ".mlp.w2."),
    (r"\.mlp\.up_proj\.", ".mlp.w3."),
)
CODEC_PREFIX = "codec_model."

CSM_1B = {
    "backbone_flavor": "llama-1B",
    "decoder_flavor": "llama-100M",
    "text_vocab_size": 128256,
    "audio_vocab_size": 2051,
    "audio_num_codebooks": 32,
}
"""config.json in Sesame's own form."""


def interleaved_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Query or key rows `[heads * head_dim, ...]` from half-split order to interleaved order, by the definition."""
    order = [row for plane in range(head_dim // 2) for row in (plane, plane + head_dim // 2)]
    heads = weight.shape[0] // head_dim
    return weight[torch.tensor([head * head_dim + row for head in range(heads) for row in order])]


def to_sesame(tensors: Mapping[str, Tensor], head_dim: int, depth_head_dim: int) -> dict[str, Tensor]:
    """A saved transformers checkpoint, whose tables are tied, in Sesame's layout; the codec is left out."""
    result = {}
    for name, tensor in tensors.items():
        if name.startswith(CODEC_PREFIX):
            continue
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            tensor = interleaved_rows(tensor, depth_head_dim if name.startswith("depth_decoder.") else head_dim)
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def codec_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The codec of a saved transformers checkpoint, as a checkpoint of its own names it."""
    return {name.removeprefix(CODEC_PREFIX): t for name, t in tensors.items() if name.startswith(CODEC_PREFIX)}
