"""LPIPS against a formulation of its own, on random weights; its files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from var_fast.errors import UserError
from var_fast.training.lpips import load_lpips

CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # torchvision's numbers, by stage
WIDTHS = (64, 128, 256, 512, 512)


@pytest.fixture(scope="module")
def states():
    """State dicts as the two published files have them, with random weights."""
    draw = torch.Generator().manual_seed(0)
    vgg, linear, width = {"classifier.0.weight": torch.zeros(1)}, {}, 3
    for stage, numbers in enumerate(CONVOLUTIONS):
        for number in numbers:
            shape = (WIDTHS[stage], width, 3, 3)
            vgg[f"features.{number}.weight"] = torch.randn(shape, generator=draw) * (2 / (9 * width)) ** 0.5
            vgg[f"features.{number}.bias"] = torch.randn(WIDTHS[stage], generator=draw) * 0.1
            width = WIDTHS[stage]
        linear[f"lin{stage}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=draw)
    return vgg, linear


@pytest.fixture(scope="module")
def files(tmp_path_factory, states):
    folder = tmp_path_factory.mktemp("weights")
    for name, state in zip(("vgg.pth", "lpips.pth"), states, strict=True):
        torch.save(state, folder / name)
    return str(folder / "lpips.pth"), str(folder / "vgg.pth")


def by_hand(a, b, vgg, linear):
    """Straight from the paper's eq. 1, in float64, one picture and one pixel's unit vector after another."""
    mean, deviation = (torch.tensor(v, dtype=torch.float64) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    def stages(picture):
        # The published shift and scale are ImageNet's, for values in [-1, 1], rounded to three digits.
        shift, scale = ((2 * mean - 1) * 1000).round() / 1000, ((2 * deviation) * 1000).round() / 1000
        x = (picture.double() - shift.view(3, 1, 1)) / scale.view(3, 1, 1)
        for stage, numbers in enumerate(CONVOLUTIONS):
            if stage:
                x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
                x = torch.stack([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)
            for number in numbers:
                weight, bias = (vgg[f"features.{number}.{kind}"].double() for kind in ("weight", "bias"))
                columns = F.unfold(x[None], 3, padding=1)[0]
                x = (weight.flatten(1) @ columns + bias[:, None]).clamp(min=0).view(-1, *x.shape[1:])
            yield x

    total = 0.0
    for stage, (f, g) in enumerate(zip(stages(a), stages(b), strict=True)):
        f, g = (x / (x.square().sum(0).sqrt() + 1e-10) for x in (f, g))
        weight = linear[f"lin{stage}.model.1.weight"].double().flatten()
        total += float(torch.einsum("c,chw->hw", weight, (f - g).square()).mean())
    return total


@pytest.mark.parametrize("height,width", [(16, 16), (33, 24)])
def test_lpips_is_the_published_distance(files, states, height, width):
    torch.manual_seed(1)
    a, b = torch.rand(2, 2, 3, height, width) * 2 - 1
    found = load_lpips(*files)(a, b)
    expected = torch.tensor([by_hand(x, y, *states) for x, y in zip(a, b, strict=True)])
    assert found.shape == (2,)
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=0)


def test_lpips_of_equal_pictures_is_zero_and_its_gradient_finite(files):
    """A black picture can have pixels without any feature, where a square root has no derivative."""
    lpips = load_lpips(*files)
    with torch.no_grad():
        for bias in (p for n, p in lpips.features.named_parameters() if n.endswith("bias")):
            bias.fill_(-1e3)
    a = torch.rand(1, 3, 16, 16, requires_grad=True)
    distance = lpips(a, a.detach())
    distance.sum().backward()
    assert float(distance.detach()) == 0.0 and torch.isfinite(a.grad).all()
    assert not any(p.requires_grad for p in lpips.parameters())


def test_linear_layers_may_have_the_short_names(tmp_path, files, states):
    torch.save({name.replace(".model.1", ""): t for name, t in states[1].items()}, tmp_path / "short.pth")
    a, b = torch.rand(2, 1, 3, 16, 16)
    assert torch.equal(load_lpips(str(tmp_path / "short.pth"), files[1])(a, b), load_lpips(*files)(a, b))


def test_missing_or_other_files_are_named(tmp_path, files, states):
    lpips, vgg = files
    with pytest.raises(UserError, match="--lpips-weights.*--vgg-weights"):
        load_lpips("", vgg)
    with pytest.raises(UserError, match="--lpips-weights.*--vgg-weights"):
        load_lpips(lpips, "")
    with pytest.raises(UserError, match="vgg_weights: /nowhere/vgg.pth does not exist"):
        load_lpips(lpips, "/nowhere/vgg.pth")
    with pytest.raises(UserError, match="lpips_weights: .*vgg.pth has no such entry"):
        load_lpips(vgg, vgg)
    with pytest.raises(UserError, match="vgg_weights: .*lpips.pth has no such entry for '0.weight'"):
        load_lpips(lpips, lpips)
    torch.save({**states[0], "features.5.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"has shape \(2, 2\) for '5.weight', expected shape \(128, 64, 3, 3\)"):
        load_lpips(lpips, str(tmp_path / "other.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match="vgg_weights: cannot read"):
        load_lpips(lpips, str(tmp_path / "text.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        load_lpips(lpips, str(tmp_path / "list.pth"))
