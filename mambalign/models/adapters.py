"""LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353) through PEFT, on every projection of a Mamba.

Beside the adapters any parameter can train in full (`A_log`, `D`, `dt_proj.bias`, `conv1d`, ...). `lora.py` has the
layers and the files; here is how adapters come onto a model, prove that they train, and go off it again.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel

from mambalign.models import files
from mambalign.models.lora import (
    DEFAULT,
    START,
    AdapterState,
    MambaLora,
    StepSizeLora,
    Writer,
    adapters_on,
    is_linear,
    kind_of,
    layers_of,
    merged_weight,
    modules_of,
    plain,
    save_tensors,
)
from mambalign.models.modules import StepSizeProjection
from mambalign.models.original import is_tied
from mambalign.recipe import Recipe, UserError, nearest

ALL_LINEAR = "all-linear"
# What is multiplied with most of the weights. A LoRA there does most of what tuning can do, and little on the maps
# inside the scan (arXiv 2410.09016, section 4; arXiv 2411.15224).
DEFAULT_TARGETS = ("in_proj", "out_proj")
# Nine tenths of the parameters are in_proj and out_proj, and only they are quantised. x_proj and dt_proj are small and
# feed an exponential; embeddings and head meet every token.
NOT_QUANTISED = ("x_proj", "dt_proj", "lm_head")


# ------------------------------------------------------------------------------------------------- asking for them


@dataclass(frozen=True)
class AdapterOptions:
    """What a recipe asks for. targets: modules that get an adapter; full: modules and parameters trained in full."""

    r: int = 16
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = DEFAULT_TARGETS
    full: tuple[str, ...] = ()
    bias: Literal["none", "all", "lora_only"] = "none"
    use_dora: bool = False
    use_rslora: bool = False

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> AdapterOptions:
        """The adapter keys of a recipe."""
        targets = DEFAULT_TARGETS if recipe.lora_target_modules is None else tuple(recipe.lora_target_modules)
        return cls(
            r=recipe.lora_r,
            alpha=recipe.lora_alpha,
            dropout=recipe.lora_dropout,
            targets=targets,
            full=tuple(recipe.lora_modules_to_save or ()),
            bias=recipe.lora_bias,
            use_dora=recipe.use_dora,
            use_rslora=recipe.use_rslora,
        )


def quantisation(recipe: Recipe) -> Any:
    """transformers' quantisation config of a recipe, or None; `NOT_QUANTISED` modules stay as they are.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if not (recipe.load_in_4bit or recipe.load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    key = "load_in_4bit" if recipe.load_in_4bit else "load_in_8bit"
    if not is_bitsandbytes_available():
        raise UserError(
            f"{key}: quantised weights need bitsandbytes, which is not installed: pip install 'mambalign[quantization]'"
            f", or set {key}: false to keep the frozen weights in 16 or 32 bits"
        )
    compute = torch.bfloat16 if recipe.bf16 else torch.float16 if recipe.fp16 else torch.float32
    storage = {} if recipe.bnb_4bit_quant_storage is None else {"bnb_4bit_quant_storage": recipe.bnb_4bit_quant_storage}
    return BitsAndBytesConfig(
        load_in_4bit=recipe.load_in_4bit,
        load_in_8bit=recipe.load_in_8bit,
        bnb_4bit_quant_type=recipe.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=recipe.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=list(NOT_QUANTISED),
        **storage,
    )


def _targets(model: nn.Module, options: AdapterOptions) -> list[str]:
    """Full names of the modules that get an adapter; UserError for a target that matches none."""
    modules = modules_of(model)
    kinds = sorted({kind_of(name) for name in modules})
    if not options.targets:
        raise UserError(f"lora_target_modules is empty: there would be no adapter; name some of {', '.join(kinds)}")
    found: set[str] = set()
    for target in options.targets:
        if target == ALL_LINEAR:
            matches = [name for name, module in modules.items() if ".layers." in name and is_linear(module)]
        else:
            matches = [name for name in modules if f".{name}".endswith(f".{target}")]
        if not matches and any(f".{target}." in f".{name}." for name, _ in model.named_parameters()):
            raise UserError(
                f"lora_target_modules: {target} is no projection, so a low-rank update of it means nothing; it is "
                f"small: train it in full with lora_modules_to_save: [{target}]"
            )
        if not matches:
            hint = nearest(target, [*kinds, ALL_LINEAR])
            raise UserError(
                f"lora_target_modules: {target!r} matches no module of this model{hint} "
                f"(there are {', '.join(kinds)}, and {ALL_LINEAR})"
            )
        found.update(matches)
    return [name for name in modules if name in found]


