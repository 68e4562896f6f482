"""Options that several commands have. Without torch, so that help answers at once."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

MODEL, IMAGES, OUTPUT, MACHINE = "Model", "Images", "Output", "Machine"


class NumberType(str, Enum):
    """Names of number types; auto: bfloat16 where the device computes in it, else float32."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Upscaling(str, Enum):
    """Ways to enlarge a picture."""

    bicubic = "bicubic"
    nearest = "nearest"


Model = Annotated[
    str,
    typer.Option(
        help="demo, a directory with config.json, or a published name (d16, d20, d24, d30, d36) with its files.",
        rich_help_panel=MODEL,
    ),
]
Vae = Annotated[Path | None, typer.Option(help="File of the published tokenizer.", rich_help_panel=MODEL)]
Var = Annotated[Path | None, typer.Option(help="File of the published transformer.", rich_help_panel=MODEL)]

Seeds = Annotated[str, typer.Option(help="Numbers and ranges with commas.", rich_help_panel=IMAGES)]
Cfg = Annotated[float, typer.Option(help="Guidance at the last scale; 0: none.", rich_help_panel=IMAGES)]
TopK = Annotated[int, typer.Option(help="Most likely codes kept; 0: all.", rich_help_panel=IMAGES)]
TopP = Annotated[float, typer.Option(help="Probability mass kept; 0 or 1: all.", rich_help_panel=IMAGES)]
MoreSmooth = Annotated[
    bool,
    typer.Option("--more-smooth", help="Mix codes: smoother pictures, not for metrics.", rich_help_panel=IMAGES),
]

Resize = Annotated[bool, typer.Option("--resize", help="Crop the centre square and scale it to the model's size.")]

SaveDir = Annotated[
    Path | None, typer.Option(help="Also write each image here, by label and seed.", rich_help_panel=OUTPUT)
]
Upscale = Annotated[
    int | None,
    typer.Option(
        min=1, max=64, help="Enlarge every image so many times; default: 4 up to 64 px.", rich_help_panel=OUTPUT
    ),
]
UpscaleMode = Annotated[Upscaling, typer.Option(help="How --upscale enlarges.", rich_help_panel=OUTPUT)]

Dtype = Annotated[
    NumberType, typer.Option(help="auto: bfloat16 where the device computes in it.", rich_help_panel=MACHINE)
]
Device = Annotated[
    str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...", rich_help_panel=MACHINE)
]
Batch = Annotated[
    int | None,
    typer.Option(min=1, help="Images made at once (changes no image); default: by size.", rich_help_panel=MACHINE),
]
