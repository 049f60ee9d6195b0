"""`mambalign check RECIPE`: what a run would find out in its first hour, in a minute and without training."""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mambalign.check.memory import estimate, tokens_per_forward
from mambalign.check.mistakes import Finding, known_mistakes
from mambalign.check.plan import Rows, described, plan, propose, step_rows, words
from mambalign.check.shapes import ModelShape
from mambalign.check.speed import Card, card_here, card_named
from mambalign.recipe import PAIR_STAGES, STAGES, Recipe, UserError, load_recipe, nearest

SAMPLE = 1000
BITSANDBYTES = "pip install 'mambalign[quantization]'"
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass
class CheckReport:
    """What `check` found. `sections` holds plain numbers and texts by heading, in the order they are shown."""

    path: str
    stage: str | None = None
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: Rows | None = None  # of the training data, where they could be read

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings if f.level == "error"]

    @property
    def usable(self) -> bool:
        """No error was found; there may be warnings."""
        return not self.errors

    def to_dict(self) -> dict[str, Any]:
        findings = [{"level": f.level, "key": f.key, "message": f.message} for f in self.findings]
        head = {"recipe": self.path, "stage": self.stage, "usable": self.usable}
        return head | {"findings": findings, "notes": self.notes, **self.sections}

    def warn(self, key: str, message: str) -> None:
        self.findings.append(Finding("warning", key, message))

    def fail(self, key: str, message: str) -> None:
        self.findings.append(Finding("error", key, message))

    @contextmanager
    def step(self, key: str) -> Iterator[None]:
        """A user's mistake inside becomes an error of the report, once; the other steps still run."""
        try:
            yield
        except (UserError, OSError) as error:
            message = str(error).removeprefix(f"{key}: ")
            # A dataset that is not there is met by its training and by its evaluation rows.
            if not any(message.endswith(f.message) for f in self.errors):
                self.fail(key, message)


def check(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    stage: str | None = None,
    devices: int = 1,
    full: bool = False,
    card: str | None = None,
    gpus: int | None = None,
) -> CheckReport:
    """Check a recipe as the run would read it.

    Args:
        path, overrides: as in `load_recipe`.
        stage: what it is for; None: its key `stage`, or the folder it lies in (`recipes/<model>/<stage>/`).
        devices: how many devices the run will have, for the arithmetic.
        full: tokenise every row instead of a random `SAMPLE` of each kind of split.
        card: plan memory and time for this card (see `speed.card_named`), and propose what suits it; None: for the GPU
            of this machine, if there is one.
        gpus: how many of them a proposal may take; None: as few as it takes.
    """
    report = CheckReport(str(path))
    try:
        stage = stage or _stage_of(path, overrides)
        report.stage = stage
        recipe = load_recipe(path, overrides, stage=stage)
    except (UserError, OSError) as error:
        report.fail("recipe", str(error))
        return report
    report.notes = recipe.notes
    shape = None
    with report.step("model_name_or_path"):
        shape = _model(report, recipe, stage, devices, on_card=card is not None)
    with report.step("load_in_4bit"):
        _bitsandbytes(recipe)
    with report.step("recipe"):
        _arguments(recipe)
    with report.step("backend"):
        report.sections["backends"] = _backends(recipe, shape)
    report.findings += known_mistakes(recipe, stage)
    tokenizer = None
    with report.step("chat_template"):
        tokenizer = _tokenizer(report, recipe, stage, shape)
    packed_rows = None
    with report.step("dataset_mixer"):
        packed_rows = _data(report, recipe, stage, tokenizer, "train", full)
    with report.step("dataset_splits"):
        _data(report, recipe, stage, tokenizer, "test", full)
    with report.step("global_batch_size"):
        _arithmetic(report, recipe, stage, packed_rows, devices)
    with report.step("output_dir"):
        _output(report, recipe, shape)
    with report.step("card"):
        target = _card(recipe, card)
        if target is not None and shape is not None:
            _plan(report, recipe, stage, shape, target, devices, gpus)
    return report