def _full(model: Any, options: AdapterOptions, targets: list[str]) -> list[str]:
    """Parameters to train in full, by their names now; UserError for an entry that matches none."""
    parameters = {name: p for name, p in model.named_parameters() if not re.search(r"\.lora_", name)}
    named = {plain(name): name for name in parameters}
    wanted: dict[str, str] = {}
    for entry in options.full:
        # A tied head is listed once, as the embedding.
        sought = "embeddings" if entry == "lm_head" and is_tied(model) else entry
        matches = [name for name in named if f".{sought}." in f".{name}."]
        if not matches:
            known = {part for name in named for part in (kind_of(name), kind_of(name.rpartition(".")[0]))}
            known = {name for name in known if not name.isdigit()} | {"dt_proj.bias"}
            raise UserError(
                f"lora_modules_to_save: {entry!r} matches no module or parameter of this model{nearest(entry, known)} "
                f"(for instance A_log, D, dt_proj.bias, conv1d, norm, embeddings)"
            )
        wanted |= dict.fromkeys(matches, "lora_modules_to_save")
    if options.bias != "none":
        kept = tuple(f"{name}.bias" for name in targets)
        wanted |= {
            name: "lora_bias" for name in named if name.endswith(kept if options.bias == "lora_only" else ".bias")
        }
    for name, key in wanted.items():
        module = name.rpartition(".")[0]
        if name.endswith(".weight") and module in targets:
            raise UserError(
                f"{key}: {kind_of(module)} has an adapter (lora_target_modules) already; keep one of the two"
            )
        if _is_packed(parameters[named[name]]):
            raise UserError(f"{key}: {module} is kept in few bits and cannot be trained in full; take it out")
    return [named[name] for name in wanted]


# ------------------------------------------------------------------------------------------------------- attaching


def untie(model: Any) -> None:
    """Give the head a weight of its own, equal to the embedding's; nothing where it has one."""
    if not is_tied(model):
        return
    head = model.get_output_embeddings()
    head = head.get_base_layer() if isinstance(head, LoraLayer) else head
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _inject(model: Any, adapter: str, config: LoraConfig) -> None:
    """Put PEFT's layers on the named modules; nothing but "default" trains afterwards."""
    config._register_custom_module({StepSizeProjection: StepSizeLora})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # `merge` and `Writer` see to it
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # "start" has one
        MambaLora(model, config, adapter)
    for layer in layers_of(model).values():
        layer.set_adapter(adapters_on(layer))
        magnitudes = layer.lora_magnitude_vector
        if adapter in magnitudes and magnitudes[adapter].weight.dtype.itemsize < 4:
            # PEFT took the norm in 16 bits; its forward pass takes it in 32, and the two must cancel at the start.
            weight = dequantize_module_weight(layer.get_base_layer()).float()
            rows = 0 if isinstance(layer.get_base_layer(), nn.Embedding) else 1
            magnitudes[adapter].weight.data = torch.linalg.norm(weight, dim=rows)
    for name, parameter in model.named_parameters():
        if re.search(r"\.lora_", name) and parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()  # steps are too small for 16 bits; autocast computes in them
        parameter.requires_grad_(f".{DEFAULT}" in name)
    model._hf_peft_config_loaded = True  # what transformers asks for before it trains a quantised model


def attach(
    model: PreTrainedModel,
    options: AdapterOptions,
    *,
    seed: int,
    base: dict[str, Any] | None = None,
    start: AdapterState | None = None,
) -> Adapters:
    """Put adapters on `model` that do nothing yet, and let them and `options.full` alone train.

    Args:
        seed: of the adapters' first values; nothing else random is touched.
        base: path and revision of the model that the adapters are for, as it lies on disk.
        start: what `stack` put on it before.

    Adapters are fp32 whatever the model is; so is what trains in full, but for weights of linear maps and norms.

    Raises:
        UserError: a target or a name that matches nothing (names the nearest), or that cannot be trained so.

    >>> adapters = attach(model, AdapterOptions(r=8, targets=("all-linear",)), seed=0)  # doctest: +SKIP
    """
    if start is not None and (options.use_dora or start.magnitudes):
        which = "use_dora" if options.use_dora else "model_name_or_path"
        raise UserError(
            f"{which}: a DoRA's magnitudes belong to whole weights, so it can neither start from an adapter nor be "
            "started from; merge first (mambalign merge RUN OUT), and make OUT the model_name_or_path"
        )
    targets = _targets(model, options)
    full = _full(model, options, targets)
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        use_dora=options.use_dora,
        use_rslora=options.use_rslora,
        target_modules=targets,
    )
    inside = {plain(name) for name in full}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # adapters are made on the CPU
        _inject(model, DEFAULT, config)
    for name, parameter in model.named_parameters():
        if plain(name) not in inside:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        # A linear map multiplies, and a norm passes on, what its own type is; all else can be kept exact.
        passes = (is_linear(owner) or "norm" in name) and name.endswith(".weight")
        if parameter.dtype.itemsize < 4 and not passes:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    kept = set() if start is None else set(start.full)
    return Adapters(model, base or {}, options.dropout, inside | kept, start is not None and start.untied)


