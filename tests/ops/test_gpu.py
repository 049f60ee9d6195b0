"""The same ops on a CUDA device: equal to the float64 reference on the CPU, and the same bits every time."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from mambalign.ops import (
    Segments,
    causal_conv1d,
    embedding,
    fla_ssd,
    gated_rms_norm,
    halves,
    nvrtc,
    rms_norm,
    scan_plan,
    selective_scan,
    ssd,
    token_logps,
)
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
    ssd_inputs,
)

pytestmark = pytest.mark.gpu


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cuda().requires_grad_() for name, value in inputs.items()}


def exact(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().double().requires_grad_() for name, value in inputs.items()}


def projected(op: Any, inputs: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """As `outputs_and_gradients`, with the projection drawn on the CPU and moved."""
    y, final = op(**inputs, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(t.device) for t in (y, final)]
    loss = (y * weights[0]).sum() + (final * weights[1]).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    results = {"y": y, "final_state": final} | dict(zip(inputs, gradients, strict=True))
    return {name: value.double().cpu() for name, value in results.items()}


@pytest.mark.parametrize("backend", ["cuda", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tree", TREES)
def test_scan_and_conv(tree: str, dtype: torch.dtype, backend: str) -> None:
    segments = Segments.from_lengths(*TREES[tree])
    T, S = segments.num_tokens, segments.num_segments
    for op, inputs, options in (
        (selective_scan, scan_inputs(T, S, dtype, D=40, N=16), {"delta_softplus": True}),
        (causal_conv1d, conv_inputs(T, S, dtype, D=40), {"activation": "silu"}),
    ):
        theirs = outputs_and_gradients(op, exact(inputs), segments=segments, backend="reference", **options)
        first, second = (projected(op, on_gpu(inputs), segments=segments, backend=backend, **options) for _ in range(2))
        assert_same(first, theirs, TOLERANCE[dtype])
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [40, 37, 1536])
def test_the_middle_of_a_block(D: int, dtype: torch.dtype) -> None:
    """Two halves with one gradient, a convolution used twice, A's logarithm: as float64, and the same bits twice."""
    segments = Segments.from_lengths([70, 33, 5, 100], [-1, 0, 0, -1])
    inputs = scan_inputs(208, 4, dtype, D=D, N=16) | conv_inputs(208, 4, dtype, D=D)
    wanted = ("weight", "bias", "A", "D", "delta_bias")
    inputs = {"xz": torch.randn(208, 2 * D).to(dtype), "d_y": torch.randn(208, D).to(dtype)} | {
        name: inputs[name] for name in wanted
    }
    inputs["A"] = inputs["A"].detach().neg().log()
    results = []
    for given, backend in ((exact(inputs), "torch"), (inputs, "cuda"), (inputs, "cuda")):
        moved = on_gpu(given)
        x, z, joint = halves(moved["xz"])
        options: dict[str, Any] = {"segments": segments, "backend": backend, "joint": joint}
        u, again = causal_conv1d(x, moved["weight"], moved["bias"], "silu", twice=True, **options)
        B, C = again[:, :16] * 2, again[:, 16:32] - 1
        parameters = moved["A"], B, C, moved["D"], z, moved["delta_bias"]
        y = selective_scan(u, u * 0.5, *parameters, delta_softplus=True, log_A=True, **options)
        gradients = torch.autograd.grad(y, [moved[name] for name in ("xz", *wanted)], moved["d_y"])
        results.append([t.double().cpu() for t in (y, *gradients)])
    for theirs, ours, same in zip(*results, strict=True):
        assert torch.equal(ours, same)
        assert relative_error(ours, theirs) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("shift", [-9.0, -3.0, 3.0], ids=["long memory", "usual memory", "short memory"])
def test_scan_cut_into_pieces(shift: float) -> None:
    """Long enough to be cut for parallelism, with decays from almost none to almost all; against float64 on the GPU."""
    segments = Segments.from_lengths([5000, 3000, 300], [-1, 0, 0])
    inputs = scan_inputs(8300, 3, torch.float32, D=64, N=16)
    inputs["delta_bias"] = (inputs["delta_bias"] + shift).detach()
    options = {"segments": segments, "delta_softplus": True}
    theirs = projected(selective_scan, on_gpu(exact(inputs)), backend="torch", **options)
    ours = projected(selective_scan, on_gpu(inputs), backend="cuda", **options)
    assert_same(ours, theirs, 1e-5)


