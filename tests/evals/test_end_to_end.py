"""Whole evaluations over HTTP: the verbs, the files that FastChat and alpaca_eval would have, kills and resumes."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mambalign.cli import app
from mambalign.evals.rule_judge import MODEL, Faults, RuleJudge, running
from tests.waiting import PATIENCE, until

JUDGE = f"{MODEL}@127.0.0.1"

CATEGORIES = ("writing", "math", "stem", "coding")
SINGLE = "[Question]\n{question}\n\n[The Start of Assistant's Answer]\n{answer}\n[The End of Assistant's Answer]"
SINGLE_2 = (
    "<|The Start of Assistant A's Conversation with User|>\n\n### User:\n{question_1}\n\n"
    "### Assistant A:\n{answer_1}\n\n"
    "### User:\n{question_2}\n\n### Assistant A:\n{answer_2}\n\n<|The End of Assistant A's Conversation with User|>"
)
PAIR = (
    "[User Question]\n{question}\n\n"
    "[The Start of Assistant A's Answer]\n{answer_a}\n[The End of Assistant A's Answer]\n\n"
    "[The Start of Assistant B's Answer]\n{answer_b}\n[The End of Assistant B's Answer]"
)
PAIR_2 = "\n\n\n".join(
    f"<|The Start of Assistant {side}'s Conversation with User|>\n\n"
    f"### User:\n{{question_1}}\n\n### Assistant {side}:\n{{answer_{side.lower()}_1}}\n\n"
    f"### User:\n{{question_2}}\n\n### Assistant {side}:\n{{answer_{side.lower()}_2}}\n\n"
    f"<|The End of Assistant {side}'s Conversation with User|>"
    for side in "AB"
)
RANKING = """<|im_start|>system
You rank.
<|im_end|>
<|im_start|>user
Please rank the models by the quality of their answers.
    "instruction": \"\"\"{instruction}\"\"\",
        "answer": \"\"\"{output_1}\"\"\"
        "answer": \"\"\"{output_2}\"\"\"
<|im_end|>"""
LETTER = """<|im_start|>system
You choose.
<|im_end|>
<|im_start|>user
    "instruction": \"\"\"{instruction}\"\"\",
        "model_identifier": "m",
        "output": \"\"\"{output_1}\"\"\"
        "model_identifier": "M",
        "output": \"\"\"{output_2}\"\"\"
