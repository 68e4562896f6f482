// The decoder on CUDA. A convolution's bias, the addition of a residual and the statistics of the next norm are one pass
// over the map; cuDNN alone would make three of them.
#ifdef VAR_FAST_WITH_CUDA

#include "cuda/ops_cuda.h"
#include "decoder.h"
#include "leaf.h"

namespace var_fast {
namespace {

constexpr auto CHANNELS_LAST = at::MemoryFormat::ChannelsLast;

// x + bias + residual, to be added up where it is read; the last two may be undefined.
struct Sum {
    at::Tensor x_BChw, bias_C, residual_BChw;
};

const float* floats(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

const void* pointer(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }

class Decoding {
public:
    Decoding(const Decoder& decoder, const Place& place) : decoder_(decoder), place_(place) {}

    at::Tensor operator()(const at::Tensor& f_hat_BChw) {
        Sum x{f_hat_BChw.to(scalar_type(decoder_.type)).contiguous(CHANNELS_LAST), {}, {}};
        for (const DecoderStep& step : decoder_.steps) {
            switch (step.kind) {
                case DecoderStep::Kind::conv: x = {convolve(settle(x), step.convs[0]), step.convs[0].bias, {}}; break;
                case DecoderStep::Kind::residual: x = residual(x, step); break;
                case DecoderStep::Kind::attention: x = attend(x, step); break;
                case DecoderStep::Kind::upsample: x = {upsample(settle(x), step.convs[0]), {}, {}}; break;
                case DecoderStep::Kind::norm_silu: x = {norm(x, step.norms[0], true, false), {}, {}}; break;
                case DecoderStep::Kind::image: return image(settle(x), step.linears[0]);
            }
        }
        TORCH_CHECK(false, "the decoder makes no image");
    }

private:
    static at::Tensor convolve(const at::Tensor& x_BChw, const Conv& layer) {
        return at::conv2d(x_BChw, layer.weight, {}, 1, layer.padding).contiguous(CHANNELS_LAST);
    }

    at::Tensor settle(const Sum& sum) {
        if (!sum.bias_C.defined() && !sum.residual_BChw.defined()) return sum.x_BChw;
        const at::Tensor& x = sum.x_BChw;
        const at::Tensor y = at::empty_like(x);
        cuda::add_bias_residual(pointer(x), element_type(x), floats(sum.bias_C), pointer(sum.residual_BChw),
                                x.numel() / x.size(1), x.size(1), y.mutable_data_ptr(), place_.stream);
        return y;
    }

    // In a buffer that the next call overwrites. `keep`: the sum is needed later, and is settled.
    at::Tensor norm(Sum& sum, const Norm& layer, bool silu, bool keep) {
        VAR_FAST_RANGE("group_norm_silu");
        const at::Tensor x = sum.x_BChw;
        const int64_t B = x.size(0), C = x.size(1), h = x.size(2), w = x.size(3);
        if (!buffer_.defined() || buffer_.numel() < x.numel()) buffer_ = at::empty({x.numel()}, x.options());
        const at::Tensor y = buffer_.narrow(0, 0, x.numel()).view({B, h, w, C}).permute({0, 3, 1, 2});
        // zero where it is new; every call leaves it as the next one needs it
        const int64_t bytes = cuda::group_norm_silu_scratch_bytes(B, h * w, C, layer.groups);
        if (!scratch_.defined() || scratch_.numel() < bytes) scratch_ = at::zeros({bytes}, x.options().dtype(at::kByte));
        const bool stores = sum.residual_BChw.defined() || (keep && sum.bias_C.defined());
        const at::Tensor stored = stores ? at::empty_like(x) : at::Tensor();
        cuda::group_norm_silu(pointer(x), element_type(x), floats(sum.bias_C), pointer(sum.residual_BChw),
                              stores ? stored.mutable_data_ptr() : nullptr, floats(layer.weight_C), floats(layer.bias_C), B,
                              h * w, C, layer.groups, layer.eps, silu, y.mutable_data_ptr(), element_type(x),
                              scratch_.mutable_data_ptr(), place_.stream);
        if (stores) sum = {stored, {}, {}};
        return y;
    }

    Sum residual(Sum x, const DecoderStep& step) {
        const at::Tensor normed = norm(x, step.norms[0], true, true);
        Sum h{convolve(normed, step.convs[0]), step.convs[0].bias, {}};
        const at::Tensor branch = convolve(norm(h, step.norms[1], true, false), step.convs[1]);
        if (step.convs.size() == 2) return {branch, step.convs[1].bias, x.x_BChw};
        return {branch, step.convs[1].bias + step.convs[2].bias, convolve(x.x_BChw, step.convs[2])};
    }

    Sum attend(Sum x, const DecoderStep& step) {
        const int64_t B = x.x_BChw.size(0), C = x.x_BChw.size(1), h = x.x_BChw.size(2), w = x.x_BChw.size(3), L = h * w;
        const at::Tensor tokens = norm(x, step.norms[0], false, true).permute({0, 2, 3, 1}).reshape({B * L, C});
        const at::Tensor qkv = linear(tokens, step.linears[0], false, at::empty({B * L, 3 * C}, tokens.options()), place_)
                                   .view({B, 1, L, 3, C});
        const at::Tensor seen = at::scaled_dot_product_attention(qkv.select(3, 0), qkv.select(3, 1), qkv.select(3, 2));
        const at::Tensor out = linear(seen.reshape({B * L, C}), step.linears[1], false, at::empty_like(tokens), place_);
        return {out.view({B, h, w, C}).permute({0, 3, 1, 2}), {}, x.x_BChw};
    }

    // As on the CPU (decoder.cpp) one 2x2 convolution makes the four phases, which are woven together.
    at::Tensor upsample(const at::Tensor& x_BChw, const Conv& layer) {
        const int64_t B = x_BChw.size(0), h = x_BChw.size(2), w = x_BChw.size(3);
        const at::Tensor phases = convolve(x_BChw, layer);
        const int64_t C = phases.size(1) / 4;
        const at::Tensor y = at::empty({B, C, 2 * h, 2 * w}, phases.options().memory_format(CHANNELS_LAST));
        cuda::weave_phases(pointer(phases), element_type(phases), floats(layer.bias), B, h, w, C, y.mutable_data_ptr(),
                           place_.stream);
        return y;
    }

    // A convolution to 3 channels: cuDNN has no tensor cores for it, and takes some 50 times as long as reading x. As a
    // product every pixel makes its nine shares in the 3 channels of its neighbours.
    at::Tensor image(const at::Tensor& x_BChw, const Linear& taps) {
        const int64_t B = x_BChw.size(0), C = x_BChw.size(1), h = x_BChw.size(2), w = x_BChw.size(3), n = taps.out_features;
        const at::Tensor x_NC = x_BChw.permute({0, 2, 3, 1}).reshape({B * h * w, C});
        at::Tensor made_NT = at::empty({B * h * w, n}, x_BChw.options().dtype(at::kFloat));
        if (x_NC.scalar_type() == at::kFloat)
            at::mm_out(made_NT, x_NC, taps.weight_NK.t());
        else
            at::mm_out(made_NT, x_NC, taps.weight_NK.t(), at::kFloat);
        const at::Tensor image_B3HW = at::empty({B, 3, h, w}, made_NT.options());
        cuda::image_of_taps(floats(made_NT), floats(taps.bias_N), B, h, w, n, image_B3HW.mutable_data_ptr<float>(),
                            place_.stream);
        return image_B3HW;
    }

    const Decoder& decoder_;
    const Place& place_;
    at::Tensor buffer_, scratch_;
};

}  // namespace

at::Tensor decode_cuda(const Decoder& decoder, const at::Tensor& f_hat_BChw, const Place& place) {
    return Decoding(decoder, place)(f_hat_BChw);
}

}  // namespace var_fast

#endif
