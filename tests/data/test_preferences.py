"""Preference rows to prompt and completions, in every layout, and what happens to pairs that are too long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import pytest

from mambalign.data import chat
from mambalign.data.mixer import tokenize_preferences
from mambalign.data.packing import PackedRows, collate_pairs
from mambalign.recipe import UserError

EOS = "<|endoftext|>"


@pytest.fixture
def tokenize(tokenizer: Any, make_recipe: Callable[..., Any]) -> Callable[..., Any]:
    def run(rows: list[dict[str, Any]], **keys: Any) -> Any:
        data = datasets.Dataset.from_list([{**row, "row_id": f"d:train:{i}"} for i, row in enumerate(rows)])
        return tokenize_preferences(data, tokenizer, make_recipe(**{"max_prompt_length": 64, **keys}))

    return run


def texts(tokenizer: Any, row: dict[str, Any]) -> dict[str, str]:
    """Prompt, completions, and (in capitals) what of them is trained."""
    found = {name: tokenizer.decode(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")}
    for side in ("chosen", "rejected"):
        keep = zip(row[f"{side}_ids"], row[f"{side}_mask"], strict=True)
        found[side.upper()] = tokenizer.decode([i for i, m in keep if m])
    return found


def one(data: Any) -> dict[str, Any]:
    assert len(data.dataset) == 1
    return data.dataset[0]


PROMPT = f"<|user|>\nHi{EOS}\n<|assistant|>\n"
EXPECTED = {
    "prompt": PROMPT,
    "chosen": f"Good day{EOS}\n",
    "CHOSEN": f"Good day{EOS}",
    "rejected": f"Good grief{EOS}\n",
    "REJECTED": f"Good grief{EOS}",
}


@pytest.fixture
def layouts(turns: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    whole = {"chosen": turns("u:Hi", "a:Good day"), "rejected": turns("u:Hi", "a:Good grief")}
    answers = {"chosen": turns("a:Good day"), "rejected": turns("a:Good grief")}
    return {
        "whole conversations": whole,
        "ultrafeedback": {**whole, "prompt": "Hi"},
        "whole, prompt as messages": {**whole, "prompt": turns("u:Hi")},
        "answers after messages": {**answers, "prompt": turns("u:Hi")},
        "answers after text": {**answers, "prompt": "Hi"},
        "text": {"prompt": "Hi", "chosen": "Good day", "rejected": "Good grief"},
        "text after messages": {"prompt": turns("u:Hi"), "chosen": "Good day", "rejected": "Good grief"},
    }


LAYOUTS = ["whole conversations", "ultrafeedback", "whole, prompt as messages", "answers after messages"]
LAYOUTS += ["answers after text", "text", "text after messages"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_say_the_same(tokenizer: Any, tokenize: Any, layouts: dict[str, Any], layout: str) -> None:
    """Also: the shared first word of both answers is trained, it is not part of the prompt."""
    data = tokenize([layouts[layout]])
    assert texts(tokenizer, one(data)) == EXPECTED
    row = one(data)
    assert data.report["tokens"] == sum(len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    assert data.report["trained_tokens"] == sum(row["chosen_mask"]) + sum(row["rejected_mask"])
    features = data.dataset.features
    assert features["prompt_ids"] == features["chosen_ids"] == datasets.List(datasets.Value("int32"))
    assert features["rejected_mask"] == datasets.List(datasets.Value("int8"))


def test_sides_are_the_whole_conversations(tokenizer: Any, tokenize: Any, turns: Any) -> None:
    """prompt + completion = the rendered conversation, token by token, for answers that begin awkwardly too."""
    for first, second in [(" a", " b"), ("\n\nx", "\ny"), ("", "x"), ("naïve", "na"), ("same", "same but longer")]:
        pair = {"chosen": turns("s:S", "u:Hi", f"a:{first}"), "rejected": turns("s:S", "u:Hi", f"a:{second}")}
        row = one(tokenize([pair]))
        for side in ("chosen", "rejected"):
            ids, mask = chat.encode_messages(tokenizer, pair[side])
            assert row["prompt_ids"] + row[f"{side}_ids"] == ids
            assert [0] * len(row["prompt_ids"]) + row[f"{side}_mask"] == mask
        assert row["prompt_ids"] == chat.encode_prompt(tokenizer, pair["chosen"][:2])


def test_history_is_prompt_and_later_turns_are_completion(tokenizer: Any, tokenize: Any, turns: Any) -> None:
    start = turns("u:Hi", "a:Hello", "u:And?")
    row = one(tokenize([{"chosen": start + turns("a:Yes", "u:Sure?", "a:Sure"), "rejected": start + turns("a:No")}]))
    found = texts(tokenizer, row)
    assert found["prompt"].endswith(f"Hello{EOS}\n<|user|>\nAnd?{EOS}\n<|assistant|>\n")
    assert found["chosen"] == f"Yes{EOS}\n<|user|>\nSure?{EOS}\n<|assistant|>\nSure{EOS}\n"
    assert found["CHOSEN"] == f"Yes{EOS}Sure{EOS}" and found["REJECTED"] == f"No{EOS}"


def test_conversations_that_part_in_a_user_turn(tokenizer: Any, tokenize: Any, turns: Any) -> None:
    row = one(tokenize([{"chosen": turns("u:Dear A", "a:x"), "rejected": turns("u:Dear B", "a:y")}]))
    found = texts(tokenizer, row)
    assert found["prompt"].startswith("<|user|>\nDear") and "assistant" not in found["prompt"]
    assert found["CHOSEN"] == f"x{EOS}" and found["REJECTED"] == f"y{EOS}"


def test_text_without_a_template(plain_tokenizer: Any, make_recipe: Any) -> None:
    rows = [
        {"prompt": "Q: Hi A:", "chosen": " yes", "rejected": " no", "row_id": "0"},
        {"prompt": None, "chosen": "Q: Hi A: yes", "rejected": "Q: Hi A: no", "row_id": "1"},
        {"prompt": None, "chosen": "alpha", "rejected": "beta", "row_id": "2"},
    ]
    data = tokenize_preferences(datasets.Dataset.from_list(rows), plain_tokenizer, make_recipe(chat_template=None))
    given, found, nothing = (texts(plain_tokenizer, row) for row in data.dataset)
    assert given["prompt"] == "Q: Hi A:" and given["chosen"] == given["CHOSEN"] == f" yes{EOS}"
    assert found["prompt"].startswith("Q: Hi A:") and found["prompt"] + found["chosen"] == f"Q: Hi A: yes{EOS}"
    assert nothing["prompt"] == "" and nothing["chosen"] == f"alpha{EOS}"
    row = data.dataset[2]
    assert row["chosen_mask"][0] == row["rejected_mask"][0] == 0, "nothing predicts a first token"
    batch = collate_pairs(PackedRows(data.dataset, max_length=64, kind="pairs", seed=0)[2])
    assert batch.num_targets == sum(row["chosen_mask"]) + sum(row["rejected_mask"])


SKIPPED = {
    "chosen_equals_rejected": (["u:Hi", "a:Yes"], ["u:Hi", "a:Yes"]),
    "starts_with_assistant": (["a:Hi", "u:x", "a:Yes"], ["u:Hi", "a:No"]),
    "no_assistant_turn": (["u:Hi"], ["u:Hi", "a:No"]),
    "last_turn_not_assistant": (["u:Hi", "a:Yes", "u:Oh"], ["u:Hi", "a:No"]),
    "unknown_role": (["u:Hi", "robot:Yes"], ["u:Hi", "a:No"]),
    "empty_conversation": ([], ["u:Hi", "a:No"]),
    "empty_completion": (["u:Hi", "a:Yes", "u:More", "a:Yes"], ["u:Hi", "a:Yes"]),
}


@pytest.mark.parametrize("reason", SKIPPED)
def test_bad_pairs_are_counted_skips(tokenize: Any, turns: Any, layouts: dict[str, Any], reason: str) -> None:
    chosen, rejected = SKIPPED[reason]
    bad = {"chosen": turns(*chosen), "rejected": turns(*rejected)}
    data = tokenize([bad, layouts["whole conversations"], bad])
    assert data.report[f"skipped/{reason}"] == 2 == data.report["skipped"]
    assert data.first_rows[f"skipped/{reason}"] == "d:train:0"
    assert data.dataset["row_id"][0] == "d:train:1"


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_missing_values(tokenize: Any, layouts: dict[str, Any], side: str) -> None:
    data = tokenize([layouts["whole conversations"], {**layouts["whole conversations"], side: None}])
    assert data.report["skipped/empty_conversation"] == 1
    data = tokenize([layouts["text"], {**layouts["text"], side: None}], chat_template=None)
    assert data.report["skipped/not_text"] == 1


def test_only_one_side_holds_the_prompt(tokenize: Any, turns: Any, layouts: dict[str, Any]) -> None:
    mixed = {"prompt": turns("u:Hi"), "chosen": turns("u:Hi", "a:Yes"), "rejected": turns("a:No")}
    assert tokenize([layouts["whole, prompt as messages"], mixed]).report["skipped/prompt_not_a_prefix"] == 1


def test_sides_that_ask_again_do_not_continue_the_prompt(tokenize: Any, turns: Any, layouts: dict[str, Any]) -> None:
    """Rendered as it stands, the question would be asked twice."""
    good = layouts["whole, prompt as messages"]
    asked_again = {**good, "prompt": turns("s:Be kind.", "u:Hi")}
    longer = {**good, "prompt": turns("u:Hi", "a:Good", "u:And?")}
    assert tokenize([good, asked_again, longer]).report["skipped/prompt_not_a_prefix"] == 2


def test_missing_messages(tokenize: Any, turns: Any, layouts: dict[str, Any]) -> None:
    for layout in ("ultrafeedback", "whole conversations"):
        bad = {**layouts[layout], "chosen": [None, *turns("a:Yes")]}
        assert tokenize([layouts[layout], bad]).report["skipped/unknown_role"] == 1


def test_all_pairs_skipped_is_an_error(tokenize: Any, turns: Any) -> None:
    same = {"chosen": turns("u:Hi", "a:Yes"), "rejected": turns("u:Hi", "a:Yes")}
    with pytest.raises(UserError, match="none of the 2 rows can be used: 2 x chosen_equals_rejected"):
        tokenize([same, same])


def test_system_prompt(tokenizer: Any, tokenize: Any, layouts: dict[str, Any]) -> None:
    for layout in LAYOUTS:
        row = one(tokenize([layouts[layout]], system_prompt="Be kind."))
        assert texts(tokenizer, row) == {**EXPECTED, "prompt": f"<|system|>\nBe kind.{EOS}\n{PROMPT}"}


# -------------------------------------------------------------------------------------------------------- truncation


@pytest.fixture
def lengths(tokenizer: Any, tokenize: Any, turns: Any) -> Callable[..., Any]:
    """A pair of about the wanted lengths, and its tokens when nothing is cut."""

    def make(prompt: int, chosen: int, rejected: int) -> tuple[dict[str, Any], dict[str, Any]]:
        words = [" ".join(str((7 * i) % 10) for i in range(n)) for n in (prompt, chosen, rejected)]
        ask = turns(f"u:{words[0]}")
        pair = {"chosen": ask + turns(f"a:A {words[1]}"), "rejected": ask + turns(f"a:B {words[2]}")}
        return pair, one(tokenize([pair], max_length=10_000))

    return make


def test_a_pair_that_fits_is_not_cut(tokenize: Any, lengths: Any) -> None:
    pair, whole = lengths(30, 5, 9)
    longest = len(whole["prompt_ids"]) + max(len(whole["chosen_ids"]), len(whole["rejected_ids"]))
    data = tokenize([pair], max_length=longest, max_prompt_length=5)
    assert one(data) == whole, "a long prompt alone is no reason"
    assert data.report["truncated"] == data.report["tokens_lost"] == 0


def test_the_prompt_loses_its_beginning_first(tokenize: Any, lengths: Any) -> None:
    pair, whole = lengths(60, 5, 9)
    data = tokenize([pair], max_length=60, max_prompt_length=20)
    row = one(data)
    assert row["prompt_ids"] == whole["prompt_ids"][-20:]
    assert (row["chosen_ids"], row["rejected_ids"]) == (whole["chosen_ids"], whole["rejected_ids"])
    assert data.report["truncated"] == data.report["notes/prompt_truncated"] == 1
    assert "notes/completion_truncated" not in data.report
    assert data.report["tokens_lost"] == len(whole["prompt_ids"]) - 20


def test_then_the_completions_lose_their_ends(tokenize: Any, lengths: Any) -> None:
    pair, whole = lengths(60, 5, 70)
    data = tokenize([pair], max_length=60, max_prompt_length=20)
    row = one(data)
    assert len(row["prompt_ids"]) == 20
    assert row["rejected_ids"] == whole["rejected_ids"][:40] and row["rejected_mask"] == whole["rejected_mask"][:40]
    assert row["chosen_ids"] == whole["chosen_ids"][:40]
    lost = {name: len(whole[name]) - len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    assert data.report["tokens_lost"] == sum(lost.values()) > 0
    assert data.report["notes/completion_truncated"] == 1


def test_a_short_prompt_leaves_its_room_to_the_completions(tokenize: Any, lengths: Any) -> None:
    pair, whole = lengths(5, 5, 90)
    row = one(tokenize([pair], max_length=70, max_prompt_length=40))
    assert row["prompt_ids"] == whole["prompt_ids"]
    assert len(row["rejected_ids"]) == 70 - len(whole["prompt_ids"])


def test_pairs_too_long_are_dropped_if_asked(tokenize: Any, lengths: Any, layouts: dict[str, Any]) -> None:
    pair, whole = lengths(60, 5, 70)
    data = tokenize([layouts["whole conversations"], pair], max_length=60, max_prompt_length=20, truncation="drop")
    assert data.report["skipped/too_long"] == 1 and len(data.dataset) == 1
    assert data.report["tokens_lost"] == sum(len(whole[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))


def test_completions_that_differ_beyond_the_cut(tokenize: Any, turns: Any, layouts: dict[str, Any]) -> None:
    long = "a song! " * 40
    pair = {"chosen": turns("u:Hi", f"a:{long}x"), "rejected": turns("u:Hi", f"a:{long}y")}
    data = tokenize([layouts["whole conversations"], pair], max_length=60, max_prompt_length=20)
    assert data.report["skipped/chosen_equals_rejected"] == 1
    assert data.report["tokens_lost"] > 60


def test_a_prompt_must_leave_room(tokenize: Any, layouts: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="max_prompt_length: 64 leaves no room for a completion in max_length: 64"):
        tokenize([layouts["text"]], max_length=64)
    assert len(tokenize([layouts["text"]], max_length=64, max_prompt_length=None).dataset) == 1, "default: half"
    with pytest.raises(UserError, match="max_length: 1 is too small for a pair"):
        tokenize([layouts["text"]], max_length=1, max_prompt_length=None)
