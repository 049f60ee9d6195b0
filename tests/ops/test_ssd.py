"""Mamba-2's ops beyond what `test_ops.py` asks of all: the scan and its reference, the gated norm, fla's kernels."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated, mamba2_chunk_scan

from mambalign.ops import Segments, fla_ssd, gated_rms_norm, reference, ssd, torch_ssd
from tests.ops.test_ops import (
    TOLERANCE,
    TREES,
    assert_same,
    outputs_and_gradients,
    poisoned,  # noqa: F401
    random,
    relative_error,
    ssd_inputs,
    tiles,  # noqa: F401
)


def exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().double().requires_grad_() for name, value in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tree", TREES)
def test_ssd_equals_reference(tree: str, dtype: torch.dtype, tiles: None) -> None:  # noqa: F811
    segments = Segments.from_lengths(*TREES[tree])
    inputs = ssd_inputs(segments.num_tokens, segments.num_segments, dtype)
    options: dict[str, Any] = {"dt_softplus": True, "dt_limit": (0.1, 1.5), "segments": segments}
    ours = outputs_and_gradients(ssd, inputs, backend="torch", **options)
    theirs = outputs_and_gradients(ssd, exact(inputs), backend="reference", **options)
    assert_same({k: v.double() for k, v in ours.items()}, theirs, TOLERANCE[dtype])
    assert ours["y"].dtype == dtype
    assert ours["final_state"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(("H", "P", "G", "N"), [(1, 1, 1, 1), (6, 1, 3, 2), (5, 4, 5, 1), (3, 7, 1, 16)])
def test_ssd_of_every_shape(H: int, P: int, G: int, N: int, tiles: None) -> None:  # noqa: F811
    segments = Segments.from_lengths([9, 4, 6, 20], [-1, 0, 0, -1])
    inputs = ssd_inputs(39, 4, torch.float64, H=H, P=P, G=G, N=N) | {"D": random(H, P, dtype=torch.float64)}
    ours = outputs_and_gradients(ssd, inputs, dt_softplus=True, segments=segments, backend="torch")
    theirs = outputs_and_gradients(ssd, inputs, dt_softplus=True, segments=segments, backend="reference")
    assert_same(ours, theirs, 1e-10)


@pytest.mark.parametrize("missing", ["D", "z", "dt_bias", "initial_state"])
def test_ssd_without_optional_inputs(missing: str) -> None:
    segments = Segments.from_lengths([9, 4, 6, 80], [-1, 0, 0, -1])
    inputs = ssd_inputs(99, 4, torch.float64)
    del inputs[missing]
    ours = outputs_and_gradients(ssd, inputs, segments=segments, backend="torch")
    theirs = outputs_and_gradients(ssd, inputs, segments=segments, backend="reference")
    assert_same(ours, theirs, 1e-10)


def test_ssd_equals_transformers() -> None:
    """The definition itself, against the peer's code, beyond a chunk of either."""
    T, H = 150, 4
    inputs = {k: v.detach() for k, v in ssd_inputs(T, 1, torch.float32).items() if k not in ("z", "initial_state")}
    limits = (0.3, 1.1)
    batched = {k: inputs[k][None] for k in ("dt", "B", "C")} | {k: inputs[k] for k in ("A", "D", "dt_bias")}
    theirs, final = mamba2_chunk_scan(
        inputs["x"][None], **batched, chunk_size=32, dt_softplus=True, dt_limit=limits, return_final_states=True
    )
    for backend in ("torch", "reference"):
        y, state = ssd(**inputs, dt_softplus=True, dt_limit=limits, output_final_state=True, backend=backend)
        assert relative_error(y, theirs[0]) < 1e-5
        assert relative_error(state, final) < 1e-5
    assert state.shape == (1, H, 3, 5)


def test_ssd_gradients_are_the_finite_differences() -> None:
    segments = Segments.from_lengths([2, 1, 3], [-1, 0, 0])
    inputs = ssd_inputs(6, 3, torch.float64, H=2, P=1, G=1, N=2)

    def scan(*values: Tensor) -> Any:
        named = dict(zip(inputs, values, strict=True))
        return ssd(**named, dt_softplus=True, segments=segments, output_final_state=True, backend="torch")

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


