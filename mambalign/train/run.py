"""A run: from a recipe to a folder that holds everything about it. Running the same recipe again resumes it.

The folder: `recipe.yaml` (frozen), `environment.json`, `data.json` (what was read, cut and skipped), `metrics.jsonl`,
`checkpoint-*/`, `reference/` (DPO), `curves.svg`, `run.json` (status, lineage, final metrics), and at the end the
model, its tokenizer and its card, loadable by plain transformers.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from mambalign.data.chat import apply_template, check_template, set_pad_token
from mambalign.data.mixer import TokenizedData, load_mix, tokenize_preferences, tokenize_sft, tokenize_text
from mambalign.data.packing import Collator, PackedRows
from mambalign.data.responses import RewardInputs
from mambalign.models import files, lineage
from mambalign.models.checkpoint import add_tokens, holds_reward_model, load_model, load_tokenizer, save_model
from mambalign.models.reward import with_reward_head
from mambalign.recipe import PAIR_STAGES, Recipe, UserError, nearest, seconds
from mambalign.support import write_json, write_text
from mambalign.train import card, checkpoint, curves, sharding
from mambalign.train.callbacks import METRICS, read_metrics
from mambalign.train.long_context import StatePassing, StatePassingTrainer, describe
from mambalign.train.objectives import PreferenceOptions
from mambalign.train.preemption import Preempted, Preemption
from mambalign.train.processes import first_decides
from mambalign.train.reference import cache_key, reference_logps, weights_fingerprint
from mambalign.train.trainer import (
    Objective,
    PackedTrainer,
    PreferenceObjective,
    RewardObjective,
    SequenceObjective,
)

logger = logging.getLogger("mambalign")

RUN, RECIPE, DATA, ENVIRONMENT = "run.json", "recipe.yaml", "data.json", "environment.json"
TOKENIZE = {
    "cpt": tokenize_text,
    "sft": tokenize_sft,
    "dpo": tokenize_preferences,
    "reward": tokenize_preferences,
}
# Keys that change where and how fast a run goes, but not what it computes: free to change before resuming.
FREE_GROUPS = ("logging", "saving", "distributed")
FREE_KEYS = frozenset(
    "resume max_tokens_per_device reference_batch_tokens preprocessing_num_workers per_device_eval_batch_size "
    "gradient_checkpointing gradient_checkpointing_kwargs cuda_graphs torch_empty_cache_steps dataloader_num_workers "
    "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor do_eval".split()
)


@dataclass(frozen=True)
class RunResult:
    """`metrics`: the final evaluation and the last training line. `already_finished`: nothing had to be done."""

    output_dir: Path
    global_step: int
    metrics: dict[str, Any]
    already_finished: bool = False


def run(stage: str, recipe: Recipe) -> RunResult:
    """Train `stage` ("cpt", "sft", "dpo" or "reward") as the recipe says, resuming whatever its `output_dir` holds.

    Raises:
        UserError: anything the user can mend: recipe, data, model, or an `output_dir` of another recipe.
        NonFiniteLossError: the loss diverged.
        Preempted: a signal or `max_runtime` stopped the run after a checkpoint; as an exit of the process, code 85.
    """
    recipe.require(stage)
    folder = Path(str(recipe.output_dir)).expanduser()
    # The arguments come first: they set up devices, find the other processes, and refuse early what cannot work.
    args = training_arguments(_for_this_many(recipe, folder), folder)
    _make(folder, recipe)
    preemption = Preemption(
        None if recipe.max_runtime is None else seconds("max_runtime", recipe.max_runtime),
        None if recipe.save_minutes is None else 60 * recipe.save_minutes,
    )
    with ExitStack() as lock, preemption.listening():
        finished = first_decides(lambda: _claim(folder, recipe, stage, args, lock))
        try:
            return finished or _train(stage, recipe, folder, args, preemption)
        except Preempted as stop:
            if args.process_index == 0:
                _note_end(folder, "preempted", why=str(stop))
                logger.warning("stopped: %s; the same command goes on from here (exit code %d)", stop, stop.code)
            raise


def _for_this_many(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe, its batch cut for the processes there are now: a run that moves to more or fewer GPUs keeps the rows
    of every step, so its losses and its schedule."""
    now = int(os.environ.get("WORLD_SIZE", "1"))
    first = (_read_json(folder / RUN).get("attempts") or [{}])[0].get("processes", now)
    if first == now or recipe.resume == "never":
        return recipe
    total = recipe.per_device_train_batch_size * recipe.accumulation_steps(first) * first
    device_batch = next(
        (n for n in range(recipe.per_device_train_batch_size, 0, -1) if total % (n * now) == 0),
        recipe.per_device_train_batch_size,
    )
    logger.info(
        "%d processes, %d before: %d a device batch and %d accumulated keep the %d of a step",
        now, first, device_batch, total // (device_batch * now), total,
    )  # fmt: skip
    return replace(
        recipe, global_batch_size=total, gradient_accumulation_steps=None, per_device_train_batch_size=device_batch
    )


