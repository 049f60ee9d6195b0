"""Mixes of files and folders: which rows are read, in which order, and what a user is told when they cannot be."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import pytest

from mambalign.data.mixer import load_mix
from mambalign.data.sources import READERS, is_test_split, parse_source, read_json_slowly, split_of_file
from mambalign.recipe import UserError


def chats(count: int, tag: str = "") -> list[dict[str, Any]]:
    turn = lambda i: [{"role": "user", "content": f"{tag}{i}"}, {"role": "assistant", "content": f"re {tag}{i}"}]  # noqa: E731
    return [{"messages": turn(i)} for i in range(count)]


def asked(rows: datasets.Dataset) -> list[str]:
    return [messages[0]["content"] for messages in rows["messages"]]


# ------------------------------------------------------------------------------------------------ names and entries


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (name, True)
        for name in "test test_sft sft_test test-1 test2023 tests testset testA sftTest eval gsm8k.eval eval_prefs "
        "evaluation validation validation_matched valid heldout held_out hold-out val valset dev dev_set my-val".split()
    ]
    + [
        (name, False)
        for name in "train train_sft devices gen interval latest contest attestation testimonials retrieval medieval "
        "invalid validated evaluator develop sft".split()
    ],
)
def test_names_of_evaluation_splits(name: str, expected: bool) -> None:
    assert is_test_split(name) is expected


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("train_sft.parquet", "train_sft"),
        ("train-00000-of-00003.parquet", "train"),
        ("test_sft-0.parquet", "test_sft"),
        ("train_2.json", "train"),
        ("train.part1.arrow", "train"),
    ],
)
def test_split_of_file(name: str, split: str) -> None:
    assert split_of_file(Path(name)) == split


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (1.5, "dataset_mixer.d: a fraction of 1.5 is more than the whole; write {max_samples: 1}.*or {weight: 1.5}"),
        (-1, "fraction -1 must be a number"),
        ("all", "fraction 'all' must be a number"),
        (True, "fraction True must be a number"),
        ({"fractoin": 0.5}, "unknown key 'fractoin'; did you mean 'fraction'"),
        ({"zzz": 0.5}, "unknown key 'zzz'; known are fraction, weight"),
        ({"weight": 2, "fraction": 1}, "give fraction or weight, not both"),
        ({"max_samples": 0.5}, "max_samples: 0.5 must be a whole number"),
        ({"max_samples": 0}, "max_samples: 0 must be a whole number"),
        ({"weight": float("inf")}, "weight inf must be a number"),
        ({"split": "train", "splits": ["train"]}, "give split or splits, not both"),
        ({"splits": 5}, "splits 5 must be a name or a list of names"),
        ({"split": [1]}, r"splits \[1\] must be a name or a list of names"),
        ({"columns": ["text"]}, r"dataset_mixer.d.columns: \['text'\] must be a map"),
        ({"columns": {"text": 3}}, "dataset_mixer.d.columns: .* must be a map"),
    ],
)
def test_wrong_entries(entry: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_source("d", entry)


# --------------------------------------------------------------------------------------------------- what is read


@pytest.fixture
def folder(write_jsonl: Callable[..., Path]) -> Path:
    write_jsonl("d/train_sft-00000-of-00002.jsonl", chats(6, "a"))
    write_jsonl("d/train_sft-00001-of-00002.jsonl", chats(4, "b"))
    return write_jsonl("d/test_sft.jsonl", chats(5, "t")).parent


def test_a_folder_of_splits(folder: Path, make_recipe: Callable[..., Any]) -> None:
    recipe = make_recipe(dataset_mixer={str(folder): 1.0}, dataset_splits=["train_sft", "test_sft"])
    train, test = load_mix(recipe, "train"), load_mix(recipe, "test")
    assert sorted(asked(train)) == [f"a{i}" for i in range(6)] + [f"b{i}" for i in range(4)]
    assert asked(test) == [f"t{i}" for i in range(5)], "test rows stay in order"
    row = dict(zip(asked(train), train["row_id"], strict=True))
    assert row["b1"] == f"{folder}:train_sft:7"
    assert set(train.column_names) == {"messages", "row_id"}


def test_sampling_is_by_seed_alone(folder: Path, make_recipe: Callable[..., Any]) -> None:
    def order(fraction: float, **keys: Any) -> list[str]:
        keys = {"dataset_mixer": {str(folder): fraction}, "dataset_splits": ["train_sft"], **keys}
        return asked(load_mix(make_recipe(**keys), "train"))

    assert order(1.0) == order(1.0) != order(1.0, seed=1)
    assert order(1.0, data_seed=5) == order(1.0, seed=5) == order(1.0, seed=9, dataset_seed=5)
    assert set(order(0.3)) < set(order(0.6)) < set(order(1.0)), "a larger fraction holds the smaller one"
    assert len(order(0.3)) == 3 and len(order(0.01)) == 1
    assert order(1.0, max_train_samples=4) == order(1.0)[:4]


def test_datasets_of_a_size_are_sampled_apart(
    write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any]
) -> None:
    mixer = {str(write_jsonl(f"{tag}.jsonl", chats(40, tag))): 0.5 for tag in "ab"}
    rows = asked(load_mix(make_recipe(dataset_mixer=mixer), "train"))
    chosen = [{name[1:] for name in rows if name[0] == tag} for tag in "ab"]
    assert len(chosen[0]) == len(chosen[1]) == 20 and chosen[0] != chosen[1]


def test_weights_repeat_and_max_samples_bound(folder: Path, make_recipe: Callable[..., Any]) -> None:
    def rows(entry: Any, kind: str = "train") -> list[str]:
        recipe = make_recipe(dataset_mixer={str(folder): entry}, dataset_splits=["train_sft", "test_sft"])
        return asked(load_mix(recipe, kind))

    twice_and_half = rows({"weight": 2.5})
    assert len(twice_and_half) == 25
    assert sorted(twice_and_half.count(name) for name in set(twice_and_half)) == [2] * 5 + [3] * 5
    assert len(rows({"max_samples": 3})) == 3
    assert len(rows({"max_samples": 99})) == 10
    assert len(rows(0.1, "test")) == 5, "test splits are read whole"


def test_max_eval_samples_is_per_split(folder: Path, make_recipe: Callable[..., Any]) -> None:
    recipe = make_recipe(dataset_mixer={str(folder): 1}, dataset_splits=["train_sft", "test_sft"], max_eval_samples=2)
    assert len(load_mix(recipe, "test")) == 2
    assert asked(load_mix(recipe, "test")) == asked(load_mix(recipe, "test"))


def test_a_mix_of_formats(tmp_path: Path, write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any]) -> None:
    datasets.Dataset.from_list(chats(2, "p")).to_parquet(tmp_path / "p.parquet")
    datasets.Dataset.from_list(chats(2, "s")).save_to_disk(tmp_path / "saved")
    both = {"train": datasets.Dataset.from_list(chats(2, "m")), "test": datasets.Dataset.from_list(chats(1, "n"))}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "dict")
    (tmp_path / "array.json").write_text(str([{"messages": chats(1, "j")[0]["messages"]}]).replace("'", '"'))
    jsonl = write_jsonl("l.jsonl", [dict(row, extra=1) for row in chats(2, "l")])
    arrow = datasets.load_from_disk(str(tmp_path / "saved")).cache_files[0]["filename"]
    names = [tmp_path / "p.parquet", tmp_path / "saved", tmp_path / "dict", tmp_path / "array.json", jsonl]
    recipe = make_recipe(dataset_mixer={**{str(name): 1.0 for name in names}, str(arrow): {"fraction": 0.5}})
    assert {name[0] for name in asked(load_mix(recipe, "train"))} == set("psmjl")
    assert len(load_mix(recipe, "train")) == 10
    assert asked(load_mix(recipe, "test")) == ["n0"], "single files without a test name are for training"


def test_a_file_named_test_is_never_trained_on(
    write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    train, test = write_jsonl("data.jsonl", chats(3)), write_jsonl("data_test.jsonl", chats(2, "t"))
    recipe = make_recipe(dataset_mixer={str(train): 1.0, str(test): 1.0})
    with caplog.at_level(logging.INFO, logger="mambalign"):
        assert len(load_mix(recipe, "train")) == 3
    assert f"dataset {test} is for evaluation by its name: none of it is trained on" in caplog.text
    assert asked(load_mix(recipe, "test")) == ["t0", "t1"]
    with pytest.raises(UserError, match=r"nothing to train on: .*data_test.jsonl hold"):
        load_mix(make_recipe(dataset_mixer={str(test): 1.0}), "train")
    stated = make_recipe(dataset_mixer={str(test): {"split": "train"}})
    assert len(load_mix(stated, "train")) == 2


def test_no_test_split_is_no_rows(folder: Path, make_recipe: Callable[..., Any]) -> None:
    recipe = make_recipe(dataset_mixer={str(folder): 1.0}, dataset_splits=["train_sft", "test_gen"])
    assert len(load_mix(recipe, "test")) == 0
    assert len(load_mix(recipe, "train")) == 10


def test_sharegpt_and_extra_message_keys(
    write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    sharegpt = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]
    extra = [{"messages": [{"role": "user", "content": "x", "id": 3}, {"content": "y", "role": "assistant", "id": 4}]}]
    mixer = {str(write_jsonl("share.jsonl", sharegpt)): 1.0, str(write_jsonl("extra.jsonl", extra)): 1.0}
    with caplog.at_level(logging.INFO, logger="mambalign"):
        rows = load_mix(make_recipe(dataset_mixer=mixer), "train")
    assert "extra.jsonl: id in the messages of 'messages' is not used" in caplog.text
    assert "share.jsonl" not in caplog.text
    expected = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert sorted((m for m in rows["messages"]), key=str)[0] == expected
    assert all(set(message) == {"role", "content"} for messages in rows["messages"] for message in messages)


def test_marks_of_what_is_not_to_be_trained_are_warned_of(
    write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """OpenAI's fine-tuning format: trained all the same, and not in silence."""
    marked = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]
    extra = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "id": 4}]
    mixer = {str(write_jsonl(f"{name}.jsonl", [{"messages": rows}])): 1.0
             for name, rows in (("marked", marked), ("extra", extra))}  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="mambalign"):
        load_mix(make_recipe(dataset_mixer=mixer), "train")
    (warned,) = caplog.messages
    assert "marked.jsonl: every assistant message of 'messages' is trained, whatever its weight says" in warned


