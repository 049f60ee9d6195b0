"""The layers' forward and backward pass as two CUDA graphs: one call of the host's instead of thousands.

Small models wait for the host: a step of 24 layers is a thousand kernels, and Python takes 50 ms and more to start
them, half of what the device needs for 32,768 tokens. A graph starts all of them at once. What is in it are the layers
and the last norm; the embedding, the head and the objective stay outside, so a graph knows nothing of targets and
losses.

A graph repeats the same kernels on the same addresses. Three things change between batches:

    segments    All that kernels know of them lies in tables on the device, made for each batch by the ops' plans.
                Tables of `fixed` segments have shapes that depend on numbers alone, so those of a new batch are written
                over those that the graph was captured with (`Segments.become`).
    tokens      Batches are filled with a sequence of zeros, to the next of 16 steps between powers of two, and with
                empty segments to a power of two. No other sequence sees them, and to gradients they add zeros.
    gradients   A graph leaves those of weights in memory of its own, and lends it to `parameter.grad`. Before it runs
                again, what is still lent is copied.

The first batch of a size runs without a graph, filled all the same, so all batches have the bits of a graph's kernels;
the second is captured. Whatever a graph cannot do (`survey`) is done without.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from mambalign.ops import Segments

logger = logging.getLogger("mambalign")

Key = tuple[int, int, tuple[Any, ...]]  # tokens, segments, and `_manner`

KEPT = 128  # graphs: each has memory of its own for its launches, beside what all of them share
TRIED = 8  # kinds of batches of a size that are remembered: forked or not, and by the items of the scan
STEPS = 16  # sizes between powers of two: packed rows fill them, and of any other batch 2 % is filling on average
SMALLEST_STEP = 64  # tokens
PLANS = {"cuda scan", "cuda conv"}  # the ops whose tables a graph's layers may read, and nothing else of segments
# Of the memory that a batch's layers keep for the backward pass, what a pass takes with all it makes on its way; and
# what has to be free for a graph: for itself, and for a batch of a size that has none.
TAKEN, ROOM = 1.25, 2.5
# How layers are computed again within a capture, where nobody may ask for the state of the random numbers.
PLAINLY = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class GraphedLayers:
    """Graphs of one model's layers, by the size of the batch; they share their memory, since one runs at a time."""

    def __init__(self) -> None:
        self.exchanged_later = False  # with those of other processes, gradients are, when the backward pass is over
        self.trying = False  # nothing is captured or replayed: every batch runs as the first of its size does
        self._graphs: OrderedDict[Key, list[_Graph]] = OrderedDict()
        self._tried: dict[Key, list[tuple[Segments, int]]] = {}
        self._weights: object = None
        self._pool: Any = None
        self._buffers: dict[str, Tensor] = {}
        self._kept, self._per_token = 0.0, 0.0  # bytes: most that a graph's batch keeps; most a token
        self._lent: list[tuple[nn.Parameter, Tensor]] = []
        self._turn: Callable[[], _Turn | None] = lambda: None
        self._said: str | None = None
        self._failed: str | None = None
        self._anchor = torch.empty(0, requires_grad=True)  # what has a gradient, where embeddings have none

    def __deepcopy__(self, memo: Any) -> GraphedLayers:
        return GraphedLayers()  # graphs belong to the weights they were captured with

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphedLayers, ()

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return sum(map(len, self._graphs.values()))

    def __call__(self, backbone: Any, embeds: Tensor, segments: Segments) -> Tensor | None:
        """`[1, T, H]` -> the last norm's output `[1, T, H]`; None where the layers are to be called as they are."""
        if not _on_gpu(embeds):
            return None
        found = survey(backbone) if self.exchanged_later or not _has_others() else "DDP exchanges gradients meanwhile"
        if not isinstance(found, str) and found != self._weights:
            self.clear()
            self._weights, self._failed = found, None
        reason = found if isinstance(found, str) else self._failed
        if reason is not None:
            self._say(reason)
            return None
        turn = self._turn()
        if turn is not None and not turn.done:  # its activations are still needed
            return None
        key = (*filled_size(segments), _manner(backbone, embeds))
        filled = segments.padded(*key[:2])
        if self.trying:
            return self._try(backbone, embeds, key, filled)
        graph = next((g for g in self._graphs.get(key, []) if g.segments.become(filled)), None)
        if graph is not None:
            self._graphs.move_to_end(key)
        else:
            graph = self._capture(backbone, embeds, key, filled)
        if graph is None:
            return None if self._failed else self._try(backbone, embeds, key, filled)
        self._take_back()
        turn = _Turn(self, graph, embeds.shape[1])
        self._turn = weakref.ref(turn)
        hidden: Tensor = _Replayed.apply(embeds, self._anchor, turn)
        return hidden

    def clear(self) -> None:
        """Let go of all graphs and of their memory; gradients stay."""
        self._take_back()
        self._graphs.clear()
        self._tried.clear()
        self._buffers.clear()
        self._pool, self._kept = None, 0.0

    def _try(self, backbone: Any, embeds: Tensor, key: Key, filled: Segments) -> Tensor:
        """Without a graph, on the batch that one would have: what is loaded at first use is, before one is captured."""
        T = embeds.shape[1]
        if self._kept and TAKEN * (self._per_token * key[0] + self._kept) > _left(embeds.device):
            self.clear()  # what graphs hold between steps is wanted
        before = _allocated(embeds.device)
        x = nn.functional.pad(embeds, (0, 0, 0, key[0] - T))
        hidden: Tensor = backbone.run_layers(x, filled)[0]

        def tried(_: Tensor) -> None:
            if filled.planned == PLANS:
                self._tried[key] = [*self._tried.get(key, [])[-TRIED:], (filled, kept)]
            elif not self._failed:
                self._failed = f"its layers run other kernels than mambalign's: {', '.join(filled.planned) or 'none'}"

        kept = _allocated(embeds.device) - before
        self._per_token = max(self._per_token, kept / key[0])
        hidden.register_hook(tried)
        return hidden[:, :T]

    def _capture(self, backbone: Any, embeds: Tensor, key: Key, filled: Segments) -> _Graph | None:
        """The graph for a batch like one that was tried; None where none was, or it cannot be made."""
        tried = self._tried.get(key, [])
        found = next((entry for entry in tried if filled.prepare(entry[0])), None)
        if found is None:
            return None
        kept = found[1]
        if _left(embeds.device) < ROOM * kept:
            self._say(f"for all batches: {ROOM:g} times what one keeps has to be free")
            return None
        self._take_back()
        if self._pool is None:
            self._pool = _new_pool()
        try:
            x, d_hidden = (self._buffer(name, embeds, key[0]) for name in ("x", "d_hidden"))
            graph = _Graph(backbone, x.requires_grad_(embeds.requires_grad), d_hidden, filled, self._pool)
        except RuntimeError as error:  # also torch.OutOfMemoryError, and what CUDA refuses in a capture
            self._failed = f"capturing failed: {str(error).strip().splitlines()[0]}"
            self.clear()
            return None
        tried.remove(found)
        self._kept = max(self._kept, kept)
        self._graphs.setdefault(key, []).append(graph)
        self._graphs.move_to_end(key)
        if self.captured > KEPT:
            self._graphs.popitem(last=False)
        return graph

    def _buffer(self, name: str, like: Tensor, tokens: int) -> Tensor:
        """`[1, tokens, H]` of what all graphs share: one runs at a time. Zeros in the dtype of `like` at first."""
        key = f"{name} {like.dtype}"
        if key not in self._buffers or self._buffers[key].shape[1] < tokens:
            self._buffers[key] = like.new_zeros(1, 1 << (tokens - 1).bit_length(), like.shape[-1])
        return self._buffers[key].detach()[:, :tokens]

    def _say(self, reason: str) -> None:
        if reason != self._said:
            logger.info("CUDA graphs: not used (%s)", reason)
            self._said = reason

    def lend(self, gradients: list[tuple[nn.Parameter, Tensor]]) -> None:
        """To parameters without a gradient; to those with one it is added."""
        late = [(parameter.grad, gradient) for parameter, gradient in gradients if parameter.grad is not None]
        for parameter, gradient in gradients:
            if parameter.grad is None:
                parameter.grad = gradient
                self._lent.append((parameter, gradient))
        if late:
            torch._foreach_add_([grad for grad, _ in late], [gradient for _, gradient in late])

    def _take_back(self) -> None:
        """Copy what is still lent: the memory is about to be written to."""
        for parameter, gradient in self._lent:
            if parameter.grad is gradient:
                parameter.grad = gradient.clone()
        self._lent.clear()


