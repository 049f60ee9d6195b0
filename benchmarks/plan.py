"""What `mambalign check` plans, beside what training steps take: memory and time of full, LoRA and QLoRA runs on a GPU.

    python benchmarks/plan.py                           # about two minutes on an H200
    python benchmarks/plan.py --only 2.8b-qlora 130m    # groups or sizes as printed by --help
    python benchmarks/plan.py --tiny                    # on a CPU: tries the script
    python benchmarks/plan.py --fit results.json        # rates for mambalign/check/speed.py, from what was measured
    python benchmarks/plan.py --replan results.json     # what was measured beside today's plan

Steps of the project's own trainer with the recipe's optimizer, on the recipes of `recipes/common`; random weights, made
on the device; synthetic rows of a fixed number of tokens. The first four steps are not timed. A case that runs out of
memory, or misses a library, is a row that says so.

QLoRA needs bitsandbytes. `limit_gb` lets the allocator have no more than a card of that size would: that a case ends
with a figure is the proof that it fits.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
from common import arguments, parse
from transformers import TrainerCallback

from mambalign.bench import contestants as models
from mambalign.bench.measure import DEVICE, environment, free_memory
from mambalign.check import Load, ModelShape
from mambalign.check.plan import plan
from mambalign.check.speed import H200, RATES, Card, Rates, card_here, times
from mambalign.data.packing import Collator, PackedRows
from mambalign.recipe import PAIR_STAGES, Recipe, load_recipe
from mambalign.train import run
from mambalign.train.trainer import PackedTrainer

COMMON = Path(__file__).parents[1] / "recipes" / "common"
RECIPES = {
    ("sft", "full"): "sft-zephyr-beta.yaml",
    ("sft", "lora"): "sft-lora.yaml",
    ("sft", "qlora"): "sft-qlora.yaml",
    ("dpo", "full"): "dpo-zephyr-beta.yaml",
    ("dpo", "lora"): "dpo-lora.yaml",
    ("dpo", "qlora"): "dpo-qlora.yaml",
}
TRIED = 2  # steps without CUDA graphs, whose memory is not seen: the second has the optimizer's state, too
WARMUP = TRIED + 2  # steps that are not timed: one captures, one more
CONTEXT = 0.6e9  # bytes of a card that CUDA itself takes: the allocator gets `limit_gb` without them
DOCUMENT = 512  # tokens of a conversation in a packed row; its first quarter is not trained on


@dataclass(frozen=True)
class Case:
    """`rows`: of `length` tokens (dpo: pairs, together that long: a quarter prompt, the rest completions) a device
    batch; `keys`: over those of the recipe; `limit_gb`: of the card that it must fit."""

    size: str
    stage: str
    method: str
    rows: int
    length: int
    keys: dict[str, Any] = field(default_factory=dict)
    accumulation: int = 1
    limit_gb: float | None = None

    @property
    def group(self) -> str:
        return f"{self.size}-{self.method}"

    @property
    def recipe(self) -> Recipe:
        """The one of `recipes/common`, with what makes it a run of a few steps."""
        keys = {
            "model_name_or_path": self.size,
            "per_device_train_batch_size": self.rows,
            "global_batch_size": self.rows * self.accumulation,
            "max_length": self.length,
            "max_prompt_length": "null",
            "output_dir": "unused",
            "eval_strategy": "no",
            "save_strategy": "no",
            "do_eval": "false",
            "report_to": "none",
            "disable_tqdm": "true",
            "log_level": "error",
            "logging_strategy": "no",
            "logging_first_step": "false",
            "use_cpu": str(DEVICE.type == "cpu").lower(),
            **self.keys,
        }
        words = [word for name, value in keys.items() for word in (f"--{name}", str(value))]
        return load_recipe(COMMON / RECIPES[self.stage, self.method], words, stage=self.stage)


NONE, SELECTIVE, WHOLE = ({"gradient_checkpointing": how} for how in ("false", "selective", "true"))
BF16 = {"dtype": "bfloat16"}
CASES = [
    Case("130m", "sft", "full", 16, 2048, NONE),
    Case("130m", "sft", "full", 16, 2048, SELECTIVE),
    Case("130m", "sft", "full", 16, 2048, WHOLE),
    Case("130m", "sft", "full", 16, 2048, NONE | BF16),
    Case("130m", "sft", "full", 4, 2048, NONE, accumulation=4),
    Case("130m", "sft", "full", 1, 2048, NONE),
    Case("130m", "sft", "lora", 16, 2048, NONE),
    Case("130m", "sft", "lora", 4, 2048, WHOLE),
    Case("130m", "sft", "qlora", 16, 2048, NONE),
    Case("130m", "dpo", "full", 16, 1024, NONE),
    Case("130m", "dpo", "full", 8, 1024, WHOLE),
    Case("130m", "dpo", "lora", 16, 1024, NONE),
    Case("130m", "dpo", "qlora", 16, 1024, NONE),
    Case("2.8b", "sft", "full", 4, 2048, WHOLE),
    Case("2.8b", "sft", "full", 4, 2048, SELECTIVE),
    Case("2.8b", "sft", "full", 2, 2048, NONE | BF16, accumulation=2),
    Case("2.8b", "sft", "lora", 8, 2048, WHOLE),
    Case("2.8b", "sft", "lora", 4, 2048, SELECTIVE),
    Case("2.8b", "sft", "qlora", 1, 2048, WHOLE, limit_gb=24),
    Case("2.8b", "sft", "qlora", 8, 2048, limit_gb=24),  # as recipes/mamba-2.8b has it
    Case("2.8b", "sft", "qlora", 4, 2048, SELECTIVE | {"use_bnb_nested_quant": "true"}),
    Case("2.8b", "dpo", "full", 8, 1024, WHOLE),
    Case("2.8b", "dpo", "lora", 8, 1024, WHOLE),
    Case("2.8b", "dpo", "qlora", 8, 1024, WHOLE, limit_gb=24),
]
TINY = [
    Case("tiny", "sft", "full", 2, 64, NONE),
    Case("tiny", "sft", "full", 1, 64, SELECTIVE | BF16, accumulation=2),
    Case("tiny", "sft", "lora", 2, 64, WHOLE),
    Case("tiny", "sft", "qlora", 2, 64, WHOLE | {"use_bnb_nested_quant": "true"}, limit_gb=24),
    Case("tiny", "dpo", "full", 2, 64, NONE),
    Case("tiny", "dpo", "lora", 2, 64, WHOLE),
    Case("tiny", "dpo", "qlora", 2, 64, WHOLE | {"optim": "adamw_torch"}),
]


# --------------------------------------------------------------------------------------------- what a run starts from


def make_model(recipe: Recipe) -> tuple[Any, Any]:
    """(model, adapters or None), as `run.load_start` leaves them, with random weights."""
    from mambalign.models.adapters import AdapterOptions, attach

    dtype = recipe.dtype or "float32"
    model = models.ours(str(recipe.model_name_or_path), "bf16" if dtype == "bfloat16" else "fp32").eval()
    if recipe.load_in_4bit:
        quantise(model, recipe)
    model.set_backend(recipe.backend)
    model.set_selective_recomputation(recipe.gradient_checkpointing == "selective")
    if not recipe.use_peft:
        return model, None
    return model, attach(model, AdapterOptions.from_recipe(recipe), seed=recipe.seed)


def quantise(model: Any, recipe: Recipe) -> None:
    """Put the weights into bitsandbytes' layers, a layer at a time, as transformers does while it loads a model."""
    import bitsandbytes
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    from mambalign.models.adapters import NOT_QUANTISED, quantisation

    weights = {name: module.weight for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    replace_with_bnb_linear(model, list(NOT_QUANTISED), quantization_config=quantisation(recipe))
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = weights.pop(name).data
            packed = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **module.weight.__dict__)
            module.weight = packed.to(DEVICE)
    model.is_quantized = model.is_loaded_in_4bit = True