def _stage_of(path: str | Path, overrides: Sequence[str]) -> str:
    written = load_recipe(path, overrides).stage
    folder = Path(path).resolve().parent.name
    if written or folder in STAGES:
        return written or folder
    other = ", ".join(name for name in STAGES if name != "sft")
    raise UserError(f"{path} does not say what it is for: add `stage: sft` (or {other}) to it, or give --stage")


# --- model -----------------------------------------------------------------------------------------------------------


def _model(report: CheckReport, recipe: Recipe, stage: str, devices: int, on_card: bool) -> ModelShape:
    """Reads config.json only; weights are neither downloaded nor opened. `on_card`: not for this machine."""
    from mambalign.models import files

    name = recipe.model_name_or_path
    assert name is not None
    if files.is_local(name):
        folder = files.resolve_folder(name)
        if files.is_adapter(folder):
            base = str(files.read_json(folder / files.ADAPTER_CONFIG).get("base_model_name_or_path"))
            recipe = replace(recipe, model_name_or_path=base, model_revision=None)
            return _model(report, recipe, stage, devices, on_card)
        config = files.read_json(folder / files.CONFIG)
        with report.step("model_name_or_path"):
            files.tensor_specs(files.weight_files(folder))
    else:
        fetched = files.fetch(name, files.CONFIG, recipe.model_revision, {})
        if fetched is None:
            raise UserError(f"{name} is neither a folder here nor a hub model with a {files.CONFIG}")
        config = files.read_json(fetched)
    shape = ModelShape.from_config(config)
    if stage == "reward":
        shape = replace(shape, tied=True)  # the language head goes
    _check_head(report, config, name, stage)
    if recipe.use_peft:
        _check_adapted(report, recipe, shape)
    shape = replace(shape, kernels=on_card or _runs_kernels(recipe, shape))
    parts = estimate(shape, recipe, stage, devices)
    report.sections["model"] = {
        "name": name,
        "parameters": shape.parameters,
        "layers": shape.layers,
        "hidden_size": shape.hidden,
        "vocabulary_rows": shape.vocab,
    }
    report.sections["memory_gb"] = {part: _gb(size) for part, size in parts.items() if size or part == "head"}
    report.sections["memory_gb"]["tokens_per_forward"] = tokens_per_forward(recipe, stage)
    available = None if on_card else _device_memory(recipe)
    if available is not None:
        report.sections["memory_gb"]["available"] = _gb(available)
        needed = parts.get("device", parts["total"])
        if needed > available:
            report.warn(
                "per_device_train_batch_size",
                f"the run is estimated at {needed / 1e9:.1f} GB and the device has {available / 1e9:.1f} GB; "
                "lower it, set max_tokens_per_device, or gradient_checkpointing: selective or true",
            )
    return shape


def _check_head(report: CheckReport, config: dict[str, Any], name: str, stage: str) -> None:
    from mambalign.models.reward import is_reward_config

    if stage == "reward":
        is_new = not is_reward_config(config)
        report.sections["reward_head"] = {"start": "new, from the seed" if is_new else f"the trained one of {name}"}
    elif is_reward_config(config):
        report.fail("model_name_or_path", f"{name} is a reward model: it scores answers and cannot be trained to write")


def _check_adapted(report: CheckReport, recipe: Recipe, shape: ModelShape) -> None:
    """Names of modules and parameters that no model of this family has; a run finds out when the weights are loaded."""
    of_mamba_1 = {"x_proj", "dt_proj"}
    first = shape.scan == ModelShape.scan
    parts = {"backbone", "layers", "mixer", "embeddings", "lm_head", "norm", "norm_f", "in_proj", "out_proj", "conv1d"}
    parts |= {"A_log", "D", "weight", "bias"} | (of_mamba_1 if first else {"dt_bias"})
    for name in recipe.lora_target_modules or ():
        if not first and name.split(".")[-1] in of_mamba_1:
            report.fail("lora_target_modules", f"{name}: a Mamba-2 has in_proj and out_proj alone")
    for name in recipe.lora_modules_to_save or ():
        unknown = [part for part in name.split(".") if part not in parts and not part.isdigit()]
        if unknown:
            hint = nearest(unknown[0], parts)
            report.fail("lora_modules_to_save", f"{name}: no module or parameter of this model{hint}")


