// gelu on the CPU: in place, bound by memory where the exponential is vectorised.
#pragma GCC optimize("fp-contract=fast", "finite-math-only", "no-signed-zeros")  // see math.h

#include <type_traits>

#include "math.h"
#include "parallel.h"

namespace var_fast::cpu {
namespace {

template <class T>
struct Gelu {
    VAR_FAST_INLINE static void run(T* x, int64_t n) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) store(x + i, gelu_of(to_float(x[i])));
    }
};

#ifdef VAR_FAST_X86
template <class T, bool CONVERTS>
VAR_FAST_AVX512 void gelu_avx512(T* x, int64_t n) {
    constexpr bool HALF = std::is_same_v<T, bf16>;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store_avx512<CONVERTS>(x + i, 0xffff, gelu_of<HALF>(load_avx512(x + i, 0xffff)));
    const __mmask16 tail = static_cast<__mmask16>((1u << (n - i)) - 1);
    store_avx512<CONVERTS>(x + i, tail, gelu_of<HALF>(load_avx512(x + i, tail)));
}
#endif

}  // namespace

void gelu(void* x, Type type, int64_t n, int threads) {
    with_element(type, [&](auto element) {
        using T = decltype(element);
        parallel_for((n + 63) / 64, threads, 256, [&](int64_t begin, int64_t end) {
            T* from = static_cast<T*>(x) + 64 * begin;
            const int64_t count = std::min(64 * end, n) - 64 * begin;
#ifdef VAR_FAST_X86
            if (isa() >= Isa::avx512_bf16) return gelu_avx512<T, true>(from, count);
            if (isa() >= Isa::avx512) return gelu_avx512<T, false>(from, count);
#endif
            dispatch<Gelu<T>>(from, count);
        });
    });
}

}  // namespace var_fast::cpu
