"""The memory of a run on one device, by parts and by moments, from shapes alone. It follows what the code allocates.

With P parameters, d = hidden size, E = inner size, N = state size, R = rank of dt, c = bytes of an activation:

    weights    4 P      (2 P when they are stored in bfloat16)
    copies     2 P      bfloat16 copies that autocast makes of fp32 weights, until the backward pass has used them
    gradients  4 P      in the type of the weights
    AdamW      8 P      two moments in the type of the weights (2 P in 8 bits, 0 for plain SGD)
    update     4 P      a temporary of `adamw_torch` on a GPU, while it updates; fused ones have none
    kept       per token and layer, for the backward pass, by our kernels on a GPU
                   d (4 + c) + 5 c E + c (R + 2 N) + 4 E N / 32
               gradient_checkpointing: selective drops c (d + 2 E) of it, true all but 4 d
    working    per token, once: (3 c + 5) E for the gradients in a layer that goes backwards; with selective or true
               also what that layer computes again
    head       logits exist for a chunk of rows, 2^27 numbers on a GPU, two of them while one is replaced

With LoRA only the adapters, and what `lora_modules_to_save` names, have gradients and moments, in fp32. Frozen weights
lie in their stored type, in_proj and out_proj perhaps in 4 bits with a constant for every 64 (fp32, or nested: 8 bits
and an fp32 number for 256), and the one that is multiplied is unpacked. A frozen matrix does not keep its input, but an
adapter keeps a copy of it and a mask of its dropout: about as much.

Not all of this is there at once. Four moments can be the highest:

    forward ends       weights, moments, copies, all that is kept, and the head with its logits
    backward begins    the same (without copies, where layers are computed again), and the last layer's working memory
    backward ends      weights, moments, gradients, and the first layer's working memory
    update             weights, moments, gradients, and the update's temporary

and, seldom, evaluation and a DPO's reference pass, which keep nothing of a layer but may read larger batches.

With several forward passes a step, gradients are there at every moment. DDP adds buckets as large as the gradients;
`fsdp: full_shard` divides weights, gradients and moments by the number of devices, and gathers two blocks at a time.

`total` is the highest moment, which is what `torch.cuda.max_memory_allocated` shows. `device` is what a card must have:
besides, `context` for CUDA and its libraries, `fragments`, what the allocator takes from the card and cannot use, and
the moments of a paged optimizer, which move to the host where the card is full.
`tests/check/test_memory.py` compares all this with what the code really allocates, tensor by tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mambalign.check.shapes import Adapters, ModelShape
from mambalign.recipe import PAIR_STAGES, Recipe

CPU_CHUNK, GPU_CHUNK = 1 << 24, 1 << 27  # logits at a time: `ops.token_logps.CHUNK_ELEMENTS`
QUANTISED_BLOCK, NESTED_BLOCK = 64, 256  # weights of a constant, constants of a constant: bitsandbytes'
CONTEXT_BYTES = 0.6e9  # CUDA's context, the kernels of the libraries, their workspaces
FRAGMENTS = 0.12  # of `total`: reserved over allocated is 1.02 to 1.27, median 1.06, in benchmarks/results/plan.json


@dataclass(frozen=True)
class Load:
    """What one device sees in one optimizer step.

    tokens: of a forward pass, at most. targets: of them, the ones that predict something. passes: forward passes.
    """

    tokens: int
    targets: int
    passes: int = 1


def load_of(recipe: Recipe, stage: str, devices: int = 1) -> Load:
    """The most that the recipe allows: full rows, or pairs of two completions of max_length."""
    tokens, whole = tokens_per_forward(recipe, stage), _tokens_per_batch(recipe, stage)
    batches = recipe.gradient_accumulation_steps or 1
    if recipe.global_batch_size is not None:
        batches = math.ceil(recipe.global_batch_size / recipe.per_device_train_batch_size / devices)
    return Load(tokens, tokens, batches * math.ceil(whole / tokens))


def tokens_per_forward(recipe: Recipe, stage: str) -> int:
    """The most tokens a device may see in one forward pass: rows of max_length, or pairs of two completions."""
    if recipe.state_passing != "off":
        return recipe.state_passing_chunk  # whatever the rows are; a batch may hold a document of any length
    tokens = _tokens_per_batch(recipe, stage)
    return min(tokens, recipe.max_tokens_per_device or tokens)


def _tokens_per_batch(recipe: Recipe, stage: str) -> int:
    return recipe.per_device_train_batch_size * recipe.max_length * (2 if stage in PAIR_STAGES else 1)


@dataclass(frozen=True)
class Types:
    """Bytes of a stored weight and of an activation; `mixed`: autocast computes on copies."""

    stored: int
    compute: int
    mixed: bool

    @classmethod
    def of(cls, recipe: Recipe) -> Types:
        stored, mixed = (2 if recipe.dtype in ("bfloat16", "float16") else 4), recipe.bf16 or recipe.fp16
        return cls(stored, 2 if mixed or stored == 2 else 4, mixed)


def adapters_of(recipe: Recipe, on_gpu: bool) -> Adapters | None:
    """None where all weights train."""
    if not recipe.use_peft:
        return None
    types = Types.of(recipe)
    modules = None if recipe.lora_target_modules is None else tuple(recipe.lora_target_modules)
    # A dropout's mask is bytes on a GPU, and numbers of the input's type, which PEFT makes fp32, on a CPU.
    mask = (1 if on_gpu else 4) if recipe.lora_dropout else 0
    return Adapters(recipe.lora_r, modules, 2 if types.mixed else 4, mask)


def kept_bytes_per_token(
    shape: ModelShape, compute_bytes: int, checkpointing: bool | str, adapters: Adapters | None = None
) -> float:
    """Bytes a token leaves behind in the whole forward pass for the backward pass; `checkpointing` as in a recipe."""
    layer = shape.kept_in_layer(compute_bytes, adapters)
    if checkpointing == "selective":
        layer -= shape.dropped_in_layer(compute_bytes, adapters)
    elif checkpointing:
        layer = 4.0 * shape.hidden
    last_norm = (4 if shape.kernels else 8) * shape.hidden
    return layer * shape.layers + last_norm


def working_bytes_per_token(
    shape: ModelShape, compute_bytes: int, checkpointing: bool | str, adapters: Adapters | None = None
) -> float:
    """Bytes a token takes, beside what is kept, in the layer that runs."""
    # An adapter's input lies there twice in fp32, beside the output it is added to.
    wide = 0 if adapters is None else 8 + 2 * compute_bytes + 2 * max(0, adapters.copy - compute_bytes)
    forward = shape.inner * (wide or 4)
    backward = shape.working(compute_bytes)
    if checkpointing == "selective":
        return max(forward, backward) + 0.8 * shape.dropped_in_layer(compute_bytes, adapters)
    if checkpointing:  # the layer runs forwards again, with the gradients of its outputs waiting
        again = shape.kept_in_layer(compute_bytes, adapters) - 4 * shape.hidden
        return again + max(forward + 5 * shape.hidden, backward)
    return max(forward, backward)


def optimizer_bytes(optim: str, stored: int = 4) -> float:
    """Optimizer state in bytes a trained parameter of `stored` bytes."""
    if "8bit" in optim:
        return 2
    if optim.startswith("sgd") or "adafactor" in optim:
        return 0
    moment = stored if optim in ("adamw_torch", "adamw_torch_fused") else 4
    return moment if optim.startswith(("lion", "adagrad", "rmsprop")) else 2 * moment


def quantised_bytes(recipe: Recipe, stored: float) -> float:
    """Bytes of a weight of in_proj or out_proj."""
    if recipe.load_in_4bit:
        constants = (1 + 4 / NESTED_BLOCK if recipe.use_bnb_nested_quant else 4) / QUANTISED_BLOCK
        return 0.5 + constants
    return 1.0 if recipe.load_in_8bit else stored


def estimate(
    shape: ModelShape, recipe: Recipe, stage: str, devices: int = 1, load: Load | None = None
) -> dict[str, float]:
    """Bytes on one device: by part, at the highest moment ("total"), and with what no tensor holds ("device").

    Args:
        devices: processes of the run, one a device.
        load: what a device sees in a step; None: the most that the recipe allows.
    """
    load = load or load_of(recipe, stage, devices)
    types, on_gpu = Types.of(recipe), shape.kernels
    adapters = adapters_of(recipe, on_gpu)
    checkpointing = recipe.gradient_checkpointing
    parts = _of_weights(shape, recipe, types)
    kept = kept_bytes_per_token(shape, types.compute, checkpointing, adapters) * load.tokens
    working = working_bytes_per_token(shape, types.compute, checkpointing, adapters) * load.tokens
    parts |= {"kept for backward": kept, "working": working}
    parts |= _head(shape, recipe, types, load, stage)
    parts["update"] = parts["gradients"] if on_gpu and recipe.optim == "adamw_torch" else 0.0
    parts["communication"] = 0.0
    if devices > 1:
        _distribute(parts, shape, recipe, types, devices)
    paged = parts["optimizer"] if "paged" in recipe.optim else 0.0
    parts["optimizer"] -= paged  # it is no tensor of PyTorch's, and can move to the host
    moments = _moments(parts, shape, recipe, stage, load)
    parts["total"] = max(moments.values())
    if on_gpu:
        parts |= {"context": CONTEXT_BYTES, "fragments": FRAGMENTS * parts["total"], "paged optimizer": paged}
        parts["device"] = parts["total"] + parts["context"] + parts["fragments"] + paged
    return parts


def highest_moment(shape: ModelShape, recipe: Recipe, stage: str, parts: dict[str, float], load: Load) -> str:
    """The moment of `estimate`'s total."""
    moments = _moments(parts, shape, recipe, stage, load)
    return max(moments, key=lambda name: moments[name])


