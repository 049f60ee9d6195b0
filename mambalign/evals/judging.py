"""Judgments of whole benchmarks: what is asked, and the files that FastChat and alpaca_eval would have written.

Files are made anew from the store whenever a command ends, so their rows do not depend on the order in which replies
came. Beside each is `.judge.json`: who judged, with what deviations from the benchmark's own judge, what is missing.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mambalign.data.json_rows import json_rows
from mambalign.evals import alpaca_eval, mt_bench
from mambalign.evals.alpaca_eval import ANNOTATORS, Annotator, Comparison
from mambalign.evals.cost import Budget, Prices
from mambalign.evals.data import find_data
from mambalign.evals.endpoint import Endpoint, Reply
from mambalign.evals.judge import Call, Judge, NoLogprobs, Outcome, Plan
from mambalign.evals.mt_bench import Answer, Match
from mambalign.evals.probe import Abilities
from mambalign.evals.store import ReplyStore
from mambalign.recipe import UserError, nearest
from mambalign.support import encodable, write_text

MODES = ("single", "pairwise-baseline", "pairwise-all")


@dataclass(frozen=True)
class Asking:
    """How a command asks its judge. store: the folder of replies, where nothing is asked twice.

    max_cost: most money that the command may spend. more: keyword arguments of `Judge`.
    """

    endpoint: Endpoint
    store: Path
    concurrency: int = 16
    prices: Prices | None = None
    max_cost: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def plan(self, calls: Sequence[Call]) -> Plan:
        """What `ask` would do; asks, writes and locks nothing."""
        return self._judge(ReplyStore(self.store)).plan(calls)

    def ask(self, calls: Sequence[Call], description: str) -> Asked:
        """Replies to the calls. Raises UserError as `Judge.ask`."""
        outcome, judge = asyncio.run(self._ask(calls, description))
        return Asked(outcome, judge.abilities or Abilities(), judge.budget.summary())

    def _judge(self, store: ReplyStore) -> Judge:
        budget = Budget(self.prices, self.max_cost)
        return Judge(self.endpoint, store, concurrency=self.concurrency, budget=budget, **self.more)

    async def _ask(self, calls: Sequence[Call], description: str) -> tuple[Outcome, Judge]:
        with ReplyStore(self.store) as store:
            judge = self._judge(store)
            try:
                return await judge.ask(calls, description), judge
            finally:
                await self.endpoint.close()


@dataclass(frozen=True)
class Asked:
    """What came of `Asking.ask`. spent: tokens, and money where prices are known, of this command."""

    outcome: Outcome
    abilities: Abilities
    spent: dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """A file of judgments. judge: its name in them. verdicts: rows that this call is about, of `wanted`; unparsed: how
    many of them hold no verdict that could be read. missing: why the others are not there, by what they are of."""

    file: Path
    judge: str
    wanted: int
    verdicts: int
    unparsed: int
    missing: dict[str, str]
    stopped: str | None
    requests: int
    spent: dict[str, Any]
    notes: list[str]

    @property
    def complete(self) -> bool:
        return self.verdicts == self.wanted

    def write(self, asking: Asking, replies: Iterable[Reply], made_from: Mapping[str, Any]) -> None:
        """The file beside, which says who judged."""
        there = list(replies)
        told = asdict(self) | {"file": self.file.name, "endpoint": asking.endpoint.base_url, "complete": self.complete}
        told |= {"asked_for": asking.endpoint.model, "extra": dict(asking.endpoint.extra), "made_from": dict(made_from)}
        told["models_that_answered"] = sorted({reply.model for reply in there if reply.model})
        told["system_fingerprints"] = sorted({one.system_fingerprint for one in there if one.system_fingerprint})
        told["tokens"] = [sum(reply.usage[i] for reply in there if reply.usage) for i in (0, 1)]
        told["time"] = time.time()
        write_whole(self.file.with_suffix(".judge.json"), json.dumps(told, indent=2) + "\n")


def notes_on(asking: Asking, asked: Asked, used: Sequence[Reply]) -> list[str]:
    """Where this judge's verdicts are not those of one model asked as the benchmark asks."""
    extra = [f"asked with {json.dumps(dict(asking.endpoint.extra))} beside the benchmark's own"]
    names = sorted({reply.model for reply in used if reply.model})
    several = [f"several models answered under this name: {', '.join(names)}"] if len(names) > 1 else []
    return [*(extra if asking.endpoint.extra else ()), *asked.abilities.notes(), *several]


