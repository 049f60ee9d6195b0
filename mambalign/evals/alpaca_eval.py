"""AlpacaEval 1 and 2 (github.com/tatsu-lab/alpaca_eval; 2: arXiv 2404.04475): prompts, verdicts, metrics, file formats.

A preference is 1 where the judge prefers the reference (`output_1`), 2 where it prefers the model (`output_2`), and for
the weighted annotator any number between. Files written here are read by alpaca_eval and the reverse.
"""

from __future__ import annotations

import ast
import csv
import json
import math
import random
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mambalign.data.json_rows import json_rows
from mambalign.recipe import UserError

TIE = 1.5
N_INSTRUCTIONS = 805
Message = dict[str, str]


@dataclass(frozen=True)
class Annotator:
    """How a judge is asked. verdict: what its reply is read as: a ranking, the log-probabilities of "m" and "M", or one
    of these letters. prompt: the name of its template among the benchmarks' files (`data.FILES`)."""

    name: str
    verdict: Literal["ranking", "logprobs", "letter"]
    prompt: str
    reference: str
    judge: str
    parameters: Mapping[str, Any]


ANNOTATORS: Mapping[str, Annotator] = {
    annotator.name: annotator
    for annotator in (
        Annotator(
            "alpaca_eval_gpt4",
            "ranking",
            "alpaca ranking prompt",
            "alpaca reference 1",
            "gpt-4",
            {"temperature": 0, "max_tokens": 100, "top_p": 1.0},
        ),
        Annotator(
            "weighted_alpaca_eval_gpt4_turbo",
            "logprobs",
            "alpaca logprob prompt",
            "alpaca reference 2",
            "gpt-4-1106-preview",
            {"temperature": 1, "max_tokens": 1, "top_p": 1.0, "logprobs": True, "top_logprobs": 5},
        ),
        # For judges without log-probabilities: another benchmark than the weighted one, and named so.
        Annotator(
            "alpaca_eval_clf",
            "letter",
            "alpaca logprob prompt",
            "alpaca reference 2",
            "gpt-4-1106-preview",
            {"temperature": 0, "max_tokens": 1, "top_p": 1.0},
        ),
    )
}


@dataclass(frozen=True)
class Output:
    """A generator's output to an instruction."""

    instruction: str
    output: str
    generator: str
    dataset: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A reference's and a model's output to one instruction.

    switched: the judge is shown the model's first. messages: what it is asked. decided: the preference that needs no
    judge, 1.5 of identical outputs, else None.
    """

    reference: Output
    output: Output
    annotator: Annotator
    switched: bool
    messages: list[Message]

    @property
    def decided(self) -> float | None:
        return TIE if self.reference.output == self.output.output else None

    def annotation(
        self,
        preference: float | None,
        raw_completion: Any = None,
        price: float | None = None,
        seconds: float | None = None,
        *,
        annotator: str | None = None,
    ) -> dict[str, Any]:
        """The row of annotations.json, alpaca_eval's keys in its order. `annotator`: its name, where the judge is not
        the annotator's own. `preference` is of reference and model, the switch undone (`unswitch`)."""
        return {
            "instruction": self.output.instruction,
            "output_1": self.reference.output,
            "generator_1": self.reference.generator,
            "dataset": self.output.dataset or self.reference.dataset,
            "output_2": self.output.output,
            "generator_2": self.output.generator,
            "annotator": annotator or self.annotator.name,
            "preference": preference,
            "price_per_example": price,
            "time_per_example": seconds,
            "raw_completion": raw_completion,
        }


# Reading ------------------------------------------------------------------------------------------------------------


def load_outputs(path: Path) -> list[Output]:
    """model_outputs.json or reference outputs (JSON array or lines, also gzipped), in the file's order.

    A null or missing output is an empty one. Raises UserError naming file, line and key; an instruction twice.
    """
    outputs: dict[str, Output] = {}
    for line, row in json_rows(path):
        where = f"{path}:{line}"
        instruction = row.get("instruction")
        if not isinstance(instruction, str):
            raise UserError(f"{where}: instruction must be text, this is {json.dumps(instruction)[:60]}")
        if instruction in outputs:
            raise UserError(f"{where}: the instruction {instruction[:60]!r} is there twice")
        output = row.get("output")
        if output is not None and not isinstance(output, str):
            raise UserError(f"{where}: output must be text, this is {json.dumps(output)[:60]}")
        generator, dataset = row.get("generator"), row.get("dataset")
        outputs[instruction] = Output(instruction, output or "", str(generator or path.name.split(".")[0]), dataset)
    if not outputs:
        raise UserError(f"{path}: there are no outputs")
    return list(outputs.values())


def load_annotations(path: Path) -> list[dict[str, Any]]:
    """Rows of annotations.json, of old and new versions, also gzipped, under one set of names.

    `preference` is a float in [1, 2] (1.5: a tie, also where the file has 0) or None where there is none (null, NaN, -1
    and whatever else is no preference). Newer versions' `preference_raw_completion` becomes `raw_completion`, etc.

    Raises:
        UserError: naming file and line of a row without instruction, or a file without rows.
    """
    rows = []
    for line, row in json_rows(path):
        plain = {key.removeprefix("preference_"): value for key, value in row.items()}
        if not isinstance(plain.get("instruction"), str):
            raise UserError(f"{path}:{line}: no instruction, so this is no annotation")
        plain["preference"] = valid_preference(plain.get("preference"))
        rows.append(plain)
    if not rows:
        raise UserError(f"{path}: there are no annotations")
    return rows


