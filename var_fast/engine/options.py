"""SamplingOptions: what a request to a sampler says beside labels and seeds; and what its steps come to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


class SamplingOptions(NamedTuple):
    """`cfg`: guidance at the last scale, growing from 0; `top_k`, `top_p`: 0 keep all codes; `more_smooth`: codes are
    mixed by a Gumbel softmax."""

    cfg: float = 1.5
    top_k: int = 900
    top_p: float = 0.96
    more_smooth: bool = False


def final_image(steps: Iterator[Callable[[], torch.Tensor]], scales: int) -> torch.Tensor:
    """The images after the last of the `scales` steps of a loop."""
    for done, image in enumerate(steps, start=1):
        if done == scales:  # decoded before the loop goes on and gives its buffers away
            images_B3HW = image()
    return images_B3HW
