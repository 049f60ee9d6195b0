"""Adapters of PEFT on a Mamba: their layers in memory and their files on disk.

In memory they are PEFT's own layers, injected into our model. Two adapters may lie on a module: "start", frozen, which
an earlier run trained, and "default", which trains.

On disk an adapter is what plain PEFT loads onto plain transformers with the same logits, relative to the original
model however many runs came before: "start" and "default" are written as one. What those two libraries cannot do with
a Mamba decides the form:

- transformers reads `dt_proj.weight` without calling the module, so an adapter on it would be ignored: its full weight
  is stored instead (rank x inner numbers a layer).
- PEFT refuses a LoRA on `out_proj`, for the sake of fused kernels that pass it over in training. It takes a LoKr
  (arXiv 2309.14859), which with a left factor of 1 x 1 is a LoRA: such an adapter is stored as LoKr.
- A tensor under its plain name (`...mixer.A_log`) is loaded into the base model by both libraries as it is.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoKrConfig, LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import save_file
from torch import Tensor, nn

from mambalign.models import files
from mambalign.models.original import is_tied
from mambalign.recipe import UserError

START, DEFAULT = "start", "default"
UNCALLED, REFUSED = "dt_proj", "out_proj"  # by plain transformers; by PEFT
_PREFIX = "base_model.model."
_SUFFIX = re.compile(
    r"^(.+)\.(lora_(?:embedding_)?[AB](?:\.weight)?|lora_magnitude_vector(?:\.weight)?|lokr_w1|lokr_w2(?:_[ab])?)$"
)


# ---------------------------------------------------------------------------------------------------- PEFT's layers


class _StepSizeDora(DoraLinearVariant):
    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        # PEFT would take the bias out of the base layer's output, where `StepSizeProjection` never put it; without a
        # base_result it multiplies by the bare weight.
        added: Tensor = module.lora_magnitude_vector[active_adapter](
            module.lora_dropout[active_adapter](x),
            lora_A=module.lora_A[active_adapter],
            lora_B=module.lora_B[active_adapter],
            scaling=module.scaling[active_adapter],
            base_layer=module.get_base_layer(),
            adapter_name=active_adapter,
        )
        return result + added


class StepSizeLora(Linear):
    """PEFT's LoRA layer on `dt_proj`, whose output has no bias in it."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None, ("use_dora",): _StepSizeDora}


class MambaLora(LoraModel):
    def _check_target_module_compatiblity(self, *_: Any) -> None:
        """PEFT refuses `out_proj` of a Mamba, whose fused kernels pass the module over; our mixers call it."""


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Name -> every module that has an adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def plain(name: str) -> str:
    """The name of a module or parameter as it is without adapters."""
    return name.replace(".base_layer", "")


def kind_of(name: str) -> str:
    return name.rpartition(".")[2]


