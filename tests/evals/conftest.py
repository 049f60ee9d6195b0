"""A small benchmark of our own: two questions, answers, judge prompts in the published files' formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mambalign.evals.mt_bench import JudgePrompt, Question

REFERENCED = "{ref_answer_1}|"
TEMPLATES = {
    "single-v1": "Q {question} A {answer}",
    "single-math-v1": f"{REFERENCED}Q {{question}} A {{answer}}",
    "single-v1-multi-turn": "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
    "single-math-v1-multi-turn": f"{REFERENCED}{{ref_answer_2}}|{{question_1}} {{answer_1}} "
    "{question_2} {answer_2}",
    "pair-v2": "Q {question} A {answer_a} B {answer_b}",
    "pair-math-v1": f"{REFERENCED}Q {{question}} A {{answer_a}} B {{answer_b}}",
    "pair-v2-multi-turn": "{question_1} {question_2} A {answer_a_1} {answer_a_2} B {answer_b_1} {answer_b_2}",
    "pair-math-v1-multi-turn": f"{REFERENCED}{{question_2}} A {{answer_a_1}} {{answer_a_2}} "
    "B {answer_b_1} {answer_b_2}",
}


@pytest.fixture
def prompts() -> dict[str, JudgePrompt]:
    return {
        name: JudgePrompt(
            name,
            "single" if name.startswith("single") else "pairwise",
            "Judge.",
            template,
            "[[rating]]" if name.startswith("single") else "[[A]]",
        )
        for name, template in TEMPLATES.items()
    }


@pytest.fixture
def questions() -> list[Question]:
    return [
        Question(7, "poetry", ("write {x}", "again")),
        Question(3, "math", ("1+1?", "2+2?")),
        Question(5, "writing", ("a", "b"), required_temperature=0.3),
    ]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Rows into a JSON-lines file of this name."""

    def to(name: str, *rows: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return to
