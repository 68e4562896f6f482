// Python bindings of the CUDA operators: device addresses, sizes, and the stream as an integer.
#pragma once

#include <pybind11/pybind11.h>

#include "cuda/ops_cuda.h"

namespace var_fast {

namespace {

using Address = uintptr_t;

// An address as the pointer that the operator takes.
struct At {
    Address address;

    template <class T>
    operator T*() const {
        return reinterpret_cast<T*>(address);
    }
};

}  // namespace

inline void bind_cuda(pybind11::module_& m) {
    using Size = int64_t;
    m.def("cuda_residual_adaln_modulate",
          [](Address x, Address branch, int branch_type, Address gate, Address scale, Address shift, Size stride,
             Size M, Size R, Size L, Size C, float eps, Address y, int y_type, Address stream) {
              cuda::residual_adaln_modulate(At{x}, At{branch}, Type(branch_type), At{gate}, At{scale}, At{shift},
                                            stride, M, R, L, C, eps, At{y}, Type(y_type), At{stream});
          });
    m.def("cuda_qk_norm",
          [](Address qkv, int type, Address scale_H, float softmax_scale, Size S, Size R, Size l, Size H, Size D,
             Address q, Address k_cache, Address v_cache, Size begin, Size capacity, Address stream) {
              cuda::qk_norm(At{qkv}, Type(type), At{scale_H}, softmax_scale, S, R, l, H, D, At{q}, At{k_cache},
                            At{v_cache}, begin, capacity, At{stream});
          });
    m.def("cuda_scale_attention", [](Address q, Address k_cache, Address v_cache, int type, Size R, Size l, Size H,
                                     Size D, Size length, Size capacity, Address out, Address scratch, Address stream) {
        cuda::scale_attention(At{q}, At{k_cache}, At{v_cache}, Type(type), R, l, H, D, length, capacity, At{out},
                              At{scratch}, At{stream});
    });
    m.def("cuda_scale_attention_scratch_bytes", &cuda::scale_attention_scratch_bytes);
    m.def("cuda_draw_tokens", [](Address logits, Address seeds, Size scale, Size B, Size l, Size V, Size top_k,
                                 double top_p, Address idx, Address bad, Address stream) {
        cuda::draw_tokens(At{logits}, At{seeds}, scale, B, l, V, top_k, top_p, At{idx}, At{bad}, At{stream});
    });
    m.def("cuda_pyramid_update",
          [](Address idx, Address codes, Address codebook, Address phi_weight, Address phi_bias, float phi_ratio,
             Address f_hat, Size B, Size C, Size h, Size w, Size pn, Size pn_next, Address next_map, Address stream) {
              cuda::pyramid_update(At{idx}, At{codes}, At{codebook}, At{phi_weight}, At{phi_bias}, phi_ratio, At{f_hat},
                                   B, C, h, w, pn, pn_next, At{next_map}, At{stream});
          });
    m.def("cuda_group_norm_silu",
          [](Address x, int x_type, Address x_bias, Address residual, Address sum, Address weight, Address bias, Size B,
             Size hw, Size C, Size groups, float eps, bool silu, Address y, int y_type, Address scratch, Address stream) {
              cuda::group_norm_silu(At{x}, Type(x_type), At{x_bias}, At{residual}, At{sum}, At{weight}, At{bias}, B, hw,
                                    C, groups, eps, silu, At{y}, Type(y_type), At{scratch}, At{stream});
          });
    m.def("cuda_add_bias_residual", [](Address x, int type, Address bias, Address residual, Size rows, Size C, Address y,
                                       Address stream) {
        cuda::add_bias_residual(At{x}, Type(type), At{bias}, At{residual}, rows, C, At{y}, At{stream});
    });
    m.def("cuda_weave_phases", [](Address phases, int type, Address bias, Size B, Size h, Size w, Size C, Address y,
                                  Address stream) {
        cuda::weave_phases(At{phases}, Type(type), At{bias}, B, h, w, C, At{y}, At{stream});
    });
    m.def("cuda_image_of_taps", [](Address taps, Address bias, Size B, Size h, Size w, Size stride, Address image,
                                   Address stream) {
        cuda::image_of_taps(At{taps}, At{bias}, B, h, w, stride, At{image}, At{stream});
    });
    m.def("cuda_skinny_linear", [](Address x, Address weight, int type, Address bias, Size M, Size N, Size K, bool gelu,
                                   Address y, bool float_out, Address stream) {
        cuda::skinny_linear(At{x}, At{weight}, Type(type), At{bias}, M, N, K, gelu, At{y}, float_out, At{stream});
    });
    m.def("cuda_transformer_blocks",
          [](Address blocks, int type, Size depth, Size M, Size S, Size R, Size l, Size H, Size hidden, Size begin,
             Size capacity, float eps, float softmax_scale, Address x, Address y, Address q, Address attended,
             Address hidden_buffer, Address partial, Address barrier, Address stream) {
              const cuda::TransformerSizes sizes{depth, M, S, R, l, H, hidden, begin, capacity, eps, softmax_scale};
              const cuda::TransformerBuffers buffers{At{x},       At{y},       At{q}, At{attended}, At{hidden_buffer},
                                                     At{partial}, At{barrier}};
              cuda::transformer_blocks(At{blocks}, Type(type), sizes, buffers, At{stream});
          });
    m.def("cuda_transformer_blocks_partial_floats", [](Size S, Size l, Size H, Size hidden) {
        return cuda::transformer_blocks_partial_floats({0, S, S, S, l, H, hidden, 0, l, 0, 0});
    });
    m.def("cuda_group_norm_silu_scratch_bytes", &cuda::group_norm_silu_scratch_bytes);
    m.def("cuda_gelu",
          [](Address x, int type, Size n, Address stream) { cuda::gelu(At{x}, Type(type), n, At{stream}); });
}

}  // namespace var_fast