def survey(backbone: Any) -> str | list[Any]:
    """Why the layers cannot be graphs; if they can, what of the weights a graph relies on and cannot see changing.

    Asked at every call, while the device waits: hence one round.
    """
    if not backbone.graphable:
        return f"{type(backbone).__name__} runs kernels of others, which are chosen while they run"
    again = any(layer.gradient_checkpointing for layer in backbone.layers)
    if again and not all(map(_recomputes_plainly, backbone.layers)):
        return "gradient_checkpointing_kwargs ask for another way to compute layers again than use_reentrant: false"
    weights: list[Any] = []
    trained = False
    for module in _modules(backbone):
        weights.append(module.training)
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return "a hook of a module would not be called"
        if hasattr(module, "_hf_hook"):
            return "accelerate moves weights while they run"
        if again and isinstance(module, _DropoutNd) and module.p and module.training:
            return "what gradient_checkpointing computes again has dropout, which would have to drop the same"
        for p in module._parameters.values():
            if p is None:
                continue
            weights.append((p.data_ptr(), p.dtype, p.requires_grad))
            if p.requires_grad:
                trained = True
                if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
                    return "a hook of a parameter would not be called"
    return weights if trained else "no layer has anything to train"


def _has_others() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _recomputes_plainly(layer: Any) -> bool:
    how = layer._gradient_checkpointing_func if layer.gradient_checkpointing else PLAINLY
    return isinstance(how, partial) and how.func is checkpoint and how.keywords.get("use_reentrant") is False


