"""Decoding tokens/s: the engine beside transformers' generate() on a CPU, beside mamba-ssm's CUDA-graph one on a GPU.

Correctness comes first: no number is printed unless both give the same greedy tokens. On a CPU the model has 8 layers
of width 256, and each contestant runs 1 and 8 answers. On a GPU (`--gpu`, sizes by `--sizes`) batches are 1, 8 and 64:
even ones, where all answers have one length, and an uneven one, where mamba-ssm goes on until its longest answer is
done and the engine gives the slot to the next. Then the time per token behind contexts of 1k to 64k.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from common import DEVICE, RESULTS, arguments, compete, environment, write
from models import MAMBA, mamba_ssm, ours

from mambalign.generation.engine import Engine
from mambalign.generation.requests import Request, Sampling
from mambalign.models import MambaForCausalLM

PROMPT = 16
BATCHES = (1, 8, 64)
CONTEXTS = (1024, 4096, 16384, 65536)


def prompts(count: int, length: int, vocabulary: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(length)
    return [tuple(row) for row in torch.randint(1, vocabulary, (count, length), generator=generator).tolist()]


def sampling(tokens: int) -> Sampling:
    return Sampling(max_new_tokens=tokens, temperature=0, ignore_end=True)


def engine_tokens(engine: Engine, rows: Sequence[tuple[int, ...]], lengths: Sequence[int]) -> list[tuple[int, ...]]:
    requests = [Request(row, sampling(length)) for row, length in zip(rows, lengths, strict=True)]
    return [answers[0].tokens for answers in engine.generate(requests)]


def same(found: Sequence[tuple[int, ...]], expected: Sequence[tuple[int, ...]], who: str) -> None:
    for number, (ours_, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours_ != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours_, theirs, strict=False)) if a != b), len(theirs))
            raise SystemExit(f"answer {number} differs from {who}'s from token {at} on: no numbers")


# ------------------------------------------------------------------------------------------------------------- a CPU


def transformers_tokens(model: Any, rows: Sequence[tuple[int, ...]], tokens: int) -> list[tuple[int, ...]]:
    ids = torch.tensor(rows)
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None
        )
    return [tuple(row[ids.shape[1] :]) for row in out.tolist()]


def on_cpu(tokens: int, repeats: int, threads: int, layers: int = 8) -> list[dict[str, Any]]:
    """Tokens/s between a short answer and a long one, which leaves out the prompt, in turn, medians."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    config = transformers.MambaConfig(vocab_size=512, hidden_size=256, num_hidden_layers=layers, pad_token_id=0)
    peer, model = transformers.MambaForCausalLM(config).eval(), MambaForCausalLM(config).eval()
    model.load_state_dict(peer.state_dict())
    rows = []
    print(f"{'answers':>8} {'transformers':>14} {'mambalign':>12} {'ratio':>7}    tokens/s, medians, {threads} threads")
    for batch in (1, 8):
        engine, asked = Engine(model, None, slots=batch), prompts(batch, PROMPT, 512)
        same(engine_tokens(engine, asked, [tokens] * batch), transformers_tokens(peer, asked, tokens), "transformers")
        contestants: dict[str, Callable[[int], Any]] = {
            "transformers": lambda n, asked=asked: transformers_tokens(peer, asked, n),
            "mambalign": lambda n, engine=engine, asked=asked: engine_tokens(engine, asked, [n] * len(asked)),
        }
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(repeats):
            for name, run in contestants.items():
                short, long = (_seconds(partial(run, n)) for n in (4, 4 + tokens))
                rates[name].append(batch * tokens / (long - short))
        row = {name: statistics.median(found) for name, found in rates.items()}
        print(f"{batch:>8} {row['transformers']:>14,.0f} {row['mambalign']:>12,.0f} "
              f"{row['mambalign'] / row['transformers']:>6.1f}x", flush=True)  # fmt: skip
        rows.append({"answers": batch, "plans": {k: v.width for k, v in engine.decoder.plans.items()}, **row})
    return rows


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------------------------------- a GPU


def peer_tokens(model: Any, rows: Sequence[tuple[int, ...]], tokens: int) -> list[tuple[int, ...]]:
    """mamba-ssm's own loop, greedy, under its CUDA graph."""
    from mamba_ssm.utils.generation import decode

    ids = torch.tensor(rows, device=DEVICE)
    out = decode(ids, model, max_length=ids.shape[1] + tokens, top_k=1, cg=True)
    return [tuple(row[ids.shape[1] :]) for row in out.tolist()]


