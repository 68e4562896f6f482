#include "sampling_loop.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>

#include "leaf.h"

namespace var_fast {
namespace {

const void* pointer(const at::Tensor& tensor) { return tensor.const_data_ptr(); }

const float* floats(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

void check_input(const char* name, const at::Tensor& tensor, at::IntArrayRef shape, at::ScalarType type,
                 const at::Device& device) {
    TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " has shape ", tensor.sizes(), ", expected ", shape);
    TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " is ", tensor.scalar_type(), ", expected ", type);
    TORCH_CHECK_VALUE(tensor.device() == device, name, " is on ", tensor.device(), ", expected ", device);
}

// The first rows x columns elements of a buffer.
at::Tensor rows_of(const at::Tensor& buffer, int64_t rows, int64_t columns) {
    return buffer.narrow(0, 0, rows * columns).view({rows, columns});
}

}  // namespace

int64_t Model::total_tokens() const {
    return std::accumulate(patch_nums.begin(), patch_nums.end(), int64_t{0},
                           [](int64_t sum, int64_t pn) { return sum + pn * pn; });
}

SamplingRun::SamplingRun(std::shared_ptr<const Model> model, int64_t batch, bool guided)
    : model_(std::move(model)), B_(batch), guided_(guided), M_(guided ? batch + 1 : batch), R_(guided ? 2 * batch : batch) {
    const Model& m = *model_;
    const auto options = at::TensorOptions().device(m.device()).dtype(at::kFloat);
    const auto half = options.dtype(scalar_type(m.type));
    const auto bytes = options.dtype(at::kByte);
    const int64_t l = *std::max_element(m.patch_nums.begin(), m.patch_nums.end());
    const int64_t tokens = l * l, D = m.C / m.H, depth = static_cast<int64_t>(m.blocks.size());
    place_.cuda = m.device().is_cuda();

    modulation_dM6C_ = at::empty({depth + 1, M_, 6 * m.C}, options);
    head_modulation_M2C_ = at::empty({M_, 2 * m.C}, options);
    x_ = at::empty({R_ * tokens * m.C}, options);
    y_ = at::empty({R_ * tokens * m.C}, half);
    attended_ = at::empty({R_ * tokens * m.C}, half);
    head_in_ = at::empty({R_ * tokens * m.C}, options);
    logits_ = at::empty({B_ * tokens * m.V}, options);
    f_hat_BChw_ = at::empty({B_, m.Cvae, m.patch_nums.back(), m.patch_nums.back()}, options);
    next_map_BlC_ = at::empty({B_ * tokens * m.Cvae}, options);
    idx_ = at::empty({B_ * tokens}, options.dtype(at::kLong));
    not_finite_SB_ = at::zeros({m.scales(), B_}, options.dtype(at::kInt));
    const Linear& fc1 = m.blocks.at(0).fc1;
    if (place_.cuda || m.type == Type::f32 || fc1.layout == Layout::tiles) {  // oneDNN's packed products return tensors of their own
        qkv_ = at::empty({R_ * tokens * 3 * m.C}, half);
        hidden_ = at::empty({feed_forward_elements(R_ * tokens, fc1)}, half);
        branch_ = at::empty({R_ * tokens * m.C}, half);
    }
    int64_t q = 0, k = 0, v = 0;
    const int64_t total = m.total_tokens();
    if (place_.cuda) {
        q = R_ * tokens * m.C * half.dtype().itemsize();
        k = v = R_ * total * m.C * half.dtype().itemsize();
    } else {
        q = cpu::q_bytes(m.type, R_, tokens, m.H, D);
        k = cpu::k_cache_bytes(m.type, R_, m.H, D, total);
        v = cpu::v_cache_bytes(m.type, R_, m.H, D, total);
    }
    q_ = at::empty({q}, bytes);
    for (int64_t block = 0; block < depth; ++block) {
        k_cache_.push_back(at::zeros({k}, bytes));
        v_cache_.push_back(at::zeros({v}, bytes));
    }
    prepare_one_launch();
}

