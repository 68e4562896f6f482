// residual_adaln_modulate on the CPU: each row is read from memory once, and stays in the first cache for three passes.
#pragma GCC optimize("fp-contract=fast", "no-math-errno")  // nothing here has to round as a reference does, see setup.py

#include "convert.h"
#include "isa.h"
#include "parallel.h"
#include "row_statistics.h"

namespace var_fast::cpu {
namespace {

struct Modulation {  // per image, rows `stride` floats apart, the last of M for all images after it
    const float *gate, *scale, *shift;
    int64_t stride, M;
};

template <class X, class Branch, class Y>
struct Rows {
    // rows [begin, end) of all R * L; x_out may be x
    VAR_FAST_INLINE static void run(const X* x, const Branch* branch, const Modulation* per_image, int64_t L, int64_t C,
                                    float eps, X* x_out, Y* y, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t offset = std::min(row / L, per_image->M - 1) * per_image->stride;
            row_of(x + row * C, branch ? branch + row * C : nullptr, per_image->gate + offset,
                   per_image->scale + offset, per_image->shift + offset, C, eps,
                   x_out ? x_out + row * C : nullptr, y + row * C);
        }
    }

    VAR_FAST_INLINE static void row_of(const X* x, const Branch* __restrict branch, const float* __restrict gate,
                                       const float* __restrict scale, const float* __restrict shift, int64_t C,
                                       float eps, X* x_out, Y* __restrict y) {
        float sum = 0;
        if (branch != nullptr) {
#pragma omp simd reduction(+ : sum)
            for (int64_t c = 0; c < C; ++c) {
                store(x_out + c, to_float(x[c]) + gate[c] * to_float(branch[c]));
                sum += to_float(x_out[c]);
            }
            x = x_out;
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t c = 0; c < C; ++c) sum += to_float(x[c]);
        }
        const RowStatistics row = row_statistics(x, C, sum, eps);
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) store(y + c, row.normed(to_float(x[c])) * (1 + scale[c]) + shift[c]);
    }
};

template <class X, class Branch, class Y>
void run_rows(const X* x, const void* branch, const Modulation& per_image, int64_t R, int64_t L, int64_t C, float eps,
              X* x_out, void* y, int threads) {
    parallel_for(R * L, threads, std::max<int64_t>(16384 / C, 1), [&](int64_t begin, int64_t end) {
        dispatch<Rows<X, Branch, Y>>(x, static_cast<const Branch*>(branch), &per_image, L, C, eps, x_out,
                                     static_cast<Y*>(y), begin, end);
    });
}

}  // namespace

void residual_adaln_modulate(float* x, const void* branch, Type branch_type, const float* gate, const float* scale,
                             const float* shift, int64_t stride, int64_t M, int64_t R, int64_t L, int64_t C, float eps,
                             void* y, Type y_type, int threads) {
    if (R * L * C == 0) return;
    const Modulation per_image{branch ? gate : scale, scale, shift, stride, M};
    with_element(branch ? branch_type : Type::f32, [&](auto branch_element) {
        with_element(y_type, [&](auto y_element) {
            run_rows<float, decltype(branch_element), decltype(y_element)>(x, branch, per_image, R, L, C, eps, x, y,
                                                                          threads);
        });
    });
}

void residual_adaln_modulate_forward(const void* x, Type type, const void* branch, Type branch_type, const float* gate,
                                     const float* scale, const float* shift, int64_t B, int64_t L, int64_t C, float eps,
                                     void* x_out, void* y, int threads) {
    if (B * L * C == 0) return;
    const Modulation per_image{branch ? gate : scale, scale, shift, C, B};
    with_element(type, [&](auto element) {
        using X = decltype(element);
        with_element(branch ? branch_type : type, [&](auto branch_element) {
            run_rows<X, decltype(branch_element), X>(static_cast<const X*>(x), branch, per_image, B, L, C, eps,
                                                     static_cast<X*>(x_out), y, threads);
        });
    });
}

}  // namespace var_fast::cpu
