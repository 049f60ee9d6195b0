"""From a YAML map to a checked dataclass: unknown keys, times, sizes, ranges."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any, TypeVar

from mambalign.support import nearest

T = TypeVar("T")

EXIT_SAVED = 85  # of a stage that a signal stopped after a checkpoint: the same command goes on from there


class ClusterError(ValueError):
    """Something in a pipeline, a profile or on a cluster cannot work. The message names the key and the way out."""


def key(default: Any, parse: Callable[[Any], Any], help: str) -> Any:
    """A key of a map: `parse` turns what YAML gave into its value, or raises ValueError with what it must be."""
    metadata = {"parse": parse, "help": help}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def build(kind: type[T], values: Any, where: str, **given: Any) -> T:
    """A dataclass whose fields were made by `key` from a map; `given` are its other fields.

    Raises:
        ClusterError: not a map, an unknown key (names the nearest), a value that a key's parser refuses.
    """
    known: dict[str, Field[Any]] = {item.name: item for item in fields(kind) if "parse" in item.metadata}  # type: ignore[arg-type]
    for name, value in as_map(values, where).items():
        if name not in known:
            raise ClusterError(
                f"{where}: unknown key {name!r}{nearest(str(name), known)} (there are {', '.join(sorted(known))})"
            )
        if value is None:
            continue
        try:
            given[name] = known[name].metadata["parse"](value)
        except ClusterError as error:
            raise ClusterError(f"{where}: {error}") from error
        except (ValueError, TypeError) as error:
            raise ClusterError(f"{where}: {name} is {value!r}; it must be {error}") from error
    missing = [n for n, f in known.items() if n not in given and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise ClusterError(f"{where}: {missing[0]} is missing: {known[missing[0]].metadata['help']}")
    return kind(**given)


def as_map(values: Any, where: str) -> Mapping[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise ClusterError(f"{where}: this must be a map of `key: value` lines, not {values!r}")
    return values


# ------------------------------------------------------------------------------------------------------------ parsers


def text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or "\n" in str(value):
        raise ValueError("text on one line")
    return str(value)


def block(value: Any) -> str:
    """Shell lines: a text of several lines, or a list of lines."""
    if isinstance(value, list):
        return "\n".join(text(line) for line in value)
    if not isinstance(value, str):
        raise ValueError("lines of text")
    return value.rstrip("\n")


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("a whole number, 0 or more")
    return value


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number")
    return float(value)


def texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise ValueError("a list of texts")
    return tuple(text(item) for item in value)


def numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError("a list of whole numbers")
    return tuple(whole(item) for item in value)


def plain_map(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError("a map")
    return dict(value)


def environment(value: Any) -> dict[str, str]:
    """Names and values; what YAML read as a number or a truth value is written as text again."""
    result = {}
    for name, item in plain_map(value).items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ClusterError(f"env: {name!r} is no name of an environment variable")
        result[name] = str(item).lower() if isinstance(item, bool) else text(item)
        if re.search(r"[\x00-\x1f]", result[name]):
            raise ClusterError(f"env: {name} holds a control character")
    return result


def seconds(value: Any) -> int:
    """Seconds of `90`, `45m`, `4h`, `2d`, `4:00:00`, `1-12:00:00`.

    Example:
        >>> [seconds(text) for text in (90, "45m", "1.5h", "4:00:00", "1-12:00:00")]
        [90, 2700, 5400, 14400, 129600]
    """
    wrong = "a time such as 45m, 4h, 2d, 4:00:00 or 1-12:00:00 (a bare number is seconds)"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(wrong)
    units = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
    written = str(value).strip()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d|)", written):
        result = round(float(match[1]) * units[match[2]])
    elif match := re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)", written):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        result = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    else:
        raise ValueError(wrong)
    if result <= 0:
        raise ValueError(f"{wrong}, above 0")
    return result


def mebibytes(value: Any) -> int:
    """MiB of `64GB`, `64G`, `1.5T`, `20000MB`; a bare number is MiB, as schedulers read it.

    Example:
        >>> [mebibytes(text) for text in ("64GB", "1.5T", 20000, "38 GiB")]
        [65536, 1572864, 20000, 38912]
    """
    wrong = "a size such as 64GB or 20000MB"
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?)?", str(value).strip(), flags=re.IGNORECASE)
    if isinstance(value, bool) or match is None:
        raise ValueError(wrong)
    result = round(float(match[1]) * {"K": 2**-10, "M": 1, "G": 2**10, "T": 2**20}[(match[2] or "M").upper()])
    if result <= 0:
        raise ValueError(f"{wrong}, above 0")
    return result


def span(value: Any) -> tuple[int, int]:
    """(least, most) of `4` or `1-4`.

    Example:
        >>> span(4), span("1-4")
        ((4, 4), (1, 4))
    """
    match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(value))
    if isinstance(value, bool) or match is None:
        raise ValueError("a number, or a range such as 1-4")
    low, high = int(match[1]), int(match[2] or match[1])
    if low > high:
        raise ValueError(f"a range from the smaller to the larger, {high}-{low}")
    return low, high


def one_of(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)}{nearest(str(value), choices)}")
        return str(value)

    return parse


# ------------------------------------------------------------------------------------------------------------- writers


def clock(duration: float) -> str:
    """Seconds as Slurm writes them: `4:00:00`, `1-12:00:00`."""
    minutes, rest = divmod(int(duration), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}-{hours:02}" if days else f"{hours}") + f":{minutes:02}:{rest:02}"


def size(mib: int, suffix: str = "") -> str:
    """MiB in the largest unit that keeps it whole: `size(65536, "B")` is `64GB`."""
    return f"{mib // 1024}G{suffix}" if mib % 1024 == 0 else f"{mib}M{suffix}"
