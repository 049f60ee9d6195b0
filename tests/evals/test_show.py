"""`eval ... show`: the judge stands beside every number, and nothing is final while a verdict is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mambalign.cli import app

Write = Callable[..., Path]


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, words)], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture
def folder(write: Write, tmp_path: Path) -> Path:
    questions = [{"question_id": i, "category": "poems", "turns": ["a", "b"]} for i in (1, 2)]
    write("data/question.jsonl", *questions)
    (tmp_path / "data/alpaca_eval_gpt4_baseline.json").write_text(
        json.dumps([{"instruction": text, "output": "x", "generator": "ref"} for text in "abc"])
    )
    return tmp_path / "data"


def verdict(number: int, turn: int, score: float) -> dict[str, Any]:
    judge = {"judge": ["my-judge", "single-v1"], "judgment": "said"}
    return {"question_id": number, "model": "m", "score": score, "turn": turn} | judge


def test_mt_bench(write: Write, folder: Path) -> None:
    rows = [verdict(1, 1, 4), verdict(1, 2, 8), verdict(2, 1, -1)]
    result = run("mt-bench", "show", write("j.jsonl", *rows), "--data-dir", folder)
    assert result.exit_code == 0, result.output
    assert "m, judged by my-judge not final" in result.output
    assert "NOT FINAL: 1 verdicts are missing (2 turn 2" in result.output
    assert "1 verdicts had no rating and are left out; as 1 or 10: 4.333 to 7.333" in result.output
    whole = run("mt-bench", "show", write("j.jsonl", *rows, verdict(2, 2, 6), verdict(2, 2, 6)), "--data-dir", folder)
    assert "not final" not in whole.output.lower() and "had one already; counted: all" in whole.output
    (read,) = json.loads(run("mt-bench", "show", write("j.jsonl", *rows), "--data-dir", folder, "--json").output)
    assert (read["average"], read["judge"], read["final"]) == (6, "my-judge", False)


def test_mt_bench_pairs(write: Write, folder: Path) -> None:
    game = {"model_1": "[a]", "model_2": "b", "judge": ["my-judge", "pair-v2"], "turn": 1}
    row = game | {"question_id": 1, "g1_winner": "model_1", "g2_winner": "model_1"}
    result = run("mt-bench", "show", write("p.jsonl", row), "--data-dir", folder, "--baseline", "b")
    assert "[a]" in result.output and "1.0000" in result.output and "NOT FINAL: 3 matches are missing" in result.output


def test_alpaca(write: Write, folder: Path, tmp_path: Path) -> None:
    base = {"output_1": "x", "generator_1": "ref", "generator_2": "m", "annotator": "alpaca_eval_gpt4-my-judge"}
    rows = [
        base | {"instruction": text, "output_2": "y", "preference": p}
        for text, p in zip("abc", (2, 1, None), strict=True)
    ]
    board = tmp_path / "leaderboard.csv"
    some = run("alpaca", "show", write("a.json", *rows[:2]), "--data-dir", folder, "--leaderboard", board)
    assert "NOT FINAL: 1 instructions have no verdict" in some.output and "m," not in board.read_text()
    whole = run("alpaca", "show", write("a.json", *rows), "--data-dir", folder, "--leaderboard", board)
    assert "not final" not in whole.output.lower() and "alpaca_eval_gpt4-my-judge" in whole.output
    assert "lost or won: 33.333 to 66.667" in whole.output
    assert board.read_text().splitlines()[1].startswith("m,50.0,50.0,1,1,0,2,50.0,,1,")
    for name, changed, message in (
        ("b.json", {"annotator": "another", "generator_2": "n"}, "names no judge"),
        ("c.json", {"generator_1": "another", "generator_2": "n"}, "names no reference"),
        ("d.json", {}, "a model is there twice"),
    ):
        files = write("a.json", *rows), write(name, *(row | changed for row in rows))
        both = run("alpaca", "show", *files, "--data-dir", folder, "--leaderboard", tmp_path / "x.csv")
        assert both.exit_code == 2 and message in both.output and not (tmp_path / "x.csv").exists()
    (read,) = json.loads(run("alpaca", "show", write("a.json", *rows), "--data-dir", folder, "--json").output)
    assert (read["win_rate"], read["n_unparsed"], read["final"]) == (50, 1, True)


def test_mistakes_are_sentences(write: Write, folder: Path) -> None:
    for words, message in (
        (("mt-bench", "show", "nowhere.jsonl"), "nowhere.jsonl"),
        (("mt-bench", "show", write("j.jsonl", verdict(1, 1, 4)), "--duplicates", "best"), "'best' is none of"),
        (("mt-bench", "show", write("j.jsonl", verdict(1, 1, 4)), "--data-dir", folder / "no"), "fetch-data"),
        (("alpaca", "show", write("a.jsonl", {"a": 1}), "--data-dir", folder), "no instruction"),
        (("mt-bench", "answer", "m", "--api-key-file", "k", "--data-dir", folder), "goes with --base-url"),
    ):
        result = run(*words)
        assert result.exit_code == 2 and message in result.stderr, (words, result.output)
