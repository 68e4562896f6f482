"""Checkpoints: what is written is read again; what is wrong is named, and changes nothing."""

from __future__ import annotations

import gzip
import inspect
import json
import os
import pickle
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import var_fast.checkpoint
from var_fast import VAR, VQVAE, Sampler
from var_fast.checkpoint import Checkpoint, CheckpointError, build_models, load_checkpoint, save_checkpoint
from var_fast.checkpoint_files import check_config, read_contents
from var_fast.engine.model_watch import ModelWatch
from var_fast.errors import UserError
from var_fast.layout import PUBLISHED_PATCH_NUMS, RULES, least_elements, tokenizer_keywords, transformer_keywords

PATCH_NUMS = (1, 2, 3)
CLASSES = ["dots", "rings", "bars"]
OFFICIAL = json.load(gzip.open(Path(__file__).parent / "golden" / "official_state_dicts.json.gz"))


def tiny_vae(patch_nums=PATCH_NUMS, **keywords):
    defaults = dict(vocab_size=24, z_channels=4, ch=32, ch_mult=(1, 1), v_patch_nums=patch_nums)
    return VQVAE(**{**defaults, **keywords}).eval()


def tiny_var(vae, **keywords):
    defaults = dict(num_classes=3, depth=2, embed_dim=16, num_heads=2, attn_l2_norm=True)
    return VAR(vae, patch_nums=vae.quantize.v_patch_nums, **{**defaults, **keywords}).eval()


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return tiny_vae(quant_resi=0.3)


@pytest.fixture(scope="module")
def var(vae):
    return tiny_var(vae, norm_eps=1e-5)


@pytest.fixture
def folder(tmp_path, vae, var):
    save_checkpoint(tmp_path / "model", vae, var, classes=CLASSES)
    return tmp_path / "model"


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name


def save(entries, path):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in entries.items()}, path)
    else:
        torch.save(entries, path)
    return path


# ---- what is written
def test_a_directory_comes_back_whole(folder, vae, var):
    loaded = load_checkpoint(folder)
    assert isinstance(loaded, Checkpoint)
    assert_same(state(loaded.vae), state(vae))
    assert_same(state(loaded.var), state(var))
    assert (loaded.vae.config, loaded.var.config) == (vae.config, var.config)
    assert loaded.classes == CLASSES and loaded.config["image_size"] == PATCH_NUMS[-1] * 2
    assert loaded.var.vae_proxy[0] is loaded.vae
    assert not loaded.vae.training and not loaded.var.training
    arguments = dict(B=2, label_B=1, g_seed=5, top_k=1)
    assert torch.equal(loaded.var.autoregressive_infer_cfg(**arguments), var.autoregressive_infer_cfg(**arguments))
    assert sorted(os.listdir(folder)) == ["config.json", "tokenizer.safetensors", "transformer.safetensors"]
    modes = {(folder / name).stat().st_mode for name in os.listdir(folder)}
    assert len(modes) == 1, "every file can be read by whoever can read config.json"


def test_a_directory_with_a_tokenizer_alone(tmp_path, vae):
    save_checkpoint(tmp_path / "new" / "model", vae)
    loaded = load_checkpoint(tmp_path / "new" / "model")
    assert_same(state(loaded.vae), state(vae))
    assert loaded.var is None and loaded.classes is None


def test_bfloat16_files_hold_half_the_bytes_and_load_as_float32(tmp_path, folder, vae, var):
    save_checkpoint(tmp_path / "half", vae, var, dtype=torch.bfloat16)
    parameters = dict(var.named_parameters())
    for name, tensor in load_file(tmp_path / "half" / "transformer.safetensors").items():
        own = var.state_dict()[name]
        assert tensor.dtype == (torch.bfloat16 if name in parameters else own.dtype), name
    size = {d: (d / "tokenizer.safetensors").stat().st_size for d in (folder, tmp_path / "half")}
    assert size[tmp_path / "half"] < 0.6 * size[folder]
    loaded = load_checkpoint(tmp_path / "half").var
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameters[name].bfloat16().float()), name


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_tokenizer_file(tmp_path, vae, suffix):
    path = save(vae.state_dict(), tmp_path / f"vae{suffix}")
    loaded = load_checkpoint(str(path), patch_nums=PATCH_NUMS, quant_resi=0.3)
    assert isinstance(loaded, VQVAE) and not loaded.training
    assert_same(state(loaded), state(vae))
    assert loaded.config == vae.config
    with pytest.raises(CheckpointError, match=r"vae\.\w+: quantize.ema_vocab_hit_SV .* patch_nums"):
        load_checkpoint(path)


