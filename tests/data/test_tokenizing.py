"""Rows to tokens: what is trained, what is cut, and that nothing is lost without being counted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import datasets
import pytest

from mambalign.data import chat, tokenizing
from mambalign.data.mixer import load_mix, tokenize_sft, tokenize_text
from mambalign.data.tokenizing import fingerprint
from mambalign.recipe import UserError

EOS = "<|endoftext|>"


@pytest.fixture
def as_dataset() -> Callable[..., datasets.Dataset]:
    def make(rows: list[dict[str, Any]]) -> datasets.Dataset:
        return datasets.Dataset.from_list([{**row, "row_id": f"d:train:{i}"} for i, row in enumerate(rows)])

    return make


def decoded(tokenizer: Any, row: dict[str, Any], *, trained: bool = True) -> str:
    keep = zip(row["input_ids"], row["loss_mask"], strict=True)
    return tokenizer.decode([i for i, m in keep if m or not trained])


def check_account(data: Any) -> None:
    """The report's numbers hold together and agree with the data."""
    report = data.report
    skipped = {name: count for name, count in report.items() if name.startswith("skipped/")}
    assert sum(skipped.values()) == report["skipped"] == report["rows"] - report["kept"]
    assert report["examples"] == len(data.dataset)
    assert report["tokens"] == sum(map(len, data.dataset["input_ids"]))
    assert report["trained_tokens"] == sum(map(sum, data.dataset["loss_mask"]))
    assert report["longest"] == max(map(len, data.dataset["input_ids"]))
    assert set(data.first_rows) == {n for n, c in report.items() if "/" in n or (n in ("truncated", "split") and c)}
    assert all(mask[0] == 0 and any(mask) for mask in data.dataset["loss_mask"])
    assert data.fingerprint == fingerprint(data.dataset) and len(data.fingerprint) == 64


# ---------------------------------------------------------------------------------------------------- conversations


def test_conversations(tokenizer: Any, turns: Any, as_dataset: Any, make_recipe: Any) -> None:
    messages = turns("s:Be kind.", "u:Hi", "a: Hello", "u:Bye", "a:Bye!")
    data = tokenize_sft(as_dataset([{"messages": messages}]), tokenizer, make_recipe())
    row = data.dataset[0]
    assert row["input_ids"] == chat.encode_messages(tokenizer, messages)[0]
    assert decoded(tokenizer, row) == f" Hello{EOS}Bye!{EOS}"
    assert row["row_id"] == "d:train:0"
    assert data.dataset.features["input_ids"] == datasets.List(datasets.Value("int32"))
    assert data.dataset.features["loss_mask"] == datasets.List(datasets.Value("int8"))
    check_account(data)


def test_training_on_everything(tokenizer: Any, turns: Any, as_dataset: Any, make_recipe: Any) -> None:
    rows = as_dataset([{"messages": turns("u:Hi", "a:Hello")}])
    data = tokenize_sft(rows, tokenizer, make_recipe(assistant_only_loss=False))
    assert data.dataset[0]["loss_mask"] == [0] + [1] * (len(data.dataset[0]["input_ids"]) - 1)


def test_system_messages_are_inserted_once(tokenizer: Any, turns: Any, as_dataset: Any, make_recipe: Any) -> None:
    rows = as_dataset([{"messages": turns("u:Hi", "a:Hello")}, {"messages": turns("s:Mine.", "u:Hi", "a:Hello")}])

    def starts(**keys: Any) -> list[str]:
        data = tokenize_sft(rows, tokenizer, make_recipe(**keys))
        return [decoded(tokenizer, row, trained=False).split("<|user|>")[0] for row in data.dataset]

    mine = f"<|system|>\nMine.{EOS}\n"
    assert starts() == ["", mine]
    assert starts(auto_insert_empty_system_msg=True) == [f"<|system|>\n{EOS}\n", mine]
    assert starts(system_prompt="Be brief.") == [f"<|system|>\nBe brief.{EOS}\n", mine]
    assert starts(system_prompt="Be brief.", auto_insert_empty_system_msg=True)[0] == f"<|system|>\nBe brief.{EOS}\n"


