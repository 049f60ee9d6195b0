"""Every backend against the reference loops: outputs, final states and every gradient, on every kind of `Segments`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mambalign.ops import (
    Segments,
    add_rms_norm,
    causal_conv1d,
    cuda_decode,
    rms_norm,
    scan_plan,
    selective_scan,
    ssd,
    token_logps,
    torch_scan,
    torch_ssd,
)

TREES = {
    "one": ([17], [-1]),
    "single token": ([1], [-1]),
    "odd lengths": ([1, 63, 100], [-1, -1, -1]),
    "uneven roots": ([5, 1, 1, 40, 2, 33], [-1] * 6),
    "pair": ([9, 4, 6], [-1, 0, 0]),
    "pair, one-token prompt": ([1, 5, 4], [-1, 0, 0]),
    "parent shorter than the window": ([2, 1, 1, 3], [-1, 0, 1, 2]),
    "one-token chain": ([1] * 9, [-1, 0, 1, 2, 3, 4, 5, 6, 7]),
    "many children": ([6, 3, 1, 7, 2, 5], [-1, 0, 0, 0, 0, 0]),
    "deep tree": ([4, 3, 2, 5, 1, 7, 6, 2], [-1, 0, 0, 1, 1, -1, 5, 3]),
    "empty segments": ([0, 4, 0, 3, 2, 0], [-1, 0, 1, 2, 0, -1]),
    "beyond a tile": ([70, 40, 33], [-1, 0, 0]),
    "no token": ([0, 0], [-1, 0]),
    "no segment": ([], []),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# dtypes of (x, residual, weight, the norm), the least of the sum, and what the sum must be in
NORM_CASES = {
    "fp32": (FP32, FP32, FP32, None, None, FP32),
    "autocast": (BF16, FP32, FP32, BF16, FP32, FP32),
    "pure bf16": (BF16, FP32, BF16, BF16, FP32, FP32),
    "all bf16": (BF16, BF16, BF16, None, None, BF16),
    "fp16": (FP16, FP32, FP32, FP16, FP32, FP32),
    "stream narrower than x": (FP32, BF16, FP32, BF16, None, FP32),
    "beginning": (FP32, None, FP32, BF16, FP32, FP32),
    "beginning, widened": (BF16, None, BF16, BF16, FP32, FP32),
}


@pytest.fixture(params=["as shipped", "small tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tile sizes decide where the backend cuts time and lanes; no boundary may show."""
    if request.param == "small tiles":
        monkeypatch.setattr(torch_scan, "MIN_STEPS", 3)
        monkeypatch.setattr(torch_scan, "MAX_STEPS", 8)
        monkeypatch.setattr(torch_scan, "CPU_STEP", 2 * 5 * 3)
        monkeypatch.setattr(torch_scan, "CPU_TILE", 1)
        monkeypatch.setattr(torch_ssd, "CHUNK", 4)
        monkeypatch.setattr(torch_ssd, "CPU_TILE", 1)
        monkeypatch.setattr(torch_ssd, "CPU_SLACK", 0)
    yield


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` full of NaN: an element that nothing writes shows."""
    for name in ("empty_like", "empty"):
        real = getattr(torch, name)

        def filled(*args: Any, _real: Callable[..., Tensor] = real, **kwargs: Any) -> Tensor:
            out = _real(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(torch, name, filled)
    real_new = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: real_new(self, *a, **k).fill_(float("nan")))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Max over elements, relative to the largest of the expected ones. NaN counts as infinite."""
    if not theirs.numel():
        return 0.0
    difference = (ours.double() - theirs.double()).abs().max().item()
    return float("inf") if difference != difference else difference / max(theirs.double().abs().max().item(), 1e-30)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def scan_inputs(T: int, S: int, dtype: torch.dtype, D: int = 5, N: int = 3) -> dict[str, Tensor]:
    state = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    return {
        "u": random(T, D, dtype=dtype),
        "delta": random(T, D, dtype=dtype),
        "A": (-torch.rand(D, N, dtype=torch.float64) * 2 - 0.1).to(state).requires_grad_(),
        "B": random(T, N, dtype=dtype),
        "C": random(T, N, dtype=dtype),
        "D": random(D, dtype=state),
        "z": random(T, D, dtype=dtype),
        "delta_bias": random(D, dtype=state),
        "initial_state": random(S, D, N, dtype=state),
    }


def ssd_inputs(T: int, S: int, dtype: torch.dtype, H: int = 4, P: int = 3, G: int = 2, N: int = 5) -> dict[str, Tensor]:
    state = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    return {
        "x": random(T, H, P, dtype=dtype),
        "dt": random(T, H, dtype=dtype),
        "A": (-torch.rand(H, dtype=torch.float64) * 2 - 0.1).to(state).requires_grad_(),
        "B": random(T, G, N, dtype=dtype),
        "C": random(T, G, N, dtype=dtype),
        "D": random(H, dtype=state),
        "z": random(T, H, P, dtype=dtype),
        "dt_bias": random(H, dtype=state),
        "initial_state": random(S, H, P, N, dtype=state),
    }


def go_in_families(monkeypatch: pytest.MonkeyPatch, whether: bool) -> None:
    """How a GPU walks trees: by one block each, or all segments at a time."""
    monkeypatch.setattr(scan_plan, "JOINING", dict.fromkeys(scan_plan.HELD, 1e9 if whether else -1e9))


def conv_inputs(T: int, S: int, dtype: torch.dtype, D: int = 5, W: int = 4) -> dict[str, Tensor]:
    return {
        "x": random(T, D, dtype=dtype),
        "weight": random(D, W, dtype=dtype),
        "bias": random(D, dtype=dtype),
        "initial_state": random(S, D, W - 1, dtype=dtype),
    }


def outputs_and_gradients(op: Callable[..., Any], inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs of `op` and the gradient of a random projection of them with respect to every input."""
    y, final = op(**inputs, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    loss = (y * torch.randn(y.shape, generator=generator)).sum() + (
        final * torch.randn(final.shape, generator=generator)
    ).sum()
    # materialize_grads: where there is no token the reference has nothing to differentiate.
    gradients = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    return {"y": y, "final_state": final} | dict(zip(inputs, gradients, strict=True))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert ours[name].shape == expected.shape, name
        error = relative_error(ours[name], expected)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance}"


def added_and_normed(backend: str, case: str, width: int, device: str = "cpu") -> None:
    """`add_rms_norm` of `backend`: sum, norm and gradients, through both outputs at once and through either alone."""
    x_dtype, residual_dtype, weight_dtype, dtype, least, sum_dtype = NORM_CASES[case]
    given = [torch.randn(2, 5, width).to(x_dtype), None, torch.randn(width).to(weight_dtype)]
    if residual_dtype is not None:
        given[1] = torch.randn(2, 5, width).to(residual_dtype)
    norm_weights, sum_weights = torch.randn(2, 2, 5, width)
    tolerance = max(TOLERANCE[t] for t in (x_dtype, weight_dtype, dtype or sum_dtype, sum_dtype))
    for through_norm, through_sum in ((1, 1), (1, 0), (0, 1)):
        results = []
        for name, place, to in ((backend, device, None), ("reference", "cpu", torch.float64)):
            inputs = [None if t is None else t.to(place, to).requires_grad_() for t in given]
            types = (dtype, least) if to is None else (None, None)
            norm, total = add_rms_norm(*inputs, 1e-3, *types, backend=name)
            loss = through_norm * (norm * norm_weights.to(place)).sum()
            loss = loss + through_sum * (total * sum_weights.to(place)).sum()
            gradients = torch.autograd.grad(loss, [t for t in inputs if t is not None])
            results.append([norm.detach().cpu(), total.detach().cpu(), *(g.cpu() for g in gradients)])
        ours, theirs = results
        assert ours[1].dtype == sum_dtype and ours[0].dtype == (dtype or torch.promote_types(sum_dtype, weight_dtype))
        assert torch.equal(ours[1], theirs[1].to(sum_dtype))
        assert [g.dtype for g in ours[2:]] == [t.dtype for t in given if t is not None]
        assert all(relative_error(a, b) <= tolerance for a, b in zip(ours, theirs, strict=True))


def one_step_is_the_ops(D: int, N: int, W: int, dtype: torch.dtype, device: str) -> None:
    """`cuda_decode`, with views as generation passes them, against convolution and scan of segments of one token."""
    rows, rank = 3, 6
    inputs = conv_inputs(2 * rows, rows, dtype, D=D, W=W) | scan_inputs(2 * rows, rows, torch.float32, D=D, N=N)
    given = {name: value.detach().to(device) for name, value in inputs.items()}
    xz, low, delta = (torch.randn(2, rows, n).to(device, dtype) for n in (2 * D, rank + 2 * N, D))
    window, state = (torch.randn(rows, *shape).to(device) for shape in ((W - 1, D), (N, D)))
    window = window.to(dtype)
    exact = {"window": window.double().transpose(1, 2).cpu(), "state": state.double().transpose(1, 2).cpu()}
    weight, A = given["weight"].float().t().contiguous(), given["A"].t().contiguous()
    each = Segments.from_lengths([1] * rows)
    for x, z, part, step in zip(*xz.split(D, 2), low, delta, strict=True):
        u, y, widened = torch.empty(rows, D, dtype=dtype, device=device), torch.empty_like(x), part.double().cpu()
        cuda_decode.conv_step(x, window, weight, given["bias"].float(), True, u, window)
        cuda_decode.state_step(
            u, step, A * math.log2(math.e), part, given["D"], z, given["delta_bias"], state, y, state
        )
        options = {"segments": each, "output_final_state": True, "backend": "reference"}
        double = {name: value.double().cpu() for name, value in given.items()}
        expected_u, exact["window"] = causal_conv1d(
            x.double().cpu(), double["weight"], double["bias"], "silu", initial_state=exact["window"], **options
        )
        assert relative_error(u.double().cpu(), expected_u) < TOLERANCE[dtype]
        B, C = widened[:, rank:].split(N, 1)
        expected_y, exact["state"] = selective_scan(
            u.double().cpu(), step.double().cpu(), double["A"], B, C, double["D"], z.double().cpu(),
            double["delta_bias"], True, initial_state=exact["state"], **options,
        )  # fmt: skip
        assert relative_error(y.double().cpu(), expected_y) < TOLERANCE[dtype]
        assert torch.equal(window.double().transpose(1, 2).cpu(), exact["window"])
        assert relative_error(state.double().transpose(1, 2).cpu(), exact["state"]) < 1e-5
    parts = low[0].double().cpu().split([rank, N, N], 1)
    cuda_decode.low_norm(low[0], N, 0.1)
    expected = torch.cat([x * torch.rsqrt(x.square().mean(1, keepdim=True) + 0.1) for x in parts], 1)
    assert relative_error(low[0].double().cpu(), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", NORM_CASES)
def test_add_and_norm_equals_reference(case: str) -> None:
    added_and_normed("torch", case, 37)


def test_add_and_norm_are_the_two_in_turn() -> None:
    """Bit for bit; and what does not fit is refused."""
    x, residual, weight = torch.randn(4, 9).double(), torch.randn(4, 9).double(), torch.randn(9).double()
    norm, total = add_rms_norm(x, residual, weight)
    assert torch.equal(total, x + residual) and torch.equal(norm, rms_norm(x + residual, weight))
    with pytest.raises(ValueError, match=r"residual must have shape \[4, 9\], got \[9\]"):
        add_rms_norm(x, residual[0], weight)
    with pytest.raises(ValueError, match=r"weight must have shape \[9\], got \[8\]"):
        add_rms_norm(x, residual, weight[:8])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tree", TREES)
def test_scan_equals_reference(tree: str, dtype: torch.dtype, tiles: None) -> None:
    segments = Segments.from_lengths(*TREES[tree])
    inputs = scan_inputs(segments.num_tokens, segments.num_segments, dtype)
    options = {"delta_softplus": True, "segments": segments}
    ours = outputs_and_gradients(selective_scan, inputs, backend="torch", **options)
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    theirs = outputs_and_gradients(selective_scan, exact, backend="reference", **options)
    assert_same({k: v.double() for k, v in ours.items()}, theirs, TOLERANCE[dtype])
    assert ours["y"].dtype == dtype
    assert ours["final_state"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("tree", TREES)
def test_conv_equals_reference(tree: str, activation: str | None, dtype: torch.dtype) -> None:
    segments = Segments.from_lengths(*TREES[tree])
    inputs = conv_inputs(segments.num_tokens, segments.num_segments, dtype)
    options = {"activation": activation, "segments": segments}
    ours = outputs_and_gradients(causal_conv1d, inputs, backend="torch", **options)
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    theirs = outputs_and_gradients(causal_conv1d, exact, backend="reference", **options)
    assert_same({k: v.double() for k, v in ours.items()}, theirs, TOLERANCE[dtype])
    assert ours["y"].dtype == dtype


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
def test_conv_of_every_width_crosses_forks(width: int) -> None:
    segments = Segments.from_lengths([2, 1, 3, 1, 1, 5], [-1, 0, 1, 0, 3, 4])
    inputs = conv_inputs(segments.num_tokens, segments.num_segments, torch.float64, W=width)
    ours = outputs_and_gradients(causal_conv1d, inputs, activation="silu", segments=segments, backend="torch")
    theirs = outputs_and_gradients(causal_conv1d, inputs, activation="silu", segments=segments, backend="reference")
    assert_same(ours, theirs, 1e-10)


@pytest.mark.parametrize(("D", "N"), [(1, 1), (1, 16), (7, 1), (33, 2)])
def test_scan_of_every_state_size(D: int, N: int, tiles: None) -> None:
    segments = Segments.from_lengths([9, 4, 6, 20], [-1, 0, 0, -1])
    inputs = scan_inputs(39, 4, torch.float64, D=D, N=N)
    ours = outputs_and_gradients(selective_scan, inputs, delta_softplus=True, segments=segments, backend="torch")
    theirs = outputs_and_gradients(selective_scan, inputs, delta_softplus=True, segments=segments, backend="reference")
    assert_same(ours, theirs, 1e-10)


def test_strides_and_index_types_change_nothing() -> None:
    """Views, as a model's splits and transposes make them, and the int32 boundaries that CUDA kernels want."""
    segments = Segments.from_lengths([9, 4, 6, 20], [-1, 0, 0, -1])
    narrow = Segments(segments.cu_seqlens.int(), segments.parent.int())
    assert narrow == segments
    for op, inputs, options in (
        (selective_scan, scan_inputs(39, 4, torch.float64), {"delta_softplus": True}),
        (causal_conv1d, conv_inputs(39, 4, torch.float64), {"activation": "silu"}),
    ):
        views = {k: v.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_() for k, v in inputs.items()}
        assert not any(view.is_contiguous() for view in views.values())
        plain = outputs_and_gradients(op, inputs, segments=segments, backend="torch", **options)
        assert_same(outputs_and_gradients(op, views, segments=narrow, backend="torch", **options), plain, 1e-12)


@pytest.mark.parametrize("missing", ["D", "z", "delta_bias", "initial_state"])
def test_scan_without_optional_inputs(missing: str, tiles: None) -> None:
    segments = Segments.from_lengths([9, 4, 6, 20], [-1, 0, 0, -1])
    inputs = scan_inputs(segments.num_tokens, segments.num_segments, torch.float64)
    del inputs[missing]
    inputs["delta"] = inputs["delta"].detach().abs().requires_grad_()  # without softplus a step must be positive
    ours = outputs_and_gradients(selective_scan, inputs, segments=segments, backend="torch")
    theirs = outputs_and_gradients(selective_scan, inputs, segments=segments, backend="reference")
    assert_same(ours, theirs, 1e-10)


def test_gradients_are_the_finite_differences() -> None:
    """Against neither backend: numerical derivatives of the op itself, through a fork and the final state."""
    segments = Segments.from_lengths([3, 2, 2], [-1, 0, 0])
    inputs = scan_inputs(7, 3, torch.float64, D=2, N=2)
    names = list(inputs)

    def scan(*values: Tensor) -> Any:
        named = dict(zip(names, values, strict=True))
        return selective_scan(**named, delta_softplus=True, segments=segments, output_final_state=True, backend="torch")

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))
    conv = conv_inputs(7, 3, torch.float64, D=2)
    assert torch.autograd.gradcheck(
        lambda *v: causal_conv1d(
            **dict(zip(conv, v, strict=True)), activation="silu", segments=segments, output_final_state=True
        ),
        tuple(conv.values()),
    )


def test_random_trees(tiles: None) -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(15):
        count = int(torch.randint(1, 9, (), generator=generator))
        lengths = [int(torch.randint(0, 20, (), generator=generator)) for _ in range(count)]
        parents = [int(torch.randint(-1, s, (), generator=generator)) if s else -1 for s in range(count)]
        segments = Segments.from_lengths(lengths, parents)
        for op, inputs, options in (
            (selective_scan, scan_inputs(sum(lengths), count, torch.float64), {"delta_softplus": True}),
            (ssd, ssd_inputs(sum(lengths), count, torch.float64), {"dt_softplus": True}),
            (causal_conv1d, conv_inputs(sum(lengths), count, torch.float64), {"activation": "silu"}),
        ):
            ours = outputs_and_gradients(op, inputs, segments=segments, backend="torch", **options)
            theirs = outputs_and_gradients(op, inputs, segments=segments, backend="reference", **options)
            assert_same(ours, theirs, 1e-10)


def alone(op: Callable[..., Any], inputs: dict[str, Tensor], segments: Segments, leaf: int) -> Tensor:
    """`op`'s output on the tokens of one segment, its whole path run as one sequence on its own."""
    path = [leaf]
    while segments.parent[path[0]] >= 0:
        path.insert(0, int(segments.parent[path[0]]))
    tokens = torch.cat([torch.arange(*segments.cu_seqlens[s : s + 2].tolist()) for s in path])
    per_token = {"u", "delta", "dt", "B", "C", "z", "x"}
    own = {k: v[tokens] if k in per_token else v for k, v in inputs.items() if k != "initial_state"}
    y: Tensor = op(**own, initial_state=inputs["initial_state"][path[:1]])
    return y[-int(segments.lengths[leaf]) :] if segments.lengths[leaf] else y[:0]


def sabotaged_segments(segments: Segments, what: str) -> Segments:
    """What a stack without the reset, or without the fork, computes."""
    if what == "no reset":
        count = segments.num_segments
        return Segments(segments.cu_seqlens, torch.arange(-1, count - 1))
    return Segments(segments.cu_seqlens, torch.full_like(segments.parent, -1))


def packed_equals_alone(segments: Segments, run_on: Segments | None = None) -> float:
    """Largest relative error between each segment packed and the same segment with its path alone."""
    S = segments.num_segments
    worst = 0.0
    for op, inputs in (
        (lambda **k: selective_scan(**k, delta_softplus=True), scan_inputs(segments.num_tokens, S, torch.float64)),
        (lambda **k: ssd(**k, dt_softplus=True), ssd_inputs(segments.num_tokens, S, torch.float64)),
        (lambda **k: causal_conv1d(**k, activation="silu"), conv_inputs(segments.num_tokens, S, torch.float64)),
    ):
        packed = op(**inputs, segments=run_on or segments)
        for s in range(S):
            expected = alone(op, inputs, segments, s)
            worst = max(worst, relative_error(packed[segments.cu_seqlens[s] : segments.cu_seqlens[s + 1]], expected))
    return worst


@pytest.mark.parametrize("tree", TREES)
def test_packed_and_forked_equal_alone(tree: str, tiles: None) -> None:
    assert packed_equals_alone(Segments.from_lengths(*TREES[tree])) < 1e-10


@pytest.mark.parametrize(("tree", "what"), [("odd lengths", "no reset"), ("pair", "no fork"), ("deep tree", "no fork")])
def test_the_check_above_notices_sabotage(tree: str, what: str) -> None:
    segments = Segments.from_lengths(*TREES[tree])
    assert packed_equals_alone(segments, run_on=sabotaged_segments(segments, what)) > 1e-2


def test_a_lost_conv_window_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the window's crossing is broken here, not the state's."""
    segments = Segments.from_lengths(*TREES["pair"])
    real = Segments.windows
    lost = lambda self, width: torch.where(real(self, width) >= self.cu_seqlens[self.segment_of_token][:, None],  # noqa: E731
                                           real(self, width), -1)  # fmt: skip
    monkeypatch.setattr(Segments, "windows", lost)
    assert packed_equals_alone(segments) > 1e-2


def test_backward_twice_gives_the_same_bits() -> None:
    segments = Segments.from_lengths([40, 9, 9, 9, 30], [-1, 0, 0, 0, -1])
    inputs = scan_inputs(97, 5, torch.float32, D=64, N=16)
    first, second = (
        outputs_and_gradients(selective_scan, inputs, delta_softplus=True, segments=segments) for _ in range(2)
    )
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_memory_grows_with_T_times_D_not_with_T_times_D_times_N() -> None:
    """What autograd keeps for the backward pass: the inputs, one [T, D] and 1/16th of the states."""
    T, D, N = 512, 32, 16
    inputs = scan_inputs(T, 1, torch.float32, D=D, N=N)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        selective_scan(**inputs, delta_softplus=True)
    assert sum(kept) < 0.5 * T * D * N


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_token_logps_equals_reference(chunk_size: int | None, dtype: torch.dtype) -> None:
    hidden, weight = random(11, 6, dtype=dtype), random(13, 6, dtype=dtype)
    labels = torch.tensor([0, 12, -100, 3, 3, -100, 7, 1, 2, 5, -100])
    projection = torch.randn(11, dtype=torch.float64)
    results = []
    for h, w, backend in ((hidden, weight, "torch"), (hidden.double(), weight.double(), "reference")):
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        logps = token_logps(h, w, labels, chunk_size=chunk_size, backend=backend)
        results.append((logps, *torch.autograd.grad((logps * projection).sum(), (h, w))))
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) < {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert results[0][0][labels == -100].eq(0).all()


def test_autocast_changes_projections_only() -> None:
    """Under autocast the head runs in bf16, the scan's own sums stay fp32."""
    inputs = scan_inputs(20, 1, torch.float32)
    plain = outputs_and_gradients(selective_scan, inputs, delta_softplus=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = outputs_and_gradients(selective_scan, inputs, delta_softplus=True)
        logps = token_logps(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 1, 2]))
    assert all(torch.equal(plain[k], cast[k]) for k in plain)
    assert logps.dtype == torch.float32


def test_errors_name_the_argument() -> None:
    inputs = {k: v.detach() for k, v in scan_inputs(6, 1, torch.float32).items()}
    with pytest.raises(ValueError, match=r"B must have shape \[6, 3\]"):
        selective_scan(**inputs | {"B": inputs["B"][:5]})
    with pytest.raises(ValueError, match="segments cover 5 tokens, u has 6"):
        selective_scan(**inputs, segments=Segments.from_lengths([5]))
    with pytest.raises(ValueError, match="no backend 'metal'; choose auto, cuda, reference, torch"):
        selective_scan(**inputs, backend="metal")
    with pytest.raises(ValueError, match="C must be floating point"):
        selective_scan(**inputs | {"C": inputs["C"].long()})
    with pytest.raises(ValueError, match="delta is on meta"):
        selective_scan(**inputs | {"delta": inputs["delta"].to("meta")})
    with pytest.raises(ValueError, match="activation must be None or 'silu'"):
        causal_conv1d(torch.randn(4, 2), torch.randn(2, 3), activation="gelu")
    with pytest.raises(ValueError, match=r"labels must be -100 or in \[0, 7\)"):
        token_logps(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 7, 2]))
    with pytest.raises(ValueError, match="index of an earlier segment"):
        Segments.from_lengths([1, 2], [1, -1])
    with pytest.raises(ValueError, match=r"one-dimensional.*got \[1, 2\]"):
        Segments([[0, 3]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="never decrease"):
        Segments(torch.tensor([0, 3, 2]))


def test_windows_and_predecessors() -> None:
    segments = Segments.from_lengths([2, 1, 0, 2], [-1, 0, 1, 2])
    assert segments.predecessor().tolist() == [-1, 0, 1, 2, 3]
    assert segments.windows(3)[3].tolist() == [0, 1, 2]
    assert torch.equal(segments.windows_at(torch.tensor([3, 0]), 3), segments.windows(3)[[3, 0]])
    assert segments.windows(3)[0].tolist() == [-1, -2, -3]  # rows 0, 1, 2 of the initial windows, oldest first
    assert segments.final_windows(3)[2].tolist() == [0, 1, 2]
    assert segments.levels == [[0], [1], [2], [3]]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("use", ["sum", "scaled sum", "mean", "weighted", "one row"])
def test_token_logps_of_which_only_the_sum_matters(use: str, backend: str) -> None:
    """The gradient made in the forward pass, and the way back from it where it is not what is wanted."""
    hidden, weight = torch.randn(37, 16, dtype=torch.float64), torch.randn(50, 16, dtype=torch.float64)
    labels = torch.randint(50, (37,))
    labels[::7] = -100
    if use == "one row":
        hidden, labels = hidden[1:2], labels[1:2]
    uses = {
        "sum": Tensor.sum,
        "scaled sum": lambda logps: -3 * logps.sum() / 5,
        "mean": Tensor.mean,
        "weighted": lambda logps: (logps * torch.linspace(-1, 2, logps.numel())).sum(),
        "one row": lambda logps: logps.sin().sum(),
    }
    results = []
    for summed in (True, False):
        inputs = [t.clone().requires_grad_() for t in (hidden, weight)]
        logps = token_logps(*inputs, labels, chunk_size=8, backend=backend, summed=summed)
        results.append((logps.detach(), *torch.autograd.grad(uses[use](logps), inputs)))
    for ours, plain in zip(*results, strict=True):
        assert relative_error(ours, plain) < 1e-14


def test_token_logps_of_a_sum_are_not_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    with torch.no_grad(), monkeypatch.context() as patched:  # and gradients that no one wants are not made
        patched.setattr(importlib.import_module("mambalign.ops.token_logps"), "_Gradients", None)
        token_logps(hidden, weight, torch.arange(9) % 7, summed=True)
    loss = token_logps(hidden, weight, torch.arange(9) % 7, summed=True).sum()
    monkeypatch.setattr(importlib.import_module("mambalign.ops.token_logps"), "_logits", None)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    none = token_logps(hidden[:0], weight, torch.arange(0), summed=True).sum()
    assert not torch.autograd.grad(none, weight)[0].any()