def _train(stage: str, recipe: Recipe, folder: Path, args: TrainingArguments, preemption: Preemption) -> RunResult:
    objective = _objective(stage, recipe)
    _check_best_metric(recipe, objective)
    model, tokenizer, facts, adapters = load_start(recipe, stage)
    with preemption.excusing("loading"), args.main_process_first(local=False):  # the others read its cache
        train, evaluation = load_data(recipe, stage, tokenizer)
    preemption.check("loading")
    if stage == "reward":
        model.config.reward_inputs = RewardInputs.of(recipe, tokenizer, train).to_dict()
    if args.process_index == 0:
        _write_facts(folder, train, evaluation)
    kind: Any = "pairs" if stage in PAIR_STAGES else "sequences"
    rows = {name: _rows(recipe, data, kind) for name, data in (("train", train), ("eval", evaluation)) if data}
    _check_batches(len(rows["train"]), args)
    with _as_user_error("transformers.Trainer"):
        trainer = (StatePassingTrainer if isinstance(objective, StatePassing) else PackedTrainer)(
            model=model,
            args=args,
            objective=objective,
            train_rows=rows["train"],
            eval_rows=rows.get("eval"),
            collator=Collator(kind, recipe.max_tokens_per_device),
            tokenizer=tokenizer,
            sampler_seed=recipe.seed if recipe.data_seed is None else recipe.data_seed,
            row_ids=train.dataset["row_id"],
            write_card=lambda target: card.write(target, stage, recipe, facts, train, read_metrics(folder / METRICS)),
            adapters=adapters,
            lineage=facts["lineage"],
            preemption=preemption,
            shards=sharding.wanted(recipe, args.world_size),
        )
    _say_plan(trainer, rows, recipe, stage)
    if isinstance(objective, PreferenceObjective) and objective.options.needs_reference:
        for name, data in (("train", train), ("eval", evaluation)):
            if data is not None:
                objective.reference[name] = _reference(trainer, data, name, recipe, folder, facts)
    preemption.check("beginning")
    start = _resume_point(folder, recipe)
    if start is not None:
        logger.info("resuming from %s", start)
        lineage.check_resumed(start, facts["lineage"])
        trainer.restore_accumulators(start)
    card.attach_hub(trainer, recipe)
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    trainer.check_weights()
    metrics = trainer.final_evaluation() if "eval" in rows and recipe.do_eval else {}
    return _finish(trainer, folder, recipe, tokenizer, metrics)


# ------------------------------------------------------------------------------------------------------- the folder


def _make(folder: Path, recipe: Recipe) -> None:
    start = Path(str(recipe.model_name_or_path)).expanduser()
    if start.is_dir() and start.resolve() == folder.resolve():
        raise UserError(f"output_dir: {folder} is model_name_or_path too, and would be overwritten; choose another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be made a folder ({error.strerror}); choose another") from error


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One process group per run folder: two would overwrite each other's checkpoints. For the first process."""
    with (folder / ".lock").open("w") as file:
        try:
            # Not flock: data workers would inherit it, and outlive a killed run for minutes.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"another process is training in {folder}; wait for it, or choose another output_dir"
            ) from error
        except OSError:
            logger.warning("%s cannot be locked (no locks on this file system); start no second run in it", folder)
        yield