def _manner(backbone: Any, embeds: Tensor) -> tuple[Any, ...]:
    """In what types and how the layers run, which may be another way at the next call."""
    kind = embeds.device.type
    how = tuple(
        (layer.gradient_checkpointing, layer.selective_recomputation, layer.mixer.backend) for layer in backbone.layers
    )
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return how, autocast, embeds.dtype, embeds.requires_grad, embeds.shape[-1], embeds.device


def _modules(backbone: Any) -> Iterator[nn.Module]:
    """All that is in a graph; `nn.Module.modules` takes a millisecond for it."""
    found: list[Any] = [backbone.norm_f, backbone.layers]
    while found:
        module = found.pop()
        yield module
        found.extend(module._modules.values())


def _named(backbone: Any) -> dict[str, nn.Parameter]:
    return {
        f"{part}.{name}": parameter
        for part in ("layers", "norm_f")
        for name, parameter in getattr(backbone, part).named_parameters()
    }


def filled_size(segments: Segments) -> tuple[int, int]:
    """(tokens, segments) that a batch of these is filled up to.

    Rows of one length that fill them keep their number: such rows have kernels of their own.

    Example:
        >>> filled_size(Segments.from_lengths([30000, 1200, 9]))
        (31744, 4)
    """
    tokens, count = max(1, segments.num_tokens), segments.num_segments
    step = max(SMALLEST_STEP, (1 << (tokens - 1).bit_length()) // 2 // STEPS)
    full = -(-tokens // step) * step
    lengths = segments.lengths
    if full == tokens and bool((lengths == lengths[0]).all()):
        return full, count
    return full, 1 << (count + (full > tokens) - 1).bit_length()


class _Layers(nn.Module):
    """What a graph captures, as a module whose parameters can be put in the place of others."""

    def __init__(self, backbone: Any):
        super().__init__()
        self.layers, self.norm_f = backbone.layers, backbone.norm_f
        self._run = backbone.run_layers

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        recomputed = [layer for layer in self.layers if layer.gradient_checkpointing]
        usual = [layer._gradient_checkpointing_func for layer in recomputed]
        for layer in recomputed:
            layer._gradient_checkpointing_func = PLAINLY
        try:
            hidden: Tensor = self._run(x, segments)[0]
        finally:
            for layer, how in zip(recomputed, usual, strict=True):
                layer._gradient_checkpointing_func = how
        return hidden


class _Graph:
    """Two graphs, the buffers they read and write, and the segments whose tables they read."""

    def __init__(self, backbone: Any, x: Tensor, d_hidden: Tensor, segments: Segments, pool: Any):
        self.segments = segments
        kind = x.device.type
        named = {name: p for name, p in _named(backbone).items() if p.requires_grad}
        # In their place leaves of our own: autograd ties a leaf to the stream on which it was first used.
        leaves = {name: p.detach().requires_grad_() for name, p in named.items()}
        layers = _Layers(backbone)
        # A weight's cast is part of the graph: one that autocast keeps would be that of an earlier step.
        autocast = torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        )

        outputs: list[Tensor] = []

        def forward() -> list[Tensor]:
            with autocast:
                outputs[:] = [functional_call(layers, leaves, (x, segments))]
            return [outputs[0].detach()]

        (hidden,), self._forward = _captured(forward, pool)
        if d_hidden.dtype != hidden.dtype:
            d_hidden = torch.zeros_like(hidden)
        inputs = [*leaves.values()] + ([x] if x.requires_grad else [])

        used: list[bool] = []  # what has no part in the output keeps having no gradient

        def backward() -> list[Tensor]:
            gradients = torch.autograd.grad(outputs.pop(), inputs, d_hidden, allow_unused=True)
            used[:] = [gradient is not None for gradient in gradients]
            pairs = zip(gradients, inputs, strict=True)
            return [_like(gradient, leaf) for gradient, leaf in pairs if gradient is not None]

        gradients, self._backward = _captured(backward, pool)
        self._x, self._d_hidden, self._hidden = x.detach(), d_hidden, _lent(hidden, self._forward)
        self._d_x = _lent(gradients.pop(), self._backward) if x.requires_grad else None
        parameters = zip(itertools.compress(named.values(), used), gradients, strict=True)
        self._gradients = [(parameter, _lent(gradient, self._backward)) for parameter, gradient in parameters]

    def forward(self, embeds: Tensor) -> Tensor:
        _fill(self._x, embeds)
        self._forward.replay()
        return self._hidden[:, : embeds.shape[1]].clone()

    def backward(self, d_hidden: Tensor) -> tuple[Tensor | None, list[tuple[nn.Parameter, Tensor]]]:
        _fill(self._d_hidden, d_hidden)
        self._backward.replay()
        return None if self._d_x is None else self._d_x[:, : d_hidden.shape[1]], self._gradients


def _fill(buffer: Tensor, values: Tensor) -> None:
    buffer[:, : values.shape[1]].copy_(values)
    buffer[:, values.shape[1] :].zero_()


def _like(gradient: Tensor, leaf: Tensor) -> Tensor:
    """As autograd leaves it in `.grad`: in the leaf's layout."""
    return gradient if gradient.stride() == leaf.stride() else torch.empty_like(leaf).copy_(gradient)


class _Turn:
    """One forward pass of a graph and the backward pass that goes with it."""

    def __init__(self, owner: GraphedLayers, graph: _Graph, tokens: int):
        self.owner, self.graph, self.tokens, self.done = owner, graph, tokens, False

    def backward(self, d_hidden: Tensor) -> Tensor | None:
        if self.done:
            raise RuntimeError(
                "the layers ran as a CUDA graph, whose backward pass can run once; for another one (retain_graph), "
                "model.set_cuda_graphs(False)"
            )
        self.done = True
        d_x, gradients = self.graph.backward(d_hidden)
        self.owner.lend(gradients)
        return d_x


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeds: Tensor, anchor: Tensor, turn: _Turn) -> Tensor:
        ctx.turn = turn
        return turn.graph.forward(embeds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor) -> tuple[Tensor | None, None, None]:
        return ctx.turn.backward(d_hidden), None, None


