"""The two halves of an input projection, and one tensor for both of their gradients.

Mamba's block cuts the rows of its input projection in two: the left half goes through the convolution, the right half
gates the scan's output. Autograd would put their gradients together again, a copy of as much as the projection wrote.
Where both ops know of the other they write into one tensor, and nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class JointGradient:
    """Where the op on the left and the op on the right half leave their gradients side by side.

    The right one goes backwards first and makes the tensor (`right`); the left one takes it (`left`), and makes a
    tensor of its own where there is none that fits: nothing depends on whether the two met. It lives as long as the
    graph, and holds memory only between the two.
    """

    def __init__(self) -> None:
        self._rows: Tensor | None = None

    def right(self, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Unwritten `[tokens, width]`, the right half of new rows."""
        self._rows = torch.empty(tokens, 2 * width, dtype=dtype, device=device)
        return self._rows[:, width:]

    def left(self, x: Tensor) -> Tensor:
        """Unwritten, shape and dtype of `x` `[T, D]`: the left half of the rows that `right` made."""
        rows, self._rows = self._rows, None
        width = x.shape[1]
        if rows is None or rows.dtype != x.dtype or rows.shape != (x.shape[0], 2 * width):
            return torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return rows[:, :width]

    def forget(self) -> None:
        self._rows = None


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, joint: JointGradient) -> tuple[Tensor, ...]:
        ctx.joint, ctx.shape = joint, rows.shape
        ctx.set_materialize_grads(False)
        left, right = rows.chunk(2, dim=-1)
        return left, right

    @staticmethod
    def backward(ctx: Any, d_left: Tensor | None, d_right: Tensor | None) -> tuple[Tensor | None, None]:
        ctx.joint.forget()
        if d_left is None and d_right is None:
            return None, None
        if d_left is None:
            d_left = torch.zeros_like(d_right)  # type: ignore[arg-type]
        elif d_right is None:
            d_right = torch.zeros_like(d_left)
        elif _side_by_side(d_left, d_right):
            return d_left.as_strided(ctx.shape, (ctx.shape[1], 1)), None
        return torch.cat([d_left, d_right], dim=-1), None  # type: ignore[list-item]


def _side_by_side(left: Tensor, right: Tensor) -> bool:
    """Whether they are the halves of the rows of one tensor."""
    width = left.shape[1]
    return (
        type(left) is type(right) is Tensor
        and left.dtype == right.dtype
        and left.stride() == right.stride() == (2 * width, 1)
        and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr() != 0
        and left.storage_offset() + width == right.storage_offset()
    )


def halves(rows: Tensor) -> tuple[Tensor, Tensor, JointGradient | None]:
    """`rows` `[T, 2 D]` as (left half, right half, what the ops that use them are given as `joint`).

    The halves are views. Gradients are those of `rows.chunk(2, dim=-1)`; the third is None where none will flow.

    Example:
        >>> xz = torch.randn(5, 8, requires_grad=True)
        >>> x, z, joint = halves(xz)
        >>> u = causal_conv1d(x, torch.randn(4, 3), joint=joint)
        >>> y = selective_scan(u, u.abs(), -torch.ones(4, 2), u[:, :2], u[:, 2:], z=z, joint=joint)
    """
    if not (torch.is_grad_enabled() and rows.requires_grad):
        left, right = rows.chunk(2, dim=-1)
        return left, right, None
    joint = JointGradient()
    left, right = _Halves.apply(rows, joint)
    return left, right, joint