def test_conversations_as_structs_of_lists(write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any]) -> None:
    """Of unequal lists nobody knows who said what: the row is empty, and tokenisation skips it."""
    roles = ["user", "assistant"]
    structs = [
        {"role": roles, "content": ["x", "y"]},
        {"role": roles, "content": ["z"]},
        {"role": roles, "content": None},
        None,
    ]
    path = str(write_jsonl("structs.jsonl", [{"messages": struct} for struct in structs]))
    rows = load_mix(make_recipe(dataset_mixer={path: 1.0}), "train")
    found = [messages for messages in rows["messages"] if messages]
    assert found == [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]]


def test_columns_are_renamed(write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any]) -> None:
    path = str(write_jsonl("q.jsonl", [{"question": "1+1?", "answer": "2", "prompt": "not this"}]))
    columns = {"prompt": "question", "completion": "answer"}
    for recipe in (
        make_recipe(dataset_mixer={path: 1.0}, dataset_columns=columns),
        make_recipe(dataset_mixer={path: {"columns": columns}}),
    ):
        row = load_mix(recipe, "train")[0]
        assert row == {"prompt": "1+1?", "completion": "2", "row_id": f"{path}:train:0"}


def test_schema_chooses_among_columns(write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any]) -> None:
    path = str(write_jsonl("x.jsonl", [{**chats(1)[0], "text": "t", "prompt": "p"}]))
    assert set(load_mix(make_recipe(dataset_mixer={path: 1}), "train").column_names) == {"messages", "text", "row_id"}
    assert set(load_mix(make_recipe(dataset_mixer={path: 1}, schema="text"), "train").column_names) == {
        "text",
        "row_id",
    }
    with pytest.raises(UserError, match="fit no schema \\(preference needs chosen and rejected\\)"):
        load_mix(make_recipe(dataset_mixer={path: 1}, schema="preference"), "train")