def make_rows(case: Case, steps: int, vocabulary: int) -> datasets.Dataset:
    """Enough for `steps`; random tokens."""
    rng = np.random.default_rng(0)
    count = case.rows * case.accumulation * steps

    def some(length: int) -> list[list[int]]:
        return rng.integers(1, vocabulary, (count, length)).tolist()

    if case.stage not in PAIR_STAGES:
        length = min(DOCUMENT, case.length)
        count *= case.length // length
        mask = [0] * (length // 4) + [1] * (length - length // 4)
        columns: dict[str, Any] = {"input_ids": some(length), "loss_mask": [mask] * count}
    else:
        prompt, completion = case.length // 4, case.length * 3 // 8
        columns = {"prompt_ids": some(prompt)}
        for side in ("chosen", "rejected"):
            columns |= {f"{side}_ids": some(completion), f"{side}_mask": [[1] * completion] * count}
    return datasets.Dataset.from_dict(columns | {"row_id": [str(i) for i in range(count)]})


# -------------------------------------------------------------------------------------------------------- measuring


class Clock(TrainerCallback):
    """When things happen on the device: `marks` are (name, event) in order, by step; `seconds` the steps' wall time;
    `memory` the most bytes of tensors that there were at a mark, and between the mark before and it."""

    def __init__(self, patience: float, graphs: Any):
        self._graphs = graphs
        self.marks: list[list[tuple[str, Any]]] = []
        self.seconds: list[float] = []
        self.memory: dict[str, tuple[int, int]] = {}
        self._patience, self._before, self._deadline = patience, time.perf_counter(), float("inf")

    def mark(self, name: str) -> None:
        if DEVICE.type != "cuda":
            self.marks[-1].append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks[-1].append((name, event))
        held, most = self.memory.get(name, (0, 0))
        now, since = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        self.memory[name] = max(held, now), max(most, since)
        torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.marks.append([])
        self._graphs.trying = len(self.seconds) < TRIED
        self.mark("begin")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.mark("clipped")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.mark("updated")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.mark("end")
        synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._before)
        self._before = now
        if len(self.seconds) == WARMUP:
            self._deadline = now + self._patience
        elif len(self.seconds) >= WARMUP + 3 and now > self._deadline:
            control.should_training_stop = True

    def spent(self, name: str) -> float:
        """Median seconds a step between the marks before and those of this name."""
        steps = [
            sum(_between(before, after) for (_, before), (it, after) in itertools.pairwise(marks) if it == name)
            for marks in self.marks[WARMUP:]
        ]
        return statistics.median(steps)


