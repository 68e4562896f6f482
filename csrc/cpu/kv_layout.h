// Where qk_norm leaves queries, keys and values for scale_attention: in the order in which the kernels read them.
//
// D is padded to a multiple of 32 (Dp), the capacity to one of 32 keys; one image's head is one slice of a cache.
//   q   (R, H, l rounded up to 16, Dp)     times log2(e): the softmax is taken in powers of two; rows after l are unset
//   float32   K [16 keys][Dp][16]          a product's 16 keys lie in one vector
//             V [key][Dp]
//   bfloat16  K [16 keys][Dp / 2][16][2]   two neighbours of the dimension that a product sums over share 32 bits, as
//             V [key / 2][Dp][2]           vdpbf16ps and the tile products want it
// In both, the words that belong to one step of the sum are contiguous: product kernels see K and V as the same thing.
#pragma once

#include <cstdint>

#include "../ops.h"

namespace var_fast::cpu {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t padded_D(int64_t D) { return round_up(D, 32); }
inline int64_t padded_keys(int64_t keys) { return round_up(keys, 32); }
inline int64_t padded_queries(int64_t l) { return round_up(l, 16); }
inline int64_t bytes_of(Type type) { return type == Type::f32 ? 4 : 2; }

#define VAR_FAST_INLINE __attribute__((always_inline)) inline

using bf16 = uint16_t;  // the upper half of a float's bits

}  // namespace var_fast::cpu
