"""var_fast.images, by numbers."""

from __future__ import annotations

import math
import os
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from var_fast.errors import UserError
from var_fast.images import check_writable, load_image, make_grid, make_strip, psnr, save_png, squarest, whole_file


def numbered(count: int, height: int = 2, width: int = 3) -> torch.Tensor:
    """(count, 3, height, width): image i is filled with (i + 1) / 100."""
    return ((torch.arange(count) + 1) / 100).view(count, 1, 1, 1).expand(count, 3, height, width)


def levels(path) -> torch.Tensor:
    """(H, W, 3) of the 8-bit values in a file."""
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        return torch.tensor(list(picture.tobytes())).view(picture.height, picture.width, 3)


# --- grids and strips


def test_grid_places_every_pixel():
    images = torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    grid = make_grid(images, columns=2, padding=1, background=0.5)
    assert grid.shape == (3, 2 * 5 + 1, 2 * 6 + 1)
    assert torch.equal(grid[:, 1:5, 1:6], images[0])
    assert torch.equal(grid[:, 1:5, 7:12], images[1])
    assert torch.equal(grid[:, 6:10, 1:6], images[2])
    assert (grid[:, 6:10, 7:12] == 0.5).all(), "the empty cell is background"
    assert (grid[:, [0, 5, 10]] == 0.5).all() and (grid[:, :, [0, 6, 12]] == 0.5).all(), "the gaps are background"


def test_grid_nearest_repeats_pixels():
    images = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    grid = make_grid(images, upscale=3, padding=0, mode="nearest")
    assert torch.equal(grid, images[0].repeat_interleave(3, 1).repeat_interleave(3, 2))


def test_grid_bicubic_stays_in_range_and_keeps_constants():
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1.0
    grid = make_grid(edge, upscale=4, padding=0)
    assert grid.min() == 0.0 and grid.max() == 1.0, "bicubic overshoot is clamped"
    torch.testing.assert_close(make_grid(numbered(1), upscale=4, padding=0), numbered(1, 8, 12)[0], atol=1e-6, rtol=0)


def test_grid_columns_default_and_limit():
    assert make_grid(numbered(16), padding=0).shape == (3, 8, 12)
    assert make_grid(numbered(2), columns=10, padding=0).shape == (3, 2, 6), "never more columns than images"


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 10**6))
def test_squarest_is_the_smallest_that_fits(count):
    columns = squarest(count)
    assert columns * columns >= count > (columns - 1) ** 2


@pytest.mark.parametrize("options", [{"columns": 0}, {"upscale": 0}, {"padding": -1}])
def test_grid_rejects(options):
    with pytest.raises(ValueError, match="make_grid"):
        make_grid(numbered(2), **options)


@pytest.mark.parametrize("shape", [(3, 4, 4), (0, 3, 4, 4), (2, 1, 4, 4)])
def test_grid_rejects_shapes(shape):
    with pytest.raises(ValueError, match="expected"):
        make_grid(torch.zeros(shape))


def test_strip_has_rows_of_images_and_columns_of_steps():
    images = numbered(6, 1, 1)
    strip = make_strip([images[0:2], images[2:4], images[4:6]], padding=0)
    assert torch.equal(strip[0], torch.tensor([[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]) / 100)


# --- PSNR


def test_psnr_by_numbers():
    a, b = torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.1)
    assert psnr(a, b) == pytest.approx(20.0, abs=1e-5)  # mse 0.01
    assert psnr(2 * a, 2 * b, peak=2.0) == pytest.approx(20.0, abs=1e-5)
    assert psnr(a, a) == math.inf
    with pytest.raises(ValueError, match="differ"):
        psnr(a, b[:, :2])


# --- PNG files


def test_save_png_rounds_and_keeps_text(tmp_path):
    path = tmp_path / "a.png"
    image = torch.arange(256).view(1, 16, 16).expand(3, 16, 16) / 255
    save_png(image + 0.4 / 255, path, {"label": "3", "class": "déjà 字"})
    assert torch.equal(levels(path)[..., 1].flatten(), torch.arange(256)), "rounded to the nearest level"
    with Image.open(path) as picture:
        assert picture.text == {"label": "3", "class": "déjà 字"}
    assert os.listdir(tmp_path) == ["a.png"]


def test_save_png_clamps_and_takes_any_layout(tmp_path):
    image = torch.tensor([[-1.0, 0.0], [1.0, 2.0], [0.5, 0.25]]).t().reshape(2, 3, 1).permute(1, 0, 2)
    save_png(image.bfloat16(), tmp_path / "a.png")
    assert levels(tmp_path / "a.png").tolist() == [[[0, 255, 128]], [[0, 255, 64]]]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_save_then_load_is_exact(tmp_path_factory, height, width, seed):
    path = tmp_path_factory.mktemp("png") / "a.png"
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed))
    save_png(image / 255, path)
    torch.testing.assert_close(load_image(path), image / 127.5 - 1.0, atol=1e-6, rtol=0)


