// weave_phases: the four phases of a doubled map to one map.
#include "device.cuh"

namespace var_fast::cuda {
namespace {

constexpr const char* OP = "weave_phases";
constexpr int THREADS = 256;

// Output pixel (2 r + a, 2 s + b) is channels [(2 a + b) C, ... + C) of corner (r + a, s + b).
template <class T, int N>
__global__ void __launch_bounds__(THREADS)
weave_kernel(const T* __restrict__ phases, const float* __restrict__ bias, int64_t pieces, int columns, int h, int w,
             T* __restrict__ y) {
    const int64_t piece = int64_t{blockIdx.x} * THREADS + threadIdx.x;
    if (piece >= pieces) return;
    const int column = static_cast<int>(piece % columns);
    const int64_t pixel = piece / columns;
    const int x = static_cast<int>(pixel % (2 * w)), row = static_cast<int>(pixel / (2 * w) % (2 * h));
    const int64_t image = pixel / (2 * w) / (2 * h), corner = (image * (h + 1) + (row + 1) / 2) * (w + 1) + (x + 1) / 2;
    const int phase = row % 2 * 2 + x % 2;
    float values[N], adds[N];
    load(phases + ((corner * 4 + phase) * columns + column) * N, values);
    load(bias + column * N, adds);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += adds[i];
    store(y + piece * N, values);
}

}  // namespace

void weave_phases(const void* phases, Type type, const float* bias, int64_t B, int64_t h, int64_t w, int64_t C, void* y,
                  void* stream) {
    if (B * h * w * C == 0) return;
    for_type(type, [&](auto element) {
        using T = decltype(element);
        for_width<T>(C, [&](auto n) {
            constexpr int N = decltype(n)::value;
            const int64_t pieces = B * 4 * h * w * C / N;
            launch(OP, &weave_kernel<T, N>, grid_of(ceil_div(pieces, THREADS)), THREADS, 0, stream,
                   static_cast<const T*>(phases), bias, pieces, C / N, h, w, static_cast<T*>(y));
        });
    });
}

}  // namespace var_fast::cuda