def _gb(size: float) -> float:
    return float(f"{size / 1e9:.3g}")


def _backends(recipe: Recipe, shape: ModelShape | None) -> dict[str, str]:
    """What runs every op of the model on this machine, and why."""
    return {op: f"{name}: {reason}" for op, (name, reason) in _chosen(recipe, shape).items()}


def _runs_kernels(recipe: Recipe, shape: ModelShape) -> bool:
    if shape.scan != ModelShape.scan:
        return _device_memory(recipe) is not None
    try:
        return _chosen(recipe, shape)[shape.scan][0] == "cuda"
    except UserError:  # reported under its own key
        return False


def _chosen(recipe: Recipe, shape: ModelShape | None) -> dict[str, tuple[str, str]]:
    import torch

    from mambalign.ops.backends import OPS, SCANS, chosen_backends

    device = torch.device("cpu" if recipe.use_cpu or not torch.cuda.is_available() else "cuda")
    scan = ModelShape.scan if shape is None else shape.scan
    ops = tuple(op for op in OPS if op not in SCANS or op == scan)
    try:
        return chosen_backends(recipe.backend, device, ops)
    except ValueError as error:
        raise UserError(f"on this machine {error}") from error


def _bitsandbytes(recipe: Recipe) -> None:
    keys = [key for key in ("load_in_4bit", "load_in_8bit") if getattr(recipe, key)]
    if keys and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{', '.join(keys)}: needs bitsandbytes, which is not installed: {BITSANDBYTES}")


def _arguments(recipe: Recipe) -> None:
    """What transformers would refuse: schedule, optimizer, loggers, and values that do not go together."""
    from mambalign.train.run import training_arguments

    # The batch is `_arithmetic`'s, for any number of devices; precision and processes are the other machine's.
    alone = replace(recipe, global_batch_size=None, gradient_accumulation_steps=None, use_cpu=True, bf16=False)
    alone = replace(alone, fp16=False, tf32=None, ddp_backend=None, deepspeed=None)
    training_arguments(alone, Path(str(recipe.output_dir)).expanduser())


def _device_memory(recipe: Recipe) -> int | None:
    import torch

    if recipe.use_cpu or not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def _card(recipe: Recipe, name: str | None) -> Card | None:
    import torch

    if name is not None:
        return card_named(name)
    available = _device_memory(recipe)
    return None if available is None else card_here(torch.cuda.get_device_name(0), available)


def _plan(
    report: CheckReport, recipe: Recipe, stage: str, shape: ModelShape, card: Card, devices: int, gpus: int | None
) -> None:
    """What the run takes on the card, and what would suit it better."""
    steps = report.sections.get("batch", {}).get("steps")
    pairs = report.sections.get("train", {}).get("rows") if stage == "dpo" else None
    planned = plan(shape, recipe, stage, card, devices, report.rows)
    report.sections["plan"] = described(planned, steps, pairs)
    if not planned.fits:
        report.warn(
            "per_device_train_batch_size",
            f"a pass may take {planned.parts['device'] / 1e9:.1f} GB of the {card.memory / 1e9:g} GB of {card.name}",
        )
    best = propose(shape, recipe, stage, card, gpus, report.rows, devices)
    if best is None:
        why = "nothing with these rows a step fits; try QLoRA or a shorter max_length"
        total = step_rows(recipe, devices)
        if gpus is not None and total % gpus:
            why = f"{total} rows a step are no multiple of {gpus} GPUs; set global_batch_size to one, or change --gpus"
        report.sections["proposal"] = {"none": why}
        return
    section = {
        "gpus": best.devices,
        "per_device_train_batch_size": best.recipe.per_device_train_batch_size,
        "gradient_checkpointing": str(best.recipe.gradient_checkpointing).lower(),
        "gradient_accumulation_steps": best.recipe.accumulation_steps(best.devices),
    }
    section |= {"fsdp": best.recipe.fsdp} if best.recipe.fsdp else {}
    report.sections["proposal"] = section | described(best, steps, pairs) | {"add": words(best, recipe) or "nothing"}


