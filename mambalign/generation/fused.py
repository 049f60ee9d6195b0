"""The step of generation on a GPU for Mamba-1 and Falcon-Mamba: seven kernels a layer, in a CUDA graph.

Norm with residual addition, input projection, convolution, projection to low rank, B and C, projection to step sizes,
state update with gate, output projection; Falcon-Mamba has one more, for its inner norms. They are the operations of
the model's forward pass, in its precisions: a residual stream of the model's type (fp32 unless its config says
otherwise), states in fp32, everything else in the weights' type.

A graph is captured for every number of rows in `plans`, and all have the slots' buffers. So the rows of a step go
through products of the same shapes whatever the other slots hold. With `exact` a smaller number of rows is used only
where it gives the bits of the full one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mambalign.generation.decode import effective_weight, unsuited
from mambalign.generation.state import LayerState
from mambalign.generation.stepper import Call, Plan, Stepper
from mambalign.ops import cuda_decode, cuda_norm, nvrtc
from mambalign.ops.torch_scan import LOG2_E


def unavailable(model: Any) -> str | None:
    """Why `FusedDecoder` cannot step `model`; None if it can."""
    mixer = model.backbone.layers[0].mixer
    reason = unsuited(model, "cuda", nvrtc.IO.keys())
    taps, states = mixer.conv1d.weight.shape[-1], mixer.A_log.shape[-1]
    if reason is None and (taps > cuda_decode.WIDEST or states > cuda_decode.MOST_STATES):
        reason = f"holds {cuda_decode.WIDEST} taps and {cuda_decode.MOST_STATES} states, not {taps} and {states}"
    embedding = model.backbone.embeddings.weight
    return reason or cuda_norm.unavailable(embedding.device, embedding)


class Product:
    """`x @ W^T`, with the module's bias unless `biased` is False."""

    def __init__(self, module: Any, biased: bool = True):
        self.weight = effective_weight(module).t()
        self.bias = None
        if biased and module.bias is not None:
            self.bias = module.bias.detach().to(self.weight.dtype)

    def call(self, x: Tensor, out: Tensor) -> Call:
        product = torch.mm if self.bias is None else partial(torch.addmm, self.bias)
        return partial(product, x, self.weight, out=out)


class Layer:
    """A block's weights as the kernels want them."""

    def __init__(self, block: Any):
        mixer = block.mixer
        self.norm, self.norm_eps = _floats(block.norm.weight), float(block.norm.variance_epsilon)
        self.in_proj, self.x_proj, self.out_proj = map(Product, (mixer.in_proj, mixer.x_proj, mixer.out_proj))
        self.dt_proj, self.dt_bias = Product(mixer.dt_proj, biased=False), _floats(mixer.dt_proj.bias)
        self.taps, self.conv_bias = _floats(mixer.conv1d.weight.squeeze(1).t()), _floats(mixer.conv1d.bias)
        self.A = -LOG2_E * torch.exp(_floats(mixer.A_log)).t().contiguous()
        self.D = _floats(mixer.D)
        self.eps = getattr(mixer, "rms_eps", None)  # Falcon-Mamba's

    def calls(self, windows: list[Tensor], states: list[Tensor], buffers: dict[str, Tensor]) -> list[Call]:
        """From `normed` to `hidden`; windows and states before and after."""
        xz, u, low, delta, y = (buffers[name] for name in ("xz", "u", "low", "delta", "y"))
        x, z = xz.split(u.shape[1], 1)
        N = len(self.A)
        norms = [] if self.eps is None else [partial(cuda_decode.low_norm, low, N, self.eps)]
        return [
            self.in_proj.call(buffers["normed"], xz),
            partial(cuda_decode.conv_step, x, windows[0], self.taps, self.conv_bias, True, u, windows[1]),
            self.x_proj.call(u, low),
            *norms,
            self.dt_proj.call(low[:, : low.shape[1] - 2 * N], delta),
            partial(cuda_decode.state_step, u, delta, self.A, low, self.D, z, self.dt_bias, states[0], y, states[1]),
            self.out_proj.call(y, buffers["hidden"]),
        ]


