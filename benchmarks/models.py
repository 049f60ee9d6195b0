"""The models that the GPU benchmarks compare, with random weights, and how each turns a batch into a loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from common import DEVICE
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mambalign.data.batches import PackedBatch
from mambalign.models.mamba import MambaForCausalLM
from mambalign.ops import Segments, token_logps

VOCABULARY = {"tiny": 512, "130m": 50280, "790m": 50280, "2.8b": 50280}
# Widths and layers, and of the Transformer heads.
MAMBA = {"tiny": (32, 2), "130m": (768, 24), "790m": (1536, 48), "2.8b": (2560, 64)}
NEOX = {"tiny": (32, 2, 4), "130m": (768, 12, 12), "790m": (1536, 24, 16), "2.8b": (2560, 32, 32)}


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


def transformer(size: str, weights: str, recompute: bool, length: int) -> Any:
    """transformers' GPT-NeoX in Pythia's shapes, with PyTorch's flash attention."""
    width, layers, heads = NEOX[size]
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY[size], hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=length, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    with torch.device(DEVICE):
        model = transformers.GPTNeoXForCausalLM(config)
    return _prepared(model, weights, recompute)


def _prepared(model: Any, weights: str, recompute: bool | str) -> Any:
    if weights == "bf16":
        model = model.to(torch.bfloat16)
    if recompute == "selective":
        model.set_selective_recomputation()
    elif recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def recomputing(model: Any, how: bool | str, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`run` with blocks recomputed, in part where `how` is "selective", and the model as it was afterwards."""

    def recomputed() -> Tensor:
        if how == "selective":
            model.set_selective_recomputation()
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            return run()
        finally:
            model.set_selective_recomputation(False)
            model.gradient_checkpointing_disable()

    return recomputed


def mamba_ssm(like: Any, weights: str, recompute: bool = False) -> Any:
    """mamba-ssm's model with the weights of ours; None where it is not installed."""
    try:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except ImportError:
        return None
    config = MambaConfig(
        d_model=like.config.hidden_size, n_layer=like.config.num_hidden_layers, vocab_size=like.config.vocab_size,
        pad_vocab_size_multiple=8,
    )  # fmt: skip
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    model = MambaLMHeadModel(config, device=DEVICE, dtype=dtype)
    state = {
        name.replace("backbone.embeddings", "backbone.embedding"): value for name, value in like.state_dict().items()
    }
    model.load_state_dict(state)
    if recompute:  # it has no switch for it
        for block in model.backbone.layers:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model.train()


def gib(*models: Any) -> float:
    """Memory of the weights."""
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters()) / 2**30


def autocast(weights: str) -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=weights != "bf16")


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


def transformer_loss(model: Any, ids: Tensor) -> Tensor:
    """With the same chunked head as ours."""
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    head = model.embed_out if hasattr(model, "embed_out") else model.lm_head  # renamed within transformers 5
    targets = ids[:, 1:].flatten()
    return -token_logps(hidden, head.weight, targets, summed=True).sum() / targets.numel()


def step(model: Any, weights: str, *losses: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A callable that runs forward and backward pass of one loss after the other, no optimizer; returns their sum."""

    def run() -> Tensor:
        total = torch.zeros((), device=DEVICE)
        try:
            for loss in losses:
                with autocast(weights):
                    value = loss()
                value.backward()
                total += value.detach()
        finally:  # also where memory ran out
            model.zero_grad(set_to_none=True)
        return total

    return run
