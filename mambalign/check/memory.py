"""How large a run is, from shapes alone: parameters, and bytes on one device. Formulas, not measurements.

With P parameters, d = hidden size, E = inner size, N = state size, R = rank of dt, c = bytes of the compute type:

    weights    4 P      (2 P when they are stored in bfloat16), and 2 P of bfloat16 copies that autocast keeps
    gradients  4 P      in the type of the weights
    AdamW      8 P      two fp32 moments (2 P in 8 bits, 0 for plain SGD)
    kept       per token and layer, for the backward pass: d (8 + 2c) + E (6c + 4) + 2c (R + 2N) + 4 E N / 32
               on a GPU with our kernels d (4 + c) + 5c E + c (R + 2N) + 4 E N / 32
               gradient_checkpointing: selective drops c (d + 2E) of it, the outputs of norm, convolution, dt_proj
               gradient_checkpointing: true leaves only 4 d, and the above once, for the layer at hand
               of a Mamba-2 with H heads and G groups: d (8 + 2c) + 5c E + 4c G N + (c + 16) H, of which selective
               drops c (d + 2E + 2 G N), the outputs of both norms and the convolution
    working    per token, once: 32 E for the fp32 vectors of the scan's backward pass
               on a GPU with our kernels 16 E, for gradients and the shares of dB and dC
               of a Mamba-2: 16 E, and three times the states between chunks, 12 E N / 64
    head       128 MiB: logits exist for a chunk of rows only

With adapters (LoRA) only they and what `lora_modules_to_save` names have gradients and moments, in fp32; the frozen
weights lie in their stored type. Quantised, in_proj and out_proj lie in 4 bits and half a bit for their constants (an
fp32 number for 64 weights; or in 8 bits), and the one that is multiplied at the moment is unpacked. An adapter keeps a
copy of its input, with dropout a byte of mask for each number, and r numbers a token.

What is not in it: the CUDA context (about 0.5 GB), fragmentation, other programs. Expect +-25 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mambalign.recipe import PAIR_STAGES, Recipe, UserError

HEAD_BYTES = 128 * 2**20
SCAN_TILE = 32  # tokens for which the scan keeps one state
CHUNK = 64  # the same of a Mamba-2
MAMBA_TYPES = ("mamba", "falcon_mamba", "mamba2")


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide parameters and memory of a Mamba-1 or Falcon-Mamba model (of a Mamba-2: `Mamba2Shape`)."""

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
    kernels: bool = False  # whether our own run it, on a GPU

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
        return ModelShape(**common, rank=rank, state=int(config.get("state_size", 16)))

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

    def lora_parameters(self, rank: int, modules: list[str] | None) -> int:
        """Parameters of LoRA adapters on the named modules (None: in_proj and out_proj; all-linear: all four)."""
        wanted = self._adapted(modules)
        embeddings = sum(name in wanted for name in ("embeddings", "lm_head"))
        layers = self.layers * sum(rank * sum(size) for name, size in self.projections.items() if name in wanted)
        return layers + embeddings * rank * (self.vocab + self.hidden)

    def lora_kept(self, rank: int, modules: list[str] | None, compute_bytes: int) -> float:
        """Bytes that adapters keep per token and layer: their input, its dropout mask, and rank numbers."""
        wanted = self._adapted(modules)
        sizes = [size for name, (size, _) in self.projections.items() if name in wanted]
        return sum(compute_bytes * rank + (compute_bytes + 1) * size for size in sizes)

    def _adapted(self, modules: list[str] | None) -> set[str]:
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

    def kept_in_layer(self, compute_bytes: int) -> float:
        """Bytes a token leaves behind in one layer for the backward pass."""
        c = compute_bytes
        states = 4 * self.inner * self.state / SCAN_TILE
        if self.kernels:
            return self.hidden * (4 + c) + 5 * c * self.inner + c * (self.rank + 2 * self.state) + states
        return self.hidden * (8 + 2 * c) + self.inner * (6 * c + 4) + 2 * c * (self.rank + 2 * self.state) + states

    def dropped_in_layer(self, compute_bytes: int) -> float:
        """What of it selective recomputation makes again."""
        return compute_bytes * (self.hidden + 2 * self.inner)

    @property
    def working(self) -> float:
        """Bytes a token takes while the scan of one layer goes backwards."""
        return (16 if self.kernels else 32) * self.inner


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

    def kept_in_layer(self, compute_bytes: int) -> float:
        """Bytes a token leaves behind in one layer for the backward pass."""
        c = compute_bytes
        shared = self.groups * self.state
        return self.hidden * (8 + 2 * c) + 5 * c * self.inner + 4 * c * shared + (c + 16) * self.rank

    def dropped_in_layer(self, compute_bytes: int) -> float:
        """What of it selective recomputation makes again."""
        return compute_bytes * (self.hidden + 2 * self.inner + 2 * self.groups * self.state)

    @property
    def working(self) -> float:
        """Bytes a token takes while the scan of one layer goes backwards."""
        return self.inner * (16 + 12 * self.state / CHUNK)


