"""Causal convolution on a GPU: `causal_conv1d.cu`, its work list, and what crosses forks.

A run of some tokens of one segment is walked with the window in registers. What lies before a segment (inputs of
its ancestors, or an initial state) is named by a small table, and the gradient for it comes back as a table of the same
shape, which is then added to the rows it belongs to: several children of one parent in a fixed order, in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambalign.ops import nvrtc
from mambalign.ops.backends import add_rows, filled, send, send_together
from mambalign.ops.halves import JointGradient
from mambalign.ops.nvrtc import IO
from mambalign.ops.segments import Segments, Tables

SOURCE = Path(__file__).with_name("causal_conv1d.cu")
# Tokens of a run, at most, where there is little to do and where there is much. The W - 1 around each are read twice,
# and each leaves its share of the taps' gradients.
RUN, LONGEST = 64, 256
THREADS, VECTOR = 128, 4
WIDEST = 8
STATIC = True  # compile for the row lengths at hand: addresses then cost no instructions


@dataclass
class Plan:
    """`runs` int32 `[R, 5]` as `struct Run`, `windows` int32 `[S, W - 1]` before the segments, both on the device.

    entering: who is handed the gradients of those windows.
    """

    runs: Tensor
    windows: Tensor
    entering: Handed


@dataclass
class Handed:
    """Of a flattened table of windows: token `tokens[k]` gets rows `rows[starts[k] : starts[k + 1]]`, all int32."""

    tokens: Tensor
    starts: Tensor
    rows: Tensor


def plan(segments: Segments, width: int, device: torch.device, run: int = RUN) -> Plan:
    def tables(segments: Segments) -> Tables:
        first = _first(segments, width)
        handed = _handed(first, segments.num_segments * width if segments.fixed else 0)
        return None, [_runs(segments, run), first.int(), *handed]

    made: Plan = segments.plan(("cuda conv", width, run, str(device)), device, tables, _built)
    return made


def _run_length(segments: Segments, channels: int, blocks: int, device: torch.device) -> int:
    """Tokens of the longest run: so many that all are walked in few whole rounds, `blocks` at once a multiprocessor.

    It depends on numbers alone, as tables of fixed segments must. A segment's last run is half of one on average.
    """
    held = blocks * nvrtc.multiprocessors(device) / -(-channels // (THREADS * VECTOR))  # runs of a round
    tokens, ends = max(segments.num_tokens, 1), segments.num_segments / 2
    rounds = math.ceil((tokens / LONGEST + ends) / held)
    return max(RUN, math.ceil(tokens / (held * rounds - ends)))


def _built(_: None, runs: Tensor, windows: Tensor, *handed: Tensor) -> Plan:
    return Plan(runs, windows, Handed(*handed))


def _first(segments: Segments, width: int) -> Tensor:
    """int64 `[S, width]`: the windows before segments, entries as in `Segments.windows`; of empty ones past the end."""
    used = segments.lengths > 0
    first = torch.full((segments.num_segments, width), -1 - segments.num_segments * width)
    first[used] = segments.windows_at(segments.cu_seqlens[:-1][used], width)
    return first


def _remembered(segments: Segments, width: int, device: torch.device, make: Callable[[Segments, int], Any]) -> Any:
    """What only calls with states need, sent when it is asked for: until the first kernel runs, the device waits."""
    key = ("cuda conv", make, width, str(device))
    if key not in segments.memo:
        made = make(segments, width)
        segments.memo[key] = send_together(made, device) if isinstance(made, list) else send(made, device)
    return segments.memo[key]


def _leaving(segments: Segments, width: int) -> list[Tensor]:
    """As `Handed`, of the windows after segments."""
    return _handed(segments.final_windows(width))


def _given(segments: Segments, width: int) -> list[Tensor]:
    """Rows of the flattened windows before segments, the rows of the initial windows that they are, and both of the
    windows after segments."""
    found = []
    for entries in (_first(segments, width), segments.final_windows(width)):
        flat = entries.flatten()
        rows = ((flat < 0) & (-flat <= flat.numel())).nonzero()[:, 0]
        found += [rows, -1 - flat[rows]]
    return found


def _runs(segments: Segments, run: int) -> Tensor:
    count = (segments.lengths + run - 1) // run
    segment = torch.repeat_interleave(torch.arange(segments.num_segments), count)
    number = torch.arange(segment.numel()) - torch.repeat_interleave(count.cumsum(0) - count, count)
    offset = number * ((segments.lengths + count - 1) // count.clamp(min=1))[segment]  # runs of a segment are alike
    begin, end = segments.cu_seqlens[segment] + offset, segments.cu_seqlens[segment + 1]
    after = torch.cat([begin[1:], end[-1:]])
    runs = torch.stack([begin, torch.minimum(after, end) - begin, segment, offset, end], dim=1).int()
    room = segments.num_segments + segments.num_tokens // run if segments.fixed else 0
    return filled(runs, room, 0)


def _handed(entries: Tensor, room: int = 0) -> list[Tensor]:
    """As in `Handed`, int32; where there are any, with room for so many."""
    flat = entries.flatten()
    rows = (flat >= 0).nonzero()[:, 0]
    tokens, counts = flat[rows].unique(return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    rows = rows[flat[rows].argsort(stable=True)]
    if rows.numel():
        tokens, rows = filled(tokens, room, 0), filled(rows, room, 0)
        starts = filled(starts, room + bool(room), int(starts[-1]))
    return [tokens.int(), starts.int(), rows.int()]


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
        run = _run_length(segments, x.shape[1], _blocks(weight.shape[1]), x.device)
        chart = plan(segments, weight.shape[1] - 1, x.device, run)
        initial = _initial(initial_state)
        ctx.prepared = _prepared(weight, bias, chart)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        values = ctx.prepared | _rows("x", x) | {"initial": initial, "y": y}
        kernels = _module(x, activation, values, x.shape[1] if joint is None else 2 * x.shape[1])
        _launch(kernels, "conv_forward", values)
        ctx.save_for_backward(x, weight, bias, initial_state)
        ctx.segments, ctx.chart, ctx.joint, ctx.activation = segments, chart, joint, activation
        ctx.set_materialize_grads(False)
        # Over the same memory: what its users send back arrives apart, for the kernel to add.
        again = y.detach()
        final = None
        if output_final_state:
            windows = _remembered(segments, weight.shape[1] - 1, x.device, Segments.final_windows)
            final = _final_state(x, initial, windows)
        return y, final, again

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_y: Tensor | None, d_final: Tensor | None, d_again: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial_state = ctx.saved_tensors
        (T, D), W, S = x.shape, weight.shape[1], ctx.segments.num_segments
        chart: Plan = ctx.chart
        d_x = torch.empty(T, D, dtype=x.dtype, device=x.device) if ctx.joint is None else ctx.joint.left(x)
        d_windows = torch.empty(S * (W - 1), D, dtype=torch.float32, device=x.device)
        d_y, d_again = (d_again, None) if d_y is None else (d_y, d_again)
        values = ctx.prepared | _rows("x", x) | _rows("d_x", d_x)
        values |= _rows("d_y", torch.zeros_like(x) if d_y is None else d_y.to(x.dtype))
        values |= {} if d_again is None else _rows("d_y_again", d_again.to(x.dtype))
        values |= {"initial": _initial(initial_state), "d_windows": d_windows}
        values["d_weights"] = torch.empty(chart.runs.shape[0], W + 1, D, dtype=torch.float32, device=x.device)
        kernels = _module(x, ctx.activation, values, d_x.stride(0))
        _launch(kernels, "conv_backward", values)
        d_weight = values["d_weight"] = torch.empty_like(values["weight"])
        d_bias = values["d_bias"] = None if bias is None else torch.empty_like(values["bias"])
        kernels.launch("sum_taps", (-(-D // 32), W + 1), nvrtc.SUMMERS, values)
        d_initial = torch.zeros_like(d_windows) if initial_state is not None else None
        tables = [d_windows]
        _hand_back(kernels, chart.entering, d_windows, values)
        if d_final is not None:
            tables.append(d_final.float().transpose(1, 2).flatten(0, 1).contiguous())
            _hand_back(kernels, Handed(*_remembered(ctx.segments, W - 1, x.device, _leaving)), tables[1], values)
        if d_initial is not None:
            given = _remembered(ctx.segments, W - 1, x.device, _given)
            for gradients, rows, initial in zip(tables, given[::2], given[1::2], strict=False):
                add_rows(d_initial, initial, gradients[rows])
        return (
            d_x,
            d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
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


def _prepared(weight: Tensor, bias: Tensor | None, chart: Plan) -> dict[str, Any]:
    """What both directions are given alike; weight and bias in one type."""
    if bias is not None and bias.dtype != weight.dtype:
        weight, bias = weight.float(), bias.float()
    return {
        "weight": weight.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "runs": chart.runs,
        "windows": chart.windows,
        "num_channels": weight.shape[0],
        "num_runs": chart.runs.shape[0],
    }


def _module(x: Tensor, activation: str | None, values: dict[str, Any], d_x_stride: int) -> Any:
    """The kernels for these tensors; where gradients are to come in their usual layout, for both directions."""
    weight, width = values["weight"], x.shape[1]
    strides = (
        values["x_stride"],
        values.get("d_y_stride", width),
        values.get("d_y_again_stride", width),
        values.get("d_x_stride", d_x_stride),
    )
    vector = _vector(width, strides, x, values)
    return _compiled(
        x.dtype, weight.dtype, weight.shape[1], vector, activation, (width, *strides) if STATIC else (), x.device
    )


@cache
def _compiled(
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    width: int,
    vector: int,
    activation: str | None,
    static: tuple[int, ...],
    device: torch.device,
) -> Any:
    macros = {"IO": IO[dtype], "W_IO": IO[weight_dtype], "W": width, "VEC": vector}
    macros |= {"SILU": int(activation == "silu"), "THREADS": THREADS, "BLOCKS": _blocks(width)}
    macros["CARVEOUT"] = 44 if dtype.itemsize == 2 else 100  # four blocks share it; the rest is cache
    if static:
        names = ("WIDTH", "x", "d_y", "d_y_again", "d_x")
        macros |= {"STATIC": 1} | {f"STATIC_{name}": n for name, n in zip(names, static, strict=True)}
    return module(tuple(macros.items()), device)


def _blocks(width: int) -> int:
    """To a multiprocessor, by registers: 128 a thread for the usual four taps. Forwards twice as many."""
    return 1 if width > 4 else 4


def _launch(kernels: Any, kernel: str, values: dict[str, Any]) -> None:
    blocks = -(-values["num_channels"] // (THREADS * kernels.macros["VEC"]))
    kernels.launch(kernel, (values["num_runs"], blocks), THREADS, values)


def _vector(width: int, strides: tuple[int, ...], x: Tensor, values: dict[str, Any]) -> int:
    """Channels a thread reads at once: VECTOR where every row starts at a multiple of as many, else 1."""
    for n in (width, *strides):
        if n % VECTOR:
            return 1
    for name in ("x", "d_y", "d_y_again", "d_x", "weight"):
        tensor = values.get(name)
        if tensor is not None and tensor.data_ptr() % (VECTOR * tensor.itemsize):
            return 1
    return VECTOR


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


def _hand_back(kernels: Any, handed: Handed, gradients: Tensor, values: dict[str, Any]) -> None:
    """Add the gradients of a table of windows to those of the tokens that its rows are; `values`: of the call."""
    values = values | {"handed": gradients, "handed_tokens": handed.tokens}
    values |= {"handed_starts": handed.starts, "handed_rows": handed.rows}
    blocks = -(-values["num_channels"] // THREADS)
    kernels.launch("hand_back", (handed.tokens.numel(), blocks), THREADS, values)


def causal_conv1d(*args: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """CUDA backend; arguments as `mambalign.ops.reference.causal_conv1d`, then `joint`. The last output is y again."""
    y, final_state, again = CausalConv1d.apply(*args)
    return y, final_state, again