@pytest.mark.parametrize("keywords", [dict(share_quant_resi=0), dict(share_quant_resi=1), dict(quant_resi=0.0)])
@pytest.mark.parametrize("shape", [dict(ch_mult=(1, 2)), dict(quant_conv_ks=1, vocab_size=7, z_channels=3)])
def test_tokenizer_keywords_are_read_from_shapes(tmp_path, keywords, shape):
    model = tiny_vae(**keywords, **shape)
    loaded = load_checkpoint(save(model.state_dict(), tmp_path / "vae.pth"), patch_nums=PATCH_NUMS)
    assert_same(state(loaded), state(model))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("buffers", [True, False])
def test_a_transformer_file(tmp_path, vae, var, suffix, buffers):
    entries = dict(var.state_dict() if buffers else var.named_parameters())
    path = save({name: tensor.detach() for name, tensor in entries.items()}, tmp_path / f"var{suffix}")
    loaded = load_checkpoint(path, vae=vae, norm_eps=1e-5)
    assert isinstance(loaded, VAR) and loaded.vae_proxy[0] is vae and not loaded.training
    assert_same(state(loaded), state(var))
    assert loaded.config == var.config
    with pytest.raises(UserError, match="vae="):
        load_checkpoint(path)


def test_a_transformer_file_with_its_tokenizers_file(tmp_path, vae, var):
    vae_path = save(vae.state_dict(), tmp_path / "vae.pth")
    path = save(var.state_dict(), tmp_path / "var.pth")
    loaded = load_checkpoint(path, vae=vae_path, quant_resi=0.3)
    assert loaded.patch_nums == loaded.vae_proxy[0].quantize.v_patch_nums == PATCH_NUMS
    assert_same(state(loaded.vae_proxy[0]), state(vae))


def test_shared_adaln_and_plain_attention_need_the_number_of_heads(tmp_path, vae):
    model = tiny_var(vae, shared_aln=True, attn_l2_norm=False, num_heads=4, mlp_ratio=2.5)
    path = save(model.state_dict(), tmp_path / "var.pth")
    with pytest.raises(CheckpointError, match="num_heads="):
        load_checkpoint(path, vae=vae)
    loaded = load_checkpoint(path, vae=vae, num_heads=4)
    assert loaded.config == model.config
    assert_same(state(loaded), state(model))


def test_plain_attention_in_the_published_proportion_shows_its_heads(tmp_path, vae):
    model = tiny_var(vae, attn_l2_norm=False, depth=1, embed_dim=64, num_heads=1)
    assert load_checkpoint(save(model.state_dict(), tmp_path / "var.pth"), vae=vae).config == model.config


def test_a_file_of_the_published_trainer_holds_both(tmp_path, vae, var):
    trainer = {"vae_local": vae.state_dict(), "var_wo_ddp": var.state_dict(), "var_opt": {"state": {}}}
    path = save({"epoch": 3, "trainer": trainer, "args": {"depth": 2}}, tmp_path / "ar-ckpt-last.pth")
    loaded = load_checkpoint(path)
    assert isinstance(loaded, Checkpoint)
    assert_same(state(loaded.vae), state(vae))
    assert_same(state(loaded.var), state(var))
    for model in (tiny_vae(), tiny_var(vae)):
        load_checkpoint(path, model=model)
        assert_same(state(model), state(vae if isinstance(model, VQVAE) else var))


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_into_a_model_from_a_file_and_from_a_directory(folder, vae, var, kind):
    for path in (folder, folder / f"{kind}.safetensors"):
        model = tiny_vae(quant_resi=0.3) if kind == "tokenizer" else tiny_var(vae, norm_eps=1e-5)
        assert load_checkpoint(path, model=model) is model
        assert_same(state(model), state(vae if kind == "tokenizer" else var))