def test_save_png_follows_umask_and_links(tmp_path):
    real, link = tmp_path / "real.png", tmp_path / "link.png"
    link.symlink_to(real)
    before = os.umask(0o022)
    try:
        save_png(torch.zeros(3, 1, 1), link)
    finally:
        os.umask(before)
    assert link.is_symlink() and stat.S_IMODE(real.stat().st_mode) == 0o644


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_save_png_rejects_non_finite(tmp_path, value):
    with pytest.raises(ValueError, match="finite"):
        save_png(torch.full((3, 1, 1), value), tmp_path / "a.png")
    with pytest.raises(ValueError, match="shape"):
        save_png(torch.zeros(1, 3, 1, 1), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


# --- whole files only


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_write_keeps_the_older_file(tmp_path, error):
    path = tmp_path / "a.png"
    path.write_bytes(b"older")
    with pytest.raises(error), whole_file(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(b"half")
        raise error
    assert path.read_bytes() == b"older" and os.listdir(tmp_path) == ["a.png"]


def test_failing_write_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot write .*No space left"), whole_file(tmp_path / "a.png"):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_writable_makes_nothing(tmp_path):
    check_writable(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"older")
    check_writable(tmp_path / "b.png")
    assert os.listdir(tmp_path) == ["b.png"] and (tmp_path / "b.png").read_bytes() == b"older"


def test_unwritable_targets(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for target, reason in [
        (tmp_path, "it is a directory"),
        (tmp_path / "missing" / "a.png", "there is no directory"),
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path / ("a" * 300), "too long"),
        ("/proc/a.png", "cannot write '/proc/a.png'"),  # no permission, not even for root
    ]:
        with pytest.raises(UserError, match=reason):
            check_writable(target)
        with pytest.raises(UserError, match=reason):
            save_png(torch.zeros(3, 1, 1), target)
    assert os.listdir(tmp_path) == ["fifo"]


# --- reading pictures


def test_load_lays_transparency_over_white(tmp_path):
    picture = Image.new("RGBA", (2, 1))
    picture.putpixel((0, 0), (255, 0, 0, 0))
    picture.putpixel((1, 0), (255, 0, 0, 255))
    picture.save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png")[:, 0].t().tolist() == [[1.0, 1.0, 1.0], [1.0, -1.0, -1.0]]


def test_load_16_bit_grey(tmp_path):
    picture = Image.new("I;16", (256, 1))
    for value in range(256):
        picture.putpixel((value, 0), value * 257)
    picture.save(tmp_path / "a.png")
    expected = torch.arange(256).view(1, 1, 256).expand(3, 1, 256) / 127.5 - 1.0
    torch.testing.assert_close(load_image(tmp_path / "a.png"), expected, atol=1e-6, rtol=0)


def test_load_turns_upright(tmp_path):
    picture = Image.new("RGB", (4, 2))
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").shape == (3, 4, 2)


def test_load_crops_the_centre(tmp_path):
    image = torch.zeros(3, 4, 8)
    image[:, :, 2:6] = 1.0
    save_png(image, tmp_path / "a.png")
    assert (load_image(tmp_path / "a.png", 4, resize=True) == 1.0).all()
    assert load_image(tmp_path / "a.png", 2, resize=True).shape == (3, 2, 2)


def test_load_wrong_size(tmp_path):
    save_png(torch.zeros(3, 4, 8), tmp_path / "a.png")
    with pytest.raises(UserError, match=r"8 x 4 pixels, expected 4 x 4"):
        load_image(tmp_path / "a.png", 4)


def test_load_unreadable(tmp_path, recwarn):
    save_png(torch.rand(3, 32, 32), tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "short.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    Image.new("F", (2, 2)).save(tmp_path / "float.tiff")
    for name, reason in [
        ("text.png", "known format"),
        ("short.png", "truncated"),
        ("missing.png", "No such file"),
        (".", "Is a directory"),
        ("float.tiff", "pixel format 'F'"),
    ]:
        with pytest.raises(UserError, match=reason) as caught:
            load_image(tmp_path / name)
        assert repr(str(tmp_path / name)) in str(caught.value) and "\n" not in str(caught.value)


def test_load_refuses_absurd_sizes(tmp_path, monkeypatch):
    save_png(torch.zeros(3, 32, 32), tmp_path / "a.png")
    for limit in (600, 100):  # Pillow warns above the limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match="exceeds limit"):
            load_image(tmp_path / "a.png")