def _between(before: Any, after: Any) -> float:
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1e3


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak() -> int:
    """The most bytes of tensors since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0


def reserved() -> int:
    """Bytes that the allocator has taken from the device: it gives none back until memory is short."""
    return torch.cuda.memory_reserved() if DEVICE.type == "cuda" else 0


def reset_peak() -> None:
    if DEVICE.type == "cuda":
        free_memory()
        torch.cuda.reset_peak_memory_stats()


class TimedTrainer(PackedTrainer):
    clock: Clock

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.clock.mark("before")
        loss = super().training_step(*args, **kwargs)
        self.clock.mark("backward")
        return loss


def make_trainer(case: Case, recipe: Recipe, folder: Path, patience: float) -> TimedTrainer:
    """As `run` makes it, on synthetic rows."""
    args = run.training_arguments(recipe, folder)
    model, adapters = make_model(recipe)
    kind: Any = "pairs" if case.stage in PAIR_STAGES else "sequences"
    rows = PackedRows(
        make_rows(case, recipe.max_steps, model.config.vocab_size),
        max_length=recipe.max_length,
        kind=kind,
        seed=0,
        packing=recipe.packing,
    )
    objective: Any = run._objective(case.stage, recipe)
    trainer = TimedTrainer(
        model=model,
        args=args,
        objective=objective,
        train_rows=rows,
        eval_rows=None,
        collator=Collator(kind, recipe.max_tokens_per_device),
        tokenizer=None,
        sampler_seed=0,
        adapters=adapters,
    )
    trainer.clock = clock = Clock(patience, model.backbone.graphs)
    trainer.add_callback(clock)
    ask = objective.ask

    def timed(model: Any, batch: Any) -> torch.Tensor:
        if model.training:
            clock.mark("before")  # of a second micro-batch: the backward pass of the first
        answer: torch.Tensor = ask(model, batch)
        if model.training:
            clock.mark("forward")
        return answer

    objective.ask = timed
    return trainer


def reference(case: Case, trainer: Any, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The reference pass over all pairs, after one over a batch of them, for which kernels are compiled."""
    pairs = trainer.train_dataset._data.with_format(None)
    seconds = 0.0
    for some in (pairs.select(range(case.rows)), pairs):
        data: Any = SimpleNamespace(dataset=some, fingerprint=len(some))
        reset_peak()
        began = time.perf_counter()
        values = run._reference(trainer, data, "train", recipe, folder, {"weights": "random"})
        synchronize()
        seconds = time.perf_counter() - began
    trainer.objective.reference["train"] = values
    tokens = sum(trainer.train_dataset.lengths())
    return {"reference_seconds": seconds, "reference_tokens": tokens, "reference_peak": peak()}


