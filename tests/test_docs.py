"""The documents: what they show is true of this code, the handbook builds, the house keeps its own rules."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _load(name: str) -> ModuleType:
    """A file of docs/, which is no package; the others of them find it under the same name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


hooks, check, sandbox = _load("hooks"), _load("check"), _load("sandbox")


@pytest.mark.parametrize("checks", check.CHECKS, ids=lambda function: function.__name__)
def test_the_documents_are_in_order(checks: Any) -> None:
    assert checks() == []


@pytest.mark.slow
def test_the_commands_of_the_documents_run() -> None:
    with sandbox.ready() as (folder, environment):
        block = check.Block("docs/x.md", 7, "bash", check.CI, "mambalign chat no-such-model\n")
        assert "docs/x.md:7: exit code 2" in (said := sandbox.run(block, folder, environment) or "")
        assert "no-such-model" in said
        assert sandbox.run_pages(folder, environment) == []


def test_every_page_of_the_tasks_runs_something() -> None:
    """A page that shows how to do a thing shows it with commands that are run."""
    for name in ("quickstart choosing data sft preferences adapters precision planning export troubleshooting").split():
        assert any(block.is_run for block in check.blocks(f"docs/{name}.md")), name


def test_the_handbook_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],  # --quiet hides warnings
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]* src=\"(https?:[^\"]+)", text)
        fetched += re.findall(
            r"<link[^>]* rel=\"?(?:stylesheet|preconnect|icon)\"?[^>]* href=\"?(https?:[^\" >]+)", text
        )
        assert not fetched, f"{page}: {fetched}"
    assert _broken_links(tmp_path, pages) == []
    shown = (tmp_path / "reference/recipe-keys.html").read_text(encoding="utf-8")
    assert 'id="simpo_gamma"' in shown and "generated:" not in shown
    api = (tmp_path / "reference/api.html").read_text(encoding="utf-8")
    assert "bradley_terry_loss" in api and "<blockquote>" not in api