def test_datasets_of_different_schemas_are_joined(
    write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any]
) -> None:
    mixer = {
        str(write_jsonl("a.jsonl", chats(2))): 1,
        str(write_jsonl("b.jsonl", [{"prompt": "p", "completion": "c"}])): 1,
    }
    rows = load_mix(make_recipe(dataset_mixer=mixer), "train")
    assert len(rows) == 3 and sum(messages is None for messages in rows["messages"]) == 1


def test_text_prompts_mix_with_message_prompts(
    write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any]
) -> None:
    answer = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    a = {"prompt": "p", "chosen": answer("x"), "rejected": answer("y")}
    b = {**a, "prompt": [{"role": "user", "content": "q"}]}
    mixer = {str(write_jsonl("a.jsonl", [a])): 1, str(write_jsonl("b.jsonl", [b])): 1}
    prompts = load_mix(make_recipe(dataset_mixer=mixer), "train")["prompt"]
    assert sorted(prompt[0]["content"] for prompt in prompts) == ["p", "q"]
    text = {"prompt": "p", "chosen": "x", "rejected": "y"}
    mixer = {str(write_jsonl("c.jsonl", [text])): 1, str(write_jsonl("b.jsonl", [b])): 1}
    with pytest.raises(UserError, match=r"column 'chosen' is text in one dataset .* messages in another"):
        load_mix(make_recipe(dataset_mixer=mixer), "train")


