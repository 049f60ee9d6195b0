"""Perplexity: streamed is whole, windows are transformers' loss, documents are what was asked for."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import transformers

from mambalign.bench import contestants, perplexity
from mambalign.bench.perplexity import Options, by_position, documents_of, edges, stream_nll, whole_nll, windows_nll
from mambalign.recipe import UserError
from tests.generation.conftest import V, pair
from tests.train.conftest import byte_tokenizer

LENGTH = 150


@pytest.fixture(params=["mamba", "falcon_mamba", "mamba2"])
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """(transformers', ours) with the same weights."""
    return pair(request.param)


def some_ids(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_streamed_is_whole(models: tuple[Any, Any], chunk: int) -> None:
    plain, ours = models
    ids = some_ids(length=40 if chunk == 1 else LENGTH)
    with torch.no_grad():
        logits = plain(ids, use_cache=False).logits[:, :-1]
    exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    found = stream_nll(ours, ids, chunk)
    assert found.shape == (2, ids.shape[1] - 1)
    assert float((found.flatten() - exact).abs().max()) < 1e-5


def test_perplexity_is_exp_of_the_loss_of_transformers(models: tuple[Any, Any]) -> None:
    plain, ours = models
    ids = some_ids()
    with torch.no_grad():
        loss = float(plain(ids, labels=ids, use_cache=False).loss)
        windows = ids[:, :120].reshape(-1, 30)
        window_loss = float(plain(windows, labels=windows, use_cache=False).loss)
    found = perplexity.interval(stream_nll(ours, ids, 33).double().mean(1).tolist())
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    for chunk in (8, 64, 10_000):  # a part of a window at a time, some windows, all
        nll = windows_nll(ours, ids[:, :120], 30, chunk, streamed=True)
        assert nll.shape == (2, 4 * 29)
        assert math.exp(float(nll.mean())) == pytest.approx(math.exp(window_loss), rel=1e-5)


def test_a_transformer_read_whole_has_its_own_loss(neox: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(neox).eval()
    ids = some_ids()
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert float(whole_nll(model, ids).mean()) == pytest.approx(loss, rel=1e-5)
    window = windows_nll(model, ids, 50, 64, streamed=False)
    assert float(window[0, :49].mean()) == pytest.approx(float(whole_nll(model, ids[:1, :50]).mean()), rel=1e-5)


def test_pieces_are_all_that_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair("mamba")
    seen: list[int] = []
    forward = ours.backbone.forward
    monkeypatch.setattr(ours.backbone, "forward", lambda ids, **rest: seen.append(ids.numel()) or forward(ids, **rest))
    stream_nll(ours, some_ids(3, 100), 30)
    assert max(seen) == 30 and sum(seen) == 3 * 99


def test_buckets_hold_every_position_once() -> None:
    assert edges(32) == [32] and edges(33) == [32, 33] and edges(128) == [32, 64, 128]
    nll = torch.arange(1, 100).float().expand(3, -1)  # of the token that has seen so many
    rows = by_position(nll)
    assert [(row["from"], row["to"]) for row in rows] == [(1, 32), (32, 64), (64, 100)]
    assert [row["nll"] for row in rows] == [16.0, 47.5, 81.5]
    assert rows[0]["perplexity_low"] == rows[0]["perplexity_high"] == pytest.approx(math.exp(16))


def test_intervals_are_students_over_documents() -> None:
    row = perplexity.interval([1.0, 2.0, 3.0])  # deviation 1, t = 4.30 with 2 degrees of freedom
    half = 4.30 / math.sqrt(3)
    assert row["perplexity"] == pytest.approx(math.exp(2))
    assert math.log(row["perplexity_low"]) == pytest.approx(2 - half, rel=1e-3)
    assert math.log(row["perplexity_high"]) == pytest.approx(2 + half, rel=1e-3)
    assert perplexity.interval([2.0])["perplexity_low"] is None
    assert perplexity.interval([1e4])["perplexity"] == math.inf  # blown up, not a crash


def options(text: Path, **changes: Any) -> Options:
    return Options("m", str(text), **{"lengths": (64, 128)} | changes)


def test_documents_are_whole_unless_asked_for_otherwise(text: Path) -> None:
    tokenizer = byte_tokenizer()
    ids, facts = documents_of(options(text), tokenizer)  # of 10 rows two have 150 bytes, two 130
    assert ids.shape == (4, 128) and facts == {"documents": 4, "too_short": 6, "joined": None}
    assert tokenizer.decode(ids[0]).startswith(" scan reads")
    ids, facts = documents_of(options(text, join="doc", lengths=(200,)), tokenizer)
    assert ids.shape == (3, 200) and facts["too_short"] == 2 and "'doc'" in facts["joined"]
    ids, facts = documents_of(options(text, concatenate=True, lengths=(400,)), tokenizer)
    assert ids.shape == (2, 400) and "concatenated" in facts["joined"]
    assert int((ids[0] == tokenizer.eos_token_id).sum()) > 2  # documents end where they end
    assert documents_of(options(text, documents=1), tokenizer)[0].shape == (1, 128)


def test_of_one_long_text_no_more_is_cut_than_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten million tokens, laid end to end: cutting them all took minutes."""
    long = tmp_path / "long.txt"
    long.write_text("x", encoding="utf-8")
    encoded = [1] * 10_000_000
    monkeypatch.setattr(perplexity, "PlainText", lambda _: SimpleNamespace(encode=lambda *_, **__: encoded))
    began = time.process_time()
    ids, _ = documents_of(options(long, concatenate=True), byte_tokenizer())
    assert ids.shape == (64, 128) and time.process_time() - began < 60


def test_too_long_a_length_is_refused_with_the_way_out(text: Path) -> None:
    with pytest.raises(UserError, match=r"--lengths 4096: no document .* \(the longest of 10 has 151.*--concatenate"):
        documents_of(options(text, lengths=(4096,)), byte_tokenizer())
    with pytest.raises(UserError, match="all 10 together have 9"):
        documents_of(options(text, lengths=(4096,), concatenate=True), byte_tokenizer())
    with pytest.raises(UserError, match=r"no column 'txt'; there are .*did you mean 'text'"):
        documents_of(options(text, column="txt"), byte_tokenizer())
    with pytest.raises(UserError, match="holds int, not text"):
        documents_of(options(text, column="doc"), byte_tokenizer())
    with pytest.raises(UserError, match=r"^--data: .*none\.jsonl' does not exist"):
        documents_of(options(text.with_name("none.jsonl")), byte_tokenizer())


def test_a_table_is_read_as_lines_are(text: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in text.read_text().splitlines()]
    (tmp_path / "data").mkdir()
    for split, some in (("train", rows[:1]), ("validation", rows)):
        datasets.Dataset.from_list(some).to_parquet(tmp_path / "data" / f"{split}.parquet")
    expected, facts = documents_of(options(text, join="doc"), byte_tokenizer())
    for place in (tmp_path / "data", tmp_path / "data" / "validation.parquet"):
        ids, found = documents_of(options(place, join="doc"), byte_tokenizer())
        assert torch.equal(ids, expected) and found == facts


def test_text_files_are_one_document(tmp_path: Path) -> None:
    novel = tmp_path / "novel.txt"
    novel.write_text("It was a dark and stormy night. " * 20, encoding="utf-8")
    ids, facts = documents_of(options(novel), byte_tokenizer())
    assert ids.shape == (1, 128) and facts["too_short"] == 0
    novel.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8 text, at byte 3"):
        documents_of(options(novel), byte_tokenizer())


def test_what_a_transformer_can_read_is_said() -> None:
    small = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    rotary = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**small, intermediate_size=8, max_position_embeddings=64)
    )
    learned = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=64)
    )
    assert contestants.reach(rotary, 256) == (256, "positions run on past 64 (rotary embeddings, default)")
    can, note = contestants.reach(learned, 256)
    assert can == 64 and "cannot read further" in note
    assert contestants.reach(learned, 64) == (64, "within its training length")


def test_a_transformer_out_of_memory_is_read_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    def limited(model: Any, ids: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > 64:
            raise torch.OutOfMemoryError
        return torch.ones(ids.shape[0], ids.shape[1] - 1)

    monkeypatch.setattr(perplexity, "whole_nll", limited)
    rows = perplexity.read(SimpleNamespace(), some_ids(2, 128), (32, 64, 128), 1024, False, math.inf)
    assert max(row["to"] for row in rows if row["kind"] == "position") == 64
    assert [row["length"] for row in rows if row["kind"] == "reset"] == [32, 64]


def test_the_verb(bench: Callable[..., Any], mamba: Path, neox: Path, text: Path) -> None:
    words = ("perplexity", mamba, "--transformer", neox, "--data", text, "--join", "doc", "--lengths", "32..128")
    written, done = bench(*words)
    assert done.exit_code == 0, done.output
    for who, name in (("ours", "small-mamba"), ("transformer", "small-neox")):
        rows = [row for row in written["rows"] if row["who"] == who]
        assert [row["length"] for row in rows if row["kind"] == "reset"] == [32, 64, 128]
        assert [row["to"] for row in rows if row["kind"] == "position"] == [32, 64, 128]
        assert {(row["model"], row["documents"]) for row in rows} == {(name, 4)}
        assert all(row["perplexity_low"] < row["perplexity"] < row["perplexity_high"] for row in rows)
    assert {row["training_length"] for row in rows} == {64}
    assert "rotary" in written["settings"]["notes"]["small-neox"] and "'doc'" in written["settings"]["joined"]


def test_other_tokens_are_refused(
    bench: Callable[..., Any], mamba: Path, neox: Path, text: Path, tmp_path: Any
) -> None:
    other = tmp_path / "other"
    transformers.AutoModelForCausalLM.from_pretrained(neox).save_pretrained(other)
    tokenizer = json.loads((neox / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["o"] = vocabulary["o"], vocabulary["e"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (other / "tokenizer_config.json").write_text((neox / "tokenizer_config.json").read_text())
    written, done = bench("perplexity", mamba, "--transformer", other, "--data", text, "--lengths", "32,64")
    assert written is None and done.exit_code == 2 and "its tokenizer makes other tokens" in done.output