def _moments(parts: dict[str, float], shape: ModelShape, recipe: Recipe, stage: str, load: Load) -> dict[str, float]:
    always = parts["weights"] + parts["optimizer"] + parts["communication"]
    gradients = parts["gradients"]
    before = gradients if load.passes > 1 else 0.0
    kept, copies, working = parts["kept for backward"], parts["autocast copies"], parts["working"]
    # Layers that are computed again need no copies meanwhile, and end with nothing of a layer kept.
    again = recipe.gradient_checkpointing is True
    return {
        "forward ends": always + before + copies + kept + parts["head"] + parts["logits"],
        "backward begins": always + before + (0 if again else copies) + kept + parts["head"] + working,
        "backward ends": always + gradients + kept / shape.layers + working,
        "update": always + gradients + parts["update"],
    } | _without_gradients(parts, shape, recipe, stage, always)


def _without_gradients(
    parts: dict[str, float], shape: ModelShape, recipe: Recipe, stage: str, always: float
) -> dict[str, float]:
    """Moments of passes that keep nothing: a layer's intermediate results and the head's chunks."""
    c, pairs = Types.of(recipe).compute, 2 if stage in PAIR_STAGES else 1
    each = 5 * c * shape.inner + (8 + c) * shape.hidden
    fixed = parts["autocast copies"] + parts["logits"]
    moments = {}
    if recipe.do_eval:
        tokens = recipe.per_device_eval_batch_size * recipe.max_length * pairs
        moments["evaluation"] = always + fixed + each * min(tokens, recipe.max_tokens_per_device or tokens)
    if stage == "dpo":
        bound = recipe.reference_batch_tokens or recipe.max_tokens_per_device
        bound = bound or recipe.per_device_train_batch_size * recipe.max_length
        moments["reference pass"] = parts["weights"] + fixed + each * bound
    return moments


