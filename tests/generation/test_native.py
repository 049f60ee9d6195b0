"""The CPU's compiled step: against fp64, on every vector width, with any threads, and where nothing can be compiled."""

from __future__ import annotations

import copy
import logging
import platform
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from mambalign.generation.decode import Decoder
from mambalign.generation.engine import Engine, make_decoder
from mambalign.generation.native import NativeDecoder, unavailable
from mambalign.generation.requests import Request
from mambalign.ops import native
from mambalign.recipe import UserError
from tests.generation.conftest import FUSED, pair
from tests.generation.test_engine import GREEDY, needs_compiler, prompt

WIDTHS = [(), ("-mno-avx512f",), ("-mno-avx",)] if platform.machine() == "x86_64" else [()]
# What is left over of vectors of 4, 8 and 16, of blocks of 16 channels, and of tiles of 4 and 8 outputs.
SIZES: list[dict[str, Any]] = [
    {"hidden_size": 37, "expand": 3, "time_step_rank": 7, "state_size": 5, "vocab_size": 265},
    {"hidden_size": 16, "expand": 1, "time_step_rank": 1, "state_size": 1, "vocab_size": 3, "conv_kernel": 1},
    {"hidden_size": 48, "expand": 2, "time_step_rank": 16, "state_size": 16, "vocab_size": 270, "use_bias": True},
    {"hidden_size": 3, "expand": 1, "time_step_rank": 2, "state_size": 3, "vocab_size": 7, "use_conv_bias": False},
]


