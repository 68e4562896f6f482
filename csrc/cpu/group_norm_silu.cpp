// group_norm_silu on the CPU, channels last: a pass that sums blocks of pixels per channel, and one that applies
// y = silu((x - near) a + b). The blocks and the order in which they are added do not depend on the threads.
#pragma GCC optimize("fp-contract=fast", "finite-math-only", "no-signed-zeros")  // see math.h

#include <cmath>
#include <type_traits>
#include <vector>

#include "math.h"
#include "parallel.h"

namespace var_fast::cpu {
namespace {

constexpr int64_t BLOCK = 256;  // pixels summed in float32 before they go into a double

// sums[0..C) and sums[C..2C): of x - near and of its square, over n pixels.
template <class X>
struct Sums {
    VAR_FAST_INLINE static void run(const X* __restrict x, const float* __restrict near, int64_t n, int64_t C,
                                    float* __restrict sums) {
        float* __restrict squares = sums + C;
        for (int64_t c = 0; c < 2 * C; ++c) sums[c] = 0;
        int64_t pixel = 0;
        for (; pixel + 4 <= n; pixel += 4, x += 4 * C) {
#pragma omp simd
            for (int64_t c = 0; c < C; ++c) {
                const float d0 = to_float(x[c]) - near[c], d1 = to_float(x[c + C]) - near[c];
                const float d2 = to_float(x[c + 2 * C]) - near[c], d3 = to_float(x[c + 3 * C]) - near[c];
                sums[c] += (d0 + d1) + (d2 + d3);
                squares[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
            }
        }
        for (; pixel < n; ++pixel, x += C) {
#pragma omp simd
            for (int64_t c = 0; c < C; ++c) {
                const float d = to_float(x[c]) - near[c];
                sums[c] += d;
                squares[c] += d * d;
            }
        }
    }
};

struct Coefficients {  // of every channel of one image
    const float *near, *a, *b;
};

template <class X, class Y, bool SILU>
struct Apply {
    VAR_FAST_INLINE static void run(const X* __restrict x, Coefficients of, int64_t n, int64_t C, Y* __restrict y) {
        const float *__restrict near = of.near, *__restrict a = of.a, *__restrict b = of.b;
        for (int64_t pixel = 0; pixel < n; ++pixel, x += C, y += C) {
#pragma omp simd
            for (int64_t c = 0; c < C; ++c) {
                const float normed = (to_float(x[c]) - near[c]) * a[c] + b[c];
                store(y + c, SILU ? silu_of(normed) : normed);
            }
        }
    }
};

#ifdef VAR_FAST_X86
template <class X, class Y, bool SILU, bool CONVERTS>
VAR_FAST_AVX512 void apply_avx512(const X* x, Coefficients of, int64_t n, int64_t C, Y* y) {
    constexpr bool HALF = std::is_same_v<Y, bf16>;
    constexpr int64_t PIXELS = 8;  // for which a vector of coefficients stays in registers
    for (int64_t pixel = 0; pixel < n; pixel += PIXELS) {
        const int64_t end = pixel + PIXELS < n ? pixel + PIXELS : n;
        for (int64_t c = 0; c < C; c += 16) {
            const __mmask16 mask = C - c >= 16 ? 0xffff : static_cast<__mmask16>((1u << (C - c)) - 1);
            const __m512 near = load_avx512(of.near + c, mask), a = load_avx512(of.a + c, mask),
                         b = load_avx512(of.b + c, mask);
            for (int64_t p = pixel; p < end; ++p) {
                const __m512 d = _mm512_sub_ps(load_avx512(x + p * C + c, mask), near);
                const __m512 normed = _mm512_fmadd_ps(d, a, b);
                store_avx512<CONVERTS>(y + p * C + c, mask, SILU ? silu_of<HALF>(normed) : normed);
            }
        }
    }
}
#endif

template <class X, class Y, bool SILU>
void apply(const X* x, Coefficients of, int64_t n, int64_t C, Y* y) {
#ifdef VAR_FAST_X86
    if (isa() >= Isa::avx512_bf16) return apply_avx512<X, Y, SILU, true>(x, of, n, C, y);
    if (isa() >= Isa::avx512) return apply_avx512<X, Y, SILU, false>(x, of, n, C, y);
#endif
    dispatch<Apply<X, Y, SILU>>(x, of, n, C, y);
}

template <class X, class Y, bool SILU>
class Image {
public:
    Image(const float* weight, const float* bias, int64_t hw, int64_t C, int64_t groups, float eps)
        : weight_(weight), bias_(bias), hw_(hw), C_(C), groups_(groups), eps_(eps), blocks_((hw + BLOCK - 1) / BLOCK),
          sums_(2 * C * blocks_), coefficients_(3 * C), totals_(2 * C) {}

