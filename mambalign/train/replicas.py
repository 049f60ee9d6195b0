"""Whole copies of a model on several GPUs whose gradients are averaged when the backward pass is over.

DDP exchanges gradients while the backward pass goes on. A pass that is a CUDA graph has nothing to go on with, and its
gradients come out where DDP does not see them. So where layers run as graphs, gradients are averaged here, as long as
they are few enough for the exchange to cost less than graphs save: always the same tensors together, so a resumed run
has the same bits. Where they are more, DDP hides the exchange, and graphs, which spare Python's time, would gain
little.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn

from mambalign.models.cuda_graphs import survey
from mambalign.train import sharding

logger = logging.getLogger("mambalign")

# Bytes of gradients, at most: on one machine (10 ms of NVLink's time), and where a network is between.
MOST, MOST_BETWEEN = 2 << 30, 64 << 20
TOGETHER = 64 << 20  # bytes of gradients in one exchange


def prepare(model: Any, accelerator: Any) -> None:
    """Where gradients are to be averaged here, begin with the first process's weights, and keep DDP away."""
    if not _wanted(model, accelerator):
        return
    for parameter in _trained(model):
        torch.distributed.broadcast(parameter.detach(), src=0)
    model.backbone.graphs.exchanged_later = True
    sharding.without_ddp(model, accelerator)


def _wanted(model: Any, accelerator: Any) -> bool:
    graphs = model.backbone.graphs
    if graphs is None or sharding.is_sharded(model) or accelerator.distributed_type != DistributedType.MULTI_GPU:
        return False
    reason, size = survey(model.backbone), sum(p.nbytes for p in _trained(model))
    if isinstance(reason, str):
        logger.info("CUDA graphs: not used (%s)", reason)
        return False
    most = MOST if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == accelerator.num_processes else MOST_BETWEEN
    if size > most:
        logger.info("CUDA graphs: not used (DDP exchanges %.1f GB of gradients during the backward pass)", size / 1e9)
    return size <= most


@torch.no_grad()
def average(model: Any) -> None:
    """Every gradient becomes the mean of all processes', zero where one has none; nothing where DDP does it.

    Every process must ask, at the end of a step.
    """
    if model.backbone.graphs is None or not model.backbone.graphs.exchanged_later:
        return
    processes = torch.distributed.get_world_size()
    on_their_way = []
    for together in _in_cuts(_trained(model)):
        gradients = [_gradient(parameter) for parameter in together]
        flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(processes)
        on_their_way.append((gradients, flat, torch.distributed.all_reduce(flat, async_op=True)))
    for gradients, flat, sent in on_their_way:
        sent.wait()
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _in_cuts(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In their order, those of one type together, up to `TOGETHER` bytes."""
    by_type: dict[torch.dtype, list[nn.Parameter]] = {}
    sizes: dict[torch.dtype, int] = {}
    for parameter in parameters:
        kind = parameter.dtype
        by_type.setdefault(kind, []).append(parameter)
        sizes[kind] = sizes.get(kind, 0) + parameter.nbytes
        if sizes[kind] >= TOGETHER:
            del sizes[kind]
            yield by_type.pop(kind)
    yield from by_type.values()
