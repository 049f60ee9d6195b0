"""MT-Bench (arXiv 2306.05685): questions, answers, judge prompts and verdicts, as FastChat's `llm_judge` has them.

Files written here are read by FastChat and the reverse. Scores of whole files are in `mt_bench_scores`.
"""

from __future__ import annotations

import json
import math
import re
import string
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mambalign.data.json_rows import json_rows
from mambalign.recipe import UserError

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
DEFAULT_TEMPERATURE = 0.7
NEED_REFERENCE = ("math", "reasoning", "coding")
UNPARSED = -1
ERROR_ANSWER = "ERROR"  # what FastChat writes where generation failed, and then has judged
JUDGE_PARAMETERS = {"temperature": 0, "max_tokens": 2048, "n": 1}
TIE_DELTA = 0.1
_FIELDS = {
    "question", "question_1", "question_2", "answer", "answer_1", "answer_2", "answer_a", "answer_b",
    "answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2", "ref_answer_1", "ref_answer_2",
}  # fmt: skip
Message = dict[str, str]


@dataclass(frozen=True)
class Question:
    """turns: the two user messages. required_temperature: overrides the category's."""

    question_id: int
    category: str
    turns: tuple[str, str]
    required_temperature: float | None = None

    @property
    def needs_reference(self) -> bool:
        return self.category in NEED_REFERENCE

    def temperature(self, force: float | None = None) -> float:
        """What answers to it are sampled at. `force` (FastChat's --force-temperature) excludes a required one.

        Raises:
            UserError: both are given.
        """
        if force is not None:
            if self.required_temperature is not None:
                raise UserError(
                    f"question {self.question_id} has required_temperature {self.required_temperature}, so a forced "
                    f"temperature of {force} would be another benchmark; leave --force-temperature out"
                )
            return force
        if self.required_temperature is not None:
            return self.required_temperature
        return TEMPERATURES.get(self.category, DEFAULT_TEMPERATURE)


@dataclass(frozen=True)
class Answer:
    """A model's answers to the turns of one question (FastChat's first choice). `row` is the whole row of the file."""

    question_id: int
    model: str
    turns: tuple[str, ...]
    row: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class JudgePrompt:
    """One line of judge_prompts.jsonl. kind: "single" or "pairwise"."""

    name: str
    kind: str
    system_prompt: str
    prompt_template: str
    output_format: str

    @property
    def turn(self) -> int:
        return 2 if self.name.endswith("multi-turn") else 1


# Reading ------------------------------------------------------------------------------------------------------------


def load_questions(path: Path) -> list[Question]:
    """Questions in the file's order; any categories and any number.

    Raises:
        UserError: naming file, line and key: not two turns, an id twice, a key missing or of the wrong type.
    """
    questions: dict[int, Question] = {}
    for line, row in json_rows(path):
        where = f"{path}:{line}"
        number = _question_id(row, where)
        if number in questions:
            raise UserError(f"{where}: question_id {number} is there twice; ids must be unique")
        turns = row.get("turns")
        if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, str) for turn in turns):
            raise UserError(f"{where}: turns of question {number} must be a list of exactly two texts")
        temperature = row.get("required_temperature")
        if temperature is not None and (isinstance(temperature, bool) or not isinstance(temperature, int | float)):
            raise UserError(f"{where}: required_temperature {temperature!r} must be a number")
        questions[number] = Question(number, _text(row, "category", where), (turns[0], turns[1]), temperature)
    if not questions:
        raise UserError(f"{path}: there are no questions")
    return list(questions.values())


def load_answers(path: Path) -> dict[int, Answer]:
    """question_id -> answer, of an answer file or of reference answers; of several to a question the last counts.

    Raises:
        UserError: naming file, line and key of what is no answer.
    """
    answers = {}
    for line, row in json_rows(path):
        where = f"{path}:{line}"
        choices = row.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        turns = first.get("turns") if isinstance(first, dict) else None
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise UserError(f'{where}: choices must be a list that begins with {{"index": 0, "turns": [text, text]}}')
        number = _question_id(row, where)
        answers[number] = Answer(number, str(row.get("model_id", path.name.split(".")[0])), tuple(turns), row)
    if not answers:
        raise UserError(f"{path}: there are no answers")
    return answers


