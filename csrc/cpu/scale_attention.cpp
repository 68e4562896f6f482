// Attention of one scale's queries over the cached keys and values of all tokens so far, on the CPU.
//
// A block of queries walks through blocks of keys: scores, running softmax, weighted sum of values. Scores never leave
// the second-level cache. How rows are cut depends on l and `length` alone, and a row's numbers do not depend on the
// rows beside it, so an image's result does not depend on its batch nor on the number of threads.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "../ops.h"
#include "attention_kernels.h"
#include "isa.h"
#include "kv_layout.h"
#include "parallel.h"
#include "wide.h"

namespace var_fast::cpu {
namespace {

AttentionKernels choose_kernels(Type type) {
#ifdef VAR_FAST_X86
    if (type == Type::bf16 && isa() >= Isa::amx) return attention_amx();
    if (type == Type::bf16 && isa() >= Isa::avx512_bf16) return attention_avx512_bf16();
    if (isa() >= Isa::avx512) return attention_avx512();
    if (isa() >= Isa::avx2) return attention_avx2();
#endif
    (void)type;
    return attention_portable();
}

// This thread's scratch memory: at least n floats, aligned to 64 bytes; it only grows.
float* scratch(int64_t n) {
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    thread_local std::unique_ptr<float, Free> memory;
    thread_local int64_t size = 0;
    if (size < n) {
        size = round_up(n, 1024);
        memory.reset(static_cast<float*>(std::aligned_alloc(64, 4 * size)));
        if (memory == nullptr) {
            size = 0;
            throw std::bad_alloc();
        }
    }
    return memory.get();
}

// Pairs (steps / 2, words, 2) of bfloat16 become (steps, words) in float32: kv_layout's two forms of the same cache.
struct UnpackPairs {
    VAR_FAST_INLINE static void run(const bf16* pairs, int64_t steps, int64_t words, float* out) {
        for (int64_t pair = 0; pair < steps / 2; ++pair, pairs += 2 * words, out += 2 * words)
            for (int64_t word = 0; word < words; word += 16) {
                const Words both = load<false>(pairs + 2 * word, 32);
                store((Words)even(both), out + word);
                store((Words)odd(both), out + words + word);
            }
    }
};

struct Unpack {
    VAR_FAST_INLINE static void run(const bf16* x, int64_t n, float* out) {
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
            std::memcpy(out + i, &bits, 4);
        }
    }
};

struct Rescale {
    VAR_FAST_INLINE static void run(float* sums, int64_t rows, int64_t Dp, const float* factor) {
        for (int64_t row = 0; row < rows; ++row) {
            const float by = factor[row];
            if (by == 1) continue;
            for (int64_t d = 0; d < Dp; ++d) sums[row * Dp + d] *= by;
        }
    }
};

VAR_FAST_INLINE Floats floats(const float* x) { return (Floats)load<false>(x, 16); }
VAR_FAST_INLINE Words scaled(const float* x, float by, float) { return (Words)(floats(x) * by); }
VAR_FAST_INLINE Words scaled(const float* x, float by, bf16) { return packed(floats(x) * by, floats(x + 16) * by); }

template <typename T>
struct Finish {
    VAR_FAST_INLINE static void run(const float* sums, const float* total, int64_t rows, int64_t D, T* out,
                                    int64_t out_row) {
        constexpr int64_t CHUNK = 64 / sizeof(T);
        const int64_t Dp = padded_D(D);
        for (int64_t row = 0; row < rows; ++row, sums += Dp, out += out_row) {
            const float by = 1 / total[row];
            for (int64_t d = 0; d < D; d += CHUNK) {
                const Words words = scaled(sums + d, by, T{});
                if (D - d >= CHUNK)
                    store(words, out + d);
                else
                    std::memcpy(out + d, &words, (D - d) * sizeof(T));
            }
        }
    }
};

struct Shape {
    int64_t R, l, H, D, length, capacity;
};

// T: type of q, caches and out; W: type of the products' operands (bfloat16 caches serve float32 kernels too).
template <typename T, typename W>
class Attention {
public:
    Attention(const AttentionKernels& kernels, const T* q, const T* k, const T* v, const Shape& shape, T* out)
        : kernels_(kernels), q_(q), k_(k), v_(v), shape_(shape), out_(out) {
        // blocks of nearly the same size; a larger block where keys have to be unpacked first, to do that less often
        const int64_t blocks = (shape.length + kernels.key_block - 1) / kernels.key_block;
        key_block_ = round_up((shape.length + blocks - 1) / blocks, 32);
        query_block_ = UNPACKED ? 2 * kernels.query_block : kernels.query_block;
        query_blocks_ = (shape.l + query_block_ - 1) / query_block_;
    }

    void run(int threads) const {
        parallel_for(shape_.R * shape_.H * query_blocks_, threads, 1, [&](int64_t begin, int64_t end) {
            const Scratch memory(*this);
            if (kernels_.begin) kernels_.begin();
            for (int64_t i = begin; i < end; ++i)
                block(i / query_blocks_, i % query_blocks_ * query_block_, memory);
            if (kernels_.end) kernels_.end();
        });
    }

private:
    static constexpr bool UNPACKED = sizeof(T) != sizeof(W);
    static constexpr int64_t STEPS = sizeof(W) == 2 ? 2 : 1;  // of a product's sum in one 32-bit word

