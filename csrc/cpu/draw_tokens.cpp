// draw_tokens on the CPU: float32 logits that are guided already, random numbers by seed, scale and token.
#pragma GCC optimize("finite-math-only", "no-signed-zeros")  // see token_row.h

#include "../ops.h"
#include "isa.h"
#include "parallel.h"
#include "token_row.h"

namespace var_fast::cpu {

int64_t draw_tokens(const float* logits, const int64_t* seeds, int64_t scale, int64_t B, int64_t l, int64_t V,
                    int64_t top_k, double top_p, int64_t* idx, int threads) {
    const int64_t rows = B * l;
    parallel_for(rows, threads, std::max<int64_t>(16384 / V, 1), [&](int64_t begin, int64_t end) {
        TokenSampler sampler(V, top_k, top_p);
        for (int64_t row = begin; row < end; ++row)
            idx[row] = sampler(logits + row * V, seeds[row / l], scale, row % l);
    });
    const int64_t* bad = std::find(idx, idx + rows, int64_t{-1});
    return bad == idx + rows ? -1 : (bad - idx) / l;
}

std::vector<double> token_exponentials(int64_t seed, int64_t scale, int64_t token, int64_t V) {
    std::vector<int32_t> codes(V);
    std::iota(codes.begin(), codes.end(), 0);
    Race race(V);
    const double* found = race.exponentials(codes.data(), V, seed, scale, token);
    return {found, found + V};
}

}  // namespace var_fast::cpu
