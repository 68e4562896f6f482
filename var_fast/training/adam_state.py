"""AdamW's state under the parameters' names, so that a checkpoint of it fits another number of ranks."""

from __future__ import annotations

import torch
from torch import nn


def adam_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, dict[str, torch.Tensor]]:
    """{parameter's name: {"exp_avg", "exp_avg_sq" (the parameter's shape), "step" (0-dim)}}, the very tensors in use.

    model: the bare one, not its DistributedDataParallel, whose names differ; sharded (fully_shard) is fine. Where the
    optimizer has not stepped yet its state is made, zeros as AdamW itself would: filling them resumes it.
    Parameters that the optimizer has not are left out. Learning rate and decay are no state: they follow from the step.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                # torch.optim.AdamW: the fused and capturable ones count on the device
                device = parameter.device if group["fused"] or group["capturable"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            tensors[names[parameter]] = {key: state[key] for key in ("exp_avg", "exp_avg_sq", "step")}
    return tensors
