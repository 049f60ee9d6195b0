"""The first step of a benchmark: a model answers, here through the generation engine or behind an endpoint.

The chat template is the model's own. Answers are in FastChat's and alpaca_eval's files; what the model was given, as it
was rendered, is beside them in `rendered/`, row by row from the first answer on, and that is what a killed command goes
on with. A failed call is no answer: it stays missing, and the command says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mambalign.data.chat import check_template, common_prefix, encode_rendered, render
from mambalign.evals.alpaca_eval import Output
from mambalign.evals.mt_bench import ERROR_ANSWER, Question, answer_row, fastchat_text, sorted_answers
from mambalign.generation.journal import Journal, progress
from mambalign.generation.requests import Request, Sampling
from mambalign.recipe import UserError
from mambalign.support import encodable, write_text

Message = dict[str, str]


@dataclass(frozen=True)
class Ask:
    """A conversation that is to be answered. state: the engine's, behind the last turn."""

    messages: list[Message]
    sampling: Sampling
    state: Any = None


@dataclass(frozen=True)
class Said:
    """An answer, or the `error` why there is none. prompt: what the model was given, None behind an endpoint."""

    text: str = ""
    prompt: str | None = None
    prompt_tokens: int | None = None
    finish_reason: str | None = None
    state: Any = None
    error: str | None = None


Done = Callable[[int, Said], Ask | None]


class Model(Protocol):
    """Who answers. identity: all of it that decides the answers; a resumed command compares it."""

    name: str

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def run(self, asks: Mapping[int, Ask], done: Done) -> None:
        """Answer all, in any order; `done(key, said)` may return what is asked next under the same key."""


@dataclass
class EngineModel:
    """A model here. engine: a `generation.engine.Engine`. Raises UserError where its tokenizer has no chat template."""

    name: str
    engine: Any
    identity: Mapping[str, Any]
    special_tokens: list[str] = field(init=False)

    def __post_init__(self) -> None:
        check_template(self.engine.tokenizer)
        self.special_tokens = list(self.engine.tokenizer.all_special_tokens)

    def run(self, asks: Mapping[int, Ask], done: Done) -> None:
        for key, ask in asks.items():
            self._start(key, ask, done)
        while self.engine.step():
            pass

    def _start(self, key: int, ask: Ask, done: Done) -> None:
        rendered = render(self.engine.tokenizer, ask.messages, add_generation_prompt=True)
        ids = tuple(encode_rendered(self.engine.tokenizer, [rendered])[0].ids)
        read = len(ask.state.tokens) if ask.state is not None else 0
        if not (read and read < len(ids) and common_prefix(ids, ask.state.tokens) == read):
            read = 0  # the template, or the tokenizer, writes the past another way: it is read again
        pieces: list[str] = []

        def sink(delta: Any) -> None:
            pieces.append(delta.text)
            if delta.finish_reason is None:
                return
            text = fastchat_text("".join(pieces), self.special_tokens)
            said = Said(text, rendered.text, len(ids), delta.finish_reason, delta.state)
            following = done(key, said)
            if following is not None:
                self._start(key, following, done)

        self.engine.add(Request(ids[read:], ask.sampling, ask.state if read else None, keep_state=True), sink)


