"""Reward models in training: the loss is the papers' and TRL's, runs learn, resume, and start from either kind."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

from mambalign.data.mixer import load_mix, tokenize_preferences
from mambalign.generation.scoring import Scorer
from mambalign.models import MambaForCausalLM
from mambalign.models.checkpoint import load_model, save_model
from mambalign.models.reward import with_reward_head
from mambalign.recipe import Recipe, UserError
from mambalign.train.asking import sequence_rewards
from mambalign.train.objectives import bradley_terry_loss, reward_metrics
from mambalign.train.run import run
from mambalign.train.trainer import RewardObjective
from tests.train.conftest import byte_tokenizer, preferences, write_jsonl

Make = Callable[..., Recipe]


# ------------------------------------------------------------------------------------------------------ the objective


def test_the_loss_is_the_equations() -> None:
    chosen, rejected = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([0.5, 1.0, 0.0])
    margins = torch.tensor([1.0, 0.0, 0.5])

    def expected(c: float, r: float, m: float = 0.0, center: float = 0.0) -> float:
        return -math.log(1 / (1 + math.exp(-(c - r - m)))) + center * (c + r) ** 2

    pairs = list(zip(chosen.tolist(), rejected.tolist(), margins.tolist(), strict=True))
    plain = [expected(c, r) for c, r, _ in pairs]
    both = [expected(c, r, m, 0.01) for c, r, m in pairs]
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(plain)
    assert bradley_terry_loss(chosen, rejected, margins, 0.01).tolist() == pytest.approx(both)


def test_the_loss_pushes_apart_up_to_the_margin_and_stays_finite() -> None:
    for value in (0.0, 1e4, -1e4):
        chosen = torch.tensor([value], requires_grad=True)
        rejected = torch.tensor([0.0], requires_grad=True)
        loss = bradley_terry_loss(chosen, rejected, torch.tensor([2.0]))
        up, down = torch.autograd.grad(loss.sum(), (chosen, rejected))
        assert loss.isfinite().all() and up <= 0 <= down and float(up) == -float(down)
    chosen = torch.tensor([3.0], requires_grad=True)
    centered = bradley_terry_loss(chosen, torch.tensor([3.0]), None, 1.0)
    (gradient,) = torch.autograd.grad(centered.sum(), chosen)
    assert gradient > 0  # towards a sum of zero


def test_metrics_stand_beside_what_length_alone_would_say() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0, 5.0]), torch.tensor([0.0, 1.0, 2.0, 1.0])
    lengths = torch.tensor([9, 9, 3, 4]), torch.tensor([3, 3, 3, 9])
    sums = reward_metrics(chosen, rejected, lengths, torch.ones(4))
    assert float(sums["rewards/accuracies"]) == 2.5 and float(sums["lengths/accuracies"]) == 2.5
    assert float(sums["rewards/margins"]) == 4 and float(sums["rewards/mean"]) == 6
    assert float(sums["lengths/chosen"]) == 25 and float(sums["loss"]) == 4


@pytest.mark.parametrize("center", [None, 0.05])
@pytest.mark.parametrize("margin", [False, True])
def test_loss_and_gradients_are_trls(center: float | None, margin: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is a development dependency: pip install -e '.[dev]'")
    import datasets
    import transformers

    from mambalign.data.packing import collate_pairs
    from tests.train.test_trl_parity import assert_same_gradients

    rows = [row | ({"margin": 0.25 * i} if margin else {}) for i, row in enumerate(preferences(6, seed=5))]

    def model() -> Any:
        torch.manual_seed(0)
        config = transformers.MambaConfig(vocab_size=264, hidden_size=16, num_hidden_layers=2, state_size=4)
        made = with_reward_head(MambaForCausalLM(config), seed=1)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return made.train()

    arguments = trl.RewardConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=len(rows), max_length=None, report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False, center_rewards_coefficient=center,
    )  # fmt: skip
    trainer = trl.RewardTrainer(
        model=model(), args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=byte_tokenizer()
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model.train(), batch)
    expected.backward()

    data = write_jsonl(tmp_path / "train.jsonl", rows)
    recipe = Recipe(stage="reward", dataset_mixer={str(data): 1.0}, max_length=4096)
    tokenized = tokenize_preferences(load_mix(recipe, "train"), byte_tokenizer(), recipe)
    packed = collate_pairs([dict(row, index=i) for i, row in enumerate(tokenized.dataset)])
    objective, ours = RewardObjective(center), model()
    assert (packed.margins is not None) == margin
    loss, sums = objective(sequence_rewards(ours, packed), packed, "train")
    (loss / len(rows)).backward()
    assert packed.num_prompt_tokens_saved > 0
    assert float(loss.detach() / len(rows)) == pytest.approx(float(expected.detach()), rel=1e-5)
    measured = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert float(sums["rewards/margins"]) / len(rows) == pytest.approx(measured["margin"], rel=1e-4)
    assert float(sums["rewards/accuracies"]) / len(rows) == pytest.approx(measured["accuracy"])
    assert_same_gradients(ours, trainer.model)


# ------------------------------------------------------------------------------------------------------------- runs


def test_a_run_learns_and_its_model_scores(recipe: Make, caplog: pytest.LogCaptureFixture) -> None:
    changes: dict[str, Any] = dict(num_train_epochs=4, learning_rate=1e-2)
    with caplog.at_level(logging.INFO, logger="mambalign"):
        result = run("reward", recipe("reward", **changes))
    assert "the reward head is new" in caplog.text and "from seed 42" in caplog.text
    metrics = result.metrics
    assert metrics["eval_rewards/accuracies"] > 0.9
    assert {"rewards/mean", "rewards/margins", "lengths/chosen", "eval_lengths/accuracies"} <= set(metrics)
    # The answers end in "yes" and "no": length knows more than chance, the model more than length.
    assert 0.5 < metrics["eval_lengths/accuracies"] < metrics["eval_rewards/accuracies"]
    model: Any = load_model(result.output_dir, head="reward")
    assert model.config.reward_inputs == {"plain_text": False, "system_prompt": None}
    card = (result.output_dir / "README.md").read_text()
    assert "Bradley-Terry on pairs" in card and "text-classification" in card
    code = card.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert math.isfinite(names["reward"])
    assert "by length alone" in (result.output_dir / "curves.svg").read_text()


def test_the_cards_reward_is_the_one_that_was_trained(recipe: Make, workbench: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()  # one that begins texts itself, beside a template that does
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    start = tmp_path / "start"
    save_model(load_model(workbench / "model"), start, tokenizer=tokenizer)
    folder = run("reward", recipe("reward", model_name_or_path=str(start), max_steps=1)).output_dir
    names: dict[str, Any] = {}
    exec((folder / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    scorer = Scorer.load(str(folder), device="cpu")
    scores = scorer.score([scorer.read(names["chat"][:1], [names["chat"][1]["content"]])])
    assert names["reward"] == pytest.approx(scores[0][0], rel=1e-5)


def test_a_reward_model_is_trained_on_and_nothing_else_starts_from_it(recipe: Make, tmp_path: Path) -> None:
    first = run("reward", recipe("reward", max_steps=2))
    trained = load_file(first.output_dir / "model.safetensors")
    again = recipe("reward", max_steps=1, model_name_or_path=str(first.output_dir), output_dir=str(tmp_path / "again"),
                   optim="sgd", learning_rate=1e-12)  # fmt: skip
    result = run("reward", again)
    assert torch.allclose(load_file(result.output_dir / "model.safetensors")["score.weight"], trained["score.weight"])
    for stage in ("sft", "dpo"):
        with pytest.raises(UserError, match="holds a reward model"):
            run(stage, recipe(stage, model_name_or_path=str(first.output_dir), output_dir=str(tmp_path / stage)))


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (
            "reward",
            dict(loss_type="ipo"),
            "loss_type: 'ipo' belongs to dpo; a reward model is trained with the Bradley",
        ),
        ("reward", dict(rpo_alpha=1.0), "rpo_alpha: 1.0 belongs to dpo"),
        ("reward", dict(truncation="split"), "truncation: split cuts plain text"),
        ("reward", dict(center_rewards_coefficient=-1), "center_rewards_coefficient is -1.0: it must not be negative"),
        (
            "dpo",
            dict(center_rewards_coefficient=0.01),
            "center_rewards_coefficient is for reward models; dpo has no use",
        ),
    ],
)
def test_keys_of_other_objectives_are_refused(stage: str, changes: dict[str, Any], message: str, recipe: Make) -> None:
    with pytest.raises(UserError, match=message):
        recipe(stage, **changes)


# ----------------------------------------------------------------------------------------------------------- margins


def tokenized(path: Path, stage: str = "reward", **keys: Any) -> Any:
    recipe = Recipe(stage=stage, dataset_mixer={str(path): 1.0}, max_length=128, **keys)  # type: ignore[arg-type]
    return tokenize_preferences(load_mix(recipe, "train"), byte_tokenizer(), recipe)


def test_margins_are_read_from_a_column_of_any_name(tmp_path: Path) -> None:
    rows = [row | {"gap": float(i)} for i, row in enumerate(preferences(4))]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    data = tokenized(path, dataset_columns={"margin": "gap"})
    assert sorted(data.dataset["margin"]) == [0.0, 1.0, 2.0, 3.0]
    assert "margin" not in tokenized(path).dataset.column_names  # not asked for
    assert data.fingerprint != tokenized(path).fingerprint
    rows[0]["gap"] = 0.5
    assert tokenized(write_jsonl(tmp_path / "b.jsonl", rows), dataset_columns={"margin": "gap"}).fingerprint not in (
        data.fingerprint,
        tokenized(path).fingerprint,
    )


def test_a_missing_margin_is_zero_and_noted_a_wrong_one_skips_the_row(tmp_path: Path) -> None:
    values: list[Any] = [1.5, None, -1.0, float("nan"), float("inf"), 2]
    rows = [row | {"margin": value} for row, value in zip(preferences(6), values, strict=True)]
    data = tokenized(write_jsonl(tmp_path / "train.jsonl", rows))
    assert sorted(data.dataset["margin"]) == [0.0, 1.5, 2.0]
    assert data.report["notes/no_margin"] == 1 and data.report["skipped/not_a_margin"] == 3
    assert "margin" not in tokenized(tmp_path / "train.jsonl", "dpo").dataset.column_names
    bad = write_jsonl(tmp_path / "bad.jsonl", [row | {"margin": "much"} for row in preferences(2)])
    with pytest.raises(UserError, match="column 'margin' must hold numbers, it holds string"):
        tokenized(bad)


def test_margins_survive_a_mix_and_rows_of_varying_types(tmp_path: Path) -> None:
    """One dataset knows no margins, and another makes the fast JSON reader fail."""
    plain = write_jsonl(tmp_path / "plain.jsonl", preferences(2))
    odd = [row | {"margin": 1} for row in preferences(3, seed=2)]
    odd[1]["chosen"] = [{"role": "assistant", "content": 7}]
    mixed = write_jsonl(tmp_path / "odd.jsonl", odd)
    recipe = Recipe(stage="reward", dataset_mixer={str(plain): 1.0, str(mixed): 1.0}, max_length=128)
    data = tokenize_preferences(load_mix(recipe, "train"), byte_tokenizer(), recipe)
    assert sorted(data.dataset["margin"]) == [0.0, 0.0, 1.0, 1.0]
    assert data.report["notes/no_margin"] == 2 and data.report["skipped/not_text"] == 1


def test_margins_reach_the_loss(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    losses = []
    for margin in (0.0, 5.0):
        write_jsonl(tmp_path / "data" / "train.jsonl", [row | {"margin": margin} for row in preferences(8)])
        out = tmp_path / f"out-{margin}"
        mixer = {str(tmp_path / "data"): 1.0}
        run("reward", recipe("reward", dataset_mixer=mixer, output_dir=str(out), max_steps=1, logging_steps=1))
        losses.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[1] > losses[0] + 3


# -------------------------------------------------------------------------------------------------------- real data


@pytest.mark.slow
def test_real_preferences_are_ranked_better_than_by_chance(shared_data: Path, tmp_path: Path) -> None:
    """A new model of one layer on 2,000 pairs, about a minute; recipes/first-run/reward.yaml is the whole of it."""
    import transformers

    from mambalign.models.checkpoint import load_tokenizer, save_model

    tokenizer = load_tokenizer(shared_data / "data/tokenizer")
    torch.manual_seed(0)
    sizes = dict(vocab_size=50304, hidden_size=32, num_hidden_layers=1, initializer_range=0.02)
    save_model(MambaForCausalLM(transformers.MambaConfig(**sizes)), tmp_path / "new", tokenizer=tokenizer)
    recipe = Recipe.from_dict(
        dict(
            stage="reward", model_name_or_path=str(tmp_path / "new"), chat_template="zephyr",
            dataset_mixer={str(shared_data / "data/dpo"): 1.0}, dataset_splits=["train_prefs", "test_prefs"],
            max_length=512, max_train_samples=2000, per_device_train_batch_size=16, per_device_eval_batch_size=16,
            learning_rate=3e-3, output_dir=str(tmp_path / "run"), save_strategy="no",
            report_to=[], use_cpu=True, disable_tqdm=True,
        )
    )  # fmt: skip
    metrics = run("reward", recipe).metrics
    # Of 853 held-out pairs: chance is three standard errors below this, and what eight trainings reached (0.60 to 0.65,
    # which rounding and so the machine decides) three above.
    assert metrics["eval_rewards/accuracies"] > 0.55
    assert 0.6 < metrics["eval_lengths/accuracies"] < 0.8  # what the data give away by length