def write_whole(path: Path, text: str) -> None:
    """As `write_text`, in a folder that may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


# MT-Bench -----------------------------------------------------------------------------------------------------------


def mt_bench_matches(
    answers: Sequence[Path],
    mode: str,
    *,
    baseline: str | None = None,
    data_dir: Path | None = None,
    references: Path | None = None,
) -> list[Match]:
    """What `mode` compares, in FastChat's order. `answers`: files, one a model. baseline: the name of one of these
    models, or another file.

    Raises:
        UserError: a mode that is not, answers or references that lack something, two files of one model.
    """
    if mode not in MODES:
        raise UserError(f"--mode: {mode!r} is none{nearest(mode, MODES)}; there are {', '.join(MODES)}")
    if (mode == "pairwise-baseline") is not (baseline is not None):
        raise UserError("--baseline names what --mode pairwise-baseline compares with: give both or neither")
    files = list(answers)
    baseline_file = Path(baseline).expanduser() if baseline is not None and baseline.endswith(".jsonl") else None
    if baseline_file:
        files = [file for file in files if file.resolve() != baseline_file.resolve()] + [baseline_file]
    given: dict[str, Mapping[int, Answer]] = {}
    for file in files:
        found = mt_bench.load_answers(file)
        names = sorted({answer.model for answer in found.values()})
        if len(names) > 1 or names[0] in given:
            raise UserError(
                f"{file} has answers of {' and '.join(names)}; a file has one model's, and a model one file"
            )
        given[names[0]] = found
    if baseline_file:
        baseline = list(given)[-1]
    questions = mt_bench.load_questions(find_data("mt-bench questions", data_dir))
    prompts = mt_bench.load_judge_prompts(find_data("mt-bench judge prompts", data_dir))
    known: Mapping[int, Answer] = {}
    if any(question.needs_reference for question in questions):
        known = mt_bench.load_answers(references or find_data("mt-bench references", data_dir))
    if mode == "single":
        return mt_bench.single_matches(questions, given, prompts, known)
    return mt_bench.pair_matches(questions, given, prompts, known, baseline)


def mt_bench_calls(matches: Sequence[Match]) -> list[Call]:
    """The calls of the matches' games, in their order."""
    calls = []
    for match in matches:
        single = len(match.models) == 1

        def verdict(text: str, match: Match = match, single: bool = single) -> bool:
            if single:
                return mt_bench.parse_rating(text) != mt_bench.UNPARSED
            return mt_bench.parse_verdict(text, match.prompt.output_format) != "error"

        calls += [
            Call(
                tuple(game),
                max_tokens=mt_bench.JUDGE_PARAMETERS["max_tokens"],
                temperature=mt_bench.JUDGE_PARAMETERS["temperature"],
                verdict=verdict,
            )
            for game in match.games
        ]
    return calls


def judge_mt_bench(matches: Sequence[Match], asking: Asking, out: Path) -> Judged:
    """Have the matches judged, and write `<judge>_single.jsonl` or `<judge>_pair.jsonl` of FastChat into folder `out`.

    Rows of other models in that file stay; those of these matches are made anew.

    Raises:
        UserError: see `Judge.ask`. What was judged until then is in the store.
    """
    single = len(matches[0].models) == 1
    asked = asking.ask(mt_bench_calls(matches), "MT-Bench")
    name = asking.endpoint.name
    replies = iter(asked.outcome.replies)
    failures = iter(asked.outcome.failures.get(i) for i in range(len(asked.outcome.replies)))
    rows, missing, used = [], {}, []
    for match in matches:
        games = [(next(replies), next(failures)) for _ in match.games]
        if all(reply for reply, _ in games):
            there = [reply for reply, _ in games if reply]
            used += there
            rows.append(match.row(name, [reply.text for reply in there], max(reply.time for reply in there)))
        else:
            why = next((reason for _, reason in games if reason), "not asked")
            missing[f"question {match.question.question_id} turn {match.turn} {' '.join(match.models)}"] = why
    file = out / f"{asking.endpoint.file_name}_{'single' if single else 'pair'}.jsonl"
    _merge(file, rows, {_identity(name, match) for match in matches})
    judged = Judged(
        file,
        name,
        wanted=len(matches),
        verdicts=len(rows),
        unparsed=sum(row.get("score") == mt_bench.UNPARSED or "error" in _winners(row) for row in rows),
        missing=missing,
        stopped=asked.outcome.stopped,
        requests=asked.outcome.asked,
        spent=asked.spent,
        notes=notes_on(asking, asked, used),
    )
    judged.write(asking, used, {"models": sorted({model for match in matches for model in match.models})})
    return judged


