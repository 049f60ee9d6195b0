"""The CUDA kernels, emulated on the CPU: their own source, all of their host code, against the reference loops."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mambalign.ops import (
    Segments,
    add_rms_norm,
    causal_conv1d,
    cuda_conv,
    cuda_decode,
    cuda_logps,
    cuda_norm,
    cuda_scan,
    embedding,
    halves,
    nvrtc,
    rms_norm,
    scan_plan,
    selective_scan,
    token_logps,
)
from mambalign.ops.reference import compute_dtype
from tests.ops import emulated
from tests.ops.test_ops import (
    NORM_CASES,
    TOLERANCE,
    TREES,
    added_and_normed,
    assert_same,
    conv_inputs,
    go_in_families,
    one_step_is_the_ops,
    outputs_and_gradients,
    relative_error,
    scan_inputs,
)

EMBEDDING = importlib.import_module("mambalign.ops.embedding")  # whose name in the package is the function's
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="no g++ here to compile the emulation with")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(autouse=True)
def emulation(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    emulated.install(monkeypatch, built)
    yield
    emulated.forget()


@pytest.fixture(params=["whole segments", "pieces", "families"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long segments are cut for parallelism, and trees walked by one block; nothing of it may show."""
    go_in_families(monkeypatch, request.param == "families")
    if request.param == "pieces":
        monkeypatch.setattr(scan_plan, "SHORTEST_PIECE", 32)


def compare(op: Any, inputs: dict[str, torch.Tensor], dtype: torch.dtype, **options: Any) -> None:
    ours = outputs_and_gradients(op, inputs, backend="cuda", **options)
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    theirs = outputs_and_gradients(op, exact, backend="reference", **options)
    assert_same({k: v.double() for k, v in ours.items()}, theirs, TOLERANCE[dtype])
    assert ours["y"].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tree", TREES)
def test_scan(tree: str, dtype: torch.dtype, pieces: None) -> None:
    segments = Segments.from_lengths(*TREES[tree])
    for D, N in ((5, 3), (40, 16)):
        inputs = scan_inputs(segments.num_tokens, segments.num_segments, dtype, D=D, N=N)
        compare(selective_scan, inputs, dtype, segments=segments, delta_softplus=True)


@pytest.mark.parametrize("N", [3, 16])
def test_scan_of_a_logarithm(N: int) -> None:
    """A as models keep it: the same results, and the logarithm's gradient."""
    segments = Segments.from_lengths([9, 4, 6], [-1, 0, 0])
    inputs = scan_inputs(19, 3, torch.float32, D=40, N=N)
    inputs["A"] = inputs["A"].detach().neg().log().requires_grad_()
    compare(selective_scan, inputs, torch.float32, segments=segments, log_A=True)


