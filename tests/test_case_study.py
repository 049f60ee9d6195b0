"""The case study: recipes, ways of computing a step (one equal to ours, one that leaks), statistics, tables, page."""

from __future__ import annotations

import copy
import importlib
import json
import math
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mambalign.cli.cluster import load_pipeline
from mambalign.data.batches import collate_sequences
from mambalign.models.mamba import MambaForCausalLM
from mambalign.recipe import load_recipe
from mambalign.train import run as run_module

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "case-study"
RESULTS = ROOT / "benchmarks" / "results" / "case_study.json"
PAGE = ROOT / "docs" / "case-study.md"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("case_study_ways", monkeypatch)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("case_study_report", monkeypatch)


def tiny_model() -> MambaForCausalLM:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, initializer_range=0.3)
    return MambaForCausalLM(config).eval()


def sequences(*lengths: int) -> list[dict[str, Any]]:
    made = np.random.default_rng(0)
    return [
        {"input_ids": made.integers(64, size=n), "loss_mask": np.ones(n, np.int64), "index": i}
        for i, n in enumerate(lengths)
    ]


def pairs(count: int) -> list[dict[str, Any]]:
    made = np.random.default_rng(1)
    found = []
    for index in range(count):
        pair: dict[str, Any] = {"prompt_ids": made.integers(64, size=2 + index), "index": index}
        for side, length in (("chosen", 5 + index), ("rejected", 4)):
            pair |= {f"{side}_ids": made.integers(64, size=length), f"{side}_mask": np.ones(length, np.int64)}
        found.append(pair)
    return found


# ------------------------------------------------------------------------------------------------------------ recipes


def test_the_recipes_are_a_chain_and_simpo_changes_objective_and_rate_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # a pipeline's recipes are relative to the working directory
    pipeline = load_pipeline(RECIPES / "pipeline.yaml")
    assert [stage.name for stage in pipeline.stages] == ["new", "cpt", "sft", "dpo", "simpo"]
    recipes = {name: load_recipe(RECIPES / f"{name}.yaml") for name in ("cpt", "sft", "dpo", "simpo")}
    starts = script("case_study", monkeypatch).STARTS
    for name, recipe in recipes.items():
        assert recipe.notes == [] and recipe.test_splits
        assert recipe.model_name_or_path == pipeline.stage(starts[name]).output_dir
        assert recipe.output_dir == pipeline.stage(name).output_dir
    dpo, simpo = recipes["dpo"].to_dict(), recipes["simpo"].to_dict()
    changed = {"loss_type", "beta", "simpo_gamma", "learning_rate", "output_dir"}
    assert {key for key in dpo if dpo[key] != simpo[key]} == changed
    assert simpo["learning_rate"] == pytest.approx(dpo["learning_rate"] / 5)  # the page says a fifth


def test_no_recipe_key_pads_or_leaks() -> None:
    keys = load_recipe(RECIPES / "sft.yaml").to_dict()
    assert not [key for key in keys if "leak" in key or "padding" in key]


# --------------------------------------------------------------------------------------------------------------- ways


def test_leaky_rows_change_the_second_document_and_not_the_first(ways: ModuleType) -> None:
    model, batch = tiny_model(), collate_sequences(sequences(9, 7, 5))
    leaking = ways.leaky(batch, [2, 1])  # the third document has a row of its own
    assert leaking.segments.lengths.tolist() == [16, 5]
    with torch.no_grad():
        right, wrong = (model(b.input_ids[None], segments=b.segments).logits[0] for b in (batch, leaking))
    torch.testing.assert_close(wrong[:9], right[:9])
    torch.testing.assert_close(wrong[16:], right[16:])
    assert (wrong[9:16] - right[9:16]).abs().max() > 0.1
    with pytest.raises(AssertionError):
        ways.leaky(batch, [2])


