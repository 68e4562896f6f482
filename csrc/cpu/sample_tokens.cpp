// sample_tokens on the CPU: one pass per row, selection instead of sorting, all sums in double.
#include <algorithm>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "../ops.h"

namespace var_fast {
namespace {

struct Candidate {
    double logit;
    double weight;  // exp(logit - largest logit)
    int64_t code;
};

// Ascending; of equal logits the lower code comes first, and so is the first that top-p drops.
bool comes_before(const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit < b.logit : a.code < b.code;
}

class RowSampler {
public:
    RowSampler(int64_t V, int64_t top_k, double top_p) : V_(V), top_k_(top_k), top_p_(top_p), logits_(V) {
        candidates_.reserve(V);
    }

    // The index drawn, or -1 if a guided logit is not finite.
    template <typename T>
    int64_t operator()(const T* cond, const T* uncond, double guidance, double u) {
        if (!guide(cond, uncond, guidance)) return -1;
        keep_top_k();
        if (top_p_ > 0 && top_p_ < 1) keep_top_p();
        return draw(u);
    }

private:
    template <typename T>
    bool guide(const T* cond, const T* uncond, double guidance) {
        double zero_if_finite = 0;  // NaN as soon as one logit is NaN or infinite
        for (int64_t v = 0; v < V_; ++v) {
            const double c = cond[v];
            logits_[v] = uncond ? (1 + guidance) * c - guidance * static_cast<double>(uncond[v]) : c;
            zero_if_finite += logits_[v] * 0;
        }
        return zero_if_finite == 0;
    }

    // Candidates: every logit that is at least the k-th largest, in index order.
    void keep_top_k() {
        double lowest_kept = -std::numeric_limits<double>::infinity();
        if (top_k_ > 0 && top_k_ < V_) {
            scratch_ = logits_;
            std::nth_element(scratch_.begin(), scratch_.begin() + (top_k_ - 1), scratch_.end(), std::greater<>());
            lowest_kept = scratch_[top_k_ - 1];
        }
        const double largest = *std::max_element(logits_.begin(), logits_.end());
        candidates_.clear();
        for (int64_t v = 0; v < V_; ++v)
            if (logits_[v] >= lowest_kept) candidates_.push_back({logits_[v], std::exp(logits_[v] - largest), v});
    }

    // Finds, by halving, the longest run of lowest candidates whose probabilities sum to at most 1 - top_p, and drops
    // it. Each step partitions what is still undecided around its middle, so the work is linear in the candidates.
    void keep_top_p() {
        double total = 0;
        for (const Candidate& c : candidates_) total += c.weight;
        const double droppable = (1 - top_p_) * total;
        auto low = candidates_.begin();        // everything before `low` is dropped
        auto high = candidates_.end() - 1;     // everything from `high` on is kept: the best one always is
        std::nth_element(low, high, candidates_.end(), comes_before);
        double dropped = 0;
        while (low < high) {
            const auto middle = low + (high - low) / 2;
            std::nth_element(low, middle, high, comes_before);
            double through_middle = dropped;
            for (auto it = low; it <= middle; ++it) through_middle += it->weight;
            if (through_middle <= droppable) {
                dropped = through_middle;
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        candidates_.erase(candidates_.begin(), low);
        std::sort(candidates_.begin(), candidates_.end(),
                  [](const Candidate& a, const Candidate& b) { return a.code < b.code; });
    }

    int64_t draw(double u) const {
        double total = 0;
        for (const Candidate& c : candidates_) total += c.weight;
        double running = 0;
        for (const Candidate& c : candidates_) {
            running += c.weight;
            if (running > u * total) return c.code;
        }
        return candidates_.back().code;  // not reached for u < 1
    }

    const int64_t V_, top_k_;
    const double top_p_;
    std::vector<double> logits_, scratch_;
    std::vector<Candidate> candidates_;
};

}  // namespace

template <typename T>
int64_t sample_tokens(const T* cond, const T* uncond, int64_t rows, int64_t V, double guidance, int64_t top_k,
                      double top_p, const double* u, int64_t* index, int threads) {
    const auto sample_rows = [&](int64_t first, int64_t last) {
        RowSampler sampler(V, top_k, top_p);
        for (int64_t row = first; row < last; ++row)
            index[row] = sampler(cond + row * V, uncond ? uncond + row * V : nullptr, guidance, u[row]);
    };
    // below some 64K logits a thread costs more than it saves
    const int64_t parts = std::clamp<int64_t>(std::min<int64_t>(threads, rows * V / 65536), 1, std::max<int64_t>(rows, 1));
    std::vector<std::thread> workers;
    for (int64_t part = 1; part < parts; ++part)
        workers.emplace_back(sample_rows, rows * part / parts, rows * (part + 1) / parts);
    sample_rows(0, rows / parts);
    for (std::thread& worker : workers) worker.join();

    const int64_t* bad = std::find(index, index + rows, int64_t{-1});
    return bad == index + rows ? -1 : bad - index;
}

template int64_t sample_tokens<float>(const float*, const float*, int64_t, int64_t, double, int64_t, double,
                                      const double*, int64_t*, int);
template int64_t sample_tokens<double>(const double*, const double*, int64_t, int64_t, double, int64_t, double,
                                       const double*, int64_t*, int);

}  // namespace var_fast
