// qk_norm of sampling on the CPU: splits the packed projection, brings queries and keys to unit length, and packs all
// three as the attention kernels read them (kv_layout.h).
#include <algorithm>
#include <cmath>

#include "../ops.h"
#include "isa.h"
#include "kv_layout.h"
#include "parallel.h"
#include "transpose.h"

namespace var_fast::cpu {
namespace {

constexpr float LOG2_E = 1.44269504088896341f;
constexpr int64_t GRAIN = 32;  // blocks (of up to 16 tokens of one head) that are worth a thread

struct Arguments {
    const void* qkv;
    const float* scale_H;
    float softmax_scale;
    int64_t S, l, H, D;
    void *q, *k_cache, *v_cache;
    int64_t begin, capacity;
};

template <typename T>
__attribute__((always_inline)) inline float inverse_length(const T* x, int64_t D) {
    float lane[16] = {}, sum = 0;
    int64_t d = 0;
    for (; d + 16 <= D; d += 16)
        for (int j = 0; j < 16; ++j) lane[j] += to_float(x[d + j]) * to_float(x[d + j]);
    for (; d < D; ++d) sum += to_float(x[d]) * to_float(x[d]);
    for (int j = 0; j < 16; ++j) sum += lane[j];
    return 1 / std::max(std::sqrt(sum), 1e-12f);
}

// Blocks [first, last) of the cache's blocks of 16 tokens: (image, block, head), heads fastest, as qkv lies in memory.
template <typename T>
struct Pack {
    static constexpr int WORD = 4 / sizeof(T);  // numbers in 32 bits

    __attribute__((always_inline)) static void run(const Arguments* arguments, StoreTransposed transpose, int64_t first,
                                                   int64_t last) {
        const Arguments& a = *arguments;
        const int64_t first_block = a.begin / 16, blocks = (a.begin + a.l + 15) / 16 - first_block;
        for (int64_t i = first; i < last; ++i) {
            const int64_t h = i % a.H, block = first_block + i / a.H % blocks, r = i / a.H / blocks;
            const int64_t from = std::max(a.begin, 16 * block), to = std::min(a.begin + a.l, 16 * block + 16);
            const int64_t row = 3 * a.H * a.D;
            const T* qkv = static_cast<const T*>(a.qkv) + (std::min(r, a.S - 1) * a.l + from - a.begin) * row + h * a.D;
            const int64_t Dp = padded_D(a.D), slice = r * a.H + h, cache = slice * padded_keys(a.capacity) * Dp;
            pack_q(a, h, qkv, row, to - from,
                   static_cast<T*>(a.q) + (slice * padded_queries(a.l) + from - a.begin) * Dp);
            pack_k(a, qkv + a.H * a.D, row, from % 16, to - from,
                   static_cast<T*>(a.k_cache) + cache + 16 * block * Dp, transpose);
            pack_v(a, qkv + 2 * a.H * a.D, row, from, to, static_cast<T*>(a.v_cache) + cache);
        }
    }

    __attribute__((always_inline)) static void pack_q(const Arguments& a, int64_t h, const T* q, int64_t row,
                                                      int64_t tokens, T* out) {
        const int64_t Dp = padded_D(a.D);
        for (int64_t t = 0; t < tokens; ++t, q += row, out += Dp) {
            float by = a.softmax_scale * LOG2_E;
            if (a.scale_H) by *= a.scale_H[h] * inverse_length(q, a.D);
            for (int64_t d = 0; d < a.D; ++d) store(to_float(q[d]) * by, out + d);
            for (int64_t d = a.D; d < Dp; ++d) out[d] = 0;
        }
    }

