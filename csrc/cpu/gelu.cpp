// gelu on the CPU, and its derivative: bound by memory where the exponential is vectorised.
#pragma GCC optimize("fp-contract=fast", "finite-math-only", "no-signed-zeros")  // see math.h

#include <type_traits>

#include "math.h"
#include "parallel.h"

namespace var_fast::cpu {
namespace {

template <class T>
struct Gelu {
    VAR_FAST_INLINE static void run(const T* x, int64_t n, T* y) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) store(y + i, gelu_of(to_float(x[i])));
    }
};

template <class T>
struct GeluBackward {
    VAR_FAST_INLINE static void run(const T* dy, const T* x, int64_t n, T* dx) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) store(dx + i, to_float(dy[i]) * gelu_slope_of(to_float(x[i])));
    }
};

#ifdef VAR_FAST_X86
VAR_FAST_INLINE_AVX512 __mmask16 mask_of(int64_t left) {
    return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
}

template <class T, bool CONVERTS>
VAR_FAST_AVX512 void gelu_avx512(const T* x, int64_t n, T* y) {
    constexpr bool HALF = std::is_same_v<T, bf16>;
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 mask = mask_of(n - i);
        store_avx512<CONVERTS>(y + i, mask, gelu_of<HALF>(load_avx512(x + i, mask)));
    }
}

template <class T, bool CONVERTS>
VAR_FAST_AVX512 void gelu_backward_avx512(const T* dy, const T* x, int64_t n, T* dx) {
    constexpr bool HALF = std::is_same_v<T, bf16>;
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 mask = mask_of(n - i);
        const __m512 slope = gelu_slope_of<HALF>(load_avx512(x + i, mask));
        store_avx512<CONVERTS>(dx + i, mask, _mm512_mul_ps(load_avx512(dy + i, mask), slope));
    }
}
#endif

// f(first, count) for parts of n numbers that no cache line is shared by
template <class F>
void in_parts(int64_t n, int threads, const F& f) {
    parallel_for((n + 63) / 64, threads, 256,
                 [&](int64_t begin, int64_t end) { f(64 * begin, std::min(64 * end, n) - 64 * begin); });
}

}  // namespace

void gelu(const void* x, Type type, int64_t n, void* y, int threads) {
    with_element(type, [&](auto element) {
        using T = decltype(element);
        in_parts(n, threads, [&](int64_t first, int64_t count) {
            const T* from = static_cast<const T*>(x) + first;
            T* to = static_cast<T*>(y) + first;
#ifdef VAR_FAST_X86
            if (isa() >= Isa::avx512_bf16) return gelu_avx512<T, true>(from, count, to);
            if (isa() >= Isa::avx512) return gelu_avx512<T, false>(from, count, to);
#endif
            dispatch<Gelu<T>>(from, count, to);
        });
    });
}

void gelu_backward(const void* dy, const void* x, Type type, int64_t n, void* dx, int threads) {
    with_element(type, [&](auto element) {
        using T = decltype(element);
        in_parts(n, threads, [&](int64_t first, int64_t count) {
            const T *above = static_cast<const T*>(dy) + first, *from = static_cast<const T*>(x) + first;
            T* to = static_cast<T*>(dx) + first;
#ifdef VAR_FAST_X86
            if (isa() >= Isa::avx512_bf16) return gelu_backward_avx512<T, true>(above, from, count, to);
            if (isa() >= Isa::avx512) return gelu_backward_avx512<T, false>(above, from, count, to);
#endif
            dispatch<GeluBackward<T>>(above, from, count, to);
        });
    });
}

}  // namespace var_fast::cpu
