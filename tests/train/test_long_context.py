"""State passing: the whole document's gradients in a chunk's memory, truncated ones, and runs with long documents."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainingArguments
from typer.testing import CliRunner

from mambalign.cli import app
from mambalign.data.mixer import load_mix, tokenize_sft, tokenize_text
from mambalign.data.packing import Collator, PackedBatch, PackedRows, collate_pairs, collate_sequences
from mambalign.models.checkpoint import load_tokenizer
from mambalign.ops import Segments
from mambalign.recipe import Recipe, UserError
from mambalign.train import checkpoint
from mambalign.train.long_context import StatePassing, StatePassingTrainer, cuts
from mambalign.train.run import load_start, run
from mambalign.train.trainer import SequenceObjective
from tests.models.test_mamba import FAMILIES, V, config_of
from tests.train.conftest import WORDS, history, killed_run, write_jsonl
from tests.train.test_processes import assert_same_losses, on_processes

Make = Callable[..., Recipe]
LENGTHS = [5, 13, 7, 1, 25, 6]  # 57 tokens


def batch_of(lengths: Sequence[int], trained: float = 0.7) -> PackedBatch:
    generator = torch.Generator().manual_seed(1)
    examples = []
    for index, length in enumerate(lengths):
        mask = torch.rand(length, generator=generator) < trained
        ids = torch.randint(2, V, (length,), generator=generator)
        examples.append({"input_ids": ids.numpy(), "loss_mask": mask.long().numpy(), "index": index})
    return collate_sequences(examples)


def model_of(family: str, **changes: Any) -> Any:
    model = FAMILIES[family][2](config_of(family, **changes)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def trainer_of(model: Any, folder: Path, exact: bool, chunk: int, **arguments: Any) -> StatePassingTrainer:
    options = dict(output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True)
    return StatePassingTrainer(
        model=model, args=TrainingArguments(**options | arguments), objective=StatePassing(exact, chunk),
        train_rows=None, eval_rows=None, collator=Collator("sequences"), tokenizer=None, sampler_seed=0,
    )  # fmt: skip


def gradients(model: Any, loss_of: Callable[[], Any]) -> tuple[float, dict[str, Tensor]]:
    """(loss, its gradients by name) of a function that goes backwards itself."""
    model.zero_grad(set_to_none=True)
    loss = float(loss_of())
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def whole(model: Any, batch: PackedBatch) -> tuple[float, dict[str, Tensor]]:
    def loss_of() -> Tensor:
        objective = SequenceObjective()
        loss = objective(objective.ask(model, batch), batch, "train")[0] / batch.num_targets
        loss.backward()
        return loss.detach()

    return gradients(model, loss_of)


def stepped(trainer: StatePassingTrainer, *batches: PackedBatch) -> tuple[float, dict[str, Tensor]]:
    items = sum(batch.num_targets for batch in batches)
    return gradients(trainer.model, lambda: trainer.training_step(trainer.model, list(batches), items))


def assert_same_gradients(
    ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]], within: float = 1e-5
) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)  # which the trainer adds up in fp32
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    for name, expected in theirs[1].items():
        assert (ours[1][name] - expected).abs().max() <= within * expected.abs().max(), name


def test_only_what_is_longer_than_a_chunk_is_cut() -> None:
    def parts(lengths: list[int], chunk: int) -> list[tuple[int, int, bool, bool]]:
        return [(c.start, c.end, c.entry is not None, c.exit is not None) for c in cuts(batch_of(lengths), chunk)]

    assert parts([5, 3, 4], 8) == [(0, 8, False, False), (8, 12, False, False)]
    assert parts([3, 10, 2], 5) == [(0, 5, False, True), (5, 10, True, True), (10, 15, True, False)]
    assert parts([5, 5], 5) == [(0, 5, False, False), (5, 10, False, False)]
    assert parts([2, 4, 4], 5) == [(0, 2, False, False), (2, 6, False, False), (6, 10, False, False)]
    assert parts([3], 9) == [(0, 3, False, False)]


@pytest.mark.parametrize("chunk", [1, 7, 20, 40, 1000])
def test_chunks_hold_every_token_and_target_once(chunk: int) -> None:
    batch = batch_of(LENGTHS)
    chunks = [cut.to("cpu") for cut in cuts(batch, chunk)]
    assert torch.equal(torch.cat([part.input_ids for part in chunks]), batch.input_ids)
    assert torch.equal(torch.cat([part.target_ids for part in chunks]), batch.target_ids)
    assert all(part.num_tokens <= chunk for part in chunks)
    start = 0
    for part in chunks:
        assert part.segments.num_tokens == part.num_tokens and part.segments.num_segments == part.num_sequences
        named = part.indices[part.target_sequence]
        inside = (batch.target_positions >= start) & (batch.target_positions < start + part.num_tokens)
        assert torch.equal(named, batch.indices[batch.target_sequence[inside]])
        assert torch.equal(part.target_positions + start, batch.target_positions[inside])
        start += part.num_tokens


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_is_the_whole_sequence(family: str, checkpointing: str, tmp_path: Path) -> None:
    """Loss and every gradient, with cuts anywhere, and parts in which nothing is trained."""
    model = model_of(family)
    batch, masked = batch_of(LENGTHS), batch_of([25], trained=0.1)
    expected = whole(model, batch), whole(model, masked)
    model.set_selective_recomputation(checkpointing == "selective")
    if checkpointing in ("full", "reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    trainer = trainer_of(model, tmp_path, exact=True, chunk=1)
    for chunk in (7, 20, 1000) if checkpointing == "none" else (13,):
        trainer.objective.chunk = chunk
        assert_same_gradients(stepped(trainer, batch), expected[0])
        assert_same_gradients(stepped(trainer, masked), expected[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_is_exact(family: str, tmp_path: Path) -> None:
    """In float64, where rounding hides nothing, down to single tokens."""
    model, batch = model_of(family, residual_in_fp32=False).double(), batch_of([3, 11, 1, 6])
    expected = whole(model, batch)
    for chunk in (1, 4):
        assert_same_gradients(stepped(trainer_of(model, tmp_path, exact=True, chunk=chunk), batch), expected, 1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_in_bfloat16(family: str, tmp_path: Path) -> None:
    """Chunks round as the whole does: as far from float32 as it, not farther."""
    model, batch = model_of(family), batch_of(LENGTHS)
    exact = whole(model, batch)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = whole(model, batch)[1]
    chunked = stepped(trainer_of(model, tmp_path, exact=True, chunk=9, bf16=True), batch)[1]
    norm = {name: float(value.norm()) for name, value in exact.items()}
    for name, value in exact.items():
        error, usual = float((chunked[name] - value).norm()), float((rounded[name] - value).norm())
        assert 0 < error < 2 * usual + 0.01 * norm[name], name


def by_hand(model: Any, batch: PackedBatch, chunk: int, detached: bool) -> tuple[float, dict[str, Tensor]]:
    """One document, chunk after chunk, in one graph or in one each."""

    def loss_of() -> float:
        states, losses = None, []
        for start in range(0, batch.num_tokens, chunk):
            end = min(start + chunk, batch.num_tokens)
            inside = (batch.target_positions >= start) & (batch.target_positions < end)
            output = model(
                batch.input_ids[None, start:end],
                segments=Segments.from_lengths([end - start]),
                target_positions=batch.target_positions[inside] - start,
                target_ids=batch.target_ids[inside],
                initial_states=states,
                output_final_states=True,
            )
            states = output.final_states
            losses.append(-output.logps.sum() / batch.num_targets)
            if detached:
                states = [tuple(state.detach() for state in layer) for layer in states]
                losses[-1].backward()
        if not detached:
            torch.stack(losses).sum().backward()
        return float(torch.stack(losses).sum().detach())

    return gradients(model, loss_of)


@pytest.mark.parametrize("family", FAMILIES)
def test_truncated_is_a_loop_with_detached_states(family: str, tmp_path: Path) -> None:
    model, batch = model_of(family), batch_of([31])
    ours = stepped(trainer_of(model, tmp_path, exact=False, chunk=8), batch)
    assert_same_gradients(ours, by_hand(model, batch, 8, detached=True))
    exact = whole(model, batch)
    assert ours[0] == pytest.approx(exact[0], rel=1e-5)  # the loss forgets nothing
    name = "backbone.layers.0.mixer.A_log"
    assert (ours[1][name] - exact[1][name]).abs().max() > 1e-3 * exact[1][name].abs().max()


def test_adapters_and_their_dropout(recipe: Make, tmp_path: Path) -> None:
    """A chunk that is computed again drops what it dropped before, and the generator goes on as if it were not."""
    keys = dict(use_peft=True, lora_r=4, lora_target_modules=["all-linear"])
    model = load_start(recipe("sft", **keys, lora_dropout=0.2), "sft")[0].train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.3)
    batch = batch_of([31])
    torch.manual_seed(5)
    expected, after = by_hand(model, batch, 8, detached=False), torch.get_rng_state()
    trainer = trainer_of(model, tmp_path, exact=True, chunk=8)
    torch.manual_seed(5)
    assert_same_gradients(stepped(trainer, batch), expected)
    assert torch.equal(torch.get_rng_state(), after)
    assert any("lora_A" in name for name in expected[1]) and not any("A_log" in name for name in expected[1])


def test_adapters_on_every_module(recipe: Make, tmp_path: Path) -> None:
    """The head is called in chunks of its own, and has a gradient where a chunk of the document has no target."""
    keys = dict(use_peft=True, lora_r=4, lora_target_modules=["all-linear", "lm_head", "embeddings"], lora_dropout=0.0)
    model = load_start(recipe("sft", **keys), "sft")[0].train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.3)
    batch = batch_of(LENGTHS, trained=0.2)
    trainer = trainer_of(model, tmp_path, exact=True, chunk=6)
    assert_same_gradients(stepped(trainer, batch), whole(model, batch))


class Kept:
    """Bytes that autograd keeps for backward passes: the most at a time."""

    live = peak = 0

    class Tensor:
        def __init__(self, owner: Kept, tensor: Tensor):
            self.owner, self.tensor = owner, tensor
            owner.live += tensor.nbytes
            owner.peak = max(owner.peak, owner.live)

        def __del__(self) -> None:
            self.owner.live -= self.tensor.nbytes

    def during(self, step: Callable[[], Any]) -> int:
        with saved_tensors_hooks(lambda tensor: Kept.Tensor(self, tensor), lambda kept: kept.tensor):
            step()
        assert self.live == 0
        return self.peak


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_does_not_grow_with_the_document(family: str, exact: bool, tmp_path: Path) -> None:
    model = model_of(family)
    trainer = trainer_of(model, tmp_path, exact, chunk=16)
    short, long = batch_of([4 * 16]), batch_of([32 * 16])
    kept = [Kept().during(lambda batch=batch: stepped(trainer, batch)) for batch in (short, long)]  # type: ignore[misc]
    assert kept[1] <= 1.02 * kept[0]
    assert Kept().during(lambda: whole(model, long)) > 10 * kept[1]


def test_cut_states_wait_in_host_memory_until_they_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a layer at each cut, whatever else is in the chunk; none is left after the step."""
    model = model_of("mamba")
    trainer, batch = trainer_of(model, tmp_path, exact=True, chunk=10), batch_of([3, 2, 40])
    made: list[Any] = []
    monkeypatch.setattr("mambalign.train.long_context.cuts", lambda *given: made.append(cuts(*given)) or made[-1])
    parts = trainer._parts(model, [batch])
    inner, layers, states, window = 48, 3, 4, 3
    held = [cut.exit.states for cut in parts if cut.exit is not None]
    assert len(held) == 4
    for cut in held:
        assert sum(tensor.untyped_storage().nbytes() for tensor in cut) == 4 * layers * inner * (states + window)
    stepped(trainer, batch)
    boundaries = [cut.exit for cut in made[-1] if cut.exit is not None]
    assert all(not (b.states or b.starts or b.ends or b.gradient) for b in boundaries[1:]) and len(boundaries) == 4


