"""Every op but the scan on a GPU, forward and backward: ours beside causal-conv1d's and mamba-ssm's, and PyTorch.

    python benchmarks/ops.py            # one CUDA card; the peers are optional; of the scan: mambalign bench scan

Correctness first: outputs and every gradient of both against float64 on the same inputs, in bf16 and in fp32, in rows
and in many short segments with forks. No time is printed unless ours is within 1e-2 (bf16) or 1e-5 (fp32), or no
further off than the peer, and a second run repeats the first bit for bit. Then forward, and forward + backward, in
turn, medians.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from common import arguments, finish, parse
from torch import Tensor

from mambalign.bench.measure import DEVICE, free_memory
from mambalign.bench.ops import Cases, Contestant, channels_last, check, measure, rows_first
from mambalign.ops import Segments, add_rms_norm, causal_conv1d, embedding, token_logps

BF16 = torch.bfloat16
ROWS = [(8, 5120, 2048), (16, 1536, 2048), (1, 5120, 16384), (1, 5120, 65536)]  # batch, channels, length
WIDTHS = [(16 * 2048, 768), (4 * 2048, 2560)]  # tokens, model width
VOCABULARY = 50280


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


def head(
    tokens: int, width: int, dtype: torch.dtype = BF16, vocabulary: int = VOCABULARY, summed: bool = False
) -> Cases:
    """Log-probs of labels one by one, as in DPO; or where only their sum matters, as in SFT."""
    labels = torch.randint(vocabulary, (tokens,), device=DEVICE)
    given = {
        "hidden": torch.randn(tokens, width, device=DEVICE, dtype=dtype, requires_grad=True),
        "weight": (torch.randn(vocabulary, width, device=DEVICE) * 0.02).to(dtype).requires_grad_(),
    }
    d_logps = torch.ones(1, device=DEVICE).expand(tokens) if summed else torch.rand(tokens, device=DEVICE) + 0.5

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return -F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")

    return {
        "ours": Contestant(partial(token_logps, labels=labels, summed=summed), given, (d_logps,)),
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
        return add_rms_norm(x, residual, weight, 1e-5, x.dtype, backend=backend)

    cases = {"ours": Contestant(ours, given, d_outputs)}
    try:
        from mamba_ssm.ops.triton.layer_norm import rms_norm_fn
    except ImportError:
        return cases
    theirs = partial(rms_norm_fn, bias=None, eps=1e-5, prenorm=True, residual_in_fp32=True)
    cases["mamba-ssm"] = Contestant(theirs, given, d_outputs)
    return cases


def table(tokens: int, width: int, dtype: torch.dtype = BF16, vocabulary: int = VOCABULARY) -> Cases:
    """The embedding, of tokens as uneven as those of text."""
    ids = (vocabulary ** torch.rand(tokens, device=DEVICE)).long().clamp(max=vocabulary - 1)
    given = {"weight": torch.randn(vocabulary, width, device=DEVICE, dtype=dtype, requires_grad=True)}
    d_rows = torch.randn(tokens, width, device=DEVICE, dtype=dtype)
    ours = Contestant(lambda weight, backend="auto": embedding(ids, weight, backend), given, (d_rows,))
    return {"ours": ours, "PyTorch": Contestant(partial(F.embedding, ids), given, (d_rows,))}


def check_all(batch: int = 3, channels: int = 256, length: int = 700) -> None:
    """Ours and the peers against float64, ours twice; stops if ours is worse than it may be or does not repeat."""
    odd = batch * length // 100
    tree = Segments.from_lengths([odd] * 100, [-1, 0, 0, 1] * 25)
    for dtype in (BF16, torch.float32):
        check("conv", conv(batch, channels, length, dtype), dtype)
        check("conv, 100 segments and forks", conv(1, channels, 100 * odd, dtype, tree), dtype)
        check("head", head(length, channels, dtype, 1000), dtype)
        check("head, summed", head(length, channels, dtype, 1000, summed=True), dtype)
        check("embedding", table(length, channels, dtype, 1000), dtype)
        check("norm", norm(length, channels, dtype), dtype)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(arguments(__doc__ or "", "ops"), argv)
    check_all(*((2, 16, 150) if options.tiny else ()))
    shapes, widths, vocabulary = (
        ([(2, 16, 150)], [(200, 32)], 1000) if options.tiny else (ROWS, WIDTHS, VOCABULARY)
    )  # fmt: skip
    rows = []
    for batch, channels, length in shapes:
        free_memory()
        shape = f"{batch} x {length:,} x {channels:,}"
        rows += measure("causal_conv1d", shape, conv(batch, channels, length), options.repeats)
    for tokens, width in widths:
        free_memory()
        shape = f"{tokens:,} x {width:,} x {vocabulary:,}"
        rows += measure("token_logps", shape, head(tokens, width, vocabulary=vocabulary), options.repeats)
        summed = head(tokens, width, vocabulary=vocabulary, summed=True)
        rows += measure("token_logps, sum", shape, summed, options.repeats)
        rows += measure("embedding", shape, table(tokens, width, vocabulary=vocabulary), options.repeats)
    for tokens, width in widths:
        free_memory()
        rows += measure("add + rms_norm", f"{tokens:,} x {width:,}", norm(tokens, width), options.repeats)
    finish("ops", options.json, rows)


if __name__ == "__main__":
    main()
