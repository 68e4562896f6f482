// Philox4x32-10, counter and key to random words (Salmon et al., SC 2011), as var_fast/engine/philox.py has it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define VAR_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VAR_FAST_HOST_DEVICE inline
#endif

namespace var_fast {

// Replaces the four words of `counter` by four random ones.
VAR_FAST_HOST_DEVICE void philox4x32(uint32_t (&counter)[4], const uint32_t (&key)[2]) {
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53u} * counter[0], product1 = uint64_t{0xCD9E8D57u} * counter[2];
        counter[0] = static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ k0;
        counter[1] = static_cast<uint32_t>(product1);
        counter[2] = static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ k1;
        counter[3] = static_cast<uint32_t>(product0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// The 24 random bits of a token; times 2^-24 they are `uniforms(seeds, stream, scale, tokens)[..., 0]`.
VAR_FAST_HOST_DEVICE uint32_t uniform_bits(int64_t seed, uint32_t stream, uint32_t scale, uint32_t token) {
    uint32_t counter[4] = {0, token, scale, stream};
    const uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
    philox4x32(counter, key);
    return counter[0] >> 8;
}

// In [0, 1), exact in float32.
VAR_FAST_HOST_DEVICE float uniform(int64_t seed, uint32_t stream, uint32_t scale, uint32_t token) {
    return static_cast<float>(uniform_bits(seed, stream, scale, token)) * (1.0f / 16777216.0f);
}

constexpr uint32_t TOKEN_STREAM = 0, GUMBEL_STREAM = 1;

}  // namespace var_fast
