#include "decoder.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include "leaf.h"

namespace var_fast {
namespace {

constexpr auto CHANNELS_LAST = at::MemoryFormat::ChannelsLast;

void push_convolution(torch::jit::Stack& stack, const at::Tensor& x_BChw, const Conv& layer) {
    const std::vector<int64_t> padding(2, layer.padding), ones(2, 1);
    stack.emplace_back(x_BChw);
    stack.emplace_back(layer.weight);
    stack.emplace_back(layer.bias);
    stack.emplace_back(padding);
    stack.emplace_back(ones);
    stack.emplace_back(ones);
    stack.emplace_back(int64_t{1});
}

// The result is channels last, as x is.
at::Tensor convolve(const at::Tensor& x_BChw, const Conv& layer) {
    if (!layer.packed) return at::conv2d(x_BChw, layer.weight, layer.bias, 1, layer.padding).contiguous(CHANNELS_LAST);
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_convolution_pointwise", "");
    torch::jit::Stack stack;
    push_convolution(stack, x_BChw, layer);
    stack.emplace_back("none");
    stack.emplace_back(c10::List<std::optional<at::Scalar>>());
    stack.emplace_back("");
    op.callBoxed(stack);
    return stack.back().toTensor().contiguous(CHANNELS_LAST);
}

// sum += convolution of x, in one pass over sum where oneDNN does both.
void convolve_and_add(const at::Tensor& sum_BChw, const at::Tensor& x_BChw, const Conv& layer) {
    if (!layer.packed) {
        sum_BChw.add_(convolve(x_BChw, layer));
        return;
    }
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_convolution_pointwise_", "binary");
    torch::jit::Stack stack;
    stack.emplace_back(sum_BChw);
    push_convolution(stack, x_BChw, layer);
    stack.emplace_back("add");
    stack.emplace_back(at::Scalar(1.0));
    stack.emplace_back();
    stack.emplace_back(c10::List<std::optional<at::Scalar>>());
    stack.emplace_back();
    op.callBoxed(stack);
}

// Winograd's weights in float32 are four times as many, and made anew for every call rather than kept (those in bfloat16
// come with the layer): that pays where there are many pixels for each.
constexpr int64_t WINOGRAD_PIXELS = 64 * 64;

bool suits_winograd(const at::Tensor& x_BChw, const Conv& layer) {
    if (layer.winograd > 0) return true;
    return x_BChw.is_cpu() && x_BChw.scalar_type() == at::kFloat && layer.padding == 1 && layer.weight.size(2) == 3 &&
           layer.weight.size(0) >= 32 && layer.weight.size(1) >= 32 && x_BChw.size(2) * x_BChw.size(3) >= WINOGRAD_PIXELS;
}

class Decoding {
public:
    Decoding(const Decoder& decoder, const Place& place) : decoder_(decoder), place_(place) {}

    at::Tensor operator()(const at::Tensor& f_hat_BChw) {
        at::Tensor x = f_hat_BChw.to(scalar_type(decoder_.type)).contiguous(CHANNELS_LAST);
        for (const DecoderStep& step : decoder_.steps) {
            switch (step.kind) {
                case DecoderStep::Kind::conv: x = conv(x, step.convs[0]); break;
                case DecoderStep::Kind::residual: x = residual(std::move(x), step); break;
                case DecoderStep::Kind::attention: attend(x, step); break;
                case DecoderStep::Kind::upsample: x = upsample(x, step.convs[0]); break;
                case DecoderStep::Kind::norm_silu: x = norm(x, step.norms[0], true); break;
                case DecoderStep::Kind::image: TORCH_CHECK(false, "a step of the decoder on CUDA");
            }
        }
        return x;
    }

private:
    // In a buffer that the next call overwrites.
    at::Tensor norm(const at::Tensor& x_BChw, const Norm& layer, bool silu) {
        VAR_FAST_RANGE("group_norm_silu");
        if (!buffer_.defined() || buffer_.numel() < x_BChw.numel()) buffer_ = at::empty({x_BChw.numel()}, x_BChw.options());
        const int64_t B = x_BChw.size(0), C = x_BChw.size(1), h = x_BChw.size(2), w = x_BChw.size(3);
        at::Tensor y = buffer_.narrow(0, 0, x_BChw.numel()).view({B, h, w, C}).permute({0, 3, 1, 2});
        const at::Tensor x = x_BChw.contiguous(CHANNELS_LAST);
        const Type type = element_type(x);
        cpu::group_norm_silu(x.const_data_ptr(), type, layer.weight_C.const_data_ptr<float>(),
                             layer.bias_C.const_data_ptr<float>(), B, h * w, C, layer.groups, layer.eps, silu,
                             y.mutable_data_ptr(), type, place_.threads);
        return y;
    }

    at::Tensor conv(const at::Tensor& x_BChw, const Conv& layer) {
        if (!suits_winograd(x_BChw, layer)) return convolve(x_BChw, layer);
        const int64_t out = layer.winograd > 0 ? layer.winograd : layer.weight.size(0);
        const at::Tensor y = at::empty({x_BChw.size(0), out, x_BChw.size(2), x_BChw.size(3)},
                                       x_BChw.options().memory_format(CHANNELS_LAST));
        winograd(x_BChw, layer, nullptr, y);
        return y;
    }

