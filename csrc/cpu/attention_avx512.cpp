// scale_attention's inner loops with AVX-512, in float32 and with vdpbf16ps on pairs of bfloat16.
#include "attention_kernels.h"
#include "intrinsics.h"

#ifdef VAR_FAST_X86
#include <algorithm>
#include <cstring>

#include "attention_softmax_avx512.h"

namespace var_fast::cpu {
namespace {

constexpr int ROWS = 6, COLUMNS = 4;  // 24 sums, four of b and one of a in 32 registers
constexpr int64_t DEPTH = 128;        // steps (pairs) of b's four columns that stay in the first-level cache: 32 KB

// Both types step through 32-bit words: a float32 number, or a pair of bfloat16. All loops over sums are unrolled, else the
// sums live in memory.
template <int M, int N>
VAR_FAST_AVX512 void tile_f32(const float* a, int64_t a_row, const float* b, int64_t b_step, int64_t b_column, float* c,
                              int64_t c_row, int64_t depth, bool add) {
    __m512 sum[M][N];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] = add ? _mm512_loadu_ps(c + m * c_row + 16 * n) : _mm512_setzero_ps();
    for (int64_t step = 0; step < depth; ++step, b += b_step) {
        __m512 of_b[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) of_b[n] = _mm512_loadu_ps(b + n * b_column);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            const __m512 of_a = _mm512_set1_ps(a[m * a_row + step]);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[m][n] = _mm512_fmadd_ps(of_a, of_b[n], sum[m][n]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) _mm512_storeu_ps(c + m * c_row + 16 * n, sum[m][n]);
}

template <int M, int N>
VAR_FAST_AVX512_BF16 void tile_bf16(const float* a, int64_t a_row, const float* b, int64_t b_step, int64_t b_column,
                                    float* c, int64_t c_row, int64_t depth, bool add) {
    __m512 sum[M][N];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] = add ? _mm512_loadu_ps(c + m * c_row + 16 * n) : _mm512_setzero_ps();
    for (int64_t step = 0; step < depth; ++step, b += b_step) {
        __m512bh of_b[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) of_b[n] = (__m512bh)_mm512_loadu_si512(b + n * b_column);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            int32_t pair;
            std::memcpy(&pair, a + m * a_row + step, 4);
            const __m512bh of_a = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], of_a, of_b[n]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) _mm512_storeu_ps(c + m * c_row + 16 * n, sum[m][n]);
}

using Tile = decltype(&tile_f32<1, 1>);

#define VAR_FAST_TILES(tile, m) {tile<m, 1>, tile<m, 2>, tile<m, 3>, tile<m, 4>}
#define VAR_FAST_ALL_TILES(tile)                                                                               \
    {VAR_FAST_TILES(tile, 1), VAR_FAST_TILES(tile, 2), VAR_FAST_TILES(tile, 3),                               \
     VAR_FAST_TILES(tile, 4), VAR_FAST_TILES(tile, 5), VAR_FAST_TILES(tile, 6)}
constexpr Tile TILES_F32[ROWS][COLUMNS] = VAR_FAST_ALL_TILES(tile_f32);
constexpr Tile TILES_BF16[ROWS][COLUMNS] = VAR_FAST_ALL_TILES(tile_bf16);

// Strides and depth of p in 32-bit words here.
void product(const Product& p, const Tile (&tiles)[ROWS][COLUMNS]) {
    const auto parts = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
    Ahead ahead(p, parts(p.depth, DEPTH) * parts(p.columns, COLUMNS) * parts(p.rows, ROWS));
    for (int64_t begin = 0; begin < p.depth; begin += DEPTH) {
        const int64_t depth = std::min(DEPTH, p.depth - begin);
        for (int64_t column = 0; column < p.columns; column += COLUMNS) {
            const int64_t columns = std::min<int64_t>(COLUMNS, p.columns - column);
            const float* b = static_cast<const float*>(p.b) + column * p.b_column + begin * p.b_step;
            for (int64_t row = 0; row < p.rows; row += ROWS) {
                ahead.step();
                tiles[std::min<int64_t>(ROWS, p.rows - row) - 1][columns - 1](
                    static_cast<const float*>(p.a) + row * p.a_row + begin, p.a_row, b, p.b_step, p.b_column,
                    p.c + row * p.c_row + 16 * column, p.c_row, depth, p.add || begin > 0);
            }
        }
    }
}

void product_f32(const Product& p) { product(p, TILES_F32); }

void product_bf16(const Product& p) {
    Product words = p;
    words.a_row /= 2, words.b_step /= 2, words.b_column /= 2, words.depth /= 2;
    product(words, TILES_BF16);
}

VAR_FAST_AVX512 __m512 weigh_f32(float* scores, int64_t keys, float largest) {
    const __m512 shift = _mm512_set1_ps(largest);
    __m512 sum = _mm512_setzero_ps();
    int64_t key = 0;
    for (; key + 16 <= keys; key += 16) {
        const __m512 weight = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(scores + key), shift), EXP2);
        _mm512_storeu_ps(scores + key, weight);
        sum = _mm512_add_ps(sum, weight);
    }
    if (key < keys) {
        const __mmask16 mask = static_cast<__mmask16>((1u << (keys - key)) - 1);
        const __m512 weight = exp2_of(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + key), shift), EXP2);
        _mm512_mask_storeu_ps(scores + key, mask, weight);
        sum = _mm512_add_ps(sum, _mm512_maskz_mov_ps(mask, weight));
    }
    return sum;
}

VAR_FAST_AVX512 void softmax_f32(const Softmax& s) { softmax_of<weigh_f32>(s); }
VAR_FAST_AVX512_BF16 void softmax_bf16(const Softmax& s) { softmax_of<weigh_bf16>(s); }

}  // namespace

AttentionKernels attention_avx512() { return {product_f32, softmax_f32, Type::f32, 48, 512, nullptr, nullptr}; }

AttentionKernels attention_avx512_bf16() { return {product_bf16, softmax_bf16, Type::bf16, 48, 512, nullptr, nullptr}; }

}  // namespace var_fast::cpu
#endif
