"""Where rows come from: local files and folders, saved datasets, and the hub; read with errors that name the place."""

from __future__ import annotations

import difflib
import errno
import glob
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetsError

from mambalign.data.chat import SHAREGPT_ROLES
from mambalign.data.json_rows import json_rows
from mambalign.recipe import UserError, entry_splits, is_test_split, nearest

logger = logging.getLogger(__name__)

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
MESSAGE_KEYS = ("role", "content", "from", "value")  # the latter two are ShareGPT's
_ENTRY_KEYS = ("fraction", "weight", "max_samples", "split", "splits", "config", "columns", "data_files", "revision")


@dataclass(frozen=True)
class Source:
    """One entry of `dataset_mixer`: which rows of which dataset."""

    name: str
    weight: float = 1.0
    max_samples: int | None = None
    splits: tuple[str, ...] | None = None
    config: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    data_files: Any = None
    revision: str | None = None

    def wanted(self, recipe_splits: Iterable[str], kind: str) -> list[str]:
        """Splits of the given kind ("train" or "test") to read; the entry's own splits go before the recipe's."""
        return [s for s in (self.splits or tuple(recipe_splits)) if is_test_split(s) == (kind == "test")]


def parse_source(name: str, entry: Any, config: str | None = None) -> Source:
    """Read one `dataset_mixer` entry: a fraction in [0, 1], or a mapping.

    Keys of the mapping: `fraction` in [0, 1]; or `weight`, which may pass 1 and then repeats rows (2.5 is every row
    twice and half of them once more); `max_samples`; `split` or `splits`; `config`; `columns` (canonical name ->
    source column); `data_files` and `revision` (hub only). They apply to training splits; test splits are read whole.

    Raises:
        UserError: unknown key, a number out of range, or a value of the wrong type.
    """
    where = f"dataset_mixer.{name}"
    if isinstance(entry, Mapping):
        unknown = sorted(set(entry) - set(_ENTRY_KEYS))
        if unknown:
            hint = nearest(unknown[0], _ENTRY_KEYS) or f"; known are {', '.join(_ENTRY_KEYS)}"
            raise UserError(f"{where}: unknown key {unknown[0]!r}{hint}")
        if "fraction" in entry and "weight" in entry:
            raise UserError(f"{where}: give fraction or weight, not both")
        options = dict(entry)
    else:
        options = {"fraction": entry}
    weight = _number(where, "fraction" if "fraction" in options else "weight", options)
    max_samples = options.get("max_samples")
    if max_samples is not None and (type(max_samples) is not int or max_samples < 1):
        raise UserError(f"{where}.max_samples: {max_samples!r} must be a whole number of rows, at least 1")
    columns = options.get("columns") or {}
    if not isinstance(columns, Mapping) or not all(isinstance(column, str) for column in columns.values()):
        raise UserError(f"{where}.columns: {columns!r} must be a map of the wanted name to the dataset's")
    return Source(
        name=name,
        weight=weight,
        max_samples=max_samples,
        splits=tuple(entry_splits(name, entry)) or None,
        config=options.get("config", config),
        columns=dict(columns),
        data_files=options.get("data_files"),
        revision=options.get("revision"),
    )


def _number(where: str, key: str, options: Mapping[str, Any]) -> float:
    value = options.get(key, 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f"{where}: {key} {value!r} must be a number, 0 (none of its training rows) or more")
    if key == "fraction" and value > 1:
        raise UserError(
            f"{where}: a fraction of {value} is more than the whole; write {{max_samples: {int(value)}}} for a number "
            f"of rows, or {{weight: {value}}} to repeat rows"
        )
    return float(value)


# --------------------------------------------------------------------------------------------------------- loading


def load_source(source: Source, recipe_splits: Iterable[str], kind: str) -> list[tuple[str, datasets.Dataset]]:
    """The (split name, rows) of the source's splits of this kind, with the source's own columns.

    A training split that is asked for must exist; a test split that a dataset lacks is left out with a log line.

    Raises:
        UserError: nothing of that name; no such split; unreadable, malformed or empty data.
    """
    path = Path(source.name).expanduser()
    if path.exists():
        _refuse_hub_only(source, recipe_splits)
        parts = _load_local(source, path, list(recipe_splits), kind)
    elif _looks_local(source.name):
        raise UserError(_missing(path))
    else:
        parts = _load_hub(source, source.wanted(recipe_splits, kind), kind)
    for split, rows in parts:
        if len(rows) == 0:
            raise UserError(f"dataset {source.name!r}: split {split!r} is empty")
    return parts


