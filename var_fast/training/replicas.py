"""Models that every rank holds whole."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from var_fast.training.ranks import Ranks


def average_gradients(model: nn.Module, ranks: Ranks) -> nn.Module:
    """What to call in place of `model`: its backward passes leave the mean of all ranks' gradients, which is the
    gradient of the whole batch where losses are means over shares of one size. All ranks begin with rank 0's weights.
    """
    if ranks.count == 1:
        return model
    # Buffers are functions of the weights, or summed over the ranks by the model itself: none has to be sent.
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
