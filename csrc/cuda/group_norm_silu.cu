// group_norm_silu, channels last: one launch for the statistics, one to apply them.
//
// What comes before a norm, a convolution's bias and the addition of a residual, is done in these two passes as well.
//
// A thread keeps to one column of the (hw, C) matrix, up to 16 bytes wide, and walks down the rows: loads are whole
// lines whatever the size of a group. How sums are grouped depends on hw and C alone, so not on the batch.
#include <algorithm>

#include "device.cuh"

namespace var_fast::cuda {
namespace {

constexpr const char* OP = "group_norm_silu";
constexpr int MOST_COLUMNS = 512;

// How an image is cut: `columns` threads side by side on a row, `rows` of them, and parts of `part` rows for a block.
struct Cut {
    int64_t columns, rows, part, parts;

    Cut(int64_t hw, int64_t C, int64_t width, int64_t elements_of_part, int64_t most_parts)
        : columns(C / width), rows(std::max<int64_t>(1, 256 / columns)) {
        const int64_t wanted = std::clamp<int64_t>(hw * C / elements_of_part, 1, most_parts);
        part = ceil_div(hw, wanted);
        parts = ceil_div(hw, part);
    }
    int64_t threads() const { return ceil_div(columns * rows, WARP) * WARP; }
};

constexpr int64_t STATISTICS_ELEMENTS = 8192, MOST_PARTS = 256;

int64_t most_parts(int64_t hw, int64_t C) {
    return std::min(hw, std::clamp<int64_t>(hw * C / STATISTICS_ELEMENTS, 1, MOST_PARTS));
}

// What is normalised: x + bias + residual, the last two where they are given.
template <class X>
struct Input {
    const X* x;
    const float* bias;
    const X* residual;

    __device__ __forceinline__ float operator()(int64_t at, int channel) const {
        return to_float(x[at]) + (bias != nullptr ? bias[channel] : 0.0f) +
               (residual != nullptr ? to_float(residual[at]) : 0.0f);
    }
};

// Sums of x - pivot and of its square, pivot the image's first element of the group: so the mean, however large,
// costs the variance no digits. The last block of an image to finish turns the parts' sums into mean and 1 / deviation.
// Where the sum is stored, the statistics are of what is stored.
template <class X, int N, bool has_residual, bool stores>
__global__ void __launch_bounds__(MOST_COLUMNS)
statistics_kernel(Input<X> input, X* __restrict__ stored, int64_t hw, int C, int groups, int columns, int rows,
                  int64_t part, float eps, float2* partial, float2* __restrict__ statistics, unsigned* finished) {
    constexpr int UNROLL = stores && !has_residual ? 1 : 4;  // what the registers hold; that form is rare
    float* const sums = reinterpret_cast<float*>(dynamic_shared());  // (rows, 2, C)
    __shared__ bool last;
    const int row = threadIdx.x / columns, channel = threadIdx.x % columns * N, group_size = C / groups;
    const int64_t image = blockIdx.y, parts = gridDim.x, first = image * hw * C;
    if (row < rows) {
        float pivot[N], bias[N] = {}, sum[N] = {}, square[N] = {};
        if (input.bias != nullptr) load(input.bias + channel, bias);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int of_group = (channel + i) / group_size * group_size;
            pivot[i] = input(first + of_group, of_group);
        }
        const int64_t end = min(part * (blockIdx.x + 1), hw);
#pragma unroll UNROLL
        for (int64_t at = part * blockIdx.x + row; at < end; at += rows) {
            const int64_t place = first + at * C + channel;
            float values[N];
            load(input.x + place, values);
#pragma unroll
            for (int i = 0; i < N; ++i) values[i] += bias[i];
            if constexpr (has_residual) {
                float residuals[N];
                load(input.residual + place, residuals);
#pragma unroll
                for (int i = 0; i < N; ++i) values[i] += residuals[i];
            }
            if constexpr (stores) {
                store(stored + place, values);
#pragma unroll
                for (int i = 0; i < N; ++i) values[i] = to_float(from_float<X>(values[i]));
            }
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float value = values[i] - pivot[i];
                sum[i] += value;
                square[i] += value * value;
            }
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            sums[row * 2 * C + channel + i] = sum[i];
            sums[(row * 2 + 1) * C + channel + i] = square[i];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * C; i += blockDim.x) {
        float sum = 0;
        for (int r = 0; r < rows; ++r) sum += sums[r * 2 * C + i];
        sums[i] = sum;
    }
    __syncthreads();
    for (int group = threadIdx.x; group < groups; group += blockDim.x) {
        float2 sum = make_float2(0, 0);
        for (int c = group * group_size; c < (group + 1) * group_size; ++c) {
            sum.x += sums[c];
            sum.y += sums[C + c];
        }
        partial[(image * parts + blockIdx.x) * groups + group] = sum;
    }
    __threadfence();  // before the count that says they are there
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(&finished[image], 1u) == parts - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    const int lane = threadIdx.x % WARP;
    for (int group = threadIdx.x / WARP; group < groups; group += blockDim.x / WARP) {
        double sum = 0, square = 0;
#pragma unroll 8
        for (int64_t i = lane; i < parts; i += WARP) {
            const float2 one = __ldcg(&partial[(image * parts + i) * groups + group]);  // not what this L1 may hold
            sum += one.x;
            square += one.y;
        }
        const double count = static_cast<double>(hw) * group_size;
        const double mean = lanes_sum(sum) / count, variance = lanes_sum(square) / count - mean * mean;
        if (lane == 0)
            statistics[image * groups + group] =
                make_float2(static_cast<float>(input(first + group * group_size, group * group_size) + mean),
                            static_cast<float>(1 / sqrt(fmax(variance, 0.0) + static_cast<double>(eps))));
    }
    if (threadIdx.x == 0) finished[image] = 0;  // ready for the next call
}

template <class X, class Y, int N, bool silu>
__global__ void __launch_bounds__(MOST_COLUMNS)
apply_kernel(const X* x, const float* __restrict__ added, const float* __restrict__ weight,
             const float* __restrict__ bias, const float2* __restrict__ statistics, int64_t hw, int C, int groups,
             int columns, int rows, int64_t part, Y* y) {
    const int row = threadIdx.x / columns, channel = threadIdx.x % columns * N, group_size = C / groups;
    const int64_t image = blockIdx.y;
    if (row >= rows) return;
    float mean[N], factor[N], shift[N], adds[N] = {};
    load(weight + channel, factor);
    load(bias + channel, shift);
    if (added != nullptr) load(added + channel, adds);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float2 of_group = statistics[image * groups + (channel + i) / group_size];
        mean[i] = of_group.x - adds[i];
        factor[i] *= of_group.y;
    }
    const int64_t end = min(part * (blockIdx.x + 1), hw);
#pragma unroll 4
    for (int64_t at = part * blockIdx.x + row; at < end; at += rows) {
        const int64_t place = (image * hw + at) * C + channel;
        float values[N];
        load(x + place, values);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            values[i] = (values[i] - mean[i]) * factor[i] + shift[i];
            if constexpr (silu) values[i] = __fdividef(values[i], 1 + __expf(-values[i]));
        }
        store(y + place, values);
    }
}

