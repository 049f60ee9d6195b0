"""The training step: one thin `transformers.Trainer` for every objective.

A device batch arrives as flat `PackedBatch`es (one, or several under a token bound). Each is one forward and one
backward pass; its loss is a *sum*, divided by the number of items (trained tokens, or pairs) of the whole optimizer
step over all micro-batches and processes. So how a step is cut into batches changes nothing but speed and memory.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from mambalign.data.packing import Collator, EpochSampler, PackedBatch, PackedRows
from mambalign.models import files
from mambalign.ops.backends import send
from mambalign.support import write_json
from mambalign.train import checkpoint as checkpoints
from mambalign.train import replicas, sharding
from mambalign.train.asking import sequence_rewards, target_logps
from mambalign.train.callbacks import AdapterAudit, MetricsFile, Milestones
from mambalign.train.finite import FiniteWatch, NonFiniteLossError, advice
from mambalign.train.objectives import (
    Completions,
    PreferenceOptions,
    bradley_terry_loss,
    preference_loss,
    preference_metrics,
    reward_metrics,
    sequence_sums,
    sft_loss,
)
from mambalign.train.preemption import DeafWorker, Preempted, Preemption, held_while_reading, signals_held
from mambalign.train.processes import FilledRows, FilledSampler, add_up, most, placeholder

if TYPE_CHECKING:  # PEFT takes seconds to import
    from mambalign.models.adapters import Adapters

logger = logging.getLogger("mambalign")

ACCUMULATORS = "accumulators.json"


class Objective(Protocol):
    """What to ask the model about a batch, and what to make of the answer."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of what an evaluation measures."""

    def items(self, batch: PackedBatch) -> int:
        """How many items of the batch the loss is a sum over."""

    def ask(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        """Log-probs of the batch's targets `[M]`, or rewards of its sequences `[K]`; fp32."""

    def __call__(self, answer: Tensor, /, batch: PackedBatch, split: str) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss summed over the items, sums of the metrics). `split` says which dataset `batch.indices` index."""


class SequenceObjective:
    """Continued pre-training and SFT: cross-entropy of the trained tokens."""

    metrics = ("loss", "perplexity")

    def ask(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        return target_logps(model, batch, summed=True)

    def items(self, batch: PackedBatch) -> int:
        return batch.num_targets

    def __call__(self, logps: Tensor, batch: PackedBatch, split: str) -> tuple[Tensor, dict[str, Tensor]]:
        loss = sft_loss(logps)
        return loss, {"loss": loss.detach()}


class PreferenceObjective:
    """DPO and its kin. `reference[split]` is `[N, 2]`: log-probs of chosen and rejected under the initial weights."""

    def ask(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        return target_logps(model, batch)

    def __init__(self, options: PreferenceOptions, reference: dict[str, Tensor]):
        self.options, self.reference = options, reference
        nothing = Completions(torch.empty(0), torch.empty(0))
        self.metrics = tuple(preference_metrics(nothing, nothing, torch.empty(0), options))

    def items(self, batch: PackedBatch) -> int:
        assert batch.pairs is not None
        return batch.pairs.shape[0]

    def __call__(self, logps: Tensor, batch: PackedBatch, split: str) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.pairs is not None
        sums, lengths = sequence_sums(logps, batch.target_sequence, batch.num_sequences)
        sides = []
        for side, k in enumerate(batch.pairs.unbind(1)):
            reference = None
            if self.options.needs_reference:
                reference = send(self.reference[split][batch.indices, side], sums.device).to(sums)
            sides.append(Completions(sums.index_select(0, k), lengths.index_select(0, k), reference))
        chosen, rejected = sides
        losses = preference_loss(chosen, rejected, self.options)
        return losses.sum(), preference_metrics(chosen, rejected, losses, self.options)


class RewardObjective:
    """Reward models: Bradley-Terry on the scores at the ends of chosen and rejected."""

    def ask(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        return sequence_rewards(model, batch)

    def __init__(self, center_coefficient: float | None = None):
        self.center_coefficient = center_coefficient
        nothing = torch.empty(0)
        self.metrics = tuple(reward_metrics(nothing, nothing, (nothing, nothing), nothing))

    def items(self, batch: PackedBatch) -> int:
        assert batch.pairs is not None
        return batch.pairs.shape[0]

    def __call__(self, rewards: Tensor, batch: PackedBatch, split: str) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.pairs is not None
        tokens = torch.bincount(batch.target_sequence, minlength=batch.num_sequences)
        chosen, rejected = (rewards.index_select(0, k) for k in batch.pairs.unbind(1))
        losses = bradley_terry_loss(chosen, rejected, batch.margins, self.center_coefficient)
        lengths = tokens[batch.pairs[:, 0]], tokens[batch.pairs[:, 1]]
        return losses.sum(), reward_metrics(chosen, rejected, lengths, losses)


class PackedTrainer(Trainer):
    """`transformers.Trainer` on `PackedRows`.

    Args:
        objective: what is minimised.
        train_rows, eval_rows: `PackedRows`; either may be None.
        collator: cuts device batches into flat micro-batches.
        sampler_seed: with the epoch, decides the order of the rows.
        row_ids: dataset index -> row id of the training data, for messages.
        write_card: called with a folder to write the model card there.
        adapters: what trains, where that is not the whole model; checkpoints hold it alone.
        lineage: what the run started from (see `lineage.py`).
        preemption: says when to stop, or to save between `save_steps`.
        shards: every process keeps a part of the model (see `sharding.py`).
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        args: Any,
        objective: Objective,
        train_rows: PackedRows | None,
        eval_rows: PackedRows | None,
        collator: Collator,
        tokenizer: Any,
        sampler_seed: int,
        row_ids: Sequence[str] = (),
        write_card: Callable[[Path], None] | None = None,
        adapters: Adapters | None = None,
        lineage: dict[str, Any] | None = None,
        preemption: Preemption | None = None,
        shards: bool = False,
    ):
        self.adapters, self.lineage, self.shards = adapters, lineage, shards
        self.preemption = preemption or Preemption()
        self.objective, self.sampler_seed, self.row_ids, self.write_card = objective, sampler_seed, row_ids, write_card
        self._metrics_file, self.milestones = MetricsFile(), Milestones(self)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            callbacks=[self._metrics_file, self.milestones] + ([AdapterAudit()] if adapters else []),
        )
        self.model_accepts_loss_kwargs = True  # our loss is already normalised over the whole step
        self._finite = FiniteWatch()
        self._sums: dict[str, float | Tensor] = {}
        self._totals = {"items": 0, "tokens": 0, "tokens_seen": 0, "prompt_tokens_saved": 0}
        self._clock: float | None = None  # set by the first step: loading is not training
        self._indices: list[int] = []  # what the current step has read
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self._staging: str | None = None  # where a checkpoint is in the making
        self._unsaved: str | None = None  # why it will not be whole
        self._owed: dict[str, bool] | None = None  # an evaluation at this step that is still to come; is a save?
        self._parameters = sum(p.numel() for p in model.parameters())

    # ------------------------------------------------------------------------------------------------- the step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one device batch; returns its share of the step's loss."""
        model.train()
        self._clock = self._clock or time.perf_counter()
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        total = torch.zeros((), device=self.args.device)
        parts = self._parts(model, inputs)
        passes = self._passes(max(len(parts), 1))
        for number in range(passes):
            # DDP decides in the forward pass whether the backward pass will exchange gradients.
            with nullcontext() if number == passes - 1 else self.accelerator.no_sync(model):
                if number < len(parts):
                    batch = parts[number].to(self.args.device, non_blocking=True)
                    total += self._forward_backward(model, batch, num_items_in_batch)
                else:  # no rows left for this process, and the others wait for its gradients: zeros
                    answer = self.objective.ask(model, placeholder().to(self.args.device))
                    self.accelerator.backward(0.0 * answer.sum())
        if self.accelerator.sync_gradients:
            replicas.average(self.model)
        return total

    def _parts(self, model: nn.Module, batches: Sequence[PackedBatch]) -> Sequence[Any]:
        """What goes through the model at once, in this order; each becomes a `PackedBatch` by `to(device)`."""
        return batches

    def _passes(self, mine: int) -> int:
        """Forward passes of this round: in each, shards are exchanged, so all processes must take as many."""
        return most(mine) if sharding.is_sharded(self.model) or self.is_deepspeed_enabled else mine

    def _forward_backward(self, model: nn.Module, batch: PackedBatch, num_items: Any) -> Tensor:
        with self.compute_loss_context_manager():
            loss, sums = self.objective(self.objective.ask(model, batch), batch, "train")
        # DDP averages gradients over processes; the count is over all of them, so put the sum back.
        loss = loss * self.accelerator.num_processes / num_items
        step, rows = self.state.global_step + 1, batch.indices.tolist()
        self._finite.watch(loss, lambda value: self._advice(f"loss is {value}", step, rows))
        self._backward(loss, batch)
        self._count(batch, sums)
        return loss.detach()

    def _backward(self, loss: Tensor, batch: PackedBatch) -> None:
        self.accelerator.backward(loss)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Of the whole step, right before the optimizer uses it."""
        norm, indices = super()._get_grad_norm(model, grad_norm), self._indices
        self._indices = []
        norm = None if norm is None else sharding.whole_tensor(norm)
        # fp16's loss scaling expects overflows: it skips the step and lowers the scale.
        if norm is not None and self.accelerator.scaler is None:
            step = self.state.global_step + 1
            self._finite.watch(
                torch.as_tensor(norm), lambda value: self._advice(f"the gradient's norm is {value}", step, indices)
            )
        return norm

    def check_weights(self) -> None:
        """Raises `NonFiniteLossError` if one is not finite: in 16 bits an optimizer overflows on finite gradients."""
        self._finite.settle()
        # What is frozen cannot have changed, and packed 4-bit numbers may look like anything.
        trained = ((name, p.detach()) for name, p in self.model.named_parameters() if p.requires_grad)
        broken = (name for name, value in trained if not bool(torch.isfinite(sharding.local_part(value)).all()))
        name = next(filter(None, gather_object([next(broken, None)])), None)
        if name is not None:
            raise NonFiniteLossError(self._advice(f"{name} is not finite", self.state.global_step, []))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        count = sum(self.objective.items(batch) for batches in batch_samples for batch in batches)
        if self.accelerator.num_processes == 1:
            return count
        return self.accelerator.gather(torch.tensor(count, device=device)).sum()

    def _count(self, batch: PackedBatch, sums: dict[str, Tensor]) -> None:
        self._indices += batch.indices.tolist()
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()
        self._totals["items"] += self.objective.items(batch)
        self._totals["tokens"] += batch.num_tokens
        self._totals["tokens_seen"] += batch.num_tokens
        self._totals["prompt_tokens_saved"] += batch.num_prompt_tokens_saved

    def _advice(self, what: str, step: int, indices: list[int]) -> str:
        rows = [self.row_ids[i] if self.row_ids else str(i) for i in dict.fromkeys(indices)]
        return advice(what, step, rows, self.args.output_dir)

    def floating_point_ops(self, inputs: Any) -> int:
        """6 operations per parameter and token (arXiv 2001.08361, section 2.1); the scan's own share is small."""
        return 6 * self._parameters * sum(batch.num_tokens for batch in inputs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but norms and biases, as usual, and but `A_log` and `D`, as Mamba's authors mark them."""
        names = super().get_decay_parameter_names(model)
        # transformers knows layers' `norm`, not the last one, `norm_f`; a DoRA's magnitudes are the norms of weights.
        free = ("norm", "magnitude")
        return [n for n in names if not any(f in n for f in free) and n.rsplit(".", 1)[-1] not in ("A_log", "D")]

    # ------------------------------------------------------------------------------------------------- the data

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> Any:
        # transformers drops the last rows of an evaluation too; of a filled one there is nothing to drop.
        if not (is_training and self.args.dataloader_drop_last):
            dataset = FilledRows(dataset, batch_size * self.args.world_size)
        loader = super()._get_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)
        if loader.num_workers:
            # Forked, whatever Python's default: a fork server would die of the signals that its workers outlive.
            loader.multiprocessing_context, loader.worker_init_fn = "fork", DeafWorker(loader.worker_init_fn)
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with signals_held():
            return super().get_batch_samples(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        filled = isinstance(data, FilledRows)
        self._order = FilledSampler(data, self.sampler_seed) if filled else EpochSampler(len(data), self.sampler_seed)
        return self._order

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        # accelerate does not reach the sampler of a resumed epoch when there are several processes.
        self._order.set_epoch(epoch)
        if self.state.global_step >= self.state.max_steps:  # resumed at the end, which transformers would train past
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    # ----------------------------------------------------------------------------------------- the end of a step

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        """Log, evaluate and save, in this order and as due; then stop, if that was asked for.

        transformers comes here at the end of a step and again at the end of an epoch. What ends both is done once: a
        checkpoint made between the two would not know that the epoch's evaluation is still to come.
        """
        closing = self.control.should_training_stop or float(self.state.epoch or 0).is_integer()
        if closing and not self.milestones.epoch_ended:
            return
        if self.control.should_log or self.control.should_evaluate:
            self._finite.settle()
        stop, save = self.preemption.step_ends()
        evaluate, planned = self.control.should_evaluate, self.control.should_save
        self.control.should_save = planned or save or stop
        # The grace may be shorter than an evaluation, which the next start can make up for.
        self.control.should_evaluate = evaluate and not stop
        self._owed = {"save": planned} if evaluate and stop else None
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kwargs)
        except Preempted:
            self._owed = {"save": planned}
            self._save_checkpoint(model)
            raise
        if stop:
            raise Preempted(f"{self.preemption.reason} at step {self.state.global_step} of {self.state.max_steps}")

    def make_up(self) -> None:
        """The evaluation, and the save after it, that the step of the checkpoint could not wait for."""
        owed, self._owed = self._owed, None
        if owed is not None:
            self.control.should_log, self.control.should_evaluate, self.control.should_save = False, True, owed["save"]
            super()._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, None, None, 0.0)

    # ---------------------------------------------------------------------------------------- evaluation and logs

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Averages over every item of the evaluation rows, logged with the prefix."""
        loader = self.get_eval_dataloader(eval_dataset)
        self.callback_handler.eval_dataloader = loader
        model = (
            self.model_wrapped if self.is_in_train else self.accelerator.prepare_model(self.model, evaluation_mode=True)
        )
        model.eval()
        sums: dict[str, float | Tensor] = {}
        items, started = 0, time.perf_counter()
        for batches in held_while_reading(loader):
            self.preemption.check("evaluating")
            parts = self._parts(model, batches)
            for _ in range(len(parts), self._passes(len(parts))):
                self.objective.ask(model, placeholder().to(self.args.device))
            for part in parts:
                batch = part.to(self.args.device, non_blocking=True)
                with self.compute_loss_context_manager():
                    _, measured = self.objective(self.objective.ask(model, batch), batch, "eval")
                for name, value in measured.items():
                    sums[name] = sums.get(name, 0.0) + value.double()
                items += self.objective.items(batch)
            self.control: Any = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        totals = add_up({name: float(value) for name, value in sums.items()} | {"items": items})
        items = max(int(totals.pop("items")), 1)
        metrics = {f"{metric_key_prefix}_{name}": value / items for name, value in totals.items()}
        if isinstance(self.objective, SequenceObjective):
            metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(metrics[f"{metric_key_prefix}_loss"], 700.0))
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - started
        if self._clock is not None:
            self._clock += metrics[f"{metric_key_prefix}_runtime"]  # tokens/s is about training
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._evaluated = (self.state.global_step, metrics)
        return metrics

    def final_evaluation(self) -> dict[str, float]:
        """Metrics of the finished model; those of the last step's evaluation if there was one."""
        step, metrics = self._evaluated
        if step == self.state.global_step and not self.args.load_best_model_at_end:
            return metrics
        try:
            return self.evaluate()
        except Preempted:
            newest = checkpoints.newest_complete(Path(self.args.output_dir))
            if newest is None or newest.name != f"checkpoint-{self.state.global_step}":
                self._save_checkpoint(self.model_wrapped)
            raise

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the averages since the last log line to the Trainer's own."""
        if "loss" in logs and "learning_rate" in logs:
            # transformers averages over the steps since the process started; ours survive a restart.
            self._pool()
            items = max(self._totals["items"], 1)
            logs = logs | {name: float(value) / items for name, value in self._sums.items()}
            logs["tokens_per_second"] = self._totals["tokens"] / max(time.perf_counter() - (self._clock or 0.0), 1e-9)
            logs["num_tokens"] = self._totals["tokens_seen"]
            if isinstance(self.objective, SequenceObjective):
                logs["packing_fill"] = self.train_dataset.fill
            else:
                logs["prompt_tokens_saved"] = self._totals["prompt_tokens_saved"]
            self._sums = {}
            self._totals |= {"items": 0, "tokens": 0}
            self._clock = time.perf_counter()
        super().log(logs, start_time)

    def _pool(self) -> None:
        """Hand the sums of all processes to the first, which logs and saves them."""
        if self.args.world_size == 1:
            return
        sums, totals = add_up({name: float(value) for name, value in self._sums.items()}), add_up(self._totals)
        first = self.is_world_process_zero()
        self._sums = dict(sums) if first else {}
        self._totals = {name: int(value) if first else 0 for name, value in totals.items()}

    # ----------------------------------------------------------------------------------------------- checkpoints

    def _get_output_dir(self, trial: Any = None) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Staged, sealed, renamed (see `checkpoint.py`). A failed save is reported and training goes on."""
        self.check_weights()
        started = time.monotonic()
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        staging = final.parent / checkpoints.STAGING
        self._pool()
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        # Every process writes its own random state; the folder is whole when all are done.
        failures = gather_object([checkpoints.failure_of(lambda: self._stage(model, trial, staging, final))])
        if self.args.should_save:
            failure = next(filter(None, failures), None)
            checkpoints.conclude(
                staging / final.name, final, failure, self.args.save_total_limit, self.state.best_model_checkpoint
            )
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.preemption.saved(time.monotonic() - started)

    def _stage(self, model: nn.Module, trial: Any, staging: Path, final: Path) -> None:
        self._staging = str(staging)
        only_model = self.args.save_only_model
        # Whoever is asked to stop is to go on later.
        self.args.save_only_model = only_model and self.preemption.reason is None
        self._unsaved = None
        try:
            super()._save_checkpoint(model, trial)
        except checkpoints.DISK_ERRORS as error:
            self._unsaved = self._unsaved or str(error)  # the first failure is the cause of the others
        finally:
            self._staging, self.args.save_only_model = None, only_model
        if self._unsaved is not None:
            raise OSError(self._unsaved)
        best = self.state.best_global_step
        self.state.best_model_checkpoint = str(final.with_name(f"checkpoint-{best}")) if best else None
        if self.args.should_save:
            self.state.save_to_json(str(staging / final.name / TRAINER_STATE_NAME))  # with the best one's final place
            self._save_accumulators(staging / final.name)

    def _save_accumulators(self, folder: Path) -> None:
        sums = {name: float(value) for name, value in self._sums.items()}
        values = {"sums": sums, "totals": self._totals, "evaluated": self._evaluated, "lines": self._metrics_file.lines}
        write_json(folder / ACCUMULATORS, values | {"owed": self._owed})

    def restore_accumulators(self, folder: Path) -> None:
        """Continue the log where the checkpoint interrupted it: its averages, its last evaluation, its lines."""
        saved = json.loads((folder / ACCUMULATORS).read_text())
        step, metrics = saved["evaluated"]
        self._evaluated, self._metrics_file.lines = (step, metrics), saved["lines"]
        self._owed = saved.get("owed")
        self.args.eval_on_start = False  # the run has started
        if self.is_world_process_zero():  # the sums are those of all processes
            self._sums, self._totals = saved["sums"], saved["totals"]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # All gather the shards, but some versions of transformers (5.17) call `_save` in the first process alone.
        with sharding.whole(self.model, here=self.args.should_save):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            if self._staging is None:
                self._write(folder, state_dict)
            else:  # `_stage` raises it: whoever left here would leave the others at transformers' next barrier
                self._unsaved = checkpoints.failure_of(lambda: self._write(folder, state_dict))

    def _write(self, folder: Path, state_dict: Any) -> None:
        if self.adapters is None:
            super()._save(str(folder), state_dict)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self.adapters.save(folder, for_resuming=True)
            self.processing_class.save_pretrained(folder)
        if self.lineage is not None:
            write_json(folder / files.LINEAGE, self.lineage)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not sharding.is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = sharding.whole_state(self.optimizer, here=self.args.should_save)
        if state is not None:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        file = Path(checkpoint) / OPTIMIZER_NAME
        sharded = sharding.is_sharded(self.model)
        # What is copied, in part or to a GPU, need not be in this process's memory.
        copied = sharded or self.args.device.type != "cpu"
        state = torch.load(file, map_location="cpu", mmap=copied, weights_only=True)
        if sharded:
            sharding.load_whole_state(self.optimizer, state)
        else:  # transformers' own way (5.17) ends in an error on several processes without a GPU
            checkpoints.load_optimizer(self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(file.with_name(SCHEDULER_NAME), weights_only=True))

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        # Here the reference pass is over and a checkpoint's weights are loaded, both on the whole model.
        if self.shards and not sharding.is_sharded(self.model):
            sharding.shard(self.model, self.accelerator)
        replicas.prepare(self.model, self.accelerator)
        return super()._prepare_for_training(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.adapters is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.adapters.restore(Path(resume_from_checkpoint))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # What no log line has taken in yet is the loss of this process's rows alone; `train_loss` is of all.
        self._tr_loss: Tensor = self.accelerator.gather(self._tr_loss).mean()
        return super()._finalize_training(*args, **kwargs)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if not best.is_dir():
            logger.error("%s could not be saved, so the last weights stay in its place", best.name)
            return
        if sharding.is_sharded(self.model):
            tensors = files.weight_files(best) if self.adapters is None else [best / files.TRAINED]
            sharding.load(self.model, files.read_tensors(tensors))
        elif self.adapters is None:
            super()._load_best_model()
        else:
            self.adapters.restore(best)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A tied head is stored once, as the embedding: it is not missing.
        missing = [name for name in load_result.missing_keys if name not in self.model.all_tied_weights_keys]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if self.write_card is not None:
            self.write_card(Path(self.args.output_dir))
