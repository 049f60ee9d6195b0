"""The models that benchmarks compare, and how each turns a batch into a loss: ours, mamba-ssm's, a Transformer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from mambalign.bench.measure import DEVICE, NoNumbers, relative_error, say
from mambalign.data.batches import PackedBatch, collate_sequences
from mambalign.models import original
from mambalign.models.checkpoint import load_model
from mambalign.models.mamba import MambaForCausalLM
from mambalign.ops import Segments, token_logps
from mambalign.recipe import UserError

VOCABULARY = {"tiny": 512, "4m": 512, "130m": 50280, "790m": 50280, "2.8b": 50280}
# Widths and layers, and of the Transformer heads. Two of Mamba's layers have the parameters of one of a Transformer's.
MAMBA = {"tiny": (32, 2), "4m": (256, 8), "130m": (768, 24), "790m": (1536, 48), "2.8b": (2560, 64)}
NEOX = {"tiny": (32, 2, 4), "4m": (256, 4, 4), "130m": (768, 12, 12), "790m": (1536, 24, 16), "2.8b": (2560, 32, 32)}
WEIGHTS = ("bf16", "fp32 + autocast", "fp32")
LONGEST = 1 << 20  # positions of a Transformer with random weights: its rotary embedding makes any number of them
# The loss and all gradients, as one vector, of ours beside the same weights under the ops' definition.
BOUNDS = {"bf16": (2e-2, 0.15), "fp32 + autocast": (2e-2, 0.15), "fp32": (1e-4, 1e-3)}


def ours(size: str, weights: str, recompute: bool | str = False) -> Any:
    """With the spread of mamba-ssm's initial weights: with transformers', 5 to 9 times that, a deep model is chaotic,
    bf16 and fp32 part within 20 layers, and nothing could be compared but averages."""
    width, layers = MAMBA[size]
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY[size], hidden_size=width, num_hidden_layers=layers, use_cache=False, pad_token_id=0,
        initializer_range=(3 * width) ** -0.5,
    )  # fmt: skip
    with torch.device(DEVICE):
        model = MambaForCausalLM(config)
    return _prepared(model, weights, recompute)


def transformer(size: str, weights: str, recompute: bool | str = False, length: int = LONGEST) -> Any:
    """transformers' GPT-NeoX in Pythia's shapes, with PyTorch's attention."""
    width, layers, heads = NEOX[size]
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY[size], hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=length, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    with torch.device(DEVICE):
        model = transformers.GPTNeoXForCausalLM(config)
    return _prepared(model, weights, recompute)


def load_ours(path: str, weights: str) -> Any:
    """A Mamba of a folder or hub id. UserError as `load_model`."""
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    return _prepared(load_model(path, dtype=dtype, device=DEVICE), weights, False)


def load_transformer(path: str, weights: str) -> Any:
    """Any causal language model that transformers has, with PyTorch's attention.

    Raises:
        UserError: nothing there, or no such model.
    """
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError, KeyError) as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"--transformer {path}: transformers cannot load it as a language model ({said})") from error
    return _prepared(model.to(DEVICE), weights, False)


def _prepared(model: Any, weights: str, recompute: bool | str) -> Any:
    if weights == "bf16":
        model = model.to(torch.bfloat16)
    if hasattr(model, "set_cuda_graphs"):  # ours, as a run trains it
        model.set_cuda_graphs(True)
    set_recompute(model, recompute)
    return model.train()


