// Draw one token a row: top-k, temperature and Gumbel-max, with noise that depends on nothing but the row's own inputs.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace aloud {

// What one draw depends on, apart from the vocabulary's size and the codebook, which a call's rows share.
struct Row {
    const float* logits;  // [vocabulary]
    std::uint64_t seed;
    std::uint64_t frame;
    float temperature;   // 0: greedy
    std::int32_t top_k;  // <= 0 or >= vocabulary: keep every token
};

constexpr std::int64_t no_token = -1;

// Working memory of a draw, kept between rows so that only the first one allocates.
struct Scratch {
    std::vector<float> scaled;
    std::vector<float> largest;
};

// Draw one row's token, or `no_token` where none is defined: a logit that is NaN or +inf, no logit above -inf, or a
// temperature that is negative, infinite or NaN.
std::int64_t draw(const Row& row, std::size_t vocabulary, std::uint32_t codebook, Scratch& scratch);

// Draw every row's token into `tokens` [rows].
void draw(const std::vector<Row>& rows, std::size_t vocabulary, std::uint32_t codebook, std::int64_t* tokens);

}  // namespace aloud
