"""Naive loops over time: the definition of every op, in float32 or float64.

They compute in float64 when any input is float64 and in float32 otherwise, and their gradients are autograd's. Every
backend is checked against them; nothing in training calls them unless `backend="reference"` asks for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambalign.ops.segments import Segments


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any of the tensors is float64, else float32: what every op accumulates in."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    segments: Segments,
    initial_state: Tensor | None,
    output_final_state: bool = True,  # it costs nothing here, and comes in any case
) -> tuple[Tensor, Tensor]:
    """Equations (2a, 2b) of arXiv 2312.00752 with the paper's discretisation (section 3.2), one token at a time."""
    dtype = compute_dtype(u, delta, A, B, C, initial_state)
    out_dtype = u.dtype
    u, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)
    if delta_softplus:
        delta = F.softplus(delta)
    zero = torch.zeros(A.shape, dtype=dtype, device=u.device)
    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    for segment, parent in enumerate(segments.parent.tolist()):
        start, end = segments.cu_seqlens[segment : segment + 2].tolist()
        root = zero if initial_state is None else initial_state[segment].to(dtype)
        state = finals[parent] if parent >= 0 else root
        for t in range(start, end):
            decay = torch.exp(delta[t, :, None] * A)
            state = decay * state + (delta[t] * u[t])[:, None] * B[t][None, :]
            outputs.append(state @ C[t])
        finals.append(state)
    y = torch.stack(outputs) if outputs else torch.zeros_like(u)
    if D is not None:
        y = y + u * D.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    final_state = torch.stack(finals) if finals else zero.new_zeros(0, *A.shape)
    return y.to(out_dtype), final_state


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    segments: Segments,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of arXiv 2405.21060 (equation 2 with the scalar A of its section 7), one token at a time."""
    dtype = compute_dtype(x, dt, A, B, C, initial_state)
    heads = x.shape[1]
    values, A = x.to(dtype), A.to(dtype)
    B, C = (t.to(dtype).repeat_interleave(heads // t.shape[1], dim=1) for t in (B, C))
    step = step_size(dt, dt_bias, dt_softplus, dt_limit, dtype)
    zero = values.new_zeros(heads, x.shape[2], B.shape[2])
    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    for segment, parent in enumerate(segments.parent.tolist()):
        start, end = segments.cu_seqlens[segment : segment + 2].tolist()
        root = zero if initial_state is None else initial_state[segment].to(dtype)
        state = finals[parent] if parent >= 0 else root
        for t in range(start, end):
            decay = torch.exp(step[t] * A)[:, None, None]
            state = decay * state + (step[t][:, None] * values[t])[:, :, None] * B[t][:, None, :]
            outputs.append((state * C[t][:, None, :]).sum(-1))
        finals.append(state)
    y = torch.stack(outputs) if outputs else torch.zeros_like(values)
    if D is not None:
        y = y + values * D.to(dtype).reshape(heads, -1)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    final_state = torch.stack(finals) if finals else zero.new_zeros(0, *zero.shape)
    return y.to(x.dtype), final_state


def step_size(
    dt: Tensor, dt_bias: Tensor | None, softplus: bool, limit: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """`clamp(softplus(dt + dt_bias), *limit)` in `dtype`."""
    step = dt.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    return (F.softplus(step) if softplus else step).clamp(*limit)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    segments: Segments,
    initial_state: Tensor | None,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """`y[t] = act(bias + sum_j weight[:, j] * x[t - (W - 1) + j])` along each token's own path."""
    dtype = compute_dtype(x, weight, initial_state)
    width = weight.shape[1] - 1
    values, taps = x.to(dtype), weight.to(dtype)
    zero = torch.zeros(width, x.shape[1], dtype=dtype, device=x.device)
    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    for segment, parent in enumerate(segments.parent.tolist()):
        start, end = segments.cu_seqlens[segment : segment + 2].tolist()
        if parent >= 0:
            window = finals[parent]
        else:
            window = zero if initial_state is None else initial_state[segment].to(dtype).T
        for t in range(start, end):
            window = torch.cat([window, values[t : t + 1]])
            outputs.append((window * taps.T).sum(0))
            window = window[1:]
        finals.append(window)
    y = torch.stack(outputs) if outputs else torch.zeros_like(values)
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    final_state = torch.stack([window.T for window in finals]) if finals else zero.T.new_zeros(0, x.shape[1], width)
    return y.to(x.dtype), final_state.to(x.dtype)


def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`log softmax(hidden @ weight.T)[label]`, 0 where the label is -100."""
    dtype = compute_dtype(hidden, weight)
    logps = torch.log_softmax((hidden.to(dtype) @ weight.to(dtype).T), dim=-1)
    valid = labels != -100
    picked = logps.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(valid, picked, torch.zeros_like(picked))


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, sum_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(equation (4) of arXiv 1910.07467 with eps inside the root, of the sum; the sum)."""
    total = x.to(sum_dtype) if residual is None else x.to(sum_dtype) + residual.to(sum_dtype)
    exact = total.to(compute_dtype(total, weight))
    return (exact / (exact.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.to(exact.dtype)).to(dtype), total
