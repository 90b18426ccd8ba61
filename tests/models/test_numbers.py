"""CSM's logits against transformers': whole prompts, frame by frame, and the errors of half precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CsmForConditionalGeneration

from aloud import Runtime, Segment
from aloud.kernels.codebook_head import codebook_head
from aloud.kernels.embedding import embed_code
from aloud.models import csm, csm_score, transformer
from aloud.models.csm import Csm
from aloud.prepare import read_segments
from aloud.prompt_block import Piece, pack
from aloud.request import Prompt, Sampling
from oracle import csm as oracle

CONFIGS: dict[str, dict[str, Any]] = {
    "plain RoPE": {},
    "llama3, 8 codebooks, head_dim 64": {
        "codebooks": 8,
        "head_dim": 64,
        "rope": oracle.LLAMA3,
        "depth_rope": oracle.DEPTH_LLAMA3,
    },
    "32 codebooks, three groups": {
        "codebooks": 32,
        "heads": 6,
        "kv_heads": 3,
        "head_dim": 32,
        "rope": oracle.LLAMA3,
        "depth_rope": oracle.DEPTH_LLAMA3,
        "depth_kv_heads": 2,
        "depth_head_dim": 16,
    },
    "ungrouped, untied, odd sizes": {
        "kv_heads": 4,
        "depth_kv_heads": 4,
        "tied": False,
        "hidden_size": 72,
        "intermediate_size": 100,
        "layers": 5,
        "vocabulary": 83,
    },
}
RELATIVE = 2e-5
"""Of the largest logit of a row. The largest error measured is 4e-6."""


@dataclass(frozen=True)
class Pair:
    """One checkpoint and one conversation, all of it with audio."""

    theirs: CsmForConditionalGeneration
    ours: Runtime
    folder: Path
    segments: list[tuple[int, str, np.ndarray | None]]

    @property
    def model(self) -> Csm:
        return self.ours._model

    @property
    def prompt(self) -> Prompt:
        segments = [Segment(text, audio, speaker) for speaker, text, audio in self.segments]
        return read_segments(self.model, self.ours._tokenizer, segments, max_positions=self.model.max_positions)[0]


@dataclass(frozen=True)
class Logits:
    """Logits at every position of a conversation, and the depth decoder's at every position with audio."""

    backbone: Tensor  # [positions, vocabulary]
    depth: Tensor  # [audio positions, codebooks - 1, vocabulary]


def conversation(seed: int) -> list[tuple[int, str, np.ndarray | None]]:
    return [
        (1, "Hi there.", oracle.speech_like(0.6, seed)),
        (0, "How are you today?", oracle.speech_like(0.75, seed + 1)),
        (1, "Fine.", oracle.speech_like(0.4, seed + 2)),
    ]


