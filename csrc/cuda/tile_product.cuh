// A product of the blocks of a persistent kernel: x (M, K) weight (N, K)^T, in tiles that may be split along K.
#pragma once

#include <cstdint>

#include "async_copy.cuh"
#include "grid.cuh"
#include "mma.cuh"

namespace var_fast::cuda {

constexpr int PRODUCT_THREADS = 256, SLICE = 64, STAGES = 5;

// How a product is cut into jobs for `blocks` blocks. A job is a tile of ROWS x 64 results, summed over one of `splits`
// runs of slices of K; the jobs of one part of the weights are neighbours, so that it is read from memory once.
struct Cut {
    int M, N, K, row_tiles, column_tiles, slices, splits, jobs;

    template <int ROWS>
    static __host__ __device__ Cut of(int M, int N, int K, int blocks, bool may_split) {
        Cut cut{M, N, K};
        cut.row_tiles = (M + ROWS - 1) / ROWS;
        cut.column_tiles = (N + SLICE - 1) / SLICE;
        cut.slices = (K + SLICE - 1) / SLICE;
        const int tiles = cut.row_tiles * cut.column_tiles, fits = blocks / tiles;
        cut.splits = !may_split || fits < 1 ? 1 : fits < cut.slices ? fits : cut.slices;
        cut.jobs = tiles * cut.splits;
        return cut;
    }
};

struct Job {
    int row, column, split, first_slice, slices;  // row, column: of the tile's first result

    template <int ROWS>
    static __device__ __forceinline__ Job of(const Cut& cut, int number) {
        const int rest = number / cut.row_tiles;
        Job job;
        job.row = number % cut.row_tiles * ROWS;
        job.column = rest % cut.column_tiles * SLICE;
        job.split = rest / cut.column_tiles;
        job.first_slice = cut.slices * job.split / cut.splits;
        job.slices = cut.slices * (job.split + 1) / cut.splits - job.first_slice;
        return job;
    }
};

// Asks for the weights that this block will multiply by, where no other block does.
template <int ROWS, class T>
__device__ __forceinline__ void prefetch_weights(const Cut& cut, const T* weight) {
    constexpr int LINE = 128 / sizeof(T);
    for (int number = blockIdx.x; number < cut.jobs; number += gridDim.x) {
        const Job job = Job::of<ROWS>(cut, number);
        if (job.row != 0) continue;
        for (int i = threadIdx.x; i < SLICE * job.slices; i += blockDim.x) {
            const int n = job.column + i % SLICE, k = (job.first_slice + i / SLICE) * LINE;
            if (n < cut.N && k < cut.K) prefetch(weight + int64_t{n} * cut.K + k);
        }
    }
}

// Rows of a slice lie 128 bytes apart; its eight 16-byte columns change places from row to row, so that eight rows of one
// column lie in different banks.
__device__ __forceinline__ int place_in_slice(int row, int column) { return row * 128 + ((column ^ (row % 8)) << 4); }

template <class T, int ROWS>
struct TileProduct {
    static constexpr int ROW_WARPS = ROWS / 32 > 0 ? ROWS / 32 : 1, COLUMN_WARPS = 2;
    static constexpr int K_WARPS = PRODUCT_THREADS / WARP / (ROW_WARPS * COLUMN_WARPS);
    static constexpr int ROW_TILES = ROWS / (16 * ROW_WARPS);  // of 16 rows, of one warp
    static constexpr int STEPS = SLICE / 16 / K_WARPS;         // of 16 along K, of one warp in one slice
    static constexpr int STAGE_BYTES = (ROWS + SLICE) * 128;
    static constexpr int STRIDE = SLICE + 4;  // floats between rows of results
    static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
    static_assert(SLICE * sizeof(T) == 128 && ROW_TILES * ROW_WARPS * 16 == ROWS);
    static_assert(K_WARPS * ROWS * STRIDE * static_cast<int>(sizeof(float)) <= SHARED_BYTES);

    unsigned char* shared;
    const T *x, *weight;
    Cut cut;

