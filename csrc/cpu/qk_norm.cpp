// qk_norm of sampling on the CPU: splits the packed projection, brings queries and keys to unit length, and packs all
// three as the attention kernels read them (kv_layout.h).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../ops.h"
#include "isa.h"
#include "kv_layout.h"
#include "parallel.h"
#include "transpose.h"
#include "wide.h"

namespace var_fast::cpu {
namespace {

constexpr float LOG2_E = 1.44269504088896341f;

struct Arguments {
    const void* qkv;
    const float* scale_H;
    float softmax_scale;
    int64_t S, l, H, D;
    void *q, *k_cache, *v_cache;
    int64_t begin, capacity;
};

VAR_FAST_INLINE Floats squares(Words x, float) { return (Floats)x * (Floats)x; }
VAR_FAST_INLINE Floats squares(Words x, bf16) { return even(x) * even(x) + odd(x) * odd(x); }
VAR_FAST_INLINE Words times(Words x, float by, float) { return (Words)((Floats)x * by); }
VAR_FAST_INLINE Words times(Words x, float by, bf16) {
    return rounded(even(x) * by) >> 16 | (rounded(odd(x) * by) & 0xffff0000);
}

template <bool PADDED, typename T>
VAR_FAST_INLINE float inverse_length(const T* x, int64_t D) {
    Floats sum = {};
    for (int64_t d = 0; d < D; d += 64 / sizeof(T)) sum += squares(load<PADDED>(x + d, D - d), T{});
    sum += __builtin_shuffle(sum, Lanes{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    sum += __builtin_shuffle(sum, Lanes{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    sum += __builtin_shuffle(sum, Lanes{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    return 1 / std::max(std::sqrt(sum[0] + sum[1]), 1e-12f);
}

// Heads [first, last) of all images, in the order (image, head): as scale_attention cuts them, so that a thread finds
// what it wrote in its own caches.
template <typename T, bool PADDED>
struct Pack {
    static constexpr int64_t CHUNK = 64 / sizeof(T);

    VAR_FAST_INLINE static void run(const Arguments* arguments, StoreTransposed transpose, int64_t first,
                                    int64_t last) {
        const Arguments a = *arguments;  // a copy, which no store below can change
        for (int64_t slice = first; slice < last;) {
            const int64_t r = slice / a.H, end = std::min(last, (r + 1) * a.H);
            // blocks of 16 tokens of the cache, heads innermost: as qkv lies in memory
            for (int64_t from = a.begin, to; from < a.begin + a.l; from = to) {
                to = std::min(a.begin + a.l, from / 16 * 16 + 16);
                for (int64_t s = slice; s < end; ++s) block(a, transpose, r, s, from, to);
            }
            slice = end;
        }
    }

    VAR_FAST_INLINE static void block(const Arguments& a, StoreTransposed transpose, int64_t r, int64_t slice,
                                      int64_t from, int64_t to) {
        const int64_t Dp = padded_D(a.D), h = slice - r * a.H, row = 3 * a.H * a.D;
        const int64_t cache = slice * padded_keys(a.capacity) * Dp;
        const T* qkv = static_cast<const T*>(a.qkv) + (std::min(r, a.S - 1) * a.l + from - a.begin) * row + h * a.D;
        pack_q(a, h, qkv, row, to - from, static_cast<T*>(a.q) + (slice * padded_queries(a.l) + from - a.begin) * Dp);
        pack_k(a, qkv + a.H * a.D, row, from % 16, to - from,
               static_cast<T*>(a.k_cache) + cache + from / 16 * 16 * Dp, transpose);
        pack_v(a, qkv + 2 * a.H * a.D, row, from, to, static_cast<T*>(a.v_cache) + cache);
    }

    VAR_FAST_INLINE static void pack_q(const Arguments& a, int64_t h, const T* q, int64_t row, int64_t tokens, T* out) {
        const int64_t Dp = padded_D(a.D);
        for (int64_t t = 0; t < tokens; ++t, q += row, out += Dp) {
            float by = a.softmax_scale * LOG2_E;
            if (a.scale_H) by *= a.scale_H[h] * inverse_length<PADDED>(q, a.D);
            for (int64_t d = 0; d < Dp; d += CHUNK) store(times(load<PADDED>(q + d, a.D - d), by, T{}), out + d);
        }
    }

    // Tokens at places offset, offset + 1, ... of a block: 32-bit words of 16 tokens side by side.
    VAR_FAST_INLINE static void pack_k(const Arguments& a, const T* k, int64_t row, int64_t offset, int64_t tokens,
                                       T* out, StoreTransposed transpose) {
        alignas(64) T chunk[16][CHUNK];
        float by[16];
        for (int64_t t = 0; t < tokens; ++t) by[t] = a.scale_H ? inverse_length<PADDED>(k + t * row, a.D) : 1;
        const unsigned mask = ((1u << tokens) - 1) << offset;
        for (int64_t d = 0; d < padded_D(a.D); d += CHUNK) {
            for (int64_t t = 0; t < tokens; ++t)
                store(times(load<PADDED>(k + t * row + d, a.D - d), by[t], T{}), chunk[offset + t]);
            transpose(chunk, out + 16 * d, mask);
        }
    }

    VAR_FAST_INLINE static void pack_v(const Arguments& a, const float* v, int64_t row, int64_t from, int64_t to,
                                       float* cache) {
        const int64_t Dp = padded_D(a.D);
        for (int64_t t = from; t < to; ++t, v += row)
            for (int64_t d = 0; d < Dp; d += CHUNK) store(load<PADDED>(v + d, a.D - d), cache + t * Dp + d);
    }

    // Pairs of tokens: an odd first token joins the one before it. What lies between the last token and the next
    // multiple of 32 is cleared: it meets weights of zero.
    VAR_FAST_INLINE static void pack_v(const Arguments& a, const bf16* v, int64_t row, int64_t from, int64_t to,
                                       bf16* cache) {
        constexpr Lanes FIRST_HALVES = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
        const int64_t Dp = padded_D(a.D);
        for (int64_t t = from / 2 * 2; t < to; t += 2)
            for (int64_t d = 0; d < Dp; d += CHUNK) {
                bf16* out = cache + t * Dp + 2 * d;
                const bf16* x = v + (t - from) * row + d;
                const Words first = t < from ? Words{} : load<PADDED>(x, a.D - d);
                const Words second = t + 1 < to ? load<PADDED>(x + row, a.D - d) : Words{};
                const Words of_even = (first & 0xffff) | second << 16, of_odd = first >> 16 | (second & 0xffff0000);
                Words low = __builtin_shuffle(of_even, of_odd, FIRST_HALVES);
                Words high = __builtin_shuffle(of_even, of_odd, FIRST_HALVES + 8);
                if (t < from) {
                    low |= load<false>(out, CHUNK) & 0xffff;
                    high |= load<false>(out + CHUNK, CHUNK) & 0xffff;
                }
                store(low, out);
                store(high, out + CHUNK);
            }
        if (to == a.begin + a.l && padded_keys(to) > padded_keys(a.begin))  // else it was done before
            std::memset(cache + round_up(to, 2) * Dp, 0, (padded_keys(to) - round_up(to, 2)) * Dp * sizeof(bf16));
    }
};

template <typename T, bool PADDED>
void pack_blocks(const Arguments& arguments, StoreTransposed transpose, int64_t first, int64_t last) {
    dispatch<Pack<T, PADDED>>(&arguments, transpose, first, last);
}

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
             int64_t H, int64_t D, void* q, void* k_cache, void* v_cache, int64_t begin, int64_t capacity,
             int threads) {
    const Arguments arguments{qkv, scale_H, softmax_scale, S, l, H, D, q, k_cache, v_cache, begin, capacity};
    const StoreTransposed transpose = choose_transpose();
    parallel_for(R * H, threads, 1, [&](int64_t first, int64_t last) {
        const bool padded = D != padded_D(D);
        const auto pack = type == Type::f32 ? (padded ? pack_blocks<float, true> : pack_blocks<float, false>)
                                            : (padded ? pack_blocks<bf16, true> : pack_blocks<bf16, false>);
        pack(arguments, transpose, first, last);
    });
}

}  // namespace var_fast::cpu