# -------------------------------------------------------------------------------------------------------- bad input


def error_of(recipe: Any, kind: str = "train") -> str:
    with pytest.raises(UserError) as error:
        load_mix(recipe, kind)
    return str(error.value)


def test_missing_file_names_the_nearest(folder: Path, make_recipe: Callable[..., Any]) -> None:
    message = error_of(make_recipe(dataset_mixer={str(folder / "tset_sft.jsonl"): 1.0}))
    assert "'tset_sft.jsonl' does not exist in" in message and "there is test_sft.jsonl" in message
    message = error_of(make_recipe(dataset_mixer={str(folder / "no" / "such" / "train.jsonl"): 1.0}))
    assert f"'no' does not exist in {folder}" in message
    message = error_of(make_recipe(dataset_mixer={str(folder / "test_sft.jsonl" / "x.jsonl"): 1.0}))
    assert "'x.jsonl' does not exist in" in message and message.endswith("test_sft.jsonl, which is a file")


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ({"split": "train_sft[:10]"}, "a slice such as 'train_sft[:10]' can only be taken of datasets of the hub"),
        ({"data_files": "x.jsonl"}, "data_files is for datasets of the hub, this one is a path"),
        ({"revision": "main"}, "revision is for datasets of the hub"),
        ({"config": "en"}, "the configuration 'en' is for datasets of the hub, this one is a path"),
    ],
)
def test_what_only_the_hub_has(folder: Path, make_recipe: Callable[..., Any], entry: dict[str, Any], what: str) -> None:
    for path in (folder, folder / "test_sft.jsonl"):
        assert what in error_of(make_recipe(dataset_mixer={str(path): entry}))


HUB_FAILURES = [
    RuntimeError("Dataset scripts are no longer supported, but found old.py"),
    ValueError("BuilderConfig 'x' not found"),
    datasets.exceptions.NonMatchingSplitsSizesError("50 rows instead of 60"),
]


