// AMX's tile registers: up to 16 rows of 64 bytes each.
#pragma once

#include <cstdint>

#include "intrinsics.h"

#ifdef VAR_FAST_X86
namespace var_fast::cpu {

struct alignas(64) TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Of this thread, from begin_tiles to end_tiles; torch's own kernels set the registers up for themselves. Those of
// multiply_tiles's a and c have `rows` rows: fewer take less time.
VAR_FAST_AMX inline void begin_tiles(int rows) {
    TileConfiguration configuration;
    for (int i = 0; i < 6; ++i) configuration.rows[i] = static_cast<uint8_t>(rows);
    __asm__ volatile("" : : "r"(&configuration) : "memory");  // the intrinsic tells of the first bytes only
    _tile_loadconfig(&configuration);
}
VAR_FAST_AMX inline void end_tiles() { _tile_release(); }

// A matrix in tiles: bytes from one row of a tile to the next, to the tile beside it, to the tiles of the next step.
struct Tiles {
    const char* data;
    int64_t row, beside, step;
};

// c (M x N tiles of float32, M and N 1 or 2) = or += a (M tiles of 16 rows by 32 bfloat16 a step) times b (N tiles of 16
// pairs of rows by 16 columns a step). c's rows are c_row bytes apart, its tiles c_column and c_group. Meanwhile LINES
// cache lines a step are fetched from `next` on.
template <int M, int N, int LINES = 0>
VAR_FAST_AMX inline __attribute__((always_inline)) void multiply_tiles(Tiles a, Tiles b, int64_t steps, bool add, char* c,
                                                                       int64_t c_row, int64_t c_column, int64_t c_group,
                                                                       const char* next = nullptr) {
    __asm__ volatile("" ::: "memory");  // the compiler does not know that tiles are loaded from memory
    if (add) {
        _tile_loadd(0, c, c_row);
        if constexpr (N > 1) _tile_loadd(1, c + c_column, c_row);
        if constexpr (M > 1) _tile_loadd(2, c + c_group, c_row);
        if constexpr (M > 1 && N > 1) _tile_loadd(3, c + c_group + c_column, c_row);
    } else {
        _tile_zero(0);
        if constexpr (N > 1) _tile_zero(1);
        if constexpr (M > 1) _tile_zero(2);
        if constexpr (M > 1 && N > 1) _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step, a.data += a.step, b.data += b.step, next += 64 * LINES) {
        _tile_loadd(6, b.data, b.row);
        _tile_loadd(4, a.data, a.row);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (N > 1) {
            _tile_loadd(7, b.data + b.beside, b.row);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (M > 1) {
            _tile_loadd(5, a.data + a.beside, a.row);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
#pragma GCC unroll 32
        for (int i = 0; i < LINES; ++i) _mm_prefetch(next + 64 * i, _MM_HINT_T1);
    }
    _tile_stored(0, c, c_row);
    if constexpr (N > 1) _tile_stored(1, c + c_column, c_row);
    if constexpr (M > 1) _tile_stored(2, c + c_group, c_row);
    if constexpr (M > 1 && N > 1) _tile_stored(3, c + c_group + c_column, c_row);
    __asm__ volatile("" ::: "memory");
}

}  // namespace var_fast::cpu
#endif
