"""Stages of kind mt-bench and alpaca: the commands that one would type, refused before anything is trained."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from mambalign.cli import app
from mambalign.cluster.evaluation import EVALUATIONS, OPTIONS, option
from mambalign.cluster.keys import ClusterError
from mambalign.cluster.pipeline import Pipeline, read_pipeline
from mambalign.evals.rule_judge import IN_PROCESS
from tests.cluster.conftest import fake_recipe

JUDGE = {"base_url": "http://127.0.0.1:8000/v1", "model": "my judge"}
STAGE = {"model": "dpo", "output_dir": "out/my eval", "judge": JUDGE}


def read(name: str, **stage: Any) -> Pipeline:
    stages = {"dpo": {"recipe": "dpo/r.yaml"}, name: stage}
    return read_pipeline({"name": "p", "resources": {"gpus": 1}, "stages": stages}, "p.yaml", fake_recipe)


def commands(name: str, **stage: Any) -> list[list[str]]:
    shell = read(name, **STAGE | stage).stage(name).shell
    assert shell is not None
    return [shlex.split(line) for line in shell.split(" &&\n")]


def options_of(*verb: str) -> set[str]:
    command: Any = typer.main.get_command(app)
    for name in verb:
        command = command.commands[name]
    return {word for parameter in command.params for word in parameter.opts}


def test_every_key_is_an_option_of_its_verb() -> None:
    for kind in EVALUATIONS:
        for verb, names in OPTIONS[kind].items():
            assert {option(verb, name) for name in names} <= options_of("eval", kind, verb), (kind, verb)


def test_every_word_of_a_stage_is_known_to_the_verbs() -> None:
    for kind in EVALUATIONS:
        for words in commands(kind, data_dir="some data"):
            assert words[:3] == ["mambalign", "eval", kind]
            assert {word for word in words if word.startswith("--")} <= options_of("eval", kind, words[3])


def test_a_stage_answers_judges_and_reports_the_model_of_an_earlier_one() -> None:
    answer, judge, report = commands("mt-bench", answer={"max_new_tokens": 32}, data_dir="d")
    file = "out/my eval/model_answer/dpo.jsonl"
    assert answer[3:7] == ["answer", "out/dpo", "--out", file]
    assert answer[7:] == ["--max-new-tokens", "32", "--model-id", "dpo", "--data-dir", "d"]
    assert judge[3:7] == ["judge", file, "--out", "out/my eval/model_judgment"]
    assert judge[7:11] == ["--judge-base-url", JUDGE["base_url"], "--judge-model", "my judge"]
    assert report[3:7] == ["report", "out/my eval/model_judgment/*_single.jsonl", "--answers", file]
    stage = read("mt-bench", **STAGE, data_dir="d").stage("mt-bench")
    assert (stage.needs, stage.inputs, stage.kind) == (("dpo",), ("out/dpo", "d"), "mt-bench")
    assert "'out/my eval/model_judgment'/*_single.jsonl" in str(stage.shell)  # the star is the shell's


def test_flags_maps_and_references() -> None:
    judge = JUDGE | {"tolerant": True, "extra": {"a": "b"}, "key_file": "${dpo.output_dir}/key"}
    _, words, report = commands("alpaca", judge=judge, report={"length_control": False})
    assert "--tolerant" in words and words[words.index("--judge-extra") + 1] == '{"a": "b"}'
    assert words[words.index("--judge-key-file") + 1] == "out/dpo/key"
    assert "--length-control" not in report
    assert report[4] == "out/my eval/dpo/*/annotations.json"


def test_the_rule_judge_needs_no_name() -> None:
    _, judge, _ = commands("mt-bench", judge={"base_url": IN_PROCESS})
    assert judge[-2:] == ["--judge-base-url", "rule"]


@pytest.mark.parametrize(
    ("name", "stage", "message"),
    [
        ("mt-bench", {"judge": {}}, "judge is missing: `judge: {base_url: ADDRESS, model: NAME}`"),
        ("mt-bench", {"judge": {"base_url": "http://a/v1"}}, "judge is missing"),
        ("mt-bench", {"judge": JUDGE | {"modle": "x"}}, "judge: unknown key 'modle'; did you mean 'model'"),
        ("alpaca", {"answer": {"max_new_token": 1}}, "answer: unknown key 'max_new_token'"),
        ("alpaca", {"answer": {"seed": [1, 2]}}, "seed must be one value"),
        ("alpaca", {"answer": {"model_id": "a b/c"}}, "model_id: 'a b/c' must be"),
        ("mt-bench", {"output_dir": None}, "needs `model:` (what to evaluate) and `output_dir:`"),
        ("mt-bench", {"overrides": {"beta": 1}}, "overrides means nothing for a mt-bench stage"),
        ("mine", {"kind": "command", "command": "x"}, "judge means nothing for a command stage"),
    ],
)
def test_what_is_refused_before_anything_is_trained(name: str, stage: dict[str, Any], message: str) -> None:
    with pytest.raises(ClusterError) as refused:
        read(name, **{key: value for key, value in (STAGE | stage).items() if value is not None})
    assert message in str(refused.value)


def test_the_tiny_pipeline_ends_in_both_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    from mambalign.cli.cluster import load_pipeline

    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    stages = load_pipeline(Path("recipes/tiny/pipeline.yaml")).stages
    assert [stage.kind for stage in stages[-2:]] == ["mt-bench", "alpaca"]
    assert all("dpo" in stage.needs and "--judge-base-url rule" in str(stage.shell) for stage in stages[-2:])
