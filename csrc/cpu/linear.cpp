// y = x W^T + bias in float32 from plain row-major weights of any type: half ones, less to hold and to read, are widened
// on the way. A panel of 32 columns x 256 weights is transposed into the first-level cache and multiplied with all rows of
// x; that costs little for few rows, where reading the weights is most of the work, and next to nothing for many. An
// element is a sum over chunks of 256 products, added in order, whatever the number of rows and threads.
#include <algorithm>
#include <cstdint>
#include <utility>

#include "../ops.h"
#include "buffer.h"
#include "gelu.h"
#include "matrix_kernels.h"
#include "parallel.h"
#include "tiles.h"

namespace var_fast::cpu {
namespace {

constexpr int CHUNK = 256;
constexpr int64_t BLOCK = 128 * 1024;  // floats of x that stay in the second-level cache
constexpr int64_t BLOCK_ROWS = 512;
constexpr int FETCHES = 4;

using Tile = void (*)(const float* x, const float* w, int64_t K, const float* base, int64_t base_stride, float* out,
                      int64_t out_stride, const char* next, int64_t next_stride, int64_t fetched);
using Pack = void (*)(const void* w, int64_t stride, int64_t n_count, int64_t K, const void* next, float* packed);

struct Kernels {
    int64_t lanes, columns, most_rows;
    const Tile (*tiles)[FETCHES];  // of 1 ... most_rows rows, which fetch 0, 4, 8, 16 rows of the weights meanwhile
    const Pack (*pack_columns)[2];  // by the weights' Type; which fetches none, half of the columns
    void (*pack_rows)(const float* x, int64_t stride, int64_t rows, int64_t available, int64_t K, float* packed);
};

#define VAR_FAST_KERNELS(isa)                                                                               \
    namespace isa {                                                                                         \
    template <int... I>                                                                                     \
    const Kernels& kernels(std::integer_sequence<int, I...>) {                                              \
        static constexpr Tile TILES[][FETCHES] = {                                                          \
            {tile<I + 1, 1, I + 1, 0>, tile<I + 1, 1, I + 1, 4>, tile<I + 1, 1, I + 1, 8>,                  \
             tile<I + 1, 1, I + 1, 16>}...};                                                                \
        static constexpr Pack PACKS[][2] = {{pack_columns<float, 0>, pack_columns<float, COLUMNS / 2>},      \
                                            {pack_columns<bf16, 0>, pack_columns<bf16, COLUMNS / 2>},        \
                                            {pack_columns<f16, 0>, pack_columns<f16, COLUMNS / 2>}};         \
        static constexpr Kernels KERNELS = {LANES, COLUMNS, MOST_ROWS, TILES, PACKS, pack_rows};            \
        return KERNELS;                                                                                     \
    }                                                                                                       \
    const Kernels& kernels() { return kernels(std::make_integer_sequence<int, MOST_ROWS>()); }              \
    }
VAR_FAST_KERNELS(portable)
#ifdef VAR_FAST_X86
VAR_FAST_KERNELS(avx2)
VAR_FAST_KERNELS(avx512)
#endif
#undef VAR_FAST_KERNELS

const Kernels& kernels() {
#ifdef VAR_FAST_X86
    if (isa() >= Isa::avx512) return avx512::kernels();
    if (isa() >= Isa::avx2) return avx2::kernels();
#endif
    return portable::kernels();
}

struct GeluRows {
    __attribute__((always_inline)) static void run(float* y, int64_t rows, int64_t columns, int64_t stride) {
        for (int64_t m = 0; m < rows; ++m) {
            float* row = y + m * stride;
            for (int64_t n = 0; n < columns; ++n) row[n] = gelu_tanh(row[n]);
        }
    }
};

struct Problem {
    const float* x;
    const char* weight;
    Type type;  // of the weights
    const float* bias;
    int64_t M, N, K;
    bool gelu;
    float* y;
};

// Panels [begin, end) of y's columns, rows [m_begin, m_end).
void part(const Kernels& kernels, const Problem& p, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end) {
    const int64_t columns = kernels.columns, K = p.K, N = p.N, size = p.type == Type::f32 ? 4 : 2;
    const Pack* const pack_columns = kernels.pack_columns[static_cast<int>(p.type)];
    const int64_t blocks = (m_end - m_begin + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t all_chunks = std::max<int64_t>((K + CHUNK - 1) / CHUNK, 1);
    const int64_t most_rows = (m_end - m_begin + blocks - 1) / blocks;
    const int64_t span = std::clamp<int64_t>(BLOCK / (most_rows * CHUNK), 1, all_chunks);  // chunks of x packed at once
    const Buffer packed_x = buffer(most_rows * span * CHUNK + kernels.lanes), packed_w = buffer(CHUNK * columns);
    float edge_base[16 * 32] = {}, edge_out[16 * 32];
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t m0 = m_begin + cut(m_end - m_begin, blocks, block);
        const int64_t rows = m_begin + cut(m_end - m_begin, blocks, block + 1) - m0;
        const int64_t tiles = (rows + kernels.most_rows - 1) / kernels.most_rows;
        // The weights that come next are fetched by the first 8, 4 or 2 tiles; one tile alone shares them with packing.
        const int64_t fetched_by_pack = tiles == 1 ? columns / 2 : 0;
        int fetch_index = tiles >= 8 ? 1 : tiles >= 4 ? 2 : 3;
        while (fetch_index > 1 && 2 << fetch_index > columns - fetched_by_pack) --fetch_index;
        const int fetch = 2 << fetch_index;
        for (int64_t first_chunk = 0; first_chunk < all_chunks; first_chunk += span) {
            const int64_t chunks = std::min(span, all_chunks - first_chunk);
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const int64_t k0 = (first_chunk + chunk) * CHUNK;
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    const int64_t m = cut(rows, tiles, tile), m_count = cut(rows, tiles, tile + 1) - m;
                    kernels.pack_rows(p.x + (m0 + m) * K + k0, K, m_count, p.M - m0 - m, std::min<int64_t>(CHUNK, K - k0),
                                      packed_x.get() + (chunk * rows + m) * CHUNK);
                }
            }
            for (int64_t panel = begin; panel < end; ++panel) {
                const int64_t n0 = panel * columns, n_count = std::min(columns, N - n0);
                for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                    const int64_t k0 = (first_chunk + chunk) * CHUNK, k_count = std::min<int64_t>(CHUNK, K - k0);
                    const char* w = p.weight + (n0 * K + k0) * size;
                    const char* next = w + (chunk + 1 < chunks ? CHUNK : columns * K - chunk * CHUNK) * size;
                    const bool has_next = chunk + 1 < chunks || panel + 1 < end;
                    pack_columns[has_next && fetched_by_pack > 0](w, K, n_count, k_count, next, packed_w.get());
                    const bool first = k0 == 0;
                    int64_t fetched_rows = fetched_by_pack;
                    for (int64_t tile = 0; tile < tiles; ++tile) {
                        const int64_t m = cut(rows, tiles, tile), m_count = cut(rows, tiles, tile + 1) - m;
                        const float* tile_x = packed_x.get() + (chunk * rows + m) * CHUNK;
                        float* out = p.y + (m0 + m) * N + n0;
                        const float* base = first ? (p.bias ? p.bias + n0 : nullptr) : out;
                        const int64_t base_stride = first ? 0 : N;
                        const bool fetches = has_next && fetched_rows + fetch <= columns;
                        const Tile run = kernels.tiles[m_count - 1][fetches ? fetch_index : 0];
                        const char* fetched = next + fetched_rows * K * size;
                        fetched_rows += fetch;
                        if (n_count == columns) {
                            run(tile_x, packed_w.get(), k_count, base, base_stride, out, N, fetched, K * size, 16 * size);
                            continue;
                        }
                        for (int64_t i = 0; base && i < m_count; ++i)
                            std::copy_n(base + i * base_stride, n_count, edge_base + i * columns);
                        run(tile_x, packed_w.get(), k_count, base ? edge_base : nullptr, columns, edge_out, columns,
                            fetched, K * size, 16 * size);
                        for (int64_t i = 0; i < m_count; ++i)
                            std::copy_n(edge_out + i * columns, n_count, out + i * N);
                    }
                }
                if (p.gelu && first_chunk + chunks == all_chunks)
                    dispatch<GeluRows>(p.y + m0 * N + n0, rows, n_count, N);
            }
        }
    }
}

}  // namespace

void linear(const float* x, const void* weight, Type weight_type, const float* bias, int64_t M, int64_t N, int64_t K,
            bool gelu, float* y, int threads) {
    if (M == 0 || N == 0) return;
    const Problem problem{x, static_cast<const char*>(weight), weight_type, bias, M, N, K, gelu, y};
    const Kernels& chosen = kernels();
    const int64_t panels = (N + chosen.columns - 1) / chosen.columns;
    // less than some 10 microseconds of work is not worth a second thread
    constexpr int64_t WORTHWHILE = 100'000;
    if (panels >= threads)
        parallel_for(panels, threads, 1 + WORTHWHILE / (M * chosen.columns * std::max<int64_t>(K, 1)),
                     [&](int64_t begin, int64_t end) { part(chosen, problem, 0, M, begin, end); });
    else
        parallel_for(M, threads, 1 + WORTHWHILE / (N * std::max<int64_t>(K, 1)),
                     [&](int64_t begin, int64_t end) { part(chosen, problem, begin, end, 0, panels); });
}

}  // namespace var_fast::cpu
