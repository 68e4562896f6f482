// residual_adaln_modulate: one read of x and branch, one write of x and y; the row stays in registers.
#include <algorithm>

#include "device.cuh"

namespace var_fast::cuda {
namespace {

constexpr const char* OP = "residual_adaln_modulate";
constexpr int MOST_THREADS = 576;  // 8 channels each

// A thread holds channels [4 t, 4 t + 4) of both halves of a row, so that a warp's float32 loads touch whole lines.
// A block takes `rows` rows of one image in turn, and reads the image's parameters once.
template <class Branch, bool has_branch, class Y>
__global__ void __launch_bounds__(MOST_THREADS)
adaln_kernel(float* x, const Branch* branch, const float* gate, const float* scale, const float* shift, int64_t stride,
             int M, int L, int C, int rows, float eps, Y* y) {
    __shared__ float sums[WARP], squares[WARP];
    let_next_start();
    wait_for_previous();
    const int image = blockIdx.y, half = C / 2, channel = threadIdx.x * 4;
    const bool active = channel < half;
    const int64_t parameters = (image < M ? image : M - 1) * stride + channel;
    float gates[2][4] = {}, scales[2][4] = {}, shifts[2][4] = {};
    if (active) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            if constexpr (has_branch) load(gate + parameters + part * half, gates[part]);
            load(scale + parameters + part * half, scales[part]);
            load(shift + parameters + part * half, shifts[part]);
        }
    }
    const int first = blockIdx.x * rows, last = min(first + rows, L);
    for (int row = first; row < last; ++row) {
        const int64_t at = (int64_t{image} * L + row) * C + channel;
        float values[2][4] = {};
        if (active) {
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                load(x + at + part * half, values[part]);
                if constexpr (has_branch) {
                    float branches[4];
                    load(branch + at + part * half, branches);
#pragma unroll
                    for (int i = 0; i < 4; ++i) values[part][i] += gates[part][i] * branches[i];
                    store(x + at + part * half, values[part]);
                }
            }
        }
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += values[i / 4][i % 4];
        const float mean = block_sum(sum, sums) / C;
        float square = 0;
        if (active) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                values[i / 4][i % 4] -= mean;
                square += values[i / 4][i % 4] * values[i / 4][i % 4];
            }
        }
        const float inverse = rsqrtf(block_sum(square, squares) / C + eps);
        if (active) {
#pragma unroll
            for (int part = 0; part < 2; ++part) {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    values[part][i] = values[part][i] * inverse * (1 + scales[part][i]) + shifts[part][i];
                store(y + at + part * half, values[part]);
            }
        }
    }
}

}  // namespace

void residual_adaln_modulate(float* x, const void* branch, Type branch_type, const float* gate, const float* scale,
                             const float* shift, int64_t stride, int64_t M, int64_t R, int64_t L, int64_t C, float eps,
                             void* y, Type y_type, void* stream) {
    expect(C % 8 == 0 && C > 0 && C <= 8 * MOST_THREADS, OP, "C a multiple of 8 up to 4608");
    expect(stride % 4 == 0, OP, "stride a multiple of 4");
    expect(M > 0 && R <= 65535, OP, "M > 0 and R <= 65535");
    if (R * L == 0) return;
    const int64_t threads = ceil_div(C / 8, WARP) * WARP;
    const int64_t rows = std::clamp<int64_t>(R * L / 2048, 1, 8);  // and every multiprocessor has enough blocks
    for_type(y_type, [&](auto y_element) {
        using Y = decltype(y_element);
        const auto run = [&](auto kernel, auto* typed_branch) {
            launch_dependent(OP, kernel, grid_of(ceil_div(L, rows), R), threads, 0, stream, x, typed_branch, gate, scale,
                             shift, stride, M, L, C, rows, eps, static_cast<Y*>(y));
        };
        if (branch == nullptr) return run(&adaln_kernel<float, false, Y>, static_cast<const float*>(nullptr));
        for_type(branch_type, [&](auto branch_element) {
            using Branch = decltype(branch_element);
            run(&adaln_kernel<Branch, true, Y>, static_cast<const Branch*>(branch));
        });
    });
}

}  // namespace var_fast::cuda
