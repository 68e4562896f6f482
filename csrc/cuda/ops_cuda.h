// The CUDA operators: plain pointers to device memory, sizes, a stream (cudaStream_t). No torch, no CUDA header.
//
// None of them waits for the device or allocates, so a CUDA graph can capture them all; results do not depend on the
// order in which blocks run, nor (bit for bit, but of transformer_blocks) on the number of images. A refused shape or a
// failed launch throws std::runtime_error that names the operator. Arrays are contiguous and start at multiples of 16
// bytes.
#pragma once

#include <cstdint>

#include "../ops.h"

namespace var_fast::cuda {

// x (R, L, C) float32 in place: x += gate * branch (branch == nullptr: x stays); then y = LN(x) (1 + scale) + shift.
// Image r takes row min(r, M - 1) of gate, scale and shift, float32, rows `stride` floats apart.
// C a multiple of 8 up to 4608, stride a multiple of 4.
void residual_adaln_modulate(float* x, const void* branch, Type branch_type, const float* gate, const float* scale,
                             const float* shift, int64_t stride, int64_t M, int64_t R, int64_t L, int64_t C, float eps,
                             void* y, Type y_type, void* stream);

// qkv (S, l, 3, H, D) -> q (R, l, H, D), and tokens [begin, begin + l) of the caches (R, H, capacity, D). Image r reads
// source min(r, S - 1). scale_H != nullptr: q and k to unit length, q times scale_H[h]; q always times softmax_scale.
// D a multiple of 8 up to 128.
void qk_norm(const void* qkv, Type type, const float* scale_H, float softmax_scale, int64_t S, int64_t R, int64_t l,
             int64_t H, int64_t D, void* q, void* k_cache, void* v_cache, int64_t begin, int64_t capacity,
             void* stream);

// softmax(q K^T) V over the first `length` tokens of the caches, out (R, l, H, D); D 32, 64, 96 or 128. Made for few
// queries (l <= 64 or so): K and V are read once for every 16 or 32 of them.
// scratch: scale_attention_scratch_bytes (0 where length <= 256), of any content.
void scale_attention(const void* q, const void* k_cache, const void* v_cache, Type type, int64_t R, int64_t l,
                     int64_t H, int64_t D, int64_t length, int64_t capacity, void* out, void* scratch, void* stream);
int64_t scale_attention_scratch_bytes(int64_t R, int64_t l, int64_t H, int64_t D, int64_t length);

// Draws one index per row of guided logits (B, l, V), V <= 16384; contract: var_fast/ops/sample_tokens.py. For top-p
// weights are whole multiples of 2^-49 of the largest, sums exact.
// (V above 12800 takes more shared memory than sm_80 has.)
// bad[scale * B + image] becomes 1 (and idx 0) where a logit of the image is not finite.
void draw_tokens(const float* logits, const int64_t* seeds, int64_t scale, int64_t B, int64_t l, int64_t V,
                 int64_t top_k, double top_p, int64_t* idx, int32_t* bad, void* stream);

// idx (B, pn * pn), or codes (B, pn * pn, C) where idx == nullptr -> bicubic up to h x w -> phi -> added to f_hat
// (B, C, h, w) -> area down to next_map (B, pn_next * pn_next, C), none where pn_next == 0.
// phi(x) = (1 - ratio) x + ratio (conv3x3(x) + bias), weight (C, C, 3, 3); phi_weight == nullptr: phi(x) = x.
// C (h + 2) w floats have to fit into shared memory, with some more: C 32, 32 x 32 does.
void pyramid_update(const int64_t* idx, const float* codes, const float* codebook, const float* phi_weight,
                    const float* phi_bias, float phi_ratio, float* f_hat, int64_t B, int64_t C, int64_t h, int64_t w,
                    int64_t pn, int64_t pn_next, float* next_map, void* stream);

// s = x + x_bias + residual, (B, hw, C), the last two where they are no nullptr -> y = GroupNorm(s) weight + bias, then
// SiLU(y) where `silu`. Where `sum` is no nullptr, s is stored there in x's type; a residual needs that, and it may be
// neither x nor residual. y may be x where their types are one and there is no sum.
// C / 8 (float32: C / 4) at most 512. scratch: group_norm_silu_scratch_bytes; zero before its first use (each call
// leaves it ready for the next one with as many images).
void group_norm_silu(const void* x, Type x_type, const float* x_bias, const void* residual, void* sum,
                     const float* weight, const float* bias, int64_t B, int64_t hw, int64_t C, int64_t groups, float eps,
                     bool silu, void* y, Type y_type, void* scratch, void* stream);
int64_t group_norm_silu_scratch_bytes(int64_t B, int64_t hw, int64_t C, int64_t groups);

// y (M, N) = x (M, K) weight (N, K)^T + bias (nullptr: none), then tanh-GELU where `gelu`; bfloat16 or float16, summed in
// float32. y and bias are of the same type, or float32 where `float_out`. M up to SKINNY_ROWS, K a multiple of 8.
// A row's result does not depend on M.
constexpr int64_t SKINNY_ROWS = 32;
void skinny_linear(const void* x, const void* weight, Type type, const void* bias, int64_t M, int64_t N, int64_t K,
                   bool gelu, void* y, bool float_out, void* stream);

// All blocks of the transformer on the l tokens of one scale of S images: x (S, l, C) float32 in place, C = 64 H. A block
// is, with modulation (M, 6, C) of the order gate1, gate2, scale1, scale2, shift1, shift2,
//   x += gate1 * proj(attention(qkv(LN(x) (1 + scale1) + shift1)));  x += gate2 * fc2(gelu(fc1(LN(x) (1 + scale2) + shift2)))
// where image r takes row min(r, M - 1), q and k are as qk_norm makes them, and the attention is over all tokens up to
// begin + l of the caches (R, H, capacity, 64); R >= S images' keys and values are cached, those from S on as image S - 1's.
// Weights (out, in), biases (nullptr: none) and caches are of `type`, bfloat16 or float16; hidden is a multiple of 8. One
// cooperative launch of as many blocks as the current device has multiprocessors; sums along K, so a row's rounding, depend
// on their number and on S l.
struct TransformerBlock {  // addresses on the device
    const void *qkv_weight, *qkv_bias, *proj_weight, *proj_bias, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
    const float *scale_H, *modulation;
    void *k_cache, *v_cache;
};
struct TransformerSizes {
    int64_t depth, M, S, R, l, H, hidden, begin, capacity;
    float eps, softmax_scale;
};
// y and attended (S, l, C), q (R, l, C) and hidden (S, l, hidden) of the type, `partial` as many floats as
// transformer_blocks_partial_floats, all of any content; barrier: one word, zero before its first use.
struct TransformerBuffers {
    float* x;
    void *y, *q, *attended, *hidden;
    float* partial;
    unsigned* barrier;
};
constexpr int64_t TRANSFORMER_BLOCKS_ROWS = 1024, TRANSFORMER_BLOCKS_HEADS = 80;  // S l and H at most
void transformer_blocks(const TransformerBlock* blocks, Type type, const TransformerSizes& sizes,
                        const TransformerBuffers& buffers, void* stream);
int64_t transformer_blocks_partial_floats(const TransformerSizes& sizes);

// y (rows, C) = x + bias + residual, each where it is no nullptr.
void add_bias_residual(const void* x, Type type, const float* bias, const void* residual, int64_t rows, int64_t C,
                       void* y, void* stream);

// phases (B, h + 1, w + 1, 4, C) -> y (B, 2 h, 2 w, C), plus bias: output pixel (2 r + a, 2 s + b) is phase 2 a + b of
// corner (r + a, s + b).
void weave_phases(const void* phases, Type type, const float* bias, int64_t B, int64_t h, int64_t w, int64_t C, void* y,
                  void* stream);

// The image of a 3x3 convolution to 3 channels: taps (B, h, w, stride), value (3 ky + kx) 3 + c of a pixel is its share in
// channel c of the pixel that sees it at (ky, kx) -> image (B, 3, h, w), plus bias, clamped to [-1, 1], then in [0, 1].
void image_of_taps(const float* taps, const float* bias, int64_t B, int64_t h, int64_t w, int64_t stride, float* image,
                   void* stream);

// tanh-GELU of n elements in place.
void gelu(void* x, Type type, int64_t n, void* stream);

}  // namespace var_fast::cuda
