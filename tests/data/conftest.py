"""A small byte-level tokenizer trained on text made here, and recipes of the data keys."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mambalign.data import chat
from mambalign.recipe import Recipe

EOS = "<|endoftext|>"


def _sentences() -> list[str]:
    who, does, what = (
        ("Anna", "The cat", "A river"),
        ("sees", "follows", "likes"),
        ("the sea.", "a song!", "two  stones?\n"),
    )
    return [" ".join(words) for words in itertools.product(who, does, what)] * 4


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A factory: byte-level BPE whose offsets are trimmed, as GPT-NeoX's are."""

    def build(*, add_prefix_space: bool = False, bos: str | None = None) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        tokenizer.decoder = decoders.ByteLevel()
        specials = [EOS, "<|padding|>"] + ([bos] if bos else [])
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_sentences(), trainer)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=EOS, bos_token=bos, clean_up_tokenization_spaces=False
        )

    return build


@pytest.fixture
def plain_tokenizer(build_tokenizer: Callable[..., Any]) -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def tokenizer(plain_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    chat.apply_template(plain_tokenizer, "zephyr")
    return plain_tokenizer


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    def make(**keys: Any) -> Recipe:
        return Recipe(**{"max_length": 128, "chat_template": "zephyr", **keys})

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Iterable[Any]], Path]:
    """Write rows (or raw lines) to a file of the test's folder."""

    def write(name: str, rows: Iterable[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def turns() -> Callable[..., list[dict[str, str]]]:
    """`turns("u:hi", "a:hello")` as messages."""

    def make(*texts: str) -> list[dict[str, str]]:
        roles = {"u": "user", "a": "assistant", "s": "system"}
        return [{"role": roles.get(r, r), "content": content} for r, _, content in (t.partition(":") for t in texts)]

    return make
