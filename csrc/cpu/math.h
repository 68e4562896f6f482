// exp and the sigmoid, in forms that vectorise. HALF: as exact as a bfloat16 result needs (a relative error of 2^-13).
#pragma once

#include "convert.h"
#include "intrinsics.h"
#include "isa.h"

namespace var_fast::cpu {

// 2^x to 1e-7, x in [-126, 128].
VAR_FAST_INLINE float exp2_of(float x) {
    // adding and taking away 1.5 * 2^23 rounds to an integer, which the sum's low bits hold
    constexpr float ROUND = 12582912.0f;
    const float shifted = x + ROUND;
    const float f = x - (shifted - ROUND);  // in [-1/2, 1/2]; the coefficients are of exp(f ln 2)
    float p = 1.5252734e-5f;
    p = p * f + 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    uint32_t bits, exponent;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 23;
    std::memcpy(&p, &bits, sizeof p);
    return p;
}

// 1 / (1 + 2^t), 0 from t = 128 on: there 2^t comes out as infinity. Compiled with -ffinite-math-only the limits are two
// instructions, else branches that keep the loop from being vectorised. A NaN may come out as a number: callers multiply
// with what t was made of.
VAR_FAST_INLINE float inverse_of_1_plus_exp2(float t) {
    t = t < -100.0f ? -100.0f : t;  // not std::max, which may stay a call where the instruction set differs
    t = t > 128.0f ? 128.0f : t;
    return 1.0f / (1.0f + exp2_of(t));
}

constexpr float LOG2_E = 1.44269504f;

// x sigmoid(x).
VAR_FAST_INLINE float silu_of(float x) { return x * inverse_of_1_plus_exp2(-LOG2_E * x); }

// GELU's tanh form: x (1 + tanh(u)) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
constexpr float GELU_1 = -2 * 0.79788456f * LOG2_E, GELU_3 = 0.044715f * GELU_1;

VAR_FAST_INLINE float gelu_of(float x) { return x * inverse_of_1_plus_exp2(x * (GELU_3 * (x * x) + GELU_1)); }

// Its derivative: with s = sigmoid(2 u), s + x s (1 - s) 2 u'. Beyond 30 it is 0 or 1 to the last bit. A NaN
// may come out as a number: the forward pass has made one of it already.
VAR_FAST_INLINE float gelu_slope_of(float x) {
    x = x < -30.0f ? -30.0f : x;
    x = x > 30.0f ? 30.0f : x;
    const float s = inverse_of_1_plus_exp2(x * (GELU_3 * (x * x) + GELU_1));
    return s - x * s * (1 - s) * ((3 / LOG2_E) * GELU_3 * (x * x) + GELU_1 / LOG2_E);
}

#ifdef VAR_FAST_X86
VAR_FAST_INLINE_AVX512 __m512 load_avx512(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }

VAR_FAST_INLINE_AVX512 __m512 load_avx512(const bf16* from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

// CONVERTS: on a machine with AVX512-BF16, whose instruction rounds sixteen at once (what is denormal becomes 0).
template <bool CONVERTS>
VAR_FAST_INLINE_AVX512 void store_avx512(float* to, __mmask16 mask, __m512 x) {
    _mm512_mask_storeu_ps(to, mask, x);
}

template <bool CONVERTS>
VAR_FAST_INLINE_AVX512 void store_avx512(bf16* to, __mmask16 mask, __m512 x) {
    if (CONVERTS) {
        __m256i halves;  // by its name: as an intrinsic it would need a second version of every function around it
        __asm__("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(x));
        return _mm256_mask_storeu_epi16(to, mask, halves);
    }
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
    rounded = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
    _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

template <bool HALF>
VAR_FAST_INLINE_AVX512 __m512 inverse_of_1_plus_exp2(__m512 t) {
    t = _mm512_max_ps(_mm512_set1_ps(-100), t);  // in this order a NaN stays one
    const __m512 f = _mm512_reduce_ps(t, 1);                             // t - floor(t), in [0, 1)
    __m512 p;
    if (HALF) {
        p = _mm512_fmadd_ps(_mm512_set1_ps(0.078024521f), f, _mm512_set1_ps(0.22606716f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69583356f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999252f));
    } else {
        p = _mm512_fmadd_ps(_mm512_set1_ps(0.0018775767f), f, _mm512_set1_ps(0.0089893406f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.055826318f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24015361f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69315308f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99999994f));
    }
    const __m512 d = _mm512_add_ps(_mm512_set1_ps(1), _mm512_scalef_ps(p, t));  // scalef takes floor(t)
    const __m512 r = _mm512_rcp14_ps(d);
    if (HALF) return r;  // 0 where d is infinite, where a step of Newton's method would make a NaN
    return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(t, _mm512_set1_ps(126), _CMP_NGT_UQ), r,
                               _mm512_fnmadd_ps(d, r, _mm512_set1_ps(2)));
}

template <bool HALF>
VAR_FAST_INLINE_AVX512 __m512 silu_of(__m512 x) {
    return _mm512_mul_ps(x, inverse_of_1_plus_exp2<HALF>(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E))));
}

template <bool HALF>
VAR_FAST_INLINE_AVX512 __m512 gelu_of(__m512 x) {
    const __m512 factor = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(GELU_3), _mm512_set1_ps(GELU_1));
    return _mm512_mul_ps(x, inverse_of_1_plus_exp2<HALF>(_mm512_mul_ps(x, factor)));
}

template <bool HALF>
VAR_FAST_INLINE_AVX512 __m512 gelu_slope_of(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(30), _mm512_max_ps(_mm512_set1_ps(-30), x));
    const __m512 xx = _mm512_mul_ps(x, x);
    const __m512 factor = _mm512_fmadd_ps(xx, _mm512_set1_ps(GELU_3), _mm512_set1_ps(GELU_1));
    const __m512 s = inverse_of_1_plus_exp2<HALF>(_mm512_mul_ps(x, factor));
    const __m512 twice_slope = _mm512_fmadd_ps(xx, _mm512_set1_ps(3 / LOG2_E * GELU_3), _mm512_set1_ps(GELU_1 / LOG2_E));
    const __m512 rest = _mm512_mul_ps(_mm512_mul_ps(x, s), _mm512_sub_ps(_mm512_set1_ps(1), s));
    return _mm512_fnmadd_ps(rest, twice_slope, s);
}
#endif

}  // namespace var_fast::cpu
