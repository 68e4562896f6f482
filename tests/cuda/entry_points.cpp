// The operators as plain C functions for ctypes: the message of what was thrown, or nullptr. Whole numbers are int64_t,
// others double.
#include <stdexcept>
#include <string>

#include "../../csrc/cuda/ops_cuda.h"

using namespace var_fast;

namespace {

template <class F>
const char* message_of(const F& f) {
    static std::string message;
    try {
        f();
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
    return nullptr;
}

}  // namespace

extern "C" {

const char* residual_adaln_modulate(float* x, const void* branch, int64_t branch_type, const float* gate,
                                    const float* scale, const float* shift, int64_t stride, int64_t M, int64_t R,
                                    int64_t L, int64_t C, double eps, void* y, int64_t y_type) {
    return message_of([&] {
        cuda::residual_adaln_modulate(x, branch, Type(branch_type), gate, scale, shift, stride, M, R, L, C, eps, y,
                                      Type(y_type), nullptr);
    });
}

const char* qk_norm(const void* qkv, int64_t type, const float* scale_H, double softmax_scale, int64_t S, int64_t R,
                    int64_t l, int64_t H, int64_t D, void* q, void* k_cache, void* v_cache, int64_t begin,
                    int64_t capacity) {
    return message_of([&] {
        cuda::qk_norm(qkv, Type(type), scale_H, static_cast<float>(softmax_scale), S, R, l, H, D, q, k_cache, v_cache,
                      begin, capacity, nullptr);
    });
}

const char* scale_attention(const void* q, const void* k_cache, const void* v_cache, int64_t type, int64_t R, int64_t l,
                            int64_t H, int64_t D, int64_t length, int64_t capacity, void* out, void* scratch) {
    return message_of([&] {
        cuda::scale_attention(q, k_cache, v_cache, Type(type), R, l, H, D, length, capacity, out, scratch, nullptr);
    });
}

int64_t scale_attention_scratch_bytes(int64_t R, int64_t l, int64_t H, int64_t D, int64_t length) {
    return cuda::scale_attention_scratch_bytes(R, l, H, D, length);
}

const char* draw_tokens(const float* logits, const int64_t* seeds, int64_t scale, int64_t B, int64_t l, int64_t V,
                        int64_t top_k, double top_p, int64_t* idx, int32_t* bad) {
    return message_of([&] { cuda::draw_tokens(logits, seeds, scale, B, l, V, top_k, top_p, idx, bad, nullptr); });
}

const char* pyramid_update(const int64_t* idx, const float* codes, const float* codebook, const float* phi_weight,
                           const float* phi_bias, double phi_ratio, float* f_hat, int64_t B, int64_t C, int64_t h,
                           int64_t w, int64_t pn, int64_t pn_next, float* next_map) {
    return message_of([&] {
        cuda::pyramid_update(idx, codes, codebook, phi_weight, phi_bias, static_cast<float>(phi_ratio), f_hat, B, C, h,
                             w, pn, pn_next, next_map, nullptr);
    });
}

const char* skinny_linear(const void* x, const void* weight, int64_t type, const void* bias, int64_t M, int64_t N,
                          int64_t K, int64_t gelu, void* y, int64_t float_out) {
    return message_of([&] {
        cuda::skinny_linear(x, weight, Type(type), bias, M, N, K, gelu != 0, y, float_out != 0, nullptr);
    });
}

const char* group_norm_silu(const void* x, int64_t x_type, const float* x_bias, const void* residual, void* sum,
                            const float* weight, const float* bias, int64_t B, int64_t hw, int64_t C, int64_t groups,
                            double eps, int64_t silu, void* y, int64_t y_type, void* scratch) {
    return message_of([&] {
        cuda::group_norm_silu(x, Type(x_type), x_bias, residual, sum, weight, bias, B, hw, C, groups, eps, silu != 0, y,
                              Type(y_type), scratch, nullptr);
    });
}

const char* add_bias_residual(const void* x, int64_t type, const float* bias, const void* residual, int64_t rows,
                              int64_t C, void* y) {
    return message_of([&] { cuda::add_bias_residual(x, Type(type), bias, residual, rows, C, y, nullptr); });
}

const char* image_of_taps(const float* taps, const float* bias, int64_t B, int64_t h, int64_t w, int64_t stride,
                          float* image) {
    return message_of([&] { cuda::image_of_taps(taps, bias, B, h, w, stride, image, nullptr); });
}

const char* weave_phases(const void* phases, int64_t type, const float* bias, int64_t B, int64_t h, int64_t w, int64_t C,
                         void* y) {
    return message_of([&] { cuda::weave_phases(phases, Type(type), bias, B, h, w, C, y, nullptr); });
}

int64_t group_norm_silu_scratch_bytes(int64_t B, int64_t hw, int64_t C, int64_t groups) {
    return cuda::group_norm_silu_scratch_bytes(B, hw, C, groups);
}

const char* gelu(void* x, int64_t type, int64_t n) {
    return message_of([&] { cuda::gelu(x, Type(type), n, nullptr); });
}

const char* transformer_blocks(const void* blocks, int64_t type, int64_t depth, int64_t M, int64_t S, int64_t R,
                               int64_t l, int64_t H, int64_t hidden, int64_t begin, int64_t capacity, double eps,
                               double softmax_scale, float* x, void* y, void* q, void* attended, void* hidden_buffer,
                               float* partial, unsigned* barrier) {
    return message_of([&] {
        const cuda::TransformerSizes sizes{depth, M, S, R, l, H, hidden, begin, capacity, static_cast<float>(eps),
                                           static_cast<float>(softmax_scale)};
        const cuda::TransformerBuffers buffers{x, y, q, attended, hidden_buffer, partial, barrier};
        cuda::transformer_blocks(static_cast<const cuda::TransformerBlock*>(blocks), Type(type), sizes, buffers, nullptr);
    });
}

int64_t transformer_blocks_partial_floats(int64_t S, int64_t l, int64_t H, int64_t hidden) {
    return cuda::transformer_blocks_partial_floats({0, S, S, S, l, H, hidden, 0, l, 0, 0});
}
}
