"""Our losses, rewards and gradients beside TRL's trainers on the same weights and rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

trl = pytest.importorskip("trl", reason="TRL is a development dependency: pip install -e '.[dev]'")

import datasets  # noqa: E402

from mambalign.data.chat import encode_messages, encode_prompt  # noqa: E402
from mambalign.data.packing import collate_pairs, collate_sequences  # noqa: E402
from mambalign.models import MambaForCausalLM  # noqa: E402
from mambalign.train.asking import target_logps  # noqa: E402
from mambalign.train.objectives import PreferenceOptions, sequence_sums  # noqa: E402
from mambalign.train.trainer import PreferenceObjective, SequenceObjective  # noqa: E402
from tests.train.conftest import byte_tokenizer, conversations, preferences  # noqa: E402

PAIRS = preferences(6, seed=5)
CHATS = conversations(6, seed=6)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(policy, reference): two different models, so that rewards are not zero."""
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = transformers.MambaConfig(vocab_size=264, hidden_size=16, num_hidden_layers=2, state_size=4)
        model = transformers.MambaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        folders.append(tmp_path_factory.mktemp("weights"))
        model.save_pretrained(folders[-1])
    return folders[0], folders[1]


def theirs(path: Path) -> Any:
    return transformers.MambaForCausalLM.from_pretrained(path)


def ours(path: Path) -> Any:
    return MambaForCausalLM.from_pretrained(path).train()


def our_pairs() -> Any:
    tokenizer = byte_tokenizer()
    examples = []
    for index, row in enumerate(PAIRS):
        prompt = encode_prompt(tokenizer, row["prompt"])
        example: dict[str, Any] = {"prompt_ids": prompt, "index": index}
        for side in ("chosen", "rejected"):
            ids, mask = encode_messages(tokenizer, row["prompt"] + row[side])
            assert ids[: len(prompt)] == prompt
            example |= {f"{side}_ids": ids[len(prompt) :], f"{side}_mask": mask[len(prompt) :]}
        examples.append(example)
    return collate_pairs(examples)


def reference_of(path: Path, batch: Any) -> Tensor:
    with torch.no_grad():
        logps = target_logps(ours(path).eval(), batch)
    sums, _ = sequence_sums(logps, batch.target_sequence, batch.num_sequences)
    return sums[batch.pairs]


def assert_same_gradients(mine: Any, other: Any, tolerance: float = 1e-5) -> None:
    expected = dict(other.named_parameters())
    scale = max(p.grad.abs().max() for p in expected.values())
    for name, parameter in mine.named_parameters():
        assert (parameter.grad - expected[name].grad).abs().max() <= tolerance * scale, name


@pytest.fixture(scope="module")
def dpo_trainer(weights: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("dpo")),
        per_device_train_batch_size=len(PAIRS),
        max_length=None,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    return trl.DPOTrainer(
        model=theirs(weights[0]),
        ref_model=theirs(weights[1]),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=byte_tokenizer(),
    )


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing"),
    [("sigmoid", 0.0), ("ipo", 0.0), ("hinge", 0.0), ("robust", 0.1), ("apo_zero", 0.0), ("apo_down", 0.0)],
)
def test_dpo(dpo_trainer: Any, weights: tuple[Path, Path], loss_type: str, label_smoothing: float) -> None:
    beta = 0.3
    dpo_trainer.loss_types, dpo_trainer.loss_weights = [loss_type], [1.0]
    dpo_trainer.beta, dpo_trainer.label_smoothing = beta, label_smoothing
    dpo_trainer.model.train().zero_grad()
    dpo_trainer._metrics["train"].clear()
    batch = next(iter(dpo_trainer.get_train_dataloader()))
    expected = dpo_trainer.compute_loss(dpo_trainer.model, batch)
    expected.backward()
    measured = {name: values[-1] for name, values in dpo_trainer._metrics["train"].items()}

    model, packed = ours(weights[0]), our_pairs()
    options = PreferenceOptions(loss_type, beta=beta, label_smoothing=label_smoothing)
    objective = PreferenceObjective(options, {"train": reference_of(weights[1], packed)})
    loss, sums = objective(target_logps(model, packed), packed, "train")
    count = objective.items(packed)
    (loss / count).backward()

    assert packed.num_prompt_tokens_saved > 0
    assert float(loss.detach() / count) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert float(sums[name] / count) == pytest.approx(measured[name], rel=1e-4, abs=1e-5), name
    assert_same_gradients(model, dpo_trainer.model)


def test_sft(weights: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(CHATS),
        assistant_only_loss=True,
        packing=False,
        max_length=None,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = trl.SFTTrainer(
        model=theirs(weights[0]),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(CHATS),
        processing_class=byte_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model.train(), batch)
    expected.backward()

    examples = []
    for index, row in enumerate(CHATS):
        ids, mask = encode_messages(byte_tokenizer(), row["messages"])
        examples.append({"input_ids": ids, "loss_mask": mask, "index": index})
    packed = collate_sequences(examples)
    model, objective = ours(weights[0]), SequenceObjective()
    loss, _ = objective(target_logps(model, packed), packed, "train")
    (loss / objective.items(packed)).backward()
    assert float(loss.detach() / objective.items(packed)) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_same_gradients(model, trainer.model)
