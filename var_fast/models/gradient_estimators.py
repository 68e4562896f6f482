"""How the gradient passes the choice of the nearest codes, which has none: straight through, or turned and scaled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

SMALLEST_NORM = 1e-6
"""Of a vector whose direction still means something."""
SMALLEST_SUM = 1e-3
"""Of the sum of two unit vectors that do not count as opposite: below it, float32 tells no plane of rotation."""


def straight_through(f_BChw: torch.Tensor, f_hat_BChw: torch.Tensor) -> torch.Tensor:
    """f_hat, with the gradient of f: d f_hat / d f is taken for the identity (Bengio et al. 2013; VAR algorithm 1)."""
    return (f_hat_BChw.detach() - f_BChw.detach()) + f_BChw


def rotation_trick(f_BChw: torch.Tensor, f_hat_BChw: torch.Tensor) -> torch.Tensor:
    """f_hat exactly, with the gradient of sg[|f_hat| / |f| R] f, where R turns f's direction into f_hat's, for each
    vector along the channels (Fifty et al. 2024, Restructuring vector quantization with the rotation trick, section 4).

    Vectors of (nearly) no length, and (nearly) opposite ones, which no single rotation joins, go straight through.
    """
    return _Rotation.apply(f_BChw, f_hat_BChw.detach())


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f_BChw, f_hat_BChw):
        ctx.save_for_backward(f_BChw, f_hat_BChw)
        return f_hat_BChw.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BChw):
        f_BChw, f_hat_BChw = ctx.saved_tensors
        length, length_hat = (torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (f_BChw, f_hat_BChw))
        e, q = f_BChw / length.clamp(min=SMALLEST_NORM), f_hat_BChw / length_hat.clamp(min=SMALLEST_NORM)
        middle = e + q
        middle_length = torch.linalg.vector_norm(middle, dim=1, keepdim=True)
        defined = (length > SMALLEST_NORM) & (length_hat > SMALLEST_NORM) & (middle_length > SMALLEST_SUM)
        middle = middle / middle_length.clamp(min=SMALLEST_SUM)

        def along(direction: torch.Tensor) -> torch.Tensor:
            return (direction * grad_BChw).sum(1, keepdim=True)

        # R = I - 2 m m^T + 2 q e^T with m halfway between e and q; this is R^T applied to the gradient.
        turned = grad_BChw - 2 * middle * along(middle) + 2 * e * along(q)
        scale = length_hat / length.clamp(min=SMALLEST_NORM)
        return torch.where(defined, scale * turned, grad_BChw), None


GRADIENTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "straight-through": straight_through,
    "rotation": rotation_trick,
}