def set_recompute(model: Any, recompute: bool | str) -> None:
    """What the backward pass computes again: nothing, whole blocks (True), or "selective", which only ours has."""
    if hasattr(model, "gradient_checkpointing_enable"):
        if hasattr(model, "set_selective_recomputation"):
            model.set_selective_recomputation(recompute == "selective")
        if recompute is True:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        elif any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            model.gradient_checkpointing_disable()
        return
    for block in model.backbone.layers:  # mamba-ssm has no switch for it
        vars(block).pop("forward", None)
        if recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def recomputing(model: Any, how: bool | str, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`run` with blocks recomputed, in part where `how` is "selective", and nothing recomputed afterwards."""

    def recomputed() -> Tensor:
        set_recompute(model, how)
        try:
            return run()
        finally:
            set_recompute(model, False)

    return recomputed


def mamba_ssm(like: Any, weights: str, recompute: bool | str = False) -> Any:
    """mamba-ssm's model with the weights of ours; None, aloud, where it is not installed or has no such model."""
    try:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except ImportError:
        return None
    if like.config.model_type != "mamba":
        say(f"mamba-ssm: no contestant, only Mamba-1 is compared and this is a {like.config.model_type}")
        return None
    try:
        config = original.to_original_config(like)
    except UserError as error:
        say(f"mamba-ssm: no contestant ({error})")
        return None
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    model = MambaLMHeadModel(MambaConfig(**config), device=DEVICE, dtype=dtype)
    state = {
        name.replace("backbone.embeddings", "backbone.embedding"): value for name, value in like.state_dict().items()
    }
    model.load_state_dict(state)
    set_recompute(model, recompute)
    return model.train()


def training_length(model: Any) -> int | None:
    """Positions that a Transformer was made for."""
    found = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    return None if found is None else int(found)


def reach(model: Any, longest: int) -> tuple[int, str]:
    """(tokens that a Transformer can be given, what is done past its training length)."""
    trained = training_length(model)
    if trained is None or longest <= trained:
        return longest, "within its training length"
    rotary = any("rotary" in type(module).__name__.lower() for module in model.modules())
    if rotary:
        kind = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
        return longest, f"positions run on past {trained:,} (rotary embeddings, {kind})"
    return trained, f"its {trained:,} positions are a table: it cannot read further"


def gib(*models: Any) -> float:
    """Memory of the weights."""
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters()) / 2**30


def million(model: Any) -> float:
    """Parameters, in millions."""
    return float(sum(p.numel() for p in model.parameters()) / 1e6)


def autocast(weights: str) -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=weights == "fp32 + autocast")


# ------------------------------------------------------------------------------------------------------------ losses


def random_batch(ids: Tensor) -> PackedBatch:
    """Rows of ids `[rows, length]` laid end to end, every token but the first of a row a target."""
    rows = ids.cpu().numpy()
    examples = [{"input_ids": row, "loss_mask": np.ones_like(row), "index": 0} for row in rows]
    return collate_sequences(examples).to(DEVICE)


def target_logps(model: Any, batch: PackedBatch, summed: bool = False) -> Tensor:
    """fp32 `[M]`, as the trainer asks for them. The plans of the kernels are made anew, as for a batch never seen."""
    segments = Segments(batch.segments.cu_seqlens, batch.segments.parent)
    logps: Tensor = model(
        batch.input_ids[None],
        segments=segments,
        target_positions=batch.target_positions,
        target_ids=batch.target_ids,
        targets_summed=summed,
        use_cache=False,
    ).logps
    return logps


def packed_loss(model: Any, batch: PackedBatch) -> Tensor:
    """Ours: only rows that predict a target meet the head, and logits never exist."""
    return -target_logps(model, batch, summed=True).sum() / batch.target_ids.numel()


