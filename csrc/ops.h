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
void residual_adaln_modulate(float* x, const void* branch, Type branch_type, const float* gate, const float* scale,
                             const float* shift, int64_t stride, int64_t M, int64_t R, int64_t L, int64_t C, float eps,
                             void* y, Type y_type, int threads);
void qk_norm(const void* qkv, Type type, const float* scale_H, float softmax_scale, int64_t S, int64_t R, int64_t l,
             int64_t H, int64_t D, void* q, void* k_cache, void* v_cache, int64_t begin, int64_t capacity, int threads);
int64_t q_bytes(Type type, int64_t R, int64_t l, int64_t H, int64_t D);
int64_t k_cache_bytes(Type type, int64_t R, int64_t H, int64_t D, int64_t capacity);
int64_t v_cache_bytes(Type type, int64_t R, int64_t H, int64_t D, int64_t capacity);
void scale_attention(const void* q, const void* k_cache, const void* v_cache, Type type, int64_t R, int64_t l, int64_t H,
                     int64_t D, int64_t length, int64_t capacity, void* out, int threads);
int64_t draw_tokens(const float* logits, const int64_t* seeds, int64_t scale, int64_t B, int64_t l, int64_t V,
                    int64_t top_k, double top_p, int64_t* idx, int threads);
void pyramid_update(const int64_t* idx, const float* codes, const float* codebook, const float* phi_weight,
                    const float* phi_bias, float phi_ratio, float* f_hat, int64_t B, int64_t C, int64_t h, int64_t w,
                    int64_t pn, int64_t pn_next, float* next_map, int threads);
void group_norm_silu(const void* x, Type x_type, const float* weight, const float* bias, int64_t B, int64_t hw, int64_t C,
                     int64_t groups, float eps, bool silu, void* y, Type y_type, int threads);
void linear(const float* x, const float* weight, const float* bias, int64_t M, int64_t N, int64_t K, bool gelu, float* y,
            int threads);
void gelu(void* x, Type type, int64_t n, int threads);
}  // namespace cpu

}  // namespace var_fast

#ifdef VAR_FAST_WITH_CUDA
#include "cuda/ops_cuda.h"
#endif