def _winners(row: Mapping[str, Any]) -> tuple[Any, Any]:
    return row.get("g1_winner"), row.get("g2_winner")


Identity = tuple[Any, ...]


def _identity(judge: str, match: Match) -> Identity:
    return (match.question.question_id, judge, match.prompt.name, *sorted(match.models))


def _row_identity(row: Mapping[str, Any]) -> Identity:
    """Two models in either order are one match: both games are played anyway."""
    models = [row["model"]] if "model" in row else sorted((str(row.get("model_1")), str(row.get("model_2"))))
    return (row.get("question_id"), *row.get("judge", ()), *models)


def _merge(file: Path, rows: list[dict[str, Any]], judged: set[Identity]) -> None:
    """Write `rows` and those in `file` that are of something else than `judged`, in FastChat's order."""
    kept = [row for _, row in json_rows(file) if _row_identity(row) not in judged] if file.is_file() else []

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        question, _, prompt, *models = _row_identity(row)
        return row.get("turn", 1), "-math-" in prompt, str(question).zfill(12), *models

    order = sorted([*kept, *rows], key=place)
    write_whole(file, "".join(json.dumps(row) + "\n" for row in order))


# AlpacaEval ---------------------------------------------------------------------------------------------------------


def alpaca_comparisons(
    outputs: Path, annotator: str, *, data_dir: Path | None = None, reference: Path | None = None
) -> list[Comparison]:
    """What `annotator` compares: a model's outputs with those of the benchmark's reference, or of the file `reference`.

    Raises:
        UserError: an annotator that is not, files that are no outputs, an instruction without an output.
    """
    how = annotator_named(annotator)
    references = alpaca_eval.load_outputs(reference or find_data(how.reference, data_dir))
    given = alpaca_eval.load_outputs(outputs)
    answered = {output.instruction for output in given}
    lacking = [one.instruction for one in references if one.instruction not in answered]
    if lacking:
        raise UserError(
            f"{outputs} lacks {len(lacking)} of {len(references)} instructions, such as {lacking[0][:60]!r}; "
            "run `mambalign eval alpaca answer` again to complete it"
        )
    template = find_data(how.prompt, data_dir).read_text(encoding="utf-8")
    return alpaca_eval.comparisons(references, given, how, template)


def annotator_named(name: str) -> Annotator:
    """Raises UserError."""
    if name not in ANNOTATORS:
        raise UserError(f"--annotator: {name!r} is none{nearest(name, ANNOTATORS)}; there are {', '.join(ANNOTATORS)}")
    return ANNOTATORS[name]


def annotator_label(annotator: Annotator, endpoint: Endpoint, tolerant: bool = False) -> str:
    """The name that goes with every number: the annotator's own only where its own judge judges."""
    own = endpoint.name == annotator.judge
    return annotator.name + ("" if own else f"_by_{endpoint.file_name}") + ("_tolerant" if tolerant else "")


def alpaca_calls(comparisons: Sequence[Comparison], tolerant: bool = False) -> list[Call]:
    """The calls of those comparisons that need a judge, in their order."""
    calls = []
    for one in comparisons:
        if one.decided is None:
            told = one.annotator.parameters
            calls.append(
                Call(
                    tuple(one.messages),
                    max_tokens=told["max_tokens"],
                    temperature=told["temperature"],
                    top_logprobs=told.get("top_logprobs"),
                    verdict=lambda text, one=one: read_verdict(one.annotator, text, None, tolerant) is not None,  # type: ignore[misc]
                )
            )
    return calls


