"""The GPU benchmark scripts run from end to end on a CPU: tiny shapes, and a stand-in for the peer."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mambalign.ops import causal_conv1d
from tests.bench import standin
from tests.bench.standin import MambaLMHeadModel
from tests.train.conftest import byte_tokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = (
    "common",
    "context_pair",
    "ops",
    "train_step",
    "real_data",
    "sft_real",
    "dpo_real",
    "long_context",
    "plan",
    "plot",
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script as its directory's own, with the stand-in for the peer beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    standin.install(monkeypatch)
    before = {name: sys.modules.pop(name, None) for name in SCRIPTS}
    yield importlib.import_module
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What was written; the plot beside it is a picture."""
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    written = json.loads(path.read_text())
    assert written["benchmark"] == path.stem and written["environment"]["mamba-ssm"] == "of unknown version"
    return written["rows"]


@pytest.fixture
def data(script: Callable[[str], ModuleType], tmp_path: Path) -> SimpleNamespace:
    """Two batches of conversations, and of pairs, of a few tokens each."""
    rng = np.random.default_rng(0)

    def some(count: int, least: int, most: int) -> list[list[int]]:
        return [rng.integers(1, 512, rng.integers(least, most)).tolist() for _ in range(count)]

    ids = some(32, 2, 30)
    masks = [[0] * (len(row) // 2) + [1] * (len(row) - len(row) // 2) for row in ids]
    script("real_data").save(tmp_path / "sft.npz", {"input_ids": ids, "loss_mask": masks})
    prompts = some(32, 1, 12)
    prompts[5] = prompts[4]
    pairs: dict[str, Any] = {"prompt_ids": prompts}
    for side in ("chosen", "rejected"):
        pairs[f"{side}_ids"] = some(32, 2, 20)
        pairs[f"{side}_mask"] = [[1] * len(row) for row in pairs[f"{side}_ids"]]
    script("real_data").save(tmp_path / "dpo.npz", pairs)
    return SimpleNamespace(sft=tmp_path / "sft.npz", dpo=tmp_path / "dpo.npz", ids=ids, pairs=pairs)


def test_real_data_survives_the_file(script: Callable[[str], ModuleType], data: SimpleNamespace) -> None:
    load = script("real_data").load
    loaded = load(data.dpo)
    assert [pair["index"] for pair in loaded] == list(range(32))
    for name, rows in data.pairs.items():
        assert [pair[name].tolist() for pair in loaded] == rows
    assert [row["input_ids"].tolist() for row in load(data.sft, 3)] == data.ids[:3]
    with pytest.raises(SystemExit, match="makes it"):
        load(data.sft.with_name("none.npz"))


def test_ops(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    script("ops").main(["--tiny", "--repeats", "1", "--json", str(tmp_path / "ops.json")])
    seen = {(row["op"], row["who"]) for row in rows_of(tmp_path / "ops.json")}
    assert {who for op, who in seen if op == "causal_conv1d"} == {"ours", "causal-conv1d"}
    ops = {"causal_conv1d", "token_logps", "token_logps, sum", "embedding", "add + rms_norm"}
    assert len(seen) == 10 and {op for op, _ in seen} == ops


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(lambda: 1.02, "further off"), (lambda: 1 + 1e-6 * float(torch.rand(())), "other bits")],
    ids=["wrong", "not repeatable"],
)
def test_ops_refuse_numbers(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, wrong: Callable[[], float], message: str
) -> None:
    def conv(x: Tensor, weight: Tensor, bias: Tensor, backend: str = "auto", **rest: Any) -> Tensor:
        y = causal_conv1d(x, weight, bias, backend=backend, **rest)
        return y if backend == "torch" else y.float() * wrong()

    ops = script("ops")
    monkeypatch.setattr(ops, "causal_conv1d", conv)
    monkeypatch.setattr(ops, "BF16", torch.float32)
    with pytest.raises(SystemExit, match=message):
        ops.check_all(2, 16, 150)


def test_train_step(
    script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    script("train_step").main(["--tiny", "--repeats", "1", "--json", str(tmp_path / "train_step.json")])
    rows = rows_of(tmp_path / "train_step.json")
    assert [row["who"] for row in rows] == ["ours", "mamba-ssm", "transformer"] * 2 + ["ours"]
    assert "x mamba-ssm" in capsys.readouterr().out
    monkeypatch.setattr(MambaLMHeadModel, "error", 0.01)
    with pytest.raises(SystemExit, match="losses differ"):
        script("train_step").main(["--tiny", "--repeats", "1", "--json", str(tmp_path / "train_step.json")])


def test_long_context(script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long_context, file = script("long_context"), tmp_path / "long_context.json"
    options = ["--tiny", "--repeats", "1", "--json", str(file)]
    long_context.main(options)
    written = json.loads(file.read_text())
    ways = {"exact", "truncated", "whole", "whole, recomputed"}
    assert {(row["length"], row["who"]) for row in written["rows"]} == {(n, w) for n in (64, 256, 512) for w in ways}
    assert 0 < written["largest_gradient_error"] < 1e-5
    monkeypatch.setattr(long_context, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match="no numbers"):
        long_context.main(options)


def test_training_cases_cover_what_is_claimed(script: Callable[[str], ModuleType]) -> None:
    """Lengths 2k to 131k at 130m, to 32k at 2.8b, with all contestants; both precisions at 2k."""
    cases = script("train_step").CASES
    of_all = {(case.size, case.rows, case.length, case.weights) for case in cases if len(case.who) == 3}
    claimed = [("130m", 16, 2048), ("130m", 4, 8192), ("130m", 1, 32768), ("130m", 1, 131072)]
    claimed += [("2.8b", 4, 2048), ("2.8b", 1, 8192), ("2.8b", 1, 32768)]
    assert {(*case, "bf16") for case in claimed} <= of_all
    assert ("130m", 16, 2048, "fp32 + autocast") in of_all


def test_sft_real(script: Callable[[str], ModuleType], data: SimpleNamespace, tmp_path: Path, monkeypatch: Any) -> None:
    arguments = ["--tiny", "--repeats", "1", "--data", str(data.sft), "--json", str(tmp_path / "sft_real.json")]
    script("sft_real").main(arguments)
    rows = rows_of(tmp_path / "sft_real.json")
    assert [row["who"] for row in rows] == ["ours, packed", "ours, padded", "mamba-ssm, padded"] * 2
    assert rows[0]["tokens"] == sum(map(len, data.ids))
    monkeypatch.setattr(MambaLMHeadModel, "error", 0.01)
    with pytest.raises(SystemExit, match="more than rounding"):
        script("sft_real").main(arguments)


def test_dpo_real(script: Callable[[str], ModuleType], data: SimpleNamespace, tmp_path: Path, monkeypatch: Any) -> None:
    arguments = ["--tiny", "--repeats", "1", "--data", str(data.dpo), "--multi-turn", str(data.dpo)]
    arguments += ["--json", str(tmp_path / "dpo_real.json")]
    script("dpo_real").main(arguments)
    rows = rows_of(tmp_path / "dpo_real.json")
    steps = [row["who"][:2] for row in rows if row["data"] == "pairs"]
    assert steps == ["ma", "a:", "b:", "c:", "d:", "e:", "e,", "e,", "re"]
    assert [row["who"][:2] for row in rows if row["data"] == "multi-turn"] == ["d:", "e:"]
    with_reference = [row["weights_gib"] for row in rows[:3]]
    assert with_reference == [2 * rows[3]["weights_gib"]] * 3
    monkeypatch.setattr(MambaLMHeadModel, "error", 0.01)
    with pytest.raises(SystemExit, match="more than rounding"):
        script("dpo_real").main(arguments)


def test_a_pair_to_read_long_documents_with(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are trained on the same batches, the documents held out are whole, and the verb reads them with both."""
    from mambalign.bench import perplexity

    text, made = tmp_path / "text.jsonl", script("context_pair")
    rows = [{"text": f"part {part} of document {doc} " * 9, "doc": doc} for doc in range(3) for part in range(2)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    seen: dict[str, list[Any]] = {}
    train = made.train

    def recorded(model: Any, loss_of: Any, batch: Any, steps: Any, *rest: Any) -> int:
        mine = seen.setdefault(type(model).__name__, [])
        return train(model, loss_of, lambda step: mine.append(batch(step)) or mine[-1], steps or 3, *rest)

    monkeypatch.setattr(made, "train", recorded)
    pair = tmp_path / "pair"
    made.main(f"--data {text} --join doc --tokenizer {tmp_path / 'tokenizer'} --out {pair} --size tiny --length 16 "
              "--rows 2 --held-out 2".split())  # fmt: skip
    mamba, neox = seen.values()
    assert len(mamba) == len(neox) == 3 and all(torch.equal(a, b) for a, b in zip(mamba, neox, strict=True))
    held_out = pair / "held-out.jsonl"
    assert [json.loads(line)["text"].split()[4] for line in held_out.read_text().splitlines()] == ["1", "2"]
    options = perplexity.Options(
        str(tmp_path / "pair/mamba"), str(held_out), str(tmp_path / "pair/neox"), lengths=(32,)
    )
    result = perplexity.run(options)
    assert {(row["who"], row.get("training_length")) for row in result["rows"]} == {("ours", None), ("transformer", 16)}


def test_memory_that_runs_out(script: Callable[[str], ModuleType]) -> None:
    fits = script("common").fits

    def needs_less_than(rows: int) -> None:
        if rows > 5:
            raise torch.OutOfMemoryError

    assert fits(needs_less_than, 16) == 4
    with pytest.raises(torch.OutOfMemoryError):
        fits(lambda rows: needs_less_than(6), 2)


def test_plan(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, file = script("plan"), tmp_path / "plan.json"
    broken = plan.Case("tiny", "sft", "full", 2, 64, {"max_tokens_per_device": 1})
    monkeypatch.setattr(plan, "TINY", [plan.TINY[1], plan.TINY[5], broken])
    plan.main(["--tiny", "--repeats", "1", "--json", str(file)])
    sft, dpo, refused = json.loads(file.read_text())["rows"]
    assert (sft["tokens"], sft["passes"], sft["targets"]) == (128, 2, 2 * 48)
    assert (dpo["tokens"], dpo["targets"], dpo["reference_tokens"]) == (128, 96, (plan.WARMUP + 1) * 128)
    for row in (sft, dpo):
        parts = [row[f"{name}_seconds"] for name in ("forward", "backward", "clip", "optimizer")]
        assert min(parts) > 0 and sum(parts) < 2 * row["seconds"] and row["planned"]["seconds"]["step"] > 0
    assert "max_tokens_per_device" in refused["missing"]
    capsys.readouterr()
    plan.main(["--fit", str(file)])
    printed = capsys.readouterr().out
    assert "host_forward: float" in printed and "tiny dpo  lora" in printed


def test_the_plan_is_measured_for_every_method(script: Callable[[str], ModuleType]) -> None:
    cases = script("plan").CASES
    assert {(c.size, c.stage, c.method) for c in cases} == {
        (size, stage, method)
        for size in ("130m", "2.8b")
        for stage in ("sft", "dpo")
        for method in ("full", "lora", "qlora")
    }
    assert any(c.limit_gb == 24 and c.recipe.load_in_4bit and c.size == "2.8b" and c.length == 2048 for c in cases)
    assert {c.recipe.gradient_checkpointing for c in cases} == {False, True, "selective"}


def test_batches_that_stand_for_all(script: Callable[[str], ModuleType]) -> None:
    spread = script("common").spread
    assert spread([7, 1, 3, 5], abs, 2) == [3, 7]
    assert spread([7, 1, 3, 5], abs, 9) == [1, 3, 5, 7]
    assert spread(list(range(100)), abs, 1) == [50]
