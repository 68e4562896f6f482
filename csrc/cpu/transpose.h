// A 16 x 16 block of 32-bit words, transposed.
#pragma once

#include <cstdint>
#include <cstring>

#include "intrinsics.h"
#include "isa.h"

namespace var_fast::cpu {

// to[j][i] = from[i][j] for the rows i of `from` that are set in mask; the other words of `to` stay as they are.
using StoreTransposed = void (*)(const void* from, void* to, unsigned mask);

inline void store_transposed_portable(const void* from, void* to, unsigned mask) {
    const char* source = static_cast<const char*>(from);
    char* target = static_cast<char*>(to);
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1)
            for (int j = 0; j < 16; ++j) std::memcpy(target + 64 * j + 4 * i, source + 64 * i + 4 * j, 4);
}

#ifdef VAR_FAST_X86
VAR_FAST_AVX512 inline void store_transposed_avx512(const void* from, void* to, unsigned mask) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(static_cast<const char*>(from) + 64 * i);
    for (int i = 0; i < 16; i += 2) {  // 32-bit words of two rows, then 64 bits of four, within each 128 bits
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4 g + c], 128 bits number q: column 4 q + c of rows 4 g to 4 g + 3. Now a transpose of 128-bit words, g with q.
    for (int c = 0; c < 4; ++c) {
        const __m512i even_01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
        const __m512i odd_01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        const __m512i even_23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
        const __m512i odd_23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        b[c] = _mm512_shuffle_i32x4(even_01, even_23, 0x88);
        b[8 + c] = _mm512_shuffle_i32x4(even_01, even_23, 0xdd);
        b[4 + c] = _mm512_shuffle_i32x4(odd_01, odd_23, 0x88);
        b[12 + c] = _mm512_shuffle_i32x4(odd_01, odd_23, 0xdd);
    }
    for (int j = 0; j < 16; ++j)
        _mm512_mask_storeu_epi32(static_cast<char*>(to) + 64 * j, static_cast<__mmask16>(mask), b[j]);
}
#endif

inline StoreTransposed choose_transpose() {
#ifdef VAR_FAST_X86
    if (isa() >= Isa::avx512) return store_transposed_avx512;
#endif
    return store_transposed_portable;
}

}  // namespace var_fast::cpu
