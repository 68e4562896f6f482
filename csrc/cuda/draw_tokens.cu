// draw_tokens: top-k, top-p and the draw, one block per row, the row in shared memory, nothing sorted.
//
// Both filters ask one question: what is the smallest logit t at which the measure of all logits up to t exceeds a
// target? For top-k a logit's measure is 1, for top-p its weight. A histogram over the range of the logits finds the
// bin of t; what is in the bin is compared pair by pair, or where it is too much, gets a histogram of its own.
//
// For top-p weights are exp(logit - largest) in double, rounded to whole multiples of 2^-49. Sums of them are exact, so
// that neither the order of the atomics nor that of the threads can change what is kept.
#include "../philox.h"
#include "device.cuh"

namespace var_fast::cuda {
namespace {

constexpr const char* OP = "draw_tokens";
constexpr int THREADS = 512, WARPS = THREADS / WARP;
constexpr int BINS = 256;    // at most THREADS
constexpr int LISTED = 512;  // logits of a bin that are compared pair by pair, at most THREADS
constexpr int INDEX_BITS = 14, MOST_CODES = 1 << INDEX_BITS;
constexpr int INDEX_MASK = MOST_CODES - 1;
constexpr double WEIGHT_ONE = 562949953421312.0;  // 2^49: weight and index fit into 64 bits, all weights' sum too
constexpr int LIMBS = 3, LIMB_BITS = 17;          // a weight in a histogram: MOST_CODES limbs sum to 32 bits at most
using Measure = unsigned long long;

struct Shared {
    Measure listed_measures[LISTED];
    Measure warps[WARPS];
    Measure below;
    double results[WARPS];
    float listed[LISTED];
    float low[WARPS], high[WARPS];
    unsigned histogram[LIMBS][BINS];
    unsigned ties[WARPS];
    int codes[WARPS];
    unsigned count;
    int bin;
    float value;
    int pad;
};

struct Runner {  // of the race: the largest result wins, of equal ones the lower code
    double result;
    int code;
};

__device__ __forceinline__ Runner lanes_winner(Runner a) {
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) {
        const Runner b{__shfl_xor_sync(ALL_LANES, a.result, lane), __shfl_xor_sync(ALL_LANES, a.code, lane)};
        if (b.result > a.result || (b.result == a.result && b.code < a.code)) a = b;
    }
    return a;
}

__device__ __forceinline__ Measure weight_of(float logit, float largest) {
    const double weight = exp(static_cast<double>(logit) - static_cast<double>(largest));
    const Measure rounded = __double2ull_rn(weight * WEIGHT_ONE);
    return rounded == 0 && weight > 0 ? 1 : rounded;  // what can be drawn has a weight to be kept by
}

// A monotone map of [low, high], low < high, onto bins 0 ... BINS - 1, low and high in different ones.
struct Bins {
    float low, unit, factor;

    __device__ __forceinline__ Bins(float low_, float high) {
        // differences must neither overflow nor be lost below float32's range
        unit = high - low_ > 1e38f ? 0.25f : high - low_ < 1e-30f ? 1.2676506e30f : 1.0f;
        low = low_ * unit;
        factor = BINS / (high * unit - low);
    }
    __device__ __forceinline__ int operator()(float x) const {
        return min(static_cast<int>((x * unit - low) * factor), BINS - 1);
    }
};

struct Range {
    float low, high;
};

__device__ __forceinline__ Range lanes_range(Range range) {
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) {
        range.low = fminf(range.low, __shfl_xor_sync(ALL_LANES, range.low, lane));
        range.high = fmaxf(range.high, __shfl_xor_sync(ALL_LANES, range.high, lane));
    }
    return range;
}

// Ends with every thread knowing; starts with a barrier, as the slots may still be read.
__device__ __forceinline__ Range block_range(Range range, Shared& s) {
    const int lane = threadIdx.x % WARP;
    range = lanes_range(range);
    __syncthreads();
    if (lane == 0) {
        s.low[threadIdx.x / WARP] = range.low;
        s.high[threadIdx.x / WARP] = range.high;
    }
    __syncthreads();
    return lanes_range({s.low[lane % WARPS], s.high[lane % WARPS]});
}

__device__ __forceinline__ Measure lanes_running_sum(Measure x) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const Measure other = __shfl_up_sync(ALL_LANES, x, step);
        if (lane >= step) x += other;
    }
    return x;
}

struct Crossing {
    float value;
    Measure below;  // of all smaller logits
};

