// scale_attention: few queries against the cached keys and values, no mask.
//
// A block takes 16 queries of one head (or two times 16) and up to SPLIT keys. float16 and bfloat16 run on the tensor
// cores, each of four warps on every fourth step of 16 keys; float32 runs on the other cores. Longer caches are split
// over blocks, whose parts a second kernel joins. Which keys are summed together depends on `length` alone.
#include <algorithm>

#include "attention_tile.cuh"

namespace var_fast::cuda {
namespace {

constexpr const char* OP = "scale_attention";
constexpr int SPLIT = 256;  // keys of a block

// Where the parts of split rows go: sums (R H, splits, l, D), and largest score and weight (R H, splits, l, 2).
struct Partial {
    float *sums, *norms;
};

// ------------------------------------------------------------------------------------------------ float16 and bfloat16
// Warp w takes query tile w % tiles of the block's and steps w / tiles, + 4, + 8 ... of the split's keys.
template <class T, int D>
__global__ void __launch_bounds__(2 * KEY_WARPS * WARP)
attention_mma(const T* q, const T* k_cache, const T* v_cache, int l, int H, int length, int64_t capacity, int tiles,
              int splits, Partial partial, T* out) {
    using State = Tile<T, D>;
    let_next_start();
    wait_for_previous();
    constexpr int WIDTH = State::WIDTH;
    float* const slots = reinterpret_cast<float*>(dynamic_shared());
    const int lane = threadIdx.x % WARP, g = lane / 4, j = lane % 4;
    const int tile = threadIdx.x / WARP % tiles, part = threadIdx.x / WARP / tiles;
    const int64_t image_head = blockIdx.x, image = image_head / H, head = image_head % H;
    const int first = (blockIdx.y * tiles + tile) * TILE;  // query of row 0
    const int begin = blockIdx.z * SPLIT, end = min(begin + SPLIT, length);

    State state;
    attend(state, q + (image * l * H + head) * D, int64_t{H} * D, first, l, k_cache + image_head * capacity * D,
           v_cache + image_head * capacity * D, begin, end, part, lane, slots + tile * 2 * State::STATE * WARP);
    if (part != 0) return;

#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const int query = first + row * 8 + g;
        if (query >= l) continue;
        const float factor = splits == 1 ? 1 / state.weight[row] : 1;
        const int64_t part_row = (image_head * splits + blockIdx.z) * l + query;
#pragma unroll
        for (int c = 0; c < D / (8 * WIDTH); ++c) {
            float elements[2 * WIDTH];
            state.outputs(row, c, factor, elements);
            const int at = c * 8 * WIDTH + j * 2 * WIDTH;
            if (splits == 1)
                store(out + ((image * l + query) * H + head) * D + at, elements);
            else
                store(partial.sums + part_row * D + at, elements);
        }
        if (splits > 1 && j == 0) {
            partial.norms[part_row * 2] = state.largest[row];
            partial.norms[part_row * 2 + 1] = state.weight[row];
        }
    }
}

// ------------------------------------------------------------------------------------------------------------- float32
constexpr int KEYS = 32;  // of one step

// 128 threads: eight to a query. For the scores a thread takes every eighth key, for the sums every eighth four of D.
// Rows of shared memory are four floats apart in banks, so that eight rows of 16 bytes are read at once.
template <int D>
__global__ void __launch_bounds__(128, 4)
attention_f32(const float* __restrict__ q, const float* __restrict__ k_cache, const float* __restrict__ v_cache, int l,
              int H, int length, int64_t capacity, int splits, Partial partial, float* __restrict__ out) {
    constexpr int ROW = D + 4, SCORE_ROW = KEYS + 4;
    float* const queries = reinterpret_cast<float*>(dynamic_shared());
    float* const keys = queries + TILE * ROW;
    float* const values = keys + KEYS * ROW;
    float* const weights = values + KEYS * ROW;
    const int row = threadIdx.x / 8, eighth = threadIdx.x % 8;
    const int64_t image_head = blockIdx.x, image = image_head / H, head = image_head % H;
    const int first = blockIdx.y * TILE, query = first + row;
    const int begin = blockIdx.z * SPLIT, end = min(begin + SPLIT, length);
    k_cache += image_head * capacity * D;
    v_cache += image_head * capacity * D;

    for (int i = threadIdx.x * 4; i < TILE * D; i += 128 * 4) {
        const int at = first + i / D;
        float4 four = make_float4(0, 0, 0, 0);
        if (at < l) four = *reinterpret_cast<const float4*>(q + ((image * l + at) * H + head) * D + i % D);
        *reinterpret_cast<float4*>(queries + i / D * ROW + i % D) = four;
    }
    float sums[D / 8] = {}, largest = NOTHING, weight = 0;
    for (int key = begin; key < end; key += KEYS) {
        __syncthreads();  // the last step's keys have been read
        for (int i = threadIdx.x * 4; i < KEYS * D; i += 128 * 4) {
            const int to = i / D * ROW + i % D, from = key * D + i;
            float4 k = make_float4(0, 0, 0, 0), v = k;
            if (from < end * D) {
                k = *reinterpret_cast<const float4*>(k_cache + from);
                v = *reinterpret_cast<const float4*>(v_cache + from);
            }
            *reinterpret_cast<float4*>(keys + to) = k;
            *reinterpret_cast<float4*>(values + to) = v;
        }
        __syncthreads();

        float scores[KEYS / 8] = {};
#pragma unroll 4
        for (int d = 0; d < D; d += 4) {
            const float4 a = *reinterpret_cast<const float4*>(queries + row * ROW + d);
#pragma unroll
            for (int i = 0; i < KEYS / 8; ++i) {
                const float4 b = *reinterpret_cast<const float4*>(keys + (i * 8 + eighth) * ROW + d);
                scores[i] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
            }
        }
        float top = largest;
#pragma unroll
        for (int i = 0; i < KEYS / 8; ++i) {
            scores[i] = key + i * 8 + eighth < end ? scores[i] * LOG2_E : -INFINITY;
            top = fmaxf(top, scores[i]);
        }
#pragma unroll
        for (int other = 4; other > 0; other /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, other));
        const float factor = exp2f(largest - top);
        largest = top;
        weight *= factor;
#pragma unroll
        for (int i = 0; i < KEYS / 8; ++i) {
            scores[i] = exp2f(scores[i] - top);
            weight += scores[i];
            weights[row * SCORE_ROW + i * 8 + eighth] = scores[i];
        }
#pragma unroll
        for (int i = 0; i < D / 8; ++i) sums[i] *= factor;
        __syncwarp();  // a query's eight threads are in one warp
#pragma unroll 4
        for (int i = 0; i < KEYS; ++i) {
            const float w = weights[row * SCORE_ROW + i];
#pragma unroll
            for (int c = 0; c < D / 32; ++c) {
                const float4 v = *reinterpret_cast<const float4*>(values + i * ROW + c * 32 + eighth * 4);
                sums[c * 4] += w * v.x;
                sums[c * 4 + 1] += w * v.y;
                sums[c * 4 + 2] += w * v.z;
                sums[c * 4 + 3] += w * v.w;
            }
        }
    }
    weight = lanes_sum<8>(weight);
    if (query >= l) return;
    const float factor = splits == 1 ? 1 / weight : 1;
    const int64_t part_row = (image_head * splits + blockIdx.z) * l + query;
    float* const to = splits == 1 ? out + ((image * l + query) * H + head) * D : partial.sums + part_row * D;
#pragma unroll
    for (int c = 0; c < D / 32; ++c)
        *reinterpret_cast<float4*>(to + c * 32 + eighth * 4) = make_float4(
            sums[c * 4] * factor, sums[c * 4 + 1] * factor, sums[c * 4 + 2] * factor, sums[c * 4 + 3] * factor);
    if (splits > 1 && eighth == 0) {
        partial.norms[part_row * 2] = largest;
        partial.norms[part_row * 2 + 1] = weight;
    }
}

