// The gradients of residual_adaln_modulate on the CPU: one pass over the rows, which stay in the first cache for four.
//
// What is summed over an image's rows is summed by CHUNK of them and then over the chunks: in an order that depends on
// the shape alone, so every run has the same bits on any number of threads.
#pragma GCC optimize("fp-contract=fast", "no-math-errno")  // nothing here has to round as a reference does, see setup.py

#include <algorithm>

#include "buffer.h"
#include "convert.h"
#include "isa.h"
#include "parallel.h"
#include "row_statistics.h"
#include "tiles.h"

namespace var_fast::cpu {
namespace {

constexpr int64_t CHUNK = 64;

template <class X, class Branch>
struct Gradients {  // nullptr: dx_out and branch, with what depends on it
    const X *dx_out, *dy, *x;
    const Branch* branch;
    const float *gate, *scale;
    int64_t L, C;
    float eps;
    X* dx;
    Branch* dbranch;
};

template <class X, class Branch>
struct BackwardRows {
    // Rows [begin, end) of one image, whose sums are added to dgate, dscale, dshift.
    VAR_FAST_INLINE static void run(const Gradients<X, Branch>* g, int64_t image, int64_t begin, int64_t end,
                                    float* dgate, float* dscale, float* dshift) {
        const int64_t C = g->C;
        const float* const gate = g->branch ? g->gate + image * C : nullptr;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t at = (image * g->L + i) * C;
            row_of(g->dx_out ? g->dx_out + at : nullptr, g->dy + at, g->x + at, g->branch ? g->branch + at : nullptr,
                   gate, g->scale + image * C, C, g->eps, g->dx + at, g->branch ? g->dbranch + at : nullptr, dgate,
                   dscale, dshift);
        }
    }

    VAR_FAST_INLINE static void row_of(const X* __restrict dx_out, const X* __restrict dy, const X* __restrict x,
                                       const Branch* __restrict branch, const float* __restrict gate,
                                       const float* __restrict scale, int64_t C, float eps, X* __restrict dx,
                                       Branch* __restrict dbranch, float* __restrict dgate, float* __restrict dscale,
                                       float* __restrict dshift) {
        const float per_C = 1 / static_cast<float>(C);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < C; ++c) sum += to_float(x[c]);
        const RowStatistics row = row_statistics(x, C, sum, eps);
        float along_1 = 0, along_x = 0;
#pragma omp simd reduction(+ : along_1, along_x)
        for (int64_t c = 0; c < C; ++c) {
            const float normed = row.normed(to_float(x[c])), d = to_float(dy[c]);
            const float dnormed = d * (1 + scale[c]);
            along_1 += dnormed;
            along_x += dnormed * normed;
            dscale[c] += d * normed;
            dshift[c] += d;
        }
        along_1 *= per_C;
        along_x *= per_C;
        if (branch == nullptr) {
#pragma omp simd
            for (int64_t c = 0; c < C; ++c) {
                const float normed = row.normed(to_float(x[c]));
                store(dx + c, row.rstd * (to_float(dy[c]) * (1 + scale[c]) - along_1 - normed * along_x));
            }
            return;
        }
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) {
            const float dnormed = to_float(dy[c]) * (1 + scale[c]);
            const float d = row.rstd * (dnormed - along_1 - row.normed(to_float(x[c])) * along_x) + to_float(dx_out[c]);
            store(dx + c, d);
            store(dbranch + c, d * gate[c]);
            dgate[c] += d * to_float(branch[c]);
        }
    }
};

template <class X, class Branch>
void backward(const Gradients<X, Branch>& g, int64_t B, float* dgate, float* dscale, float* dshift, int threads) {
    const int64_t C = g.C, chunks = parts_of(g.L, CHUNK), sums = B * chunks * C;
    const Buffer all = buffer(3 * sums);
    parallel_for(B * chunks, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            float* const to = all.get() + i * C;
            for (int which = 0; which < 3; ++which) std::fill_n(to + which * sums, C, 0.0f);
            dispatch<BackwardRows<X, Branch>>(&g, i / chunks, cut(g.L, chunks, i % chunks),
                                              cut(g.L, chunks, i % chunks + 1), to, to + sums, to + 2 * sums);
        }
    });
    for (int which = dgate ? 0 : 1; which < 3; ++which) {
        float* const out = which == 0 ? dgate : which == 1 ? dscale : dshift;
        parallel_for(B, threads, 16, [&](int64_t begin, int64_t end) {
            for (int64_t image = begin; image < end; ++image) {
                std::fill_n(out + image * C, C, 0.0f);
                for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                    const float* from = all.get() + which * sums + (image * chunks + chunk) * C;
                    for (int64_t c = 0; c < C; ++c) out[image * C + c] += from[c];
                }
            }
        });
    }
}

}  // namespace

void residual_adaln_modulate_backward(const void* dx_out, const void* dy, const void* x_out, Type type, const void* branch,
                                      Type branch_type, const float* gate, const float* scale, int64_t B, int64_t L,
                                      int64_t C, float eps, void* dx, void* dbranch, float* dgate, float* dscale,
                                      float* dshift, int threads) {
    with_element(type, [&](auto element) {
        using X = decltype(element);
        with_element(branch ? branch_type : type, [&](auto branch_element) {
            using Branch = decltype(branch_element);
            const Gradients<X, Branch> g{static_cast<const X*>(dx_out), static_cast<const X*>(dy),
                                         static_cast<const X*>(x_out),  static_cast<const Branch*>(branch),
                                         gate,                          scale,
                                         L,                             C,
                                         eps,                           static_cast<X*>(dx),
                                         static_cast<Branch*>(dbranch)};
            backward(g, B, dgate, dscale, dshift, threads);
        });
    });
}

}  // namespace var_fast::cpu
