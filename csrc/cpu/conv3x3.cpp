// 3x3 convolution in float32, channels last, by Winograd's F(4x4, 3x3): 4 x 4 outputs from 6 x 6 inputs by 36 instead
// of 144 products per pair of channels (Lavin & Gray, arXiv 1509.09308). With the points 0, +-5/8, +-3/2 and infinity
// the error is about 1.1e-6 of the result at 160 channels; their 0, +-1, +-2 give 2.6e-6. Some 28 tiles at a time are
// transformed, multiplied (36 matrix products with weights transformed beforehand) and transformed back in the cache.
// An element's rounding depends on the number of channels alone: not on the batch, the tile's place or the threads.
#include <algorithm>
#include <cstdint>
#include <utility>

#include "../ops.h"
#include "buffer.h"
#include "matrix_kernels.h"
#include "parallel.h"
#include "tiles.h"

namespace var_fast::cpu {
namespace {

constexpr float POINT_A = 0.625f, POINT_B = 1.5f;
constexpr int POINTS = 36;
constexpr int CHUNK = 160;     // channels that are summed at a time, at most
constexpr int64_t BLOCK = 28;  // tiles, whose transforms stay in the second-level cache

}  // namespace

#define VAR_FAST_TARGET
namespace {
namespace portable {
#include "winograd.h"
}
}  // namespace
#undef VAR_FAST_TARGET
#ifdef VAR_FAST_X86
#define VAR_FAST_TARGET VAR_FAST_AVX2
namespace {
namespace avx2 {
#include "winograd.h"
}
}  // namespace
#undef VAR_FAST_TARGET
#define VAR_FAST_TARGET VAR_FAST_AVX512
namespace {
namespace avx512 {
#include "winograd.h"
}
}  // namespace
#undef VAR_FAST_TARGET
#endif

namespace {

constexpr int FETCHES = 4;
using Tile = void (*)(const float* x, const float* w, int64_t K, const float* base, int64_t base_stride, float* out,
                      int64_t out_stride, const char* next, int64_t next_stride, int64_t fetched);

struct Kernels {
    int64_t lanes, columns, most_rows;
    const Tile (*tiles)[FETCHES];
    void (*input_tile)(const float* x, int64_t row, int64_t pixel, int64_t channels, float* v, int64_t stride);
    void (*output_tile)(const float* m, int64_t stride, const float* bias, const float* residual, float* y, int64_t row,
                        int64_t pixel);
};

#define VAR_FAST_KERNELS(isa)                                                                                \
    namespace isa {                                                                                         \
    template <int... I>                                                                                     \
    const Kernels& kernels(std::integer_sequence<int, I...>) {                                              \
        static constexpr Tile TILES[][FETCHES] = {                                                          \
            {tile<I + 1, CHUNK, 1, 0>, tile<I + 1, CHUNK, 1, 4>, tile<I + 1, CHUNK, 1, 8>,                  \
             tile<I + 1, CHUNK, 1, 16>}...};                                                                \
        static constexpr Kernels KERNELS = {LANES, COLUMNS, MOST_ROWS, TILES, input_tile, output_tile};     \
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

// Input channels in chunks of 16 m <= CHUNK, output channels in panels of `columns`. Packed weights are
// (chunk, panel, point, channel of the chunk, column).
struct Channels {
    int64_t in, chunk, panels, columns;
    Channels(int64_t in, int64_t out, int64_t columns) : in(in), panels(parts_of(out, columns)), columns(columns) {
        chunk = (parts_of(in, parts_of(in, CHUNK)) + 15) / 16 * 16;
    }
    int64_t chunks() const { return parts_of(in, chunk); }
    int64_t count(int64_t index) const { return std::min(chunk, in - index * chunk); }
    int64_t offset(int64_t index, int64_t panel) const {
        return (index * chunk * panels + panel * count(index)) * POINTS * columns;
    }
    int64_t floats() const { return in * panels * POINTS * columns; }
};

struct Problem {
    const float *x, *packed, *bias, *residual;
    int64_t B, h, w, Cin, Cout;
    float* y;
    int64_t tiles_h() const { return parts_of(h, 4); }
    int64_t tiles_w() const { return parts_of(w, 4); }
    int64_t tiles() const { return B * tiles_h() * tiles_w(); }
};

// Where tile `index` lies: image, first row and column of its outputs.
struct Place {
    int64_t image, i, j;
    Place(const Problem& p, int64_t index)
        : image(index / (p.tiles_h() * p.tiles_w())),
          i(index / p.tiles_w() % p.tiles_h() * 4),
          j(index % p.tiles_w() * 4) {}
};

// Channels [c0, c0 + count) of tile `index` -> v; `patch` is POINTS * CHUNK floats of scratch.
void transform_input(const Kernels& kernels, const Problem& p, int64_t index, int64_t c0, int64_t count, float* patch,
                     float* v, int64_t stride) {
    const Place at(p, index);
    const float* image = p.x + at.image * p.h * p.w * p.Cin + c0;
    const bool inside = at.i > 0 && at.j > 0 && at.i + 5 <= p.h && at.j + 5 <= p.w;
    if (inside && count % kernels.lanes == 0) {
        kernels.input_tile(image + ((at.i - 1) * p.w + at.j - 1) * p.Cin, p.w * p.Cin, p.Cin, count, v, stride);
        return;
    }
    const int64_t whole = parts_of(count, kernels.lanes) * kernels.lanes;
    std::fill_n(patch, POINTS * CHUNK, 0.0f);
    for (int64_t i = std::max<int64_t>(at.i - 1, 0); i < std::min(at.i + 5, p.h); ++i)
        for (int64_t j = std::max<int64_t>(at.j - 1, 0); j < std::min(at.j + 5, p.w); ++j)
            std::copy_n(image + (i * p.w + j) * p.Cin, count, patch + ((i - at.i + 1) * 6 + j - at.j + 1) * CHUNK);
    kernels.input_tile(patch, 6 * CHUNK, CHUNK, whole, v, stride);
}

// m -> channels [c0, c0 + count) of tile `index`; bias has `columns` floats.
void transform_output(const Kernels& kernels, const Problem& p, int64_t index, int64_t c0, int64_t count,
                      const float* bias, const float* m, int64_t stride) {
    const Place at(p, index);
    const int64_t first = ((at.image * p.h + at.i) * p.w + at.j) * p.Cout + c0;
    const float* residual = p.residual ? p.residual + first : nullptr;
    if (at.i + 4 <= p.h && at.j + 4 <= p.w && count == kernels.columns) {
        kernels.output_tile(m, stride, bias, residual, p.y + first, p.w * p.Cout, p.Cout);
        return;
    }
    float whole[16 * 32], whole_residual[16 * 32] = {};
    const int64_t rows = std::min<int64_t>(4, p.h - at.i), pixels = std::min<int64_t>(4, p.w - at.j);
    for (int64_t i = 0; residual && i < rows; ++i)
        for (int64_t j = 0; j < pixels; ++j)
            std::copy_n(residual + (i * p.w + j) * p.Cout, count, whole_residual + (4 * i + j) * kernels.columns);
    kernels.output_tile(m, stride, bias, residual ? whole_residual : nullptr, whole, 4 * kernels.columns,
                        kernels.columns);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < pixels; ++j)
            std::copy_n(whole + (4 * i + j) * kernels.columns, count, p.y + first + (i * p.w + j) * p.Cout);
}

// Panels [begin, end) of the output channels of tiles [first, last), BLOCK of them at most.
class Part {
public:
    Part(const Kernels& kernels, const Problem& p, int64_t most_tiles, int64_t begin, int64_t end)
        : kernels_(kernels),
          p_(p),
          channels_(p.Cin, p.Cout, kernels.columns),
          begin_(begin),
          end_(end),
          patch_(buffer(POINTS * CHUNK)),
          inputs_(buffer(POINTS * most_tiles * CHUNK)),
          products_(buffer(POINTS * most_tiles * kernels.columns * (channels_.chunks() == 1 ? 1 : end - begin))) {}

