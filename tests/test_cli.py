"""The command line: help that teaches, exit codes, one sentence for a user's mistake, lazy imports."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import mambalign
from mambalign.cli import app

VERBS = [
    *("cpt", "sft", "dpo", "reward", "check", "plot"),
    *("run", "submit", "status", "why"),
    *("score", "best-of-n", "convert", "merge", "chat", "serve", "doctor", "demo"),
]
NESTED = [
    *("recipes list", "recipes show", "recipes keys", "eval fetch-data", "eval calibrate"),
    *(f"eval {bench} {verb}" for bench in ("mt-bench", "alpaca") for verb in ("answer", "judge", "show", "report")),
    "eval compare",
    *(f"bench {verb}" for verb in ("length", "perplexity", "scan", "decode", "plot")),
]


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "sft" / "recipe.yaml"
    path.parent.mkdir()
    path.write_text("model_name_or_path: m\ndataset_mixer: {d: 1.0}\noutput_dir: o\ntorch_dtype: float32\n")
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands for mambalign.train.run: records calls, raises `trained.error` if one is set."""
    calls: list[Any] = []

    def fake(stage: str, loaded: mambalign.Recipe) -> Any:
        calls.append((stage, loaded))
        if loaded.run_name == "interrupt":
            raise KeyboardInterrupt
        if loaded.run_name == "crash":
            raise RuntimeError("a bug")
        if loaded.run_name == "library":
            int("not ours")
        if loaded.run_name == "full":
            raise OSError(28, "No space left on device", "o/model.safetensors")
        if loaded.run_name == "quota":
            raise OSError(errno.EDQUOT, "Disk quota exceeded", "o/model.safetensors")
        if loaded.run_name == "stopped":
            raise SystemExit(85)
        return SimpleNamespace(output_dir=Path("o"), global_step=7, already_finished=False)

    monkeypatch.setitem(sys.modules, "mambalign.train.run", SimpleNamespace(run=fake))
    return calls


