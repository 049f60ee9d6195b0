"""The step of generation on a CPU for Mamba-1 and Falcon-Mamba: one call of compiled code.

At one token a CPU spends most of its time between PyTorch's calls. `ops/decode_step.cpp` is the whole step, with the
weights where the model keeps them. Every number of it is computed in one order, whatever rows are beside it and however
many threads there are: the rows of a step have the same bits in any batch by construction, and nothing is measured.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mambalign.generation.decode import effective_weight, unsuited
from mambalign.generation.state import LayerState
from mambalign.generation.stepper import Call, Plan, Stepper
from mambalign.ops import cpu_decode
from mambalign.ops.cpu_decode import BLOCK
from mambalign.ops.torch_scan import LOG2_E

SHARE = 2**18  # bytes of a layer for a thread: reading fewer takes no longer than the threads' five meetings


def unavailable(model: Any) -> str | None:
    """Why `NativeDecoder` cannot step `model`, but for a compiler; None if it can."""
    if model.backbone.embeddings.weight.device.type != "cpu":
        return "is for a CPU"
    return unsuited(model, "native", cpu_decode.MACROS.keys())


class NativeDecoder(Stepper):
    """See `Stepper`. Channels are padded with zeros to whole blocks. States are `[layers, capacity, blocks, N, BLOCK]`
    and windows `[layers, capacity, W - 1, D]`, both fp32.

    Raises:
        ops.native.Unavailable: no compiler here, or none that works.
    """

    dtype = torch.float32

    def __init__(self, model: Any, capacity: int):
        backbone, mixer = model.backbone, model.backbone.layers[0].mixer
        self.embedding = effective_weight(backbone.embeddings)
        super().__init__(self.embedding.device, capacity, "native")
        self._step = cpu_decode.compiled(self.embedding.dtype)
        self._held: list[Any] = []  # what the structures point to
        count, hidden, rank = len(backbone.layers), self.embedding.shape[1], mixer.time_step_rank
        (self.channels, states), taps = mixer.A_log.shape, mixer.conv1d.weight.shape[-1]
        wide, wide_hidden = _padded(self.channels), _padded(hidden)
        head = effective_weight(model.lm_head)
        self.windows = torch.zeros(count, capacity, taps - 1, wide)
        self.states = torch.zeros(count, capacity, wide // BLOCK, states, BLOCK)
        self.logits = torch.zeros(capacity, head.shape[0])
        sizes = dict(hidden=wide_hidden, normed=wide_hidden, u=wide, z=wide, y=wide, low=rank + 2 * states)
        buffers = {name: self._address(torch.zeros(capacity, size)) for name, size in sizes.items()}
        layers = [self._layer(number, block) for number, block in enumerate(backbone.layers)]
        self._model = cpu_decode.Model(
            layers=(cpu_decode.Layer * count)(*layers), norm=self._floats(backbone.norm_f.weight),
            embedding=self._address(self.embedding), head=self._product(model.lm_head, head),
            logits=self.logits.data_ptr(), num_layers=count, hidden_size=hidden, wide_hidden=wide_hidden,
            channels=self.channels, wide=wide,
            states=states, taps=taps, rank=rank, vocabulary=head.shape[0], threads=_threads(mixer),
            eps=backbone.norm_f.variance_epsilon, low_eps=getattr(mixer, "rms_eps", -1.0), **buffers,
        )  # fmt: skip
        self.settle(exact=False)

    def _layer(self, number: int, block: Any) -> cpu_decode.Layer:
        mixer = block.mixer
        A = -LOG2_E * torch.exp(mixer.A_log.detach().float())
        return cpu_decode.Layer(
            norm=self._floats(block.norm.weight), in_proj=self._product(mixer.in_proj),
            x_proj=self._product(mixer.x_proj), out_proj=self._product(mixer.out_proj),
            dt_weight=self._address(_blocks(effective_weight(mixer.dt_proj))), dt_bias=self._floats(mixer.dt_proj.bias),
            taps=self._floats(mixer.conv1d.weight.squeeze(1).t()), conv_bias=self._floats(mixer.conv1d.bias),
            A=self._address(_blocks(A)), D=self._floats(mixer.D),
            window=self.windows[number].data_ptr(), state=self.states[number].data_ptr(),
        )  # fmt: skip

    def _product(self, module: Any, weight: Tensor | None = None) -> cpu_decode.Product:
        """weight: the module's effective one, where it is at hand: an adapter's takes a product to make."""
        bias = None if module.bias is None else self._address(module.bias.detach().float())
        return cpu_decode.Product(w=self._address(effective_weight(module) if weight is None else weight), bias=bias)

    def _floats(self, value: Tensor | None) -> int:
        """fp32, its last axis padded; zeros for None, a bias of channels that is not there."""
        value = torch.zeros(self.channels) if value is None else value.detach().float()
        return self._address(pad(value, (0, _padded(value.shape[-1]) - value.shape[-1])))

    def _address(self, tensor: Tensor) -> int:
        self._held.append(tensor.contiguous())
        return int(self._held[-1].data_ptr())

    def load(self, row: int, state: LayerState) -> None:
        self.windows[:, row, :, : self.channels] = state.conv.transpose(1, 2)
        self.states[:, row] = _blocks(state.ssm)

    def read(self, row: int, back: int = 0) -> LayerState:
        assert back == 0, "states are updated in place"
        conv = self.windows[:, row, :, : self.channels].transpose(1, 2).to(self.embedding.dtype, copy=True).contiguous()
        ssm = self.states[:, row].transpose(2, 3).flatten(1, 2)[:, : self.channels].clone()
        return LayerState(conv, ssm)

    def buffers(self) -> list[Tensor]:
        return [*self.windows, *self.states]

    def program(self, plan: Plan, start: int, phase: int) -> list[Call]:
        assert start == phase == 0, "one call takes all rows"
        return [partial(self._step, ctypes.byref(self._model), self.tokens.data_ptr(), plan.rows)]


def _threads(mixer: Any) -> int:
    layer = sum(parameter.numel() * parameter.element_size() for parameter in mixer.parameters())
    return min(torch.get_num_threads(), max(1, layer // SHARE))


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _blocks(by_channel: Tensor) -> Tensor:
    """`[.., D, N]` -> `[.., blocks, N, BLOCK]`, fp32."""
    channels = by_channel.shape[-2]
    rows = pad(by_channel.detach().float(), (0, 0, 0, _padded(channels) - channels))
    return rows.unflatten(-2, (-1, BLOCK)).transpose(-2, -1)