def padded_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Logits of all positions and plain cross-entropy, as mamba-ssm's users train; -100 is no target."""
    logits = model(ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def hidden_and_head(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(last hidden states `[B, L, H]`, the head's weight `[V, H]`) of any transformers model."""
    hidden = model.base_model(ids, use_cache=False).last_hidden_state
    return hidden, model.get_output_embeddings().weight


def transformer_loss(model: Any, ids: Tensor) -> Tensor:
    """With the same chunked head as ours."""
    hidden, head = hidden_and_head(model, ids)
    targets = ids[:, 1:].flatten()
    return -token_logps(hidden[:, :-1].flatten(0, 1), head, targets, summed=True).sum() / targets.numel()


def attention(model: Any, ids: Tensor) -> tuple[Callable[[], Any], str]:
    """(context to run a Transformer in, what its attention is): FlashAttention where PyTorch has it for this model."""

    def flash() -> Any:
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION)

    with torch.no_grad(), contextlib.suppress(RuntimeError):
        with flash():
            model.base_model(ids, use_cache=False)
        return flash, "FlashAttention through PyTorch's SDPA"
    return contextlib.nullcontext, "PyTorch's SDPA, its own choice of kernel"


def step(
    model: Any,
    weights: str,
    *losses: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    context: Callable[[], Any] = contextlib.nullcontext,
) -> Callable[[], Tensor]:
    """A callable that runs forward and backward pass of one loss after the other; returns their sum.

    The second call of ours captures CUDA graphs, the third runs them. Their memory is not seen when they run, so it is
    that of the first two calls that counts.

    optimizer: takes a step at the end, if given. context: what all of it runs in.
    """
    graphs = getattr(getattr(model, "backbone", None), "graphs", None)
    first = True

    def run() -> Tensor:
        nonlocal first
        total = torch.zeros((), device=DEVICE)
        if graphs is not None:
            graphs.trying, first = first, False
        try:
            with context():
                for loss in losses:
                    with autocast(weights):
                        value = loss()
                    value.backward()
                    total += value.detach()
            if optimizer is not None:
                optimizer.step()
        finally:  # also where memory ran out
            model.zero_grad(set_to_none=True)
        return total

    return run


# ------------------------------------------------------------------------------------------------------- correctness


def check_ours(model: Any, weights: str, vocabulary: int) -> dict[str, float]:
    """Loss and gradients of ours at 48 tokens of two sequences, beside the same weights under the ops' definition.

    The definition are the loops of `ops.reference`. Returns both relative errors.

    Raises:
        NoNumbers: they differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(vocabulary, (length,), generator=generator).numpy() for length in (29, 19)]
    batch = collate_sequences([{"input_ids": row, "loss_mask": np.ones_like(row), "index": 0} for row in rows])
    batch = batch.to(DEVICE)
    found = {}
    for backend in ("auto", "reference"):
        model.set_backend(backend)
        try:
            with autocast(weights):
                loss = packed_loss(model, batch)
            loss.backward()
            found[backend] = float(loss.detach()), _gradient(model.parameters())
        finally:
            model.set_backend("auto")
            model.zero_grad(set_to_none=True)
    (loss_, gradient), (exact_loss, exact) = found["auto"], found["reference"]
    errors = {"loss": abs(loss_ / exact_loss - 1), "gradient": relative_error(gradient, exact)}
    for (name, error), bound in zip(errors.items(), BOUNDS[weights], strict=True):
        if not error < bound:
            raise NoNumbers(
                f"the {name} of ours differs by {error:.1e} from the definition of its ops (allowed: {bound:g}): "
                "no numbers"
            )
    say(f"ours against its definition: loss within {errors['loss']:.1e}, gradients within {errors['gradient']:.1e}")
    return errors


def _gradient(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """A sample of every gradient, fp32 on the CPU: of large models all of them would not fit twice."""
    parts = [p.grad.detach().flatten() for p in parameters if p.grad is not None]
    return torch.cat([part[:: max(1, part.numel() // 20000)].float().cpu() for part in parts])


def check_peer(losses: dict[str, float], bound: float = 2e-2) -> None:
    """Ours and mamba-ssm's model have the same weights, so the same loss.

    Raises:
        NoNumbers: they have not.
    """
    if {"ours", "mamba-ssm"} <= losses.keys() and not abs(losses["ours"] / losses["mamba-ssm"] - 1) < bound:
        raise NoNumbers(f"the losses differ: {losses}: no numbers")