<|im_end|>"""


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass(frozen=True)
class Small:
    """data: a data folder. answers(model): an answer file; outputs(model): model_outputs.json."""

    data: Path
    questions: int
    instructions: int

    def answers(self, model: str, text: Callable[[int, int], str]) -> Path:
        rows = [
            {"question_id": q, "model_id": model, "choices": [{"index": 0, "turns": [text(q, 1), text(q, 2)]}]}
            for q in range(1, self.questions + 1)
        ]
        return write_rows(self.data / "model_answer" / f"{model}.jsonl", rows)

    def outputs(self, model: str, text: Callable[[int], str]) -> Path:
        rows = [
            {"instruction": f"Explain thing number {i}.", "output": text(i), "generator": model, "dataset": "own"}
            for i in range(self.instructions)
        ]
        path = self.data / f"{model}.json"
        path.write_text(json.dumps(rows))
        return path


@pytest.fixture
def small(tmp_path: Path) -> Small:
    """12 questions and 40 instructions."""
    data = tmp_path / "data"
    questions = [
        {"question_id": q, "category": CATEGORIES[q % 4], "turns": [f"What about topic {q}?", f"And more on {q}?"]}
        for q in range(1, 13)
    ]
    write_rows(data / "mt_bench/question.jsonl", questions)
    references = [{"question_id": q, "choices": [{"index": 0, "turns": [f"ref {q}", "ref"]}]} for q in range(1, 13)]
    write_rows(data / "mt_bench/reference_answer/gpt-4.jsonl", references)
    prompts = []
    for family, kind, templates in (("single", "single", (SINGLE, SINGLE_2)), ("pair", "pairwise", (PAIR, PAIR_2))):
        for name in ("v1", "math-v1") if family == "single" else ("v2", "math-v1"):
            for template, suffix in zip(templates, ("", "-multi-turn"), strict=True):
                reference = "[The Start of Reference Answer]\n{ref_answer_1}\n[The End of Reference Answer]\n\n"
                prompts.append(
                    {
                        "name": f"{family}-{name}{suffix}",
                        "type": kind,
                        "system_prompt": "You judge.",
                        "prompt_template": (reference if "math" in name else "") + template,
                        "output_format": "[[rating]]" if family == "single" else "[[A]]",
                    }
                )
    write_rows(data / "mt_bench/judge_prompts.jsonl", prompts)
    templates = {"alpaca_eval_gpt4/alpaca_eval": RANKING, "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf": LETTER}
    for name, template in templates.items():
        path = data / f"alpaca_eval/evaluators/{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template)
    made = Small(data, 12, 40)
    reference = made.outputs(
        "reference", lambda i: f"Thing number {i} is explained here in some words." + " more" * (i % 7)
    )
    for name in ("alpaca_eval.json", "alpaca_eval_gpt4_baseline.json"):
        (data / "alpaca_eval" / name).write_text(reference.read_text())
    return made


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, words)], env={"COLUMNS": "200", "TERM": "dumb"})


def judge_words(server: RuleJudge, small: Small, out: Path, *more: Any) -> list[Any]:
    where = ("--judge-base-url", server.url, "--judge-model", MODEL, "--data-dir", small.data, "--out", out)
    return [*where, *more]


def mt_bench(server: RuleJudge, small: Small, out: Path, files: list[Path], *more: Any) -> Any:
    return run("mt-bench", "judge", *files, *judge_words(server, small, out, *more))


def alpaca(server: RuleJudge, small: Small, out: Path, file: Path, *more: Any) -> Any:
    return run("alpaca", "judge", file, *judge_words(server, small, out, *more))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "tstamp"} for row in rows(path)]


# MT-Bench -----------------------------------------------------------------------------------------------------------


def test_single_is_a_row_an_answer_whatever_the_concurrency(small: Small, tmp_path: Path) -> None:
    file = small.answers("mine", lambda q, turn: f"About topic {q}: " + "well " * (q * turn) + ".")
    with running(Faults(throttle_every=7, retry_after="0")) as server:
        one = mt_bench(server, small, tmp_path / "one", [file], "--concurrency", 1)
        many = mt_bench(server, small, tmp_path / "many", [file], "--concurrency", 32)
    assert (one.exit_code, many.exit_code) == (0, 0), one.output + many.output
    files = [tmp_path / name / f"{JUDGE}_single.jsonl" for name in ("one", "many")]
    assert without_times(files[0]) == without_times(files[1])
    judged = rows(files[0])
    assert [(row["turn"], row["question_id"] % 4 in (1, 3)) for row in judged] == [
        (turn, math) for turn in (1, 2) for math in (False, True) for _ in range(6)
    ]
    assert list(judged[0]) == ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
    assert all(row["judge"][0] == JUDGE and 1 <= row["score"] <= 10 for row in judged)
    assert len({row["score"] for row in judged}) > 2
    about = json.loads((tmp_path / "one" / f"{JUDGE}_single.judge.json").read_text())
    assert about["complete"] and about["asked_for"] == MODEL and about["models_that_answered"] == [MODEL]


def test_pairs_are_judged_in_both_orders_and_a_swap_changes_nothing(small: Small, tmp_path: Path) -> None:
    long = small.answers("long", lambda q, turn: f"About topic {q}: " + "well " * 30 + ".")
    short = small.answers("short", lambda q, turn: "No")
    same = small.answers("same", lambda q, turn: "No")
    with running() as server:
        all_pairs = mt_bench(server, small, tmp_path, [long, short, same], "--mode", "pairwise-all")
        assert all_pairs.exit_code == 0, all_pairs.output
        # "long" against "same" asks what "long" against "short" did, and the third pair the same in both orders.
        assert len(server.judged) == 12 * 2 * 2 + 12 * 2
        swapped = mt_bench(server, small, tmp_path / "b", [short], "--mode", "pairwise-baseline", "--baseline", long)
        assert swapped.exit_code == 0, swapped.output
    judged = rows(tmp_path / f"{JUDGE}_pair.jsonl")
    assert len(judged) == 3 * 12 * 2
    for row in judged:
        ties = {row["model_1"], row["model_2"]} == {"short", "same"}
        assert (row["g1_winner"], row["g2_winner"]) == (("tie", "tie") if ties else ("model_1", "model_1")), row
        assert row["g1_user_prompt"] != row["g2_user_prompt"] or ties
    for row in rows(tmp_path / "b" / f"{JUDGE}_pair.jsonl"):
        assert (row["model_1"], row["model_2"]) == ("short", "long")
        assert (row["g1_winner"], row["g2_winner"]) == ("model_2", "model_2")


def test_other_models_stay_in_the_file_and_none_is_there_twice(small: Small, tmp_path: Path) -> None:
    a = small.answers("a", lambda q, turn: f"a {q}")
    b = small.answers("b", lambda q, turn: f"b {q}")
    with running() as server:
        for files in ([a], [b], [a], [b, a]):
            assert mt_bench(server, small, tmp_path, files).exit_code == 0
        assert len(server.judged) == 48
    judged = rows(tmp_path / f"{JUDGE}_single.jsonl")
    keys = [(row["question_id"], row["model"], row["turn"]) for row in judged]
    assert len(keys) == len(set(keys)) == 48


def test_the_order_of_two_files_makes_no_other_match(small: Small, tmp_path: Path) -> None:
    """Else the next command's glob would count a pair of models twice."""
    a = small.answers("a", lambda q, turn: f"a {q}")
    b = small.answers("b", lambda q, turn: f"b {q} " + "well " * q)
    with running() as server:
        for files in ([a, b], [b, a]):
            assert mt_bench(server, small, tmp_path, files, "--mode", "pairwise-all").exit_code == 0
    judged = rows(tmp_path / f"{JUDGE}_pair.jsonl")
    assert len(judged) == 24 and {(row["model_1"], row["model_2"]) for row in judged} == {("b", "a")}