def stack(model: Any, state: AdapterState) -> None:
    """Put what an earlier run trained on its base model: full weights replaced, adapters frozen on top ("start").

    Raises:
        UserError: a tensor that this model has no place for.
    """
    state.base_is_tied = is_tied(model)
    if state.untied:
        untie(model)
    modules, parameters = modules_of(model), dict(model.named_parameters())
    if is_tied(model):
        parameters["lm_head.weight"] = model.get_output_embeddings().weight
    for name, value in state.full.items():
        _check_fit(state, name, value.shape, parameters[name].shape if name in parameters else None)
        parameters[name].data.copy_(value)
    by_rank: dict[int, list[str]] = defaultdict(list)
    for name, (a, b) in state.factors.items():
        weight = modules.get(name)
        shape = None if weight is None else _in_out(weight)
        _check_fit(state, name, (a.shape[1], b.shape[0]), shape)
        by_rank[a.shape[0]].append(name)
    for rank, names in by_rank.items():
        dora = bool(state.magnitudes)
        _inject(model, START, LoraConfig(r=rank, lora_alpha=rank, target_modules=names, use_dora=dora))
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            a, b = state.factors[name]
            embedding = START in layer.lora_embedding_A
            ours = (layer.lora_embedding_A, layer.lora_embedding_B) if embedding else (layer.lora_A, layer.lora_B)
            for held, value in zip(ours, (a, b), strict=True):
                (held[START] if embedding else held[START].weight).copy_(value)
            if name in state.magnitudes:
                layer.lora_magnitude_vector[START].weight.copy_(state.magnitudes[name].flatten())


