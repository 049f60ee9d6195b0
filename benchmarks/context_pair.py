"""A Mamba and a GPT-NeoX of one size, pre-trained on the same tokens in sequences of one length: for bench perplexity.

    python benchmarks/context_pair.py --data novels.jsonl --join doc --tokenizer TOKENIZER --out pair --seconds 60
    mambalign bench perplexity pair/mamba --transformer pair/neox --data pair/held-out.jsonl --lengths 512..32k

Both see the same batches in the same order, as many as the slower one manages in `--seconds`. The last documents are
held out. After a minute both are poor language models; what the figure shows is what happens past their length.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambalign.bench import contestants
from mambalign.bench.measure import DEVICE, free_memory
from mambalign.bench.perplexity import Options, texts_of
from mambalign.models.checkpoint import load_tokenizer, save_model

PIECE = 20000  # characters tokenised together: pieces go to all cores


def tokens_of(documents: Sequence[str], tokenizer: Any) -> Tensor:
    """All documents end to end, each ended with eos: int64 `[tokens]`."""
    pieces = [(text, start) for text in documents for start in range(0, len(text), PIECE)]
    ids = tokenizer([text[start : start + PIECE] for text, start in pieces], add_special_tokens=False)["input_ids"]
    ended = ([tokenizer.eos_token_id] if start + PIECE >= len(text) else [] for text, start in pieces)
    return torch.tensor([token for piece, end in zip(ids, ended, strict=True) for token in [*piece, *end]])


def batches(tokens: Tensor, rows: int, length: int) -> Callable[[int], Tensor]:
    """Step -> int64 `[rows, length]`, the same for every model."""

    def batch(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(tokens.numel() - length, (rows,), generator=generator)
        return torch.stack([tokens[start : start + length] for start in starts.tolist()]).to(DEVICE)

    return batch


def train(model: Any, loss_of: Callable[[Tensor], Tensor], batch: Callable[[int], Tensor], steps: int | None,
          seconds: float, rate: float) -> int:  # fmt: skip
    """AdamW with warm-up and cosine decay, over `steps`, or as many as fit into `seconds`; returns how many."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    began, step, share = time.monotonic(), 0, 0.0
    while share < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))
        with contestants.autocast("fp32 + autocast"):
            loss = loss_of(batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            print(f"{type(model).__name__} step {step}: loss {float(loss.detach()):.3f}", flush=True)
        step += 1
        share = step / steps if steps else (time.monotonic() - began) / seconds
    return step


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="as of mambalign bench perplexity")
    parser.add_argument("--join", help="rows that are equal in this column are parts of one document")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", default="130m", choices=list(contestants.MAMBA))
    parser.add_argument("--length", type=int, default=512, help="of the training sequences")
    parser.add_argument("--rows", type=int, default=64, help="sequences a step")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training the first of the two")
    parser.add_argument("--held-out", type=int, default=8, help="documents, the last ones")
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(options.tokenizer)
    documents = list(texts_of(Options("", options.data, join=options.join, split=None)))
    if len(documents) <= options.held_out:
        raise SystemExit(f"{len(documents)} documents are too few to hold {options.held_out} out")
    options.out.mkdir(parents=True, exist_ok=True)
    held_out = "".join(json.dumps({"text": text}) + "\n" for text in documents[-options.held_out :])
    (options.out / "held-out.jsonl").write_text(held_out, encoding="utf-8")
    batch = batches(tokens_of(documents[: -options.held_out], tokenizer), options.rows, options.length)
    contestants.VOCABULARY[options.size] = -(-len(tokenizer) // 8) * 8  # both get the tokenizer's
    steps = None
    makers: dict[str, Any] = {
        "mamba": lambda: contestants.ours(options.size, "fp32"),
        "neox": lambda: contestants.transformer(options.size, "fp32", length=options.length),
    }
    for name, make in makers.items():
        model = make()

        def loss_of(ids: Tensor, model: Any = model, name: str = name) -> Tensor:
            if name == "mamba":
                return contestants.packed_loss(model, contestants.random_batch(ids))
            return contestants.transformer_loss(model, ids)

        steps = train(model, loss_of, batch, steps, options.seconds, options.rate)
        print(f"{name}: {steps} steps of {options.rows} x {options.length} tokens", flush=True)
        if name == "mamba":
            save_model(model.cpu(), options.out / name, tokenizer=tokenizer, overwrite=True)
        else:
            model.save_pretrained(options.out / name)
            tokenizer.save_pretrained(options.out / name)
        del model
        free_memory()


if __name__ == "__main__":
    main()