struct Scratch {
    float2 *partial, *statistics;
    unsigned* finished;
};

template <class X, class Y, int N>
void run(Input<X> input, X* sum, const float* weight, const float* bias, int64_t B, int64_t hw, int64_t C,
         int64_t groups, float eps, bool silu, Y* y, Scratch scratch, void* stream) {
    expect(C / N <= MOST_COLUMNS, OP, "at most 512 loads to a row: 4096 channels of 16 bits, 512 where C is odd");
    const Cut cut(hw, C, N, STATISTICS_ELEMENTS, MOST_PARTS);
    launch(OP,
           input.residual != nullptr ? &statistics_kernel<X, N, true, true>
           : sum != nullptr          ? &statistics_kernel<X, N, false, true>
                                     : &statistics_kernel<X, N, false, false>,
           grid_of(cut.parts, B), cut.threads(), cut.rows * 2 * C * sizeof(float), stream, input, sum, hw, C, groups,
           cut.columns, cut.rows, cut.part, eps, scratch.partial, scratch.statistics, scratch.finished);
    // 8 rows a thread where that leaves enough blocks: reading the parameters costs about three
    const int64_t elements = 8 * 256 * N;
    const Cut pieces(hw, C, N, B * hw * C < 512 * elements ? elements / 4 : elements, 1 << 20);
    launch(OP, silu ? &apply_kernel<X, Y, N, true> : &apply_kernel<X, Y, N, false>, grid_of(pieces.parts, B),
           pieces.threads(), 0, stream, sum != nullptr ? sum : input.x, sum != nullptr ? nullptr : input.bias, weight,
           bias, scratch.statistics, hw, C, groups, pieces.columns, pieces.rows, pieces.part, y);
}

}  // namespace

// The counters come first: of all of it they alone have to be zero before the first use.
int64_t group_norm_silu_scratch_bytes(int64_t B, int64_t hw, int64_t C, int64_t groups) {
    return ceil_div(B, 2) * 8 + B * groups * (1 + most_parts(hw, C)) * static_cast<int64_t>(sizeof(float2));
}

void group_norm_silu(const void* x, Type x_type, const float* x_bias, const void* residual, void* sum,
                     const float* weight, const float* bias, int64_t B, int64_t hw, int64_t C, int64_t groups, float eps,
                     bool silu, void* y, Type y_type, void* scratch, void* stream) {
    expect(groups > 0 && C > 0 && C % groups == 0, OP, "C a multiple of groups");
    expect(B <= 65535, OP, "B <= 65535");
    expect(residual == nullptr || sum != nullptr, OP, "a place for the sum where there is a residual");
    expect(sum == nullptr || (sum != x && sum != residual), OP, "the sum in a place of its own");
    if (B * hw == 0) return;
    float2* const pairs = static_cast<float2*>(scratch) + ceil_div(B, 2);
    const Scratch parts{pairs + B * groups, pairs, static_cast<unsigned*>(scratch)};
    for_type(x_type, [&](auto x_element) {
        using X = decltype(x_element);
        const Input<X> input{static_cast<const X*>(x), x_bias, static_cast<const X*>(residual)};
        for_type(y_type, [&](auto y_element) {
            using Y = decltype(y_element);
            const auto with = [&](auto run_n) {
                run_n(input, static_cast<X*>(sum), weight, bias, B, hw, C, groups, eps, silu, static_cast<Y*>(y), parts,
                      stream);
            };
            if (C % per_load<X> == 0) return with(&run<X, Y, per_load<X>>);
            with(&run<X, Y, 1>);
        });
    });
}

}  // namespace var_fast::cuda
