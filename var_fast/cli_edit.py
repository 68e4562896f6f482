"""The command var-fast edit: new content in a region of a picture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from var_fast import cli_options as opt
from var_fast import cli_work as work
from var_fast.cli_arguments import parse_box, parse_labels, parse_seeds
from var_fast.errors import UserError

if TYPE_CHECKING:
    import torch

REGION = "Region"
MOST_COLUMNS = 6


def edit(
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="A picture of the model's size.")],
    mask: Annotated[
        Path | None,
        typer.Option(help="A picture of PICTURE's size: white where new content is made.", rich_help_panel=REGION),
    ] = None,
    box: Annotated[
        str | None,
        typer.Option(
            metavar="x0,y0,x1,y1",
            help="Instead: new content in this box, in pixels of the model's size from the top left corner.",
            rich_help_panel=REGION,
        ),
    ] = None,
    outside: Annotated[
        bool, typer.Option("--outside", help="New content outside the mask or box.", rich_help_panel=REGION)
    ] = False,
    paste: Annotated[
        bool,
        typer.Option(
            help="Put the picture's own pixels back outside the region: exact, but its edges may show.",
            rich_help_panel=REGION,
        ),
    ] = False,
    resize: opt.Resize = False,
    model: opt.Model = "demo",
    vae_ckpt: opt.Vae = None,
    var_ckpt: opt.Var = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Classes of the new content, by number or name, several with commas; default: of no class.",
            rich_help_panel=opt.IMAGES,
        ),
    ] = None,
    seeds: opt.Seeds = "0-3",
    cfg: opt.Cfg = 1.5,
    top_k: opt.TopK = 900,
    top_p: opt.TopP = 0.96,
    more_smooth: opt.MoreSmooth = False,
    out: Annotated[
        Path, typer.Option(help="The picture: original, region in grey, results.", rich_help_panel=opt.OUTPUT)
    ] = Path("edited.png"),
    save_dir: opt.SaveDir = None,
    columns: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Results per row; default: one per label, or up to {MOST_COLUMNS}.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    upscale: opt.Upscale = None,
    upscale_mode: opt.UpscaleMode = opt.Upscaling.bicubic,
    dtype: opt.Dtype = opt.NumberType.auto,
    device: opt.Device = "auto",
    batch: opt.Batch = None,
) -> None:
    """Make new content in a region of a picture: in-painting, out-painting (--outside), changes of class.

    What is kept has the picture's own tokens at every scale; the rest is sampled to go with it.
    A token is sampled if at least half of its area is in the region.
    There are as many results as seeds or labels, whichever are more; the others are used again in turn.
    A result depends on picture, region, label, seed and options only.
    """
    seed_list = parse_seeds(seeds)
    if (mask is None) == (box is None):
        raise UserError(f"{'neither' if box is None else 'both'} of --mask and --box given, expected one of them")
    corners = None if box is None else parse_box(box)
    work.require_png(out, save_dir)
    if os.path.realpath(out) in (os.path.realpath(path) for path in (picture, mask) if path is not None):
        raise UserError(f"--out is {str(out)!r}, which is read too, expected another file")
    import torch

    from var_fast.cli_models import image_size, load_both, pick_device
    from var_fast.engine import Sampler
    from var_fast.images import load_image, make_grid
    from var_fast.models.var import check_sampling_options

    check_sampling_options(cfg, top_k, top_p)
    work.check_places(out, save_dir)
    place = pick_device(device)
    vae, var, classes, _ = load_both(model, vae_ckpt, var_ckpt)
    size = image_size(vae)
    no_class = var.num_classes
    label_list = [no_class] if labels is None else parse_labels(labels, var.num_classes, classes)
    pairs = work.pair_up(label_list, seed_list)

    image_3HW = load_image(picture, size, resize).add(1).div(2)
    if corners is not None:
        region_HW = _box_region(corners, size)
    else:
        if resize and load_image(mask).shape != load_image(picture).shape:
            raise UserError(
                f"--mask {str(mask)!r} and PICTURE {str(picture)!r} differ in size, so --resize would part them"
            )
        region_HW = load_image(mask, size, resize).mean(0) >= 0
    if outside:
        region_HW = ~region_HW
    if not region_HW.any():
        raise UserError("the region for new content is empty, expected at least one pixel (white in --mask)")

    batch = batch or work.default_batch(size, place.type)
    sampler = Sampler(var, dtype=dtype.value, device=place, max_batch=batch)
    options = dict(cfg=cfg, top_k=top_k, top_p=top_p, more_smooth=more_smooth)

    def make(labels: list[int], seeds: list[int]) -> Iterator[torch.Tensor]:
        yield sampler.edit(image_3HW, region_HW, labels, seeds, **options, paste=paste)

    (images_B3HW,), seconds = work.make_images(make, pairs, batch)
    columns = min(columns or work.columns_by_label(label_list, len(pairs)) or MOST_COLUMNS, len(pairs))
    # Original and region open the first row; the rows below keep these two places empty.
    empty = torch.ones_like(image_3HW)
    head, tiles = [image_3HW, torch.where(region_HW, 0.5, image_3HW)], []
    for row_B3HW in images_B3HW.split(columns):
        tiles += [*head, *row_B3HW]
        head = [empty, empty]
    upscale = upscale or work.default_upscale(size)
    grid = make_grid(torch.stack(tiles), columns + 2, upscale, mode=upscale_mode.value)
    texts = work.sampler_notes(model, {**options, "outside": outside, "paste": paste, "resize": resize}, sampler)
    texts |= {"picture": picture.name, **({"mask": mask.name} if box is None else {"box": box})}
    names = [*classes, "no class"] if classes else None
    work.write_images(grid, images_B3HW, pairs, names, texts, out, save_dir)
    work.print_summary(sampler, len(pairs), size, seconds, out, save_dir)


def _box_region(corners: tuple[int, int, int, int], size: int) -> torch.Tensor:
    """(size, size) bool, True inside the box."""
    import torch

    left, top, right, bottom = corners
    if right > size or bottom > size:
        raise UserError(f"--box reaches to {right},{bottom}, expected at most {size},{size}: the model's size")
    region_HW = torch.zeros(size, size, dtype=torch.bool)
    region_HW[top:bottom, left:right] = True
    return region_HW
