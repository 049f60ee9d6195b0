"""What training asks a model about a batch; nothing else of a training run calls it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mambalign.data.packing import PackedBatch


def target_output(model: nn.Module, batch: PackedBatch, summed: bool = False, **states: Any) -> Any:
    """A language model's `CausalLMOutput` with the log-probs of the batch's targets.

    Args:
        summed: only their sum will matter (see `token_logps`).
        states: `initial_states`, `output_final_states` of the packed row.
    """
    return model(
        input_ids=batch.input_ids[None],
        segments=batch.segments,
        target_positions=batch.target_positions,
        target_ids=batch.target_ids,
        targets_summed=summed,
        use_cache=False,
        **states,
    )


def target_logps(model: nn.Module, batch: PackedBatch, summed: bool = False) -> Tensor:
    """fp32 `[M]` log-probs of the batch's targets."""
    logps: Tensor = target_output(model, batch, summed).logps
    return logps


def sequence_rewards(model: nn.Module, batch: PackedBatch) -> Tensor:
    """fp32 `[K]` rewards of the batch's sequences."""
    output = model(input_ids=batch.input_ids[None], segments=batch.segments, positions=batch.last_positions)
    rewards: Tensor = output.logits[:, 0]
    return rewards
