// pyramid_update on the CPU. Inside, maps are channels last, so that a vector holds channels of one pixel: codes are
// rows of the codebook already, interpolation is a sum of scaled vectors, phi a product of nine C x C matrices.
#pragma GCC optimize("fp-contract=fast")

#include <algorithm>
#include <cmath>
#include <vector>

#include "convert.h"
#include "intrinsics.h"
#include "isa.h"
#include "parallel.h"

namespace var_fast::cpu {
namespace {

constexpr int64_t LANES = 16;  // channels are padded to a multiple of it

// Bicubic interpolation of one axis (A = -0.75, align_corners false): 4 places in the source and their weights.
struct Taps {
    int64_t place[4];
    float weight[4];
};

std::vector<Taps> bicubic_taps(int64_t from, int64_t to) {
    constexpr double A = -0.75;
    const auto near = [](double x) { return ((A + 2) * x - (A + 3)) * x * x + 1; };          // |x| <= 1
    const auto far = [](double x) { return ((A * x - 5 * A) * x + 8 * A) * x - 4 * A; };     // 1 < |x| < 2
    std::vector<Taps> taps(to);
    for (int64_t i = 0; i < to; ++i) {
        const double source = (i + 0.5) * static_cast<double>(from) / static_cast<double>(to) - 0.5;
        const double base = std::floor(source), t = source - base;
        const double weights[4] = {far(t + 1), near(t), near(1 - t), far(2 - t)};
        for (int k = 0; k < 4; ++k) {
            taps[i].place[k] = std::clamp<int64_t>(static_cast<int64_t>(base) - 1 + k, 0, from - 1);
            taps[i].weight[k] = static_cast<float>(weights[k]);
        }
    }
    return taps;
}

// to[0..n) = the weighted sum of four vectors.
struct Blend {
    VAR_FAST_INLINE static void run(const float* const* from, const float* weight, int64_t n, float* __restrict to) {
        const float *__restrict a = from[0], *__restrict b = from[1], *__restrict c = from[2], *__restrict d = from[3];
        const float wa = weight[0], wb = weight[1], wc = weight[2], wd = weight[3];
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = wa * a[i] + wb * b[i] + wc * c[i] + wd * d[i];
    }
};

// phi over one row of pixels: out (w, padded) = bias + sum over 9 taps and `C` inputs. `in` is the row above, with a
// pixel of zeros at both ends of all rows; weight is [tap][input][padded output].
struct PhiRow {
    const float *in, *weight, *bias;
    int64_t in_stride, w, C, padded;
};

struct PhiPlain {
    VAR_FAST_INLINE static void run(const PhiRow* row, float* __restrict out) {
        const int64_t C = row->C, padded = row->padded;
        for (int64_t x = 0; x < row->w; ++x, out += padded) {
            const float* __restrict bias = row->bias;
            for (int64_t o = 0; o < padded; ++o) out[o] = bias[o];
            const float* __restrict weight = row->weight;
            for (int64_t ky = 0; ky < 3; ++ky) {
                for (int64_t kx = 0; kx < 3; ++kx) {
                    const float* __restrict in = row->in + ky * row->in_stride + (x + kx) * padded;
                    for (int64_t i = 0; i < C; ++i, weight += padded) {
                        const float value = in[i];
#pragma omp simd
                        for (int64_t o = 0; o < padded; ++o) out[o] += value * weight[o];
                    }
                }
            }
        }
    }
};

#ifdef VAR_FAST_X86
// PIXELS x 32 outputs in registers: each weight loaded is used PIXELS times. `mask` is of the second 16 outputs.
template <int PIXELS, bool BOTH>
VAR_FAST_INLINE_AVX512 void phi_tile_avx512(const PhiRow& row, int64_t x, int64_t o, float* out) {
    const int64_t padded = row.padded;
    __m512 low[PIXELS], high[PIXELS];
#pragma GCC unroll 16
    for (int p = 0; p < PIXELS; ++p) {
        low[p] = _mm512_loadu_ps(row.bias + o);
        if (BOTH) high[p] = _mm512_loadu_ps(row.bias + o + 16);
    }
    const float* weight = row.weight + o;
    for (int64_t ky = 0; ky < 3; ++ky)
        for (int64_t kx = 0; kx < 3; ++kx) {
            const float* in = row.in + ky * row.in_stride + (x + kx) * padded;
            for (int64_t i = 0; i < row.C; ++i, ++in, weight += padded) {
                const __m512 w_low = _mm512_loadu_ps(weight);
                const __m512 w_high = BOTH ? _mm512_loadu_ps(weight + 16) : w_low;
#pragma GCC unroll 16
                for (int p = 0; p < PIXELS; ++p) {
                    const __m512 value = _mm512_set1_ps(in[p * padded]);
                    low[p] = _mm512_fmadd_ps(value, w_low, low[p]);
                    if (BOTH) high[p] = _mm512_fmadd_ps(value, w_high, high[p]);
                }
            }
        }
#pragma GCC unroll 16
    for (int p = 0; p < PIXELS; ++p) {
        _mm512_storeu_ps(out + (x + p) * padded + o, low[p]);
        if (BOTH) _mm512_storeu_ps(out + (x + p) * padded + o + 16, high[p]);
    }
}

template <bool BOTH>
VAR_FAST_INLINE_AVX512 void phi_outputs_avx512(const PhiRow& row, int64_t o, float* out) {
    int64_t x = 0;
    for (; x + 8 <= row.w; x += 8) phi_tile_avx512<8, BOTH>(row, x, o, out);
    for (; x + 4 <= row.w; x += 4) phi_tile_avx512<4, BOTH>(row, x, o, out);
    for (; x < row.w; ++x) phi_tile_avx512<1, BOTH>(row, x, o, out);
}

VAR_FAST_AVX512 void phi_row_avx512(const PhiRow& row, float* out) {
    int64_t o = 0;
    for (; o + 32 <= row.padded; o += 32) phi_outputs_avx512<true>(row, o, out);
    if (o < row.padded) phi_outputs_avx512<false>(row, o, out);
}

template <int PIXELS>
VAR_FAST_INLINE_AVX2 void phi_tile_avx2(const PhiRow& row, int64_t x, int64_t o, float* out) {
    const int64_t padded = row.padded;
    __m256 low[PIXELS], high[PIXELS];
#pragma GCC unroll 8
    for (int p = 0; p < PIXELS; ++p) {
        low[p] = _mm256_loadu_ps(row.bias + o);
        high[p] = _mm256_loadu_ps(row.bias + o + 8);
    }
    const float* weight = row.weight + o;
    for (int64_t ky = 0; ky < 3; ++ky)
        for (int64_t kx = 0; kx < 3; ++kx) {
            const float* in = row.in + ky * row.in_stride + (x + kx) * padded;
            for (int64_t i = 0; i < row.C; ++i, ++in, weight += padded) {
                const __m256 w_low = _mm256_loadu_ps(weight), w_high = _mm256_loadu_ps(weight + 8);
#pragma GCC unroll 8
                for (int p = 0; p < PIXELS; ++p) {
                    const __m256 value = _mm256_broadcast_ss(in + p * padded);
                    low[p] = _mm256_fmadd_ps(value, w_low, low[p]);
                    high[p] = _mm256_fmadd_ps(value, w_high, high[p]);
                }
            }
        }
#pragma GCC unroll 8
    for (int p = 0; p < PIXELS; ++p) {
        _mm256_storeu_ps(out + (x + p) * padded + o, low[p]);
        _mm256_storeu_ps(out + (x + p) * padded + o + 8, high[p]);
    }
}

VAR_FAST_AVX2 void phi_row_avx2(const PhiRow& row, float* out) {
    for (int64_t o = 0; o < row.padded; o += LANES) {
        int64_t x = 0;
        for (; x + 6 <= row.w; x += 6) phi_tile_avx2<6>(row, x, o, out);
        for (; x < row.w; ++x) phi_tile_avx2<1>(row, x, o, out);
    }
}
#endif

void phi_row(const PhiRow& row, float* out) {
#ifdef VAR_FAST_X86
    if (isa() >= Isa::avx512) return phi_row_avx512(row, out);
    if (isa() >= Isa::avx2) return phi_row_avx2(row, out);
#endif
    PhiPlain::run(&row, out);
}

// f[c][pixel] += map[pixel][c], and the sum into map too; both run over n pixels.
void add_transposed(float* __restrict f, float* __restrict map, int64_t plane, int64_t n, int64_t C, int64_t padded) {
    for (int64_t c = 0; c < C; ++c)
        for (int64_t p = 0; p < n; ++p) map[p * padded + c] = f[c * plane + p] += map[p * padded + c];
}

struct Add {
    VAR_FAST_INLINE static void run(const float* __restrict from, int64_t n, float* __restrict to) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] += from[i];
    }
};

