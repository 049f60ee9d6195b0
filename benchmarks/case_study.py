"""Pre-training, SFT, DPO and SimPO of a small Mamba on real data, packed and padded, and what leaking states cost.

    python benchmarks/case_study.py --data ../shared/data              # everything, on a GPU: minutes
    python benchmarks/case_study.py --tiny --work TMP --out TMP/a.json # every line of it on a CPU: about 2 minutes
    python benchmarks/case_study.py --plot-only JSON                   # plot and tables of an earlier run, anywhere
    python benchmarks/case_study.py --write-docs JSON                  # its tables, into docs/case-study.md

DATA holds `text`, `sft` and `dpo` (folders of parquet files) and `tokenizer`. The recipes are those of
`recipes/case-study`; the ways that are no recipes are in `case_study_ways.py`. Every stage leaves a file in
WORK/results and is passed over where that is there; the JSON holds what is there, raw enough for every table and plot,
which `case_study_report.py` makes of it. No text of the data is in it: prompts are named by file and row. `--only`
names groups of stages: packed, leak, padded; the last two need the models of the first. Everything took 334 seconds on
an H200 with `--padded-seconds 15`; the default of 60 adds about 3 minutes.

The padded runs begin from the same weights as the packed ones and read the same examples in the same steps, so their
losses can be compared one by one. They are slower, and end after `--padded-seconds` of training each, wherever they
are; held-out figures beside them are at that point.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import runpy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from case_study_ways import document_logps, exactness, in_place, pair_logps
from common import RESULTS

from mambalign.bench.measure import environment
from mambalign.data.packing import PackedRows
from mambalign.recipe import Recipe, load_recipe
from mambalign.support import write_json

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "case-study"
FOLDERS = {"cpt": "text", "sft": "sft", "dpo": "dpo", "simpo": "dpo"}
STARTS = {"cpt": "new", "sft": "cpt", "dpo": "sft", "simpo": "sft"}
SEEDS = (1, 2, 3)
GROUPS = ("packed", "leak", "padded")
SIZE, TINY_SIZE = (512, 10), (32, 2)  # width and layers
PROMPTS, NEW_TOKENS = 64, 192  # whose answers are counted; tokens an answer may have
SHOWN, SHOWN_FROM = 400, "sft/test_sft.parquet"  # characters that are kept of an answer to be shown; whose prompts

TINY: dict[str, Any] = {
    "max_train_samples": 48, "max_eval_samples": 6, "max_steps": 3, "max_length": 192, "bf16": False,
    "per_device_train_batch_size": 3, "per_device_eval_batch_size": 4, "dataloader_num_workers": 0,
    "preprocessing_num_workers": None, "logging_steps": 1, "eval_steps": 2,
}  # fmt: skip


class Study:
    """The stages, what each needs, and where its result lies."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.tiny = options, options.tiny
        self.work: Path = options.work
        self.results = self.work / "results"
        self.results.mkdir(parents=True, exist_ok=True)
        self.bf16 = not self.tiny
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def stages(self) -> dict[str, tuple[str, Callable[[], dict[str, Any]]]]:
        """Name -> (group, what makes its result), in the order in which they can run."""
        found: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {}
        for name in STARTS:
            found[name] = ("packed", lambda name=name: self.train(name))
        found["held-out"] = ("packed", self.held_out)
        found["answers"] = ("packed", self.answers)
        found["exactness"] = ("packed", self.exactness)
        for seed in SEEDS:
            for way in ("packed", "leaky"):
                found[f"leak-{way}-{seed}"] = ("leak", lambda way=way, seed=seed: self.leak(way, seed))
        for name, way in (("sft", "padded"), ("dpo", "padded"), ("sft", "sorted"), ("cpt", "padded")):
            found[f"{name}-{way}"] = ("padded", lambda name=name, way=way: self.train(name, way))
        return found

    def run(self) -> None:
        for name, (group, make) in self.stages().items():
            target = self.results / f"{name}.json"
            if group not in self.options.only or target.exists():
                continue
            began = time.monotonic()
            print(f"--- {name}", flush=True)
            result = make()
            write_json(target, result | {"seconds": time.monotonic() - began})
            print(f"--- {name}: {time.monotonic() - began:.0f} s", flush=True)
            self.write()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def write(self) -> None:
        """All there is, as one file: what the plots and tables are made of."""
        stages = {path.stem: json.loads(path.read_text()) for path in sorted(self.results.glob("*.json"))}
        settings = {
            "tiny": self.tiny, "size": TINY_SIZE if self.tiny else SIZE, "new_tokens": self.new_tokens,
            "padded_seconds": self.options.padded_seconds, "seeds": SEEDS,
        }  # fmt: skip
        study = {"benchmark": "case_study", "environment": environment(), "settings": settings, "stages": stages}
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        self.options.out.write_text(json.dumps(rounded(study), separators=(",", ":")) + "\n")

    # ------------------------------------------------------------------------------------------------------ recipes

    @property
    def new_tokens(self) -> int:
        return 8 if self.tiny else NEW_TOKENS

    def recipe(self, name: str, **changes: Any) -> Recipe:
        """The recipe with this study's folders. Nothing is saved on the way: a stage that was cut short begins anew."""
        recipe = load_recipe(RECIPES / f"{name}.yaml")
        changes = (TINY if self.tiny else {}) | changes
        if self.tiny and recipe.stage == "dpo":
            changes |= {"max_train_samples": 12, "max_length": 128, "max_prompt_length": 64}
        if self.tiny and recipe.stage == "cpt":
            changes |= {"max_train_samples": 4, "max_eval_samples": 1}  # of thousands of tokens each
        return replace(
            recipe,
            **{
                "model_name_or_path": str(self.work / STARTS[name]),
                "dataset_mixer": {str(self.options.data / FOLDERS[name]): 1.0},
                "output_dir": str(self.work / name),
                "save_strategy": "no",
                "report_to": ["none"],
                "disable_tqdm": True,
                "resume": "never",
            }
            | changes,
        )

    def new_model(self) -> None:
        if not (self.work / "new").exists():
            make = runpy.run_path(str(ROOT / "recipes" / "first-run" / "new_model.py"))["main"]
            make(str(self.options.data / "tokenizer"), self.work / "new", *(TINY_SIZE if self.tiny else SIZE))

    # ------------------------------------------------------------------------------------------------------- stages

    def train(self, name: str, way: str = "packed", **changes: Any) -> dict[str, Any]:
        """One run: what it took, its curves, its last metrics."""
        from mambalign.train.run import DATA, run

        self.new_model()
        folder = self.work / (name if way == "packed" else f"{name}-{way}")
        recipe = self.recipe(name, **({"output_dir": str(folder)} | changes))
        with in_place(way, self.options.padded_seconds if way in ("padded", "sorted") else None) as facts:
            result = run(recipe.stage or name, recipe)
        folder = Path(str(recipe.output_dir))
        data = {split: some["report"] for split, some in json.loads((folder / DATA).read_text()).items()}
        epoch = {"batch": recipe.per_device_train_batch_size, "epochs": recipe.num_train_epochs, "data": data}
        return {"way": way, "metrics": result.metrics, "curve": curve(folder)} | epoch | facts

    def leak(self, way: str, seed: int) -> dict[str, Any]:
        """SFT for one epoch; held-out log-probs of every document alone, which is right, and in leaking rows. Their
        numbers of tokens are those of `held_out`."""
        folder = self.work / f"leak-{way}-{seed}"
        changes = {"seed": seed, "num_train_epochs": 1.0, "eval_strategy": "no", "do_eval": False}
        result = self.train("sft", way, output_dir=str(folder), **changes)
        model, rows = self.model(folder), self.rows("sft")
        alone, leaking = (
            document_logps(model, rows(packing), self.bf16, leak=leak)[0]
            for packing, leak in ((False, False), (True, True))
        )
        return result | {"seed": seed, "alone": alone, "leaking": leaking}

    def held_out(self) -> dict[str, Any]:
        """Log-probs of held-out documents and pairs under the models of all stages, and their numbers of tokens."""
        found: dict[str, Any] = {data: {"logps": {}} for data in ("text", "sft", "pairs")}
        text, sft, pairs = (self.rows(name)(False) for name in ("cpt", "sft", "dpo"))
        for name in ("new", "cpt", "sft", "dpo", "simpo"):
            model = self.model(self.work / name)
            logps = {"text": document_logps(model, text, self.bf16), "sft": document_logps(model, sft, self.bf16)}
            if name in ("sft", "dpo", "simpo"):
                logps["pairs"] = pair_logps(model, pairs, self.bf16)
            for data, (sums, counts) in logps.items():
                found[data]["logps"][name], found[data]["tokens"] = sums, counts
        return found | {"betas": {n: self.recipe(n).beta for n in ("dpo", "simpo")}}

    def exactness(self) -> dict[str, Any]:
        """One step in fp32, packed and padded, of the SFT result."""
        model, count = self.model(self.work / "sft"), 4 if self.tiny else 16
        return {
            "sft": exactness(model, self.rows("sft")(True), "sequences", count),
            "dpo": exactness(model, self.rows("dpo")(False), "pairs", count),
        }

    def answers(self) -> dict[str, Any]:
        """Greedy answers of every stage to fixed held-out prompts: the first of every source of the SFT data, which
        are shown, and the first `PROMPTS` single-turn prompts of the pairs, whose answers are counted. Answers are
        kept, prompts are not: they are text of the data, and are named by file and row."""
        from mambalign.data.chat import encode_prompt
        from mambalign.generation.engine import Engine
        from mambalign.generation.requests import Request, Sampling
        from mambalign.models.checkpoint import load_tokenizer

        shown, counted = (
            shown_prompts(self.options.data),
            counted_prompts(self.options.data, 4 if self.tiny else PROMPTS),
        )
        tokenizer = load_tokenizer(str(self.work / "sft"))  # with the template, for the pre-trained model too
        requests = [
            Request(tuple(encode_prompt(tokenizer, messages)), Sampling(temperature=0, max_new_tokens=self.new_tokens))
            for messages in [*[messages for _, _, messages in shown], *counted]
        ]
        prompts = [{"source": source, "file": SHOWN_FROM, "row": row} for source, row, _ in shown]
        found: dict[str, Any] = {"prompts": prompts}
        for name in STARTS:
            engine = Engine(self.model(self.work / name), tokenizer)
            texts = [some[0] for some in engine.generate(requests)]
            found[name] = {
                "shown": [" ".join(answer.text.split())[:SHOWN] for answer in texts[: len(shown)]],
                "lengths": [len(answer.tokens) for answer in texts[len(shown) :]],
                "stopped": [answer.finish_reason == "stop" for answer in texts[len(shown) :]],
            }
            del engine
        return found

    def model(self, folder: Path) -> Any:
        from mambalign.models.checkpoint import load_model

        return load_model(str(folder), dtype="float32", device=self.device).eval()

    def rows(self, name: str) -> Callable[[bool], PackedRows]:
        """Held-out rows of a recipe: packed, or each example alone."""
        from mambalign.data.chat import apply_template, set_pad_token
        from mambalign.models.checkpoint import load_tokenizer
        from mambalign.train.run import load_data

        recipe = self.recipe(name)
        tokenizer = load_tokenizer(str(self.work / STARTS[name]))  # as the run has it, which has filled the cache
        if name == "cpt":
            set_pad_token(tokenizer)
        else:
            apply_template(tokenizer, recipe.chat_template)
        _, held_out = load_data(recipe, str(recipe.stage), tokenizer)
        assert held_out is not None
        kind: Any = "pairs" if recipe.stage == "dpo" else "sequences"
        return lambda packing: PackedRows(
            held_out.dataset, max_length=recipe.max_length, kind=kind, seed=recipe.seed, packing=packing
        )


