"""The recipe's dataset mix as one dataset of canonical columns, sampled and shuffled by seed alone.

Canonical columns: `messages` (a list of role and content), `prompt`, `completion`, `chosen`, `rejected` (text or
messages), `text`; for reward models `margin`, a number; and `row_id`, "dataset:split:index", which every later report
and error uses.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from mambalign.data.preferences import MARGIN, tokenize_preferences
from mambalign.data.sources import MESSAGE_KEYS, Source, load_source, parse_source, plain_message
from mambalign.data.tokenizing import TokenizedData, tokenize_sft, tokenize_text
from mambalign.recipe import UserError, is_test_split, nearest

if TYPE_CHECKING:
    from mambalign.recipe import Recipe

__all__ = ["TokenizedData", "load_mix", "tokenize_preferences", "tokenize_sft", "tokenize_text"]

logger = logging.getLogger(__name__)

SCHEMAS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
_MESSAGES = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
# How other formats (OpenAI's, axolotl's) say of a message whether it is trained.
MARKS = frozenset({"weight", "train", "training", "mask"})


def load_mix(recipe: Recipe, split_kind: str) -> datasets.Dataset:
    """All rows of `dataset_mixer` of one kind, "train" or "test", in canonical columns with `row_id`.

    Training rows are sampled per dataset (`fraction`, `weight`, `max_samples`: the first rows of a permutation seeded
    by the recipe's seed and the dataset's name, so a larger fraction holds the smaller one), joined, shuffled and cut
    to `max_train_samples`. Test splits are read whole and in order, each cut to a seeded sample of `max_eval_samples`.
    Splits whose name says test, eval, validation or held out are never trained on.

    Returns:
        The rows; for "test" without any test split, a dataset of length 0.

    Raises:
        UserError: nothing to train on; anything that `load_source` refuses; no columns of a known schema.
    """
    assert split_kind in ("train", "test"), split_kind
    sources = parse_mixer(recipe)
    splits = list(recipe.dataset_splits or ["train", "test"])
    seed = _seed(recipe)
    parts = []
    for source in sources:
        if source.weight == 0 and split_kind == "train":
            continue
        loaded = load_source(source, splits, split_kind)
        if not loaded and split_kind == "train":
            logger.info("dataset %s is for evaluation by its name: none of it is trained on", source.name)
        for split, rows in loaded:
            rows = canonical_columns(rows, source, recipe)
            rows = rows.add_column("row_id", [f"{source.name}:{split}:{i}" for i in range(len(rows))])
            rng = np.random.default_rng([seed, zlib.crc32(f"{source.name}:{split}".encode())])
            if split_kind == "train":
                parts.append(_sample(rows, source, rng))
            else:
                kept = rng.permutation(len(rows))[: recipe.max_eval_samples]
                parts.append(rows if len(kept) == len(rows) else rows.select(np.sort(kept)))
    if not parts:
        if split_kind == "test":
            return datasets.Dataset.from_dict({"row_id": []})
        raise UserError(_nothing_to_train_on(sources, splits))
    mix = _concatenate(parts)
    if split_kind == "test":
        return mix
    return mix.select(np.random.default_rng([seed, len(mix)]).permutation(len(mix))[: recipe.max_train_samples])


def parse_mixer(recipe: Recipe) -> list[Source]:
    """The entries of `dataset_mixer`, with `dataset_configs` filled in."""
    mixer = recipe.dataset_mixer
    if not mixer:
        raise UserError(
            "dataset_mixer: no dataset is named; map hub ids or paths to fractions, as in {data.jsonl: 1.0}"
        )
    configs = recipe.dataset_configs or {}
    if not isinstance(configs, dict):
        if len(configs) != len(mixer):
            raise UserError(f"dataset_configs: {len(configs)} names for {len(mixer)} datasets; give one each, or a map")
        configs = dict(zip(mixer, configs, strict=True))
    for name in configs:
        if name not in mixer:
            raise UserError(f"dataset_configs: {name!r} is not a dataset of dataset_mixer" + nearest(name, mixer))
    return [parse_source(str(name), entry, configs.get(name)) for name, entry in mixer.items()]


def _seed(recipe: Recipe) -> int:
    for key in ("dataset_seed", "data_seed", "seed"):
        value = getattr(recipe, key, None)
        if value is not None:
            return int(value)
    return 42


def _nothing_to_train_on(sources: list[Source], splits: list[str]) -> str:
    named = sorted({split for source in sources for split in (source.splits or splits)})
    if all(is_test_split(split) for split in named):
        return (
            f"dataset_splits: {', '.join(named)} are for evaluation only, so nothing is left to train on; add another"
        )
    if all(source.weight == 0 for source in sources):
        return "nothing to train on: every dataset of dataset_mixer has the fraction 0"
    names = ", ".join(source.name for source in sources)
    return f"nothing to train on: {names} hold(s) evaluation data only, by name; say split: train if it is not"


def _sample(rows: datasets.Dataset, source: Source, rng: np.random.Generator) -> datasets.Dataset:
    count = max(1, round(source.weight * len(rows)))
    if source.max_samples is not None:
        count = min(count, source.max_samples)
    if count == len(rows):
        return rows
    passes = [rng.permutation(len(rows)) for _ in range(math.ceil(count / len(rows)))]
    return rows.select(np.concatenate(passes)[:count])


# --------------------------------------------------------------------------------------------------------- columns


def canonical_columns(rows: datasets.Dataset, source: Source, recipe: Recipe) -> datasets.Dataset:
    """Rename to canonical names, keep only the columns of known schemas, and bring conversations to one layout."""
    there = list(rows.column_names)
    rename = _renames(there, source, recipe)
    rows = rows.remove_columns([c for c in rename.values() if c in there and c not in rename])
    rows = rows.rename_columns({old: new for old, new in rename.items() if old != new})
    keep = _schema_columns(list(rows.column_names), there, source, recipe)
    rows = rows.select_columns(keep)
    if MARGIN in keep:
        rows = _numbers(rows, MARGIN, source)
    for name in keep:
        feature = rows.features[name]
        if name == MARGIN:
            continue
        is_text = _is_text(feature) and (name != "messages" or feature.dtype == "null")
        if not (is_text or _is_messages(feature)):
            rows = _mend(rows, name, source)
    return rows


def _renames(there: list[str], source: Source, recipe: Recipe) -> dict[str, str]:
    """source column -> canonical column. The entry's own map must fit; the recipe's applies where it fits."""
    known = {name for columns in SCHEMAS.values() for name in columns} | {MARGIN}
    rename = {}
    wanted = {**recipe.dataset_columns, **source.columns}
    if recipe.text_column and recipe.text_column != "text":
        wanted.setdefault("text", recipe.text_column)
    for canonical, column in wanted.items():
        if canonical not in known:
            raise UserError(f"dataset_columns: {canonical!r} is not one of {', '.join(sorted(known))}")
        if column in there:
            rename[column] = canonical
        elif canonical in source.columns or canonical not in there:
            key = f"dataset_mixer.{source.name}.columns" if canonical in source.columns else "dataset_columns"
            if canonical not in source.columns and canonical not in recipe.dataset_columns:
                key = "text_column"
                if recipe.schema != "text":
                    continue
            raise UserError(
                f"{key}: dataset {source.name!r} has no column {column!r}; it has {', '.join(there)}"
                + nearest(column, there)
            )
    if "conversations" in there and "messages" not in there and "messages" not in rename.values():
        rename["conversations"] = "messages"
    return rename


def _schema_columns(columns: list[str], there: list[str], source: Source, recipe: Recipe) -> list[str]:
    schemas = SCHEMAS if recipe.schema == "auto" else {recipe.schema: SCHEMAS[recipe.schema]}
    found = {name for needed in schemas.values() if set(needed) <= set(columns) for name in needed}
    if not found:
        wanted = {name: [recipe.text_column if n == "text" else n for n in needed] for name, needed in schemas.items()}
        needs = "; ".join(f"{name} needs {' and '.join(needed)}" for name, needed in wanted.items())
        near = (nearest(column, there) for needed in wanted.values() for column in needed if column not in there)
        raise UserError(
            f"dataset {source.name!r} has the columns {', '.join(there)}, which fit no schema ({needs})"
            "; name them with dataset_columns, a map of the wanted name to the dataset's" + next(filter(None, near), "")
        )
    if "chosen" in found and "prompt" in columns:
        found.add("prompt")
    if "chosen" in found and MARGIN in columns and recipe.stage == "reward":
        found.add(MARGIN)
    return [name for name in columns if name in found]


def _numbers(rows: datasets.Dataset, name: str, source: Source) -> datasets.Dataset:
    dtype = str(getattr(rows.features[name], "dtype", "list"))
    if not dtype.startswith(("int", "uint", "float", "null")):
        raise UserError(f"dataset {source.name!r}: column {name!r} must hold numbers, it holds {dtype}")
    return rows.cast_column(name, datasets.Value("float64"))


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "null")


def _is_messages(feature: Any) -> bool:
    inner = getattr(feature, "feature", None)
    return isinstance(inner, dict) and set(inner) == {"role", "content"} and all(map(_is_text, inner.values()))


def _mend(rows: datasets.Dataset, name: str, source: Source) -> datasets.Dataset:
    """Reduce another layout (ShareGPT, extra keys, types that differ from row to row) to text, or to role and content.

    What is no text becomes None, and the row a counted skip of tokenisation.
    """
    feature = rows.features[name]
    is_mixed = type(feature).__name__ == "Json"  # the JSON reader's name for values of differing type
    inner = getattr(feature, "feature", None)
    only_empty = isinstance(inner, datasets.Value) and inner.dtype == "null"
    holds_messages = not is_mixed and (
        isinstance(inner, dict) or type(inner).__name__ == "Json" or only_empty or _is_struct_of_lists(feature)
    )
    if is_mixed:
        texts, lists = (
            next((i for i, value in enumerate(rows[name]) if isinstance(value, kind)), None) for kind in (str, list)
        )
        if texts is not None and lists is not None:
            raise UserError(
                f"dataset {source.name!r}: column {name!r} is text in row {texts} but a list of messages in row "
                f"{lists} (counted from 0); it must be one of them throughout"
            )
        holds_messages = lists is not None
    if name == "text" if holds_messages else name == "messages" or not is_mixed:
        wanted = [] if name == "messages" else ["text"]
        wanted += [] if name == "text" else ["a list of messages (role and content)"]
        held = "values of several kinds" if is_mixed else str(feature)[:80]
        raise UserError(f"dataset {source.name!r}: column {name!r} must hold {' or '.join(wanted)}, it holds {held}")
    unused = _other_keys(rows, name) if holds_messages else []
    if unused:
        logger.info("dataset %s: %s in the messages of %r is not used", source.name, ", ".join(unused), name)
    marks = " or ".join(key for key in unused if key in MARKS)
    if marks:
        logger.warning(
            "dataset %s: every assistant message of %r is trained, whatever its %s says; leave out turns that are not "
            "to be learnt", source.name, name, marks,
        )  # fmt: skip
    features = rows.features.copy()
    features[name] = _MESSAGES if holds_messages else datasets.Value("string")
    function = _plain_messages if holds_messages else _plain_text
    return rows.map(function, batched=True, fn_kwargs={"name": name}, features=features, desc=f"reading {source.name}")


def _plain_text(batch: dict[str, list[Any]], name: str) -> dict[str, list[Any]]:
    return {name: [value if isinstance(value, str) else None for value in batch[name]]}


def _other_keys(rows: datasets.Dataset, name: str) -> list[str]:
    """Keys of the first messages that a template does not see, such as `weight` or `tool_calls`."""
    first = (messages for messages in rows.select_columns([name])[:100][name] if isinstance(messages, list))
    keys = {key for messages in first for message in messages if isinstance(message, Mapping) for key in message}
    return sorted(keys - set(MESSAGE_KEYS))


def _is_struct_of_lists(feature: Any) -> bool:
    """How older readers give a list of structs."""
    return isinstance(feature, dict) and all(hasattr(inner, "feature") for inner in feature.values())


def _plain_messages(batch: dict[str, list[Any]], name: str) -> dict[str, list[Any]]:
    plain = []
    for messages in batch[name]:
        if isinstance(messages, Mapping):
            columns = [values or [] for values in messages.values()]
            whole = len(set(map(len, columns))) == 1
            messages = [dict(zip(messages, row, strict=True)) for row in zip(*columns, strict=True)] if whole else None
        plain.append([plain_message(message) for message in messages] if isinstance(messages, list) else None)
    return {name: plain}


def _concatenate(parts: list[datasets.Dataset]) -> datasets.Dataset:
    if len(parts) == 1:
        return parts[0]
    names = sorted({name for part in parts for name in part.column_names})
    if len({_is_text(part.features["prompt"]) for part in parts if "prompt" in part.column_names}) > 1:
        parts = [_prompt_as_messages(part) for part in parts]
    for name in names:
        having = [part for part in parts if name in part.column_names]
        if len({_is_text(part.features[name]) for part in having}) > 1:
            first = {_is_text(part.features[name]): part[0]["row_id"] for part in having}
            raise UserError(
                f"dataset_mixer: column {name!r} is text in one dataset ({first[True]}) and messages in another "
                f"({first[False]}); bring them to one layout, or train on them in turn"
            )
    target = datasets.Features()
    for part in parts:
        for name, feature in part.features.items():
            kind = feature if name == MARGIN else datasets.Value("string") if _is_text(feature) else _MESSAGES
            target.setdefault(name, kind)
    aligned = []
    for part in parts:
        features = datasets.Features({name: target[name] for name in part.column_names})
        aligned.append(part if part.features == features else part.cast(features))
    return datasets.concatenate_datasets(aligned)


def _prompt_as_messages(part: datasets.Dataset) -> datasets.Dataset:
    """A text prompt of an answer in messages is one user turn; said so, it mixes with prompts in messages."""
    answers = [part.features[name] for name in ("completion", "chosen") if name in part.column_names]
    if "prompt" not in part.column_names or not _is_text(part.features["prompt"]) or any(map(_is_text, answers)):
        return part
    features = part.features.copy()
    features["prompt"] = _MESSAGES
    return part.map(_prompt_turn, features=features, desc="prompts to messages")


def _prompt_turn(row: dict[str, Any]) -> dict[str, Any]:
    prompt = row["prompt"]
    return {"prompt": None if prompt is None else [{"role": "user", "content": prompt}]}