def _claim(folder: Path, recipe: Recipe, stage: str, args: TrainingArguments, lock: ExitStack) -> RunResult | None:
    """Make the folder this recipe's, and nobody else's until `lock` closes; the result if the run in it is finished.

    Raises:
        UserError: another run is in it, or it holds one of another recipe and `resume` is not "never".
    """
    lock.enter_context(_exclusive(folder))
    frozen = folder / RECIPE
    if recipe.resume == "never" and frozen.exists():
        _set_aside(folder)
    if frozen.exists():
        state = _read_json(folder / RUN)
        changed = _changed_keys(Recipe.from_dict(_read_yaml(frozen)), recipe)
        if changed and (state.get("status") == "finished" or checkpoint.checkpoints(folder)):
            raise UserError(
                f"{folder} holds a run of another recipe, which differs in {'; '.join(changed)}. Put the old values "
                "back to resume it, choose another output_dir, or pass --resume never to set the old run aside and "
                "start afresh"
            )
        if state.get("status") == "finished":
            logger.info("%s is finished (%d steps): nothing to do", folder, state["global_step"])
            return RunResult(folder, state["global_step"], state["metrics"], already_finished=True)
    write_text(frozen, recipe.to_yaml())
    state = _read_json(folder / RUN)
    attempt = {"started": _now(), "processes": args.world_size}
    state = {
        "stage": stage,
        "status": "running",
        "started": state.get("started", attempt["started"]),
        "attempts": [*state.get("attempts", []), attempt],
    }
    write_json(folder / RUN, state)
    write_json(folder / ENVIRONMENT, _environment())
    return None


def _note_end(folder: Path, status: str, **facts: Any) -> None:
    """Write into run.json how this attempt ended; one that was killed has no end there."""
    state = _read_json(folder / RUN)
    attempts: list[dict[str, Any]] = state.get("attempts") or [{}]
    attempts[-1] |= {"ended": _now(), "status": status, **{k: v for k, v in facts.items() if k == "why"}}
    write_json(folder / RUN, state | {"status": status, "attempts": attempts, "ended": _now(), **facts})


def _changed_keys(earlier: Recipe, now: Recipe) -> list[str]:
    from mambalign.recipe import key_groups

    free = FREE_KEYS | {item.name for group in FREE_GROUPS for item in key_groups()[group]} | {"output_dir"}
    if now.state_passing == earlier.state_passing == "exact":
        free |= {"state_passing_chunk"}  # the gradients are the same, whatever it is
    before, after = earlier.to_dict(), now.to_dict()
    return [
        f"{key} ({before[key]!r}, now {after[key]!r})" for key in after if key not in free and before[key] != after[key]
    ]


def _set_aside(folder: Path) -> None:
    """Move an earlier run's files into `previous-N`: asked to start afresh, but nothing is lost."""
    target = next(path for n in itertools.count(1) if not (path := folder / f"previous-{n}").exists())
    target.mkdir()
    for entry in list(folder.iterdir()):
        if not entry.name.startswith("previous-") and entry.name != ".lock":
            os.replace(entry, target / entry.name)
    logger.info("the earlier run was moved to %s", target)


def _resume_point(folder: Path, recipe: Recipe) -> Path | None:
    if recipe.resume in ("auto", "never"):
        chosen = checkpoint.newest_complete(folder)
    else:
        chosen = Path(recipe.resume).expanduser()
        if not chosen.is_dir():
            raise UserError(f"resume: {recipe.resume!r} is neither auto, never nor a checkpoint folder")
        problem = checkpoint.fault(chosen)
        if problem:
            raise UserError(f"resume: {chosen} {problem}; --resume auto takes the newest complete one")
    if chosen and not (chosen / "scheduler.pt").exists():
        raise UserError(
            f"save_only_model: {chosen} holds no optimizer state, so the run cannot go on from there; --resume never "
            "sets it aside and starts afresh, or make the checkpoint the model_name_or_path of a new run"
        )
    return chosen