@pytest.mark.parametrize("kind", ["sequences", "pairs"])
def test_padded_is_packed_and_leaky_is_not(ways: ModuleType, kind: str) -> None:
    examples = sequences(*range(3, 40, 2)) if kind == "sequences" else pairs(18)
    assert len(examples) > ways.ROWS, "several padded passes"
    rows = [examples[start : start + 3] for start in range(0, len(examples), 3)]
    if kind == "pairs":
        rows = [[pair] for pair in examples]
    facts = ways.exactness(tiny_model(), rows, kind, len(rows))
    assert facts["sequences"] == len(examples) * (2 if kind == "pairs" else 1)
    assert facts["loss_difference"] < 1e-5 and facts["gradient_error"] < 1e-5
    if kind == "sequences":
        assert facts["leaky_loss_difference"] > 1e-3 and facts["leaky_gradient_error"] > 1e-2


def test_held_out_log_probs_are_each_documents_own(ways: ModuleType) -> None:
    model, examples = tiny_model(), sequences(6, 11, 4, 9)
    alone, tokens = ways.document_logps(model, [[example] for example in examples], False)
    packed, same = ways.document_logps(model, [examples[2:], examples[:2]], False)  # rows in any order
    assert tokens == same == [5, 10, 3, 8]
    assert alone == pytest.approx(packed, abs=0.011)
    leaking, _ = ways.document_logps(model, [examples[:2], examples[2:]], False, leak=True)
    assert leaking[::2] == pytest.approx(alone[::2], abs=0.011)
    assert min(abs(a - b) for a, b in zip(leaking[1::2], alone[1::2], strict=True)) > 0.05
    _, counts = ways.pair_logps(model, [[pair] for pair in pairs(3)], False)
    assert counts == [[5, 4], [6, 4], [7, 4]]


