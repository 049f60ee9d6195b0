"""Small evaluations in the benchmarks' formats, of held-out topics: questions, references and judge prompts of our own.

Neither is MT-Bench or AlpacaEval, only their files and their code. The demo's judge is a program that knows the right
answers, called in this process instead of over HTTP.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mambalign.demo import tasks
from mambalign.demo.evaluate import MAX_NEW_TOKENS
from mambalign.demo.tasks import Grade, Problem, grade
from mambalign.evals import judging, mt_bench_scores, report
from mambalign.evals.answers import EngineModel, answer_mt_bench
from mambalign.evals.mt_bench import load_questions
from mambalign.evals.rule_judge import RuleEndpoint
from mambalign.generation.engine import Engine
from mambalign.generation.journal import model_fingerprint

JUDGE = "demo-program-not-a-language-model"
RATINGS = {(True, True): 10, (True, False): 8, (False, True): 3, (False, False): 1}  # (right, kind)
PER_CATEGORY = 5
Conversation = tuple[str, Problem, Problem]
_SYSTEM = "Rate the last answer."
_ONE_TURN = "[Question]\n{question}\n\n[The Start of Assistant's Answer]\n{answer}\n[The End of Assistant's Answer]"
_TWO_TURNS = (
    "<|The Start of Assistant A's Conversation with User|>\n\n### User:\n{question_1}\n\n### Assistant A:\n{answer_1}"
    "\n\n### User:\n{question_2}\n\n### Assistant A:\n{answer_2}\n\n<|The End of Assistant A's Conversation with User|>"
)
# Read from the front and with the shortest first answer, so that an answer that imitates what follows it is part of the
# answer, and wrong.
_READ_ONE = re.compile(r"\[Question\]\n(.*?)\n\n\[The Start of.*?\]\n(.*)\n\[The End of .*", re.DOTALL)
_READ_TWO = re.compile(
    r"<\|The Start of.*?### User:\n(.*?)\n\n### Assistant A:\n.*?\n\n### User:\n(.*?)\n\n### Assistant A:\n(.*)"
    r"\n\n<\|The End of .*",
    re.DOTALL,
)
_RANKING = """<|im_start|>system
You compare two answers to one instruction.
<|im_end|>
<|im_start|>user
Please rank the models by the quality of their answers, as a list of {"model": name, "rank": number}.
    "instruction": \"\"\"{instruction}\"\"\"
    "model": "model_1", "answer": \"\"\"{output_1}\"\"\"
    "model": "model_2", "answer": \"\"\"{output_2}\"\"\"
<|im_end|>
"""


def write_mt_bench(folder: Path, conversations: Iterable[Conversation]) -> None:
    """Questions and judge prompts in MT-Bench's format into the data folder `folder`. Answers to them are greedy."""
    questions = [
        {"question_id": number, "category": category, "turns": [first.prompt, then.prompt], "required_temperature": 0.0}
        for number, (category, first, then) in enumerate(conversations, 1)
    ]
    names = {"single-v1": _ONE_TURN, "single-v1-multi-turn": _TWO_TURNS}
    about = {"type": "single", "system_prompt": _SYSTEM, "output_format": "[[rating]]"}
    prompts = [{"name": name, "prompt_template": template, **about} for name, template in names.items()]
    _write_lines(folder / "mt_bench" / "question.jsonl", questions)
    _write_lines(folder / "mt_bench" / "judge_prompts.jsonl", prompts)


def write_alpaca(folder: Path, problems: Iterable[Problem]) -> None:
    """Reference outputs (the right answers) and a ranking prompt in AlpacaEval's format into the data folder."""
    rows = [
        {"dataset": one.task, "instruction": one.prompt, "output": one.answer, "generator": "right-answers"}
        for one in problems
    ]
    place = folder / "alpaca_eval"
    prompt = place / "evaluators" / "alpaca_eval_gpt4" / "alpaca_eval.txt"
    prompt.parent.mkdir(parents=True, exist_ok=True)
    prompt.write_text(_RANKING, encoding="utf-8")
    for name in ("alpaca_eval.json", "alpaca_eval_gpt4_baseline.json"):
        (place / name).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def grader(conversations: Iterable[Conversation]) -> Callable[[str, bool], tuple[str, None]]:
    """The demo's judge: it knows the right answers and reads a judge's prompt as `write_mt_bench` wrote it."""
    expected: dict[tuple[str, ...], Problem] = {}
    for _, first, then in conversations:
        expected |= {(first.prompt,): first, (first.prompt, then.prompt): then}

    def rule(prompt: str, logprobs: bool) -> tuple[str, None]:
        shown = prompt.removeprefix(f"{_SYSTEM}\n")
        read = _READ_ONE.fullmatch(shown) or _READ_TWO.fullmatch(shown)
        if read is None:
            return "This is no answer to rate.", None
        *asked, answer = read.groups()
        problem = expected.get(tuple(asked))  # none: an answer imitates a question
        graded = grade(problem, answer) if problem else Grade(correct=False, kind=False)
        words = f"{'right' if graded.correct else 'wrong'}, {'with' if graded.kind else 'without'} a kind closing"
        return f"By program, not by a language model: {words}. Rating: [[{RATINGS[graded]}]]", None

    return rule


def run_mt_bench(folder: Path, models: dict[str, tuple[str, Any, Any]], seed: int) -> dict[str, Any]:
    """Have the models answer and the program judge; returns the scores. All files, and report.html, are in `folder`.

    models: name -> (path of its folder, the model, its tokenizer). What an earlier call left is made anew.
    """
    shutil.rmtree(folder, ignore_errors=True)
    conversations = tasks.held_out_conversations(PER_CATEGORY, seed)
    write_mt_bench(folder / "data", conversations)
    questions = load_questions(folder / "data" / "mt_bench" / "question.jsonl")
    answers = []
    for name, (path, model, tokenizer) in models.items():
        answers.append(folder / "model_answer" / f"{name}.jsonl")
        who = EngineModel(name, Engine(model, tokenizer), {"model": model_fingerprint(path)})
        answer_mt_bench(questions, who, answers[-1], max_new_tokens=MAX_NEW_TOKENS)
    matches = judging.mt_bench_matches(answers, "single", data_dir=folder / "data")
    asking = judging.Asking(
        RuleEndpoint(model=JUDGE, rule=grader(conversations)), folder / "model_judgment" / "replies"
    )
    judged = judging.judge_mt_bench(matches, asking, folder / "model_judgment")
    verdicts = mt_bench_scores.load_judgments(judged.file)
    answered = dict(report.load_answered(path) for path in answers)
    page = report.mt_bench_page(verdicts, questions, answered, [report.load_about(judged.file)])
    judging.write_whole(folder / "report.html", page.html())
    by_model = {result["model"]: result for result in mt_bench_scores.summarize(verdicts, questions)}
    return {"judge": JUDGE, "questions": len(questions), "scores": {name: by_model[name] for name in models}}
