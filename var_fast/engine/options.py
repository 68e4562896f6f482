"""SamplingOptions: what a request to a sampler says beside labels and seeds."""

from __future__ import annotations

from typing import NamedTuple


class SamplingOptions(NamedTuple):
    """`cfg`: guidance at the last scale, growing from 0; `top_k`, `top_p`: 0 keep all codes; `more_smooth`: codes are
    mixed by a Gumbel softmax."""

    cfg: float = 1.5
    top_k: int = 900
    top_p: float = 0.96
    more_smooth: bool = False
