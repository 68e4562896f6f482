"""The command line, with a tiny random model: what it writes, and one clear line for every kind of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import var_fast
from tests.cli_util import CLASSES, SIZE, read, refused, run
from var_fast import VAR, VQVAE, Sampler, cli_models
from var_fast.checkpoint import save_checkpoint
from var_fast.cli_arguments import image_name, parse_labels, parse_seeds, spread
from var_fast.cli_models import pick_device
from var_fast.errors import UserError
from var_fast.images import save_png

pytestmark = pytest.mark.usefixtures("one_thread")


def sample(model, *arguments) -> int:
    return run("sample", "--model", model, "--dtype", "float32", *arguments)


# --- sampling


def test_sample_writes_a_grid(model, folder, capsys):
    assert sample(model, "--seeds", "0-15", "--upscale", 1) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"16 x {SIZE} x {SIZE} pixels on cpu in float32" in out
    assert "seconds per image" in out and f"picture: {folder / 'grid.png'}\n" in out
    assert os.listdir(folder) == ["grid.png"]
    picture, text = read("grid.png")
    assert picture.shape == (3, 4 * (SIZE + 2) + 2, 4 * (SIZE + 2) + 2), "a column per label"
    assert text["label"] == ",".join(["0,1,2,3"] * 4) and text["seed"] == ",".join(map(str, range(16)))
    assert text["model"] == str(model) and text["Software"] == f"var_fast {var_fast.__version__}"
    assert json.loads(text["options"]) == {
        "cfg": 1.5,
        "top_k": 900,
        "top_p": 0.96,
        "more_smooth": False,
        "dtype": "float32",
        "device": "cpu",
    }


def test_images_are_the_samplers(model, folder):
    options = ("--cfg", 2, "--top-k", 5, "--top-p", 0.9, "--more-smooth", "--batch", 2)
    assert sample(model, "--labels", "dog,0", "--seeds", "7-9", "--save-dir", "single", *options) == 0
    names = ["label0-face-smiling-seed8.png", "label3-dog-seed7.png", "label3-dog-seed9.png"]
    assert sorted(os.listdir("single")) == names
    var = VAR.from_pretrained(model)
    expected = Sampler(var, dtype="float32").sample([0, 3, 3], [8, 7, 9], 2.0, 5, 0.9, more_smooth=True)
    for name, image in zip(names, expected):
        picture, text = read(Path("single") / name)
        # Half a level of rounding, and float32 noise of other batches.
        torch.testing.assert_close(picture, image, atol=0.51 / 255, rtol=0)
        assert (text["label"], text["class"], text["seed"]) == (name[5], CLASSES[int(name[5])], name[-5])
        assert json.loads(text["options"])["top_k"] == 5
    grid, _ = read("grid.png")
    assert grid.shape == (3, 2 * (4 * SIZE + 2) + 2, 2 * (4 * SIZE + 2) + 2), "4 times as large by default"
    assert not torch.equal(expected[1], expected[2]), "two seeds give two images"


def test_steps_show_every_scale(model, folder):
    options = ("--labels", "0-2", "--seeds", "5", "--batch", 2, "--upscale", 1, "--upscale-mode", "nearest")
    assert sample(model, "--steps", "--out", "strip.png", *options) == 0
    strip, text = read("strip.png")
    assert strip.shape == (3, 3 * (SIZE + 2) + 2, 2 * (SIZE + 2) + 2)
    assert (text["label"], text["seed"]) == ("0,1,2", "5,5,5")
    scales = list(Sampler(VAR.from_pretrained(model), dtype="float32").stream([0, 1, 2], [5, 5, 5]))
    for row in range(3):
        for column, images in enumerate(scales):
            top, left = (2 + n * (SIZE + 2) for n in (row, column))
            tile = strip[:, top : top + SIZE, left : left + SIZE]
            torch.testing.assert_close(tile, images[row], atol=0.51 / 255, rtol=0)


def test_grid_without_labels_or_with_columns(model, folder):
    assert sample(model, "--labels", "0", "--seeds", "0-4", "--upscale", 1) == 0
    assert read("grid.png")[0].shape == (3, 2 * (SIZE + 2) + 2, 3 * (SIZE + 2) + 2), "five images: 3 + 2"
    assert sample(model, "--labels", "0-3", "--seeds", "0-7", "--columns", 8, "--upscale", 1) == 0
    assert read("grid.png")[0].shape == (3, SIZE + 4, 8 * (SIZE + 2) + 2)


def test_list_labels(model, folder, capsys):
    assert run("sample", "--model", model, "--list-labels") == 0
    assert capsys.readouterr().out.splitlines()[2] == "   2  cat, tabby"
    assert os.listdir(folder) == []


def test_published_files(model, folder, capsys, monkeypatch):
    torch.manual_seed(1)
    vae = VQVAE(vocab_size=8, z_channels=4, ch=32, v_patch_nums=(1, 2), ch_mult=(1, 2))
    var = VAR(vae, num_classes=2, depth=16, embed_dim=16, num_heads=1, patch_nums=(1, 2), attn_l2_norm=True)
    torch.save(vae.state_dict(), "vae.pth")
    torch.save(var.state_dict(), "var.pth")
    files = ("--vae-ckpt", "vae.pth", "--var-ckpt", "var.pth")
    assert "expected d16 for 256 px" in refused(capsys, folder, "sample", "--model", "d16", *files)
    assert "needs its files: --vae-ckpt" in refused(capsys, folder, "sample", "--model", "var_d30")
    swapped = ("--vae-ckpt", "var.pth", "--var-ckpt", "vae.pth")
    assert "vae.pth holds no transformer" in refused(capsys, folder, "sample", "--model", "d16", *swapped)
    assert "expected none with --model" in refused(capsys, folder, "sample", "--model", model, *files)
    monkeypatch.setitem(cli_models.PUBLISHED, "d16", SIZE)
    for name in ("d16", "var_d16"):
        assert sample(name, *files, "--labels", "1", "--seeds", "0") == 0
    by_name = ("--labels", "dog")
    assert "this model has no class names" in refused(capsys, folder, "sample", "--model", "d16", *files, *by_name)


# --- reconstruction


def test_reconstruct(model, folder, capsys):
    pictures = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2)).mul(255).round().div(255)
    for name, picture in zip(("a.png", "b.png"), pictures):
        save_png(picture, name)
    assert run("reconstruct", "--model", model, "a.png", "b.png", "--upscale", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    made, text = read("reconstruction.png")
    assert made.shape == (3, 2 * (SIZE + 2) + 2, 2 * (SIZE + 2) + 2)
    expected = VQVAE.from_pretrained(model).img_to_reconstructed_img(pictures * 2 - 1, last_one=True).add(1).div(2)
    decibels = [-10 * torch.log10((a - b).square().mean()).item() for a, b in zip(pictures, expected)]
    for row, name in enumerate(("a.png", "b.png")):
        tiles = made[:, 2 + row * (SIZE + 2) :][:, :SIZE]
        torch.testing.assert_close(tiles[..., 2 : 2 + SIZE], pictures[row], atol=1e-6, rtol=0)
        torch.testing.assert_close(tiles[..., SIZE + 4 : 2 * SIZE + 4], expected[row], atol=0.51 / 255, rtol=0)
        assert lines[row] == f"{decibels[row]:6.2f} dB  {name}"
    assert lines[2].endswith("dB  mean") and lines[-1] == f"picture: {folder / 'reconstruction.png'}"
    assert text["psnr"] == f"{decibels[0]:.2f},{decibels[1]:.2f}" and json.loads(text["images"]) == ["a.png", "b.png"]


def test_reconstruct_other_sizes(model, folder, capsys):
    save_png(torch.rand(3, 9, 7), "a.png")
    line = refused(capsys, folder, "reconstruct", "--model", model, "a.png")
    assert "'a.png' is 7 x 9 pixels, expected 4 x 4" in line
    assert run("reconstruct", "--model", model, "a.png", "--resize", "--out", "b.png") == 0


@pytest.mark.parametrize(
    "content, message", [(None, "No such file"), (b"", "not a picture"), (b"\x89PNG\r\n\x1a\n1234", "cannot read")]
)
def test_reconstruct_unreadable(model, folder, capsys, content, message):
    if content is not None:
        Path("a.png").write_bytes(content)
    assert message in refused(capsys, folder, "reconstruct", "--model", model, "a.png")


# --- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--labels", "4"], "label is 4, expected 0 to 3"),
        (["--labels", "0-4"], "label is 4, expected 0 to 3"),
        (["--labels", "-1"], "label is '-1', expected a number from 0 to 3"),
        (["--labels", "face-smilling"], "did you mean 'face-smiling'?"),
        (["--labels", "0,,1"], "label is ''"),
        (["--labels", "3-0"], "runs backwards"),
        (["--seeds", "x"], "--seeds holds 'x'"),
        (["--seeds", "-1"], "--seeds holds '-1'"),
        (["--seeds", str(2**63)], "up to 2^63 - 1"),
        (["--seeds", "0-9999999999"], "too long"),
        (["--cfg", "nan"], "cfg is nan"),
        (["--cfg", "inf"], "cfg is inf, expected a finite number"),
        (["--top-k", "-1"], "top_k is -1, expected at least 0"),
        (["--top-k", "many"], "'--top-k'"),
        (["--top-p", "1.5"], "top_p is 1.5, expected 0 to 1"),
        (["--top-p", "-0.1"], "top_p is -0.1"),
        (["--dtype", "float8"], "'float32', 'bfloat16'"),
        (["--device", "abacus"], "--device is 'abacus'"),
        (["--device", "meta"], "--device is 'meta', which cannot be used here"),
        (["--device", "hpu"], "--device is 'hpu', which cannot be used here"),
        (["--out", "x.png", "--save-dir", "./x.png"], "--out and --save-dir are both 'x.png'"),
        (["--batch", "0"], "'--batch'"),
        (["--columns", "0"], "'--columns'"),
        (["--columns", "2", "--steps"], "--steps"),
        (["--upscale", "0"], "'--upscale'"),
        (["--unheard-of"], "No such option"),
        (["--out", "grid.jpg"], "ends in .png"),
    ],
)
def test_bad_options(model, folder, capsys, arguments, message):
    assert message in refused(capsys, folder, "sample", "--model", model, *arguments)


@pytest.mark.parametrize(
    "out", ["missing/grid.png", "directory.png", "/proc/grid.png", "file/grid.png", "a" * 300 + ".png"]
)
@pytest.mark.parametrize("command", ["sample", "reconstruct"])
def test_unwritable_out_is_found_before_any_work(model, folder, capsys, monkeypatch, command, out):
    os.mkdir("directory.png")
    Path("file").touch()
    for name in ("load_both", "load_tokenizer"):
        monkeypatch.setattr(cli_models, name, lambda *a: pytest.fail("loaded a model first"))
    arguments = ["a.png"] if command == "reconstruct" else []
    assert "cannot write" in refused(capsys, folder, command, "--model", model, "--out", out, *arguments)


@pytest.mark.parametrize("save_dir", ["missing/single", "file", "/proc/single"])
def test_unwritable_save_dir(model, folder, capsys, save_dir):
    Path("file").touch()
    line = refused(capsys, folder, "sample", "--model", model, "--save-dir", save_dir)
    assert save_dir in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(model, folder, capsys):
    os.mkdir("closed", mode=0o500)
    assert "Permission denied" in refused(capsys, folder, "sample", "--model", model, "--out", "closed/grid.png")


@pytest.mark.parametrize("name", ["var_d17", "d16-512", "nowhere/model", "Demo", ""])
@pytest.mark.parametrize("command", [["sample"], ["reconstruct", "a.png"]])
def test_unknown_model(folder, capsys, command, name):
    assert f"model {name!r} is unknown, expected" in refused(capsys, folder, *command, "--model", name)


def test_model_that_is_no_model(folder, capsys):
    Path("file.pth").touch()
    os.mkdir("empty")
    assert "is a file, expected a directory" in refused(capsys, folder, "sample", "--model", "file.pth")
    assert "config.json" in refused(capsys, folder, "sample", "--model", "empty")
    save_checkpoint("tokenizer", VQVAE(vocab_size=8, z_channels=4, ch=32, v_patch_nums=(1, 2), ch_mult=(1, 2)))
    assert "tokenizer only" in refused(capsys, folder, "sample", "--model", "tokenizer")


@pytest.mark.parametrize("part, entry", [("transformer", "head.weight"), ("tokenizer", "decoder.conv_out.bias")])
def test_nan_weights(model, folder, capsys, part, entry):
    os.mkdir("broken")
    for file in model.iterdir():
        Path("broken", file.name).write_bytes(file.read_bytes())
    weights = load_file(f"broken/{part}.safetensors")
    weights[entry].flatten()[0] = torch.nan
    save_file(weights, f"broken/{part}.safetensors")
    arguments = ("sample", "--model", "broken", "--dtype", "float32", "--save-dir", "single")
    assert "not finite" in refused(capsys, folder, *arguments)
    assert "not finite" in refused(capsys, folder, *arguments, "--steps")


def test_damaged_weights(model, folder, capsys):
    os.mkdir("broken")
    for file in model.iterdir():
        Path("broken", file.name).write_bytes(file.read_bytes()[:200])
    Path("broken/config.json").write_bytes((model / "config.json").read_bytes())
    assert "tokenizer.safetensors" in refused(capsys, folder, "sample", "--model", "broken")
    assert "tokenizer.safetensors" in refused(capsys, folder, "reconstruct", "a.png", "--model", "broken")


def test_out_of_memory(model, folder, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate\n")

    monkeypatch.setattr(Sampler, "sample", fail)
    assert "out of memory: try a --batch below 64" in refused(capsys, folder, "sample", "--model", model)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_on_the_cpu(model, folder, capsys, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    save_png(torch.rand(3, SIZE, SIZE), "a.png")
    monkeypatch.setattr(VQVAE, "img_to_reconstructed_img", fail)
    line = refused(capsys, folder, "reconstruct", "--model", model, "a.png")
    assert line == "error: out of memory: try --device cpu\n"


@pytest.mark.parametrize("kind", [RuntimeError, NotImplementedError, RecursionError])
def test_other_runtime_errors_are_not_out_of_memory(model, folder, monkeypatch, kind):
    def fail(*arguments, **options):
        raise kind("Cannot copy out of meta tensor; no data!")

    monkeypatch.setattr(Sampler, "sample", fail)
    with pytest.raises(kind, match="no data"):
        sample(model)


def test_reconstruct_on_a_device_without_data(model, folder, capsys):
    save_png(torch.rand(3, SIZE, SIZE), "a.png")
    line = refused(capsys, folder, "reconstruct", "--model", model, "a.png", "--device", "meta")
    assert "--device is 'meta', which cannot be used here" in line


def test_save_dir_that_becomes_a_file_meanwhile(model, folder, capsys, monkeypatch):
    """The folder comes first, so that no grid is left behind where it cannot be made."""
    real = Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda *a, **k: (Path("single").touch(), real(*a, **k))[1])
    assert sample(model, "--save-dir", "single") == 2
    assert "cannot make the directory 'single'" in capsys.readouterr().err
    assert os.listdir(folder) == ["single"]


# --- Ctrl-C, and failures of our own


@pytest.mark.parametrize("place", ["sample", "save"])
def test_interrupt(model, folder, capsys, monkeypatch, place):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    Path("grid.png").write_bytes(b"older")
    if place == "sample":
        monkeypatch.setattr(Sampler, "sample", interrupt)
    else:
        monkeypatch.setattr(Image.Image, "save", interrupt)
    assert sample(model) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert os.listdir(folder) == ["grid.png"] and Path("grid.png").read_bytes() == b"older"


def test_our_own_mistakes_keep_their_traceback(model, folder, monkeypatch):
    monkeypatch.setattr(Sampler, "sample", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(model)
    assert os.listdir(folder) == []


# --- the other commands


def test_doctor(capsys):
    assert run("doctor", "--json") == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"] == torch.__version__
    assert run("doctor") == 0
    assert torch.__version__ in capsys.readouterr().out


def test_help_and_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"var_fast {var_fast.__version__}\n"
    for arguments in (
        [],
        ["--help"],
        ["sample", "--help"],
        ["edit", "--help"],
        ["train"],
        ["train", "tokenizer", "--help"],
    ):
        assert run(*arguments) == 0
        assert "Usage: var-fast" in capsys.readouterr().out


def test_train_is_handed_its_arguments(folder, capsys):
    assert "No such option" in refused(capsys, folder, "train", "tokenizer", "--unheard-of", "3")
    assert "does not exist" in refused(capsys, folder, "train", "tokenizer", "--steps", 1, "--data", "missing")
    tokenizer = ("train", "tokenizer", "--data", "missing")
    assert "ch: got 0, expected 1" in refused(capsys, folder, *tokenizer, "--ch", 0)
    assert "ch_mult: got '1,x'" in refused(capsys, folder, *tokenizer, "--ch-mult", "1,x")
    assert "preset: got 'large', expected one of small" in refused(capsys, folder, *tokenizer, "--preset", "large")
    assert "steps, epochs: got both" in refused(capsys, folder, *tokenizer, "--steps", 1, "--epochs", 1)
    assert "depth: got 0" in refused(capsys, folder, "train", "transformer", "--data", "missing", "--depth", 0)
    assert "Missing option '--data'" in refused(capsys, folder, "train", "tokenizer")


def python(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, **options)


def test_module_is_the_command():
    done = python("-m", "var_fast", "sample", "--seeds", "x")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["sample", "edit"])
def test_help_needs_no_torch(command):
    code = f"import sys, var_fast.cli as c; c.main(['{command}', '--help']); sys.exit('torch' in sys.modules)"
    done = python("-c", code)
    assert done.returncode == 0, "importing torch would make help wait for seconds"


# --- labels and seeds


def test_parse_labels():
    assert parse_labels(" 2 , 0-1,DOG,face-smiling", 4, CLASSES) == [2, 0, 1, 3, 0]
    assert parse_labels("Cat, Tabby", 4, CLASSES) == [2], "one name may hold commas"
    assert parse_labels("1 - 3", 4, None) == [1, 2, 3]
    with pytest.raises(UserError, match="no class names"):
        parse_labels("dog", 4, None)
    with pytest.raises(UserError, match="is no class of this model; \\(var-fast sample --list"):
        parse_labels("xyzzy", 4, CLASSES)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2**62), st.integers(0, 20)), min_size=1, max_size=5))
def test_parse_seeds(ranges):
    text = ",".join(str(first) if length == 0 else f"{first}-{first + length}" for first, length in ranges)
    assert parse_seeds(text) == [first + i for first, length in ranges for i in range(length + 1)]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 2000))
def test_spread(num_classes):
    labels = spread(num_classes)
    assert len(labels) == len(set(labels)) == min(16, num_classes)
    assert labels[0] == 0 and labels[-1] == num_classes - 1 and labels == sorted(labels)


def test_image_name():
    assert image_name(1, 2, None) == "label1-seed2.png"
    assert image_name(0, 2, ["Été / ../x"]) == "label0-été-x-seed2.png"


def test_batch_is_the_number_of_images_made_at_once(model, tmp_path, monkeypatch):
    from var_fast import engine

    seen, real = [], engine.Sampler.__init__

    def init(self, *arguments, **options):
        seen.append(options["max_batch"])
        real(self, *arguments, **options)

    monkeypatch.setattr(engine.Sampler, "__init__", init)
    assert sample(model, "--seeds", "0-69", "--batch", 70, "--out", tmp_path / "x.png") == 0
    assert seen == [70]


def test_each_process_of_torchrun_gets_a_gpu_of_its_own(monkeypatch):
    """On a machine that says it has four: the device that is tried, and what is refused."""
    tried = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "zeros", lambda size, device: tried.append(str(device)) or torch.ones(1))
    assert str(pick_device("auto")) == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert str(pick_device("cuda")) == str(pick_device("auto")) == "cuda:3"
    assert str(pick_device("cpu")) == "cpu"
    with pytest.raises(UserError, match="--device is 'cuda:1', expected cuda or auto where several processes"):
        pick_device("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert str(pick_device("cuda:1")) == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each process sees only its own
    assert str(pick_device("cuda")) == "cuda:0"
    assert tried == ["cuda", "cuda:3", "cuda:3", "cpu", "cuda:1", "cuda:0"]
