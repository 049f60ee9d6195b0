"""From text to checked values: YAML files, command-line overrides, types.

`schema` says which keys exist; this module knows only how to read them.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from mambalign.support import nearest


class UserError(ValueError):
    """Something the user wrote cannot work. The message names the key, the value and the way out."""


# --- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `5e-7` as a number (YAML 1.2) and refuses a key written twice in one map."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *shared`; its keys may be overridden
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=key_node.start_mark)
            if key in seen:
                problem = f"key {key!r} is given twice (first in line {seen[key]})"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)


# PyYAML follows YAML 1.1, where a float needs a dot and a signed exponent, so 5e-7 would be text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; `UserError` with file and line when it is not YAML or repeats a key."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}" if mark else source
        begun = error.context_mark
        context = f" ({error.context} begun in line {begun.line + 1})" if error.problem and begun else ""
        raise UserError(f"{where}: {error.problem or error.context}{context}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not readable as YAML: {error}") from error


def read_yaml_map(path: Path, what: str = "recipe") -> dict[str, Any]:
    """The map in a YAML file, which is a `what`; an empty file is an empty map."""
    if path.is_dir():
        # As deep as recipes/<model>/<stage>/ and no further: this may be a home folder.
        found = islice((p for folders in ("", "*/", "*/*/") for p in path.glob(f"{folders}*.yaml")), 6)
        names = ", ".join(sorted(map(str, found)))
        hint = f"; it holds {names}" if names else ""
        raise UserError(f"{path} is a folder, a {what} is a YAML file{hint}")
    if not path.exists():
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"{what} {path} does not exist{nearest(path.name, siblings)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a UTF-8 text file, a {what} is YAML") from error
    value = parse_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: a {what} is a map of `key: value` lines, this is {_describe(value)}")
    for key in value:
        if not isinstance(key, str):
            raise UserError(f"{path}: key {key!r} must be text")
    return value


def read_recipe_map(path: Path, _chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The map of a recipe with its `extends` files below it: later files win, key by key, maps are not merged.

    `extends` is a path or a list of paths relative to the file that names them.
    """
    resolved = path.resolve()
    if resolved in _chain:
        raise UserError(f"{path}: `extends` goes in a circle: {' -> '.join(str(p) for p in (*_chain, resolved))}")
    own = read_yaml_map(path)
    parents = own.pop("extends", None) or []
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise UserError(f"{path}: extends must be a path or a list of paths, not {parents!r}")
    merged: dict[str, Any] = {}
    for parent in parents:
        merged |= read_recipe_map(path.parent / parent, (*_chain, resolved))
    return merged | own


# --- command line ----------------------------------------------------------------------------------------------------


def split_overrides(overrides: Sequence[str]) -> list[tuple[str, list[str] | None]]:
    """`["--a", "1", "--b=2", "--c"]` -> `[("a", ["1"]), ("b", ["2"]), ("c", None)]`; `--a-b` is `a_b`."""
    result: list[tuple[str, list[str] | None]] = []
    for token in overrides:
        if token.startswith("--") and len(token) > 2:
            name, sep, value = token[2:].partition("=")
            head, dot, rest = name.partition(".")
            result.append((head.replace("-", "_") + dot + rest, [value] if sep else None))
        elif not result:
            raise UserError(f"{token!r} is not an option; write overrides as --key value or --key=value")
        else:
            key, values = result[-1]
            result[-1] = (key, [*(values or []), token])
    return result


def set_nested(target: dict[str, Any], path: str, value: Any, key: str) -> None:
    """Set `path` inside a map whose keys may hold dots themselves (`my.jsonl`): existing keys win, longest first."""
    while path not in target:
        prefixes = [k for k in target if isinstance(k, str) and path.startswith(k + ".")]
        if not prefixes:
            break
        head = max(prefixes, key=len)
        if not isinstance(target[head], dict):
            raise UserError(f"--{key}.{path}: {key}.{head} is {target[head]!r}, not a map that could hold a key")
        target[head] = dict(target[head])
        target, path = target[head], path[len(head) + 1 :]
    target[path] = value


# --- types -----------------------------------------------------------------------------------------------------------

_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
_NONE = {"", "null", "none", "~"}