def rounded(value: Any) -> Any:
    """The same with floats of six digits, and without a point where they are whole."""
    if isinstance(value, dict):
        return {key: rounded(some) for key, some in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(some) for some in value]
    if isinstance(value, float) and math.isfinite(value):
        short = float(f"{value:.6g}")
        return int(short) if short.is_integer() else short
    return value


def shown_prompts(data: Path) -> list[tuple[str, int, list[dict[str, str]]]]:
    """(source, row, messages up to the first answer) of the first held-out conversation of every source."""
    from pyarrow.parquet import read_table

    first: dict[str, tuple[str, int, list[dict[str, str]]]] = {}
    for number, row in enumerate(read_table(data / SHOWN_FROM, columns=["source", "messages"]).to_pylist()):
        if row["source"] not in first:
            roles = [message["role"] for message in row["messages"]]
            first[row["source"]] = (row["source"], number, row["messages"][: roles.index("assistant")])
    return list(first.values())


def counted_prompts(data: Path, count: int) -> list[list[dict[str, str]]]:
    """The first held-out preference prompts of a single turn, those about harm left out."""
    from pyarrow.parquet import read_table

    rows = read_table(data / "dpo" / "test_prefs.parquet", columns=["source", "prompt", "chosen"]).to_pylist()
    prompts = [row["prompt"] for row in rows if "harm" not in row["source"] and len(row["chosen"]) == 2]
    return [[{"role": "user", "content": prompt}] for prompt in prompts[:count]]