@pytest.mark.parametrize("D", [40, 64])  # some channels of a block do not exist, or it is known that all do
def test_scan_compiled_for_its_row_lengths(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; here every shape but these shares a build that reads the lengths at run time."""
    monkeypatch.setattr(cuda_scan, "STATIC", True)
    segments = Segments.from_lengths([70, 4, 40], [-1, 0, 0])
    inputs = scan_inputs(114, 3, torch.float32, D=D, N=16)
    inputs["z"] = torch.randn(114, 2 * D)[:, D:].requires_grad_()
    compare(selective_scan, inputs, torch.float32, segments=segments, delta_softplus=True)


@pytest.mark.parametrize("missing", ["D", "z", "delta_bias", "initial_state"])
def test_scan_without_optional_inputs(missing: str, pieces: None) -> None:
    segments = Segments.from_lengths([70, 4, 6, 20], [-1, 0, 0, -1])
    inputs = scan_inputs(100, 4, torch.float32)
    del inputs[missing]
    inputs["delta"] = inputs["delta"].detach().abs().requires_grad_()  # without softplus a step must be positive
    compare(selective_scan, inputs, torch.float32, segments=segments)


@pytest.mark.parametrize("shift", [-9.0, 3.0], ids=["long memory", "short memory"])
def test_scan_of_weak_and_strong_decay(shift: float, pieces: None) -> None:
    segments = Segments.from_lengths([200, 90, 33], [-1, 0, 0])
    inputs = scan_inputs(323, 3, torch.float32)
    inputs["delta_bias"] = (inputs["delta_bias"] + shift).detach().requires_grad_()
    compare(selective_scan, inputs, torch.float32, segments=segments, delta_softplus=True)


def test_inputs_of_several_types() -> None:
    """As under autocast: the widest type decides, and every gradient has its input's own."""
    segments = Segments.from_lengths([9, 4, 6], [-1, 0, 0])
    inputs = scan_inputs(19, 3, torch.bfloat16)
    inputs["delta"] = inputs["delta"].detach().float().requires_grad_()
    compare(selective_scan, inputs, torch.bfloat16, segments=segments, delta_softplus=True)
    inputs = conv_inputs(19, 3, torch.bfloat16)
    inputs["weight"] = inputs["weight"].detach().float().requires_grad_()
    compare(causal_conv1d, inputs, torch.bfloat16, segments=segments, activation="silu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("tree", TREES)
def test_conv(tree: str, activation: str | None, dtype: torch.dtype) -> None:
    segments = Segments.from_lengths(*TREES[tree])
    for D in (5, 8):  # rows of one element at a time, and of vectors
        inputs = conv_inputs(segments.num_tokens, segments.num_segments, dtype, D=D)
        compare(causal_conv1d, inputs, dtype, segments=segments, activation=activation)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
def test_conv_of_every_width_crosses_forks(width: int) -> None:
    segments = Segments.from_lengths([2, 1, 3, 1, 1, 5, 70], [-1, 0, 1, 0, 3, 4, 0])
    inputs = conv_inputs(segments.num_tokens, segments.num_segments, torch.float32, W=width)
    compare(causal_conv1d, inputs, torch.float32, segments=segments, activation="silu")


def test_rows_with_gaps_between_them() -> None:
    """What a model passes: halves and slices of wider projections, and gradients that arrive transposed."""
    segments = Segments.from_lengths([9, 4, 6, 20], [-1, 0, 0, -1])
    for op, inputs, options in (
        (selective_scan, scan_inputs(39, 4, torch.float32), {"delta_softplus": True}),
        (causal_conv1d, conv_inputs(39, 4, torch.float32, D=8), {"activation": "silu"}),
    ):
        views = {k: v.detach().repeat_interleave(2, dim=0)[::2].requires_grad_() for k, v in inputs.items()}
        plain = outputs_and_gradients(op, inputs, segments=segments, backend="cuda", **options)
        assert_same(outputs_and_gradients(op, views, segments=segments, backend="cuda", **options), plain, 0.0)
        y = op(**inputs, segments=segments, backend="cuda", **options)
        turned = torch.randn(y.shape[1], y.shape[0]).T
        first = next(iter(inputs.values()))
        ours = torch.autograd.grad(y, first, turned, retain_graph=True)
        assert torch.equal(ours[0], torch.autograd.grad(y, first, turned.contiguous())[0])


def block(xz: torch.Tensor, weights: dict[str, torch.Tensor], joint: bool, segments: Segments) -> torch.Tensor:
    """The middle of Mamba's block: convolution of one half, scan gated by the other."""
    x, z, gradient = halves(xz) if joint else (*xz.chunk(2, dim=-1), None)
    options: dict[str, Any] = {"segments": segments, "backend": "cuda", "joint": gradient}
    u, again = causal_conv1d(x, weights["weight"], weights["bias"], "silu", twice=True, **options)
    B, C = again[:, :3] * 2, again[:, 2:5] - 1
    return selective_scan(u, u * 0.5, weights["A"], B, C, weights["D"], z, delta_softplus=True, **options)


def block_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor], Segments]:
    segments = Segments.from_lengths([9, 4, 6, 20], [-1, 0, 0, -1])
    weights = {k: v.detach() for k, v in (scan_inputs(1, 1, dtype, D=8) | conv_inputs(1, 1, dtype, D=8)).items()}
    return torch.randn(39, 16).to(dtype).requires_grad_(), weights, segments


