// The tokenizer's decoder, channels last: f_hat -> image.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "linear.h"

namespace var_fast {

struct Norm {
    at::Tensor weight_C, bias_C;  // float32
    int64_t groups = 32;
    float eps = 1e-6f;
};

// `packed`: by mkldnn_reorder_conv2d_weight, for this padding. On CUDA the bias is float32.
// `winograd`: the output channels, where the weight is cpu::conv3x3_bf16_pack's and the bias is float32; else 0.
struct Conv {
    at::Tensor weight, bias;
    int64_t padding = 0;
    bool packed = false;
    int64_t winograd = 0;
};

// One step of the decoder, in the order in which they run; what a kind does not use is empty.
struct DecoderStep {
    enum class Kind { conv, residual, attention, upsample, norm_silu, image };
    Kind kind = Kind::conv;
    std::vector<Norm> norms;
    std::vector<Conv> convs;      // conv: 1; residual: 2, or 3 with a shortcut; upsample: its four phases as one
    std::vector<Linear> linears;  // attention: qkv, proj; image (on CUDA, the last): the taps (32, C) of a 3x3 convolution
                                  // to 3 channels, its bias
};

struct Decoder {
    std::vector<DecoderStep> steps;
    Type type = Type::f32;
};

// f_hat (B, Cvae, h, w) float32 -> image (B, 3, H, W) float32 in [0, 1].
at::Tensor decode(const Decoder& decoder, const at::Tensor& f_hat_BChw, const Place& place);

// The same on CUDA, which `decode` calls there.
at::Tensor decode_cuda(const Decoder& decoder, const at::Tensor& f_hat_BChw, const Place& place);

}  // namespace var_fast
