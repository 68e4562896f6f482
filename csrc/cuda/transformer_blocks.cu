// transformer_blocks: all blocks of the transformer on the tokens of one scale, in one launch.
//
// For few tokens a launch takes longer than what it computes. Here the grid stays, one block a multiprocessor, and waits at
// barriers between the operators; meanwhile the weights of the products to come are on their way into the cache. Products
// with few tiles are split along K, and who needs their result adds the parts up, in one order always.
#include <algorithm>

#include "attention_tile.cuh"
#include "grid.cuh"
#include "tile_product.cuh"

namespace var_fast::cuda {
namespace {

constexpr const char* OP = "transformer_blocks";
constexpr int D = 64, THREADS = PRODUCT_THREADS;
constexpr int HEAD_LANES = 8;  // of 8 elements each
constexpr int ROW_CHUNKS = 5;  // of 4 THREADS channels
static_assert(ROW_CHUNKS * THREADS * 4 == D * TRANSFORMER_BLOCKS_HEADS);

enum Part { gate1, gate2, scale1, scale2, shift1, shift2, PARTS };

// The result of a product cut into `splits`: `rows` rows of N floats each; none where `at` is nullptr.
struct Parts {
    const float* at;
    int splits, rows, N;

    // Four neighbouring results, bias included.
    template <class T>
    __device__ __forceinline__ void sum(int row, int column, const T* bias, float (&to)[4]) const {
        if (bias != nullptr)
            load(bias + column, to);
        else
            to[0] = to[1] = to[2] = to[3] = 0;
        for (int split = 0; split < splits; ++split) {
            float part[4];
            load(at + (int64_t{split} * rows + row) * N + column, part);
#pragma unroll
            for (int i = 0; i < 4; ++i) to[i] += part[i];
        }
    }
};

// One row of x after another: x += gate * branch, then y = LN(x) (1 + scale) + shift where y is no nullptr.
template <class T>
__device__ __forceinline__ void norm(const TransformerSizes& s, float* x, Parts branch, const T* bias,
                                     const float* gate, const float* scale, const float* shift, T* y, float* slots) {
    const int C = static_cast<int>(s.H) * D, rows = static_cast<int>(s.S * s.l);
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        const int64_t image = row / s.l, parameters = (image < s.M ? image : s.M - 1) * PARTS * C;
        float values[ROW_CHUNKS][4] = {};
        float sum = 0;
#pragma unroll
        for (int chunk = 0; chunk < ROW_CHUNKS; ++chunk) {
            const int channel = (chunk * THREADS + threadIdx.x) * 4;
            if (channel >= C) continue;
            float* const at = x + int64_t{row} * C + channel;
            load(at, values[chunk]);
            if (branch.at != nullptr) {
                float gates[4], branches[4];
                load(gate + parameters + channel, gates);
                branch.sum(row, channel, bias, branches);
#pragma unroll
                for (int i = 0; i < 4; ++i) values[chunk][i] += gates[i] * branches[i];
                store(at, values[chunk]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) sum += values[chunk][i];
        }
        if (y == nullptr) continue;
        const float mean = block_sum(sum, slots) / C;
        float square = 0;
#pragma unroll
        for (int chunk = 0; chunk < ROW_CHUNKS; ++chunk) {
            if ((chunk * THREADS + threadIdx.x) * 4 >= C) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                values[chunk][i] -= mean;
                square += values[chunk][i] * values[chunk][i];
            }
        }
        const float inverse = rsqrtf(block_sum(square, slots + WARP) / C + s.eps);
#pragma unroll
        for (int chunk = 0; chunk < ROW_CHUNKS; ++chunk) {
            const int channel = (chunk * THREADS + threadIdx.x) * 4;
            if (channel >= C) continue;
            float scales[4], shifts[4];
            load(scale + parameters + channel, scales);
            load(shift + parameters + channel, shifts);
#pragma unroll
            for (int i = 0; i < 4; ++i) values[chunk][i] = values[chunk][i] * inverse * (1 + scales[i]) + shifts[i];
            store(y + int64_t{row} * C + channel, values[chunk]);
        }
    }
}

// As qk_norm, from the parts of the projection; eight lanes to a head of a token.
template <class T>
__device__ __forceinline__ void split_heads(const TransformerSizes& s, const Parts& qkv, const T* bias,
                                            const float* scale_H, T* q, T* k_cache, T* v_cache) {
    const int H = static_cast<int>(s.H), d = threadIdx.x % HEAD_LANES * 8;
    const int64_t items = s.R * s.l * H, step = int64_t{gridDim.x} * (THREADS / HEAD_LANES);
    // Every lane comes to every sum over lanes, also where its item is none.
    for (int64_t first = int64_t{blockIdx.x} * (THREADS / HEAD_LANES); first < items; first += step) {
        const int64_t item = first + threadIdx.x / HEAD_LANES;
        const int64_t head = item % H, token = item / H % s.l, image = item / H / s.l;
        const bool active = item < items;
        float heads[3][8] = {};
        if (active) {
            const int row = static_cast<int>((image < s.S ? image : s.S - 1) * s.l + token);
#pragma unroll
            for (int part = 0; part < 3; ++part)
#pragma unroll
                for (int four = 0; four < 8; four += 4) {
                    float sums[4];
                    qkv.sum(row, static_cast<int>(part * H + head) * D + d + four, bias, sums);
#pragma unroll
                    for (int i = 0; i < 4; ++i) heads[part][four + i] = sums[i];
                }
        }
        float factors[2] = {s.softmax_scale, 1};
        if (scale_H != nullptr) {
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                float square = 0;
#pragma unroll
                for (int i = 0; i < 8; ++i) square += heads[part][i] * heads[part][i];
                factors[part] /= fmaxf(sqrtf(lanes_sum<HEAD_LANES>(square)), 1e-12f);
            }
            if (active) factors[0] *= scale_H[head];
        }
        if (!active) continue;
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
            for (int i = 0; i < 8; ++i) heads[part][i] *= factors[part];
        const int64_t cached = ((image * H + head) * s.capacity + s.begin + token) * D + d;
        store(q + item * D + d, heads[0]);
        store(k_cache + cached, heads[1]);
        store(v_cache + cached, heads[2]);
    }
}

