// One row of logits to one index: top-k, top-p and the draw, by the rules of var_fast/ops/sample_tokens.py.
//
// Nothing is sorted. A threshold is found by halving the range it lies in and counting (top-k) or adding up weights
// (top-p) over the row, which is a vectorised pass over some kilobytes in the first cache. All sums are in double; all
// comparisons are of the logits themselves, so what ties stays exact.
// Include after #pragma GCC optimize("finite-math-only", "no-signed-zeros"): it lets minima become one instruction. That
// the logits are finite is checked on their bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "convert.h"
#include "intrinsics.h"
#include "isa.h"
#include "race.h"

namespace var_fast::cpu {

// The bits of floating-point numbers as integers in the same order, so that there is a middle between any two.
template <class T>
struct Order;

template <>
struct Order<float> {
    using Integer = int32_t;
    using Unsigned = uint32_t;
    static constexpr Integer INFINITE = 0x7f800000, MAGNITUDE = 0x7fffffff;
};

template <>
struct Order<double> {
    using Integer = int64_t;
    using Unsigned = uint64_t;
    static constexpr Integer INFINITE = 0x7ff0000000000000, MAGNITUDE = 0x7fffffffffffffff;
};

template <class T>
VAR_FAST_INLINE typename Order<T>::Integer order_of(T value) {
    using I = typename Order<T>::Integer;
    const I bits = bits_as<I>(value);
    return bits ^ ((bits >> (8 * sizeof(I) - 1)) & Order<T>::MAGNITUDE);
}

template <class T>
VAR_FAST_INLINE T value_of(typename Order<T>::Integer order) {
    using I = typename Order<T>::Integer;
    return bits_as<T>(order ^ ((order >> (8 * sizeof(I) - 1)) & Order<T>::MAGNITUDE));
}

// A range of numbers, halved again and again: first by value, which is quick where logits are spread evenly, then by
// their integer images, which ends after as many steps as they have bits.
template <class T>
class Halving {
public:
    using Integer = typename Order<T>::Integer;

    // From the least number to just above the largest, given as images. Above -0 is not 0, which equals it.
    Halving(Integer least, Integer largest)
        : low_(least), high_(largest + (value_of<T>(largest) == 0 && largest < 0 ? 2 : 1)) {}
    bool done() const { return high_ == low_ + 1; }
    T low() const { return value_of<T>(low_); }
    T high() const { return value_of<T>(high_); }
    T middle() {
        using U = typename Order<T>::Unsigned;
        if (steps_++ < 16) {
            const T value = low() / 2 + high() / 2;
            middle_ = order_of(value);
            if (low_ < middle_ && middle_ < high_) return value;
        }
        middle_ = low_ + static_cast<Integer>((static_cast<U>(high_) - static_cast<U>(low_)) / 2);
        return value_of<T>(middle_);
    }
    void take_upper() { low_ = middle_; }
    void take_lower() { high_ = middle_; }

private:
    Integer low_, high_, middle_ = 0;
    int steps_ = 0;
};

// exp(x) for x <= 0, to 1-2 units in the last place, denormal results included.
VAR_FAST_INLINE double exp_of(double x) {
    constexpr double ROUND = 6755399441055744.0;  // 1.5 * 2^52: a sum with it is rounded to an integer
    x = x < -746.0 ? -746.0 : x;
    const double n = (x * 1.4426950408889634 + ROUND) - ROUND;
    // ln 2 in two parts, the first with so few bits that n times it is exact
    const double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
    double p = 1.0 / 6227020800;  // the series of exp: its next term is below 2^-57 for |r| <= ln(2) / 2
    p = p * r + 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    // 2^n in two factors, since it may be too small for one
    const double half = (n * 0.5 + ROUND) - ROUND;
    const int64_t first = bits_as<int64_t>(half + ROUND), second = bits_as<int64_t>((n - half) + ROUND);
    return p * bits_as<double>((first + 1023) << 52) * bits_as<double>((second + 1023) << 52);
}

// ------------------------------------------------------------- the passes over a row, one function per instruction set
template <class T>
struct Extremes {  // of the images: least, largest, largest magnitude
    using I = typename Order<T>::Integer;
    VAR_FAST_INLINE static void run(const T* __restrict row, int64_t n, I* extremes) {
        I least = order_of(row[0]), largest = least, magnitude = 0;
#pragma omp simd reduction(min : least) reduction(max : largest, magnitude)
        for (int64_t v = 0; v < n; ++v) {
            const I order = order_of(row[v]), size = bits_as<I>(row[v]) & Order<T>::MAGNITUDE;
            least = order < least ? order : least;
            largest = order > largest ? order : largest;
            magnitude = size > magnitude ? size : magnitude;
        }
        extremes[0] = least;
        extremes[1] = largest;
        extremes[2] = magnitude;
    }
};

template <class T>
struct CountFrom {
    using I = typename Order<T>::Integer;
    VAR_FAST_INLINE static void run(const T* __restrict row, int64_t n, T limit, int64_t* result) {
        I count = 0;
#pragma omp simd reduction(+ : count)
        for (int64_t v = 0; v < n; ++v) count += row[v] >= limit ? 1 : 0;
        *result = count;
    }
};

template <class T>
struct Keep {  // those that are `lowest` or more, and where they were; `logits` and `codes` have room for 16 more
    VAR_FAST_INLINE static void run(const T* __restrict row, int64_t n, T lowest, double* __restrict logits,
                                    int32_t* __restrict codes, int64_t* kept) {
        int64_t k = 0;
        for (int64_t v = 0; v < n; ++v) {
            logits[k] = row[v];
            codes[k] = static_cast<int32_t>(v);
            k += row[v] >= lowest;
        }
        *kept = k;
    }
};

#ifdef VAR_FAST_X86
VAR_FAST_AVX512 inline int64_t keep_avx512(const float* row, int64_t n, float lowest, double* logits, int32_t* codes) {
    const __m512 limit = _mm512_set1_ps(lowest);
    __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int64_t k = 0;
    for (int64_t v = 0; v < n; v += 16, places = _mm512_add_epi32(places, _mm512_set1_epi32(16))) {
        const __mmask16 here = n - v >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - v)) - 1);
        const __m512 x = _mm512_maskz_loadu_ps(here, row + v);
        const __mmask16 taken = _mm512_mask_cmp_ps_mask(here, x, limit, _CMP_GE_OQ);
        const __m512 packed = _mm512_maskz_compress_ps(taken, x);
        _mm512_storeu_pd(logits + k, _mm512_cvtps_pd(_mm512_castps512_ps256(packed)));
        _mm512_storeu_pd(logits + k + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(packed, 1)));
        _mm512_storeu_si512(codes + k, _mm512_maskz_compress_epi32(taken, places));
        k += __builtin_popcount(taken);
    }
    return k;
}
#endif