# --- tokenizer and template ------------------------------------------------------------------------------------------


def _tokenizer(report: CheckReport, recipe: Recipe, stage: str, shape: ModelShape | None) -> Any:
    from mambalign.data.chat import apply_template, check_template, end_of_turn_id, set_pad_token
    from mambalign.models.checkpoint import load_tokenizer

    name = recipe.tokenizer_name_or_path or recipe.model_name_or_path
    assert name is not None
    revision = None if recipe.tokenizer_name_or_path else recipe.model_revision
    tokenizer = load_tokenizer(name, revision=revision)
    if stage in PAIR_STAGES and recipe.loss_type != "orpo" and not tokenizer.chat_template:
        report.warn(
            "model_name_or_path",
            f"the tokenizer of {name} has no chat template, as a base model's: start {stage} from an SFT run's result",
        )
    before = len(tokenizer)
    section: dict[str, Any] = {"name": name, "tokens": before}
    if stage == "cpt" and recipe.chat_template is None:
        set_pad_token(tokenizer)
    else:
        apply_template(tokenizer, recipe.chat_template)
        check_template(tokenizer)
        section["template"] = recipe.chat_template or "the tokenizer's own"
        section["end_of_turn"] = tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))
        section["tokens_added"] = len(tokenizer) - before
        if len(tokenizer) > before:
            _check_new_rows(report, recipe, shape)
    report.sections["tokenizer"] = section
    if shape is not None and before > shape.vocab:
        report.warn(
            "tokenizer_name_or_path",
            f"{name} has {before} tokens and the model {shape.vocab} rows for them: is it this model's tokenizer?",
        )
    elif shape is not None and len(tokenizer) > shape.vocab:
        section["embedding_grows_to"] = math.ceil(len(tokenizer) / 8) * 8
    return tokenizer


def _check_new_rows(report: CheckReport, recipe: Recipe, shape: ModelShape | None) -> None:
    """Adapters train no row of a new token, unless the recipe says so (`Adapters.keep_new_rows` refuses the run)."""
    if not recipe.use_peft or shape is None:
        return
    whole = {name.split(".")[-1] for name in recipe.lora_modules_to_save or ()}
    trained = whole | {name.split(".")[-1] for name in recipe.lora_target_modules or ()}
    sides = {"embeddings", "lm_head"}
    if not (sides <= trained or (shape.tied and sides & whole)):
        report.fail(
            "chat_template",
            "it adds tokens whose rows nothing trains beside adapters; set lora_modules_to_save: "
            f"[{'embeddings' if shape.tied else 'embeddings, lm_head'}], or take a template that needs no new tokens "
            "(zephyr)",
        )


# --- data ------------------------------------------------------------------------------------------------------------


