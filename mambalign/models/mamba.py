"""Mamba-1 (arXiv 2312.00752) and Falcon-Mamba (arXiv 2410.05355) on packed tokens.

The classes subclass transformers' own: same configs, same parameter names, same `generate()`, so every checkpoint is
interchangeable. What differs is the forward pass. Whatever comes in (padded with a mask, packed with `Segments`, or
a step of generation with a cache) is laid flat into one `[1, T, hidden]` tensor without padding; only the convolution
and the scan learn where sequences begin. The mixer calls its projections as modules, so adapters and hooks on any of
them act, in training too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.falcon_mamba import modeling_falcon_mamba as hf_falcon
from transformers.models.mamba import modeling_mamba as hf_mamba
from transformers.models.mamba.modeling_mamba import MambaCausalLMOutput, MambaOutput

from mambalign.models.cuda_graphs import GraphedLayers
from mambalign.models.modules import Embedding, ResidualRMSNorm, RMSNorm, StepSizeProjection
from mambalign.models.recompute import Recomputation
from mambalign.ops import Segments, causal_conv1d, halves, selective_scan, token_logps
from mambalign.ops.backends import take_rows
from mambalign.ops.halves import JointGradient
from mambalign.ops.rms_norm import normalised

# The recurrence is an exponential of these; the authors keep them in fp32 whatever the rest is in
# (https://github.com/state-spaces/mamba#precision), and so do we: on loading, and on any later `.to(dtype)`.
FP32_PARAMETERS = ("A_log", "D", "dt_proj.bias", "dt_bias")
FP32_PATTERNS = ["A_log", r"mixer\.D$", r"dt_proj\.bias", "dt_bias"]
CALLED_HEAD_ELEMENTS = 2**24  # logits that exist at a time where the head is called as a module: 64 MiB in fp32
# How other stacks mark a packed row. transformers' Mamba drops these without a word, and its documents leak.
FOREIGN_PACKING = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")

# One layer's (convolution window, scan state), a row for every segment; None where nothing came before.
LayerState = tuple[Tensor | None, Tensor | None]


@dataclass
class BackboneOutput(MambaOutput):
    """Adds `final_states`: per layer, what `initial_states` of the tokens that follow are."""

    final_states: tuple[LayerState, ...] | None = None


@dataclass
class CausalLMOutput(MambaCausalLMOutput):
    """Adds `logps`: fp32 `[M]`, the log-probability of every requested target (then `logits` is None), and
    `final_states`, as `BackboneOutput` does."""

    logps: Tensor | None = None
    final_states: tuple[LayerState, ...] | None = None


class StatefulMixer:
    """What the mixers of all families share: their place in a cache, and parameters that stay fp32."""

    fp32_parameters: tuple[str, ...]

    def _read(self: Any, cache_params: Cache | None, given: LayerState) -> LayerState:
        """(convolution window, state) of every row of the cache, None where it has none yet; without one, `given`."""
        if cache_params is None or not cache_params.has_previous_state(self.layer_idx):
            return given
        layer: Any = cache_params.layers[self.layer_idx]
        return layer.conv_states[0][..., 1:], layer.recurrent_states[0]

    def _write(self: Any, cache_params: Cache | None, conv_state: Tensor | None, ssm_state: Tensor | None) -> None:
        if cache_params is not None and conv_state is not None:
            # transformers keeps one column more than the convolution needs; the oldest is never read.
            padded = nn.functional.pad(conv_state, (1, 0))
            cache_params.update_conv_state(padded, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
            cache_params.update_recurrent_state(ssm_state, self.layer_idx)

    def _convolve(
        self: Any,
        x: Tensor,
        conv_state: Tensor | None,
        segments: Segments,
        recomputation: Recomputation,
        caching: bool,
        joint: JointGradient | None = None,
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """(activated convolution of `x`, a tensor for each of two users; the window after it if `caching`).

        Under selective recomputation it is dropped.
        """
        silu = self.activation in ("silu", "swish")

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, final: bool = False) -> Any:
            return causal_conv1d(
                x, weight, bias, "silu" if silu else None, segments, before, final,
                joint=joint, twice=True, backend=self.backend,
            )  # fmt: skip

        inputs = x, self.conv1d.weight.squeeze(1), self.conv1d.bias, conv_state
        convolved = convolve(*inputs, final=caching)
        pair, window = convolved if caching else (convolved, None)
        recomputation.drop(pair[0], lambda *inputs: convolve(*inputs)[0], *inputs)
        return (pair if silu else (self.act(pair[0]),) * 2), window

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves and casts like any module, but never below fp32 for `fp32_parameters`."""
        before = {name: self.get_parameter(name).detach() for name in self.fp32_parameters}
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, value in before.items():
            parameter = self.get_parameter(name)
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = value.to(parameter.device, torch.float32)
                parameter.grad = None if parameter.grad is None else parameter.grad.float()
        return self