// The smallest of the n logits at which the measure of all up to it exceeds `target`; that of all n must.
// Logits outside [low, high] do not count; both bounds are among them. Called by all threads, after a barrier.
template <bool weighted, class Logit, class MeasureOf>
__device__ Crossing find_crossing(Shared& s, int n, const Logit& logit, const MeasureOf& measure, float low, float high,
                                  Measure target) {
    const int thread = threadIdx.x, lane = thread % WARP;
    Measure below = 0;  // of what is smaller than `low`
    while (low < high) {
        const Bins bins(low, high);
        if (thread < BINS)
            for (int limb = 0; limb < (weighted ? LIMBS : 1); ++limb) s.histogram[limb][thread] = 0;
        if (thread == 0) s.count = 0;
        __syncthreads();
        for (int i = thread; i < n; i += THREADS) {
            const float x = logit(i);
            if (x < low || x > high) continue;
            const int bin = bins(x);
            if constexpr (weighted) {
                const Measure m = measure(i);
                for (int limb = 0; limb < LIMBS; ++limb)
                    atomicAdd(&s.histogram[limb][bin],
                              static_cast<unsigned>(m >> limb * LIMB_BITS) & ((1u << LIMB_BITS) - 1));
            } else {
                atomicAdd(&s.histogram[0][bin], 1u);
            }
        }
        __syncthreads();
        Measure mine = 0;
        if (thread < BINS)
            for (int limb = 0; limb < (weighted ? LIMBS : 1); ++limb)
                mine += static_cast<Measure>(s.histogram[limb][thread]) << limb * LIMB_BITS;
        Measure through = lanes_running_sum(mine);
        if (lane == WARP - 1) s.warps[thread / WARP] = through;
        __syncthreads();
        through += below;
        for (int warp = 0; warp < thread / WARP && warp < BINS / WARP; ++warp) through += s.warps[warp];
        if (thread < BINS && through - mine <= target && target < through) {  // of one thread only
            s.bin = thread;
            s.below = through - mine;
        }
        __syncthreads();
        const int chosen = s.bin;
        below = s.below;
        Range range{INFINITY, -INFINITY};
        for (int i = thread; i < n; i += THREADS) {
            const float x = logit(i);
            if (x < low || x > high || bins(x) != chosen) continue;
            range = {fminf(range.low, x), fmaxf(range.high, x)};
            const unsigned at = atomicAdd(&s.count, 1u);
            if (at < LISTED) {
                s.listed[at] = x;
                if constexpr (weighted) s.listed_measures[at] = measure(i);
            }
        }
        range = block_range(range, s);
        const int listed = s.count;
        if (listed <= LISTED) {
            if (thread < listed) {
                const float x = s.listed[thread];
                Measure smaller = below, equal = 0;
                bool first = true;  // of those that tie: one thread is to write
                for (int i = 0; i < listed; ++i) {
                    const Measure m = weighted ? s.listed_measures[i] : 1;
                    if (s.listed[i] < x) smaller += m;
                    if (s.listed[i] == x) {
                        equal += m;
                        first = first && i >= thread;
                    }
                }
                if (first && smaller <= target && target < smaller + equal) {
                    s.value = x;
                    s.below = smaller;
                }
            }
            __syncthreads();
            const Crossing found{s.value, s.below};
            __syncthreads();
            return found;
        }
        low = range.low;
        high = range.high;
        __syncthreads();  // s.count has been read
    }
    return {low, below};
}