def valid_preference(value: Any) -> float | None:
    """The preference as alpaca_eval counts it: 0 is a tie, what is not within [1, 2] is none.

    >>> [valid_preference(value) for value in (2, 0, 1.25, "1.5", None, float("nan"), -1)]
    [2.0, 1.5, 1.25, 1.5, None, None, None]
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if value == 0:
        return TIE
    return float(value) if 1 <= value <= 2 else None


# Asking -------------------------------------------------------------------------------------------------------------


def comparisons(
    references: Sequence[Output],
    outputs: Sequence[Output],
    annotator: Annotator,
    template: str,
    *,
    seed: int = 0,
    parity: bool = False,
) -> list[Comparison]:
    """What is to be judged, in the order of `references`: every instruction that both have.

    Raises:
        UserError: they have no instruction in common.
    """
    answers = {output.instruction: output for output in outputs}
    made = []
    for reference in references:
        output = answers.get(reference.instruction)
        if output is None:
            continue
        switched = is_switched(reference.instruction, seed)
        shown = (output, reference) if switched else (reference, output)
        values = {"instruction": reference.instruction, "output_1": shown[0].output, "output_2": shown[1].output}
        messages = fill(template, values, parity=parity)
        made.append(Comparison(reference, output, annotator, switched, messages))
    if not made:
        raise UserError("the model's outputs and the reference's have no instruction in common")
    return made


def is_switched(instruction: str, seed: int = 0) -> bool:
    """Whether the judge is shown the model's output first: alpaca_eval's seeded coin."""
    coin = random.Random(f"is_switched_outputs{instruction}{seed}")
    return coin.choices([False, True], k=1)[0]


def unswitch(preference: float | None, switched: bool) -> float | None:
    """A preference between what was shown first and second, as one between reference and model."""
    return 3 - preference if switched and preference is not None else preference


_PLACE = re.compile(r"{([^ \s]+?)}")
_TURN = re.compile(r"<\|im_start\|>([^\n]*)\n(.*?)<\|im_end\|>", re.DOTALL)


def fill(template: str, values: Mapping[str, str], *, parity: bool = False) -> list[Message]:
    """The template's ChatML turns as messages, its places filled, every content stripped.

    alpaca_eval fills first and splits then, replacing each place's first occurrence in order; so an instruction that
    says "{output_1}" takes the output's place, and an answer that says "<|im_end|>" ends the judge's prompt. That is
    `parity`; else texts are only text. All other texts give the same messages.

    Raises:
        UserError: the template is no ChatML, or a place has no value.
    """
    names = list(dict.fromkeys(_PLACE.findall(template)))
    unknown = [name for name in names if name not in values]
    if unknown:
        raise UserError(f"the judge's prompt has a place {{{unknown[0]}}}, which nothing fills")
    if not template.strip().startswith("<|im_start|>") or not template.strip().endswith("<|im_end|>"):
        raise UserError("the judge's prompt must be ChatML: <|im_start|>role, a line break, text, <|im_end|>")
    if parity:
        for name in names:
            template = template.replace(f"{{{name}}}", values[name], 1)
        return [_chatml_turn(part) for part in template.strip().split("<|im_start|>")[1:]]
    filled = []
    for role, content in _TURN.findall(template):
        text = _PLACE.sub(lambda place: values[place.group(1)], content)
        filled.append({"role": role.strip(), "content": text.strip()})
    return filled


def _chatml_turn(part: str) -> Message:
    role, _, content = part.partition("\n")
    return {"role": role.strip(), "content": content.split("<|im_end|>", 1)[0].strip()}


# Verdicts -----------------------------------------------------------------------------------------------------------

_LIST = re.compile(r"\[\s*{.*?}\s*\]", re.DOTALL)


def parse_ranking(reply: str | None) -> int | None:
    """alpaca_eval's strict reading: the reply is a Python list, and says the rank of model_1, 1 or 2; else None.

    >>> parse_ranking("[{'model': 'model_1', 'rank': 2}, {'model': 'model_2', 'rank': 1}]")
    2
    """
    try:
        ranks = ast.literal_eval(reply or "")
        rank = next(entry["rank"] for entry in ranks if entry["model"] == "model_1")
    except (ValueError, SyntaxError, TypeError, KeyError, IndexError, StopIteration, MemoryError, RecursionError):
        return None
    return int(rank) if rank in (1, 2) else None


def parse_ranking_tolerant(reply: str | None) -> int | None:
    """As `parse_ranking`, of the only list in a reply that has more around it (a code fence, a sentence), in Python or
    JSON; lists that disagree are none."""
    found = set()
    for text in _LIST.findall(reply or ""):
        rank = parse_ranking(text)
        if rank is None:
            try:
                rank = parse_ranking(repr(json.loads(text)))
            except (ValueError, RecursionError):
                continue
        found.add(rank)
    return found.pop() if len(found) == 1 else None


def parse_logprobs(top_logprobs: Iterable[Mapping[str, Any]] | Mapping[str, float]) -> float | None:
    """2 - p(m) / (p(m) + p(M)) of the first token's likeliest alternatives (`{"token", "logprob"}`, or token ->
    log-probability); a token that is not among them has p = 0; None where neither is, or one has no number."""
    if isinstance(top_logprobs, Mapping):
        logprobs = dict(top_logprobs)
    else:
        logprobs = {entry["token"]: entry["logprob"] for entry in top_logprobs}
    first, second = (logprobs.get(token, -math.inf) for token in ("m", "M"))
    if not all(isinstance(value, int | float) and value < math.inf for value in (first, second)):
        return None
    best = max(first, second)
    if best == -math.inf:
        return None
    weights = math.exp(first - best), math.exp(second - best)
    return 2 - weights[0] / (weights[0] + weights[1])


def parse_letter(reply: str | None) -> int | None:
    """1 of a reply "m" (the one shown first), 2 of "M", spaces and quotes around it allowed; else None."""
    return {"m": 1, "M": 2}.get((reply or "").strip().strip("\"'`.").strip())


def completion_logprobs(raw_completion: Any) -> list[Mapping[str, Any]] | None:
    """The first token's alternatives in a stored `raw_completion`, None where it has none."""
    if not isinstance(raw_completion, Mapping):
        return None
    content = (raw_completion.get("logprobs") or {}).get("content") or []
    return content[0].get("top_logprobs") if content else None