def test_help_and_recipes_do_not_import_torch() -> None:
    code = """
import sys
from mambalign.cli import app
for words in (["--help"], ["sft", "--help"], ["recipes", "keys"], ["--version"]):
    try:
        app(words)
    except SystemExit as stop:
        assert not stop.code, words
heavy = {"torch", "transformers", "datasets", "numpy"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"mambalign {mambalign.__version__}" in done.stdout


@pytest.mark.parametrize("verb", [*VERBS, *NESTED])
def test_every_verb_explains_itself_with_an_example(verb: str) -> None:
    result = run(*verb.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: mambalign {verb}" in " ".join(result.output.split())
    # Rich reads square brackets as markup: nothing of the text may be lost.
    assert "[/]" not in result.output


def test_the_top_level_help_lists_every_verb() -> None:
    output = run("--help").output
    assert all(verb in output for verb in [*VERBS, "recipes", "eval"])


@pytest.mark.parametrize("stage", ["cpt", "sft", "dpo", "reward"])
def test_a_training_verb_hands_recipe_and_overrides_to_run(stage: str, tmp_path: Path, trained: list[Any]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: m\ndataset_mixer: {d: 1.0}\noutput_dir: o\n")
    words = ["--learning_rate", "3e-6", "--max_steps", "-1", "--packing=false", "--dataset_mixer.x/y=0.5"]
    result = run(stage, str(path), *words)
    assert result.exit_code == 0, result.output
    (called, loaded), = trained  # fmt: skip
    assert called == stage == loaded.stage
    assert (loaded.learning_rate, loaded.max_steps, loaded.packing) == (3e-6, -1, False)
    assert loaded.dataset_mixer == {"d": 1.0, "x/y": 0.5}
    assert "finished: 7 steps; the model is in o" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft", "nowhere.yaml"], "recipe nowhere.yaml does not exist"),
        (["sft", "--seed", "1", "r.yaml"], "the recipe comes first"),
        (["sft", "RECIPE", "--lerning_rate", "1"], "did you mean 'learning_rate'"),
        (["sft", "RECIPE", "--beta", "x"], "beta must be a number"),
        (["convert", "nowhere/at/all", "out", "--to", "gguf"], "--to must be hf or mamba-ssm, not 'gguf'"),
        (["convert", "nowhere/at/all", "out", "--to", "hf"], "nowhere/at/all"),
        (["recipes", "keys", "--group", "modle"], "did you mean 'model'"),
        (["recipes", "list", "nowhere"], "there is no folder nowhere"),
        (["score", "nowhere", "nowhere.jsonl"], "nowhere.jsonl"),
        (["best-of-n", "a", "b", "nowhere.jsonl", "--temperature", "0"], "temperature: 0.0 must be above 0"),
        (["check", "nowhere.yaml"], "recipe nowhere.yaml does not exist"),
        (["plot", "nowhere"], "is it a run folder?"),
        (["run", "nowhere.yaml"], "pipeline nowhere.yaml does not exist"),
        (["submit", "nowhere.yaml", "--to", "slrum"], "'slrum'; did you mean 'slurm'"),
        (["submit", "RECIPE", "--to", "slurm"], "unknown key 'model_name_or_path'"),
        (["status", "nowhere"], "holds neither pipeline.json"),
        (["why", "nowhere"], "neither a job id nor a folder"),
        (["plot", "nowhere", "--out", "curves"], "a file name that ends in .svg, .png, .pdf"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(words: list[str], message: str, recipe: Path) -> None:
    result = run(*[str(recipe) if word == "RECIPE" else word for word in words])
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output


def test_usage_errors_exit_with_2() -> None:
    assert run("sft").exit_code == 2
    assert run("nonsense").exit_code == 2


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("interrupt", 130, "run the same command again"),
        ("full", 2, "the disk is full (o/model.safetensors)"),
        ("quota", 2, "the disk quota is used up (o/model.safetensors)"),
        ("stopped", 85, ""),
        ("crash", 1, ""),
        ("library", 1, ""),  # a ValueError of some library is a bug of ours, not a sentence for the user
    ],
)
def test_exit_codes(name: str, code: int, message: str, recipe: Path, trained: list[Any]) -> None:
    result = run("sft", str(recipe), "--run_name", name)
    assert result.exit_code == code
    assert message in result.output
    if name in ("crash", "library"):
        assert isinstance(result.exception, RuntimeError | ValueError)


def test_debug_shows_the_traceback(recipe: Path) -> None:
    assert "Traceback" in run("sft", str(recipe), "--beta", "x", "--debug").output


def test_show_prints_the_whole_recipe_as_yaml(recipe: Path) -> None:
    result = run("recipes", "show", str(recipe), "--seed", "7")
    assert result.exit_code == 0
    text = result.stdout
    again = mambalign.Recipe.from_dict(__import__("yaml").safe_load(text))
    assert (again.seed, again.stage, again.dtype) == (7, "sft", "float32")


def test_keys_prints_default_and_meaning() -> None:
    output = run("recipes", "keys", "--group", "objective").output
    assert "label_smoothing" in output and "sigmoid" in output and "learning_rate" not in output


def test_list_names_stage_model_and_data(recipe: Path) -> None:
    output = run("recipes", "list", str(recipe.parents[1])).output
    assert "recipe.yaml" in output and "sft" in output


def test_list_falls_back_on_the_recipes_that_an_installed_mambalign_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought = tmp_path / "mambalign" / "recipes" / "sft" / "mine.yaml"
    brought.parent.mkdir(parents=True)
    brought.write_text("model_name_or_path: m\ndataset_mixer: {d: 1.0}\noutput_dir: o\n")
    monkeypatch.setattr(mambalign, "__file__", str(tmp_path / "mambalign" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert "mine.yaml" in run("recipes", "list").output


def test_narrow_terminals_cut_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambalign.cli.training.make_console", lambda: Console(width=70))
    assert "gradient_checkpointing_kwargs" in run("recipes", "keys").output


def test_doctor_reports_versions_devices_and_backends() -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert set(facts["backends"]) >= {"selective_scan", "causal_conv1d", "token_logps", "generation_on_a_cpu"}
    assert all(": " in chosen for chosen in facts["backends"].values())
    assert facts["versions"]["mambalign"] == mambalign.__version__
    assert facts["files"]["hub"].startswith("offline, switched off by HF_HUB_OFFLINE")  # as the tests' environment says
    assert "versions" in run("doctor").output


def test_libraries_are_heard_once() -> None:
    code = """
import logging, datasets, huggingface_hub
from mambalign.cli.common import log_to_stderr
log_to_stderr()
for library in ("datasets", "huggingface_hub", "accelerate"):
    logging.getLogger(library + ".part").warning("said by %s", library)
"""
    heard = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert [heard.count(f"said by {name}") for name in ("datasets", "huggingface_hub", "accelerate")] == [1, 1, 1]


def test_the_hub_is_asked_once_whether_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    from mambalign.doctor import OFFLINE, hub_problem

    for name in (*OFFLINE, "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # answers 501, which is an answer
        Thread(target=server.handle_request).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub_problem() is None
    problem = hub_problem()
    assert problem is not None and "cannot be reached (" in problem
