// The sampling loop of VAR (figure 4 of the paper): scale by scale, all blocks with cached keys and values, guidance, the
// draw, the tokenizer's pyramid and decoder. One loop for CPU and CUDA; DESIGN.md lists what it computes once.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "decoder.h"
#include "linear.h"
#include "ops.h"

namespace var_fast {

struct BlockWeights {
    Linear modulation;  // SiLU(condition) -> 6C: gates, scales, shifts of attention and FFN; unused where it is shared
    at::Tensor shared_offset_6C;  // with one modulation for all blocks: what this one adds to it
    Linear qkv, proj, fc1, fc2;
    at::Tensor scale_H;  // of the normalised queries, float32; undefined: they are not normalised
};

struct Phi {
    at::Tensor weight, bias;  // undefined: the identity
    float ratio = 0;
};

// What does not change from call to call. Weights of half types only in `blocks` and `decoder`, and on CUDA the head.
struct Model {
    std::vector<int64_t> patch_nums;
    int64_t C = 0, H = 0, V = 0, Cvae = 0, hidden = 0;
    float eps = 1e-6f, softmax_scale = 1;
    Type type = Type::f32;  // of what enters the products
    at::Tensor class_embedding, start_1lC, position_1LC, codebook_VC;
    Linear word_embedding, shared_modulation, head_modulation, head;
    std::vector<BlockWeights> blocks;
    std::vector<Phi> phi;  // one a scale
    Decoder decoder;
    int64_t one_launch_rows = 0;  // on CUDA: scales of at most so many tokens of all images have their blocks in one launch

    int64_t scales() const { return static_cast<int64_t>(patch_nums.size()); }
    int64_t tokens(int64_t scale) const { return patch_nums[scale] * patch_nums[scale]; }
    int64_t total_tokens() const;
    at::Device device() const { return codebook_VC.device(); }
};

struct NotFiniteError : std::runtime_error {
    NotFiniteError(int64_t scale, int64_t image)
        : std::runtime_error("logits are not finite"), scale(scale), image(image) {}
    int64_t scale, image;
};

// The buffers of `batch` images in the making; with guidance the rows of the null class follow those of the labels. A run
// is used by one thread at a time. After begin(): logits(), then advance(), for scale 0, 1, ...; image() at any time after.
class SamplingRun {
public:
    SamplingRun(std::shared_ptr<const Model> model, int64_t batch, bool guided);

    // labels (B) int64, the null class included; `stream`: the CUDA stream that torch uses now.
    void begin(const at::Tensor& label_B, double cfg, uintptr_t stream);
    // CUDA: the stream of the calls to come.
    void use_stream(uintptr_t stream) { place_.stream = reinterpret_cast<void*>(stream); }
    // Guided logits (B, l, V) float32 of the next scale; the buffer is overwritten by the next call.
    at::Tensor logits();
    // Indices (B, l) int64 drawn from logits() with the random numbers of each image's seed; the buffer is overwritten by
    // the next call. Logits that are not finite: NotFiniteError on a CPU, on CUDA a flag in not_finite().
    at::Tensor draw(const at::Tensor& logits_BlV, const at::Tensor& seed_B, int64_t top_k, double top_p);
    // The scale's tokens (B, l), or their codes (B, l, Cvae) float32, enter f_hat; the next scale's input is made.
    void advance(const std::optional<at::Tensor>& idx_Bl, const std::optional<at::Tensor>& codes_BlC);
    at::Tensor f_hat() const { return f_hat_BChw_; }
    // (scales, B) int32: not 0 where logits were not finite (CUDA).
    at::Tensor not_finite() const { return not_finite_SB_; }
    // (B, 3, H, W) float32 in [0, 1] of f_hat as it stands.
    at::Tensor image();
    // All of it; `check` is called once a scale, and may throw to stop.
    at::Tensor sample(const at::Tensor& label_B, const at::Tensor& seed_B, double cfg, int64_t top_k, double top_p,
                      uintptr_t stream, const std::function<void()>& check);

private:
    void modulations(const at::Tensor& label_B);
    at::Tensor attend(int64_t block, int64_t images);  // (images * l, C) of the queries in q_
    const float* modulation(int64_t block, int64_t part) const;
    void prepare_one_launch();
    void blocks_in_one_launch(int64_t images);

    std::shared_ptr<const Model> model_;
    const int64_t B_;
    const bool guided_;
    const int64_t M_, R_;  // rows of the modulation (labels and null class), images in the blocks
    double cfg_ = 0;
    int64_t scale_ = 0, begin_ = 0;
    Place place_;
    at::Tensor condition_MC_, modulation_dM6C_, head_modulation_M2C_, x_, y_, attended_, qkv_, q_, hidden_, branch_, head_in_,
        logits_, f_hat_BChw_, next_map_BlC_, idx_, not_finite_SB_;
    std::vector<at::Tensor> k_cache_, v_cache_;
    int64_t one_launch_rows_ = 0;
    at::Tensor block_table_, partial_, barrier_;  // of cuda::transformer_blocks
};

}  // namespace var_fast