def test_a_run_in_another_way_is_the_run(ways: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same losses padded, others when states leak; a bound ends it early; afterwards all is as before."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "recipes" / "tiny" / "prepare.py"))["main"](Path("data/tiny"))
    curve = script("case_study", monkeypatch).curve
    before = run_module.PackedTrainer, run_module.Collator
    losses = {}
    bounds = {"packed": None, "padded": None, "sorted": 0.0, "leaky": 0.0}
    for way, bound in bounds.items():
        overrides = ["--output_dir", way, "--max_steps", "4", "--logging_steps", "1", "--report_to", "none"]
        overrides += ["--eval_strategy", "no", "--save_strategy", "no"]
        recipe = load_recipe(ROOT / "recipes/tiny/sft/config_full.yaml", overrides, stage="sft")
        with ways.in_place(way, bound) as facts:
            run_module.run("sft", recipe)
        losses[way] = [line["loss"] for line in curve(Path(way))["train"]]
        assert (facts["steps"], facts["max_steps"]) == (4 if bound is None else 1, 4)
        assert facts["training_s"] > 0 and bool(facts["padded_positions"]) is (way in ("padded", "sorted"))
    assert len(losses["packed"]) == 4 and losses["padded"] == pytest.approx(losses["packed"], rel=1e-5)
    assert losses["sorted"] == pytest.approx(losses["packed"][:1], rel=1e-5)
    assert losses["leaky"][0] != pytest.approx(losses["packed"][0], rel=1e-6)
    assert (run_module.PackedTrainer, run_module.Collator) == before


# --------------------------------------------------------------------------------------------------------- statistics


def test_strata_hold_every_pair_once(report: ModuleType) -> None:
    lengths = np.array([-400.0, -50, -49, 0, 1, 50, 51, 300, 301])
    margins = np.array([-1.0, 1, 1, -1, 1, 1, 1, 1, 2])
    rows = report.strata(lengths, margins)
    assert [row["right"].total for row in rows] == [2, 2, 2, 1, 1, 1]
    assert [row["right"].hits for row in rows] == [1, 1, 2, 1, 1, 1]
    assert rows[0]["margin"].mean == 0.0 and rows[-1]["margin"].mean == 2.0
    empty = report.strata(lengths[:2], margins[:2])[-1]
    assert empty["right"].total == 0 and math.isnan(empty["margin"].mean)


def test_margins_are_the_rewards_of_their_papers(report: ModuleType) -> None:
    found = {
        "logps": {"sft": [[-10.0, -6.0]], "dpo": [[-8.0, -7.0]]},
        "tokens": [[5, 2]],
    }
    assert report.margins(found, "dpo", reference="sft", average=False, beta=0.1) == pytest.approx([0.3])
    assert report.margins(found, "dpo", reference="sft", average=True) == pytest.approx([2 / 5 + 1 / 2])
    assert report.margins(found, "dpo", reference=None, average=True, beta=2.0) == pytest.approx([2 * (-1.6 + 3.5)])
    assert report.length_differences(found).tolist() == [3.0]


def test_a_loss_is_by_token_and_its_interval_by_document(report: ModuleType) -> None:
    value, low, high = report.mean_loss([-10.0, -1.0], [5, 1])
    assert value == pytest.approx(11 / 6) and (low, high) == (1.0, 2.0)  # one document drawn twice, at worst
    assert report.loss_difference([-10.0, -1.0], [-16.0, -1.0], [5, 1])[0] == pytest.approx(1.0)
    value, low, high = report.mean_loss([-2.0, -4.0] * 200, [1, 1] * 200)
    assert low < value < high and (high - low) / 3.92 == pytest.approx(1 / math.sqrt(400), rel=0.1)


def test_rank_correlation(report: ModuleType) -> None:
    assert report.rank_correlation(np.array([1.0, 2, 9]), np.array([3.0, 4, 5])) == pytest.approx(1.0)
    assert report.rank_correlation(np.array([1.0, 1, 2]), np.array([1.0, 2, 3])) == pytest.approx(math.sqrt(3) / 2)


# --------------------------------------------------------------------------------------------------------------- page


def made_up() -> dict[str, Any]:
    """Results of every stage in the form of the JSON; none of the numbers was measured."""
    random = np.random.default_rng(0)
    line = {"loss": 3.0, "train_s": 1.0}
    train = [line | {"step": step, "num_tokens": 500 * step, "train_s": float(step)} for step in (1, 2, 3)]
    stage = {
        "way": "packed", "steps": 3, "max_steps": 6, "batch": 4, "training_s": 3.0, "before_training_s": 1.0,
        "padded_positions": None, "peak_gib": 2.0, "utilisation": 50.0, "metrics": {"eval_loss": 2.5},
        "curve": {"train": train, "eval": [{"step": 3, "eval_loss": 2.5, "num_tokens": 1500, "train_s": 3.0}]},
    }  # fmt: skip
    slow = copy.deepcopy(stage) | {"way": "padded", "padded_positions": 6000}
    for line in slow["curve"]["train"]:
        line["train_s"] *= 4
    logps = random.normal(-20, 3, 12).tolist()
    names = ("cpt", "sft", "dpo", "simpo")
    pair_logps = {name: random.normal(-50, 9, (40, 2)).tolist() for name in names[1:]}
    both = {"logps": pair_logps, "tokens": random.integers(5, 200, (40, 2)).tolist()}
    facts = {"sequences": 4, "loss_difference": 1e-7, "gradient_error": 1e-7}
    leaks = facts | {"leaky_loss_difference": 0.1, "leaky_gradient_error": 0.2}
    answers = {name: {"shown": ["a ``b``\n"], "lengths": [3, 5], "stopped": [True, False]} for name in names}
    prompts = [{"source": "here", "file": "sft/test_sft.parquet", "row": 7}]
    stages: dict[str, Any] = {name: stage for name in names}
    stages |= {f"{name}-padded": slow for name in names[:3]}
    stages["exactness"] = {"sft": leaks, "dpo": facts}
    documents = {"logps": {name: logps for name in ("new", *names)}, "tokens": [10] * 12}
    held_out: dict[str, Any] = {"text": documents, "sft": documents}
    stages["held-out"] = held_out | {"pairs": both, "betas": {"dpo": 0.1, "simpo": 2.0}}
    stages["answers"] = {"prompts": prompts, **answers}
    worse = [value - 1 for value in logps]
    for seed in (1, 2):
        stages[f"leak-packed-{seed}"] = {"alone": logps, "leaking": worse}
        stages[f"leak-leaky-{seed}"] = {"alone": worse, "leaking": logps}
    versions = {"date": "today", "card": "CARD", "torch": "2", "transformers": "5"}
    settings = {"tiny": False, "size": [512, 10], "seeds": [1, 2], "padded_seconds": 60.0}
    return {"benchmark": "case_study", "environment": versions, "settings": settings, "stages": stages}


def test_tables_and_plot_come_from_the_json_alone(report: ModuleType, tmp_path: Path) -> None:
    results = json.loads(json.dumps(made_up()))
    tables = {name: table(results) for name, table in report.TABLES.items()}
    assert "| SFT, padded | 3 of 6 | 0.0 M | 75% |" in tables["runs"] and "500 tokens/s" in tables["runs"]
    late = copy.deepcopy(results)
    late["stages"]["sft-padded"] |= {"steps": 4, "padded_positions": 8000}  # a step after the last log line
    assert "| SFT, padded | 4 of 6 | 0.0 M | 75% |" in report.runs_table(late)
    assert "| SFT, padded | 3 | 3.000 to 3.000 | 0.0e+00 | 0.0e+00 | 4.0x |" in tables["agreement"]
    assert "Leaky minus leak-free, read alone: 0.1000 ± 0.0000 over seeds (+0.1000, +0.1000)" in tables["leakage"]
    assert "**here**, row 7 of `sft/test_sft.parquet`" in tables["samples"] and "`` a 'b' ``" in tables["samples"]
    target = report.draw(results, tmp_path / "made_up.json")
    assert target == tmp_path / "made_up.png" and target.stat().st_size > 10_000


@pytest.fixture
def measured() -> dict[str, Any]:
    """The committed results."""
    if not RESULTS.exists():
        pytest.skip("no results are committed")
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return results


def test_the_sentences_of_the_page_have_the_numbers_of_the_tables(report: ModuleType, measured: dict[str, Any]) -> None:
    prose, stages = _prose(), measured["stages"]
    by_seed = report.leakage_losses(measured)
    losses = {key: float(np.mean(values)) for key, values in by_seed.items()}
    right, leaky = losses["packed", "alone"], losses["leaky", "alone"]
    costs = np.subtract(by_seed["leaky", "alone"], by_seed["packed", "alone"]).tolist()
    cost = report.clustered_mean(costs)
    kept = stages["held-out"]
    loss = {
        (data, name): f"{report.mean_loss(kept[data]['logps'][name], kept[data]['tokens'], 1)[0]:.3f}"
        for data in ("text", "sft") for name in ("cpt", "sft", "dpo", "simpo")
    }  # fmt: skip
    moved = [abs(float(loss[data, "dpo"]) - float(loss[data, "sft"])) for data in ("text", "sft")]
    assert max(moved) < 0.1, "the page says that DPO moves neither loss by more"
    course = {name: [line["eval_loss"] for line in stages[name]["curve"]["eval"]] for name in ("dpo", "simpo")}
    lines = stages["dpo"]["curve"]["eval"]
    lowest = min(lines, key=lambda line: line["eval_loss"])
    (rights, gains) = ([line[f"eval_rewards/{name}"] for line in lines] for name in ("accuracies", "margins"))
    each = np.sort(np.logaddexp(0, -report.scorings(measured)["DPO"]))
    exact = stages["exactness"]["sft"]
    seconds = sum(stage["seconds"] for stage in stages.values())
    rate = load_recipe(RECIPES / "simpo.yaml").learning_rate
    said = [
        f"less than {math.ceil(exact['loss_difference'] * 1e7) / 10:.1f}e-6 of itself",
        f"the gradient by {exact['gradient_error'] * 1e5:.1f}e-5",
        f"A leaky row is {exact['leaky_loss_difference']:.0%} off",
        f"{exact['leaky_gradient_error']:.0%} in the gradient",
        f"took 334 seconds on one H200, {seconds:.0f} of them in the stages",
        f"--padded-seconds {measured['settings']['padded_seconds']}\n",
        f"learning rate, {rate * 1e5:.0f}e-5 instead of 1e-4",
        f"leaky rows costs {cost.mean:.4f} ± {cost.standard_error:.4f} of held-out loss",
        f"costs {cost.mean:.4f} ± {cost.standard_error:.4f} ({leaky:.3f} instead of {right:.3f})",
        f"between {min(costs):.4f} and {max(costs):.4f} in each of the three seeds",
        f"in leaky rows costs {losses['packed', 'leaking'] - right:.3f}",
        f"shows {losses['leaky', 'leaking']:.4f}, and read rightly {leaky:.4f}",
        f"SFT takes the conversations from {loss['sft', 'cpt']} to {loss['sft', 'sft']}",
        f"the novels: {loss['text', 'cpt']} becomes {loss['text', 'sft']}",
        f"conversations go from {loss['sft', 'sft']} to {loss['sft', 'simpo']}, "
        f"novels from {loss['text', 'sft']} to {loss['text', 'simpo']}",
        f"was {course['dpo'][0]:.3f} at its first evaluation, after {lines[0]['step']} of 294 steps",
        f"lowest after {lowest['step']} steps, {lowest['eval_loss']:.3f}, and is {course['dpo'][-1]:.3f} at the end",
        f"({rights[0]:.2f}, then {rights[-1]:.2f}): margins grew from {gains[0]:.1f} to {gains[-1]:.1f}",
        f"a tenth of them makes {each[-(len(each) // 10) :].sum() / each.sum():.0%} of it",
        f"fell from {course['simpo'][0]:.3f} after 50 steps to {course['simpo'][-1]:.3f}",
    ]
    assert [sentence for sentence in said if sentence not in prose] == []


def test_the_sentences_about_padded_runs_have_the_numbers_of_the_tables(
    report: ModuleType, measured: dict[str, Any]
) -> None:
    prose, stages = _prose(), measured["stages"]
    names = ("cpt-padded", "sft-padded", "sft-sorted", "dpo-padded")
    faster, seconds, pads, apart, positions = {}, {}, {}, {}, {}
    for name in names:
        packed, padded = stages[name.split("-")[0]], stages[name]
        unit = "step" if name == "dpo-padded" else "num_tokens"
        faster[name] = f"{report.speed(packed, unit) / report.speed(padded, unit):.1f}"
        line, first = padded["curve"]["train"][-1], padded["curve"]["train"][0]["train_s"]
        (same,) = (one for one in packed["curve"]["train"] if one["step"] == line["step"])
        slow, fast = line["train_s"] - first, same["train_s"] - packed["curve"]["train"][0]["train_s"]
        seconds[name] = (line["step"], f"{slow:.1f} s", f"{fast:.1f} s", f"{slow / fast:.1f} times")
        computed = padded["padded_positions"] / padded["steps"] * line["step"]
        pads[name] = f"{1 - line['num_tokens'] / computed:.0%}"
        positions[name] = f"{computed / same['num_tokens']:.1f}"
        apart[name] = np.abs(np.subtract(*report.same_steps(packed, padded)))
    memory = {name: f"{stages[name]['peak_gib']:.1f}" for name in stages if "peak_gib" in stages[name]}
    assert memory["cpt-padded"] == memory["sft-padded"] and memory["cpt"] == memory["sft"]
    busy = {name: f"{stages[name]['utilisation']:.0f}" for name in (*names, "cpt", "sft", "dpo", "simpo")}
    shares = sorted(busy[name] for name in ("cpt", "sft", "dpo", "simpo"))
    conversations = stages["sft"]["data"]["train"]["rows"] / (stages["sft"]["max_steps"] / stages["sft"]["epochs"])
    sorting = report.speed(stages["sft-sorted"]) / report.speed(stages["sft-padded"])
    held = {
        name: {line["step"]: f"{line['eval_loss']:.3f}" for line in stages[name]["curve"]["eval"]}
        for name in (*names, "cpt", "sft", "dpo")
    }
    assert held["sft"][50] == held["sft-sorted"][50] and held["dpo"][100] == held["dpo-padded"][100]
    steps = [line["step"] for line in stages["cpt-padded"]["curve"]["train"]]
    at = {way: {line["step"]: line["loss"] for line in stages[way]["curve"]["train"]} for way in ("cpt", "cpt-padded")}
    early, late = apart["cpt-padded"][: steps.index(40)], apart["cpt-padded"][steps.index(50) :]
    assert early.max() < 1e-4 < 0.1 < apart["cpt-padded"][steps.index(40)], "the page says when the runs part"
    close = max(apart["sft-padded"].max(), apart["sft-sorted"].max())
    ends = [float(losses[i]) for losses in [report.same_steps(stages["sft"], stages["sft-sorted"])[0]] for i in (0, -1)]
    step, slow, fast, times = zip(*(seconds[name] for name in names), strict=True)
    said = [
        f"{faster['cpt-padded']} times as fast as padded in pre-training, {faster['sft-padded']} times in SFT "
        f"({faster['sft-sorted']} with conversations sorted by length) and {faster['dpo-padded']} times in DPO",
        f"in {memory['cpt']} GiB instead of {memory['cpt-padded']}, and {memory['dpo']} instead of "
        f"{memory['dpo-padded']} for DPO",
        f"has {memory['sft-padded']} GiB already in pre-training and SFT ({memory['sft-sorted']} sorted), "
        f"packed {memory['sft']}",
        f"32 sequences: {memory['dpo-padded']} GiB, packed {memory['dpo']}",
        f"card was busy {shares[0]} to {shares[-1]}% of the time",
        f"busy {busy['sft-sorted']}% of the time when sorted and {busy['sft-padded']}% when not",
        f"Pre-training, to step {step[0]}: {slow[0]} padded, {fast[0]} packed, {times[0]}",
        f"SFT, to step {step[1]}: {slow[1]} and {fast[1]}, {times[1]}",
        f"Sorted by length, to step {step[2]}: {slow[2]} and {fast[2]}, {times[2]}",
        f"DPO, to step {step[3]}: {slow[3]} and {fast[3]}, {times[3]}",
        "The reference pass before it took "
        + " and ".join(f"{stages[name]['before_training_s']:.0f} s" for name in ("dpo-padded", "dpo")),
        f"They are {pads['cpt-padded']} of pre-training's positions, {pads['sft-padded']} of SFT's, and "
        f"{pads['sft-sorted']} of SFT's when sorted, which makes it faster by {sorting:.2f}",
        f"still {faster['sft-sorted']} times as fast",
        f"a step of SFT has {conversations:.0f} conversations",
        f"There {pads['dpo-padded']} of the positions are pads",
        f"together {positions['dpo-padded']} positions for every one",
        f"differs by at most {close:.1e} while the loss falls from {ends[0]:.3f} to {ends[1]:.3f}".replace("e-0", "e-"),
        f"after 50 steps is {held['sft'][50]} packed and padded by length",
        f"after 100 steps is {held['dpo'][100]} in both",
        f"rises from {at['cpt'][35]:.2f} to {at['cpt'][40]:.2f} packed and {at['cpt-padded'][40]:.2f} padded",
        f"the two are within {math.ceil(late.max() * 1e3) / 1e3:.3f}",
        f"after 100 steps is {held['cpt'][100]} packed and {held['cpt-padded'][100]} padded",
    ]
    assert [sentence for sentence in said if sentence not in prose] == []


def test_the_sentences_about_length_have_the_numbers_of_the_tables(
    report: ModuleType, measured: dict[str, Any]
) -> None:
    prose, stages = _prose(), measured["stages"]
    pairs, answers = stages["held-out"]["pairs"], stages["answers"]
    lengths, margins = report.length_differences(pairs), report.scorings(measured)
    right = {name: values > 0 for name, values in margins.items()}
    part = {name: float(values.mean()) for name, values in right.items()}
    ranks = {name: f"{report.rank_correlation(values, lengths):.2f}" for name, values in margins.items()}
    beside = {name: report.clustered_mean((right[name].astype(float) - (lengths > 0)).tolist()) for name in right}
    longer = float(np.mean(lengths > 0))
    split = {(n, way): f"{right[n][s * lengths > 0].mean():.0%}" for n in right for way, s in (("+", 1), ("-", -1))}
    layers = {name: [row["right"].value for row in report.strata(lengths, margins[name])] for name in right}
    middle = (lengths > -50) & (lengths <= 50)
    token = {
        name: [f"{value:.1f}" for value in np.mean(np.divide(pairs["logps"][name], pairs["tokens"]), axis=0)]
        for name in ("sft", "simpo")
    }
    words = {name: float(np.mean(answers[name]["lengths"])) for name in ("sft", "dpo")}
    ended = {name: sum(answers[name]["stopped"]) for name in ("sft", "dpo", "simpo")}
    short = sum(length <= 5 for length in answers["simpo"]["lengths"])
    mean, sft = "DPO model, log-ratio a token", "SFT model, log-prob a token"
    assert 2.5 < words["dpo"] / words["sft"] < 3.5, "the page says three times as long"
    said = [
        f"DPO ranks {part['DPO']:.1%} of held-out pairs right. Calling the longer answer better ranks {longer:.1%}",
        f"learning rate ranks {part['SimPO']:.1%} right, fewer than length alone",
        f"A reward accuracy of {part['DPO']:.3f} sounds like taste, and a ruler has {longer:.3f}",
        f"The difference, {beside['DPO'].mean:.3f} ± {beside['DPO'].standard_error:.3f}, is none",
        f"SimPO's, {beside['SimPO'].mean:.3f} ± {beside['SimPO'].standard_error:.3f}, is one",
        f"DPO is right in {split['DPO', '+']} of the pairs, SimPO in {split['SimPO', '+']}",
        f"DPO in {split['DPO', '-']}, which is a coin, and SimPO in {split['SimPO', '-']}",
        f"climbs from {layers['DPO'][0]:.3f} (chosen much shorter)\nto {layers['DPO'][-1]:.3f}",
        f"SimPO's from {layers['SimPO'][0]:.3f} to {layers['SimPO'][-1]:.3f}",
        f"DPO has {right['DPO'][middle].mean():.3f} "
        f"and SimPO {right['SimPO'][middle].mean():.3f} of {middle.sum()} pairs",
        f"as many pairs right ({part[mean]:.3f})",
        f"(rank correlation {ranks[mean]} against {ranks['DPO']})",
        f"as much as that ({ranks['SimPO']})",
        f"likelier ({ranks[sft]}), and ranks {part[sft]:.3f} right.\nSimPO took that to {part['SimPO']:.3f}",
        "chosen answer has {}, of a rejected one {}, after SFT they had {} and {}".format(
            *token["simpo"], *token["sft"]
        ),
        f"{words['dpo']:.1f} tokens instead of {words['sft']:.1f}, and ends {ended['dpo']} of 64 where SFT ended "
        f"{ended['sft']}",
        f"ended {ended['simpo']} of 64, {short} of them after at most five tokens; {64 - ended['simpo']} ran into",
    ]
    assert [sentence for sentence in said if sentence not in prose] == []


def _prose() -> str:
    """The page without its tables."""
    return re.sub(r"<!-- begin .*?<!-- end [a-z-]+ -->", "", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_runs_that_were_not_made_are_named(report: ModuleType, tmp_path: Path) -> None:
    results = made_up()
    said = "*Not run: SFT padded by length. That needs `--only padded`, about 2 minutes on one GPU.*"
    assert report.runs_table(results).endswith("|\n\n" + said) and report.agreement_table(results).endswith(said)
    for name in ("cpt-padded", "sft-padded", "dpo-padded"):
        assert "Padded runs end" in report.environment_table(results)
        del results["stages"][name]
    assert "Padded runs end" not in report.environment_table(results)
    assert report.agreement_table(results) == report.not_run(results["stages"])
    assert report.draw(results, tmp_path / "packed.json").stat().st_size > 10_000
    complete = made_up()
    complete["stages"]["sft-sorted"] = complete["stages"]["sft-padded"]
    assert "Not run" not in report.runs_table(complete) + report.agreement_table(complete)


def test_floats_are_written_short(monkeypatch: pytest.MonkeyPatch) -> None:
    found = script("case_study", monkeypatch).rounded(
        {"a": (1234.56789, 82.0, True, 28448517), "b": 3.9e-05, "c": None}
    )
    assert json.dumps(found) == '{"a": [1234.57, 82, true, 28448517], "b": 3.9e-05, "c": null}'


def test_the_results_hold_no_text_of_the_data(monkeypatch: pytest.MonkeyPatch, measured: dict[str, Any]) -> None:
    """Prompts are file and row; the only long texts are answers, none of which quotes five words of its prompt."""
    whole = RESULTS.read_text(encoding="utf-8")
    answers = measured["stages"]["answers"]
    for prompt in answers["prompts"]:
        assert set(prompt) == {"source", "file", "row"} and isinstance(prompt["row"], int)
    shown = [text for name in ("cpt", "sft", "dpo", "simpo") for text in answers[name]["shown"]]
    assert {text for text in _strings(measured) if len(text) > 60} <= set(shown)
    assert len(whole) < 250_000 and not re.search(r'"(/|~|[A-Za-z]:\\)', whole)
    data = ROOT.parent / "shared" / "data"
    if not data.exists():
        pytest.skip("answers are not compared with the prompts: ../shared/data is not there")
    prompts = script("case_study", monkeypatch).shown_prompts(data)
    assert [(source, row) for source, row, _ in prompts] == [(p["source"], p["row"]) for p in answers["prompts"]]
    for number, (_, _, messages) in enumerate(prompts):
        asked = _runs_of_words(" ".join(message["content"] for message in messages))
        for name in ("cpt", "sft", "dpo", "simpo"):
            assert not asked & _runs_of_words(answers[name]["shown"][number])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for some in value.values() if isinstance(value, dict) else value:
            yield from _strings(some)


def _runs_of_words(text: str, count: int = 5) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + count]) for start in range(len(words) - count + 1)}


def test_the_page_has_a_place_for_every_table_and_refuses_tiny_results(report: ModuleType) -> None:
    page, results = PAGE.read_text(encoding="utf-8"), made_up()
    filled = report.filled(page, results)
    assert report.filled(filled, results) == filled and "one CARD" in filled
    results["settings"]["tiny"] = True
    with pytest.raises(ValueError, match="tiny"):
        report.filled(page, results)
    with pytest.raises(ValueError, match="places for the table environment"):
        report.filled("no marks", made_up())


def test_the_page_shows_what_was_measured(report: ModuleType) -> None:
    """The tables are those of the committed results; where there are none, the page has none."""
    page = PAGE.read_text(encoding="utf-8")
    if RESULTS.exists():
        assert report.filled(page, json.loads(RESULTS.read_text(encoding="utf-8"))) == page
    else:
        assert "Not measured yet" in page and "| --- |" not in page
