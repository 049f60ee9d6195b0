"""Pages and comparisons: everything escaped, nothing fetched, no mean final while something is missing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mambalign.cli import app
from mambalign.evals.report import radar
from mambalign.evals.rule_judge import MODEL

Write = Callable[..., Path]
EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}"
CATEGORIES = ("poems", "sums", "facts")


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, words)], env={"COLUMNS": "200", "TERM": "dumb"})


class Reader(HTMLParser):
    """Tags, texts, and whatever would be fetched."""

    VOID = frozenset({"meta"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.fetched: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href") or name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Reader:
    page = path.read_text(encoding="utf-8")
    reader = Reader(page)
    assert reader.fetched == [] and not {"script", "img", "link"} & reader.tags and "url(" not in page
    return reader


def rating(number: int, turn: int, score: float, model: str = "m", judge: str = "my-judge") -> dict[str, Any]:
    said = {"judge": [judge, "single-v1"], "judgment": f"because {EVIL}", "user_prompt": f"shown {EVIL}"}
    return {"question_id": number, "model": model, "score": score, "turn": turn, **said}


@pytest.fixture
def data(write: Write, tmp_path: Path) -> Path:
    questions = [
        {"question_id": i, "category": CATEGORIES[i % 3] + "<b>", "turns": [f"ask {i} {EVIL}", f"more {i}"]}
        for i in range(6)
    ]
    write("data/question.jsonl", *questions)
    rows = [{"instruction": f"do {i}", "output": "x", "generator": "ref"} for i in range(4)]
    (tmp_path / "data/alpaca_eval_gpt4_baseline.json").write_text(json.dumps(rows))
    return tmp_path / "data"


@pytest.fixture
def answers(write: Write) -> Path:
    rows = [{"question_id": i, "model_id": "m", "choices": [{"turns": [f"one {i} {EVIL}", f"two {i}"]}]}
            for i in range(6)]  # fmt: skip
    given = {"turns": ["a", "b"], "prompts": [f"<|user|>{EVIL}", "p2"]}
    given |= {"finish_reasons": ["stop", "length"], "beyond_trained_length": [False, True]}
    rendered = [{"question_id": i, **given} for i in range(6)]
    write("answers/rendered/m.jsonl", *rendered)
    return write("answers/m.jsonl", *rows)


def every_rating(**changes: Any) -> list[dict[str, Any]]:
    return [rating(i, turn, i + turn, **changes) for i in range(6) for turn in (1, 2)]


def test_a_page_escapes_what_models_and_judges_wrote(write: Write, data: Path, answers: Path, tmp_path: Path) -> None:
    out = tmp_path / "new/page.html"
    file = write("j.jsonl", *every_rating(model="m"))
    done = run("mt-bench", "report", file, "--answers", answers, "--data-dir", data, "--out", out)
    assert done.exit_code == 0, done.output
    assert "NOT FINAL" not in done.output
    page = read(out)
    assert "Not final" not in page.text
    for text in (f"ask 0 {EVIL}", f"one 0 {EVIL}", f"because {EVIL}", f"shown {EVIL}", f"<|user|>{EVIL}", "poems<b>"):
        assert text in page.text, text
    assert "6 rows; 6 answers were cut off" in page.text and "6 prompts are longer" in page.text
    # The ten worst of twelve, worst first: question 0's turns are rated 1 and 2, of the best two none is there.
    heads = re.findall(r"question (\d), turn (\d), \S+: (\d+) by my-judge", page.text)
    assert (
        heads[0] == ("0", "1", "1")
        and [int(score) for _, _, score in heads] == sorted(i + turn for i in range(6) for turn in (1, 2))[:10]
    )
    assert page.text.count("judged by my-judge") >= 5
    assert "svg" in page.tags and "4.00" in page.text and "MT-Bench's format, other questions" in page.text


def test_a_page_is_not_final_while_a_verdict_or_an_answer_is_missing(
    write: Write, data: Path, answers: Path, tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    rows = every_rating()
    file = write("j.jsonl", *rows[:-1])
    done = run("mt-bench", "report", file, "--data-dir", data, "--out", out)
    assert "NOT FINAL: m: 1 verdicts by my-judge are missing: question 5 turn 2" in done.output
    assert "Not final." in read(out).text and "(NOT FINAL)" in read(out).text
    file = write("j.jsonl", *rows)
    short = write("answers/m.jsonl", *[json.loads(line) for line in answers.read_text().splitlines()[:5]])
    done = run("mt-bench", "report", file, "--answers", short, "--data-dir", data, "--out", out)
    assert "1 answers are missing: question 5" in done.output
    file.with_suffix(".judge.json").write_text(
        json.dumps({"judge": "my-judge", "missing": {"question 9": "<i>429"}, "made_from": {"models": ["m"]},
                    "notes": ["it reasons <u>"]})
    )  # fmt: skip
    run("mt-bench", "report", file, "--data-dir", data, "--out", out)
    assert "1 verdicts are missing: <i>429" in read(out).text and "it reasons <u>" in read(out).text
    done = run("mt-bench", "report", write("k.jsonl", *every_rating(model="other")), "--answers", answers,
               "--data-dir", data, "--out", out)  # fmt: skip
    assert "m: none of its answers has a verdict" in done.output


def test_unread_verdicts_are_listed_with_their_bounds(write: Write, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    rows = [*every_rating(judge=f"{MODEL}@127.0.0.1")[:-1], rating(5, 2, -1, judge=f"{MODEL}@127.0.0.1")]
    assert run("mt-bench", "report", write("j.jsonl", *rows), "--data-dir", data, "--out", out).exit_code == 0
    text = read(out).text
    assert "Verdicts without a rating" in text and "question 5, turn 2, facts<b>: no rating by" in text
    assert "Had all been 1 or 10: 3.50 to 4.25" in text  # eleven ratings of 41 in all
    assert "is rule-based, not a language model" in text


def test_half_a_surrogate_pair_does_not_stop_a_page(write: Write, data: Path, tmp_path: Path) -> None:
    file = write("j.jsonl", rating(0, 1, 2) | {"judgment": "broken \ud83d here"})
    done = run("mt-bench", "report", file, "--data-dir", data, "--out", tmp_path / "p.html")
    assert done.exit_code == 0 and "broken ? here" in read(tmp_path / "p.html").text


def test_a_page_is_named_after_the_benchmark_only_where_its_questions_were_asked(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [{"question_id": i, "category": "math", "turns": ["a", "b"]} for i in range(81, 161)]
    file = write("j.jsonl", *[rating(i, turn, 5) for i in range(81, 161) for turn in (1, 2)])
    write("data/question.jsonl", *questions)
    assert run("mt-bench", "report", file, "--data-dir", tmp_path / "data", "--out", tmp_path / "p.html").exit_code == 0
    assert "MT-Bench, single answers" in read(tmp_path / "p.html").text
    monkeypatch.setattr("mambalign.evals.data.DEFAULT_FOLDER", tmp_path / "nowhere")
    done = run("mt-bench", "report", file, "--out", tmp_path / "p.html")
    assert "NOT FINAL: no question file" in done.output and "(NOT FINAL)" in read(tmp_path / "p.html").text


def preference(i: int, value: float | None, model: str = "m", judge: str = "my-judge") -> dict[str, Any]:
    about = {"generator_1": "ref", "generator_2": model, "annotator": judge, "dataset": f"set<b>{i % 2}"}
    texts = {"output_1": f"ref {EVIL}", "output_2": f"own {EVIL}" + "x" * i, "raw_completion": f"so {EVIL}"}
    return {"instruction": f"do {i}", "preference": value, **about, **texts}


def test_alpaca_page(write: Write, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    rows = [preference(0, 1.0), preference(1, 1.25), preference(2, 2.0), preference(3, None)]
    (tmp_path / "model_outputs.json").write_text(json.dumps([{"instruction": "do 0", "generator": "m", "output": "o"}]))
    write("rendered/model_outputs.jsonl", {"instruction": "do 0", "output": "o", "prompt": f"given {EVIL}",
                                           "finish_reason": "stop", "beyond_trained_length": False})  # fmt: skip
    file = write("a.json", *rows)
    done = run("alpaca", "report", file, "--data-dir", data, "--out", out, "--outputs", tmp_path / "model_outputs.json")
    assert done.exit_code == 0 and "NOT FINAL" not in done.output, done.output
    text = read(out).text
    for part in (
        "AlpacaEval's format, other instructions",
        "41.67",
        f"own {EVIL}",
        f"so {EVIL}",
        f"given {EVIL}",
        "The 2 worst losses",
        "31.25 to 56.25",
    ):
        assert part in text, part
    assert text.index("preference for the model 0.000") < text.index("preference for the model 0.250")
    assert "preference for the model 1.000" not in text
    done = run("alpaca", "report", write("a.json", *rows[:3]), "--data-dir", data, "--out", out)
    assert "NOT FINAL: m: 1 instructions have no verdict by my-judge" in done.output


def test_pair_page(write: Write, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    rows = [pair(i, turn, "model_2", EVIL) for i in range(6) for turn in (1, 2)]
    done = run("mt-bench", "report", write("p.jsonl", *rows), "--data-dir", data, "--out", out, "--baseline", "base")
    assert done.exit_code == 0 and "NOT FINAL" not in done.output, done.output
    text = read(out).text
    assert "m against base, judged by my-judge" in text and "10 of 12" in text and f"g1 {EVIL}" in text
    assert "m lost to base" in text
    run("mt-bench", "report", write("p.jsonl", *rows), "--data-dir", data, "--out", out, "--baseline", "m")
    assert "0 of 0" in read(out).text and "lost to" not in read(out).text  # base, of which this now is, won them all


def pair(number: int, turn: int, winner: str, text: str = "", model: str = "m") -> dict[str, Any]:
    about = {"question_id": number, "turn": turn, "model_1": model, "model_2": "base", "judge": ["my-judge", "pair-v2"]}
    games = {f"{game}_{key}": f"{game} {text}" for game in ("g1", "g2") for key in ("judgment", "user_prompt")}
    return (
        about
        | games
        | {"g1_winner": winner, "g2_winner": "tie" if winner == "split" else winner}
        | ({"g1_winner": "model_1"} if winner == "split" else {})
    )


def test_a_radar_leaves_out_what_has_no_number() -> None:
    whole = radar({"m<": {"a": 10.0, "b": 5.0, "c": 0.0}}, 10, "t<")
    assert "m&lt;" in whole and "t&lt;" in whole
    corners = re.findall(r'points="([^"]+)" stroke', whole)[0].split()
    assert corners[0] == "230.0,60.0" and corners[2] == "230.0,190.0"  # the top at full radius, the centre
    open_one = radar({"m": {"a": 10.0, "b": None, "c": 0.0}}, 10, "t")
    assert "<polyline" in open_one and len(re.findall(r'points="([^"]+)" stroke', open_one)[0].split()) == 2
    assert radar({"m": {"a": 1.0, "b": 2.0}}, 10, "t") == ""


# Comparisons --------------------------------------------------------------------------------------------------------


def compared(*words: Any) -> dict[str, Any]:
    done = run("compare", *words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_compare_pairs_by_question(write: Write, data: Path, answers: Path) -> None:
    a = write("a.jsonl", *every_rating())
    b = write("b.jsonl", *[row | {"model": "n", "score": row["score"] + (row["question_id"] % 3)}
                           for row in every_rating()])  # fmt: skip
    other = write("answers/n.jsonl", *[{"question_id": i, "model_id": "n", "choices": [{"turns": ["", "abc"]}]}
                                       for i in range(6)])  # fmt: skip
    result = compared(a, b, "--data-dir", data, "--answers", answers, "--answers", other)
    # Differences by question: 0, 1, 2, 0, 1, 2.
    assert result["difference"]["mean"] == pytest.approx(1.0)
    assert result["difference"]["standard_error"] == pytest.approx((0.8 / 6) ** 0.5)
    assert result["difference"]["p_permutation"] == pytest.approx(2 * 2**2 / 2**6)  # of 64 flips: all signs, zeros free
    assert result["wins"] == {"win": 4, "loss": 0, "tie": 2} and result["n_unpaired"] == 0 and result["final"]
    assert result["categories"]["poems<b>"]["wins"] == {"win": 0, "loss": 0, "tie": 2}
    assert result["length"]["mean_b"] == 1.5 and result["length"]["difference"]["mean"] < 0
    turned = compared(b, a, "--data-dir", data)
    assert turned["difference"]["mean"] == pytest.approx(-1.0) and turned["length"] is None
    assert turned["wins"] == {"win": 0, "loss": 4, "tie": 2}


def test_compare_leaves_out_what_one_side_lacks_and_says_so(write: Write, data: Path, tmp_path: Path) -> None:
    a, b = write("a.jsonl", *every_rating()), write("b.jsonl", *every_rating(model="n")[2:])
    result = compared(a, b, "--data-dir", data)
    assert (result["n_questions"], result["n_unpaired"], result["final"]) == (5, 1, False)
    assert result["missing"] == {"a": 0, "b": 2}
    done = run("compare", a, b, "--data-dir", data, "--html", tmp_path / "c.html")
    assert "NOT FINAL: n: 2 verdicts by my-judge are missing" in done.output
    assert "Not final." in read(tmp_path / "c.html").text


def test_two_judges_are_refused_or_labelled(write: Write, data: Path, tmp_path: Path) -> None:
    a, b = write("a.jsonl", *every_rating()), write("b.jsonl", *every_rating(model="n", judge="gpt-4"))
    refused = run("compare", a, b, "--data-dir", data)
    assert refused.exit_code == 2 and "m was judged by my-judge, n by gpt-4" in refused.output
    done = run("compare", a, b, "--data-dir", data, "--different-judges", "--html", tmp_path / "c.html")
    for text in (done.output, read(tmp_path / "c.html").text):
        assert "DIFFERENT JUDGES: my-judge judged m, gpt-4 judged n" in " ".join(text.split())


def test_compare_pairwise_files_with_the_agreement_of_both_orders(write: Write, data: Path) -> None:
    a = write("a.jsonl", *[pair(i, turn, "model_2") for i in range(6) for turn in (1, 2)])
    b = write("b.jsonl", *[pair(i, turn, "split" if turn == 1 else "model_1", model="n") for i in range(6)
                           for turn in (1, 2)])  # fmt: skip
    result = compared(a, b, "--data-dir", data)
    assert (result["mean_a"], result["mean_b"], result["against"]) == (0.0, 0.75, "base")
    assert (result["a"]["orders_agree"], result["b"]["orders_agree"]) == (1.0, 0.5)


def test_compare_alpaca(write: Write, data: Path) -> None:
    a = write("a.json", *[preference(i, 1.0) for i in range(4)])
    b = write("b.json", *[preference(i, value, "n") for i, value in enumerate((2.0, 1.0, 1.5, None))])
    result = compared(a, b, "--data-dir", data)
    assert result["difference"]["mean"] == pytest.approx(0.5) and result["n_questions"] == 3 and result["final"]
    assert result["wins"] == {"win": 2, "loss": 0, "tie": 1} and result["b"]["n_unread"] == 1
    assert list(result["categories"]) == ["set<b>0", "set<b>1"]


@pytest.mark.parametrize(
    ("first", "second", "words", "message"),
    [
        ("ratings", "annotations", (), "compare files of one kind"),
        ("both", "ratings", (), "choose with --model-a or --model-b"),
        ("both", "ratings", ("--model-a", "x"), "no verdicts on 'x'; it has those on m, n"),
        ("ratings", "elsewhere", (), "no question in common"),
        ("judges", "ratings", (), "one judge a side"),
    ],
)
def test_what_cannot_be_compared(
    first: str, second: str, words: tuple[str, ...], message: str, write: Write, data: Path
) -> None:
    files = {
        "ratings": every_rating(),
        "both": [*every_rating(), *every_rating(model="n")],
        "annotations": [preference(0, 1.0)],
        "elsewhere": [rating(99, 1, 5)],
        "judges": [*every_rating(), rating(1, 1, 5, judge="b")],
    }
    paths = [write(f"{name}.jsonl", *files[name]) for name in (first, second)]
    done = run("compare", *paths, *words, "--data-dir", data)
    assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output


def test_the_rule_judge_needs_no_server_and_names_itself(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives the verdicts it gives over HTTP."""
    from mambalign.evals.rule_judge import verdict

    monkeypatch.setitem(sys.modules, "openai", None)  # `make demo` installs no extra
    data = tmp_path / "data"
    write("data/question.jsonl", {"question_id": 1, "category": "poems", "turns": ["What is it?", "And then?"]})
    shown = "[Question]\n{question}\n\n[The Start of Assistant's Answer]\n{answer}\n[The End of Assistant's Answer]"
    later = "<|Assistant A's Conversation with User|>\n### User:\n{question_2}\n\n### Assistant A:\n{answer_2}\n\n<|"
    about = {"type": "single", "system_prompt": "", "output_format": "[[rating]]"}
    write("data/judge_prompts.jsonl", {"name": "single-v1", "prompt_template": shown, **about},
          {"name": "single-v1-multi-turn", "prompt_template": later, **about})  # fmt: skip
    turns = ["It is what it is, and then some more words.", "No"]
    file = write("m.jsonl", {"question_id": 1, "model_id": "m", "choices": [{"turns": turns}]})
    words = ("mt-bench", "judge", file, "--data-dir", data, "--out", tmp_path / "out", "--judge-base-url", "rule")
    assert run(*words).exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / f"{MODEL}_single.jsonl").read_text().splitlines()]
    assert [row["judge"][0] for row in rows] == [MODEL, MODEL]
    assert [row["judgment"] for row in rows] == [verdict(f"\n{row['user_prompt']}", False)[0] for row in rows]
    assert "not gpt-4" in run(*words, "--judge-model", "gpt-4").output
    assert "--judge-model is missing" in run(*words[:-1], "http://127.0.0.1:9/v1").output
