// sample_tokens on the CPU: guidance in double, then the row as in token_row.h.
#pragma GCC optimize("finite-math-only", "no-signed-zeros")  // see token_row.h

#include "../ops.h"
#include "isa.h"
#include "parallel.h"
#include "token_row.h"

namespace var_fast {
namespace {

template <class T>
struct Guide {
    VAR_FAST_INLINE static void run(const T* __restrict cond, const T* __restrict uncond, double guidance, int64_t V,
                                    double* __restrict guided) {
#pragma omp simd
        for (int64_t v = 0; v < V; ++v)
            guided[v] = (1 + guidance) * static_cast<double>(cond[v]) - guidance * static_cast<double>(uncond[v]);
    }
};

}  // namespace

template <typename T>
int64_t sample_tokens(const T* cond, const T* uncond, int64_t B, int64_t l, int64_t V, double guidance, int64_t top_k,
                      double top_p, const int64_t* seeds, int64_t scale, int64_t* index, int threads) {
    const int64_t rows = B * l;
    cpu::parallel_for(rows, threads, std::max<int64_t>(16384 / V, 1), [&](int64_t begin, int64_t end) {
        cpu::TokenSampler sampler(V, top_k, top_p);
        std::vector<double> guided(uncond ? V : 0);
        for (int64_t row = begin; row < end; ++row) {
            const auto draw = [&](const auto* logits) { return sampler(logits, seeds[row / l], scale, row % l); };
            if (uncond == nullptr) {
                index[row] = draw(cond + row * V);
                continue;
            }
            cpu::dispatch<Guide<T>>(cond + row * V, uncond + row * V, guidance, V, guided.data());
            index[row] = draw(guided.data());
        }
    });
    const int64_t* bad = std::find(index, index + rows, int64_t{-1});
    return bad == index + rows ? -1 : (bad - index) / l;
}

template int64_t sample_tokens<float>(const float*, const float*, int64_t, int64_t, int64_t, double, int64_t, double,
                                      const int64_t*, int64_t, int64_t*, int);
template int64_t sample_tokens<double>(const double*, const double*, int64_t, int64_t, int64_t, double, int64_t, double,
                                       const int64_t*, int64_t, int64_t*, int);

}  // namespace var_fast
