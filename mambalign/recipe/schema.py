"""Every key of a recipe, what it means and what it may be; and how a recipe is loaded."""

# ruff: noqa: RUF009 - `_key` and `_arg` only call dataclasses.field
from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from mambalign.recipe.legacy import rename_keys
from mambalign.recipe.splits import entry_splits, is_test_split
from mambalign.recipe.values import UserError, apply_override, coerce, read_recipe_map, seconds, split_overrides

logger = logging.getLogger("mambalign")

STAGES = ("cpt", "sft", "dpo", "reward")
Stage = Literal["cpt", "sft", "dpo", "reward"]
PAIR_STAGES = ("dpo", "reward")  # those that read chosen and rejected
LossType = Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "simpo", "orpo", "kto"]
Backend = Literal["auto", "cuda", "torch", "reference"]
Checkpointing = Literal["selective"]
Interval = Literal["no", "steps", "epoch"]
Schedule = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "cosine_with_min_lr", "polynomial",
    "inverse_sqrt", "reduce_lr_on_plateau", "warmup_stable_decay",
]  # fmt: skip

# What a key means when a recipe of this stage does not give it.
STAGE_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpt": {"truncation": "split", "assistant_only_loss": False},
    "sft": {},
    "dpo": {"learning_rate": 5e-7, "max_length": 1024},
    "reward": {"learning_rate": 1e-5, "max_length": 1024},
}
NO_REFERENCE = ("simpo", "orpo")


def _key(default: Any, group: str, help: str, trainer: bool = False) -> Any:
    """A recipe key. `trainer`: handed to `transformers.TrainingArguments` under the same name."""
    metadata = {"help": help, "group": group, "trainer": trainer}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _arg(default: Any, group: str, help: str) -> Any:
    return _key(default, group, help, trainer=True)


