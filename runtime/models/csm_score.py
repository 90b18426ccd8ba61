"""How likely a CSM model finds the audio of a conversation: teacher-forced log-likelihoods of every codebook token."""

from __future__ import annotations

import torch

from aloud.kernels.codebook_head import codebook_head
from aloud.kernels.embedding import embed_code
from aloud.kernels.linear import norm_linear
from aloud.models import transformer
from aloud.models.csm import CsmConfig, CsmWeights, embed_prompt
from aloud.request import Prompt

FRAMES_AT_ONCE = 256
"""Frames that go through the depth decoder together: bounds the memory of its cache."""


def score(config: CsmConfig, weights: CsmWeights, prompt: Prompt) -> torch.Tensor:
    """Natural log-likelihood of each token of the prompt's audio, given all that stands before it.

    -> float32 [audio positions, codebooks]; an audio position is a frame, or the end frame behind a segment's frames
    """
    device = weights.text_embedding.device
    x = embed_prompt(config, weights, prompt.text_tokens.to(device), prompt.codes.to(device))
    cache = transformer.allocate_cache(config.backbone, 1, len(prompt), device=x.device, dtype=x.dtype)
    positions = torch.arange(len(prompt), device=x.device)
    hidden = transformer.step(config.backbone, weights.backbone, cache, x, torch.zeros_like(positions), positions)
    audio = (prompt.text_tokens < 0).nonzero()[:, 0].to(x.device)
    # What stands at an audio position was predicted at the position before.
    hidden, codes = hidden[audio - 1], prompt.codes.to(x.device)[audio]
    parts = [
        _score_frames(config, weights, hidden_part, codes_part)
        for hidden_part, codes_part in zip(hidden.split(FRAMES_AT_ONCE), codes.split(FRAMES_AT_ONCE), strict=True)
    ]
    return torch.cat(parts)


def _score_frames(config: CsmConfig, weights: CsmWeights, hidden: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Backbone outputs [frames, hidden_size] and the codes that follow [frames, codebooks] -> [frames, codebooks]."""
    norm, eps = weights.backbone.norm, config.backbone.norm_eps
    scores = [_log_likelihood(codebook_head(hidden, norm, eps, weights.backbone_head, 0), codes[:, 0])]
    cache = transformer.allocate_cache(
        config.depth, len(codes), config.codebooks, device=hidden.device, dtype=hidden.dtype
    )
    slots = torch.arange(len(codes), device=codes.device)
    x = norm_linear(hidden, norm, eps, weights.depth_projector)
    transformer.step(config.depth, weights.depth, cache, x, slots, torch.zeros_like(slots))
    for codebook in range(1, config.codebooks):
        x = embed_code(codes[:, codebook - 1], weights.depth_embedding, config.audio_vocabulary, codebook - 1)
        depth_hidden = transformer.step(config.depth, weights.depth, cache, x, slots, torch.full_like(slots, codebook))
        logits = codebook_head(
            depth_hidden, weights.depth.norm, config.depth.norm_eps, weights.depth_heads, codebook - 1
        )
        scores.append(_log_likelihood(logits, codes[:, codebook]))
    return torch.stack(scores, dim=1)


def _log_likelihood(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