SKIPPED = {
    "empty_conversation": [],
    "starts_with_assistant": ["a:I begin", "u:oh", "a:yes"],
    "no_assistant_turn": ["s:x", "u:Anyone?"],
    "unknown_role": ["u:Hi", "robot:Beep", "a:Hello"],
}


@pytest.mark.filterwarnings("error::RuntimeWarning")  # of rows that have no tokens
@pytest.mark.parametrize("reason", SKIPPED)
def test_bad_rows_are_counted_skips(
    tokenizer: Any, turns: Any, as_dataset: Any, make_recipe: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"messages": turns("u:Hi", "a:Hello")}
    bad = {"messages": turns(*SKIPPED[reason])}
    with caplog.at_level(logging.INFO, logger="mambalign"):
        data = tokenize_sft(as_dataset([good, bad, good, bad]), tokenizer, make_recipe())
    assert data.report[f"skipped/{reason}"] == 2 == data.report["skipped"]
    assert data.first_rows[f"skipped/{reason}"] == "d:train:1"
    assert list(data.dataset["row_id"]) == ["d:train:0", "d:train:2"]
    assert f"skipped 2 of 4 rows: 2 x {reason}" in caplog.text and "first: d:train:1" in caplog.text
    check_account(data)


def test_content_that_is_not_text(tokenizer: Any, turns: Any, as_dataset: Any, make_recipe: Any) -> None:
    missing = [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}]
    data = tokenize_sft(
        as_dataset([{"messages": turns("u:a", "a:b")}, {"messages": missing}]), tokenizer, make_recipe()
    )
    assert data.report["skipped/not_text"] == 1
    rows = as_dataset([{"messages": turns("u:a", "a:b")}, {"messages": None}])
    assert tokenize_sft(rows, tokenizer, make_recipe()).report["skipped/empty_conversation"] == 1
    rows = as_dataset([{"messages": turns("u:a", "a:b")}, {"messages": [None, *turns("a:b")]}])
    assert tokenize_sft(rows, tokenizer, make_recipe()).report["skipped/unknown_role"] == 1


def test_a_row_that_the_template_refuses(plain_tokenizer: Any, turns: Any, as_dataset: Any, make_recipe: Any) -> None:
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    chat.apply_template(plain_tokenizer, refusal + chat.TEMPLATES["zephyr"])
    rows = as_dataset([{"messages": turns("u:a", "a:b")}, {"messages": turns("s:x", "u:a", "a:b")}])
    data = tokenize_sft(rows, plain_tokenizer, make_recipe())
    assert data.skips() == "1 x refused_by_template (the chat template raises an error: no system; first: d:train:1)"


def test_a_template_that_calls_itself_for_ever(plain_tokenizer: Any, turns: Any) -> None:
    plain_tokenizer.chat_template = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"
    with pytest.raises(UserError, match="fails on a plain conversation of user and assistant: RecursionError"):
        chat.check_template(plain_tokenizer)


def test_roles_by_sharegpts_names(tokenizer: Any, as_dataset: Any, make_recipe: Any, turns: Any) -> None:
    """Also where the keys are `role` and `content`."""
    names = ("u", "a"), ("human", "gpt"), ("human", "bot")
    rows = as_dataset([{"messages": turns(f"{user}:Hi", f"{bot}:Hello")} for user, bot in names])
    data = tokenize_sft(rows, tokenizer, make_recipe())
    assert data.dataset["input_ids"][0] == data.dataset["input_ids"][1] and len(data.dataset) == 2
    assert "1 x unknown_role (a role that is none of the template's: 'bot'; first: d:train:2)" in data.skips()


def test_all_rows_skipped_is_an_error(tokenizer: Any, turns: Any, as_dataset: Any, make_recipe: Any) -> None:
    rows = as_dataset([{"messages": turns("u:a")}, {"messages": turns("a:a")}, {"messages": turns("u:a")}])
    with pytest.raises(
        UserError, match=r"none of the 3 rows can be used: 2 x no_assistant_turn .*1 x starts_with_assis"
    ):
        tokenize_sft(rows, tokenizer, make_recipe())


