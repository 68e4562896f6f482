// Cutting n things into parts of nearly one size.
#pragma once

#include <cstdint>

namespace var_fast::cpu {

inline int64_t parts_of(int64_t n, int64_t most) { return (n + most - 1) / most; }
inline int64_t cut(int64_t n, int64_t parts, int64_t i) { return n * i / parts; }

}  // namespace var_fast::cpu
