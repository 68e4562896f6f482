// pyramid_update: index -> code -> bicubic up -> phi -> f_hat += -> area down, in one launch.
//
// A block makes four channels of one image: the 3x3 convolution asks for all channels of the map that was scaled up
// (made again by every block of the image, which is little work), and nothing else is shared between output channels.
#include "device.cuh"

namespace var_fast::cuda {
namespace {

constexpr const char* OP = "pyramid_update";
constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int OUT = 4;  // channels of a block
// More shared memory would leave a multiprocessor one block; then codes are read from where they are.
constexpr int64_t STAGED_BYTES = 100 * 1024;

// Four neighbours in a line and their weights.
struct Taps {
    float weight[4];
    int first;
};

// Cubic convolution with a = -0.75, pixel centres at halves, as F.interpolate(mode="bicubic", align_corners=False).
__device__ __forceinline__ Taps bicubic_taps(int at, int size, int source_size) {
    const float place = (at + 0.5f) * (static_cast<float>(source_size) / size) - 0.5f, floor = floorf(place);
    const float t = place - floor, a = -0.75f;
    const auto near = [&](float x) { return ((a + 2) * x - (a + 3)) * x * x + 1; };
    const auto far = [&](float x) { return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a; };
    return {{far(t + 1), near(t), near(1 - t), far(2 - t)}, static_cast<int>(floor) - 1};
}

struct Layout {  // of shared memory, in bytes
    int64_t weights, up, sums, taps, rows, codes, end;
    int plane;  // floats of a channel of `up`, odd: lanes write one pixel of 32 channels to 32 banks