class PackedMixer(StatefulMixer):
    """Convolution, projections and scan on packed tokens; mixed into Mamba-1's and Falcon-Mamba's mixer classes."""

    fp32_parameters = ("A_log", "D", "dt_proj.bias")

    def __init__(self: Any, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.backend = "auto"
        bare = StepSizeProjection(self.time_step_rank, self.intermediate_size, device="meta")
        bare.weight, bare.bias = self.dt_proj.weight, self.dt_proj.bias
        self.dt_proj = bare
        self._apply(lambda parameter: parameter)  # made in half precision where that is torch's default dtype

    def normalise(self, delta: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Falcon-Mamba puts RMS norms here (arXiv 2410.05355, section 3.1)."""
        return delta, B, C

    @force_accelerate_hooks(["conv1d", "dt_proj"])  # parameters of theirs are used without a call of the module
    def forward(
        self: Any,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        segments: Segments | None = None,
        recomputation: Recomputation | None = None,
        state: LayerState = (None, None),
        output_state: bool = False,
        **_: Any,
    ) -> Any:
        """`[1, T, hidden]` -> `[1, T, hidden]`; with a cache, segment s reads and writes its row s. `output_state`: ->
        (that, window, state), and they have gradients, as has the `state` given."""
        assert segments is not None and hidden_states.shape[0] == 1, "mixers see packed tokens only"
        recomputation = recomputation or Recomputation(enabled=False)
        delta_bias = self.dt_proj.bias  # taken before the module is called, which may offload it again
        conv_state, ssm_state = self._read(cache_params, state)
        caching = output_state or cache_params is not None
        x, z, joint = halves(self.in_proj(hidden_states).squeeze(0))
        (x, again), conv_state = self._convolve(x, conv_state, segments, recomputation, caching, joint)
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        written = again._version if again.requires_grad else 0
        low_rank, B, C = self.normalise(*self.x_proj(again).split(sizes, dim=-1))
        if again.requires_grad and again._version != written:
            x = again  # a hook wrote to it, which only this one knows how to go back through
        delta = self.dt_proj(low_rank)
        recomputation.drop(delta, self.dt_proj, low_rank, module=self.dt_proj)
        scanned: Any = selective_scan(
            x,
            delta,
            self.A_log,
            B,
            C,
            self.D,
            z,
            delta_bias,
            delta_softplus=True,
            segments=segments,
            initial_state=ssm_state,
            output_final_state=caching,
            joint=joint,
            log_A=True,
            backend=self.backend,
        )
        y, ssm_state = scanned if caching else (scanned, None)
        self._write(cache_params, conv_state, ssm_state)
        out: Tensor = self.out_proj(y)[None]
        return (out, conv_state, ssm_state) if output_state else out


class MambaMixer(PackedMixer, hf_mamba.MambaMixer):
    pass


class FalconMambaMixer(PackedMixer, hf_falcon.FalconMambaMixer):
    def normalise(self, delta: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        delta, B, C = (normalised(x, self.rms_eps).to(x.dtype) for x in (delta, B, C))
        return delta, B, C


class PackedBlock:
    """Pre-norm residual block: (hidden states, residual stream before them) -> the same two for the next block, and its
    final window and state if `output_state`. Whatever has a gradient is positional, as reentrant checkpointing asks.

    What a mixer returns is added to the stream by the norm that reads the sum: the next block's, or the last one. The
    stream stays fp32 where the config says so, and the norm sees it so.
    """

    mixer_class: type[Any]
    selective_recomputation = False

    def __init__(self: Any, config: Any, layer_idx: int):
        nn.Module.__init__(self)
        self.config, self.layer_idx, self.residual_in_fp32 = config, layer_idx, config.residual_in_fp32
        self.norm = ResidualRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = self.mixer_class(config, layer_idx=layer_idx, initialize_mixer_weights=False)

    def forward(
        self: Any,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        *,
        cache_params: Cache | None = None,
        segments: Segments | None = None,
        output_state: bool = False,
        **_: Any,
    ) -> tuple[Tensor, ...]:
        device = hidden_states.device.type
        # What the input projection works in; where the norm writes it at once, autocast has nothing left to copy.
        working = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.norm.weight.dtype
        normed, total = self.norm(hidden_states, residual, working, torch.float32 if self.residual_in_fp32 else None)
        whole = self.gradient_checkpointing and self.training  # then this runs twice already
        with Recomputation(self.selective_recomputation and cache_params is None and not whole) as recomputation:
            # At the beginning of the stream the norm may have seen narrower numbers than the stream holds.
            recomputation.drop(
                normed, lambda x: self.norm(x, None, working, None)[0], hidden_states if residual is None else total,
                module=self.norm,
            )  # fmt: skip
            mixed = self.mixer(
                normed, cache_params=cache_params, segments=segments, recomputation=recomputation,
                state=(conv_state, ssm_state), output_state=output_state,
            )  # fmt: skip
        return (mixed[0], total, *mixed[1:]) if output_state else (mixed, total)


class MambaBlock(PackedBlock, hf_mamba.MambaBlock):
    mixer_class = MambaMixer


class FalconMambaBlock(PackedBlock, hf_falcon.FalconMambaBlock):
    mixer_class = FalconMambaMixer


@lru_cache(maxsize=16)
def _equal_roots(rows: int, length: int) -> Segments:
    """A batch without padding; kept, so that the steps of one generation share their index tensors."""
    return Segments.from_lengths([length] * rows)


def _unpad(attention_mask: Tensor | None, rows: int, length: int) -> tuple[Segments, Tensor | None]:
    """Segments of a padded batch, and the flat positions of its real tokens (None: all of them).

    A mask may be longer than the input (a continued cache): its last `length` columns count.
    """
    if attention_mask is None:
        return _equal_roots(rows, length), None
    if attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < length:
        raise ValueError(f"attention_mask must be [{rows}, >= {length}], got {list(attention_mask.shape)}")
    mask = attention_mask[:, -length:].bool()
    lengths = mask.sum(1).tolist()
    if all(n == length for n in lengths):
        return _equal_roots(rows, length), None
    return Segments.from_lengths(lengths), mask.flatten().nonzero()[:, 0]


def _refuse_foreign_packing(others: dict[str, Any], attention_mask: Tensor | None) -> None:
    marks = [name for name in FOREIGN_PACKING if others.get(name) is not None]
    positions = others.get("position_ids")
    if positions is not None and attention_mask is None and bool((positions.diff(dim=-1) < 0).any()):
        marks.append("position_ids that start again")
    if marks:
        raise ValueError(f"{marks[0]} would be ignored; describe a packed row by segments=Segments(cu_seqlens)")


class PackedModel:
    """The backbone; mixed into every family's transformers model class."""

    _keep_in_fp32_modules_strict = FP32_PATTERNS
    pretrained_class: type[Any]
    block_class: type[Any]
    graphable = True  # all of the layers' kernels take what they know of segments from tables of `Segments.plan`

    def __init__(self: Any, config: Any):
        # Past transformers' own constructor, which would build (and initialise) every layer a second time.
        self.pretrained_class.__init__(self, config)
        self.embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([self.block_class(config, layer_idx=i) for i in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.graphs: GraphedLayers | None = None
        self.norm_f = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_init()

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        attention_mask: Tensor | None = None,
        segments: Segments | None = None,
        initial_states: Sequence[LayerState] | None = None,
        output_final_states: bool = False,
        **others: Any,
    ) -> tuple[Any, ...] | BackboneOutput:
        """Padded `[B, L]` with an optional mask (either side), or packed `[1, T]` with `segments`. Pads come out 0.

        A packed row may start from `initial_states` (a `LayerState` a layer) and return `final_states`, which gradients
        flow through.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if segments is None:
            _refuse_foreign_packing(others, attention_mask)
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        if segments is not None and (use_cache or cache_params is not None):
            raise ValueError(
                "segments and a cache do not go together: pass padded rows with an attention_mask to fill or continue "
                "a cache, or leave use_cache out"
            )
        if segments is None and (initial_states is not None or output_final_states):
            raise ValueError("initial_states and output_final_states need segments: there is a state for each of them")
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        use_cache = bool(use_cache) and segments is None and not (self.gradient_checkpointing and self.training)
        embeds: Tensor = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        rows, length = embeds.shape[:2]
        if use_cache and cache_params is None:
            cache_params = DynamicCache(config=self.config)
        real = None
        if segments is None:
            segments, real = _unpad(attention_mask, rows, length)
        elif attention_mask is not None or rows != 1 or length != segments.num_tokens:
            raise ValueError(
                f"segments describe one packed row [1, {segments.num_tokens}] without attention_mask, "
                f"got input of shape [{rows}, {length}]" + (" and a mask" if attention_mask is not None else "")
            )
        flat = embeds.flatten(0, 1)
        hidden = (flat if real is None else flat[real])[None]

        def padded(packed: Tensor) -> Tensor:
            if real is None:
                return packed.view(rows, length, packed.shape[-1])
            out = packed.new_zeros(rows * length, packed.shape[-1])
            return out.index_copy(0, real, packed[0]).view(rows, length, packed.shape[-1])

        collected: list[Tensor] = []
        plain = initial_states is None and cache_params is None and not (output_hidden_states or output_final_states)
        normed, finals = None, []
        if plain and self.graphs is not None and self.training and torch.is_grad_enabled():
            normed = self.graphs(self, hidden, segments)
        if normed is None:
            normed, finals = self.run_layers(
                hidden, segments, cache_params, initial_states, output_final_states,
                (lambda stream: collected.append(padded(stream))) if output_hidden_states else None,
            )  # fmt: skip
        hidden = padded(normed)
        all_hidden = (*collected, hidden) if output_hidden_states else None
        cache = cache_params if use_cache else None
        final_states = tuple(finals) if output_final_states else None
        if not (self.config.return_dict if return_dict is None else return_dict):
            return tuple(v for v in (hidden, cache, all_hidden, final_states) if v is not None)
        return BackboneOutput(hidden, cache, all_hidden, final_states)

    def run_layers(
        self: Any,
        hidden: Tensor,
        segments: Segments,
        cache_params: Cache | None = None,
        initial_states: Sequence[LayerState] | None = None,
        output_final_states: bool = False,
        see: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, list[LayerState]]:
        """All layers and the last norm on packed `[1, T, hidden]`; `see` is shown the stream behind every layer."""
        finals: list[LayerState] = []
        residual = None
        states: Sequence[Any] = initial_states or [()] * len(self.layers)
        for block, state in zip(self.layers, states, strict=True):
            if residual is not None and block.gradient_checkpointing and self.training:
                hidden, residual = hidden + residual, None  # one tensor to keep for the block, not two
            hidden, residual, *final = block(
                hidden, residual, *state, cache_params=cache_params, segments=segments, output_state=output_final_states
            )
            finals += [tuple(final)] if final else []
            if see is not None:
                see(hidden + residual)
        return self.norm_f(hidden, residual), finals


class MambaModel(PackedModel, hf_mamba.MambaModel):
    pretrained_class, block_class = hf_mamba.MambaPreTrainedModel, MambaBlock


class FalconMambaModel(PackedModel, hf_falcon.FalconMambaModel):
    pretrained_class, block_class = hf_falcon.FalconMambaPreTrainedModel, FalconMambaBlock


class PackedCausalLM:
    """The language model; mixed into every family's transformers class."""

    _keep_in_fp32_modules_strict = FP32_PATTERNS
    pretrained_class: type[Any]
    backbone_class: type[Any]

    def __init__(self: Any, config: Any):
        self.pretrained_class.__init__(self, config)
        self.backbone = self.backbone_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.backend = "auto"
        self.post_init()

    def set_backend(self: Any, backend: str) -> None:
        """Use `backend` ("auto" or a name) for every op."""
        for module in self.modules():
            if hasattr(module, "backend"):
                module.backend = backend

    def set_selective_recomputation(self: Any, enabled: bool = True) -> None:
        """Compute norms, convolutions and step sizes again in the backward pass: see `mambalign.models.recompute`.

        Layers that `gradient_checkpointing_enable` computes again as a whole ignore it.
        """
        for layer in self.backbone.layers:
            layer.selective_recomputation = enabled

    def set_cuda_graphs(self: Any, enabled: bool = True) -> None:
        """Run the layers as CUDA graphs in training, where they can be (see `mambalign.models.cuda_graphs`).

        `backward()` then leaves the gradients of their weights in `.grad`; `torch.autograd.grad` does not find them.
        """
        self.backbone.graphs = GraphedLayers() if enabled else None

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Cache | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        segments: Segments | None = None,
        target_positions: Tensor | None = None,
        target_ids: Tensor | None = None,
        targets_summed: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...] | CausalLMOutput:
        """Logits of a padded batch or of a packed row, or the log-probs of named targets.

        Args:
            input_ids: int64 `[B, L]`, or packed `[1, T]` with `segments`.
            attention_mask: `[B, L]`, pads on either side; with a continued cache its last L columns count.
            labels: shape of input_ids, -100 ignored; shifted along each token's own path, never across sequences or
                from a pad. The loss is their mean, or the sum by `num_items_in_batch` as in transformers.
            segments: boundaries and forks of a packed row.
            target_positions, target_ids: int64 `[M]`: the flat row (into `[B * L]`) whose hidden state predicts, and
                what. Only these rows meet the head, and no logits are returned.
            targets_summed: only the sum of the log-probs will matter (see `token_logps`).
            kwargs: `initial_states` and `output_final_states` among others, as the backbone's.

        Returns:
            `CausalLMOutput` with `logits` fp32 `[B, L, V]`, or with `logps` fp32 `[M]` where targets are given.
        """
        outputs = self.backbone(
            input_ids,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            attention_mask=attention_mask,
            segments=segments,
            **kwargs,
        )
        hidden = outputs.last_hidden_state.to(self.lm_head.weight.dtype)
        loss = logits = logps = None
        if segments is not None and labels is not None:
            target_positions, target_ids = _targets_of(labels[0], segments)
        if target_positions is not None and target_ids is not None:
            predicting = take_rows(hidden.flatten(0, 1), target_positions)
            summed = targets_summed or labels is not None
            logps = _head_logps(self.lm_head, predicting, target_ids, self.backend, summed)
            if labels is not None:
                count = kwargs.get("num_items_in_batch")
                loss = -logps.sum() / (logps.numel() if count is None else count)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
            logits = logits.float() if logits.dtype.itemsize < 4 else logits
            if labels is not None:
                labels = labels if attention_mask is None else _predicted(labels, attention_mask)
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutput(
            loss=loss,
            logits=logits,
            cache_params=outputs.cache_params,
            hidden_states=outputs.hidden_states,
            logps=logps,
            final_states=outputs.final_states,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def _head_logps(head: nn.Module, hidden: Tensor, ids: Tensor, backend: str, summed: bool) -> Tensor:
    """fp32 `[M]` log-probs of `ids` under a head of any kind; logits exist for a chunk of rows at a time.

    A plain head is a weight that the fused op reads. Any other (with an adapter, quantised) is called, and called
    again in the backward pass: an adapter on it is never passed over.
    """
    if type(head) is nn.Linear:
        return token_logps(hidden, head.weight, ids, backend=backend, summed=summed)

    def logps_of(rows: Tensor, wanted: Tensor) -> Tensor:
        logits: Tensor = head(rows)
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        return logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)

    rows = max(1, CALLED_HEAD_ELEMENTS // head.out_features)  # type: ignore[operator]
    chunks = zip(hidden.split(rows), ids.split(rows), strict=True)
    parts = [checkpoint(logps_of, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat(parts) if parts else hidden.sum(1)


def _predicted(labels: Tensor, attention_mask: Tensor) -> Tensor:
    """Padded `labels` without those of pads and of tokens after a pad, which no token of the row predicts."""
    real = attention_mask[:, -labels.shape[1] :].bool()
    follows = nn.functional.pad(real[:, :-1], (1, 0))
    return labels.masked_fill(~(real & follows), -100)


def _targets_of(labels: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """(positions, ids) of the labels of a packed row: each is predicted by the token before it on its own path."""
    before = segments.predecessor().to(labels.device)
    wanted = ((labels != -100) & (before >= 0)).nonzero()[:, 0]
    return before[wanted], labels[wanted]


class MambaForCausalLM(PackedCausalLM, hf_mamba.MambaForCausalLM):
    """transformers' `MambaForCausalLM`, exact on packed, forked and padded input."""

    pretrained_class, backbone_class = hf_mamba.MambaPreTrainedModel, MambaModel


class FalconMambaForCausalLM(PackedCausalLM, hf_falcon.FalconMambaForCausalLM):
    """transformers' `FalconMambaForCausalLM`, exact on packed, forked and padded input."""

    pretrained_class, backbone_class = hf_falcon.FalconMambaPreTrainedModel, FalconMambaModel


# By model_type; each family's module adds its own.
FAMILIES: dict[str, type[Any]] = {"mamba": MambaForCausalLM, "falcon_mamba": FalconMambaForCausalLM}


def model_class(config: Any) -> type[Any]:
    """Our class for a transformers config.

    Raises:
        ValueError: a model type that is not of the families above.
    """
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not supported; mambalign trains {', '.join(sorted(FAMILIES))}")
    return FAMILIES[family]