def _data(report: CheckReport, recipe: Recipe, stage: str, tokenizer: Any, kind: str, full: bool) -> int | None:
    """Tokenises (a sample of) the rows of a kind; returns how many packed rows, pairs or prompts an epoch has.
    Without a tokenizer files and columns are looked at all the same."""
    from mambalign.data.mixer import load_mix, tokenize_preferences, tokenize_sft, tokenize_text
    from mambalign.data.packing import PackedRows
    from mambalign.data.tokenizing import list_lengths

    rows = load_mix(replace(recipe, max_eval_samples=None), kind)
    if len(rows) == 0:  # only of the test kind
        if recipe.eval_strategy != "no":
            report.fail(
                "eval_strategy",
                f"{recipe.eval_strategy}, but there are no rows to evaluate on: none of dataset_splits "
                f"{recipe.dataset_splits} that is there is named test; name one, or set eval_strategy: no",
            )
        return None
    total = len(rows)
    if kind == "test" and recipe.max_eval_samples:
        total = min(total, recipe.max_eval_samples)
    if tokenizer is None:
        report.sections[kind] = {"rows": total, "columns": ", ".join(rows.column_names)}
        return None
    if not full and total > SAMPLE:
        rows = rows.select(sorted(random.Random(recipe.seed).sample(range(len(rows)), SAMPLE)))
    pairs = stage in PAIR_STAGES
    tokenize = tokenize_preferences if pairs else {"cpt": tokenize_text, "sft": tokenize_sft}[stage]
    tokenized = tokenize(rows, tokenizer, recipe)
    scale = total / len(rows)
    section: dict[str, Any] = {"rows": total, "rows_looked_at": len(rows), "columns": ", ".join(rows.column_names)}
    section |= {k: v for k, v in tokenized.report.items() if k not in section and isinstance(v, int | float)}
    report.sections[kind] = section
    key = "dataset_mixer" if kind == "train" else "dataset_splits"
    columns = ("prompt_ids", "chosen_ids", "rejected_ids") if pairs else ("input_ids",)
    for column in columns:
        section[f"{column.removesuffix('_ids')}_tokens"] = _distribution(list_lengths(tokenized.dataset, column))
    _data_warnings(report, recipe, kind, key, len(rows), tokenized)
    packed = PackedRows(
        tokenized.dataset,
        max_length=recipe.max_length,
        kind="pairs" if pairs else "sequences",
        seed=recipe.seed,
        packing=recipe.packing,
        group_by_prompt=recipe.group_by_prompt,
        longer_alone=recipe.state_passing != "off",
    )
    if recipe.state_passing != "off":
        from mambalign.train.long_context import describe

        section["state_passing"] = describe(recipe, packed.example_lengths)
    if not pairs:
        section["packed_rows"] = round(len(packed) * scale)
        section["packing_fill"] = round(packed.fill, 4)
    longest, bound = max(packed.example_lengths), recipe.max_tokens_per_device
    if bound is not None and longest > bound:
        report.fail("max_tokens_per_device", f"{bound} is too small for a {kind} row of {longest} tokens; raise it")
    lengths = packed.lengths()
    section["tokens_per_row"] = round(sum(lengths) / len(packed), 1)
    if kind == "train":
        report.rows = Rows.of(lengths, section.get("trained_share", 1.0))
    return round(len(packed) * scale)


def _data_warnings(report: CheckReport, recipe: Recipe, kind: str, key: str, looked_at: int, tokenized: Any) -> None:
    from mambalign.data.tokenizing import list_lengths

    counts: dict[str, int | float] = tokenized.report
    section = report.sections[kind]
    trained, tokens = counts.get("trained_tokens", 0), counts.get("tokens", 0)
    if tokens:
        section["trained_share"] = round(trained / tokens, 4)
    if not trained:
        report.fail(key, f"no token of the {kind} rows would be trained on")
    too_long = sum(counts.get(name, 0) for name in ("truncated", "skipped/truncated_away", "skipped/too_long"))
    share = f"{too_long / looked_at:.0%} of the {kind} rows are longer"
    if too_long > looked_at / 2:
        report.warn("max_length", f"{recipe.max_length} is below the {kind} data's median: {share} and lose their rest")
    elif too_long > looked_at / 10:
        report.warn("max_length", f"{share} than {recipe.max_length} and lose their rest")
    skipped = counts.get("skipped", 0)
    if skipped:
        report.warn(key, f"{skipped} of {looked_at} {kind} rows would be skipped: {tokenized.skips()}")
    if "chosen_ids" in tokenized.dataset.column_names:
        chosen, rejected = (list_lengths(tokenized.dataset, f"{side}_ids") for side in ("chosen", "rejected"))
        longer = float((chosen > rejected).mean())
        section["chosen_longer_share"] = round(longer, 4)
        if longer > 0.8 and len(chosen) >= 50:
            learnt = "take length for quality" if report.stage == "reward" else "be long"
            report.warn(key, f"chosen is longer in {longer:.0%} of the {kind} pairs: the model will learn to {learnt}")


