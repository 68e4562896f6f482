"""Reading checkpoint files and directories into state dicts. No code in them is run; nothing is built here."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from var_fast.layout import PARTS, CheckpointError, check_keywords, kind_of, shown

CONFIG_NAME = "config.json"
FORMAT, VERSION = "var_fast", 1
TRAINER_NAMES = {"tokenizer": "vae_local", "transformer": "var_wo_ddp"}  # in files of the published trainer


class Part(NamedTuple):
    """One model's state dict, as found in the file `path`, and the constructor keywords that came with it."""

    path: Path
    entries: Mapping[str, torch.Tensor]
    keywords: dict[str, Any]


class Contents(NamedTuple):
    """The parts of a checkpoint by name, "tokenizer" and "transformer"; `config` is None for a single file."""

    path: Path
    parts: dict[str, Part]
    config: dict[str, Any] | None


def read_contents(path: Path, only: str | None = None) -> Contents:
    """The state dicts in a file or directory, or just the part `only`. Raises CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    parts, config = {}, None
    if path.is_dir():
        config = _read_config(path / CONFIG_NAME)
        for name in PARTS:
            if name in config and only in (None, name):
                file = path / f"{name}.safetensors"
                parts[name] = Part(file, _check_entries(_read_file(file), file), config[name])
    else:
        for name, found in _pick_state_dicts(_read_file(path), path).items():
            if only in (None, name):
                parts[name] = Part(path, _check_entries(found, path), {})
    if not parts:
        raise CheckpointError(f"{path}: holds no {only}")
    return Contents(path, parts, config)


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on old formats; what is wrong is raised
            # A map of the file saves a second copy in memory. Nothing keeps it: entries are copied into models.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged bytes lead the readers to raise nearly anything
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        if forbidden:
            raise CheckpointError(f"{path}: asks to run {forbidden[1]}, expected nothing but tensors") from None
        # torch's own words here advise to run the file's code
        reason = "it asks for more than tensors" if "weights_only" in str(error) else first_line(error)
        raise CheckpointError(f"{path}: is damaged or no checkpoint at all: {reason}") from None


def _pick_state_dicts(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    trainer = content.get("trainer", content)
    if isinstance(trainer, Mapping):
        picked = {part: trainer[name] for part, name in TRAINER_NAMES.items() if name in trainer}
        if picked:
            return picked
    kind = kind_of(str(name) for name in content)
    if kind is None:
        first = f", the first is {shown(next(iter(content)))}" if content else ""
        raise CheckpointError(f"{path}: no entry belongs to a tokenizer or a transformer{first}")
    return {kind: content}


def _check_entries(content: Any, path: Path) -> Mapping[str, torch.Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: {shown(name)} is a {type(value).__name__}, expected a tensor")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_nested or value.is_quantized:
            raise CheckpointError(
                f"{path}: {shown(name)} is a {value.layout} tensor on {value.device}, expected a plain one with values"
            )
    return content


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: holds no {CONFIG_NAME}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {first_line(error)}") from None
    check_config(config, str(path))
    return config


def check_config(config: Any, where: str) -> None:
    """Raise CheckpointError on the first thing in a config.json that is missing, unknown or absurd."""
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f'{where}: expected a configuration of this library, with "format": "{FORMAT}"')
    if config.get("version") != VERSION:
        raise CheckpointError(f"{where}: version is {shown(config.get('version'))}, expected {VERSION}")
    for name in config:
        if name not in ("format", "version", *PARTS, "classes", "image_size"):
            raise CheckpointError(f"{where}: has the unknown key {shown(name)}")
    if "tokenizer" not in config:
        raise CheckpointError(f"{where}: tokenizer is missing, expected its keywords")
    for part in PARTS:
        keywords = config.get(part, {})
        if not isinstance(keywords, dict):
            raise CheckpointError(f"{where}: {part} is {shown(keywords)}, expected its keywords")
        check_keywords(part, keywords, where)
    classes = config.get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{where}: classes is {shown(classes)}, expected a list of names")
    if type(config.get("image_size", 1)) is not int:
        raise CheckpointError(f"{where}: image_size is {shown(config['image_size'])}, expected a whole number")


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