def shape_of(model: Any) -> ModelShape:
    shape = ModelShape.from_config(model.config.to_dict())
    return replace(shape, kernels=DEVICE.type == "cuda")


def measure(case: Case, repeats: int, patience: float) -> dict[str, Any]:
    """A row of the table; what is needed to plan the same, and to fit the model of time, is in it."""
    recipe = replace(case.recipe, max_steps=WARMUP + repeats)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainer = make_trainer(case, recipe, folder, patience)
        batches = [trainer.data_collator([trainer.train_dataset[i] for i in range(case.rows)])]
        free_memory()
        if case.limit_gb is not None and DEVICE.type == "cuda":
            share = (case.limit_gb * 1e9 - CONTEXT) / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(share)
        static = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
        facts = reference(case, trainer, recipe, folder) if case.stage == "dpo" else {}
        reset_peak()
        trainer.train()
        clock, taken = trainer.clock, reserved()
    count = case.accumulation
    return {
        **facts,
        "shape": asdict(shape_of(trainer.model)),
        "tokens": count * sum(batch.num_tokens for part in batches for batch in part),
        "targets": count * sum(batch.num_targets for part in batches for batch in part),
        "passes": count * sum(len(part) for part in batches),
        "seconds": statistics.median(clock.seconds[WARMUP:]),
        "all_seconds": clock.seconds,
        "forward_seconds": clock.spent("forward"),
        "backward_seconds": clock.spent("backward"),
        "clip_seconds": clock.spent("clipped"),
        "optimizer_seconds": clock.spent("updated"),
        "static": static,
        "card_bytes": torch.cuda.get_device_properties(0).total_memory if DEVICE.type == "cuda" else 0,
        "memory": clock.memory,
        "peak_allocated": max([most for _, most in clock.memory.values()], default=0),
        "peak_reserved": taken,
    }


def attempt(case: Case, repeats: int, patience: float) -> dict[str, Any]:
    """`measure`; why there is no figure, where there is none. The memory is free again afterwards."""
    row: dict[str, Any] = asdict(case) | {"group": case.group}
    if case.method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        return row | {"missing": "bitsandbytes is not installed"}
    missing = None
    try:
        row |= measure(case, repeats, patience)
    except torch.OutOfMemoryError:
        missing = "out of memory" + (f" on {case.limit_gb:g} GB" if case.limit_gb else "")
    except Exception as error:
        missing = f"{type(error).__name__}: {error}"
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
        free_memory()
    return row if missing is None else row | {"missing": missing[:500]}


# ---------------------------------------------------------------------------------------------------------- results


def case_of(row: dict[str, Any]) -> Case:
    return Case(**{name: row[name] for name in Case.__dataclass_fields__})


