// Python bindings of the native operators. Tensors arrive as addresses, checked by var_fast/ops/<operator>.py:
// so this file needs pybind11 alone, and builds in seconds.
#include <pybind11/pybind11.h>

#include "ops.h"

namespace py = pybind11;

namespace {

template <typename T>
const T* pointer(uintptr_t address) {
    return reinterpret_cast<const T*>(address);
}

int64_t sample_tokens(uintptr_t cond, uintptr_t uncond, bool is_double, int64_t rows, int64_t V, double guidance,
                      int64_t top_k, double top_p, uintptr_t u, uintptr_t index, int threads) {
    py::gil_scoped_release without_gil;
    const auto run = [&](auto element) {
        using T = decltype(element);
        return var_fast::sample_tokens<T>(pointer<T>(cond), pointer<T>(uncond), rows, V, guidance, top_k, top_p,
                                          pointer<double>(u), reinterpret_cast<int64_t*>(index), threads);
    };
    return is_double ? run(double{}) : run(float{});
}

void cpu_linear(uintptr_t x, uintptr_t weight, uintptr_t bias, int64_t M, int64_t N, int64_t K, bool gelu, uintptr_t y,
                int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::linear(pointer<float>(x), pointer<float>(weight), pointer<float>(bias), M, N, K, gelu,
                          reinterpret_cast<float*>(y), threads);
}

void cpu_conv3x3_pack(uintptr_t weight, int64_t Cin, int64_t Cout, uintptr_t packed) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::conv3x3_pack(pointer<float>(weight), Cin, Cout, reinterpret_cast<float*>(packed));
}

void cpu_conv3x3(uintptr_t x, uintptr_t packed, uintptr_t bias, uintptr_t residual, int64_t B, int64_t h, int64_t w,
                 int64_t Cin, int64_t Cout, uintptr_t y, int threads) {
    py::gil_scoped_release without_gil;
    var_fast::cpu::conv3x3(pointer<float>(x), pointer<float>(packed), pointer<float>(bias), pointer<float>(residual), B,
                           h, w, Cin, Cout, reinterpret_cast<float*>(y), threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native operators of var_fast; call them through var_fast.ops.";
    m.def("sample_tokens", &sample_tokens, py::arg("cond"), py::arg("uncond"), py::arg("is_double"), py::arg("rows"),
          py::arg("V"), py::arg("guidance"), py::arg("top_k"), py::arg("top_p"), py::arg("u"), py::arg("index"),
          py::arg("threads"));
    m.def("cpu_linear", &cpu_linear, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("M"), py::arg("N"),
          py::arg("K"), py::arg("gelu"), py::arg("y"), py::arg("threads"));
    m.def("cpu_conv3x3_packed_bytes", &var_fast::cpu::conv3x3_packed_bytes, py::arg("Cin"), py::arg("Cout"));
    m.def("cpu_conv3x3_pack", &cpu_conv3x3_pack, py::arg("weight"), py::arg("Cin"), py::arg("Cout"), py::arg("packed"));
    m.def("cpu_conv3x3", &cpu_conv3x3, py::arg("x"), py::arg("packed"), py::arg("bias"), py::arg("residual"),
          py::arg("B"), py::arg("h"), py::arg("w"), py::arg("Cin"), py::arg("Cout"), py::arg("y"), py::arg("threads"));
}
