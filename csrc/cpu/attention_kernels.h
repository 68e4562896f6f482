// The inner loops of scale_attention, one set per instruction set.
#pragma once

#include <cstdint>

#include "../ops.h"
#include "isa.h"

namespace var_fast::cpu {

// c (rows, 16 columns) = a (rows, depth) b, or c += where `add`. Strides in elements.
// float32: b has, for each step of depth and each column block, 16 numbers; bfloat16: 16 pairs for two steps.
struct Product {
    const void* a;
    int64_t a_row;
    const void* b;
    int64_t b_step;    // from one step (pair of steps) to the next
    int64_t b_column;  // from one block of 16 columns to the next
    float* c;
    int64_t c_row;
    int64_t rows, depth, columns;
    bool add;
    const char* ahead;  // what the next products will read, or nullptr: brought into the second-level cache meanwhile
    int64_t ahead_bytes;
};

// Spreads the prefetch of p.ahead over the steps of a product.
class Ahead {
public:
    Ahead(const Product& p, int64_t steps)
        : at_(p.ahead), left_(p.ahead_bytes), step_((p.ahead_bytes / steps + 63) / 64 * 64) {}
    void step() {
        const int64_t bytes = left_ < step_ ? left_ : step_;
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at_ + i, 0, 2);
        at_ += bytes, left_ -= bytes;
    }

private:
    const char* at_;
    int64_t left_, step_;
};

// What a block of keys does to the running softmax of `rows` queries. scores (rows, row) in powers of two, of which
// `keys` count, become weights 2^(score - largest) in place (bfloat16: in the first half of the row, followed by zeros
// up to a multiple of 32 keys). largest and total (rows) are those of all blocks so far, -infinity and 0 before the
// first one; what was summed up to now has to be multiplied by factor (rows). Room for a multiple of 16 rows.
struct Softmax {
    float* scores;
    int64_t row;
    int64_t rows, keys;
    float *largest, *total, *factor;
};

struct AttentionKernels {
    void (*product)(const Product&);
    void (*softmax)(const Softmax&);
    Type operand;          // what a and b, and the weights, are made of
    int64_t query_block;   // rows and keys (a multiple of 32) that the driver hands over at once, at most
    int64_t key_block;
    void (*begin)();       // called on each thread before and after the products of one call, or nullptr
    void (*end)();
};

AttentionKernels attention_portable();
#ifdef VAR_FAST_X86
AttentionKernels attention_avx2();
AttentionKernels attention_avx512();
AttentionKernels attention_avx512_bf16();
AttentionKernels attention_amx();
#endif

// 2^x = 2^floor(x) p(x - floor(x)); p's relative error is 1.1e-7 in EXP2 (float32 weights), 1e-4 in EXP2_SHORT, far
// below the 2e-3 to which a bfloat16 weight is rounded. Lowest power first.
constexpr float EXP2[] = {0.99999994f, 0.69315308f, 0.24015361f, 0.055826318f, 0.0089893397f, 0.0018775767f};
constexpr float EXP2_SHORT[] = {0.9999252f, 0.69583356f, 0.22606716f, 0.078024521f};
constexpr float EXP2_LEAST = -125;  // weights below 2^-125 count as that: denormal ones would be slow

}  // namespace var_fast::cpu
