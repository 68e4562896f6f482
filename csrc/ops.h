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

// x (R, L, C) in place: x += gate * branch, (R, L, C) of branch_type (nullptr: x stays as it is); then
// y = LN(x) * (1 + scale) + shift. Image r takes row min(r, M - 1) of gate, scale and shift, `stride` floats apart.
void residual_adaln_modulate(float* x, const void* branch, Type branch_type, const float* gate, const float* scale,
                             const float* shift, int64_t stride, int64_t M, int64_t R, int64_t L, int64_t C, float eps,
                             void* y, Type y_type, int threads);

// GELU, tanh form, in place.
void gelu(void* x, Type type, int64_t n, int threads);

// Channels last: x (B, hw, C) -> y = SiLU(GroupNorm(x) weight + bias), or without SiLU. y may be x where the types are one.
void group_norm_silu(const void* x, Type x_type, const float* weight, const float* bias, int64_t B, int64_t hw,
                     int64_t C, int64_t groups, float eps, bool silu, void* y, Type y_type, int threads);

// sample_tokens of guided logits (B, l, V) with the random numbers of philox.h for (seed of the image, scale, token);
// idx (B, l). Returns -1, or the lowest image whose logits are not finite (its indices are then unspecified).
int64_t draw_tokens(const float* logits, const int64_t* seeds, int64_t scale, int64_t B, int64_t l, int64_t V,
                    int64_t top_k, double top_p, int64_t* idx, int threads);

// Tokens idx (B, pn * pn), or with idx == nullptr their codes (B, pn * pn, C) -> bicubic up to h x w ->
// phi(x) = (1 - phi_ratio) x + phi_ratio conv3x3(x), weight (C, C, 3, 3), bias (C); phi_weight == nullptr: the identity
// -> added to f_hat (B, C, h, w) -> its area means next_map (B, pn_next * pn_next, C); pn_next == 0: none.
void pyramid_update(const int64_t* idx, const float* codes, const float* codebook, const float* phi_weight,
                    const float* phi_bias, float phi_ratio, float* f_hat, int64_t B, int64_t C, int64_t h, int64_t w,
                    int64_t pn, int64_t pn_next, float* next_map, int threads);

}  // namespace cpu
}  // namespace var_fast
