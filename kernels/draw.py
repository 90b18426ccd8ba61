"""Draw one token a row: top-k, temperature and Gumbel-max with counter-based noise.

    z     = logit / temperature                                    float32
    kept  = every token with z >= the k-th largest z               ties at the threshold stay; k <= 0 keeps all
    word  = philox4x32_10(key = seed, counter = (token, codebook, frame, frame >> 32))[0]
    u     = ((word >> 9) + 0.5) * 2^-23                            float32, exact, never 0 or 1
    g     = -log(-log(u))                                          each log in float64, rounded to float32
    token = argmax over kept of z + g                              float32, lowest index on ties

which is a draw from softmax(z) over the kept tokens, because the largest of z + Gumbel noise is at `token` with exactly
that probability (Gumbel 1954; Yellott 1977). The noise is a function of the seed and of what is being drawn, so a
request's tokens do not depend on which other requests share the batch, which row it has, or who draws. Temperature 0 is
the argmax of the logits, lowest index on ties, without noise.

A row has no token, and yields -1, if any of its logits is NaN or +inf, if none is above -inf, or if its temperature is
negative, infinite or NaN. A logit of -inf is never drawn. Temperatures so small that z overflows (below about 1e-36 for
logits up to 100) meet the definition but make large z tie.

Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch

from aloud import _sampler
from aloud.kernels.check import check
from aloud.kernels.launch import (
    ANY_ALIGNMENT,
    PROGRAMMATIC_LAUNCH_CAPABILITY,
    Launch,
    capability,
    ceil_div,
    next_power_of_2,
)
from aloud.kernels.triton_language import gdc_launch_dependents, gdc_wait, tl, triton

WORD = 0xFFFFFFFF


def philox_reference(seed: torch.Tensor, counter: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Compute the four words of Philox4x32-10.

    `seed` is a 64-bit pattern in an int64, `counter` four words in int64, all of shapes that broadcast together;
    so are the four words that come back.
    """
    key_0, key_1 = seed & WORD, (seed >> 32) & WORD
    word_0, word_1, word_2, word_3 = counter
    for _ in range(10):
        # The products' upper halves may set the sign bit; the masks after the shifts take its copies away again.
        product_0, product_1 = word_0 * 0xD2511F53, word_2 * 0xCD9E8D57
        word_0, word_1 = (product_1 >> 32) & WORD ^ word_1 ^ key_0, product_1 & WORD
        word_2, word_3 = (product_0 >> 32) & WORD ^ word_3 ^ key_1, product_0 & WORD
        key_0, key_1 = (key_0 + 0x9E3779B9) & WORD, (key_1 + 0xBB67AE85) & WORD
    return word_0, word_1, word_2, word_3


def gumbel_reference(seed: torch.Tensor, frame: torch.Tensor, codebook: int, vocabulary: int) -> torch.Tensor:
    """Compute the noise of every token: `[rows, vocabulary]` float32, from `seed` and `frame`, `[rows]` int64."""
    token = torch.arange(vocabulary, device=seed.device)
    frame = frame[:, None]
    counter = (token, torch.full_like(token, codebook), frame & WORD, (frame >> 32) & WORD)
    word = philox_reference(seed[:, None], counter)[0]
    uniform = ((word >> 9).float() + 0.5) * 2**-23
    exponential = -uniform.double().log().float()
    return -exponential.double().log().float()


def draw_reference(
    logits: torch.Tensor,
    *,
    seed: torch.Tensor,
    frame: torch.Tensor,
    codebook: int,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
) -> torch.Tensor:
    """Draw as `draw` does, in plain PyTorch: the definition."""
    vocabulary = logits.shape[1]
    greedy = (temperature == 0)[:, None]
    z = torch.where(greedy, logits, logits / temperature[:, None])
    k = torch.where((top_k > 0) & (top_k < vocabulary), top_k, vocabulary).long()
    threshold = z.sort(dim=1, descending=True).values.gather(1, k[:, None] - 1)
    kept = (z >= threshold) & (logits > -torch.inf)
    score = torch.where(greedy, z, z + gumbel_reference(seed, frame, codebook, vocabulary))
    best = score.masked_fill(~kept, -torch.inf).amax(dim=1, keepdim=True)
    token = (kept & (score == best)).int().argmax(dim=1)  # the first of the best
    has_token = (logits < torch.inf).all(dim=1) & (logits > -torch.inf).any(dim=1)
    has_token &= (temperature >= 0) & (temperature < torch.inf)
    return torch.where(has_token, token, -1)