def _in_out(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.in_features, module.out_features


def _check_fit(state: AdapterState, name: str, found: Iterable[int], wanted: Iterable[int] | None) -> None:
    if wanted is None:
        raise UserError(f"the adapter {state.source} has {name}, and the model no such module or parameter")
    if tuple(found) != tuple(wanted):
        raise UserError(
            f"the adapter {state.source} is for a {name} of {list(found)}, the model's is {list(wanted)}: it was "
            "trained on another model"
        )


# ------------------------------------------------------------------------------------------------------ in training


class Audit:
    """Finds trained tensors that no gradient reaches, before a run is spent on them.

    A tensor is dead if its gradient is exactly zero in the first step. One half of an untrained adapter is zero, and
    so is the gradient of the other: that one is waited for until its half has moved.
    """

    def __init__(self, model: nn.Module):
        self._parameters = dict(model.named_parameters())
        self._waiting = {name for name, parameter in self._parameters.items() if parameter.requires_grad}
        self._all = len(self._waiting)

    def check(self) -> bool:
        """Look at the gradients of a step; whether there is anything left to wait for.

        Raises:
            UserError: names the tensors that got none.
        """
        # In the same order on every process: a gradient in shards is gathered.
        alive = {name for name in sorted(self._waiting) if self._has_gradient(self._parameters[name])}
        self._waiting -= alive
        dead = [name for name in sorted(self._waiting) if not self._excused(name)]
        if dead:
            kinds = Counter(_kind_of_parameter(name) for name in dead)
            shown = ", ".join(plain(name) for name in dead[:3]) + (" ..." if len(dead) > 3 else "")
            raise UserError(
                f"{len(dead)} of {self._all} trained tensors got no gradient "
                f"({', '.join(f'{count} of {kind}' for kind, count in kinds.items())}): {shown}. They would stay as "
                "they are to the end. Take them out of lora_target_modules or lora_modules_to_save, or find what "
                "cuts them off"
            )
        return bool(self._waiting)

    @staticmethod
    def _has_gradient(parameter: Tensor) -> bool:
        return parameter.grad is not None and bool(_whole(parameter.grad).any())

    def _excused(self, name: str) -> bool:
        other = re.sub(r"lora_(embedding_)?([AB])\.", lambda m: f"lora_{m[1] or ''}{'BA'['AB'.index(m[2])]}.", name)
        return other != name and not bool(_whole(self._parameters[other].detach()).any())


def _whole(tensor: Any) -> Any:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _kind_of_parameter(name: str) -> str:
    """The name of a row in the audit: a projection with an adapter, or a parameter without its place."""
    module, adapted, _ = name.partition(".lora_")
    if adapted:
        return kind_of(module)
    owner, parameter = plain(name).rsplit(".", 2)[-2:]
    return parameter if owner == "mixer" else f"{owner}.{parameter}"


@dataclass
class Adapters:
    """The adapters on a model in training.

    full: plain names of the parameters whose values differ from the base model's. untied: embedding and head are two
    weights here and one in the base model.
    """

    model: Any
    base: dict[str, Any]
    dropout: float
    full: set[str]
    untied: bool

    def table(self) -> str:
        """How many modules and what share of the model's parameters train, a row for each kind."""
        parameters = dict(self.model.named_parameters())
        total = sum(_logical_size(p) for name, p in parameters.items() if not re.search(r"\.lora_", name))
        places = Counter(kind_of(name) for name in modules_of(self.model))
        places.update(_kind_of_parameter(name) for name in parameters if not re.search(r"\.lora_", name))
        rows: dict[str, list[Any]] = {}
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                row = rows.setdefault(_kind_of_parameter(name), [set(), 0])
                row[0].add(name.partition(".lora_")[0])
                row[1] += parameter.numel()
        lines = [f"{'trained':<16}{'modules':>12}{'parameters':>16}{'share':>10}"]
        for kind, (names, size) in sorted(rows.items()):
            lines.append(f"{kind:<16}{f'{len(names)} of {places[kind]}':>12}{size:>16,}{size / total:>10.3%}")
        size = sum(size for _, size in rows.values())
        return "\n".join([*lines, f"{'all':<16}{'':>12}{size:>16,}{size / total:>10.3%}"])

    def keep_new_rows(self, why: str) -> None:
        """Store embedding and head in full: they have rows that the base model's have not.

        Raises:
            UserError: nothing trains those rows, on one side or on both: all new tokens would be one to the model.
        """
        model, tied = self.model, is_tied(self.model)
        sides = {"embeddings": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
        frozen = [name for name, side in sides.items() if not any(p.requires_grad for p in side.parameters())]
        if frozen:
            entries = "embeddings" if tied else "embeddings, lm_head"
            raise UserError(
                f"{why}, and nothing trains their rows of {' and '.join(frozen)}: set lora_modules_to_save: "
                f"[{entries}], or take a template that needs no new tokens (zephyr)"
            )
        self.full |= {"backbone.embeddings.weight"} if tied else {"backbone.embeddings.weight", "lm_head.weight"}

    def trained(self) -> dict[str, Tensor]:
        """Every trained tensor as it is in memory, by its name there."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def save(self, folder: Path, *, for_resuming: bool = False) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, and what a resume needs beside them."""
        Writer(self.model, self.base, self.dropout, self.full, self.untied).write(folder)
        if for_resuming:
            save_tensors(self.trained(), folder / files.TRAINED)

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Take the trained tensors of a checkpoint.

        Raises:
            UserError: they are not the ones that train here.
        """
        found, wanted = files.read_tensors([folder / files.TRAINED]), self.trained()
        differing = sorted(found.keys() ^ wanted.keys()) or [n for n in found if found[n].shape != wanted[n].shape]
        if differing:
            raise UserError(
                f"{folder / files.TRAINED} is of other adapters than the recipe's: {', '.join(differing[:3])}"
            )
        for name, value in found.items():
            wanted[name].copy_(value)


def _is_packed(parameter: Any) -> bool:
    return not parameter.is_floating_point() or hasattr(parameter, "quant_state")


def _logical_size(parameter: Any) -> int:
    """Numbers a parameter stands for; bitsandbytes packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else math.prod(state.shape))


@torch.no_grad()
def merge(model: Any) -> Any:
    """Put every adapter into the weight it lies on and take PEFT's layers away; returns `model`.

    Where one of embedding and head has an adapter and they are tied, they become two weights: the adapter moved one.

    Raises:
        UserError: the weights are quantised.
    """
    layers = layers_of(model)
    if any(_is_packed(layer.get_base_layer().weight) for layer in layers.values()):
        raise UserError(
            "an adapter cannot be merged into quantised weights; load the model without quantization_config"
        )
    if any(kind_of(name) in ("embeddings", "lm_head") for name in layers):
        untie(model)
    for name, layer in layers.items():
        base, weight = layer.get_base_layer(), merged_weight(layer)
        base.weight.data = weight.to(base.weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    if layers:
        del model.peft_config
    model._hf_peft_config_loaded = False
    return model.requires_grad_(True)
