"""Turns, medians, memory, files and figures, whatever is measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mambalign.bench import figures, measure
from mambalign.recipe import UserError


def test_contestants_take_turns_and_those_without_memory_leave(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    now = [100.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0]))

    def run(name: str, takes: float, lacks: bool = False) -> Any:
        def call() -> None:
            order.append(name)
            now[0] += takes
            if lacks:
                raise torch.OutOfMemoryError

        return call

    results = measure.compete(
        {"slow": run("slow", 2.0), "big": run("big", 9.0, lacks=True), "fast": run("fast", 0.5)}, repeats=3, warmup=1
    )
    assert order == ["slow", "big", "fast"] + ["slow", "fast"] * 3
    assert list(results) == ["slow", "fast"] and "big: out of memory" in capsys.readouterr().err
    assert [results["slow"][key] for key in ("ms_low", "ms", "ms_high")] == [2000.0] * 3
    assert results["fast"]["ms"] == 500.0
    order.clear()
    measure.compete({"slow": run("slow", 1.0)}, repeats=9, warmup=0, seconds=0.5)
    assert len(order) == 3  # time is over, but a median needs three
    order.clear()
    measure.compete({"slow": run("slow", 1.0)}, repeats=9, warmup=0, seconds=4.5)
    assert len(order) == 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks of resident memory are Linux's")
def test_peak_memory_of_a_cpu_is_what_was_held_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            held = torch.ones(16, 2**20)  # 64 MiB, thrice, never two at once
            del held

    _, peak = measure.timed(run)
    assert 60 < peak * 1024 < 120


def test_median_and_quartiles() -> None:
    assert measure.spread_of([1.0, 2.0, 3.0, 4.0, 100.0], "ms") == {"ms": 3.0, "ms_low": 2.0, "ms_high": 4.0}
    assert measure.spread_of([7.0], "ms") == {"ms": 7.0, "ms_low": 7.0, "ms_high": 7.0}


def result(**changes: Any) -> measure.Result:
    row = {"who": "ours", "size": "tiny", "length": 64, "tokens": 64, "rows": 1, "weights": "fp32", "recompute": False,
           "parameters_million": 1.0, "outcome": "measured", "ms": 1.0, "ms_low": 1.0, "ms_high": 1.0,
           "peak_gib": float("nan")} | changes  # fmt: skip
    return measure.result_of("length", [row, row | {"length": 128, "ms": None, "outcome": "out of memory"}])


def test_what_is_not_measured_is_null_in_strict_json(tmp_path: Path) -> None:
    file = tmp_path / "made" / "length.json"
    measure.write(result(), file)
    written = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert written["rows"][0]["peak_gib"] is None
    assert {"date", "card", "machine", "torch", "transformers", "mamba-ssm"} <= written["environment"].keys()
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_json_is_written_and_the_way_to_the_plot_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = tmp_path / "length.json"
    measure.write(result(), file)
    assert json.loads(file.read_text())["benchmark"] == "length" and not list(tmp_path.glob("*.png"))
    assert f"mambalign bench plot {file}" in capsys.readouterr().err


def test_several_files_become_one_figure_and_others_are_refused(tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    measure.write(result(), files[0])
    measure.write(result(size="130m", peak_gib=2.0), files[1])
    drawn = figures.draw(files, tmp_path / "both.svg")
    assert drawn.read_text().count("tiny, fp32") == 2 and "130m, fp32" in drawn.read_text()
    other = tmp_path / "other.json"
    for content, message in (
        ('{"benchmark": "poem", "rows": []}', "no result of length"),
        ('{"benchmark": "length", "rows": []}', "no rows"),
        ("[1]", "no result of length"),
        ("{", "is no JSON"),
    ):
        other.write_text(content)
        with pytest.raises(UserError, match=message):
            figures.draw([other])
    with pytest.raises(UserError, match=r"ends in \.svg, \.png, \.pdf"):
        figures.draw(files, tmp_path / "both.gif")
