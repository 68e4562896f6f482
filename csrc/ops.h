// Declarations of the native operators: plain pointers and sizes, no torch. Contracts: var_fast/ops/<operator>.py.
#pragma once

#include <cstdint>

namespace var_fast {

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2 };

// Draws one index per row from guided, filtered logits; cond and uncond are (rows, V), u and index are (rows).
// uncond == nullptr: no guidance. Needs V > 0, top_k >= 0, top_p in [0, 1], u in [0, 1).
// Returns -1, or the lowest row whose guided logits are not finite (index is then unspecified).
template <typename T>
int64_t sample_tokens(const T* cond, const T* uncond, int64_t rows, int64_t V, double guidance, int64_t top_k,
                      double top_p, const double* u, int64_t* index, int threads);

namespace cpu {

// Sampling's qk_norm: qkv (S, l, 3, H, D) of float32 or bfloat16 -> q and, at tokens [begin, begin + l), one layer's
// caches of `capacity` tokens; image r of R reads source min(r, S - 1). With scale_H (H): q and k at unit length, as
// F.normalize makes them, and q times its head's scale; nullptr: split only. q is then multiplied by softmax_scale.
// Tokens are appended in order: what the caches hold after begin + l is lost. The layouts are scale_attention's own.
void qk_norm(const void* qkv, Type type, const float* scale_H, float softmax_scale, int64_t S, int64_t R, int64_t l,
             int64_t H, int64_t D, void* q, void* k_cache, void* v_cache, int64_t begin, int64_t capacity, int threads);
int64_t q_bytes(Type type, int64_t R, int64_t l, int64_t H, int64_t D);
int64_t k_cache_bytes(Type type, int64_t R, int64_t H, int64_t D, int64_t capacity);
int64_t v_cache_bytes(Type type, int64_t R, int64_t H, int64_t D, int64_t capacity);

// out (R, l, H, D) = softmax(q K^T) V over the first `length` tokens of the caches, all as qk_norm left them.
// float32: an image's result depends neither on R nor on `threads`, to the last bit.
void scale_attention(const void* q, const void* k_cache, const void* v_cache, Type type, int64_t R, int64_t l,
                     int64_t H, int64_t D, int64_t length, int64_t capacity, void* out, int threads);

}  // namespace cpu
}  // namespace var_fast
