// image_of_taps: from an input pixel's shares in its neighbours to the image.
#include "device.cuh"

namespace var_fast::cuda {
namespace {

constexpr const char* OP = "image_of_taps";
constexpr int THREADS = 256;

// A thread makes one pixel: of each of its nine neighbours the part that the neighbour's product has for it.
__global__ void __launch_bounds__(THREADS)
image_kernel(const float* __restrict__ taps, const float* __restrict__ bias, int64_t pixels, int h, int w, int stride,
             float* __restrict__ image) {
    const int64_t pixel = int64_t{blockIdx.x} * THREADS + threadIdx.x;
    if (pixel >= pixels) return;
    const int x = static_cast<int>(pixel % w), y = static_cast<int>(pixel / w % h);
    float sums[3] = {bias[0], bias[1], bias[2]};
#pragma unroll
    for (int ky = 0; ky < 3; ++ky)
#pragma unroll
        for (int kx = 0; kx < 3; ++kx) {
            const int from_y = y + ky - 1, from_x = x + kx - 1;
            if (from_y < 0 || from_y >= h || from_x < 0 || from_x >= w) continue;
            const float* const from = taps + (pixel + (ky - 1) * w + kx - 1) * stride + (ky * 3 + kx) * 3;
#pragma unroll
            for (int c = 0; c < 3; ++c) sums[c] += from[c];
        }
    float* const to = image + pixel / w / h * 3 * h * w + y * w + x;
#pragma unroll
    for (int c = 0; c < 3; ++c) to[int64_t{c} * h * w] = 0.5f * (fminf(fmaxf(sums[c], -1.0f), 1.0f) + 1.0f);
}

}  // namespace

void image_of_taps(const float* taps, const float* bias, int64_t B, int64_t h, int64_t w, int64_t stride, float* image,
                   void* stream) {
    expect(stride >= 27, OP, "27 values a pixel");
    if (B * h * w == 0) return;
    launch(OP, &image_kernel, grid_of(ceil_div(B * h * w, THREADS)), THREADS, 0, stream, taps,
           bias, B * h * w, h, w, stride, image);
}

}  // namespace var_fast::cuda
