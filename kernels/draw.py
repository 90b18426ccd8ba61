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
