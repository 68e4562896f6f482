// AMX's tile registers: 16 rows of 64 bytes each, all eight of one shape.
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

// Of this thread, from begin_tiles to end_tiles; torch's own kernels set the registers up for themselves.
VAR_FAST_AMX inline void begin_tiles() {
    static constexpr TileConfiguration CONFIGURATION;
    _tile_loadconfig(&CONFIGURATION);
}
VAR_FAST_AMX inline void end_tiles() { _tile_release(); }

// The compiler does not know that tiles are loaded from memory and stored to it.
inline __attribute__((always_inline)) void tiles_see_memory() { __asm__ volatile("" ::: "memory"); }

}  // namespace var_fast::cpu
#endif
