"""Loading and saving checkpoints: all is checked before anything is copied; a failed save leaves the old files."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from var_fast.checkpoint_files import (
    CONFIG_NAME,
    FORMAT,
    VERSION,
    Contents,
    Part,
    check_config,
    first_line,
    read_contents,
)
from var_fast.errors import UserError
from var_fast.layout import (
    HIT_COUNTS,
    RULES,
    CheckpointError,
    check_keywords,
    least_elements,
    patch_nums_of_levels,
    shown,
    tokenizer_keywords,
    transformer_keywords,
)
from var_fast.models import VAR, VQVAE
from var_fast.models.no_initialisation import NoInitialisation

__all__ = ["Checkpoint", "CheckpointError", "load_checkpoint", "save_checkpoint"]

DEMO = Path(__file__).parent / "demo"
PART_CLASSES: dict[str, type[nn.Module]] = {"tokenizer": VQVAE, "transformer": VAR}
NOT_IN_SHAPES = ("num_heads", "norm_eps", "quant_resi", "using_znorm")  # they change results, but no shape
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Checkpoint(NamedTuple):
    """Both models of a checkpoint. `var` and `classes`, the names of the classes by number, are None where it has none;
    `config` is what config.json says, empty for a single file."""

    vae: VQVAE
    var: VAR | None
    classes: list[str] | None
    config: dict[str, Any]


def load_checkpoint(
    path: str | os.PathLike[str],
    model: VQVAE | VAR | None = None,
    *,
    vae: VQVAE | str | os.PathLike[str] | None = None,
    mapped: bool = False,
    **keywords: Any,
) -> VQVAE | VAR | Checkpoint:
    """Read a checkpoint into new models on the CPU in evaluation mode, or into `model`. No code in a file is ever run.

    `path` is one of

    - a tokenizer's file, .pth or .safetensors: returns a VQVAE;
    - a transformer's file: returns a VAR around `vae`, a VQVAE or the path of its file;
    - a file of the published trainer, which holds both: returns a Checkpoint (vae, var, classes, config);
    - a directory written by `save_checkpoint` or `save_pretrained`, or "demo", the model in this package: a Checkpoint.

    Constructor keywords are deduced from shapes and, in a directory, read from config.json. `keywords` are for what
    neither tells: `patch_nums` where a pyramid is not a published one, `num_heads` with plain attention, `quant_resi`,
    `using_znorm`, `norm_eps`, the drop rates. With `model`, its part of the checkpoint is copied into it, cast to its
    types, and it is returned. Buffers may be missing: they stay as constructed.

    `mapped`: weights of new models that the file has in the model's type stay in the file and come into memory when
    they are used, so the file must not be written over meanwhile (replacing it by a renamed one does no harm). Changes
    made to such weights stay in memory.

    Raises CheckpointError that names the file and the first wrong entry, in the order of the model's state dict, before
    anything is copied; UserError for arguments that do not go together.
    """
    contents = read_contents(DEMO if path == "demo" else Path(path))
    if model is not None:
        if vae is not None or keywords:
            raise UserError(f"{next(iter(keywords), 'vae')} is given beside model, expected one of the two")
        return _load_into(model, contents)
    loaded = build_models(contents, vae=vae, keywords=keywords, mapped=mapped)
    if contents.config is not None or len(contents.parts) > 1:
        return loaded
    return loaded.vae if loaded.var is None else loaded.var


def save_checkpoint(
    directory: str | os.PathLike[str],
    vae: VQVAE,
    var: VAR | None = None,
    *,
    classes: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `vae`, `var` and config.json to `directory`, for `load_checkpoint`. `dtype`: cast parameters to this type.

    All files are written under other names first: if that fails, the directory is as it was.
    Raises CheckpointError where it cannot be written, UserError for bad arguments.
    """
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f"dtype is {dtype}, expected one of {', '.join(map(str, FLOATS))}")
    directory = Path(directory)
    config: dict[str, Any] = {"format": FORMAT, "version": VERSION, "tokenizer": vae.config}
    models: dict[str, nn.Module] = {"tokenizer": vae}
    if var is not None:
        models["transformer"] = var
        config.update(transformer=var.config, image_size=vae.quantize.v_patch_nums[-1] * vae.downsample)
    if classes is not None:
        config["classes"] = list(classes)
        if var is None or len(classes) != var.num_classes:
            raise UserError(f"classes has {len(classes)} names, expected {var.num_classes if var else 'none'}")
    check_config(config, str(directory / CONFIG_NAME))

    suffix = f".{os.getpid()}.{secrets.token_hex(4)}.tmp"
    new_files: list[tuple[Path, Path]] = []
    target = directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_NAME, *(f"{part}.safetensors" for part in models)):
            target, new = directory / name, directory / f".{name}{suffix}"
            new_files.append((new, target))
            if name == CONFIG_NAME:
                new.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
                mode = new.stat().st_mode
            else:
                save_file(_tensors_to_save(models[target.stem], dtype), new, metadata={"format": "pt"})
                new.chmod(mode)  # safetensors makes files that only their owner can read
            with open(new, "rb+") as file:
                os.fsync(file.fileno())
        for new, target in reversed(new_files):
            os.replace(new, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: cannot be written: {first_line(error)}") from error
    finally:
        for new, _ in new_files:
            new.unlink(missing_ok=True)


def _tensors_to_save(model: nn.Module, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    parameters = {name for name, _ in model.named_parameters()}
    return {
        name: tensor.detach().to("cpu", dtype if name in parameters else None).contiguous()
        for name, tensor in model.state_dict().items()
    }


def build_models(
    contents: Contents,
    *,
    vae: VQVAE | str | os.PathLike[str] | None = None,
    keywords: Mapping[str, Any],
    mapped: bool = False,
    vae_class: type[VQVAE] = VQVAE,
    var_class: type[VAR] = VAR,
) -> Checkpoint:
    """New models from what was read: arguments and errors as in `load_checkpoint`; the classes may be subclasses."""
    parts = dict(contents.parts)
    if vae is not None and "transformer" not in parts:
        raise UserError(f"vae is given, but {contents.path} holds no transformer to go with it")
    if isinstance(vae, VQVAE):
        parts.pop("tokenizer", None)
    elif vae is not None:
        parts["tokenizer"] = read_contents(Path(vae), only="tokenizer").parts["tokenizer"]
    elif "tokenizer" not in parts:
        raise UserError(f"{contents.path}: is a transformer, expected its tokenizer too: vae=, a VQVAE or its file")
    given = _keywords_by_part(keywords, parts, contents.path)

    var_keywords: dict[str, Any] = {}
    if "transformer" in parts:
        var_keywords = _transformer_keywords(parts["transformer"], given["transformer"], vae)
    if not isinstance(vae, VQVAE):
        vae_keywords = _tokenizer_keywords(parts["tokenizer"], given["tokenizer"], var_keywords.get("patch_nums"))
        vae = _build(vae_class, (), vae_keywords, parts["tokenizer"], mapped)
    config = contents.config or {}
    classes = config.get("classes")
    if "transformer" not in parts:
        return Checkpoint(vae, None, classes, config)

    patch_nums = tuple(var_keywords["patch_nums"])
    if patch_nums != vae.quantize.v_patch_nums:
        where = parts["transformer"].path
        raise CheckpointError(
            f"{where}: patch_nums is {patch_nums}, expected the tokenizer's {vae.quantize.v_patch_nums}"
        )
    if classes is not None and len(classes) != var_keywords["num_classes"]:
        where = contents.path / CONFIG_NAME
        raise CheckpointError(f"{where}: classes has {len(classes)} names, expected {var_keywords['num_classes']}")
    var = _build(var_class, (vae,), var_keywords, parts["transformer"], mapped)
    var.class_names = classes
    return Checkpoint(vae, var, classes, config)


def _keywords_by_part(keywords: Mapping[str, Any], parts: Mapping[str, Part], path: Path) -> dict[str, dict[str, Any]]:
    by_part = {part: {k: v for k, v in keywords.items() if k in RULES[part]} for part in PART_CLASSES}
    if "patch_nums" in keywords:
        by_part["tokenizer"].setdefault("v_patch_nums", keywords["patch_nums"])
    for name in keywords:
        if not any(name in by_part[part] for part in parts) and name != "patch_nums":
            raise UserError(f"{name} is no keyword of the {' or '.join(parts)}, which is what is built from {path}")
    return by_part


def _transformer_keywords(part: Part, given: dict[str, Any], vae: Any) -> dict[str, Any]:
    where = str(part.path)
    keywords = transformer_keywords(_shapes(part), where, _levels(part))
    if isinstance(vae, VQVAE):
        keywords.setdefault("patch_nums", vae.quantize.v_patch_nums)
    keywords.update(part.keywords)
    keywords.update(given)
    if "patch_nums" not in keywords:
        raise CheckpointError(
            f"{where}: pos_1LC is of no published pyramid, expected patch_nums=(1, 2, ...) to be given"
        )
    if "num_heads" not in keywords:
        raise CheckpointError(f"{where}: plain attention does not show its heads, expected num_heads= given")
    check_keywords("transformer", keywords, where)
    return keywords


def _tokenizer_keywords(part: Part, given: dict[str, Any], patch_nums: Sequence[int] | None) -> dict[str, Any]:
    where = str(part.path)
    keywords = tokenizer_keywords(_shapes(part), where)
    if patch_nums is not None:
        keywords["v_patch_nums"] = patch_nums
    keywords.update(part.keywords)
    keywords.update(given)
    if "v_patch_nums" not in keywords:
        raise CheckpointError(f"{where}: {HIT_COUNTS} is of no published pyramid, expected patch_nums=(1, ...) given")
    check_keywords("tokenizer", keywords, where)
    return keywords


def _shapes(part: Part) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in part.entries.items()}


def _levels(part: Part) -> torch.Tensor | None:
    """The buffer `lvl_1L`, found to be as long as `pos_1LC`."""
    levels = part.entries.get("lvl_1L")
    if levels is not None and "pos_1LC" in part.entries:
        expected = torch.empty(1, *part.entries["pos_1LC"].shape[1:2], dtype=torch.int64, device="meta")
        _check_entry("lvl_1L", expected, levels, part.path)
    return levels


def _build(cls: type[nn.Module], args: tuple[Any, ...], keywords: dict[str, Any], part: Part, mapped: bool) -> Any:
    room, elements = part.path.stat().st_size, 0
    for name, tensor in part.entries.items():
        room, elements = room - tensor.nbytes, elements + tensor.numel()
        if room < 0:  # a stride of 0 makes any shape out of one number
            raise CheckpointError(f"{part.path}: {name} has shape {tuple(tensor.shape)}, more than the file can hold")
    kind = "tokenizer" if issubclass(cls, VQVAE) else "transformer"
    try:
        if least_elements(kind, keywords) > elements:  # the first wrong entry can be named without the memory
            with torch.device("meta"), NoInitialisation():
                _check_fit(cls(*args, **keywords), part)
        with torch.random.fork_rng(devices=[]), NoInitialisation():
            model = cls(*args, **keywords)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{part.path}: {first_line(error)}") from error
    _check_fit(model, part)
    (_assign if mapped else _copy)(model, part)
    return model.eval()


def _load_into(model: VQVAE | VAR, contents: Contents) -> VQVAE | VAR:
    kind = next((name for name, cls in PART_CLASSES.items() if isinstance(model, cls)), None)
    if kind is None:
        raise UserError(f"model is a {type(model).__name__}, expected a VQVAE or a VAR")
    if kind not in contents.parts:
        raise CheckpointError(f"{contents.path}: is a {next(iter(contents.parts))}, expected a {kind}")
    part = contents.parts[kind]
    for name in NOT_IN_SHAPES:
        found, expected = part.keywords.get(name), model.config.get(name)
        if found not in (None, expected):
            raise CheckpointError(f"{contents.path / CONFIG_NAME}: {name} is {found}, expected the model's {expected}")
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise UserError(f"model holds no values, {name} is on the meta device: expected a model on a real one")
    _check_fit(model, part)
    _copy(model, part)
    return model


def _check_fit(model: nn.Module, part: Part) -> None:
    """Raise on the first entry that the file lacks or that does not fit `model`. Nothing is copied."""
    own = model.state_dict()
    buffers = {name for name, _ in model.named_buffers()}
    for name, expected in own.items():
        if name in part.entries:
            _check_entry(name, expected, part.entries[name], part.path)
        elif name not in buffers:
            raise CheckpointError(f"{part.path}: {name} is missing, expected shape {tuple(expected.shape)}")
    for name, found in part.entries.items():
        if name not in own:
            raise CheckpointError(
                f"{part.path}: {shown(name)} has shape {tuple(found.shape)}, expected no such entry in this model"
            )
    if "lvl_1L" in part.entries:
        patch_nums = patch_nums_of_levels(part.entries["lvl_1L"], str(part.path))
        if patch_nums != model.patch_nums:
            raise CheckpointError(f"{part.path}: lvl_1L is of patch_nums {patch_nums}, expected {model.patch_nums}")


def _check_entry(name: str, expected: torch.Tensor, found: torch.Tensor, path: Path) -> None:
    skip = 1 if name == HIT_COUNTS else 0  # the file's statistics may be of another number of scales
    if found.dim() != expected.dim() or found.shape[skip:] != expected.shape[skip:]:
        raise CheckpointError(f"{path}: {name} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if found.dtype not in (FLOATS if expected.is_floating_point() else INTEGERS):
        raise CheckpointError(f"{path}: {name} has type {found.dtype}, expected {expected.dtype}")


def _copy(model: nn.Module, part: Part) -> None:
    own = model.state_dict()
    model.load_state_dict({name: part.entries.get(name, own[name]) for name in own})


def _assign(model: nn.Module, part: Part) -> None:
    """As `_copy`, but tensors that have the model's type become its own as they are."""
    own = model.state_dict()

    def fitting(name: str) -> torch.Tensor:
        found = part.entries.get(name, own[name])
        as_it_is = found.dtype == own[name].dtype and found.is_contiguous()
        return found if as_it_is else own[name].copy_(found)

    model.load_state_dict({name: fitting(name) for name in own}, assign=True)