@pytest.mark.parametrize("families", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scan_of_trees_by_one_block_and_by_many(
    families: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_in_families(monkeypatch, families)
    lengths, parent = [300, 40, 70, 5, 33, 100, 9, 64, 200], [-1, 0, 0, 1, 1, -1, 5, 5, 5]
    segments, inputs = Segments.from_lengths(lengths, parent), scan_inputs(sum(lengths), 9, dtype, D=200, N=16)
    options: dict[str, Any] = {"segments": segments, "delta_softplus": True}
    theirs = outputs_and_gradients(selective_scan, exact(inputs), backend="reference", **options)
    first, second = (projected(selective_scan, on_gpu(inputs), backend="cuda", **options) for _ in range(2))
    assert_same(first, theirs, TOLERANCE[dtype])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_op_may_be_the_first_to_go_backwards() -> None:
    """In the thread that autograd starts for it, which has called nothing of CUDA's before."""
    code = """
import torch
from mambalign.ops import selective_scan
u, delta = (torch.rand(300, 64, device="cuda").requires_grad_() for _ in range(2))
B, C = (torch.rand(300, 16, device="cuda").requires_grad_() for _ in range(2))
y = selective_scan(u, delta, -torch.ones(64, 16, device="cuda"), B, C)
d_y = torch.ones_like(y)
assert torch.autograd.grad(y, u, d_y)[0].isfinite().all()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("crowded", [False, True], ids=["two blocks", "all blocks of the card"])
def test_scan_in_a_relay(crowded: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Legs that wait for one another: as if the card had one multiprocessor, and with every block it has."""
    monkeypatch.setattr(scan_plan, "SHORTEST_PIECE", 32)
    channels = 64 * scan_plan.HELD_IN_RELAY // scan_plan.WARPS
    channels *= nvrtc.multiprocessors(torch.device("cuda")) if crowded else 1
    if not crowded:
        monkeypatch.setattr(nvrtc, "multiprocessors", lambda device: 1)
    segments, inputs = Segments.from_lengths([270], [-1]), scan_inputs(270, 1, dtype, D=channels, N=16)
    options: dict[str, Any] = {"segments": segments, "delta_softplus": True}
    assert scan_plan.is_relay(segments, channels // 64, torch.device("cuda"))
    theirs = outputs_and_gradients(selective_scan, exact(inputs), backend="reference", **options)
    first, second = (projected(selective_scan, on_gpu(inputs), backend="cuda", **options) for _ in range(2))
    assert_same(first, theirs, TOLERANCE[dtype])
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("summed", [False, True], ids=["", "summed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [1000, 1001, 50280])
def test_token_logps(vocabulary: int, dtype: torch.dtype, summed: bool) -> None:
    hidden, weight = (torch.randn(n, 64).to(dtype).requires_grad_() for n in (300, vocabulary))
    labels = torch.randint(vocabulary, (300,))
    labels[::7] = -100
    double = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    theirs = torch.autograd.grad(token_logps(*double, labels, backend="reference").sum(), double)
    moved = [t.detach().cuda().requires_grad_() for t in (hidden, weight)]

    def gradients() -> tuple[torch.Tensor, ...]:
        logps = token_logps(*moved, labels.cuda(), chunk_size=128, backend="cuda", summed=summed)
        return torch.autograd.grad(logps.sum(), moved)

    first, second = gradients(), gradients()
    assert all(relative_error(a.cpu(), b) < 10 * TOLERANCE[dtype] for a, b in zip(first, theirs, strict=True))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("rows", [1, 130, 5000])  # the last: several rows a block, the next on its way
@pytest.mark.parametrize("width", [63, 768, 2560, 4096, 8192])
def test_norm(width: int, rows: int) -> None:
    x, weight = torch.randn(rows, width, requires_grad=True), torch.randn(width, requires_grad=True)
    moved = [t.detach().cuda().requires_grad_() for t in (x, weight)]
    ours = torch.autograd.grad(rms_norm(*moved, backend="cuda").pow(3).sum(), moved)
    double = [t.detach().double().requires_grad_() for t in (x, weight)]
    theirs = torch.autograd.grad(rms_norm(*double, backend="reference").pow(3).sum(), double)
    assert all(relative_error(a.cpu(), b) < 1e-5 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend", ["cuda", "torch"])
@pytest.mark.parametrize("width", [63, 2560])
@pytest.mark.parametrize("case", NORM_CASES)
def test_add_and_norm(case: str, width: int, backend: str) -> None:
    added_and_normed(backend, case, width, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("D", "N", "W"), [(5, 3, 1), (1536, 16, 4), (132, 4, 2), (7, 20, 3)])
def test_a_step_of_generation_is_the_ops_at_one_token(D: int, N: int, W: int, dtype: torch.dtype) -> None:
    one_step_is_the_ops(D, N, W, dtype, "cuda")


@pytest.mark.parametrize("backend", ["cuda", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tree", TREES)
def test_ssd(tree: str, dtype: torch.dtype, backend: str) -> None:
    segments = Segments.from_lengths(*TREES[tree])
    inputs = ssd_inputs(segments.num_tokens, segments.num_segments, dtype, H=4, P=64, G=2, N=32)
    options: dict[str, Any] = {"segments": segments, "dt_softplus": True, "dt_limit": (0.1, 1.5)}
    if backend == "cuda":
        missing = fla_ssd.unavailable(torch.device("cuda"))
        if missing:
            pytest.skip(f"the cuda backend {missing}")
        if dtype == torch.float32:
            with pytest.raises(ValueError, match="takes 16-bit x"):
                ssd(**on_gpu(inputs), backend=backend, **options)
            return
    theirs = outputs_and_gradients(ssd, exact(inputs), backend="reference", **options)
    first, second = (projected(ssd, on_gpu(inputs), backend=backend, **options) for _ in range(2))
    # fla's kernels round weighted inputs and, for the outputs, the states between chunks to 16 bits.
    assert_same(first, theirs, TOLERANCE[dtype] * (2 if backend == "cuda" else 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shift", [-6.0, -2.0, 2.0], ids=["long memory", "usual memory", "short memory"])
def test_long_ssd(shift: float) -> None:
    segments = Segments.from_lengths([5000, 3000, 300], [-1, 0, 0])
    inputs = ssd_inputs(8300, 3, torch.float32, H=4, P=64, G=1, N=128)
    inputs["dt_bias"] = (inputs["dt_bias"] + shift).detach()
    options = {"segments": segments, "dt_softplus": True, "backend": "torch"}
    assert_same(projected(ssd, on_gpu(inputs), **options), projected(ssd, on_gpu(exact(inputs)), **options), 1e-5)


def test_gated_norm() -> None:
    inputs = [torch.randn(130, 512, requires_grad=True), torch.randn(130, 512, requires_grad=True), torch.randn(512)]
    moved = [t.detach().cuda().requires_grad_() for t in inputs]
    double = [t.detach().double().requires_grad_() for t in inputs]
    ours, theirs = (
        torch.autograd.grad(gated_rms_norm(*given, group_size=128).pow(3).sum(), given) for given in (moved, double)
    )
    assert all(relative_error(a.cpu(), b) < 1e-5 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [3, 96, 50280])
def test_embedding(vocabulary: int, dtype: torch.dtype) -> None:
    """The same bits every time, also where tokens are many and PyTorch's sum depends on the run."""
    torch.manual_seed(0)
    ids = torch.randint(vocabulary, (20_000,))
    d_rows = torch.randn(20_000, 256).to(dtype)
    exact_sum = torch.zeros(vocabulary, 256, dtype=torch.float64).index_add_(0, ids, d_rows.double())
    found = []
    for _ in range(5):
        weight = torch.randn(vocabulary, 256, device="cuda", dtype=dtype, requires_grad=True)
        embedding(ids.cuda(), weight, backend="cuda").backward(d_rows.cuda())
        assert weight.grad is not None
        found.append(weight.grad)
    assert relative_error(found[0].cpu(), exact_sum) < (1e-6 if dtype == torch.float32 else 4e-3)
    assert all(torch.equal(found[0], other) for other in found)
