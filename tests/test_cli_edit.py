"""var-fast edit, with a tiny random model: what it writes, and one clear line for every kind of bad input."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.cli_util import CLASSES, SIZE, read, refused, run
from var_fast import VAR, Sampler, cli_models
from var_fast.cli_arguments import parse_box
from var_fast.errors import UserError
from var_fast.images import save_png

pytestmark = pytest.mark.usefixtures("one_thread")
LEVEL = 0.51 / 255  # half a level of rounding


@pytest.fixture
def photo(folder) -> torch.Tensor:
    """(3, SIZE, SIZE), written as photo.png."""
    image = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(2)).mul(255).round().div(255)
    save_png(image, "photo.png")
    return image


def edit(model, *arguments) -> int:
    return run("edit", "photo.png", "--model", model, "--dtype", "float32", *arguments)


def tiles(path, rows: int, columns: int) -> torch.Tensor:
    """(rows, columns, 3, SIZE, SIZE) of a picture that was written with --upscale 1."""
    picture, _ = read(path)
    assert picture.shape == (3, rows * (SIZE + 2) + 2, columns * (SIZE + 2) + 2)
    return picture[:, 2:, 2:].unfold(1, SIZE, SIZE + 2).unfold(2, SIZE, SIZE + 2).permute(1, 2, 0, 3, 4)


def region(left, top, right, bottom) -> torch.Tensor:
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def save_mask(mask: torch.Tensor, path, levels=(0, 255)) -> None:
    Image.fromarray(torch.where(mask, levels[1], levels[0]).to(torch.uint8).numpy()).save(path)


# --- what is written


def test_original_region_and_results(model, folder, photo, capsys):
    capsys.readouterr()
    options = ("--cfg", 2, "--top-k", 5, "--top-p", 0.9, "--more-smooth", "--batch", 2, "--upscale", 1)
    arguments = ("--box", "0,0,4,2", "--labels", "dog,0", "--seeds", "7-10", "--save-dir", "single", *options)
    assert edit(model, *arguments) == 0
    out, err = capsys.readouterr()
    assert err == "" and f"4 x {SIZE} x {SIZE} pixels on cpu in float32" in out
    assert f"picture: {folder / 'edited.png'}\nimages:  {folder / 'single'}\n" in out
    sampler, mask = Sampler(VAR.from_pretrained(model), dtype="float32"), region(0, 0, 4, 2)
    expected = sampler.edit(photo, mask, [3, 0, 3, 0], [7, 8, 9, 10], 2.0, 5, 0.9, more_smooth=True)
    made = tiles("edited.png", 2, 4)  # a column per label beside the two
    torch.testing.assert_close(made[:, 2:].flatten(0, 1), expected, atol=LEVEL, rtol=0)
    torch.testing.assert_close(made[0, 0], photo, atol=1e-6, rtol=0)
    torch.testing.assert_close(made[0, 1], torch.where(mask, 0.5, photo), atol=LEVEL, rtol=0)
    assert (made[1, :2] == 1).all(), "the places below original and region are empty"
    text = read("edited.png")[1]
    assert (text["label"], text["seed"], text["picture"]) == ("3,0,3,0", "7,8,9,10", "photo.png")
    assert text["box"] == "0,0,4,2" and "mask" not in text
    assert json.loads(text["options"]) == {
        "cfg": 2.0,
        "top_k": 5,
        "top_p": 0.9,
        "more_smooth": True,
        "outside": False,
        "paste": False,
        "resize": False,
        "dtype": "float32",
        "device": "cpu",
    }
    names = [f"label{label}-{CLASSES[label]}-seed{seed}.png" for label, seed in ((3, 7), (0, 8), (3, 9), (0, 10))]
    assert sorted(os.listdir("single")) == sorted(names)
    for name, image in zip(names, expected):
        torch.testing.assert_close(read(Path("single") / name)[0], image, atol=LEVEL, rtol=0)


def test_without_labels_the_content_is_of_no_class(model, photo):
    assert edit(model, "--box", "0,0,4,2", "--seeds", "0-2", "--upscale", 1, "--save-dir", "single") == 0
    sampler = Sampler(VAR.from_pretrained(model), dtype="float32")
    expected = sampler.edit(photo, region(0, 0, 4, 2), [4] * 3, [0, 1, 2])
    torch.testing.assert_close(tiles("edited.png", 1, 5)[0, 2:], expected, atol=LEVEL, rtol=0)
    assert "label4-no-class-seed2.png" in os.listdir("single")
    text = read("single/label4-no-class-seed2.png")[1]
    assert (text["label"], text["class"], text["seed"]) == ("4", "no class", "2")


def test_a_mask_file_is_a_box_and_outside_is_its_opposite(model, photo):
    save_mask(region(0, 0, 2, 4), "mask.png")
    save_mask(~region(0, 0, 2, 4), "not.png")
    save_mask(region(0, 0, 2, 4), "grey.png", levels=(127, 128))
    arguments = ("--labels", "0", "--upscale", 1, "--seeds", "0-1")
    box = ("--box", "0,0,2,4")
    for names, places in (
        (("a", "b", "c"), (box, ("--mask", "mask.png"), ("--mask", "not.png", "--outside"))),
        (("d", "e"), (box, ("--mask", "grey.png"))),
        (("f", "g"), ((*box, "--outside"), ("--mask", "not.png"))),
    ):
        for name, place in zip(names, places):
            assert edit(model, *place, *arguments, "--out", f"{name}.png") == 0
            assert torch.equal(read(f"{name}.png")[0], read(f"{names[0]}.png")[0]), place
    assert not torch.equal(read("a.png")[0], read("f.png")[0])
    assert read("b.png")[1]["mask"] == "mask.png"


def test_paste(model, photo):
    arguments = ("--box", "0,0,4,3", "--seeds", "0", "--upscale", 1)
    assert edit(model, *arguments, "--paste", "--out", "a.png") == 0
    assert edit(model, *arguments, "--no-paste", "--out", "b.png") == 0
    mask = region(0, 0, 4, 3)
    pasted, plain = (tiles(name, 1, 3)[0, 2] for name in ("a.png", "b.png"))
    assert torch.equal(pasted[:, mask], plain[:, mask])
    torch.testing.assert_close(pasted[:, ~mask], photo[:, ~mask], atol=1e-6, rtol=0)
    assert not torch.equal(pasted, plain)
    assert json.loads(read("a.png")[1]["options"])["paste"] is True


def test_many_results_fill_rows_of_six(model, photo):
    assert edit(model, "--box", "0,0,4,2", "--seeds", "0-7", "--upscale", 1) == 0
    assert bool((tiles("edited.png", 2, 8)[1, 4:] == 1).all())
    assert edit(model, "--box", "0,0,4,2", "--seeds", "0-2", "--columns", 2) == 0
    assert read("edited.png")[0].shape == (3, 2 * (4 * SIZE + 2) + 2, 4 * (4 * SIZE + 2) + 2)


def test_resize_crops_picture_and_mask_alike(model, folder, photo, capsys):
    # 8 x 4 times as large as the model's: its middle is the photo
    wide = torch.zeros(3, SIZE, 2 * SIZE)
    wide[:, :, 2:6] = photo
    save_png(wide, "wide.png")
    mask = torch.ones(SIZE, 2 * SIZE, dtype=torch.bool)
    mask[:, 4:6] = False
    save_mask(mask, "wide_mask.png")
    save_mask(region(0, 0, 2, 4), "mask.png")
    command = ("edit", "wide.png", "--model", model, "--dtype", "float32", "--upscale", 1, "--seeds", 0)
    assert run(*command, "--mask", "wide_mask.png", "--resize", "--out", "a.png") == 0
    assert edit(model, "--mask", "mask.png", "--upscale", 1, "--seeds", 0, "--out", "b.png") == 0
    assert torch.equal(read("a.png")[0], read("b.png")[0])
    assert "'wide.png' is 8 x 4 pixels, expected 4 x 4" in refused(capsys, folder, *command, "--mask", "wide_mask.png")
    line = refused(capsys, folder, *command, "--mask", "mask.png", "--resize")
    assert "--mask 'mask.png' and PICTURE 'wide.png' differ in size" in line


# --- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "neither of --mask and --box given, expected one of them"),
        (["--box", "0,0,4,2", "--mask", "mask.png"], "both of --mask and --box given"),
        (["--box", "0,0,4"], "--box is '0,0,4', expected x0,y0,x1,y1"),
        (["--box", "2,0,2,4"], "x0 < x1 and y0 < y1"),
        (["--box", "-1,0,2,4"], "--box is '-1,0,2,4'"),
        (["--box", "0,0,5,4"], "--box reaches to 5,4, expected at most 4,4"),
        (["--box", "0,0,1,1"], "mask is too thin: its 1 pixels"),
        (["--box", "0,0,4,4", "--outside"], "the region for new content is empty"),
        (["--mask", "black.png"], "the region for new content is empty"),
        (["--mask", "missing.png"], "cannot read image 'missing.png': No such file"),
        (["--mask", "text.png"], "not a picture"),
        (["--mask", "large.png"], "'large.png' is 8 x 8 pixels, expected 4 x 4"),
        (["--box", "0,0,4,2", "--labels", "4"], "label is 4, expected 0 to 3"),
        (["--box", "0,0,4,2", "--labels", "dgo"], "did you mean 'dog'?"),
        (["--box", "0,0,4,2", "--seeds", "x"], "--seeds holds 'x'"),
        (["--box", "0,0,4,2", "--top-p", "1.5"], "top_p is 1.5"),
        (["--box", "0,0,4,2", "--device", "abacus"], "--device is 'abacus'"),
        (["--box", "0,0,4,2", "--out", "edited.jpg"], "ends in .png"),
        (["--box", "0,0,4,2", "--out", "missing/edited.png"], "cannot write 'missing/edited.png'"),
        (["--box", "0,0,4,2", "--out", "./photo.png"], "--out is 'photo.png', which is read too"),
        (["--mask", "mask.png", "--out", "mask.png"], "--out is 'mask.png', which is read too"),
        (["--box", "0,0,4,2", "--save-dir", "text.png"], "--save-dir is 'text.png', expected a directory"),
        (["--box", "0,0,4,2", "--save-dir", "edited.png"], "--out and --save-dir are both 'edited.png'"),
        (["--box", "0,0,4,2", "--model", "nowhere"], "model 'nowhere' is unknown"),
    ],
)
def test_bad_options(model, folder, photo, capsys, arguments, message):
    save_mask(region(0, 0, 4, 2), "mask.png")
    save_mask(region(0, 0, 0, 0), "black.png")
    save_mask(torch.ones(8, 8, dtype=torch.bool), "large.png")
    Path("text.png").write_text("text")
    before = Path("photo.png").read_bytes()
    named = [] if "--model" in arguments else ["--model", model]
    assert message in refused(capsys, folder, "edit", "photo.png", *named, *arguments)
    assert Path("photo.png").read_bytes() == before


def test_picture_that_does_not_fit(model, folder, capsys):
    save_png(torch.rand(3, 9, 7), "a.png")
    arguments = ("--model", model, "--box", "0,0,4,2")
    assert "'a.png' is 7 x 9 pixels, expected 4 x 4" in refused(capsys, folder, "edit", "a.png", *arguments)
    assert "No such file" in refused(capsys, folder, "edit", "b.png", *arguments)
    assert "Missing argument 'PICTURE'" in refused(capsys, folder, "edit", *arguments)


def test_unwritable_out_is_found_before_any_work(model, folder, photo, capsys, monkeypatch):
    monkeypatch.setattr(cli_models, "load_both", lambda *a: pytest.fail("loaded a model first"))
    line = refused(capsys, folder, "edit", "photo.png", "--model", model, "--box", "0,0,4,2", "--out", "x/y.png")
    assert "there is no directory" in line


def test_out_of_memory_and_interrupt(model, folder, photo, capsys, monkeypatch):
    def fail(error):
        def edit(*arguments, **options):
            raise error

        monkeypatch.setattr(Sampler, "edit", edit)

    fail(torch.OutOfMemoryError("CUDA out of memory."))
    line = refused(capsys, folder, "edit", "photo.png", "--model", model, "--box", "0,0,4,2")
    assert "out of memory: try a --batch below 64" in line
    fail(KeyboardInterrupt())
    assert edit(model, "--box", "0,0,4,2") == 130
    assert os.listdir(folder) == ["photo.png"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4), st.sampled_from([",", " , "]))
def test_parse_box(numbers, comma):
    text, (left, top, right, bottom) = comma.join(map(str, numbers)), numbers
    if left < right and top < bottom:
        assert parse_box(text) == tuple(numbers)
    else:
        with pytest.raises(UserError, match="--box is"):
            parse_box(text)
