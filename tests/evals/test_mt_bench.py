"""Questions, prompts, verdicts, averages: FastChat's rules on a small benchmark, and what it gets wrong."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mambalign.evals import mt_bench, mt_bench_scores
from mambalign.evals.mt_bench import Answer, JudgePrompt, Question
from mambalign.recipe import UserError

Write = Callable[..., Path]


def answer(number: int, model: str = "m") -> Answer:
    return Answer(number, model, (f"{model}{number}.1", f"{model}{number}.2 {{answer}}"))


def answers(questions: list[Question], *models: str) -> dict[str, dict[int, Answer]]:
    return {model: {q.question_id: answer(q.question_id, model) for q in questions} for model in models}


REFERENCES = {3: Answer(3, "gpt-4", ("two", "four"))}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 1, "category": "x", "turns": ["one"]}, "q.jsonl:2: turns of question 1 must be"),
        ({"question_id": 1, "category": "x", "turns": ["a", "b", "c"]}, "exactly two texts"),
        ({"question_id": 1, "category": "x", "turns": "ab"}, "exactly two texts"),
        ({"question_id": 81, "category": "x", "turns": ["a", "b"]}, "q.jsonl:2: question_id 81 is there twice"),
        ({"question_id": 1.5, "category": "x", "turns": ["a", "b"]}, "question_id must be a whole number"),
        ({"category": "x", "turns": ["a", "b"]}, "question_id must be a whole number, this is null"),
        ({"question_id": 1, "turns": ["a", "b"]}, "q.jsonl:2: category must be text"),
        ({"question_id": 1, "category": "x", "turns": ["a", "b"], "required_temperature": "0"}, "required_temperature"),
    ],
)
def test_a_bad_question_is_named(write: Write, row: dict[str, Any], message: str) -> None:
    path = write("q.jsonl", {"question_id": 81, "category": "math", "turns": ["a", "b"], "reference": ["r"]}, row)
    with pytest.raises(UserError, match=message):
        mt_bench.load_questions(path)


def test_temperatures(questions: list[Question]) -> None:
    assert [question.temperature() for question in questions] == [0.7, 0.0, 0.3]
    assert [question.temperature(1.0) for question in questions[:2]] == [1.0, 1.0]
    with pytest.raises(UserError, match="required_temperature"):
        questions[2].temperature(1.0)


def test_matches_come_in_fastchats_order(questions: list[Question], prompts: dict[str, JudgePrompt]) -> None:
    matches = mt_bench.single_matches(questions, answers(questions, "m", "k"), prompts, REFERENCES)
    assert [(match.question.question_id, match.turn, match.models[0]) for match in matches] == [
        (7, 1, "m"), (7, 1, "k"), (5, 1, "m"), (5, 1, "k"), (3, 1, "m"), (3, 1, "k"),
        (7, 2, "m"), (7, 2, "k"), (5, 2, "m"), (5, 2, "k"), (3, 2, "m"), (3, 2, "k"),
    ]  # fmt: skip
    assert {match.prompt.name for match in matches if match.question.question_id == 3} == {
        "single-math-v1",
        "single-math-v1-multi-turn",
    }


def test_braces_are_text_and_the_second_turn_shows_both(
    questions: list[Question], prompts: dict[str, JudgePrompt]
) -> None:
    matches = mt_bench.single_matches(questions, answers(questions, "m"), prompts, REFERENCES)
    first, last = matches[0], matches[-1]
    assert first.user_prompts == ("Q write {x} A m7.1",)
    assert last.user_prompts == ("two|four|1+1? m3.1 2+2? m3.2 {answer}",)
    assert first.games == (
        [{"role": "system", "content": "Judge."}, {"role": "user", "content": "Q write {x} A m7.1"}],
    )
    row = first.row("my judge", ["fine [[7]]"], 1.0)
    assert (row["judge"], row["score"], row["turn"]) == (["my judge", "single-v1"], 7, 1)


def test_the_second_game_is_swapped(questions: list[Question], prompts: dict[str, JudgePrompt]) -> None:
    given = answers(questions, "m", "k", "base")
    matches = mt_bench.pair_matches(questions, given, prompts, REFERENCES, baseline="base")
    assert {match.models for match in matches} == {("m", "base"), ("k", "base")} and len(matches) == 12
    assert matches[0].user_prompts == ("Q write {x} A m7.1 B base7.1", "Q write {x} A base7.1 B m7.1")
    assert matches[0].row("j", ["[[A]]", "[[A]]"])["g2_winner"] == "model_2"
    assert len(mt_bench.pair_matches(questions, given, prompts, REFERENCES)) == 3 * 6
    with pytest.raises(UserError, match="no answers of the baseline 'x'"):
        mt_bench.pair_matches(questions, given, prompts, REFERENCES, baseline="x")
    with pytest.raises(UserError, match="two models"):
        mt_bench.pair_matches(questions, {"m": given["m"]}, prompts, REFERENCES)


def test_what_is_missing_is_named(questions: list[Question], prompts: dict[str, JudgePrompt]) -> None:
    given = answers(questions, "m")
    with pytest.raises(UserError, match=r"question 3 \(math\) needs a reference answer"):
        mt_bench.single_matches(questions, given, prompts, {})
    with pytest.raises(UserError, match="m has no answer to both turns of question 5"):
        mt_bench.single_matches(questions, {"m": {k: v for k, v in given["m"].items() if k != 5}}, prompts, REFERENCES)
    with pytest.raises(UserError, match="lack 'single-v1'"):
        mt_bench.single_matches(questions, given, {}, REFERENCES)


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("[[8]] then [[2]]", 8),
        ("first [3], Rating: [[8.5]]", 8.5),
        ("Rating: [7]", 7),
        ("in [2023] they said", 2023),
        ("[[7/10]] [6]", 6),
        ("[[10]]", 10),
        ("[[08]]", 8),  # FastChat's literal_eval dies of it
        ("[[5.]]", 5.0),
        ("[[-3]]", -1),
        ("[[ 7 ]]", -1),
        ("Rating: 7", -1),
        ("$ERROR$", -1),
        ("", -1),
        (None, -1),
        (f"[[{'9' * 400}]]", -1),
    ],
)
def test_ratings(text: str | None, rating: float) -> None:
    found = mt_bench.parse_rating(text)
    assert found == rating and type(found) is type(rating)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[B]] no, [[A]]", "A"),
        ("[[C]] [[B]]", "B"),
        ("[[C]]", "tie"),
        ("[A]", "error"),
        ("", "error"),
        (None, "error"),
    ],
)
def test_verdicts(text: str | None, verdict: str) -> None:
    assert mt_bench.parse_verdict(text) == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[8,7]]", "A"),
        ("[[7, 8]]", "B"),
        ("[[7.05,7]]", "tie"),
        ("[7,9]", "B"),
        ("[[7,  9]]", "error"),
        ("[[7]]", "error"),
    ],
)
def test_pairs_of_ratings(text: str, verdict: str) -> None:
    assert mt_bench.parse_verdict(text, "[[rating_a,rating_b]]") == verdict


def test_swapped_verdicts() -> None:
    assert mt_bench.pair_winners("A", "A") == ("model_1", "model_2")
    assert mt_bench.pair_winners("A", "B") == ("model_1", "model_1")
    assert mt_bench.pair_winners("tie", "error") == ("tie", "error")


def test_answer_files(write: Write) -> None:
    rows = [mt_bench.answer_row(number, "m", [["a", text]]) for number, text in ((5, "x"), (3, "y"), (5, "z"))]
    assert [row["choices"][0]["turns"][1] for row in mt_bench.sorted_answers(rows)] == ["y", "z"]
    assert list(rows[0]) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    loaded = mt_bench.load_answers(write("m.jsonl", *rows))
    assert loaded[5].turns == ("a", "z") and loaded[3].model == "m"
    with pytest.raises(UserError, match=r"a\.jsonl:1: choices"):
        mt_bench.load_answers(write("a.jsonl", {"question_id": 1, "choices": []}))


def test_fastchats_post_processing() -> None:
    assert mt_bench.fastchat_text(" hi </s> ### Human: more", ["</s>"], "###") == "hi"
    assert mt_bench.fastchat_text("### Human: at the start", [], "###") == "### Human: at the start"


def test_prompt_files_are_checked(write: Write) -> None:
    row = {"name": "x", "type": "single", "system_prompt": "s", "prompt_template": "{answr}", "output_format": "f"}
    with pytest.raises(UserError, match=r"p\.jsonl:1: prompt_template asks for 'answr'"):
        mt_bench.load_judge_prompts(write("p.jsonl", row))
    with pytest.raises(UserError, match="no format string"):
        mt_bench.load_judge_prompts(write("p.jsonl", row | {"prompt_template": "{answer"}))


# Averages -----------------------------------------------------------------------------------------------------------


def verdict(number: int, turn: int, score: Any, model: str = "m", **more: Any) -> dict[str, Any]:
    prompt = "single-v1" + ("-multi-turn" if turn == 2 else "")
    row = {
        "question_id": number,
        "model": model,
        "judge": ["gpt-4", prompt],
        "judgment": f"[[{score}]]",
        "score": score,
    }
    return row | {"turn": turn} | more


def test_the_average_is_over_verdicts_not_over_turns(write: Write, questions: list[Question]) -> None:
    rows = [verdict(7, 1, 10), verdict(7, 2, 4), verdict(3, 1, 1), verdict(3, 2, -1), verdict(5, 1, 8.5)]
    (summary,) = mt_bench_scores.summarize(mt_bench_scores.load_judgments(write("j.jsonl", *rows)), questions)
    assert summary["average"] == pytest.approx(23.5 / 4) and summary["first_turn"] == pytest.approx(19.5 / 3)
    assert summary["second_turn"] == 4
    assert summary["categories"] == {"math": 1, "writing": 8.5, "poetry": 7}
    assert (summary["n"], summary["n_unparsed"], summary["n_missing"], summary["final"]) == (4, 1, 1, False)
    assert summary["missing"] == [(5, 2)] and summary["unparsed"] == [(3, 2)]
    assert summary["if_unparsed_were_1"] == pytest.approx(24.5 / 5)
    assert summary["if_unparsed_were_10"] == pytest.approx(33.5 / 5)
    json.dumps(summary, allow_nan=False)


def test_a_failed_call_is_no_verdict(write: Write, questions: list[Question]) -> None:
    rows = [verdict(q.question_id, turn, 5) for q in questions for turn in (1, 2)]
    rows[0] |= {"score": -1, "judgment": "$ERROR$"}
    (summary,) = mt_bench_scores.summarize(mt_bench_scores.load_judgments(write("j.jsonl", *rows)), questions)
    assert (summary["n_missing"], summary["n_unparsed"], summary["final"]) == (1, 0, False)
    again = [*rows, verdict(7, 1, 9)]
    (summary,) = mt_bench_scores.summarize(mt_bench_scores.load_judgments(write("j.jsonl", *again)), questions)
    assert summary["final"] and summary["average"] == pytest.approx(34 / 6)


@pytest.mark.parametrize(("keep", "average"), [("all", 5.0), ("first", 4.0), ("last", 6.0)])
def test_duplicates(write: Write, keep: Any, average: float) -> None:
    rows = [verdict(7, turn, score) for score in (4, 6) for turn in (1, 2)]
    (summary,) = mt_bench_scores.summarize(mt_bench_scores.load_judgments(write("j.jsonl", *rows)), duplicates=keep)
    assert (summary["average"], summary["n_duplicates"]) == (average, 2)
    with pytest.raises(UserError, match="'best' is none of"):
        mt_bench_scores.without_duplicates([], "best")  # type: ignore[arg-type]


def test_files_as_they_are_found(tmp_path: Path) -> None:
    odd = [
        verdict(81, 1, None),
        verdict(82, 1, float("nan")),
        verdict(83, 1, "7"),
        verdict(84, 1, -1.0),
        {k: v for k, v in verdict(85, 2, 9).items() if k not in ("score", "turn")},
        verdict(86, 1, 2023) | {"question_id": "86"},
    ]
    for name, content in (
        ("a.jsonl.gz", gzip.compress("".join(json.dumps(row) + "\n" for row in odd).encode())),
        ("a.json", json.dumps(odd, indent=1).encode()),
    ):
        (tmp_path / name).write_bytes(content)
        loaded = mt_bench_scores.load_judgments(tmp_path / name)
        assert [row.score for row in loaded] == [-1, -1, 7, -1, 9, 2023]
        assert [row.turn for row in loaded] == [1, 1, 1, 1, 2, 1]
        (summary,) = mt_bench_scores.summarize(loaded)
        assert (summary["n"], summary["n_unparsed"], summary["n_out_of_range"]) == (3, 3, 1)
        assert list(summary["categories"]) == ["writing"]
    (tmp_path / "cut.gz").write_bytes(gzip.compress(json.dumps(verdict(81, 1, 5)).encode())[:-9])
    with pytest.raises(UserError, match="cut off or damaged"):
        mt_bench_scores.load_judgments(tmp_path / "cut.gz")


def test_judges_and_models_have_numbers_of_their_own(write: Write) -> None:
    rows = [verdict(7, 1, 4), verdict(7, 1, 8, model="n"), verdict(7, 1, 6) | {"judge": ["other", "single-v1"]}]
    summaries = mt_bench_scores.summarize(mt_bench_scores.load_judgments(write("j.jsonl", *rows)))
    assert [(s["judge"], s["model"], s["average"], s["n_missing"]) for s in summaries] == [
        ("gpt-4", "n", 8, 1),
        ("other", "m", 6, 1),
        ("gpt-4", "m", 4, 1),
    ]


def test_the_wrong_kind_of_file_is_named(write: Write) -> None:
    single, pair = write("s.jsonl", verdict(1, 1, 2)), write("p.jsonl", game(1, "tie", "tie"))
    with pytest.raises(UserError, match="these are pairwise judgments"):
        mt_bench_scores.load_judgments(pair)
    with pytest.raises(UserError, match="these are judgments of single answers"):
        mt_bench_scores.load_pair_judgments(single)
    with pytest.raises(UserError, match="there are no judgments"):
        mt_bench_scores.load_judgments(write("empty.jsonl"))
    with pytest.raises(UserError, match=r"x\.jsonl:1: turn must be 1 or 2, this is 3"):
        mt_bench_scores.load_judgments(write("x.jsonl", verdict(1, 3, 2)))


def game(number: int, g1: str, g2: str, models: tuple[str, str] = ("a", "b"), turn: int = 1) -> dict[str, Any]:
    judge = {"judge": ["gpt-4", "pair-v2"], "turn": turn}
    return {"question_id": number, "model_1": models[0], "model_2": models[1], "g1_winner": g1, "g2_winner": g2} | judge


def test_pairwise_rates(write: Write) -> None:
    rows = [
        game(1, "model_1", "model_1"),
        game(2, "model_2", "model_2"),
        game(3, "model_1", "model_2"),  # changed its mind
        game(4, "tie", "model_1"),
        game(5, "error", "model_1"),
        game(6, "model_1", "model_1", ("c", "a")),
        {k: v for k, v in game(7, "", "").items() if "winner" not in k} | {"winner": "model_1"},
    ]
    judgments = mt_bench_scores.load_pair_judgments(write("p.jsonl", *rows))
    table = {row["model"]: row for row in mt_bench_scores.pair_table(judgments)}
    assert [table["a"][key] for key in ("win", "loss", "tie")] == [2, 2, 2]
    assert table["a"]["win_rate"] == table["a"]["loss_rate"] == pytest.approx(1 / 3)
    assert table["c"]["win_rate_adjusted"] == 1 and table["b"]["win_rate_adjusted"] == pytest.approx(2 / 5)
    assert [row["model"] for row in mt_bench_scores.pair_table(judgments, "b")] == ["a"]
    summary = mt_bench_scores.pair_summary(judgments)
    assert (summary["n_errors"], summary["final"]) == (1, False)
    assert summary["consistent"] == pytest.approx(4 / 6)
    assert summary["first_shown"] == pytest.approx(6 / 11)
    winners = [vote["winner"] for vote in mt_bench_scores.votes(judgments)]
    assert winners == ["model_a", "model_b", "tie (inconsistent)", "tie (inconsistent)", "model_a", "model_a"]
    with pytest.raises(UserError, match="no judgments of 'z'; there are those of a, b, c"):
        mt_bench_scores.pair_summary(judgments, baseline="z")
    with pytest.raises(UserError, match="winner 'A' is none of"):
        mt_bench_scores.load_pair_judgments(write("x.jsonl", game(1, "A", "B")))


def test_only_matches_against_the_baseline_say_anything(write: Write) -> None:
    """Errors, missing matches and the judge's bias among other models are no matter of theirs."""
    other = ("b", "c")
    rows = [game(q, "model_1", "model_1", turn=turn) for q in (1, 2) for turn in (1, 2)]
    rows += [game(1, "error", "tie", other), game(2, "model_1", "model_2", other), game(2, "tie", "tie", ("c", "b"))]
    judgments = mt_bench_scores.load_pair_judgments(write("p.jsonl", *rows))
    everything, alone = (mt_bench_scores.pair_summary(judgments, baseline=name) for name in (None, "a"))
    assert (everything["n_errors"], everything["n_missing"], everything["n_duplicates"]) == (1, 2, 1)
    assert not everything["final"] and "1 matches were judged again" in mt_bench_scores.pair_notes(everything)[0]
    assert alone["final"] and (alone["n_errors"], alone["n_missing"], alone["n_duplicates"]) == (0, 0, 0)
    assert (alone["n_matches"], alone["consistent"], alone["first_shown"]) == (4, 1, 0.5)
    assert not mt_bench_scores.pair_notes(alone)


def test_sign_test() -> None:
    assert mt_bench_scores.sign_test(0, 0) is None
    assert mt_bench_scores.sign_test(3, 3) == 1
    expected = 2 * sum(math.comb(20, k) for k in range(15, 21)) / 2**20
    assert mt_bench_scores.sign_test(5, 15) == pytest.approx(expected, rel=1e-12)
    assert mt_bench_scores.sign_test(3000, 3300) == pytest.approx(0.000165, rel=0.02)
