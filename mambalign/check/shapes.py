"""The sizes of a model that decide its parameters, memory and speed, from its config.json alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mambalign.recipe import UserError

SCAN_TILE = 32  # tokens for which the scan keeps one state
CHUNK = 64  # the same of a Mamba-2
MAMBA_TYPES = ("mamba", "falcon_mamba", "mamba2")


@dataclass(frozen=True)
class Adapters:
    """LoRA on `modules` (None: in_proj and out_proj). Its input is copied into the type it computes in, `copy` bytes a
    number, and dropout keeps a mask of `mask` bytes."""

    rank: int
    modules: tuple[str, ...] | None = None
    copy: int = 4
    mask: int = 0


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide parameters, memory and speed of a Mamba-1 or Falcon-Mamba (of a Mamba-2: `Mamba2Shape`)."""

    hidden: int
    layers: int
    vocab: int
    inner: int
    rank: int
    state: int = 16
    conv: int = 4
    tied: bool = True
    conv_bias: bool = True
    proj_bias: bool = False
    inner_norms: bool = False  # Falcon-Mamba's, on the step sizes, B and C
    kernels: bool = False  # whether a GPU runs it, with our kernels where the family has them

    scan = "selective_scan"  # the op

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From a config.json, in the Hugging Face or the original state-spaces layout.

        Raises:
            UserError: not a model of these families.
        """
        try:
            return cls._original(config) if "d_model" in config else cls._hugging_face(config)
        except (KeyError, TypeError) as error:
            raise UserError(f"the model's config.json is incomplete: {error} is missing or wrong") from error

    @classmethod
    def _original(cls, config: Mapping[str, Any]) -> ModelShape:
        ssm = config.get("ssm_cfg") or {}
        layer = ssm.get("layer", "Mamba1")
        if layer not in ("Mamba1", "Mamba2"):
            raise UserError(f"the model's config.json names layer {layer!r}; supported are Mamba1 and Mamba2")
        hidden, multiple = int(config["d_model"]), int(config.get("pad_vocab_size_multiple") or 1)
        inner = int(ssm.get("expand", 2)) * hidden
        common: dict[str, Any] = {
            "hidden": hidden,
            "layers": int(config["n_layer"]),
            "vocab": math.ceil(int(config["vocab_size"]) / multiple) * multiple,
            "inner": inner,
            "conv": int(ssm.get("d_conv", 4)),
            "tied": bool(config.get("tie_embeddings", True)),
            "conv_bias": bool(ssm.get("conv_bias", True)),
            "proj_bias": bool(ssm.get("bias", False)),
        }
        if layer == "Mamba2":
            heads, groups = inner // int(ssm.get("headdim", 64)), int(ssm.get("ngroups", 1))
            gated_norm = bool(ssm.get("rmsnorm", True))
            state = int(ssm.get("d_state", 128))
            return Mamba2Shape(**common, rank=heads, state=state, groups=groups, gated_norm=gated_norm)
        return ModelShape(**common, rank=_rank(ssm.get("dt_rank", "auto"), hidden), state=int(ssm.get("d_state", 16)))

    @classmethod
    def _hugging_face(cls, config: Mapping[str, Any]) -> ModelShape:
        kind = config.get("model_type")
        if kind not in MAMBA_TYPES:
            raise UserError(f"the model is of type {kind!r}; supported are {', '.join(MAMBA_TYPES)}")
        hidden = int(config["hidden_size"])
        common: dict[str, Any] = {
            "hidden": hidden,
            "layers": int(config["num_hidden_layers"]),
            "vocab": int(config["vocab_size"]),
            "inner": int(config.get("intermediate_size") or config.get("expand", 2) * hidden),
            "conv": int(config.get("conv_kernel", 4)),
            "tied": bool(config.get("tie_word_embeddings", kind != "mamba2")),
            "conv_bias": bool(config.get("use_conv_bias", True)),
            "proj_bias": bool(config.get("use_bias", False)),
        }
        if kind == "mamba2":
            return Mamba2Shape(
                **common,
                rank=int(config.get("num_heads", 128)),
                state=int(config.get("state_size", 128)),
                groups=int(config.get("n_groups", 8)),
                gated_norm=config.get("gated_norm") != "none",
            )
        rank = _rank(config.get("time_step_rank", "auto"), hidden)
        falcon = kind == "falcon_mamba"
        return ModelShape(**common, rank=rank, state=int(config.get("state_size", 16)), inner_norms=falcon)

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(in, out) of every linear map of a layer."""
        return {
            "in_proj": (self.hidden, 2 * self.inner),
            "x_proj": (self.inner, self.rank + 2 * self.state),
            "dt_proj": (self.rank, self.inner),
            "out_proj": (self.inner, self.hidden),
        }

    @property
    def layer_parameters(self) -> int:
        matrices = sum(i * o for i, o in self.projections.values())
        biases = self.proj_bias * (2 * self.inner + self.hidden)
        return matrices + biases + sum(self.small.values()) + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, a tied head once."""
        heads = 1 if self.tied else 2
        return self.layers * self.layer_parameters + heads * self.vocab * self.hidden + self.hidden

    def lora_parameters(self, rank: int, modules: Sequence[str] | None) -> int:
        """Parameters of LoRA adapters on the named modules (None: in_proj and out_proj; all-linear: all four)."""
        wanted = self.adapted(modules)
        embeddings = sum(name in wanted for name in ("embeddings", "lm_head"))
        layers = self.layers * sum(rank * sum(size) for name, size in self.projections.items() if name in wanted)
        return layers + embeddings * rank * (self.vocab + self.hidden)

    def adapted(self, modules: Sequence[str] | None) -> set[str]:
        names = {name.split(".")[-1] for name in modules or ("in_proj", "out_proj")}
        return names | (set(self.projections) if "all-linear" in names else set())

    @property
    def quantised(self) -> int:
        """Weights that load_in_4bit and load_in_8bit reach."""
        return self.layers * sum(math.prod(self.projections[name]) for name in ("in_proj", "out_proj"))

    def full_parameters(self, names: list[str] | None) -> int:
        """Parameters of what `lora_modules_to_save` names."""
        sizes = {name: self.layers * math.prod(size) for name, size in self.projections.items()}
        sizes |= {name: self.layers * size for name, size in self.small.items()}
        sizes |= {
            "norm": self.layers * self.hidden,
            "norm_f": self.hidden,
            "embeddings": self.vocab * self.hidden,
            "lm_head": 0 if self.tied and "embeddings" in (names or []) else self.vocab * self.hidden,
        }
        return sum(sizes.get(name.split(".")[-1], 0) for name in names or [])

    @property
    def small(self) -> dict[str, int]:
        """Numbers in the parameters of a layer's convolution and scan, dt_proj's bias among them."""
        conv = self.inner * (self.conv + self.conv_bias)
        return {"A_log": self.inner * self.state, "D": self.inner, "bias": self.inner, "conv1d": conv}

    def kept_in_layer(self, c: int, adapters: Adapters | None = None) -> float:
        """Bytes a token leaves behind in one layer for the backward pass; `c`: bytes of an activation.

        The residual stream, in_proj's output (x and z), the convolution's, the step sizes, x_proj's output, and a state
        in 32 tokens. Weights that train also need what they are multiplied with: the norm and the scan's output.
        """
        hidden, inner, narrow = self.hidden, self.inner, self.rank + 2 * self.state
        states = 4 * inner * self.state / SCAN_TILE
        norms = 4 * narrow * self.inner_norms
        if self.kernels:
            kept = 4 * hidden + 4 * c * inner + c * narrow + states + norms
        else:  # fp32 copies of 16-bit numbers; the norm's input
            kept = 8 * hidden + inner * (5 * c + (3 if c < 4 else 0)) + 2 * c * narrow + states / 2 + norms
        return kept + self._kept_inputs(c, adapters)

    def _kept_inputs(self, c: int, adapters: Adapters | None) -> float:
        if adapters is None:
            return c * (self.hidden + self.inner)
        return self.kept_by(adapters) - (0 if self.kernels else 6 * self.hidden)  # frozen norms keep less

    def kept_by(self, adapters: Adapters) -> float:
        """The same of a layer's adapters: a copy of their input, the mask of its dropout, and `rank` numbers."""
        sizes = [size for name, (size, _) in self.projections.items() if name in self.adapted(adapters.modules)]
        return sum(adapters.copy * (size + adapters.rank) + adapters.mask * size for size in sizes)

    def dropped_in_layer(self, c: int, adapters: Adapters | None = None) -> float:
        """What of it selective recomputation makes again: convolution, step sizes, and the norm if it was kept."""
        return c * (2 * self.inner + (self.hidden if adapters is None else 0))

    def working(self, c: int) -> float:
        """Bytes a token takes while a layer goes backwards: gradients, and the shares of dB and dC of the scan."""
        if self.kernels:
            return self.inner * (3 * c + 5)
        return self.inner * (38 if c < 4 else 34)


