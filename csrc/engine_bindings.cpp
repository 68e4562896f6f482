// Python bindings of the sampling loop, the only ones that know torch's tensors.
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>

#include "engine_bindings.h"
#include "sampling_loop.h"

namespace py = pybind11;

namespace var_fast {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

// The loop computes as it is written: no autograd, no autocast, no other Python thread held up.
struct Guards {
    c10::InferenceMode no_inference_mode{false};  // else buffers made in it could not be written to outside
    at::NoGradGuard no_grad;
    c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
    py::gil_scoped_release without_gil;
};

template <class F>
auto guarded(const F& f) {
    const Guards guards;
    return f();
}

Linear make_linear(const at::Tensor& weight_NK, const MaybeTensor& bias_N, Layout layout, int64_t out_features) {
    return {weight_NK, bias_N.value_or(at::Tensor()), layout, out_features};
}

}  // namespace

// Some values from the middle of each tensor on a CPU, mixed into one number.
uint64_t fingerprint(const std::vector<at::Tensor>& tensors) {
    constexpr size_t MOST = 16;
    uint64_t mixed = 0;
    for (const at::Tensor& tensor : tensors) {
        if (!tensor.is_cpu() || tensor.layout() != at::kStrided || !tensor.is_contiguous() || tensor.numel() == 0) continue;
        const auto* const bytes = static_cast<const unsigned char*>(tensor.const_data_ptr());
        const size_t size = tensor.element_size(), elements = tensor.numel();
        const size_t looks = std::min(elements, MOST), first = (elements - looks) / 2;
        for (size_t at = first; at < first + looks; ++at) {
            uint64_t value = 0;
            std::memcpy(&value, bytes + at * size, std::min(size, sizeof value));
            mixed = (mixed ^ value) * 0x9E3779B97F4A7C15u;
            mixed ^= mixed >> 29;
        }
    }
    return mixed;
}