struct Scale {
    VAR_FAST_INLINE static void run(float* __restrict x, float factor, int64_t n) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) x[i] *= factor;
    }
};

class Update {
public:
    Update(const int64_t* idx, const float* codes, const float* codebook, const float* phi_weight,
           const float* phi_bias, float phi_ratio, float* f_hat, int64_t C, int64_t h, int64_t w, int64_t pn,
           int64_t pn_next, float* next_map)
        : idx_(idx), codes_(codes), codebook_(codebook), f_hat_(f_hat), next_map_(next_map), C_(C),
          padded_((C + LANES - 1) / LANES * LANES), h_(h), w_(w), pn_(pn), pn_next_(pn_next), has_phi_(phi_weight),
          rows_of_(bicubic_taps(pn, h)), columns_of_(bicubic_taps(pn, w)) {
        if (has_phi_) pack(phi_weight, phi_bias, phi_ratio);
    }

    int64_t padded() const { return padded_; }

    // Rows [begin, end) of one image's f_hat; sum (h, w, padded) gets them channels last.
    void update(int64_t image, int64_t begin, int64_t end, float* sum) {
        const int64_t width = (w_ + 2) * padded_;
        // rows begin - 1 to end of the map at full size, zeros around it, where phi needs them
        std::vector<float> full((end - begin + 2) * width), wide(4 * w_ * padded_);
        std::vector<int64_t> held(4, -1);  // which rows of the source `wide` holds, stretched to full width
        for (int64_t y = std::max<int64_t>(begin - has_phi_, 0); y < std::min(end + has_phi_, h_); ++y) {
            const float* from[4];
            for (int k = 0; k < 4; ++k) from[k] = stretched(image, rows_of_[y].place[k], held, wide);
            dispatch<Blend>(static_cast<const float* const*>(from), static_cast<const float*>(rows_of_[y].weight),
                            w_ * padded_, full.data() + (y - begin + 1) * width + padded_);
        }
        for (int64_t y = begin; y < end; ++y) {
            float* out = sum + y * w_ * padded_;
            const float* in = full.data() + (y - begin) * width;
            if (has_phi_)
                phi_row({in, weight_.data(), bias_.data(), width, w_, C_, padded_}, out);
            else
                std::copy_n(in + width + padded_, w_ * padded_, out);
            add_transposed(f_hat_ + image * C_ * h_ * w_ + y * w_, out, h_ * w_, w_, C_, padded_);
        }
    }

