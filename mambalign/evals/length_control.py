"""AlpacaEval 2's length-controlled win rate (arXiv 2404.04475): the wins there would be at equal length.

logit P(model wins | i) = a tanh(delta_i / sd(delta)) + b gamma_i + c, with delta the reference's characters less the
model's and gamma the instruction's difficulty, which is fixed. The win rate is 100 mean(sigmoid(b gamma_i + c)). The
paper says L2; alpaca_eval's code, and every published number, is L1 with liblinear. Needs scikit-learn (extra `eval`).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mambalign.recipe import UserError

Array = NDArray[np.float64]
GRID: Array = np.logspace(-4, 4, 10)
REGULARIZATION = 0.2  # shared by two gamed models
_FOLDS = 5
_FEATURES = ("np.tanh(std_delta_len)", "instruction_difficulty", "not_gamed_baseline.astype(float)")


@dataclass(frozen=True)
class Coefficients:
    """a of the length term, b of the difficulty (0 where there is none), c the constant."""

    length: float
    difficulty: float
    constant: float


@dataclass(frozen=True)
class Gamed:
    """df_gamed.csv: how gpt4_1106_preview fares against its own verbose and concise answers, which ties the length
    coefficient down. [rows] each; preference in [0, 1]."""

    preference: Array
    delta: Array
    difficulty: Array
    index: NDArray[np.int64]

    def difficulties(self) -> dict[int, float]:
        """index of the instruction -> its difficulty."""
        return {int(i): float(value) for i, value in zip(self.index[::-1], self.difficulty[::-1], strict=True)}


@dataclass(frozen=True)
class LengthControlled:
    """win_rate and standard_error in per cent; preferences: P(model wins) at equal length, of every row."""

    win_rate: float
    standard_error: float
    coefficients: Coefficients
    preferences: tuple[float, ...] = field(repr=False)
    C: float | None = None
    warnings: tuple[str, ...] = ()


def load_gamed(path: Path) -> Gamed:
    """df_gamed.csv. Raises UserError where a column is missing or a field is no number."""
    rows = _csv(path, ("index", "preference", "std_delta_len", "instruction_difficulty"))
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return Gamed(
        columns["preference"],
        columns["std_delta_len"],
        columns["instruction_difficulty"],
        columns["index"].astype(np.int64),
    )


def load_difficulty(path: Path) -> dict[int, float]:
    """instruction_difficulty.csv: index of the instruction -> difficulty. Raises UserError as `load_gamed`."""
    rows = _csv(path, ("instruction_difficulty",))
    return {
        int(row[""] if "" in row else row.get("index", i)): row["instruction_difficulty"] for i, row in enumerate(rows)
    }


def load_coefficients(path: Path) -> dict[str, Coefficients]:
    """alpaca_eval's `weights/.../baseline_<reference>.csv`: model -> coefficients, the last of several."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        missing = [name for name in _FEATURES if name not in (table.fieldnames or ())]
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r}, so these are no coefficients of length control")
        return {row.get("") or "": Coefficients(*(float(row[name]) for name in _FEATURES)) for row in table}


def _csv(path: Path, wanted: Sequence[str]) -> list[dict[str, float]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        missing = [name for name in wanted if name not in (table.fieldnames or ())]
        if missing:
            raise UserError(f"{path}: there is no column {missing[0]!r}")
        keep = [name for name in table.fieldnames or () if name in (*wanted, "", "index")]
        try:
            rows = [{name: float(row[name]) for name in keep} for row in table]
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}:{table.line_num}: {error}") from error
    if not rows:
        raise UserError(f"{path}: there are no rows")
    return rows


def difficulties(
    annotations: Sequence[Mapping[str, Any]],
    instructions: Sequence[str],
    difficulty: Mapping[int, float],
    *,
    positional: bool = False,
) -> list[float] | None:
    """The difficulty of every annotation, found by its instruction's place in the benchmark's list.

    alpaca_eval takes the place in the file, so one missing row shifts every later one: `positional=True`, for parity
    with published numbers only. None where an instruction is not in the list: a custom set has no difficulties.
    """
    if positional:
        return [difficulty[place] for place in range(len(annotations))]
    places = {instruction: place for place, instruction in enumerate(instructions)}
    found = [difficulty.get(places.get(row["instruction"], -1)) for row in annotations]
    known = [value for value in found if value is not None]
    return known if len(known) == len(annotations) else None


def predict(coefficients: Coefficients, difficulty: Sequence[float] | None, n: int | None = None) -> LengthControlled:
    """The win rate that coefficients say, over these difficulties; without difficulties, of `n` rows."""
    gamma = np.zeros(n or 1) if difficulty is None else np.asarray(difficulty, np.float64)
    p = _sigmoid(coefficients.difficulty * gamma + coefficients.constant)
    error = 100 * float(p.std(ddof=1)) / math.sqrt(len(p)) if len(p) > 1 else math.nan
    return LengthControlled(100 * float(p.mean()), error, coefficients, tuple(p.tolist()))


