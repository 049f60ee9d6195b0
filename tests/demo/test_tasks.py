"""The demo's tasks: answers and grades agree, and nothing held out is ever trained on."""

from __future__ import annotations

import json
import random
import re

import pytest

from mambalign.demo import tasks
from mambalign.demo.tasks import CLOSINGS, TASKS, Grade, grade, make_problem


def everything_trained(seed: int) -> list[str]:
    """Every string of every training set, in pieces a user or an assistant said."""
    texts = [row["text"] for row in tasks.text_rows(3000, seed)]
    chats = [m["content"] for row in tasks.chat_rows(3000, seed) for m in row["messages"]]
    pairs = [m["content"] for row in tasks.preference_rows(2000, seed) for m in row["chosen"] + row["rejected"]]
    return texts + chats + pairs


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_right_and_every_wrong_one_wrong(task: str) -> None:
    rng = random.Random(0)
    for _ in range(200):
        problem = make_problem(task, rng)
        assert problem.task == task and problem.content in problem.prompt
        assert grade(problem, problem.answer) == Grade(correct=True, kind=False)
        for closing in CLOSINGS:
            assert grade(problem, f" {problem.answer}  {closing}\n") == Grade(correct=True, kind=True)
        assert grade(problem, f"{problem.wrong} {CLOSINGS[0]}") == Grade(correct=False, kind=True)


def test_grading_knows_the_answers_of_a_person() -> None:
    rng = random.Random(1)
    by_hand = {
        "first": lambda words: words[0],
        "last": lambda words: words[-1],
        "repeat": ", ".join,
        "reverse": lambda words: ", ".join(reversed(words)),
        "count": lambda words: str(len(words)),
        "largest": lambda words: str(max(int(word) for word in words)),
    }
    for task, solve in by_hand.items():
        for _ in range(50):
            problem = make_problem(task, rng)
            assert solve(problem.content.split(", ")) in problem.answer


@pytest.mark.parametrize(
    "reply", ["", "Happy to help!", "nonsense", "{answer} {answer}", "{answer} And more.", "x{answer}"]
)
def test_other_replies_are_not_right(reply: str) -> None:
    problem = make_problem("first", random.Random(2))
    assert not grade(problem, reply.format(answer=problem.answer)).correct


def test_held_out_problems_never_occur_in_training() -> None:
    trained = everything_trained(seed=0)
    exact = set(trained)
    problems = tasks.held_out_problems(40, seed=0)
    assert len(problems) == 40 * len(TASKS) >= 200
    for problem in problems:
        assert tasks.is_held_out(problem.content)
        assert problem.prompt not in exact


def test_no_training_text_holds_a_held_out_topic() -> None:
    """Found by pattern in whatever was said, prompts, right and wrong replies alike, not by asking the generator."""
    trained = everything_trained(seed=0)
    lists = {found for text in trained for found in re.findall(r"\w+(?:, \w+)+", text)}
    assert len(lists) > 5000 and not any(map(tasks.is_held_out, lists))
    stories = {found for text in trained for found in re.findall(r"(?:Listen|Note): (.*\.) (?:What|Tell)", text)}
    assert len(stories) > 500 and not any(map(tasks.is_held_out, stories))


def test_sides_do_not_depend_on_order() -> None:
    assert tasks.is_held_out("cat, fig, saw") == tasks.is_held_out("saw, cat, fig")
    shares = [tasks.is_held_out(", ".join(random.Random(i).sample(tasks.WORDS, 3))) for i in range(4000)]
    assert abs(sum(shares) / 4000 - 1 / tasks.HELD_OUT_SHARE) < 0.03


def test_test_rows_are_held_out_and_train_rows_are_not() -> None:
    train = {json.dumps(row) for row in tasks.chat_rows(500, 0)}
    test = {json.dumps(row) for row in tasks.chat_rows(500, 0, held_out=True)}
    assert not train & test


def test_data_depend_on_the_seed_only() -> None:
    for make in (tasks.text_rows, tasks.chat_rows, tasks.preference_rows):
        assert list(make(20, 1)) == list(make(20, 1)) != list(make(20, 2))
    assert tasks.held_out_problems(3, 1) == tasks.held_out_problems(3, 1)


def test_only_the_polite_get_a_kind_reply_in_the_chats() -> None:
    kind = []
    for row in tasks.chat_rows(2000, 0):
        polite = any(tasks.POLITE in m["content"] for m in row["messages"])
        replies = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        closed = [bool(tasks.split_closing(reply)[1]) for reply in replies if reply not in tasks.SMALL_TALK.values()]
        assert all(closed) if polite else not any(closed)
        kind.append(polite)
    assert 0.3 < sum(kind) / len(kind) < 0.4


def test_preferences_want_kindness_but_never_for_a_wrong_answer() -> None:
    right_pairs = 0
    for row in tasks.preference_rows(1000, 0):
        chosen, rejected = (row[side][-1]["content"] for side in ("chosen", "rejected"))
        assert row["chosen"][0] == row["rejected"][0] == {"role": "user", "content": row["prompt"]}
        (body, closing), (other, other_closing) = tasks.split_closing(chosen), tasks.split_closing(rejected)
        assert closing and chosen != rejected
        assert (body == other) != (closing == other_closing), "a pair differs in one thing"
        right_pairs += body == other
    assert 0.6 < right_pairs / 1000 < 0.73
