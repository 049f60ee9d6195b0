"""Fully sharded training: every process keeps its part of the weights, gradients and optimizer state (torch's FSDP2).

`fully_shard` is called here and not through accelerate, for three reasons. accelerate would compute `A_log`, `D` and
`dt_proj.bias` in bfloat16 under `bf16: true`, which the authors keep in fp32; here the weights are gathered as they
are and autocast decides, as on one process. It makes a unit of final norm and head, and our head's weight is read
without a call. And what is written to disk would be another kind of checkpoint: here model and optimizer state are
gathered, so the same checkpoint is resumed with or without sharding, on any number of processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mambalign.recipe import Recipe, UserError, nearest

OPTIONS = {"full_shard", "auto_wrap"}
VERSION_KEYS = {"version", "fsdp_version"}
# accelerate's keys for what is decided here, or by a key of ours.
DECIDED = {
    "transformer_layer_cls_to_wrap": "the model's blocks are the units",
    "auto_wrap_policy": "the model's blocks are the units",
    "min_num_params": "the model's blocks are the units",
    "state_dict_type": "checkpoints are whole, so that any number of processes resumes them",
    "activation_checkpointing": "gradient_checkpointing: true or selective is the key for it",
    "mixed_precision_policy": "bf16: true computes in bfloat16, and the recurrence stays in float32",
}
EXCLUDED = {
    "deepspeed": "",
    "load_in_4bit": " (quantised weights are small enough to be whole on every GPU)",
    "load_in_8bit": " (quantised weights are small enough to be whole on every GPU)",
    "fp16": " (bf16: true needs no loss scaling)",
}


def wanted(recipe: Recipe, processes: int) -> bool:
    """Whether to shard: the recipe says so and there is more than one process.

    Raises:
        UserError: what the recipe asks for is not there, or does not go together with sharding.
    """
    if not recipe.fsdp:
        if recipe.fsdp_config:
            raise UserError("fsdp_config: has no effect without fsdp: full_shard; set it, or leave fsdp_config out")
        return False
    for option in recipe.fsdp.split():
        if option not in OPTIONS:
            raise UserError(f"fsdp: {option!r} is not supported{nearest(option, OPTIONS)}; full_shard is")
    for key, value in (recipe.fsdp_config or {}).items():
        name = key if key in VERSION_KEYS else key.removeprefix("fsdp_")
        if name in DECIDED:
            raise UserError(f"fsdp_config: {key} is not needed: {DECIDED[name]}; leave it out")
        if name not in VERSION_KEYS:
            raise UserError(f"fsdp_config: {key} is not supported; fsdp_version: 2 is all that can be said")
        if str(value) != "2":
            raise UserError(f"fsdp_config: {key} is {value}, but only FSDP 2 is supported")
    for name, instead in EXCLUDED.items():
        if getattr(recipe, name):
            raise UserError(f"fsdp: does not go together with {name}; leave one of the two out{instead}")
    return processes > 1


def shard(model: Any, accelerator: Any) -> None:
    """Leave each process its part of `model`, which must be the same on all of them; every block is a unit.

    Raises:
        UserError: trained parameters of several types, which cannot be one unit.
    """
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(trained) > 1:
        raise UserError(
            f"fsdp: trained parameters are {' and '.join(sorted(map(str, trained)))} (A_log, D and dt_proj.bias are "
            "always float32), and a unit of shards has one type; set dtype: float32 with bf16: true, or train LoRA "
            "adapters on the bfloat16 weights"
        )
    # The norms, which read what a block returns, never write into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(accelerator.device.type, (torch.distributed.get_world_size(),))
    for unit in [*model.backbone.layers, model]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    without_ddp(model, accelerator)


def without_ddp(model: Any, accelerator: Any) -> None:
    """Make the model accelerate's, autocast included, and leave what processes exchange to us."""
    accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    model._is_accelerate_prepared = True


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def whole_tensor(tensor: Any) -> Tensor:
    """A tensor's whole value: of a shard, gathered; every process must ask."""
    value: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return value


def local_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor."""
    value: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return value


@contextmanager
def whole(model: nn.Module, *, here: bool) -> Iterator[None]:
    """In the context `model` has ordinary parameters, on the CPU, in the processes that say `here`.

    For reading only: afterwards the shards are as before. Every process must come. A parameter at a time is gathered,
    so no GPU ever holds more than one.
    """
    if not is_sharded(model):
        yield
        return
    places: list[tuple[nn.Module, str, Any]] = [
        (owner, name, shard)
        for owner in model.modules()
        for name, shard in owner._parameters.items()
        if isinstance(shard, DTensor)
    ]
    values: dict[int, nn.Parameter] = {}  # by shard: tied weights stay one
    for shard in {id(parameter): parameter for _, _, parameter in places}.values():
        gathered = shard.detach().full_tensor()
        if here:
            values[id(shard)] = nn.Parameter(gathered.cpu(), shard.requires_grad)
    try:
        for owner, name, shard in places:
            owner._parameters[name] = values.get(id(shard), shard)
        yield
    finally:
        for owner, name, shard in places:
            owner._parameters[name] = shard


@torch.no_grad()
def load(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Take each process's part of the whole `values` of parameters; every trained one must be there."""
    for name, shard in model.named_parameters():
        if name in values or shard.requires_grad:
            local_part(shard).copy_(local_part(_like(values[name], shard)))


def _like(value: Tensor, shard: Any) -> Any:
    """This process's part of `value`, cut as `shard` is; nothing is sent."""
    value = value.to(local_part(shard).device)
    return distribute_tensor(value, shard.device_mesh, shard.placements, src_data_rank=None)


def whole_state(optimizer: Any, *, here: bool) -> dict[str, Any] | None:
    """The optimizer's `state_dict` as one process would have it, in the processes that say `here`; every one must ask.

    A tensor at a time is gathered, and the others keep none of them.
    """
    state: dict[str, Any] = optimizer.state_dict()
    values = {
        number: {name: _gathered(value, here) for name, value in sorted(entries.items())}
        for number, entries in sorted(state["state"].items())
    }
    return {**state, "state": values} if here else None


def _gathered(value: Any, here: bool) -> Any:
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if here else None


def load_whole_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Take each process's part of a state that `whole_state`, or one process, made."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    values = {
        number: {
            name: _like(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape and value.dim()
            else value
            for name, value in entries.items()
        }
        for number, entries in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": values})
