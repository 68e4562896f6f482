#include "linear.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>

#ifdef VAR_FAST_WITH_CUDA
#include "cuda/ops_cuda.h"
#endif

namespace var_fast {
namespace {

// oneDNN's product with packed weights is an operator of torch without a C++ function of its own.
at::Tensor packed_linear(const at::Tensor& x_MK, const Linear& layer) {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "");
    torch::jit::Stack stack;
    stack.emplace_back(x_MK);
    stack.emplace_back(layer.weight_NK);
    stack.emplace_back(layer.bias_N.defined() ? c10::IValue(layer.bias_N) : c10::IValue());
    stack.emplace_back("none");  // GELU done apart is faster: 30% of the product in oneDNN's epilogue
    stack.emplace_back(c10::List<std::optional<at::Scalar>>());
    stack.emplace_back("");
    op.callBoxed(stack);
    return stack.back().toTensor();
}

#ifdef VAR_FAST_WITH_CUDA
// Few rows and not too many weights: reading them is all the work, and the library's kernels take up to twice our
// time. On an H100 they catch up where the weights are more than this.
constexpr int64_t SKINNY_WEIGHTS = 1 << 23;

bool is_skinny(const at::Tensor& x_MK, const at::Tensor& y_MN) {
    return x_MK.scalar_type() != at::kFloat && y_MN.defined() && x_MK.size(0) <= cuda::SKINNY_ROWS &&
           x_MK.size(1) % 8 == 0 && x_MK.size(1) * y_MN.size(1) <= SKINNY_WEIGHTS;
}

void skinny_linear(const at::Tensor& x_MK, const Linear& layer, bool gelu, const at::Tensor& y_MN, const Place& place) {
    RECORD_USER_SCOPE("op:matrix products");  // see leaf.h
    cuda::skinny_linear(x_MK.const_data_ptr(), layer.weight_NK.const_data_ptr(), element_type(x_MK),
                        layer.bias_N.defined() ? layer.bias_N.const_data_ptr() : nullptr, x_MK.size(0),
                        layer.out_features, x_MK.size(1), gelu, y_MN.mutable_data_ptr(),
                        y_MN.scalar_type() == at::kFloat, place.stream);
}
#endif

const float* float_pointer(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
}

void check_tiles(const Linear& layer, int64_t in_features) {
    const int64_t bytes = cpu::linear_bf16_packed_bytes(layer.out_features, in_features);
    TORCH_CHECK_VALUE(layer.weight_NK.nbytes() == static_cast<size_t>(bytes), "a layer's weights do not fit ", in_features,
                      " features");
}

}  // namespace

at::ScalarType scalar_type(Type type) {
    return type == Type::f32 ? at::kFloat : type == Type::bf16 ? at::kBFloat16 : at::kHalf;
}

Type element_type(const at::Tensor& tensor) {
    const at::ScalarType type = tensor.scalar_type();
    TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "a tensor is ", type,
                      ", expected float32, bfloat16 or float16");
    return type == at::kFloat ? Type::f32 : type == at::kBFloat16 ? Type::bf16 : Type::f16;
}