class FusedDecoder(Stepper):
    """See `Stepper`. States lie as the kernels read them: `[2, layers, capacity, N, D]`, windows `[.., W - 1, D]`.

    A step reads one half and writes the other: so the state before a step is still there when its token turns out to
    have been the last, and nothing is copied for it.
    """

    turns = remembered = 2

    dtype = torch.float32

    def __init__(self, model: Any, capacity: int, *, exact: bool = True, step: str = "auto"):
        backbone = model.backbone
        self.embedding = effective_weight(backbone.embeddings)
        super().__init__(self.embedding.device, capacity, step)
        self.layers = [Layer(block) for block in backbone.layers]
        self.norm, self.norm_eps = _floats(backbone.norm_f.weight), float(backbone.norm_f.variance_epsilon)
        self.head = Product(model.lm_head)
        (states, channels), taps, hidden = self.layers[0].A.shape, len(self.layers[0].taps), self.embedding.shape[1]
        weights = self.embedding.dtype
        wide = torch.float32 if model.config.residual_in_fp32 else weights
        self.windows = self._zeros(2, len(self.layers), capacity, taps - 1, channels, dtype=weights)
        self.states = self._zeros(2, len(self.layers), capacity, states, channels)
        self.logits = self._zeros(capacity, self.head.weight.shape[1])
        low = self.layers[0].x_proj.weight.shape[1]
        sizes = {"hidden": hidden, "normed": hidden, "xz": 2 * channels, "u": channels, "low": low, "delta": channels,
                 "y": channels}  # fmt: skip
        self._buffers = {name: self._zeros(capacity, size, dtype=weights) for name, size in sizes.items()}
        self._buffers |= {"stream": self._zeros(capacity, hidden, dtype=wide), "scales": self._zeros(capacity)}
        # The head's product is rounded as in the model's forward pass.
        narrow = weights != self.dtype
        self._buffers["scores"] = self._zeros(*self.logits.shape, dtype=weights) if narrow else self.logits
        self.settle(exact)
        if self.step_kind[0] == "graph":
            for self.phase in (1, 0):
                for plan in self.plans.values():
                    self.built(plan, 0)

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def load(self, row: int, state: LayerState) -> None:
        self.windows[self.phase, :, row].copy_(state.conv.transpose(1, 2))
        self.states[self.phase, :, row].copy_(state.ssm.transpose(1, 2))

    def read(self, row: int, back: int = 0) -> LayerState:
        conv, ssm = (x[self.phase ^ back, :, row].transpose(1, 2).clone(memory_format=torch.contiguous_format)
                     for x in (self.windows, self.states))  # fmt: skip
        return LayerState(conv, ssm)

    def move(self, source: int, target: int) -> None:
        self.tokens[target].copy_(self.tokens[source])
        for buffer in (self.windows, self.states):
            buffer[:, :, target].copy_(buffer[:, :, source])

    def buffers(self) -> list[Tensor]:
        return [*self.windows.flatten(0, 1), *self.states.flatten(0, 1)]

    def intermediates(self) -> list[Tensor]:
        return list(self._buffers.values())

    def program(self, plan: Plan, start: int, phase: int) -> list[Call]:
        rows = slice(start, start + plan.width)
        buffers = {name: buffer[rows] for name, buffer in self._buffers.items()}
        hidden, normed, stream, scores = (buffers[name] for name in ("hidden", "normed", "stream", "scores"))

        def norm(weight: Tensor, eps: float, residual: Tensor | None) -> Call:
            into = normed, stream, buffers["scales"]
            return partial(cuda_norm.add_rms_norm_into, hidden, residual, weight, eps, *into)

        calls: list[Call] = [partial(torch.index_select, self.embedding, 0, self.tokens[rows], out=hidden)]
        for number, layer in enumerate(self.layers):
            calls.append(norm(layer.norm, layer.norm_eps, stream if number else None))
            windows, states = ([x[half, number, rows] for half in (phase, 1 - phase)]
                               for x in (self.windows, self.states))  # fmt: skip
            calls += layer.calls(windows, states, buffers)
        calls.append(norm(self.norm, self.norm_eps, stream))
        calls.append(self.head.call(normed, scores))
        if scores.dtype != self.dtype:
            calls.append(partial(self.logits[rows].copy_, scores))
        return calls


def _floats(value: Tensor | None) -> Any:
    return None if value is None else value.detach().float().contiguous()