def length_controlled(
    annotations: Sequence[Mapping[str, Any]],
    difficulty: Sequence[float] | None,
    gamed: Gamed | None,
    *,
    C: float | None = None,
) -> LengthControlled:
    """Fit one model's annotations.

    Args:
        annotations: rows with `preference` in [1, 2] or None, `output_1`, `output_2` and the generators' names.
        difficulty: of every row; None drops the term (a custom instruction set).
        gamed: the regularising rows of df_gamed.csv, weight 0.1 each; None: there are none, and the fit is looser.
        C: inverse strength of L1; None chooses among `GRID` by 5-fold cross-validation grouped by row.

    Raises:
        UserError: no preference, or scikit-learn is not installed.

    The reference against itself is 50 by construction. `warnings` say what to distrust.
    """
    first = annotations[0] if annotations else {}
    if first and first.get("generator_1") == first.get("generator_2"):
        half = predict(Coefficients(0.0, 0.0, 0.0), difficulty, len(annotations))
        return LengthControlled(half.win_rate, 0.0, half.coefficients, half.preferences)
    x, y, weight = _design(annotations, difficulty, gamed)
    fit = _fitter()
    chosen = _cross_validated(fit, x, y, weight) if C is None else C
    coefficients = Coefficients(*map(float, fit(x, y, weight, chosen)))
    made = predict(coefficients, difficulty, len(annotations))
    raw = 100 * float(np.mean([row["preference"] - 1 for row in annotations if row["preference"] is not None]))
    notes = _warnings(raw, made.win_rate, difficulty, gamed)
    return LengthControlled(made.win_rate, made.standard_error, coefficients, made.preferences, chosen, notes)


def is_extreme(win_rate: float, controlled: float) -> bool:
    """alpaca_eval's alarm: control moved the win rate by over 10 points and over a quarter of what room there was."""
    low = min(win_rate - win_rate / 4, win_rate - 10)
    high = max(win_rate + (100 - win_rate) / 4, win_rate + 10)
    return controlled < low or controlled > high


def _warnings(
    win_rate: float, controlled: float, difficulty: Sequence[float] | None, gamed: Gamed | None
) -> tuple[str, ...]:
    notes = []
    if is_extreme(win_rate, controlled):
        notes.append(
            f"length control moves the win rate from {win_rate:.1f} to {controlled:.1f}, which may be a failed fit"
        )
    if difficulty is None:
        notes.append("these instructions have no known difficulty, so the fit has lengths and a constant only")
    if gamed is None:
        notes.append(
            "without df_gamed.csv nothing ties the length coefficient down; not comparable with published ones"
        )
    return tuple(notes)


def _design(
    annotations: Sequence[Mapping[str, Any]], difficulty: Sequence[float] | None, gamed: Gamed | None
) -> tuple[Array, Array, Array]:
    """Features [rows, 3], preferences [rows] in [0, 1] and weights [rows]: gamed rows first, then the model's."""
    lengths = [len(row["output_1"] or "") - len(row["output_2"] or "") for row in annotations]
    delta = np.array(lengths, np.float64)
    spread = float(delta.std(ddof=1)) if len(delta) > 1 else 0.0
    gamma = np.zeros(len(delta)) if difficulty is None else np.asarray(difficulty, np.float64)
    own = np.stack([np.tanh(delta / spread) if spread else np.zeros(len(delta)), gamma, np.ones(len(delta))], axis=1)
    preference = np.array([math.nan if row["preference"] is None else row["preference"] - 1 for row in annotations])
    judged = ~np.isnan(preference)
    if not judged.any():
        raise UserError("there is no preference among the annotations, so there is nothing to fit")
    x, y, weight = own[judged], preference[judged], np.ones(int(judged.sum()))
    if gamed is not None:
        known = ~np.isnan(gamed.preference)
        hard = np.zeros(len(known)) if difficulty is None else gamed.difficulty
        theirs = np.stack([np.tanh(gamed.delta), hard, np.zeros(len(known))], axis=1)[known]
        x, y = np.concatenate([theirs, x]), np.concatenate([gamed.preference[known], y])
        weight = np.concatenate([np.full(len(theirs), REGULARIZATION / 2), weight])
    return x, y, weight


def _fitter() -> Any:
    """fit(x, y, weight, C) -> [3] coefficients: soft labels are every row twice, weighted y and 1 - y."""
    try:
        import sklearn
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError('the length-controlled win rate needs scikit-learn: pip install "mambalign[eval]"') from error
    old = tuple(int(part) for part in sklearn.__version__.split(".")[:2]) < (1, 8)
    l1: dict[str, Any] = {"penalty": "l1"} if old else {"l1_ratio": 1.0}

    def fit(x: Array, y: Array, weight: Array, C: float) -> Array:
        model = LogisticRegression(C=C, solver="liblinear", fit_intercept=False, random_state=123, **l1)
        labels = np.repeat([1, 0], len(x))
        model.fit(np.concatenate([x, x]), labels, sample_weight=np.concatenate([y * weight, (1 - y) * weight]))
        coefficients: Array = model.coef_[0]
        return coefficients

    return fit


def _cross_validated(fit: Any, x: Array, y: Array, weight: Array) -> float:
    """The C of the least weighted log-loss over held-out folds; the smallest of equals, as scikit-learn's argmax."""
    from sklearn.model_selection import GroupKFold

    if len(x) < _FOLDS:
        raise UserError(f"length control needs {_FOLDS} judged rows at least to cross-validate, here are {len(x)}")
    losses = np.zeros((_FOLDS, len(GRID)))
    for fold, (train, test) in enumerate(GroupKFold(_FOLDS).split(x, groups=np.arange(len(x)))):
        for i, C in enumerate(GRID):
            p = np.clip(_sigmoid(x[test] @ fit(x[train], y[train], weight[train], float(C))), 1e-15, 1 - 1e-15)
            loss = y[test] * np.log(p) + (1 - y[test]) * np.log(1 - p)
            losses[fold, i] = -float(np.mean(loss * weight[test]))
    return float(GRID[int(losses.mean(0).argmin())])


def _sigmoid(x: Array) -> Array:
    value: Array = np.exp(-np.logaddexp(0, -x))
    return value
