"""Layers as CUDA graphs, without a GPU: the kernels are emulated, and a graph runs again what it was captured with.

So it repeats what a real graph would: the same calls on the same buffers and tables. What it cannot show is that CUDA
can capture them (tests marked `gpu`).
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from mambalign.models import cuda_graphs
from mambalign.models.mamba import FalconMambaForCausalLM, MambaForCausalLM
from mambalign.ops import Segments, cuda_conv, scan_plan
from tests.ops.test_cuda import built, emulation, pytestmark  # noqa: F401 (fixtures)

# Sizes of one graph each, several times; the trees of a size differ in lengths, numbers and forks.
TREES: list[tuple[list[int], list[int] | None]] = [
    ([40, 20], None),
    ([30, 31, 2], None),  # the same size, filled
    ([7, 50], None),
    ([60], None),
    ([20, 12, 9, 15], [-1, 0, 0, -1]),  # forked
    ([13, 13, 22, 1], [-1, 0, 0, -1]),
    ([11, 2, 2, 30], [-1, 0, 1, 0]),
    ([90, 20, 6], None),  # another size
    ([100, 20], None),
    ([100, 1], None),
    ([64], None),  # nothing to fill
    ([64], None),
    ([64], None),
]


class Again:
    """Stands in for a CUDA graph: `replay` runs the same function and leaves its results where the first ones are."""

    replays = 0

    def __init__(self, run: Callable[[], list[torch.Tensor]]):
        self._run, self.outputs = run, run()

    def replay(self) -> None:
        Again.replays += 1
        with torch.enable_grad():
            found = self._run()
        with torch.no_grad():
            for buffer, value in zip(self.outputs, found, strict=True):
                buffer.copy_(value)


def captured(run: Callable[[], list[torch.Tensor]], pool: Any) -> tuple[list[torch.Tensor], Again]:
    again = Again(run)
    for output in again.outputs:  # a capture runs nothing
        output.detach().fill_(torch.nan)
    return [*again.outputs], again


@pytest.fixture(autouse=True)
def stand_ins(emulation: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    for name, stand_in in {
        "_on_gpu": lambda x: True,
        "_new_pool": object,
        "_allocated": lambda device: 0,
        "_left": lambda device: float("inf"),
        "_captured": captured,
        "_lent": lambda tensor, graph: tensor,
    }.items():
        monkeypatch.setattr(cuda_graphs, name, stand_in)
    # Few blocks at a time, so that all numbers of units are spread over as many items.
    monkeypatch.setattr(scan_plan, "HELD", {"scan_forward": 4, "scan_backward": 4})
    Again.replays = 0


def model_of(kind: str = "mamba", **config: Any) -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=31, hidden_size=16, num_hidden_layers=2, state_size=16, use_cache=False) | config
    if kind == "mamba":
        return MambaForCausalLM(transformers.MambaConfig(**sizes)).train()
    return FalconMambaForCausalLM(transformers.FalconMambaConfig(**sizes)).train()


def loss_of(model: Any, tree: tuple[list[int], list[int] | None], seed: int = 0) -> torch.Tensor:
    segments = Segments.from_lengths(*tree)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(31, (segments.num_tokens,), generator=generator)
    before = segments.predecessor()
    targets = (before >= 0).nonzero()[:, 0]
    logps = model(
        ids[None], segments=segments, target_positions=before[targets], target_ids=ids[targets], use_cache=False
    ).logps
    weights = torch.randn(logps.shape, generator=generator)
    return -(logps * weights).sum()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def losses_and_gradients(model: Any, trees: Any = TREES) -> list[tuple[float, dict[str, torch.Tensor]]]:
    found = []
    for number, tree in enumerate(trees):
        loss = loss_of(model, tree, seed=number)
        loss.backward()
        found.append((float(loss), gradients(model)))
        model.zero_grad()
    return found


def assert_same(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    for (loss, grads), (exact_loss, exact) in zip(found, expected, strict=True):
        assert loss == pytest.approx(exact_loss, rel=tolerance)
        assert grads.keys() == exact.keys()
        for name, value in exact.items():
            assert (grads[name] - value).norm() <= tolerance * value.norm() + 1e-9, name


def with_graphs(model: Any) -> Any:
    model.set_cuda_graphs(True)
    return model


@pytest.mark.parametrize("kind", ["mamba", "falcon"])
def test_batches_of_all_kinds_have_the_gradients_that_they_have_without(kind: str) -> None:
    expected = losses_and_gradients(model_of(kind))
    model = with_graphs(model_of(kind))
    found = losses_and_gradients(model)
    # Each size and kind runs once without: 60 to 64 tokens with and without forks, 101 to 128, one row of 64.
    assert model.backbone.graphs.captured >= 4 and Again.replays == 2 * (len(TREES) - 4 - 1)
    assert_same(found, expected)


@pytest.mark.parametrize("recompute", ["nothing", "selective", "blocks"])
def test_recomputation_and_autocast_are_captured(recompute: str) -> None:
    results = []
    for graphs in (False, True):
        model = model_of()
        model.set_selective_recomputation(recompute == "selective")
        if recompute == "blocks":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.set_cuda_graphs(graphs)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(losses_and_gradients(model, TREES[:7]))
    assert_same(results[1], results[0], 3e-2)
    assert Again.replays


def test_a_step_changes_weights_and_a_graph_sees_it() -> None:
    """Casts of the weights of an earlier step, or of the step before, would show in the second loss."""
    found = []
    for graphs in (False, True):
        model = model_of()
        model.set_cuda_graphs(graphs)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        losses = []
        for step in range(5):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, TREES[step % 3], seed=1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=2e-2) and Again.replays == 8
    assert len(set(found[0])) == 5


def test_tables_that_are_not_renewed_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = losses_and_gradients(model_of(), TREES[:4])
    monkeypatch.setattr(Segments, "become", lambda self, other: True)
    found = losses_and_gradients(with_graphs(model_of()), TREES[:4])
    with pytest.raises(AssertionError):
        assert_same(found, expected)


def test_gradients_add_up_over_batches() -> None:
    expected, found = (
        losses_and_gradients_of_steps(model_of()),
        losses_and_gradients_of_steps(with_graphs(model_of())),
    )
    assert_same(found, expected)


def losses_and_gradients_of_steps(model: Any) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Three batches a step, of which graphs run none, some and all; gradients set to None, or to zero in place."""
    found = []
    for step, trees in enumerate([TREES[:3], TREES[1:4], [TREES[0], TREES[7], TREES[3]], TREES[:3]]):
        loss = torch.zeros(())
        for number, tree in enumerate(trees):
            one = loss_of(model, tree, seed=10 * step + number)
            one.backward()
            loss += one.detach()
        found.append((float(loss), gradients(model)))
        model.zero_grad(set_to_none=step % 2 == 0)
    return found


