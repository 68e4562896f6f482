"""The published code's numbers (tests/golden, made on a CPU in float32) on the CUDA device.

float32 must agree as the CPU does (1e-4, all tokens equal). No golden values under autocast exist: there the bounds are
about twice the error that autocast costs these small models on a CPU.
"""

from __future__ import annotations

import pytest
import torch

from tests.models import test_golden as on_cpu
from tests.models.golden_util import CASES, load_case
from tests.models.test_golden import relative_error, tokens

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# relative error of latents and images, and of logits
BOUNDS = {torch.float32: (1e-4, 1e-4), torch.float16: (7e-3, 1.5e-3), torch.bfloat16: (5.5e-2, 1.2e-2)}


@pytest.fixture(params=CASES)
def case(request):
    case = load_case(request.param)
    case.vae.to(DEVICE).eval()
    case.var.to(DEVICE)
    case.arrays = {name: array.to(DEVICE) for name, array in case.arrays.items()}
    return case


@pytest.fixture(params=BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def bounds(request):
    """BOUNDS of a dtype, inside its autocast (float32: none, and no TensorFloat-32 in convolutions either)."""
    half = request.param != torch.float32
    with (
        torch.no_grad(),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        torch.autocast(DEVICE, dtype=request.param if half else None, enabled=half),
    ):
        yield BOUNDS[request.param]


def test_encoder(case, bounds):
    assert relative_error(case.vae.encode(case.arrays["image_B3HW"]), case.arrays["latent_BChw"]) < bounds[0]


def test_decoder(case, bounds):
    out = case.vae.idxBl_to_img(tokens(case), same_shape=True, last_one=True)
    assert relative_error(out, case.arrays["recon_from_idx_B3HW"]) < bounds[0]


def test_logits(case, bounds):
    out = case.var(case.arrays["label_B"], case.arrays["var_input_BLC"])
    assert relative_error(out, case.arrays["logits_BLV"]) < bounds[1]


@pytest.mark.parametrize("bounds", [torch.float32], indirect=True, ids=["float32"])
def test_tokens(case, bounds):
    ours = case.vae.img_to_idxBl(case.arrays["image_B3HW"])
    for idx_Bl, golden_Bl in zip(ours, tokens(case), strict=True):
        assert torch.equal(idx_Bl, golden_Bl)


@pytest.mark.parametrize("bounds", [torch.float32], indirect=True, ids=["float32"])
@pytest.mark.parametrize("cfg", [0.0, 1.5, 4.0])
def test_greedy_images(case, bounds, cfg):
    out = case.var.autoregressive_infer_cfg(2, case.arrays["label_B"], g_seed=7, cfg=cfg, top_k=1)
    assert relative_error(out, case.arrays[f"infer_topk1_cfg{cfg}_B3HW"]) < bounds[0]


@pytest.mark.parametrize(
    "body",
    [
        on_cpu.test_f_hat,
        on_cpu.test_reconstruction_of_image,
        on_cpu.test_teacher_forcing_input,
        on_cpu.test_loss_and_gradients,
        on_cpu.test_greedy_image_of_the_null_class,
    ],
    ids=lambda body: body.__name__.removeprefix("test_"),
)
def test_as_on_the_cpu(case, body):
    """The float32 tests of tests/models/test_golden.py, their tolerances included, on the device's case."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        body(case)


def test_tokenizer_training_step(case):
    # it builds a tokenizer of its own, which this makes on the device
    with torch.device(DEVICE), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        on_cpu.test_tokenizer_training_step(case)
