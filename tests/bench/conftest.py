"""Small models on disk with the same tokenizer, text to read, and the verbs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from mambalign.bench import decode, length, measure, perplexity, scan
from mambalign.cli import app
from mambalign.models.checkpoint import save_model
from tests.generation.conftest import pair
from tests.train.conftest import byte_tokenizer

POSITIONS = 64  # that the Transformer was made for


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tiny needs no collection of all that the process holds, which takes a second each time."""
    monkeypatch.setattr(measure, "free_memory", lambda: None)
    for module in (length, scan, decode, perplexity):
        monkeypatch.setattr(module, "free_memory", lambda: None)


@pytest.fixture(scope="session")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "small-mamba"
    save_model(pair("mamba")[1], folder, tokenizer=byte_tokenizer())
    return folder


@pytest.fixture(scope="session")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "small-neox"
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=264, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=POSITIONS,
    )  # fmt: skip
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five documents of 20 to 300 bytes, in two parts each."""
    file = tmp_path_factory.mktemp("bench") / "documents.jsonl"
    words = "a scan reads a token and keeps a state of one size whatever it has read before "
    rows = [
        {"text": (words * 9)[start : start + size // 2], "doc": number}
        for number, size in enumerate((20, 300, 200, 140, 260))
        for start in (number, number + 30)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Any]:
    """Runs `mambalign bench WORDS` with its file in this test's folder; returns (what was written, the outcome)."""

    def run(*words: str) -> tuple[Any, Any]:
        out = tmp_path / "result.json"
        done = CliRunner().invoke(app, ["bench", *map(str, words), "--out", str(out)])
        return (json.loads(out.read_text(encoding="utf-8")) if out.exists() else None), done

    return run
