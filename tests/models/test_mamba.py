"""The models: equal to transformers on the same weights, and exact on packed, forked and padded input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload
from torch import Tensor

from mambalign.models import FalconMambaForCausalLM, Mamba2ForCausalLM, MambaForCausalLM
from mambalign.models.mamba import FP32_PARAMETERS, model_class
from mambalign.ops import Segments

FAMILIES = {
    "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM, MambaForCausalLM),
    "falcon_mamba": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM, FalconMambaForCausalLM),
    "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM, Mamba2ForCausalLM),
}
V = 67


def config_of(family: str, **changes: Any) -> Any:
    sizes = dict(vocab_size=V, hidden_size=24, num_hidden_layers=3, state_size=4, pad_token_id=0, eos_token_id=1)
    if family == "mamba2":  # heads of 8 channels, three in a group
        expand = changes.get("expand", 2)
        sizes |= dict(num_heads=3 * expand, head_dim=8, n_groups=expand, chunk_size=8, tie_word_embeddings=True)
    return FAMILIES[family][0](**sizes | changes)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def both(family: str, tmp_path: Path) -> tuple[Any, Any]:
    """(transformers' model, ours) with the same weights, all parameters away from their initial values."""
    _, theirs, ours = FAMILIES[family]
    model = theirs(config_of(family)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    return model, ours.from_pretrained(tmp_path).eval()


def ids_and_mask(side: str | None) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, V, (3, 13))
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :5] = 0
        mask[2, :12] = 0
    elif side == "right":
        mask[0, -5:] = 0
        mask[2, -12:] = 0
    return ids * mask, mask


def relative(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_logits_equal_transformers(both: tuple[Any, Any], side: str | None) -> None:
    theirs, ours = both
    ids, mask = ids_and_mask(side)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        got = ours(ids, attention_mask=mask).logits
    assert relative(got[mask.bool()], expected[mask.bool()]) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"use_bias": True, "use_conv_bias": False, "conv_kernel": 2},
        {"expand": 3, "time_step_rank": 7, "state_size": 1, "layer_norm_epsilon": 1e-3},
        {"hidden_act": "swish", "residual_in_fp32": False, "tie_word_embeddings": False},
        {"hidden_act": "gelu"},
    ],
    ids=str,
)
def test_every_shape_and_activation_equals_transformers(family: str, changes: dict[str, Any]) -> None:
    _, theirs, ours = FAMILIES[family]
    plain, model = (kind(config_of(family, **changes)).eval() for kind in (theirs, ours))
    model.load_state_dict(plain.state_dict())
    ids, mask = ids_and_mask("left")
    options: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        assert relative(model(ids).logits, plain(ids).logits) < 1e-5
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_loss_hidden_states_and_gradients_equal_transformers(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    ids, _ = ids_and_mask(None)
    expected = theirs(ids, labels=ids, output_hidden_states=True)
    got = ours(ids, labels=ids, output_hidden_states=True)
    assert abs(got.loss - expected.loss) < 1e-5
    assert len(got.hidden_states) == len(expected.hidden_states)
    assert all(relative(a, b) < 1e-5 for a, b in zip(got.hidden_states, expected.hidden_states, strict=True))
    expected.loss.backward()
    got.loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, gradients[name].grad) < 1e-4, name


def test_what_we_save_is_what_transformers_loads(both: tuple[Any, Any], family: str, tmp_path: Path) -> None:
    _, ours = both
    ours.save_pretrained(tmp_path / "ours")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(plain) is FAMILIES[family][1]
    ids, _ = ids_and_mask(None)
    with torch.no_grad():
        assert relative(ours(ids).logits, plain(ids).logits) < 1e-5


def gradients_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


TREES = {
    "packed": ([5, 1, 9, 2], [-1] * 4),
    "pair": ([6, 4, 7], [-1, 0, 0]),
    "pair with a one-token prompt": ([1, 4, 7], [-1, 0, 0]),
    "tree of turns": ([3, 2, 5, 1, 4, 6], [-1, 0, 0, 1, 1, -1]),
}


def path_of(segments: Segments, leaf: int) -> list[int]:
    path = [leaf]
    while segments.parent[path[0]] >= 0:
        path.insert(0, int(segments.parent[path[0]]))
    return path


