"""Selective scan on a GPU: `selective_scan.cu`, the passes around it, and their gradients.

A *unit* is a segment, or a piece of a long one (`scan_plan`). The main passes walk all units at once, a block for 64
channels of each, so they must know the state in which every unit starts (forwards) and the gradient of the state in
which it ends (backwards). Where no unit has a parent, both are given and one pass does it. Otherwise:

    heads   units with a child, walked from a zero state: where that leads, and the sum of their step sizes
    join    true starts, parents first: a state decays over a unit by exp(A times that sum), one exponential
    main    outputs, final states, and the state before every 32 tokens for the backward pass
    tails   units with a parent, walked backwards from a zero gradient
    join    the same with gradients, children first; several children of one parent add up
    main    backwards: recomputes 32 tokens from the stored state, then all gradients

Pieces and forks are thus one thing. Where families of units are walked by one block each, or rows in a relay, the main
passes are enough.

dB and dC are sums over channels: every block writes its own share, and a sum over blocks in a fixed order follows, so
results repeat bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambalign.ops import nvrtc, scan_plan
from mambalign.ops.halves import JointGradient
from mambalign.ops.nvrtc import IO
from mambalign.ops.scan_plan import TILE, WARPS, Plan, Walk
from mambalign.ops.segments import Segments

SOURCE = Path(__file__).with_name("selective_scan.cu")
PARAMETERS = Path(__file__).with_name("scan_parameters.cu")
STATES, LANES = 16, 16  # as in the source: states of a channel, channels of a warp
# Bytes of the source's `struct Shared`: B and C of a tile; for every warp groups of four tokens, and one in passing.
SHARED = 4 * (2 * TILE * STATES + WARPS * (TILE // 4 * (3 * 76 + 4 * 64) + 4 * 64))
STATIC = True  # compile for the row lengths at hand: addresses then cost no instructions (a sixth of all)


def unavailable(device: torch.device, A: Tensor | None = None, *others: Tensor | None) -> str | None:
    """Why this backend cannot run on `device`, or on these inputs; None if it can."""
    if A is not None and A.shape[1] > STATES:
        return f"holds at most {STATES} states a channel, A has {A.shape[1]}"
    return nvrtc.unavailable(device, A, *others)


def module(macros: tuple[tuple[str, int], ...], device: torch.device) -> Any:
    return nvrtc.module(SOURCE, macros, device)


class _Problem:
    """What the passes of one call share. It holds no token tensors: autograd keeps those, and may drop them.

    Small models are bound by the host, so what can be prepared once for both directions is.
    """

    def __init__(
        self,
        tokens: dict[str, Tensor],
        A: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        segments: Segments,
        joint: JointGradient | None,
        log_A: bool,
    ):
        u = tokens["u"]
        (self.T, self.D), self.N = u.shape, A.shape[1]
        self.blocks = -(-self.D // (LANES * WARPS))
        self.Dp = self.blocks * LANES * WARPS
        self.device, self.segments, self.joint = u.device, segments, joint
        # One element type for all: where they differ, the widest keeps every bit.
        self.dtype = u.dtype if all(t.dtype == u.dtype for t in tokens.values()) else torch.float32
        self._parameters = nvrtc.module(PARAMETERS, (("IO", 0),), self.device)
        sizes = {"num_channels": self.D, "padded_channels": self.Dp, "num_states": self.N}
        self._given = sizes | {"A": A.float().contiguous(), "is_log": log_A}
        rates = self.states(1)
        self._parameters.launch("scan_rates", (-(-STATES * self.Dp // 128), 1), 128, self._given | {"rates": rates})
        self._shared = {
            "A": rates,
            "D": self._vector(D),
            "bias": self._vector(delta_bias),
            **sizes,
            "num_tokens": self.T,
            "num_blocks": self.blocks,
        }

    def compile(self, laid: dict[str, Any], softplus: bool) -> None:
        """Choose the kernels, for both directions, by the layout of the token tensors."""
        rows = self.N == STATES and all(nvrtc.in_fours(laid[name]) for name in ("B", "C"))
        tokens = self.D % 4 == 0 and all(nvrtc.in_fours(laid[name]) for name in ("u", "delta", "z") if name in laid)
        macros = {
            "IO": IO[self.dtype],
            "GATED": "z" in laid,
            "SOFTPLUS": softplus,
            "WARPS": WARPS,
            "SHARED_BYTES": SHARED,
        }
        relay = scan_plan.is_relay(self.segments, self.blocks, self.device)
        forward, backward = (scan_plan.HELD_IN_RELAY if relay else held for held in scan_plan.HELD.values())
        macros |= {"RELAY": relay, "HELD_FORWARD": forward, "HELD": backward}
        macros |= {"ALIGNED_ROWS": rows, "ALIGNED_TOKENS": tokens}
        if STATIC:
            # y's gradient, and z where there is none, have the usual row length.
            strides = {name: laid.get(f"{name}_stride", self.D) for name in ("u", "delta", "B", "C", "z", "d_out")}
            strides["d_z"] = self.D if self.joint is None else 2 * self.D
            macros |= {"STATIC": 1, "STATIC_WIDTH": self.D} | {f"STATIC_{name}": n for name, n in strides.items()}
        self._module = module(tuple((name, int(value)) for name, value in macros.items()), self.device)

    def laid(self, tokens: dict[str, Tensor]) -> dict[str, Any]:
        """Token tensors in the call's dtype, with the row stride of each."""
        values: dict[str, Any] = {}
        for name, value in tokens.items():
            value = value.to(self.dtype)
            value = value if value.stride(1) == 1 else value.contiguous()
            values[name], values[f"{name}_stride"] = value, value.stride(0)
        return values

    def laid_gradient(self, d_out: Tensor) -> dict[str, Any]:
        """The same of y's gradient, in the layout that the kernels were compiled for."""
        d_out = d_out.to(self.dtype).contiguous()
        d_out = d_out if d_out.data_ptr() % (4 * d_out.itemsize) == 0 else d_out.clone()
        return {"d_out": d_out, "d_out_stride": self.D}

    def plan(self, kernel: str) -> Plan:
        return scan_plan.plan(self.segments, self.blocks, self.device, kernel)

    def values(self, plan: Plan) -> dict[str, Any]:
        """What every pass with this plan is given."""
        joined = len(plan.joined)
        values = self._shared | {"units": plan.units, "joined": plan.joined, "num_joined": joined}
        if joined:
            sums = torch.empty(joined, self.Dp, dtype=torch.float32, device=self.device)
            values |= {"starts": self.states(joined), "ends": self.states(joined), "sums": sums}
        elif plan.handed:
            values["starts"] = values["ends"] = self.states(plan.handed)
        return values

    def _vector(self, value: Tensor | None) -> Tensor | None:
        """`[D]` -> fp32 `[Dp]`."""
        if value is None:
            return None
        missing = self.Dp - self.D
        return torch.nn.functional.pad(value.float(), (0, missing)) if missing else value.float().contiguous()

    def states(self, rows: int) -> Tensor:
        return torch.empty(rows, STATES, self.Dp, dtype=torch.float32, device=self.device)

    def _states(self, rows: int) -> Tensor:
        """Zero where no state or channel is."""
        full = self.N == STATES and self.Dp == self.D
        return self.states(rows) if full else self.states(rows).zero_()

    def padded(self, states: Tensor | None) -> Tensor | None:
        """`[R, D, N]` -> fp32 `[R, 16, Dp]`."""
        if states is None:
            return None
        out = self._states(states.shape[0])
        out[:, : self.N, : self.D] = states.transpose(1, 2)
        return out

    def unpadded(self, states: Tensor) -> Tensor:
        """`[R, 16, Dp]` -> `[R, D, N]`."""
        return states[:, : self.N, : self.D].transpose(1, 2)

    def gradients(self, gated: bool) -> dict[str, Any]:
        """Of the token tensors, unwritten; that of z beside its other half where there is one."""
        grads: dict[str, Any] = {name: self.tokens() for name in ("d_u", "d_delta")}
        if gated:
            joint = self.joint
            d_z = self.tokens() if joint is None else joint.right(self.T, self.D, self.dtype, self.device)
            grads |= {"d_z": d_z, "d_z_stride": d_z.stride(0)}
        return grads

    def tokens(self) -> Tensor:
        return torch.empty(self.T, self.D, dtype=self.dtype, device=self.device)

    def walk(self, kernel: str, plan: Plan, walk: Walk, values: dict[str, Any]) -> None:
        """Every pair of an item and a block of channels; in a relay as turns of the blocks that run at a time."""
        values = values | {"item_starts": walk.starts, "item_units": walk.units}
        blocks = pairs = self.blocks * walk.items
        if plan.rows and pairs:
            blocks = min(pairs, scan_plan.held(scan_plan.HELD_IN_RELAY, self.device))
            turns = torch.zeros(1 + pairs, dtype=torch.int32, device=self.device)
            values |= {"turns": turns, "num_turns": pairs, "turns_apart": self.blocks * plan.rows}
        self._module.launch(kernel, (blocks, 1), 32 * WARPS, values, SHARED if kernel == "scan_backward" else 0)

    def join(self, kernel: str, values: dict[str, Any]) -> None:
        if values["num_joined"]:
            self._module.launch(kernel, (-(-STATES * self.Dp // 128), 1), 128, values)

    def sum_vectors(self, d_vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """fp32 dA `[D, N]`, dD and the bias' gradient `[D]` from the shares of all items."""
        sizes = ((self.D, self.N), (self.D,), (self.D,))
        d_A, d_D, d_bias = (torch.empty(size, dtype=torch.float32, device=self.device) for size in sizes)
        values = self._given | {"d_vectors": d_vectors, "num_items": d_vectors.shape[0]}
        values |= {"d_A": d_A, "d_D": d_D, "d_bias": d_bias}
        self._parameters.launch("sum_vectors", (-(-self.D // 32), STATES + 2), nvrtc.SUMMERS, values)
        return d_A, d_D, d_bias

    def sum_BC(self, values: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """dB and dC `[T, N]` from the shares of all blocks."""
        d_B, d_C = torch.empty(2, self.T, STATES, dtype=self.dtype, device=self.device).unbind(0)
        self._module.launch("sum_BC", (-(-self.T * 8 // 32), 1), nvrtc.SUMMERS, values | {"d_B": d_B, "d_C": d_C})
        return d_B[:, : self.N], d_C[:, : self.N]


class SelectiveScan(torch.autograd.Function):
    """See `mambalign.ops.selective_scan` for the contract."""

    @staticmethod
    def forward(
        ctx: Any,
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
        output_final_state: bool,
        joint: JointGradient | None = None,
        log_A: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        tokens = _tokens(u, delta, B, C, z)
        problem = _Problem(tokens, A, D, delta_bias, segments, joint, log_A)
        laid = problem.laid(tokens)
        problem.compile(laid, delta_softplus)
        plan = problem.plan("scan_forward")
        y, checkpoints = problem.tokens(), problem.states(plan.checkpoints)
        finals = problem.states(segments.num_segments) if output_final_state else None
        values = problem.values(plan) | laid | {"initial": problem.padded(initial_state)}
        values |= {"y": y, "checkpoints": checkpoints, "finals": finals}
        problem.walk("scan_heads", plan, plan.heads, values)
        problem.join("join_forward", values)
        problem.walk("scan_forward", plan, plan.all, values)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, checkpoints)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        return y.to(u.dtype), None if finals is None else problem.unpadded(finals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_finals: Tensor | None) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, delta_bias, initial_state, checkpoints = ctx.saved_tensors
        problem: _Problem = ctx.problem
        plan = problem.plan("scan_backward")
        values = problem.values(plan) | problem.laid(_tokens(u, delta, B, C, z))
        values |= problem.laid_gradient(torch.zeros_like(u) if d_out is None else d_out)
        values |= {"d_final": problem.padded(d_finals), "checkpoints": checkpoints}
        problem.walk("scan_tails", plan, plan.tails, values)
        problem.join("join_backward", values)
        grads = problem.gradients(gated=z is not None)
        # Of every item, or row of a relay: 16 rows of A, one of D, one of the bias.
        shares = plan.rows or plan.all.items
        d_vectors = torch.empty(shares, STATES + 2, problem.Dp, dtype=torch.float32, device=u.device)
        d_BC = torch.empty(problem.blocks, problem.T, 2 * STATES, dtype=torch.float32, device=u.device)
        d_initial = None
        if initial_state is not None:
            d_initial = problem.states(problem.segments.num_segments).zero_()
        values |= grads | {"d_BC": d_BC, "d_vectors": d_vectors, "d_initial": d_initial}
        problem.walk("scan_backward", plan, plan.all, values)
        d_B, d_C = problem.sum_BC(values)
        d_A, d_D, d_bias = problem.sum_vectors(d_vectors)
        return (
            grads["d_u"].to(u.dtype),
            grads["d_delta"].to(delta.dtype),
            d_A.to(A.dtype),
            d_B.to(B.dtype),
            d_C.to(C.dtype),
            None if D is None else d_D.to(D.dtype),
            None if z is None else grads["d_z"].to(z.dtype),
            None if delta_bias is None else d_bias.to(delta_bias.dtype),
            None,
            None,
            None if d_initial is None else problem.unpadded(d_initial).to(initial_state.dtype),
            None,
            None,
            None,
        )


def _tokens(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> dict[str, Tensor]:
    return {"u": u, "delta": delta, "B": B, "C": C} | ({} if z is None else {"z": z})


def selective_scan(*args: Any) -> tuple[Tensor, Tensor | None]:
    """CUDA backend; arguments as `mambalign.ops.reference.selective_scan`, then `joint`, `log_A`."""
    y, final_state = SelectiveScan.apply(*args)
    if y.requires_grad:
        y.grad_fn.problem.plan("scan_backward")  # made while the device is busy: when it is needed, it may wait for it
    return y, final_state