// Two blocks at a time: shared memory has no room for more where codes are many.
__global__ void __launch_bounds__(THREADS, 2)
draw_kernel(const float* __restrict__ logits, const int64_t* __restrict__ seeds, int scale, int B, int l, int V,
            int top_k, double droppable, int64_t* __restrict__ idx, int* __restrict__ bad) {
    Shared& s = *reinterpret_cast<Shared*>(dynamic_shared());
    Measure* const kept = reinterpret_cast<Measure*>(dynamic_shared() + sizeof(Shared));  // weight, index; index order
    float* const row = reinterpret_cast<float*>(kept + V);
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const int64_t at = blockIdx.x;
    const int image = static_cast<int>(at / l), token = static_cast<int>(at % l);

    Range range{INFINITY, -INFINITY};
    bool finite = true;
    const auto take = [&](int v, float x) {
        row[v] = x;
        range = {fminf(range.low, x), fmaxf(range.high, x)};
        finite = finite && fabsf(x) < INFINITY;
    };
    if (V % 4 == 0) {
        for (int v = thread * 4; v < V; v += THREADS * 4) {
            float four[4];
            load(logits + at * V + v, four);
            for (int i = 0; i < 4; ++i) take(v + i, four[i]);
        }
    } else {
        for (int v = thread; v < V; v += THREADS) take(v, logits[at * V + v]);
    }
    if (__syncthreads_or(!finite)) {
        if (thread == 0) {
            idx[at] = 0;
            bad[int64_t{scale} * B + image] = 1;
        }
        return;
    }
    range = block_range(range, s);
    const float largest = range.high;

    // top-k: the k-th largest is the (V - k + 1)-th smallest
    float lowest_kept = range.low;
    if (top_k > 0 && top_k < V)
        lowest_kept = find_crossing<false>(
                          s, V, [&](int i) { return row[i]; }, [](int) { return Measure{1}; }, range.low, range.high,
                          static_cast<Measure>(V - top_k))
                          .value;

    // the indices of those kept, in order: each warp counts in a run of its own, then writes
    const int run = (V + THREADS - 1) / THREADS * WARP, begin = warp * run, end = min(begin + run, V);
    const unsigned lanes_before = (1u << lane) - 1;
    unsigned count = 0;
    for (int v = begin + lane; v - lane < end; v += WARP)
        count += __popc(__ballot_sync(ALL_LANES, v < end && row[v] >= lowest_kept));
    if (lane == 0) s.ties[warp] = count;
    __syncthreads();
    int n = 0, to = 0;
    for (int other = 0; other < WARPS; ++other) {
        if (other == warp) to = n;
        n += s.ties[other];
    }
    for (int v = begin + lane; v - lane < end; v += WARP) {
        const bool keep = v < end && row[v] >= lowest_kept;
        const unsigned lanes = __ballot_sync(ALL_LANES, keep);
        if (keep) kept[to + __popc(lanes & lanes_before)] = v;
        to += __popc(lanes);
    }
    __syncthreads();
    // top-p: all below t go, and of those that tie at t the first ones, as far as they may
    float t = lowest_kept;
    Measure dropped_ties = 0;
    const auto logit = [&](int i) { return row[kept[i] & INDEX_MASK]; };
    if (droppable >= 0) {
        Measure total = 0;
        for (int i = thread; i < n; i += THREADS) {
            const int v = static_cast<int>(kept[i]);
            const Measure weight = weight_of(row[v], largest);
            kept[i] = weight << INDEX_BITS | v;
            total += weight;
        }
        total = block_sum(total, s.warps);
        __syncthreads();
        const double most = droppable * static_cast<double>(total);
        const Measure target = most < static_cast<double>(total - 1) ? static_cast<Measure>(most) : total - 1;
        const Crossing found = find_crossing<true>(
            s, n, logit, [&](int i) { return kept[i] >> INDEX_BITS; }, lowest_kept, largest, target);
        t = found.value;
        dropped_ties = (target - found.below) / weight_of(t, largest);
    }

    // those that tie at t are counted in index order, so each warp has a share of the codes
    const int share = (n + THREADS - 1) / THREADS * WARP, from = warp * share, until = min(from + share, n);
    Measure ties = 0;
    if (dropped_ties > 0) {
        count = 0;
        for (int i = from + lane; i - lane < until; i += WARP)
            count += __popc(__ballot_sync(ALL_LANES, i < until && logit(i) == t));
        if (lane == 0) s.ties[warp] = count;
        __syncthreads();
        for (int other = 0; other < warp; ++other) ties += s.ties[other];
    }
    Runner first{0, MOST_CODES};
    for (int i = from + lane; i - lane < until; i += WARP) {
        const float x = i < until ? logit(i) : -INFINITY;
        bool drop = x < t;
        if (dropped_ties > 0) {
            const unsigned lanes = __ballot_sync(ALL_LANES, x == t);
            drop = drop || (x == t && ties + __popc(lanes & lanes_before) < dropped_ties);
            ties += __popc(lanes);
        }
        if (drop || i >= until) continue;
        const int code = static_cast<int>(kept[i] & INDEX_MASK);
        const Philox four = philox_block(seeds[image], TOKEN_STREAM, scale, token, code / 4);
        const uint32_t* const w = four.word;  // no index that only the thread knows: the words are in registers
        const uint32_t word = code & 2 ? (code & 1 ? w[3] : w[2]) : (code & 1 ? w[1] : w[0]);
        const double result = exp(static_cast<double>(x) - static_cast<double>(largest)) / -log(uniform_of(word));
        if (result > first.result) first = {result, code};
    }
    first = lanes_winner(first);
    if (lane == 0) {
        s.results[warp] = first.result;
        s.codes[warp] = first.code;
    }
    __syncthreads();
    if (warp > 0) return;
    first = lanes_winner(lane < WARPS ? Runner{s.results[lane], s.codes[lane]} : Runner{0, MOST_CODES});
    if (lane == 0) idx[at] = first.code;
}

}  // namespace

void draw_tokens(const float* logits, const int64_t* seeds, int64_t scale, int64_t B, int64_t l, int64_t V,
                 int64_t top_k, double top_p, int64_t* idx, int32_t* bad, void* stream) {
    expect(V > 0 && V <= MOST_CODES, OP, "0 < V <= 16384");
    expect(top_k >= 0 && top_p >= 0 && top_p <= 1, OP, "top_k >= 0 and top_p in [0, 1]");
    if (B * l == 0) return;
    const int64_t shared = sizeof(Shared) + V * (sizeof(Measure) + sizeof(float));
    launch(OP, &draw_kernel, grid_of(B * l), THREADS, shared, stream, logits, seeds, scale, B, l, V,
           top_k < V ? top_k : 0, top_p > 0 && top_p < 1 ? 1 - top_p : -1.0, idx, bad);
}

}  // namespace var_fast::cuda