@pytest.fixture(scope="module", params=list(CONFIGS), ids=list(CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    seed: int = request.config.getoption("--seed")
    model = oracle.random_model(oracle.small_config(**CONFIGS[request.param]), seed)
    folder = oracle.save(model, tmp_path_factory.mktemp("checkpoint"))
    return Pair(model, Runtime.load(folder, device="cpu"), folder, conversation(seed))


@torch.no_grad()
def theirs_from_text_and_sound(pair: Pair) -> Logits:
    """What transformers' model makes of the text and the samples, in one forward pass with labels."""
    given = oracle.inputs(pair.folder, pair.theirs.config, pair.segments)
    config = pair.theirs.config
    is_audio = (given.input_ids == config.audio_token_id) | (given.input_ids == config.audio_eos_token_id)
    labels = torch.where(is_audio, given.input_ids, -100)
    out = pair.theirs(given.input_ids, given.input_values, input_values_cutoffs=given.cutoffs, labels=labels)
    return Logits(out.logits[0], out.depth_decoder_logits)


def at_once(config: csm.CsmConfig, weights: csm.CsmWeights, cache: Tensor, x: Tensor) -> Tensor:
    """All positions of one slot in one step of the backbone."""
    positions = torch.arange(len(x))
    return transformer.step(config.backbone, weights.backbone, cache, x, torch.zeros_like(positions), positions)


def ours_at_once(model: Csm, prompt: Prompt) -> Logits:
    """Ours, the whole conversation in one prefill; the depth decoder's as `score` computes them."""
    config, weights = model.config, model.weights
    x = csm.embed_prompt(config, weights, prompt.text_tokens, prompt.codes)
    cache = transformer.allocate_cache(config.backbone, 1, len(prompt), device=x.device, dtype=x.dtype)
    hidden = at_once(config, weights, cache, x)
    backbone = codebook_head(hidden, weights.backbone.norm, config.backbone.norm_eps, weights.backbone_head, 0)
    heads = _Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csm_score, "codebook_head", heads)
        csm_score.score(config, weights, prompt)
    return Logits(backbone, torch.stack(heads.logits[1:], dim=1))


class _Recorder:
    """`codebook_head` that keeps what it returns."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, *arguments: Any) -> Tensor:
        self.logits.append(codebook_head(*arguments))
        return self.logits[-1]


class _Forced:
    """`next_code` that keeps the logits, and draws what it was given."""

    def __init__(self, codes: Tensor) -> None:
        self._codes = codes
        self.logits: list[Tensor] = []

    def __call__(
        self,
        x: Tensor,
        gain: Tensor,
        eps: float,
        heads: Tensor,
        head: int,
        *,
        frame: Tensor,
        codebook: int,
        table: Tensor,
        vocabulary: int,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        code = self._codes[frame, codebook]
        self.logits.append(codebook_head(x, gain, eps, heads, head))
        return code, embed_code(code, table, vocabulary, codebook)


def ours_by_frames(model: Csm, prompt: Prompt, text_positions: int, slots: int = 1, slot: int = 0) -> Logits:
    """Ours, the first `text_positions` positions as a prompt and then frame after frame, with the codes given.

    -> logits from the last position of the prompt on
    """
    beginning = Prompt(prompt.text_tokens[:text_positions], prompt.codes[:text_positions])
    state = model.allocate(slots + 1, len(prompt))  # and the scratch slot
    model.start(state, slot, Sampling(), 0, len(beginning))
    model.prefill(state, pack([Piece(slot, beginning, 0, len(beginning), 0)], len(beginning), slots))
    assert int(state.position[slot]) == text_positions - 1
    frames = prompt.codes[text_positions:]
    forced = _Forced(frames)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csm, "next_code", forced)
        for frame in frames:
            codes = csm.draw_codes(model.config, model.weights, state, torch.tensor([slot]))
            assert torch.equal(codes[0], frame)
    assert int(state.position[slot]) == len(prompt) - 1
    logits = torch.cat(forced.logits).unflatten(0, (len(frames), -1))
    return Logits(logits[:, 0], logits[:, 1:])


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Each row within `RELATIVE` of its largest entry."""
    assert ours.shape == theirs.shape
    error = float(((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)).max())
    print(f"largest relative error {error:.2e}")
    assert error <= RELATIVE


def last_turns_audio(prompt: Prompt) -> int:
    """Where the last run of audio begins."""
    text = (prompt.text_tokens >= 0).nonzero()
    return int(text[-1]) + 1


def test_prefill_logits(pair: Pair) -> None:
    ours, theirs = ours_at_once(pair.model, pair.prompt), theirs_from_text_and_sound(pair)
    assert_close(ours.backbone, theirs.backbone)
    assert_close(ours.depth, theirs.depth)


def test_step_logits(pair: Pair) -> None:
    """Prefill up to the last turn's text, then frame by frame: transformers' logits, and our own of one prefill."""
    prompt = pair.prompt
    begin = last_turns_audio(prompt)
    frames = len(prompt) - begin
    assert frames == 5 + 1
    ours = ours_by_frames(pair.model, prompt, begin)
    for whole in (theirs_from_text_and_sound(pair), ours_at_once(pair.model, prompt)):
        # The logits that predict a frame stand one position before it.
        assert_close(ours.backbone, whole.backbone[begin - 1 : -1])
        assert_close(ours.depth, whole.depth[-frames:])


def test_any_split_between_prompt_and_frames(pair: Pair) -> None:
    """However much of the audio is read as prompt, the rest is the same."""
    prompt = pair.prompt
    begin = last_turns_audio(prompt)
    whole = ours_at_once(pair.model, prompt)
    for split in range(begin, len(prompt)):
        ours = ours_by_frames(pair.model, prompt, split, slots=3, slot=split % 3)
        assert_close(ours.backbone, whole.backbone[split - 1 : -1])
        assert_close(ours.depth, whole.depth[split - len(prompt) :])


def test_positions_up_to_the_models_last(tmp_path: Path, seed: int) -> None:
    """At the far end of csm-1b's 2,048 positions, with its own RoPE, the logits are transformers', too."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 0.125,
        "high_freq_factor": 0.5,
        "original_max_position_embeddings": 1024,
    }
    model = oracle.random_model(oracle.small_config(positions=2048, head_dim=64, rope=rope), seed)
    runtime = Runtime.load(oracle.save(model, tmp_path), device="cpu")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 400, (2048,), generator=generator)
    with torch.no_grad():
        expected = model(input_ids=tokens[None]).logits[0]
    prompt = Prompt(tokens, torch.zeros(2048, 4, dtype=torch.int64))
    config, weights = runtime.config, runtime._model.weights
    x = csm.embed_prompt(config, weights, prompt.text_tokens, prompt.codes)
    cache = transformer.allocate_cache(config.backbone, 1, 2048, device=x.device, dtype=x.dtype)
    at_once(config, weights, cache, x[:-2])
    for position in (2046, 2047):
        hidden = transformer.step(
            config.backbone,
            weights.backbone,
            cache,
            x[position : position + 1],
            torch.tensor([0]),
            torch.tensor([position]),
        )
        ours = codebook_head(hidden, weights.backbone.norm, config.backbone.norm_eps, weights.backbone_head, 0)
        assert_close(ours, expected[position : position + 1])


# --- half precision ---------------------------------------------------------------------------------------------------

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Wide enough that the largest error is that of many sums and not of one row that a norm happens to blow up.
WIDE: dict[str, dict[str, Any]] = {
    "8 codebooks": {
        "codebooks": 8,
        "hidden_size": 256,
        "intermediate_size": 384,
        "head_dim": 64,
        "depth_hidden_size": 160,
        "depth_head_dim": 32,
        "depth_kv_heads": 2,
        "rope": oracle.LLAMA3,
        "depth_rope": oracle.DEPTH_LLAMA3,
    },
    "32 codebooks, three groups": {
        "codebooks": 32,
        "hidden_size": 192,
        "intermediate_size": 256,
        "heads": 6,
        "kv_heads": 3,
        "head_dim": 32,
        "depth_hidden_size": 128,
        "depth_head_dim": 32,
        "rope": oracle.LLAMA3,
        "depth_rope": oracle.DEPTH_LLAMA3,
    },
}
MODELS = 3


def wide_model(name: str, seed: int, dtype: torch.dtype) -> CsmForConditionalGeneration:
    """A model whose products keep their inputs' scale, in float32, with weights that `dtype` has exactly."""
    model = oracle.random_model(oracle.small_config(**WIDE[name]), seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "codec" not in parameter_name and "embed_" not in parameter_name:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.to(dtype).float()


@torch.no_grad()
def theirs_from_codes(model: CsmForConditionalGeneration, prompt: Prompt) -> Logits:
    """What transformers' decoders make of text tokens and codes, in the model's own dtype, so that no codec rounds."""
    is_text = prompt.text_tokens >= 0
    text = model.embed_text_tokens(prompt.text_tokens.clamp(min=0))
    audio = model.backbone_model.embed_tokens(prompt.codes[None])[0]
    embedded = torch.where(is_text[:, None], text, audio)[None]
    hidden = model.backbone_model(inputs_embeds=embedded).last_hidden_state[0]
    places = (~is_text).nonzero()[:, 0]
    codes = torch.nn.functional.pad(prompt.codes[places, :-1], (1, 0))
    depth = model.depth_decoder(input_ids=codes, backbone_last_hidden_state=hidden[places - 1]).logits
    return Logits(model.lm_head(hidden).float(), depth.float())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", WIDE)
def test_half_precision_errs_no_more_than_transformers(name: str, dtype: str, tmp_path: Path, seed: int) -> None:
    """max|ours - reference| <= 2 max|theirs - reference|, and the median error within 1.25 of theirs.

    The reference is transformers in float32 with the same weights; theirs is transformers in the half dtype, in its
    eager attention and in its SDPA. Measured in bfloat16 over 40 models of each configuration, in logits of up to 4:
    the median error is 0.005 to 0.007, 0.91 to 0.94 of eager's and 0.96 to 0.98 of SDPA's; the largest error is on
    average 0.88 of eager's and 0.97 of SDPA's, for a single model at most 1.7 times.
    """
    errors: dict[tuple[str, str], list[Tensor]] = {}
    for number in range(MODELS):
        folder = tmp_path / str(number)
        model = wide_model(name, seed + number, HALF[dtype])
        oracle.save(model, folder)
        runtime = Runtime.load(folder, device="cpu", dtype=dtype)
        prompt = Pair(model, runtime, folder, conversation(seed + number)).prompt
        begin = last_turns_audio(prompt)
        results = {"ours": ours_at_once(runtime._model, prompt)}
        for attention in ("eager", "sdpa"):
            theirs = CsmForConditionalGeneration.from_pretrained(
                folder, dtype=HALF[dtype], attn_implementation=attention
            )
            results[attention] = theirs_from_codes(theirs.eval(), prompt)
        reference, by_frames = theirs_from_codes(model, prompt), ours_by_frames(runtime._model, prompt, begin)
        for kind, last in (("backbone", slice(begin - 1, -1)), ("depth", slice(begin - len(prompt), None))):
            exact = getattr(reference, kind)
            for who, logits in results.items():
                error = (getattr(logits, kind) - exact).abs()
                errors.setdefault((kind, who), []).append(error.flatten())
                errors.setdefault((kind, f"{who}, last turn"), []).append(error[last].flatten())
            errors.setdefault((kind, "by frames"), []).append((getattr(by_frames, kind) - exact[last]).abs().flatten())
    pooled = {key: torch.cat(parts) for key, parts in errors.items()}
    for kind in ("backbone", "depth"):
        for attention in ("eager", "sdpa"):
            theirs = pooled[kind, attention]
            for who, same_rows in (("ours", attention), ("by frames", f"{attention}, last turn")):
                ours = pooled[kind, who]
                largest = float(ours.max() / theirs.max())
                median = float(ours.median() / pooled[kind, same_rows].median())
                print(f"{kind}, {who}, against {attention}: largest {largest:.2f}, median {median:.3f} of theirs")
                assert largest <= 2
                assert median <= 1.25
