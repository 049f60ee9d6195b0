"""The GPU benchmarks run from end to end on a CPU: tiny shapes, and a stand-in for the peer with its interface.

The stand-in has mamba-ssm's modules, parameter names and calls, and computes with our ops; what it shows is that the
scripts ask it rightly, and that they refuse to print a time when it disagrees.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from mambalign.models.mamba import MambaMixer, RMSNorm
from mambalign.ops import Segments, causal_conv1d, selective_scan

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = ("common", "models", "ops", "train_step", "real_data", "sft_real", "dpo_real", "decode", "plan", "plot")


class Block(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.norm, self.mixer = RMSNorm(config.hidden_size, eps=1e-5), MambaMixer(config, layer_idx=0)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None) -> Any:
        residual = hidden_states.float() if residual is None else residual + hidden_states
        rows, length, width = residual.shape
        normed = self.norm(residual.to(self.norm.weight.dtype)).view(1, -1, width)
        return self.mixer(normed, segments=Segments.from_lengths([length] * rows)).view(rows, length, width), residual


class Backbone(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm_f = RMSNorm(config.hidden_size, eps=1e-5)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=None)
        return self.norm_f((hidden + residual).to(self.norm_f.weight.dtype))


class MambaLMHeadModel(nn.Module):
    error = 0.0  # what is wrong with its logits

    def __init__(self, config: Any, device: Any = None, dtype: Any = None):
        super().__init__()
        self.backbone = Backbone(
            transformers.MambaConfig(
                vocab_size=config.vocab_size, hidden_size=config.d_model, num_hidden_layers=config.n_layer
            )
        )
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.lm_head.weight = self.backbone.embedding.weight
        self.to(device=device, dtype=dtype)

    def forward(self, input_ids: Tensor) -> Any:
        logits = self.lm_head(self.backbone(input_ids))
        return namedtuple("CausalLMOutput", ["logits"])(
            logits=logits + self.error * torch.arange(logits.shape[-1]).to(logits)
        )


def decode(ids: Tensor, model: Any, max_length: int, top_k: int, cg: bool) -> Tensor:
    assert top_k == 1 and cg
    with torch.no_grad():
        while ids.shape[1] < max_length:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def packed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def selective_scan_fn(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **rest: Any) -> Tensor:
    rows, channels, length = u.shape
    segments = Segments.from_lengths([length] * rows)
    z = packed(rest.pop("z"))
    y = selective_scan(*map(packed, (u, delta)), A, *map(packed, (B, C)), D, z, segments=segments, **rest)
    return y.view(rows, length, channels).transpose(1, 2)


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    rows, channels, length = x.shape
    y = causal_conv1d(packed(x), weight, bias, activation, Segments.from_lengths([length] * rows))
    return y.view(rows, length, channels).transpose(1, 2)


def rms_norm_fn(
    x: Tensor, weight: Tensor, bias: None, residual: Tensor, eps: float, prenorm: bool, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    assert prenorm and residual_in_fp32
    total = residual + x
    return (nn.functional.rms_norm(total, weight.shape, weight.float(), eps)).to(x.dtype), total


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script as its directory's own, with the stand-in for the peer beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name, members in {
        "mamba_ssm": {},
        "mamba_ssm.models": {},
        "mamba_ssm.models.config_mamba": {"MambaConfig": SimpleNamespace},
        "mamba_ssm.models.mixer_seq_simple": {"MambaLMHeadModel": MambaLMHeadModel},
        "mamba_ssm.utils": {},
        "mamba_ssm.utils.generation": {"decode": decode},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.layer_norm": {"rms_norm_fn": rms_norm_fn},
        "causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn},
    }.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
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
    assert {who for op, who in seen if op == "selective_scan"} == {"ours", "mamba-ssm", "ours, 100 uneven segments"}
    assert len(seen) == 9


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
        ops.check(2, 16, 150)


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


def test_decode(script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, file = script("decode").main, tmp_path / "decode.json"
    main(["--tiny", "--repeats", "1", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["answers"] for row in rows] == [1, 8]  # speeds are differences of times: at this size they may be noise
    gpu = ["--gpu", "--tiny", "--repeats", "1", "--json", str(file)]
    monkeypatch.setattr(script("decode"), "CONTEXTS", (64, 128))
    monkeypatch.setattr(script("decode"), "BATCHES", (1, 2))
    monkeypatch.setattr(script("decode"), "write", lambda name, path, rows: path.write_text(json.dumps(rows)))
    main(gpu)
    seen = {(row["case"], row.get("who")) for row in json.loads(file.read_text())}
    assert seen == {(c, w) for c in ("even", "uneven") for w in ("ours", "mamba-ssm")} | {("context", None)}
    monkeypatch.setattr(MambaLMHeadModel, "error", 1.0)
    with pytest.raises(SystemExit, match="differs from mamba-ssm's from token 0 on: no numbers"):
        main(gpu)


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
    assert steps == ["ma", "a:", "b:", "c:", "d:", "e:", "re"]
    assert [row["who"][:2] for row in rows if row["data"] == "multi-turn"] == ["d:", "e:"]
    with_reference = [row["weights_gib"] for row in rows[:3]]
    assert with_reference == [2 * rows[3]["weights_gib"]] * 3
    monkeypatch.setattr(MambaLMHeadModel, "error", 0.01)
    with pytest.raises(SystemExit, match="more than rounding"):
        script("dpo_real").main(arguments)


def test_plan(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, file = script("plan"), tmp_path / "plan.json"
    broken = plan.Case("tiny", "sft", "full", 2, 64, {"max_tokens_per_device": 1})
    monkeypatch.setattr(plan, "TINY", [plan.TINY[1], plan.TINY[5], broken])
    plan.main(["--tiny", "--repeats", "1", "--json", str(file)])
    sft, dpo, refused = json.loads(file.read_text())["rows"]
    assert (sft["tokens"], sft["passes"], sft["targets"]) == (128, 2, 2 * 48)
    assert (dpo["tokens"], dpo["targets"], dpo["reference_tokens"]) == (128, 96, 4 * 128)
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


def test_memory_that_runs_out(script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    common = script("common")

    def needs_less_than(rows: int) -> None:
        if rows > 5:
            raise torch.OutOfMemoryError

    assert common.fits(needs_less_than, 16) == 4
    results = common.compete({"big": lambda: needs_less_than(6), "small": lambda: None}, repeats=3)
    assert list(results) == ["small"] and "big: out of memory" in capsys.readouterr().out
    with pytest.raises(torch.OutOfMemoryError):
        common.fits(lambda rows: needs_less_than(6), 2)


def test_batches_that_stand_for_all(script: Callable[[str], ModuleType]) -> None:
    spread = script("common").spread
    assert spread([7, 1, 3, 5], abs, 2) == [3, 7]
    assert spread([7, 1, 3, 5], abs, 9) == [1, 3, 5, 7]
    assert spread(list(range(100)), abs, 1) == [50]