def test_changed_answers_are_judged_anew(small: Small, tmp_path: Path) -> None:
    with running() as server:
        mt_bench(server, small, tmp_path, [small.answers("a", lambda q, turn: "first")])
        mt_bench(server, small, tmp_path, [small.answers("a", lambda q, turn: "second" if q == 5 else "first")])
        # Of question 5: both prompts; of no other.
        assert len(server.judged) == 24 + 2
    judged = rows(tmp_path / f"{JUDGE}_single.jsonl")
    assert len(judged) == 24 and sum("second" in row["user_prompt"] for row in judged) == 2


def test_junk_is_an_unreadable_verdict_and_silence_is_none(small: Small, tmp_path: Path) -> None:
    file = small.answers("mine", lambda q, turn: f"About topic {q}.")
    with running(Faults(junk_every=3)) as server:
        junk = mt_bench(server, small, tmp_path / "junk", [file], "--json")
    told = json.loads(junk.stdout)
    judged = rows(Path(told["file"]))
    assert junk.exit_code == 0 and told["unparsed"] == sum(row["score"] == -1 for row in judged) > 0
    with running(Faults(empty_every=5)) as server:
        silent = mt_bench(server, small, tmp_path / "silent", [file])
        judged = rows(tmp_path / "silent" / f"{JUDGE}_single.jsonl")
        assert silent.exit_code == 3 and "verdicts are missing (empty text" in silent.output
        assert 0 < len(judged) < 24 and all(row["score"] != -1 for row in judged)
        server.faults = Faults()
        before = len(server.requests)
        assert mt_bench(server, small, tmp_path / "silent", [file]).exit_code == 0
        assert len(server.requests) - before == 24 - len(judged)


# AlpacaEval ---------------------------------------------------------------------------------------------------------


def outputs(small: Small) -> Path:
    """A third is what the reference says."""
    reference = json.loads((small.data / "alpaca_eval/alpaca_eval.json").read_text())
    return small.outputs("mine", lambda i: reference[i]["output"] if i % 3 == 0 else f"Thing number {i}: " + "x " * i)