def load_judge_prompts(path: Path) -> dict[str, JudgePrompt]:
    """name -> prompt. Raises UserError naming file, line and key of what is no judge prompt."""
    prompts: dict[str, JudgePrompt] = {}
    for line, row in json_rows(path):
        where = f"{path}:{line}"
        name = _text(row, "name", where)
        if name in prompts:
            raise UserError(f"{where}: name {name!r} is there twice")
        keys = ("type", "system_prompt", "prompt_template", "output_format")
        prompt = JudgePrompt(name, *(_text(row, key, where) for key in keys))
        try:
            fields = {name for _, name, _, _ in string.Formatter().parse(prompt.prompt_template) if name is not None}
        except ValueError as error:
            raise UserError(f"{where}: prompt_template is no format string: {error}") from error
        if fields - _FIELDS:
            raise UserError(f"{where}: prompt_template asks for {sorted(fields - _FIELDS)[0]!r}, which nothing fills")
        prompts[name] = prompt
    return prompts


def _question_id(row: Mapping[str, Any], where: str) -> int:
    number = row.get("question_id")
    if isinstance(number, str) and number.strip().isdecimal():
        number = int(number)
    if type(number) is not int:
        raise UserError(f"{where}: question_id must be a whole number, this is {json.dumps(number)}")
    return number


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} must be text, this is {json.dumps(value)[:60]}")
    return value


# Answers ------------------------------------------------------------------------------------------------------------


def answer_row(question_id: int, model: str, choices: Sequence[Sequence[str]], **more: Any) -> dict[str, Any]:
    """A row of `model_answer/<model>.jsonl`; `choices` are lists of turns, `more` follows FastChat's keys."""
    return {
        "question_id": question_id,
        "answer_id": uuid.uuid4().hex,
        "model_id": model,
        "choices": [{"index": index, "turns": list(turns)} for index, turns in enumerate(choices)],
        "tstamp": time.time(),
        **more,
    }


