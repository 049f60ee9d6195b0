"""Every op on a GPU, forward and backward: ours beside mamba-ssm's and causal-conv1d's kernels, and beside PyTorch.

    python benchmarks/ops.py            # one CUDA card; the peers are optional

Correctness first: outputs and every gradient of both against float64 on the same inputs, in bf16 and in fp32, in rows
and in many short segments with forks. No time is printed unless ours is within 1e-2 (bf16) or 1e-5 (fp32), or no
further off than the peer, and a second run repeats the first bit for bit. Then forward, and forward + backward, in
turn, medians.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import DEVICE, arguments, compete, free_memory, parse, relative_error, write
from torch import Tensor

from mambalign.ops import Segments, causal_conv1d, rms_norm, selective_scan, token_logps

N = 16
BF16 = torch.bfloat16
ROWS = [(8, 5120, 2048), (16, 1536, 2048), (1, 5120, 16384), (1, 5120, 65536)]  # batch, channels, length
WIDTHS = [(16 * 2048, 768), (4 * 2048, 2560)]  # tokens, model width
VOCABULARY = 50280


def unchanged(tensors: list[Tensor]) -> list[Tensor]:
    return tensors


@dataclass(frozen=True)
class Contestant:
    """`apply(**given)`, the gradients of its outputs, and how its results are brought to the layout of ours."""

    apply: Callable[..., Any]
    given: dict[str, Tensor]
    d_outputs: tuple[Tensor, ...]
    back: Callable[[list[Tensor]], list[Tensor]] = unchanged

    def forward(self) -> Any:
        return self.apply(**self.given)

    def both(self) -> list[Tensor]:
        """The outputs and the gradient of everything given."""
        outputs = self.forward()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad(outputs, list(self.given.values()), self.d_outputs)
        return [*(output.detach() for output in outputs), *gradients]

    def exact(self) -> list[Tensor]:
        """The same in float64, by the PyTorch backend."""
        given = {name: value.detach().double().requires_grad_() for name, value in self.given.items()}
        d_outputs = tuple(d.double() for d in self.d_outputs)
        return Contestant(partial(self.apply, backend="torch"), given, d_outputs).both()


Cases = dict[str, Contestant]


def rows_first(batch: int, tensor: Tensor) -> Tensor:
    """`[T, D]` as the peers have it, `[batch, D, T / batch]`."""
    return tensor.detach().view(batch, -1, tensor.shape[1]).transpose(1, 2).contiguous()


def channels_last(results: list[Tensor]) -> list[Tensor]:
    return [x.transpose(1, 2).flatten(0, 1) if x.dim() == 3 else x for x in results]


def scan_inputs(tokens: int, channels: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Packed tensors with the statistics of a trained layer: step sizes around 0.01 to 0.1, A from -1 to -16."""

    def normal(width: int) -> Tensor:
        return torch.randn(tokens, width, device=DEVICE, dtype=dtype)

    made = {
        "u": normal(channels),
        "delta": normal(channels) * 0.5,
        "A": -torch.arange(1, N + 1, device=DEVICE).float().repeat(channels, 1),
        "B": normal(N),
        "C": normal(N),
        "D": torch.ones(channels, device=DEVICE),
        "z": normal(channels),
        "delta_bias": torch.empty(channels, device=DEVICE).uniform_(-4.6, -2.2),
    }
    return {name: value.requires_grad_() for name, value in made.items()}


def scan(batch: int, channels: int, length: int, dtype: torch.dtype = BF16, segments: Segments | None = None) -> Cases:
    tokens = batch * length
    given = scan_inputs(tokens, channels, dtype)
    d_y = torch.randn(tokens, channels, device=DEVICE, dtype=dtype)
    rows = Segments.from_lengths([length] * batch)
    ours = partial(selective_scan, delta_softplus=True, segments=segments or rows)
    cases = {"ours": Contestant(ours, given, (d_y,))}
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return cases
    if segments is None:  # it knows nothing of them
        turned = {
            name: (rows_first(batch, value) if name in ("u", "delta", "B", "C", "z") else value.detach())
            for name, value in given.items()
        }
        turned = {name: value.requires_grad_() for name, value in turned.items()}
        theirs = partial(selective_scan_fn, delta_softplus=True)
        cases["mamba-ssm"] = Contestant(theirs, turned, (rows_first(batch, d_y),), channels_last)
    return cases


