// Scratch memory of one call, aligned to cache lines.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace var_fast::cpu {

struct FreeBuffer {
    void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, FreeBuffer>;

inline Buffer buffer(int64_t floats) {
    void* p = std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
    if (p == nullptr) throw std::bad_alloc();
    return Buffer(static_cast<float*>(p));
}

}  // namespace var_fast::cpu