@dataclass(frozen=True)
class Mamba2Shape(ModelShape):
    """The same of a Mamba-2; `rank` is the number of heads, for a step size is all that is made for each."""

    groups: int = 1
    gated_norm: bool = True

    scan = "ssd"

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(in, out) of every linear map of a layer."""
        into = 2 * self.inner + 2 * self.groups * self.state + self.rank
        return {"in_proj": (self.hidden, into), "out_proj": (self.inner, self.hidden)}

    @property
    def layer_parameters(self) -> int:
        matrices = sum(i * o for i, o in self.projections.values())
        biases = self.proj_bias * sum(o for _, o in self.projections.values())
        # The gated norm; the norm before.
        return matrices + biases + sum(self.small.values()) + self.inner * self.gated_norm + self.hidden

    @property
    def small(self) -> dict[str, int]:
        conv = (self.inner + 2 * self.groups * self.state) * (self.conv + self.conv_bias)
        return {"A_log": self.rank, "D": self.rank, "dt_bias": self.rank, "conv1d": conv}

    def kept_in_layer(self, c: int, adapters: Adapters | None = None) -> float:
        hidden, inner, shared = self.hidden, self.inner, self.groups * self.state
        kept = hidden * (8 + c) + 4 * c * inner + 4 * c * shared + (c + 16) * self.rank
        return kept + self._kept_inputs(c, adapters)

    def dropped_in_layer(self, c: int, adapters: Adapters | None = None) -> float:
        whole = 2 * self.inner + self.hidden if adapters is None else self.inner
        return c * (whole + 2 * self.groups * self.state)

    def working(self, c: int) -> float:
        """Gradients, fp32 copies of 16-bit numbers, and three times the states between chunks."""
        return self.inner * (18 + 12 * self.state / CHUNK + (8 if c < 4 else 0))


def _rank(written: Any, hidden: int) -> int:
    return math.ceil(hidden / 16) if written == "auto" else int(written)
