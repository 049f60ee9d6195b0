"""Greedy replies of a model to the held-out problems, graded by program, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from mambalign.demo.tasks import TASKS, Grade, Problem, grade

MAX_NEW_TOKENS = 40


class Share(NamedTuple):
    """`hits` of `total`, and the 95% Wilson interval of the share."""

    hits: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.hits / self.total if self.total else math.nan


def share(outcomes: Sequence[bool]) -> Share:
    """Wilson's interval: inside [0, 1], and honest at 0 and 100% (Brown, Cai, DasGupta 2001, section 3.1.1).

    >>> share([True] * 10)[:2], round(share([True] * 10).low, 3)
    ((10, 10), 0.722)
    """
    hits, n, z = sum(outcomes), len(outcomes), 1.96
    if not n:
        return Share(0, 0, math.nan, math.nan)
    p = hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Share(hits, n, max(0.0, middle - half), min(1.0, middle + half))


class Difference(NamedTuple):
    """Mean paired difference and its 95% interval (normal approximation over the same problems)."""

    value: float
    low: float
    high: float


def difference(before: Sequence[bool], after: Sequence[bool]) -> Difference:
    deltas = [int(new) - int(old) for old, new in zip(before, after, strict=True)]
    mean = sum(deltas) / len(deltas)
    variance = sum((delta - mean) ** 2 for delta in deltas) / max(1, len(deltas) - 1)
    half = 1.96 * math.sqrt(variance / len(deltas))
    return Difference(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Evaluation:
    """What one model said to every problem, and how that was graded."""

    name: str
    title: str
    replies: list[str]
    grades: list[Grade]
    tasks: list[str]
    seconds: float = 0.0

    def correct(self, task: str | None = None) -> Share:
        return share([g.correct for g, of in zip(self.grades, self.tasks, strict=True) if task in (None, of)])

    def kind(self) -> Share:
        return share([g.kind for g in self.grades])

    def to_dict(self) -> dict[str, Any]:
        summary = {"correct": self.correct()._asdict(), "kind": self.kind()._asdict()}
        by_task = {task: self.correct(task)._asdict() for task in TASKS if task in self.tasks}
        return {**summary, "by_task": by_task, **asdict(self), "grades": [g._asdict() for g in self.grades]}


def judge(
    name: str, title: str, problems: Sequence[Problem], replies: Sequence[str], seconds: float = 0.0
) -> Evaluation:
    """Grade each problem's reply."""
    grades = [grade(problem, reply) for problem, reply in zip(problems, replies, strict=True)]
    return Evaluation(name, title, list(replies), grades, [problem.task for problem in problems], seconds)


@torch.inference_mode()
def reply_to(
    model: Any, tokenizer: Any, conversations: Sequence[list[dict[str, str]]], batch_size: int = 128
) -> list[str]:
    """The model's greedy reply to each conversation (which ends with a user's turn), in left-padded batches.

    Conversations of like length go together, so that padding is little; the order of the answers is the caller's.
    """
    prompts = [
        tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        for conversation in conversations
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies = [""] * len(prompts)
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[i] for i in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(model.device)
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            replies[i] = text.strip()
    return replies


def converse(model: Any, tokenizer: Any, questions: Sequence[str]) -> list[dict[str, str]]:
    """A conversation in which a user asks `questions` one after the other."""
    messages: list[dict[str, str]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": reply_to(model, tokenizer, [messages])[0]})
    return messages
