"""The documents: links lead somewhere, the commands they show exist, the house keeps its own rules."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from mambalign.cli import app
from mambalign.cli.cluster import load_pipeline
from mambalign.recipe import STAGES, load_recipe

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s#]+)[^)]*\)")
SKIPPED = {".venv", ".git", "demo-run", "runs", "node_modules"}
DOCUMENTS = [path for path in sorted(ROOT.rglob("*.md")) if not SKIPPED & set(path.relative_to(ROOT).parts)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = LINK.findall(document.read_text(encoding="utf-8"))
    broken = [
        link for link in links if not link.startswith(("http", "mailto:")) and not (document.parent / link).exists()
    ]
    assert not broken


def test_make_verbs_in_the_documents_exist() -> None:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    for document in DOCUMENTS:
        used = set(re.findall(r"`make ([a-z-]+)", document.read_text(encoding="utf-8")))
        assert used <= verbs, f"{document.name} names {sorted(used - verbs)}"


def test_mambalign_commands_in_the_documents_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs exist, recipes and pipelines are there and load with the options that are shown."""
    monkeypatch.chdir(ROOT)  # a pipeline's recipes are relative to the working directory
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands} | {
        "recipes",
        "eval",
        "bench",
    }
    for document in DOCUMENTS:
        for block in re.findall(r"```(?:bash)?\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.S):
            for line in re.findall(r"^mambalign .*$", block, flags=re.M):
                verb, *words = shlex.split(line, comments=True)[1:]
                assert verb in verbs, f"{document.name}: {line}"
                if verb in ("run", "submit") and words[0].startswith("recipes/"):
                    load_pipeline(Path(words[0]))
                    assert "--profile" not in words or Path(words[words.index("--profile") + 1]).is_file()
                elif words and words[0].startswith("recipes/"):
                    load_recipe(ROOT / words[0], words[1:], stage=verb if verb in STAGES else None)


def test_performance_shows_the_measured_numbers() -> None:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "benchmarks/results/cpu.json").read_text(encoding="utf-8"))["rows"]
    for row in measured:
        line = next(line for line in page.splitlines() if line.startswith(f"| {row['tokens']:,} |"))
        assert all(f" {row[name]:,.1f} " in line for name in ("transformers", "mambalign") if row[name]), line
    for row in json.loads((ROOT / "benchmarks/results/decode_cpu.json").read_text(encoding="utf-8"))["rows"]:
        ratio = row["mambalign"] / row["transformers"]
        assert f"| {row['answers']} | {row['transformers']:,.0f} | {row['mambalign']:,.0f} | {ratio:.1f}x |" in page


def test_make_help_lists_every_verb() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for verb in ("setup", "demo", "test", "lint", "type", "bench", "docs", "help", "clean"):
        assert f"make {verb} " in done.stdout


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
