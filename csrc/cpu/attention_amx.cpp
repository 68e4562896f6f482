// scale_attention's products of bfloat16 in AMX tiles (16 rows of 64 bytes); the softmax between them is AVX-512's.
#include "amx.h"
#include "attention_kernels.h"

#ifdef VAR_FAST_X86
#include "attention_softmax_avx512.h"

namespace var_fast::cpu {
namespace {

VAR_FAST_AMX void softmax(const Softmax& s) { softmax_of<weigh_bf16>(s); }

// M x N tiles of sums in registers 0 to 3, a's in 4 and 5, b's in 6 and 7. Strides in bytes.
template <int M, int N>
VAR_FAST_AMX inline void tiles(const char* a, int64_t a_row, const char* b, int64_t b_row, int64_t b_column, char* c,
                               int64_t c_row, int64_t depth, bool add) {
    if (add) {
        _tile_loadd(0, c, c_row);
        if constexpr (N > 1) _tile_loadd(1, c + 64, c_row);
        if constexpr (M > 1) _tile_loadd(2, c + 16 * c_row, c_row);
        if constexpr (M > 1 && N > 1) _tile_loadd(3, c + 16 * c_row + 64, c_row);
    } else {
        _tile_zero(0);
        if constexpr (N > 1) _tile_zero(1);
        if constexpr (M > 1) _tile_zero(2);
        if constexpr (M > 1 && N > 1) _tile_zero(3);
    }
    for (int64_t step = 0; step < depth; step += 32, a += 64, b += 16 * b_row) {
        _tile_loadd(6, b, b_row);
        _tile_loadd(4, a, a_row);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (N > 1) {
            _tile_loadd(7, b + b_column, b_row);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (M > 1) {
            _tile_loadd(5, a + 16 * a_row, a_row);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_row);
    if constexpr (N > 1) _tile_stored(1, c + 64, c_row);
    if constexpr (M > 1) _tile_stored(2, c + 16 * c_row, c_row);
    if constexpr (M > 1 && N > 1) _tile_stored(3, c + 16 * c_row + 64, c_row);
}

// Reads and writes whole tiles of 16 rows.
VAR_FAST_AMX __attribute__((noinline)) void product(const Product& p) {
    const int64_t a_row = 2 * p.a_row, b_row = 2 * p.b_step, b_column = 2 * p.b_column, c_row = 4 * p.c_row;
    tiles_see_memory();
    Ahead ahead(p, (p.columns + 1) / 2 * ((p.rows + 31) / 32));
    for (int64_t column = 0; column < p.columns; column += 2) {
        const char* b = static_cast<const char*>(p.b) + column * b_column;
        const bool two_columns = column + 1 < p.columns;
        for (int64_t row = 0; row < p.rows; row += 32) {
            const char* a = static_cast<const char*>(p.a) + row * a_row;
            char* c = reinterpret_cast<char*>(p.c) + row * c_row + 64 * column;
            const auto run = row + 16 < p.rows ? (two_columns ? tiles<2, 2> : tiles<2, 1>)
                                               : (two_columns ? tiles<1, 2> : tiles<1, 1>);
            ahead.step();
            run(a, a_row, b, b_row, b_column, c, c_row, p.depth, p.add);
        }
    }
    tiles_see_memory();
}

}  // namespace

AttentionKernels attention_amx() { return {product, softmax, Type::bf16, 32, 256, begin_tiles, end_tiles}; }

}  // namespace var_fast::cpu
#endif
