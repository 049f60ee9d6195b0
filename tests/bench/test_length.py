"""Training steps by length: crossovers, memory that runs out, checks before numbers, and the verb from end to end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mambalign.bench import contestants, length
from mambalign.bench.length import LEVELS, NO_MEMORY, NO_TIME, OK, Contestant, Options, crossover
from mambalign.bench.measure import NoNumbers
from mambalign.recipe import UserError
from tests.bench import standin

LENGTHS = [2**i for i in range(9, 16)]


def linear(slope: float = 1.0) -> dict[int, float]:
    return dict.fromkeys(LENGTHS, slope)


def test_a_crossover_is_where_the_curves_meet() -> None:
    """Attention's cost a token is a line in the length: in log-log it is met exactly at a power law's crossing."""
    power = {n: (n / 3000) ** 0.7 for n in LENGTHS}
    found = crossover(linear(), power)
    assert abs(found["length"] - 3000) <= 1 and "less from about 3,000 tokens on" in found["says"]
    assert crossover(power, linear())["length"] is None


@pytest.mark.parametrize(
    ("ours", "other", "says"),
    [
        (linear(2.0), linear(), "more at every length"),
        (linear(), linear(2.0), "less at every length"),
        (linear(), linear(), "more at every length"),  # equal is not less
        (linear() | {LENGTHS[2]: 0.5}, linear(), "more at 32,768, though less at some before"),
        ({512: 1.0}, {1024: 1.0}, "nothing to compare"),
    ],
)
def test_no_crossover_is_said_and_not_made_up(ours: dict[int, float], other: dict[int, float], says: str) -> None:
    found = crossover(ours, other)
    assert found["length"] is None and says in found["says"]


def test_of_several_crossings_the_last_counts_and_missing_lengths_do_not() -> None:
    ours = dict(zip(LENGTHS, [1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0], strict=True))
    other = dict(zip(LENGTHS, [2.0, 2.0, 0.5, 0.5, 2.0, 4.0, 8.0], strict=True))
    found = crossover(ours, other)["length"]
    assert 4096 < found < 8192 and abs(found - math.sqrt(4096 * 8192)) < 2  # halfway: 2x dearer, then 2x cheaper
    del other[8192]
    assert 4096 < crossover(ours, other)["length"] < 16384


class Needy:
    """A contestant whose steps need as many GiB as `needs` says by what is recomputed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, needs: dict[bool | str, int], card: int):
        self.recompute: bool | str = False
        self.config = type("Config", (), {"vocab_size": 100})
        monkeypatch.setattr(contestants, "reach", lambda model, longest: (longest, ""))
        monkeypatch.setattr(contestants, "set_recompute", lambda model, how: setattr(model, "recompute", how))
        monkeypatch.setattr(contestants, "step", lambda model, *_, **__: model.run)
        monkeypatch.setattr(contestants, "gib", lambda *_: 1.0)
        monkeypatch.setattr(contestants, "million", lambda _: 1.0)
        self.needs, self.card, self.runs = needs, card, 0

    def run(self) -> torch.Tensor:
        self.runs += 1
        if self.needs[self.recompute] > self.card:
            raise torch.OutOfMemoryError
        return torch.tensor(1.0)


@pytest.mark.parametrize(
    ("card", "outcome", "recompute"),
    [(16, OK, False), (8, OK, "selective"), (4, OK, True), (1, NO_MEMORY, True)],
)
def test_memory_that_runs_out_is_met_by_recomputing_and_then_is_a_result(
    card: int, outcome: str, recompute: bool | str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Needy(monkeypatch, {False: 10, "selective": 6, True: 2}, card)
    one = Contestant("ours", model, "fp32", lambda *_: None, LEVELS["auto"])
    (row,) = length.measure([one], 8, 2, 100, repeats=3, deadline=math.inf)
    assert (row["outcome"], row["recompute"]) == (outcome, recompute)
    assert ("ms" in row) is (outcome == OK)
    assert ("recomputed" in capsys.readouterr().err) is (recompute is not False)
    tried = model.runs
    (again,) = length.measure([one], 16, 2, 100, repeats=3, deadline=math.inf)
    assert again["outcome"] == outcome
    if outcome == NO_MEMORY:
        assert model.runs == tried  # once too little is too little: nothing is tried again


def test_a_kernel_that_fails_at_a_length_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = length.measure

    def failing(made: Any, tokens: int, *rest: Any) -> Any:
        if tokens > 16:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nadvice")
        return measured(made, tokens, *rest)

    monkeypatch.setattr(length, "measure", failing)
    result = length.run(Options(size="tiny", lengths=(16, 32, 64), repeats=1, tokens=32))
    assert {row["length"] for row in result["rows"]} == {16}
    assert result["settings"]["stopped"] == "at 32 tokens: CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal"):
        length.run(Options(size="tiny", lengths=(32,), repeats=1, tokens=32))


def test_the_first_length_is_measured_whatever_the_time() -> None:
    result = length.run(Options(size="tiny", lengths=(16, 32), repeats=1, tokens=32, minutes=0))
    assert [(row["length"], row["outcome"]) for row in result["rows"]] == [(16, OK)] * 2


