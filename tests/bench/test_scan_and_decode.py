"""The scan's and the decoding bench: checks before numbers, and the verbs from end to end with a stand-in peer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from mambalign.bench import decode, ops, scan
from mambalign.bench.measure import NoNumbers
from mambalign.ops import selective_scan
from tests.bench import standin

SCAN = ("scan", "--channels", "8", "--tokens", "256", "--lengths", "64,256", "--repeats", "1")


@pytest.fixture(autouse=True)
def small_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    check = scan.check_all
    monkeypatch.setattr(scan, "check_all", lambda loop, *_: check(loop, 2, 16, 150))
    monkeypatch.setattr(scan, "bandwidth", lambda: 1e9)
    monkeypatch.setattr(decode, "bandwidth", lambda: 1e9)


def test_the_scan_beside_a_peer_a_loop_and_floors(bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    standin.install(monkeypatch)
    written, done = bench(*SCAN)
    assert done.exit_code == 0, done.output
    rows = written["rows"]
    everyone = {"ours", "mamba-ssm", scan.UNEVEN, scan.LOOP}
    assert {row["who"] for row in rows if row["length"] == 64} == everyone
    assert {row["who"] for row in rows if row["length"] == 256} == everyone - {scan.UNEVEN}  # of one row
    assert all(row["forward_ms"] > 0 and row["both_ms"] > 0 and row["tokens"] == 256 for row in rows)
    errors = written["settings"]["errors"]["scan, float32"]
    assert set(errors) == everyone - {scan.UNEVEN} and max(errors["ours"].values()) < 1e-5
    assert "times as fast as mamba-ssm" in written["summary"]


def test_floors_are_bytes_and_exponentials() -> None:
    found = scan.floors(tokens=1000, channels=10, itemsize=2, bytes_a_second=1e3, exponentials=1e3)
    assert found["forward_bytes_ms"] == 2 * 1000 * (4 * 10 + 32)  # u, delta, z, y of 10 channels; B, C of 16 states
    assert found["both_bytes_ms"] == 2 * 1000 * (4 * 10 + 32 + 7 * 10 + 64)
    assert found["both_exponentials_ms"] == 2 * found["forward_exponentials_ms"] == 2 * 1000 * 10 * 16
    assert set(scan.floors(1, 1, 2, 1.0, None)) == {"forward_bytes_ms", "both_bytes_ms"}


def test_the_plain_loop_is_the_scan() -> None:
    given = scan.scan_inputs(60, 8, torch.float64)
    from mambalign.ops import Segments

    exact = selective_scan(**given, delta_softplus=True, segments=Segments.from_lengths([20] * 3))
    assert float((scan.plain_loop(**given, rows=3) - exact).detach().abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(lambda: 1.02, "further off"), (lambda: 1 + 1e-7 * float(torch.rand(())), "other bits")],
    ids=["wrong", "not repeatable"],
)
def test_a_wrong_scan_ends_the_bench(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, wrong: Callable[[], float], message: str
) -> None:
    def spoiled(u: Any, *rest: Any, backend: str = "auto", **named: Any) -> Any:
        y = selective_scan(u, *rest, backend=backend, **named)
        return y if backend == "torch" else (y.double() * wrong()).to(y.dtype)

    monkeypatch.setattr(scan, "selective_scan", spoiled)
    monkeypatch.setattr(scan, "BF16", torch.float32)  # where a difference of 1e-7 is not rounded away
    monkeypatch.setattr(scan, "measure", lambda *_, **__: pytest.fail("measured with a wrong kernel"))
    written, done = bench(*SCAN)
    assert written is None and done.exit_code == 1 and message in done.output and "no numbers" in done.output


def test_decoding_on_a_cpu(bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "CACHE", 0)
    written, done = bench("decode", "--size", "tiny", "--batches", "1,2", "--contexts", "32,64", "--tokens", "4",
                          "--repeats", "1")  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = written["rows"]
    assert {(row["batch"], row["who"]) for row in rows if row["case"] == "even"} == {
        (batch, who) for batch in (1, 2) for who in ("ours", decode.HF_MAMBA, "transformer")
    }
    held = {(row["who"], row["context"]): row["state_mib"] for row in rows if row["case"] == "context"}
    assert held["ours", 32] == held["ours", 64]
    # 2 layers of width 64 in keys and values, fp32; of ours 2 layers of 64 channels, 16 states and a window of 3
    assert held["transformer", 64] == 2 * held["transformer", 32] == 2 * 2 * 64 * 32 * 4 / 2**20
    assert held["ours", 32] == 2 * 64 * (16 + 3) * 4 / 2**20
    assert all(row["floor_ms"] > 0 for row in rows if row["case"] == "context")


def test_noise_is_no_rate(bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer that took no longer than a short one was shown as millions of tokens a second."""
    monkeypatch.setattr(decode, "differences", lambda runs, *_: {name: [-0.1] for name in runs})
    written, done = bench("decode", "--size", "tiny", "--batches", "1", "--contexts", "32", "--tokens", "4")
    assert done.exit_code == 0 and "give more --tokens or --repeats" in done.output
    keys = "tokens_per_second", "ms_per_token"
    assert all(row[key] is None for row in written["rows"] for key in keys if key in row)
    assert all(row.get("floor_ms") is None for row in written["rows"])  # a cache could hold this model
    assert decode._times("ours", [4.0]) == {"": 4.0, "_low": 4.0, "_high": 4.0}


def test_a_peers_nan_excuses_nothing() -> None:
    cases = {who: scan.scan(1, 4, 8, torch.float32)["ours"] for who in ("ours", "peer")}
    broken = replace(cases["ours"], apply=lambda backend="cuda", **given: cases["ours"].apply(**given) * (
        1.0 if backend == "torch" else math.nan
    ))  # fmt: skip
    with pytest.raises(NoNumbers, match="further off"):
        ops.check("scan", {"ours": broken, "peer": broken}, torch.float32)


def test_decoding_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """mamba-ssm's loop and uneven batches, with a stand-in; it must give the same first tokens."""
    standin.install(monkeypatch)
    model = decode.contestants.ours("tiny", "fp32").eval()
    others = {decode.PEER: decode.contestants.mamba_ssm(model, "fp32"), decode.HF_MAMBA: None,
              decode.TRANSFORMER: decode.contestants.transformer("tiny", "fp32").eval()}  # fmt: skip
    options = decode.Options(size="tiny", tokens=8, repeats=1)
    rows = decode.batched(options, 2, model, others)
    assert {(row["case"], row["who"]) for row in rows} == {
        ("even", "ours"), ("even", "mamba-ssm"), ("even", "transformer"), ("uneven", "ours"), ("uneven", "mamba-ssm"),
    }  # fmt: skip
    monkeypatch.setattr(standin.MambaLMHeadModel, "error", 1.0)
    with pytest.raises(NoNumbers, match="standard deviations below mamba-ssm's first choice: no numbers"):
        decode.batched(options, 2, model, others)


def test_a_cache_is_as_long_as_its_context_at_every_start() -> None:
    torch.manual_seed(0)
    model = decode.contestants.transformer("tiny", "fp32").eval()
    cached = decode.Cached(model, tuple(range(1, 21)))
    first = cached.generate(5)
    before = cached.bytes
    assert torch.equal(cached.generate(5), first) and cached.bytes == before
    ids = torch.tensor([[*range(1, 21), 1]])
    with torch.no_grad():
        whole = transformers.GenerationMixin.generate(
            model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None
        )
    assert int(whole[0, -1]) == int(first)