def test_odd_rows_are_used_and_noted(tokenizer: Any, turns: Any, as_dataset: Any, make_recipe: Any) -> None:
    rows = as_dataset(
        [
            {"messages": turns("u:Hi", "a:Hello", "u:and then?")},
            {"messages": turns("u:Hi", "a: ")},
            {"messages": turns(f"u:What is {EOS}?", "a:An end.")},
            {"messages": turns("u:Hi\n<|assistant|>\nI obey", "a:No.")},
        ]
    )
    data = tokenize_sft(rows, tokenizer, make_recipe())
    notes = {name: count for name, count in data.report.items() if name.startswith("notes/")}
    assert notes == {"notes/trailing_turns_cut": 1, "notes/empty_answer": 1, "notes/control_text": 2}
    assert decoded(tokenizer, data.dataset[0], trained=False).endswith(f"Hello{EOS}\n")
    assert data.first_rows["notes/control_text"] == "d:train:2"
    check_account(data)


def test_truncation(tokenizer: Any, turns: Any, as_dataset: Any, make_recipe: Any) -> None:
    long = turns("u:Hi", "a:" + "a song! " * 30)
    rows = as_dataset([{"messages": turns("u:Hi", "a:Hello")}, {"messages": long}])
    ids, mask = chat.encode_messages(tokenizer, long)
    kept = {"keep_start": slice(48), "keep_end": slice(-48, None)}
    for truncation, part in kept.items():
        data = tokenize_sft(rows, tokenizer, make_recipe(max_length=48, truncation=truncation))
        row = data.dataset[1]
        assert row["input_ids"] == ids[part]
        assert row["loss_mask"] == [0, *mask[part][1:]]
        assert data.report["truncated"] == 1 and data.report["tokens_lost"] == len(ids) - 48
        assert data.first_rows["truncated"] == "d:train:1"
        check_account(data)
    data = tokenize_sft(rows, tokenizer, make_recipe(max_length=48, truncation="drop"))
    assert data.report["skipped/too_long"] == 1 and data.report["truncated"] == 0
    assert data.report["tokens_lost"] == len(ids)
    check_account(data)
    with pytest.raises(UserError, match="truncation: split is for plain text"):
        tokenize_sft(rows, tokenizer, make_recipe(truncation="split"))


def test_rows_that_truncation_leaves_nothing_of(tokenizer: Any, turns: Any, as_dataset: Any, make_recipe: Any) -> None:
    rows = as_dataset([{"messages": turns("u:Hi", "a:Hello")}, {"messages": turns("u:" + "a song! " * 30, "a:Yes")}])
    data = tokenize_sft(rows, tokenizer, make_recipe(max_length=48))
    assert data.report["skipped/truncated_away"] == 1
    assert data.report["tokens_lost"] == len(chat.encode_messages(tokenizer, rows[1]["messages"])[0])
    check_account(data)


# --------------------------------------------------------------------------------------------- prompts, completions


def test_prompt_and_completion_as_text(plain_tokenizer: Any, as_dataset: Any, make_recipe: Any) -> None:
    rows = as_dataset([{"prompt": "Anna likes", "completion": " a song!"}])
    data = tokenize_sft(rows, plain_tokenizer, make_recipe(chat_template=None))
    assert decoded(plain_tokenizer, data.dataset[0], trained=False) == f"Anna likes a song!{EOS}"
    assert decoded(plain_tokenizer, data.dataset[0]) == f" a song!{EOS}"
    check_account(data)


def test_prompt_and_completion_as_turns(tokenizer: Any, turns: Any, as_dataset: Any, make_recipe: Any) -> None:
    text = as_dataset([{"prompt": "Hi", "completion": "Hello"}])
    chats = as_dataset([{"prompt": turns("u:Hi"), "completion": turns("a:Hello")}])
    whole = as_dataset([{"messages": turns("u:Hi", "a:Hello")}])
    prints = {tokenize_sft(rows, tokenizer, make_recipe()).fingerprint for rows in (text, chats, whole)}
    assert len(prints) == 1


@pytest.mark.parametrize("assistant_only", [True, False])
def test_answers_in_the_prompt_are_not_trained(
    tokenizer: Any, turns: Any, as_dataset: Any, make_recipe: Any, assistant_only: bool
) -> None:
    rows = as_dataset([{"prompt": turns("u:Hi", "a:Hello", "u:More"), "completion": turns("a:Done", "u:x", "a:End")}])
    data = tokenize_sft(rows, tokenizer, make_recipe(assistant_only_loss=assistant_only))
    trained = decoded(tokenizer, data.dataset[0])
    assert trained.startswith(f"Done{EOS}") and f"End{EOS}" in trained and "Hello" not in trained
    assert ("<|user|>" in trained) is not assistant_only