@pytest.mark.parametrize("failure", HUB_FAILURES, ids=lambda failure: type(failure).__name__)
def test_hub_failures_are_sentences(
    make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=failure))
    message = error_of(make_recipe(dataset_mixer={"some/where": 1.0}))
    assert "dataset 'some/where'" in message and str(failure) in message


@pytest.mark.parametrize("name", ["a.jsonl", "hub/id"])
def test_a_full_disk_is_not_blamed_on_the_data(
    write_jsonl: Callable[..., Path],
    make_recipe: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    path = write_jsonl(name, chats(2)) if name.endswith("jsonl") else name
    failure = datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset")
    failure.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=failure))
    with pytest.raises(OSError, match="No space left"):
        load_mix(make_recipe(dataset_mixer={str(path): 1.0}), "train")


def test_hub_dataset_without_network(make_recipe: Callable[..., Any]) -> None:
    message = error_of(make_recipe(dataset_mixer={"nobody/nothing": 1.0}))
    assert "dataset 'nobody/nothing' is neither a file or folder here nor could it be read from the hub" in message
    assert "\n" not in message


def test_missing_split_names_those_there(folder: Path, make_recipe: Callable[..., Any]) -> None:
    message = error_of(make_recipe(dataset_mixer={str(folder): 1.0}))
    assert "has no split 'train'; it has test_sft, train_sft; set dataset_splits" in message


def test_only_evaluation_splits(folder: Path, make_recipe: Callable[..., Any]) -> None:
    message = error_of(make_recipe(dataset_mixer={str(folder): 1.0}, dataset_splits=["test_sft", "validation"]))
    assert "dataset_splits: test_sft, validation are for evaluation only" in message


def test_empty_mixer_and_zero_fractions(folder: Path, make_recipe: Callable[..., Any]) -> None:
    assert "dataset_mixer: no dataset is named" in error_of(make_recipe())
    recipe = make_recipe(dataset_mixer={str(folder): 0}, dataset_splits=["train_sft", "test_sft"])
    assert "nothing to train on: every dataset of dataset_mixer has the fraction 0" in error_of(recipe)
    assert len(load_mix(recipe, "test")) == 5


def test_missing_column_names_those_there(write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any]) -> None:
    path = str(write_jsonl("q.jsonl", [{"question": "1+1?", "answer": "2"}]))
    message = error_of(make_recipe(dataset_mixer={path: 1.0}))
    assert "has the columns" in message and "question" in message and "messages needs messages" in message
    message = error_of(make_recipe(dataset_mixer={path: 1.0}, dataset_columns={"messages": "chat"}))
    assert "dataset_columns: dataset" in message and "has no column 'chat'; it has" in message
    message = error_of(make_recipe(dataset_mixer={path: {"columns": {"text": "body"}}}))
    assert "columns: dataset" in message and "has no column 'body'" in message
    near = str(write_jsonl("near.jsonl", [{"mesages": []}]))
    assert error_of(make_recipe(dataset_mixer={near: 1.0})).endswith("did you mean 'mesages'?")
    message = error_of(make_recipe(dataset_mixer={near: {"columns": {"messages": "message"}}}))
    assert "has no column 'message'; it has mesages; did you mean 'mesages'?" in message
    message = error_of(make_recipe(dataset_mixer={path: 1.0}, text_column="answr"))
    assert "text needs answr" in message and "did you mean 'answer'?" in message
    message = error_of(make_recipe(dataset_mixer={path: 1.0}, dataset_columns={"mesages": "question"}))
    assert "'mesages' is not one of chosen, completion, margin, messages" in message
    message = error_of(make_recipe(dataset_mixer={path: 1.0}, schema="text", text_column="body"))
    assert "text_column: dataset" in message


