// parallel_for over OpenMP: torch has loaded the same library, so its threads are the ones used here.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace var_fast::cpu {

// f(begin, end) for parts of [0, n) of at least `grain`, each on a thread of its own.
template <class F>
void parallel_for(int64_t n, int threads, int64_t grain, const F& f) {
    const int64_t parts = std::clamp<int64_t>(std::min<int64_t>(threads, n / std::max<int64_t>(grain, 1)), 1, 1024);
    if (parts == 1 || omp_in_parallel()) {
        if (n > 0) f(int64_t{0}, n);
        return;
    }
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) f(n * part / parts, n * (part + 1) / parts);
}

}  // namespace var_fast::cpu
