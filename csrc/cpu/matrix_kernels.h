// The building blocks of linear.cpp and conv3x3.cpp for each instruction set: namespaces portable, avx2, avx512 with
// LANES, COLUMNS, MOST_ROWS, tile, pack_columns and pack_rows (matrix_tile.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "convert.h"
#include "isa.h"

#ifdef VAR_FAST_X86
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 about its own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace var_fast::cpu {
namespace {

namespace portable {
#define VAR_FAST_TARGET
typedef float Vector __attribute__((vector_size(16)));
constexpr int LANES = 4, VECTORS = 2, MOST_ROWS = 4, UNROLL = 1;
inline Vector zero() { return Vector{}; }
inline Vector load(const float* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }
inline Vector everywhere(float a) { return Vector{a, a, a, a}; }
inline Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
inline Vector minus_fma(Vector a, Vector b, Vector c) { return c - a * b; }
inline Vector add(Vector a, Vector b) { return a + b; }
inline Vector subtract(Vector a, Vector b) { return a - b; }
inline Vector multiply(Vector a, Vector b) { return a * b; }
// (LANES rows of `stride`, LANES) of float32, bfloat16 or float16 -> (LANES rows of `to_stride`, LANES), written in order
template <class From>
inline void transpose(const From* from, int64_t stride, float* to, int64_t to_stride) {
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < LANES; ++j) to[i * to_stride + j] = to_float(from[j * stride + i]);
}
#include "matrix_tile.h"
#undef VAR_FAST_TARGET
}  // namespace portable

#ifdef VAR_FAST_X86
VAR_FAST_INLINE_AVX2 __m128 four(const float* p) { return _mm_loadu_ps(p); }
VAR_FAST_INLINE_AVX2 __m128 four(const bf16* p) {
    const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16));
}
VAR_FAST_INLINE_AVX2 __m128 four(const f16* p) {
    return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

namespace avx2 {
#define VAR_FAST_TARGET VAR_FAST_AVX2
using Vector = __m256;
constexpr int LANES = 8, VECTORS = 2, MOST_ROWS = 6, UNROLL = 4;  // 12 sums, 2 columns, 1 row of 16 registers
VAR_FAST_TARGET inline Vector zero() { return _mm256_setzero_ps(); }
VAR_FAST_TARGET inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
VAR_FAST_TARGET inline void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
VAR_FAST_TARGET inline Vector everywhere(float a) { return _mm256_set1_ps(a); }
VAR_FAST_TARGET inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
VAR_FAST_TARGET inline Vector minus_fma(Vector a, Vector b, Vector c) { return _mm256_fnmadd_ps(a, b, c); }
VAR_FAST_TARGET inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
VAR_FAST_TARGET inline Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
VAR_FAST_TARGET inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
template <class From>
VAR_FAST_TARGET inline void transpose(const From* from, int64_t stride, float* to, int64_t to_stride) {
#pragma GCC unroll 2
    for (int k = 0; k < LANES; k += 4) {
        __m256d half[4];
        __m256 row[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
            row[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(four(from + i * stride + k)),
                                          four(from + (4 + i) * stride + k), 1);
        half[0] = _mm256_castps_pd(_mm256_unpacklo_ps(row[0], row[1]));
        half[1] = _mm256_castps_pd(_mm256_unpackhi_ps(row[0], row[1]));
        half[2] = _mm256_castps_pd(_mm256_unpacklo_ps(row[2], row[3]));
        half[3] = _mm256_castps_pd(_mm256_unpackhi_ps(row[2], row[3]));
        store(to, _mm256_castpd_ps(_mm256_unpacklo_pd(half[0], half[2])));
        store(to += to_stride, _mm256_castpd_ps(_mm256_unpackhi_pd(half[0], half[2])));
        store(to += to_stride, _mm256_castpd_ps(_mm256_unpacklo_pd(half[1], half[3])));
        store(to += to_stride, _mm256_castpd_ps(_mm256_unpackhi_pd(half[1], half[3])));
        to += to_stride;
    }
}
#include "matrix_tile.h"
#undef VAR_FAST_TARGET
}  // namespace avx2

namespace avx512 {
#define VAR_FAST_TARGET VAR_FAST_AVX512
using Vector = __m512;
constexpr int LANES = 16, VECTORS = 2, MOST_ROWS = 14, UNROLL = 1;  // 28 sums, 2 columns, 1 row of 32 registers
VAR_FAST_TARGET inline Vector zero() { return _mm512_setzero_ps(); }
VAR_FAST_TARGET inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
VAR_FAST_TARGET inline void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
VAR_FAST_TARGET inline Vector everywhere(float a) {
    Vector v = _mm512_set1_ps(a);
    __asm__("" : "+v"(v));  // else gcc folds the load into each multiplication, twice as many
    return v;
}
VAR_FAST_TARGET inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
VAR_FAST_TARGET inline Vector minus_fma(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }
VAR_FAST_TARGET inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
VAR_FAST_TARGET inline Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
VAR_FAST_TARGET inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
// Groups of four lanes come together while loading, the ports that multiply do half the shuffles of the usual way.
template <class From>
VAR_FAST_TARGET inline void transpose(const From* from, int64_t stride, float* to, int64_t to_stride) {
    __asm__("" : "+r"(stride));  // else gcc keeps dozens of offsets, in memory
    __m512 row[4][4];            // [i][j]: k = 4j ... 4j + 3 of rows i, i + 4, i + 8, i + 12
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, from += stride) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) row[i][j] = _mm512_castps128_ps512(four(from + 4 * j));
        const From* p = from + 4 * stride;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
            row[i][j] = _mm512_mask_broadcast_f32x4(row[i][j], 0x00F0, four(p + 4 * j));
        p += 4 * stride;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
            row[i][j] = _mm512_mask_broadcast_f32x4(row[i][j], 0x0F00, four(p + 4 * j));
        p += 4 * stride;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
            row[i][j] = _mm512_mask_broadcast_f32x4(row[i][j], 0xF000, four(p + 4 * j));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j, to += to_stride) {
        const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(row[0][j], row[1][j]));
        const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(row[0][j], row[1][j]));
        const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(row[2][j], row[3][j]));
        const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(row[2][j], row[3][j]));
        store(to, _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)));
        store(to += to_stride, _mm512_castpd_ps(_mm512_unpackhi_pd(a, c)));
        store(to += to_stride, _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)));
        store(to += to_stride, _mm512_castpd_ps(_mm512_unpackhi_pd(b, d)));
    }
}
#include "matrix_tile.h"
#undef VAR_FAST_TARGET
}  // namespace avx512
#endif

}  // namespace
}  // namespace var_fast::cpu