def test_a_gradient_that_someone_keeps_is_not_written_to() -> None:
    model = with_graphs(model_of())
    for _ in range(2):
        loss_of(model, TREES[0]).backward()
        model.zero_grad()
    loss_of(model, TREES[0]).backward()
    before = gradients(model)
    loss_of(model, TREES[1], seed=5).backward()  # adds to those of the batch before
    after = gradients(model)
    model.zero_grad()
    loss_of(model, TREES[1], seed=5).backward()
    alone = gradients(model)
    for name, value in alone.items():
        assert torch.allclose(after[name], before[name] + value, atol=1e-6), name


def test_two_forward_passes_before_a_backward_pass() -> None:
    """The second finds the graph's activations in use."""
    expected = model_of()
    (loss_of(expected, TREES[0], 1) + loss_of(expected, TREES[0], 2)).backward()
    model = with_graphs(model_of())
    losses_and_gradients(model, [TREES[0]] * 3)
    first, second = loss_of(model, TREES[0], 1), loss_of(model, TREES[0], 2)
    (first + second).backward()
    assert_same([(0.0, gradients(model))], [(0.0, gradients(expected))])


def test_a_second_backward_pass_is_refused() -> None:
    model = with_graphs(model_of())
    losses_and_gradients(model, [TREES[0]] * 2)
    loss = loss_of(model, TREES[0])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="set_cuda_graphs"):
        loss.backward()


