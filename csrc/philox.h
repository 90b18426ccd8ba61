// Random numbers as a function of (key, counter): Philox4x32-10, without any state.
//
// Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Ten rounds; each multiplies two
// of the counter's words by constants and mixes the halves of the products with the other two words and the key.

#pragma once

#include <array>
#include <cstdint>

namespace aloud {

using Words = std::array<std::uint32_t, 4>;

// The four random words that belong to `counter` under the 64-bit `key` (its low 32 bits are the key's first word).
inline Words philox(std::uint64_t key, Words counter) {
    constexpr std::uint64_t multiplier_0 = 0xD2511F53, multiplier_1 = 0xCD9E8D57;
    constexpr std::uint32_t weyl_0 = 0x9E3779B9, weyl_1 = 0xBB67AE85;  // golden ratio and sqrt(3) - 1, as fractions
    auto key_0 = static_cast<std::uint32_t>(key), key_1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t product_0 = multiplier_0 * counter[0], product_1 = multiplier_1 * counter[2];
        counter = {static_cast<std::uint32_t>(product_1 >> 32) ^ counter[1] ^ key_0,
                   static_cast<std::uint32_t>(product_1),
                   static_cast<std::uint32_t>(product_0 >> 32) ^ counter[3] ^ key_1,
                   static_cast<std::uint32_t>(product_0)};
        key_0 += weyl_0;
        key_1 += weyl_1;
    }
    return counter;
}

}  // namespace aloud
