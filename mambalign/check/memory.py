"""How large a run is, from shapes alone: parameters, and bytes on one device. Formulas, not measurements.

With P parameters, d = hidden size, E = inner size, N = state size, R = rank of dt, c = bytes of the compute type:

    weights    4 P      (2 P when they are stored in bfloat16), and 2 P of bfloat16 copies that autocast keeps
    gradients  4 P      in the type of the weights
    AdamW      8 P      two fp32 moments (2 P in 8 bits, 0 for plain SGD)
    kept       per token and layer, for the backward pass: d (8 + 2c) + E (6c + 4) + 2c (R + 2N) + 4 E N / 32
               gradient_checkpointing: selective drops c (d + 2E) of it, the outputs of norm, convolution, dt_proj
               gradient_checkpointing: true leaves only 4 d, and the above once, for the layer at hand
    working    per token, once: 32 E for the fp32 vectors of the scan's backward pass
    head       128 MiB: logits exist for a chunk of rows only

Adapters (LoRA) put gradients and moments on their own parameters only, and 4-bit weights count 0.5 bytes and a tenth
for their constants. What is not in it: the CUDA context (about 0.5 GB), fragmentation, other programs. Expect +-25 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mambalign.recipe import Recipe, UserError

HEAD_BYTES = 128 * 2**20
SCAN_TILE = 32  # tokens for which the scan keeps one state
MAMBA_TYPES = ("mamba", "falcon_mamba")


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide parameters and memory of a Mamba-1 or Falcon-Mamba model."""

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
        if ssm.get("layer", "Mamba1") != "Mamba1":
            raise UserError(f"the model's config.json names layer {ssm['layer']!r}; only Mamba-1 is supported")
        hidden, multiple = int(config["d_model"]), int(config.get("pad_vocab_size_multiple") or 1)
        rank = ssm.get("dt_rank", "auto")
        return cls(
            hidden=hidden,
            layers=int(config["n_layer"]),
            vocab=math.ceil(int(config["vocab_size"]) / multiple) * multiple,
            inner=int(ssm.get("expand", 2)) * hidden,
            rank=math.ceil(hidden / 16) if rank == "auto" else int(rank),
            state=int(ssm.get("d_state", 16)),
            conv=int(ssm.get("d_conv", 4)),
            tied=bool(config.get("tie_embeddings", True)),
            conv_bias=bool(ssm.get("conv_bias", True)),
            proj_bias=bool(ssm.get("bias", False)),
        )

    @classmethod
    def _hugging_face(cls, config: Mapping[str, Any]) -> ModelShape:
        kind = config.get("model_type")
        if kind not in MAMBA_TYPES:
            raise UserError(f"the model is of type {kind!r}; supported are {', '.join(MAMBA_TYPES)}")
        hidden = int(config["hidden_size"])
        rank = config.get("time_step_rank", "auto")
        return cls(
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            vocab=int(config["vocab_size"]),
            inner=int(config.get("intermediate_size") or config.get("expand", 2) * hidden),
            rank=math.ceil(hidden / 16) if rank == "auto" else int(rank),
            state=int(config.get("state_size", 16)),
            conv=int(config.get("conv_kernel", 4)),
            tied=bool(config.get("tie_word_embeddings", True)),
            conv_bias=bool(config.get("use_conv_bias", True)),
            proj_bias=bool(config.get("use_bias", False)),
        )

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
        conv = self.inner * (self.conv + self.conv_bias)
        biases = self.inner + self.proj_bias * (2 * self.inner + self.hidden)  # dt_proj always has one
        return matrices + conv + biases + self.inner * (self.state + 1) + self.hidden  # A_log, D, norm

    @property
    def parameters(self) -> int:
        """All parameters, a tied head once."""
        heads = 1 if self.tied else 2
        return self.layers * self.layer_parameters + heads * self.vocab * self.hidden + self.hidden

    def lora_parameters(self, rank: int, modules: list[str] | None) -> int:
        """Parameters of LoRA adapters on the named projections (None: all four)."""
        wanted = modules if modules is not None else list(self.projections)
        return self.layers * sum(rank * sum(s) for name, s in self.projections.items() if name in wanted)


def kept_bytes_per_token(shape: ModelShape, compute_bytes: int, checkpointing: bool | str) -> float:
    """Bytes a token leaves behind in the whole forward pass for the backward pass; `checkpointing` as in a recipe."""
    c = compute_bytes
    layer = (
        shape.hidden * (8 + 2 * c)
        + shape.inner * (6 * c + 4)
        + 2 * c * (shape.rank + 2 * shape.state)
        + 4 * shape.inner * shape.state / SCAN_TILE
    )
    if checkpointing == "selective":
        return (layer - c * (shape.hidden + 2 * shape.inner)) * shape.layers
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
    tokens = recipe.per_device_train_batch_size * recipe.max_length * (2 if stage == "dpo" else 1)
    return min(tokens, recipe.max_tokens_per_device or tokens)


def estimate(shape: ModelShape, recipe: Recipe, stage: str) -> dict[str, float]:
    """Bytes on one device by part, and their sum under "total"; without any sharding over devices."""
    count = shape.parameters
    adapters = recipe.use_peft
    trained = shape.lora_parameters(recipe.lora_r, recipe.lora_target_modules) if adapters else count
    stored: float = 2 if recipe.dtype in ("bfloat16", "float16") else 4
    frozen = 0.55 if recipe.load_in_4bit else 1.1 if recipe.load_in_8bit else stored
    mixed = recipe.bf16 or recipe.fp16
    compute = 2 if mixed or stored == 2 else 4
    tokens = tokens_per_forward(recipe, stage)
    parts: dict[str, float] = {
        "weights": frozen * count + stored * trained if adapters else stored * count,
        "autocast copies": 2 * trained if mixed and stored == 4 else 0,
        "gradients": stored * trained,
        "optimizer": optimizer_bytes(recipe.optim) * trained,
        "kept for backward": kept_bytes_per_token(shape, compute, recipe.gradient_checkpointing) * tokens,
        "working": 32 * shape.inner * tokens,
        "head": HEAD_BYTES,
    }
    parts["total"] = sum(parts.values())
    return parts
