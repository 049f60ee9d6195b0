"""One token for many sequences at once: the step of generation, written out as a short list of in-place calls.

A model's forward pass spends its time at one token on modules, views and new tensors. Here everything that does not
depend on the tokens is made once: buffers with a row a sequence, weights as the products want them, and for every
number of rows a *program*, a list of calls with their arguments bound. A step runs through it. States lie as the step
reads them (`[N, D]`, not the papers' `[D, N]`: the long axis innermost), and a convolution's window is a ring that all
rows turn together, so nothing is shifted.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mambalign.generation.state import LayerState
from mambalign.generation.stepper import Call, Plan, Stepper
from mambalign.models.mamba2 import GATE_FIRST, NO_NORM, NORM_FIRST
from mambalign.ops.torch_scan import LOG2_E
from mambalign.recipe import UserError

COPIED = 2**22  # elements of a weight up to which a CPU gets a transposed copy: few rows times it take half the time
ALIGNED = 16  # elements: a row of a matrix begins at a multiple, else some kernels round every other row differently
BLOCK = 2**17  # elements of a weight that a product of several rows takes at once on a CPU: with them it stays in cache
VECTORS = 64  # elements that the widest unrolled loop takes at once

# torch.nn.functional's own, which hides their `out`; torch.ops.aten's cost three times the dispatch.
silu: Any = torch._C._nn.silu
log_sigmoid: Any = torch._C._nn.log_sigmoid


class Decoder(Stepper):
    """A step of any family, on any device, in fp32 (fp64 for fp64 models) but for the products of 16-bit weights."""

    def __init__(self, model: Any, capacity: int, *, exact: bool = True, step: str = "auto"):
        weight = model.backbone.embeddings.weight
        super().__init__(weight.device, capacity, step)
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._scratch: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype], Tensor] = {}  # of it, as the program made last uses them in the end
        self.embedding = effective_weight(model.backbone.embeddings)
        self.head = Projection(self, model.lm_head)
        self.norm = Norm(self, model.backbone.norm_f, self.head)
        kind = Mamba2Step if model.config.model_type == "mamba2" else MambaStep
        blocks = model.backbone.layers
        channels, _, self.window = blocks[0].mixer.conv1d.weight.shape
        self.turns = self.window  # phase: where the next inputs go in the rings
        self.rings = self.zeros(len(blocks), 2, self.window, capacity, channels)
        self.states = self.zeros(len(blocks), capacity, *kind.state_shape(blocks[0].mixer))
        self.layers: list[Any] = [kind(self, block, number) for number, block in enumerate(blocks)]
        self.logits = self.matrix("logits", capacity, self.head.outputs)
        # Columns that no layer writes: with them the length of a row is sqrt(sum of squares + H eps).
        self.hidden = self.matrix("hidden", capacity, self.norm.size + ALIGNED)
        self.hidden[:, self.norm.size] = self.norm.padding
        self.settle(exact)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def scratch(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer that holds nothing between calls: shared by all layers, and by programs of any number of rows."""
        key, size = (name, dtype or self.dtype), math.prod(shape)
        if key not in self._scratch or self._scratch[key].numel() < size:
            self._scratch[key] = torch.zeros(size, dtype=key[1], device=self.device)
        self._views[key] = self._scratch[key][:size].view(shape)
        return self._views[key]

    def matrix(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """A scratch buffer that products read or write."""
        padded = self.scratch(name, rows, -(-columns // ALIGNED) * ALIGNED, dtype=dtype)
        self._views[name, padded.dtype] = padded[:, :columns]
        return padded[:, :columns]

    def steady(self, size: int) -> bool:
        """Whether all loops over rows of `size` elements are whole vectors.

        torch computes what is left over (of a buffer, and of each thread's share of it) by another exp2, silu and
        softplus, which differ in the last bit for one number in twenty. Its exp, tanh and log_sigmoid do not.
        """
        threads = torch.get_num_threads() if self.device.type == "cpu" else 0
        return all(size % (VECTORS * share) == 0 for share in range(1, threads + 1))

    # ------------------------------------------------------------------------------------------------- the states

    def load(self, row: int, state: LayerState) -> None:
        for back, column in enumerate(state.conv.unbind(2), 1):
            self.rings[:, :, (self.phase + back) % self.window, row].copy_(column[:, None])
        self.states[:, row].copy_(self.layers[0].inner(state.ssm))

    def read(self, row: int, back: int = 0) -> LayerState:
        assert back == 0, "states are updated in place"
        inputs = slice(self.phase + 1, self.phase + self.window)
        conv = self.rings.flatten(1, 2)[:, inputs, row].transpose(1, 2).to(self.embedding.dtype, copy=True)
        ssm = self.layers[0].outer(self.states[:, row]).clone(memory_format=torch.contiguous_format)
        return LayerState(conv.contiguous(), ssm)

    def move(self, source: int, target: int) -> None:
        self.tokens[target].copy_(self.tokens[source])
        self.rings[:, :, :, target].copy_(self.rings[:, :, :, source])
        self.states[:, target].copy_(self.states[:, source])

    def buffers(self) -> list[Tensor]:
        return [x for layer in self.layers for x in (layer.ring.permute(2, 0, 1, 3), layer.state)]

    # ------------------------------------------------------------------------------------------------- the step

    def intermediates(self) -> list[Tensor]:
        return [self.hidden, *self._views.values()]

    def program(self, plan: Plan, start: int, phase: int) -> list[Call]:
        """The calls that take rows `start ...` one token further, with the rings at `phase`."""
        rows, wide = slice(start, start + plan.rows), slice(start, start + plan.width)
        hidden = self.hidden[wide, : self.norm.size]
        self._views.clear()
        calls: list[Call] = []
        embedded = self.scratch("embedded", plan.width, self.norm.size, dtype=self.embedding.dtype)
        calls.append(partial(torch.index_select, self.embedding, 0, self.tokens[wide], out=embedded))
        calls.append(partial(hidden.copy_, embedded))
        normed = self.matrix("normed", plan.width, self.norm.size)
        for layer in self.layers:
            self.norm_of(layer.norm, calls, wide, normed, plan.rows)
            layer.emit(calls, rows, plan, phase, normed, hidden)
        self.norm_of(self.norm, calls, wide, normed, plan.rows)
        self.head.emit(calls, normed, self.logits[wide])
        return calls

    def norm_of(self, norm: Norm, calls: list[Call], wide: slice, out: Tensor, rows: int) -> None:
        """The first `rows` of `out`. Sums go over as many rows as products: a GPU orders them by the number of rows."""
        hidden, length = self.hidden[wide], self.scratch("length", len(out), 1)
        calls += [
            partial(torch.linalg.vector_norm, hidden, 2, 1, True, out=length),
            partial(torch.div, hidden[:rows, : self.norm.size], length[:rows], out=out[:rows]),
        ]
        if norm.weight is not None:
            calls.append(partial(out[:rows].mul_, norm.weight))


# ---------------------------------------------------------------------------------------------------------- parts


def effective_weight(module: Any) -> Tensor:
    """The weight that does what `module` does, adapters on it included.

    Raises:
        UserError: a quantised module.
    """
    if hasattr(module, "base_layer"):
        from mambalign.models.lora import merged_weight  # PEFT takes seconds to import

        base = module.get_base_layer().weight
        return merged_weight(module).to(base.dtype if base.is_floating_point() else torch.float32)
    weight: Tensor = module.weight.detach()
    if not weight.is_floating_point() or weight.dim() != 2:
        raise UserError("the engine wants plain weights, and these are quantised; load the model without load_in_4bit")
    return weight


def unsuited(model: Any, backend: str, dtypes: Collection[torch.dtype]) -> str | None:
    """Why a step written as a whole, for `backend` and weights of `dtypes`, cannot be `model`'s; None if it can."""
    mixer = model.backbone.layers[0].mixer
    if model.config.model_type not in ("mamba", "falcon_mamba"):
        return f"is not written for {model.config.model_type}"
    if mixer.backend not in ("auto", backend):
        return f"is not the backend {mixer.backend!r} that was asked for"
    if mixer.activation not in ("silu", "swish"):
        return f"has no activation {mixer.activation!r}"
    modules = [mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj, model.lm_head, model.backbone.embeddings]
    found = {(m.get_base_layer() if hasattr(m, "base_layer") else m).weight.dtype for m in modules}
    if len(found) > 1 or not found <= set(dtypes):
        names = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"wants all weights in one of {names}, not {', '.join(sorted(map(str, found)))}"
    return None


class Projection:
    """`x @ W^T + bias` into a given buffer, or added to it; in W's dtype, whatever that of the buffers."""

    def __init__(self, decoder: Decoder, module: Any, sign: int = 1):
        self.decoder = decoder
        weight = effective_weight(module) if sign > 0 else -effective_weight(module)
        self.outputs, self.inputs = weight.shape
        self.weight = weight.t()
        self.copied, self.block = weight.device.type == "cpu" and weight.numel() <= COPIED, self.outputs
        if self.copied:
            # One more vector a row: rows that lie a power of two apart push each other out of the cache.
            self.weight = weight.new_zeros(self.inputs, (self.outputs // ALIGNED + 1) * ALIGNED)[:, : self.outputs]
            self.weight.copy_(weight.t())
            self.block = max(BLOCK // self.inputs // VECTORS, 1) * VECTORS
        bias = module.bias
        self.bias = None if bias is None else sign * bias.detach().to(decoder.dtype)

    def emit(self, calls: list[Call], x: Tensor, out: Tensor, add: bool = False) -> None:
        if self.weight.dtype == self.decoder.dtype:
            block = self.outputs if len(x) == 1 else self.block
            terms = out if add else None if self.bias is None else self.bias.expand(out.shape)
            for at in range(0, self.outputs, block):
                columns = (slice(None), slice(at, at + block))
                product = torch.mm if terms is None else partial(torch.addmm, terms[columns])
                calls.append(partial(product, x, self.weight[columns], out=out[columns]))
            bias = self.bias if add else None
        else:
            dtype = self.weight.dtype
            narrow = self.decoder.matrix("narrow in", x.shape[0], self.inputs, dtype)
            result = self.decoder.matrix("narrow out", x.shape[0], self.outputs, dtype)
            calls += [partial(narrow.copy_, x), partial(torch.mm, narrow, self.weight, out=result)]
            calls.append(partial(out.add_, result) if add else partial(out.copy_, result))
            bias = self.bias
        if bias is not None:
            calls.append(partial(out.add_, bias))


class Norm:
    """Of an RMS norm: `weight * sqrt(H)` and `sqrt(H eps)`, for a row divided by its length (see `Decoder.hidden`).

    The weight moves into the product that reads the norm where that has a copy of its own as precise; then it is None.
    """

    def __init__(self, decoder: Decoder, module: Any, reader: Projection):
        self.size = module.weight.shape[0]
        weight = module.weight.detach().to(decoder.dtype) * self.size**0.5
        moves = reader.copied and reader.weight.dtype == decoder.dtype
        self.weight = None if moves else weight
        if moves:
            reader.weight *= weight[:, None]
        self.padding = (self.size * module.variance_epsilon) ** 0.5


class Step:
    """What the layers of all families share.

    ring: `[2, W, rows, channels]` of the decoder's, the last W inputs, each at its place modulo W and written twice: so
    from any place on, the next W of the 2 W lie in their order, and are summed in it wherever the ring stands.
    """

    def __init__(self, decoder: Decoder, block: Any, number: int):
        mixer = self.mixer = block.mixer
        self.decoder, self.ring, self.state = decoder, decoder.rings[number], decoder.states[number]
        self.in_proj, self.out_proj = Projection(decoder, mixer.in_proj), Projection(decoder, mixer.out_proj)
        self.norm = Norm(decoder, block.norm, self.in_proj)
        self.taps = mixer.conv1d.weight.detach().squeeze(1).to(decoder.dtype).t()[:, None].contiguous()
        # The last place of the sum is the bias, written once.
        self.products = decoder.zeros(len(self.taps) + 1, *self.ring.shape[2:])
        if mixer.conv1d.bias is not None:
            self.products[-1] = mixer.conv1d.bias.detach()
        self.act = None if mixer.activation in ("silu", "swish") else mixer.act

    def convolve(self, calls: list[Call], x: Tensor, rows: slice, phase: int, out: Tensor) -> None:
        """Push `x [rows, channels]` into the ring and write the convolution; `out` may be `x`."""
        window = len(self.taps)
        inputs = self.ring.flatten(0, 1)[phase + 1 : phase + 1 + window, rows]
        products = self.products[:, rows]
        calls += [
            partial(self.ring[:, phase, rows].copy_, x),
            partial(torch.mul, inputs, self.taps, out=products[:-1]),
            partial(torch.sum, products, 0, out=out),
        ]

    def activate(self, calls: list[Call], x: Tensor) -> None:
        """The convolution's activation, in place."""
        act = self.act
        if act is None:
            self.silu(calls, x)
        else:
            calls.append(lambda: x.copy_(act(x)))

    def silu(self, calls: list[Call], x: Tensor) -> None:
        """In place."""
        if self.decoder.steady(x.shape[1]):
            calls.append(partial(silu, x, out=x))
            return
        below = self.decoder.scratch("silu", *x.shape)
        calls += [
            partial(torch.mul, x, -1, out=below),
            below.exp_,
            partial(below.add_, 1),
            partial(x.div_, below),
        ]


class MambaStep(Step):
    """Mamba-1's and Falcon-Mamba's; state `[rows, N, D]`."""

    def __init__(self, decoder: Decoder, block: Any, number: int):
        super().__init__(decoder, block, number)
        mixer = self.mixer
        # Step sizes are kept negated: softplus(x) is -log_sigmoid(-x).
        self.x_proj, self.dt_proj = Projection(decoder, mixer.x_proj), Projection(decoder, mixer.dt_proj, sign=-1)
        if self.dt_proj.bias is None:
            self.dt_proj.bias = decoder.zeros(mixer.intermediate_size)
        self.A = torch.exp(mixer.A_log.detach()).t().to(decoder.dtype).contiguous()
        self.binary = decoder.steady(self.A.numel())
        if self.binary:
            self.A *= LOG2_E  # for exp2, which costs half of exp
        self.D = mixer.D.detach().to(decoder.dtype)
        self.eps = getattr(mixer, "rms_eps", None)

    @staticmethod
    def state_shape(mixer: Any) -> tuple[int, ...]:
        channels, states = mixer.A_log.shape
        return states, channels

    def inner(self, state: Tensor) -> Tensor:
        """`[L, D, N]` -> `[L, N, D]`."""
        return state.transpose(1, 2)

    outer = inner

    def emit(self, calls: list[Call], rows: slice, plan: Plan, phase: int, x: Tensor, out: Tensor) -> None:
        n, (N, D), scratch, matrix = plan.rows, self.A.shape, self.decoder.scratch, self.decoder.matrix
        xz, y = matrix("xz", plan.width, 2 * D), matrix("y", plan.width, D)
        u, z = xz.split(D, 1)
        low, dt = matrix("low", plan.width, self.x_proj.outputs), matrix("dt", plan.width, D)
        rank = self.dt_proj.inputs
        self.in_proj.emit(calls, x, xz)
        self.convolve(calls, u[:n], rows, phase, u[:n])
        if self.act is None:
            self.silu(calls, xz[:n])  # one call for both halves
        else:
            self.activate(calls, u[:n])
            self.silu(calls, z[:n])
        self.x_proj.emit(calls, u, low)
        B, C = low[:, rank : rank + N], low[:, rank + N :]
        if self.eps is not None:  # of all rows, as in `norm_of`
            for part in (low[:, :rank], B, C):
                calls.append(partial(_normalise, part, self.eps))
        B, C = B[:n], C[:n]
        self.dt_proj.emit(calls, low[:, :rank], dt)
        mixed, dt, u, y, z, state = y, dt[:n], u[:n], y[:n], z[:n], self.state[rows]
        decay = scratch("decay", n, N, D)
        calls += [
            partial(log_sigmoid, dt, out=dt),
            partial(torch.mul, dt[:, None], self.A, out=decay),
            decay.exp2_ if self.binary else decay.exp_,
            partial(state.mul_, decay),
            partial(dt.mul_, u),
            partial(state.addcmul_, B[:, :, None], dt[:, None], value=-1),
            partial(torch.bmm, C[:, None], state, out=y[:, None]),
            partial(y.addcmul_, u, self.D),
            partial(y.mul_, z),
        ]
        self.out_proj.emit(calls, mixed, out, add=True)


def _normalise(x: Tensor, eps: float) -> None:
    """Falcon-Mamba's norm without a weight (arXiv 2410.05355, section 3.1), in place."""
    x.mul_(x.square().mean(-1, keepdim=True).add_(eps).rsqrt_())


class Mamba2Step(Step):
    """Mamba-2's: G groups of R heads of P channels; state `[rows, G, N, R * P]`."""

    def __init__(self, decoder: Decoder, block: Any, number: int):
        super().__init__(decoder, block, number)
        mixer = self.mixer
        self.heads, self.groups, self.N = mixer.num_heads, mixer.n_groups, mixer.ssm_state_size
        self.width = mixer.intermediate_size
        self.R, self.P = self.heads // self.groups, self.width // self.heads
        dtype = decoder.dtype
        self.A = torch.exp(mixer.A_log.detach()).to(dtype)
        self.D = mixer.D.detach().to(dtype).repeat_interleave(self.P)
        # Step sizes are kept negated: softplus(x) is -log_sigmoid(-x).
        self.bias = -mixer.dt_bias.detach().to(dtype)
        lowest, highest = map(float, mixer.time_step_limit)
        self.limits = None if (lowest, highest) == (0.0, math.inf) else (-highest, -lowest)
        self.kind = NO_NORM if mixer.norm is None else NORM_FIRST if mixer.norm.norm_before_gate else GATE_FIRST
        if mixer.norm is not None:
            self.group_size = mixer.norm.group_size
            self.weight = mixer.norm.weight.detach().to(dtype) * self.group_size**0.5
            self.padding = self.group_size * mixer.norm.variance_epsilon

    @staticmethod
    def state_shape(mixer: Any) -> tuple[int, ...]:
        return mixer.n_groups, mixer.ssm_state_size, mixer.intermediate_size // mixer.n_groups

    def inner(self, state: Tensor) -> Tensor:
        """`[L, H, P, N]` -> `[L, G, N, R * P]`."""
        return state.unflatten(1, (self.groups, self.R)).permute(0, 1, 4, 2, 3).flatten(3)

    def outer(self, state: Tensor) -> Tensor:
        return state.unflatten(3, (self.R, self.P)).permute(0, 1, 3, 4, 2).flatten(1, 2)

    def emit(self, calls: list[Call], rows: slice, plan: Plan, phase: int, x: Tensor, out: Tensor) -> None:
        n, scratch, matrix = plan.rows, self.decoder.scratch, self.decoder.matrix
        G, N, R, P = self.groups, self.N, self.R, self.P
        projected, mixed = (
            matrix("projected", plan.width, self.in_proj.outputs),
            matrix("mixed", plan.width, self.width),
        )
        z, xBC, step = projected[:n].split([self.width, self.width + 2 * G * N, self.heads], dim=1)
        self.in_proj.emit(calls, x, projected)
        convolved = scratch("convolved", n, xBC.shape[1])
        self.convolve(calls, xBC, rows, phase, convolved)
        self.activate(calls, convolved)
        u, B, C = convolved.split([self.width, G * N, G * N], dim=1)
        dt, decay, du = scratch("dt", n, self.heads), scratch("decay", n, self.heads), scratch("du", n, G, R, P)
        packed, whole = scratch("C", n, G * N), scratch("y", plan.width, self.width)
        y = whole[:n]
        state = self.state[rows]
        by_head = state.unflatten(3, (R, P))
        calls += [
            partial(torch.sub, self.bias, step, out=dt),
            partial(log_sigmoid, dt, out=dt),
        ]
        if self.limits is not None:
            calls.append(partial(dt.clamp_, *self.limits))
        calls += [
            partial(torch.mul, dt, self.A, out=decay),
            decay.exp_,
            partial(by_head.mul_, decay.view(n, G, 1, R, 1)),
            partial(torch.mul, u.unflatten(1, (G, R, P)), dt.view(n, G, R, 1), out=du),
            partial(state.addcmul_, B.unflatten(1, (G, N))[..., None], du.view(n, G, 1, R * P), value=-1),
            partial(packed.copy_, C),
            partial(torch.bmm, packed.view(n * G, 1, N), state.flatten(0, 1), out=y.view(n * G, 1, R * P)),
            partial(y.addcmul_, u, self.D),
        ]
        self.silu(calls, z)
        if self.kind == GATE_FIRST:
            calls.append(partial(y.mul_, z))
        if self.kind != NO_NORM:
            self._norm(calls, whole, n)
        calls.append(
            partial(mixed[:n].copy_, y) if self.kind == GATE_FIRST else partial(torch.mul, y, z, out=mixed[:n])
        )
        self.out_proj.emit(calls, mixed, out, add=True)

    def _norm(self, calls: list[Call], whole: Tensor, rows: int) -> None:
        """In place, of the first rows; sums go over all (see `Decoder.norm_of`)."""
        y, grouped = whole[:rows], whole.unflatten(1, (-1, self.group_size))
        length = self.decoder.scratch("group length", *grouped.shape[:2], 1)
        calls += [
            partial(torch.linalg.vector_norm, grouped, 2, 2, True, out=length),
            length.square_,
            partial(length.add_, self.padding),
            length.sqrt_,
            partial(grouped[:rows].div_, length[:rows]),
            partial(y.mul_, self.weight),
        ]