def test_a_forward_pass_that_nobody_goes_back_through_holds_nothing_up() -> None:
    model = with_graphs(model_of())
    losses_and_gradients(model, [TREES[0]] * 2)
    loss_of(model, TREES[0])
    replays = Again.replays
    loss_of(model, TREES[0])
    assert Again.replays == replays + 1


@pytest.mark.parametrize("frozen", ["embeddings", "all but one"])
def test_frozen_weights(frozen: str) -> None:
    results = []
    for graphs in (False, True):
        model = model_of(tie_word_embeddings=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(
                "layers.1.mixer.in_proj" in name or (frozen == "embeddings" and "embed" not in name)
            )
        model.set_cuda_graphs(graphs)
        results.append(losses_and_gradients(model, TREES[:7]))
    assert_same(results[1], results[0])
    assert Again.replays


def test_a_weight_without_a_part_in_the_output_has_no_gradient() -> None:
    model = with_graphs(model_of())
    model.backbone.layers[0].mixer.register_parameter("spare", torch.nn.Parameter(torch.ones(3)))
    for _ in range(3):
        loss_of(model, TREES[0]).backward()
    assert Again.replays == 4 and model.backbone.layers[0].mixer.spare.grad is None
    assert all(p.grad is not None for name, p in model.named_parameters() if "spare" not in name)


def test_weights_in_other_places_are_captured_anew() -> None:
    model, expected = with_graphs(model_of()), model_of()
    losses_and_gradients(model, TREES[:4])
    for one in (model, expected):
        weight = one.backbone.layers[0].mixer.in_proj.weight
        weight.data = weight.data.clone() * 1.5
    assert_same(losses_and_gradients(model, TREES[:4]), losses_and_gradients(expected, TREES[:4]))


def test_what_cannot_be_a_graph_runs_without(caplog: pytest.LogCaptureFixture) -> None:
    def hooked(model: Any) -> None:
        model.backbone.layers[1].mixer.register_forward_hook(lambda *_: None)

    def hooked_weight(model: Any) -> None:
        model.backbone.layers[1].norm.weight.register_hook(lambda gradient: gradient * 2)

    cases: dict[str, Callable[[Any], Any]] = {
        "a hook of a module": hooked,
        "a hook of a parameter": hooked_weight,
        "another way": lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}),
        "other kernels than mambalign's": lambda model: model.set_backend("torch"),
        "nothing to train|has anything to train": lambda model: model.backbone.requires_grad_(False),
        "on a graph": lambda model: model.eval(),
    }
    for said, change in cases.items():
        model = with_graphs(model_of(tie_word_embeddings=False))
        change(model)
        caplog.clear()
        with caplog.at_level("INFO", "mambalign"):
            for _ in range(3):
                loss_of(model, TREES[0]).backward()
        assert model.backbone.graphs.captured == 0 and Again.replays == 0
        notes = [r.getMessage() for r in caplog.records if "CUDA graphs" in r.getMessage()]
        if said != "on a graph":
            assert len(notes) == 1 and any(part in notes[0] for part in said.split("|"))


