"""Tokenizers, and rows for new tokens: the padded vocabulary is used before it is grown, never shrunk or untied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, FalconMambaConfig, MambaConfig, PreTrainedTokenizerFast

from mambalign.models.checkpoint import add_tokens, load_model, load_tokenizer, save_model
from mambalign.models.mamba import FalconMambaForCausalLM, MambaForCausalLM
from mambalign.recipe import UserError


def tiny_tokenizer(size: int = 13) -> PreTrainedTokenizerFast:
    words = ["<|endoftext|>", *(f"w{i}" for i in range(1, size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def tiny_model(rows: int = 16, tied: bool = True, kind: str = "mamba") -> Any:
    sizes = {"vocab_size": rows, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}
    if kind == "mamba":
        return MambaForCausalLM(MambaConfig(**sizes, tie_word_embeddings=tied)).eval()
    return FalconMambaForCausalLM(FalconMambaConfig(**sizes, tie_word_embeddings=tied)).eval()


def chatml(tokenizer: Any) -> int:
    return tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})


def weights(model: Any) -> list[torch.Tensor]:
    """The embedding and, where it is another one, the head."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return [embedding] if head is embedding else [embedding, head]


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("counted", [True, False])
def test_padding_rows_are_used_before_any_is_added(kind: str, tied: bool, counted: bool) -> None:
    model, tokenizer = tiny_model(16, tied, kind), tiny_tokenizer(13)
    before = [weight.detach().clone() for weight in weights(model)]
    parameters = list(model.parameters())
    added = chatml(tokenizer)
    assert add_tokens(model, tokenizer, new_ids=added if counted else [13, 14]) == 0
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for old, new in zip(before, weights(model), strict=True):
        assert torch.equal(new[:13], old[:13])
        assert torch.equal(new[15:], old[15:])
        torch.testing.assert_close(new[13:15], old[:13].mean(0).expand(2, -1))
    assert len(weights(model)) == (1 if tied else 2)
    assert model.config.vocab_size == 16


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("multiple", "rows"), [(8, 24), (1, 17), (64, 64)])
def test_growing_keeps_tie_dtype_and_multiple(tied: bool, dtype: torch.dtype, multiple: int, rows: int) -> None:
    model, tokenizer = tiny_model(16, tied).to(dtype), tiny_tokenizer(15)
    model.get_input_embeddings().weight.requires_grad_(False)
    before = [weight.detach().clone() for weight in weights(model)]
    assert add_tokens(model, tokenizer, multiple, new_ids=chatml(tokenizer)) == rows - 16
    assert len(weights(model)) == (1 if tied else 2)
    for old, new in zip(before, weights(model), strict=True):
        assert new.shape == (rows, 8)
        assert new.dtype == dtype
        assert torch.equal(new[:15], old[:15])
        # Row 15 was padding and is now <|im_start|>.
        assert torch.equal(new[15:], old[:15].mean(0, dtype=torch.float32).to(dtype).expand(rows - 15, -1))
    assert not model.get_input_embeddings().weight.requires_grad
    assert model.config.vocab_size == model.lm_head.out_features == rows
    assert model(input_ids=torch.tensor([[1, 15, 16]])).logits.shape[-1] == rows


def test_nothing_new_changes_nothing() -> None:
    model, tokenizer = tiny_model(16), tiny_tokenizer(13)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert add_tokens(model, tokenizer) == 0
    assert add_tokens(model, tokenizer, pad_to_multiple_of=64) == 0  # not even to reach the multiple
    chatml(tokenizer)
    assert add_tokens(model, tokenizer) == 0  # an id that was not named may be trained already: its row is kept
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_an_added_token_does_not_move_the_others() -> None:
    model, tokenizer = tiny_model(13), tiny_tokenizer(13)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        add_tokens(model, tokenizer, new_ids=chatml(tokenizer))
        after = model(input_ids=ids).logits
    torch.testing.assert_close(after[..., :13], before)
    torch.testing.assert_close(after[..., 13], before.mean(-1), rtol=1e-4, atol=1e-5)


def test_a_tokenizer_with_gaps_gets_rows_for_its_highest_id() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "z": 20}, unk_token="a"))
    model = tiny_model(16)
    assert add_tokens(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == 8
    assert model.config.vocab_size == 24


@pytest.mark.parametrize(("options", "says"), [({"new_ids": [99]}, "99 is no id"), ({"pad_to_multiple_of": 0}, "= 0")])
def test_wrong_arguments(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        add_tokens(tiny_model(), tiny_tokenizer(), **options)


@pytest.mark.parametrize("layout", ["hf", "mamba-ssm"])
def test_model_and_tokenizer_travel_together(tmp_path: Path, layout: Any) -> None:
    model, tokenizer = tiny_model(16), tiny_tokenizer(16)
    add_tokens(model, tokenizer, new_ids=chatml(tokenizer))
    save_model(model, tmp_path / "m", layout=layout, tokenizer=tokenizer)
    again = load_tokenizer(tmp_path / "m")
    assert again("w3 <|im_end|>").input_ids == tokenizer("w3 <|im_end|>").input_ids == [3, 17]
    loaded = load_model(tmp_path / "m")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    if layout == "hf":
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").config.vocab_size == 24


def test_a_folder_without_tokenizer_says_which_to_use(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path / "m", layout="mamba-ssm")
    with pytest.raises(UserError, match="tokenizer_name_or_path: EleutherAI/gpt-neox-20b"):
        load_tokenizer(tmp_path / "m")
    with pytest.raises(UserError, match="tokenizer_name_or_path: EleutherAI/gpt-neox-20b"):
        load_tokenizer("someone/not-cached", cache_dir=str(tmp_path))
    with pytest.raises(UserError, match="no tokenizer folder"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "m" / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path / "m")


@pytest.mark.shared("data/tokenizer")
def test_neox_tokenizer_fits_the_padded_vocabulary(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "data" / "tokenizer")
    assert len(tokenizer) == 50277
    assert tokenizer("Hello world").input_ids == [12092, 1533]
    model = tiny_model(50280)
    old = model.get_input_embeddings().weight.detach().clone()
    assert add_tokens(model, tokenizer, new_ids=chatml(tokenizer)) == 0
    new = model.get_input_embeddings().weight
    assert model.lm_head.weight is new
    assert torch.equal(new[:50277], old[:50277])
    torch.testing.assert_close(new[50277:50279], old[:50277].mean(0).expand(2, -1))
    assert tokenizer.add_tokens(["<one>", "<two>"]) == 2
    assert add_tokens(model, tokenizer, new_ids=2) == 8
    assert model.config.vocab_size == 50288
    save_model(model, tmp_path / "m", layout="mamba-ssm", tokenizer=tokenizer)
    assert load_model(tmp_path / "m").config.vocab_size == 50288
    assert load_tokenizer(tmp_path / "m").convert_tokens_to_ids("<two>") == 50280