def test_column_of_the_wrong_kind(write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any]) -> None:
    path = str(write_jsonl("n.jsonl", [{"text": 3}]))
    assert "column 'text' must hold text" in error_of(make_recipe(dataset_mixer={path: 1.0}))
    single = chats(1)[0]["messages"][0]
    for wrong in (3, "text", str(chats(1)[0]["messages"]), single):
        path = str(write_jsonl("m.jsonl", [{"messages": wrong}]))
        message = error_of(make_recipe(dataset_mixer={path: 1.0}))
        assert "column 'messages' must hold a list of messages (role and content), it holds" in message
    path = str(write_jsonl("c.jsonl", [{"chosen": single, "rejected": single}]))
    assert "column 'chosen' must hold text or a list of messages" in error_of(make_recipe(dataset_mixer={path: 1.0}))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"messages": [{"role": "user", "content": "x"}', "malformed JSON"),
        ("not json at all", "malformed JSON"),
        ("[1, 2]", "a row must be a JSON object"),
        ('{"text": ' + "[" * 3000 + "]" * 3000 + "}", "the JSON is nested too deeply"),
    ],
)
def test_malformed_line(
    write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any], line: str, what: str
) -> None:
    path = write_jsonl("bad.jsonl", [*chats(3), line, *chats(1)])
    message = error_of(make_recipe(dataset_mixer={str(path): 1.0}))
    assert f"{path}:4: {what}" in message


def test_lines_are_counted_after_a_byte_order_mark(
    write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any]
) -> None:
    path = write_jsonl("bom.jsonl", ["\ufeff" + json.dumps(chats(1)[0]), "", '{"messages": [tru'])
    assert f"{path}:3: malformed JSON" in error_of(make_recipe(dataset_mixer={str(path): 1.0}))


@pytest.mark.parametrize(("name", "start", "end"), [("l.jsonl", "", ""), ("a.json", "[", "]")])
def test_text_that_is_not_utf8(
    tmp_path: Path, make_recipe: Callable[..., Any], name: str, start: str, end: str
) -> None:
    path = tmp_path / name
    rows = ('{"text": "plain"}', '{"text": "na\u00efve"}')
    path.write_bytes((start + (",\n" if start else "\n").join(rows) + end).encode("latin-1"))
    assert f"{path}:2: not UTF-8 text, at byte 0xef" in error_of(make_recipe(dataset_mixer={str(path): 1.0}))


def test_half_a_surrogate_pair_is_no_text(write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any]) -> None:
    path = write_jsonl("s.jsonl", ['{"text": "\\ud83d"}', '{"text": "\\ud83d\\ude00"}'])
    assert sorted(load_mix(make_recipe(dataset_mixer={str(path): 1.0}), "train")["text"], key=str) == [None, "😀"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl.gz"])
def test_files_of_no_known_kind(write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any], name: str) -> None:
    path = write_jsonl(name, chats(1))
    message = error_of(make_recipe(dataset_mixer={str(path): 1.0}))
    assert f"cannot read {path}: a data file ends in .jsonl, .json, .parquet, .arrow, this one in" in message


def test_nothing_but_empty_conversations(write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any]) -> None:
    """A type of its own to the JSON reader; tokenisation counts them."""
    path = str(write_jsonl("empty.jsonl", [{"messages": []}] * 2))
    assert load_mix(make_recipe(dataset_mixer={path: 1.0}), "train")["messages"][:] == [[], []]


def test_paths_are_no_patterns(tmp_path: Path, make_recipe: Callable[..., Any]) -> None:
    folder = tmp_path / "my [demo]* {dir}?"
    datasets.Dataset.from_list(chats(2)).save_to_disk(folder / "saved")
    for name in ("train[1].parquet", "train.jsonl"):
        getattr(datasets.Dataset.from_list(chats(2)), f"to_{READERS[Path(name).suffix]}")(folder / name)
    for path in (*folder.iterdir(), folder / "saved"):
        assert len(load_mix(make_recipe(dataset_mixer={str(path): 1.0}), "train")) == 2
    (folder / "a::b.jsonl").write_text('{"text": "x"}')
    assert "takes '::' for an archive's" in error_of(make_recipe(dataset_mixer={str(folder / "a::b.jsonl"): 1.0}))