def _describe(value: Any) -> str:
    names = {bool: "yes or no", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a map"}
    return "nothing" if value is None else f"{names.get(type(value), type(value).__name__)} ({value!r})"


def type_name(annotation: Any) -> str:
    """The type of a key in a user's words: `list[str] | None` -> "a list of texts, or null"."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return ", or ".join(type_name(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin is list:
        return "a list of texts"
    names: dict[Any, str] = {
        int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"
    }  # fmt: skip
    return names.get(annotation, "a map")


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
        return value.lower() in _TRUE
    raise ValueError


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"[-+]?[\d_]+", value.strip()) else _to_int(float(value))
    if value != int(value):
        raise ValueError
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _to_str(value: Any) -> str:
    # A bare number is a fair way to write a name (`model_revision: 1234567`); yes/no is not: YAML reads `no` as false.
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    return str(value)


def _to_list(value: Any) -> list[str]:
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            value = parse_yaml(text, "a list")
        else:
            value = [] if text.lower() in _NONE else [part.strip() for part in text.split(",")]
    if not isinstance(value, list):
        raise ValueError
    return [_to_str(v) for v in value]


def _to_dict(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.strip().startswith("{"):
        value = parse_yaml(value, "a map")
    if not isinstance(value, dict):
        raise ValueError
    return {_to_str(k): v for k, v in value.items()}


def _to_choice(value: Any, choices: tuple[Any, ...]) -> Any:
    if value is False:  # YAML 1.1 reads a bare `no` or `off` as false
        value = next((word for word in ("no", "off") if word in choices), value)
    if isinstance(value, str) and value in choices:
        return value
    raise ValueError


_CONVERTERS: dict[Any, Callable[[Any], Any]] = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}


def _convert(value: Any, annotation: Any) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if type(None) in args and (value is None or (isinstance(value, str) and value.lower() in _NONE)):
            return None
        for option in args:
            try:
                return _convert(value, option)
            except (ValueError, OverflowError):
                continue
        raise ValueError
    if origin is Literal:
        return _to_choice(value, args)
    if origin is list:
        return _to_list(value)
    if origin is dict:
        return _to_dict(value)
    if annotation is type(None):
        raise ValueError
    return _CONVERTERS[annotation](value)


def coerce(key: str, value: Any, annotation: Any) -> Any:
    """`value` as the type of `key`; `UserError` naming key, value and the type expected."""
    try:
        return _convert(value, annotation)
    except UserError:
        raise
    except (ValueError, OverflowError) as error:
        literals = [a for a in (annotation, *get_args(annotation)) if get_origin(a) is Literal]
        hint = nearest(str(value), [str(c) for a in literals for c in get_args(a)])
        raise UserError(f"{key} must be {type_name(annotation)}, not {_describe(value)}{hint}") from error


def takes(annotation: Any, kind: type) -> bool:
    """Whether a key of this type may be a `kind`, which is dict or list."""
    return any(get_origin(option) is kind for option in (annotation, *get_args(annotation)))


def apply_override(
    values: dict[str, Any], name: str, words: list[str] | None, types: Mapping[str, Any], key_help: Callable[[str], str]
) -> None:
    """Put `--name words` of a command line into a map of keys, which have these types and help texts."""
    key, dot, path = name.partition(".")
    if dot:
        target = values.get(key) or {}
        if not isinstance(target, dict) or (key in types and not takes(types[key], dict)):
            raise UserError(f"--{name}: {key} is not a map that could hold {path!r}")
        text = " ".join(words or ["true"])
        target = dict(target)
        set_nested(target, path, parse_yaml(text, f"--{name}"), key)
        values[key] = target
        return
    if words is None and types.get(key, bool) not in (bool, bool | None):
        raise UserError(f"--{name} needs a value: {key_help(key)}")
    value: Any = words or ["true"]
    values[key] = value[0] if len(value) == 1 else value
    if len(value) > 1 and key in types and not takes(types[key], list):
        raise UserError(f"--{name} takes one value, not {len(value)}: {' '.join(value)!r}")


def seconds(key: str, text: str) -> float:
    """Seconds of "4h", "1h30m", "90m", "45s", and of Slurm's "[days-]hours:minutes:seconds".

    >>> seconds("max_runtime", "1h30m"), seconds("max_runtime", "1-00:00:30")
    (5400.0, 86430.0)

    Raises:
        UserError: `text` is no time above zero. A bare number, which schedulers read in different units, is none.
    """
    units = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text.strip())
    match = units or clock
    parts = [int(part or 0) for part in match.groups()] if match else []
    total = sum(part * unit for part, unit in zip(parts, (86400, 3600, 60, 1), strict=False))
    if not total:
        raise UserError(f"{key}: {text!r} is no time; write it like 4h, 90m, 1h30m or, in quotes, '04:00:00'")
    return float(total)
