// One tensor-core product, and packing its 16-bit operands.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace var_fast::cuda {

#ifndef VAR_FAST_ON_HOST
// c (16 x 8, float32) += a (16 x 16) b (16 x 8), elements of T. With g = lane / 4, j = lane % 4 a lane holds, two to a
// word,
//   a: rows g, g + 8 of columns 2j, 2j + 1, then the same rows of columns 2j + 8, 2j + 9;
//   b: rows 2j, 2j + 1, then 2j + 8, 2j + 9 of column g;     c: columns 2j, 2j + 1 of row g, then of row g + 8.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// low and high as T, low in the lower half of the word.
template <class T>
__device__ __forceinline__ uint32_t pack_two(float low, float high) {
    uint32_t word;
    if constexpr (std::is_same_v<T, __half>)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
#endif

}  // namespace var_fast::cuda
