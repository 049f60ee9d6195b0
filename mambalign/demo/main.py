"""`mambalign demo`: data, model and tokenizer made here, then the ordinary pipeline, an evaluation and a report.

Nothing below trains in a way of its own: the three stages are ordinary recipes over ordinary files, handed to
`mambalign.train.run.run`, and left in the folder for the reader to change and run by hand.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import MambaConfig
from transformers.utils import logging as hf_logging

from mambalign.data.chat import apply_template
from mambalign.demo import tasks
from mambalign.demo.benchmark import run_mt_bench
from mambalign.demo.evaluate import Difference, Evaluation, converse, difference, judge, reply_to
from mambalign.demo.report import percent, read_metrics, write_report
from mambalign.demo.tokenizer import build_tokenizer
from mambalign.models import MambaForCausalLM
from mambalign.models.checkpoint import load_model, load_tokenizer, save_model
from mambalign.recipe import Recipe, UserError
from mambalign.support import write_json
from mambalign.train.run import run

SETTINGS_FILE, RESULTS_FILE, LOG_FILE, MT_BENCH = "demo.json", "evaluation.json", "training.log", "mt-bench"
SUMMARY = (
    "A small Mamba from scratch, on a CPU: pre-trained on plain text, fine-tuned to follow instructions (SFT), then "
    "aligned to close every reply kindly (DPO). In the fine-tuning data only those who ask politely get a kind reply; "
    "the preference pairs want one for everybody."
)
TITLES = {"cpt": "Pre-training", "sft": "SFT", "dpo": "DPO"}
MODELS = {"cpt": ("base", "Base"), "sft": ("sft", "SFT"), "dpo": ("dpo", "DPO")}


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a demo computes."""

    seed: int = 0
    texts: int = 2000
    chats: int = 18000
    preferences: int = 1500
    test_rows: int = 100
    per_task: int = 40
    hidden_size: int = 128
    layers: int = 1
    state_size: int = 16
    row_tokens: int = 512


QUICK = {"texts": 60, "chats": 120, "preferences": 40, "test_rows": 20, "per_task": 4, "hidden_size": 32, "layers": 1}