def judge_alpaca(comparisons: Sequence[Comparison], asking: Asking, out: Path, *, tolerant: bool = False) -> Judged:
    """Have the comparisons judged, and write alpaca_eval's `annotations.json` into `out`/model/annotator, and its
    `leaderboard.csv` where no verdict is missing.

    tolerant: read a ranking also where there is more around it; alpaca_eval does not, and the name says so.

    Raises:
        UserError: see `Judge.ask`; the judge gives no log-probabilities and the annotator reads them; the model's name
            cannot be a folder's.
    """
    annotator, model = comparisons[0].annotator, comparisons[0].output.generator
    name = _folder_name(model)  # before anything is paid for
    try:
        asked = asking.ask(alpaca_calls(comparisons, tolerant), "AlpacaEval")
    except NoLogprobs as error:
        raise UserError(
            f"{error}, which {annotator.name} reads; --annotator alpaca_eval_gpt4 (a ranking) and alpaca_eval_clf (the "
            "letter alone) do without. They are other benchmarks, and the result is named after them"
        ) from error
    label = annotator_label(annotator, asking.endpoint, tolerant)
    replies, number = iter(enumerate(asked.outcome.replies)), 0
    rows, missing, used = [], {}, []
    for one in comparisons:
        if one.decided is not None:
            rows.append(one.annotation(one.decided, annotator=label))
            continue
        number, reply = next(replies)
        if reply is None:
            missing[one.output.instruction[:80]] = asked.outcome.failures.get(number, "not asked")
            continue
        used.append(reply)
        preference = read_verdict(annotator, reply.text, reply.top_logprobs, tolerant)
        rows.append(
            one.annotation(
                alpaca_eval.unswitch(preference, one.switched),
                _raw_completion(annotator, reply),
                asking.prices.of(*reply.usage) if asking.prices and reply.usage else None,
                reply.seconds,
                annotator=label,
            )
        )
    folder = out / name / label
    judged = Judged(
        folder / "annotations.json",
        label,
        wanted=len(comparisons),
        verdicts=len(rows),
        unparsed=sum(row["preference"] is None for row in rows),
        missing=missing,
        stopped=asked.outcome.stopped,
        requests=asked.outcome.asked,
        spent=asked.spent,
        notes=notes_on(asking, asked, used),
    )
    write_whole(judged.file, alpaca_eval.annotations_text(rows))
    judged.write(asking, used, {"models": [model, comparisons[0].reference.generator]})
    leaderboard = folder / "leaderboard.csv"
    if judged.complete:
        numbers = alpaca_eval.metrics(row["preference"] for row in rows)
        length = alpaca_eval.avg_length(one.output.output for one in comparisons)
        write_whole(leaderboard, alpaca_eval.leaderboard_text({model: numbers | {"avg_length": length}}))
    else:
        leaderboard.unlink(missing_ok=True)  # an earlier one would be of other verdicts
    return judged


def _folder_name(model: str) -> str:
    name = encodable(re.sub(r"[/\x00-\x1f\x7f]", "-", model))
    if not name.strip(". ") or len(name.encode()) > 200:
        raise UserError(f"generator {model[:60]!r} cannot name the folder of its results; call the model otherwise")
    return name


def read_verdict(
    annotator: Annotator, text: str, top_logprobs: dict[str, float] | None, tolerant: bool = False
) -> float | None:
    """The preference between what was shown first and second, as the annotator reads a reply."""
    if annotator.verdict == "logprobs":
        return alpaca_eval.parse_logprobs(top_logprobs or {})
    if annotator.verdict == "letter":
        return alpaca_eval.parse_letter(text)
    rank = alpaca_eval.parse_ranking(text)
    return alpaca_eval.parse_ranking_tolerant(text) if rank is None and tolerant else rank


def _raw_completion(annotator: Annotator, reply: Reply) -> Any:
    """As alpaca_eval keeps it: the text, or all of the choice where log-probabilities were asked for."""
    if annotator.verdict != "logprobs":
        return reply.text
    return reply.choice | {"text": reply.text, "total_tokens": float(sum(reply.usage or (0, 0)))}
