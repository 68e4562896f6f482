"""Pictures in and out: PNG files, grids, strips, PSNR. torch and Pillow only."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin

from var_fast.errors import UserError

# Not all that Pillow knows: of some formats it asks other programs, which a picture from anywhere must not start.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def load_image(path: str | os.PathLike[str], size: int | None = None, resize: bool = False) -> torch.Tensor:
    """Reads a picture as float32 (3, H, W) in [-1, 1], upright (EXIF), transparency laid over white.

    `size`: the side that the picture must have (None: any). With `resize`, its centre square is scaled to that side
    instead of refusing other sizes. Raises UserError if the file cannot be read or has another size.
    """
    try:
        with warnings.catch_warnings():
            # A picture of absurd size is an error here, not a remark on stderr.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                picture = to_rgb(ImageOps.exif_transpose(file))
    except Image.UnidentifiedImageError:
        raise UserError(f"cannot read image {str(path)!r}: not a picture in a known format") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"cannot read image {str(path)!r}: {_reason(error)}") from None

    if size is not None and picture.size != (size, size):
        if not resize:
            found = f"{picture.width} x {picture.height} pixels"
            raise UserError(f"image {str(path)!r} is {found}, expected {size} x {size} (--resize crops and scales it)")
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS, centering=(0.5, 0.5))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).float().div(127.5).sub(1.0).contiguous()


def to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        # Pillow would clip 16-bit greys at 255. 65535 = 257 * 255; the addition makes its truncation a rounding.
        return picture.point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixel format {picture.mode!r} has no known range, expected 8 or 16 bits per channel")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def psnr(a: torch.Tensor, b: torch.Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB of two pictures whose values span `peak`; inf where they are equal.

    peak = 1 for values in [0, 1], 2 for values in [-1, 1].
    """
    if a.shape != b.shape:
        raise ValueError(f"psnr: shapes {tuple(a.shape)} and {tuple(b.shape)} differ")
    mse = (a.double() - b.double()).square().mean()
    return float(10.0 * torch.log10(peak * peak / mse))


def make_grid(
    images_B3HW: torch.Tensor,
    columns: int | None = None,
    upscale: int = 1,
    padding: int = 2,
    mode: str = "bicubic",
    background: float = 1.0,
) -> torch.Tensor:
    """Lays B pictures in [0, 1] out row by row.

    Returns (3, rows (H u + p) + p, columns (W u + p) + p), where u = upscale and p = padding (pixels).
    `columns`: None gives the squarest grid. `mode` ("nearest" or "bicubic") enlarges each picture `upscale` times.
    The gaps and the empty cells of the last row have the value `background`.
    """
    if images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3 or len(images_B3HW) == 0:
        raise ValueError(f"make_grid: images have shape {tuple(images_B3HW.shape)}, expected (B >= 1, 3, H, W)")
    if columns is None:
        columns = squarest(len(images_B3HW))
    if columns < 1 or upscale < 1 or padding < 0:
        raise ValueError(f"make_grid: columns={columns}, upscale={upscale}, padding={padding}: too small")
    tiles_B3HW = images_B3HW.float()
    if upscale > 1:
        tiles_B3HW = F.interpolate(tiles_B3HW, scale_factor=upscale, mode=mode).clamp(0.0, 1.0)
    count, _, height, width = tiles_B3HW.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    extent = (rows * (height + padding) + padding, columns * (width + padding) + padding)
    grid = tiles_B3HW.new_full((3, *extent), background)
    for index, tile_3HW in enumerate(tiles_B3HW):
        top = padding + (index // columns) * (height + padding)
        left = padding + (index % columns) * (width + padding)
        grid[:, top : top + height, left : left + width] = tile_3HW
    return grid


def make_strip(
    steps: Sequence[torch.Tensor], upscale: int = 1, padding: int = 2, mode: str = "bicubic"
) -> torch.Tensor:
    """A row per image, a column per step; `steps`: K tensors (B, 3, H, W) in [0, 1], for instance one per scale."""
    tiles_BK3HW = torch.stack(list(steps), dim=1)
    return make_grid(tiles_BK3HW.flatten(0, 1), len(steps), upscale, padding, mode)


def squarest(count: int) -> int:
    """The number of columns of the squarest grid of `count` cells: the smallest c with c * c >= count."""
    columns = max(1, int(count**0.5))
    return columns if columns * columns >= count else columns + 1


def save_png(image_3HW: torch.Tensor, path: str | os.PathLike[str], text: Mapping[str, str] | None = None) -> None:
    """Writes a picture in [0, 1] as 8-bit PNG, whole or not at all; `text` becomes PNG text chunks.

    Values are rounded to the nearest of 256 levels. Raises ValueError if the picture is not finite, UserError if it
    cannot be written; an older file of that name then stays as it was.
    """
    if image_3HW.ndim != 3 or image_3HW.shape[0] != 3:
        raise ValueError(f"save_png: image has shape {tuple(image_3HW.shape)}, expected (3, H, W)")
    if not bool(torch.isfinite(image_3HW).all()):
        raise ValueError("save_png: image has values that are not finite")
    levels_3HW = image_3HW.detach().float().cpu().clamp(0, 1).mul(255).round().to(torch.uint8)
    picture = Image.fromarray(levels_3HW.permute(1, 2, 0).contiguous().numpy())
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=chunks)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yields the name of an empty temporary file beside `path`, which becomes `path` if the block ends well.

    Nothing is left if the block raises, Ctrl-C included. Raises UserError if the file cannot be written. Symbolic
    links are followed.
    """
    target = _target(path)
    try:
        temporary = _temporary_beside(target)
        try:
            yield temporary
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {_reason(error)}") from None


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises UserError if `path` could not be written now; makes and removes a temporary file beside it."""
    target = _target(path)
    try:
        # Trying is the only sure way: os.access tells root yes, and knows nothing of quotas.
        os.unlink(_temporary_beside(target))
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {_reason(error)}") from None


def _temporary_beside(target: str) -> str:
    temporary = os.path.join(os.path.dirname(target), f".var_fast-{secrets.token_hex(6)}.tmp")
    # Not tempfile: its files are private to the user, these get the ordinary permissions.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return temporary


def _target(path: str | os.PathLike[str]) -> str:
    """The file that a write to `path` would make or replace; UserError if there is something else there."""
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    try:
        if not os.path.isdir(folder):
            raise UserError(f"cannot write {str(path)!r}: there is no directory {folder!r}")
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return target
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {_reason(error)}") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"cannot write {str(path)!r}: it is a directory")
    if not stat.S_ISREG(mode):
        raise UserError(f"cannot write {str(path)!r}: it is not a regular file")
    if not os.access(target, os.W_OK):
        raise UserError(f"cannot write {str(path)!r}: the file is read-only")
    return target


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