def _broken_links(site: Path, pages: list[Path]) -> list[str]:
    """Links within the built site that lead to no file, or to no anchor of it."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    anchors = {page: set(re.findall(r"\b(?:id|name)=\"?([^\" >]+)", text)) for page, text in texts.items()}
    broken = []
    for page, text in texts.items():
        for link in set(re.findall(r"\b(?:href|src)=\"?([^\" >]+)", text)):
            path, _, anchor = unquote(link).partition("#")
            target = Path(os.path.normpath(page.parent / path)) if path else page
            if re.match(r"[a-z]+:", link) or page.name == "404.html" or anchor.startswith("__"):
                continue
            if not target.exists() or (anchor and target in anchors and anchor not in anchors[target]):
                broken.append(f"{page.relative_to(site)}: {link}")
    return broken


# ---------------------------------------------------------------------------------- the checks find what they are for


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a](nowhere.md)", "leads nowhere"),
        ("[a](sft.md#no-such-heading)", "no heading"),
        ("[a](reference/recipe-keys.md#no_such_key)", "no heading"),
        ("[a](https://nodots)", "no address"),
        ("[a]: nowhere.md", "leads nowhere"),
        ('<img src="nowhere.png">', "leads nowhere"),
        ("[a](sft.md#packing) [b](reference/recipe-keys.md#beta) [c](../recipes/clusters) `[d](code.md)`", None),
    ],
)
def test_a_link_is_checked(text: str, said: str | None) -> None:
    problems = list(check.link_problems("docs/index.md", text))
    assert (said is None and not problems) or (said and len(problems) == 1 and said in problems[0]), problems


@pytest.mark.parametrize(
    ("fence", "text", "said"),
    [
        ("bash", "mambalign sft x.yaml", 'say title="CI runs this"'),
        ('bash title="whatever"', "ls", 'say title="CI runs this"'),
        ('bash title="CI runs this: tests/no.py"', "ls", "does not exist"),
        ('bash title="CI runs this: .ci/run"', "make coffee", "does not run"),
        ("", "mambalign doctor", "these are commands"),
        ("text", "OMP_NUM_THREADS=1 python x.py", "these are commands"),
        ("powershell", "ls", "not known"),
        ('json title="x"', "{", "not JSON"),
        ('python title="CI runs this"', "def", "not Python"),
        ('python title="CI runs this"', "from mambalign import no_such", "has no no_such"),
        ("yaml", "beta: 1", 'say title="in a recipe"'),
        ('yaml title="in a recipe"', "beta: [", "YAML"),
        ('yaml title="in a recipe"', "betta: 1", "unknown key 'betta'"),
        ('yaml title="in a recipe"', "beta: much", "beta must be a number"),
        ('yaml title="sft.yaml"', "torch_dtype: bfloat16", "a key of old"),
        ('yaml title="in a pipeline"', "sft: {recipe: recipes/no.yaml}", "recipes/no.yaml"),
        ('yaml title="in a pipeline"', "stages: {sft: {command: ls, colour: red}}", "unknown key 'colour'"),
        ('yaml title="in a profile"', "colour: red", "no profile has the key"),
    ],
)
def test_a_block_is_checked(fence: str, text: str, said: str) -> None:
    (block,) = check.blocks("docs/index.md", f"```{fence}\n{text}\n```\n")
    problems = list(check.block_problems(block))
    assert problems and said in problems[0], problems


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("mambalign stf recipes/tiny/sft/config_full.yaml", "no verb stf"),
        ("mambalign eval mt-bench anser x", "no verb anser"),
        ("mambalign chat x --temprature 1", "No such option"),
        ("mambalign merge x", "Missing "),
        ("mambalign serve x --port ninety", "integer"),
        ("mambalign sft recipes/tiny/sft/no.yaml", "does not exist"),
        ("mambalign sft recipes/tiny/sft/config_full.yaml --betta 1", "unknown key"),
        ("torchrun --nproc-per-node 2 -m mambalign dpo recipes/tiny/dpo/config_full.yaml --beta no", "beta must be"),
        ("ls | HF_HUB_OFFLINE=1 mambalign run recipes/no.yaml && true", "no.yaml"),
        ("mambalign submit recipes/tiny/pipeline.yaml --to slurm --profile no.yaml", "no profile"),
        ("mambalign recipes keys --group colours", "no group"),
        ("make coffee", "no verb coffee"),
        ("pip install 'mambalign[colours]'", "no extra colours"),
        ("mambalign dpo recipes/tiny/dpo/config_full.yaml --beta 0.2  # as mambalign says", None),
    ],
)
def test_a_command_is_checked(command: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = check.blocks("docs/index.md", f'```bash title="needs: x"\n{command}\n```\n')
    (words,) = check.commands(block)
    problems = check.command_problems(words, str(tmp_path))
    assert (said is None and not problems) or (said and problems and said in problems[0]), problems


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("`mambalign aline x`", "no verb aline"),
        ("`mambalign eval mt-bench anser`", "no verb anser"),
        ("`mambalign check --ful`", "no option --ful"),
        ("`mambalign sft RECIPE --betta 1`", "no option --betta"),
        ("`recipes/tiny/sft/none.yaml`", "does not exist"),
        ("`mambalign check --full`, `mambalign dpo --beta 1`, `mambalign VERB --help`, `mambalign`", None),
    ],
)
def test_a_command_in_a_sentence_is_checked(text: str, said: str | None) -> None:
    problems = list(check.inline_problems("docs/index.md", text))
    assert (said is None and not problems) or (said and len(problems) == 1 and said in problems[0]), problems


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("| `betta` | same | | |", "not true that it is 'same'"),
        ("| `torch_dtype` | same | `dtype` | |", "not true that it is 'same'"),
        ("| `torch_dtype` | read as | `beta` | |", "not true that it is 'read as'"),
        ("| `beta` | refused | | |", "not true that it is 'refused'"),
        ("| `padding_free` | refused | | |", "the program takes it"),
        ("| `micro_batch_size` | write | `per_device_batch` | |", "is no key here"),
        ("| `beta` | sometimes | | |", "is none of"),
        ("| `torch_dtype` | read as | `dtype` | |", None),
        ("| `micro_batch_size` | write | `per_device_train_batch_size: 4` | |", None),
    ],
)
def test_a_row_of_a_key_table_is_checked(row: str, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "read", lambda page: f"| theirs | how | here | why |\n|---|---|---|---|\n{row}\n")
    ((theirs, how, here),) = check.key_rows("docs/coming-from/x.md")
    problems = [problem for key in theirs for problem in check._row_problems(key, how, here)]
    assert (said is None and not problems) or (said and any(said in problem for problem in problems)), problems


def test_a_quoted_message_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, wrong in (
        ("another process is training in ...; wait for it, or choose another output_dir", 0),
        ("another process is trainning in ...; wait for it, or choose another output_dir", 1),
        ("wait for it, or choose another output_dir ... another process is training in", 1),
        ("... in ...", 1),
    ):
        block = check.Block("docs/x.md", 1, "text", "message", text)
        monkeypatch.setattr(check, "all_blocks", lambda block=block: [block])
        assert len(check.check_messages()) == wrong, text


# ------------------------------------------------------------------------------------------- numbers, keys and verbs


def test_the_memory_of_the_models_is_their_readmes() -> None:
    page = (ROOT / "docs/choosing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w.-]+) ((?:\| (?:[\d.]+|-) ){6})\|$", page, flags=re.M)
    assert len(rows) == 7
    for model, cells in rows:
        readme = (ROOT / "recipes" / model / "README.md").read_text(encoding="utf-8")
        totals = dict(re.findall(r"^\| ((?:sft|dpo)/config_\w+) .* ([\d.]+) \|$", readme, flags=re.M))
        wanted = [
            totals.get(f"{stage}/config_{how}", "-") for stage in ("sft", "dpo") for how in ("full", "lora", "qlora")
        ]
        assert cells.strip("| ").split(" | ") == wanted, model


def test_every_key_that_trl_adds_has_a_row() -> None:
    trl = pytest.importorskip("trl")
    from transformers import TrainingArguments
    from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments

    common = {field.name for field in dataclasses.fields(TrainingArguments)}
    kinds = (trl.SFTConfig, trl.DPOConfig, trl.RewardConfig, trl.ModelConfig, ScriptArguments, DatasetMixtureConfig)
    wanted = {field.name for kind in kinds for field in dataclasses.fields(kind)} - common
    named = {key for theirs, _, _ in check.key_rows("docs/coming-from/trl.md") for key in theirs}
    assert wanted <= named, sorted(wanted - named)
    ours = {"dataset_text_field", "resume_from_checkpoint", "group_by_length"}  # of earlier versions too
    assert named - wanted - common <= ours | {"attn_implementation"}, sorted(named - wanted - common)


def test_the_objectives_page_has_every_loss() -> None:
    from mambalign.train.objectives import LOSSES

    formulas = (ROOT / "docs/preferences.md").read_text(encoding="utf-8").partition("## What they compute")[2]
    shown = set(re.findall(r"^\| `(\w+)` \|", formulas.partition("## ")[0], flags=re.M)) - {"loss_type"}
    assert shown == set(LOSSES)


def test_numbers_of_other_pages_are_those_of_the_performance_page() -> None:
    measured = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    for page, numbers in {
        "preferences": ("4.8", "69.9"),
        "choosing": ("1.04", "0.93", "2.9"),
    }.items():
        text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
        for number in numbers:
            assert all(re.search(rf"(?<![\d.,]){re.escape(number)}(?!\d|,\d)", each) for each in (text, measured)), (
                page,
                number,
            )


def results(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text("utf-8"))["rows"]
    return rows


def test_performance_shows_the_measured_numbers() -> None:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    for row in results("cpu"):
        line = next(line for line in page.splitlines() if line.startswith(f"| {row['tokens']:,} |"))
        assert all(f" {row[name]:,.1f} " in line for name in ("transformers", "mambalign") if row[name]), line
    even = [row for row in results("decode_cpu") if row["case"] == "even"]
    rates = {(row["batch"], row["who"]): row["tokens_per_second"] for row in even}
    for batch in (1, 8):
        ours, theirs = rates[batch, "ours"], rates[batch, "transformers' Mamba"]
        assert f"| {batch} | {theirs:,.0f} | {ours:,.0f} | {ours / theirs:.1f}x |" in page


def test_performance_shows_what_generation_took_on_a_gpu() -> None:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    aims = ""
    for case, batch in (("even", 1), ("even", 8), ("uneven", 8), ("even", 64), ("uneven", 64)):
        cells = [f"{batch}, uneven" if case == "uneven" else str(batch)]
        for size in ("130m", "2.8b"):
            rates = {
                row["who"]: row["tokens_per_second"]
                for row in results(f"decode_{size}")
                if row["case"] == case and row["batch"] == batch
            }
            ours, peer, other = rates["ours"], rates["mamba-ssm"], rates.get("transformer")
            cells += [f"{ours:,.0f}", f"{peer:,.0f}", f"{ours / peer:.2f}x", f"{other:,.0f}" if other else ""]
            if case == "uneven" and batch == 64:
                aims += f"{', ' if aims else ''}**{ours / peer:.1f}x** ({size})"
        assert f"| {' | '.join(cells)} |" in page
    assert f"| decoding 64 uneven answers at least 1.5x mamba-ssm's | {aims} |" in page
    for size in ("130m", "2.8b"):
        times = {
            row["context"]: row for row in results(f"decode_{size}") if (row["case"], row["who"]) == ("context", "ours")
        }
        assert f"**{times[65536]['ms_per_token'] / times[1024]['ms_per_token']:.2f}x** ({size})" in page
        assert all(f"{row['ms_per_token']:.2f} | {row['state_mib']:,.1f} MiB" in page for row in times.values())


def test_performance_shows_the_steps_and_scans_that_were_measured() -> None:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    scans = {(row["who"], row["length"]): row for row in results("scan")}
    for length, rows in ((2048, "8 x 2,048"), (4096, "4 x 4,096"), (16384, "1 x 16,384"), (65536, "1 x 65,536")):
        ours, peer = scans["ours", length], scans["mamba-ssm", length]
        line = next(line for line in page.splitlines() if line.startswith(f"| scan {rows} x 5,120 |"))
        shown = [f"{one[name]:.2f}" for one in (ours, peer) for name in ("forward_ms", "both_ms")]
        assert [line.split(" | ")[i] for i in (1, 2, 4, 5)] == shown, line
        if length in (2048, 65536):
            assert f"**{peer['both_ms'] / ours['both_ms']:.2f}x**" in page
    for size, weights in (("130m", "fp32 + autocast"), ("130m", "bf16"), ("2.8b", "bf16")):
        rows = {
            row["who"]: row
            for row in results(f"train_step_{size}")
            if row["weights"] == weights and not row["recompute"]
        }
        measured = [rows[who]["tokens_per_second"] for who in ("ours", "mamba-ssm", "transformer")]
        speeds = [f"{float(f'{speed:.4g}'):,.0f}" for speed in measured]
        assert any(all(speed in line for speed in speeds) for line in page.splitlines() if line.startswith("| ")), (
            speeds
        )
    sft = {row["who"]: row["tokens_per_second"] for row in results("sft_real_2.8b")}
    assert f"**{sft['ours, packed'] / sft['mamba-ssm, padded']:.1f}x** (2.8b" in page
    small = [row for row in results("sft_real_130m") if row["weights"] == "bf16"]
    sft = {row["who"]: row["tokens_per_second"] for row in small}
    assert f"**{sft['ours, packed'] / sft['mamba-ssm, padded']:.1f}x** (130m)" in page
    for row in results("dpo_real_130m") + results("dpo_real_2.8b"):
        if row["data"] == "pairs" and not row["who"].startswith("reference"):
            assert f"| {row['pairs_per_second']:.1f} | {row['peak_gib']:.1f} " in page, row["who"]
    for size in ("130m", "2.8b"):
        speeds = {row["who"]: row["pairs_per_second"] for row in results(f"dpo_real_{size}") if row["data"] != "pairs"}
        assert f"**{speeds['e: + prefix sharing'] / speeds['d: + packing']:.2f}x** at {size}" in page


def test_performance_shows_the_whole_steps_that_were_measured() -> None:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    shown = [line.split(" | ") for line in page.splitlines() if re.match(r"\| (SFT|DPO) (full|LoRA|QLoRA), ", line)]
    measured = {
        (f"{1e3 * row['seconds']:.1f}", f"{row['tokens'] / row['seconds']:,.0f}", f"{row['peak_allocated'] / 1e9:.1f}")
        for row in results("plan")
    }
    rows = {tuple(cell.strip(" |") for cell in line[2:]) for line in shown if len(line) == 5}
    assert len(rows) >= 10 and rows <= measured


def test_the_page_on_long_documents_shows_what_was_measured() -> None:
    page = (ROOT / "docs/long-context.md").read_text(encoding="utf-8")
    for row in results("long_context"):
        line = next(
            line for line in page.splitlines() if line.startswith(f"| {row['length']:,} | ") and "MB" not in line
        )
        assert f"{row['peak_gib']:.1f}" in line and f"{round(row['tokens_per_second'], -2):,.0f}" in line, (row, line)


def test_make_help_lists_every_verb() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for verb in ("setup", "demo", "test", "lint", "type", "bench", "docs", "help", "clean"):
        assert f"make {verb} " in done.stdout


def test_make_verbs_in_the_documents_exist() -> None:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    for page in check.pages():
        used = set(re.findall(r"`make ([a-z-]+)", check.read(page)))
        assert used <= verbs, f"{page} names {sorted(used - verbs)}"


def test_constraints_meet_the_requirements() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    )
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    required = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["dev"]]
    for requirement in required:
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is required but not in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement}, but constraints.txt has {pinned[name]}"