    // Tokens at places offset, offset + 1, ... of a block: words of 16 tokens side by side.
    __attribute__((always_inline)) static void pack_k(const Arguments& a, const T* k, int64_t row, int64_t offset,
                                                      int64_t tokens, T* out, StoreTransposed transpose) {
        constexpr int64_t CHUNK = 16 * WORD;
        alignas(64) T chunk[16][CHUNK];
        float by[16];
        for (int64_t t = 0; t < tokens; ++t) by[t] = a.scale_H ? inverse_length(k + t * row, a.D) : 1;
        const unsigned mask = ((1u << tokens) - 1) << offset;
        for (int64_t d = 0; d < padded_D(a.D); d += CHUNK) {
            for (int64_t t = 0; t < tokens; ++t) {
                const T* x = k + t * row + d;
                T* to = chunk[offset + t];
                if (d + CHUNK <= a.D) {
                    for (int64_t j = 0; j < CHUNK; ++j) store(to_float(x[j]) * by[t], to + j);
                } else {
                    for (int64_t j = 0; j < CHUNK; ++j)
                        if (d + j < a.D) store(to_float(x[j]) * by[t], to + j); else to[j] = 0;
                }
            }
            transpose(chunk, out + 16 * d, mask);
        }
    }

    __attribute__((always_inline)) static void pack_v(const Arguments& a, const float* v, int64_t row, int64_t from,
                                                      int64_t to, float* cache) {
        for (int64_t t = from; t < to; ++t, v += row) {
            float* out = cache + t * padded_D(a.D);
            for (int64_t d = 0; d < a.D; ++d) out[d] = v[d];
        }
    }

    // Pairs of tokens: an odd first token joins the one before it. What lies between the last token and the next
    // multiple of 32 is cleared: it meets weights of zero.
    __attribute__((always_inline)) static void pack_v(const Arguments& a, const bf16* v, int64_t row, int64_t from,
                                                      int64_t to, bf16* cache) {
        const int64_t Dp = padded_D(a.D);
        if (from % 2) {
            bf16* out = cache + (from - 1) * Dp;
            for (int64_t d = 0; d < a.D; ++d) out[2 * d + 1] = v[d];
            ++from, v += row;
        }
        for (; from + 1 < to; from += 2, v += 2 * row) {
            bf16* out = cache + from * Dp;
            const bf16 *even = v, *odd = v + row;
            for (int64_t d = 0; d < a.D; ++d) out[2 * d] = even[d], out[2 * d + 1] = odd[d];
        }
        if (from < to) {
            bf16* out = cache + from * Dp;
            for (int64_t d = 0; d < a.D; ++d) out[2 * d] = v[d], out[2 * d + 1] = 0;
        }
        if (to == a.begin + a.l)
            std::fill(cache + round_up(to, 2) * Dp, cache + padded_keys(to) * Dp, bf16{0});
    }
};

}  // namespace

int64_t q_bytes(Type type, int64_t R, int64_t l, int64_t H, int64_t D) {
    return R * H * padded_queries(l) * padded_D(D) * bytes_of(type);
}

int64_t k_cache_bytes(Type type, int64_t R, int64_t H, int64_t D, int64_t capacity) {
    return R * H * padded_keys(capacity) * padded_D(D) * bytes_of(type);
}

int64_t v_cache_bytes(Type type, int64_t R, int64_t H, int64_t D, int64_t capacity) {
    return k_cache_bytes(type, R, H, D, capacity);
}

void qk_norm(const void* qkv, Type type, const float* scale_H, float softmax_scale, int64_t S, int64_t R, int64_t l,
             int64_t H, int64_t D, void* q, void* k_cache, void* v_cache, int64_t begin, int64_t capacity, int threads) {
    const Arguments arguments{qkv, scale_H, softmax_scale, S, l, H, D, q, k_cache, v_cache, begin, capacity};
    const StoreTransposed transpose = choose_transpose();
    const int64_t blocks = (begin + l + 15) / 16 - begin / 16;
    parallel_for(R * blocks * H, threads, GRAIN, [&](int64_t first, int64_t last) {
        if (type == Type::f32)
            dispatch<Pack<float>>(&arguments, transpose, first, last);
        else
            dispatch<Pack<bf16>>(&arguments, transpose, first, last);
    });
}

}  // namespace var_fast::cpu