@pytest.fixture
def compiled_anew(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Libraries are looked for again, within the test and after it."""
    cached = native.library
    monkeypatch.setattr("mambalign.ops.native.library", native.library.__wrapped__)
    assert native.library is not cached
    return monkeypatch


def walked(decoder: Any, rows: int, steps: int = 6, seed: int = 0) -> torch.Tensor:
    """Logits of `steps` steps of random tokens, from random states; those of all decoders of a model are alike."""
    words = decoder.logits.shape[1]
    random = torch.Generator().manual_seed(seed)
    for row in range(rows):
        empty = decoder.read(row)
        filled = [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.dtype)
                  for x in (empty.conv, empty.ssm)]  # fmt: skip
        decoder.load(row, type(empty)(*filled))
    found = []
    for _ in range(steps):
        decoder.tokens[:rows] = torch.randint(words, (rows,), generator=random)
        found.append(decoder.step(rows).clone())
    return torch.stack(found)


def assert_close(found: torch.Tensor, expected: torch.Tensor, rel: float = 1e-5) -> None:
    assert bool(found.isfinite().all())
    assert float((found.double() - expected).abs().max()) <= rel * float(expected.abs().max())


@needs_compiler
@pytest.mark.parametrize("flags", WIDTHS, ids=str)
@pytest.mark.parametrize("family", FUSED)
def test_every_size_on_every_vector_width(
    family: str, flags: tuple[str, ...], compiled_anew: pytest.MonkeyPatch
) -> None:
    compiled_anew.setattr(native, "OPTIONS", (*native.OPTIONS, *flags))
    for sizes in SIZES:
        model = pair(family, **sizes)[1]
        exact = Decoder(copy.deepcopy(model).double(), 9, exact=False, step="eager")
        decoder = NativeDecoder(model, 9)
        for rows in (1, 2, 9):
            assert_close(walked(decoder, rows), walked(exact, rows))


@needs_compiler
def test_strong_and_weak_decay_and_wide_gates() -> None:
    """Exponents from -1e4 to -1e-7, gates and step sizes of +-200: no overflow, no NaN, 1e-5 of fp64."""
    model = pair("mamba", hidden_size=32)[1]
    with torch.no_grad():
        for number, block in enumerate(model.backbone.layers):
            mixer = block.mixer
            mixer.A_log.copy_(torch.linspace(-12, 6, mixer.A_log.numel()).view_as(mixer.A_log))
            mixer.dt_proj.bias.copy_(torch.linspace(-30, 30, mixer.dt_proj.bias.numel()))
            mixer.in_proj.weight[len(mixer.D) :] *= 40 * (number + 1)
    exact = Decoder(copy.deepcopy(model).double(), 4, exact=False, step="eager")
    assert_close(walked(NativeDecoder(model, 4), 4), walked(exact, 4))


@needs_compiler
def test_a_number_is_the_same_bits_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair("mamba", hidden_size=80, vocab_size=301)[1]
    monkeypatch.setattr("mambalign.generation.native.SHARE", 1)
    before = torch.get_num_threads()
    found = {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            decoder = NativeDecoder(model, 8)
            assert decoder._model.threads == threads
            found[threads] = walked(decoder, 8)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[1], found[2]) and torch.equal(found[1], found[3])


@needs_compiler
def test_rows_that_take_no_part_are_left_alone() -> None:
    decoder = NativeDecoder(pair("mamba")[1], 4)
    walked(decoder, 4, steps=1)
    before = [decoder.read(row) for row in (2, 3)]
    decoder.step(2)
    for row, state in zip((2, 3), before, strict=True):
        assert all(map(torch.equal, (*state.conv, *state.ssm), (*decoder.read(row).conv, *decoder.read(row).ssm)))


@needs_compiler
@pytest.mark.parametrize("damaged", ["norm_f.weight", "layers.1.mixer.dt_proj.bias", "layers.2.mixer.A_log"])
def test_what_is_no_number_is_not_hidden(damaged: str) -> None:
    model = pair("mamba")[1]
    model.backbone.get_parameter(damaged).data.fill_(torch.nan)
    decoder = NativeDecoder(model, 1)
    decoder.tokens[0] = 5
    assert bool(decoder.step(1).isnan().all())


# ------------------------------------------------------------------------------------------- when there is no compiler


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        ("", "none of no-such-compiler is here"),
        ("no-such-compiler -m64", "CXX names no-such-compiler, which is not here"),
        ("broken", "does not compile it"),
    ],
)
def test_without_a_compiler_pytorch_steps(
    compiler: str, says: str, tmp_path: Path, compiled_anew: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if compiler == "broken":
        script = tmp_path / compiler
        script.write_text("#!/bin/sh\necho error: out of order >&2\nexit 1\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        compiler = str(script)
    compiled_anew.setenv("CXX", compiler)
    compiled_anew.setattr(native, "COMPILERS", ("no-such-compiler",))
    model = pair("mamba")[1]
    with caplog.at_level(logging.INFO, "mambalign"):
        engine = Engine(model, None, slots=1)
    assert isinstance(engine.decoder, Decoder) and says in caplog.text
    assert len(engine.generate([Request(prompt(3), GREEDY)])[0][0].tokens) == GREEDY.max_new_tokens
    with pytest.raises(UserError, match=says):
        make_decoder(model, 1, step="native")


@needs_compiler
def test_a_library_is_kept_and_one_that_cannot_be_kept_is_used(
    tmp_path: Path, compiled_anew: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = pair("mamba")[1]
    compiled_anew.setenv("CXX", f"{native._compiler()[0]} -DAN_OPTION")
    compiled_anew.setattr(native, "CACHE", tmp_path / "kept")
    with caplog.at_level(logging.INFO, "mambalign"):
        expected = walked(NativeDecoder(model, 1), 1)
        assert torch.equal(walked(NativeDecoder(model, 1), 1), expected)
    assert caplog.text.count("decode_step.cpp compiled by") == 1
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".so"]
    (tmp_path / "file").touch()
    compiled_anew.setattr(native, "CACHE", tmp_path / "file" / "no-folder")
    assert torch.equal(walked(NativeDecoder(model, 1), 1), expected)
    (kept,) = (tmp_path / "kept").iterdir()
    torn = tmp_path / "torn" / kept.name
    torn.parent.mkdir()
    torn.write_bytes(b"torn")
    compiled_anew.setattr(native, "CACHE", torn.parent)
    assert torch.equal(walked(NativeDecoder(model, 1), 1), expected) and torn.stat().st_size == kept.stat().st_size


def test_what_takes_the_plain_step_and_why() -> None:
    for family, changes, says in (
        ("mamba2", {}, "not written for mamba2"),
        ("mamba", {"hidden_act": "gelu"}, "no activation 'gelu'"),
    ):
        model = pair(family, **changes)[1]
        assert says in str(unavailable(model)) and isinstance(make_decoder(model, 1), Decoder)
    model = pair("mamba")[1]
    assert unavailable(model) is None
    assert "wants all weights in one of bfloat16 or float32" in str(unavailable(model.half()))
    model.float().set_backend("torch")
    assert "backend 'torch'" in str(unavailable(model))
