"""One token of every sequence on a GPU: `decode_step.cu`, the convolution and the state update of a step of generation.

These are not ops with gradients: they write into buffers that are given, allocate nothing and wait for nothing, so a
CUDA graph can hold them. Every row is computed alike, whatever the number of rows. Their definition is that of
`causal_conv1d` and `selective_scan` at segments of one token, with initial and final states.

In what follows D channels, N states, W taps, R the rank of the step sizes; "IO" is bf16, fp16 or fp32, one for all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from mambalign.ops import nvrtc
from mambalign.ops.nvrtc import IO

SOURCE = Path(__file__).with_name("decode_step.cu")
THREADS, VECTOR = 128, 4
MOST_STATES, WIDEST = 64, 8  # a thread holds them in registers


def conv_step(
    x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, y: Tensor, next_window: Tensor
) -> None:
    """Write the convolution of `window` and `x`, with its activation, to `y`, and the window after x to `next_window`.

    x: IO `[rows, D]`, rows at any distance. window, next_window (may be the same): IO `[rows, W - 1, D]`, oldest
    first. weight: fp32 `[W, D]`. bias: fp32 `[D]`. y: IO `[rows, D]`.
    """
    rows, channels = y.shape
    aligned = all(t.data_ptr() % (VECTOR * t.itemsize) == 0 for t in (x, window, next_window, y))
    vector = VECTOR if aligned and channels % VECTOR == 0 and x.stride(0) % VECTOR == 0 else 1
    values = {"x": x, "x_stride": x.stride(0), "window": window, "next_window": next_window, "weight": weight,
              "bias": bias, "y": y, "num_channels": channels, "silu": int(silu)}  # fmt: skip
    grid = -(-channels // (THREADS * vector)), rows
    _launch("conv_step", grid, THREADS, values, y, taps=len(weight), vector=vector)


def low_norm(low: Tensor, states: int, eps: float) -> None:
    """RMS norms without weights of the three parts of every row of `low`, IO `[rows, R + 2 N]`, in place."""
    values = {"low": low, "low_stride": low.stride(0), "rank": low.shape[1] - 2 * states, "eps": float(eps)}
    _launch("low_norm", (3, len(low)), 32, values, low, states=states)


def state_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    low: Tensor,
    D: Tensor,
    z: Tensor,
    bias: Tensor | None,
    state: Tensor,
    y: Tensor,
    next_state: Tensor,
) -> None:
    """Write `state` one token further to `next_state` (may be the same), and the gated output to `y`.

    u, delta, z: IO `[rows, D]`, rows at any distance; delta before bias and softplus. A: fp32 `[N, D]`,
    `-exp(A_log)` times log2(e). low: IO `[rows, R + 2 N]` that ends in B and C. D, bias: fp32 `[D]`.
    state, next_state: fp32 `[rows, N, D]`. y: IO `[rows, D]`.
    """
    rows, channels = y.shape
    states = len(A)
    values = {"A": A, "D": D, "bias": bias, "low": low, "low_stride": low.stride(0), "rank": low.shape[1] - 2 * states,
              "state": state, "next_state": next_state, "y": y, "num_channels": channels}  # fmt: skip
    for name, tensor in (("u", u), ("delta", delta), ("z", z)):
        values |= {name: tensor, f"{name}_stride": tensor.stride(0)}
    _launch("state_step", (-(-channels // THREADS), rows), THREADS, values, y, states=states)


def _launch(
    kernel: str, grid: tuple[int, int], threads: int, values: dict[str, Any], like: Tensor,
    taps: int = 1, states: int = 1, vector: int = 1,
) -> None:  # fmt: skip
    # All is read once, so what is in flight counts: the cache is its buffer.
    macros = (("IO", IO[like.dtype]), ("W", taps), ("N", states), ("VEC", vector), ("CARVEOUT", 0))
    nvrtc.module(SOURCE, macros, like.device).launch(kernel, grid, threads, values)
