// A linear layer where its weights lie: on a CPU own float32 kernel, which takes half weights too; of bfloat16 x own kernel
// with AMX, else oneDNN's packed one; on CUDA cuBLASLt, of a half type and few rows own kernel.
#pragma once

#include <ATen/ATen.h>

#include "ops.h"

namespace var_fast {

// Where a run computes: a CUDA stream, or threads of the CPU.
struct Place {
    bool cuda = false;
    void* stream = nullptr;
    int threads = 1;
};

// Of weights: (N, K); as mkldnn::_reorder_linear_weight leaves them; as cpu::linear_bf16_pack does, bias float32.
enum class Layout { plain, onednn, tiles };

struct Linear {
    at::Tensor weight_NK, bias_N;  // bias undefined: none
    Layout layout = Layout::plain;
    int64_t out_features = 0;
};

// y (M, N) = x (M, K) W^T + b, then tanh-GELU if asked for, in x's type. `y` is written where the library can, else a
// tensor of its own is returned.
at::Tensor linear(const at::Tensor& x_MK, const Linear& layer, bool gelu, const at::Tensor& y_MN, const Place& place);

// y (M, C) = fc2(GELU(fc1(x (M, C)))) as two of linear; `hidden` is what is between them, by feed_forward_elements.
at::Tensor feed_forward(const at::Tensor& x_MC, const Linear& fc1, const Linear& fc2, const at::Tensor& hidden,
                        const at::Tensor& y_MC, const Place& place);
int64_t feed_forward_elements(int64_t M, const Linear& fc1);

// As linear, but y is float32 whatever x's type; so is the bias.
void linear_float32(const at::Tensor& x_MK, const Linear& layer, const at::Tensor& y_MN, const Place& place);

at::ScalarType scalar_type(Type type);
Type element_type(const at::Tensor& tensor);

}  // namespace var_fast