def _refuse_hub_only(source: Source, recipe_splits: Iterable[str]) -> None:
    if source.config is not None:
        raise UserError(
            f"dataset {source.name!r}: the configuration {source.config!r} is for datasets of the hub, this one is a "
            "path; leave it out (dataset_configs may be a map of dataset to name)"
        )
    for key in ("data_files", "revision"):
        if getattr(source, key) is not None:
            raise UserError(f"dataset_mixer.{source.name}: {key} is for datasets of the hub, this one is a path")
    for split in source.splits or recipe_splits:
        if "[" in split:
            raise UserError(
                f"dataset {source.name!r}: a slice such as {split!r} can only be taken of datasets of the hub; write "
                "the split's name and give a fraction or max_samples"
            )


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).suffix in READERS or "\\" in name or name.count("/") > 1


def _missing(path: Path) -> str:
    parent = path.parent
    while not parent.exists():
        path, parent = parent, parent.parent
    if not parent.is_dir():
        return f"dataset_mixer: {path.name!r} does not exist in {parent}, which is a file"
    names = sorted(entry.name for entry in islice(parent.iterdir(), 1000))
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or names[:5]
    there = f"; there is {', '.join(near)}" if near else "; the folder is empty"
    return f"dataset_mixer: {path.name!r} does not exist in {parent}{there}"


def split_of_file(path: Path) -> str:
    """The split a data file belongs to: its name up to the shard number (`train_sft-00000-of-00003.parquet`)."""
    return re.sub(r"_\d+$", "", re.split(r"[.\-]", path.name)[0])


def _load_local(source: Source, path: Path, recipe_splits: list[str], kind: str) -> list[tuple[str, datasets.Dataset]]:
    if path.is_file():
        return _load_single(source, path, kind, lambda: read_files([path]))
    if (path / "dataset_dict.json").exists():
        saved = _load_saved(path)
        return [(s, saved[s]) for s in _choose(source, recipe_splits, kind, list(saved))]
    if (path / "state.json").exists():
        return _load_single(source, path, kind, lambda: _load_saved(path))
    files: dict[str, list[Path]] = {}
    for split, file in _files_by_split(path):
        files.setdefault(split, []).append(file)
    if not files:
        raise UserError(
            f"dataset_mixer: the folder {path} holds no data; wanted are files named after their split, such as "
            f"train.jsonl or test-00000.parquet ({', '.join(READERS)}), or a folder written by save_to_disk"
        )
    return [(s, read_files(files[s])) for s in _choose(source, recipe_splits, kind, list(files))]


def _load_saved(path: Path) -> Any:
    try:
        return datasets.load_from_disk(str(path))
    except (IndexError, KeyError, OSError, ValueError) as error:  # IndexError: no rows at all
        raise UserError(
            f"cannot read the saved dataset {path}: it is empty or damaged ({_first_line(error)})"
        ) from error


