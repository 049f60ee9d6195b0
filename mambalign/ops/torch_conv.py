"""Causal convolution in plain PyTorch, any device: shifted slices inside segments, a gather for tokens near a start.

The tap at distance j contributes a contiguous shifted product for every token that lies at least j deep in its segment.
The others (at most W - 1 per segment) look up their input along the path: in the parent's tail, further up, or in the
initial window. The backward pass mirrors it and keeps nothing but the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambalign.ops.backends import add_rows, without_autocast
from mambalign.ops.reference import compute_dtype
from mambalign.ops.segments import Segments


@dataclass
class Tap:
    """Distance j: `inside [T - j, 1]` says where the shifted slice is right; elsewhere `tokens` read `source`."""

    distance: int
    inside: Tensor | None
    tokens: Tensor
    source: Tensor


def plan(segments: Segments, width: int, device: torch.device) -> tuple[list[Tap], Tensor]:
    """The taps at distances 1..width, and `final_windows` as rows of `[x ; initial windows]`."""
    key = ("conv", width, str(device))
    if key not in segments.memo:
        taps = _taps(segments, width, device)
        segments.memo[key] = taps, _as_rows(segments.final_windows(width), segments.num_tokens).to(device)
    return segments.memo[key]


def _as_rows(entries: Tensor, num_tokens: int) -> Tensor:
    return torch.where(entries >= 0, entries, num_tokens - 1 - entries)


def _taps(segments: Segments, width: int, device: torch.device) -> list[Tap]:
    depth = torch.arange(segments.num_tokens) - segments.cu_seqlens[segments.segment_of_token]
    sources = _as_rows(segments.windows(width), segments.num_tokens)
    taps = []
    for distance in range(1, width + 1):
        tokens = (depth < distance).nonzero()[:, 0]
        inside = (depth[distance:] >= distance)[:, None]
        taps.append(
            Tap(
                distance,
                None if bool(inside.all()) else inside.to(device),
                tokens.to(device),
                sources[tokens, width - distance].to(device),
            )
        )
    return taps


class CausalConv1d(torch.autograd.Function):
    """See `mambalign.ops.causal_conv1d` for the contract."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        segments: Segments,
        initial_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, rows, final_rows = _convolve(x, weight, bias, segments, initial_state)
        ctx.save_for_backward(x, weight, bias, initial_state)
        ctx.activation, ctx.segments = activation, segments
        ctx.set_materialize_grads(False)
        out = torch.nn.functional.silu(y) if activation == "silu" else y
        final = rows[final_rows.flatten()].view(*final_rows.shape, x.shape[1]).transpose(1, 2)
        return out.to(x.dtype), final.to(x.dtype)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, initial_state = ctx.saved_tensors
        segments, width = ctx.segments, weight.shape[1] - 1
        taps, final_rows = plan(segments, width, x.device)
        y, rows, _ = _convolve(x, weight, bias, segments, initial_state)
        w = weight.to(rows.dtype)
        d_y = torch.zeros_like(y) if d_out is None else d_out.to(y.dtype)
        if ctx.activation == "silu":
            gate = torch.sigmoid(y)
            d_y = d_y * gate * (1 + y * (1 - gate))
        xc = rows[: x.shape[0]]
        d_rows = torch.zeros_like(rows)
        d_x = d_rows[: x.shape[0]]
        d_x.addcmul_(d_y, w[:, width])
        d_weight = torch.empty_like(w)
        d_weight[:, width] = (d_y * xc).sum(0)
        outside_rows, outside_values = [final_rows.flatten()], []
        if d_final is None:
            outside_rows = []
        else:
            outside_values.append(d_final.to(rows.dtype).transpose(1, 2).flatten(0, 1))
        for tap in taps:
            column = w[:, width - tap.distance]
            below = d_y[tap.distance :] if tap.inside is None else d_y[tap.distance :] * tap.inside
            d_x[: below.shape[0]].addcmul_(below, column)
            d_weight[:, width - tap.distance] = (below * xc[: below.shape[0]]).sum(0)
            d_weight[:, width - tap.distance] += (d_y[tap.tokens] * rows[tap.source]).sum(0)
            outside_rows.append(tap.source)
            outside_values.append(d_y[tap.tokens] * column)
        if outside_rows:
            # Several children may read the same parent token.
            add_rows(d_rows, torch.cat(outside_rows), torch.cat(outside_values))
        d_initial = None
        if initial_state is not None:
            d_initial = d_rows[x.shape[0] :].view(segments.num_segments, width, x.shape[1]).transpose(1, 2)
        return (
            d_x.to(x.dtype),
            d_weight.to(weight.dtype),
            None if bias is None else d_y.sum(0).to(bias.dtype),
            None,
            None,
            None if d_initial is None else d_initial.to(initial_state.dtype),
        )


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, segments: Segments, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y before the activation, `[x ; initial windows]` in the compute dtype, final windows as rows of it)."""
    dtype = compute_dtype(x, weight, initial_state)
    width = weight.shape[1] - 1
    taps, final_rows = plan(segments, width, x.device)
    if initial_state is None:
        before = x.new_zeros(segments.num_segments * width, x.shape[1], dtype=dtype)
    else:
        before = initial_state.to(dtype).transpose(1, 2).flatten(0, 1)
    rows = torch.cat([x.to(dtype), before])
    xc, w = rows[: x.shape[0]], weight.to(dtype)
    y = xc * w[:, width]
    if bias is not None:
        y += bias.to(dtype)
    for tap in taps:
        column = w[:, width - tap.distance]
        shifted = xc[: max(x.shape[0] - tap.distance, 0)]
        y[tap.distance :].addcmul_(shifted if tap.inside is None else shifted * tap.inside, column)
        # Every token stands once in `tokens`, so this indexed write is exact.
        y[tap.tokens] += rows[tap.source] * column
    return y, rows, final_rows


def causal_conv1d(*args: Any) -> tuple[Tensor, Tensor]:
    """PyTorch backend; arguments as `mambalign.ops.reference.causal_conv1d`."""
    y, final_state = CausalConv1d.apply(*args[:-1])  # the last state comes in any case
    return y, final_state