    struct Scratch {
        explicit Scratch(const Attention& a) {
            const int64_t Dp = padded_D(a.shape_.D), rows = round_up(a.query_block_, 16);
            score_row = a.key_block_ + 16;  // not a multiple of 4 KB
            const int64_t unpacked = UNPACKED ? rows * Dp + 2 * a.key_block_ * Dp : 0;
            scores = scratch(rows * (score_row + Dp + 3) + unpacked);
            sums = scores + rows * score_row;
            largest = sums + rows * Dp, total = largest + rows, factor = total + rows;
            q = factor + rows, k = q + rows * Dp, v = k + a.key_block_ * Dp;
        }
        int64_t score_row;
        float *scores, *sums, *largest, *total, *factor, *q, *k, *v;
    };

    void block(int64_t slice, int64_t query, const Scratch& m) const {
        const auto [R, l, H, D, length, capacity] = shape_;
        const int64_t Dp = padded_D(D), rows = std::min(query_block_, l - query);
        const T* q = q_ + (slice * padded_queries(l) + query) * Dp;
        const T* k = k_ + slice * padded_keys(capacity) * Dp;
        const T* v = v_ + slice * padded_keys(capacity) * Dp;
        const void* queries = q;
        if constexpr (UNPACKED) {
            dispatch<Unpack>(q, rows * Dp, m.q);
            queries = m.q;
        }
        std::fill_n(m.largest, rows, -std::numeric_limits<float>::infinity());
        std::fill_n(m.total, rows, 0.f);
        // the next head's keys and values are fetched while this one's are at work, a part with each block
        const int64_t parts = query_blocks_ * ((length + key_block_ - 1) / key_block_);
        const int64_t part = query / query_block_ * (parts / query_blocks_);
        const int64_t bytes = padded_keys(length) * Dp * sizeof(T);
        const int64_t share = slice + 1 < R * H ? round_up(bytes / parts, 64) : 0;
        const char* next_k = reinterpret_cast<const char*>(k + padded_keys(capacity) * Dp) + part * share;
        const char* next_v = reinterpret_cast<const char*>(v + padded_keys(capacity) * Dp) + part * share;
        for (int64_t key = 0; key < length; key += key_block_) {
            const int64_t keys = std::min(key_block_, length - key), padded = padded_keys(keys);
            const void *key_words = k + key * Dp, *value_words = v + key * Dp;
            if constexpr (UNPACKED) {
                for (int64_t i = 0; i < padded; i += 16)
                    dispatch<UnpackPairs>(k + (key + i) * Dp, Dp, int64_t{16}, m.k + i * Dp);
                dispatch<UnpackPairs>(v + key * Dp, padded, Dp, m.v);
                key_words = m.k, value_words = m.v;
            }
            kernels_.product({queries, Dp, key_words, 16 * STEPS, 16 * Dp, m.scores, m.score_row, rows, Dp,
                              (keys + 15) / 16, false, next_k, share});
            kernels_.softmax({m.scores, m.score_row, rows, keys, m.largest, m.total, m.factor});
            if (key > 0) dispatch<Rescale>(m.sums, rows, Dp, const_cast<const float*>(m.factor));
            kernels_.product({m.scores, m.score_row * STEPS, value_words, Dp * STEPS, 16 * STEPS, m.sums, Dp, rows,
                              STEPS == 2 ? padded : keys, Dp / 16, key > 0, next_v, share});
            next_k += share, next_v += share;
        }
        T* out = out_ + ((slice / H * l + query) * H + slice % H) * D;
        dispatch<Finish<T>>(const_cast<const float*>(m.sums), const_cast<const float*>(m.total), rows, D, out, H * D);
    }

    AttentionKernels kernels_;
    const T *q_, *k_, *v_;
    Shape shape_;
    T* out_;
    int64_t key_block_, query_block_, query_blocks_;
};

template <typename T, typename W>
void run(const AttentionKernels& kernels, const void* q, const void* k, const void* v, const Shape& shape, void* out,
         int threads) {
    Attention<T, W>(kernels, static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), shape,
                    static_cast<T*>(out))
        .run(threads);
}

}  // namespace

void scale_attention(const void* q, const void* k_cache, const void* v_cache, Type type, int64_t R, int64_t l,
                     int64_t H, int64_t D, int64_t length, int64_t capacity, void* out, int threads) {
    const AttentionKernels kernels = choose_kernels(type);
    const Shape shape{R, l, H, D, length, capacity};
    const auto chosen = type == Type::f32               ? run<float, float>
                        : kernels.operand == Type::bf16 ? run<bf16, bf16>
                                                        : run<bf16, float>;
    chosen(kernels, q, k_cache, v_cache, shape, out, threads);
}

}  // namespace var_fast::cpu