template <class T>
int64_t keep_from(const T* row, int64_t n, T lowest, double* logits, int32_t* codes) {
#ifdef VAR_FAST_X86
    if constexpr (sizeof(T) == sizeof(float))
        if (isa() >= Isa::avx512) return keep_avx512(row, n, lowest, logits, codes);
#endif
    int64_t kept = 0;
    dispatch<Keep<T>>(row, n, lowest, logits, codes, &kept);
    return kept;
}

template <class T>
struct Widen {
    VAR_FAST_INLINE static void run(const T* __restrict row, int64_t n, double* __restrict logits) {
#pragma omp simd
        for (int64_t v = 0; v < n; ++v) logits[v] = row[v];
    }
};

struct Weights {
    VAR_FAST_INLINE static void run(const double* __restrict logits, int64_t n, double largest,
                                    double* __restrict weights, double* total) {
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; ++i) {
            weights[i] = exp_of(logits[i] - largest);
            sum += weights[i];
        }
        *total = sum;
    }
};

struct WeightBelow {  // in four parts, so that additions need not wait for each other
    VAR_FAST_INLINE static void run(const double* __restrict logits, const double* __restrict weights, int64_t n,
                                    double limit, double* result) {
        const int64_t part = n / 4;
        double a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
        for (int64_t i = 0; i < part; ++i) {
            a += logits[i] < limit ? weights[i] : 0.0;
            b += logits[i + part] < limit ? weights[i + part] : 0.0;
            c += logits[i + 2 * part] < limit ? weights[i + 2 * part] : 0.0;
            d += logits[i + 3 * part] < limit ? weights[i + 3 * part] : 0.0;
        }
        for (int64_t i = 4 * part; i < n; ++i) d += logits[i] < limit ? weights[i] : 0.0;
        *result = (a + b) + (c + d);
    }
};

constexpr int64_t BLOCK = 64;

struct CountBetween {  // low <= logit < high, in every block and together
    VAR_FAST_INLINE static void run(const double* __restrict logits, int64_t n, double low, double high,
                                    int32_t* __restrict blocks, int64_t* result) {
        int64_t total = 0;
        for (int64_t begin = 0; begin < n; begin += BLOCK) {
            const int64_t end = begin + BLOCK < n ? begin + BLOCK : n;
            int64_t count = 0;
#pragma omp simd reduction(+ : count)
            for (int64_t i = begin; i < end; ++i) count += (logits[i] >= low ? 1 : 0) - (logits[i] >= high ? 1 : 0);
            blocks[begin / BLOCK] = static_cast<int32_t>(count);
            total += count;
        }
        *result = total;
    }
};

struct DropBelow {
    VAR_FAST_INLINE static void run(const double* __restrict logits, double* __restrict weights, int64_t n,
                                    double limit) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) weights[i] = logits[i] < limit ? 0.0 : weights[i];
    }
};

