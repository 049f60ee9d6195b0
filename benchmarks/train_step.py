"""Forward + backward of whole models on a GPU, no optimizer: ours, mamba-ssm's own, and a Transformer of the same size.

    python benchmarks/train_step.py --only 130m       # or 2.8b, or long; all by default

Random weights and tokens, every token a target. The Transformer is transformers' GPT-NeoX in Pythia's shapes with
PyTorch's flash attention and the same chunked head as ours. Correctness first: the loss of ours and of mamba-ssm's
model on the same weights and tokens must agree.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from common import arguments, compete, environment, write

from mambalign.models.mamba import MambaForCausalLM
from mambalign.ops import Segments, token_logps

VOCABULARY = 50280
MAMBA = {"130m": (768, 24), "790m": (1536, 48), "2.8b": (2560, 64)}
NEOX = {"130m": (768, 12, 12), "790m": (1536, 24, 16), "2.8b": (2560, 32, 32)}
# (group, size, rows, length, weights, recomputation of blocks)
CASES = [
    ("130m", "130m", 16, 2048, "fp32 + autocast", False),
    ("130m", "130m", 16, 2048, "bf16", False),
    ("2.8b", "2.8b", 4, 2048, "bf16", False),
    ("2.8b", "2.8b", 4, 2048, "fp32 + autocast", True),
    ("long", "130m", 4, 8192, "bf16", False),
    ("long", "130m", 1, 32768, "bf16", False),
    ("long", "130m", 1, 131072, "bf16", True),
]


def ours(size: str, weights: str, recompute: bool) -> Any:
    width, layers = MAMBA[size]
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, use_cache=False, pad_token_id=0
    )
    with torch.device("cuda"):
        model = MambaForCausalLM(config)
    return _prepared(model, weights, recompute)


def transformer(size: str, weights: str, recompute: bool, length: int) -> Any:
    width, layers, heads = NEOX[size]
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=length, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    with torch.device("cuda"):
        model = transformers.GPTNeoXForCausalLM(config)
    return _prepared(model, weights, recompute)


def _prepared(model: Any, weights: str, recompute: bool) -> Any:
    if weights == "bf16":
        model = model.to(torch.bfloat16)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def mamba_ssm(like: Any, size: str, weights: str) -> Any:
    """mamba-ssm's model with the weights of ours; None where it is not installed."""
    try:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except ImportError:
        return None
    width, layers = MAMBA[size]
    config = MambaConfig(d_model=width, n_layer=layers, vocab_size=VOCABULARY, pad_vocab_size_multiple=8)
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    model = MambaLMHeadModel(config, device="cuda", dtype=dtype)
    state = {
        name.replace("backbone.embeddings", "backbone.embedding"): value for name, value in like.state_dict().items()
    }
    model.load_state_dict(state)
    return model.train()


def packed_step(model: Any, ids: torch.Tensor, autocast: bool) -> Callable[[], torch.Tensor]:
    """One flat row of equal segments, every token but the first of each a target, as training does it."""
    rows, length = ids.shape
    segments = Segments.from_lengths([length] * rows)
    flat = ids.flatten()
    positions = (torch.arange(rows)[:, None] * length + torch.arange(length - 1)).flatten().cuda()

    def run() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logps = model(
                flat[None],
                segments=segments,
                target_positions=positions,
                target_ids=flat[positions + 1],
                use_cache=False,
            ).logps
        return _finish(model, -logps.mean())

    return run


def padded_step(model: Any, ids: torch.Tensor, autocast: bool) -> Callable[[], torch.Tensor]:
    """Logits and plain cross-entropy, as mamba-ssm's users train."""

    def run() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logits = model(ids).logits
        return _finish(model, F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))

    return run


def transformer_step(model: Any, ids: torch.Tensor, autocast: bool) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            hidden = model.gpt_neox(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            logps = token_logps(hidden, model.embed_out.weight, ids[:, 1:].flatten())
        return _finish(model, -logps.mean())

    return run


def _finish(model: Any, loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()


def measure(case: tuple[Any, ...], repeats: int, who: set[str]) -> list[dict[str, Any]]:
    _, size, rows, length, weights, recompute = case
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (rows, length), device="cuda")
    autocast = weights != "bf16"
    results: dict[str, dict[str, float]] = {}
    losses: dict[str, float] = {}

    def one(name: str, run: Callable[[], torch.Tensor]) -> None:
        torch.cuda.empty_cache()
        try:
            losses[name] = float(run())
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory", flush=True)
            return
        results.update(compete({name: run}, repeats))

    model = ours(size, weights, recompute)
    held = torch.cuda.memory_allocated() / 2**30
    one("ours", packed_step(model, ids, autocast))
    if "mamba-ssm" in who and not recompute and (peer := mamba_ssm(model, size, weights)) is not None:
        one("mamba-ssm", padded_step(peer, ids, autocast))
        del peer
    del model
    gc.collect()
    if "transformer" in who:
        model = transformer(size, weights, recompute, length)
        one("transformer", transformer_step(model, ids, autocast))
        del model
    gc.collect()
    if "mamba-ssm" in losses and not abs(losses["ours"] - losses["mamba-ssm"]) < 2e-2 * losses["mamba-ssm"]:
        raise SystemExit(f"the losses differ: {losses}")
    made = []
    for name, result in results.items():
        row = {"size": size, "rows": rows, "length": length, "weights": weights, "recompute": recompute, "who": name}
        row |= {
            "tokens_per_second": rows * length / result["ms"] * 1e3,
            "activations_gib": result["gib"],
            "weights_gib": held,
        }
        made.append(row)
        ratio = results["mamba-ssm"]["ms"] / result["ms"] if name == "ours" and "mamba-ssm" in results else None
        print(
            f"{size:>5} {rows:>3} x {length:>7,} {weights:>15}{' recomputed' if recompute else '':11} {name:>12}: "
            f"{row['tokens_per_second']:>10,.0f} tok/s, {held + result['gib']:6.1f} GiB, loss {losses[name]:.4f}"
            + (f", {ratio:.2f}x mamba-ssm" if ratio else ""),
            flush=True,
        )
    return made


def main() -> None:
    parser = arguments(__doc__ or "", "train_step")
    parser.add_argument("--only", nargs="*", default=["130m", "2.8b", "long"], help="groups of cases")
    parser.add_argument("--who", nargs="*", default=["mamba-ssm", "transformer"], help="whom to measure beside ours")
    options = parser.parse_args()
    print(" | ".join(f"{k} {v}" for k, v in environment().items()))
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if case[0] in options.only:
            rows += measure(case, options.repeats, set(options.who))
    write(options.json, rows)


if __name__ == "__main__":
    main()