def _finish(trainer: PackedTrainer, folder: Path, recipe: Recipe, tokenizer: Any, metrics: dict[str, Any]) -> RunResult:
    first = trainer.is_world_process_zero()
    with sharding.whole(trainer.model, here=first):
        if first and trainer.adapters is not None:
            trainer.adapters.save(folder)
            tokenizer.save_pretrained(folder)
        elif first:
            save_model(trainer.accelerator.unwrap_model(trainer.model), folder, tokenizer=tokenizer, overwrite=True)
    if not first:
        return RunResult(folder, trainer.state.global_step, metrics)
    lines = [line for line in read_metrics(folder / METRICS) if "learning_rate" in line]
    summary = (lines[-1] if lines else {}) | metrics
    write_json(folder / files.LINEAGE, trainer.lineage)
    if lines:
        curves.draw([folder], folder / curves.CURVES)
    trainer.create_model_card()
    _note_end(folder, "finished", global_step=trainer.state.global_step, metrics=summary)
    card.push(folder, recipe)
    return RunResult(folder, trainer.state.global_step, summary)


def _write_facts(folder: Path, train: TokenizedData, evaluation: TokenizedData | None) -> None:
    facts = {"train": train, "eval": evaluation}
    write_json(
        folder / DATA,
        {name: {"report": data.report, "fingerprint": data.fingerprint} for name, data in facts.items() if data},
    )


def _environment() -> dict[str, Any]:
    names = ("mambalign", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "triton",
             "peft", "bitsandbytes")  # fmt: skip
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "packages": versions,
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load(path.read_text()))


# ------------------------------------------------------------------------------------------------- what goes into it


def training_arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    """transformers' arguments for a recipe; what transformers refuses becomes a `UserError` in its words."""
    supported = set(inspect.signature(TrainingArguments).parameters)
    values = recipe.training_arguments(supported=supported)
    for name in ("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision"):
        values.pop(name, None)  # `card.push` uploads whole, verified files; see there
    for name in ("fsdp", "fsdp_config"):
        values.pop(name, None)  # see `sharding.py`
    loggers = values.get("report_to", [])
    quiet = loggers in ("none", ["none"])
    values |= {
        "output_dir": str(folder),
        "report_to": loggers if quiet or "all" in loggers else sorted({*loggers, "tensorboard"}),
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        # transformers narrates every file it writes at "info": one level quieter than ours.
        "log_level": {"debug": "info", "info": "warning"}.get(recipe.log_level, recipe.log_level),
    }
    # A bar redrawn into a log file is megabytes of it; the log lines stay.
    values.setdefault("disable_tqdm", not sys.stderr.isatty())
    if recipe.greater_is_better is None and (recipe.metric_for_best_model or "").endswith("perplexity"):
        values["greater_is_better"] = False  # transformers would take the largest of all but losses
    if not torch.accelerator.is_available():
        values["dataloader_pin_memory"] = False  # nothing to pin for: every run would warn of it
    elif recipe.dataloader_pin_memory:
        values["accelerator_config"] = {"non_blocking": True}  # else each batch waits for the step before it
    if not (recipe.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        # Else DDP sorts its buckets anew after a start's first step, and sums of three processes depend on the order.
        values.setdefault("ddp_find_unused_parameters", True)
    sharding.wanted(recipe, processes=1)
    if recipe.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"deepspeed: {recipe.deepspeed} needs DeepSpeed: pip install deepspeed, or set fsdp: full_shard"
        )
    unknown = sorted(set(values) - supported)
    if unknown:
        raise UserError(f"the installed transformers does not know {', '.join(unknown)}; leave out or upgrade")
    with _as_user_error("transformers.TrainingArguments"):
        args = TrainingArguments(**values)
    with _as_user_error("optim"):
        optimizer_class, optimizer_options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = optimizer_class([torch.zeros(1, requires_grad=True)], **optimizer_options)
    if recipe.gradient_checkpointing is True:
        _check_checkpointing(recipe.gradient_checkpointing_kwargs or {})
    with _as_user_error(f"lr_scheduler_type {recipe.lr_scheduler_type}, lr_scheduler_kwargs"):
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    with _as_user_error("report_to"):
        for logger_class in get_reporting_integration_callbacks(args.report_to):
            logger_class()
    if args.n_gpu > 1:
        logger.warning(
            "training on one of %d GPUs; for all of them: torchrun --nproc-per-node %d -m mambalign ...",
            args.n_gpu, args.n_gpu,
        )  # fmt: skip
        args._n_gpu = 1  # else transformers wraps the model in DataParallel, which cannot cut a flat batch
    return args