@pytest.mark.parametrize("annotator", ["alpaca_eval_gpt4", "weighted_alpaca_eval_gpt4_turbo", "alpaca_eval_clf"])
def test_alpaca_writes_annotations_in_order_and_asks_nothing_of_identical_outputs(
    annotator: str, small: Small, tmp_path: Path
) -> None:
    with running() as server:
        done = alpaca(server, small, tmp_path, outputs(small), "--annotator", annotator)
        assert done.exit_code == 0, done.output
        assert len(server.judged) == 26
    folder = tmp_path / "mine" / f"{annotator}_by_{JUDGE}"
    judged = json.loads((folder / "annotations.json").read_text())
    assert [row["instruction"] for row in judged] == [f"Explain thing number {i}." for i in range(40)]
    assert all(row["annotator"] == f"{annotator}_by_{JUDGE}" for row in judged)
    assert all(row["preference"] == 1.5 and row["raw_completion"] is None for row in judged[::3])
    assert {row["preference"] > 1.5 for i, row in enumerate(judged) if i % 3} == {True, False}
    assert (folder / "leaderboard.csv").read_text().count("\n") == 2


def test_the_switch_is_undone(small: Small, tmp_path: Path) -> None:
    """A far better output is preferred whichever place it was shown in."""
    file = small.outputs("mine", lambda i: f"Explain thing number {i}: " + "word " * 60 + ".")
    with running() as server:
        for annotator in ("alpaca_eval_gpt4", "weighted_alpaca_eval_gpt4_turbo", "alpaca_eval_clf"):
            assert alpaca(server, small, tmp_path, file, "--annotator", annotator).exit_code == 0
            judged = json.loads((tmp_path / "mine" / f"{annotator}_by_{JUDGE}" / "annotations.json").read_text())
            assert min(row["preference"] for row in judged) > 1.9
        prompts = [body["messages"][1]["content"] for body in server.judged]
        assert {text.index("word word") < text.index("is explained") for text in prompts} == {True, False}


def test_a_judge_without_logprobs_is_refused_for_the_weighted_annotator_only(small: Small, tmp_path: Path) -> None:
    with running(Faults(no_logprobs=True)) as server:
        refused = alpaca(server, small, tmp_path, outputs(small))
        assert refused.exit_code == 2 and "--annotator alpaca_eval_gpt4" in refused.output and not server.judged
        assert not (tmp_path / "mine").exists()
        assert alpaca(server, small, tmp_path, outputs(small), "--annotator", "alpaca_eval_clf").exit_code == 0
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [f"alpaca_eval_clf_by_{JUDGE}"]


def test_what_a_judge_was_told_beside_the_benchmark_is_said(small: Small, tmp_path: Path) -> None:
    more = ("--judge-extra", '{"temperature": 1, "seed": 3}')
    with running() as server:
        done = mt_bench(server, small, tmp_path, [small.answers("a", lambda q, turn: f"a {q}")], *more)
        assert done.exit_code == 0 and server.judged[-1]["temperature"] == 1
        report = run("calibrate", done.stdout.split()[0], *judge_words(server, small, tmp_path / "c", "--json", *more))
    said = 'asked with {"temperature": 1, "seed": 3} beside the benchmark\'s own'
    assert said in json.loads((tmp_path / f"{JUDGE}_single.judge.json").read_text())["notes"]
    assert said in json.loads(report.stdout)["notes"]


def test_a_models_name_leads_to_no_other_folder(small: Small, tmp_path: Path) -> None:
    named = outputs(small)
    rows = json.loads(named.read_text())
    with running() as server:
        for name, folder in (("..", None), (" ", None), ("x" * 300, None), ("../a/b\n\0c", "..-a-b--c")):
            named.write_text(json.dumps([row | {"generator": name} for row in rows]))
            out = tmp_path / "out" / "in"
            done = alpaca(server, small, out, named, "--annotator", "alpaca_eval_gpt4")
            assert done.exit_code == (0 if folder else 2), done.output
            if folder is None:
                assert "cannot name the folder" in done.output and not server.judged
            else:
                assert (out / folder).is_dir() and [path.name for path in (tmp_path / "out").iterdir()] == ["in"]


