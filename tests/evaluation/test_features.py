"""Features from .npz files and folders by a network that is given, and TorchScript files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.two_ranks import on_two_ranks
from var_fast.errors import UserError
from var_fast.evaluation.features import count_pictures, load_feature_network, picture_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
PICTURES = np.random.default_rng(0).integers(0, 256, (11, 6, 5, 3), dtype=np.uint8)


def network(pictures_B3HW: torch.Tensor) -> torch.Tensor:
    assert pictures_B3HW.dtype == torch.uint8 and pictures_B3HW.is_contiguous()
    return pictures_B3HW.float().mean((2, 3)).square()


FEATURES = PICTURES.transpose(0, 3, 1, 2).astype(np.float64).mean((2, 3)) ** 2


def check(statistics) -> None:
    assert statistics.count == 11
    np.testing.assert_allclose(statistics.mean_D.numpy(), FEATURES.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.covariance_DD.numpy(), np.cov(FEATURES, rowvar=False), rtol=1e-5)


def save_folder(folder) -> None:
    for i, picture in enumerate(PICTURES):
        place = folder / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{i}.png")


def test_npz_and_folder_give_numpys_numbers(tmp_path):
    np.savez(tmp_path / "a.npz", PICTURES)
    save_folder(tmp_path / "pictures")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    told = []
    check(picture_statistics(tmp_path / "a.npz", network, batch=4, advance=told.append))
    assert told == [4, 4, 3]
    check(picture_statistics(tmp_path / "pictures", lambda x: network(x)[..., None, None], batch=3))
    assert count_pictures(tmp_path / "a.npz") == count_pictures(tmp_path / "pictures") == 11


def _on_ranks(ranks):
    import os

    place = os.environ["VAR_FAST_TEST_PLACE"]
    found = [picture_statistics(f"{place}/{name}", network, batch=2, ranks=ranks) for name in ("a.npz", "pictures")]
    one = picture_statistics(f"{place}/one.npz", network, batch=2, ranks=ranks)  # nothing for rank 0
    return [(s.count, s.mean_D, s.covariance_DD) for s in found], one.count, one.mean_D


def test_two_ranks_share_the_pictures(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", PICTURES)
    np.savez(tmp_path / "one.npz", PICTURES[:1])
    save_folder(tmp_path / "pictures")
    monkeypatch.setenv("VAR_FAST_TEST_PLACE", str(tmp_path))
    (told,) = on_two_ranks(_on_ranks)
    for found, count, mean_D in told:
        for n, mean, covariance in found:
            assert n == 11
            np.testing.assert_allclose(mean.numpy(), FEATURES.mean(0), rtol=1e-6)
            np.testing.assert_allclose(covariance.numpy(), np.cov(FEATURES, rowvar=False), rtol=1e-5)
        assert count == 1
        np.testing.assert_allclose(mean_D.numpy(), FEATURES[0], rtol=1e-6)


def test_ready_statistics_are_taken(tmp_path):
    np.savez(tmp_path / "r.npz", mu=FEATURES.mean(0), sigma=np.cov(FEATURES, rowvar=False), arr_0=PICTURES)
    found = picture_statistics(tmp_path / "r.npz", None)
    np.testing.assert_array_equal(found.mean_D.numpy(), FEATURES.mean(0))
    np.testing.assert_allclose(found.covariance_DD.numpy(), np.cov(FEATURES, rowvar=False), rtol=1e-12)
    assert count_pictures(tmp_path / "r.npz") == 0


@pytest.mark.parametrize(
    "mu, sigma, words",
    [
        (np.zeros(3), np.zeros((2, 2)), "expected \\(D,\\) and \\(D, D\\)"),
        (np.zeros(2), np.full((2, 2), np.nan), "not finite"),
        (np.zeros(2), np.array([[1.0, 2.0], [3.0, 4.0]]), "not symmetric"),
        (np.array(["a", "b"]), np.zeros((2, 2)), "cannot read mu and sigma"),
        (np.array([None, print]), np.zeros((2, 2)), "cannot read mu and sigma"),  # a pickle
    ],
)
def test_bad_statistics(tmp_path, mu, sigma, words):
    np.savez(tmp_path / "r.npz", mu=mu, sigma=sigma)
    with pytest.raises(UserError, match=words) as error:
        picture_statistics(tmp_path / "r.npz", None)
    assert "r.npz" in str(error.value)


class Plain(torch.nn.Module):
    def forward(self, x):
        return x.float().mean((2, 3)).square()


class LikeInception(torch.nn.Module):
    def forward(self, img, use_fp16: bool = False, return_features: bool = False):
        x = img.float().mean((2, 3)).square()
        return x if return_features else x[:, :1]


class Picky(torch.nn.Module):
    def forward(self, x):
        return x.float() @ torch.zeros(99, 1)


@pytest.mark.parametrize("module", [Plain, LikeInception])
def test_torchscript(tmp_path, module):
    torch.jit.script(module()).save(tmp_path / "net.pt")
    np.savez(tmp_path / "a.npz", PICTURES)
    check(picture_statistics(tmp_path / "a.npz", load_feature_network(tmp_path / "net.pt", "cpu")))


def test_bad_networks(tmp_path):
    np.savez(tmp_path / "a.npz", PICTURES)
    with pytest.raises(UserError, match="there is no file"):
        load_feature_network(tmp_path / "net.pt", "cpu")
    (tmp_path / "net.pt").write_text("nonsense")
    with pytest.raises(UserError, match="net.pt is no TorchScript file"):
        load_feature_network(tmp_path / "net.pt", "cpu")
    torch.save({"a": torch.zeros(1)}, tmp_path / "net.pt")
    with pytest.raises(UserError, match="net.pt is no TorchScript file"):
        load_feature_network(tmp_path / "net.pt", "cpu")
    torch.jit.script(Picky()).save(tmp_path / "net.pt")
    with pytest.raises(UserError, match="failed on uint8 pictures \\(11, 3, 6, 5\\): .*mat"):
        picture_statistics(tmp_path / "a.npz", load_feature_network(tmp_path / "net.pt", "cpu"))
    for bad in (lambda x: x.float().mean(), lambda x: None, lambda x: x[:2].float().flatten(1)):
        with pytest.raises(UserError, match="feature network gave .* for 11 pictures, expected a tensor \\(11, D\\)"):
            picture_statistics(tmp_path / "a.npz", bad)


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        picture_statistics(tmp_path / "none", network)
    with pytest.raises(UserError, match="holds no pictures"):
        picture_statistics(tmp_path, network)
    save_folder(tmp_path / "p")
    Image.new("RGB", (7, 6)).save(tmp_path / "p" / "other.png")
    with pytest.raises(UserError, match="other.png is 7 x 6 pixels, expected 5 x 6 pixels as .*0.png"):
        picture_statistics(tmp_path / "p", network)
    (tmp_path / "p" / "other.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot read .*other.png"):
        picture_statistics(tmp_path / "p", network)