void bind_engine(py::module_& m) {
    m.def("fingerprint", &fingerprint, py::arg("tensors"));

    py::enum_<Layout>(m, "Layout")
        .value("plain", Layout::plain)
        .value("onednn", Layout::onednn)
        .value("tiles", Layout::tiles);
    py::class_<Linear>(m, "Linear").def(py::init(&make_linear), py::arg("weight"), py::arg("bias"), py::arg("layout"),
                                        py::arg("out_features"));

    py::class_<Norm>(m, "Norm").def(py::init([](const at::Tensor& weight_C, const at::Tensor& bias_C, int64_t groups,
                                                double eps) { return Norm{weight_C, bias_C, groups, static_cast<float>(eps)}; }));
    py::class_<Conv>(m, "Conv").def(
        py::init([](const at::Tensor& weight, const at::Tensor& bias, int64_t padding, bool packed, int64_t winograd) {
            return Conv{weight, bias, padding, packed, winograd};
        }),
        py::arg("weight"), py::arg("bias"), py::arg("padding"), py::arg("packed") = false, py::arg("winograd") = 0);
    py::class_<DecoderStep> step(m, "DecoderStep");
    py::enum_<DecoderStep::Kind>(step, "Kind")
        .value("conv", DecoderStep::Kind::conv)
        .value("residual", DecoderStep::Kind::residual)
        .value("attention", DecoderStep::Kind::attention)
        .value("upsample", DecoderStep::Kind::upsample)
        .value("norm_silu", DecoderStep::Kind::norm_silu)
        .value("image", DecoderStep::Kind::image);
    step.def(py::init([](DecoderStep::Kind kind, std::vector<Norm> norms, std::vector<Conv> convs,
                         std::vector<Linear> linears) {
                 return DecoderStep{kind, std::move(norms), std::move(convs), std::move(linears)};
             }),
             py::arg("kind"), py::arg("norms"), py::arg("convs"), py::arg("linears"));

    py::class_<BlockWeights>(m, "BlockWeights")
        .def(py::init<>())
        .def_readwrite("modulation", &BlockWeights::modulation)
        .def_readwrite("qkv", &BlockWeights::qkv)
        .def_readwrite("proj", &BlockWeights::proj)
        .def_readwrite("fc1", &BlockWeights::fc1)
        .def_readwrite("fc2", &BlockWeights::fc2)
        .def_readwrite("shared_offset_6C", &BlockWeights::shared_offset_6C)
        .def_readwrite("scale_H", &BlockWeights::scale_H);

    py::class_<Model, std::shared_ptr<Model>>(m, "Model")
        .def(py::init<>())
        .def_readwrite("patch_nums", &Model::patch_nums)
        .def_readwrite("C", &Model::C)
        .def_readwrite("H", &Model::H)
        .def_readwrite("V", &Model::V)
        .def_readwrite("Cvae", &Model::Cvae)
        .def_readwrite("hidden", &Model::hidden)
        .def_readwrite("eps", &Model::eps)
        .def_readwrite("softmax_scale", &Model::softmax_scale)
        .def_property(
            "dtype", [](const Model& model) { return scalar_type(model.type); },
            [](Model& model, at::ScalarType type) {
                model.type = model.decoder.type =
                    type == at::kFloat ? Type::f32 : type == at::kBFloat16 ? Type::bf16 : Type::f16;
            })
        .def_readwrite("class_embedding", &Model::class_embedding)
        .def_readwrite("start_1lC", &Model::start_1lC)
        .def_readwrite("position_1LC", &Model::position_1LC)
        .def_readwrite("codebook_VC", &Model::codebook_VC)
        .def_readwrite("word_embedding", &Model::word_embedding)
        .def_readwrite("shared_modulation", &Model::shared_modulation)
        .def_readwrite("head_modulation", &Model::head_modulation)
        .def_readwrite("head", &Model::head)
        .def_readwrite("blocks", &Model::blocks)
        .def_readwrite("one_launch_rows", &Model::one_launch_rows)
        .def("set_phi",
             [](Model& model, const std::vector<std::tuple<MaybeTensor, MaybeTensor, double>>& scales) {
                 model.phi.clear();
                 for (const auto& [weight, bias, ratio] : scales)
                     model.phi.push_back({weight.value_or(at::Tensor()), bias.value_or(at::Tensor()), static_cast<float>(ratio)});
             })
        .def("set_decoder", [](Model& model, std::vector<DecoderStep> steps) { model.decoder.steps = std::move(steps); });

    py::class_<SamplingRun>(m, "SamplingRun")
        .def(py::init([](std::shared_ptr<Model> model, int64_t batch, bool guided) {
                 return guarded([&] { return std::make_unique<SamplingRun>(std::move(model), batch, guided); });
             }),
             py::arg("model").none(false), py::arg("batch"), py::arg("guided"))
        .def("use_stream", &SamplingRun::use_stream)
        .def("begin",
             [](SamplingRun& run, const at::Tensor& label_B, double cfg, uintptr_t stream) {
                 guarded([&] { run.begin(label_B, cfg, stream); });
             })
        .def("logits", [](SamplingRun& run) { return guarded([&] { return run.logits(); }); })
        .def("draw",
             [](SamplingRun& run, const at::Tensor& logits_BlV, const at::Tensor& seed_B, int64_t top_k, double top_p) {
                 return guarded([&] { return run.draw(logits_BlV, seed_B, top_k, top_p); });
             })
        .def("advance",
             [](SamplingRun& run, const MaybeTensor& idx_Bl, const MaybeTensor& codes_BlC) {
                 guarded([&] { run.advance(idx_Bl, codes_BlC); });
             },
             py::arg("idx_Bl"), py::arg("codes_BlC") = py::none())
        .def("sample",
             [](SamplingRun& run, const at::Tensor& label_B, const at::Tensor& seed_B, double cfg, int64_t top_k,
                double top_p, uintptr_t stream) {
                 return guarded([&] {
                     return run.sample(label_B, seed_B, cfg, top_k, top_p, stream, [] {
                         const py::gil_scoped_acquire with_gil;
                         if (PyErr_CheckSignals() != 0) throw py::error_already_set();
                     });
                 });
             })
        .def("image", [](SamplingRun& run) { return guarded([&] { return run.image(); }); })
        .def_property_readonly("f_hat", &SamplingRun::f_hat)
        .def_property_readonly("not_finite", &SamplingRun::not_finite);

    // (scale, image) as the arguments of a Python exception
    static py::exception<NotFiniteError> not_finite(m, "NotFinite", PyExc_ArithmeticError);
    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const NotFiniteError& error) {
            PyErr_SetObject(not_finite.ptr(), py::make_tuple(error.scale, error.image).ptr());
        }
    });
}

}  // namespace var_fast
