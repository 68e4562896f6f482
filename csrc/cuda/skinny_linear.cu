// skinny_linear: a product with few rows, bound by reading the weights once.
//
// A block makes 16 outputs of all rows; its warps take turns at the steps of 32 along K. The weights are the left operand
// of the tensor cores' product, 16 outputs by 16 of K, and 8 rows of x the right one. A sum over K may take it in any
// order that both operands share, so a lane loads 16 bytes of its rows straight into operands. What the kernel before
// does not write, the first weights, is loaded before waiting for it. How K is cut depends on N and K: so a row's result
// does not depend on the others.
#include <algorithm>

#include "mma.cuh"

namespace var_fast::cuda {
namespace {

constexpr const char* OP = "skinny_linear";
constexpr int OUTPUTS = 16, STEP = 32, MOST_WARPS = 16;
constexpr int GROUP = 4;  // steps whose weights are loaded together
constexpr int64_t MANY_BLOCKS = 264;  // two for each multiprocessor of an H100
constexpr int STRIDE = 20;  // floats between rows of 16 outputs in shared memory: a warp's sums go to different banks

struct Shape {
    int M, N, K;
};

// Ends of a product: y as T or as float32, bias likewise.
struct Ends {
    const void* bias;
    void* y;
    bool float_out, gelu;
};

template <class T>
__device__ __forceinline__ uint4 words_at(const T* from, bool inside) {
    return inside ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
}

// x is no __restrict__: its loads must not be moved before the wait for the kernel that writes it.
template <class T, int TILES>
__global__ void __launch_bounds__(MOST_WARPS * WARP)
skinny_kernel(const T* x, const T* weight, Shape s, Ends ends) {
    float* const parts = reinterpret_cast<float*>(dynamic_shared());  // (warps, 8 TILES, STRIDE)
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int g = lane / 4, j = lane % 4, first_output = blockIdx.x * OUTPUTS;
    const bool has_low = first_output + g < s.N, has_high = first_output + g + 8 < s.N;
    const T* const low = weight + int64_t{first_output + g} * s.K + 8 * j;
    const T* const high = low + 8 * s.K;
    const T* const rows = x + g * s.K + 8 * j;
    uint4 coming[GROUP][2];
    const auto load_weights = [&](int step) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            const int k = (step + i * warps) * STEP;
            coming[i][0] = words_at(low + k, has_low && k + 8 * j < s.K);
            coming[i][1] = words_at(high + k, has_high && k + 8 * j < s.K);
        }
    };
    let_next_start();
    load_weights(warp);
    wait_for_previous();

    float sums[TILES][4] = {};
    const int steps = (s.K + STEP - 1) / STEP;
    for (int step = warp; step < steps; step += GROUP * warps) {
        uint4 here[GROUP][2];
#pragma unroll
        for (int i = 0; i < GROUP; ++i) here[i][0] = coming[i][0], here[i][1] = coming[i][1];
        if (step + GROUP * warps < steps) load_weights(step + GROUP * warps);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            const int k = (step + i * warps) * STEP;
            const uint32_t first[4] = {here[i][0].x, here[i][1].x, here[i][0].y, here[i][1].y};
            const uint32_t second[4] = {here[i][0].z, here[i][1].z, here[i][0].w, here[i][1].w};
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const uint4 word = words_at(rows + (8 * t * s.K + k), 8 * t + g < s.M && k + 8 * j < s.K);
                mma_16x8x16<T>(sums[t], first, word.x, word.y);
                mma_16x8x16<T>(sums[t], second, word.z, word.w);
            }
        }
    }

#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            parts[((warp * TILES + t) * 8 + 2 * j + i % 2) * STRIDE + g + i / 2 * 8] = sums[t][i];
    __syncthreads();
    for (int at = threadIdx.x; at < s.M * OUTPUTS; at += blockDim.x) {
        const int row = at / OUTPUTS, output = first_output + at % OUTPUTS;
        if (output >= s.N) continue;
        float sum = 0;
        for (int w = 0; w < warps; ++w) sum += parts[(w * TILES * 8 + row) * STRIDE + at % OUTPUTS];
        if (ends.bias != nullptr)
            sum += ends.float_out ? static_cast<const float*>(ends.bias)[output]
                                  : to_float(static_cast<const T*>(ends.bias)[output]);
        if (ends.gelu) sum = gelu_of(sum);
        const int64_t to = int64_t{row} * s.N + output;
        if (ends.float_out)
            static_cast<float*>(ends.y)[to] = sum;
        else
            static_cast<T*>(ends.y)[to] = from_float<T>(sum);
    }
}

}  // namespace

void skinny_linear(const void* x, const void* weight, Type type, const void* bias, int64_t M, int64_t N, int64_t K,
                   bool gelu, void* y, bool float_out, void* stream) {
    expect(type != Type::f32, OP, "bfloat16 or float16");
    expect(M <= SKINNY_ROWS && K > 0 && K % 8 == 0, OP, "at most 32 rows and K a multiple of 8");
    if (M * N == 0) return;
    const Shape shape{static_cast<int>(M), static_cast<int>(N), static_cast<int>(K)};
    const Ends ends{bias, y, float_out, gelu};
    // Enough loads under way for a multiprocessor that has one block; where there are many blocks, small ones, so that
    // one loads while another adds up.
    const int64_t most = ceil_div(N, OUTPUTS) > MANY_BLOCKS ? MOST_WARPS / 2 : MOST_WARPS;
    const int64_t warps = std::clamp<int64_t>(ceil_div(K, GROUP * STEP), 1, most);
    const auto run = [&](auto* typed_x, auto kernel, int64_t tiles) {
        launch_dependent(OP, kernel, grid_of(ceil_div(N, OUTPUTS)), warps * WARP,
                         warps * tiles * 8 * STRIDE * static_cast<int64_t>(sizeof(float)), stream, typed_x,
                         static_cast<decltype(typed_x)>(weight), shape, ends);
    };
    const auto with = [&](auto element) {
        using T = decltype(element);
        const T* const rows = static_cast<const T*>(x);
        const int64_t tiles = ceil_div(M, 8);
        if (tiles <= 1) return run(rows, &skinny_kernel<T, 1>, 1);
        if (tiles <= 2) return run(rows, &skinny_kernel<T, 2>, 2);
        if (tiles <= 3) return run(rows, &skinny_kernel<T, 3>, 3);
        run(rows, &skinny_kernel<T, 4>, 4);
    };
    type == Type::bf16 ? with(__nv_bfloat16{}) : with(__half{});
}

}  // namespace var_fast::cuda
