"""Selective recomputation: what is cheap to compute again is not kept for the backward pass.

Of a Mamba-1 layer, per token, with H = hidden size, E = inner size, 16 states and 2-byte activations:

    kept        residual stream 4 H   in_proj's output 4 E   scan's output 2 E   scan's states 2 E   x_proj's output
    dropped     norm 2 H              convolution 2 E        step sizes 2 E
    costs       one pass of the norm, one of the convolution and one product with dt_proj (rank E/32) a layer

Nothing is computed twice that a large matrix product or the scan made. This is finer than
`torch.utils.checkpoint`'s selective policies, which run the whole block again and choose among dispatched operations:
ours are autograd Functions, which they do not see.

How: while a layer runs, autograd saves tensors through these hooks. A dropped tensor is known by its storage, so every
view of it, saved by whatever module, becomes a note of how to make it again. The first of its users in the backward
pass computes it and the last lets go of it. Anything else is saved as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.dropout import _DropoutNd


class Recomputation(saved_tensors_hooks):
    """A context around the users of dropped tensors; without `enabled` it changes nothing.

    Gradients are those of the same computation without it, bit for bit. As autograd does, the backward pass raises a
    RuntimeError where a tensor it needs was modified in place since.

    Example:
        >>> x, weight = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
        >>> with Recomputation() as recomputation:
        ...     y = x.sigmoid()
        ...     recomputation.drop(y, torch.sigmoid, x)
        ...     loss = (y * weight).sum()
        >>> loss.backward()
    """

    def __init__(self, enabled: bool = True):
        self._enabled = enabled and torch.is_grad_enabled()
        # By address of the storage; each recipe holds its tensor until the context is left, so no address is reused.
        recipes: dict[int, _Recipe] = {}
        super().__init__(partial(_pack, recipes), _unpack)
        self._recipes = recipes

    def __enter__(self) -> Recomputation:  # type: ignore[override]
        if self._enabled:
            super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._enabled:
            super().__exit__(*error)
        for recipe in self._recipes.values():
            recipe.value = None
        self._recipes.clear()

    def drop(
        self, tensor: Tensor, compute: Callable[..., Any], *inputs: Tensor | None, module: nn.Module | None = None
    ) -> None:
        """Whoever saves `tensor` from here on gets `compute(*inputs)`, under today's autocast, in the backward pass.

        `compute` must return the same bits again. `module`, if given, is what it calls: `tensor` is kept after all
        where a second call could differ or be noticed (hooks, dropout).
        """
        if self._enabled and tensor.nbytes and (module is None or _repeatable(module)):
            parameters = () if module is None else tuple(module.parameters())
            self._recipes[tensor.untyped_storage().data_ptr()] = _Recipe(tensor, compute, inputs, parameters)


def _repeatable(module: nn.Module) -> bool:
    return not any(
        part._forward_hooks
        or part._forward_pre_hooks
        or hasattr(part, "_hf_hook")  # accelerate's: moves weights
        or (isinstance(part, _DropoutNd) and part.training and part.p)
        for part in module.modules()
    )


class _Recipe:
    """A dropped tensor: how to make it again, and its value while there are users to come."""

    def __init__(
        self,
        tensor: Tensor,
        compute: Callable[..., Any],
        inputs: tuple[Tensor | None, ...],
        parameters: tuple[Tensor, ...],
    ):
        device = tensor.device.type
        self.value: Tensor | None = tensor.detach()
        self._version = tensor._version
        self.users, self._to_come = 0, 0
        self._compute = compute
        self.inputs = tuple(None if value is None else _Kept.of(value.detach()) for value in inputs)
        self._parameters = tuple(_Kept.of(value.detach()) for value in parameters)
        self._autocast = partial(
            torch.autocast, device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )

    def describes(self, tensor: Tensor) -> bool:
        """Whether `tensor`, of the same storage, is (a view of) what `compute` returns: nothing wrote to it since."""
        return self.value is not None and self.value._version == self._version and self.value.dtype == tensor.dtype

    def take(self) -> Tensor:
        if self.value is None:
            inputs = [None if value is None else value.take() for value in self.inputs]
            for parameter in self._parameters:
                parameter.take()
            with torch.no_grad(), self._autocast():
                self.value = self._compute(*inputs).detach()
            self._to_come = self.users
        value = self.value
        self._to_come -= 1
        if self._to_come <= 0:
            self.value = None
        return value


@dataclass(frozen=True)
class _Kept:
    """A tensor saved as it is. Autograd counts no versions of what goes through hooks, so this does."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Kept:
        return cls(tensor, tensor._version)

    def take(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {list(self.tensor.shape)} that the backward pass needs was modified in place after "
                f"the forward pass (version {self.tensor._version}, expected {self.version}); go backwards before "
                "changing weights, or run the forward pass again"
            )
        return self.tensor


@dataclass(frozen=True)
class _View:
    """A dropped tensor as one of its users saw it."""

    recipe: _Recipe
    where: tuple[Any, Any, Any]  # size, stride, offset

    def take(self) -> Tensor:
        return self.recipe.take().as_strided(*self.where)


def _pack(recipes: dict[int, _Recipe], tensor: Tensor) -> _Kept | _View:
    if type(tensor) is Tensor and tensor.layout == torch.strided:
        recipe = recipes.get(tensor.untyped_storage().data_ptr())
        if recipe is not None and recipe.describes(tensor):
            recipe.users += 1
            return _View(recipe, (tensor.shape, tensor.stride(), tensor.storage_offset()))
    return _Kept.of(tensor)


def _unpack(packed: Any) -> Tensor:
    tensor: Tensor = packed.take()
    return tensor