void SamplingRun::begin(const at::Tensor& label_B, double cfg, uintptr_t stream) {
    const Model& m = *model_;
    check_input("label_B", label_B, {B_}, at::kLong, m.device());
    cfg_ = cfg;
    place_.stream = reinterpret_cast<void*>(stream);
    place_.threads = at::get_num_threads();
    scale_ = begin_ = 0;
    f_hat_BChw_.zero_();
    not_finite_SB_.zero_();
    modulations(label_B);
    const int64_t l = m.tokens(0);
    const at::Tensor x_MlC = rows_of(x_, M_ * l, m.C).view({M_, l, m.C});
    at::add_out(const_cast<at::Tensor&>(x_MlC), condition_MC_.unsqueeze(1), m.start_1lC);
}

// The class alone decides them, so once a call is enough; all unconditional rows are one.
void SamplingRun::modulations(const at::Tensor& label_B) {
    const Model& m = *model_;
    at::Tensor row_M = label_B;
    if (guided_) row_M = at::cat({label_B, at::full({1}, m.class_embedding.size(0) - 1, label_B.options())});
    condition_MC_ = m.class_embedding.index_select(0, row_M);
    at::Tensor active_MC = at::silu(condition_MC_);
    if (place_.cuda) active_MC = active_MC.to(scalar_type(m.type));  // as these weights are there
    at::Tensor shared_M6C;
    if (m.shared_modulation.weight_NK.defined()) {
        shared_M6C = at::empty({M_, 6 * m.C}, condition_MC_.options());
        linear_float32(active_MC, m.shared_modulation, shared_M6C, place_);
    }
    for (size_t block = 0; block < m.blocks.size(); ++block) {
        at::Tensor own_M6C = modulation_dM6C_[static_cast<int64_t>(block)];
        if (shared_M6C.defined())
            at::add_out(own_M6C, shared_M6C, m.blocks[block].shared_offset_6C);
        else
            linear_float32(active_MC, m.blocks[block].modulation, own_M6C, place_);
    }
    // The head's, scale and shift, follow those of the blocks, so that all rows lie equally far apart.
    linear_float32(active_MC, m.head_modulation, head_modulation_M2C_, place_);
    modulation_dM6C_[-1].narrow(1, 0, 2 * m.C).copy_(head_modulation_M2C_);
}

const float* SamplingRun::modulation(int64_t block, int64_t part) const {
    return floats(modulation_dM6C_) + (block * M_ * 6 + part) * model_->C;
}

