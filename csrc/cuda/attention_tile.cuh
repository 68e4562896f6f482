// Sixteen queries of one head against cached keys and values, on the tensor cores.
#pragma once

#include "mma.cuh"

namespace var_fast::cuda {

constexpr int TILE = 16;           // queries
constexpr int KEY_WARPS = 4;       // share the keys of a tile
constexpr float NOTHING = -1e30f;  // the largest score of no keys: finite, so that differences are no NaN
constexpr float LOG2_E = 1.4426950408889634f;

// 16 bytes of row `row` from element `at` on, zero beyond the last row.
template <int D, class T>
__device__ __forceinline__ uint4 row_words(const T* rows, int row, int end, int at) {
    return row < end ? *reinterpret_cast<const uint4*>(rows + int64_t{row} * D + at) : make_uint4(0, 0, 0, 0);
}

// Both tensor-core products may take their inner and outer indices in any order that their operands share. The orders
// here let a lane load 16 bytes in a row straight into operands, without shared memory:
//   scores: words 2 s, 2 s + 1 of a lane's 16 bytes (elements 32 c + 8 j ... + 7 of D) are the operands of step s;
//   values: column g of output tile t is element 8 WIDTH c + WIDTH g + t of D, so a lane's WIDTH elements are the
//   same column of WIDTH tiles.
template <class T, int D>
struct Tile {
    static constexpr int CHUNKS = D / 32;              // of 32 elements, in the scores
    static constexpr int WIDTH = D % 64 == 0 ? 8 : 4;  // elements of V in one load
    static constexpr int OUTPUTS = D / 8;              // output tiles
    static constexpr int STATE = OUTPUTS * 4 + 4;      // floats of a lane in a merge

    uint4 query[2][CHUNKS];
    float sums[OUTPUTS][4] = {};
    float largest[2] = {NOTHING, NOTHING}, weight[2] = {};  // of rows g and g + 8; weight: of this lane's keys only

    __device__ __forceinline__ void step(const T* keys, const T* values, int key, int end, int g, int j) {
        uint4 key_words[2][CHUNKS];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) key_words[n][c] = row_words<D>(keys, key + n * 8 + g, end, c * 32 + j * 8);
        uint32_t value_words[4][D / 16];
#pragma unroll
        for (int row = 0; row < 4; ++row)
            load_values(values, key + row / 2 * 8 + 2 * j + row % 2, end, g, value_words[row]);

        float scores[2][4] = {};
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                const uint4 low = query[0][c], high = query[1][c], word = key_words[n][c];
                const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
                mma_16x8x16<T>(scores[n], first, word.x, word.y);
                mma_16x8x16<T>(scores[n], second, word.z, word.w);
            }
        add(scores, value_words, end - key, j);
    }

    __device__ __forceinline__ void add(float (&scores)[2][4], const uint32_t (&value_words)[4][D / 16], int keys_left,
                                        int j) {
        float factor[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float top = largest[row];
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& score = scores[n][row * 2 + i];
                    score = n * 8 + 2 * j + i < keys_left ? score * LOG2_E : -INFINITY;
                    top = fmaxf(top, score);
                }
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
            factor[row] = exp2f(largest[row] - top);
            largest[row] = top;
            weight[row] *= factor[row];
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& score = scores[n][row * 2 + i];
                    score = exp2f(score - top);
                    weight[row] += score;
                }
        }
        const uint32_t weights[4] = {pack_two<T>(scores[0][0], scores[0][1]), pack_two<T>(scores[0][2], scores[0][3]),
                                     pack_two<T>(scores[1][0], scores[1][1]), pack_two<T>(scores[1][2], scores[1][3])};
