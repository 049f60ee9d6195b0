"""Benchmark files: pinned, whole or absent, resumable, found under the names people give them."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mambalign.evals.data import FILES, RECEIPT, DataFile, fetch_data, find_data
from mambalign.recipe import UserError

CONTENT = bytes(range(256)) * 20


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """Serves `content`; cuts the first `cut` answers in half; remembers the ranges asked for."""
    state = SimpleNamespace(content=CONTENT, cut=0, ranges=[], status=None, url="", resumes=True)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.ranges.append(asked)
            if state.status:
                self.send_error(state.status)
                return
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and state.resumes else 0
            if start >= len(state.content):
                self.send_error(416)
                return
            body = state.content[start:]
            self.send_response(206 if asked and state.resumes else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if state.cut:
                state.cut -= 1
                body = body[: len(body) // 2]
            self.wfile.write(body)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/f.json"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def entry(server: SimpleNamespace, sha256: str | None = hashlib.sha256(CONTENT).hexdigest()) -> dict[str, DataFile]:
    return {"a file": DataFile("sub/f.json", server.url, sha256, "CC-BY-NC-4.0")}


def test_a_broken_connection_is_gone_on_with(server: SimpleNamespace, tmp_path: Path) -> None:
    server.cut = 1
    with pytest.raises(UserError, match="run the same command again"):
        fetch_data(tmp_path, files=entry(server), report=lambda line: None)
    assert not (tmp_path / "sub/f.json").exists()
    said: list[str] = []
    (path,) = fetch_data(tmp_path, files=entry(server), report=said.append)
    assert path.read_bytes() == CONTENT and server.ranges[-1] == f"bytes={len(CONTENT) // 2}-"
    assert "not for commercial use" in said[-1]
    fetch_data(tmp_path, files=entry(server), report=said.append)
    assert len(server.ranges) == 2, "what is there is checked, not fetched"


def test_a_server_that_cannot_resume_starts_over(server: SimpleNamespace, tmp_path: Path) -> None:
    server.resumes = False
    partial = tmp_path / "sub/f.json.partial"
    partial.parent.mkdir()
    for rest in (b"of something else", CONTENT + b"too long"):
        partial.write_bytes(rest)
        (path,) = fetch_data(tmp_path, files=entry(server), report=lambda line: None)
        assert path.read_bytes() == CONTENT
        path.unlink()
    server.resumes = True
    partial.write_bytes(CONTENT + b"too long")
    fetch_data(tmp_path, files=entry(server), report=lambda line: None)


def test_another_content_is_refused(server: SimpleNamespace, tmp_path: Path) -> None:
    server.content = b"changed"
    with pytest.raises(UserError, match="is not the pinned a file"):
        fetch_data(tmp_path, files=entry(server), report=lambda line: None)
    assert not (tmp_path / "sub/f.json").exists()
    (tmp_path / "sub/f.json").write_bytes(b"the user's own")
    with pytest.raises(UserError, match="delete the file"):
        fetch_data(tmp_path, files=entry(server), report=lambda line: None)
    assert (tmp_path / "sub/f.json").read_bytes() == b"the user's own"


def test_an_unknown_hash_is_recorded_and_held_to(server: SimpleNamespace, tmp_path: Path) -> None:
    said: list[str] = []
    (path,) = fetch_data(tmp_path, files=entry(server, None), report=said.append)
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert "no SHA-256 was known" in said[0] and digest in said[0]
    assert json.loads((tmp_path / RECEIPT).read_text()) == {"sub/f.json": digest}
    path.unlink()
    server.content = b"changed"
    with pytest.raises(UserError, match="is not the pinned"):
        fetch_data(tmp_path, files=entry(server, None), report=said.append)


def test_no_server_and_no_file_are_sentences(server: SimpleNamespace, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(UserError, match="HTTP 404"):
        fetch_data(tmp_path, files=entry(server), report=print)
    closed = {"x": DataFile("x", "http://127.0.0.1:9/x", None, "Apache-2.0")}
    with pytest.raises(UserError, match="--data-dir"):
        fetch_data(tmp_path, files=closed, report=print)
    with pytest.raises(UserError, match=r"fetch-data.*--data-dir"):
        find_data("mt-bench questions", tmp_path)
    with pytest.raises(UserError, match="no benchmark file 'mt-bench question'"):
        find_data("mt-bench question", tmp_path)


def test_files_are_found_under_their_usual_names(tmp_path: Path) -> None:
    for place in ("mt_bench/question.jsonl", "question.jsonl", "mt_bench/question.jsonl.gz"):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(b"{}") if place.endswith("gz") else b"{}")
        assert find_data("mt-bench questions", tmp_path) == path
        path.unlink()


def test_every_file_is_pinned() -> None:
    assert len({file.path for file in FILES.values()}) == len(FILES) == 9
    for file in FILES.values():
        assert file.sha256 is not None and len(file.sha256) == 64
        assert file.url.startswith("https://") and "/main/" not in file.url