def test_malformed_line_of_a_large_file(write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any]) -> None:
    """Beyond the first block that the fast reader looks at."""
    path = write_jsonl("bad.jsonl", [*chats(200, "x" * 100_000), '{"messages": [tru', *chats(1)])
    assert f"{path}:201: malformed JSON" in error_of(make_recipe(dataset_mixer={str(path): 1.0}))


def test_malformed_array(tmp_path: Path, make_recipe: Callable[..., Any]) -> None:
    path = tmp_path / "array.json"
    path.write_text('[\n{"text": "a"},\n{"text": }\n]')
    assert f"{path}:3: malformed JSON" in error_of(make_recipe(dataset_mixer={str(path): 1.0}))


def test_values_of_differing_type_become_none(
    write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any]
) -> None:
    """One bad content does not spoil a file: tokenisation skips and counts the row."""
    bad = {"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": ["a"]}]}
    path = write_jsonl("mixed.jsonl", [*chats(2), bad, {"messages": ["what"]}, {"messages": 3}])
    rows = load_mix(make_recipe(dataset_mixer={str(path): 1.0}), "train")
    contents = {row["row_id"][-1]: [m["content"] for m in row["messages"] or []] for row in rows}
    assert contents == {"0": ["0", "re 0"], "1": ["1", "re 1"], "2": [None, None], "3": [None], "4": []}
    path = write_jsonl("texts.jsonl", [{"text": "a"}, {"text": 5}])
    assert sorted(load_mix(make_recipe(dataset_mixer={str(path): 1.0}), "train")["text"], key=str) == [None, "a"]


def test_column_that_changes_its_kind(write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any]) -> None:
    path = write_jsonl("mixed.jsonl", [*chats(2), {"messages": "just text"}])
    message = error_of(make_recipe(dataset_mixer={str(path): 1.0}))
    assert "column 'messages' is text in row 2 but a list of messages in row 0" in message
    with pytest.raises(UserError, match=f"{path}:3: column 'messages' is a text here but a list .* in mixed.jsonl:1"):
        read_json_slowly([path])
    good = write_jsonl("good.jsonl", [*chats(2), {"messages": [{"role": "user", "content": 3}], "other": 1}])
    assert read_json_slowly([good])[2]["messages"] == [{"role": "user", "content": None}]


def test_empty_files_and_folders(
    tmp_path: Path, write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any]
) -> None:
    (tmp_path / "none.jsonl").touch()
    assert "none.jsonl: the file is empty" in error_of(make_recipe(dataset_mixer={str(tmp_path / "none.jsonl"): 1.0}))
    blank = write_jsonl("blank.jsonl", ["", ""])
    assert "blank.jsonl" in error_of(make_recipe(dataset_mixer={str(blank): 1.0}))
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    assert "it is empty or damaged" in error_of(make_recipe(dataset_mixer={str(tmp_path / "saved"): 1.0}))
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "train.parquet")
    assert "there are no rows" in error_of(make_recipe(dataset_mixer={str(tmp_path / "train.parquet"): 1.0}))
    (tmp_path / "folder").mkdir()
    assert "holds no data; wanted are files named after their split" in error_of(
        make_recipe(dataset_mixer={str(tmp_path / "folder"): 1.0})
    )


def test_torn_parquet(tmp_path: Path, make_recipe: Callable[..., Any]) -> None:
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_list(chats(50)).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-200])
    assert f"cannot read {path}: " in error_of(make_recipe(dataset_mixer={str(path): 1.0}))


def test_configurations(write_jsonl: Callable[..., Path], make_recipe: Callable[..., Any]) -> None:
    path = str(write_jsonl("a.jsonl", chats(1)))
    recipe = make_recipe()
    recipe.dataset_mixer, recipe.dataset_configs = {path: 1.0}, ["a", "b"]
    assert "dataset_configs: 2 names for 1 datasets" in error_of(recipe)
    recipe.dataset_configs = {f"{path}x": "main"}
    assert error_of(recipe).endswith(f"is not a dataset of dataset_mixer; did you mean {path!r}?")
