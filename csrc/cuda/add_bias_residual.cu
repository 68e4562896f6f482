// add_bias_residual: what follows a convolution where no norm does it.
#include "device.cuh"

namespace var_fast::cuda {
namespace {

constexpr const char* OP = "add_bias_residual";
constexpr int THREADS = 256;

// y = x + bias + residual, each where it is given; one load's elements a thread.
template <class T, int N>
__global__ void __launch_bounds__(THREADS)
add_kernel(const T* __restrict__ x, const float* __restrict__ bias, const T* __restrict__ residual, int64_t pieces,
           int columns, T* __restrict__ y) {
    const int64_t piece = int64_t{blockIdx.x} * THREADS + threadIdx.x;
    if (piece >= pieces) return;
    float values[N], adds[N];
    load(x + piece * N, values);
    if (bias != nullptr) {
        load(bias + piece % columns * N, adds);
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] += adds[i];
    }
    if (residual != nullptr) {
        load(residual + piece * N, adds);
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] += adds[i];
    }
    store(y + piece * N, values);
}

}  // namespace

void add_bias_residual(const void* x, Type type, const float* bias, const void* residual, int64_t rows, int64_t C,
                       void* y, void* stream) {
    if (rows * C == 0) return;
    for_type(type, [&](auto element) {
        using T = decltype(element);
        for_width<T>(C, [&](auto n) {
            constexpr int N = decltype(n)::value;
            const int64_t pieces = rows * C / N;
            launch(OP, &add_kernel<T, N>, grid_of(ceil_div(pieces, THREADS)), THREADS, 0, stream,
                   static_cast<const T*>(x), bias, static_cast<const T*>(residual), pieces, C / N,
                   static_cast<T*>(y));
        });
    });
}

}  // namespace var_fast::cuda