def test_an_unfinished_result_has_no_leaderboard(small: Small, tmp_path: Path) -> None:
    words = ("--annotator", "alpaca_eval_gpt4")
    with running() as server:
        assert alpaca(server, small, tmp_path, outputs(small), *words).exit_code == 0
    with running(Faults(empty_every=4)) as server:
        assert alpaca(server, small, tmp_path, outputs(small), *words).exit_code == 3
    assert not list(tmp_path.rglob("leaderboard.csv"))


def test_both_benchmarks_share_a_store(small: Small, tmp_path: Path) -> None:
    file = small.answers("mine", lambda q, turn: f"About {q}.")
    with running() as server:
        for _ in range(2):
            store = ("--store", tmp_path / "store")
            assert mt_bench(server, small, tmp_path / "m", [file], *store).exit_code == 0
            assert alpaca(server, small, tmp_path / "a", outputs(small), *store).exit_code == 0
        assert len(server.requests) == 1 + 24 + 26


# Money, and mistakes ------------------------------------------------------------------------------------------------


def test_a_dry_run_makes_no_call_and_no_file(small: Small, tmp_path: Path) -> None:
    file = small.answers("mine", lambda q, turn: f"About {q}.")
    with running() as server:
        prices = ("--price-in", 30, "--price-out", 60)
        told = json.loads(mt_bench(server, small, tmp_path / "o", [file], "--dry-run", "--json", *prices).stdout)
        pairs = alpaca(server, small, tmp_path / "o", outputs(small), "--dry-run", *prices)
        assert not server.requests and not (tmp_path / "o").exists()
    assert (told["calls"], told["stored"], told["judge"]) == (24, 0, JUDGE) and told["cost"] > 0
    assert "26, 0 of them" in pairs.output and "cost" in pairs.output


def test_max_cost_stops_with_3_and_the_same_command_goes_on(small: Small, tmp_path: Path) -> None:
    file = small.answers("mine", lambda q, turn: f"About {q}.")
    words = ("--price-in", 100, "--price-out", 100, "--concurrency", 4, "--max-cost")
    with running() as server:
        stopped = mt_bench(server, small, tmp_path, [file], *words, 0.3)
        assert stopped.exit_code == 3 and "might exceed --max-cost 0.3" in stopped.output
        some = len(rows(tmp_path / f"{JUDGE}_single.jsonl"))
        assert 0 < some < 24
        assert mt_bench(server, small, tmp_path, [file], *words, 30).exit_code == 0
        assert len(server.judged) == 24


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode", "pairwise"], "did you mean"),
        (["--mode", "pairwise-baseline"], "give both or neither"),
        (["--baseline", "x"], "give both or neither"),
        (["--mode", "pairwise-all"], "two models"),
        (["--price-in", "1"], "prices go together"),
        (["--max-cost", "1"], "--price-in and --price-out"),
        (["--judge-extra", "[1]"], "must be a JSON object"),
        (["--judge-key-env", "NO_SUCH_VARIABLE"], "no such variable"),
        (["--judge-model", "gpt-4"], f"it lists {MODEL}"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], message: str, small: Small, tmp_path: Path) -> None:
    file = small.answers("mine", lambda q, turn: f"About {q}.")
    with running() as server:
        result = mt_bench(server, small, tmp_path, [file], *words)
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
        assert not server.judged


# Kills --------------------------------------------------------------------------------------------------------------


