// scale_attention's inner loops in plain C++.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention_kernels.h"

namespace var_fast::cpu {
namespace {

void product(const Product& p) {
    for (int64_t column = 0; column < p.columns; ++column) {
        const float* b = static_cast<const float*>(p.b) + column * p.b_column;
        for (int64_t row = 0; row < p.rows; ++row) {
            const float* a = static_cast<const float*>(p.a) + row * p.a_row;
            float* c = p.c + row * p.c_row + 16 * column;
            float sum[16] = {};
            if (p.add) std::memcpy(sum, c, sizeof sum);
            for (int64_t step = 0; step < p.depth; ++step)
                for (int j = 0; j < 16; ++j) sum[j] += a[step] * b[step * p.b_step + j];
            std::memcpy(c, sum, sizeof sum);
        }
    }
}

float exp2_of(float x) {  // x <= 0
    x = std::max(x, EXP2_LEAST);
    const int32_t floor = static_cast<int32_t>(x) - (static_cast<float>(static_cast<int32_t>(x)) > x);
    const float f = x - static_cast<float>(floor);
    float y = EXP2[5];
    for (int power = 4; power >= 0; --power) y = y * f + EXP2[power];
    int32_t bits;
    std::memcpy(&bits, &y, 4);
    bits += floor * (1 << 23);
    std::memcpy(&y, &bits, 4);
    return y;
}

void softmax(const Softmax& s) {
    for (int64_t row = 0; row < s.rows; ++row) {
        float* scores = s.scores + row * s.row;
        const float largest = std::max(s.largest[row], *std::max_element(scores, scores + s.keys));
        float sums[16] = {};
        int64_t key = 0;
        for (; key + 16 <= s.keys; key += 16)
            for (int j = 0; j < 16; ++j) sums[j] += scores[key + j] = exp2_of(scores[key + j] - largest);
        for (int j = 0; key < s.keys; ++key, ++j) sums[j] += scores[key] = exp2_of(scores[key] - largest);
        float sum = 0;
        for (const float part : sums) sum += part;
        s.factor[row] = s.largest[row] == largest ? 1 : exp2_of(s.largest[row] - largest);
        s.total[row] = s.total[row] * s.factor[row] + sum;
        s.largest[row] = largest;
    }
}

}  // namespace

AttentionKernels attention_portable() { return {product, softmax, Type::f32, 32, 512, nullptr, nullptr}; }

}  // namespace var_fast::cpu