def curve(folder: Path) -> dict[str, list[dict[str, float]]]:
    """`train` and `eval` lines of a run's log; training lines have `train_s`, seconds of training so far."""
    from mambalign.train.callbacks import METRICS, read_metrics

    seconds = tokens = 0.0
    lines: dict[str, list[dict[str, float]]] = {"train": [], "eval": []}
    names = ("step", "loss", "num_tokens", "rewards/accuracies", "rewards/margins", "eval_loss")
    names += ("eval_rewards/accuracies", "eval_rewards/margins")
    for line in read_metrics(folder / METRICS):
        kept = {name: line[name] for name in names if name in line}
        if "tokens_per_second" in line:
            seconds += (line["num_tokens"] - tokens) / line["tokens_per_second"]
            tokens = line["num_tokens"]
            lines["train"].append(kept | {"train_s": round(seconds, 3)})
        elif "eval_loss" in line:
            lines["eval"].append(kept | {"train_s": round(seconds, 3), "num_tokens": tokens})
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=Path("runs/case-study"), help="models and results of stages")
    parser.add_argument("--out", type=Path, default=RESULTS / "case_study.json", help="plots are written beside it")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="groups of stages")
    parser.add_argument("--padded-seconds", type=float, default=60.0, help="training of each padded run, at most")
    parser.add_argument("--tiny", action="store_true", help="a few steps on a CPU; its figures mean nothing")
    parser.add_argument("--plot-only", type=Path, metavar="JSON")
    parser.add_argument("--write-docs", type=Path, metavar="JSON")
    options = parser.parse_args(argv)
    import case_study_report as report

    given = options.plot_only or options.write_docs
    if given is None:
        if not torch.cuda.is_available() and not options.tiny:
            raise SystemExit("no CUDA device: it would take days (--tiny tries the script without one)")
        study = Study(options)
        study.run()
        study.write()
        given = options.out
    results = json.loads(given.read_text())
    if options.write_docs is None:
        report.draw(results, given)
        print(report.text(results))
    else:
        report.write_docs(results, ROOT / "docs" / "case-study.md")


if __name__ == "__main__":
    main()
