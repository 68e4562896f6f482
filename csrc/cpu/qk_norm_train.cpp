// qk_norm of training on the CPU, forward and backward: tokens after tokens, a head's channels in the first cache.
#pragma GCC optimize("fp-contract=fast", "no-math-errno")  // nothing here has to round as a reference does, see setup.py

#include <algorithm>
#include <cmath>

#include "buffer.h"
#include "convert.h"
#include "isa.h"
#include "parallel.h"
#include "tiles.h"

namespace var_fast::cpu {
namespace {

constexpr int64_t CHUNK = 64;  // tokens whose dscale is summed at a time
constexpr float SHORTEST = 1e-12f;

template <class T>
VAR_FAST_INLINE float length(const T* __restrict x, int64_t D) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < D; ++d) squares += to_float(x[d]) * to_float(x[d]);
    return std::max(std::sqrt(squares), SHORTEST);
}

template <class T>
struct Forward {
    VAR_FAST_INLINE static void run(const T* x, const float* scale_H, int64_t H, int64_t D, T* q, T* k, int64_t begin,
                                    int64_t end) {
        for (int64_t token = begin; token < end; ++token)
            for (int64_t h = 0; h < H; ++h) {
                const int64_t from = token * 3 * H * D + h * D, to = (token * H + h) * D;
                head(x + from, scale_H[h], D, q + to);
                head(x + from + H * D, 1, D, k + to);
            }
    }

    VAR_FAST_INLINE static void head(const T* __restrict x, float scale, int64_t D, T* __restrict y) {
        const float by = scale / length(x, D);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) store(y + d, to_float(x[d]) * by);
    }
};

template <class T>
struct Gradients {
    const T *dq, *dk, *dv;
    const int64_t* strides;
    const T* x;
    const float* scale_H;
    int64_t L, H, D;
    T* dx;
};

template <class T>
struct Backward {
    // Tokens [begin, end) of all; dscale_H is added to.
    VAR_FAST_INLINE static void run(const Gradients<T>* g, int64_t begin, int64_t end, float* dscale_H) {
        const int64_t H = g->H, D = g->D, *s = g->strides;
        for (int64_t token = begin; token < end; ++token) {
            const int64_t b = token / g->L, l = token % g->L;
            for (int64_t h = 0; h < H; ++h) {
                const int64_t at = token * 3 * H * D + h * D;
                dscale_H[h] += head(g->dq + b * s[0] + l * s[1] + h * s[2], g->x + at, g->scale_H[h], D, g->dx + at);
                head(g->dk + b * s[3] + l * s[4] + h * s[5], g->x + at + H * D, 1, D, g->dx + at + H * D);
                std::copy_n(g->dv + b * s[6] + l * s[7] + h * s[8], D, g->dx + at + 2 * H * D);
            }
        }
    }

    // Returns unit x . dy, the gradient of the scale.
    VAR_FAST_INLINE static float head(const T* __restrict dy, const T* __restrict x, float scale, int64_t D,
                                      T* __restrict dx) {
        float squares = 0, along = 0;
#pragma omp simd reduction(+ : squares, along)
        for (int64_t d = 0; d < D; ++d) {
            squares += to_float(x[d]) * to_float(x[d]);
            along += to_float(x[d]) * to_float(dy[d]);
        }
        const float size = std::sqrt(squares), inverse = 1 / std::max(size, SHORTEST);
        along *= inverse;
        const float by = scale * inverse;
        const float back = size > SHORTEST ? along * inverse : 0.0f;  // what is shorter was divided by a constant
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) store(dx + d, by * (to_float(dy[d]) - back * to_float(x[d])));
        return along;
    }
};

}  // namespace

void qk_norm_forward(const void* x, Type type, const float* scale_H, int64_t tokens, int64_t H, int64_t D, void* q,
                     void* k, int threads) {
    with_element(type, [&](auto element) {
        using T = decltype(element);
        parallel_for(tokens, threads, std::max<int64_t>(16384 / std::max<int64_t>(H * D, 1), 1),
                     [&](int64_t begin, int64_t end) {
                         dispatch<Forward<T>>(static_cast<const T*>(x), scale_H, H, D, static_cast<T*>(q),
                                              static_cast<T*>(k), begin, end);
                     });
    });
}

void qk_norm_backward(const void* dq, const void* dk, const void* dv, const int64_t* strides, const void* x, Type type,
                      const float* scale_H, int64_t B, int64_t L, int64_t H, int64_t D, void* dx, float* dscale_H,
                      int threads) {
    const int64_t tokens = B * L, chunks = parts_of(tokens, CHUNK);
    const Buffer sums = buffer(chunks * H);
    std::fill_n(sums.get(), chunks * H, 0.0f);
    with_element(type, [&](auto element) {
        using T = decltype(element);
        const Gradients<T> g{static_cast<const T*>(dq), static_cast<const T*>(dk), static_cast<const T*>(dv), strides,
                             static_cast<const T*>(x),  scale_H, L, H, D, static_cast<T*>(dx)};
        parallel_for(chunks, threads, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                dispatch<Backward<T>>(&g, cut(tokens, chunks, i), cut(tokens, chunks, i + 1), sums.get() + i * H);
        });
    });
    std::fill_n(dscale_H, H, 0.0f);
    for (int64_t i = 0; i < chunks * H; ++i) dscale_H[i % H] += sums.get()[i];
}

}  // namespace var_fast::cpu
