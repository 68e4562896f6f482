// 3x3 convolution in bfloat16, channels last, by Winograd's F(2x2, 3x3): 2 x 2 outputs from 4 x 4 inputs by 16 instead of
// 36 products per pair of channels (Lavin & Gray, arXiv 1509.09308), on AVX-512's bfloat16 products. Transforms are in
// float32; their results are rounded to bfloat16, products are summed in float32. The error is about 4e-3 of the result,
// where a direct product of rounded weights has 2.5e-3; larger tiles would need fewer products and have three times the
// error. As in conv3x3.cpp tiles go through all three steps in the cache, a block of them at a time.
//
// Channels are taken in groups of 32, in each the even ones before the odd ones: that is how 32-bit words of two
// bfloat16s come apart. Weights are in the same order, so the products do not know.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "../ops.h"
#include "buffer.h"
#include "convert.h"
#include "intrinsics.h"
#include "isa.h"
#include "parallel.h"
#include "tiles.h"

namespace var_fast::cpu {
namespace {

constexpr int POINTS = 16, GROUP = 32;
constexpr int COLUMNS = 32;                  // output channels at a time
constexpr int MOST_ROWS = 14;                // tiles at a time: 28 sums, 2 columns and 1 row of 32 registers
constexpr int64_t INPUT_BYTES = 320 * 1024;  // transformed inputs of a block, in the second-level cache

int64_t whole(int64_t channels) { return parts_of(channels, GROUP) * GROUP; }

// Where channel `c` lies among those of its group.
int64_t place_of(int64_t c) { return c / GROUP * GROUP + c % 2 * (GROUP / 2) + c % GROUP / 2; }

#ifdef VAR_FAST_X86
#define VAR_FAST_TARGET VAR_FAST_AVX512_BF16

// out = B^T d of one line of four
VAR_FAST_TARGET inline __attribute__((always_inline)) void input_line(const __m512* d, __m512* out, int step) {
    out[0] = _mm512_sub_ps(d[0], d[2]);
    out[step] = _mm512_add_ps(d[1], d[2]);
    out[2 * step] = _mm512_sub_ps(d[2], d[1]);
    out[3 * step] = _mm512_sub_ps(d[1], d[3]);
}

// v[4 i + j] (`stride` elements apart) = B^T d B of 4 x 4 pixels of `channels` channels, whole groups.
VAR_FAST_TARGET void input_tile(const bf16* x, int64_t row, int64_t pixel, int64_t channels, bf16* v, int64_t stride) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    for (int64_t c = 0; c < channels; c += GROUP)
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
            __m512 half[16];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                __m512 column[4];
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const __m512i two = _mm512_loadu_si512(x + i * row + j * pixel + c);
                    column[i] = _mm512_castsi512_ps(odd ? _mm512_and_si512(two, upper) : _mm512_slli_epi32(two, 16));
                }
                input_line(column, half + j, 4);
            }
            bf16* to = v + c + odd * (GROUP / 2);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                __m512 line[4];
                input_line(half + 4 * i, line, 1);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (4 * i + j) * stride),
                                        (__m256i)_mm512_cvtneps_pbh(line[j]));
            }
        }
}

// out = A^T m of one line of four
VAR_FAST_TARGET inline __attribute__((always_inline)) void output_line(const __m512* m, __m512* out, int step) {
    out[0] = _mm512_add_ps(m[0], _mm512_add_ps(m[1], m[2]));
    out[step] = _mm512_sub_ps(m[1], _mm512_add_ps(m[2], m[3]));
}

VAR_FAST_TARGET inline __attribute__((always_inline)) __m512 widen(const bf16* from) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
}

// y (2 x 2 pixels, COLUMNS channels) = A^T m A + bias + residual (nullptr: none); m[4 i + j] are `stride` floats apart.
VAR_FAST_TARGET void output_tile(const float* m, int64_t stride, const float* bias, const bf16* residual, bf16* y,
                                 int64_t row, int64_t pixel) {
#pragma GCC unroll 2
    for (int c = 0; c < COLUMNS; c += 16) {
        __m512 half[8];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            __m512 column[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) column[i] = _mm512_loadu_ps(m + (4 * i + j) * stride + c);
            output_line(column, half + j, 4);
        }
        const __m512 start = _mm512_loadu_ps(bias + c);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            __m512 line[2];
            output_line(half + 4 * i, line, 1);
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                const int64_t at = i * row + j * pixel + c;
                __m512 sum = _mm512_add_ps(line[j], start);
                if (residual) sum = _mm512_add_ps(sum, widen(residual + at));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + at), (__m256i)_mm512_cvtneps_pbh(sum));
            }
        }
    }
}