at::Tensor SamplingRun::logits() {
    const Model& m = *model_;
    TORCH_CHECK(scale_ < m.scales(), "all ", m.scales(), " scales are sampled: call begin()");
    enum Part { gate1, gate2, scale1, scale2, shift1, shift2 };
    const int64_t l = m.tokens(scale_), C = m.C, D = C / m.H, total = m.total_tokens(), depth = m.blocks.size();
    // At the first scale all unconditional images are the same one.
    const int64_t S = scale_ == 0 ? M_ : R_, N = S * l;
    float* const x = x_.mutable_data_ptr<float>();
    const at::Tensor y_NC = rows_of(y_, N, C);
    const auto buffer = [&](const at::Tensor& whole, int64_t columns) {
        return whole.defined() ? rows_of(whole, N, columns) : at::Tensor();
    };
    const auto norm = [&](int64_t images, const at::Tensor& branch, const float* gate, const float* scale,
                          const float* shift, const at::Tensor& y) {
        const void* const data = branch.defined() ? pointer(branch) : nullptr;
        leaf_residual_adaln_modulate(place_, x, data, m.type, gate, scale, shift, 6 * C, M_, images, l, C, m.eps,
                                     y.mutable_data_ptr(), element_type(y));
    };
    at::Tensor branch_NC;
    const bool one_launch = N <= one_launch_rows_;
    if (one_launch) blocks_in_one_launch(S);  // x is then whole, with no branch still to be added
    for (int64_t d = 0; d < depth && !one_launch; ++d) {
        const BlockWeights& block = m.blocks[d];
        norm(S, branch_NC, d ? modulation(d - 1, gate2) : nullptr, modulation(d, scale1), modulation(d, shift1), y_NC);
        const at::Tensor qkv_N3C = linear(y_NC, block.qkv, false, buffer(qkv_, 3 * C), place_);
        leaf_qk_norm(place_, pointer(qkv_N3C), m.type, floats(block.scale_H), m.softmax_scale, S, R_, l, m.H, D,
                     q_.mutable_data_ptr(), k_cache_[d].mutable_data_ptr(), v_cache_[d].mutable_data_ptr(), begin_, total);
        branch_NC = linear(attend(d, S), block.proj, false, buffer(branch_, C), place_);
        norm(S, branch_NC, modulation(d, gate1), modulation(d, scale2), modulation(d, shift2), y_NC);
        branch_NC = feed_forward(y_NC, block.fc1, block.fc2, hidden_, buffer(branch_, C), place_);
    }

    const double t = m.scales() > 1 ? cfg_ * scale_ / (m.scales() - 1) : 0;
    const bool mixed = guided_ && t != 0;
    const int64_t images = mixed ? R_ : B_, rows = B_ * l;
    at::Tensor h_NC = rows_of(head_in_, images * l, C);
    norm(images, branch_NC, modulation(depth - 1, gate2), modulation(depth, 0), modulation(depth, 1), h_NC);
    // The head is linear, so guidance before it gives the guided logits, from half the rows.
    if (mixed) {
        at::Tensor guided_NC = h_NC.narrow(0, 0, rows);
        guided_NC.mul_(1 + t).sub_(h_NC.narrow(0, rows, rows), t);
        h_NC = guided_NC;
    }
    const at::Tensor logits_NV = rows_of(logits_, rows, m.V);
    // On a CPU the head stays in float32: logits rounded to bfloat16 change more tokens than the blocks' roundings do.
    linear_float32(place_.cuda ? h_NC.to(scalar_type(m.type)) : h_NC, m.head, logits_NV, place_);
    return logits_NV.view({B_, l, m.V});
}

#ifdef VAR_FAST_WITH_CUDA
void SamplingRun::prepare_one_launch() {
    const Model& m = *model_;
    if (!place_.cuda || m.type == Type::f32 || m.one_launch_rows <= 0) return;
    if (m.C != 64 * m.H || m.H > cuda::TRANSFORMER_BLOCKS_HEADS || m.hidden % 8 != 0) return;
    one_launch_rows_ = std::min(m.one_launch_rows, cuda::TRANSFORMER_BLOCKS_ROWS);
    int64_t floats_needed = 1;
    for (int64_t si = 0; si < m.scales(); ++si) {
        const int64_t S = si == 0 ? M_ : R_, l = m.tokens(si);
        if (S * l > one_launch_rows_) continue;
        const cuda::TransformerSizes sizes{0, M_, S, R_, l, m.H, m.hidden, 0, l, 0, 0};
        floats_needed = std::max(floats_needed, cuda::transformer_blocks_partial_floats(sizes));
    }
    const auto options = x_.options();
    partial_ = at::empty({floats_needed}, options);
    barrier_ = at::zeros({1}, options.dtype(at::kInt));
    // Rows as cuda::TransformerBlock has them.
    static_assert(sizeof(cuda::TransformerBlock) == 12 * sizeof(int64_t));
    const auto depth = static_cast<int64_t>(m.blocks.size());
    const at::Tensor table = at::empty({depth, 12}, at::kLong);
    const auto address = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; };
    auto* const rows = reinterpret_cast<cuda::TransformerBlock*>(table.mutable_data_ptr<int64_t>());
    for (int64_t d = 0; d < depth; ++d) {
        const BlockWeights& block = m.blocks[d];
        rows[d] = {address(block.qkv.weight_NK),
                   address(block.qkv.bias_N),
                   address(block.proj.weight_NK),
                   address(block.proj.bias_N),
                   address(block.fc1.weight_NK),
                   address(block.fc1.bias_N),
                   address(block.fc2.weight_NK),
                   address(block.fc2.bias_N),
                   floats(block.scale_H),
                   modulation(d, 0),
                   k_cache_[d].mutable_data_ptr(),
                   v_cache_[d].mutable_data_ptr()};
    }
    block_table_ = table.to(m.device());
}

