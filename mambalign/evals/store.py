"""What a judge has answered, kept so that nothing is asked twice.

A folder of three append-only files of one JSON object a line: `replies.jsonl`, whose rows are verdicts under the hash
of all that was asked; `failures.jsonl`, calls that got no verdict and why, which are asked again; `probes.jsonl`, what
endpoints were found to accept. A row is written at once and synced before it counts, so a killed command loses only
the calls that were under way.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mambalign.recipe import UserError

log = logging.getLogger(__name__)


def content_key(**content: Any) -> str:
    """SHA-256 of `content` as canonical JSON.

    >>> content_key(a=1, b="x") == content_key(b="x", a=1)
    True
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class ReplyStore:
    """The folder, read as it is now; enter the context to write to it.

    Two benchmarks may share a folder, also at different times two judges; two processes at once may not.

    `replies` maps keys to rows, `failures` keys without a reply to their last failure, `probes` keys to the last probe.
    Of a reply that is there twice the first counts. What a kill or a full disk left of a line is skipped aloud.

    Raises:
        UserError: on entering, when another process writes the folder or it cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder = folder.expanduser()
        self._read()
        self._appended = self._synced = 0

    def _read(self) -> None:
        self.replies: dict[str, dict[str, Any]] = {}
        for row in _rows(self.folder / "replies.jsonl"):
            self.replies.setdefault(row["key"], row)
        self.failures = {row["key"]: row for row in _rows(self.folder / "failures.jsonl")}
        self.failures = {key: row for key, row in self.failures.items() if key not in self.replies}
        self.probes = {row["key"]: row for row in _rows(self.folder / "probes.jsonl")}

    def __enter__(self) -> ReplyStore:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock_file = _appendable(self.folder / "lock")
            self._files = {
                name: _appendable(self.folder / f"{name}.jsonl") for name in ("replies", "failures", "probes")
            }
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written ({error.strerror}); give another --store") from error
        try:
            # A file of its own, since closing any handle of a POSIX-locked file, as `_read` does, would let go of it.
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._close()
            raise UserError(
                f"another process writes {self.folder}; wait for it, or give another --store (which asks all anew)"
            ) from error
        self._read()  # what another process wrote until a moment ago
        for file in self._files.values():
            _cut_torn_line(file)
        self._sync_lock = asyncio.Lock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sync()
        self._close()

    def _close(self) -> None:
        for file in (*self._files.values(), self._lock_file):
            file.close()

    async def add_reply(self, row: dict[str, Any]) -> None:
        """Append; returns when the row is on the disk. Calls at the same time share a sync."""
        self._append("replies", row)
        self.replies[row["key"]] = row
        self.failures.pop(row["key"], None)
        mine = self._appended
        async with self._sync_lock:
            if self._synced < mine:
                covers = self._appended
                await asyncio.to_thread(self._sync)
                self._synced = covers

    def add_failure(self, row: dict[str, Any]) -> None:
        """Append; of no consequence beyond a report, so not synced."""
        self._append("failures", row)
        self.failures[row["key"]] = row

    def add_probe(self, row: dict[str, Any]) -> None:
        self._append("probes", row)
        self.probes[row["key"]] = row

    def _append(self, name: str, row: dict[str, Any]) -> None:
        file = self._files[name]
        line = json.dumps(row).encode() + b"\n"
        before = file.seek(0, os.SEEK_END)
        try:
            written = file.write(line)  # unbuffered: it survives a kill of this process from here on
            while written < len(line):  # the disk is nearly full: go on, or learn so
                written += file.write(line[written:])
        except OSError:
            file.truncate(before)  # a half line would spoil the next
            raise
        self._appended += 1

    def _sync(self) -> None:
        os.fsync(self._files["replies"].fileno())


def _appendable(path: Path) -> IO[bytes]:
    return path.open("a+b", buffering=0)


def _cut_torn_line(file: IO[bytes]) -> None:
    """Take off what a kill left behind the last newline."""
    size = end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    damaged = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                continue  # torn by a kill, or being written right now
            try:
                row = json.loads(line)
                damaged += 0 if isinstance(row, dict) and isinstance(row.get("key"), str) else 1
            except ValueError:
                damaged += 1
                continue
            if isinstance(row, dict) and isinstance(row.get("key"), str):
                yield row
    if damaged:
        log.warning("%s: %d lines are damaged and do not count; what they held is asked again", path, damaged)