def sorted_answers(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """FastChat's `reorg_answer_file`: of several rows to a question the last, sorted by id."""
    last = {int(row["question_id"]): row for row in rows}
    return [last[number] for number in sorted(last)]


def fastchat_text(output: str, special_tokens: Iterable[str], stop: str | None = None) -> str:
    """FastChat's post-processing of decoded text: cut at the stop string unless it comes first of all (`find > 0`),
    every special token's text taken out, stripped."""
    if stop and output.find(stop) > 0:
        output = output[: output.find(stop)]
    for token in special_tokens:
        output = output.replace(token, "")
    return output.strip()


# Matches ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """One thing to be judged: an answer (`models` has one name) or two against each other (two names).

    `games` are the prompts to send, one for a single answer; for a pair two, of which the second shows the answers in
    reverse order.
    """

    question: Question
    prompt: JudgePrompt
    models: tuple[str, ...]
    answers: tuple[Answer, ...]
    reference: Answer | None = None

    @property
    def turn(self) -> int:
        return self.prompt.turn

    @property
    def user_prompts(self) -> tuple[str, ...]:
        """What the judge is shown, `str.format` of the template: braces in answers are text."""
        orders = [self.answers] if len(self.answers) == 1 else [self.answers, self.answers[::-1]]
        return tuple(self.prompt.prompt_template.format(**self._values(order)) for order in orders)

    @property
    def games(self) -> tuple[list[Message], ...]:
        system = {"role": "system", "content": self.prompt.system_prompt}
        return tuple([system, {"role": "user", "content": user}] for user in self.user_prompts)

    def _values(self, answers: tuple[Answer, ...]) -> dict[str, str]:
        values = {}
        if self.reference is not None:
            values = {f"ref_answer_{i}": turn for i, turn in enumerate(self.reference.turns, start=1)}
        names = ("answer",) if len(answers) == 1 else ("answer_a", "answer_b")
        if self.turn == 1:
            values |= {"question": self.question.turns[0]}
            return values | {name: answer.turns[0] for name, answer in zip(names, answers, strict=True)}
        for i in (0, 1):
            values[f"question_{i + 1}"] = self.question.turns[i]
            values |= {f"{name}_{i + 1}": answer.turns[i] for name, answer in zip(names, answers, strict=True)}
        return values

    def row(self, judge: str, judgments: Sequence[str], tstamp: float | None = None, **more: Any) -> dict[str, Any]:
        """The judgment file's row for the judge's replies, one a game; `more` follows FastChat's keys."""
        stamp = time.time() if tstamp is None else tstamp
        identity = {"judge": [judge, self.prompt.name]}
        if len(self.models) == 1:
            (user_prompt,), (judgment,) = self.user_prompts, judgments
            verdict = {"user_prompt": user_prompt, "judgment": judgment, "score": parse_rating(judgment)}
            model = {"question_id": self.question.question_id, "model": self.models[0]}
            return model | identity | verdict | {"turn": self.turn, "tstamp": stamp} | more
        winners = pair_winners(*(parse_verdict(text, self.prompt.output_format) for text in judgments))
        row: dict[str, Any] = {
            "question_id": self.question.question_id,
            "model_1": self.models[0],
            "model_2": self.models[1],
            "g1_winner": winners[0],
            "g2_winner": winners[1],
        } | identity
        for game, user_prompt, judgment in zip(("g1", "g2"), self.user_prompts, judgments, strict=True):
            row |= {f"{game}_user_prompt": user_prompt, f"{game}_judgment": judgment}
        return row | {"turn": self.turn, "tstamp": stamp} | more


def prompt_name(kind: str, question: Question, turn: int) -> str:
    """Which of FastChat's eight prompts judges `turn` of a question: with a reference for math, reasoning, coding.

    >>> prompt_name("single", Question(1, "math", ("", "")), 2)
    'single-math-v1-multi-turn'
    >>> prompt_name("pairwise", Question(1, "stem", ("", "")), 1)
    'pair-v2'
    """
    family = "single" if kind == "single" else "pair"
    plain = "single-v1" if kind == "single" else "pair-v2"
    return (f"{family}-math-v1" if question.needs_reference else plain) + ("-multi-turn" if turn == 2 else "")


def single_matches(
    questions: Sequence[Question],
    answers: Mapping[str, Mapping[int, Answer]],
    prompts: Mapping[str, JudgePrompt],
    references: Mapping[int, Answer],
) -> list[Match]:
    """Every model's answer to every turn, in FastChat's order. `answers`: model -> question_id -> answer.

    Raises:
        UserError: an answer, a prompt or the reference answer of a question that needs one is missing.
    """
    return _matches("single", questions, [(model,) for model in answers], answers, prompts, references)


def pair_matches(
    questions: Sequence[Question],
    answers: Mapping[str, Mapping[int, Answer]],
    prompts: Mapping[str, JudgePrompt],
    references: Mapping[int, Answer],
    baseline: str | None = None,
) -> list[Match]:
    """Every other model against `baseline` (pairwise-baseline), or each against each (None: pairwise-all).

    Raises:
        UserError: as `single_matches`; no two models to compare.
    """
    models = list(answers)
    if baseline is not None and baseline not in answers:
        raise UserError(f"there are no answers of the baseline {baseline!r}; there are those of {', '.join(models)}")
    if baseline is not None:
        pairs = [(model, baseline) for model in models if model != baseline]
    else:
        pairs = [(first, second) for i, first in enumerate(models) for second in models[i + 1 :]]
    if not pairs:
        raise UserError("a comparison needs the answers of two models at least")
    return _matches("pairwise", questions, pairs, answers, prompts, references)


def _matches(
    kind: str,
    questions: Sequence[Question],
    line_ups: Sequence[tuple[str, ...]],
    answers: Mapping[str, Mapping[int, Answer]],
    prompts: Mapping[str, JudgePrompt],
    references: Mapping[int, Answer],
) -> list[Match]:
    matches = []
    for turn in (1, 2):
        for with_reference in (False, True):
            for question in questions:
                if question.needs_reference is not with_reference:
                    continue
                name = prompt_name(kind, question, turn)
                if name not in prompts:
                    raise UserError(f"the judge prompts lack {name!r}; they have {', '.join(prompts)}")
                reference = _reference(question, references) if with_reference else None
                for models in line_ups:
                    given = tuple(_answer(question, model, answers[model]) for model in models)
                    matches.append(Match(question, prompts[name], models, given, reference))
    return matches


def _answer(question: Question, model: str, answers: Mapping[int, Answer]) -> Answer:
    answer = answers.get(question.question_id)
    if answer is None or len(answer.turns) < 2:
        raise UserError(
            f"{model} has no answer to both turns of question {question.question_id}; "
            "run `mambalign eval mt-bench answer` again to complete them"
        )
    return answer


def _reference(question: Question, references: Mapping[int, Answer]) -> Answer:
    reference = references.get(question.question_id)
    if reference is None or len(reference.turns) < 2:
        raise UserError(
            f"question {question.question_id} ({question.category}) needs a reference answer and there is none; "
            "give a file that has it with --references"
        )
    return reference


# Verdicts -----------------------------------------------------------------------------------------------------------

_NUMBER = r"(\d+\.?\d*)"
_RATING = (re.compile(rf"\[\[{_NUMBER}\]\]"), re.compile(rf"\[{_NUMBER}\]"))
_RATINGS = (re.compile(rf"\[\[{_NUMBER},\s?{_NUMBER}\]\]"), re.compile(rf"\[{_NUMBER},\s?{_NUMBER}\]"))


def parse_rating(judgment: str | None) -> int | float:
    """The first `[[number]]`, else the first `[number]`, else -1. No check of the range, as in FastChat.

    >>> parse_rating("[1] is good. Rating: [[8.5]]"), parse_rating("Rating: [7]"), parse_rating("Rating: 7")
    (8.5, 7, -1)
    """
    for pattern in _RATING:
        if match := pattern.search(judgment or ""):
            return _number(match.group(1))
    return UNPARSED


def parse_verdict(judgment: str | None, output_format: str = "[[A]]") -> str:
    """ "A", "B", "tie" or "error". `[[A]]` anywhere goes before `[[B]]` before `[[C]]`; under
    `[[rating_a,rating_b]]` ratings within 0.1 of each other tie. Raises UserError for another format."""
    judgment = judgment or ""
    if output_format == "[[A]]":
        verdicts = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}
        return next((verdict for mark, verdict in verdicts.items() if mark in judgment), "error")
    if output_format != "[[rating_a,rating_b]]":
        raise UserError(f"output_format {output_format!r} of a pairwise judge prompt is not known")
    for pattern in _RATINGS:
        if match := pattern.search(judgment):
            first, second = map(_number, match.groups())
            return "tie" if abs(first - second) <= TIE_DELTA else "A" if first > second else "B"
    return "error"


def pair_winners(first_game: str, second_game: str) -> tuple[str, str]:
    """The verdicts of both games as "model_1", "model_2", "tie" or "error"; the second showed the models swapped."""
    first = {"A": "model_1", "B": "model_2"}
    second = {"A": "model_2", "B": "model_1"}
    return first.get(first_game, first_game), second.get(second_game, second_game)


def _number(text: str) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        return UNPARSED
    return value if "." in text else int(text)