    void run(int64_t first, int64_t last) {
        const int64_t tiles = last - first, columns = kernels_.columns, chunks = channels_.chunks();
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            for (int64_t i = 0; i < tiles; ++i)
                transform_input(kernels_, p_, first + i, chunk * channels_.chunk, channels_.count(chunk), patch_.get(),
                                inputs_.get() + i * CHUNK, tiles * CHUNK);
            for (int64_t panel = begin_; panel < end_; ++panel) {
                float* m = products_.get() + (chunks == 1 ? 0 : panel - begin_) * POINTS * tiles * columns;
                multiply(chunk, panel, tiles, m);
                if (chunk + 1 < chunks) continue;
                const int64_t c0 = panel * columns, count = std::min(columns, p_.Cout - c0);
                float bias[32] = {};
                if (p_.bias) std::copy_n(p_.bias + c0, count, bias);
                for (int64_t i = 0; i < tiles; ++i)
                    transform_output(kernels_, p_, first + i, c0, count, bias, m + i * columns, tiles * columns);
            }
        }
    }

private:
    // m (POINTS, tiles, columns) (+)= inputs (POINTS, tiles, channels of the chunk) times their weights
    void multiply(int64_t chunk, int64_t panel, int64_t tiles, float* m) {
        const int64_t columns = kernels_.columns, K = channels_.count(chunk);
        const int64_t parts = parts_of(tiles, kernels_.most_rows);
        const int fetch_index = parts >= 8 ? 1 : parts >= 4 ? 2 : 3, fetch = 2 << fetch_index;
        const float* w = p_.packed + channels_.offset(chunk, panel);
        for (int64_t point = 0; point < POINTS; ++point, w += K * columns) {
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t i = cut(tiles, parts, part), rows = cut(tiles, parts, part + 1) - i;
                float* out = m + (point * tiles + i) * columns;
                // the next point's weights lie behind these
                const Tile run = kernels_.tiles[rows - 1][(part + 1) * fetch <= columns ? fetch_index : 0];
                run(inputs_.get() + (point * tiles + i) * CHUNK, w, K, chunk > 0 ? out : nullptr, columns, out, columns,
                    reinterpret_cast<const char*>(w + (columns + part * fetch) * K), K * sizeof(float), 16 * sizeof(float));
            }
        }
    }