// out (ROWS, COLUMNS) = x (ROWS, K) times w (K / 2, COLUMNS, 2), K even; rows of x are `stride` elements apart.
template <int ROWS>
VAR_FAST_TARGET void multiply(const bf16* x, int64_t stride, const bf16* w, int64_t K, float* out) {
    __m512 sum[ROWS][2];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
#pragma GCC unroll 1
    for (int64_t k = 0; k < K; k += 2, w += 2 * COLUMNS) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(w), right = (__m512bh)_mm512_loadu_si512(w + COLUMNS);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; ++m) {
            int two;
            std::memcpy(&two, x + m * stride + k, sizeof two);
            __m512i both = _mm512_set1_epi32(two);
            __asm__("" : "+v"(both));  // else gcc folds the load into each product, twice as many
            sum[m][0] = _mm512_dpbf16_ps(sum[m][0], (__m512bh)both, left);
            sum[m][1] = _mm512_dpbf16_ps(sum[m][1], (__m512bh)both, right);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
        _mm512_storeu_ps(out + m * COLUMNS, sum[m][0]);
        _mm512_storeu_ps(out + m * COLUMNS + 16, sum[m][1]);
    }
}
#undef VAR_FAST_TARGET

using Multiply = void (*)(const bf16* x, int64_t stride, const bf16* w, int64_t K, float* out);

template <int... I>
Multiply multiply_rows(int64_t rows, std::integer_sequence<int, I...>) {
    static constexpr Multiply BY_ROWS[] = {multiply<I + 1>...};
    return BY_ROWS[rows - 1];
}

struct Problem {
    const bf16 *x, *packed;
    const float* bias;
    const bf16* residual;
    int64_t B, h, w, Cin, Cout;
    bf16* y;
    int64_t tiles_h() const { return parts_of(h, 2); }
    int64_t tiles_w() const { return parts_of(w, 2); }
    int64_t tiles() const { return B * tiles_h() * tiles_w(); }
    int64_t block() const {
        return std::max<int64_t>(INPUT_BYTES / (POINTS * std::max<int64_t>(whole(Cin), GROUP) * 2) / MOST_ROWS, 1) * MOST_ROWS;
    }
};

// Where tile `index` lies: image, first row and column of its outputs.
struct Place {
    int64_t image, i, j;
    Place(const Problem& p, int64_t index)
        : image(index / (p.tiles_h() * p.tiles_w())),
          i(index / p.tiles_w() % p.tiles_h() * 2),
          j(index % p.tiles_w() * 2) {}
};

// The work of one thread, with its scratch memory.
class Worker {
public:
    Worker(const Problem& p, int64_t most_tiles)
        : p_(p),
          K_(whole(p.Cin)),
          patch_(buffer(POINTS * K_ / 2)),
          inputs_(buffer(POINTS * most_tiles * K_ / 2)),
          products_(buffer(POINTS * most_tiles * COLUMNS)) {
        std::fill_n(patch_.get(), POINTS * K_ / 2, 0.0f);
    }

    // Tiles [first, last).
    void run(int64_t first, int64_t last) {
        const int64_t tiles = last - first;
        bf16* v = reinterpret_cast<bf16*>(inputs_.get());
        for (int64_t i = 0; i < tiles; ++i) transform_input(first + i, v + i * K_, tiles * K_);
        for (int64_t c0 = 0; c0 < p_.Cout; c0 += COLUMNS) {
            const int64_t count = std::min<int64_t>(COLUMNS, p_.Cout - c0), parts = parts_of(tiles, MOST_ROWS);
            const bf16* w = p_.packed + c0 * POINTS * K_;
            for (int64_t point = 0; point < POINTS; ++point, w += K_ * COLUMNS)
                for (int64_t part = 0; part < parts; ++part) {
                    const int64_t i = cut(tiles, parts, part), rows = cut(tiles, parts, part + 1) - i;
                    multiply_rows(rows, std::make_integer_sequence<int, MOST_ROWS>())(
                        v + (point * tiles + i) * K_, K_, w, K_, products_.get() + (point * tiles + i) * COLUMNS);
                }
            float bias[COLUMNS] = {};
            if (p_.bias) std::copy_n(p_.bias + c0, count, bias);
            for (int64_t i = 0; i < tiles; ++i)
                transform_output(first + i, c0, count, bias, products_.get() + i * COLUMNS, tiles * COLUMNS);
        }
    }

private:
    void transform_input(int64_t index, bf16* v, int64_t stride) {
        const Place at(p_, index);
        const bf16* image = p_.x + at.image * p_.h * p_.w * p_.Cin;
        const bool inside = at.i > 0 && at.j > 0 && at.i + 3 <= p_.h && at.j + 3 <= p_.w;
        if (inside && p_.Cin == K_) {
            input_tile(image + ((at.i - 1) * p_.w + at.j - 1) * p_.Cin, p_.w * p_.Cin, p_.Cin, K_, v, stride);
            return;
        }
        bf16* patch = reinterpret_cast<bf16*>(patch_.get());  // channels from Cin on stay zero
        for (int64_t i = 0; i < 4; ++i)
            for (int64_t j = 0; j < 4; ++j) {
                const int64_t row = at.i - 1 + i, column = at.j - 1 + j;
                bf16* to = patch + (4 * i + j) * K_;
                if (row < 0 || row >= p_.h || column < 0 || column >= p_.w)
                    std::fill_n(to, p_.Cin, bf16{0});
                else
                    std::copy_n(image + (row * p_.w + column) * p_.Cin, p_.Cin, to);
            }
        input_tile(patch, 4 * K_, K_, K_, v, stride);
    }

