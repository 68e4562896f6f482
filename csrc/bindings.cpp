// Python bindings of the native operators. Tensors arrive as addresses, checked by var_fast/ops/<operator>.py:
// so this file needs pybind11 alone, and builds in seconds.
#include <pybind11/pybind11.h>

#include "engine_bindings.h"
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

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native operators of var_fast; call them through var_fast.ops.";
    m.def("sample_tokens", &sample_tokens, py::arg("cond"), py::arg("uncond"), py::arg("is_double"), py::arg("rows"),
          py::arg("V"), py::arg("guidance"), py::arg("top_k"), py::arg("top_p"), py::arg("u"), py::arg("index"),
          py::arg("threads"));
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
}
