"""Reward models: one score for a whole sequence, from a scalar head on the backbone of any family.

transformers has no sequence classification for Mamba, so the classes are made here: the family's backbone, and `score`
where its head was. A folder of one is plain (safetensors, `architectures`, one label) and is loaded by
`load_model(path, head="reward")`; the classes have transformers' usual names and outputs, so that trainers which know
those, such as TRL's, take them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from mambalign.models.mamba import PackedCausalLM, model_class
from mambalign.ops import Segments
from mambalign.ops.backends import take_rows

SUFFIX = "ForSequenceClassification"


class ScoreHead(nn.Linear):
    """`[..., hidden]` -> `[..., 1]` without bias, in at least fp32 under any autocast.

    Rewards are compared with one another, and bfloat16 would make ties of all that differ by less than 1/256.
    """

    def __init__(self, hidden_size: int, **factory: Any):
        super().__init__(hidden_size, 1, bias=False, **factory)

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.to(wide), self.weight.to(wide))


class PackedRewardModel:
    """Backbone and `score`; mixed into the pretrained class of every family."""

    pretrained_class: type[Any]
    backbone_class: type[Any]
    set_backend = PackedCausalLM.set_backend
    set_selective_recomputation = PackedCausalLM.set_selective_recomputation
    set_cuda_graphs = PackedCausalLM.set_cuda_graphs

    def __init__(self: Any, config: Any):
        self.pretrained_class.__init__(self, config)
        self.backbone = self.backbone_class(config)
        self.score = ScoreHead(config.hidden_size)
        self.post_init()

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        segments: Segments | None = None,
        positions: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Rewards of whole sequences.

        Args:
            input_ids: int64 `[B, L]`, or packed `[1, T]` with `segments`.
            attention_mask: `[B, L]`, pads on either side.
            segments: boundaries and forks of a packed row.
            positions: int64 `[K]`, the flat rows (into `[B * L]`) of the last tokens that are to be scored; None: the
                last real token of every row, or of every segment.

        Returns:
            `logits` fp32 `[B, 1]`, `[S, 1]` or `[K, 1]`.

        Raises:
            ValueError: a segment on whose path there is no token.
        """
        kwargs["use_cache"] = False  # a score is the end of a sequence
        outputs = self.backbone(input_ids, attention_mask=attention_mask, segments=segments, return_dict=True, **kwargs)
        hidden: Tensor = outputs.last_hidden_state
        if positions is None and segments is not None and bool((segments.last_token < 0).any()):
            raise ValueError("a sequence without tokens has no reward; leave it out of the segments")
        if positions is None:
            positions = segments.last_token if segments is not None else _last_of_rows(hidden, attention_mask)
        logits = self.score(take_rows(hidden.flatten(0, 1), positions.to(hidden.device)))
        if self.config.return_dict if return_dict is None else return_dict:
            return SequenceClassifierOutput(logits=logits, hidden_states=outputs.hidden_states)
        return (logits,)


def _last_of_rows(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Flat position of the last real token of every row."""
    rows, length = hidden.shape[:2]
    starts = torch.arange(rows, device=hidden.device) * length
    if attention_mask is None:
        return starts + length - 1
    places = torch.arange(1, length + 1, device=hidden.device)
    return starts + (attention_mask.to(places) * places).argmax(1)


@cache
def _of_family(language_model: Any) -> Any:
    kept = [*language_model._keep_in_fp32_modules_strict, r"^score\."]
    members = {
        "__module__": __name__,
        "__doc__": f"A scalar head on the backbone of {language_model.__name__}.",
        "pretrained_class": language_model.pretrained_class,
        "backbone_class": language_model.backbone_class,
        "_keep_in_fp32_modules_strict": kept,
    }
    name = language_model.__name__.removesuffix("ForCausalLM") + SUFFIX
    return type(name, (PackedRewardModel, language_model.pretrained_class), members)


def reward_class(config: Any) -> type[Any]:
    """The reward model's class for a transformers config.

    Raises:
        ValueError: a model type that no language model here has.
    """
    language_model: Any = model_class(config)
    made: type[Any] = _of_family(language_model)
    return made


def is_reward_config(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a reward model, by its `architectures`."""
    return any(str(name).endswith(SUFFIX) for name in config.get("architectures") or [])


def with_reward_head(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A reward model of the language model's backbone (shared, not copied) and a new head.

    The head is drawn from N(0, 1 / (hidden + 1)) (arXiv 2009.01325) by `seed` alone.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    with torch.device("meta"):
        reward: Any = reward_class(config)(config)
    backbone: Any = model.backbone
    beside: Any = model.get_input_embeddings().weight
    head = ScoreHead(config.hidden_size, dtype=torch.promote_types(beside.dtype, torch.float32))
    std = 1 / math.sqrt(config.hidden_size + 1)
    with torch.no_grad():
        head.weight.normal_(0.0, std, generator=torch.Generator().manual_seed(seed))
    reward.backbone, reward.score = backbone, head.to(beside.device)
    reward.name_or_path = model.name_or_path
    return reward.train(model.training)