    const Kernels& kernels_;
    const Problem& p_;
    const Channels channels_;
    const int64_t begin_, end_;
    const Buffer patch_, inputs_, products_;
};

// Of one input channel G g G^T for `columns` output channels, the last ones zero if there are fewer: g (3, 3) lie `stride`
// floats apart, the results of the 36 points `point` floats.
struct TransformWeights {
    __attribute__((always_inline)) static void run(const float* g, int64_t stride, int64_t outputs, int64_t columns, float* to,
                                                   int64_t point) {
        constexpr double A = POINT_A, B = POINT_B;
        constexpr double SCALE_A = 2 * A * A * (A * A - B * B), SCALE_B = 2 * B * B * (B * B - A * A);
        constexpr double G[6][3] = {{1 / (A * A * B * B), 0, 0},
                                    {1 / SCALE_A, A / SCALE_A, A * A / SCALE_A},
                                    {1 / SCALE_A, -A / SCALE_A, A * A / SCALE_A},
                                    {1 / SCALE_B, B / SCALE_B, B * B / SCALE_B},
                                    {1 / SCALE_B, -B / SCALE_B, B * B / SCALE_B},
                                    {0, 0, 1}};
        constexpr int MANY = 8;  // columns at a time
        for (int64_t first = 0; first < columns; first += MANY) {
            double taps[9][MANY] = {}, half[6][3][MANY];
            for (int64_t c = 0; c < std::min<int64_t>(MANY, outputs - first); ++c)
                for (int tap = 0; tap < 9; ++tap) taps[tap][c] = g[(first + c) * stride + tap];
            for (int i = 0; i < 6; ++i)
                for (int j = 0; j < 3; ++j)
                    for (int c = 0; c < MANY; ++c)
                        half[i][j][c] = G[i][0] * taps[j][c] + G[i][1] * taps[3 + j][c] + G[i][2] * taps[6 + j][c];
            for (int i = 0; i < 6; ++i)
                for (int j = 0; j < 6; ++j)
                    for (int c = 0; c < MANY; ++c)
                        to[(6 * i + j) * point + first + c] = static_cast<float>(
                            half[i][0][c] * G[j][0] + half[i][1][c] * G[j][1] + half[i][2][c] * G[j][2]);
        }
    }
};

}  // namespace

int64_t conv3x3_packed_bytes(int64_t Cin, int64_t Cout) {
    return Channels(Cin, Cout, kernels().columns).floats() * static_cast<int64_t>(sizeof(float));
}

void conv3x3_pack(const float* weight, int64_t Cin, int64_t Cout, float* packed, int threads) {
    const int64_t columns = kernels().columns;
    const Channels channels(Cin, Cout, columns);
    parallel_for(channels.panels * Cin, threads, 4096 / columns, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t panel = i / Cin, in = i % Cin, chunk = in / channels.chunk, first = panel * columns;
            float* const to = packed + channels.offset(chunk, panel) + in % channels.chunk * columns;
            dispatch<TransformWeights>(weight + (first * Cin + in) * 9, Cin * 9, std::min(columns, Cout - first), columns, to,
                                       channels.count(chunk) * columns);
        }
    });
}

void conv3x3(const float* x, const float* packed, const float* bias, const float* residual, int64_t B, int64_t h,
             int64_t w, int64_t Cin, int64_t Cout, float* y, int threads) {
    const Problem p{x, packed, bias, residual, B, h, w, Cin, Cout, y};
    const Kernels& chosen = kernels();
    const int64_t tiles = p.tiles(), panels = parts_of(Cout, chosen.columns);
    if (tiles == 0 || Cout == 0) return;
    if (tiles >= threads * BLOCK || panels < threads) {
        const int64_t blocks = std::min(parts_of(parts_of(tiles, BLOCK), threads) * threads, tiles);
        parallel_for(blocks, threads, 1, [&](int64_t begin, int64_t end) {
            Part part(chosen, p, parts_of(tiles, blocks), 0, panels);
            for (int64_t i = begin; i < end; ++i) part.run(cut(tiles, blocks, i), cut(tiles, blocks, i + 1));
        });
    } else {  // few tiles: reading the weights is much of the work, so they are what is shared out
        const int64_t blocks = parts_of(tiles, BLOCK);
        parallel_for(panels, threads, 1, [&](int64_t begin, int64_t end) {
            Part part(chosen, p, parts_of(tiles, blocks), begin, end);
            for (int64_t i = 0; i < blocks; ++i) part.run(cut(tiles, blocks, i), cut(tiles, blocks, i + 1));
        });
    }
}

}  // namespace var_fast::cpu
