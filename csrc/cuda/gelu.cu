// gelu: the tanh form, in place.
#include "device.cuh"

namespace var_fast::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(256)
gelu_kernel(T* x, int64_t n) {
    constexpr int N = per_load<T>;
    let_next_start();
    wait_for_previous();
    const int64_t at = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
    if (at + N <= n) {
        float values[N];
        load(x + at, values);
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = gelu_of(values[i]);
        store(x + at, values);
    } else {
        for (int64_t i = at; i < n; ++i) x[i] = from_float<T>(gelu_of(to_float(x[i])));
    }
}

}  // namespace

void gelu(void* x, Type type, int64_t n, void* stream) {
    if (n <= 0) return;
    for_type(type, [&](auto element) {
        using T = decltype(element);
        const int64_t threads = ceil_div(n, per_load<T>);
        launch_dependent("gelu", &gelu_kernel<T>, grid_of(ceil_div(threads, 256)), 256, 0, stream, static_cast<T*>(x), n);
    });
}

}  // namespace var_fast::cuda