@contextmanager
def command(words: list[Any]) -> Iterator[subprocess.Popen[str]]:
    line = [sys.executable, "-m", "mambalign", "eval", *map(str, words)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=os.getcwd())
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def held(server: RuleJudge, after: int) -> Iterator[Callable[[int], None]]:
    """Within, the judge gives so many verdicts and no more; a function that waits until n further calls are under way.

    They have been taken then, and each of the concurrent callers stored what it was told before.
    """
    probe, take, go = 1, server.take, threading.Event()

    def wait(body: dict[str, Any]) -> int:
        number = take(body)
        if number > probe + after:
            go.wait(PATIENCE)
        return number

    server.take = wait  # type: ignore[method-assign]
    try:
        yield lambda n: until(lambda: len(server.requests) == probe + after + n)
    finally:
        server.take = take  # type: ignore[method-assign]
        go.set()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_midway_and_resumed_repeats_only_what_was_under_way(
    how: signal.Signals, small: Small, tmp_path: Path
) -> None:
    concurrency = 4
    file = small.outputs("mine", lambda i: f"Thing number {i}: " + "x " * i)
    with running() as server:
        words = judge_words(server, small, tmp_path, "--annotator", "alpaca_eval_gpt4", "--concurrency", concurrency)
        with held(server, 12) as reached, command(["alpaca", "judge", file, *words]) as process:
            reached(concurrency)
            process.send_signal(how)
            output = process.communicate()[0]
        assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), output
        if how == signal.SIGINT:
            assert "run the same command again" in output and "Traceback" not in output
        kept = rows(tmp_path / "replies/replies.jsonl") if how == signal.SIGINT else None
        until(lambda: len(server.judged) == 12 + concurrency)  # what was under way is answered, to nobody
        answered = len(server.judged)
        assert alpaca(server, small, tmp_path, file, "--annotator", "alpaca_eval_gpt4").exit_code == 0
        texts = [body["messages"][1]["content"] for body in server.judged]
        assert len(set(texts)) == 40
        assert len(texts) - 40 <= concurrency  # answered while nobody listened any more
        assert kept is None or len(texts) - answered == 40 - len(kept)  # nothing that was on the disk was asked again
    assert len(rows(tmp_path / "replies/replies.jsonl")) == 40
    assert len(json.loads(next(tmp_path.rglob("annotations.json")).read_text())) == 40


def test_two_commands_on_one_store_refuse_the_second(small: Small, tmp_path: Path) -> None:
    file = small.outputs("mine", lambda i: f"Thing number {i}: " + "x " * i)
    with running() as server:
        words = judge_words(server, small, tmp_path, "--annotator", "alpaca_eval_gpt4", "--concurrency", 2)
        with held(server, 2) as reached, command(["alpaca", "judge", file, *words]):
            reached(2)
            second = alpaca(server, small, tmp_path, file, "--annotator", "alpaca_eval_gpt4")
    assert second.exit_code == 2 and "another process writes" in second.output


# Calibration --------------------------------------------------------------------------------------------------------


def test_a_judge_agrees_with_itself_and_not_with_its_opposite(small: Small, tmp_path: Path) -> None:
    file = small.answers("mine", lambda q, turn: f"About topic {q}: " + "well " * (q * turn) + ".")
    with running() as server:
        mt_bench(server, small, tmp_path, [file])
        published = tmp_path / f"{JUDGE}_single.jsonl"
        reversed_file = tmp_path / "reversed.jsonl"
        reversed_file.write_text(
            "".join(json.dumps(row | {"score": 11 - row["score"]}) + "\n" for row in rows(published))
        )
        same = run("calibrate", published, *judge_words(server, small, tmp_path / "c", "--json"))
        opposite = run("calibrate", reversed_file, *judge_words(server, small, tmp_path / "c", "--json"))
        some = run("calibrate", published, *judge_words(server, small, tmp_path / "c", "-n", 7, "--json"))
    assert same.exit_code == opposite.exit_code == 0, same.output + opposite.output
    numbers = json.loads(same.stdout)["numbers"]
    assert numbers["same_rating"]["value"] == 1 and numbers["bias"]["value"] == 0
    assert numbers["rank_correlation"]["value"] == pytest.approx(1)
    assert "much as" in json.loads(same.stdout)["verdict"]
    assert json.loads(opposite.stdout)["numbers"]["rank_correlation"]["value"] == pytest.approx(-1)
    assert "do not use it" in json.loads(opposite.stdout)["verdict"]
    assert json.loads(some.stdout)["compared"] == 7
    assert len(server.judged) == 24 * 2  # once by the benchmark, once into the calibration's own store


def test_published_verdicts_without_a_score_are_left_out(small: Small, tmp_path: Path) -> None:
    file = small.answers("mine", lambda q, turn: f"About topic {q}: " + "well " * (q * turn) + ".")
    with running() as server:
        mt_bench(server, small, tmp_path, [file])
        published = rows(tmp_path / f"{JUDGE}_single.jsonl")
        published[0]["score"], published[1]["score"], published[2]["score"] = None, -1, str(published[2]["score"])
        found = write_rows(tmp_path / "published.jsonl", published)
        done = run("calibrate", found, *judge_words(server, small, tmp_path / "c", "--json"))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["compared"] == 22


