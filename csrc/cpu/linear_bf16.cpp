// y = x W^T + bias in bfloat16, in AMX tiles. Weights are kept as the tiles want them (linear_bf16_pack): panels of 32
// columns; in a panel, for every 32 inputs, two tiles of 16 pairs of inputs by 16 columns. Rows of x are put into tiles
// at the start of a call and stay in the second-level cache; 2 x 2 tiles of sums, up to 32 rows by a panel, stay in
// registers through a chunk of inputs whose weights fit the first-level cache. Weights come from memory, most of the work
// where rows are few: while one chunk of a panel is multiplied, the next one is fetched. Sums are float32, in the order of
// the inputs whatever the number of rows and threads, so a row does not depend on the others.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "../ops.h"
#include "amx.h"
#include "buffer.h"
#include "convert.h"
#include "gelu.h"
#include "parallel.h"
#include "tiles.h"

namespace var_fast::cpu {
namespace {

constexpr int64_t TILE = 16, TILE_BYTES = 1024;
constexpr int64_t PANEL = 2 * TILE, STEP = 32;  // columns and inputs of one step
constexpr int64_t STEP_BYTES = 2 * TILE_BYTES, SUM_BYTES = 4 * TILE_BYTES;

int64_t steps_of(int64_t K) { return std::max<int64_t>(parts_of(K, STEP), 1); }

#ifdef VAR_FAST_X86

constexpr int64_t CHUNK = 8;              // steps
constexpr int BLOCK_GROUPS = 8;           // of x at a time
constexpr int64_t BLOCK_BYTES = 1 << 19;  // that stay in the second-level cache

// sums (2 x 2 tiles; ROW_TILES 1: the upper two) = or += a group of x times a panel.
template <int ROW_TILES, int LINES>
VAR_FAST_AMX void multiply(const char* x, const char* w, int64_t steps, bool add, char* sums, const char* next) {
    const Tiles left{x, 64, TILE_BYTES, STEP_BYTES}, right{w, 64, TILE_BYTES, STEP_BYTES};
    multiply_tiles<ROW_TILES, 2, LINES>(left, right, steps, add, sums, 64, TILE_BYTES, 2 * TILE_BYTES, next);
}

using Multiply = void (*)(const char*, const char*, int64_t, bool, char*, const char*);

// A chunk's 32 lines a step are fetched by all groups of x together.
constexpr int64_t lines_of(int64_t groups) { return (STEP_BYTES / 64 + groups - 1) / groups; }

template <int... I>
Multiply multiply_of(int64_t row_tiles, int64_t groups, bool fetches, std::integer_sequence<int, I...>) {
    static constexpr Multiply FETCHING[][2] = {{multiply<1, lines_of(I + 1)>, multiply<2, lines_of(I + 1)>}...};
    static constexpr Multiply PLAIN[] = {multiply<1, 0>, multiply<2, 0>};
    return fetches ? FETCHING[groups - 1][row_tiles - 1] : PLAIN[row_tiles - 1];
}

VAR_FAST_AMX inline __attribute__((always_inline)) __m512 gelu(__m512 x) {
    float lanes[TILE];
    _mm512_storeu_ps(lanes, x);
    for (int64_t i = 0; i < TILE; ++i) lanes[i] = gelu_tanh(lanes[i]);
    return _mm512_loadu_ps(lanes);
}

// The first `count` of 32 elements.
VAR_FAST_AMX inline __mmask32 first(int64_t count) {
    return count >= PANEL ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

// Where rows of 32 elements go: bytes from one to the next, from those of a tile to those of the next.
struct Rows {
    char* data;
    int64_t row, tile;
};

// y = sums + bias, `rows` by `columns` of them; of the other columns `mask` chooses which become zero.
template <bool GELU>
VAR_FAST_AMX void finish(const char* sums, const float* bias, int64_t rows, int64_t tile_rows, int64_t columns,
                         __mmask32 mask, Rows y) {
    const __m512 left = _mm512_loadu_ps(bias), right = _mm512_loadu_ps(bias + TILE);
    for (int64_t m = 0; m < rows; ++m) {
        const int64_t tile = m >= tile_rows, row = m - tile * tile_rows;
        const char* from = sums + tile * 2 * TILE_BYTES + row * 64;
        __m512 a = _mm512_add_ps(_mm512_loadu_ps(from), left);
        __m512 b = _mm512_add_ps(_mm512_loadu_ps(from + TILE_BYTES), right);
        if constexpr (GELU) {
            a = gelu(a);
            b = gelu(b);
        }
        const __m512i out = _mm512_maskz_mov_epi16(first(columns), (__m512i)_mm512_cvtne2ps_pbh(b, a));
        _mm512_mask_storeu_epi16(y.data + tile * y.tile + row * y.row, mask, out);
    }
}

// x (rows, width) -> groups of `steps` steps, two tiles each; zeros where there is no row or no input.
VAR_FAST_AMX void pack_rows(const bf16* x, int64_t stride, int64_t rows, int64_t tile_rows, int64_t width, int64_t steps,
                            char* to) {
    for (int64_t m = 0; m < parts_of(rows, tile_rows) * tile_rows; ++m) {
        const int64_t tile = m / tile_rows;
        char* row = to + tile / 2 * steps * STEP_BYTES + tile % 2 * TILE_BYTES + m % tile_rows * 64;
        for (int64_t step = 0; step < steps; ++step) {
            const __mmask32 mask = first(m < rows ? std::max<int64_t>(width - step * STEP, 0) : 0);
            _mm512_store_si512(row + step * STEP_BYTES, _mm512_maskz_loadu_epi16(mask, x + m * stride + step * STEP));
        }
    }
}

struct Problem {
    const char* x;
    bool x_in_tiles;  // groups of steps, as pack_rows leaves them
    const char* packed;
    const float* bias;
    int64_t M, N, K;
    bool gelu;
    char* y;
    bool y_in_tiles;  // as the next product's x
    // As few tiles as can be, all of one number of rows.
    int64_t tile_rows() const { return parts_of(M, parts_of(M, TILE)); }
    int64_t group_rows() const { return 2 * tile_rows(); }
    int64_t groups() const { return parts_of(M, group_rows()); }
    int64_t panels() const { return parts_of(N, PANEL); }
};

// The work of one thread.
class Worker {
public:
    explicit Worker(const Problem& p) : p_(p), steps_(steps_of(p.K)), tile_rows_(p.tile_rows()), group_rows_(p.group_rows()) {}

    // Groups [g_begin, g_end) of rows by panels [begin, end) of columns.
    VAR_FAST_AMX void run(int64_t g_begin, int64_t g_end, int64_t begin, int64_t end) {
        const int64_t blocks = parts_of(g_end - g_begin, BLOCK_GROUPS), most = parts_of(g_end - g_begin, blocks);
        const int64_t span = std::min(BLOCK_BYTES / (most * STEP_BYTES) / CHUNK * CHUNK, steps_);
        // where x does not fit, the sums of all panels are kept until its next inputs are there
        const int64_t kept = span < steps_ ? end - begin : 1;
        const Buffer x = buffer(p_.x_in_tiles ? 0 : most * span * STEP_BYTES / 4), sums = buffer(kept * most * SUM_BYTES / 4);
        begin_tiles(static_cast<int>(tile_rows_));
        for (int64_t block = 0; block < blocks; ++block) {
            g0_ = g_begin + cut(g_end - g_begin, blocks, block);
            groups_ = g_begin + cut(g_end - g_begin, blocks, block + 1) - g0_;
            for (first_ = 0; first_ < steps_; first_ += span) {
                count_ = std::min(span, steps_ - first_);
                take_rows(reinterpret_cast<char*>(x.get()));
                for (int64_t i = begin; i < end; ++i)
                    panel(i, i + 1 < end, reinterpret_cast<char*>(sums.get()) + (i - begin) % kept * groups_ * SUM_BYTES);
            }
        }
        end_tiles();
    }

private:
    // x_ = groups_ of steps [first_, first_ + count_)
    VAR_FAST_AMX void take_rows(char* packed) {
        if (p_.x_in_tiles) {
            x_ = p_.x + (g0_ * steps_ + first_) * STEP_BYTES;
            x_group_ = steps_ * STEP_BYTES;
            return;
        }
        const int64_t m0 = g0_ * group_rows_, rows = std::min(groups_ * group_rows_, p_.M - m0), k0 = first_ * STEP;
        pack_rows(reinterpret_cast<const bf16*>(p_.x) + m0 * p_.K + k0, p_.K, rows, tile_rows_, p_.K - k0, count_, packed);
        x_ = packed;
        x_group_ = count_ * STEP_BYTES;
    }

    Rows out(int64_t group, int64_t panel) const {
        if (p_.y_in_tiles) return {p_.y + ((g0_ + group) * p_.panels() + panel) * STEP_BYTES, 64, TILE_BYTES};
        const int64_t row = p_.N * static_cast<int64_t>(sizeof(bf16));
        return {p_.y + (g0_ + group) * group_rows_ * row + panel * 64, row, tile_rows_ * row};
    }

    // Those inputs by one panel.
    VAR_FAST_AMX void panel(int64_t index, bool has_next, char* sums) {
        const int64_t n0 = index * PANEL, columns = std::min(PANEL, p_.N - n0), lines = lines_of(groups_);
        const char* const w = p_.packed + (index * steps_ + first_) * STEP_BYTES;
        alignas(64) float bias[PANEL] = {};
        if (p_.bias) std::copy_n(p_.bias + n0, columns, bias);
        const __mmask32 mask = first(p_.y_in_tiles ? PANEL : columns);
        for (int64_t chunk = 0; chunk < count_; chunk += CHUNK) {
            const int64_t steps = std::min(CHUNK, count_ - chunk);
            const bool last = chunk + steps == count_, whole = first_ + chunk + steps == steps_;
            const char* const next = last ? w + steps_ * STEP_BYTES : w + (chunk + steps) * STEP_BYTES;
            const bool fetches = !last || has_next;
            for (int64_t group = 0; group < groups_; ++group) {
                const int64_t m0 = (g0_ + group) * group_rows_, rows = std::min(group_rows_, p_.M - m0);
                const Multiply run = multiply_of(parts_of(rows, tile_rows_), groups_, fetches,
                                                 std::make_integer_sequence<int, BLOCK_GROUPS>());
                run(x_ + group * x_group_ + chunk * STEP_BYTES, w + chunk * STEP_BYTES, steps, first_ + chunk > 0,
                    sums + group * SUM_BYTES, next + group * steps * lines * 64);
                if (whole)
                    (p_.gelu ? finish<true> : finish<false>)(sums + group * SUM_BYTES, bias, rows, tile_rows_, columns,
                                                             mask, out(group, index));
            }
        }
    }

    const Problem& p_;
    const int64_t steps_, tile_rows_, group_rows_;
    const char* x_ = nullptr;
    int64_t x_group_ = 0;            // bytes from a group to the next
    int64_t g0_ = 0, groups_ = 0;    // of the block
    int64_t first_ = 0, count_ = 0;  // steps that x_ holds
};

// Into how many parts the rows go; columns go into threads / that. A thread packs its rows and reads its weights, either
// as long as about six products of a group with a panel.
int64_t row_parts(int64_t groups, int64_t panels, int64_t threads) {
    constexpr int64_t MOVED = 6;
    int64_t best = 1, least = INT64_MAX;
    for (int64_t parts = 1; parts <= std::min(threads, groups); ++parts) {
        const int64_t g = parts_of(groups, parts), p = parts_of(panels, std::min(threads / parts, panels));
        const int64_t cost = g * p + MOVED * (g + p);
        if (cost < least) {
            least = cost;
            best = parts;
        }
    }
    return best;
}

void run(const Problem& p, int threads) {
    if (p.M == 0 || p.N == 0) return;
    const int64_t rows = row_parts(p.groups(), p.panels(), std::max(threads, 1));
    const int64_t columns = std::min<int64_t>(std::max(threads, 1) / rows, p.panels());
    parallel_for(rows * columns, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
            const int64_t row = part / columns, column = part % columns;
            Worker(p).run(cut(p.groups(), rows, row), cut(p.groups(), rows, row + 1), cut(p.panels(), columns, column),
                          cut(p.panels(), columns, column + 1));
        }
    });
}
#endif

}  // namespace