    __device__ __forceinline__ void load(int stage, const Job& job, int slice) const {
        unsigned char* const to = shared + stage * STAGE_BYTES;
        const int k = (job.first_slice + slice) * SLICE;
#pragma unroll
        for (int i = threadIdx.x; i < (ROWS + SLICE) * 8; i += PRODUCT_THREADS) {
            const int row = i / 8, column = i % 8;
            const bool of_x = row < ROWS;
            const int source = of_x ? job.row + row : job.column + row - ROWS;
            const bool inside = source < (of_x ? cut.M : cut.N) && k + column * 8 < cut.K;
            const T* const from = of_x ? x : weight;
            // rows of x are a multiple of 8, so both parts have the same exchange of columns
            copy_16_async(to + place_in_slice(row, column),
                          inside ? from + int64_t{source} * cut.K + k + column * 8 : from, inside);
        }
    }

    __device__ __forceinline__ void multiply(float (&sums)[ROW_TILES][4][4], int stage, int row_warp, int column_warp,
                                             int k_warp, int lane) const {
        const unsigned char* const rows = shared + stage * STAGE_BYTES;
        const unsigned char* const weights = rows + ROWS * 128;
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            const int column = (k_warp * STEPS + s) * 2;  // of 16 bytes
            uint32_t a[ROW_TILES][4], b[2][4];
#pragma unroll
            for (int t = 0; t < ROW_TILES; ++t)
                load_matrices(a[t], rows + place_in_slice((row_warp * ROW_TILES + t) * 16 + lane % 16, column + lane / 16));
#pragma unroll
            for (int n = 0; n < 2; ++n)
                load_matrices(b[n], weights + place_in_slice(column_warp * 32 + n * 16 + lane / 16 * 8 + lane % 8,
                                                             column + lane / 8 % 2));
#pragma unroll
            for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
                for (int n = 0; n < 4; ++n)
                    mma_16x8x16<T>(sums[t][n], a[t], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
    }

    // end(row, column, split, sums): four neighbouring results of a job, all inside.
    template <class End>
    __device__ __forceinline__ void run(const End& end) const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        const int row_warp = warp % ROW_WARPS, column_warp = warp / ROW_WARPS % COLUMN_WARPS;
        const int k_warp = warp / (ROW_WARPS * COLUMN_WARPS);
        for (int number = blockIdx.x; number < cut.jobs; number += gridDim.x) {
            const Job job = Job::of<ROWS>(cut, number);
            float sums[ROW_TILES][4][4] = {};
#pragma unroll
            for (int i = 0; i < STAGES - 1; ++i) {
                if (i < job.slices) load(i, job, i);
                close_group();
            }
            for (int slice = 0; slice < job.slices; ++slice) {
                wait_groups<STAGES - 2>();
                __syncthreads();  // the slice is here, and the one before has been read
                const int ahead = slice + STAGES - 1;
                if (ahead < job.slices) load(ahead % STAGES, job, ahead);
                close_group();
                multiply(sums, slice % STAGES, row_warp, column_warp, k_warp, lane);
            }
            wait_groups<0>();
            __syncthreads();

            float* const results = reinterpret_cast<float*>(shared);  // (K_WARPS, ROWS, STRIDE)
#pragma unroll
            for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
                for (int n = 0; n < 4; ++n)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int row = (row_warp * ROW_TILES + t) * 16 + half * 8 + lane / 4;
                        const int column = column_warp * 32 + n * 8 + lane % 4 * 2;
                        *reinterpret_cast<float2*>(results + (k_warp * ROWS + row) * STRIDE + column) =
                            make_float2(sums[t][n][half * 2], sums[t][n][half * 2 + 1]);
                    }
            __syncthreads();
            for (int i = threadIdx.x; i < ROWS * SLICE / 4; i += PRODUCT_THREADS) {
                const int row = i / (SLICE / 4), column = i % (SLICE / 4) * 4;
                if (job.row + row >= cut.M || job.column + column >= cut.N) continue;
                float total[4] = {};
#pragma unroll
                for (int k = 0; k < K_WARPS; ++k) {
                    const float4 part =
                        *reinterpret_cast<const float4*>(results + (k * ROWS + row) * STRIDE + column);
                    total[0] += part.x;
                    total[1] += part.y;
                    total[2] += part.z;
                    total[3] += part.w;
                }
                end(job.row + row, job.column + column, job.split, total);
            }
            __syncthreads();  // before the next job's first slices arrive
        }
    }
};

}  // namespace var_fast::cuda