def test_a_table_of_positions_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Needy(monkeypatch, {False: 0}, 1)
    monkeypatch.setattr(contestants, "reach", lambda model, longest: (min(longest, 64), "a table"))
    one = Contestant("transformer", model, "fp32", lambda *_: None, (False,))
    outcomes = [length.measure([one], n, 1, 100, repeats=1, deadline=math.inf)[0]["outcome"] for n in (64, 65)]
    assert outcomes == [OK, length.NO_POSITIONS]


def test_who_would_take_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Needy(monkeypatch, {False: 0}, 1)
    one = Contestant("transformer", model, "fp32", lambda *_: None, (False,))
    one.speeds = [(1024, 1.0), (2048, 2.0)]  # milliseconds a token, doubling with the length
    assert one.expected_ms(4096, 100) == pytest.approx(400)
    now = 1000.0
    monkeypatch.setattr(length.time, "monotonic", lambda: now)
    (row,) = length.measure([one], 4096, 1, 100, repeats=3, deadline=now + 60)  # 4 steps of 16 s
    assert row["outcome"] == NO_TIME and model.runs == 0
    (row,) = length.measure([one], 4096, 1, 100, repeats=3, deadline=now + 70)
    assert row["outcome"] == OK


def test_a_wrong_kernel_ends_the_bench_before_any_step(bench: Callable[..., Any], monkeypatch: Any) -> None:
    from mambalign.models import mamba

    right = mamba.selective_scan

    def wrong(*inputs: Any, backend: str = "auto", **rest: Any) -> Any:
        y = right(*inputs, backend=backend, **rest)
        return y if backend == "reference" else y * 1.01

    monkeypatch.setattr(mamba, "selective_scan", wrong)
    monkeypatch.setattr(length, "measure", lambda *_: pytest.fail("measured with a wrong kernel"))
    written, done = bench("length", "--size", "tiny", "--lengths", "16")
    assert written is None and done.exit_code == 1
    assert "of ours differs by" in done.output and "no numbers" in done.output


def test_a_peer_that_disagrees_ends_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    standin.install(monkeypatch)
    monkeypatch.setattr(standin.MambaLMHeadModel, "error", 0.01)
    with pytest.raises(NoNumbers, match="losses differ"):
        length.run(Options(size="tiny", lengths=(16,), repeats=1))


def test_the_verb_with_all_contestants(bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    standin.install(monkeypatch)
    words = ("length", "--size", "tiny", "--lengths", "16..64", "--tokens", "32", "--repeats", "2")
    written, done = bench(*words)
    assert done.exit_code == 0, done.output
    rows = written["rows"]
    assert [(row["who"], row["length"]) for row in rows] == [
        (who, n) for n in (16, 32, 64) for who in ("ours", "mamba-ssm", "transformer")
    ]
    assert all(row["rows"] * row["length"] == row["tokens"] == max(32, row["length"]) for row in rows)
    assert all(row["outcome"] == OK and row["ms_low"] <= row["ms"] <= row["ms_high"] for row in rows)
    assert all(row["tokens_per_second"] == pytest.approx(1e3 * row["tokens"] / row["ms"]) for row in rows)
    assert set(written["settings"]["errors"]) == {"loss", "gradient"} and written["settings"]["attention"]
    assert "time of ours, beside the Transformer" in written["summary"] and "beside the Transformer" in done.output
    _, done = bench(*words, "--json", "--optimizer", "--recompute", "full")
    assert '"optimizer": true' in done.stdout and '"recompute": true' in done.stdout


def test_models_of_ones_own(bench: Callable[..., Any], mamba: Any, neox: Any) -> None:
    written, done = bench("length", "--model", mamba, "--transformer", neox, "--lengths", "16", "--tokens", "32",
                          "--repeats", "1")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert {row["size"] for row in written["rows"]} == {"small-mamba"} and len(written["rows"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "130n"], "did you mean '130m'"),
        (["--lengths", "512,x"], "'x' is no number; write 512,2k,8k or 512..64k"),
        (["--lengths", "1"], "at least 2 tokens"),
        (["--lengths", "2k..512"], "2k..512 ends before it begins"),
        (["--plot", "figure.gif"], "figure.gif: give a file"),
        (["--recompute", "some"], "choose auto, none, selective, full"),
        (["--weights", "int8"], "choose bf16"),
        (["--transformer", "nowhere"], "--transformer nowhere"),
    ],
)
def test_mistakes_are_sentences(bench: Callable[..., Any], words: list[str], message: str) -> None:
    written, done = bench("length", "--size", "tiny", *words) if "--size" not in words else bench("length", *words)
    assert written is None and done.exit_code == 2 and message in done.output and "Traceback" not in done.output


def test_lists_of_lengths() -> None:
    from mambalign.cli.benching import numbers

    assert numbers("512, 2k,2048", "--lengths") == (512, 2048)
    assert numbers("1..9", "--lengths") == (1, 2, 4, 8)
    assert numbers("0..4", "--lengths") == (0,)
    assert numbers(None, "--lengths") is None
    with pytest.raises(UserError, match="--lengths"):
        numbers("", "--lengths")