def run_demo(output_dir: Path = Path("demo-run"), *, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Run the demo, or the rest of it, in `output_dir`; returns what evaluation.json holds.

    quick: a model too small and trained too briefly to learn anything, to see every part work in seconds.

    Raises:
        UserError: the folder holds a demo of other settings, or something else.
    """
    settings = Settings(seed=seed, **(QUICK if quick else {}))
    console, started = Console(), time.perf_counter()
    folder = Path(output_dir).expanduser()
    _claim(folder, settings, console)
    finished = True
    for number, (stage, values) in enumerate(recipes(folder, settings).items(), 1):
        path = escape(str(_recipe_file(folder, stage)))
        console.print(f"[bold]{number}/4 {TITLES[stage]}[/]  recipe: {path}", soft_wrap=True)
        with _training_log(folder / LOG_FILE), _one_thread():
            outcome = run(stage, Recipe.from_dict(values, stage=stage))
        finished &= outcome.already_finished
        loss = outcome.metrics.get("eval_loss", float("nan"))
        state = "already finished" if outcome.already_finished else "done"
        console.print(f"    {state}: {outcome.global_step} steps, held-out loss {loss:.3f}")
    console.print("[bold]4/4 Evaluation[/]")
    results = _finished_results(folder) if finished else None
    finished = results is not None
    if results is None:
        with _training_log(folder / LOG_FILE), _one_thread():
            results = evaluate(folder, settings)
        write_json(folder / RESULTS_FILE, results)
    page = write_report(folder, results)
    show(results, console)
    console.print(f"{time.perf_counter() - started:.0f} s. The report: [bold]{escape(str(page))}[/]", soft_wrap=True)
    if finished:
        again = f"for a fresh one remove {folder} or choose another --output-dir"
        console.print(f"This demo was finished before; {escape(again)}.", soft_wrap=True)
    return results


# ------------------------------------------------------------------------------------------------- what is made here


def _claim(folder: Path, settings: Settings, console: Console) -> None:
    """Make data, tokenizer, an untrained model and recipes, once.

    The settings come first and claim the folder; the last recipe stands for the whole set.
    """
    stamp = folder / SETTINGS_FILE
    if stamp.exists():
        earlier = json.loads(stamp.read_text(encoding="utf-8"))
        changed = [f"{key} {earlier.get(key)!r}" for key, now in asdict(settings).items() if earlier.get(key) != now]
        if changed:
            raise UserError(
                f"{folder} holds a demo with {', '.join(changed)}, which is not what is asked for now; "
                "choose another --output-dir"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no demo; choose another --output-dir")
    stages = recipes(folder, settings)
    if _recipe_file(folder, list(stages)[-1]).exists():
        return
    console.print(f"Making data, a tokenizer and an untrained model in {escape(str(folder))}", soft_wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(stamp, asdict(settings))
    write_data(folder / "data", settings)
    make_model(folder / "init", settings)
    for stage, values in stages.items():
        path = _recipe_file(folder, stage)
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _recipe_file(folder: Path, stage: str) -> Path:
    return folder / "recipes" / f"{stage}.yaml"


def write_data(folder: Path, settings: Settings) -> None:
    """text/, chat/ and preferences/, each with train.jsonl and test.jsonl; test rows are of held-out topics only."""
    makers = {
        "text": (tasks.text_rows, settings.texts),
        "chat": (tasks.chat_rows, settings.chats),
        "preferences": (tasks.preference_rows, settings.preferences),
    }
    for name, (make, count) in makers.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        _write_rows(folder / name / "train.jsonl", make(count, settings.seed))
        _write_rows(folder / name / "test.jsonl", make(settings.test_rows, settings.seed, held_out=True))


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _tokenizer_texts(seed: int) -> Iterator[str]:
    """Enough of every kind of sentence, from the training side."""
    yield from (row["text"] for row in tasks.text_rows(2000, seed))
    yield from (message["content"] for row in tasks.chat_rows(3000, seed) for message in row["messages"])


def make_model(folder: Path, settings: Settings) -> None:
    """An untrained Mamba and its tokenizer, as a checkpoint like any other."""
    tokenizer = build_tokenizer(_tokenizer_texts(settings.seed))
    apply_template(tokenizer, "zephyr")
    torch.manual_seed(settings.seed)
    config = MambaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        state_size=settings.state_size,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    save_model(MambaForCausalLM(config), folder, tokenizer=tokenizer, overwrite=True)


def recipes(folder: Path, settings: Settings) -> dict[str, dict[str, Any]]:
    """Stage -> its recipe. Each stage starts from the one before; the numbers were tuned on two CPU cores."""
    common = {
        "max_length": settings.row_tokens,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "adam_beta2": 0.98,
        "logging_steps": 10,
        "eval_strategy": "no",
        "do_eval": True,
        "save_steps": 250,
        "save_total_limit": 1,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "seed": settings.seed,
        "log_level": "warning",
    }

    def stage(name: str, start: str, data: str, **values: Any) -> dict[str, Any]:
        return {
            "model_name_or_path": str(folder / start),
            "dataset_mixer": {str(folder / "data" / data): 1.0},
            "output_dir": str(folder / name),
            **common,
            **values,
        }

    return {
        "cpt": stage("cpt", "init", "text", learning_rate=3e-3, warmup_steps=20, per_device_train_batch_size=1),
        # A high rate for long: copying emerges late and at once, and a cosine would have cooled down by then.
        "sft": stage(
            "sft",
            "cpt",
            "chat",
            learning_rate=3e-3,
            warmup_steps=20,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": 300},
            per_device_train_batch_size=1,
        ),
        # rpo_alpha keeps the right answers likely: without it kindness comes at once and a third of them are lost.
        "dpo": stage(
            "dpo",
            "sft",
            "preferences",
            learning_rate=3e-4,
            warmup_steps=5,
            beta=0.1,
            rpo_alpha=1.0,
            logging_steps=5,
            per_device_train_batch_size=16,
        ),
    }


@contextlib.contextmanager
def _training_log(path: Path) -> Iterator[None]:
    """What training prints line by line goes to a file; its progress bar (stderr) stays on the screen, alone."""
    ours = logging.getLogger("mambalign")
    level, theirs = ours.level, (datasets.are_progress_bars_disabled(), hf_logging.is_progress_bar_enabled())
    ours.setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    hf_logging.disable_progress_bar()
    try:
        with path.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            yield
    finally:
        ours.setLevel(level)
        if not theirs[0]:
            datasets.enable_progress_bars()
        if theirs[1]:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A model this small gains nothing from a second thread, and beside other work every step waits for the slower one:
    2.3 steps a second instead of 22 on two busy cores. Nor do the results then depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------------- evaluation


def _finished_results(folder: Path) -> dict[str, Any] | None:
    try:
        results = dict(json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return results if "mt_bench" in results else None  # else of an earlier version


def evaluate(folder: Path, settings: Settings) -> dict[str, Any]:
    """Ask the three models the held-out questions; everything the table and the report say."""
    problems = tasks.held_out_problems(settings.per_task, settings.seed)
    questions = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    evaluations, models = [], {}
    for stage, (name, title) in MODELS.items():
        model, tokenizer = load_model(folder / stage), load_tokenizer(folder / stage)
        models[name] = (str(folder / stage), model, tokenizer)
        started = time.perf_counter()
        replies = reply_to(model, tokenizer, questions)
        evaluations.append(judge(name, title, problems, replies, time.perf_counter() - started))
    conversation = converse(model, tokenizer, _chat_questions(settings.seed))
    parameters = sum(p.numel() for p in model.parameters())
    results = summarise(folder, settings, problems, evaluations, conversation, parameters)
    return results | {"mt_bench": run_mt_bench(folder / MT_BENCH, models, settings.seed)}


def _chat_questions(seed: int) -> list[str]:
    """Small talk, a held-out question, more about the same, and thanks."""
    lists = [p for p in tasks.held_out_problems(2, seed + 1) if p.task == "reverse" and tasks.POLITE not in p.prompt]
    problem = lists[0]
    return ["Hello!", problem.prompt, "And the first word?", "Thank you!"]


def summarise(
    folder: Path,
    settings: Settings,
    problems: list[tasks.Problem],
    evaluations: list[Evaluation],
    conversation: list[dict[str, str]],
    parameters: int,
) -> dict[str, Any]:
    base, sft, dpo = evaluations
    right = difference([g.correct for g in sft.grades], [g.correct for g in dpo.grades])
    kind = difference([g.kind for g in sft.grades], [g.kind for g in dpo.grades])
    gain = sft.correct().value - base.correct().value
    here = shlex.quote(str(folder))
    # The last of each task is an impolite question: there the two trained models can differ.
    shown = {problem.task: at for at, problem in enumerate(problems)}
    return {
        "headline": f"SFT taught it to answer: {percent(sft.correct().value)} right. DPO taught it to be kind: "
        f"{percent(sft.kind().value)} became {percent(dpo.kind().value)}.",
        "summary": SUMMARY,
        "model_line": f"{parameters:,} parameters; Mamba-1, layers: {settings.layers}, width: {settings.hidden_size}, "
        f"state: {settings.state_size}. Every stage packs without padding and without a leak between examples.",
        "tiles": [
            {"value": f"{_points(gain)} points", "label": "right answers, SFT over base"},
            {"value": f"{_points(kind.value)} points", "label": f"kind replies, DPO over SFT ({_interval(kind)})"},
            {"value": f"{_points(right.value)} points", "label": f"right answers, DPO over SFT ({_interval(right)})"},
        ],
        "targets": [
            {"text": "SFT answers at least 50 points more right than the base model", "met": gain >= 0.5},
            {"text": "DPO is kind at least 20 points more often than SFT", "met": kind.value >= 0.2},
            {
                "text": "DPO keeps the right answers: it loses at most 2 points, or no more than the noise",
                "met": right.value >= -0.02 or right.high >= 0,
            },
        ],
        "models": [evaluation.to_dict() for evaluation in evaluations],
        "examples": {task: problems[at].prompt for task, at in shown.items()},
        "samples": [
            {
                "prompt": problems[at].prompt,
                "replies": [{"text": e.replies[at], **e.grades[at]._asdict()} for e in evaluations],
            }
            for at in shown.values()
        ],
        "conversation": conversation,
        "stages": {stage: {"title": TITLES[stage], "facts": stage_facts(folder, stage)} for stage in MODELS},
        "commands": [
            f"mambalign sft {here}/recipes/sft.yaml --learning_rate 1e-3 --output_dir {here}/sft-slower",
            f"mambalign dpo {here}/recipes/dpo.yaml --beta 0.5 --output_dir {here}/dpo-tighter",
            f"mambalign check {here}/recipes/dpo.yaml",
        ],
        "footer": f"Written by mambalign demo, seed {settings.seed}. Models, data, recipes, metrics: in {folder}.",
    }


def _points(share: float) -> str:
    return f"{round(100 * share):+d}"  # an integer has no -0


def _interval(value: Difference) -> str:
    return f"95%: {_points(value.low)} to {_points(value.high)}"


def stage_facts(folder: Path, stage: str) -> dict[str, str]:
    """What the run folder says of itself, in words."""
    run_folder = folder / stage
    state = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text(encoding="utf-8"))
    report = json.loads((run_folder / "data.json").read_text(encoding="utf-8"))["train"]["report"]
    metrics = read_metrics(run_folder / "metrics.jsonl")
    tokens = max((row.get("num_tokens", 0) for row in metrics), default=0)
    speeds = [row["tokens_per_second"] for row in metrics if row.get("tokens_per_second")]
    seconds = (datetime.fromisoformat(state["ended"]) - datetime.fromisoformat(state["started"])).total_seconds()
    pairs, batch = stage == "dpo", recipe["per_device_train_batch_size"]
    fill = tokens / max(1, state["global_step"] * batch * recipe["max_length"])
    # A pair's prompt is a shared parent of both replies: what is not trained is computed once instead of twice.
    saved = report["tokens"] - report["trained_tokens"]
    shared = f"{saved:,} ({percent(saved / (report['tokens'] + saved))})"
    return {
        "examples": f"{report.get('kept', report.get('rows', 0)):,}",
        "steps": f"{state['global_step']:,}",
        "tokens": f"{tokens:,.0f}",
        "seconds": f"{seconds:.0f}",
        "tokens per second (median)": f"{sorted(speeds)[len(speeds) // 2]:,.0f}" if speeds else "–",
        "packing fill": "–" if pairs else percent(fill, 1),
        "prompt tokens saved by sharing": shared if pairs else "–",
        "batch": f"{batch} pairs" if pairs else f"{batch} x {recipe['max_length']} tokens",
        "peak learning rate": f"{recipe['learning_rate']:g}",
        "held-out loss": f"{state['metrics'].get('eval_loss', float('nan')):.3f}",
    }


def show(results: dict[str, Any], console: Console) -> None:
    """The table and the sample conversation, on the terminal."""
    total = results["models"][0]["correct"]["total"]
    console.print(f"{total} held-out questions, greedy replies, 95% intervals", soft_wrap=True)
    table = Table()
    for column in ("", "right", "kind closing"):
        table.add_column(column)
    for model in results["models"]:
        cells = [
            f"{percent(s['hits'] / s['total'], 1)}  [dim]{percent(s['low'])} – {percent(s['high'])}[/]"
            for s in (model["correct"], model["kind"])
        ]
        table.add_row(model["title"], *cells)
    console.print(table)
    for target in results["targets"]:
        verdict = "[green]met[/]    " if target["met"] else "[red]not met[/]"
        console.print(f"  {verdict} {target['text']}", soft_wrap=True)
    show_mt_bench(results, console)
    console.print("\n[bold]A conversation with the aligned model[/]")
    for message in results["conversation"]:
        colour = "blue" if message["role"] == "user" else "green"
        said = escape(message["content"])
        console.print(f"  [{colour}]{message['role']:>9}[/]  {said}", highlight=False, soft_wrap=True)


def show_mt_bench(results: dict[str, Any], console: Console) -> None:
    """The scores of the evaluation in MT-Bench's format, named after who judged."""
    found = results["mt_bench"]
    console.print(
        f"\n{found['questions']} two-turn questions in MT-Bench's format (not MT-Bench), rated 1 to 10 by "
        f"{found['judge']}: 10 right and kind, 8 right, 3 kind but wrong, 1 neither",
        soft_wrap=True,
    )
    table = Table()
    for column in ("", "turn 1", "turn 2", "both", "95% interval, by question"):
        table.add_column(column)
    titles = {model["name"]: model["title"] for model in results["models"]}
    for name, scores in found["scores"].items():
        means = (f"{scores[key]:.2f}" for key in ("first_turn", "second_turn", "average"))
        low, high = scores["errors"]["average"]["interval"]
        table.add_row(titles[name], *means, f"{low:.2f} – {high:.2f}")
    console.print(table)