def cats(backward: Any) -> int:
    """How often `backward()` puts tensors together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        backward()
    return sum(event.count for event in profile.key_averages() if event.key == "aten::cat")


@pytest.mark.parametrize(("dtype", "static"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_both_halves_gradients_are_written_into_one_tensor(
    dtype: torch.dtype, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_scan, "STATIC", static)
    monkeypatch.setattr(cuda_conv, "STATIC", static)
    xz, weights, segments = block_inputs(dtype)
    wanted = torch.randn(39, 8).to(dtype)
    theirs = torch.autograd.grad(block(xz, weights, False, segments), xz, wanted)[0]
    y = block(xz, weights, True, segments)
    assert cats(lambda: y.backward(wanted, retain_graph=True)) == 0
    assert torch.equal(xz.grad, theirs)
    first, xz.grad = xz.grad, None
    y.backward(wanted)
    assert torch.equal(xz.grad, theirs) and xz.grad.data_ptr() != first.data_ptr()


def test_halves_that_do_not_meet() -> None:
    """Hooks, other users, one half alone, parts of a backward pass: the gradients of `chunk`, by a copy."""
    xz, weights, segments = block_inputs(torch.float32)
    for case in ("hook", "other user", "left alone", "right alone", "in parts", "mixed types"):
        results = []
        for joint in (False, True):
            x, z, gradient = halves(xz) if joint else (*xz.chunk(2, dim=-1), None)
            options: dict[str, Any] = {"segments": segments, "backend": "cuda", "joint": gradient}
            if case == "hook":
                z.register_hook(lambda d_z: d_z * 2)
            given = (x if case != "right alone" else x.detach()), (z if case != "left alone" else z.detach())
            x_given = given[0].bfloat16() if case == "mixed types" else given[0]
            u = causal_conv1d(x_given, weights["weight"], weights["bias"], "silu", **options)
            y = selective_scan(u, u * 0.5, weights["A"], u[:, :3], u[:, 2:5], z=given[1], **options)
            y = y + (z * x if case == "other user" else 0)
            if case == "in parts":
                parts = torch.autograd.grad(y.sum(), (z, u), retain_graph=True)
                results.append(torch.autograd.grad((u, z), xz, (parts[1], parts[0])))
            else:
                results.append(torch.autograd.grad(y.pow(2).sum(), xz))
        assert torch.equal(results[0][0], results[1][0]), case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [5, 8])
def test_a_convolution_used_twice(D: int, dtype: torch.dtype) -> None:
    """The gradients of both uses add up in fp32, and either may be missing."""
    segments = Segments.from_lengths([9, 4, 70, 20], [-1, 0, 0, -1])
    inputs = conv_inputs(103, 4, dtype, D=D)
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    weights = torch.randn(2, 103, D).to(dtype)
    weights[1] = weights[1].T.contiguous().T if D == 5 else weights[1]
    for used in ((0, 1), (0,), (1,)):
        pair = causal_conv1d(**inputs, activation="silu", segments=segments, twice=True, backend="cuda")
        assert pair[0].data_ptr() == pair[1].data_ptr() and pair[0]._version == pair[1]._version
        ours = torch.autograd.grad([pair[i] for i in used], list(inputs.values()), [weights[i] for i in used])
        y = causal_conv1d(**exact, activation="silu", segments=segments, backend="reference")
        theirs = torch.autograd.grad(y, list(exact.values()), sum(weights[i].double() for i in used))
        for a, b in zip(ours, theirs, strict=True):
            assert relative_error(a, b) < TOLERANCE[dtype]
    pair[0].detach().add_(1)
    assert pair[0]._version == pair[1]._version > 0  # a write to one shows in the other


@pytest.mark.parametrize("vocabulary", [2, 7, 50, 264, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_logps(vocabulary: int, dtype: torch.dtype) -> None:
    hidden, weight = (torch.randn(n, 16).to(dtype).requires_grad_() for n in (37, vocabulary))
    labels = torch.randint(vocabulary, (37,))
    labels[::7] = -100
    projection = torch.randn(37)
    results = []
    for backend, inputs in (("cuda", (hidden, weight)), ("reference", (hidden.double(), weight.double()))):
        inputs = [t.detach().requires_grad_() for t in inputs]
        logps = token_logps(*inputs, labels, chunk_size=8, backend=backend)
        assert logps.dtype == compute_dtype(*inputs)
        results.append((logps, *torch.autograd.grad((logps * projection).sum(), inputs)))
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) < TOLERANCE[dtype]
    assert results[0][0][labels == -100].eq(0).all()


@pytest.mark.parametrize("width", [1, 37, 64, 700])
@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype", "dtype"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, None),
        (torch.float16, torch.float32, torch.float16),
    ],
    ids=str,
)
def test_norm(x_dtype: torch.dtype, weight_dtype: torch.dtype, dtype: torch.dtype | None, width: int) -> None:
    x, weight = torch.randn(2, 5, width).to(x_dtype), torch.randn(width).to(weight_dtype)
    results = []
    for backend, inputs in (("cuda", (x, weight)), ("reference", (x.double(), weight.double()))):
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = rms_norm(*inputs, 1e-3, dtype if backend == "cuda" else None, backend=backend)
        results.append((y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), inputs)))
    assert results[0][0].dtype == (dtype or torch.promote_types(x_dtype, weight_dtype))
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) < max(TOLERANCE[d] for d in (x_dtype, weight_dtype))


@pytest.mark.parametrize("rows", [1, 50])
def test_norm_of_many_rows_by_few_blocks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block walks several rows, the next on its way: as on a GPU, which has room for a few of a batch."""
    monkeypatch.setattr(cuda_norm, "FORWARD_THREADS", 0)
    monkeypatch.setattr(cuda_norm, "BACKWARD_THREADS", 200)
    x, residual = torch.randn(rows, 700, requires_grad=True), torch.randn(rows, 700, requires_grad=True)
    weight, results = torch.randn(700, requires_grad=True), []
    projections = torch.randn(2, rows, 700)
    for backend in ("cuda", "cuda", "torch"):
        outputs = add_rms_norm(x, residual, weight, backend=backend)
        loss = sum((output * projection).sum() for output, projection in zip(outputs, projections, strict=True))
        results.append((*outputs, *torch.autograd.grad(loss, (x, residual, weight))))
    for ours, again, theirs in zip(*results, strict=True):
        assert torch.equal(ours, again) and relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("case", NORM_CASES)