def scan_timed(batch: int, channels: int, length: int) -> Cases:
    """At several rows also the same tokens in 100 uneven segments."""
    cases = scan(batch, channels, length)
    if batch > 1:
        tokens = batch * length
        cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(0))[:99].sort().values + 1
        segments = Segments(torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])]))
        ours = cases["ours"]
        apply = partial(selective_scan, delta_softplus=True, segments=segments)
        cases["ours, 100 uneven segments"] = Contestant(apply, ours.given, ours.d_outputs)
    return cases


def conv(batch: int, channels: int, length: int, dtype: torch.dtype = BF16, segments: Segments | None = None) -> Cases:
    # Half of a wider projection, as in the model.
    wide = torch.randn(batch * length, 2 * channels, device=DEVICE, dtype=dtype)
    taps = {
        "weight": torch.randn(channels, 4, device=DEVICE, requires_grad=True),
        "bias": torch.randn(channels, device=DEVICE, requires_grad=True),
    }
    d_y = torch.randn(batch * length, channels, device=DEVICE, dtype=dtype)
    given = {"x": wide[:, :channels].requires_grad_(), **taps}
    rows = Segments.from_lengths([length] * batch)
    ours = partial(causal_conv1d, activation="silu", segments=segments or rows)
    cases = {"ours": Contestant(ours, given, (d_y,))}
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        return cases
    if segments is None:
        turned = {"x": rows_first(batch, wide)[:, :channels].requires_grad_(), **taps}
        theirs = partial(causal_conv1d_fn, activation="silu")
        cases["causal-conv1d"] = Contestant(theirs, turned, (rows_first(batch, d_y),), channels_last)
    return cases


def head(tokens: int, width: int, dtype: torch.dtype = BF16, vocabulary: int = VOCABULARY) -> Cases:
    labels = torch.randint(vocabulary, (tokens,), device=DEVICE)
    given = {
        "hidden": torch.randn(tokens, width, device=DEVICE, dtype=dtype, requires_grad=True),
        "weight": (torch.randn(vocabulary, width, device=DEVICE) * 0.02).to(dtype).requires_grad_(),
    }
    d_logps = torch.rand(tokens, device=DEVICE) + 0.5

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return -F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")

    return {
        "ours": Contestant(partial(token_logps, labels=labels), given, (d_logps,)),
        "PyTorch": Contestant(plain, given, (d_logps,)),
    }