@dataclass
class EndpointModel:
    """A model behind an OpenAI-compatible server, which applies the chat template. Up to `parallel` calls at once.
    asked_for: its name there, where that is another than in the results."""

    name: str
    base_url: str
    api_key: str = "none"
    parallel: int = 8
    timeout: float = 600.0
    max_retries: int = 6
    asked_for: str | None = None

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"model": self.asked_for or self.name, "base_url": self.base_url}

    def run(self, asks: Mapping[int, Ask], done: Done) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError('a model behind an endpoint needs the client: pip install "mambalign[eval]"') from error
        client = openai.OpenAI(
            base_url=self.base_url, api_key=self.api_key, timeout=self.timeout, max_retries=self.max_retries
        )

        def call(ask: Ask) -> Said:
            sampling = ask.sampling
            try:
                answer = client.chat.completions.create(
                    model=self.asked_for or self.name,
                    messages=ask.messages,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_new_tokens,
                    seed=sampling.seed,
                )
            except openai.OpenAIError as error:
                return Said(error=" ".join(str(error).split())[:300])
            except ValueError as error:
                return Said(error=f"the reply is no JSON: {error}"[:300])
            return _said(answer)

        with client, ThreadPoolExecutor(self.parallel) as pool:
            running: dict[Future[Said], int] = {pool.submit(call, ask): key for key, ask in asks.items()}
            try:
                while running:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        key = running.pop(future)
                        following = done(key, future.result())
                        if following is not None:
                            running[pool.submit(call, following)] = key
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _said(answer: Any) -> Said:
    """What the client made of a reply, which it checks in nothing: a page of HTML is a text, wrong types are kept."""
    choices = getattr(answer, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    text = getattr(message, "content", None)
    if not isinstance(text, str):
        return Said(error="the reply has no content" if message else f"no chat completion: {str(answer)[:80]!r}")
    tokens = getattr(getattr(answer, "usage", None), "prompt_tokens", None)
    text = encodable(text).strip()  # it is asked again, and written
    return Said(text, None, tokens if isinstance(tokens, int) else None, getattr(choice, "finish_reason", None))


def answer_mt_bench(
    questions: Sequence[Question],
    model: Model,
    out: Path,
    *,
    choices: int = 1,
    max_new_tokens: int = 1024,
    force_temperature: float | None = None,
    trained_length: int | None = None,
    parity: bool = False,
) -> dict[str, Any]:
    """Answer both turns of every question into `out` (`model_answer/<model>.jsonl`); returns counts.

    Choice i is sampled with seed i, at the category's temperature; the second turn's prompt has the model's own first
    answer, whose state is continued. trained_length: prompts of more tokens are counted, and marked in their rows.
    parity: a failed call is the answer "ERROR", as FastChat has it. Killed, the same call goes on.

    Raises:
        UserError: `out` is of something else, or some questions could not be answered.
    """
    samplings = {
        (question.question_id, i): Sampling(
            max_new_tokens=max_new_tokens, temperature=question.temperature(force_temperature), seed=i
        )
        for question in questions
        for i in range(choices)
    }
    by_id = {question.question_id: question for question in questions}
    settings = {"choices": choices, "max_new_tokens": max_new_tokens, "force_temperature": force_temperature}
    content = [asdict(question) for question in questions]
    journal = Journal(rendered_file(out), {"model": dict(model.identity), **settings, "questions": _digest(content)})
    if journal.finished is not None and out.is_file():
        return journal.finished | {"finished_before": True}

    with _opened(journal) as rows:
        held: dict[tuple[int, int], dict[str, Any]] = {(row["question_id"], row["index"]): row for row in rows}
        left = [key for key in samplings if key not in held]
        first: dict[int, Said] = {}
        errors: list[str] = []
        with progress(len(samplings), len(held), f"{model.name} answers MT-Bench") as bar:

            def done(place: int, said: Said) -> Ask | None:
                number, index = left[place]
                question, sampling = by_id[number], samplings[left[place]]
                if said.error is not None:
                    errors.append(f"question {number}: {said.error}")
                    if not parity:
                        return None
                    said = Said(ERROR_ANSWER, error=said.error)
                if place not in first:
                    first[place] = said
                    turns = [question.turns[0], said.text, question.turns[1]]
                    roles = ("user", "assistant", "user")
                    messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
                    return Ask(messages, sampling, said.state)
                row = _mt_bench_row(number, index, (first.pop(place), said), sampling, trained_length)
                journal.write([row])
                held[number, index] = row
                bar.update(1)
                return None

            asks = {i: Ask([{"role": "user", "content": by_id[key[0]].turns[0]}], samplings[key])
                    for i, key in enumerate(left)}  # fmt: skip
            model.run(asks, done)
        _complete(len(samplings) - len(held), len(samplings), errors)
        answers = [
            answer_row(number, model.name, [held[number, i]["turns"] for i in range(choices)]) for number in by_id
        ]
        _write(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sorted_answers(answers)))
        summary = {
            "questions": len(by_id),
            "cut_off_at_max_new_tokens": sum(row["finish_reasons"].count("length") for row in held.values()),
            "prompts_beyond_trained_length": sum(sum(row["beyond_trained_length"]) for row in held.values()),
            "empty_answers": sum(not text for row in held.values() for text in row["turns"]),
            "failed_calls": len(errors),
        }
        journal.finish(summary)
    return summary