def test_add_and_norm(case: str) -> None:
    added_and_normed("cuda", case, 700)


def test_a_sum_that_no_one_norms_hands_its_gradient_on() -> None:
    x, residual = torch.randn(3, 8).bfloat16().requires_grad_(), torch.randn(3, 8, requires_grad=True)
    total = add_rms_norm(x, residual, torch.ones(8), backend="cuda")[1]
    weights = torch.randn(3, 8)
    d_x, d_residual = torch.autograd.grad((total * weights).sum(), (x, residual))
    assert torch.equal(d_residual, weights) and torch.equal(d_x, weights.bfloat16())


@pytest.mark.parametrize("vocabulary", [2, 37, 264, 4103, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_and_the_gradient_of_their_sum_at_once(vocabulary: int, dtype: torch.dtype) -> None:
    """A block has a row: as a warp that goes one way, then the other, but for the order of the sum."""
    logits, labels = (3 * torch.randn(5, vocabulary)).to(dtype), torch.tensor([0, vocabulary - 1, -100, vocabulary, 1])
    logps, log_z = cuda_logps.forward(logits, labels)
    d_logits = cuda_logps.backward_(logits.clone(), labels, log_z, torch.ones(5))
    ours = cuda_logps.both_(logits.clone(), labels)
    assert torch.allclose(ours[0], logps, rtol=1e-5, atol=1e-6, equal_nan=True) and ours[0][2] == 0
    assert torch.allclose(ours[1], log_z, rtol=1e-6)
    assert relative_error(ours[2], d_logits) < {torch.float32: 1e-5}.get(dtype, 1e-3) and not ours[2][2].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 4, 2049])
