"""Published judgments, recomputed to the last digit. None of them is in this repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mambalign.data.json_rows import json_rows
from mambalign.evals import alpaca_eval, alpaca_scores, length_control, mt_bench, mt_bench_scores
from mambalign.evals.data import FILES, find_data
from mambalign.support import sha256_file

pytestmark = pytest.mark.shared("eval")
EXACT = 1e-9
FIELDS = ("win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate")


@pytest.fixture
def data(shared_data: Path) -> Path:
    return shared_data / "eval"


@pytest.fixture
def phi3(data: Path) -> Path:
    return data / "published/mt_bench/stefanstud_phi3"


@pytest.fixture
def bench(data: Path, phi3: Path) -> dict[str, Any]:
    return {
        "questions": mt_bench.load_questions(find_data("mt-bench questions", data)),
        "prompts": mt_bench.load_judge_prompts(find_data("mt-bench judge prompts", data)),
        "references": mt_bench.load_answers(find_data("mt-bench references", data)),
        "answers": {
            name: mt_bench.load_answers(phi3 / f"model_answer/{name}.jsonl") for name in ("phi-3", "phi-3-dpo")
        },
    }


def test_the_files_are_the_pinned_ones(data: Path) -> None:
    checked = 0
    for name, file in FILES.items():
        if "difficulty" in name or "gamed" in name or "reference 1" in name:
            continue  # there are only stand-ins of these
        assert sha256_file(find_data(name, data)) == file.sha256
        checked += 1
    assert checked == 6


def test_the_questions_have_the_published_shape(bench: dict[str, Any]) -> None:
    assert [question.question_id for question in bench["questions"]] == list(range(81, 161))
    for question in bench["questions"]:
        assert question.category == mt_bench_scores.category_of(question.question_id)
    assert sorted(bench["references"]) == [q.question_id for q in bench["questions"] if q.needs_reference]


def test_every_stored_judgment_is_rebuilt_byte_identical(bench: dict[str, Any], phi3: Path) -> None:
    answers = {"phi-3-dpo": bench["answers"]["phi-3-dpo"]}
    matches = mt_bench.single_matches(bench["questions"], answers, bench["prompts"], bench["references"])
    assert len(matches) == 160
    by_key = {(match.question.question_id, match.turn): match for match in matches}
    stored = [row for _, row in json_rows(phi3 / "gpt-4_single.jsonl")]
    for row in stored:
        rebuilt = by_key[row["question_id"], row["turn"]].row("gpt-4", [row["judgment"]], row["tstamp"])
        assert list(rebuilt.items()) == list(row.items())
    assert len(stored) == 160


def test_every_stored_pairwise_judgment_is_rebuilt_byte_identical(bench: dict[str, Any], phi3: Path) -> None:
    matches = mt_bench.pair_matches(bench["questions"], bench["answers"], bench["prompts"], bench["references"])
    by_key = {(match.question.question_id, match.turn): match for match in matches}
    stored = [row for _, row in json_rows(phi3 / "gpt-4_pair.jsonl")]
    for row in stored:
        judgments = [row["g1_judgment"], row["g2_judgment"]]
        rebuilt = by_key[row["question_id"], row["turn"]].row("gpt-4", judgments, row["tstamp"])
        assert list(rebuilt.items()) == list(row.items())
    assert len(stored) == 75


def test_the_published_categories(bench: dict[str, Any], phi3: Path) -> None:
    (summary,) = mt_bench_scores.summarize(
        mt_bench_scores.load_judgments(phi3 / "gpt-4_single.jsonl"), bench["questions"]
    )
    published = (9.6, 8.55, 6.85, 6.15, 6.45, 8.25, 9.8, 9.95)
    assert summary["categories"] == pytest.approx(dict(zip(mt_bench.CATEGORIES, published, strict=True)), abs=EXACT)
    assert (summary["judge"], summary["model"], summary["final"], summary["n"]) == ("gpt-4", "phi-3-dpo", True, 160)
    table = mt_bench_scores.pair_summary(
        mt_bench_scores.load_pair_judgments(phi3 / "gpt-4_pair.jsonl"), bench["questions"]
    )
    first = table["table"][0]
    assert (first["model"], first["tie"], table["n_errors"]) == ("phi-3-dpo", 35, 2)
    assert first["win_rate_adjusted"] == pytest.approx(0.5137, abs=5e-5)
    assert not table["final"]  # the run was interrupted: 75 of 160 matches


@pytest.mark.parametrize("version", ["AE1", "AE2"])
def test_every_field_of_the_leaderboard(data: Path, version: str) -> None:
    published = alpaca_eval.read_leaderboard(next((data / "alpaca_eval").glob(f"leaderboard_{version}_*.csv")))
    folders = [path for path in (data / f"published/alpaca_eval/{version}").iterdir() if path.is_dir()]
    for folder in folders:
        rows = alpaca_eval.load_annotations(folder / "annotations.json.gz")
        numbers = alpaca_eval.metrics(row["preference"] for row in rows)
        assert numbers == pytest.approx({key: published[folder.name][key] for key in FIELDS}, abs=EXACT)
        # Of falcon-7b-instruct the published annotations are of another model than the published outputs.
        source = folder / "model_outputs.json.gz"
        outputs = alpaca_eval.load_outputs(source) if source.is_file() else None
        summary = alpaca_scores.summarize(rows, outputs=outputs)
        assert summary["avg_length"] == published[folder.name]["avg_length"]
    assert len(folders) == 2


def test_zephyr(data: Path) -> None:
    rows = alpaca_eval.load_annotations(data / "published/alpaca_eval/AE1/zephyr-7b-beta/annotations.json.gz")
    asked = [row.instruction for row in alpaca_eval.load_outputs(find_data("alpaca reference 2", data))]
    summary = alpaca_scores.summarize(rows, asked)
    expected = {
        "win_rate": 90.5977584059776,
        "standard_error": 1.0287080531312012,
        "n_wins": 727,
        "n_wins_base": 75,
        "n_draws": 1,
        "n_total": 803,
        "avg_length": 1444,
    }
    assert {key: summary[key] for key in expected} == pytest.approx(expected, abs=EXACT)
    assert (summary["n_unparsed"], summary["n_missing"]) == (2, 0)
    assert summary["if_unparsed_lost"] < summary["win_rate"] < summary["if_unparsed_won"]


def test_every_stored_completion_gives_the_stored_preference(data: Path) -> None:
    annotator = alpaca_eval.ANNOTATORS["weighted_alpaca_eval_gpt4_turbo"]
    template = find_data(annotator.prompt, data).read_text()
    compared = ties = 0
    for file in sorted((data / "published/alpaca_eval/AE2").glob("*/annotations.json.gz")):
        rows = alpaca_eval.load_annotations(file)
        sides = [
            [alpaca_eval.Output(row["instruction"], row[f"output_{i}"], row[f"generator_{i}"]) for row in rows]
            for i in (1, 2)
        ]
        made = alpaca_eval.comparisons(*sides, annotator, template)
        exact = alpaca_eval.comparisons(*sides, annotator, template, parity=True)
        assert [each.messages for each in made] == [each.messages for each in exact]
        assert sum(each.switched for each in made) == 406
        for row, each in zip(rows, made, strict=True):
            logprobs = alpaca_eval.completion_logprobs(row["raw_completion"])
            if logprobs is None:
                assert each.decided == row["preference"] == 1.5
                ties += 1
                continue
            preference = alpaca_eval.unswitch(alpaca_eval.parse_logprobs(logprobs), each.switched)
            assert preference == pytest.approx(row["preference"], abs=1e-10)
            compared += 1
    assert (compared, ties) == (1605, 5)


def test_length_control_from_published_coefficients(data: Path) -> None:
    folder = data / "alpaca_eval"
    published = alpaca_eval.read_leaderboard(next(folder.glob("leaderboard_AE2_*.csv")))
    coefficients = length_control.load_coefficients(next(folder.glob("glm_coefs_*.csv")))
    difficulty = length_control.load_difficulty(folder / "instruction_difficulty.RECOVERED.csv")
    gamma = [difficulty[i] for i in range(805)]
    close, errors = 0, []
    for model, row in published.items():
        if model in coefficients and row["length_controlled_winrate"] is not None:
            made = length_control.predict(coefficients[model], gamma)
            close += abs(made.win_rate - row["length_controlled_winrate"]) < 1e-6
            if row["lc_standard_error"] is not None:
                errors.append(abs(made.standard_error - row["lc_standard_error"]))
    assert close == 189
    assert np.median(errors) < 1e-9


def test_length_control_refitted(data: Path) -> None:
    folder = data / "alpaca_eval"
    published = alpaca_eval.read_leaderboard(next(folder.glob("leaderboard_AE2_*.csv")))
    gamed = length_control.load_gamed(folder / "df_gamed.SURROGATE.csv")
    asked = [row.instruction for row in alpaca_eval.load_outputs(find_data("alpaca reference 2", data))]
    for file in sorted((data / "published/alpaca_eval/AE2").glob("*/annotations.json.gz")):
        rows = alpaca_eval.load_annotations(file)
        hard = length_control.difficulties(rows, asked, gamed.difficulties())
        expected = published[file.parent.name]["length_controlled_winrate"]
        fits = [length_control.length_controlled(rows, hard, gamed, C=float(C)) for C in length_control.GRID[5:]]
        assert min(abs(fit.win_rate - expected) for fit in fits) < 5.6e-7
    # The stand-in has other preferences than the hub's file, so cross-validation may choose another C.
    assert alpaca_scores.summarize(rows, asked, gamed)["length_controlled_winrate"] == pytest.approx(expected, abs=0.15)
