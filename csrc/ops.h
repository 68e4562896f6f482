// Declarations of the native operators: plain pointers and sizes, no torch. Contracts: var_fast/ops/<operator>.py.
#pragma once

#include <cstdint>
#include <vector>

namespace var_fast {

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2 };

// Draws one index per row from guided, filtered logits; cond and uncond are (B, l, V), seeds (B), index (B, l).
// uncond == nullptr: no guidance. Needs V > 0, top_k >= 0, top_p in [0, 1], scale in [0, 2^32).
// Returns -1, or the lowest image whose guided logits are not finite (its indices are then unspecified).
template <typename T>
int64_t sample_tokens(const T* cond, const T* uncond, int64_t B, int64_t l, int64_t V, double guidance, int64_t top_k,
                      double top_p, const int64_t* seeds, int64_t scale, int64_t* index, int threads);

// The leaf operators of the sampling loop. All arrays are contiguous, of float32 where they have no `type` of their own,
// which is float32 or bfloat16 here, and on CUDA (cuda/ops_cuda.h) float16 too.
namespace cpu {

// x (R, L, C) in place: x += gate * branch, (R, L, C) of branch_type (nullptr: x stays as it is); then
// y = LN(x) * (1 + scale) + shift. Image r takes row min(r, M - 1) of gate, scale and shift, `stride` floats apart.
void residual_adaln_modulate(float* x, const void* branch, Type branch_type, const float* gate, const float* scale,
                             const float* shift, int64_t stride, int64_t M, int64_t R, int64_t L, int64_t C, float eps,
                             void* y, Type y_type, int threads);

// Training's, with `type` of x, x_out and y; modulations (B, C). x_out is x + gate * branch, y the norm of x_out as it is
// rounded; branch nullptr: y is the norm of x, and x_out is nullptr. Backward: x_out as the forward pass left it (without
// branch: x), dx_out its gradient; without branch dx_out, dbranch and dgate are nullptr. dgate, dscale and dshift (B, C)
// have the same bits on any number of threads.
void residual_adaln_modulate_forward(const void* x, Type type, const void* branch, Type branch_type, const float* gate,
                                     const float* scale, const float* shift, int64_t B, int64_t L, int64_t C, float eps,
                                     void* x_out, void* y, int threads);
void residual_adaln_modulate_backward(const void* dx_out, const void* dy, const void* x_out, Type type, const void* branch,
                                      Type branch_type, const float* gate, const float* scale, int64_t B, int64_t L,
                                      int64_t C, float eps, void* dx, void* dbranch, float* dgate, float* dscale,
                                      float* dshift, int threads);

// Training's qk_norm: x (tokens, 3, H, D) -> q and k (tokens, H, D) at unit length, q then times its head's scale.
// Backward: dq, dk, dv have unit strides over D and those given over (B, L, H), each three numbers, dq's first; dx as x, and
// dscale_H (H), with the same bits on any number of threads.
void qk_norm_forward(const void* x, Type type, const float* scale_H, int64_t tokens, int64_t H, int64_t D, void* q,
                     void* k, int threads);
void qk_norm_backward(const void* dq, const void* dk, const void* dv, const int64_t* strides, const void* x, Type type,
                      const float* scale_H, int64_t B, int64_t L, int64_t H, int64_t D, void* dx, float* dscale_H,
                      int threads);

// Sampling's qk_norm: qkv (S, l, 3, H, D) -> q and, at tokens [begin, begin + l), one layer's caches of `capacity`
// tokens; image r of R reads source min(r, S - 1). With scale_H (H): q and k at unit length, as F.normalize makes them,
// and q times its head's scale; nullptr: split only. q is then multiplied by softmax_scale. Tokens are appended in order:
// what the caches hold after begin + l is lost. The layouts are scale_attention's own; caches begin as zeros.
void qk_norm(const void* qkv, Type type, const float* scale_H, float softmax_scale, int64_t S, int64_t R, int64_t l,
             int64_t H, int64_t D, void* q, void* k_cache, void* v_cache, int64_t begin, int64_t capacity, int threads);
int64_t q_bytes(Type type, int64_t R, int64_t l, int64_t H, int64_t D);
int64_t k_cache_bytes(Type type, int64_t R, int64_t H, int64_t D, int64_t capacity);
int64_t v_cache_bytes(Type type, int64_t R, int64_t H, int64_t D, int64_t capacity);

// out (R, l, H, D) = softmax(q K^T) V over the first `length` tokens of the caches, all as qk_norm left them.
// float32: an image's result depends neither on R nor on `threads`, to the last bit.
void scale_attention(const void* q, const void* k_cache, const void* v_cache, Type type, int64_t R, int64_t l,
                     int64_t H, int64_t D, int64_t length, int64_t capacity, void* out, int threads);

// y (M, N) = x (M, K) W^T + bias (nullptr: none), W (N, K) row-major, its numbers as they are, of any type; gelu: tanh-GELU
// of that. The order of an element's additions depends on K and the instruction set alone, so a row does not depend on the
// others.
void linear(const float* x, const void* weight, Type weight_type, const float* bias, int64_t M, int64_t N, int64_t K,
            bool gelu, float* y, int threads);

// The same of bfloat16 x and y, summed in float32. linear_bf16_pack makes `packed` (linear_bf16_packed_bytes long, aligned
// to 64 bytes) from weight (N, K) bfloat16. Needs isa() >= amx, else throws std::runtime_error; packing does not.
int64_t linear_bf16_packed_bytes(int64_t N, int64_t K);
void linear_bf16_pack(const void* weight, int64_t N, int64_t K, void* packed, int threads);
void linear_bf16(const void* x, const void* packed, const float* bias, int64_t M, int64_t N, int64_t K, bool gelu, void* y,
                 int threads);
// y (M, C) = linear_bf16 (C, hidden) of linear_bf16 with GELU (hidden, C) of x (M, C); `scratch`, aligned to 64 bytes, holds
// what is between them, in tiles: feed_forward_bf16_bytes, which grow with M.
int64_t feed_forward_bf16_bytes(int64_t M, int64_t hidden);
void feed_forward_bf16(const void* x, const void* packed1, const float* bias1, const void* packed2, const float* bias2,
                       int64_t M, int64_t C, int64_t hidden, void* scratch, void* y, int threads);

// y (B, h, w, Cout) = 3x3 convolution (stride 1, zero padding 1) of x (B, h, w, Cin) + bias (nullptr: none) + residual
// (the shape of y, may be y itself; nullptr: none), float32. conv3x3_pack makes `packed` (conv3x3_packed_bytes long,
// aligned to 64 bytes) from weight (Cout, Cin, 3, 3); it holds for one process: its layout follows the instruction set.
// An image's result does not depend on the others. Winograd F(4x4, 3x3): error about 2e-6 of the result.
int64_t conv3x3_packed_bytes(int64_t Cin, int64_t Cout);
void conv3x3_pack(const float* weight, int64_t Cin, int64_t Cout, float* packed, int threads);
void conv3x3(const float* x, const float* packed, const float* bias, const float* residual, int64_t B, int64_t h,
             int64_t w, int64_t Cin, int64_t Cout, float* y, int threads);

// The same of bfloat16 x, residual and y, by F(2x2, 3x3): error about 4e-3 of the result. Needs isa() >= avx512_bf16, else
// throws std::runtime_error; packing does not.
int64_t conv3x3_bf16_packed_bytes(int64_t Cin, int64_t Cout);
void conv3x3_bf16_pack(const float* weight, int64_t Cin, int64_t Cout, void* packed);
void conv3x3_bf16(const void* x, const void* packed, const float* bias, const void* residual, int64_t B, int64_t h,
                  int64_t w, int64_t Cin, int64_t Cout, void* y, int threads);

// GELU, tanh form, y may be x; dx = dy times its derivative at x, dx may be dy.
void gelu(const void* x, Type type, int64_t n, void* y, int threads);
void gelu_backward(const void* dy, const void* x, Type type, int64_t n, void* dx, int threads);

// sample_tokens of guided logits (B, l, V), idx (B, l). Returns -1, or the lowest image whose logits are not finite (its indices are then unspecified).
int64_t draw_tokens(const float* logits, const int64_t* seeds, int64_t scale, int64_t B, int64_t l, int64_t V,
                    int64_t top_k, double top_p, int64_t* idx, int threads);
// Its random numbers for one token, of every code.
std::vector<double> token_exponentials(int64_t seed, int64_t scale, int64_t token, int64_t V);

// Tokens idx (B, pn * pn), or with idx == nullptr their codes (B, pn * pn, C) -> bicubic up to h x w ->
// phi(x) = (1 - phi_ratio) x + phi_ratio conv3x3(x), weight (C, C, 3, 3), bias (C); phi_weight == nullptr: the identity
// -> added to f_hat (B, C, h, w) -> its area means next_map (B, pn_next * pn_next, C); pn_next == 0: none.
void pyramid_update(const int64_t* idx, const float* codes, const float* codebook, const float* phi_weight,
                    const float* phi_bias, float phi_ratio, float* f_hat, int64_t B, int64_t C, int64_t h, int64_t w,
                    int64_t pn, int64_t pn_next, float* next_map, int threads);

// Channels last: x (B, hw, C) -> y = SiLU(GroupNorm(x) weight + bias), or without SiLU. y may be x where the types are one.
void group_norm_silu(const void* x, Type x_type, const float* weight, const float* bias, int64_t B, int64_t hw,
                     int64_t C, int64_t groups, float eps, bool silu, void* y, Type y_type, int threads);

}  // namespace cpu
}  // namespace var_fast

#ifdef VAR_FAST_WITH_CUDA
#include "cuda/ops_cuda.h"
#endif