def _check_checkpointing(given: dict[str, Any]) -> None:
    """Every key is torch's or the Trainer's: others go on to the layers, which take anything without a word."""
    known = {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"}
    known |= {"every_n_layers", "offload"}
    for name in given.keys() - known:
        choices = ", ".join(sorted(known))
        raise UserError(f"gradient_checkpointing_kwargs: {name} is unknown{nearest(name, known)} (there are {choices})")


@contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    """What is refused here, before any work is done, is something in the recipe: a `UserError` in the same words."""
    try:
        yield
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"{what}: {error}") from error


def load_start(recipe: Recipe, stage: str) -> tuple[Any, Any, dict[str, Any], Any]:
    """(model, tokenizer, facts, adapters or None) that the run starts from: chat tokens added, adapters attached."""
    path = str(recipe.model_name_or_path)
    tokenizer = load_tokenizer(
        recipe.tokenizer_name_or_path or path,
        revision=None if recipe.tokenizer_name_or_path else recipe.model_revision,
    )
    before = len(tokenizer)
    if stage == "cpt" and recipe.chat_template is None:
        set_pad_token(tokenizer)
    else:
        apply_template(tokenizer, recipe.chat_template)
        check_template(tokenizer)
    scored = stage == "reward" and holds_reward_model(path, recipe.model_revision)
    model, earlier = _load_weights(recipe, "reward" if scored else "lm")
    grown = add_tokens(model, tokenizer, new_ids=len(tokenizer) - before)
    if len(tokenizer) > before:
        logger.info("%d chat tokens added to the tokenizer, %d rows to the embedding", len(tokenizer) - before, grown)
    for config in filter(None, (model.config, getattr(model, "generation_config", None))):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    record = lineage.record(recipe, stage, model.config)
    facts = {
        "model": path,
        "revision": recipe.model_revision,
        "weights": weights_fingerprint(model),
        "trained_by": (record["from"] or {}).get("stage") or _read_json(Path(path).expanduser() / RUN).get("stage"),
        "lineage": record,
    }
    if stage == "reward" and not scored:
        logger.info("the reward head is new, %s has none: it starts at random, from seed %d", path, recipe.seed)
        model = with_reward_head(model, recipe.seed)
    model.set_backend(recipe.backend)
    model.set_selective_recomputation(recipe.gradient_checkpointing == "selective")
    model.set_cuda_graphs(recipe.allows_graphs)
    if not recipe.use_peft:
        return model, tokenizer, facts, None
    from mambalign.models.adapters import AdapterOptions, attach

    options = AdapterOptions.from_recipe(recipe)
    adapters = attach(model, options, seed=recipe.seed, base=record["base"], start=earlier)
    if len(tokenizer) > before:
        adapters.keep_new_rows(f"chat_template: {recipe.chat_template or 'the tokenizer'} adds tokens")
    return model, tokenizer, facts, adapters


def _load_weights(recipe: Recipe, head: Any) -> tuple[Any, Any]:
    """(model, the adapter frozen on it or None): a run of adapters on an adapter's folder starts from both."""
    path, dtype, revision = str(recipe.model_name_or_path), recipe.dtype or "float32", recipe.model_revision
    if not recipe.use_peft:
        return load_model(path, dtype=dtype, revision=revision, head=head), None
    from mambalign.models.adapters import quantisation

    config = quantisation(recipe)
    kwargs = {} if config is None else {"quantization_config": config}
    if files.is_adapter(files.resolve_folder(path, revision)):
        return lineage.load_adapter(path, dtype=dtype, revision=revision, **kwargs)
    return load_model(path, dtype=dtype, revision=revision, **kwargs), None


def load_data(recipe: Recipe, stage: str, tokenizer: Any) -> tuple[TokenizedData, TokenizedData | None]:
    """Tokenised training and evaluation rows; (.., None) where no split is for evaluation."""
    train = TOKENIZE[stage](load_mix(recipe, "train"), tokenizer, recipe)
    held_out: datasets.Dataset = load_mix(recipe, "test")
    if not len(held_out):
        if recipe.eval_strategy != "no":
            raise UserError(
                f"eval_strategy: {recipe.eval_strategy}, but none of dataset_splits {recipe.dataset_splits} is there "
                "to evaluate on; add a split with `test` in its name, or set eval_strategy: no"
            )
        return train, None
    return train, TOKENIZE[stage](held_out, tokenizer, recipe)