def _mt_bench_row(
    number: int, index: int, said: tuple[Said, Said], sampling: Sampling, trained_length: int | None
) -> dict[str, Any]:
    tokens = [each.prompt_tokens for each in said]
    return {
        "question_id": number,
        "index": index,
        "turns": [each.text for each in said],
        "prompts": [each.prompt for each in said],
        "prompt_tokens": tokens,
        "finish_reasons": [each.finish_reason for each in said],
        "beyond_trained_length": [bool(trained_length and n and n > trained_length) for n in tokens],
        "temperature": sampling.temperature,
        "seed": sampling.seed,
    }


def answer_alpaca(
    instructions: Sequence[Output],
    model: Model,
    out: Path,
    *,
    max_new_tokens: int = 2048,
    temperature: float = 0.7,
    top_p: float = 1.0,
    seed: int = 0,
    trained_length: int | None = None,
) -> dict[str, Any]:
    """Answer every instruction into `out` (model_outputs.json, in the instructions' order); returns counts.

    The defaults are those of the Zephyr paper's configuration. `instructions` are any outputs to them, such as the
    reference's. Killed, the same call goes on.

    Raises:
        UserError: `out` is of something else, or some instructions could not be answered.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    content = [each.instruction for each in instructions]
    made_from = {"model": dict(model.identity), "sampling": asdict(sampling), "instructions": _digest(content)}
    journal = Journal(rendered_file(out), made_from)
    if journal.finished is not None and out.is_file():
        return journal.finished | {"finished_before": True}

    with _opened(journal) as rows:
        held: dict[str, dict[str, Any]] = {row["instruction"]: row for row in rows}
        errors: list[str] = []
        with progress(len(instructions), len(held), f"{model.name} answers AlpacaEval") as bar:

            def done(place: int, said: Said) -> None:
                if said.error is not None:
                    errors.append(f"{instructions[place].instruction[:60]!r}: {said.error}")
                    return
                tokens = said.prompt_tokens
                row = {
                    "instruction": instructions[place].instruction,
                    "output": said.text,
                    "prompt": said.prompt,
                    "prompt_tokens": tokens,
                    "finish_reason": said.finish_reason,
                    "beyond_trained_length": bool(trained_length and tokens and tokens > trained_length),
                }
                journal.write([row])
                held[instructions[place].instruction] = row
                bar.update(1)

            left = [i for i, each in enumerate(instructions) if each.instruction not in held]
            model.run({i: Ask([{"role": "user", "content": content[i]}], sampling) for i in left}, done)
        _complete(len(instructions) - len(held), len(instructions), errors)
        outputs = [
            {
                "dataset": each.dataset,
                "instruction": each.instruction,
                "output": held[each.instruction]["output"],
                "generator": model.name,
            }
            for each in instructions
        ]
        _write(out, json.dumps(outputs, indent=2, ensure_ascii=False) + "\n")
        summary = {
            "instructions": len(outputs),
            "cut_off_at_max_new_tokens": sum(row["finish_reason"] == "length" for row in held.values()),
            "prompts_beyond_trained_length": sum(row["beyond_trained_length"] for row in held.values()),
            "empty_answers": sum(not row["output"] for row in held.values()),
            "mean_characters": sum(len(row["output"]) for row in held.values()) // len(outputs),
        }
        journal.finish(summary)
    return summary


class _opened:
    """The journal as a context that yields its earlier rows; of a finished one whose answers were deleted, all."""

    def __init__(self, journal: Journal):
        self.journal = journal

    def __enter__(self) -> list[dict[str, Any]]:
        if self.journal.finished is not None:
            self.journal.out.replace(self.journal.partial)
        self.journal.__enter__()
        return list(self.journal.earlier())

    def __exit__(self, *error: Any) -> None:
        self.journal.__exit__(*error)


def rendered_file(answers: Path) -> Path:
    """Where the prompts of an answer file are. Not beside it: FastChat takes every .jsonl there for a model's."""
    return answers.parent / "rendered" / f"{answers.stem}.jsonl"


def _complete(missing: int, wanted: int, errors: Sequence[str]) -> None:
    if missing:
        why = f" ({errors[0]})" if errors else ""
        raise UserError(f"{missing} of {wanted} could not be answered{why}; run the same command again to go on")


def _write(out: Path, text: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