@pytest.mark.parametrize("annotator", ["alpaca_eval_gpt4", "weighted_alpaca_eval_gpt4_turbo"])
def test_calibration_knows_who_was_shown_first(annotator: str, small: Small, tmp_path: Path) -> None:
    with running() as server:
        alpaca(server, small, tmp_path, outputs(small), "--annotator", annotator)
        published = next(tmp_path.rglob("annotations.json"))
        words = judge_words(server, small, tmp_path / "c", "--annotator", annotator, "--json")
        done = run("calibrate", published, *words)
    assert done.exit_code == 0, done.output
    numbers = json.loads(done.stdout)["numbers"]
    assert numbers["agreement"]["value"] == 1 and numbers["win_rate_bias"]["value"] == pytest.approx(0, abs=1e-9)
    assert numbers["prefers_first"] == numbers["prefers_first_published"]
    assert 0.2 < numbers["prefers_first"]["value"] < 0.8


# The real files -----------------------------------------------------------------------------------------------------


@pytest.mark.shared("eval/mt_bench", "eval/alpaca_eval", "eval/published")
def test_the_real_benchmarks_against_both_judges(shared_data: Path, tmp_path: Path) -> None:
    """80 x 2 judgments and 805, and every stored prompt of the published judgments is what we would send."""
    data = shared_data / "eval"
    answers = data / "published/mt_bench/stefanstud_phi3/model_answer/phi-3-dpo.jsonl"
    where = ("--data-dir", data, "--out", tmp_path, "--concurrency", 32)
    with running(Faults(throttle_every=50, retry_after="0")) as server:
        own = ("--judge-base-url", server.url, "--judge-model", MODEL)
        assert run("mt-bench", "judge", answers, *own, *where).exit_code == 0
        assert len(server.judged) == 160
        outputs = data / "published/alpaca_eval/AE1/zephyr-7b-beta/model_outputs.json.gz"
        done = run("alpaca", "judge", outputs, *own, *where, "--annotator", "alpaca_eval_gpt4")
        assert done.exit_code == 0 and len(server.judged) == 160 + 804, done.output  # one output is the reference's
    published = {(row["question_id"], row["turn"]): row for row in rows(answers.parent.parent / "gpt-4_single.jsonl")}
    for row in rows(tmp_path / f"{JUDGE}_single.jsonl"):
        assert row["user_prompt"] == published[row["question_id"], row["turn"]]["user_prompt"]


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.shared("eval/mt_bench", "eval/published", "eval/fakejudge.py")
def test_the_shared_fake_judge(shared_data: Path, tmp_path: Path) -> None:
    port = random.SystemRandom().randrange(10_000, 20_000)  # where the kernel takes none from, and our Slurm none
    script = shared_data / "eval/fakejudge.py"
    process = subprocess.Popen([sys.executable, str(script), str(port), "40"])
    try:
        until(lambda: listens(port) or process.poll() is not None)
        assert json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/").read())["n"] == 0
        answers = shared_data / "eval/published/mt_bench/stefanstud_phi3/model_answer/phi-3.jsonl"
        words = ("--judge-base-url", f"http://127.0.0.1:{port}/v1", "--judge-model", "gpt-4", "--concurrency", 8)
        words = (*words, "--data-dir", shared_data / "eval", "--out", tmp_path)
        for _ in range(2):
            done = run("mt-bench", "judge", answers, *words)
            assert done.exit_code == 0, done.output
        asked = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/").read())["n"]
    finally:
        process.kill()
        process.wait()
    assert asked - asked // 40 == 161  # 160 judgments and a probe; the others were 429s
    judged = rows(tmp_path / "gpt-4@127.0.0.1_single.jsonl")  # a gpt-4 that is not OpenAI's does not pose as it
    assert len(judged) == 160 and all(
        re.fullmatch(r"Explanation. Rating: \[\[\d+]]", row["judgment"]) for row in judged
    )
