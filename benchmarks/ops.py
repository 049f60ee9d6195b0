"""The selective scan and the convolution on a GPU: ours beside mamba-ssm's and causal-conv1d's CUDA kernels.

    python benchmarks/ops.py            # one CUDA card; the peers are optional

Correctness first: outputs and every gradient of both against float64 on the same bf16 inputs; no time is printed unless
ours is within 1e-2, or no further off than the peer. Then forward, and forward + backward, in turn, medians.
"""

from __future__ import annotations

from typing import Any

import torch
from common import arguments, compete, environment, relative_error, write

from mambalign.ops import Segments, causal_conv1d, selective_scan

N = 16
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
SHAPES = [(8, 5120, 2048), (16, 1536, 2048), (1, 5120, 16384), (1, 5120, 65536)]


def inputs(rows: int, channels: int, length: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Packed tensors with the statistics of a trained layer: step sizes around 0.01 to 0.1, A from -1 to -16."""
    T = rows * length
    made = {
        "u": torch.randn(T, channels, device="cuda", dtype=dtype),
        "delta": (torch.randn(T, channels, device="cuda") * 0.5).to(dtype),
        "A": -torch.arange(1, N + 1, device="cuda").float().repeat(channels, 1),
        "B": torch.randn(T, N, device="cuda", dtype=dtype),
        "C": torch.randn(T, N, device="cuda", dtype=dtype),
        "D": torch.ones(channels, device="cuda"),
        "z": torch.randn(T, channels, device="cuda", dtype=dtype),
        "delta_bias": torch.empty(channels, device="cuda").uniform_(-4.6, -2.2),
    }
    return {name: value.requires_grad_() for name, value in made.items()}


def ours(given: dict[str, torch.Tensor], segments: Segments) -> Any:
    return lambda: selective_scan(**given, delta_softplus=True, segments=segments)


def theirs(given: dict[str, torch.Tensor], rows: int) -> tuple[Any, dict[str, torch.Tensor]] | None:
    """mamba-ssm's call on tensors in its own layout, `[rows, channels, length]`; None where it is not installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    turned = {
        name: value.detach().view(rows, -1, value.shape[1]).transpose(1, 2).contiguous().requires_grad_()
        if name in ("u", "delta", "B", "C", "z")
        else value.detach().requires_grad_()
        for name, value in given.items()
    }
    return lambda: selective_scan_fn(**turned, delta_softplus=True), turned


def gradients(run: Any, given: dict[str, torch.Tensor], d_y: torch.Tensor) -> list[torch.Tensor]:
    y = run()
    return [y.detach(), *torch.autograd.grad(y, list(given.values()), d_y)]


def check() -> None:
    """Ours (plain and forked) and the peer against float64; stops if ours is worse than it may be."""
    for dtype, bound in ((torch.bfloat16, 1e-2), (torch.float32, 1e-5)):
        given = inputs(3, 256, 700, dtype)
        exact = {name: value.detach().double().requires_grad_() for name, value in given.items()}
        d_y = torch.randn(3 * 700, 256, device="cuda", dtype=dtype)
        for what, segments in (
            ("three rows", Segments.from_lengths([700] * 3)),
            ("100 segments and forks", Segments.from_lengths([21] * 100, [-1, 0, 0, 1] * 25)),
        ):
            truth = gradients(
                lambda s=segments, e=exact: selective_scan(**e, delta_softplus=True, segments=s, backend="torch"),
                exact, d_y.double(),
            )  # fmt: skip
            results = {"ours": gradients(ours(given, segments), given, d_y)}
            peer = theirs(given, 3) if what == "three rows" else None
            if peer:
                turned = d_y.view(3, 700, -1).transpose(1, 2).contiguous()
                back = [g.transpose(1, 2).reshape(3 * 700, -1) if g.dim() == 3 else g for g in gradients(*peer, turned)]
                results["mamba-ssm"] = back
            errors = {
                who: [relative_error(a, b) for a, b in zip(result, truth, strict=True)]
                for who, result in results.items()
            }
            for who, row in errors.items():
                named = "  ".join(f"{n} {e:.1e}" for n, e in zip(("y", *NAMES), row, strict=True))
                print(f"{dtype!s:>14}, {what}, {who}: {named}")
            allowed = [max(bound, e) for e in errors.get("mamba-ssm", [0.0] * len(errors["ours"]))]
            if not all(e <= a for e, a in zip(errors["ours"], allowed, strict=True)):
                raise SystemExit("ours is further off than it may be: no numbers")


