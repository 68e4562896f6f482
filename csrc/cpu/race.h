// The draw of sample_tokens: of codes with weights w, the one of the largest w / E wins, E the exponential random numbers
// of var_fast/ops/philox.py. Include as token_row.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../philox.h"
#include "convert.h"
#include "isa.h"

namespace var_fast::cpu {

// log(x) to a relative error of 1e-15, x in [2^-60, 1].
VAR_FAST_INLINE double log_of(double x) {
    // x = 2^(e - 64) m, m in [sqrt(1/2), sqrt(2)); e is positive, so that it may be the low bits of a double
    constexpr uint64_t SQRT_HALF = 0x3fe6a09e667f3bcd, TWO_64 = uint64_t{64} << 52, TWO_52 = 0x4330000000000000;
    const uint64_t bits = bits_as<uint64_t>(x);
    const uint64_t e = (bits - SQRT_HALF + TWO_64) >> 52;
    const double m = bits_as<double>(bits + TWO_64 - (e << 52));
    const double exponent = bits_as<double>(e | TWO_52) - (4503599627370496.0 + 64.0);
    const double s = (m - 1) / (m + 1), z = s * s;  // log m = 2 atanh s = 2 s (1 + z / 3 + z^2 / 5 + ...), z < 0.03
    double p = 2.0 / 21;
    p = p * z + 2.0 / 19;
    p = p * z + 2.0 / 17;
    p = p * z + 2.0 / 15;
    p = p * z + 2.0 / 13;
    p = p * z + 2.0 / 11;
    p = p * z + 2.0 / 9;
    p = p * z + 2.0 / 7;
    p = p * z + 2.0 / 5;
    p = p * z + 2.0 / 3;
    // ln 2 in two parts, the first with so few bits that the exponent times it is exact
    return exponent * 0.693147180369123816490 + (exponent * 1.90821492927058770002e-10 + (p * z * s + 2 * s));
}

// The words of all codes, four of a counter: word i of counter b, which is code 4 b + i's, at words[i * blocks + b].
struct TokenWords {
    VAR_FAST_INLINE static void run(int64_t seed, uint32_t scale, uint32_t token, int64_t blocks,
                                    uint32_t* __restrict words) {
        for (int64_t block = 0; block < blocks; ++block) {  // omp simd would make `four` an array in memory
            const Philox four = philox_block(seed, TOKEN_STREAM, scale, token, static_cast<uint32_t>(block));
            for (int i = 0; i < 4; ++i) words[i * blocks + block] = four.word[i];
        }
    }
};

struct Exponentials {
    VAR_FAST_INLINE static void run(const uint32_t* __restrict words, int64_t blocks, const int32_t* __restrict codes,
                                    int64_t n, double* __restrict exponentials) {
        const int32_t plane = static_cast<int32_t>(blocks);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i)
            exponentials[i] = -log_of(uniform_of(words[(codes[i] & 3) * plane + (codes[i] >> 2)]));
    }
};

struct Largest {
    VAR_FAST_INLINE static void run(const double* __restrict weights, const double* __restrict exponentials, int64_t n,
                                    double* __restrict results, double* result) {
        double largest = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < n; ++i) {
            results[i] = weights[i] / exponentials[i];
            largest = results[i] > largest ? results[i] : largest;
        }
        *result = largest;
    }
};

class Race {
public:
    explicit Race(int64_t V) : blocks_((V + 3) / 4), words_(4 * blocks_), exponentials_(V), results_(V) {}

    // E of `n` codes, for one token of an image.
    const double* exponentials(const int32_t* codes, int64_t n, int64_t seed, int64_t scale, int64_t token) {
        dispatch<TokenWords>(seed, static_cast<uint32_t>(scale), static_cast<uint32_t>(token), blocks_, words_.data());
        dispatch<Exponentials>(words_.data(), blocks_, codes, n, exponentials_.data());
        return exponentials_.data();
    }

    // Of the n codes, with their weights; one of them at least is not 0.
    int32_t winner(const double* weights, const int32_t* codes, int64_t n, int64_t seed, int64_t scale, int64_t token) {
        double largest = 0;
        dispatch<Largest>(weights, exponentials(codes, n, seed, scale, token), n, results_.data(), &largest);
        return codes[std::find(results_.begin(), results_.begin() + n, largest) - results_.begin()];
    }

private:
    const int64_t blocks_;
    std::vector<uint32_t> words_;
    std::vector<double> exponentials_, results_;
};

}  // namespace var_fast::cpu
