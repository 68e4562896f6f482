// The running softmax with AVX-512, 16 rows at a time: what is known of a row is one lane of a vector.
#pragma once

#include "attention_kernels.h"
#include "intrinsics.h"

namespace var_fast::cpu {

template <int TERMS>
VAR_FAST_AVX512 inline __m512 exp2_of(__m512 x, const float (&polynomial)[TERMS]) {  // x <= 0
    x = _mm512_max_ps(x, _mm512_set1_ps(EXP2_LEAST));
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
    __m512 y = _mm512_set1_ps(polynomial[TERMS - 1]);
#pragma GCC unroll 8
    for (int power = TERMS - 2; power >= 0; --power) y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(polynomial[power]));
    return _mm512_scalef_ps(y, x);  // times 2^floor(x)
}

struct Sum {
    VAR_FAST_AVX512 static __m512 of(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
};
struct Largest {
    VAR_FAST_AVX512 static __m512 of(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
};

// Lane i of the result combines all lanes of x[i].
template <class Combine>
VAR_FAST_AVX512 inline __m512 across(const __m512 (&x)[16]) {
    __m512 pairs[8], fours[4], halves[2];
    for (int i = 0; i < 8; ++i) {  // rows i and i + 8 share a vector from here on: 8 lanes each
        const __m512 low = _mm512_shuffle_f32x4(x[i], x[i + 8], 0x44);
        const __m512 high = _mm512_shuffle_f32x4(x[i], x[i + 8], 0xee);
        pairs[i] = Combine::of(low, high);
    }
    for (int i = 0; i < 4; ++i) {  // 128 bits for each of rows i, i + 4, i + 8, i + 12
        const __m512 low = _mm512_shuffle_f32x4(pairs[i], pairs[i + 4], 0x88);
        const __m512 high = _mm512_shuffle_f32x4(pairs[i], pairs[i + 4], 0xdd);
        fours[i] = Combine::of(low, high);  // in the order i, i + 8, i + 4, i + 12
    }
    for (int i = 0; i < 2; ++i)
        halves[i] = Combine::of(_mm512_unpacklo_ps(fours[i], fours[i + 2]), _mm512_unpackhi_ps(fours[i], fours[i + 2]));
    const __m512 low = _mm512_unpacklo_ps(halves[0], halves[1]), high = _mm512_unpackhi_ps(halves[0], halves[1]);
    const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(order, Combine::of(low, high));
}

VAR_FAST_AVX512 inline __m512 largest_of(const float* x, int64_t n) {
    __m512 a = _mm512_set1_ps(-__builtin_inff()), b = a;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        a = _mm512_max_ps(a, _mm512_loadu_ps(x + i));
        b = _mm512_max_ps(b, _mm512_loadu_ps(x + i + 16));
    }
    for (; i < n; i += 16) {
        const __mmask16 here = n - i < 16 ? static_cast<__mmask16>((1u << (n - i)) - 1) : 0xffff;
        a = _mm512_mask_max_ps(a, here, a, _mm512_maskz_loadu_ps(here, x + i));
    }
    return _mm512_max_ps(a, b);
}

// weigh(scores of a row, keys, largest): the row's weights in place; lanes of their sum.
template <__m512 (*weigh)(float*, int64_t, float)>
VAR_FAST_AVX512 inline void softmax_of(const Softmax& s) {
    for (int64_t begin = 0; begin < s.rows; begin += 16) {
        const int64_t rows = s.rows - begin < 16 ? s.rows - begin : 16;
        float* scores = s.scores + begin * s.row;
        __m512 lanes[16] = {};
        for (int64_t row = 0; row < rows; ++row) lanes[row] = largest_of(scores + row * s.row, s.keys);
        const __m512 before = _mm512_loadu_ps(s.largest + begin);
        const __m512 largest = _mm512_max_ps(before, across<Largest>(lanes));
        const __mmask16 changed = _mm512_cmp_ps_mask(before, largest, _CMP_NEQ_UQ);
        const __m512 one = _mm512_set1_ps(1);
        const __m512 factor = _mm512_mask_mov_ps(one, changed, exp2_of(_mm512_sub_ps(before, largest), EXP2));
        _mm512_storeu_ps(s.largest + begin, largest);
        _mm512_storeu_ps(s.factor + begin, factor);
        for (int64_t row = 0; row < rows; ++row)
            lanes[row] = weigh(scores + row * s.row, s.keys, s.largest[begin + row]);
        const __m512 total = _mm512_fmadd_ps(_mm512_loadu_ps(s.total + begin), factor, across<Sum>(lanes));
        _mm512_storeu_ps(s.total + begin, total);
    }
}

VAR_FAST_AVX512_BF16 inline __m512 weigh_bf16(float* scores, int64_t keys, float largest) {
    uint16_t* weights = reinterpret_cast<uint16_t*>(scores);  // 32 are written after the 32 scores were read
    const __m512 shift = _mm512_set1_ps(largest);
    __m512 sum_0 = _mm512_setzero_ps(), sum_1 = sum_0;
    int64_t key = 0;
    for (; key + 32 <= keys; key += 32) {
        const __m512 weight_0 = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(scores + key), shift), EXP2_SHORT);
        const __m512 weight_1 = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(scores + key + 16), shift), EXP2_SHORT);
        sum_0 = _mm512_add_ps(sum_0, weight_0);
        sum_1 = _mm512_add_ps(sum_1, weight_1);
        _mm512_storeu_si512(weights + key, (__m512i)_mm512_cvtne2ps_pbh(weight_1, weight_0));
    }
    if (key < keys) {
        const uint32_t mask = (1u << (keys - key)) - 1;
        const __mmask16 mask_0 = static_cast<__mmask16>(mask), mask_1 = static_cast<__mmask16>(mask >> 16);
        const __m512 x_0 = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask_0, scores + key), shift);
        const __m512 x_1 = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask_1, scores + key + 16), shift);
        const __m512 weight_0 = _mm512_maskz_mov_ps(mask_0, exp2_of(x_0, EXP2_SHORT));
        const __m512 weight_1 = _mm512_maskz_mov_ps(mask_1, exp2_of(x_1, EXP2_SHORT));
        sum_0 = _mm512_add_ps(sum_0, weight_0);
        sum_1 = _mm512_add_ps(sum_1, weight_1);
        _mm512_storeu_si512(weights + key, (__m512i)_mm512_cvtne2ps_pbh(weight_1, weight_0));
    }
    return _mm512_add_ps(sum_0, sum_1);
}

}  // namespace var_fast::cpu
