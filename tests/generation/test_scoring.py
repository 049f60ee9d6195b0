"""Scores of answers and best-of-n: they are what training sees; files stream, stop and go on, and stay in order."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig
from typer.testing import CliRunner

from mambalign.cli import app
from mambalign.data.chat import encode_messages, encode_prompt
from mambalign.data.responses import Responses, ResponseTokenizer, RewardInputs
from mambalign.data.rows import Skip
from mambalign.generation.best_of_n import best_of_n
from mambalign.generation.engine import Engine
from mambalign.generation.journal import Journal
from mambalign.generation.requests import Sampling
from mambalign.generation.scoring import Scorer, score_file
from mambalign.models import MambaForCausalLM
from mambalign.models.checkpoint import load_model, save_model
from mambalign.models.reward import with_reward_head
from mambalign.recipe import UserError
from tests.train.conftest import byte_tokenizer, preferences, write_jsonl

QUESTION = [{"role": "user", "content": "why not"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `policy/` and `reward/`, both random."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    policy = MambaForCausalLM(MambaConfig(vocab_size=264, hidden_size=16, num_hidden_layers=2, state_size=4))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_model(policy, folder / "policy", tokenizer=byte_tokenizer())
    save_model(with_reward_head(policy, seed=0), folder / "reward", tokenizer=byte_tokenizer())
    return folder


@pytest.fixture(scope="module")
def scorer(models: Path) -> Scorer:
    return Scorer.load(str(models / "reward"), device="cpu")


def alone(models: Path, messages: list[dict[str, str]]) -> float:
    """As training sees it: the head at the last trained token, which ends the turn."""
    ids, mask = encode_messages(byte_tokenizer(), messages)
    assert mask[-1] == 1 and ids[-1] == byte_tokenizer().eos_token_id
    model: Any = load_model(models / "reward", head="reward")
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits)


def answers(count: int) -> list[dict[str, Any]]:
    texts = ["yes", "no", "", "the dog eats " * 5, "a big cat"]
    return [{"id": i, "prompt": f"number {i}", "responses": texts[: 1 + i % 5]} for i in range(count)]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("max_tokens", [1, 60, 16384])
def test_scores_are_those_of_each_conversation_alone(models: Path, scorer: Scorer, max_tokens: int) -> None:
    rows = answers(6)
    tight = Scorer(scorer.model, scorer.tokenizer, max_tokens)
    found = tight.score([tight.read(row["prompt"], row["responses"]) for row in rows])
    for row, scores in zip(rows, found, strict=True):
        for response, value in zip(row["responses"], scores, strict=True):
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": response}]
            assert value == pytest.approx(alone(models, turns), abs=1e-5)
    assert len({round(value, 3) for scores in found for value in scores}) > 12  # they differ by far more than that


def test_every_form_of_a_row_gives_the_same_scores(models: Path, scorer: Scorer) -> None:
    whole = [[*QUESTION, {"role": "assistant", "content": text}] for text in ("yes", "no")]
    forms: list[tuple[Any, list[Any]]] = [
        ("why not", ["yes", "no"]),
        (QUESTION, ["yes", "no"]),
        (QUESTION, [turns[1:] for turns in whole]),
        ("why not", whole),  # ultrafeedback's
        (None, whole),
        ([{"from": "human", "value": "why not"}], ["yes", "no"]),
    ]
    expected = [alone(models, turns) for turns in whole]
    for prompt, responses in forms:
        (scores,) = scorer.score([scorer.read(prompt, responses)])
        assert scores == pytest.approx(expected, abs=1e-5), prompt


def test_a_prompt_is_computed_once(scorer: Scorer) -> None:
    shared = scorer.read(QUESTION, ["yes", "yes it is", "yes"])
    prompt = encode_prompt(byte_tokenizer(), QUESTION)
    assert shared.prompt[: len(prompt)] == prompt and all(shared.endings)
    assert shared.endings[0] == shared.endings[2]  # the same answer twice still has an ending
    assert scorer.read(QUESTION, ["yes"]).prompt == []
    assert Responses.sharing([[1, 2], [1, 2]]) == Responses([1], [[2], [2]])


def test_text_and_system_prompt_are_read_as_in_training() -> None:
    tokenizer = byte_tokenizer()
    plain = ResponseTokenizer(tokenizer, RewardInputs(plain_text=True))
    (ids,) = plain("why", ["not"]).endings
    assert tokenizer.decode(ids) == "whynot<|endoftext|>"
    with_system = ResponseTokenizer(tokenizer, RewardInputs(system_prompt="be brief"))
    assert "be brief" in tokenizer.decode(with_system("why", ["not"]).endings[0])
    with pytest.raises(Skip, match="unknown_role"):
        plain(None, [[{"role": "robot", "content": "x"}]])


def test_a_file_is_scored_in_order_and_ranked(models: Path, tmp_path: Path) -> None:
    rows = [*answers(7), {"id": 7, "prompt": [{"role": "robot", "content": "x"}], "responses": ["y"]}]
    rows.append({"id": 8, "prompt": "half a surrogate", "responses": ["fine", "\ud800"]})
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    summary = score_file(str(models / "reward"), source, tmp_path / "out.jsonl", device="cpu", max_tokens=50)
    scored = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in scored] == list(range(9))
    for row in scored[:7]:
        ordered = [row["scores"][i] for i in row["ranking"]]
        assert ordered == sorted(row["scores"], reverse=True) and len(ordered) == len(row["responses"])
    assert scored[7]["scores"] is None and "unknown_role" in scored[7]["skipped"]
    assert scored[8]["scores"] is None and "not_text" in scored[8]["skipped"]
    assert summary == {"rows": 9, "responses": sum(len(row["responses"]) for row in rows[:7]), "skipped": 2}
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "out.jsonl.meta.json"}


def test_of_pairs_the_accuracy_stands_beside_that_of_length(models: Path, scorer: Scorer, tmp_path: Path) -> None:
    pairs = preferences(20)
    for pair in pairs:  # label by the model itself: it is always right
        (scores,) = scorer.score([scorer.read(pair["prompt"], [pair["chosen"], pair["rejected"]])])
        if scores[0] < scores[1]:
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    source = write_jsonl(tmp_path / "in.jsonl", pairs)
    summary = score_file(str(models / "reward"), source, tmp_path / "out.jsonl", device="cpu")
    longer = [len(p["chosen"][0]["content"]) - len(p["rejected"][0]["content"]) for p in pairs]
    by_length = sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in longer) / len(pairs)
    assert summary["accuracy"] == 1.0 and summary["accuracy_of_length_alone"] == round(by_length, 4)
    assert summary["pairs_where_chosen_is_longer"] == sum(d > 0 for d in longer)
    assert summary["accuracy_where_chosen_is_shorter"] == 1.0


@pytest.mark.parametrize("killed_after", [0, 1, 3])
def test_interrupted_it_goes_on(
    killed_after: int, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", answers(12))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    score_file(str(models / "reward"), source, whole, device="cpu", max_tokens=80)
    real, passes = Scorer.score, iter(range(100))

    def score(self: Scorer, rows: Any) -> Any:
        if next(passes) == killed_after:
            raise KeyboardInterrupt
        return real(self, rows)

    with monkeypatch.context() as patched:
        patched.setattr(Scorer, "score", score)
        with pytest.raises(KeyboardInterrupt):
            score_file(str(models / "reward"), source, out, device="cpu", max_tokens=80)
    assert not out.exists()
    with (tmp_path / "out.jsonl.partial").open("a") as torn:
        torn.write('{"id": 99, "prom')
    scored: list[int] = []
    monkeypatch.setattr(Scorer, "score", lambda self, rows: scored.append(len(rows)) or real(self, rows))
    summary = score_file(str(models / "reward"), source, out, device="cpu", max_tokens=80)
    assert out.read_text() == whole.read_text() and summary["rows"] == 12
    assert (sum(scored) < 12) == (killed_after > 0)
    again = score_file(str(models / "reward"), source, out, device="cpu", max_tokens=80)
    assert again == summary | {"finished_before": True} and sum(scored) <= 12


def test_another_result_is_never_overwritten_or_mixed(models: Path, tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", answers(3)), tmp_path / "out.jsonl"
    score_file(str(models / "reward"), source, out, device="cpu")
    before = out.read_text()
    write_jsonl(source, answers(4))
    with pytest.raises(UserError, match=r"holds, or was to hold, another result \(another input\)"):
        score_file(str(models / "reward"), source, out, device="cpu")
    (tmp_path / "mine.jsonl").write_text("precious")
    with pytest.raises(UserError, match="give another --out"):
        score_file(str(models / "reward"), source, tmp_path / "mine.jsonl", device="cpu")
    assert out.read_text() == before and (tmp_path / "mine.jsonl").read_text() == "precious"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, r"in.jsonl:2: a row needs `responses`.*it has prompt"),
        ({"prompt": "x", "responses": []}, r"in.jsonl:2: a row needs `responses`"),
        ({"prompt": "x", "messages": [], "responses": ["y"]}, "in.jsonl:2: give prompt or messages, not both"),
        ({"prompt": "x", "responses": ["y"], "scores": [1]}, "the row has 'scores' already"),
        ("{", "in.jsonl:2: malformed JSON"),
    ],
)
def test_rows_that_cannot_be_meant_are_named_before_work_begins(
    row: Any, message: str, models: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    lines = [json.dumps(answers(1)[0]), row if isinstance(row, str) else json.dumps(row)]
    source.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=message):
        score_file(str(models / "reward"), source, tmp_path / "out.jsonl", device="cpu")
    assert not list(tmp_path.glob("out*"))


def test_weights_that_give_no_number_are_said(models: Path, scorer: Scorer) -> None:
    broken: Any = load_model(models / "reward", head="reward")
    broken.score.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="scores that are not finite"):
        Scorer(broken, scorer.tokenizer).score([scorer.read("a", ["b"])])


# --------------------------------------------------------------------------------------------------------- best of n


def test_the_best_has_the_highest_score_and_prompts_do_not_depend_on_their_order(models: Path, tmp_path: Path) -> None:
    policy, reward, sampling = str(models / "policy"), str(models / "reward"), Sampling(n=3, max_new_tokens=6)
    rows: list[dict[str, Any]] = [{"prompt": "why"}, {"messages": QUESTION}, {"prompt": QUESTION * 1, "id": 3}]
    rows.append({"messages": [*QUESTION, {"role": "assistant", "content": "done"}]})
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    summary = best_of_n(policy, reward, source, tmp_path / "out.jsonl", sampling, device="cpu")
    found = read(tmp_path / "out.jsonl")
    for row in found[:3]:
        scores = [candidate["score"] for candidate in row["candidates"]]
        assert scores == sorted(scores, reverse=True) and row["best"] == row["candidates"][0]["text"]
        turns = [{"role": "user", "content": row["prompt"]}] if row.get("prompt") == "why" else QUESTION
        for candidate in row["candidates"]:
            expected = alone(models, [*turns, {"role": "assistant", "content": candidate["text"]}])
            assert candidate["score"] == pytest.approx(expected, abs=1e-5)
    assert found[1]["candidates"] == found[2]["candidates"]  # the same prompt
    assert found[3]["best"] is None and "the assistant has the last word" in found[3]["skipped"]
    assert summary["rows"] == 4 and summary["skipped"] == 1 and summary["candidates"] == 9
    assert summary["mean_score_of_the_best"] > summary["mean_score"]
    back = write_jsonl(tmp_path / "back.jsonl", rows[::-1])
    best_of_n(policy, reward, back, tmp_path / "back.out.jsonl", sampling, device="cpu")
    assert [row["candidates"] for row in read(tmp_path / "back.out.jsonl")[::-1]] == [r["candidates"] for r in found]


def test_the_policy_may_be_an_adapter(models: Path, tmp_path: Path) -> None:
    from mambalign.models.adapters import AdapterOptions, attach

    policy, folder = str(models / "policy"), tmp_path / "adapter"
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "why"}])

    def choose(seed: int) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        attach(load_model(policy), AdapterOptions(r=2), seed=seed, base={"path": policy}).save(folder)
        byte_tokenizer().save_pretrained(folder)
        where = str(folder), str(models / "reward"), source, tmp_path / "out.jsonl"
        return best_of_n(*where, Sampling(n=2, max_new_tokens=3), device="cpu")

    assert choose(seed=0)["candidates"] == 2
    with pytest.raises(UserError, match="another policy"):
        choose(seed=1)


def test_answers_that_would_all_be_the_same_are_refused(models: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "why"}])
    with pytest.raises(UserError, match="must be above 0; at 0"):
        best_of_n("p", "r", source, tmp_path / "out.jsonl", Sampling(n=2, temperature=0), device="cpu")


def test_interrupted_best_of_n_goes_on_with_the_same_answers(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, reward, sampling = (
        str(models / "policy"),
        str(models / "reward"),
        Sampling(n=8, max_new_tokens=5),
    )  # two rows at a time
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": word} for word in ("red", "blue", "green")])
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    expected = best_of_n(policy, reward, source, whole, sampling, device="cpu")
    calls: Iterator[int] = iter(range(9))
    real = Engine.generate

    def one_only(self: Engine, requests: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(self, requests)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "generate", one_only)
        with pytest.raises(KeyboardInterrupt):
            best_of_n(policy, reward, source, out, sampling, device="cpu")
    asked: list[int] = []
    monkeypatch.setattr(Engine, "generate", lambda self, requests: asked.append(len(requests)) or real(self, requests))
    assert best_of_n(policy, reward, source, out, sampling, device="cpu") == expected
    assert out.read_text() == whole.read_text() and sum(asked) == 1  # the others were not asked again


# ------------------------------------------------------------------------------------------------------ command line


def test_the_commands(models: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "pairs.jsonl", preferences(3))
    words = ["score", str(models / "reward"), str(source), "--device", "cpu"]
    first, second = (CliRunner().invoke(app, words) for _ in range(2))
    assert first.exit_code == second.exit_code == 0, first.output
    assert "pairs.scored.jsonl: finished" in first.output and "accuracy of length alone" in first.output
    assert "was finished before" in second.output
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "why"}])
    sizes = ["-n", "2", "--max-new-tokens", "4", "--device", "cpu"]
    words = ["best-of-n", str(models / "policy"), str(models / "reward"), str(prompts), *sizes]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert len(read(tmp_path / "prompts.best-of-2.jsonl")[0]["candidates"]) == 2
    swapped = ["best-of-n", str(models / "reward"), str(models / "policy"), str(prompts), *sizes, "--seed", "1"]
    refused = CliRunner().invoke(app, [*swapped, "--out", str(tmp_path / "o.jsonl")])
    assert refused.exit_code == 2 and "cannot write any" in refused.output


def test_two_writers_of_one_journal(tmp_path: Path) -> None:
    """Also after the first has read what an earlier command left."""
    out, made_from = tmp_path / "out.jsonl", {"model": "m"}
    with Journal(out, made_from) as first:
        first.write([{"a": 1}])
    with Journal(out, made_from) as again:
        assert list(again.earlier()) == [{"a": 1}]
        with pytest.raises(UserError, match="another process is writing"), Journal(out, made_from):
            pass