# ------------------------------------------------------------------------------------------------ what is CUDA's part


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None


def _new_pool() -> Any:
    return torch.cuda.graph_pool_handle()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device)


def _left(device: torch.device) -> float:
    """Bytes that torch may still give out, those included that it has and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _captured(run: Callable[[], list[Tensor]], pool: Any) -> tuple[list[Tensor], Any]:
    """(what `run` returns, the graph of it). Other threads may go on: they pin memory for the next batch."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = run()
    return outputs, graph


ARRAY_TYPES = {4: "<f4", 2: "<i2"}  # of CUDA's array interface, by bytes; it knows no bf16, but two bytes are two bytes


class _Lent:
    """Memory of a graph's, which lives as long as the graph does, by CUDA's array interface (version 3)."""

    def __init__(self, tensor: Tensor, graph: Any):
        self._graph = graph
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": ARRAY_TYPES[tensor.itemsize],
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _lent(tensor: Tensor, graph: Any) -> Tensor:
    """`tensor` without a claim to its memory, which the next graph to be captured may use, too: all share one pool."""
    if tensor.numel() == 0 or not tensor.is_contiguous() or tensor.itemsize not in ARRAY_TYPES:
        return tensor
    return torch.as_tensor(_Lent(tensor, graph), device=tensor.device).view(tensor.dtype)
