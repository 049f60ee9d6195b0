"""Causal convolution on a GPU: `causal_conv1d.cu`, its work list, and what crosses forks.

A run of up to 64 tokens of one segment is walked with the window in registers. What lies before a segment (inputs of
its ancestors, or an initial state) is named by a small table, and the gradient for it comes back as a table of the same
shape, which is then added to the rows it belongs to: several children of one parent in a fixed order, in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambalign.ops import nvrtc
from mambalign.ops.backends import add_rows, send
from mambalign.ops.halves import JointGradient
from mambalign.ops.nvrtc import IO
from mambalign.ops.segments import Segments

SOURCE = Path(__file__).with_name("causal_conv1d.cu")
RUN = 64  # tokens; the W - 1 around each are read twice, and each leaves its share of the taps' gradients
THREADS, VECTOR = 128, 4
WIDEST = 8


@dataclass
class Plan:
    """`runs` int32 `[R, 5]` as `struct Run`; the tables are int32 `[S, W - 1]`, entries as in `Segments.windows`."""

    runs: Tensor
    windows: Tensor
    final_windows: Tensor
    crossing: Crossing  # of the windows before segments
    leaving: Crossing  # of the windows after them


@dataclass
class Crossing:
    """Where the rows of a flattened table of windows point: `x[tokens[i]]` or `initial[k]`.

    `token_rows` are the table's rows that point at tokens, `place` their positions in `tokens`, which has none twice.
    """

    token_rows: Tensor
    tokens: Tensor
    place: Tensor
    initial_rows: Tensor
    initial: Tensor


def plan(segments: Segments, width: int, device: torch.device) -> Plan:
    key = ("cuda conv", width, str(device))
    if key not in segments._plans:
        nonempty = segments.lengths > 0
        first = torch.full((segments.num_segments, width), -1)
        first[nonempty] = segments.windows_at(segments.cu_seqlens[:-1][nonempty], width)
        last = segments.final_windows(width)
        segments._plans[key] = Plan(
            send(_runs(segments), device),
            send(first.int(), device),
            send(last, device),
            _crossing(first.flatten(), torch.repeat_interleave(nonempty, width), device),
            _crossing(last.flatten(), torch.ones(last.numel(), dtype=torch.bool), device),
        )
    return segments._plans[key]  # type: ignore[return-value]


def _runs(segments: Segments) -> Tensor:
    count = (segments.lengths + RUN - 1) // RUN
    segment = torch.repeat_interleave(torch.arange(segments.num_segments), count)
    number = torch.arange(segment.numel()) - torch.repeat_interleave(count.cumsum(0) - count, count)
    begin, end = segments.cu_seqlens[segment] + number * RUN, segments.cu_seqlens[segment + 1]
    length = torch.minimum(end - begin, torch.tensor(RUN))
    return torch.stack([begin, length, segment, number * RUN, end], dim=1).int()


def _crossing(entries: Tensor, used: Tensor, device: torch.device) -> Crossing:
    token_rows = (used & (entries >= 0)).nonzero()[:, 0]
    tokens, place = entries[token_rows].unique(return_inverse=True)
    initial_rows = (used & (entries < 0)).nonzero()[:, 0]
    return Crossing(*(send(t, device) for t in (token_rows, tokens, place, initial_rows, -1 - entries[initial_rows])))


def unavailable(device: torch.device, weight: Tensor | None = None, *others: Tensor | None) -> str | None:
    """Why this backend cannot run on `device`, or on these inputs; None if it can."""
    if weight is not None and weight.shape[1] > WIDEST:
        return f"holds windows of at most {WIDEST} inputs, weight has {weight.shape[1]}"
    return nvrtc.unavailable(device, weight, *others)


class CausalConv1d(torch.autograd.Function):
    """See `mambalign.ops.causal_conv1d` for the contract."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        segments: Segments,
        initial_state: Tensor | None,
        output_final_state: bool,
        joint: JointGradient | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        chart = plan(segments, weight.shape[1] - 1, x.device)
        ctx.prepared = _prepared(weight, bias, activation, chart)
        initial = _initial(initial_state)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _launch("conv_forward", ctx.prepared | _rows("x", x) | {"initial": initial, "y": y}, x, weight)
        ctx.save_for_backward(x, weight, bias, initial_state)
        ctx.segments, ctx.chart, ctx.joint = segments, chart, joint
        ctx.set_materialize_grads(False)
        # Over the same memory: what its users send back arrives apart, for the kernel to add.
        again = y.detach()
        return y, _final_state(x, initial, chart.final_windows) if output_final_state else None, again

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_y: Tensor | None, d_final: Tensor | None, d_again: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial_state = ctx.saved_tensors
        (T, D), W, S = x.shape, weight.shape[1], ctx.segments.num_segments
        chart: Plan = ctx.chart
        values = ctx.prepared | _rows("x", x) | {"initial": _initial(initial_state)}
        d_x = torch.empty(T, D, dtype=x.dtype, device=x.device) if ctx.joint is None else ctx.joint.left(x)
        d_weights = torch.empty(chart.runs.shape[0], W + 1, D, dtype=torch.float32, device=x.device)
        d_windows = torch.empty(S * (W - 1), D, dtype=torch.float32, device=x.device)
        d_y, d_again = (d_again, None) if d_y is None else (d_y, d_again)
        outputs = _rows("d_y", torch.zeros_like(x) if d_y is None else d_y.to(x.dtype))
        outputs |= {} if d_again is None else _rows("d_y_again", d_again.to(x.dtype))
        outputs |= {"d_x": d_x, "d_x_stride": d_x.stride(0), "d_weights": d_weights, "d_windows": d_windows}
        _launch("conv_backward", values | outputs, x, weight)
        d_initial = torch.zeros_like(d_windows) if initial_state is not None else None
        _hand_back(chart.crossing, d_windows, d_x, d_initial)
        if d_final is not None:
            _hand_back(chart.leaving, d_final.float().transpose(1, 2).flatten(0, 1), d_x, d_initial)
        shares = d_weights.sum(0)
        return (
            d_x,
            shares[:W].T.to(weight.dtype),
            None if bias is None else shares[W].to(bias.dtype),
            None,
            None,
            None if d_initial is None else d_initial.view(S, W - 1, D).transpose(1, 2).to(initial_state.dtype),
            None,
            None,
        )


