"""Long files of rows: checked before work begins; results written line by line, appearing whole, and gone on with where
a killed command stopped.

`OUT.partial` holds the lines so far, in the order of the input; when the last is written it becomes `OUT`. What they
were made from, and at the end a summary, is in `OUT.meta.json`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from transformers.utils import logging as hf_logging

from mambalign.data.json_rows import json_rows
from mambalign.models import files
from mambalign.recipe import UserError
from mambalign.support import write_text


class Journal:
    """The output of one command.

    Args:
        out: the file that is to appear.
        made_from: everything that decides its content; a rest of other content is refused.

    `finished` holds the summary if the file is there already, made from the same. Inside the context `written` counts
    the rows that an earlier, interrupted command left, and `earlier()` reads them.

    Raises:
        UserError: `out` or its rest is of something else, or another process is writing it.
    """

    def __init__(self, out: Path, made_from: dict[str, Any]):
        self.out = out.expanduser()
        self.partial = self.out.with_name(f"{self.out.name}.partial")
        self.meta = self.out.with_name(f"{self.out.name}.meta.json")
        self.made_from: dict[str, Any] = json.loads(json.dumps(made_from))
        self.written = 0
        known = files.read_json(self.meta) if self.meta.is_file() else {}
        if (self.out.exists() or self.partial.exists()) and known.get("made_from") != self.made_from:
            before = known.get("made_from") or {}
            differ = sorted(k for k in before.keys() | self.made_from.keys() if before.get(k) != self.made_from.get(k))
            raise UserError(
                f"{self.out} holds, or was to hold, another result (another {', '.join(differ)}); give another --out, "
                f"or delete it, {self.partial.name} and {self.meta.name}"
            )
        self.finished: dict[str, Any] | None = known.get("summary") if self.out.exists() else None

    def __enter__(self) -> Journal:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = self.partial.open("a+b")
        except OSError as error:
            raise UserError(f"{self.out} cannot be written ({error.strerror}); give another --out") from error
        try:
            # Not lockf, which `earlier` would give up by closing the same file.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise UserError(f"another process is writing {self.out}; wait for it, or give another --out") from error
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if line.endswith(b"\n"):  # a kill may have torn the last one
                whole += len(line)
                self.written += 1
        self._file.truncate(whole)
        self._describe({})
        return self

    def earlier(self) -> Iterator[dict[str, Any]]:
        """The rows that were there when the context was entered."""
        with self.partial.open("rb") as file:
            yield from (json.loads(line) for line in islice(file, self.written))

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows; they survive a kill from here on."""
        self._file.write(b"".join(map(_line, rows)))
        self._file.flush()

    def finish(self, summary: dict[str, Any]) -> None:
        """All rows are written: let the file appear."""
        os.fsync(self._file.fileno())
        self._describe({"summary": summary})
        os.replace(self.partial, self.out)

    def _describe(self, more: dict[str, Any]) -> None:
        write_text(self.meta, json.dumps({"made_from": self.made_from, **more}, indent=2) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
        return json.dumps(row).encode() + b"\n"


def check_rows(source: Path, added: Sequence[str], read: Callable[[dict[str, Any], str], Any]) -> int:
    """How many rows `source` has, each of which `read(row, where)` accepts.

    Raises:
        UserError: before any work is done, for the first row that is refused or has one of the keys `added`.
    """
    total = 0
    for line, row in json_rows(source):
        total += 1
        read(row, f"{source}:{line}")
        taken = [key for key in added if key in row]
        if taken:
            raise UserError(f"{source}:{line}: the row has {taken[0]!r} already, which would be lost; rename the key")
    if not total:
        raise UserError(f"{source}: there are no rows")
    return total


def model_fingerprint(path: str) -> str:
    """Which model a folder holds: its config's content, and name, size and time of every weight file (not content:
    that would take minutes of a large one); of an adapter, those of its base model too. A hub id stands for itself."""
    if not files.is_local(path):
        return path
    folder = files.resolve_folder(path)
    adapter = files.is_adapter(folder)
    config = folder / (files.ADAPTER_CONFIG if adapter else files.CONFIG)
    digest = hashlib.sha256(config.read_bytes())
    if adapter:
        digest.update(model_fingerprint(str(files.read_json(config).get("base_model_name_or_path"))).encode())
    for file in [folder / files.ADAPTER_WEIGHTS] if adapter else files.weight_files(folder):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@contextmanager
def progress(total: int, done: int, description: str) -> Iterator[Any]:
    """A bar over rows on a terminal, nothing in a log file; yields it, to `update(n)`."""
    with hf_logging.tqdm(total=total, initial=done, desc=description, disable=not sys.stderr.isatty()) as bar:
        yield bar