void SamplingRun::blocks_in_one_launch(int64_t images) {
    VAR_FAST_RANGE("transformer_blocks");
    const Model& m = *model_;
    const cuda::TransformerSizes sizes{static_cast<int64_t>(m.blocks.size()),
                                       M_,
                                       images,
                                       R_,
                                       m.tokens(scale_),
                                       m.H,
                                       m.hidden,
                                       begin_,
                                       m.total_tokens(),
                                       m.eps,
                                       m.softmax_scale};
    const cuda::TransformerBuffers buffers{x_.mutable_data_ptr<float>(),   y_.mutable_data_ptr(),
                                           q_.mutable_data_ptr(),          attended_.mutable_data_ptr(),
                                           hidden_.mutable_data_ptr(),     partial_.mutable_data_ptr<float>(),
                                           static_cast<unsigned*>(barrier_.mutable_data_ptr())};
    cuda::transformer_blocks(static_cast<const cuda::TransformerBlock*>(pointer(block_table_)), m.type, sizes, buffers,
                             place_.stream);
}
#else
void SamplingRun::prepare_one_launch() {}
void SamplingRun::blocks_in_one_launch(int64_t) {}
#endif

at::Tensor SamplingRun::attend(int64_t block, int64_t images) {
    VAR_FAST_RANGE("scale_attention");
    const Model& m = *model_;
    const int64_t l = m.tokens(scale_), D = m.C / m.H, length = begin_ + l, total = m.total_tokens();
    if (!place_.cuda) {
        const at::Tensor attended_NC = rows_of(attended_, images * l, m.C);
        cpu::scale_attention(pointer(q_), pointer(k_cache_[block]), pointer(v_cache_[block]), m.type, images, l, m.H, D,
                             length, total, attended_NC.mutable_data_ptr(), place_.threads);
        return attended_NC;
    }
#ifdef VAR_FAST_WITH_CUDA
    // Few queries: reading K and V is all the work, and the library's kernel has too few blocks for that. The limits are
    // those of an H100.
    const bool few = l <= 16 || (l <= 100 && images * m.H * l <= 20000);
    if (few && D % 32 == 0 && D <= 128) {
        const at::Tensor attended_NC = rows_of(attended_, images * l, m.C);
        const int64_t bytes = cuda::scale_attention_scratch_bytes(images, l, m.H, D, length);
        const at::Tensor scratch = at::empty({bytes}, q_.options());
        cuda::scale_attention(pointer(q_), pointer(k_cache_[block]), pointer(v_cache_[block]), m.type, images, l, m.H, D,
                              length, total, attended_NC.mutable_data_ptr(), scratch.mutable_data_ptr(), place_.stream);
        return attended_NC;
    }
#endif
    const auto view = [&](const at::Tensor& bytes, at::IntArrayRef shape) {
        return bytes.view(scalar_type(m.type)).narrow(0, 0, c10::multiply_integers(shape)).view(shape);
    };
    const at::Tensor q = view(q_, {images, l, m.H, D}).transpose(1, 2);
    const at::Tensor k = view(k_cache_[block], {images, m.H, total, D}).narrow(2, 0, length);
    const at::Tensor v = view(v_cache_[block], {images, m.H, total, D}).narrow(2, 0, length);
    const at::Tensor o = at::scaled_dot_product_attention(q, k, v, {}, 0.0, false, 1.0);
    return o.transpose(1, 2).reshape({images * l, m.C});
}

