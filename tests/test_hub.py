"""save_pretrained and from_pretrained: folders, the published files, a stand-in for the hub; models stay plain."""

from __future__ import annotations

import copy
import inspect
import pickle
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

import var_fast.checkpoint
from var_fast import VAR, VQVAE
from var_fast.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from var_fast.errors import UserError
from var_fast.layout import PUBLISHED_PATCH_NUMS

PATCH_NUMS = (1, 2, 3)
VAE = dict(vocab_size=24, z_channels=4, ch=32, ch_mult=(1, 1))


def tiny(patch_nums=PATCH_NUMS, **keywords):
    vae = VQVAE(**VAE, v_patch_nums=patch_nums)
    defaults = dict(num_classes=3, depth=2, embed_dim=16, num_heads=2, attn_l2_norm=True)
    return VAR(vae, patch_nums=patch_nums, **{**defaults, **keywords}).eval()


@pytest.fixture(scope="module")
def var():
    torch.manual_seed(0)
    return tiny()


@pytest.fixture
def published(tmp_path, var):
    """A folder with files of the published names, of tiny models."""
    folder = tmp_path / "published"
    folder.mkdir()
    torch.save(var.vae_proxy[0].state_dict(), folder / "vae_ch160v4096z32.pth")
    torch.save(var.state_dict(), folder / "var_d16.pth")
    return folder


def assert_same(model, expected):
    state = model.state_dict()
    assert list(state) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name


# ---- folders
def test_a_transformer_is_saved_with_its_tokenizer(tmp_path, var):
    var = copy.deepcopy(var)
    var.class_names = ["dots", "rings", "bars"]
    assert var.save_pretrained(tmp_path / "a") is None
    loaded = VAR.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(str(tmp_path / "b"))
    again = VAR.from_pretrained(str(tmp_path / "b"))
    for model in (loaded, again):
        assert type(model) is VAR and not model.training
        assert_same(model, var)
        assert_same(model.vae_proxy[0], var.vae_proxy[0])
        assert model.class_names == var.class_names
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert_same(VQVAE.from_pretrained(tmp_path / "a"), var.vae_proxy[0])
    assert_same(load_checkpoint(tmp_path / "a").var, var)


def test_a_tokenizer_alone(tmp_path, var):
    vae = var.vae_proxy[0]
    vae.save_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = VQVAE.from_pretrained(tmp_path)
    assert type(loaded) is VQVAE and not loaded.training and loaded.config == vae.config
    assert torch.equal(loaded.quant_conv.weight, vae.quant_conv.weight.bfloat16().float())
    with pytest.raises(CheckpointError, match="transformer.safetensors not found"):
        VAR.from_pretrained(tmp_path)


def test_keywords_reach_the_constructor(tmp_path, var):
    var.save_pretrained(tmp_path)
    assert VAR.from_pretrained(tmp_path, cond_drop_rate=0.0, depth=2).cond_drop_rate == 0
    assert VQVAE.from_pretrained(tmp_path, test_mode=False).encoder.conv_in.weight.requires_grad
    with pytest.raises(UserError, match="widht is no keyword"):
        VAR.from_pretrained(tmp_path, widht=3)
    with pytest.raises(CheckpointError, match="blocks.2.attn.scale_mul_1H11 is missing"):
        VAR.from_pretrained(tmp_path, depth=3)


def test_demo(tmp_path, var, monkeypatch):
    save_checkpoint(tmp_path, var.vae_proxy[0], var)
    monkeypatch.setattr(var_fast.checkpoint, "DEMO", tmp_path)
    assert_same(VAR.from_pretrained("demo"), var)
    assert_same(VQVAE.from_pretrained("demo"), var.vae_proxy[0])


def test_a_subclass_comes_back_as_itself(tmp_path, var):
    class MyVAR(VAR):
        pass

    class MyVQVAE(VQVAE):
        pass

    var.save_pretrained(tmp_path)
    assert type(MyVAR.from_pretrained(tmp_path)) is MyVAR
    assert type(MyVQVAE.from_pretrained(tmp_path)) is MyVQVAE


# ---- the published files
def test_published_names_in_a_local_folder(published, var):
    loaded = VAR.from_pretrained(published, depth=16)
    assert_same(loaded, var)
    assert_same(loaded.vae_proxy[0], var.vae_proxy[0])
    assert_same(VQVAE.from_pretrained(str(published), patch_nums=PATCH_NUMS), var.vae_proxy[0])
    vae = copy.deepcopy(var.vae_proxy[0])
    assert VAR.from_pretrained(published, depth=16, vae=vae).vae_proxy[0] is vae


def test_the_512_px_file_gets_a_512_px_tokenizer(published):
    """Both published pyramids have ten scales; the tokenizer's file, trained at 256 px, cannot tell which is wanted."""
    pyramids = {size: PUBLISHED_PATCH_NUMS[size] for size in (256, 512)}
    with torch.no_grad():
        small = VQVAE(**VAE, v_patch_nums=pyramids[256])
        large = tiny(pyramids[512], depth=1, embed_dim=4, num_heads=1)
    torch.save(small.state_dict(), published / "vae_ch160v4096z32.pth")
    torch.save(dict(large.named_parameters()), published / "var_d36.pth")  # as published files may be: without buffers
    loaded = VAR.from_pretrained(published, depth=36)
    assert loaded.patch_nums == loaded.vae_proxy[0].quantize.v_patch_nums == pyramids[512]
    assert_same(loaded, large)
    assert VQVAE.from_pretrained(published).quantize.v_patch_nums == pyramids[256]