def _files_by_split(path: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(path.rglob("*")):
        if file.suffix in READERS and file.is_file() and not file.name.startswith("."):
            within = file.relative_to(path).parts[:-1]
            if within in ((), ("data",)):
                yield split_of_file(file), file
            elif len(within) == 1:
                yield within[0], file


def _load_single(source: Source, path: Path, kind: str, read: Any) -> list[tuple[str, datasets.Dataset]]:
    """A file or saved dataset without splits: the split the entry names, else test or train by the file's name."""
    stated = (source.splits or (None,))[0]
    split = stated or (split_of_file(path) if is_test_split(path.stem) else "train")
    return [(split, read())] if is_test_split(split) == (kind == "test") else []


def _choose(source: Source, recipe_splits: list[str], kind: str, available: list[str]) -> list[str]:
    wanted = source.wanted(recipe_splits, kind)
    missing = [split for split in wanted if split not in available]
    if missing and kind == "train":
        raise UserError(
            f"dataset {source.name!r} has no split {missing[0]!r}; it has {', '.join(sorted(available))}; set "
            "dataset_splits, or split: for this dataset alone"
        )
    for split in missing:
        logger.info("dataset %s has no split %s to evaluate on (it has %s)", source.name, split, ", ".join(available))
    return [split for split in wanted if split in available]


def _load_hub(source: Source, wanted: list[str], kind: str) -> list[tuple[str, datasets.Dataset]]:
    parts = []
    for split in wanted:
        try:
            rows = datasets.load_dataset(
                source.name, source.config, split=split, data_files=source.data_files, revision=source.revision
            )
        except (ValueError, RuntimeError) as error:  # no such split or configuration, a dataset that is a script
            if kind == "test" and "split" in str(error).lower():
                logger.info("dataset %s has no split %s to evaluate on: %s", source.name, split, error)
                continue
            raise UserError(f"dataset {source.name!r}, split {split!r}: {error}") from error
        except (DatasetsError, OSError) as error:  # no such dataset, no access, offline, malformed data
            cause = _cause(error)
            raise UserError(
                f"dataset {source.name!r} is neither a file or folder here nor could it be read from the hub "
                f"({type(cause).__name__}: {_first_line(cause)}); check the name, the network and your access, or give "
                "a local path"
            ) from error
        parts.append((split, rows))
    return parts


def _cause(error: BaseException) -> BaseException:
    """What went wrong beneath the datasets library's wrapping; a full disk is raised as what it is."""
    cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        raise cause
    return cause


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


# --------------------------------------------------------------------------------------------------------- reading


def read_files(paths: list[Path]) -> datasets.Dataset:
    """Rows of data files of one kind, through the datasets library's cache.

    Raises:
        UserError: a file is malformed (JSON: names the line), empty, or its columns change type beyond repair.
    """
    for path in paths:
        if path.suffix not in READERS:
            raise UserError(
                f"cannot read {path}: a data file ends in {', '.join(READERS)}, this one in {path.suffix!r}"
            )
    kinds = {READERS[path.suffix] for path in paths}
    if len(kinds) > 1:
        names = ", ".join(path.name for path in paths)
        raise UserError(f"cannot read {names}: all files of a split must be of one kind of {', '.join(READERS)}")
    for path in paths:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
        if "::" in str(path):
            raise UserError(f"cannot read {path}: the datasets library takes '::' for an archive's inside; rename it")
    reader = kinds.pop()
    try:
        rows = datasets.load_dataset(reader, data_files=[glob.escape(str(p)) for p in paths], split="train")
        if reader == "json":
            rows.data.table.validate(full=True)  # its reader takes bytes that are no UTF-8
        return rows
    except (DatasetGenerationError, ValueError, TypeError, RecursionError) as error:
        cause = _cause(error)
        if reader == "json":
            return read_json_slowly(paths)
        if "corresponds to no data" in str(error):
            raise UserError(f"{', '.join(map(str, paths))}: there are no rows") from error
        raise UserError(f"cannot read {', '.join(map(str, paths))}: {_first_line(cause)}") from error


def read_json_slowly(paths: list[Path]) -> datasets.Dataset:
    """After the fast reader failed: find the malformed line, or mend values whose type differs from row to row.

    A value that cannot be text or a conversation becomes None, which tokenisation then counts as a skipped row.
    """
    rows = [(path, line, row) for path in paths for line, row in json_rows(path)]
    if not rows:
        raise UserError(f"{paths[0]}: there are no rows")
    names = sorted({name for _, _, row in rows for name in row})
    columns: dict[str, list[Any]] = {}
    for name in names:
        raw = [row.get(name) for _, _, row in rows]
        if _are_numbers(raw):
            columns[name] = raw
            continue
        values = [_plain(value) for value in raw]
        types = {type(value) for value in values if value is not None}
        if len(types) > 1:
            first = next(i for i, value in enumerate(values) if value is not None)
            other = next(i for i, v in enumerate(values) if v is not None and type(v) is not type(values[first]))
            path, line, _ = rows[other]
            raise UserError(
                f"{path}:{line}: column {name!r} is a {_type_name(values[other])} here but a "
                f"{_type_name(values[first])} in {rows[first][0].name}:{rows[first][1]}; a column must hold one of "
                "them throughout"
            )
        if types:
            columns[name] = values
    return datasets.Dataset.from_dict(columns)


def _are_numbers(values: list[Any]) -> bool:
    held = [value for value in values if value is not None]
    return bool(held) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in held)


def _plain(value: Any) -> str | list[dict[str, str | None]] | None:
    """The value as text or as a conversation of text, None where it is neither."""
    if isinstance(value, list):
        return [plain_message(message) for message in value]
    return _text(value)


def _text(value: Any) -> str | None:
    """The value if it is text: JSON can spell half a surrogate pair, which no encoding of text has."""
    is_text = isinstance(value, str) and not re.search("[\ud800-\udfff]", value)
    return value if is_text else None


def plain_message(message: Any) -> dict[str, str | None]:
    """`{"role", "content"}` of a message in that layout or ShareGPT's (`from`, `value`); None for what is not text."""
    if not isinstance(message, Mapping):
        return {"role": None, "content": None}
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else None
    return {"role": role, "content": _text(content)}


def _type_name(value: Any) -> str:
    return "text" if isinstance(value, str) else "list of messages"