# Metrics ------------------------------------------------------------------------------------------------------------


def metrics(preferences: Iterable[Any]) -> dict[str, float | int]:
    """alpaca_eval's seven numbers. x = preference - 1; what is no preference is dropped.

    win_rate = 100 mean(x); standard_error = 100 sd(x) / sqrt(n), with n - 1 degrees of freedom; wins x > 0.5;
    n_draws x = 0.5 exactly; discrete_win_rate = 100 (wins + draws / 2) / n.

    >>> metrics([2, 2, 1, 0, None])["win_rate"]
    62.5
    """
    x = [value - 1 for value in map(valid_preference, preferences) if value is not None]
    n = len(x)
    wins, base, draws = sum(v > 0.5 for v in x), sum(v < 0.5 for v in x), sum(v == 0.5 for v in x)
    return {
        "win_rate": 100 * math.fsum(x) / n if n else math.nan,
        "standard_error": 100 * statistics.stdev(x) / math.sqrt(n) if n > 1 else math.nan,
        "n_wins": wins,
        "n_wins_base": base,
        "n_draws": draws,
        "n_total": n,
        "discrete_win_rate": 100 * (wins + draws / 2) / n if n else math.nan,
    }


def avg_length(outputs: Iterable[str | None], n_instructions: int | None = None) -> int:
    """Mean characters of an output, rounded down. `n_instructions`: divide by so many, missing outputs being empty."""
    lengths = [len(output or "") for output in outputs]
    return sum(lengths) // (n_instructions or len(lengths))


LEADERBOARD = (
    "win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate", "mode",
    "avg_length", "length_controlled_winrate", "lc_standard_error",
)  # fmt: skip


def read_leaderboard(path: Path) -> dict[str, dict[str, Any]]:
    """model -> column -> number (None where the field is empty) or text. Raises UserError where it is no such table."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.reader(file)
        header = next(table, [])
        if "win_rate" not in header:
            raise UserError(f"{path}: no column win_rate, so this is no leaderboard")
        return {row[0]: dict(zip(header[1:], map(_cell, row[1:]), strict=False)) for row in table if row}


def leaderboard_text(models: Mapping[str, Mapping[str, Any]]) -> str:
    """leaderboard.csv: a line a model, best win rate first, empty where a number is not known."""
    lines = [",".join(("", *LEADERBOARD))]
    ranked = sorted(models.items(), key=lambda item: -(item[1].get("win_rate") or 0))
    for name, row in ranked:
        cells = ["" if row.get(key) is None else str(row[key]) for key in LEADERBOARD]
        quoted = f'"{name.replace(chr(34), chr(34) * 2)}"' if re.search('[",\n]', name) else name
        lines.append(",".join([quoted, *cells]))
    return "\n".join(lines) + "\n"


def annotations_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """annotations.json: an array, indented by 2.

    Some servers spell infinities and NaN in their replies, which JSON lacks: a log-probability of minus infinity is
    written as -9999.0, as OpenAI does, any other as null.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list):
            return [plain(each) for each in value]
        if isinstance(value, float) and not math.isfinite(value):
            return -9999.0 if value == -math.inf else None
        return value

    return json.dumps([plain(row) for row in rows], indent=2, allow_nan=False) + "\n"


def _cell(text: str) -> Any:
    try:
        return int(text) if text.lstrip("-").isdecimal() else float(text)
    except ValueError:
        return text or None
