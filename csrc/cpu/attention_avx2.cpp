// scale_attention's inner loops with AVX2 and FMA.
#include "attention_kernels.h"
#include "intrinsics.h"

#ifdef VAR_FAST_X86
#include <algorithm>

namespace var_fast::cpu {
namespace {

constexpr int ROWS = 6;            // 12 sums, two of b and one of a in 16 registers
constexpr int64_t DEPTH = 256;     // steps of b that stay in the first-level cache: 16 KB

template <int M>
VAR_FAST_AVX2 void tile(const float* a, int64_t a_row, const float* b, int64_t b_step, float* c, int64_t c_row,
                        int64_t depth, bool add) {
    __m256 sum[M][2];
#pragma GCC unroll 6  // all loops over sums, else they live in memory
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) sum[m][n] = add ? _mm256_loadu_ps(c + m * c_row + 8 * n) : _mm256_setzero_ps();
    for (int64_t step = 0; step < depth; ++step, b += b_step) {
        const __m256 low = _mm256_loadu_ps(b), high = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            const __m256 factor = _mm256_broadcast_ss(a + m * a_row + step);
            sum[m][0] = _mm256_fmadd_ps(factor, low, sum[m][0]);
            sum[m][1] = _mm256_fmadd_ps(factor, high, sum[m][1]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) _mm256_storeu_ps(c + m * c_row + 8 * n, sum[m][n]);
}

VAR_FAST_AVX2 void product(const Product& p) {
    constexpr decltype(&tile<1>) TILES[] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
    for (int64_t begin = 0; begin < p.depth; begin += DEPTH) {
        const int64_t depth = std::min(DEPTH, p.depth - begin);
        for (int64_t column = 0; column < p.columns; ++column) {
            const float* b = static_cast<const float*>(p.b) + column * p.b_column + begin * p.b_step;
            for (int64_t row = 0; row < p.rows; row += ROWS)
                TILES[std::min<int64_t>(ROWS, p.rows - row) - 1](
                    static_cast<const float*>(p.a) + row * p.a_row + begin, p.a_row, b, p.b_step,
                    p.c + row * p.c_row + 16 * column, p.c_row, depth, p.add || begin > 0);
        }
    }
}

VAR_FAST_AVX2 inline __m256 exp2_of(__m256 x) {  // x <= 0
    x = _mm256_max_ps(x, _mm256_set1_ps(EXP2_LEAST));
    const __m256 floor = _mm256_floor_ps(x);
    const __m256 f = _mm256_sub_ps(x, floor);
    __m256 y = _mm256_set1_ps(EXP2[5]);
    for (int power = 4; power >= 0; --power) y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(EXP2[power]));
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(floor), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
}

template <class Combine>
VAR_FAST_AVX2 inline float across(__m256 x, Combine combine) {
    alignas(32) float lane[8];
    _mm256_store_ps(lane, x);
    for (int half = 4; half > 0; half /= 2)
        for (int j = 0; j < half; ++j) lane[j] = combine(lane[j], lane[j + half]);
    return lane[0];
}

VAR_FAST_AVX2 void softmax(const Softmax& s) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const int64_t whole = s.keys / 8 * 8;
    const __m256i tail = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(s.keys - whole)), lanes);
    for (int64_t row = 0; row < s.rows; ++row) {
        float* scores = s.scores + row * s.row;
        __m256 most = _mm256_set1_ps(s.largest[row]);
        for (int64_t key = 0; key < whole; key += 8) most = _mm256_max_ps(most, _mm256_loadu_ps(scores + key));
        if (whole < s.keys) {
            const __m256 last = _mm256_loadu_ps(scores + whole);
            most = _mm256_max_ps(most, _mm256_blendv_ps(most, last, _mm256_castsi256_ps(tail)));
        }
        const float largest = across(most, [](float a, float b) { return a > b ? a : b; });
        const __m256 shift = _mm256_set1_ps(largest);
        __m256 sum = _mm256_setzero_ps();
        for (int64_t key = 0; key < whole; key += 8) {
            const __m256 weight = exp2_of(_mm256_sub_ps(_mm256_loadu_ps(scores + key), shift));
            _mm256_storeu_ps(scores + key, weight);
            sum = _mm256_add_ps(sum, weight);
        }
        if (whole < s.keys) {
            const __m256 weight = _mm256_and_ps(exp2_of(_mm256_sub_ps(_mm256_loadu_ps(scores + whole), shift)),
                                                _mm256_castsi256_ps(tail));
            _mm256_storeu_ps(scores + whole, weight);
            sum = _mm256_add_ps(sum, weight);
        }
        s.factor[row] =
            s.largest[row] == largest ? 1 : _mm256_cvtss_f32(exp2_of(_mm256_set1_ps(s.largest[row] - largest)));
        s.total[row] = s.total[row] * s.factor[row] + across(sum, [](float a, float b) { return a + b; });
        s.largest[row] = largest;
    }
}

}  // namespace

AttentionKernels attention_avx2() { return {product, softmax, Type::f32, 48, 512, nullptr, nullptr}; }

}  // namespace var_fast::cpu
#endif