// Two tiles of 16 queries at a time, four warps each.
template <class T>
__device__ __forceinline__ void attention(const TransformerSizes& s, const T* q, const T* k_cache, const T* v_cache,
                                          T* out, float* slots) {
    using State = Tile<T, D>;
    constexpr int TILES = THREADS / WARP / KEY_WARPS;
    const int H = static_cast<int>(s.H), l = static_cast<int>(s.l), length = static_cast<int>(s.begin) + l;
    const int query_tiles = (l + TILE - 1) / TILE, items = static_cast<int>(s.S) * H * query_tiles;
    const int lane = threadIdx.x % WARP, tile = threadIdx.x / WARP % TILES, part = threadIdx.x / WARP / TILES;
    for (int first = blockIdx.x * TILES; first < items; first += gridDim.x * TILES) {
        const int item = first + tile;
        const bool active = item < items;
        const int image_head = active ? item / query_tiles : 0, head = image_head % H, image = image_head / H;
        const int query_begin = item % query_tiles * TILE;
        const int64_t queries = (int64_t{image} * l * H + head) * D, cached = image_head * s.capacity * D;
        State state;
        attend(state, q + queries, int64_t{H} * D, query_begin, active ? l : 0, k_cache + cached, v_cache + cached, 0,
               active ? length : 0, part, lane, slots + tile * 2 * State::STATE * WARP);
        if (part == 0 && active) {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const int query = query_begin + row * 8 + lane / 4;
                if (query >= l) continue;
#pragma unroll
                for (int c = 0; c < D / (8 * State::WIDTH); ++c) {
                    float elements[2 * State::WIDTH];
                    state.outputs(row, c, 1 / state.weight[row], elements);
                    store(out + queries + int64_t{query} * H * D + (c * 8 + lane % 4 * 2) * State::WIDTH, elements);
                }
            }
        }
        __syncthreads();  // the slots have been read
    }
}

