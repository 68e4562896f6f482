"""Registration of kernels with torch.library, so that torch.compile, FSDP and autograd see through them."""

from __future__ import annotations

from collections.abc import Callable

import torch


def register(
    name: str,
    schema: str,
    run: Callable,
    fake: Callable,
    *,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> Callable:
    """The operator torch.ops.var_fast.<name>, which is returned.

    `schema` without the name, "(Tensor x) -> Tensor"; `run` computes, without gradient; `fake` makes empty results of
    the right shapes. `backward(ctx, *grads)` and `setup_context(ctx, inputs, output)` as
    torch.library.register_autograd takes them; without them there is no gradient.
    """
    # Not torch.library.custom_op: its wrapper costs 0.2 ms a call and imports torch._dynamo (seconds) at the first.
    qualified = f"var_fast::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CompositeExplicitAutograd", run)
    torch.library.register_fake(qualified, fake)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    return getattr(torch.ops.var_fast, name).default