// ------------------------------------------------------------------------------------------------------ joining splits
// One warp per query and head.
template <class T>
__global__ void __launch_bounds__(128)
join_splits(Partial partial, int64_t rows, int l, int H, int D, int splits, T* out) {
    let_next_start();
    wait_for_previous();
    const int64_t item = int64_t{blockIdx.x} * 4 + threadIdx.x / WARP;  // (image, head, query)
    if (item >= rows) return;
    const int lane = threadIdx.x % WARP;
    const int64_t image_head = item / l, query = item % l;
    const int64_t first = image_head * splits * l + query;
    const float* const norms = partial.norms + first * 2;
    const float* const sums = partial.sums + first * D;
    const int next_norm = l * 2, next_sum = l * D;
    float top = NOTHING;
    for (int split = 0; split < splits; ++split) top = fmaxf(top, norms[split * next_norm]);
    T* const to = out + ((image_head / H * l + query) * H + image_head % H) * D;
    for (int d = lane; d < D; d += WARP) {
        float sum = 0, weight = 0;
        for (int split = 0; split < splits; ++split) {
            const float factor = exp2f(norms[split * next_norm] - top);
            sum += factor * sums[split * next_sum + d];
            weight += factor * norms[split * next_norm + 1];
        }
        to[d] = from_float<T>(sum / weight);
    }
}