def test_strong_decays_do_not_blur_weak_ones() -> None:
    """A step that forgets everything (dt A = -3000), then steps that keep: decays are differences of huge sums."""
    inputs = ssd_inputs(60, 1, torch.float32)
    with torch.no_grad():
        inputs["dt"].copy_(torch.full((60, 4), 0.01))
        inputs["dt"][5] = 3000.0
        inputs["A"].fill_(-1.0)
    del inputs["dt_bias"], inputs["initial_state"]
    ours = outputs_and_gradients(ssd, inputs, backend="torch")
    theirs = outputs_and_gradients(ssd, exact(inputs), backend="reference")
    assert_same({k: v[6:] if k in ("y", "x", "B", "C") else v for k, v in ours.items() if k != "dt"},
                {k: (v[6:] if k in ("y", "x", "B", "C") else v).float() for k, v in theirs.items() if k != "dt"},
                2e-6)  # fmt: skip


def test_ssd_twice_gives_the_same_bits_and_views_change_nothing() -> None:
    segments = Segments.from_lengths([140, 9, 9, 9, 30], [-1, 0, 0, 0, -1])
    inputs = ssd_inputs(197, 5, torch.float32, H=8, P=16, N=16)
    views = {k: v.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_() for k, v in inputs.items()}
    first, second, third = (
        outputs_and_gradients(ssd, given, dt_softplus=True, segments=segments) for given in (inputs, inputs, views)
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert_same(third, first, 2e-6)


def test_ssd_keeps_its_inputs_only() -> None:
    T, H, P, N = 512, 4, 16, 32
    inputs = ssd_inputs(T, 1, torch.float32, H=H, P=P, N=N)
    del inputs["z"]
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        ssd(**inputs, dt_softplus=True)
    given = sum(t.nbytes for t in inputs.values())
    assert sum(kept.values()) < given + 5 * inputs["dt"].nbytes
    assert given < T * H * P * N  # a state a token would show


def test_ssd_under_autocast() -> None:
    inputs = ssd_inputs(20, 1, torch.float32)
    plain = outputs_and_gradients(ssd, inputs, dt_softplus=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = outputs_and_gradients(ssd, inputs, dt_softplus=True)
    assert all(torch.equal(plain[k], cast[k]) for k in plain)


def test_ssd_errors_name_the_argument() -> None:
    inputs = {k: v.detach() for k, v in ssd_inputs(6, 1, torch.float32).items()}
    for change, says in (
        ({"C": inputs["C"][:5]}, r"C must have shape \[6, 2, 5\]"),
        ({"D": torch.randn(4, 4)}, r"D must have shape \[4, 3\]"),
        ({"x": torch.randn(6, 3, 3)}, "3 heads of x must be a multiple of the 2 groups"),
        ({"x": torch.randn(6, 12)}, r"x must be \[T, H, P\]"),
        ({"dt": inputs["dt"].long()}, "dt must be floating point"),
        ({"B": inputs["B"].to("meta")}, "B is on meta"),
        ({"dt_limit": (1.0, 0.5)}, r"dt_limit must be two increasing numbers.*\(1.0, 0.5\)"),
        ({"segments": Segments.from_lengths([5])}, "segments cover 5 tokens, x has 6"),
        ({"backend": "fla"}, "no backend 'fla'; choose auto, cuda, reference, torch"),
        ({"backend": "cuda"}, "backend 'cuda' needs a CUDA device, not cpu"),
    ):
        with pytest.raises(ValueError, match=says):
            ssd(**inputs | change)


# --- flash-linear-attention's kernels, by a stand-in of the same signature


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """fla-core 0.6.0's contract, in loops: packed [1, T, H, .], states [N, H, K, V], no empty sequence."""
    assert not kwargs and g is not None and g_gamma is None and cu_seqlens is not None and not state_v_first
    assert q.shape == k.shape and q.shape[0] == 1 and initial_state is not None and g.dtype == torch.float32
    assert initial_state.shape == (len(cu_seqlens) - 1, *q.shape[2:], v.shape[3]) and bool(
        (cu_seqlens.diff() > 0).all()
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outputs, finals = [], []
    for state, (begin, end) in zip(initial_state, cu_seqlens.unfold(0, 2, 1).tolist(), strict=True):
        for t in range(begin, end):
            state = g[0, t].exp()[:, None, None] * state + k[0, t, :, :, None] * v[0, t, :, None]
            outputs.append((scale * q[0, t, :, :, None] * state).sum(1))
        finals.append(state)
    return torch.stack(outputs)[None].to(v.dtype), torch.stack(finals) if output_final_state else None


@pytest.mark.parametrize("limits", [(0.0, math.inf), (0.1, 1.5)])
@pytest.mark.parametrize("tree", TREES)
def test_fla_is_given_the_right_arguments(
    tree: str, limits: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fla_ssd, "kernel", lambda: chunk_simple_gla)
    segments = Segments.from_lengths(*TREES[tree])
    inputs = ssd_inputs(segments.num_tokens, segments.num_segments, torch.float32)
    order = list(inspect.signature(reference.ssd).parameters)
    options = {"dt_softplus": True, "dt_limit": limits, "segments": segments}
    ours, theirs = (
        outputs_and_gradients(lambda run=run, **given: run(*(given[name] for name in order)), inputs, **options)
        for run in (fla_ssd.ssd, reference.ssd)
    )
    assert_same(ours, theirs, 1e-5)


def test_when_fla_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, half = torch.device("cuda"), torch.empty(3, 4, 8, dtype=torch.bfloat16)
    monkeypatch.setattr(fla_ssd, "kernel", lambda: ImportError("No module named 'fla'"))
    assert "pip install 'mambalign[mamba2]'): No module named 'fla'" in (fla_ssd.unavailable(gpu, half, half) or "")
    monkeypatch.setattr(fla_ssd, "kernel", lambda: chunk_simple_gla)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for version in ((3, 4, 0), (3, 7, 0)):
        monkeypatch.setattr(fla_ssd, "triton", lambda version=version: version)
        assert "Triton 3.7.0 on this GPU" in (fla_ssd.unavailable(gpu) or "").replace("3.4.0", "3.7.0")
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
            assert fla_ssd.unavailable(gpu) is None
    monkeypatch.setattr(fla_ssd, "triton", lambda: (3, 7, 1))
    assert fla_ssd.unavailable(gpu) is None and fla_ssd.unavailable(gpu, half, half) is None
    assert "takes 16-bit x, not torch.float32" in (fla_ssd.unavailable(gpu, half.float(), half) or "")
    assert "takes up to 256 states, not 512" in (fla_ssd.unavailable(gpu, half, torch.empty(3, 4, 512)) or "")
    assert fla_ssd.unavailable(torch.device("cpu")) == "needs a CUDA device, not cpu"


# --- the gated norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("group_size", [None, 6, 1])
def test_gated_norm(group_size: int | None, norm_before_gate: bool, dtype: torch.dtype) -> None:
    """Against mamba_ssm's definition in plain words; gradients by autograd of that."""
    x, z = (random(2, 7, 12, dtype=dtype) for _ in range(2))
    weight = random(12, dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    def definition(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        gated = x if norm_before_gate else x * F.silu(z)
        groups = [
            part / (part.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() for part in gated.split(group_size or 12, -1)
        ]
        normed = torch.cat(groups, -1) * weight
        return normed * F.silu(z) if norm_before_gate else normed

    results = []
    for op, given in (
        (lambda *a: gated_rms_norm(*a, 1e-3, group_size, norm_before_gate), (x, z, weight)),
        (definition, [t.detach().double().requires_grad_() for t in (x, z, weight)]),
    ):
        y = op(*given)
        projection = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append([y, *torch.autograd.grad((y * projection).sum(), given)])
    assert results[0][0].dtype == dtype
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) < {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]


def test_gated_norm_equals_transformers_and_keeps_its_arguments_only() -> None:
    x, z = (random(5, 12, dtype=torch.float32) for _ in range(2))
    norm = MambaRMSNormGated(12, group_size=4, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        y = gated_rms_norm(x, z, norm.weight, group_size=4)
    assert sum(kept.values()) <= 2 * x.numel() + 12
    assert relative_error(y, norm(x, z)) < 1e-6


def test_gated_norm_errors() -> None:
    x = torch.randn(3, 12)
    with pytest.raises(ValueError, match=r"z must have shape \[3, 12\].*got \[3, 11\]"):
        gated_rms_norm(x, x[:, :11], torch.ones(12))
    for size in (5, 0):
        with pytest.raises(ValueError, match=f"group_size = {size} does not divide 12"):
            gated_rms_norm(x, x, torch.ones(12), group_size=size)


@pytest.mark.parametrize("slack", [0, 64])
def test_chunks_are_less_than_half_padding(slack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or as many sizes fewer as the slack allows."""
    monkeypatch.setattr(torch_ssd, "CPU_SLACK", 8 * slack)
    lengths = [1, 2, 3, 5, 33, 63, 64, 65, 100, 129]
    chunks = torch_ssd.plan(Segments.from_lengths(lengths), 8, torch.device("cpu"))
    assert chunks.count == sum(-(-length // 64) for length in lengths)
    assert [bucket.tokens.shape[1] for bucket in chunks.buckets] == ([64, 8] if slack else [64, 8, 4, 2, 1])
    sizes = [(bucket.tokens.numel(), bucket.exists) for bucket in chunks.buckets]
    used = [padded if exists is None else int(exists.sum()) for padded, exists in sizes]
    assert sum(used) == sum(lengths)
    if not slack:
        assert all(2 * real > padded for real, (padded, _) in zip(used, sizes, strict=True))