def _of_weights(shape: ModelShape, recipe: Recipe, types: Types) -> dict[str, float]:
    """What does not depend on the tokens."""
    count, stored = shape.parameters, types.stored
    matrices = shape.layers * sum(math.prod(size) for size in shape.projections.values())
    copies = 2.0 * (matrices + shape.vocab * shape.hidden) if types.mixed and stored == 4 else 0.0
    if not recipe.use_peft:
        state = optimizer_bytes(recipe.optim, stored) * count
        return {
            "weights": stored * count,
            "autocast copies": copies,
            "gradients": stored * count,
            "optimizer": state,
        }
    trained = shape.lora_parameters(recipe.lora_r, recipe.lora_target_modules)
    trained += shape.full_parameters(recipe.lora_modules_to_save)
    bits = quantised_bytes(recipe, stored)
    largest = max(math.prod(size) for size in shape.projections.values())
    unpacked = types.compute * largest if bits != stored else 0
    if bits != stored:
        copies -= 2.0 * shape.quantised if copies else 0.0
    weights = bits * shape.quantised + stored * (count - shape.quantised) + 4 * trained + unpacked
    copies += 2.0 * trained if types.mixed else 0.0
    if recipe.gradient_checkpointing is True and not types.mixed:
        copies = 0.0
    return {
        "weights": weights,
        "autocast copies": copies,
        "gradients": 4.0 * trained,
        "optimizer": optimizer_bytes(recipe.optim) * trained,
    }


def _head(shape: ModelShape, recipe: Recipe, types: Types, load: Load, stage: str) -> dict[str, float]:
    """The rows that predict, their gradients and the weight's, if it trains: "head"; and the chunks: "logits"."""
    if stage == "reward":  # a score needs no logits
        return {"head": 0.0, "logits": 0.0}
    limit = GPU_CHUNK if shape.kernels else CPU_CHUNK
    rows = max(1, limit // shape.vocab)
    chunk = min(load.targets, rows) * shape.vocab * (types.compute if shape.kernels else 4)
    chunks = chunk * (2 if load.targets > rows or not shape.kernels else 1)
    predicting = 2 * types.compute * load.targets * shape.hidden
    weight = 0.0 if recipe.use_peft else 4.0 * shape.vocab * shape.hidden
    normed = 4.0 * (load.tokens + load.targets) * shape.hidden if types.stored == 4 else 0.0
    return {"head": predicting + weight, "logits": max(chunks + normed, 1.5 * weight)}


def _distribute(parts: dict[str, float], shape: ModelShape, recipe: Recipe, types: Types, devices: int) -> None:
    """Change `parts` to those of one of several devices."""
    if not recipe.fsdp:
        parts["communication"] = parts["gradients"]  # DDP's buckets
        return
    for name in ("weights", "gradients", "optimizer", "update"):
        parts[name] /= devices
    # Whole: what is in no block, the block that runs and the next one; and gradients before they are split.
    block = shape.layer_parameters
    rest = shape.parameters - shape.layers * block
    parts["communication"] = types.stored * float(rest + 2 * block + (0 if recipe.use_peft else rest + block))


def on_gpu(shape: ModelShape) -> ModelShape:
    """The same model as a GPU runs it."""
    return replace(shape, kernels=True)