def test_a_chunk_needs_segments_and_no_forks() -> None:
    pair = dict(prompt_ids=[5, 6], chosen_ids=[7], chosen_mask=[1], rejected_ids=[8, 9], rejected_mask=[1, 1])
    with pytest.raises(ValueError, match="without forks"):
        cuts(collate_pairs([{**pair, "index": 0}]), 2)
    model = model_of("mamba")
    with pytest.raises(ValueError, match="need segments"):
        model(torch.ones(1, 4, dtype=torch.int64), output_final_states=True)


# ------------------------------------------------------------------------------------------------------------- runs


def text(words: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator).tolist())


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Texts of about 20 tokens, and of 500."""
    folder = tmp_path / "documents"
    folder.mkdir()
    sizes = [4] * 6 + [110] + [5] * 3 + [90, 4]
    write_jsonl(folder / "train.jsonl", [{"text": text(n, seed)} for seed, n in enumerate(sizes)])
    write_jsonl(folder / "test.jsonl", [{"text": text(n, 100 + seed)} for seed, n in enumerate([6, 120, 5])])
    return folder


@pytest.fixture
def long(recipe: Make, documents: Path) -> Make:
    """A recipe whose steps are the same, whether documents are computed whole or in chunks."""

    def make(**changes: Any) -> Recipe:
        keys: dict[str, Any] = dict(
            dataset_mixer={str(documents): 1.0}, max_length=100, packing=False, num_train_epochs=1, logging_steps=1,
            eval_strategy="steps", eval_steps=2, state_passing="exact", state_passing_chunk=64, adam_epsilon=1e-3,
        )  # fmt: skip
        return recipe("cpt", **keys | changes)

    return make


def test_a_run_from_the_command_line_is_the_run_of_whole_documents(long: Make, tmp_path: Path) -> None:
    """Losses, evaluations, counts and weights; `check` says what the chunk means."""
    whole_run = long(output_dir=str(tmp_path / "whole"), state_passing="off", max_length=1000)
    run("cpt", whole_run)
    path = tmp_path / "exact.yaml"
    values = long(output_dir=str(tmp_path / "exact")).to_dict()
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    for words in (["check", path, "--json"], ["cpt", path]):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        if words[0] == "check":
            report = json.loads(done.stdout)
            assert "2 of 12 examples are longer, the longest has 5" in report["train"]["state_passing"]
            assert report["memory_gb"]["tokens_per_forward"] == 64
    assert_same_losses(tmp_path / "whole", tmp_path / "exact")
    for a, b in zip(history(tmp_path / "whole"), history(tmp_path / "exact"), strict=True):
        assert a.get("num_tokens") == b.get("num_tokens")
    for key, expected in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert (expected - load_file(tmp_path / "exact" / "model.safetensors")[key]).abs().max() < 1e-5, key


def test_truncated_learns_otherwise_and_evaluates_the_same(long: Make, tmp_path: Path) -> None:
    changes: dict[str, Any] = dict(eval_on_start=True, max_steps=2, bf16=True)
    exact = run("cpt", long(output_dir=str(tmp_path / "exact"), **changes)).output_dir
    cut = run("cpt", long(output_dir=str(tmp_path / "cut"), state_passing="truncated", **changes)).output_dir
    first, second = ([line["eval_loss"] for line in history(folder) if "eval_loss" in line] for folder in (exact, cut))
    assert first[0] == pytest.approx(second[0], rel=1e-6) and first[-1] != second[-1]


def test_killed_and_resumed_is_unkilled(long: Make, tmp_path: Path) -> None:
    """With dropout, which the second pass repeats; and with another chunk nothing but rounding changes."""
    keys: dict[str, Any] = dict(
        use_peft=True,
        lora_r=4,
        lora_dropout=0.1,
        save_steps=1,
        gradient_accumulation_steps=1,
        max_steps=4,
        eval_strategy="no",
        do_eval=False,
    )
    calm = run("cpt", long(output_dir=str(tmp_path / "calm"), **keys)).output_dir
    killed = long(output_dir=str(tmp_path / "killed"), **keys)
    killed_run("cpt", killed, lambda folder: checkpoint.newest_complete(folder) is not None)
    run("cpt", killed)
    assert history(calm) == history(tmp_path / "killed")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (calm, tmp_path / "killed"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = run("cpt", long(output_dir=str(tmp_path / "killed"), **keys | dict(state_passing_chunk=50)))
    assert again.already_finished
    with pytest.raises(UserError, match="state_passing "):
        run("cpt", long(output_dir=str(tmp_path / "killed"), **keys | dict(state_passing="truncated")))


@pytest.mark.parametrize("changes", [{}, dict(fsdp="full_shard", state_passing_chunk=100)], ids=["ddp", "fsdp"])
def test_two_processes_are_one(changes: dict[str, Any], long: Make, tmp_path: Path) -> None:
    """One has a long document where the other has none; shards are exchanged in the first pass, too."""
    keys: dict[str, Any] = dict(
        global_batch_size=6, gradient_accumulation_steps=None, per_device_train_batch_size=3, max_steps=2
    )
    run("cpt", long(output_dir=str(tmp_path / "one"), **keys))
    on_processes("cpt", long(output_dir=str(tmp_path / "two"), **keys | changes))
    assert_same_losses(tmp_path / "one", tmp_path / "two")


# ------------------------------------------------------------------------------------------------ data and refusals


@pytest.mark.parametrize("stage", ["cpt", "sft"])
def test_long_examples_stay_whole_and_have_rows_of_their_own(stage: str, long: Make, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": text(60, 1)}, {"role": "assistant", "content": text(60, 2)}]
    rows = {"cpt": [{"text": text(100, 1)}, {"text": "a"}], "sft": [{"messages": turns}, {"messages": turns[:1] * 2}]}
    rows["sft"][1] = {"messages": [turns[0] | {"content": "a"}, turns[1] | {"content": "b"}]}
    path = write_jsonl(tmp_path / f"{stage}.jsonl", rows[stage])
    recipe = long(dataset_mixer={str(path): 1.0}, max_length=64, truncation="keep_start")
    tokenizer = load_tokenizer(str(recipe.model_name_or_path))
    data = (tokenize_text if stage == "cpt" else tokenize_sft)(load_mix(recipe, "train"), tokenizer, recipe)
    assert data.report["tokens_lost"] == data.report["truncated"] == data.report["skipped"] == 0
    packed = PackedRows(data.dataset, max_length=64, kind="sequences", seed=0, longer_alone=True)
    assert sorted(packed.lengths()) == sorted(packed.example_lengths) and max(packed.lengths()) > 400
    assert packed.fill == pytest.approx(sum(packed.lengths()) / (64 + max(packed.lengths())))
    with pytest.raises(UserError, match="does not fit a packed row of 64"):
        PackedRows(data.dataset, max_length=64, kind="sequences", seed=0)


@pytest.mark.parametrize(
    ("stage", "changes", "says"),
    [
        ("dpo", dict(state_passing="exact"), r"state_passing: exact is for cpt and sft.*set it to off"),
        ("reward", dict(state_passing="truncated"), r"state_passing: truncated is for cpt and sft"),
        ("sft", dict(state_passing="exactly"), r"state_passing must be one of off, exact, truncated, .*'exact'"),
        ("sft", dict(state_passing="exact", state_passing_chunk=0), r"state_passing_chunk is 0: it must be above 0"),
        ("sft", dict(state_passing="exact", max_tokens_per_device=9), r"max_tokens_per_device is 9: .*leave this out"),
        ("sft", dict(state_passing="exact", deepspeed="zero3.json"), r"state_passing is 'exact': .*full_shard"),
    ],
)
def test_what_cannot_work_names_the_key(stage: str, changes: dict[str, Any], says: str, recipe: Make) -> None:
    with pytest.raises(UserError, match=says):
        recipe(stage, **changes)


def test_a_bare_off_is_off(recipe: Make) -> None:
    assert recipe("sft", state_passing=yaml.safe_load("off")).state_passing == "off"