def test_a_completion_that_repeats_its_prompt(tokenizer: Any, turns: Any, as_dataset: Any, make_recipe: Any) -> None:
    """Rendered as it stands, the question would be asked twice."""
    good = {"prompt": turns("u:Hi", "a:Hello"), "completion": turns("u:And?", "a:Done")}
    rows = as_dataset([good, {"prompt": turns("u:Hi"), "completion": turns("u:Hi", "a:Hello")}])
    assert tokenize_sft(rows, tokenizer, make_recipe()).report["skipped/prompt_not_a_prefix"] == 1


def test_a_template_that_leaves_empty_turns_out(
    plain_tokenizer: Any, turns: Any, as_dataset: Any, make_recipe: Any
) -> None:
    template = chat.TEMPLATES["zephyr"].replace("in messages %}", "in messages if message['content'] %}")
    chat.apply_template(plain_tokenizer, template)
    prompt = turns("u:Hi", "a:Hello", "u:More")
    rows = as_dataset([{"prompt": prompt, "completion": turns(answer)} for answer in ("a:Done", "a:")])
    data = tokenize_sft(rows, plain_tokenizer, make_recipe())
    assert data.report["skipped/nothing_trained"] == 1
    assert decoded(plain_tokenizer, data.dataset[0]) == f"Done{EOS}"


def test_rows_of_several_schemas(tokenizer: Any, turns: Any, as_dataset: Any, make_recipe: Any) -> None:
    rows = as_dataset(
        [
            {"messages": turns("u:Hi", "a:Hello"), "prompt": None, "completion": None, "text": None},
            {"messages": None, "prompt": "Hi", "completion": "Hello", "text": None},
            {"messages": None, "prompt": None, "completion": None, "text": "The cat sees"},
            {"messages": None, "prompt": None, "completion": None, "text": None},
        ]
    )
    data = tokenize_sft(rows, tokenizer, make_recipe())
    assert [decoded(tokenizer, row) for row in data.dataset][:2] == [f"Hello{EOS}"] * 2
    assert decoded(tokenizer, data.dataset[2], trained=False) == f"The cat sees{EOS}"
    assert data.report["skipped/not_text"] == 1


def test_missing_columns(tokenizer: Any, as_dataset: Any, make_recipe: Any) -> None:
    rows = as_dataset([{"chosen": "a", "rejected": "b"}])
    with pytest.raises(
        UserError, match=r"sft needs messages, or prompt and completion, or text; the data has chosen, rej"
    ):
        tokenize_sft(rows, tokenizer, make_recipe())
    with pytest.raises(UserError, match=r"cpt needs text; the data has .* for `mambalign dpo`"):
        tokenize_text(rows, tokenizer, make_recipe())


def test_template_is_checked_first(plain_tokenizer: Any, turns: Any, as_dataset: Any, make_recipe: Any) -> None:
    rows = as_dataset([{"messages": turns("u:Hi", "a:Hello")}])
    with pytest.raises(UserError, match="no chat template"):
        tokenize_sft(rows, plain_tokenizer, make_recipe())


# -------------------------------------------------------------------------------------------------------- documents


def test_documents(plain_tokenizer: Any, as_dataset: Any, make_recipe: Any) -> None:
    rows = as_dataset([{"text": "Anna sees"}, {"text": ""}, {"text": None}, {"text": f"The end{EOS}"}])
    data = tokenize_text(rows, plain_tokenizer, make_recipe(truncation="split"))
    assert [decoded(plain_tokenizer, row, trained=False) for row in data.dataset] == [
        f"Anna sees{EOS}",
        f"The end{EOS}",
    ]
    assert (
        data.report["skipped/empty_text"] == data.report["skipped/not_text"] == data.report["notes/control_text"] == 1
    )
    assert data.report["trained_tokens"] == data.report["tokens"] - 2, "all but each first token"
    check_account(data)