def _rank(written: Any, hidden: int) -> int:
    return math.ceil(hidden / 16) if written == "auto" else int(written)


def kept_bytes_per_token(shape: ModelShape, compute_bytes: int, checkpointing: bool | str) -> float:
    """Bytes a token leaves behind in the whole forward pass for the backward pass; `checkpointing` as in a recipe."""
    layer = shape.kept_in_layer(compute_bytes)
    if checkpointing == "selective":
        return (layer - shape.dropped_in_layer(compute_bytes)) * shape.layers
    return 4 * shape.hidden * shape.layers + layer if checkpointing else layer * shape.layers


def optimizer_bytes(optim: str) -> float:
    """Optimizer state in bytes a trained parameter."""
    if "8bit" in optim:
        return 2
    if optim.startswith("sgd") or "adafactor" in optim:
        return 0
    return 4 if optim.startswith(("lion", "adagrad", "rmsprop")) else 8


def tokens_per_forward(recipe: Recipe, stage: str) -> int:
    """The most tokens a device may see in one forward pass: rows of max_length, or pairs of two completions."""
    if recipe.state_passing != "off":
        return recipe.state_passing_chunk  # whatever the rows are; a batch may hold a document of any length
    tokens = recipe.per_device_train_batch_size * recipe.max_length * (2 if stage in PAIR_STAGES else 1)
    return min(tokens, recipe.max_tokens_per_device or tokens)


def estimate(shape: ModelShape, recipe: Recipe, stage: str) -> dict[str, float]:
    """Bytes on one device by part, and their sum under "total"; without any sharding over devices."""
    count = shape.parameters
    stored: float = 2 if recipe.dtype in ("bfloat16", "float16") else 4
    mixed = recipe.bf16 or recipe.fp16
    compute = 2 if mixed or stored == 2 else 4
    tokens = tokens_per_forward(recipe, stage)
    head = 0 if stage == "reward" else HEAD_BYTES  # a score needs no logits
    kept = kept_bytes_per_token(shape, compute, recipe.gradient_checkpointing)
    trained, weights, trained_bytes = count, stored * count, stored
    if recipe.use_peft:
        trained = shape.lora_parameters(recipe.lora_r, recipe.lora_target_modules)
        trained += shape.full_parameters(recipe.lora_modules_to_save)
        bits = 0.5 * 1.125 if recipe.load_in_4bit else 1.0 if recipe.load_in_8bit else stored
        quantised, largest = shape.quantised, max(math.prod(size) for size in shape.projections.values())
        unpacked = compute * largest if bits != stored else 0
        weights = bits * quantised + stored * (count - quantised) + 4 * trained + unpacked
        trained_bytes = 4
        layers = 1 if recipe.gradient_checkpointing is True else shape.layers
        kept += layers * shape.lora_kept(recipe.lora_r, recipe.lora_target_modules, compute)
    parts: dict[str, float] = {
        "weights": weights,
        # autocast keeps copies of what trains; a frozen fp32 weight is copied at every use and let go.
        "autocast copies": 2 * trained if mixed and trained_bytes == 4 else 0,
        "gradients": trained_bytes * trained,
        "optimizer": optimizer_bytes(recipe.optim) * trained,
        "kept for backward": kept * tokens,
        "working": shape.working * tokens,
        "head": head,
    }
    parts["total"] = sum(parts.values())
    return parts
