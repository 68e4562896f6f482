// float <-> bfloat16, from float16, and from a Type to the C++ type of its elements. Inlined into every instruction
// set's version of a loop, where the compiler vectorises it.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "../ops.h"

namespace var_fast::cpu {

#define VAR_FAST_INLINE inline __attribute__((always_inline))
#define VAR_FAST_INLINE_AVX512 VAR_FAST_INLINE VAR_FAST_AVX512
#define VAR_FAST_INLINE_AVX2 VAR_FAST_INLINE VAR_FAST_AVX2

template <class To, class From>
VAR_FAST_INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

struct bf16 {
    uint16_t bits;
};

struct f16 {
    uint16_t bits;
};

VAR_FAST_INLINE float to_float(float x) { return x; }

VAR_FAST_INLINE float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

VAR_FAST_INLINE float to_float(f16 x) {
    const uint32_t magnitude = x.bits & 0x7fffu;
    const float small = static_cast<float>(magnitude) * 0x1p-24f;  // right where the exponent is zero
    const uint32_t wider = magnitude < 0x7c00u ? (127 - 15) << 23 : (255 - 31) << 23;  // infinity and NaN stay so
    const uint32_t bits = magnitude < 0x400u ? bits_as<uint32_t>(small) : (magnitude << 13) + wider;
    return bits_as<float>(bits | (x.bits & 0x8000u) << 16);
}

VAR_FAST_INLINE void store(float* to, float value) { *to = value; }

// Rounds to nearest, ties to even; a NaN stays one (rounding its bits could carry it into infinity).
VAR_FAST_INLINE void store(bf16* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40u;
    to->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// f(float{}) or f(bf16{}).
template <class F>
auto with_element(Type type, const F& f) {
    if (type == Type::f32) return f(float{});
    if (type == Type::bf16) return f(bf16{});
    throw std::invalid_argument("the CPU operators take float32 and bfloat16");
}

}  // namespace var_fast::cpu