at::Tensor linear(const at::Tensor& x_MK, const Linear& layer, bool gelu, const at::Tensor& y_MN, const Place& place) {
    const bool is_float = x_MK.scalar_type() == at::kFloat;
    TORCH_CHECK_VALUE(layer.layout != Layout::plain || layer.weight_NK.size(1) == x_MK.size(1), "a layer takes ",
                      layer.weight_NK.size(1), " features and is given ", x_MK.size(1));
    TORCH_CHECK_VALUE(!y_MN.defined() || y_MN.size(1) == layer.out_features, "a layer makes ", layer.out_features,
                      " features, expected ", y_MN.size(1));
    if (!place.cuda && is_float) {
        TORCH_CHECK_VALUE(layer.layout == Layout::plain, "a layer's weight is packed, and its input is float32");
        RECORD_USER_SCOPE("op:matrix products");  // see leaf.h
        cpu::linear(x_MK.const_data_ptr<float>(), layer.weight_NK.const_data_ptr(), element_type(layer.weight_NK),
                    float_pointer(layer.bias_N), x_MK.size(0), layer.out_features, x_MK.size(1), gelu,
                    y_MN.mutable_data_ptr<float>(), place.threads);
        return y_MN;
    }
    if (layer.layout == Layout::tiles) {
        RECORD_USER_SCOPE("op:matrix products");
        const int64_t M = x_MK.size(0), N = layer.out_features, K = x_MK.size(1);
        check_tiles(layer, K);
        cpu::linear_bf16(x_MK.const_data_ptr(), layer.weight_NK.const_data_ptr(), float_pointer(layer.bias_N), M, N, K,
                         gelu, y_MN.mutable_data_ptr(), place.threads);
        return y_MN;
    }
    if (!place.cuda) {
        const at::Tensor made_MN =
            layer.layout == Layout::onednn ? packed_linear(x_MK, layer) : at::linear(x_MK, layer.weight_NK, layer.bias_N);
        if (gelu) {
            RECORD_USER_SCOPE("op:gelu");
            cpu::gelu(made_MN.const_data_ptr(), element_type(made_MN), made_MN.numel(), made_MN.mutable_data_ptr(),
                      place.threads);
        }
        return made_MN;
    }
#ifdef VAR_FAST_WITH_CUDA
    if (is_skinny(x_MK, y_MN)) {
        skinny_linear(x_MK, layer, gelu, y_MN, place);
        return y_MN;
    }
#endif
    at::Tensor out_MN = y_MN;
    const at::Tensor weight_KN = layer.weight_NK.t();
    if (gelu && !is_float && layer.bias_N.defined())
        return at::_addmm_activation_out(out_MN, layer.bias_N, x_MK, weight_KN, 1, 1, /*use_gelu=*/true);
    layer.bias_N.defined() ? at::addmm_out(out_MN, layer.bias_N, x_MK, weight_KN)
                           : at::mm_out(out_MN, x_MK, weight_KN);
#ifdef VAR_FAST_WITH_CUDA
    if (gelu) cuda::gelu(out_MN.mutable_data_ptr(), element_type(out_MN), out_MN.numel(), place.stream);
#endif
    return out_MN;
}

at::Tensor feed_forward(const at::Tensor& x_MC, const Linear& fc1, const Linear& fc2, const at::Tensor& hidden,
                        const at::Tensor& y_MC, const Place& place) {
    const int64_t M = x_MC.size(0), C = x_MC.size(1), width = fc1.out_features;
    if (fc1.layout != Layout::tiles) {
        const at::Tensor hidden_MN = hidden.defined() ? hidden.narrow(0, 0, M * width).view({M, width}) : at::Tensor();
        return linear(linear(x_MC, fc1, /*gelu=*/true, hidden_MN, place), fc2, /*gelu=*/false, y_MC, place);
    }
    RECORD_USER_SCOPE("op:matrix products");
    check_tiles(fc1, C);
    check_tiles(fc2, width);
    cpu::feed_forward_bf16(x_MC.const_data_ptr(), fc1.weight_NK.const_data_ptr(), float_pointer(fc1.bias_N),
                           fc2.weight_NK.const_data_ptr(), float_pointer(fc2.bias_N), M, C, width,
                           hidden.mutable_data_ptr(), y_MC.mutable_data_ptr(), place.threads);
    return y_MC;
}

int64_t feed_forward_elements(int64_t M, const Linear& fc1) {
    const int64_t in_tiles = cpu::feed_forward_bf16_bytes(M, fc1.out_features) / static_cast<int64_t>(sizeof(at::BFloat16));
    return fc1.layout == Layout::tiles ? in_tiles : M * fc1.out_features;
}

void linear_float32(const at::Tensor& x_MK, const Linear& layer, const at::Tensor& y_MN, const Place& place) {
    at::Tensor out_MN = y_MN;
    if (x_MK.scalar_type() == at::kFloat) {
        linear(x_MK, layer, /*gelu=*/false, y_MN, place);
        return;
    }
#ifdef VAR_FAST_WITH_CUDA
    if (is_skinny(x_MK, y_MN)) return skinny_linear(x_MK, layer, /*gelu=*/false, y_MN, place);
#endif
    at::mm_out(out_MN, x_MK, layer.weight_NK.t(), at::kFloat);  // float32 sums leave cuBLAS unrounded
    if (layer.bias_N.defined()) out_MN.add_(layer.bias_N);
}

}  // namespace var_fast