def test_a_model_keeps_its_types(tmp_path, vae, var):
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in var.state_dict().items()}
    path = save(half, tmp_path / "var.pth")
    model = tiny_var(vae).double()
    load_checkpoint(path, model=model)
    assert torch.equal(model.head.weight, var.head.weight.bfloat16().double())


def test_code_statistics_of_another_number_of_scales(tmp_path, vae):
    entries = {**vae.state_dict(), "quantize.ema_vocab_hit_SV": torch.ones(10, 24)}
    model = load_checkpoint(save(entries, tmp_path / "vae.pth"), model=tiny_vae())
    assert torch.equal(model.quantize.ema_vocab_hit_SV, torch.zeros(3, 24))
    assert torch.equal(model.quant_conv.weight, vae.quant_conv.weight)


def test_demo_is_the_packaged_directory(folder, monkeypatch, var):
    monkeypatch.setattr(var_fast.checkpoint, "DEMO", folder)
    assert_same(state(load_checkpoint("demo").var), state(var))


def test_loading_draws_no_random_numbers(folder):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_checkpoint(folder)
    assert torch.equal(torch.rand(1), expected)


# ---- published layouts
def outline(cls, *args, **keywords):
    with torch.device("meta"):
        return cls(*args, **keywords)


def test_published_tokenizer_by_its_shapes():
    shapes = {name: tuple(shape) for name, shape in OFFICIAL["vae_ch160v4096z32"]["state_dict"].items()}
    keywords = tokenizer_keywords(shapes, "vae_ch160v4096z32.pth")
    assert keywords == dict(
        vocab_size=4096,
        z_channels=32,
        ch=160,
        ch_mult=[1, 1, 2, 2, 4],
        quant_conv_ks=3,
        share_quant_resi=4,
        v_patch_nums=list(PUBLISHED_PATCH_NUMS[256]),
    )
    model = outline(VQVAE, **keywords)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes


@pytest.mark.parametrize("name, size", [("d16", 256), ("d20", 256), ("d24", 256), ("d30", 256), ("d36", 512)])
@pytest.mark.parametrize("buffers", [True, False])
def test_published_transformers_by_their_shapes(name, size, buffers):
    official, depth = OFFICIAL[f"var_{name}"], int(name[1:])
    shapes = {name: tuple(shape) for name, shape in official["state_dict"].items()}
    if not buffers:
        for key in [key for key in shapes if key.endswith(("lvl_1L", "attn_bias_for_masking", "zero_k_bias"))]:
            del shapes[key]
    keywords = transformer_keywords(shapes, f"var_{name}.pth")
    assert keywords == dict(
        num_classes=1000,
        depth=depth,
        embed_dim=64 * depth,
        num_heads=depth,
        mlp_ratio=4.0,
        shared_aln=official["shared_aln"],
        attn_l2_norm=True,
        patch_nums=list(PUBLISHED_PATCH_NUMS[size]),
    )
    assert keywords["patch_nums"] == official["patch_nums"]
    if buffers:
        vae = outline(VQVAE, v_patch_nums=keywords["patch_nums"])
        model = outline(VAR, vae, **keywords)
        assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes


@pytest.mark.parametrize("name", OFFICIAL)
def test_least_elements_is_a_bound_near_the_whole(name):
    shapes = {name: tuple(shape) for name, shape in OFFICIAL[name]["state_dict"].items()}
    part = "tokenizer" if name.startswith("vae") else "transformer"
    keywords = (tokenizer_keywords if part == "tokenizer" else transformer_keywords)(shapes, name)
    elements = sum(prod(shape) for shape in shapes.values())
    assert 0.4 * elements < least_elements(part, keywords) < elements


def test_published_1024_pyramid_by_its_length(tmp_path):
    side = PUBLISHED_PATCH_NUMS[1024]
    assert sum(pn * pn for pn in side) == 9451
    shapes = dict.fromkeys(["blocks.0.ffn.fc1.weight", "class_emb.weight"], (64, 64))
    shapes.update({"pos_start": (1, 1, 64), "pos_1LC": (1, 9451, 64), "lvl_embed.weight": (14, 64)})
    assert transformer_keywords(shapes, "file")["patch_nums"] == list(side)


