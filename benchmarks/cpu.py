"""Forward + backward tokens/s on a CPU: transformers' Mamba beside ours, in turn, in one run (`make bench`).

A model of 8 layers of width 256 without its head, the same weights in both. Correctness comes first: no number is
printed unless outputs and every gradient agree. Each of transformers' measurements is a process of its own under a time
cap, since its backward pass is quadratic in the length and at 2,048 tokens does not end in reasonable time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

LENGTHS = (128, 512, 2048)


def backbone(peer: bool, layers: int = 8) -> Any:
    from mambalign.models.mamba import MambaModel

    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    config = transformers.MambaConfig(vocab_size=512, hidden_size=256, num_hidden_layers=layers, use_cache=False)
    return (transformers.MambaModel if peer else MambaModel)(config).train()


def step(model: Any, ids: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    hidden = model(ids).last_hidden_state
    # A fixed projection: the squares of a normed output have no gradient to speak of.
    hidden.backward(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)))
    return hidden.detach()


def check() -> float:
    """Largest relative difference of outputs and gradients at 48 tokens; raises if it is not rounding."""
    ids = torch.randint(512, (1, 48), generator=torch.Generator().manual_seed(1))
    peer, ours = backbone(peer=True), backbone(peer=False)
    ours.load_state_dict(peer.state_dict())
    pairs = [(step(peer, ids), step(ours, ids))]
    gradients = dict(peer.named_parameters())
    pairs += [(gradients[name].grad, parameter.grad) for name, parameter in ours.named_parameters()]
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    if not worst < 1e-3:
        raise SystemExit(f"outputs or gradients differ by {worst:.1e}: no numbers")
    return worst


def measure(peer: bool, length: int, threads: int, repeats: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    model = backbone(peer)
    ids = torch.randint(512, (1, length), generator=torch.Generator().manual_seed(length))
    if not peer:
        step(model, ids)  # the peer's first step costs as much as any other: warming it up would double the wait
    pipe.send("ready")
    for _ in range(repeats):
        start = time.perf_counter()
        step(model, ids)
        pipe.send(time.perf_counter() - start)
    pipe.close()


def timed(peer: bool, length: int, threads: int, repeats: int, cap: float | None) -> list[float]:
    """Seconds of each repeat that ended before the cap, which counts from the first step on."""
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe(duplex=False)
    worker = context.Process(target=measure, args=(peer, length, threads, repeats, end))
    worker.start()
    end.close()
    seconds: list[float] = []
    try:
        pipe.recv()
        deadline = time.monotonic() + (cap or 0.0)
        while len(seconds) < repeats and pipe.poll(None if cap is None else max(0.0, deadline - time.monotonic())):
            seconds.append(pipe.recv())
    except EOFError:  # a crash is not a slow step: it must not be printed as one
        worker.join()
        raise SystemExit(
            f"{'transformers' if peer else 'mambalign'} at {length} tokens ended with exit code {worker.exitcode}"
        ) from None
    worker.kill()
    worker.join()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="steps of the peer; ours takes three times as many")
    parser.add_argument("--cap", type=float, default=120.0, help="seconds that transformers may take for one length")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/cpu.json"))
    options = parser.parse_args()
    error = check()
    print(f"outputs and gradients agree (largest relative difference {error:.1e})")
    facts = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "repeats": options.repeats,
        "cap_seconds": options.cap,
        "largest_relative_difference": error,
    }
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()), end="\n\n")
    print(f"{'tokens':>7} {'transformers':>16} {'mambalign':>16} {'ratio':>7}    tokens/s, forward + backward, medians")
    rows: list[dict[str, Any]] = []
    for length in LENGTHS:
        # Our steps are short: more of them, so that a busy moment of a shared machine is not all that is seen.
        mine = timed(False, length, options.threads, 3 * options.repeats, cap=None)
        theirs = timed(True, length, options.threads, options.repeats, options.cap)
        ours = length / statistics.median(mine)
        peer = length / statistics.median(theirs) if theirs else None
        bound = length / options.cap
        shown = f"{peer:,.1f}" if peer else f"< {bound:,.1f} (cap)"
        ratio = f"{ours / peer:.0f}x" if peer else f"> {ours / bound:.0f}x"
        print(f"{length:>7,} {shown:>16} {ours:>16,.1f} {ratio:>7}", flush=True)
        rows.append({"tokens": length, "transformers": peer, "mambalign": ours})
    by_length = {row["tokens"]: row["mambalign"] for row in rows}
    print(f"\ntime per token at 2,048 over 512: {by_length[512] / by_length[2048]:.2f}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