def test_among_other_processes_gradients_must_be_exchanged_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP does not see gradients that come out of a graph."""
    monkeypatch.setattr(cuda_graphs, "_has_others", lambda: True)
    model = with_graphs(model_of())
    losses_and_gradients(model, [TREES[0]] * 3)
    assert model.backbone.graphs.captured == 0
    model.backbone.graphs.exchanged_later = True
    losses_and_gradients(model, [TREES[0]] * 3)
    assert model.backbone.graphs.captured == 1


def test_states_and_hidden_states_come_from_the_layers_themselves() -> None:
    model = with_graphs(model_of())
    losses_and_gradients(model, [TREES[0]] * 2)
    ids = torch.arange(60)[None] % 31
    segments = Segments.from_lengths([40, 20])
    outputs = model(ids, segments=segments, output_final_states=True, output_hidden_states=True)
    assert len(outputs.final_states) == 2 and len(outputs.hidden_states) == 3
    again = model(ids[:, :5], segments=Segments.from_lengths([2, 3]), initial_states=outputs.final_states)
    assert again.logits.shape == (1, 5, 31)


def test_padded_batches_are_graphs_too() -> None:
    """[B, L] with a mask is packed before the layers see it."""
    results = []
    for graphs in (False, True):
        model = model_of()
        model.set_cuda_graphs(graphs)
        found = []
        for lengths in ([12, 30], [30, 29], [30, 30], [30, 30], [30, 30]):
            ids = torch.arange(60).view(2, 30) % 31
            mask = torch.arange(30)[None] < torch.tensor(lengths)[:, None]
            loss = model(ids, attention_mask=mask, labels=ids.masked_fill(~mask, -100)).loss
            loss.backward()
            found.append((float(loss), gradients(model)))
            model.zero_grad()
        results.append(found)
    assert_same(results[1], results[0])
    assert Again.replays


def test_memory_that_is_short_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """For a large batch only: a small one has its graph. It is said once."""
    caplog.set_level("INFO", "mambalign")
    allocated = iter(range(0, 10**6, 100))  # every pass keeps 100 bytes
    monkeypatch.setattr(cuda_graphs, "_allocated", lambda device: next(allocated))
    monkeypatch.setattr(cuda_graphs, "_left", lambda device: 260)
    model = with_graphs(model_of())
    losses_and_gradients(model, [TREES[0]] * 3)
    assert model.backbone.graphs.captured == 1
    monkeypatch.setattr(cuda_graphs, "_left", lambda device: 249)
    assert_same(losses_and_gradients(model, [TREES[7]] * 3), losses_and_gradients(model_of(), [TREES[7]] * 3))
    assert len(model.backbone.graphs._tried) == 1  # of the size that has none
    assert sum("has to be free" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("short", [0, 1])
def test_graphs_give_way_to_a_batch_that_needs_their_memory(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = iter(range(0, 10**6, 64))  # a byte a token of the first batch
    monkeypatch.setattr(cuda_graphs, "_allocated", lambda device: next(allocated))
    model = with_graphs(model_of())
    losses_and_gradients(model, [TREES[0]] * 2)
    assert model.backbone.graphs.captured == 1
    needed = int(cuda_graphs.TAKEN * (64 + 128))  # what the graph holds, and the other size's 128 tokens
    monkeypatch.setattr(cuda_graphs, "_left", lambda device: needed - short)
    loss_of(model, TREES[7]).backward()
    assert model.backbone.graphs.captured == 1 - short


def test_a_capture_that_fails_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(run: Any, pool: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda_graphs, "_captured", refuse)
    expected = losses_and_gradients(model_of(), TREES[:4])
    with caplog.at_level("INFO", "mambalign"):
        found = losses_and_gradients(with_graphs(model_of()), TREES[:4])
    assert_same(found, expected)
    assert any("capturing failed: CUDA out of memory" in record.getMessage() for record in caplog.records)


def test_no_more_graphs_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "KEPT", 1)
    trees = [TREES[0], TREES[0], TREES[7], TREES[7], TREES[0], TREES[0]]
    model = with_graphs(model_of())
    assert_same(losses_and_gradients(model, trees), losses_and_gradients(model_of(), trees))
    assert model.backbone.graphs.captured == 1 and Again.replays == 6


def test_a_model_with_graphs_can_be_copied_and_pickled() -> None:
    model = with_graphs(model_of())
    losses_and_gradients(model, [TREES[0]] * 2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.backbone.graphs.captured == 0
        assert_same(losses_and_gradients(other, TREES[:3]), losses_and_gradients(model_of(), TREES[:3]))


# ---------------------------------------------------------------------------------------------------- fixed segments


def random_tree(tokens: int, segments: int, forked: bool, source: random.Random) -> Segments:
    count = source.randint(2, segments - 1)
    cuts = sorted(source.randint(0, tokens) for _ in range(count - 1))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, source.randint(cuts[-1], tokens)], strict=True)]
    parent = [-1] + [source.randint(-1, s - 1) if forked else -1 for s in range(1, count)]
    return Segments.from_lengths(lengths, parent)


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("shortest", [32, 256])
def test_tables_of_fixed_segments_have_one_shape(forked: bool, shortest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few kinds: with and without a window that goes from segment to segment, or a state, which has two ways to go."""
    monkeypatch.setattr(scan_plan, "SHORTEST_PIECE", shortest)
    monkeypatch.setattr(scan_plan, "HELD", {"scan_forward": 20, "scan_backward": 20})
    source, device, shapes = random.Random(0), torch.device("cpu"), set()
    for _ in range(150):
        padded = random_tree(1000, 16, forked, source).padded(1024, 16)
        assert padded.num_tokens == 1024 and padded.num_segments == 16
        for kernel in scan_plan.HELD:
            scan_plan.plan(padded, 3, device, kernel)
        cuda_conv.plan(padded, 3, device)
        shapes.add(str([made.form for made in padded._plans.values()]))
    assert len(shapes) <= 6


