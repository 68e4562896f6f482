// Philox4x32-10: random words by counter and key, without state (Salmon et al., Parallel random numbers: as easy as
// 1, 2, 3, SC 2011). The same numbers as var_fast/ops/philox.py, on the host and in CUDA kernels.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VAR_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VAR_FAST_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace var_fast {

struct Philox {
    uint32_t word[4];
};

VAR_FAST_HOST_DEVICE Philox philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0, product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(product0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// The words of one block: numbers 4 block .. 4 block + 3 of a token. `stream` keeps numbers of different use apart.
VAR_FAST_HOST_DEVICE Philox philox_block(int64_t seed, uint32_t stream, uint32_t scale, uint32_t token, uint32_t block) {
    const uint64_t key = static_cast<uint64_t>(seed);
    return philox4x32(block, token, scale, stream, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

constexpr uint32_t TOKEN_STREAM = 0;  // the draws of sample_tokens

// In (0, 1), exact in double; exponentials of var_fast/ops/philox.py are its -log.
VAR_FAST_HOST_DEVICE double uniform_of(uint32_t word) { return (word + 0.5) * 2.3283064365386962890625e-10; }

}  // namespace var_fast