# --- launch table -----------------------------------------------------------------------------------------------------
# A program holds whole rows in registers: 16 tokens a thread, so that each step of the search is short and the sums
# over a row cross as few warps as possible. One row a program: rows are searched for different numbers of steps.

TOKENS_PER_THREAD = 16


def warps_for_tokens(tokens: int) -> int:
    """Warps that hold `tokens` tokens, a power of two: 1 to 8."""
    return min(max(tokens // (32 * TOKENS_PER_THREAD), 1), 8)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def gumbel(seed, frame, codebook, token):
    """Noise of tokens: seed, frame int64 [rows, 1], codebook and token int32, token [1, tokens] -> [rows, tokens]."""
    frame_low, frame_high = frame.to(tl.uint32), (frame >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, token, codebook, frame_low, frame_high)
    uniform = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    exponential = -tl.log(uniform.to(tl.float64)).to(tl.float32)
    return -tl.log(exponential.to(tl.float64)).to(tl.float32)


@triton.jit
def draw_rows(logits, noise, token, inside, temperature, top_k):
    """Draw for rows that are in registers already -> int32 [rows], -1 where a row has no token.

    logits, noise float32 [rows, tokens]; token int32 [1, tokens], `inside` where it is one of the vocabulary;
    temperature, top_k [rows].

    The k-th largest z is never looked for. The token with the best score of all is the answer if it is kept, that is,
    if fewer than k tokens have a larger z. If it is not kept, then neither is any token with the same z or less, and
    the best of those above is the next to ask. Every step leaves at least the largest z, which is always kept. With
    flat logits each step leaves a random share of the tokens, as in quickselect, so that ln(vocabulary / k) + 1 steps
    are expected, 5 for 50 of 2,048; a steeper distribution has its best scores further up and takes fewer.
    """
    greedy = temperature == 0
    everything: tl.constexpr = token.shape[1]
    k = tl.where((top_k <= 0) | greedy, everything, top_k)
    # NaN is not below infinity, so it makes a row undrawable too.
    drawable = tl.max((inside & (logits > float("-inf"))).to(tl.int32), axis=1) > 0
    drawable &= tl.max((inside & ~(logits < float("inf"))).to(tl.int32), axis=1) == 0
    drawable &= (temperature >= 0) & (temperature < float("inf"))

    z = tl.div_rn(logits, tl.where(greedy, 1.0, temperature)[:, None])
    score = tl.where(greedy[:, None], z, z + noise)
    live = inside & (logits > float("-inf"))
    undecided = drawable.to(tl.int32)
    drawn = tl.where(drawable, 0, -1)
    while tl.max(undecided, axis=0) > 0:
        best = tl.max(tl.where(live, score, float("-inf")), axis=1)[:, None]
        first = tl.min(tl.where(live & (score == best), token, everything), axis=1)  # lowest index on ties
        first_z = tl.max(tl.where(token == first[:, None], z, float("-inf")), axis=1)
        live &= z > first_z[:, None]
        kept = tl.sum(live.to(tl.int32), axis=1) < k
        drawn = tl.where(kept & (undecided > 0), first, drawn)
        undecided = tl.where(kept, 0, undecided)
    return drawn


@triton.jit(do_not_specialize=["rows", "codebook"], do_not_specialize_on_alignment=ANY_ALIGNMENT)
def draw_kernel(
    logits_ptr,
    seed_ptr,
    frame_ptr,
    temperature_ptr,
    top_k_ptr,
    tokens_ptr,
    stride_logits_row,
    rows,
    vocabulary,
    codebook,
    ROWS: tl.constexpr,
    VOCABULARY: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One program draws for ROWS rows of VOCABULARY tokens, the next power of two of `vocabulary`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, VOCABULARY)[None, :]
    exists = row < rows
    inside = exists[:, None] & (token < vocabulary)
    if PROGRAMMATIC:
        gdc_launch_dependents()
        gdc_wait()
    seed = tl.load(seed_ptr + row, mask=exists, other=0)
    frame = tl.load(frame_ptr + row, mask=exists, other=0)
    temperature = tl.load(temperature_ptr + row, mask=exists, other=0.0)
    top_k = tl.load(top_k_ptr + row, mask=exists, other=0)
    logits = tl.load(
        logits_ptr + row.to(tl.int64)[:, None] * stride_logits_row + token, mask=inside, other=float("-inf")
    )
    noise = gumbel(seed[:, None], frame[:, None], codebook, token)
    drawn = draw_rows(logits, noise, token, inside, temperature, top_k)
    tl.store(tokens_ptr + row, drawn.to(tl.int64), mask=exists)


def as_int32(word: int) -> int:
    """The 32 bits of `word` as the signed number that a kernel takes."""
    return word - 2**32 if word >= 2**31 else word


def plan_draw(
    logits: torch.Tensor,
    *,
    seed: torch.Tensor,
    frame: torch.Tensor,
    codebook: int,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    capability: int,
    rows_per_program: int = 1,
) -> Launch:
    """The launch behind `draw`; its output is the tokens. `rows_per_program` is a power of two."""
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    block = next_power_of_2(vocabulary)
    programmatic = capability >= PROGRAMMATIC_LAUNCH_CAPABILITY
    return Launch(
        draw_kernel,
        grid=(ceil_div(rows, rows_per_program),),
        arguments={
            "logits_ptr": logits,
            "seed_ptr": seed.contiguous(),
            "frame_ptr": frame.contiguous(),
            "temperature_ptr": temperature.contiguous(),
            "top_k_ptr": top_k.contiguous(),
            "tokens_ptr": tokens,
            "stride_logits_row": logits.stride(0),
            "rows": rows,
            "vocabulary": vocabulary,
            "codebook": as_int32(codebook),
        },
        constants={"ROWS": rows_per_program, "VOCABULARY": block, "PROGRAMMATIC": programmatic},
        num_warps=warps_for_tokens(block),
        programmatic=programmatic,
        outputs=(tokens,),
    )


def draw(
    logits: torch.Tensor,
    *,
    seed: torch.Tensor,
    frame: torch.Tensor,
    codebook: int,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
) -> torch.Tensor:
    """Draw one token a row, `[rows]` int64, -1 where a row has none.

    Args:
        logits: `[rows, vocabulary]` float32; rows may be any distance apart, a row's logits lie side by side.
        seed: `[rows]` int64, the 64-bit pattern of the request's seed.
        frame: `[rows]` int64, the frame that the token belongs to.
        codebook: the codebook that the token belongs to, the same for all rows, below 2^32.
        temperature: `[rows]` float32; 0 is greedy.
        top_k: `[rows]` int32; 0 or less, or the vocabulary or more, keeps every token.

    Raises:
        ValueError: a shape, dtype, device or layout is not as above.
    """
    sizes: dict[str, int] = {}
    check("logits", logits, "rows vocabulary", sizes, dtype=torch.float32)
    check("seed", seed, "rows", sizes, dtype=torch.int64, device=logits.device)
    check("frame", frame, "rows", sizes, dtype=torch.int64, device=logits.device)
    check("temperature", temperature, "rows", sizes, dtype=torch.float32, device=logits.device)
    check("top_k", top_k, "rows", sizes, dtype=torch.int32, device=logits.device)
    if not 0 <= codebook <= WORD:
        raise ValueError(f"codebook must be from 0 to {WORD}, got {codebook}")
    if logits.is_cuda:
        launch = plan_draw(
            logits,
            seed=seed,
            frame=frame,
            codebook=codebook,
            temperature=temperature,
            top_k=top_k,
            capability=capability(logits.device),
        )
        launch.run()
        return launch.outputs[0]
    # On the CPU `.cpu()` and `.numpy()` share memory; from another device they are the copies there and back.
    tokens = _sampler.draw(
        logits.detach().cpu().numpy(),
        seed.cpu().numpy(),
        frame.cpu().numpy(),
        codebook,
        temperature.cpu().numpy(),
        top_k.cpu().numpy(),
    )
    return torch.from_numpy(tokens).to(logits.device)