    void transform_output(int64_t index, int64_t c0, int64_t count, const float* bias, const float* m, int64_t stride) {
        const Place at(p_, index);
        const int64_t first = ((at.image * p_.h + at.i) * p_.w + at.j) * p_.Cout + c0;
        const bf16* residual = p_.residual ? p_.residual + first : nullptr;
        if (at.i + 2 <= p_.h && at.j + 2 <= p_.w && count == COLUMNS) {
            output_tile(m, stride, bias, residual, p_.y + first, p_.w * p_.Cout, p_.Cout);
            return;
        }
        bf16 all[4 * COLUMNS], all_residual[4 * COLUMNS] = {};
        const int64_t rows = std::min<int64_t>(2, p_.h - at.i), pixels = std::min<int64_t>(2, p_.w - at.j);
        for (int64_t i = 0; residual && i < rows; ++i)
            for (int64_t j = 0; j < pixels; ++j)
                std::copy_n(residual + (i * p_.w + j) * p_.Cout, count, all_residual + (2 * i + j) * COLUMNS);
        output_tile(m, stride, bias, residual ? all_residual : nullptr, all, 2 * COLUMNS, COLUMNS);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < pixels; ++j)
                std::copy_n(all + (2 * i + j) * COLUMNS, count, p_.y + first + (i * p_.w + j) * p_.Cout);
    }

    const Problem& p_;
    const int64_t K_;
    const Buffer patch_, inputs_, products_;
};
#endif

}  // namespace

int64_t conv3x3_bf16_packed_bytes(int64_t Cin, int64_t Cout) {
    return parts_of(Cout, COLUMNS) * COLUMNS * POINTS * whole(Cin) * static_cast<int64_t>(sizeof(bf16));
}

// (panel of COLUMNS output channels, point, pair of input channels, column, 2)
void conv3x3_bf16_pack(const float* weight, int64_t Cin, int64_t Cout, void* packed) {
    constexpr double G[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
    const int64_t K = whole(Cin), panels = parts_of(Cout, COLUMNS);
    bf16* const to = static_cast<bf16*>(packed);
    std::fill_n(to, panels * COLUMNS * POINTS * K, bf16{0});
    for (int64_t out = 0; out < Cout; ++out)
        for (int64_t in = 0; in < Cin; ++in) {
            const float* g = weight + (out * Cin + in) * 9;
            double half[4][3];
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 3; ++j) half[i][j] = G[i][0] * g[j] + G[i][1] * g[3 + j] + G[i][2] * g[6 + j];
            const int64_t k = place_of(in);
            bf16* at = to + out / COLUMNS * COLUMNS * POINTS * K + k / 2 * 2 * COLUMNS + out % COLUMNS * 2 + k % 2;
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 4; ++j)
                    store(at + (4 * i + j) * K * COLUMNS,
                          static_cast<float>(half[i][0] * G[j][0] + half[i][1] * G[j][1] + half[i][2] * G[j][2]));
        }
}

void conv3x3_bf16([[maybe_unused]] const void* x, [[maybe_unused]] const void* packed,
                  [[maybe_unused]] const float* bias, [[maybe_unused]] const void* residual,
                  [[maybe_unused]] int64_t B, [[maybe_unused]] int64_t h, [[maybe_unused]] int64_t w,
                  [[maybe_unused]] int64_t Cin, [[maybe_unused]] int64_t Cout, [[maybe_unused]] void* y,
                  [[maybe_unused]] int threads) {
#ifdef VAR_FAST_X86
    if (isa() >= Isa::avx512_bf16) {
        const Problem p{static_cast<const bf16*>(x), static_cast<const bf16*>(packed), bias,
                        static_cast<const bf16*>(residual), B, h, w, Cin, Cout, static_cast<bf16*>(y)};
        const int64_t tiles = p.tiles();
        const int64_t blocks = std::min(parts_of(parts_of(tiles, p.block()), threads) * threads, tiles);
        parallel_for(blocks, threads, 1, [&](int64_t begin, int64_t end) {
            Worker worker(p, parts_of(tiles, blocks));
            for (int64_t i = begin; i < end; ++i) worker.run(cut(tiles, blocks, i), cut(tiles, blocks, i + 1));
        });
        return;
    }
#endif
    throw std::runtime_error("conv3x3_bf16: needs AVX-512's bfloat16 instructions");
}

}  // namespace var_fast::cpu