Cases = dict[str, tuple[Any, dict[str, torch.Tensor], torch.Tensor]]  # who -> (run, what it differentiates, d_y)


def scan_cases(batch: int, channels: int, length: int) -> Cases:
    given, T = inputs(batch, channels, length), batch * length
    d_y = torch.randn(T, channels, device="cuda", dtype=torch.bfloat16)
    cases = {"ours": (ours(given, Segments.from_lengths([length] * batch)), given, d_y)}
    if (peer := theirs(given, batch)) is not None:
        cases["mamba-ssm"] = (*peer, d_y.view(batch, length, -1).transpose(1, 2).contiguous())
    if (batch, channels) == (8, 5120):
        uneven = (torch.rand(99, generator=torch.Generator().manual_seed(0)) * (T - 1)).long().sort().values
        cuts = torch.cat([torch.tensor([0]), uneven + 1, torch.tensor([T])])
        cases["ours, 100 uneven segments"] = (ours(given, Segments(cuts)), given, d_y)
    return cases


def conv_cases(batch: int, channels: int, length: int) -> Cases:
    # Half of a wider projection, as in the model.
    wide = torch.randn(batch * length, 2 * channels, device="cuda", dtype=torch.bfloat16)
    taps = {
        "weight": torch.randn(channels, 4, device="cuda", requires_grad=True),
        "bias": torch.randn(channels, device="cuda", requires_grad=True),
    }
    d_y = torch.randn(batch * length, channels, device="cuda", dtype=torch.bfloat16)
    given = {"x": wide[:, :channels].requires_grad_(), **taps}
    segments = Segments.from_lengths([length] * batch)
    cases = {"ours": (lambda: causal_conv1d(**given, activation="silu", segments=segments), given, d_y)}
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        return cases
    turned = wide.view(batch, length, -1).transpose(1, 2).contiguous()[:, :channels]
    their = {"x": turned.requires_grad_(), **taps}
    their_d_y = d_y.view(batch, length, -1).transpose(1, 2).contiguous()
    cases["causal-conv1d"] = (lambda: causal_conv1d_fn(**their, activation="silu"), their, their_d_y)
    return cases


def measure(op: str, cases: Cases, shape: tuple[int, int, int], repeats: int) -> list[dict[str, Any]]:
    with torch.no_grad():
        forward = compete({who: case[0] for who, case in cases.items()}, repeats, burst=5)
    both = compete({who: lambda c=case: gradients(*c) for who, case in cases.items()}, repeats, burst=5)
    peer = next((both[who] for who in both if not who.startswith("ours")), None)
    rows = []
    for who in both:
        row = {"op": op, **dict(zip(("batch", "channels", "length"), shape, strict=True)), "who": who}
        row |= {"forward_ms": forward[who]["ms"], "both_ms": both[who]["ms"], "peak_gib": both[who]["gib"]}
        rows.append(row)
        show(row, peer)
    return rows


def show(row: dict[str, Any], peer: dict[str, float] | None) -> None:
    ratio = f"{peer['ms'] / row['both_ms']:5.2f}x the peer" if peer and row["who"].startswith("ours") else ""
    shape = f"{row['batch']} x {row['length']:,} x {row['channels']}"
    print(
        f"{row['op']:>15} {shape:>20} {row['who']:>26}: forward {row['forward_ms']:7.3f} ms, "
        f"forward + backward {row['both_ms']:7.3f} ms, {row['peak_gib']:5.2f} GiB {ratio}",
        flush=True,
    )


def main() -> None:
    options = arguments(__doc__ or "", "ops").parse_args()
    print(" | ".join(f"{k} {v}" for k, v in environment().items()))
    check()
    rows = []
    for op, cases in (("selective_scan", scan_cases), ("causal_conv1d", conv_cases)):
        for shape in SHAPES:
            torch.cuda.empty_cache()
            rows += measure(op, cases(*shape), shape, options.repeats)
    write(options.json, rows)


if __name__ == "__main__":
    main()