template <class T, int ROWS>
__global__ void __launch_bounds__(THREADS)
blocks_kernel(const TransformerBlock* blocks, TransformerSizes s, TransformerBuffers buffers) {
    using Product = TileProduct<T, ROWS>;
    unsigned char* const shared = dynamic_shared();
    float* const slots = reinterpret_cast<float*>(shared);
    T *const y = static_cast<T*>(buffers.y), *const q = static_cast<T*>(buffers.q),
            *const attended = static_cast<T*>(buffers.attended), *const hidden = static_cast<T*>(buffers.hidden);
    const int rows = static_cast<int>(s.S * s.l), C = static_cast<int>(s.H) * D, F = static_cast<int>(s.hidden);
    const int grid = gridDim.x;
    const Cut qkv_cut = Cut::of<ROWS>(rows, 3 * C, C, grid, true), proj_cut = Cut::of<ROWS>(rows, C, C, grid, true),
              fc1_cut = Cut::of<ROWS>(rows, F, C, grid, false), fc2_cut = Cut::of<ROWS>(rows, C, F, grid, true);
    const Parts qkv{buffers.partial, qkv_cut.splits, rows, 3 * C}, proj{buffers.partial, proj_cut.splits, rows, C},
        fc2{buffers.partial, fc2_cut.splits, rows, C};
    const auto make_parts = [&](const T* x, const void* weight, const Cut& cut) {
        Product{shared, x, static_cast<const T*>(weight), cut}.run([&](int row, int column, int split, float(&sums)[4]) {
            store(buffers.partial + (int64_t{split} * rows + row) * cut.N + column, sums);
        });
    };
    const auto pointer = [](const void* at) { return static_cast<const T*>(at); };

    const T* last_bias = nullptr;
    const float* last_gate = nullptr;
    for (int64_t number = 0; number < s.depth; ++number) {
        const TransformerBlock block = blocks[number];
        const float* const modulation = block.modulation;
        T *const k_cache = static_cast<T*>(block.k_cache), *const v_cache = static_cast<T*>(block.v_cache);
        prefetch_weights<ROWS>(qkv_cut, pointer(block.qkv_weight));
        norm(s, buffers.x, number > 0 ? fc2 : Parts{}, last_bias, last_gate, modulation + scale1 * C,
             modulation + shift1 * C, y, slots);
        grid_barrier(buffers.barrier);
        make_parts(y, block.qkv_weight, qkv_cut);
        grid_barrier(buffers.barrier);
        prefetch_weights<ROWS>(proj_cut, pointer(block.proj_weight));
        split_heads(s, qkv, pointer(block.qkv_bias), block.scale_H, q, k_cache, v_cache);
        grid_barrier(buffers.barrier);
        prefetch_weights<ROWS>(fc1_cut, pointer(block.fc1_weight));
        attention(s, q, k_cache, v_cache, attended, slots);
        grid_barrier(buffers.barrier);
        make_parts(attended, block.proj_weight, proj_cut);
        grid_barrier(buffers.barrier);
        prefetch_weights<ROWS>(fc2_cut, pointer(block.fc2_weight));
        norm(s, buffers.x, proj, pointer(block.proj_bias), modulation + gate1 * C, modulation + scale2 * C,
             modulation + shift2 * C, y, slots);
        grid_barrier(buffers.barrier);
        const T* const fc1_bias = pointer(block.fc1_bias);
        Product{shared, y, pointer(block.fc1_weight), fc1_cut}.run([&](int row, int column, int, float(&sums)[4]) {
            float bias[4] = {};
            if (fc1_bias != nullptr) load(fc1_bias + column, bias);
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[i] = gelu_of(sums[i] + bias[i]);
            store(hidden + int64_t{row} * F + column, sums);
        });
        grid_barrier(buffers.barrier);
        make_parts(hidden, block.fc2_weight, fc2_cut);
        grid_barrier(buffers.barrier);
        last_bias = pointer(block.fc2_bias);
        last_gate = modulation + gate2 * C;
    }
    norm<T>(s, buffers.x, fc2, last_bias, last_gate, nullptr, nullptr, nullptr, slots);
}

// Tiles of 16 rows where that is all there is.
template <class F>
void for_rows(int64_t rows, const F& f) {
    rows <= 16 ? f(std::integral_constant<int, 16>{}) : f(std::integral_constant<int, 64>{});
}

}  // namespace

int64_t transformer_blocks_partial_floats(const TransformerSizes& s) {
    const int64_t rows = s.S * s.l, C = s.H * D, grid = multiprocessors(OP);
    int64_t most = 0;
    for_rows(rows, [&](auto tile_rows) {
        for (const auto& [N, K] : {std::pair{3 * C, C}, std::pair{C, C}, std::pair{C, s.hidden}})
            most = std::max(most, rows * N * Cut::of<tile_rows>(rows, N, K, grid, true).splits);
    });
    return most;
}

void transformer_blocks(const TransformerBlock* blocks, Type type, const TransformerSizes& s,
                        const TransformerBuffers& buffers, void* stream) {
    expect(type != Type::f32, OP, "bfloat16 or float16");
    expect(s.H > 0 && s.H <= TRANSFORMER_BLOCKS_HEADS, OP, "at most 80 heads of 64 channels");
    expect(s.hidden > 0 && s.hidden % 8 == 0, OP, "hidden a multiple of 8");
    expect(s.M > 0 && s.S > 0 && s.S <= s.R, OP, "M > 0 and 0 < S <= R");
    expect(s.l > 0 && s.begin >= 0 && s.begin + s.l <= s.capacity, OP, "begin + l <= capacity");
    expect(s.S * s.l <= TRANSFORMER_BLOCKS_ROWS, OP, "at most 1024 tokens");
    const auto with = [&](auto element) {
        using T = decltype(element);
        for_rows(s.S * s.l, [&](auto rows) {
            constexpr int64_t slots = 2 * 2 * Tile<T, D>::STATE * WARP * static_cast<int64_t>(sizeof(float));
            using Product = TileProduct<T, rows>;
            launch_cooperative(OP, &blocks_kernel<T, rows>, grid_of(multiprocessors(OP)), THREADS,
                               std::max<int64_t>(Product::SHARED_BYTES, slots), stream, blocks, s, buffers);
        });
    };
    type == Type::bf16 ? with(__nv_bfloat16{}) : with(__half{});
}

}  // namespace var_fast::cuda