def factors_of(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """(A `[r, in]`, B `[out, r]`) with the scale in B: the update of the weight is `B @ A`."""
    if adapter in layer.lora_A:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    else:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return a.detach(), b.detach() * layer.scaling[adapter]


def adapters_on(layer: Any) -> list[str]:
    return [name for name in (START, DEFAULT) if name in layer.lora_A or name in layer.lora_embedding_A]


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """The weight that does what the layer does with its adapters, in at least float32."""
    weight = dequantize_module_weight(layer.get_base_layer()).detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    transposed = isinstance(layer.get_base_layer(), nn.Embedding)
    for adapter in adapters_on(layer):
        a, b = factors_of(layer, adapter)
        total = weight + ((b @ a).T if transposed else b @ a)
        if adapter in layer.lora_magnitude_vector:
            # DoRA, equation 5: the magnitudes belong to the output's rows, those of an embedding to its columns.
            magnitude, rows = layer.lora_magnitude_vector[adapter].weight.flatten(), 0 if transposed else 1
            scale = magnitude / torch.linalg.norm(total, dim=rows)
            total = total * (scale if transposed else scale[:, None])
        weight = total
    return weight.clone()


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> every module an adapter can lie on, as it is without adapters."""
    inside = tuple(f"{name}." for name in layers_of(model))
    return {
        name: module.get_base_layer() if isinstance(module, LoraLayer) else module
        for name, module in model.named_modules()
        if not name.startswith(inside) and isinstance(module, LoraLayer | nn.Linear | nn.Embedding)
    }


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)  # bitsandbytes' too


# ------------------------------------------------------------------------------------------------------------ files


@dataclass
class AdapterState:
    """An adapter on disk, in any form PEFT has for a Mamba.

    factors: module -> (A `[r, in]`, B `[out, r]`, the scale in it). full: parameter -> value. magnitudes: DoRA's.
    base_is_tied: whether embedding and head are one in the model it was put on.
    """

    source: Path
    config: dict[str, Any]
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    full: dict[str, Tensor] = field(default_factory=dict)
    base_is_tied: bool = False

    @property
    def untied(self) -> bool:
        """Embedding or head is a copy of its own, whatever the base model ties."""
        return bool({"embeddings", "lm_head"} & set(self.config.get("modules_to_save") or ()))


def read(folder: Path) -> AdapterState:
    """Read a LoRA or DoRA adapter of PEFT, whoever wrote it, or a LoKr of ours.

    Raises:
        UserError: another kind of adapter, damaged files, or a tensor that no adapter of that kind has.
    """
    config = files.read_json(folder / files.ADAPTER_CONFIG)
    state = AdapterState(folder, config)
    kind = config.get("peft_type")
    if kind not in ("LORA", "LOKR"):
        raise UserError(f"{folder / files.ADAPTER_CONFIG}: peft_type is {kind!r}; LoRA and DoRA adapters can be read")
    if not (folder / files.ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{folder} has an {files.ADAPTER_CONFIG} but no {files.ADAPTER_WEIGHTS}")
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in files.read_tensors([folder / files.ADAPTER_WEIGHTS]).items():
        name = key.removeprefix(_PREFIX)
        if match := _SUFFIX.match(name):
            parts[match[1]][match[2].removesuffix(".weight")] = value
        elif "lora_" in name or "lokr_" in name:
            raise UserError(f"{folder / files.ADAPTER_WEIGHTS}: {key} is nothing that this version can read")
        else:
            state.full[plain(name)] = value
    for name, part in parts.items():
        state.factors[name] = _read_factors(part, name, config)
        if "lora_magnitude_vector" in part:
            state.magnitudes[name] = part["lora_magnitude_vector"]
    return state


def _read_factors(part: dict[str, Tensor], name: str, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if "lokr_w1" in part:
        left = part["lokr_w1"]
        a, b = (part["lokr_w2_b"], part["lokr_w2_a"]) if "lokr_w2_a" in part else (part.get("lokr_w2"), None)
        if a is None or left.numel() != 1:
            raise UserError(f"the LoKr on {name} has a left factor of {list(left.shape)}; only one of [1, 1] is a LoRA")
        b = (torch.eye(a.shape[0]) if b is None else b) * left
    else:
        missing = {"lora_A", "lora_B"} - {key.replace("embedding_", "") for key in part}
        if missing:
            raise UserError(f"the adapter on {name} has no {' and no '.join(sorted(missing))}")
        a, b = (part.get(f"lora_{half}", part.get(f"lora_embedding_{half}")) for half in "AB")
        assert a is not None and b is not None
    rank = _by_pattern(config.get("rank_pattern"), name, config.get("r", a.shape[0]))
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", config.get("alpha", rank)))
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return a.float(), b.float() * (alpha / divisor)


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """As PEFT reads rank_pattern and alpha_pattern: a key matches the end of a name."""
    return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", name)), default)


@dataclass
class Writer:
    """Writes the adapters on `model` for plain PEFT on plain transformers: see the head of this module.

    base: path and revision of the model they are for. full, untied: see `adapters.Adapters`.
    """

    model: Any
    base: dict[str, Any]
    dropout: float
    full: set[str]
    untied: bool

    def __post_init__(self) -> None:
        self.layers = layers_of(self.model)
        self.dora = any(layer.lora_magnitude_vector for layer in self.layers.values())
        self.lokr = not self.dora and any(kind_of(name) == REFUSED for name in self.layers)
        # Modules under adapters in plain PEFT; modules whose merged weight is stored; those that PEFT keeps a copy of.
        self.wrapped = [name for name in self.layers if not self._is_stored_whole(name)]
        self.merged = [name for name in self.layers if name not in self.wrapped]
        self.copies: set[str] = set()

    def write(self, folder: Path) -> None:
        tensors = dict(self._tensors())
        save_tensors({_PREFIX + name: value for name, value in tensors.items()}, folder / files.ADAPTER_WEIGHTS)
        staging = folder / ".adapter_config"
        self._config().save_pretrained(str(staging))
        # The config goes last: it is what makes the folder an adapter.
        os.replace(staging / files.ADAPTER_CONFIG, folder / files.ADAPTER_CONFIG)
        staging.rmdir()

    def _is_stored_whole(self, name: str) -> bool:
        kind = kind_of(name)
        if isinstance(self.layers[name].get_base_layer(), nn.Embedding) and self.lokr:
            return True  # PEFT has no LoKr for it
        apart = kind in ("embeddings", "lm_head") and self.untied and f"{name}.weight" in self.full
        return apart or kind == UNCALLED or (kind == REFUSED and self.dora)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.wrapped:
            yield from self._adapter(name, self.layers[name])
        for name in self.merged:
            yield self._whole(f"{name}.weight"), merged_weight(self.layers[name])
        for name, parameter in self.model.named_parameters():
            module, _, kind = plain(name).rpartition(".")
            if plain(name) not in self.full:
                continue
            if not (module in self.merged and kind == "weight"):
                yield self._whole(plain(name)), parameter
            if kind_of(module) == "embeddings" and is_tied(self.model):
                # A merged embedding is not the head's any more, and transformers' own loader unties what it loads.
                yield self._whole("lm_head.weight"), parameter

    def _whole(self, name: str) -> str:
        """The key of a full value of parameter `name`."""
        module, _, parameter = name.rpartition(".")
        # Where the base model ties them, plain PEFT would load one into both; a copy is of one alone.
        if kind_of(module) in ("embeddings", "lm_head") and (self.untied or module in self.merged):
            self.copies.add(kind_of(module))
        return f"{module}.base_layer.{parameter}" if module in self.wrapped else name

    def _adapter(self, name: str, layer: Any) -> Iterator[tuple[str, Tensor]]:
        a, b = self._joined(layer)
        if self.lokr:
            yield f"{name}.lokr_w1", torch.ones(1, 1)
            if a.shape[0] < max(a.shape[1], b.shape[0]) / 2:  # PEFT's own condition for two factors
                yield f"{name}.lokr_w2_a", b
                yield f"{name}.lokr_w2_b", a
            else:
                yield f"{name}.lokr_w2", b @ a
            return
        embedding, weight = ("embedding_", "") if layer.lora_embedding_A else ("", ".weight")
        yield f"{name}.lora_{embedding}A{weight}", a
        yield f"{name}.lora_{embedding}B{weight}", b
        for magnitude in layer.lora_magnitude_vector.values():
            # PEFT writes this key without its last word, reads both, and transformers' own loader only this one.
            yield f"{name}.lora_magnitude_vector.weight", magnitude.weight.detach()

    @staticmethod
    def _joined(layer: Any) -> tuple[Tensor, Tensor]:
        """The update of all adapters as one: `[B1 B2] @ [A1; A2]`."""
        pairs = [factors_of(layer, adapter) for adapter in adapters_on(layer)]
        return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)

    def _config(self) -> Any:
        ranks = {name: self._joined(self.layers[name])[0].shape[0] for name in self.wrapped}
        usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
        kinds = Counter(kind_of(name) for name in modules_of(self.model))
        groups: dict[str, set[str]] = defaultdict(set)
        for name in ranks:
            groups[kind_of(name)].add(name)
        targets: list[str] = []
        pattern: dict[str, int] = {}
        for kind, names in groups.items():
            alike = len(names) == kinds[kind] and len({ranks[name] for name in names}) == 1
            for name in [kind] if alike else sorted(names):
                targets.append(name)
                rank = ranks[next(iter(names))] if alike else ranks[name]
                if rank != usual:
                    pattern[name] = rank
        common: dict[str, Any] = dict(
            r=usual,
            target_modules=targets or DUMMY_TARGET_MODULES,
            rank_pattern=pattern,
            alpha_pattern=dict(pattern),
            modules_to_save=sorted(self.copies) or None,
            base_model_name_or_path=self.base.get("path"),
            revision=self.base.get("revision"),
            task_type="CAUSAL_LM",
            inference_mode=True,
        )
        if self.lokr:
            return LoKrConfig(alpha=usual, decompose_factor=1, **common)
        return LoraConfig(lora_alpha=usual, lora_dropout=self.dropout, use_dora=self.dora, **common)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Atomically; every tensor in memory of its own."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        save_file(
            {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()},
            beside,
            metadata={"format": "pt"},
        )
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
