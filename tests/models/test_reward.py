"""Reward models: exact on packed, forked and padded input, fp32 scores, and never taken for a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mambalign.data.batches import collate_responses
from mambalign.models.checkpoint import add_tokens, holds_reward_model, load_model, save_model
from mambalign.models.mamba import model_class
from mambalign.models.reward import reward_class, with_reward_head
from mambalign.ops import Segments
from mambalign.recipe import UserError
from tests.models.test_mamba import FAMILIES, config_of

V = 67


def language_model(family: str) -> Any:
    config = config_of(family)
    model = model_class(config)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=FAMILIES)
def reward(request: pytest.FixtureRequest) -> Any:
    return with_reward_head(language_model(request.param), seed=3)


def alone(model: Any, ids: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0, 0]


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# Prompts shorter and longer than the convolution's window, an empty one, and endings of one token.
GROUPS = [([7], [[8], [9, 10, 11]]), ([], [[5, 6]]), (list(range(2, 40)), [[3], list(range(4, 60)), [3, 3]])]


def test_packed_and_forked_is_alone_in_rewards_and_every_gradient(reward: Any) -> None:
    reward = reward.double()
    batch = collate_responses(GROUPS)
    packed = reward(input_ids=batch.input_ids[None], segments=batch.segments, positions=batch.last_positions).logits
    whole = [prompt + ending for prompt, endings in GROUPS for ending in endings]
    single = torch.stack([alone(reward, ids) for ids in whole])
    assert packed.shape == (len(whole), 1) and packed.dtype == torch.float64
    assert (packed[:, 0] - single).abs().max() < 1e-10 < single.diff().abs().min()

    weight = torch.randn(len(whole), dtype=torch.float64)
    expected = gradients(reward, (single * weight).sum())
    found = gradients(reward, (packed[:, 0] * weight).sum())
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (found[name] - gradient).abs().max() <= 1e-9 * (1 + gradient.abs().max()), name


def test_padded_rows_are_scored_at_their_last_real_token(reward: Any) -> None:
    rows = [[5, 6, 7], [8, 9, 10, 11, 12], [3]]
    expected = torch.stack([alone(reward, ids) for ids in rows])
    for left in (True, False):
        ids, mask = torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, 5, dtype=torch.long)
        for row, tokens in enumerate(rows):
            place = slice(5 - len(tokens), 5) if left else slice(len(tokens))
            ids[row, place], mask[row, place] = torch.tensor(tokens), 1
        assert (reward(input_ids=ids, attention_mask=mask).logits[:, 0] - expected).abs().max() < 1e-5


def test_every_segment_is_scored_where_no_positions_are_given(reward: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    (one, two) = reward(input_ids=ids, segments=Segments.from_lengths([3, 1], [-1, 0])).logits[:, 0]
    assert (one - alone(reward, [5, 6, 7])).abs() < 1e-5 and (two - alone(reward, [5, 6, 7, 8])).abs() < 1e-5
    with pytest.raises(ValueError, match="a sequence without tokens has no reward"):
        reward(input_ids=ids, segments=Segments.from_lengths([4, 0]))


def test_scores_are_float32_beside_half_weights_and_under_autocast(reward: Any, tmp_path: Path) -> None:
    save_model(reward, tmp_path / "r")
    half = load_model(tmp_path / "r", dtype="bfloat16", head="reward")
    assert half.backbone.embeddings.weight.dtype == torch.bfloat16 and half.score.weight.dtype == torch.float32
    ids = torch.tensor([[5, 6, 7]])
    seen: list[Tensor] = []
    reward.score.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], output]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = reward(input_ids=ids).logits
    assert half(input_ids=ids).logits.dtype == under.dtype == torch.float32
    assert torch.equal(seen[1], seen[0].float() @ reward.score.weight.T)  # no product in bfloat16


def test_a_new_head_is_drawn_by_its_seed_alone() -> None:
    model = language_model("mamba")
    torch.manual_seed(1)
    one = with_reward_head(model, seed=3)
    torch.manual_seed(2)
    same, other = with_reward_head(model, seed=3), with_reward_head(model, seed=4)
    assert torch.equal(one.score.weight, same.score.weight) and not torch.equal(one.score.weight, other.score.weight)
    assert one.backbone is model.backbone
    wide = with_reward_head(model_class(config := config_of("mamba", hidden_size=1024, num_hidden_layers=1))(config), 0)
    assert wide.score.weight.std().item() == pytest.approx(1025**-0.5, rel=0.1)


def test_saved_and_loaded_it_scores_the_same_and_says_what_it_is(reward: Any, tmp_path: Path) -> None:
    folder = save_model(reward, tmp_path / "r")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(reward).__name__] and type(reward).__name__.endswith(
        "ForSequenceClassification"
    )
    assert len(config["id2label"]) == 1
    again = load_model(folder, head="reward")
    assert type(again) is type(reward) is reward_class(reward.config) and again.config.num_labels == 1
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(input_ids=ids).logits, reward(input_ids=ids).logits)
    assert holds_reward_model(folder)


def test_each_kind_is_refused_as_the_other(reward: Any, tmp_path: Path) -> None:
    save_model(reward, tmp_path / "reward")
    save_model(language_model("mamba"), tmp_path / "lm")
    with pytest.raises(UserError, match=r"reward holds a reward model \(\w+\): it scores answers and cannot write any"):
        load_model(tmp_path / "reward")
    with pytest.raises(UserError, match="lm holds a language model, which has no score to give; `mambalign reward`"):
        load_model(tmp_path / "lm", head="reward")
    with pytest.raises(UserError, match="mamba_ssm knows no reward models"):
        save_model(reward, tmp_path / "original", layout="mamba-ssm")
    assert not holds_reward_model(tmp_path / "lm") and not (tmp_path / "original").exists()


def test_a_reward_model_without_its_head_is_refused(tmp_path: Path) -> None:
    folder = save_model(language_model("mamba"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MambaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"score.weight is missing there"):
        load_model(folder, head="reward")


def test_tokens_are_added_to_a_model_without_a_language_head(reward: Any) -> None:
    from tests.train.conftest import byte_tokenizer

    before = reward.backbone.embeddings.weight.detach().clone()
    grown = add_tokens(reward, byte_tokenizer())
    after = reward.backbone.embeddings.weight
    assert after.shape[0] == before.shape[0] + grown == reward.config.vocab_size == 264
    assert torch.equal(after[: before.shape[0]], before) and torch.allclose(after[-1], before.mean(0), atol=1e-6)