def _distribution(lengths: Any) -> dict[str, float]:
    ordered = sorted(lengths.tolist())
    picked = {f"p{p}": float(ordered[round(p / 100 * (len(ordered) - 1))]) for p in PERCENTILES}
    return {"count": len(ordered), "mean": round(sum(ordered) / len(ordered), 1)} | picked


# --- arithmetic and output -------------------------------------------------------------------------------------------


def _arithmetic(report: CheckReport, recipe: Recipe, stage: str, rows: int | None, devices: int) -> None:
    accumulation = recipe.accumulation_steps(devices)
    batch = recipe.per_device_train_batch_size * devices * accumulation
    unit = "pairs" if stage in PAIR_STAGES else "rows"
    section: dict[str, Any] = {
        f"{unit}_per_device": recipe.per_device_train_batch_size,
        "devices": devices,
        "gradient_accumulation_steps": accumulation,
        f"{unit}_per_step": batch,
    }
    report.sections["batch"] = section
    if rows is None:
        return
    section["tokens_per_step"] = round(report.sections["train"]["tokens_per_row"] * batch)
    # As transformers counts: device batches of an epoch, and an incomplete accumulation still makes a step.
    batches = math.ceil(rows / devices / recipe.per_device_train_batch_size)
    per_epoch = max(1, math.ceil(batches / accumulation))
    steps = recipe.max_steps if recipe.max_steps > 0 else math.ceil(recipe.num_train_epochs * per_epoch)
    warmup = recipe.training_arguments(devices)["warmup_steps"]
    section |= {
        "steps_per_epoch": per_epoch,
        "steps": steps,
        "epochs": round(steps / per_epoch, 2),
        "warmup_steps": math.ceil(warmup * steps) if warmup < 1 else int(warmup),
    }
    round_of_devices = recipe.per_device_train_batch_size * devices
    if recipe.dataloader_drop_last and rows < round_of_devices:
        report.fail("dataloader_drop_last", f"{rows} {unit} do not fill a batch of {round_of_devices}, so none is read")
    elif rows < batch:
        report.warn("global_batch_size", f"a step asks for {batch} {unit} and an epoch has {rows}; a step sees no more")
    elif steps < 10:
        report.warn("num_train_epochs", f"the run has {steps} steps in all; a schedule needs some dozens")
    if section["warmup_steps"] >= steps > 1:
        report.warn("warmup_steps", f"the warmup of {section['warmup_steps']} steps is the whole run of {steps}")
    if recipe.save_strategy == "steps" and recipe.save_steps > steps:
        report.warn(
            "save_steps", f"{recipe.save_steps:g} is more than the run's {steps} steps: a stopped run would start anew"
        )


def _output(report: CheckReport, recipe: Recipe, shape: ModelShape | None) -> None:
    import shutil

    assert recipe.output_dir is not None
    folder = Path(recipe.output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; output_dir must be a folder")
    section: dict[str, Any] = {"output_dir": str(folder)}
    report.sections["output"] = section
    saved = [int(number) for p in folder.glob("checkpoint-*") if (number := p.name.rpartition("-")[2]).isdigit()]
    if saved and recipe.resume == "auto":
        section["will_resume_from"] = f"checkpoint-{max(saved)}"
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    section["free_gb"] = _gb(free)
    if shape is None or recipe.save_strategy == "no" or recipe.use_peft:
        return
    # Weights and two moments; one more than is kept while the oldest waits to be removed; and the exported model.
    one = (4 if recipe.save_only_model else 12) * shape.parameters
    needed = one * ((recipe.save_total_limit or 1) + 1) + 4 * shape.parameters
    section["checkpoints_gb"] = _gb(needed)
    if needed > free:
        report.warn("output_dir", f"checkpoints take about {needed / 1e9:.1f} GB there, {free / 1e9:.1f} GB are free")
