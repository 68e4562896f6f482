// Parts of the softmax that the AVX-512 kernels share; softmax_to_bf16 is that of AVX512-BF16 and AMX.
#pragma once

#include <limits>

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

VAR_FAST_AVX512 inline float largest_of(const float* x, int64_t n, float start) {
    __m512 a = _mm512_set1_ps(start), b = a;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        a = _mm512_max_ps(a, _mm512_loadu_ps(x + i));
        b = _mm512_max_ps(b, _mm512_loadu_ps(x + i + 16));
    }
    for (; i < n; i += 16) {
        const __mmask16 here = n - i < 16 ? static_cast<__mmask16>((1u << (n - i)) - 1) : 0xffff;
        a = _mm512_mask_max_ps(a, here, a, _mm512_maskz_loadu_ps(here, x + i));
    }
    return _mm512_reduce_max_ps(_mm512_max_ps(a, b));
}

VAR_FAST_AVX512 inline void advance(const Softmax& s, int64_t row, float largest, float sum) {
    s.factor[row] = _mm512_cvtss_f32(exp2_of(_mm512_set1_ps(s.largest[row] - largest), EXP2));
    s.total[row] = s.total[row] * s.factor[row] + sum;
    s.largest[row] = largest;
}

VAR_FAST_AVX512_BF16 inline void softmax_to_bf16(const Softmax& s) {
    const int64_t whole = s.keys / 32 * 32, left = s.keys - whole;
    const __mmask16 tail_0 = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const __mmask16 tail_1 = left <= 16 ? 0 : static_cast<__mmask16>((1u << (left - 16)) - 1);
    for (int64_t row = 0; row < s.rows; ++row) {
        float* scores = s.scores + row * s.row;
        uint16_t* weights = reinterpret_cast<uint16_t*>(scores);  // 32 are written after the 32 scores were read
        const float largest = largest_of(scores, s.keys, s.largest[row]);
        const __m512 shift = _mm512_set1_ps(largest);
        __m512 sum_0 = _mm512_setzero_ps(), sum_1 = sum_0;
        for (int64_t key = 0; key < whole; key += 32) {
            const __m512 weight_0 = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(scores + key), shift), EXP2_SHORT);
            const __m512 weight_1 = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(scores + key + 16), shift), EXP2_SHORT);
            sum_0 = _mm512_add_ps(sum_0, weight_0);
            sum_1 = _mm512_add_ps(sum_1, weight_1);
            _mm512_storeu_si512(weights + key, (__m512i)_mm512_cvtne2ps_pbh(weight_1, weight_0));
        }
        if (left) {
            const __m512 x_0 = _mm512_sub_ps(_mm512_maskz_loadu_ps(tail_0, scores + whole), shift);
            const __m512 x_1 = _mm512_sub_ps(_mm512_maskz_loadu_ps(tail_1, scores + whole + 16), shift);
            const __m512 weight_0 = _mm512_maskz_mov_ps(tail_0, exp2_of(x_0, EXP2_SHORT));
            const __m512 weight_1 = _mm512_maskz_mov_ps(tail_1, exp2_of(x_1, EXP2_SHORT));
            sum_0 = _mm512_add_ps(sum_0, weight_0);
            sum_1 = _mm512_add_ps(sum_1, weight_1);
            _mm512_storeu_si512(weights + whole, (__m512i)_mm512_cvtne2ps_pbh(weight_1, weight_0));
        }
        advance(s, row, largest, _mm512_reduce_add_ps(_mm512_add_ps(sum_0, sum_1)));
    }
}

}  // namespace var_fast::cpu
