// Each leaf operator on the device where the tensors lie, under the name by which bench/timeline.py knows it in a profile.
#pragma once

#include <ATen/record_function.h>

#include "linear.h"
#include "ops.h"

namespace var_fast {

#define VAR_FAST_RANGE(operator) RECORD_USER_SCOPE("op:" operator)

#ifdef VAR_FAST_WITH_CUDA
#define VAR_FAST_LEAF(name)                                                                 \
    template <class... Args>                                                                \
    void leaf_##name(const Place& place, Args... args) {                                    \
        VAR_FAST_RANGE(#name);                                                              \
        place.cuda ? cuda::name(args..., place.stream) : cpu::name(args..., place.threads); \
    }
#else
#define VAR_FAST_LEAF(name)                              \
    template <class... Args>                             \
    void leaf_##name(const Place& place, Args... args) { \
        VAR_FAST_RANGE(#name);                           \
        cpu::name(args..., place.threads);               \
    }
#endif

VAR_FAST_LEAF(residual_adaln_modulate)
VAR_FAST_LEAF(qk_norm)
VAR_FAST_LEAF(pyramid_update)

#undef VAR_FAST_LEAF

// The lowest image whose logits are not finite, or -1; on CUDA always -1, and `flags` tell later.
inline int64_t leaf_draw_tokens(const Place& place, const float* logits, const int64_t* seeds, int64_t scale, int64_t B,
                                int64_t l, int64_t V, int64_t top_k, double top_p, int64_t* idx,
                                [[maybe_unused]] int32_t* flags) {
    VAR_FAST_RANGE("sample_tokens");
#ifdef VAR_FAST_WITH_CUDA
    if (place.cuda) {
        cuda::draw_tokens(logits, seeds, scale, B, l, V, top_k, top_p, idx, flags, place.stream);
        return -1;
    }
#endif
    return cpu::draw_tokens(logits, seeds, scale, B, l, V, top_k, top_p, idx, place.threads);
}

}  // namespace var_fast