#pragma unroll
        for (int t = 0; t < OUTPUTS; ++t) {
            // the halves of two rows' words, one under the other
            const unsigned halves = t % 2 ? 0x7632 : 0x5410;
            const uint32_t b0 = __byte_perm(value_words[0][t / 2], value_words[1][t / 2], halves);
            const uint32_t b1 = __byte_perm(value_words[2][t / 2], value_words[3][t / 2], halves);
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[t][i] *= factor[i / 2];
            mma_16x8x16<T>(sums[t], weights, b0, b1);
        }
    }

    static __device__ __forceinline__ void load_values(const T* values, int row, int end, int g,
                                                       uint32_t (&words)[D / 16]) {
#pragma unroll
        for (int c = 0; c < D / (8 * WIDTH); ++c) {
            Pack<uint32_t, WIDTH / 2> pack{};
            if (row < end)
                pack = *reinterpret_cast<const Pack<uint32_t, WIDTH / 2>*>(values + int64_t{row} * D + c * 8 * WIDTH +
                                                                           g * WIDTH);
#pragma unroll
            for (int i = 0; i < WIDTH / 2; ++i) words[c * WIDTH / 2 + i] = pack.at[i];
        }
    }

    // Where the weights of a row's lanes become one.
    __device__ __forceinline__ void join_lanes() {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            weight[row] += __shfl_xor_sync(ALL_LANES, weight[row], 1);
            weight[row] += __shfl_xor_sync(ALL_LANES, weight[row], 2);
        }
    }

    __device__ __forceinline__ void give(float* slot, int lane) const {
#pragma unroll
        for (int i = 0; i < OUTPUTS * 4; ++i) slot[i * WARP + lane] = sums[i / 4][i % 4];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            slot[(OUTPUTS * 4 + row) * WARP + lane] = largest[row];
            slot[(OUTPUTS * 4 + 2 + row) * WARP + lane] = weight[row];
        }
    }

    __device__ __forceinline__ void take(const float* slot, int lane) {
        float mine[2], theirs[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const float other = slot[(OUTPUTS * 4 + row) * WARP + lane], top = fmaxf(largest[row], other);
            mine[row] = exp2f(largest[row] - top);
            theirs[row] = exp2f(other - top);
            largest[row] = top;
            weight[row] = weight[row] * mine[row] + slot[(OUTPUTS * 4 + 2 + row) * WARP + lane] * theirs[row];
        }
#pragma unroll
        for (int i = 0; i < OUTPUTS * 4; ++i) {
            float& sum = sums[i / 4][i % 4];
            sum = sum * mine[i % 4 / 2] + slot[i * WARP + lane] * theirs[i % 4 / 2];
        }
    }

    // The 2 WIDTH elements that the lane holds of chunk c of row g (row 0) or g + 8 (row 1), times `factor`.
    __device__ __forceinline__ void outputs(int row, int c, float factor, float (&to)[2 * WIDTH]) const {
#pragma unroll
        for (int i = 0; i < 2 * WIDTH; ++i) to[i] = sums[c * WIDTH + i % WIDTH][row * 2 + i / WIDTH] * factor;
    }
};

// The state of queries [first, first + 16) of `l`, in the warp of part 0: four warps, parts 0 to 3, take every fourth
// step of keys [begin, end). `q`: the first query of the image and head, rows `stride` elements apart. All threads of
// the block come here; slots: 2 STATE WARP floats of each tile.
template <class T, int D>
__device__ __forceinline__ void attend(Tile<T, D>& state, const T* q, int64_t stride, int first, int l, const T* keys,
                                       const T* values, int begin, int end, int part, int lane, float* slots) {
    using State = Tile<T, D>;
    const int g = lane / 4, j = lane % 4;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const int query = first + row * 8 + g;
        const T* const from = q + query * stride;
#pragma unroll
        for (int c = 0; c < State::CHUNKS; ++c)
            state.query[row][c] =
                query < l ? *reinterpret_cast<const uint4*>(from + c * 32 + j * 8) : make_uint4(0, 0, 0, 0);
    }
    for (int key = begin + part * 16; key < end; key += KEY_WARPS * 16) state.step(keys, values, key, end, g, j);
    state.join_lanes();

    // 3 and 2 to 1 and 0, then 1 to 0
    float* const slot = slots + part % 2 * State::STATE * WARP;
    if (part >= 2) state.give(slot, lane);
    __syncthreads();
    if (part < 2) state.take(slot, lane);
    __syncthreads();
    if (part == 1) state.give(slot - State::STATE * WARP, lane);
    __syncthreads();
    if (part == 0) state.take(slot, lane);
}

}  // namespace var_fast::cuda
