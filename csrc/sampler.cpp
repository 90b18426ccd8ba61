// Draw one row; draw many. The mathematics is in kernels/draw.py; every operation here is one IEEE float32 operation.

#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>

#include "philox.h"

namespace aloud {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// Whether the logits define a distribution: some are finite, the others -inf.
bool drawable(const float* logits, std::size_t vocabulary) {
    std::uint32_t below_infinity = 0, above_minus_infinity = 0;  // counted, not branched on: this vectorises
    for (std::size_t token = 0; token < vocabulary; ++token) {
        below_infinity += logits[token] < infinity;  // NaN compares false
        above_minus_infinity += logits[token] > -infinity;
    }
    return below_infinity == vocabulary && above_minus_infinity > 0;
}

// The k-th largest of `values`, or -infinity where k keeps all of them.
float kth_largest(const std::vector<float>& values, std::int32_t k, std::vector<float>& largest) {
    if (k <= 0 || static_cast<std::size_t>(k) >= values.size()) return -infinity;
    largest = values;
    std::nth_element(largest.begin(), largest.begin() + (k - 1), largest.end(), std::greater<>());
    return largest[k - 1];
}

// Standard Gumbel noise from a random word, through u in (0, 1) with 24 significant bits, which float32 holds exactly.
//
// The logarithms are taken in double and rounded: float32 logarithms differ in the last bit from one platform to the
// next, and one bit can change a token. For all 2^23 possible u the double results lie far enough from where float32
// rounding changes its mind that any double logarithm gives the same noise (tests/kernels/test_draw.py shows it).
float gumbel(std::uint32_t word) {
    const float uniform = (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f;
    const float exponential = -static_cast<float>(std::log(static_cast<double>(uniform)));
    return -static_cast<float>(std::log(static_cast<double>(exponential)));
}

}  // namespace

std::int64_t draw(const Row& row, std::size_t vocabulary, std::uint32_t codebook, Scratch& scratch) {
    const float* logits = row.logits;
    if (!drawable(logits, vocabulary) || !(row.temperature >= 0 && row.temperature < infinity)) return no_token;
    if (row.temperature == 0) return std::max_element(logits, logits + vocabulary) - logits;

    std::vector<float>& z = scratch.scaled;
    z.resize(vocabulary);
    for (std::size_t token = 0; token < vocabulary; ++token) z[token] = logits[token] / row.temperature;
    const float threshold = kth_largest(z, row.top_k, scratch.largest);

    const auto frame_low = static_cast<std::uint32_t>(row.frame);
    const auto frame_high = static_cast<std::uint32_t>(row.frame >> 32);
    std::int64_t best = no_token;
    float best_score = -infinity;
    for (std::size_t token = 0; token < vocabulary; ++token) {
        // A finite logit over a tiny temperature can overflow to z = -inf and may be drawn; a logit of -inf may not.
        if (z[token] < threshold || logits[token] == -infinity) continue;
        const Words words = philox(row.seed, {static_cast<std::uint32_t>(token), codebook, frame_low, frame_high});
        const float score = z[token] + gumbel(words[0]);
        if (best == no_token || score > best_score) {
            best = static_cast<std::int64_t>(token);
            best_score = score;
        }
    }
    return best;
}

void draw(const std::vector<Row>& rows, std::size_t vocabulary, std::uint32_t codebook, std::int64_t* tokens) {
    Scratch scratch;
    for (const Row& row : rows) *tokens++ = draw(row, vocabulary, codebook, scratch);
}

}  // namespace aloud