    void conv_and_add(const at::Tensor& sum_BChw, const at::Tensor& x_BChw, const Conv& layer) {
        if (!suits_winograd(x_BChw, layer)) return convolve_and_add(sum_BChw, x_BChw, layer);
        winograd(x_BChw, layer, sum_BChw.const_data_ptr(), sum_BChw);
    }

    void winograd(const at::Tensor& x_BChw, const Conv& layer, const void* residual, const at::Tensor& y_BChw) {
        RECORD_USER_SCOPE("op:convolution");  // see leaf.h
        const int64_t B = x_BChw.size(0), in = x_BChw.size(1), h = x_BChw.size(2), w = x_BChw.size(3);
        const int64_t out = y_BChw.size(1);
        const float* const bias = layer.bias.const_data_ptr<float>();
        if (layer.winograd > 0) {
            TORCH_CHECK(layer.weight.nbytes() == static_cast<size_t>(cpu::conv3x3_bf16_packed_bytes(in, out)),
                        "a 3x3 convolution's weight does not fit ", in, " channels");
            cpu::conv3x3_bf16(x_BChw.const_data_ptr(), layer.weight.const_data_ptr(), bias, residual, B, h, w, in, out,
                              y_BChw.mutable_data_ptr(), place_.threads);
            return;
        }
        const int64_t floats = cpu::conv3x3_packed_bytes(in, out) / static_cast<int64_t>(sizeof(float));
        if (!packed_.defined() || packed_.numel() < floats) packed_ = at::empty({floats}, x_BChw.options());
        cpu::conv3x3_pack(layer.weight.const_data_ptr<float>(), in, out, packed_.mutable_data_ptr<float>(), place_.threads);
        cpu::conv3x3(x_BChw.const_data_ptr<float>(), packed_.const_data_ptr<float>(), bias,
                     static_cast<const float*>(residual), B, h, w, in, out, y_BChw.mutable_data_ptr<float>(),
                     place_.threads);
    }

    // Overwrites x: nothing else needs it.
    at::Tensor residual(at::Tensor x, const DecoderStep& step) {
        const at::Tensor h = conv(norm(x, step.norms[0], true), step.convs[0]);
        if (step.convs.size() > 2) x = convolve(x, step.convs[2]);
        conv_and_add(x, norm(h, step.norms[1], true), step.convs[1]);
        return x;
    }

    void attend(const at::Tensor& x_BChw, const DecoderStep& step) {
        const int64_t B = x_BChw.size(0), C = x_BChw.size(1), L = x_BChw.size(2) * x_BChw.size(3);
        const at::Tensor tokens = norm(x_BChw, step.norms[0], false).permute({0, 2, 3, 1}).reshape({B * L, C});
        const at::Tensor qkv = linear(tokens, step.linears[0], false, at::empty({B * L, 3 * C}, tokens.options()), place_)
                                   .view({B, 1, L, 3, C});
        const at::Tensor seen = at::scaled_dot_product_attention(qkv.select(3, 0), qkv.select(3, 1), qkv.select(3, 2));
        const at::Tensor out = linear(seen.reshape({B * L, C}), step.linears[1], false, at::empty_like(tokens), place_);
        x_BChw.permute({0, 2, 3, 1}).add_(out.view({B, x_BChw.size(2), x_BChw.size(3), C}));
    }

    // Doubling by nearest neighbours and then a 3x3 convolution: every output pixel sees 2x2 input pixels only, by its
    // place in its pair of rows and columns one of four sets of weights. One 2x2 convolution makes all four at every
    // corner between pixels; they are woven together here.
    static at::Tensor upsample(const at::Tensor& x_BChw, const Conv& layer) {
        const int64_t B = x_BChw.size(0), h = x_BChw.size(2), w = x_BChw.size(3);
        const at::Tensor phases = convolve(x_BChw, layer);
        const int64_t C = phases.size(1) / 4;
        at::Tensor y = at::empty({B, C, 2 * h, 2 * w}, phases.options().memory_format(CHANNELS_LAST));
        const at::Tensor pairs = y.permute({0, 2, 3, 1}).view({B, h, 2, w, 2, C});
        for (int64_t a = 0; a < 2; ++a)
            for (int64_t b = 0; b < 2; ++b)
                pairs.select(4, b).select(2, a).copy_(
                    phases.narrow(1, (2 * a + b) * C, C).narrow(2, a, h).narrow(3, b, w).permute({0, 2, 3, 1}));
        return y;
    }

    const Decoder& decoder_;
    const Place& place_;
    at::Tensor buffer_, packed_;
};

}  // namespace

at::Tensor decode(const Decoder& decoder, const at::Tensor& f_hat_BChw, const Place& place) {
    const auto finish = [](const at::Tensor& x) { return x.to(at::kFloat).clamp_(-1, 1).add_(1).mul_(0.5).contiguous(); };
#ifdef VAR_FAST_WITH_CUDA
    if (place.cuda) return decode_cuda(decoder, f_hat_BChw, place);
#endif
    // One by one: what a layer leaves is still in the cache for the next one, and memory does not grow with the batch.
    std::vector<at::Tensor> images;
    Decoding decoding(decoder, place);
    for (const at::Tensor& f_hat_Chw : f_hat_BChw.unbind(0)) images.push_back(finish(decoding(f_hat_Chw.unsqueeze(0))));
    return at::cat(images);
}

}  // namespace var_fast
