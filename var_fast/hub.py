"""save_pretrained, from_pretrained and push_to_hub of the models, as users of huggingface_hub know them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from var_fast.errors import UserError

PUBLISHED_TOKENIZER = "vae_ch160v4096z32.pth"
PUBLISHED_TRANSFORMER = "var_d{depth}.pth"


class _Source:
    """A local folder, the packaged "demo", or a repository on the hub."""

    def __init__(self, name: str | os.PathLike[str], options: dict[str, Any]):
        from var_fast.checkpoint import DEMO, CheckpointError

        self.name, self.options, self.trouble = str(name), options, ""
        self.folder = DEMO if name == "demo" else Path(name) if Path(name).is_dir() else None
        if self.folder is None and Path(name).is_file():
            raise CheckpointError(f"{name}: is a file, expected a folder or a repository: load_checkpoint reads files")

    def find(self, filename: str) -> Path | None:
        """The file's path on this machine; None if there is no such file, or if the hub is in `trouble`."""
        if self.folder is not None:
            return self.folder / filename if (self.folder / filename).exists() else None
        try:
            return Path(huggingface_hub.hf_hub_download(self.name, filename, **self.options))
        except LocalEntryNotFoundError:
            trouble = "the hub cannot be reached or is not to be asked"
        except EntryNotFoundError:
            return None
        except Exception as error:  # the hub's client raises the errors of whichever http library it uses
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            trouble = f"the hub refused or cannot be reached: {reason}"
        self.trouble = self.trouble or f"it is no local folder, and {trouble}"
        self.options["local_files_only"] = True  # asking again would only wait again
        return None

    def require(self, filename: str, what: str) -> Path:
        from var_fast.checkpoint import CheckpointError

        path = self.find(filename)
        if path is None:
            reason = self.trouble or "it has no such file"
            raise CheckpointError(f"{self.name}: {filename} not found ({reason}), expected {what}")
        return path


class _HubMixin(
    huggingface_hub.ModelHubMixin,
    library_name="var_fast",
    license="mit",
    paper_url="https://arxiv.org/abs/2404.02905",
):
    """What both models share. Constructing, pickling and copying are those of a plain nn.Module."""

    def __new__(cls, *args: Any, **kwargs: Any):
        # ModelHubMixin would record the constructor's arguments at this place; the models keep their own `config`.
        return super(huggingface_hub.ModelHubMixin, cls).__new__(cls)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        config: None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the model to a directory (see `save_checkpoint`); `dtype` casts the parameters.

        The rest is huggingface_hub's: `push_to_hub` uploads to `repo_id` and returns the commit's address;
        `model_card_kwargs` adds a model card, README.md. Raises CheckpointError if the directory cannot be written.
        """
        if config is not None:
            raise UserError("config is given, expected None: a model writes the configuration it was built with")
        directory = Path(save_directory)
        self._save_pretrained(directory, dtype)
        if model_card_kwargs is not None:
            self.generate_model_card(**model_card_kwargs).save(directory / "README.md")
        if push_to_hub:
            return self.push_to_hub(
                repo_id or directory.name, model_card_kwargs=model_card_kwargs or {}, **push_to_hub_kwargs
            )
        return None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **model_kwargs: Any,
    ):
        """A model on the CPU, in evaluation mode, from a folder that save_pretrained wrote, a repository with the same
        files, "demo", or the published files: ("FoundationVision/var", depth=16), or a local folder that holds them.

        `model_kwargs` are the keywords of `load_checkpoint`, of VAR also `depth`, which of the published files to take
        (36 is for 512 px), and `vae`, a tokenizer at hand. The other arguments are hf_hub_download's.
        Raises CheckpointError if files are not found, the hub cannot be reached, or a file is wrong.
        """
        options = dict(
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        return cls._from_source(_Source(pretrained_model_name_or_path, options), **model_kwargs)


class TokenizerHubMixin(_HubMixin):
    """For VQVAE: its directory holds config.json and tokenizer.safetensors."""

    def _save_pretrained(self, save_directory: Path, dtype: torch.dtype | None = None) -> None:
        from var_fast.checkpoint import save_checkpoint

        save_checkpoint(save_directory, self, dtype=dtype)

    @classmethod
    def _from_source(cls, source: _Source, **keywords: Any):
        from var_fast.checkpoint import build_models, read_contents

        path = source.find(PUBLISHED_TOKENIZER)
        if path is None:
            path = source.require("config.json", f"that or {PUBLISHED_TOKENIZER}").parent
            source.require("tokenizer.safetensors", "it beside config.json")
        return build_models(read_contents(path, only="tokenizer"), keywords=keywords, vae_class=cls).vae


class TransformerHubMixin(_HubMixin):
    """For VAR: its directory holds config.json, transformer.safetensors and its tokenizer's tokenizer.safetensors."""

    class_names: list[str] | None = None
    """Names of the classes by number, where the checkpoint gives them; saved with the model."""

    def _save_pretrained(self, save_directory: Path, dtype: torch.dtype | None = None) -> None:
        from var_fast.checkpoint import save_checkpoint

        save_checkpoint(save_directory, self.vae_proxy[0], self, classes=self.class_names, dtype=dtype)

    @classmethod
    def _from_source(cls, source: _Source, *, depth: int | None = None, vae: Any = None, **keywords: Any):
        from var_fast.checkpoint import build_models, read_contents

        published = None if depth is None else source.find(PUBLISHED_TRANSFORMER.format(depth=depth))
        if published is not None:
            contents = read_contents(published, only="transformer")
            vae = source.require(PUBLISHED_TOKENIZER, "the tokenizer, or vae=") if vae is None else vae
        else:
            instead = "depth=16, 20, 24, 30 or 36 for a published file"
            if depth is not None:
                keywords["depth"], instead = depth, f"that or {PUBLISHED_TRANSFORMER.format(depth=depth)}"
            folder = source.require("config.json", instead).parent
            source.require("tokenizer.safetensors", "it beside config.json")
            source.require("transformer.safetensors", "it beside config.json")
            contents = read_contents(folder)
        return build_models(contents, vae=vae, keywords=keywords, var_class=cls).var
