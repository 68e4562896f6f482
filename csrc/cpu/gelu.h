// tanh-GELU of one float, in a form that the compiler vectorises (no libm call, no branch).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace var_fast::cpu {

// e^x for x <= 88, relative error below 2e-7; 0 below -87.3 (the caller's sums then do not change).
__attribute__((always_inline)) inline float exp_fast(float x) {
    constexpr float LOG2E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.0f ? 88.0f : x;
    // adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits
    const float shifted = x * LOG2E + 12582912.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    const float n = shifted - 12582912.0f;
    const float r = (x - n * LN2_HIGH) - n * LN2_LOW;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const int32_t power = (bits - 0x4B400000 + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}

// 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3)
__attribute__((always_inline)) inline float gelu_tanh(float x) {
    constexpr float TWICE_ROOT_2_OVER_PI = 1.5957691216f;
    x = x < -20.0f ? -20.0f : x;  // zero there, whatever overflows
    const float u = TWICE_ROOT_2_OVER_PI * (x + 0.044715f * (x * x * x));
    return x / (1.0f + exp_fast(-u));
}

}  // namespace var_fast::cpu
