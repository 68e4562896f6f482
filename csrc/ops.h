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

// y (M, N) = x (M, K) W^T + bias (nullptr: none), float32, W (N, K) row-major; gelu: tanh-GELU of that. The order of
// an element's additions depends on K and the instruction set alone, so a row does not depend on the others.
void linear(const float* x, const float* weight, const float* bias, int64_t M, int64_t N, int64_t K, bool gelu,
            float* y, int threads);

// y (B, h, w, Cout) = 3x3 convolution (stride 1, zero padding 1) of x (B, h, w, Cin) + bias (nullptr: none) + residual
// (the shape of y, may be y itself; nullptr: none), float32. conv3x3_pack makes `packed` (conv3x3_packed_bytes long,
// aligned to 64 bytes) from weight (Cout, Cin, 3, 3); it holds for one process: its layout follows the instruction set.
// An image's result does not depend on the others. Winograd F(4x4, 3x3): error about 2e-6 of the result.
int64_t conv3x3_packed_bytes(int64_t Cin, int64_t Cout);
void conv3x3_pack(const float* weight, int64_t Cin, int64_t Cout, float* packed);
void conv3x3(const float* x, const float* packed, const float* bias, const float* residual, int64_t B, int64_t h,
             int64_t w, int64_t Cin, int64_t Cout, float* y, int threads);

}  // namespace cpu
}  // namespace var_fast