def alone_loss_and_logits(model: Any, ids: Tensor, segments: Segments, padding: str) -> tuple[Tensor, list[Tensor]]:
    """Every root-to-leaf path as a sequence of its own, in one padded batch; each segment's tokens scored once."""
    leaves = [s for s in range(segments.num_segments) if s not in segments.parent.tolist()]
    sequences, owners = [], []
    for leaf in leaves:
        path = path_of(segments, leaf)
        sequences.append(torch.cat([ids[segments.cu_seqlens[s] : segments.cu_seqlens[s + 1]] for s in path]))
        owners.append(torch.cat([torch.full((int(segments.lengths[s]),), s) for s in path]))
    width = max(len(s) for s in sequences) + (0 if padding == "none" else 3)
    loss = torch.zeros((), dtype=next(model.parameters()).dtype)
    logits: dict[int, Tensor] = {}
    for sequence, owner in zip(sequences, owners, strict=True):
        pad = width - len(sequence) if padding != "none" else 0
        filler = torch.zeros(pad, dtype=torch.long)
        left = padding == "left"
        row = torch.cat([filler, sequence] if left else [sequence, filler])[None]
        mask = torch.cat([filler, torch.ones_like(sequence)] if left else [torch.ones_like(sequence), filler])[None]
        out = model(row, attention_mask=mask).logits[0]
        out = out[pad:] if left else out[: len(sequence)]
        for s in owner.unique().tolist():
            if s in logits:
                continue  # a shared prefix is scored once
            where = (owner == s).nonzero()[:, 0]
            logits[s] = out[where]
            scored = where[where > 0]
            loss = loss - out[scored - 1].log_softmax(-1).gather(1, sequence[scored, None]).sum()
    return loss, [logits[s] for s in range(segments.num_segments)]


