"""Rows of JSON files, with errors that name file and line. Imports nothing heavy."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from mambalign.recipe import UserError


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a JSON-lines file, or of a `.json` file that holds one array (lines are then row numbers).

    Either may be compressed with gzip, whatever its name.

    Raises:
        UserError: naming file and line of what is not UTF-8, not JSON, or not an object; a damaged archive.
    """
    with _open(path) as file:
        try:
            start = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
            file.seek(0)
            if start == b"[":
                entries: Iterable[tuple[int, Any]] = enumerate(_decode(path, file.read(), 0), start=1)
            else:
                lines = ((number, line.rstrip()) for number, line in enumerate(file, start=1) if line.strip())
                entries = ((number, _decode(path, line, number)) for number, line in lines)
            for number, row in entries:
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: a row must be a JSON object, this is {json.dumps(row)[:60]}")
                yield number, row
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}: the gzip archive is cut off or damaged; copy or download it again") from error


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path, "rb")) if compressed else path.open("rb")


def _decode(path: Path, raw: bytes, line: int) -> Any:
    """The JSON of one line, or of a whole file where `line` is 0."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = line or raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 text, at byte {raw[error.start]:#x}; save the file as UTF-8"
        ) from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = text[max(0, error.pos - 20) : error.pos + 20].strip()
        raise UserError(
            f"{path}:{line + error.lineno - 1 if line else error.lineno}: malformed JSON: {error.msg} at column "
            f"{error.colno}, near {place!r}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{path}:{line or 1}: the JSON is nested too deeply to be read") from error
