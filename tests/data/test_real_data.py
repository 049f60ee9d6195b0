"""Statistics of real conversations, preferences and novels; skipped where there are none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mambalign.data import chat
from mambalign.data.mixer import load_mix, tokenize_preferences, tokenize_sft, tokenize_text
from mambalign.data.packing import Collator, PackedRows, best_fit_decreasing


@pytest.fixture
def neox(shared_data: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "data/tokenizer")
    chat.apply_template(tokenizer, "zephyr")
    return tokenizer


def test_conversations(shared_data: Path, neox: Any, make_recipe: Callable[..., Any]) -> None:
    splits = ["train_sft", "test_sft"]
    recipe = make_recipe(dataset_mixer={str(shared_data / "data/sft"): 0.1}, dataset_splits=splits, max_length=2048)
    data = tokenize_sft(load_mix(recipe, "train"), neox, recipe)
    assert data.report["rows"] == 2457 and data.report["skipped"] == 0
    rows = PackedRows(data.dataset, max_length=2048, kind="sequences", seed=0)
    assert rows.fill > 0.99
    assert 8 < len(data.dataset) / len(rows) < 10
    for row in data.dataset.select(range(0, 200, 7)):
        pairs = list(zip(row["input_ids"], row["loss_mask"], strict=True))
        ends = [i for i, (token, mask) in enumerate(pairs) if mask and token == neox.eos_token_id]
        answers = neox.decode(row["input_ids"]).count("<|assistant|>\n")
        assert len(ends) == answers, "every answer's end is trained"
    assert len(load_mix(recipe, "test")) == 756


def test_all_conversations_fill_their_rows(shared_data: Path) -> None:
    """The published figure, with character counts in the place of tokens (about four to one) to be quick."""
    import pyarrow.parquet as pq

    table = pq.read_table(shared_data / "data/sft/train_sft.parquet", columns=["messages"])
    lengths = [min(2048, 20 + sum(len(m["content"]) for m in row) // 4) for row in table.column("messages").to_pylist()]
    bins = best_fit_decreasing(lengths, 2048)
    assert sum(lengths) / (2048 * len(bins)) > 0.998


def test_preferences(shared_data: Path, neox: Any, make_recipe: Callable[..., Any]) -> None:
    recipe = make_recipe(
        dataset_mixer={str(shared_data / "data/dpo"): 0.1},
        dataset_splits=["train_prefs", "test_prefs"],
        max_length=1024,
        max_prompt_length=512,
    )
    mix = load_mix(recipe, "train")
    data = tokenize_preferences(mix, neox, recipe)
    assert data.report["rows"] == 940 and data.report["kept"] > 930
    assert 0 < data.report["truncated"] < 60
    source = dict(zip(mix["row_id"], zip(mix["chosen"], mix["rejected"], strict=True), strict=True))
    checked: Counter[str] = Counter()
    for row in data.dataset.select(range(300)):
        for side, messages in zip(("chosen", "rejected"), source[row["row_id"]], strict=True):
            ids, _ = chat.encode_messages(neox, messages)
            assert len(row["prompt_ids"]) + len(row[f"{side}_ids"]) <= 1024
            if row["prompt_ids"] + row[f"{side}_ids"] == ids:  # not truncated
                checked["whole"] += 1
                checked["handbook's prompt"] += row["prompt_ids"] == chat.encode_prompt(neox, messages[:-1])
    assert checked["whole"] > 560
    assert checked["handbook's prompt"] > 0.98 * checked["whole"]
    rows = PackedRows(data.dataset, max_length=1024, kind="pairs", seed=0)
    (batch,) = Collator("pairs")([rows[i] for i in range(32)])
    assert batch.num_prompt_tokens_saved > 0
    parts = Collator("pairs", max_tokens=4096)([rows[i] for i in range(32)])
    assert all(part.num_tokens <= 4096 for part in parts)
    assert sum(part.num_targets for part in parts) == batch.num_targets


def test_novels(shared_data: Path, neox: Any, make_recipe: Callable[..., Any]) -> None:
    recipe = make_recipe(
        dataset_mixer={str(shared_data / "data/text"): 0.01},
        dataset_splits=["train", "validation"],
        max_length=1024,
        truncation="split",
    )
    data = tokenize_text(load_mix(recipe, "train"), neox, recipe)
    assert data.report["rows"] == 25 and data.report["tokens_lost"] == 0
    pieces = len(data.dataset)
    assert data.report["trained_tokens"] == data.report["tokens"] - pieces
    assert PackedRows(data.dataset, max_length=1024, kind="sequences", seed=0).fill > 0.85
    assert len(load_mix(recipe, "test")) == 31
