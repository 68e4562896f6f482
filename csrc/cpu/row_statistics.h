// Mean and deviation of a row, for layer norms.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "convert.h"

namespace var_fast::cpu {

struct RowStatistics {
    // The float32 mean is off by up to its own rounding; the deviations from it say by how much.
    float mean, rest, rstd;
    VAR_FAST_INLINE float normed(float x) const { return ((x - mean) - rest) * rstd; }
};

// `sum` is that of the C numbers of x.
template <class T>
VAR_FAST_INLINE RowStatistics row_statistics(const T* x, int64_t C, float sum, float eps) {
    const float mean = sum / static_cast<float>(C);
    float rest = 0, squares = 0;
#pragma omp simd reduction(+ : rest, squares)
    for (int64_t c = 0; c < C; ++c) {
        const float deviation = to_float(x[c]) - mean;
        rest += deviation;
        squares += deviation * deviation;
    }
    rest /= static_cast<float>(C);
    const float variance = std::max(squares / static_cast<float>(C) - rest * rest, 0.0f);
    return {mean, rest, 1 / std::sqrt(variance + eps)};
}

}  // namespace var_fast::cpu
