// scale_attention's products of bfloat16 in AMX tiles (16 rows of 64 bytes); the softmax between them is AVX-512's.
#include "amx.h"
#include "attention_kernels.h"

#ifdef VAR_FAST_X86
#include "attention_softmax_avx512.h"

namespace var_fast::cpu {
namespace {

VAR_FAST_AMX void softmax(const Softmax& s) { softmax_of<weigh_bf16>(s); }

template <int M, int N>
VAR_FAST_AMX void multiply(const Tiles& a, const Tiles& b, const Product& p, char* c) {
    multiply_tiles<M, N>(a, b, (p.depth + 31) / 32, p.add, c, 4 * p.c_row, 64, 16 * 4 * p.c_row);
}

// Reads and writes whole tiles of 16 rows.
VAR_FAST_AMX __attribute__((noinline)) void product(const Product& p) {
    const int64_t a_row = 2 * p.a_row, b_row = 2 * p.b_step, b_column = 2 * p.b_column, c_row = 4 * p.c_row;
    Ahead ahead(p, (p.columns + 1) / 2 * ((p.rows + 31) / 32));
    for (int64_t column = 0; column < p.columns; column += 2) {
        const Tiles b{static_cast<const char*>(p.b) + column * b_column, b_row, b_column, 16 * b_row};
        const bool two_columns = column + 1 < p.columns;
        for (int64_t row = 0; row < p.rows; row += 32) {
            const Tiles a{static_cast<const char*>(p.a) + row * a_row, a_row, 16 * a_row, 64};
            const auto run = row + 16 < p.rows ? (two_columns ? multiply<2, 2> : multiply<2, 1>)
                                               : (two_columns ? multiply<1, 2> : multiply<1, 1>);
            ahead.step();
            run(a, b, p, reinterpret_cast<char*>(p.c) + row * c_row + 64 * column);
        }
    }
}

}  // namespace

AttentionKernels attention_amx() { return {product, softmax, Type::bf16, 32, 256, [] { begin_tiles(16); }, end_tiles}; }

}  // namespace var_fast::cpu
#endif