def _rows(recipe: Recipe, data: TokenizedData, kind: Any) -> PackedRows:
    return PackedRows(
        data.dataset,
        max_length=recipe.max_length,
        kind=kind,
        seed=recipe.seed,
        packing=recipe.packing,
        group_by_prompt=recipe.group_by_prompt,
        longer_alone=recipe.state_passing != "off",
    )


def _objective(stage: str, recipe: Recipe) -> Objective:
    if stage == "reward":
        return RewardObjective(recipe.center_rewards_coefficient)
    if stage != "dpo":
        mode = recipe.state_passing
        return SequenceObjective() if mode == "off" else StatePassing(mode == "exact", recipe.state_passing_chunk)
    options = PreferenceOptions(
        recipe.loss_type, recipe.beta, recipe.label_smoothing, recipe.simpo_gamma, recipe.rpo_alpha
    )
    return PreferenceObjective(options, {})


def _check_best_metric(recipe: Recipe, objective: Objective) -> None:
    name = (recipe.metric_for_best_model or "loss").removeprefix("eval_")
    if name not in objective.metrics:
        raise UserError(
            f"metric_for_best_model: {name} is not measured{nearest(name, objective.metrics)} "
            f"(there are {', '.join(objective.metrics)})"
        )


def _check_batches(rows: int, args: TrainingArguments) -> None:
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        raise UserError(
            f"dataloader_drop_last: {rows} training rows do not fill a batch of per_device_train_batch_size "
            f"{args.train_batch_size} x {args.world_size} device(s), and an incomplete one is dropped; lower the batch "
            "size or set it to false"
        )


def _reference(
    trainer: PackedTrainer,
    data: TokenizedData,
    split: str,
    recipe: Recipe,
    folder: Path,
    facts: dict[str, Any],
) -> torch.Tensor:
    """Reference log-probs of one split, from the initial weights: no checkpoint has been loaded yet."""
    pairs = PackedRows(data.dataset, max_length=None, kind="pairs", seed=0)
    bound = recipe.reference_batch_tokens or recipe.max_tokens_per_device
    bound = max(bound or recipe.per_device_train_batch_size * recipe.max_length, max(pairs.lengths()))
    precision = "bf16 autocast" if recipe.bf16 else "fp16 autocast" if recipe.fp16 else str(recipe.dtype)
    key = cache_key(weights=facts["weights"], data=data.fingerprint, precision=precision, backend=recipe.backend)
    return reference_logps(
        trainer.model,
        pairs,
        folder=folder / "reference",
        key=key,
        max_tokens=bound,
        device=trainer.args.device,
        autocast=trainer.accelerator.autocast,  # `train` has not wrapped the model in it yet
        preemption=trainer.preemption,
        description=f"reference log-probs ({split})",
    )


def _say_plan(trainer: PackedTrainer, rows: dict[str, PackedRows], recipe: Recipe, stage: str) -> None:
    """One line a person can check against the paper they follow."""
    args, train = trainer.args, rows["train"]
    count = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    what = "pairs" if stage in PAIR_STAGES else f"rows of {recipe.max_length} tokens, {train.fill:.1%} filled"
    logger.info(
        "%s: %d %s; %d a step (%d x %d accumulated x %d processes); %s tokens an epoch",
        stage, len(train), what, count, args.train_batch_size, args.gradient_accumulation_steps, args.world_size,
        f"{sum(train.lengths()):,}",
    )  # fmt: skip
    if recipe.state_passing != "off":
        logger.info("state_passing: %s", describe(recipe, train.example_lengths))
    if trainer.adapters is not None:
        logger.info("adapters:\n%s", trainer.adapters.table())
    if recipe.loss_type == "kto" and recipe.max_tokens_per_device and stage == "dpo":
        logger.warning(
            "max_tokens_per_device: kto takes its reference point from the pairs of one forward pass, so this bound "
            "changes the update; keep it so large that it rarely cuts a batch"
        )
