// Python bindings of the native operators. Tensors arrive as addresses, checked by var_fast/ops/<operator>.py:
// so this file needs pybind11 alone, and builds in seconds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "engine_bindings.h"
#include "cpu/isa.h"
#include "ops.h"
#include "philox.h"

#ifdef VAR_FAST_WITH_CUDA
#include "bindings_cuda.h"
#endif

namespace py = pybind11;

namespace {

template <typename T>
const T* pointer(uintptr_t address) {
    return reinterpret_cast<const T*>(address);
}

template <typename T>
T* writable(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

int64_t sample_tokens(uintptr_t cond, uintptr_t uncond, bool is_double, int64_t B, int64_t l, int64_t V,
                      double guidance, int64_t top_k, double top_p, uintptr_t seeds, int64_t scale, uintptr_t index,
                      int threads) {
    py::gil_scoped_release without_gil;
    const auto run = [&](auto element) {
        using T = decltype(element);
        return var_fast::sample_tokens<T>(pointer<T>(cond), pointer<T>(uncond), B, l, V, guidance, top_k, top_p,
                                          pointer<int64_t>(seeds), scale, writable<int64_t>(index), threads);
    };
    return is_double ? run(double{}) : run(float{});
}

void cpu_qk_norm(uintptr_t qkv, int type, uintptr_t scale_H, float softmax_scale, int64_t S, int64_t R, int64_t l,
                 int64_t H, int64_t D, uintptr_t q, uintptr_t k_cache, uintptr_t v_cache, int64_t begin,
                 int64_t capacity, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::qk_norm(pointer<void>(qkv), var_fast::Type(type), pointer<float>(scale_H), softmax_scale, S, R, l, H,
                           D, reinterpret_cast<void*>(q), reinterpret_cast<void*>(k_cache),
                           reinterpret_cast<void*>(v_cache), begin, capacity, threads);
}

void cpu_scale_attention(uintptr_t q, uintptr_t k_cache, uintptr_t v_cache, int type, int64_t R, int64_t l, int64_t H,
                         int64_t D, int64_t length, int64_t capacity, uintptr_t out, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::scale_attention(pointer<void>(q), pointer<void>(k_cache), pointer<void>(v_cache),
                                   var_fast::Type(type), R, l, H, D, length, capacity, reinterpret_cast<void*>(out),
                                   threads);
}

var_fast::Type type_of(int type) { return static_cast<var_fast::Type>(type); }

void cpu_residual_adaln_modulate(uintptr_t x, uintptr_t branch, int branch_type, uintptr_t gate, uintptr_t scale,
                                 uintptr_t shift, int64_t stride, int64_t M, int64_t R, int64_t L, int64_t C, float eps,
                                 uintptr_t y, int y_type, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::residual_adaln_modulate(writable<float>(x), pointer<void>(branch), type_of(branch_type),
                                           pointer<float>(gate), pointer<float>(scale), pointer<float>(shift), stride,
                                           M, R, L, C, eps, writable<void>(y), type_of(y_type), threads);
}

void cpu_residual_adaln_modulate_forward(uintptr_t x, int type, uintptr_t branch, int branch_type, uintptr_t gate,
                                         uintptr_t scale, uintptr_t shift, int64_t B, int64_t L, int64_t C, float eps,
                                         uintptr_t x_out, uintptr_t y, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::residual_adaln_modulate_forward(pointer<void>(x), type_of(type), pointer<void>(branch),
                                                   type_of(branch_type), pointer<float>(gate), pointer<float>(scale),
                                                   pointer<float>(shift), B, L, C, eps, writable<void>(x_out),
                                                   writable<void>(y), threads);
}

void cpu_residual_adaln_modulate_backward(uintptr_t dx_out, uintptr_t dy, uintptr_t x, int type, uintptr_t branch,
                                          int branch_type, uintptr_t gate, uintptr_t scale, int64_t B, int64_t L,
                                          int64_t C, float eps, uintptr_t dx, uintptr_t dbranch, uintptr_t dgate,
                                          uintptr_t dscale, uintptr_t dshift, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::residual_adaln_modulate_backward(
        pointer<void>(dx_out), pointer<void>(dy), pointer<void>(x), type_of(type), pointer<void>(branch),
        type_of(branch_type), pointer<float>(gate), pointer<float>(scale), B, L, C, eps, writable<void>(dx),
        writable<void>(dbranch), writable<float>(dgate), writable<float>(dscale), writable<float>(dshift), threads);
}

void cpu_qk_norm_forward(uintptr_t x, int type, uintptr_t scale_H, int64_t tokens, int64_t H, int64_t D, uintptr_t q,
                         uintptr_t k, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::qk_norm_forward(pointer<void>(x), type_of(type), pointer<float>(scale_H), tokens, H, D,
                                   writable<void>(q), writable<void>(k), threads);
}

void cpu_qk_norm_backward(uintptr_t dq, uintptr_t dk, uintptr_t dv, const std::array<int64_t, 9>& strides, uintptr_t x,
                          int type, uintptr_t scale_H, int64_t B, int64_t L, int64_t H, int64_t D, uintptr_t dx,
                          uintptr_t dscale_H, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::qk_norm_backward(pointer<void>(dq), pointer<void>(dk), pointer<void>(dv), strides.data(),
                                    pointer<void>(x), type_of(type), pointer<float>(scale_H), B, L, H, D,
                                    writable<void>(dx), writable<float>(dscale_H), threads);
}

void cpu_gelu(uintptr_t x, int type, int64_t n, uintptr_t y, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::gelu(pointer<void>(x), type_of(type), n, writable<void>(y), threads);
}

void cpu_gelu_backward(uintptr_t dy, uintptr_t x, int type, int64_t n, uintptr_t dx, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::gelu_backward(pointer<void>(dy), pointer<void>(x), type_of(type), n, writable<void>(dx), threads);
}

void cpu_group_norm_silu(uintptr_t x, int x_type, uintptr_t weight, uintptr_t bias, int64_t B, int64_t hw, int64_t C,
                         int64_t groups, float eps, bool silu, uintptr_t y, int y_type, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::group_norm_silu(pointer<void>(x), type_of(x_type), pointer<float>(weight), pointer<float>(bias), B,
                                   hw, C, groups, eps, silu, writable<void>(y), type_of(y_type), threads);
}

void cpu_linear(uintptr_t x, uintptr_t weight, int weight_type, uintptr_t bias, int64_t M, int64_t N, int64_t K, bool gelu,
                uintptr_t y, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::linear(pointer<float>(x), pointer<void>(weight), type_of(weight_type), pointer<float>(bias), M, N, K, gelu,
                          reinterpret_cast<float*>(y), threads);
}

int64_t cpu_draw_tokens(uintptr_t logits, uintptr_t seeds, int64_t scale, int64_t B, int64_t l, int64_t V,
                        int64_t top_k, double top_p, uintptr_t idx, int threads) {
    py::gil_scoped_release without_gil;
    return var_fast::cpu::draw_tokens(pointer<float>(logits), pointer<int64_t>(seeds), scale, B, l, V, top_k, top_p,
                                      writable<int64_t>(idx), threads);
}

void cpu_pyramid_update(uintptr_t idx, uintptr_t codes, uintptr_t codebook, uintptr_t phi_weight, uintptr_t phi_bias,
                        float phi_ratio, uintptr_t f_hat, int64_t B, int64_t C, int64_t h, int64_t w, int64_t pn,
                        int64_t pn_next, uintptr_t next_map, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::pyramid_update(pointer<int64_t>(idx), pointer<float>(codes), pointer<float>(codebook),
                                  pointer<float>(phi_weight), pointer<float>(phi_bias), phi_ratio,
                                  writable<float>(f_hat), B, C, h, w, pn, pn_next, writable<float>(next_map), threads);
}

py::tuple philox4x32(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
    const var_fast::Philox words =
        var_fast::philox4x32(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
    return py::make_tuple(words.word[0], words.word[1], words.word[2], words.word[3]);
}

void cpu_conv3x3_pack(uintptr_t weight, int64_t Cin, int64_t Cout, uintptr_t packed, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::conv3x3_pack(pointer<float>(weight), Cin, Cout, reinterpret_cast<float*>(packed), threads);
}

void cpu_conv3x3(uintptr_t x, uintptr_t packed, uintptr_t bias, uintptr_t residual, int64_t B, int64_t h, int64_t w,
                 int64_t Cin, int64_t Cout, uintptr_t y, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::conv3x3(pointer<float>(x), pointer<float>(packed), pointer<float>(bias), pointer<float>(residual), B,
                           h, w, Cin, Cout, reinterpret_cast<float*>(y), threads);
}

void cpu_linear_bf16_pack(uintptr_t weight, int64_t N, int64_t K, uintptr_t packed, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::linear_bf16_pack(pointer<void>(weight), N, K, writable<void>(packed), threads);
}

void cpu_linear_bf16(uintptr_t x, uintptr_t packed, uintptr_t bias, int64_t M, int64_t N, int64_t K, bool gelu,
                     uintptr_t y, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::linear_bf16(pointer<void>(x), pointer<void>(packed), pointer<float>(bias), M, N, K, gelu,
                               writable<void>(y), threads);
}

void cpu_feed_forward_bf16(uintptr_t x, uintptr_t packed1, uintptr_t bias1, uintptr_t packed2, uintptr_t bias2, int64_t M,
                           int64_t C, int64_t hidden, uintptr_t scratch, uintptr_t y, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::feed_forward_bf16(pointer<void>(x), pointer<void>(packed1), pointer<float>(bias1), pointer<void>(packed2),
                                     pointer<float>(bias2), M, C, hidden, writable<void>(scratch), writable<void>(y),
                                     threads);
}

void cpu_conv3x3_bf16_pack(uintptr_t weight, int64_t Cin, int64_t Cout, uintptr_t packed) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::conv3x3_bf16_pack(pointer<float>(weight), Cin, Cout, writable<void>(packed));
}

void cpu_conv3x3_bf16(uintptr_t x, uintptr_t packed, uintptr_t bias, uintptr_t residual, int64_t B, int64_t h, int64_t w,
                      int64_t Cin, int64_t Cout, uintptr_t y, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::conv3x3_bf16(pointer<void>(x), pointer<void>(packed), pointer<float>(bias), pointer<void>(residual), B,
                                h, w, Cin, Cout, writable<void>(y), threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native operators of var_fast; call them through var_fast.ops.";
    m.def("sample_tokens", &sample_tokens, py::arg("cond"), py::arg("uncond"), py::arg("is_double"), py::arg("B"),
          py::arg("l"), py::arg("V"), py::arg("guidance"), py::arg("top_k"), py::arg("top_p"), py::arg("seeds"),
          py::arg("scale"), py::arg("index"), py::arg("threads"));
    var_fast::bind_engine(m);
    m.def("cpu_qk_norm", &cpu_qk_norm, py::arg("qkv"), py::arg("type"), py::arg("scale_H"), py::arg("softmax_scale"),
          py::arg("S"), py::arg("R"), py::arg("l"), py::arg("H"), py::arg("D"), py::arg("q"), py::arg("k_cache"),
          py::arg("v_cache"), py::arg("begin"), py::arg("capacity"), py::arg("threads"));
    m.def("cpu_scale_attention", &cpu_scale_attention, py::arg("q"), py::arg("k_cache"), py::arg("v_cache"),
          py::arg("type"), py::arg("R"), py::arg("l"), py::arg("H"), py::arg("D"), py::arg("length"),
          py::arg("capacity"), py::arg("out"), py::arg("threads"));
    m.def("cpu_q_bytes", [](int type, int64_t R, int64_t l, int64_t H, int64_t D) {
        return var_fast::cpu::q_bytes(var_fast::Type(type), R, l, H, D);
    });
    m.def("cpu_k_cache_bytes", [](int type, int64_t R, int64_t H, int64_t D, int64_t capacity) {
        return var_fast::cpu::k_cache_bytes(var_fast::Type(type), R, H, D, capacity);
    });
    m.def("cpu_v_cache_bytes", [](int type, int64_t R, int64_t H, int64_t D, int64_t capacity) {
        return var_fast::cpu::v_cache_bytes(var_fast::Type(type), R, H, D, capacity);
    });
    m.def("cpu_residual_adaln_modulate", &cpu_residual_adaln_modulate, py::arg("x"), py::arg("branch"),
          py::arg("branch_type"), py::arg("gate"), py::arg("scale"), py::arg("shift"), py::arg("stride"), py::arg("M"),
          py::arg("R"), py::arg("L"), py::arg("C"), py::arg("eps"), py::arg("y"), py::arg("y_type"),
          py::arg("threads"));
    m.def("cpu_residual_adaln_modulate_forward", &cpu_residual_adaln_modulate_forward, py::arg("x"), py::arg("type"),
          py::arg("branch"), py::arg("branch_type"), py::arg("gate"), py::arg("scale"), py::arg("shift"), py::arg("B"),
          py::arg("L"), py::arg("C"), py::arg("eps"), py::arg("x_out"), py::arg("y"), py::arg("threads"));
    m.def("cpu_residual_adaln_modulate_backward", &cpu_residual_adaln_modulate_backward, py::arg("dx_out"), py::arg("dy"),
          py::arg("x"), py::arg("type"), py::arg("branch"), py::arg("branch_type"), py::arg("gate"), py::arg("scale"),
          py::arg("B"), py::arg("L"), py::arg("C"), py::arg("eps"), py::arg("dx"), py::arg("dbranch"), py::arg("dgate"),
          py::arg("dscale"), py::arg("dshift"), py::arg("threads"));
    m.def("cpu_qk_norm_forward", &cpu_qk_norm_forward, py::arg("x"), py::arg("type"), py::arg("scale_H"),
          py::arg("tokens"), py::arg("H"), py::arg("D"), py::arg("q"), py::arg("k"), py::arg("threads"));
    m.def("cpu_qk_norm_backward", &cpu_qk_norm_backward, py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("strides"),
          py::arg("x"), py::arg("type"), py::arg("scale_H"), py::arg("B"), py::arg("L"), py::arg("H"), py::arg("D"),
          py::arg("dx"), py::arg("dscale_H"), py::arg("threads"));
    m.def("cpu_gelu", &cpu_gelu, py::arg("x"), py::arg("type"), py::arg("n"), py::arg("y"), py::arg("threads"));
    m.def("cpu_gelu_backward", &cpu_gelu_backward, py::arg("dy"), py::arg("x"), py::arg("type"), py::arg("n"),
          py::arg("dx"), py::arg("threads"));
    m.def("cpu_group_norm_silu", &cpu_group_norm_silu, py::arg("x"), py::arg("x_type"), py::arg("weight"),
          py::arg("bias"), py::arg("B"), py::arg("hw"), py::arg("C"), py::arg("groups"), py::arg("eps"),
          py::arg("silu"), py::arg("y"), py::arg("y_type"), py::arg("threads"));
    m.def("cpu_draw_tokens", &cpu_draw_tokens, py::arg("logits"), py::arg("seeds"), py::arg("scale"), py::arg("B"),
          py::arg("l"), py::arg("V"), py::arg("top_k"), py::arg("top_p"), py::arg("idx"), py::arg("threads"));
    m.def("cpu_pyramid_update", &cpu_pyramid_update, py::arg("idx"), py::arg("codes"), py::arg("codebook"),
          py::arg("phi_weight"), py::arg("phi_bias"), py::arg("phi_ratio"), py::arg("f_hat"), py::arg("B"),
          py::arg("C"), py::arg("h"), py::arg("w"), py::arg("pn"), py::arg("pn_next"), py::arg("next_map"),
          py::arg("threads"));
    m.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"));
    m.def("cpu_token_exponentials", &var_fast::cpu::token_exponentials, py::arg("seed"), py::arg("scale"),
          py::arg("token"), py::arg("V"));
    m.def("cpu_isa", [] { return var_fast::cpu::isa_name(var_fast::cpu::isa()); });
    m.def("cpu_linear", &cpu_linear, py::arg("x"), py::arg("weight"), py::arg("weight_type"), py::arg("bias"), py::arg("M"),
          py::arg("N"), py::arg("K"), py::arg("gelu"), py::arg("y"), py::arg("threads"));
    m.def("cpu_linear_bf16_packed_bytes", &var_fast::cpu::linear_bf16_packed_bytes, py::arg("N"), py::arg("K"));
    m.def("cpu_linear_bf16_pack", &cpu_linear_bf16_pack, py::arg("weight"), py::arg("N"), py::arg("K"),
          py::arg("packed"), py::arg("threads"));
    m.def("cpu_linear_bf16", &cpu_linear_bf16, py::arg("x"), py::arg("packed"), py::arg("bias"), py::arg("M"),
          py::arg("N"), py::arg("K"), py::arg("gelu"), py::arg("y"), py::arg("threads"));
    m.def("cpu_feed_forward_bf16_bytes", &var_fast::cpu::feed_forward_bf16_bytes, py::arg("M"), py::arg("hidden"));
    m.def("cpu_feed_forward_bf16", &cpu_feed_forward_bf16, py::arg("x"), py::arg("packed1"), py::arg("bias1"),
          py::arg("packed2"), py::arg("bias2"), py::arg("M"), py::arg("C"), py::arg("hidden"), py::arg("scratch"),
          py::arg("y"), py::arg("threads"));
    m.def("cpu_conv3x3_packed_bytes", &var_fast::cpu::conv3x3_packed_bytes, py::arg("Cin"), py::arg("Cout"));
    m.def("cpu_conv3x3_pack", &cpu_conv3x3_pack, py::arg("weight"), py::arg("Cin"), py::arg("Cout"), py::arg("packed"),
          py::arg("threads"));
    m.def("cpu_conv3x3", &cpu_conv3x3, py::arg("x"), py::arg("packed"), py::arg("bias"), py::arg("residual"),
          py::arg("B"), py::arg("h"), py::arg("w"), py::arg("Cin"), py::arg("Cout"), py::arg("y"), py::arg("threads"));
    m.def("cpu_conv3x3_bf16_packed_bytes", &var_fast::cpu::conv3x3_bf16_packed_bytes, py::arg("Cin"), py::arg("Cout"));
    m.def("cpu_conv3x3_bf16_pack", &cpu_conv3x3_bf16_pack, py::arg("weight"), py::arg("Cin"), py::arg("Cout"),
          py::arg("packed"));
    m.def("cpu_conv3x3_bf16", &cpu_conv3x3_bf16, py::arg("x"), py::arg("packed"), py::arg("bias"), py::arg("residual"),
          py::arg("B"), py::arg("h"), py::arg("w"), py::arg("Cin"), py::arg("Cout"), py::arg("y"), py::arg("threads"));
#ifdef VAR_FAST_WITH_CUDA
    var_fast::bind_cuda(m);
    m.def("has_cuda", [] { return true; }, "Whether this build holds the CUDA operators (not: whether there is a GPU).");
#else
    m.def("has_cuda", [] { return false; }, "Whether this build holds the CUDA operators (not: whether there is a GPU).");
#endif
}