@dataclass
class Recipe:
    """Every key of a recipe. A value is checked when the recipe is made; `UserError` names the key that is wrong.

    `notes` (not a key) holds one sentence for every key of an earlier recipe that was renamed or ignored.
    """

    stage: Stage | None = _key(
        None, "model", "What this recipe is for: cpt, sft, dpo or reward. Optional; the command's verb says it too."
    )
    model_name_or_path: str | None = _key(
        None,
        "model",
        "Checkpoint to start from: a folder or hub id, Hugging Face or original state-spaces layout. dpo, reward: the "
        "SFT run's output_dir.",
    )
    model_revision: str | None = _key(None, "model", "Branch, tag or commit of the model on the hub.")
    tokenizer_name_or_path: str | None = _key(
        None, "model", "Tokenizer, when it is not beside the model (original checkpoints: EleutherAI/gpt-neox-20b)."
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = _key(
        None,
        "model",
        "Type of the stored weights; null is float32 master weights, which `bf16: true` computes on in bfloat16.",
    )
    bf16: bool = _arg(False, "model", "Compute in bfloat16 (autocast) on the weights of `dtype`.")
    fp16: bool = _arg(
        False, "model", "Compute in float16 with loss scaling. Mamba overflows easily in it; prefer bf16."
    )
    backend: Backend = _key(
        "auto", "model", "Kernels of every op. `mambalign doctor` shows what auto picks on this machine and why."
    )
    chat_template: str | None = _key(
        None, "model", "zephyr, chatml, a Jinja text or file with {% generation %} marks; null is the tokenizer's own."
    )

    dataset_mixer: dict[str, Any] = _key(
        {},
        "data",
        "Datasets: {hub id, folder or jsonl/parquet/arrow file: fraction of its training rows, or a map with "
        "fraction or weight, max_samples, split, config, columns}.",
    )
    dataset_splits: list[str] = _key(
        ["train", "test"],
        "data",
        "Splits to read. One named test, validation, eval, dev or held out is only ever evaluated.",
    )
    dataset_configs: list[str] | dict[str, Any] | None = _key(
        None, "data", "Configuration names of the datasets, in the order of dataset_mixer, or a map of dataset to name."
    )
    dataset_columns: dict[str, Any] = _key(
        {},
        "data",
        "Names of columns: {messages|prompt|completion|chosen|rejected|text: the dataset's name for it}; reward: also "
        "margin, a number, by how much chosen is better.",
    )
    dataset_seed: int | None = _key(None, "data", "Seed of mixing and sub-sampling; null is `data_seed`, then `seed`.")
    text_column: str = _key("text", "data", "Column of plain text (cpt, schema text).")
    schema: Literal["auto", "messages", "prompt_completion", "text", "preference"] = _key(
        "auto", "data", "Form of the rows; auto looks at the columns."
    )
    system_prompt: str | None = _key(None, "data", "System message put before conversations that have none.")
    auto_insert_empty_system_msg: bool = _key(
        False,
        "data",
        "Put an empty system message before conversations that have none (the handbook's zephyr models did).",
    )
    max_length: int = _key(
        2048,
        "data",
        "Tokens of a packed row (cpt, sft) or the longest prompt + completion (dpo, reward: 1024 when not given).",
    )
    max_prompt_length: int | None = _key(
        None,
        "data",
        "dpo, reward: a pair over max_length has its prompt cut to this first, keeping the end, then its completions, "
        "keeping the start; null is half of max_length.",
    )
    truncation: Literal["keep_start", "keep_end", "drop", "split"] = _key(
        "keep_start",
        "data",
        "What happens to an example longer than max_length; counted and reported. split (cpt's default): cut into "
        "several. dpo, reward: drop, or else a pair is cut as max_prompt_length says, be it keep_start or keep_end.",
    )
    packing: bool = _key(True, "data", "Lay several examples into a row of max_length; their states never mix.")
    assistant_only_loss: bool = _key(True, "data", "Train on the assistant's turns only (cpt: false).")
    preprocessing_num_workers: int | None = _key(
        None, "data", "Processes for tokenizing; null is one. The result does not depend on it."
    )
    max_train_samples: int | None = _key(None, "data", "Use at most this many training rows.")
    max_eval_samples: int | None = _key(None, "data", "Use at most this many rows of each evaluation split.")
    group_by_prompt: bool = _key(
        False, "data", "dpo, reward: put pairs of the same prompt in the same batch, so that it is computed once."
    )
    max_tokens_per_device: int | None = _key(
        None, "data", "Split a device batch into micro-batches of at most this many tokens; the update stays the same."
    )
    state_passing: Literal["off", "exact", "truncated"] = _key(
        "off",
        "data",
        "cpt, sft: examples longer than max_length are not cut (whatever truncation says) but computed in chunks that "
        "hand on their state. exact: the gradients of the whole, for a second forward pass; truncated: they end at a "
        "chunk's edge.",
    )
    state_passing_chunk: int = _key(8192, "data", "state_passing: tokens of a chunk, so of one forward pass.")

    loss_type: LossType = _key(
        "sigmoid",
        "objective",
        "Preference loss: sigmoid (DPO), ipo, hinge, robust, apo_zero, apo_down, simpo, orpo, kto.",
    )
    beta: float = _key(
        0.1,
        "objective",
        "Strength of the pull towards the reference (inverse temperature of the implicit reward); ipo: tau, orpo: "
        "lambda.",
    )
    label_smoothing: float = _key(
        0.0, "objective", "Assumed rate of flipped preferences (sigmoid, robust), 0 to below 0.5."
    )
    rpo_alpha: float | None = _key(
        None, "objective", "Weight of an added log-likelihood term on the chosen completions."
    )
    simpo_gamma: float = _key(0.5, "objective", "simpo: target margin between the length-normalised rewards.")
    center_rewards_coefficient: float | None = _key(
        None,
        "objective",
        "reward: weight of (reward of chosen + reward of rejected)^2, which keeps rewards around 0; 0.01 is usual.",
    )
    reference_batch_tokens: int | None = _key(
        None, "objective", "Tokens per forward of the reference pass; null is the training batch's size."
    )

    use_peft: bool = _key(False, "adapters", "Train LoRA adapters, and what lora_modules_to_save names, alone.")
    lora_r: int = _key(16, "adapters", "Rank of the adapters.")
    lora_alpha: float = _key(16, "adapters", "Scale of the adapters: alpha / r.")
    lora_dropout: float = _key(0.05, "adapters", "Dropout on the adapters' input.")
    lora_bias: Literal["none", "all", "lora_only"] = _key("none", "adapters", "Which biases train along.")
    lora_target_modules: list[str] | None = _key(
        None,
        "adapters",
        "Modules that get an adapter, by the end of their names: in_proj, x_proj, dt_proj, out_proj, embeddings, "
        "lm_head; all-linear is every projection; null is in_proj and out_proj.",
    )
    lora_modules_to_save: list[str] | None = _key(
        None,
        "adapters",
        "Modules and parameters trained in full beside the adapters: A_log, D, dt_proj.bias, conv1d, norm, embeddings.",
    )
    use_dora: bool = _key(False, "adapters", "DoRA: train the magnitude of every weight's rows apart from the adapter.")
    use_rslora: bool = _key(False, "adapters", "Scale the adapters by alpha / sqrt(r) instead.")
    load_in_4bit: bool = _key(
        False, "adapters", "QLoRA: keep the frozen in_proj and out_proj in 4 bits, all else as dtype says."
    )
    load_in_8bit: bool = _key(False, "adapters", "The same in 8 bits.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _key("nf4", "adapters", "4-bit number format.")
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] | None = _key(
        None, "adapters", "Type of the tensors that hold the 4-bit numbers; null is uint8."
    )
    use_bnb_nested_quant: bool = _key(False, "adapters", "Quantise the quantisation constants too.")

    output_dir: str | None = _arg(
        None,
        "training",
        "Run folder: frozen recipe, metrics, checkpoints and the finished model. The same command again resumes in it.",
    )
    resume: str = _key(
        "auto",
        "training",
        "auto: continue from the newest whole checkpoint in output_dir; never: start afresh; or a checkpoint's folder.",
    )
    learning_rate: float = _arg(2e-5, "training", "Peak learning rate (dpo: 5e-7 when not given, reward: 1e-5).")
    lr_scheduler_type: Schedule = _arg("cosine", "training", "Schedule after the warmup.")
    lr_scheduler_kwargs: dict[str, Any] | None = _arg(None, "training", "Extra arguments of the schedule.")
    warmup_ratio: float | None = _key(
        None, "training", "Warmup as a share of all steps; 0.1 when neither it nor warmup_steps is given."
    )
    warmup_steps: float | None = _key(None, "training", "Warmup steps; below 1 a share of all steps.")
    num_train_epochs: float = _arg(1.0, "training", "Passes over the training rows.")
    max_steps: int = _arg(-1, "training", "Stop after this many steps; -1: num_train_epochs decides.")
    per_device_train_batch_size: int = _arg(
        8,
        "training",
        "cpt, sft: packed rows of max_length; dpo, reward: pairs; on each device, each accumulation step.",
    )
    per_device_eval_batch_size: int = _arg(8, "training", "The same in evaluation.")
    gradient_accumulation_steps: int | None = _key(
        None, "training", "Device batches per optimizer step; null is 1, or what global_batch_size asks for."
    )
    global_batch_size: int | None = _key(
        None,
        "training",
        "Rows (or pairs) per optimizer step over all devices; gradient_accumulation_steps follows from it, for any "
        "number of devices.",
    )
    gradient_checkpointing: bool | Checkpointing = _key(
        False,
        "training",
        "true: keep only each layer's input and compute the rest again in the backward pass (an eighth of the "
        "memory, a third more time). selective: keep what large matrix products and the scan made, and compute norms, "
        "convolutions and step sizes again (two thirds of the memory, a few percent more time). Same gradients.",
    )
    gradient_checkpointing_kwargs: dict[str, Any] | None = _key(
        None, "training", "Arguments of gradient_checkpointing: true; use_reentrant is false unless given."
    )
    cuda_graphs: bool = _key(
        True,
        "training",
        "Start the layers' kernels together instead of one after the other: a small model no longer waits for the "
        "host. On NVIDIA GPUs, for Mamba-1 and Falcon-Mamba; on several where gradients take no more than 2 GiB, or 64 "
        "MiB over a network. Where it cannot be, the log says why.",
    )
    optim: str = _arg("adamw_torch", "training", "Optimizer, by its name in transformers.")
    optim_args: str | None = _arg(None, "training", "Extra arguments of the optimizer: a=1,b=2.")
    adam_beta1: float = _arg(0.9, "training", "AdamW's first decay.")
    adam_beta2: float = _arg(0.999, "training", "AdamW's second decay.")
    adam_epsilon: float = _arg(1e-8, "training", "AdamW's epsilon.")
    weight_decay: float = _arg(0.0, "training", "Weight decay; never on norms, biases, A_log and D.")
    max_grad_norm: float = _arg(1.0, "training", "Clip the gradient's norm to this.")
    seed: int = _arg(42, "training", "Seed of everything random.")
    data_seed: int | None = _arg(None, "training", "Seed of the order of the data; null is `seed`.")
    full_determinism: bool = _arg(False, "training", "Only deterministic kernels; slower.")
    use_cpu: bool = _arg(False, "training", "Train on the CPU although there is an accelerator.")
    tf32: bool | None = _arg(
        None, "training", "TensorFloat-32 matrix products on NVIDIA GPUs; null is torch's default."
    )
    torch_empty_cache_steps: int | None = _arg(None, "training", "Empty the allocator's cache every so many steps.")
    dataloader_num_workers: int = _arg(0, "training", "Processes that prepare batches.")
    dataloader_pin_memory: bool = _arg(True, "training", "Page-locked batches.")
    dataloader_drop_last: bool = _arg(False, "training", "Drop an incomplete last batch.")
    dataloader_persistent_workers: bool = _arg(False, "training", "Keep the data processes between epochs.")
    dataloader_prefetch_factor: int | None = _arg(None, "training", "Batches each data process prepares ahead.")

    do_eval: bool = _arg(
        True, "evaluation", "Evaluate the test splits after training, and during it as eval_strategy says."
    )
    eval_strategy: Interval = _arg("no", "evaluation", "When to evaluate during training: no, steps, epoch.")
    eval_steps: float | None = _arg(
        None, "evaluation", "Steps between evaluations; below 1 a share of all steps; null is logging_steps."
    )
    eval_delay: float = _arg(0.0, "evaluation", "Steps or epochs before the first evaluation.")
    eval_on_start: bool = _arg(False, "evaluation", "Evaluate before the first step.")
    load_best_model_at_end: bool = _arg(False, "evaluation", "Export the best checkpoint instead of the last.")
    metric_for_best_model: str | None = _arg(None, "evaluation", "Metric that says which is best; null is the loss.")
    greater_is_better: bool | None = _arg(None, "evaluation", "Direction of that metric.")

    logging_steps: float = _arg(10.0, "logging", "Steps between log lines; below 1 a share of all steps.")
    logging_strategy: Interval = _arg("steps", "logging", "When to log: no, steps, epoch.")
    logging_first_step: bool = _arg(True, "logging", "Log the first step too.")
    log_level: Literal["debug", "info", "warning", "error", "critical", "passive"] = _arg(
        "info", "logging", "How much the libraries say."
    )
    disable_tqdm: bool | None = _arg(
        None, "logging", "No progress bar; null shows one on a terminal and spares a log file."
    )
    report_to: list[str] = _arg(
        ["tensorboard"], "logging", "Loggers beside metrics.jsonl: tensorboard, wandb, ...; none for no other."
    )
    run_name: str | None = _arg(None, "logging", "Name of the run in the loggers; null is output_dir.")

    save_strategy: Interval = _arg("steps", "saving", "When to save a checkpoint: no, steps, epoch.")
    save_steps: float = _arg(500.0, "saving", "Steps between checkpoints; below 1 a share of all steps.")
    save_total_limit: int | None = _arg(
        2, "saving", "Checkpoints to keep; with 2, one that a crash tore has another before it."
    )
    save_only_model: bool = _arg(False, "saving", "Save no optimizer state: smaller, but such a run cannot resume.")
    save_minutes: float | None = _key(
        None, "saving", "Also save when so many minutes of work would be lost, whatever save_steps says."
    )
    max_runtime: str | None = _key(
        None, "saving", "Stop in time with a checkpoint and exit code 85: 4h, 90m, 1h30m, 1-00:00:00 or 04:00:00."
    )
    push_to_hub: bool = _arg(False, "saving", "Upload the finished model and its card.")
    hub_model_id: str | None = _arg(
        None, "saving", "Repository to push to; null is output_dir's name under your account."
    )
    hub_strategy: Literal["end", "every_save"] = _arg(
        "every_save", "saving", "When to push: the finished run only, or the model of every checkpoint too."
    )
    hub_private_repo: bool | None = _arg(None, "saving", "Make the repository private.")
    hub_revision: str | None = _arg(None, "saving", "Branch to push to.")

    fsdp: str | None = _arg(None, "distributed", "full_shard (FSDP 2): weights and optimizer in shards.")
    fsdp_config: dict[str, Any] | None = _arg(None, "distributed", "fsdp_version: 2, if anything.")
    deepspeed: str | None = _arg(None, "distributed", "DeepSpeed config file.")
    ddp_backend: str | None = _arg(None, "distributed", "nccl, gloo, ...")
    ddp_find_unused_parameters: bool | None = _arg(None, "distributed", "As in DistributedDataParallel.")
    ddp_bucket_cap_mb: int | None = _arg(None, "distributed", "As in DistributedDataParallel.")
    ddp_timeout: int = _arg(1800, "distributed", "Seconds a collective may wait.")

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        hints = key_types()
        for item in fields(self):
            setattr(self, item.name, coerce(item.name, getattr(self, item.name), hints[item.name]))
        _check_values(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, stage: str | None = None) -> Recipe:
        """A recipe from a map of keys, today's or an earlier handbook's, with the defaults of its stage.

        Raises:
            UserError: unknown key, wrong type, values that cannot go together, or a required key of the stage missing.
        """
        renamed, notes = rename_keys(values, key_types())
        written = renamed.get("stage")
        if stage is not None and stage not in STAGES:
            raise UserError(f"stage must be one of {', '.join(STAGES)}, not {stage!r}")
        if stage and written and written != stage:
            raise UserError(f"this is a recipe for {written} (its key `stage` says so), not for {stage}")
        renamed["stage"] = coerce("stage", stage or written, key_types()["stage"])
        recipe = cls(**(STAGE_DEFAULTS.get(renamed["stage"] or "", {}) | renamed))
        recipe.notes = notes
        if recipe.stage:
            recipe.require(recipe.stage)
        return recipe

    def require(self, stage: str) -> None:
        """`UserError` unless the keys that a run of `stage` cannot do without are given."""
        for name in ("model_name_or_path", "dataset_mixer", "output_dir"):
            if not getattr(self, name):
                raise UserError(f"{name} is missing: {key_help(name)}")
        pairs = stage in PAIR_STAGES
        if pairs and self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise UserError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length ({self.max_length}): "
                "the completion needs room"
            )
        if pairs and self.state_passing != "off":
            raise UserError(
                f"state_passing: {self.state_passing} is for cpt and sft, not for pairs, which fork from their prompt; "
                "set it to off, and bound memory by max_tokens_per_device or gradient_checkpointing"
            )
        if pairs and self.truncation == "split":
            raise UserError("truncation: split cuts plain text; a preference pair can be keep_start, keep_end or drop")
        self._require_objective(stage)
        own = [split for item in self.dataset_mixer.items() for split in entry_splits(*item)]
        if not self.train_splits and all(map(is_test_split, own)):
            raise UserError(f"dataset_splits {self.dataset_splits} name only test splits; nothing is left to train on")

    def _require_objective(self, stage: str) -> None:
        if stage == "reward":
            if self.use_peft:
                raise UserError(
                    "use_peft: a reward model trains in full; start it from `mambalign merge` of an adapter"
                )
            for name in ("loss_type", "label_smoothing", "rpo_alpha"):
                if getattr(self, name) != getattr(Recipe, name):
                    raise UserError(
                        f"{name}: {getattr(self, name)!r} belongs to dpo; a reward model is trained with the "
                        "Bradley-Terry loss, so leave it out"
                    )
        elif self.center_rewards_coefficient is not None:
            raise UserError(f"center_rewards_coefficient is for reward models; {stage} has no use for it, leave it out")

    @property
    def train_splits(self) -> list[str]:
        """Splits that are trained on: those whose name does not say test, evaluation, validation or held out."""
        return [s for s in self.dataset_splits if not is_test_split(s)]

    @property
    def test_splits(self) -> list[str]:
        """Splits that are only ever evaluated, by their name."""
        return [s for s in self.dataset_splits if is_test_split(s)]

    @property
    def allows_graphs(self) -> bool:
        """Whether nothing that is known before the model forbids CUDA graphs.

        DeepSpeed's hooks on gradients nobody sees; states that are handed on are not in a graph.
        """
        return self.cuda_graphs and not self.deepspeed and self.state_passing == "off"

    def accumulation_steps(self, world_size: int = 1) -> int:
        """Device batches per optimizer step with `world_size` devices.

        Raises:
            UserError: global_batch_size cannot be reached exactly, or contradicts gradient_accumulation_steps.
        """
        given, wanted = self.gradient_accumulation_steps, self.global_batch_size
        if wanted is None:
            return given or 1
        per_step = self.per_device_train_batch_size * world_size
        arithmetic = f"per_device_train_batch_size {self.per_device_train_batch_size} x {world_size} device(s)"
        if wanted % per_step:
            raise UserError(f"global_batch_size {wanted} is not a multiple of {arithmetic} = {per_step}")
        if given is not None and given != wanted // per_step:
            raise UserError(
                f"global_batch_size {wanted} and gradient_accumulation_steps {given} disagree: "
                f"{arithmetic} x {given} = {per_step * given}; remove one of them (--global_batch_size null)"
            )
        return wanted // per_step

    def training_arguments(self, world_size: int | None = None, supported: Collection[str] = ()) -> dict[str, Any]:
        """What is handed to `transformers.TrainingArguments`, good for every 5.x release.

        Args:
            world_size: training processes; None reads WORLD_SIZE, which every launcher sets.
            supported: names the installed `TrainingArguments` takes; lets newer names be used where old ones warn.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["trainer"]}
        values = {name: value for name, value in values.items() if value is not None}
        # transformers 5 has no warmup_ratio: warmup_steps below 1 is the share. Of the two, at most one is not 0.
        given = [value for value in (self.warmup_steps, self.warmup_ratio) if value is not None]
        values["warmup_steps"] = max(given, default=0.1)
        processes = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
        values["gradient_accumulation_steps"] = self.accumulation_steps(processes)
        values["report_to"] = self.report_to or "none"
        if self.gradient_checkpointing is True:  # selective is the model's own
            prefix = "activation" if "activation_checkpointing" in supported else "gradient"
            values[f"{prefix}_checkpointing"] = True
            if self.gradient_checkpointing_kwargs:
                kwargs = {"use_reentrant": False} | self.gradient_checkpointing_kwargs
                values[f"{prefix}_checkpointing_kwargs"] = kwargs
        return values

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value; `Recipe.from_dict` gives an equal recipe back."""
        return asdict(self)

    def to_yaml(self) -> str:
        """The whole recipe, defaults included and grouped, as YAML that loads to an equal recipe."""
        parts = []
        for group, items in key_groups().items():
            values = {item.name: getattr(self, item.name) for item in items}
            parts.append(f"# {group}\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120))
        return "\n".join(parts)


def _check_values(recipe: Recipe) -> None:
    """Ranges and pairs of keys that cannot work in any stage."""
    if recipe.max_runtime is not None:
        seconds("max_runtime", recipe.max_runtime)

    def refuse(key: str, why: str) -> None:
        raise UserError(f"{key} is {getattr(recipe, key)!r}: {why}")

    positive = (
        "max_length", "max_prompt_length", "max_tokens_per_device", "beta", "learning_rate", "num_train_epochs",
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "global_batch_size",
        "max_train_samples", "max_eval_samples", "preprocessing_num_workers", "reference_batch_tokens", "lora_r",
        "lora_alpha", "logging_steps", "save_steps", "eval_steps", "save_total_limit", "save_minutes",
        "state_passing_chunk",
    )  # fmt: skip
    for key in positive:
        value = getattr(recipe, key)
        if value is not None and value <= 0:
            refuse(key, "it must be above 0")
    not_negative = (
        "weight_decay", "max_grad_norm", "warmup_steps", "rpo_alpha", "simpo_gamma", "center_rewards_coefficient",
        "dataloader_num_workers",
    )  # fmt: skip
    for key in not_negative:
        value = getattr(recipe, key)
        if value is not None and value < 0:
            refuse(key, "it must not be negative")
    for key in ("seed", "data_seed", "dataset_seed"):
        value = getattr(recipe, key)
        if value is not None and not 0 <= value < 2**32:
            refuse(key, "it must be from 0 to 4294967295")
    if not 0 <= recipe.label_smoothing < 0.5:
        refuse("label_smoothing", "it is a rate of flipped labels from 0 to below 0.5")
    if recipe.label_smoothing and recipe.loss_type not in ("sigmoid", "robust"):
        refuse("label_smoothing", f"loss_type {recipe.loss_type} has none; only sigmoid and robust do")
    if recipe.warmup_ratio is not None and not 0 <= recipe.warmup_ratio < 1:
        refuse("warmup_ratio", "it is a share of all steps from 0 to below 1; write a number of steps as warmup_steps")
    if recipe.warmup_ratio and recipe.warmup_steps:
        refuse("warmup_ratio", f"warmup_steps ({recipe.warmup_steps:g}) is given too; keep one of them")
    if recipe.max_steps == 0 or recipe.max_steps < -1:
        refuse("max_steps", "it is a number of steps, or -1 to let num_train_epochs decide")
    if recipe.state_passing != "off" and recipe.max_tokens_per_device:
        refuse("max_tokens_per_device", "with state_passing, state_passing_chunk is the bound; leave this out")
    if recipe.state_passing != "off" and recipe.deepspeed:
        refuse("state_passing", "it does not go together with deepspeed; shard by fsdp: full_shard, or set it to off")
    if recipe.bf16 and recipe.fp16:
        refuse("fp16", "bf16 is on too; keep bf16")
    if recipe.load_in_4bit and recipe.load_in_8bit:
        refuse("load_in_8bit", "load_in_4bit is on too; keep one of them")
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(recipe, key) and not recipe.use_peft:
            refuse(key, "quantised weights cannot be trained; set use_peft: true to train adapters on them")
    if not 0 <= recipe.lora_dropout < 1:
        refuse("lora_dropout", "it is a share from 0 to below 1")
    if isinstance(recipe.dataset_configs, list) and len(recipe.dataset_configs) != len(recipe.dataset_mixer):
        refuse("dataset_configs", f"it names one for each of the {len(recipe.dataset_mixer)} datasets of dataset_mixer")
    for name, share in recipe.dataset_mixer.items():
        if not isinstance(share, dict) and (isinstance(share, bool) or not isinstance(share, int | float) or share < 0):
            raise UserError(f"dataset_mixer: {name!r} has {share!r}; it must be a fraction of its rows, or a map")
    if recipe.dataloader_persistent_workers and not recipe.dataloader_num_workers:
        refuse("dataloader_persistent_workers", "there are none to keep; set dataloader_num_workers above 0")
    if recipe.load_best_model_at_end and recipe.eval_strategy == "no":
        refuse("load_best_model_at_end", "nothing is evaluated during training; set eval_strategy: steps or epoch")


@cache
def key_types() -> dict[str, Any]:
    """Name -> type of every key."""
    hints = get_type_hints(Recipe)
    return {item.name: hints[item.name] for item in fields(Recipe)}


@cache
def key_groups() -> dict[str, list[Field[Any]]]:
    """Group -> its keys, in the order of `Recipe`."""
    groups: dict[str, list[Field[Any]]] = {}
    for item in fields(Recipe):
        groups.setdefault(item.metadata["group"], []).append(item)
    return groups


def key_help(name: str) -> str:
    """The help text of a key."""
    return str(next(item.metadata["help"] for item in fields(Recipe) if item.name == name))


def key_default(item: Field[Any]) -> Any:
    """The default value of a key."""
    return item.default_factory() if item.default_factory is not MISSING else item.default


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, stage: str | None = None) -> Recipe:
    """Read a recipe, put `--key value` overrides over it, check it.

    Args:
        path: YAML file; its `extends` files (relative to it) are read first, key by key the later one wins.
        overrides: words of a command line: `--learning_rate 1e-5`, `--packing=false`, `--push_to_hub`,
            `--dataset_splits train_sft,test_sft`, `--dataset_mixer.my/set=0.5`.
        stage: one of `STAGES`; brings the stage's defaults and its required keys. None: as the recipe says.

    Every key of an earlier handbook that was renamed or has no meaning here is said once on the logger "mambalign".
    """
    values, notes = rename_keys(read_recipe_map(Path(path).expanduser()), key_types())
    extra: dict[str, Any] = {}
    for name, words in split_overrides(overrides):
        key = name.partition(".")[0]
        if "." in name and key not in extra and key in values:
            extra[key] = values[key]
        apply_override(extra, name, words, key_types(), key_help)
    extra, more = rename_keys(extra, key_types())
    recipe = Recipe.from_dict(values | extra, stage=stage)
    recipe.notes = list(dict.fromkeys(notes + more))
    for note in recipe.notes:
        logger.warning("%s: %s", path, note)
    return recipe