def on_gpu(sizes: Sequence[str], tokens: int, repeats: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for size in sizes:
        model = ours(size, "bf16").eval()
        peer = mamba_ssm(model, "bf16")
        for batch in BATCHES:
            for exact in (True, False):
                engine = Engine(model, None, slots=batch, exact=exact)
                rows += _batch(size, engine, peer, tokens, repeats)
                del engine
        rows += _contexts(size, model, repeats)
    return rows


def _batch(size: str, engine: Engine, peer: Any, tokens: int, repeats: int) -> list[dict[str, Any]]:
    batch, vocabulary = engine.slots, engine.decoder.embedding.shape[0]
    asked = prompts(batch, PROMPT, vocabulary)
    uneven = [tokens // 8 + (7 * tokens // 8) * (i * 37 % 64) // 63 for i in range(4 * batch)]  # 1/8 .. 1, no order
    cases = {"even": (asked, [tokens] * batch)}
    if batch > 1:
        cases["uneven"] = (asked * 4, uneven)
    rows = []
    for case, (given, lengths) in cases.items():
        contestants: dict[str, Callable[[], Any]] = {"ours": partial(engine_tokens, engine, given, lengths)}
        if peer is not None:

            def theirs(given: Any = given, lengths: Any = lengths) -> Any:
                for start in range(0, len(given), batch):
                    peer_tokens(peer, given[start : start + batch], max(lengths[start : start + batch]))

            contestants["mamba-ssm"] = theirs
            # bf16 parts two implementations at a near tie; the first tokens must agree all the same.
            first = [row[:4] for row in peer_tokens(peer, asked, 4)]
            same([row[:4] for row in engine_tokens(engine, asked, [4] * batch)], first, "mamba-ssm")
        for who, measured in compete(contestants, repeats).items():
            rate = sum(lengths) / measured["ms"] * 1e3
            rows.append({"size": size, "batch": batch, "case": case, "exact": engine.exact, "who": who,
                         "tokens_per_second": rate, **measured})  # fmt: skip
            print(f"{size:>6} {batch:>3} {case:>7} exact={engine.exact!s:>5} {who:>10} {rate:>12,.0f} tokens/s")
    return rows


def _contexts(size: str, model: Any, repeats: int, tokens: int = 64) -> list[dict[str, Any]]:
    """Milliseconds a token behind a context: of one answer, from the state that the context left."""
    engine, rows = Engine(model, None, slots=1), []
    for length in CONTEXTS:
        (context,) = prompts(1, length, engine.decoder.embedding.shape[0])
        state = engine.generate([Request(context, sampling(1), keep_state=True)])[0][0].state
        measured = compete({"ours": partial(engine.generate, [Request((1,), sampling(tokens), state)])}, repeats)[
            "ours"
        ]
        rows.append({"size": size, "case": "context", "context": length, "ms_per_token": measured["ms"] / tokens})
        print(f"{size:>6} behind {length:>6} tokens: {measured['ms'] / tokens:.3f} ms a token", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__ or "", "decode", repeats=5)
    parser.add_argument("--gpu", action="store_true", help="on a GPU, beside mamba-ssm")
    parser.add_argument("--sizes", nargs="+", default=["130m", "2.8b"], choices=list(MAMBA), help="with --gpu")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    if options.gpu:
        if DEVICE.type != "cuda" and not options.tiny:
            raise SystemExit("no CUDA device: --gpu has nothing to measure (--tiny tries the script without one)")
        sizes, tokens = (["tiny"], 8) if options.tiny else (options.sizes, options.tokens)
        print(" | ".join(f"{k} {v}" for k, v in environment().items()), flush=True)
        write("decode", options.json, on_gpu(sizes, tokens, options.repeats))
        return
    path = options.json if options.json != RESULTS / "decode.json" else RESULTS / "decode_cpu.json"
    facts = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "threads": options.threads,
             "tokens": options.tokens, **environment()}  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in facts.items()), end="\n\n")
    rows = on_cpu(8 if options.tiny else options.tokens, options.repeats, options.threads, 2 if options.tiny else 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