    void operator()(const X* x, Y* y, int threads) {
        float *near = coefficients_.data(), *a = near + C_, *b = a + C_;
        // Sums of x - near lose nothing where the mean is large against the deviation.
        for (int64_t c = 0; c < C_; ++c) near[c] = to_float(x[c]);
        const int64_t grain = std::max<int64_t>(32768 / (BLOCK * C_), 1);
        parallel_for(blocks_, threads, grain, [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; ++block)
                dispatch<Sums<X>>(x + block * BLOCK * C_, static_cast<const float*>(near), pixels(block), C_,
                                  sums_.data() + 2 * C_ * block);
        });
        solve(near, a, b);
        parallel_for(blocks_, threads, grain, [&](int64_t begin, int64_t end) {
            for (int64_t block = end - 1; block >= begin; --block) {  // what was summed last is still in the cache
                const int64_t offset = block * BLOCK * C_;
                apply<X, Y, SILU>(x + offset, Coefficients{near, a, b}, pixels(block), C_, y + offset);
            }
        });
    }

private:
    int64_t pixels(int64_t block) const { return std::min(BLOCK, hw_ - block * BLOCK); }

    void solve(float* near, float* a, float* b) {
        std::fill(totals_.begin(), totals_.end(), 0.0);
        for (int64_t block = 0; block < blocks_; ++block)
            for (int64_t i = 0; i < 2 * C_; ++i) totals_[i] += sums_[2 * C_ * block + i];
        const int64_t per_group = C_ / groups_;
        const double n = static_cast<double>(hw_);
        for (int64_t first = 0; first < C_; first += per_group) {
            double mean = 0, variance = 0;
            for (int64_t c = first; c < first + per_group; ++c) mean += near[c] + totals_[c] / n;
            mean /= static_cast<double>(per_group);
            for (int64_t c = first; c < first + per_group; ++c) {
                const double off = totals_[c] / n, distance = near[c] + off - mean;
                variance += std::max(totals_[C_ + c] / n - off * off, 0.0) + distance * distance;
            }
            const double rstd = 1 / std::sqrt(variance / static_cast<double>(per_group) + eps_);
            for (int64_t c = first; c < first + per_group; ++c) {
                const double slope = rstd * weight_[c];
                a[c] = static_cast<float>(slope);
                b[c] = static_cast<float>(bias_[c] + (near[c] - mean) * slope);
            }
        }
    }

    const float *weight_, *bias_;
    const int64_t hw_, C_, groups_;
    const double eps_;
    const int64_t blocks_;
    std::vector<float> sums_, coefficients_;
    std::vector<double> totals_;
};

template <class X, class Y, bool SILU>
void run(const X* x, const float* weight, const float* bias, int64_t B, int64_t hw, int64_t C, int64_t groups,
         float eps, Y* y, int threads) {
    // Small images one to a thread, so that the second pass finds them in its cache; large ones shared by all.
    const bool by_image = B >= threads && hw * C * static_cast<int64_t>(sizeof(X)) <= (1 << 20);
    parallel_for(B, by_image ? threads : 1, std::max<int64_t>(32768 / (hw * C), 1), [&](int64_t begin, int64_t end) {
        Image<X, Y, SILU> image(weight, bias, hw, C, groups, eps);
        for (int64_t i = begin; i < end; ++i) image(x + i * hw * C, y + i * hw * C, by_image ? 1 : threads);
    });
}

}  // namespace

void group_norm_silu(const void* x, Type x_type, const float* weight, const float* bias, int64_t B, int64_t hw,
                     int64_t C, int64_t groups, float eps, bool silu, void* y, Type y_type, int threads) {
    if (B * hw * C == 0) return;
    with_element(x_type, [&](auto x_element) {
        with_element(y_type, [&](auto y_element) {
            using X = decltype(x_element);
            using Y = decltype(y_element);
            const auto chosen = silu ? run<X, Y, true> : run<X, Y, false>;
            chosen(static_cast<const X*>(x), weight, bias, B, hw, C, groups, eps, static_cast<Y*>(y), threads);
        });
    });
}

}  // namespace var_fast::cpu