def packed_loss_and_logits(model: Any, ids: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    before = segments.predecessor()
    wanted = (before >= 0).nonzero()[:, 0]
    logits = model(ids[None], segments=segments).logits[0]
    out = model(ids[None], segments=segments, target_positions=before[wanted], target_ids=ids[wanted])
    assert out.logits is None
    return -out.logps.sum(), logits


def compare(model: Any, segments: Segments, padding: str, run_on: Segments | None = None) -> tuple[float, float]:
    """(worst relative error of the logits, of any parameter's gradient) of packed and forked against alone."""
    ids = torch.randint(2, V, (segments.num_tokens,), generator=torch.Generator().manual_seed(3))
    loss, logits = packed_loss_and_logits(model, ids, run_on or segments)
    packed = gradients_of(model, loss)
    loss, expected = alone_loss_and_logits(model, ids, segments, padding)
    alone = gradients_of(model, loss)
    return relative(logits, torch.cat(expected)), max(relative(packed[name], alone[name]) for name in alone)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_packed_and_forked_equal_alone(
    both: tuple[Any, Any], tree: str, padding: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = both[1].to(dtype)
    logits, gradient = compare(model, Segments.from_lengths(*TREES[tree]), padding)
    assert logits < tolerance
    assert gradient < tolerance


@pytest.mark.parametrize("sabotage", ["reset", "fork", "window"])
def test_the_comparison_notices_sabotage(both: tuple[Any, Any], sabotage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = both[1].double()
    segments = Segments.from_lengths(*TREES["packed" if sabotage == "reset" else "pair"])
    run_on = None
    if sabotage == "reset":  # the state runs on into the next document, as in every stack that ignores boundaries
        run_on = Segments(segments.cu_seqlens, torch.arange(-1, segments.num_segments - 1))
        monkeypatch.setattr(run_on, "predecessor", segments.predecessor)
    elif sabotage == "fork":
        run_on = Segments(segments.cu_seqlens)
        monkeypatch.setattr(run_on, "predecessor", segments.predecessor)
    else:  # only the convolution forgets the prompt's last inputs
        monkeypatch.setattr(
            Segments, "windows", lambda self, width: torch.full((self.num_tokens, width), -1, dtype=torch.long)
        )
    logits, gradient = compare(model, segments, "none", run_on)
    assert logits > 1e-3
    assert gradient > 1e-3


def test_labels_of_a_packed_row_never_cross_documents(both: tuple[Any, Any]) -> None:
    model = both[1]
    segments = Segments.from_lengths([4, 6])
    ids = torch.randint(2, V, (10,))
    labels = ids.clone()
    labels[2] = -100
    loss = model(ids[None], segments=segments, labels=labels[None]).loss
    parts = [
        model(ids[None, :4], labels=labels[None, :4]).loss * 2,
        model(ids[None, 4:], labels=labels[None, 4:]).loss * 5,
    ]
    assert abs(loss - sum(parts) / 7) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_a_padded_batch_are_those_of_its_rows(both: tuple[Any, Any], side: str) -> None:
    """transformers would also train the first token of a left-padded row, from the pad before it."""
    model = both[1]
    ids, mask = ids_and_mask(side)
    rows = [row[real.bool()][None] for row, real in zip(ids, mask, strict=True)]
    summed = sum(model(row, labels=row).loss * (row.shape[1] - 1) for row in rows if row.shape[1] > 1)
    count = sum(row.shape[1] - 1 for row in rows)
    for labels in (ids, ids.masked_fill(mask == 0, -100)):
        assert abs(model(ids, attention_mask=mask, labels=labels).loss - summed / count) < 1e-5
    packed, segments = torch.cat(rows, 1), Segments.from_lengths([row.shape[1] for row in rows])
    for inputs in ({"input_ids": ids, "labels": ids, "attention_mask": mask},
                   {"input_ids": packed, "labels": packed, "segments": segments}):  # fmt: skip
        assert abs(model(**inputs, num_items_in_batch=7).loss - summed / 7) < 1e-4


def test_a_row_without_tokens(both: tuple[Any, Any]) -> None:
    ids = torch.empty(1, 0, dtype=torch.long)
    assert both[1](ids, segments=Segments.from_lengths([])).logits.shape == (1, 0, V)


def test_generate_equals_transformers(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    ids, mask = ids_and_mask("left")
    options: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    for row in range(3):
        real = mask[row].bool()
        alone = ours.generate(ids[row, real][None], max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert torch.equal(ours.generate(ids, **options)[row, -20:], alone[0, -20:])


@pytest.mark.parametrize("cuts", [[1, 1, 11], [2, 5, 6], [12, 1], [4, 1, 1, 7]])
def test_a_cache_continues_with_many_tokens_at_once(both: tuple[Any, Any], cuts: list[int]) -> None:
    model = both[1]
    ids = torch.randint(2, V, (2, sum(cuts)))
    expected, cache, outputs, start = model(ids).logits, None, [], 0
    for cut in cuts:
        out = model(ids[:, start : start + cut], cache_params=cache, use_cache=True)
        cache, start = out.cache_params, start + cut
        outputs.append(out.logits)
    assert relative(torch.cat(outputs, 1), expected) < 1e-5


def test_a_batch_of_uneven_continuations(both: tuple[Any, Any]) -> None:
    """The second turn of two chats, left-padded, on the cache of the first; one of them adds nothing."""
    model = both[1]
    first, second = torch.randint(2, V, (2, 7)), torch.randint(2, V, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    cache = model(first, use_cache=True).cache_params
    both_turns = torch.cat([torch.ones_like(first), mask], 1)  # as generate() passes it
    out = model(second * mask, cache_params=cache, use_cache=True, attention_mask=both_turns)
    alone = model(torch.cat([first[:1], second[:1, 2:]], 1)).logits
    assert relative(out.logits[:1, 2:], alone[:, 7:]) < 1e-5
    step = model(second[:, :1], cache_params=out.cache_params, use_cache=True).logits
    assert relative(step[1], model(torch.cat([first[1:], second[1:, :1]], 1)).logits[0, -1:]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_parameters_stay_fp32(both: tuple[Any, Any], family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ours = both[1]
    ours(torch.randint(2, V, (1, 5))).logits.sum().backward()
    exact = {n: p.clone() for n, p in ours.named_parameters() if n.endswith(FP32_PARAMETERS)}
    ours.save_pretrained(tmp_path / "saved")
    loaded = FAMILIES[family][2].from_pretrained(tmp_path / "saved", dtype=dtype)
    built = FAMILIES[family][2]._from_config(ours.config, dtype=dtype)
    assert all(p.dtype == torch.float32 for n, p in built.named_parameters() if n.endswith(FP32_PARAMETERS))
    for model in (loaded, ours.to(dtype), ours.half()):
        for name, parameter in model.named_parameters():
            if name.endswith(FP32_PARAMETERS):
                assert parameter.dtype == torch.float32, name
                assert torch.equal(parameter, exact[name]), name  # not rounded on the way
            else:
                assert parameter.dtype in (dtype, torch.float16), name
            assert parameter.grad is None or parameter.grad.dtype == parameter.dtype, name
    assert loaded(torch.randint(2, V, (1, 5))).logits.isfinite().all()


@pytest.mark.parametrize("in_fp32", [True, False])
def test_the_residual_stream_is_as_wide_as_the_config_says(family: str, in_fp32: bool) -> None:
    model = FAMILIES[family][2](config_of(family, residual_in_fp32=in_fp32)).bfloat16()
    stream = model(torch.randint(2, V, (1, 5)), output_hidden_states=True).hidden_states
    assert {hidden.dtype for hidden in stream[:-1]} == {torch.float32 if in_fp32 else torch.bfloat16}


def test_pure_bf16_trains(both: tuple[Any, Any]) -> None:
    model = both[1].to(torch.bfloat16).train()
    ids = torch.randint(2, V, (2, 9))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(both: tuple[Any, Any], reentrant: bool) -> None:
    model = both[1].train()
    segments = Segments.from_lengths(*TREES["pair"])
    ids = torch.randint(2, V, (segments.num_tokens,))
    plain = gradients_of(model, packed_loss_and_logits(model, ids, segments)[0])
    kept = bytes_kept(model, ids, segments)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again = gradients_of(model, packed_loss_and_logits(model, ids, segments)[0])
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert bytes_kept(model, ids, segments) < 0.7 * kept  # it was on


def bytes_kept(model: Any, ids: Tensor, segments: Segments) -> int:
    """What autograd keeps between the forward and the backward pass."""
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        packed_loss_and_logits(model, ids, segments)
    return sum(kept)


def test_weights_offloaded_by_accelerate(both: tuple[Any, Any]) -> None:
    """Every parameter is on the meta device but while its module runs; some of ours are used by another."""
    model = both[1]
    ids, _ = ids_and_mask(None)
    with torch.no_grad():
        expected = model(ids).logits
        cpu_offload(model, execution_device="cpu")
        assert model.backbone.layers[0].mixer.conv1d.weight.is_meta
        assert torch.equal(model(ids).logits, expected)


def test_the_mixer_calls_its_projections(both: tuple[Any, Any], family: str) -> None:
    """A hook on any projection acts in training too: what adapters need."""
    model = both[1].train()
    called: set[str] = set()
    names = ("in_proj", "norm", "out_proj") if family == "mamba2" else ("in_proj", "x_proj", "dt_proj", "out_proj")
    for name in names:
        module = getattr(model.backbone.layers[0].mixer, name)
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(torch.randint(2, V, (1, 4)))
    assert called == set(names)


def test_clear_errors(both: tuple[Any, Any]) -> None:
    model = both[1]
    ids = torch.randint(2, V, (1, 6))
    with pytest.raises(ValueError, match=r"one packed row \[1, 5\]"):
        model(ids, segments=Segments.from_lengths([5]))
    with pytest.raises(ValueError, match="and a mask"):
        model(ids, segments=Segments.from_lengths([6]), attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(ids, attention_mask=torch.ones(1, 4))
    packed_elsewhere: dict[str, Any] = {
        "cu_seq_lens_q": torch.tensor([0, 2, 6]),
        "seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]]),
    }
    for mark, value in packed_elsewhere.items():
        for part in (model, model.backbone):
            with pytest.raises(ValueError, match=f"{mark}.* would be ignored.*segments="):
                part(ids, **{mark: value})
        model(ids, segments=Segments.from_lengths([2, 4]), **{mark: value})
    model(ids, position_ids=torch.arange(6)[None])
    with pytest.raises(ValueError, match="exactly one of"):
        model.backbone()
    with pytest.raises(ValueError, match="mambalign trains falcon_mamba, mamba, mamba2"):
        model_class(transformers.LlamaConfig())
    cache = model(ids, use_cache=True).cache_params
    with pytest.raises(ValueError, match="do not go together"):
        model(ids, segments=Segments.from_lengths([6]), cache_params=cache)
    with pytest.raises(ValueError, match=r"do not go together.*leave use_cache out"):
        model(ids, segments=Segments.from_lengths([6]), use_cache=True)
