"""Pictures in a folder."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from var_fast.errors import UserError


def find_pictures(folder: str | Path) -> list[Path]:
    """Files below `folder`, at any depth, whose names say that they are pictures, in the order of their names.

    Raises UserError if there is no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist, expected a folder of pictures or a file")
    known = Image.registered_extensions()
    found = [
        Path(place) / name
        for place, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in known and not name.startswith(".")
    ]
    if not found:
        raise UserError(f"there are no pictures below {folder}")
    return sorted(found)