def norm(tokens: int, width: int, dtype: torch.dtype = BF16) -> Cases:
    """As between two blocks: a block's output is added to the fp32 residual stream, and the sum is normed."""
    given = {
        "x": torch.randn(tokens, width, device=DEVICE, dtype=dtype, requires_grad=True),
        "residual": torch.randn(tokens, width, device=DEVICE, requires_grad=True),
        "weight": (torch.rand(width, device=DEVICE) + 0.5).to(dtype).requires_grad_(),
    }
    d_outputs = (
        torch.randn(tokens, width, device=DEVICE, dtype=dtype),
        torch.randn(tokens, width, device=DEVICE),
    )

    def ours(x: Tensor, residual: Tensor, weight: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
        total = residual + x
        return rms_norm(total, weight, 1e-5, x.dtype, backend), total

    cases = {"ours": Contestant(ours, given, d_outputs)}
    try:
        from mamba_ssm.ops.triton.layer_norm import rms_norm_fn
    except ImportError:
        return cases
    theirs = partial(rms_norm_fn, bias=None, eps=1e-5, prenorm=True, residual_in_fp32=True)
    cases["mamba-ssm"] = Contestant(theirs, given, d_outputs)
    return cases


def check(batch: int = 3, channels: int = 256, length: int = 700) -> None:
    """Ours and the peers against float64, ours twice; stops if ours is worse than it may be or does not repeat."""
    odd = batch * length // 100
    tree = Segments.from_lengths([odd] * 100, [-1, 0, 0, 1] * 25)
    for dtype, bound in ((BF16, 1e-2), (torch.float32, 1e-5)):
        for op, cases in (
            ("scan", scan(batch, channels, length, dtype)),
            ("scan, 100 segments and forks", scan(1, channels, 100 * odd, dtype, tree)),
            ("conv", conv(batch, channels, length, dtype)),
            ("conv, 100 segments and forks", conv(1, channels, 100 * odd, dtype, tree)),
            ("head", head(length, channels, dtype, 1000)),
            ("norm", norm(length, channels, dtype)),
        ):
            ours, truth = cases["ours"], cases["ours"].exact()
            names = [f"y{n + 1}" if n else "y" for n in range(len(ours.d_outputs))] + list(ours.given)
            results = {who: case.back(case.both()) for who, case in cases.items()}
            errors = {
                who: [relative_error(a, b) for a, b in zip(result, truth, strict=True)]
                for who, result in results.items()
            }
            for who, row in errors.items():
                named = "  ".join(f"{n} {e:.1e}" for n, e in zip(names, row, strict=True))
                print(f"{str(dtype).removeprefix('torch.'):>8}, {op}, {who}: {named}", flush=True)
            peers = [row for who, row in errors.items() if who != "ours"]
            allowed = [max(bound, *(row[i] for row in peers)) if peers else bound for i in range(len(names))]
            if not all(e <= a for e, a in zip(errors["ours"], allowed, strict=True)):
                raise SystemExit(f"{op}: ours is further off than it may be: no numbers")
            if not all(torch.equal(a, b) for a, b in zip(results["ours"], ours.both(), strict=True)):
                raise SystemExit(f"{op}: a second run gives other bits: no numbers")


def measure(op: str, shape: str, cases: Cases, repeats: int) -> list[dict[str, Any]]:
    with torch.no_grad():
        forward = compete({who: case.forward for who, case in cases.items()}, repeats, burst=5)
    both = compete({who: case.both for who, case in cases.items()}, repeats, burst=5)
    peer = next((both[who]["ms"] for who in both if not who.startswith("ours")), None)
    rows = []
    for who in both:
        row = {"op": op, "shape": shape, "who": who, "forward_ms": forward[who]["ms"]}
        rows.append(row | {"both_ms": both[who]["ms"], "peak_gib": both[who]["gib"]})
        ratio = f", {peer / both[who]['ms']:.2f}x the peer" if peer and who.startswith("ours") else ""
        print(
            f"{op:>15} {shape:>24} {who:>26}: forward {forward[who]['ms']:7.3f} ms, forward + backward "
            f"{both[who]['ms']:7.3f} ms, {both[who]['gib']:5.2f} GiB{ratio}",
            flush=True,
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(arguments(__doc__ or "", "ops"), argv)
    check(*((2, 16, 150) if options.tiny else ()))
    shapes, widths, vocabulary = (
        ([(2, 16, 150)], [(200, 32)], 1000) if options.tiny else (ROWS, WIDTHS, VOCABULARY)
    )  # fmt: skip
    rows = []
    for op, make in (("selective_scan", scan_timed), ("causal_conv1d", conv)):
        for batch, channels, length in shapes:
            free_memory()
            shape = f"{batch} x {length:,} x {channels:,}"
            rows += measure(op, shape, make(batch, channels, length), options.repeats)
    for tokens, width in widths:
        free_memory()
        shape = f"{tokens:,} x {width:,} x {vocabulary:,}"
        rows += measure("token_logps", shape, head(tokens, width, vocabulary=vocabulary), options.repeats)
    for tokens, width in widths:
        free_memory()
        rows += measure("add + rms_norm", f"{tokens:,} x {width:,}", norm(tokens, width), options.repeats)
    write("ops", options.json, rows)


if __name__ == "__main__":
    main()