struct Shape {
    int64_t R, l, H, D, length, capacity, splits;
};

template <class T, int D>
void run(const T* q, const T* k_cache, const T* v_cache, const Shape& s, Partial partial, T* out, void* stream) {
    const int64_t heads = s.R * s.H, query_tiles = ceil_div(s.l, TILE);
    if constexpr (sizeof(T) == 4) {
        const int64_t shared = ((TILE + 2 * KEYS) * (D + 4) + TILE * (KEYS + 4)) * sizeof(float);
        launch(OP, &attention_f32<D>, grid_of(heads, query_tiles, s.splits), 128, shared, stream, q, k_cache, v_cache,
               s.l, s.H, s.length, s.capacity, s.splits, partial, out);
    } else {
        // two query tiles share a block's reads of K and V, unless that leaves multiprocessors idle
        const int64_t tiles = query_tiles > 1 && heads * query_tiles * s.splits >= 1024 ? 2 : 1;
        const int64_t shared = tiles * 2 * Tile<T, D>::STATE * WARP * sizeof(float);
        launch_dependent(OP, &attention_mma<T, D>, grid_of(heads, ceil_div(query_tiles, tiles), s.splits),
                         tiles * KEY_WARPS * WARP, shared, stream, q, k_cache, v_cache, s.l, s.H, s.length, s.capacity,
                         tiles, s.splits, partial, out);
    }
    if (s.splits > 1)
        launch_dependent(OP, &join_splits<T>, grid_of(ceil_div(heads * s.l, 4)), 128, 0, stream, partial, heads * s.l,
                         s.l, s.H, s.D, s.splits, out);
}

int64_t splits_of(int64_t length) { return ceil_div(length, SPLIT); }

}  // namespace

int64_t scale_attention_scratch_bytes(int64_t R, int64_t l, int64_t H, int64_t D, int64_t length) {
    const int64_t splits = splits_of(length);
    return splits > 1 ? R * H * splits * l * (D + 2) * static_cast<int64_t>(sizeof(float)) : 0;
}

void scale_attention(const void* q, const void* k_cache, const void* v_cache, Type type, int64_t R, int64_t l,
                     int64_t H, int64_t D, int64_t length, int64_t capacity, void* out, void* scratch, void* stream) {
    expect(D == 32 || D == 64 || D == 96 || D == 128, OP, "D 32, 64, 96 or 128");
    expect(length > 0 && length <= capacity, OP, "0 < length <= capacity");
    expect(l <= 65535 * TILE && l * length < (1 << 22), OP, "fewer queries and keys");
    if (R * l * H == 0) return;
    const Shape shape{R, l, H, D, length, capacity, splits_of(length)};
    expect(shape.splits == 1 || scratch != nullptr, OP, "scratch where length is above 256");
    float* const floats = static_cast<float*>(scratch);
    const Partial partial{floats, floats + (floats == nullptr ? 0 : R * H * shape.splits * l * D)};
    for_type(type, [&](auto element) {
        using T = decltype(element);
        const auto with = [&](auto run_d) {
            run_d(static_cast<const T*>(q), static_cast<const T*>(k_cache), static_cast<const T*>(v_cache), shape,
                  partial, static_cast<T*>(out), stream);
        };
        if (D == 32) return with(&run<T, 32>);
        if (D == 64) return with(&run<T, 64>);
        if (D == 96) return with(&run<T, 96>);
        with(&run<T, 128>);
    });
}

}  // namespace var_fast::cuda