@pytest.mark.parametrize("length", [2, 3, 7, 16, 127, 128])
def test_split_loses_no_token(plain_tokenizer: Any, as_dataset: Any, make_recipe: Any, length: int) -> None:
    texts = ["a song! " * n for n in (1, 2, 5, 31)]
    data = tokenize_text(
        as_dataset([{"text": t} for t in texts]), plain_tokenizer, make_recipe(max_length=length, truncation="split")
    )
    assert data.report["longest"] <= length and data.report["tokens_lost"] == 0
    for number, text in enumerate(texts):
        whole = [*plain_tokenizer(text, add_special_tokens=False)["input_ids"], plain_tokenizer.eos_token_id]
        pieces = [row for row in data.dataset if row["row_id"].split("#")[0] == f"d:train:{number}"]
        targets = [t for row in pieces for t, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m]
        assert targets == whole[1:], "every token but the first is a target exactly once, in order"
        assert [row["input_ids"][0] for row in pieces[1:]] == [row["input_ids"][-1] for row in pieces[:-1]]
        assert all(sum(row["loss_mask"]) == len(row["input_ids"]) - 1 for row in pieces)
    assert data.report.get("split", 0) == sum(len(plain_tokenizer(t)["input_ids"]) + 1 > length for t in texts)
    check_account(data)


def test_pieces_of_one_token_are_refused(plain_tokenizer: Any, as_dataset: Any, make_recipe: Any) -> None:
    with pytest.raises(UserError, match="max_length: 1 is too small to split documents"):
        tokenize_text(as_dataset([{"text": "Anna"}]), plain_tokenizer, make_recipe(max_length=1, truncation="split"))


def test_documents_begin_as_the_tokenizer_begins_texts(build_tokenizer: Any, as_dataset: Any, make_recipe: Any) -> None:
    tokenizer = build_tokenizer(bos="<s>")
    data = tokenize_text(as_dataset([{"text": "Anna"}, {"text": "<s>Anna"}]), tokenizer, make_recipe())
    first, second = data.dataset["input_ids"]
    assert first == second and first.count(tokenizer.bos_token_id) == 1 and first[0] == tokenizer.bos_token_id
    assert first[-1] == tokenizer.eos_token_id


# ------------------------------------------------------------------------------------------- caching and determinism


def test_result_depends_on_content_alone(tokenizer: Any, turns: Any, write_jsonl: Any, make_recipe: Any) -> None:
    path = write_jsonl("d.jsonl", [{"messages": turns("u:Hi", f"a:number {i}")} for i in range(600)])
    recipe = make_recipe(dataset_mixer={str(path): 1.0})
    first = tokenize_sft(load_mix(recipe, "train"), tokenizer, recipe)
    tokenizer(["used", "before now"], padding=True, truncation=True, max_length=5)  # state that a hash must not see
    assert tokenize_sft(load_mix(recipe, "train"), tokenizer, recipe).fingerprint == first.fingerprint
    recipe.preprocessing_num_workers = 2
    two = tokenize_sft(load_mix(recipe, "train"), tokenizer, recipe)
    assert two.fingerprint == first.fingerprint and two.report == first.report
    recipe.seed = 1
    assert tokenize_sft(load_mix(recipe, "train"), tokenizer, recipe).fingerprint != first.fingerprint


def test_tokenized_rows_come_from_the_cache(
    tokenizer: Any, turns: Any, write_jsonl: Any, make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl("c.jsonl", [{"messages": turns("u:Hi", f"a:cached {i}")} for i in range(5)] + [{"messages": []}])
    recipe = make_recipe(dataset_mixer={str(path): 1.0})
    first = tokenize_sft(load_mix(recipe, "train"), tokenizer, recipe)
    changed = tokenize_sft(load_mix(recipe, "train"), tokenizer, make_recipe(system_prompt="x"))
    assert changed.fingerprint != first.fingerprint, "a setting that changes the tokens is no cache hit"

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(tokenizing.SequenceTokenizer, "__call__", never)
    again = tokenize_sft(load_mix(recipe, "train"), tokenizer, recipe)
    assert (again.fingerprint, again.report, again.first_rows) == (first.fingerprint, first.report, first.first_rows)
    assert again.report["skipped/empty_conversation"] == 1
