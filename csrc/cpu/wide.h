// 512 bits of float32 or bfloat16 in one register, or in several smaller ones: the compiler's own vectors, for code
// that `dispatch` compiles for several instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#include "kv_layout.h"

namespace var_fast::cpu {

using Floats = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Lanes = int32_t __attribute__((vector_size(64)));

// 512 bits of T at x; where D is PADDED only the first `left` numbers are there, the others zero.
template <bool PADDED, typename T>
VAR_FAST_INLINE Words load(const T* x, int64_t left) {
    constexpr int64_t ALL = 64 / sizeof(T);
    Words words = {};
    if (!PADDED || left >= ALL)
        std::memcpy(&words, x, sizeof words);
    else if (left > 0)
        std::memcpy(&words, x, left * sizeof(T));
    return words;
}

// Those numbers as floats: bfloat16 is the upper half of one, and two of them share a word.
VAR_FAST_INLINE Floats even(Words words) { return (Floats)(words << 16); }
VAR_FAST_INLINE Floats odd(Words words) { return (Floats)(words & 0xffff0000); }

VAR_FAST_INLINE Words rounded(Floats x) {  // to bfloat16 in the upper half, ties to even
    const Words bits = (Words)x;
    const Lanes nan = (Lanes)(x != x);
    return (Words)(nan ? (Lanes)(bits | 0x400000) : (Lanes)(bits + 0x7fff + ((bits >> 16) & 1)));
}

VAR_FAST_INLINE void store(Words words, void* to) { std::memcpy(to, &words, sizeof words); }

// 32 floats in order, to bfloat16.
VAR_FAST_INLINE Words packed(Floats first, Floats second) {
    using Halves = bf16 __attribute__((vector_size(64)));
    constexpr Halves UPPER = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                              33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return (Words)__builtin_shuffle((Halves)rounded(first), (Halves)rounded(second), UPPER);
}

}  // namespace var_fast::cpu