def _rows(name: str, value: Tensor) -> dict[str, Any]:
    value = value if value.stride(1) == 1 else value.contiguous()
    return {name: value, f"{name}_stride": value.stride(0)}


def _initial(initial_state: Tensor | None) -> Tensor | None:
    """`[S, D, W - 1]` -> fp32 `[S * (W - 1), D]`."""
    return None if initial_state is None else initial_state.float().transpose(1, 2).flatten(0, 1).contiguous()


def _prepared(weight: Tensor, bias: Tensor | None, activation: str | None, chart: Plan) -> dict[str, Any]:
    """What both directions are given alike."""
    return {
        "weight": weight.float().T.contiguous(),
        "bias": None if bias is None else bias.float().contiguous(),
        "runs": chart.runs,
        "windows": chart.windows,
        "num_channels": weight.shape[0],
        "silu": activation == "silu",
    }


def _launch(kernel: str, values: dict[str, Any], x: Tensor, weight: Tensor) -> None:
    vector = _vector(x, values)
    macros = (("IO", IO[x.dtype]), ("W", weight.shape[1]), ("VEC", vector))
    blocks = -(-x.shape[1] // (THREADS * vector))
    module(macros, x.device).launch(kernel, (values["runs"].shape[0], blocks), THREADS, values)


def _vector(x: Tensor, values: dict[str, Any]) -> int:
    """Channels a thread reads at once: VECTOR where every row starts at a multiple of as many, else 1."""
    elements = [x.shape[1], *(value for name, value in values.items() if name.endswith("_stride"))]
    addresses = [values[name].data_ptr() for name in ("x", "d_y", "d_y_again", "d_x") if name in values]
    aligned = all(n % VECTOR == 0 for n in elements) and all(a % (VECTOR * x.itemsize) == 0 for a in addresses)
    return VECTOR if aligned else 1


def module(macros: tuple[tuple[str, int], ...], device: torch.device) -> Any:
    return nvrtc.module(SOURCE, macros, device)


def _final_state(x: Tensor, initial: Tensor | None, windows: Tensor) -> Tensor:
    """The last W - 1 inputs of every path `[S, D, W - 1]`."""
    final = x.new_zeros(*windows.shape, x.shape[1])
    inside = (windows >= 0)[..., None]
    if x.shape[0]:
        final = torch.where(inside, x[windows.clamp(min=0)], final)
    if initial is not None and windows.numel():
        final = torch.where(inside, final, initial[(-1 - windows).clamp(min=0)].to(x.dtype))
    return final.transpose(1, 2)


def _hand_back(crossing: Crossing, gradients: Tensor, d_x: Tensor, d_initial: Tensor | None) -> None:
    """Add the gradients of a table of windows to the tokens and initial inputs that its rows point at."""
    if crossing.tokens.numel():
        total = d_x[crossing.tokens].float()
        add_rows(total, crossing.place, gradients[crossing.token_rows])
        d_x[crossing.tokens] = total.to(d_x.dtype)
    if d_initial is not None and crossing.initial.numel():
        add_rows(d_initial, crossing.initial, gradients[crossing.initial_rows])


def causal_conv1d(*args: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """CUDA backend; arguments as `mambalign.ops.reference.causal_conv1d`, then `joint`. The last output is y again."""
    y, final_state, again = CausalConv1d.apply(*args)
    return y, final_state, again