def test_what_a_folder_lacks(published, tmp_path):
    with pytest.raises(CheckpointError, match="config.json not found .*that or var_d20.pth"):
        VAR.from_pretrained(published, depth=20)
    with pytest.raises(CheckpointError, match="config.json not found .*depth=16, 20, 24, 30 or 36"):
        VAR.from_pretrained(published)
    (published / "vae_ch160v4096z32.pth").unlink()
    with pytest.raises(CheckpointError, match="vae_ch160v4096z32.pth not found"):
        VAR.from_pretrained(published, depth=16)
    with pytest.raises(CheckpointError, match="var_d16.pth: is a file"):
        VAR.from_pretrained(published / "var_d16.pth")


# ---- the hub
class FakeHub:
    """Stands in for hf_hub_download: copies files of one folder to a cache."""

    def __init__(self, folder, cache):
        self.folder, self.cache, self.asked = folder, cache, []
        cache.mkdir()

    def __call__(self, repo_id, filename, **options):
        self.asked.append((repo_id, filename))
        self.options = options
        if not (self.folder / filename).exists():
            raise EntryNotFoundError(f"404: {filename}")
        return shutil.copy(self.folder / filename, self.cache / filename)


def test_published_files_are_asked_for_by_name(published, tmp_path, var, monkeypatch):
    hub = FakeHub(published, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    loaded = VAR.from_pretrained("FoundationVision/var", depth=16, revision="main", token=False)
    assert_same(loaded, var)
    assert hub.asked == [
        ("FoundationVision/var", "var_d16.pth"),
        ("FoundationVision/var", "vae_ch160v4096z32.pth"),
    ]
    assert hub.options["revision"] == "main" and hub.options["token"] is False
    with pytest.raises(CheckpointError, match="FoundationVision/var: config.json not found .*no such file"):
        VAR.from_pretrained("FoundationVision/var")


def test_a_repository_with_our_files(tmp_path, var, monkeypatch):
    var.save_pretrained(tmp_path / "ours")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", FakeHub(tmp_path / "ours", tmp_path / "cache"))
    assert_same(VAR.from_pretrained("someone/emoji"), var)
    hub = FakeHub(tmp_path / "ours", tmp_path / "cache for the tokenizer alone")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    assert_same(VQVAE.from_pretrained("someone/emoji"), var.vae_proxy[0])
    assert ("someone/emoji", "transformer.safetensors") not in hub.asked


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), ConnectionError("no route\nto host"), OSError()])
@pytest.mark.parametrize("cls, keywords", [(VAR, dict(depth=16)), (VAR, {}), (VQVAE, {})])
def test_no_network_is_one_clear_error(monkeypatch, error, cls, keywords):
    asked_outside = []

    def unreachable(*args, local_files_only, **options):
        asked_outside.append(not local_files_only)
        raise LocalEntryNotFoundError("not in the cache") if local_files_only else error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(CheckpointError, match="^FoundationVision/var: .* no local folder, .* reached") as raised:
        cls.from_pretrained("FoundationVision/var", **keywords)
    assert "\n" not in str(raised.value)
    assert asked_outside == [True, False][: len(asked_outside)], "each wait for a hub out of reach takes half a minute"


def test_an_empty_cache_and_no_leave_to_ask(tmp_path):
    with pytest.raises(CheckpointError, match="^FoundationVision/var: .*hub cannot be reached or is not to be asked"):
        VAR.from_pretrained("FoundationVision/var", depth=16, cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(CheckpointError, match="^no/such/folder: .*refused"):
        VAR.from_pretrained("no/such/folder", depth=16)


def test_push_to_hub(tmp_path, var, monkeypatch):
    pushed = {}

    class FakeApi:
        def __init__(self, **options):
            pass

        def create_repo(self, repo_id, **options):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **options):
            pushed[repo_id] = sorted(path.name for path in folder_path.iterdir())
            return "the commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", FakeApi)
    assert var.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="someone/emoji") == "the commit"
    assert pushed == {"someone/emoji": ["README.md", "config.json", "tokenizer.safetensors", "transformer.safetensors"]}
    assert not (tmp_path / "model" / "README.md").exists()
    with pytest.raises(UserError, match="config is given"):
        var.save_pretrained(tmp_path / "model", config={})


# ---- the models stay plain modules
def test_the_mixin_leaves_the_constructors_alone(var):
    assert issubclass(VAR, huggingface_hub.ModelHubMixin) and issubclass(VQVAE, huggingface_hub.ModelHubMixin)
    assert next(iter(inspect.signature(VAR).parameters)) == "vae_local"
    assert list(inspect.signature(VQVAE).parameters)[:3] == ["vocab_size", "z_channels", "ch"]
    model = VAR(var.vae_proxy[0], 5, 1, 16, 2, patch_nums=PATCH_NUMS)
    assert (model.num_classes, model.depth) == (5, 1)
    assert not [name for name in vars(model) if name.startswith("_hub")], "nothing is recorded while constructing"
    with pytest.raises(TypeError):
        VAR(var.vae_proxy[0], patch_nums=PATCH_NUMS, config={})
    with pytest.raises(TypeError):
        VAR()


def test_copies_and_pickles(var):
    for model in (copy.deepcopy(var), pickle.loads(pickle.dumps(var))):
        assert_same(model, var)
        assert model.config == var.config and model.vae_proxy[0] is not var.vae_proxy[0]


def test_models_are_built_on_the_meta_device():
    with torch.device("meta"):
        model = tiny()
    assert all(tensor.is_meta for tensor in model.state_dict().values())