@pytest.mark.parametrize("part, cls", [("tokenizer", VQVAE), ("transformer", VAR)])
def test_every_constructor_keyword_has_a_rule(part, cls):
    assert set(RULES[part]) == set(inspect.signature(cls).parameters) - {"vae_local"}
    for name, parameter in inspect.signature(cls).parameters.items():
        assert name == "vae_local" or RULES[part][name][1](parameter.default), name


# ---- what is wrong: files
class Hostile:
    """Pickled, it is a call that leaves a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def changed(entries, **new):
    return {name: new.get(name.replace(".", "_"), tensor) for name, tensor in entries.items()}


def cut(path, keep):
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def write_wrong_file(kind, entries, path):
    """Write a file that is wrong in the way `kind` says; entries are those of a right transformer."""
    if kind.startswith("truncated"):
        cut(save(entries, path), float(kind.split()[1]))
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("version https://example.org/spec/v1\noid sha256:0123\nsize 1240\n")
    elif kind == "hostile":
        torch.save({**entries, "head.bias": Hostile(path.with_name("mark"))}, path)
    elif kind == "hostile, old format":
        wrong = {**entries, "head.bias": Hostile(path.with_name("mark"))}
        torch.save(wrong, path, _use_new_zipfile_serialization=False)
    elif kind == "hostile, plain pickle":
        path.write_bytes(pickle.dumps(Hostile(path.with_name("mark")), protocol=4))
    elif kind == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    elif kind == "list":
        torch.save(list(entries.values()), path)
    elif kind == "list of a trainer":
        torch.save({"trainer": {"var_wo_ddp": [1, 2]}}, path)
    elif kind == "no entries":
        torch.save({}, path)
    elif kind == "other names":
        torch.save({f"module.{name}": tensor for name, tensor in entries.items()}, path)
    elif kind == "tokenizer":
        save({f"encoder.{name}": tensor for name, tensor in entries.items()}, path)
    elif kind == "missing":
        save({n: t for n, t in entries.items() if n not in ("head.bias", "blocks.1.attn.q_bias")}, path)
    elif kind == "unexpected":
        save({**entries, "blocks.1.attn.k\n_bias": torch.zeros(16)}, path)
    elif kind == "shapes":
        wrong = {"blocks_1_attn_proj_weight": torch.zeros(16, 15), "head_bias": torch.zeros(23)}
        save(changed(entries, **wrong), path)
    elif kind == "dimensions":
        save(changed(entries, word_embed_bias=torch.zeros(1, 16)), path)
    elif kind == "levels":
        save(changed(entries, lvl_1L=torch.zeros(1, 14, dtype=torch.int64)), path)
    elif kind == "float levels":
        save(changed(entries, lvl_1L=entries["lvl_1L"].float()), path)
    elif kind == "integer weights":
        save(changed(entries, head_weight=torch.ones(24, 16, dtype=torch.int32)), path)
    elif kind == "complex weights":
        save(changed(entries, head_weight=torch.ones(24, 16, dtype=torch.complex64)), path)
    elif kind == "no values":
        torch.save(changed(entries, head_weight=torch.ones(24, 16, device="meta")), path)
    elif kind == "sparse":
        torch.save(changed(entries, head_weight=torch.eye(24, 16).to_sparse()), path)
    elif kind == "number":
        torch.save({**entries, "head.bias": 1.0}, path)
    elif kind == "numbered":
        torch.save({**entries, 7: torch.ones(1)}, path)


WRONG_FILES = {
    "truncated 0.3": "damaged",
    "truncated 0.97": "damaged",
    "empty": "is empty",
    "text": "damaged",
    "hostile": r"asks to run \w+\.mkdir",
    "hostile, old format": r"asks to run \w+\.mkdir",
    "hostile, plain pickle": "damaged or no checkpoint at all: it asks for more than tensors",
    "script": "damaged or no checkpoint at all: it asks for more than tensors",
    "list": "holds a list",
    "list of a trainer": "holds a list",
    "no entries": "no entry belongs",
    "other names": "no entry belongs .* 'module.pos_start'",
    "tokenizer": "",
    "missing": r"blocks\.1\.attn\.q_bias is missing, expected shape \(16,\)",
    "unexpected": r"'blocks\.1\.attn\.k\\n_bias' has shape \(16,\), expected no such entry",
    "shapes": r"blocks\.1\.attn\.proj\.weight has shape \(16, 15\), expected \(16, 16\)",
    "dimensions": r"word_embed\.bias has shape \(1, 16\), expected \(16,\)",
    "levels": "lvl_1L",
    "float levels": "lvl_1L has type torch.float32, expected torch.int64",
    "integer weights": "head.weight has type torch.int32, expected torch.float32",
    "complex weights": "head.weight has type torch.complex64",
    "no values": "'head.weight' is a .* on meta",
    "sparse": "'head.weight' is a torch.sparse_coo",
    "number": "'head.bias' is a float, expected a tensor",
    "numbered": "7 is a Tensor",
}
PTH_ONLY = {"hostile", "script", "list", "no entries", "no values", "sparse", "number", "other names"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "kind, suffix",
    [(k, ".pth") for k in WRONG_FILES]
    + [(k, ".safetensors") for k in WRONG_FILES if k.split(",")[0].split(" of")[0] not in PTH_ONLY | {"numbered"}],
)
def test_a_wrong_file_is_named_and_nothing_changes(tmp_path, vae, var, kind, suffix):
    path = tmp_path / f"wrong{suffix}"
    write_wrong_file(kind, state(var), path)
    model = tiny_var(vae)
    before = state(model)
    with pytest.raises(CheckpointError, match=f"wrong{suffix}: .*{WRONG_FILES[kind]}") as into:
        load_checkpoint(path, model=model)
    assert_same(state(model), before)
    with pytest.raises(UserError, match=f"wrong{suffix}.*{WRONG_FILES[kind]}") as build:
        load_checkpoint(path, vae=vae)
    for error in (into, build):
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not (tmp_path / "mark").exists(), "code in the file was run"


@pytest.mark.parametrize("kind", ["missing", "unexpected", "shapes", "dimensions", "levels", "integer weights"])
def test_a_wrong_file_in_a_directory(folder, vae, var, kind):
    path = folder / "transformer.safetensors"
    write_wrong_file(kind, state(var), path)
    with pytest.raises(CheckpointError, match=f"{path}: .*{WRONG_FILES[kind]}"):
        load_checkpoint(folder)


def test_a_shape_made_out_of_one_number_builds_nothing(tmp_path, vae, var):
    entries = changed(
        state(var),
        class_emb_weight=torch.zeros(1).expand(1_000_000, 16),
        attn_bias_for_masking=torch.zeros(1).expand(1, 1, 14, 14),
    )
    with pytest.raises(CheckpointError, match=r"bomb.pth: class_emb.weight has shape .* more than the file can hold"):
        load_checkpoint(save(entries, tmp_path / "bomb.pth"), vae=vae)


def test_absurd_shapes_are_refused(tmp_path, vae, var):
    wide = changed(state(var), pos_start=torch.zeros(1).expand(1, 1, 10**9))
    with pytest.raises(CheckpointError, match="absurd.pth: transformer: embed_dim is 1000000000, expected a whole"):
        load_checkpoint(save(wide, tmp_path / "absurd.pth"), vae=vae)
    deep = {**state(var), "blocks.9999.attn.q_bias": torch.zeros(16)}
    with pytest.raises(CheckpointError, match="absurd.pth: transformer: depth is 10000, expected a whole"):
        load_checkpoint(save(deep, tmp_path / "absurd.pth"), vae=vae)
    long = changed(state(var), pos_1LC=torch.zeros(1).expand(1, 10**9, 16))
    long["lvl_1L"] = torch.zeros(1, dtype=torch.int64).expand(1, 10**9)
    with pytest.raises(CheckpointError, match="absurd.pth: lvl_1L has 1000000000 elements"):
        load_checkpoint(save(long, tmp_path / "absurd.pth"), vae=vae)


def test_a_model_much_larger_than_its_file_takes_no_memory(tmp_path, vae, var):
    built_on = []

    class Watched(VAR):
        def __init__(self, *args, **keywords):
            built_on.append(torch.empty(0).device.type)
            super().__init__(*args, **keywords)

    large = changed(state(var), pos_start=torch.zeros(1, 1, 2**10), blocks_0_ffn_fc1_weight=torch.zeros(2**12, 0))
    large["blocks.255.attn.q_bias"] = torch.zeros(1)
    contents = read_contents(save(large, tmp_path / "large.pth"))
    with pytest.raises(CheckpointError, match=r"large.pth: pos_1LC has shape \(1, 14, 16\), expected \(1, 14, 1024\)"):
        build_models(contents, vae=vae, keywords={}, var_class=Watched)
    assert built_on == ["meta"]


def test_a_gap_in_the_blocks_is_found(tmp_path, vae, var):
    entries = {name.replace("blocks.1.", "blocks.2."): tensor for name, tensor in state(var).items()}
    with pytest.raises(CheckpointError, match=r"gap.pth: blocks\.1\.attn\.scale_mul_1H11 is missing"):
        load_checkpoint(save(entries, tmp_path / "gap.pth"), vae=vae)


def test_a_tokenizer_of_other_widths(tmp_path, vae):
    entries = {**state(vae), "encoder.conv_in.weight": torch.zeros(33, 3, 3, 3)}
    with pytest.raises(CheckpointError, match=r"vae.pth: encoder.down.0.block.0.conv1.weight has 32 channels"):
        load_checkpoint(save(entries, tmp_path / "vae.pth"), patch_nums=PATCH_NUMS)
    model = tiny_vae(ch=64)
    before = state(model)
    with pytest.raises(CheckpointError, match=r"encoder.conv_in.weight has shape \(32, 3, 3, 3\), expected \(64,"):
        load_checkpoint(save(state(vae), tmp_path / "vae.pth"), model=model)
    assert_same(state(model), before)


def test_a_pyramid_of_the_same_length_is_not_the_same(tmp_path):
    # 1 + 4 + 81 = 1 + 36 + 49 tokens in three scales: every shape agrees
    other, own = tiny_vae((1, 2, 9)), tiny_vae((1, 6, 7))
    path = save(tiny_var(other).state_dict(), tmp_path / "var.pth")
    model = tiny_var(own)
    before = state(model)
    for arguments in (dict(model=model), dict(vae=own)):
        with pytest.raises(CheckpointError, match=r"var.pth: .*patch_nums .*\(1, 2, 9\), expected .*\(1, 6, 7\)"):
            load_checkpoint(path, **arguments)
    assert_same(state(model), before)


def test_paths_that_lead_nowhere(tmp_path, folder):
    for path, words in [
        (tmp_path / "none.pth", "none.pth: no such file or directory"),
        (tmp_path, "holds no config.json"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(path)
    (folder / "transformer.safetensors").unlink()
    with pytest.raises(CheckpointError, match="transformer.safetensors: no such file"):
        load_checkpoint(folder)


def test_arguments_that_do_not_go_together(tmp_path, folder, vae, var):
    vae_path = save(vae.state_dict(), tmp_path / "vae.pth")
    var_path = save(var.state_dict(), tmp_path / "var.pth")
    for words, path, arguments in [
        ("vae is given", vae_path, dict(vae=vae)),
        ("vae is given beside model", var_path, dict(model=var, vae=vae)),
        ("depth is given beside model", var_path, dict(model=var, depth=2)),
        ("depth is no keyword of the tokenizer", vae_path, dict(depth=2)),
        ("widht is no keyword", folder, dict(widht=2)),
        ("ch is no keyword of the transformer", var_path, dict(vae=vae, ch=32)),
        ("depth is 0, expected a whole number", folder, dict(depth=0)),
        ("patch_nums is 3, expected growing", vae_path, dict(patch_nums=3)),
        ("model is a Linear", vae_path, dict(model=torch.nn.Linear(1, 1))),
        ("is a tokenizer, expected a transformer", vae_path, dict(model=var)),
        ("var.pth: holds no tokenizer", var_path, dict(vae=var_path)),
        ("meta device", vae_path, dict(model=outline(tiny_vae))),
        ("blocks.2.attn.scale_mul_1H11 is missing", folder, dict(depth=3)),
        ("num_heads", var_path, dict(vae=vae, num_heads=3)),
    ]:
        with pytest.raises(UserError, match=words):
            load_checkpoint(path, **arguments)


def test_a_model_that_would_compute_otherwise(folder, vae):
    model = tiny_var(vae, norm_eps=1e-3)
    before = state(model)
    with pytest.raises(CheckpointError, match="config.json: norm_eps is 1e-05, expected the model's 0.001"):
        load_checkpoint(folder, model=model)
    assert_same(state(model), before)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([".pth", ".safetensors"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=4),
    st.floats(0, 1),
)
def test_damaged_bytes_load_whole_or_not_at_all(tmp_path, vae, var, suffix, flips, place):
    """Flipped bytes, mostly in the last 30 kB and first 2 kB, where a file says what it holds; and whatever follows."""
    path = save(state(var), tmp_path / f"bytes{suffix}")
    content = bytearray(path.read_bytes())
    head = 2000 + int(place * 20000)
    for position, flip in flips:
        near_start = suffix == ".safetensors" or position < 0.3
        offset = int(position * head) if near_start else len(content) - 1 - int(position * 30000)
        content[offset] ^= flip
    path.write_bytes(content)
    model = tiny_var(vae)
    before = state(model)
    try:
        load_checkpoint(path, model=model)
    except CheckpointError as error:
        assert f"bytes{suffix}" in str(error)
        assert_same(state(model), before)


# ---- what is wrong: configs
def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '"demo"',
        "[" * 100_000,
        '{"format": "other"}',
        '{"format": "var_fast"}',
        "\x00",
        '{"format": 1e999}',
    ],
)
def test_a_config_that_is_none(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json: ") as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "part, keyword, value",
    [
        ("transformer", "depth", 10**9),
        ("transformer", "depth", -1),
        ("transformer", "depth", "2"),
        ("transformer", "depth", True),
        ("transformer", "depth", 2.0),
        ("transformer", "embed_dim", 10**30),
        ("transformer", "norm_eps", float("nan")),
        ("transformer", "mlp_ratio", float("inf")),
        ("transformer", "cond_drop_rate", 1.5),
        ("transformer", "shared_aln", 1),
        ("transformer", "patch_nums", [1, 2, 2]),
        ("transformer", "patch_nums", [1, 10**9]),
        ("transformer", "patch_nums", "123"),
        ("transformer", "vae_local", None),
        ("tokenizer", "ch_mult", [1] * 1000),
        ("tokenizer", "ch_mult", []),
        ("tokenizer", "vocab_size", None),
        ("tokenizer", "surprise\n", 1),
    ],
)
def test_an_absurd_config(folder, part, keyword, value):
    edit(folder, lambda config: config[part].update({keyword: value}))
    with pytest.raises(CheckpointError, match=f"config.json: {part}.*{keyword.strip()}.*expected") as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.update(version=2), "version is 2, expected 1"),
        (lambda c: c.update(extra=1), "unknown key 'extra'"),
        (lambda c: c.update(classes="abc"), "classes is 'abc'"),
        (lambda c: c.update(classes=["a", 1, "c"]), "classes is"),
        (lambda c: c.update(classes=["a"]), "classes has 1 names, expected 3"),
        (lambda c: c.update(image_size="6"), "image_size is '6'"),
        (lambda c: c.update(transformer=[]), r"transformer is \[\]"),
        (lambda c: c.pop("tokenizer"), "tokenizer is missing"),
    ],
)
def test_a_wrong_config(folder, change, words):
    edit(folder, change)
    with pytest.raises(CheckpointError, match=f"config.json: .*{words}"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "part, keyword, value, words",
    [
        ("transformer", "depth", 3, r"transformer.safetensors: blocks\.2\.attn\.scale_mul_1H11 is missing"),
        (
            "transformer",
            "num_heads",
            4,
            r"blocks\.0\.attn\.scale_mul_1H11 has shape \(1, 2, .*expected \(1, 4,",
        ),
        ("transformer", "num_heads", 3, "transformer.safetensors: embed_dim is 16, expected a multiple of num_heads"),
        ("transformer", "patch_nums", [1, 2], r"patch_nums is \(1, 2\), expected the tokenizer's \(1, 2, 3\)"),
        ("tokenizer", "v_patch_nums", [1, 2], r"patch_nums is \(1, 2, 3\), expected the tokenizer's \(1, 2\)"),
        ("tokenizer", "ch", 33, "tokenizer.safetensors: 33 channels, expected a multiple of 32"),
        ("tokenizer", "vocab_size", 25, r"quantize\.embedding\.weight has shape \(24, 4\), expected \(25, 4\)"),
    ],
)
def test_a_config_of_another_model(folder, part, keyword, value, words):
    edit(folder, lambda config: config[part].update({keyword: value}))
    if keyword == "vocab_size":  # the statistics come first in the state dict
        words = r"quantize\.ema_vocab_hit_SV has shape \(3, 24\), expected \(3, 25\)"
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(st.sampled_from(sorted(RULES["tokenizer"])) | st.text(max_size=4), JSON, max_size=3),
    st.dictionaries(st.sampled_from(sorted(RULES["transformer"])) | st.text(max_size=4), JSON, max_size=3) | JSON,
    JSON,
)
def test_any_json_is_accepted_or_refused_in_words(tokenizer, transformer, classes):
    config = dict(format="var_fast", version=1, tokenizer=tokenizer, transformer=transformer, classes=classes)
    try:
        check_config(config, "config.json")
    except CheckpointError as error:
        assert str(error).startswith("config.json: ") and "\n" not in str(error)
    else:
        assert set(tokenizer) <= set(RULES["tokenizer"]) and isinstance(classes, list)


# ---- failing writes
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", ["tokenizer.safetensors", "transformer.safetensors"])
def test_a_save_that_fails_leaves_the_old_files(folder, vae, var, monkeypatch, error, failing):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    whole_save = var_fast.checkpoint.save_file

    def save_half(tensors, path, **options):
        whole_save(tensors, path, **options)
        if failing in str(path):
            cut(Path(path), 0.5)
            raise error

    monkeypatch.setattr(var_fast.checkpoint, "save_file", save_half)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
        save_checkpoint(folder, tiny_vae(), tiny_var(vae, num_classes=5))
    if isinstance(error, OSError):
        assert f"{folder / failing}: cannot be written" in str(raised.value) and "No space left" in str(raised.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_save_replaces_the_old_files(folder, vae):
    new = tiny_var(vae, num_classes=5)
    save_checkpoint(folder, vae, new)
    loaded = load_checkpoint(folder)
    assert_same(state(loaded.var), state(new))
    assert loaded.classes is None
    assert len(list(folder.iterdir())) == 3


def test_a_place_that_cannot_be_written(tmp_path, vae):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/model: cannot be written: .*[Nn]ot a directory"):
        save_checkpoint(tmp_path / "file" / "model", vae)


def test_what_cannot_be_saved(tmp_path, vae, var):
    with pytest.raises(UserError, match="classes has 2 names, expected 3"):
        save_checkpoint(tmp_path / "model", vae, var, classes=["a", "b"])
    with pytest.raises(UserError, match="dtype is torch.int8"):
        save_checkpoint(tmp_path / "model", vae, var, dtype=torch.int8)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_mapped_weights_stay_in_the_file_until_they_change(tmp_path, suffix):
    var = VAR.from_pretrained("demo")
    path = tmp_path / f"var{suffix}"
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in var.state_dict().items()
    }
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    before = path.read_bytes()
    mapped = load_checkpoint(path, vae=var.vae_proxy[0], mapped=True, patch_nums=var.patch_nums)
    assert str(path) in Path("/proc/self/maps").read_text()
    for name, tensor in mapped.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(parameter.requires_grad for parameter in mapped.parameters())
    expected = Sampler(var, dtype="bfloat16").sample([1], [0])
    assert not [t for t in ModelWatch(mapped)._in_memory if any(t is p for p in mapped.parameters())]
    sampler = Sampler(mapped, dtype="bfloat16")  # packs the weights and lets their pages go
    assert torch.equal(sampler.sample([1], [0]), expected)
    for name, tensor in mapped.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    with torch.no_grad():
        mapped.head.weight.mul_(2)
    changed = sampler.sample([1], [0])
    assert not torch.equal(changed, expected)
    assert torch.equal(mapped.head.weight, 2 * state["head.weight"])  # what was changed is kept, in memory
    assert path.read_bytes() == before