def test_a_gradient_times_a_factor(count: int, dtype: torch.dtype) -> None:
    gradient, factor = torch.randn(count, 1), torch.tensor([0.3])
    assert torch.equal(cuda_logps.scaled(gradient, factor, dtype), (gradient * factor).to(dtype))


def test_logits_of_any_size_and_unknown_labels() -> None:
    logits = torch.tensor([[-1e4, 0.0, 1e4], [-3e4, -3e4, -3e4], [0.0, 0.0, 0.0]])
    logps, log_z = cuda_logps.forward(logits, torch.tensor([1, 2, 5]))
    assert torch.allclose(log_z, logits.logsumexp(1))
    assert logps[0] == -1e4 and abs(logps[1] + 1.0986123) < 1e-2 and logps[2].isnan()


def test_results_repeat_bit_for_bit_whichever_lane_and_warp_comes_first(
    pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A barrier that is missing would let one read what another has not written yet, or has written over."""
    segments = Segments.from_lengths([40, 70, 9, 9, 70], [-1, 0, 0, 1, -1])
    for op, inputs, options in (
        (selective_scan, scan_inputs(198, 5, torch.bfloat16, D=64, N=16), {"delta_softplus": True}),
        (selective_scan, scan_inputs(198, 5, torch.float32, D=96, N=16), {"delta_softplus": True}),
        (selective_scan, scan_inputs(198, 5, torch.float32, D=40, N=3), {"delta_softplus": True}),
        (causal_conv1d, conv_inputs(198, 5, torch.bfloat16, D=64), {"activation": "silu"}),
    ):
        runs = []
        for backwards in (False, True, False):
            monkeypatch.setattr(emulated, "BACKWARDS", backwards)
            runs.append(outputs_and_gradients(op, inputs, segments=segments, backend="cuda", **options))
        for run in runs:
            assert [name for name in run if not torch.equal(run[name], runs[0][name])] == []


@pytest.mark.parametrize(
    ("D", "N", "W", "dtype"),
    [(5, 3, 1, torch.float32), (40, 16, 4, torch.bfloat16), (132, 4, 2, torch.float16), (7, 20, 3, torch.bfloat16)],
    ids=str,
)
def test_a_step_of_generation_is_the_ops_at_one_token(D: int, N: int, W: int, dtype: torch.dtype) -> None:
    """Twice in a row, so that the windows and states that the first left are right, too."""
    one_step_is_the_ops(D, N, W, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [20, 19, 600])
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 5000])
def test_embedding(vocabulary: int, width: int, dtype: torch.dtype) -> None:
    """Runs of one token within a chunk of 32, across one edge, and over several chunks."""
    generator = torch.Generator().manual_seed(vocabulary)
    for tokens in (1, 32, 33, 131):
        ids = torch.randint(vocabulary, (1, tokens), generator=generator)
        weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
        d_rows = torch.randn(1, tokens, width, generator=generator).to(dtype)
        rows = embedding(ids, weight, backend="cuda")
        assert torch.equal(rows, weight[ids])
        rows.backward(d_rows)
        exact = torch.zeros(vocabulary, width, dtype=torch.float64).index_add_(0, ids[0], d_rows[0].double())
        assert weight.grad is not None and weight.grad.dtype == dtype
        assert relative_error(weight.grad, exact) < {torch.float32: 1e-6, torch.float16: 1e-3}.get(dtype, 4e-3)


def test_norm_into_the_stream_itself() -> None:
    x, stream, weight = torch.randn(3, 700).bfloat16(), torch.randn(3, 700), torch.randn(700)
    y, total = add_rms_norm(x, stream, weight, 1e-3, torch.bfloat16, backend="cuda")
    into = torch.full((3, 700), torch.nan, dtype=torch.bfloat16)
    cuda_norm.add_rms_norm_into(x, stream, weight, 1e-3, into, stream, torch.empty(3))
    assert torch.equal(into, y) and torch.equal(stream, total)


def test_what_a_backend_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = scan_inputs(5, 1, torch.float32, N=17)
    with pytest.raises(ValueError, match="holds at most 16 states a channel, A has 17"):
        selective_scan(**wide, backend="cuda")
    with pytest.raises(ValueError, match="computes in fp32, and an input is fp64"):
        causal_conv1d(**conv_inputs(5, 1, torch.float64), backend="cuda")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="backend 'cuda' needs an NVIDIA GPU"):
        token_logps(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 1, 2]), backend="cuda")


def test_structs_of_host_and_kernels_agree() -> None:
    for source, constants in (
        (cuda_scan.PARAMETERS, {"STATES": cuda_scan.STATES}),
        (nvrtc.PREAMBLE, {"SUMMERS": nvrtc.SUMMERS // 32}),
        (EMBEDDING.SOURCE, {"CHUNK": EMBEDDING.CHUNK}),
        (cuda_decode.SOURCE, {"THREADS": cuda_decode.THREADS}),
        (
            cuda_scan.SOURCE,
            {
                "N": cuda_scan.STATES,
                "LANES": cuda_scan.LANES,
                "TILE": scan_plan.TILE,
                "HAS_CHILD": scan_plan.HAS_CHILD,
                "IS_LAST": scan_plan.IS_LAST,
            },
        ),
        (cuda_logps.SOURCE, {"LANES": cuda_logps.LANES, "BLOCK": cuda_logps.BLOCK}),
    ):
        for name, value in constants.items():
            assert re.search(rf"#define {name} {value}\b", source.read_text()), name


def test_a_relay_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough rows of one length go in legs, each from where the one before it left off."""
    segments = Segments.from_lengths([270, 270], [-1, -1])
    inputs = scan_inputs(540, 2, torch.float32, D=20, N=16)
    launched: list[tuple[str, int]] = []
    launch = emulated.EmulatedModule.launch

    def counted(
        module: Any, name: str, grid: tuple[int, int], threads: int, values: dict[str, Any], *args: Any
    ) -> None:
        launched.append((name, values.get("num_turns", 0)))
        launch(module, name, grid, threads, values, *args)

    monkeypatch.setattr(emulated.EmulatedModule, "launch", counted)
    options: dict[str, Any] = {"segments": segments, "backend": "cuda", "delta_softplus": True}
    whole = outputs_and_gradients(selective_scan, inputs, **options)
    assert ("scan_forward", 0) in launched and ("scan_backward", 0) in launched
    monkeypatch.setattr(scan_plan, "SHORTEST_PIECE", 32)
    launched.clear()
    relayed = outputs_and_gradients(selective_scan, inputs, **options)
    # 270 tokens are 3 legs of 96, since a leg is whole tiles.
    assert ("scan_forward", 6) in launched and ("scan_backward", 6) in launched
    assert all(torch.equal(whole[k], relayed[k]) for k in whole if k not in ("D", "delta_bias"))
    assert_same(relayed, whole, 1e-6)  # sums over tokens in shares
    compare(selective_scan, inputs, torch.float32, segments=segments, delta_softplus=True)


@pytest.mark.parametrize(
    ("rows", "length", "D", "goes"),
    [(4, 2048, 5120, True), (8, 2048, 5120, False), (2, 2048, 5120, False), (4, 512, 5120, False)],
)
def test_what_goes_in_a_relay(rows: int, length: int, D: int, goes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 132 multiprocessors: between two and 2.6 warps a scheduler, long enough to be cut, of one length, no forks."""
    monkeypatch.setattr(nvrtc, "multiprocessors", lambda device: 132)
    blocks, device = D // (cuda_scan.LANES * scan_plan.WARPS), torch.device("cpu")
    assert scan_plan.is_relay(Segments.from_lengths([length] * rows, [-1] * rows), blocks, device) == goes
    uneven = Segments.from_lengths([length] * (rows - 1) + [length - 1], [-1] * rows)
    forked = Segments.from_lengths([length] * rows, [-1] + [0] * (rows - 1))
    assert not scan_plan.is_relay(uneven, blocks, device)
    assert not scan_plan.is_relay(forked, blocks, device)


@pytest.mark.parametrize("wanted", [True, False])
def test_only_where_gradients_are_wanted_a_plan_is_made_for_them(wanted: bool) -> None:
    segments, inputs = Segments.from_lengths([40, 30]), scan_inputs(70, 2, torch.float32, D=20, N=16)
    with torch.set_grad_enabled(wanted):
        selective_scan(**inputs, segments=segments, backend="cuda")
    made = [key[-1] for key in segments._plans if key[0] == "cuda scan"]
    assert made == (["scan_forward", "scan_backward"] if wanted else ["scan_forward"])


# Prompts, tokens of each of two completions, channels; and the way that was faster for such batches on an H200.
FORKS = {
    "few short pairs": ([150, 260, 40, 90, 620, 110, 60, 200], 100, 1536, "apart"),
    "many short pairs": ([150, 260, 40, 90, 620, 110, 60, 200] * 8, 100, 1536, "families"),
    "few short pairs, wide": ([150, 260, 40, 90, 620, 110, 60, 200] * 2, 100, 5120, "families"),
    "few long pairs": ([3800, 900, 700, 1400], 200, 1536, "apart"),
    "one pair, wide": ([1700], 200, 5120, "apart"),
}


@pytest.mark.parametrize("batch", FORKS)
def test_forks_go_the_faster_way(batch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "multiprocessors", lambda device: 132)
    prompts, completion, channels, way = FORKS[batch]
    lengths = [tokens for prompt in prompts for tokens in (prompt, completion, completion)]
    parent = [p for root in range(0, len(lengths), 3) for p in (-1, root, root)]
    for kernel in scan_plan.HELD:
        plan = scan_plan.plan(Segments.from_lengths(lengths, parent), channels // 64, torch.device("cpu"), kernel)
        assert (plan.handed == len(prompts)) == (way == "families")
        assert (len(plan.joined) > 0) == (plan.heads.items > 0) == (plan.tails.items > 0) == (way == "apart")


def test_a_family_is_walked_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one block: parents first; or children first, one of whom leaves its gradient, and the others add theirs."""
    go_in_families(monkeypatch, True)
    segments = Segments.from_lengths(*TREES["deep tree"])
    for kernel in scan_plan.HELD:
        plan = scan_plan.plan(segments, 1, torch.device("cpu"), kernel)
        seen: dict[int, int] = {}
        for item, (start, end) in enumerate(itertools.pairwise(plan.all.starts.tolist())):
            left: set[int] = set()
            for unit in plan.all.units[start:end].tolist():
                parent, before, after, adds = (plan.units[unit].tolist()[i] for i in (3, 7, 8, 9))
                seen[unit] = item
                if parent >= 0:
                    assert before == plan.units[parent].tolist()[8]
                    assert (parent in seen) == (kernel == "scan_forward")
                    if kernel == "scan_backward":
                        assert bool(adds) == (before in left)
                        left.add(before)
                assert after < 0 or kernel == "scan_forward" or after in left
        assert sorted(seen) == list(range(8))
        assert all(seen[u] == seen[p] for u, p in enumerate(segments.parent.tolist()) if p >= 0)


@pytest.mark.parametrize("kernel", ["scan_forward", "scan_backward"])
def test_the_leg_before_one_is_a_round_of_rows_earlier(kernel: str) -> None:
    """The emulation, which runs one block after the other, would not notice one that nobody waits for."""
    facts, tables = scan_plan._relay(Segments.from_lengths([2048] * 3, [-1] * 3), kernel)
    relay = scan_plan._built(facts, *tables)
    order = relay.all.units.tolist()
    for place, unit in enumerate(order):
        before, after = relay.units[unit].tolist()[7:9]
        source = (after + 1 if after >= 0 else -1) if kernel == "scan_backward" else before
        assert order.index(source) == place - relay.rows if source >= 0 else place < relay.rows
    assert len(order) == 3 * scan_plan.LEGS and relay.rows == 3