// ----------------------------------------------------------------------------------------------------------- one thread
// The index that each row of logits draws, row after row.
class TokenSampler {
public:
    TokenSampler(int64_t V, int64_t top_k, double top_p)
        : V_(V), top_k_(top_k > 0 && top_k < V ? top_k : 0), top_p_(top_p > 0 && top_p < 1 ? top_p : 0),
          logits_(V + 16), weights_(V), codes_(V + 16), counts_((V + BLOCK - 1) / BLOCK), race_(V) {
        std::iota(codes_.begin(), codes_.end(), 0);
    }

    // The code that token `token` of an image of this seed draws; -1 if a logit is not finite.
    template <class T>
    int64_t operator()(const T* row, int64_t seed, int64_t scale, int64_t token) {
        using I = typename Order<T>::Integer;
        I extremes[3];
        dispatch<Extremes<T>>(row, V_, static_cast<I*>(extremes));
        if (extremes[2] >= Order<T>::INFINITE) return -1;
        const Halving<T> range(extremes[0], extremes[1]);
        largest_ = value_of<T>(extremes[1]);
        n_ = V_;
        if (top_k_ > 0)
            n_ = keep_from(row, V_, lowest_of_top_k(row, range), logits_.data(), codes_.data());
        else
            dispatch<Widen<T>>(row, V_, logits_.data());
        double total = 0;
        dispatch<Weights>(logits(), n_, largest_, weights_.data(), &total);
        if (top_p_ > 0) keep_top_p(range, (1 - top_p_) * total);
        return race_.winner(weights_.data(), codes_.data(), n_, seed, scale, token);
    }

private:
    const double* logits() const { return logits_.data(); }
    const double* weights() const { return weights_.data(); }

    // The least of the k largest, or a number between it and the next smaller one.
    template <class T>
    T lowest_of_top_k(const T* row, Halving<T> range) const {
        while (!range.done()) {
            const T middle = range.middle();
            int64_t count = 0;
            dispatch<CountFrom<T>>(row, V_, middle, &count);
            if (count == top_k_) return middle;
            if (count > top_k_)
                range.take_upper();
            else
                range.take_lower();
        }
        return range.low();
    }

    // The weights of the least likely codes become 0 as long as they sum to no more than `droppable`. Everything below
    // range.low() goes; not everything below range.high() does.
    template <class T>
    void keep_top_p(Halving<T> range, double droppable) {
        double dropped = 0;
        int64_t undecided = n_;
        for (int steps = 1; !range.done() && undecided > 24; ++steps) {
            const T middle = range.middle();
            double below = 0;
            dispatch<WeightBelow>(logits(), weights(), n_, static_cast<double>(middle), &below);
            if (below <= droppable) {
                dropped = below;
                range.take_upper();
            } else {
                range.take_lower();
            }
            if (steps >= 5 && steps % 2 == 1) undecided = count_between(range.low(), range.high());
        }
        count_between(range.low(), range.high());
        dispatch<DropBelow>(logits(), weights_.data(), n_, static_cast<double>(range.low()));
        drop_one_by_one(range.low(), range.high(), dropped, droppable);
    }

    int64_t count_between(double low, double high) {
        int64_t count = 0;
        dispatch<CountBetween>(logits(), n_, low, high, counts_.data(), &count);
        return count;
    }

    // The rest of keep_top_p for the few (or equal) logits in [low, high), which counts_ tells the blocks of.
    void drop_one_by_one(double low, double high, double dropped, double droppable) {
        undecided_.clear();
        for (int64_t begin = 0; begin < n_; begin += BLOCK) {
            if (counts_[begin / BLOCK] == 0) continue;
            int64_t places[BLOCK], found = 0;  // without a branch for each: half of them would be guessed wrong
            for (int64_t i = begin; i < std::min(begin + BLOCK, n_); ++i) {
                places[found] = i;
                found += (logits_[i] >= low) & (logits_[i] < high);
            }
            for (int64_t j = 0; j < found; ++j) undecided_.push_back({logits_[places[j]], places[j]});
        }
        std::sort(undecided_.begin(), undecided_.end());  // of equal logits the lower code is dropped first
        for (size_t j = 0; j < undecided_.size(); ++j) {
            const auto [logit, place] = undecided_[j];
            dropped += weights_[place];
            const bool best = logit == largest_ && j + 1 == undecided_.size();  // it always stays
            if (dropped > droppable || best) return;
            weights_[place] = 0;
        }
    }

    const int64_t V_, top_k_;
    const double top_p_;
    std::vector<double> logits_, weights_;  // of the n_ codes_ that top-k keeps, in the order of their index
    std::vector<int32_t> codes_, counts_;
    Race race_;
    std::vector<std::pair<double, int64_t>> undecided_;
    double largest_ = 0;
    int64_t n_ = 0;
};

}  // namespace var_fast::cpu