def test_segments_become_others() -> None:
    device = torch.device("cpu")
    one, other = (Segments.from_lengths(lengths).padded(64, 4) for lengths in ([20, 30], [3, 50]))
    plan = cuda_conv.plan(one, 3, device)
    runs = plan.runs
    assert one.last_token.tolist() == [19, 49, 63, -4] and one.become(other)
    assert one == other and one.last_token.tolist() == [2, 52, 63, -4] and one.lengths.tolist() == [3, 50, 11, 0]
    assert cuda_conv.plan(one, 3, device).runs is runs
    assert torch.equal(runs, cuda_conv.plan(other, 3, device).runs)
    forked = Segments.from_lengths([20, 30], [-1, 0]).padded(64, 4)
    assert not one.become(forked) and one == other


def test_segments_with_plans_can_be_copied_and_pickled() -> None:
    segments = Segments.from_lengths([20, 30], [-1, 0]).padded(64, 4)
    cuda_conv.plan(segments, 3, torch.device("cpu"))
    for other in (copy.deepcopy(segments), pickle.loads(pickle.dumps(segments))):
        assert other == segments and other.fixed and not other.planned and other.lengths.tolist() == [20, 30, 14, 0]


def test_there_has_to_be_room() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Segments.from_lengths([10, 10]).padded(19, 4)
    with pytest.raises(ValueError, match="does not fit"):
        Segments.from_lengths([10, 10]).padded(21, 2)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 4095, 4096, 5000, 16385, 100_000])
def test_filling_is_little(tokens: int) -> None:
    full, count = cuda_graphs.filled_size(Segments.from_lengths([tokens - tokens // 2, tokens // 2]))
    assert tokens <= full <= max(tokens + 64, tokens * 17 / 16) and count in (2, 4)
    assert cuda_graphs.filled_size(Segments.from_lengths([2048] * 3)) == (6144, 3)


def test_a_mamba_2_runs_without() -> None:
    from mambalign.models.mamba2 import Mamba2Model

    assert not Mamba2Model.graphable
    assert "kernels of others" in str(cuda_graphs.survey(Mamba2Model.__new__(Mamba2Model)))