def load_of(row: dict[str, Any]) -> Load:
    passes = row["passes"]
    return Load(row["tokens"] // passes, row["targets"] // passes, passes)


def card_of(environment: dict[str, str], row: dict[str, Any]) -> Card:
    """The one that was measured on; on a CPU figures mean nothing, and the H200 stands in."""
    card = environment["card"]
    return H200 if card == "none" else card_here(card, row.get("card_bytes", H200.memory))


def planned(row: dict[str, Any], card: Card) -> dict[str, Any]:
    """What the planner says of a row."""
    case, shape = case_of(row), ModelShape(**row["shape"])
    made = plan(shape, case.recipe, case.stage, card, rows=load_of(row))
    return {
        "total": made.parts["total"],
        "device": made.parts["device"],
        "parts": made.parts,
        "moment": made.moment,
        "seconds": made.seconds,
    }


def name_of(row: dict[str, Any]) -> str:
    keys = " ".join(f"{name}={value}" for name, value in row["keys"].items())
    times = f" x {row['accumulation']}" if row["accumulation"] > 1 else ""
    return f"{row['size']:>4} {row['stage']} {row['method']:>5} {row['rows']:>2} x {row['length']:,}{times} {keys}"


def show(row: dict[str, Any]) -> None:
    what = name_of(row)
    if "missing" in row:
        print(f"{what:78} {row['missing']}", flush=True)
        return
    made, held = row["planned"], row["peak_allocated"]
    memory = f"{held / 1e9:6.2f} GB (reserved {row['peak_reserved'] / 1e9:6.2f})"
    memory += f", planned {made['total'] / 1e9:6.2f} ({made['total'] / max(held, 1) - 1:+.0%})"
    spent = f"{1e3 * row['seconds']:8.1f} ms, {row['tokens'] / row['seconds']:9,.0f} tok/s"
    if made["seconds"]:
        step = made["seconds"]["step"]
        spent += f", planned {1e3 * step:8.1f} ms ({step / row['seconds'] - 1:+.0%})"
    fits = f", fits {row['limit_gb']:g} GB" if row["limit_gb"] else ""
    print(f"{what:78} {spent}; {memory}{fits}", flush=True)


# ---------------------------------------------------------------------------------------------------- calibration


# Where a fit begins: kernels one at a time and passes of whole models on an H200, 2026-11-24 (docs/performance.md);
# those of Python by eye, from a few rows.
ALONE = Rates(
    matrix=0.724,
    narrow=132.0,
    head=0.61,
    scan_forward=8.7e-12,
    scan_backward=25.3e-12,
    convolution_forward=8.2,
    convolution_backward=25.0,
    norm_forward=31.0,
    norm_backward=110.0,
    memory=0.8,
    unpack=0.4,
    optimizer=80.0,
    host_forward=0.85e-3,
    host_backward=0.95e-3,
    host_adapter=0.25e-3,
    host_packed=0.1e-3,
    host_again=0.3e-3,
    host_tensor=30e-6,
    host_step=1e-3,
    host_token=0.5e-6,
    host_wrapped=0.2e-3,
    host_graph=0.05e-3,
)


def misses(runs: Sequence[tuple[dict[str, Any], ModelShape, Recipe]], card: Card, rates: Rates) -> list[float]:
    """Log of predicted over measured, for the parts of every row; the whole step counts twice, and what is beside the
    passes half. A DPO's reference pass is left out: it is seconds, and half of it is files and first batches."""
    found = []
    for row, shape, recipe in runs:
        made = times(shape, recipe, row["stage"], card, load_of(row), rates=rates)
        rest = row["seconds"] - row["forward_seconds"] - row["backward_seconds"]
        for weight, ours, seen in (
            (2.0, made["step"], row["seconds"]),
            (1.0, made["forward"], row["forward_seconds"]),
            (1.0, made["backward"], row["backward_seconds"]),
            (0.5, made["step"] - made["forward"] - made["backward"], rest),
        ):
            found.append(weight * math.log(ours / max(seen, 1e-3)))
    return found


def fit(rows: Sequence[dict[str, Any]], card: Card) -> Rates:
    """Rates of the least squares of `misses`, by coordinate descent in ever smaller steps; near `ALONE` where the rows
    do not say, and those of the card, whose kernels were measured, more so than those of Python."""
    stiffness = {item.name: 0.02 if item.name.startswith("host") else 1.0 for item in fields(Rates)}
    runs = [(row, ModelShape(**row["shape"]), case_of(row).recipe) for row in rows]

    def cost(rates: Rates) -> float:
        drift = sum(k * math.log(getattr(rates, name) / getattr(ALONE, name)) ** 2 for name, k in stiffness.items())
        return sum(miss**2 for miss in misses(runs, card, rates)) + drift

    best, lowest = ALONE, cost(ALONE)
    for stride in (1.5, 1.25, 1.1, 1.05, 1.02, 1.01):
        for _ in range(6):
            before = lowest
            for name in stiffness:
                for factor in (stride, 1 / stride):
                    tried = replace(best, **{name: getattr(best, name) * factor})
                    if (found := cost(tried)) < lowest:
                        best, lowest = tried, found
            if before - lowest < 1e-4:
                break
    return best


def calibrate(path: Path) -> None:
    """Print the rates that fit a file of results, how every row is then met, and how if it had not been measured."""
    written = json.loads(path.read_text())
    rows = [row for row in written["rows"] if "missing" not in row]
    card = card_of(written["environment"], rows[0])
    rates = fit(rows, card)
    print(f"Rates, from {path.name}, {written['environment']}:")
    for item in fields(Rates):
        print(f"    {item.name}: float = {getattr(rates, item.name):.3g}  # was {getattr(RATES, item.name):.3g}")
    for row in rows:
        case, shape = case_of(row), ModelShape(**row["shape"])
        without = fit([other for other in rows if other is not row], card)
        step, blind = (
            times(shape, case.recipe, case.stage, card, load_of(row), rates=which)["step"] for which in (rates, without)
        )
        took = f"{1e3 * row['seconds']:8.1f} ms, fitted {1e3 * step:8.1f} ({step / row['seconds'] - 1:+.0%})"
        print(f"{name_of(row):78} {took}, to the other rows alone {blind / row['seconds'] - 1:+.0%}", flush=True)
    fragments = [row["peak_reserved"] / row["peak_allocated"] - 1 for row in rows if row["peak_allocated"]]
    if fragments:
        print(f"reserved over allocated: median {statistics.median(fragments):.3f}, most {max(fragments):.3f}")


def replanned(path: Path) -> None:
    """Show a file of results beside today's plan."""
    written = json.loads(path.read_text())
    for row in written["rows"]:
        if "missing" not in row:
            row["planned"] = planned(row, card_of(written["environment"], row))
        show(row)


def main(argv: Sequence[str] | None = None) -> None:
    groups = list(
        dict.fromkeys(name for case in CASES for name in (case.size, case.group, f"{case.size}-{case.stage}"))
    )
    parser = arguments(__doc__ or "", "plan", repeats=5)
    parser.add_argument("--only", nargs="*", choices=groups, help="groups of cases; all by default")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="no more timed steps of a case after so long, from 3 on"
    )
    parser.add_argument("--fit", type=Path, metavar="JSON", help="print the planner's rates that fit these results")
    parser.add_argument("--replan", type=Path, metavar="JSON", help="show these results beside today's plan")
    options = parser.parse_args(argv)
    for path, work in ((options.fit, calibrate), (options.replan, replanned)):
        if path is not None:
            work(path)
            return
    options = parse(parser, argv)
    wanted: Callable[[Case], bool] = lambda case: (  # noqa: E731
        not options.only or bool({case.size, case.group, f"{case.size}-{case.stage}"} & set(options.only))
    )
    rows = []
    for case in TINY if options.tiny else filter(wanted, CASES):
        began = time.monotonic()
        row = attempt(case, options.repeats, options.seconds)
        if "missing" not in row:
            row["planned"] = planned(row, card_of(environment(), row))
        row["case_seconds"] = round(time.monotonic() - began, 1)
        rows.append(row)
        show(row)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"benchmark": "plan", "environment": environment(), "rows": rows}, indent=1) + "\n"
        )
    print(f"{sum(row['case_seconds'] for row in rows):.0f} s; written to {options.json}")


if __name__ == "__main__":
    main()