    // Rows [begin, end) of the next map of one image: means over the areas of `sum` (adaptive average pooling).
    void shrink(int64_t image, int64_t begin, int64_t end, const float* sum) const {
        const int64_t n = pn_next_;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t top = i * h_ / n, bottom = ((i + 1) * h_ + n - 1) / n;
            for (int64_t j = 0; j < n; ++j) {
                const int64_t left = j * w_ / n, right = ((j + 1) * w_ + n - 1) / n;
                float* out = next_map_ + ((image * n + i) * n + j) * C_;
                std::fill_n(out, C_, 0.0f);
                for (int64_t y = top; y < bottom; ++y)
                    for (int64_t x = left; x < right; ++x) dispatch<Add>(sum + (y * w_ + x) * padded_, C_, out);
                dispatch<Scale>(out, 1.0f / static_cast<float>((bottom - top) * (right - left)), C_);
            }
        }
    }

private:
    // (1 - ratio) x + ratio conv(x) as one convolution.
    void pack(const float* weight, const float* bias, float ratio) {
        weight_.assign(9 * C_ * padded_, 0.0f);
        bias_.assign(padded_, 0.0f);
        for (int64_t o = 0; o < C_; ++o) {
            for (int64_t i = 0; i < C_; ++i)
                for (int64_t tap = 0; tap < 9; ++tap)
                    weight_[(tap * C_ + i) * padded_ + o] =
                        ratio * weight[(o * C_ + i) * 9 + tap] + (tap == 4 && i == o ? 1 - ratio : 0.0f);
            bias_[o] = bias ? ratio * bias[o] : 0.0f;
        }
    }

    // A row of the source map, stretched to width w: from `wide` where one of its four places holds it.
    const float* stretched(int64_t image, int64_t row, std::vector<int64_t>& held, std::vector<float>& wide) const {
        float* out = wide.data() + row % 4 * w_ * padded_;
        if (held[row % 4] == row) return out;
        held[row % 4] = row;
        for (int64_t x = 0; x < w_; ++x) {
            const float* from[4];
            for (int k = 0; k < 4; ++k) from[k] = code(image, row * pn_ + columns_of_[x].place[k]);
            dispatch<Blend>(static_cast<const float* const*>(from), static_cast<const float*>(columns_of_[x].weight),
                            C_, out + x * padded_);
        }
        return out;
    }

    const float* code(int64_t image, int64_t token) const {
        const int64_t at = image * pn_ * pn_ + token;
        return idx_ ? codebook_ + idx_[at] * C_ : codes_ + at * C_;
    }

    const int64_t* idx_;
    const float *codes_, *codebook_;
    float *f_hat_, *next_map_;
    const int64_t C_, padded_, h_, w_, pn_, pn_next_;
    const bool has_phi_;
    const std::vector<Taps> rows_of_, columns_of_;
    std::vector<float> weight_, bias_;
};

}  // namespace

void pyramid_update(const int64_t* idx, const float* codes, const float* codebook, const float* phi_weight,
                    const float* phi_bias, float phi_ratio, float* f_hat, int64_t B, int64_t C, int64_t h, int64_t w,
                    int64_t pn, int64_t pn_next, float* next_map, int threads) {
    if (B * C * h * w == 0) return;
    Update update(idx, codes, codebook, phi_weight, phi_bias, phi_ratio, f_hat, C, h, w, pn, pn_next, next_map);
    const int64_t map = h * w * update.padded();
    if (B >= threads) {
        parallel_for(B, threads, 1, [&](int64_t begin, int64_t end) {
            std::vector<float> sum(map);
            for (int64_t image = begin; image < end; ++image) {
                update.update(image, 0, h, sum.data());
                update.shrink(image, 0, pn_next, sum.data());
            }
        });
        return;
    }
    std::vector<float> sum(map);
    for (int64_t image = 0; image < B; ++image) {
        parallel_for(h, threads, 4, [&](int64_t begin, int64_t end) { update.update(image, begin, end, sum.data()); });
        update.shrink(image, 0, pn_next, sum.data());
    }
}

}  // namespace var_fast::cpu