int64_t linear_bf16_packed_bytes(int64_t N, int64_t K) { return parts_of(N, PANEL) * steps_of(K) * STEP_BYTES; }

// (panel, step, tile, pair of inputs, column, 2)
void linear_bf16_pack(const void* weight, int64_t N, int64_t K, void* packed, int threads) {
    const auto* const from = static_cast<const bf16*>(weight);
    const int64_t steps = steps_of(K);
    parallel_for(parts_of(N, PANEL) * PANEL, threads, PANEL, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
            bf16* to = static_cast<bf16*>(packed) + n / PANEL * steps * PANEL * STEP + n % PANEL / TILE * TILE * STEP;
            for (int64_t k = 0; k < steps * STEP; ++k)
                to[k / STEP * PANEL * STEP + k % STEP / 2 * 2 * TILE + n % TILE * 2 + k % 2] =
                    n < N && k < K ? from[n * K + k] : bf16{0};
        }
    });
}

void linear_bf16([[maybe_unused]] const void* x, [[maybe_unused]] const void* packed, [[maybe_unused]] const float* bias,
                 [[maybe_unused]] int64_t M, [[maybe_unused]] int64_t N, [[maybe_unused]] int64_t K,
                 [[maybe_unused]] bool gelu, [[maybe_unused]] void* y, [[maybe_unused]] int threads) {
#ifdef VAR_FAST_X86
    if (isa() >= Isa::amx) {
        run({static_cast<const char*>(x), false, static_cast<const char*>(packed), bias, M, N, K, gelu, static_cast<char*>(y),
             false},
            threads);
        return;
    }
#endif
    throw std::runtime_error("linear_bf16: needs AMX");
}

int64_t feed_forward_bf16_bytes(int64_t M, int64_t hidden) {
    return parts_of(parts_of(M, TILE), 2) * parts_of(hidden, PANEL) * STEP_BYTES;
}

void feed_forward_bf16([[maybe_unused]] const void* x, [[maybe_unused]] const void* packed1,
                       [[maybe_unused]] const float* bias1, [[maybe_unused]] const void* packed2,
                       [[maybe_unused]] const float* bias2, [[maybe_unused]] int64_t M, [[maybe_unused]] int64_t C,
                       [[maybe_unused]] int64_t hidden, [[maybe_unused]] void* scratch, [[maybe_unused]] void* y,
                       [[maybe_unused]] int threads) {
#ifdef VAR_FAST_X86
    if (isa() >= Isa::amx) {
        char* const between = static_cast<char*>(scratch);
        run({static_cast<const char*>(x), false, static_cast<const char*>(packed1), bias1, M, hidden, C, true, between, true},
            threads);
        run({between, true, static_cast<const char*>(packed2), bias2, M, C, hidden, false, static_cast<char*>(y), false},
            threads);
        return;
    }
#endif
    throw std::runtime_error("feed_forward_bf16: needs AMX");
}

}  // namespace var_fast::cpu