    Layout(int64_t C, int64_t h, int64_t w, int64_t pn, bool staged) {
        plane = static_cast<int>((h + 2) * w) | 1;
        weights = 0;
        up = weights + C * 9 * OUT * sizeof(float);
        sums = up + C * plane * sizeof(float);
        taps = sums + OUT * h * w * sizeof(float);
        rows = taps + (h + w) * sizeof(Taps);
        codes = rows + pn * pn * sizeof(int);
        end = codes + (staged ? pn * pn * C * sizeof(float) : 0);
    }
};

struct Arguments {
    const int64_t* idx;
    const float *codes, *codebook, *phi_weight, *phi_bias;
    float phi_ratio;
    float* f_hat;
    int C, h, w, pn, pn_next;
    float* next_map;
    Layout layout;
};

template <bool has_phi, bool staged>
__global__ void __launch_bounds__(THREADS)
pyramid_kernel(Arguments a) {
    unsigned char* const shared = dynamic_shared();
    float* const weights = reinterpret_cast<float*>(shared + a.layout.weights);  // (C, 9, OUT)
    float* const up = reinterpret_cast<float*>(shared + a.layout.up);            // (C, h + 2, w), zero rows around
    float* const sums = reinterpret_cast<float*>(shared + a.layout.sums);        // (OUT, h, w), the new f_hat
    Taps* const taps = reinterpret_cast<Taps*>(shared + a.layout.taps);          // of h rows, then of w columns
    int* const rows = reinterpret_cast<int*>(shared + a.layout.rows);            // where a token's code is
    float* const staged_codes = reinterpret_cast<float*>(shared + a.layout.codes);
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const int C = a.C, h = a.h, w = a.w, pn = a.pn, pixels = h * w, plane = a.layout.plane;
    const int first = blockIdx.x * OUT;
    const int64_t image = blockIdx.y;

    for (int i = thread; i < h + w; i += THREADS) taps[i] = i < h ? bicubic_taps(i, h, pn) : bicubic_taps(i - h, w, pn);
    for (int i = thread; i < pn * pn; i += THREADS)
        rows[i] = a.idx != nullptr ? static_cast<int>(a.idx[image * pn * pn + i]) * C : i * C;
    if constexpr (has_phi)
        for (int i = thread; i < OUT * C * 9; i += THREADS) {
            const int out = i / (C * 9), rest = i % (C * 9);
            weights[rest * OUT + out] = first + out < C ? a.phi_weight[int64_t{first + out} * C * 9 + rest] : 0.0f;
        }
    for (int i = thread; i < C * 2 * w; i += THREADS) up[i / (2 * w) * plane + (i / w % 2) * (h + 1) * w + i % w] = 0;
    __syncthreads();

    const float* const table = a.idx != nullptr ? a.codebook : a.codes + image * pn * pn * C;
    if constexpr (staged) {
        for (int i = warp; i < pn * pn; i += WARPS)
            for (int c = lane; c < C; c += WARP) staged_codes[i * C + c] = table[rows[i] + c];
        __syncthreads();
    }
    const auto code = [&](int row, int column, int c) {
        const int token = row * pn + column;
        return staged ? staged_codes[token * C + c] : table[rows[token] + c];
    };

    // Up, a row by each warp, a channel in each lane. Four neighbouring columns, scaled vertically, move along the row.
    for (int y = warp; y < h; y += WARPS) {
        const Taps vertical = taps[y];
        int source_rows[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) source_rows[i] = min(max(vertical.first + i, 0), pn - 1);
        for (int c = lane; c < C; c += WARP) {
            const auto column = [&](int j) {
                j = min(max(j, 0), pn - 1);
                float sum = 0;
#pragma unroll
                for (int i = 0; i < 4; ++i) sum += vertical.weight[i] * code(source_rows[i], j, c);
                return sum;
            };
            int left = taps[h].first;
            float columns[4] = {column(left), column(left + 1), column(left + 2), column(left + 3)};
            for (int x = 0; x < w; ++x) {
                const Taps horizontal = taps[h + x];
                for (; left < horizontal.first; ++left) {
#pragma unroll
                    for (int i = 0; i < 3; ++i) columns[i] = columns[i + 1];
                    columns[3] = column(left + 4);
                }
                float sum = 0;
#pragma unroll
                for (int i = 0; i < 4; ++i) sum += horizontal.weight[i] * columns[i];
                up[c * plane + (y + 1) * w + x] = sum;
            }
        }
    }
    __syncthreads();

    // phi and the sum, a pixel in each thread
    for (int pixel = thread; pixel < pixels; pixel += THREADS) {
        const int x = pixel % w;
        float conv[OUT] = {};
        if constexpr (has_phi) {
            const bool has_left = x > 0, has_right = x < w - 1;
#pragma unroll 2
            for (int c = 0; c < C; ++c) {
                const float* const top = up + c * plane + pixel;  // the pixel above this one
#pragma unroll
                for (int ky = 0; ky < 3; ++ky) {
                    const float values[3] = {has_left ? top[ky * w - 1] : 0.0f, top[ky * w],
                                             has_right ? top[ky * w + 1] : 0.0f};
#pragma unroll
                    for (int kx = 0; kx < 3; ++kx) {
                        const float4 weight = *reinterpret_cast<const float4*>(weights + ((c * 3 + ky) * 3 + kx) * OUT);
                        conv[0] += values[kx] * weight.x;
                        conv[1] += values[kx] * weight.y;
                        conv[2] += values[kx] * weight.z;
                        conv[3] += values[kx] * weight.w;
                    }
                }
            }
        }
#pragma unroll
        for (int out = 0; out < OUT; ++out) {
            if (first + out >= C) continue;
            float value = up[(first + out) * plane + w + pixel];
            if constexpr (has_phi) {
                const float bias = a.phi_bias != nullptr ? a.phi_bias[first + out] : 0.0f;
                value = (1 - a.phi_ratio) * value + a.phi_ratio * (conv[out] + bias);
            }
            float* const sum = a.f_hat + (image * C + first + out) * pixels + pixel;
            sums[out * pixels + pixel] = *sum += value;
        }
    }
    if (a.pn_next == 0) return;
    __syncthreads();

    // down: the mean over each token's area
    const int next = a.pn_next;
    for (int token = thread; token < next * next; token += THREADS) {
        const int top = token / next * h / next, bottom = ((token / next + 1) * h + next - 1) / next;
        const int left = token % next * w / next, right = ((token % next + 1) * w + next - 1) / next;
        float totals[OUT] = {};
        for (int y = top; y < bottom; ++y)
            for (int x = left; x < right; ++x)
#pragma unroll
                for (int out = 0; out < OUT; ++out) totals[out] += sums[out * pixels + y * w + x];
        const int area = (bottom - top) * (right - left);
#pragma unroll
        for (int out = 0; out < OUT; ++out)
            if (first + out < C) a.next_map[(image * next * next + token) * C + first + out] = totals[out] / area;
    }
}

}  // namespace

void pyramid_update(const int64_t* idx, const float* codes, const float* codebook, const float* phi_weight,
                    const float* phi_bias, float phi_ratio, float* f_hat, int64_t B, int64_t C, int64_t h, int64_t w,
                    int64_t pn, int64_t pn_next, float* next_map, void* stream) {
    expect(C > 0 && pn > 0 && pn <= h && pn <= w, OP, "C > 0 and 0 < pn <= h, w");
    expect(B <= 65535, OP, "B <= 65535");
    if (B == 0) return;
    const bool staged = Layout(C, h, w, pn, true).end <= STAGED_BYTES;
    const Layout layout(C, h, w, pn, staged);
    const Arguments arguments{idx,
                              codes,
                              codebook,
                              phi_weight,
                              phi_bias,
                              phi_ratio,
                              f_hat,
                              static_cast<int>(C),
                              static_cast<int>(h),
                              static_cast<int>(w),
                              static_cast<int>(pn),
                              static_cast<int>(pn_next),
                              next_map,
                              layout};
    const auto run = [&](auto kernel) {
        launch(OP, kernel, grid_of(ceil_div(C, OUT), B), THREADS, layout.end, stream, arguments);
    };
    if (phi_weight != nullptr) return run(staged ? &pyramid_kernel<true, true> : &pyramid_kernel<true, false>);
    run(staged ? &pyramid_kernel<false, true> : &pyramid_kernel<false, false>);
}

}  // namespace var_fast::cuda