at::Tensor SamplingRun::draw(const at::Tensor& logits_BlV, const at::Tensor& seed_B, int64_t top_k, double top_p) {
    const Model& m = *model_;
    const int64_t l = m.tokens(scale_);
    check_input("seed_B", seed_B, {B_}, at::kLong, m.device());
    check_input("logits_BlV", logits_BlV, {B_, l, m.V}, at::kFloat, m.device());
    const at::Tensor seeds = seed_B.contiguous(), logits = logits_BlV.contiguous();
    const int64_t bad = leaf_draw_tokens(place_, floats(logits), seeds.const_data_ptr<int64_t>(), scale_, B_, l, m.V,
                                         top_k, top_p, idx_.mutable_data_ptr<int64_t>(),
                                         not_finite_SB_.mutable_data_ptr<int32_t>());
    if (bad >= 0) throw NotFiniteError(scale_, bad);
    return idx_.narrow(0, 0, B_ * l).view({B_, l});
}

void SamplingRun::advance(const std::optional<at::Tensor>& idx_Bl, const std::optional<at::Tensor>& codes_BlC) {
    const Model& m = *model_;
    TORCH_CHECK(scale_ < m.scales(), "all ", m.scales(), " scales are sampled: call begin()");
    const int64_t pn = m.patch_nums[scale_], side = m.patch_nums.back();
    TORCH_CHECK_VALUE(idx_Bl.has_value() != codes_BlC.has_value(), "expected either idx_Bl or codes_BlC");
    if (idx_Bl) check_input("idx_Bl", *idx_Bl, {B_, pn * pn}, at::kLong, m.device());
    if (codes_BlC) check_input("codes_BlC", codes_BlC->to(at::kFloat), {B_, pn * pn, m.Cvae}, at::kFloat, m.device());
    const bool last = scale_ + 1 == m.scales();
    const int64_t pn_next = last ? 0 : m.patch_nums[scale_ + 1], l = pn_next * pn_next;
    const at::Tensor idx = idx_Bl ? idx_Bl->contiguous() : at::Tensor();
    const at::Tensor codes = codes_BlC ? codes_BlC->to(at::kFloat).contiguous() : at::Tensor();
    const Phi& phi = m.phi[scale_];
    leaf_pyramid_update(place_, idx.defined() ? idx.const_data_ptr<int64_t>() : nullptr, floats(codes), floats(m.codebook_VC),
                        floats(phi.weight), floats(phi.bias), phi.ratio, f_hat_BChw_.mutable_data_ptr<float>(), B_, m.Cvae,
                        side, side, pn, pn_next, next_map_BlC_.mutable_data_ptr<float>());
    begin_ += m.tokens(scale_);
    ++scale_;
    if (last) return;
    const at::Tensor x_NC = rows_of(x_, R_ * l, m.C), x_BlC = x_NC.narrow(0, 0, B_ * l);
    linear(rows_of(next_map_BlC_, B_ * l, m.Cvae), m.word_embedding, false, x_BlC, place_);
    x_BlC.view({B_, l, m.C}).add_(m.position_1LC.narrow(1, begin_, l));
    if (guided_) x_NC.narrow(0, B_ * l, B_ * l).copy_(x_BlC);
}

at::Tensor SamplingRun::sample(const at::Tensor& label_B, const at::Tensor& seed_B, double cfg, int64_t top_k,
                               double top_p, uintptr_t stream, const std::function<void()>& check) {
    begin(label_B, cfg, stream);
    while (scale_ < model_->scales()) {
        check();
        RECORD_USER_SCOPE("scale:" + std::to_string(scale_) + ":" + std::to_string(model_->patch_nums[scale_]));
        advance(draw(logits(), seed_B, top_k, top_p), {});
    }
    check();
    return image();
}

at::Tensor SamplingRun::image() {
    RECORD_USER_SCOPE("part:decoder");
    return decode(model_->decoder, f_hat_BChw_, place_);
}

}  // namespace var_fast
