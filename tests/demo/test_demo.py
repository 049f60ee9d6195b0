"""The demo's tokenizer, statistics and report, and the whole demo on a model too small to learn."""

from __future__ import annotations

import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mambalign.cli import app
from mambalign.data.chat import apply_template, check_template, encode_messages
from mambalign.demo import main, report, tasks
from mambalign.demo.evaluate import difference, judge, share
from mambalign.demo.tokenizer import ROLES, build_tokenizer
from mambalign.recipe import Recipe, UserError

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(scope="module")
def tokenizer():
    built = build_tokenizer(main._tokenizer_texts(0))
    apply_template(built, "zephyr")
    return built


@pytest.fixture
def finished(finished_demo: Path) -> Path:
    return finished_demo


def test_every_word_of_the_demo_is_one_token(tokenizer) -> None:
    for word in [*tasks.WORDS, *tasks.NAMES, *tasks.DIGITS]:
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word
    assert len(tokenizer) < 1024
    for role in ROLES:
        assert len(tokenizer(role)["input_ids"]) == 1


@pytest.mark.parametrize("text", ["Ünïcode 🐍 text\n\tof any kind", "cat,dog", "  two  spaces ", ""])
def test_any_text_comes_back_unchanged(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_is_the_same_every_time(tokenizer) -> None:
    assert build_tokenizer(main._tokenizer_texts(0)).get_vocab() == {
        token: index for token, index in tokenizer.get_vocab().items()
    }


def test_the_end_of_turn_is_trained(tokenizer) -> None:
    check_template(tokenizer)
    row = next(iter(tasks.chat_rows(1, 0)))
    ids, mask = encode_messages(tokenizer, row["messages"])[:2]
    trained = [token for token, is_trained in zip(ids, mask, strict=True) if is_trained]
    assert trained.count(tokenizer.eos_token_id) == len(row["messages"]) // 2


def test_wilson_intervals() -> None:
    # scipy.stats.binomtest(k, n).proportion_ci(method="wilson") with z = 1.96
    assert share([True] * 7 + [False] * 3)[2:] == pytest.approx((0.3968, 0.8922), abs=1e-4)
    assert share([False] * 20)[2:] == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert share([True] * 20).high == pytest.approx(1.0)


def test_paired_differences() -> None:
    same = [True, False] * 10
    assert difference(same, same) == (0.0, 0.0, 0.0)
    up = difference([False] * 50, [True] * 50)
    assert (up.value, up.low, up.high) == (1.0, 1.0, 1.0)
    half = difference([False] * 40, [True, False] * 20)
    assert half.value == 0.5 and 0.3 < half.low < 0.5 < half.high < 0.7


def results(folder: Path, replies: dict[str, list[str]], problems: list[tasks.Problem]) -> dict:
    evaluations = [judge(name, title, problems, replies[name]) for name, title in main.MODELS.values()]
    conversation = [{"role": "user", "content": "<b>Hi</b>"}, {"role": "assistant", "content": "Hello!"}]
    return main.summarise(folder, main.Settings(per_task=10), problems, evaluations, conversation, 1234)


def test_targets_are_judged_by_the_numbers(finished: Path) -> None:
    problems = tasks.held_out_problems(10, 0)
    right = [problem.answer for problem in problems]
    kind = [f"{answer} {tasks.CLOSINGS[0]}" for answer in right]
    good = results(finished, {"base": [""] * len(right), "sft": right, "dpo": kind}, problems)
    assert [target["met"] for target in good["targets"]] == [True, True, True]
    forgot = [f"{problem.wrong} {tasks.CLOSINGS[0]}" for problem in problems]
    bad = results(finished, {"base": [""] * len(right), "sft": right, "dpo": forgot}, problems)
    assert [target["met"] for target in bad["targets"]] == [True, True, False]
    unmoved = results(finished, {"base": right, "sft": right, "dpo": right}, problems)
    assert [target["met"] for target in unmoved["targets"]] == [False, False, True]
    assert main._points(-0.004) == main._points(0.0) == "+0"


class _Page(HTMLParser):
    """Open tags that were never closed, and everything that would be fetched from elsewhere."""

    VOID = frozenset({"meta", "br", "link", "img", "path", "use"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        links = [value for name, value in attrs if name in ("src", "href") and value]
        self.fetched += [link for link in links if not link.startswith("#")]

    def handle_endtag(self, tag) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_report_is_one_whole_page(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    parser = _Page()
    parser.feed(page)
    assert parser.open == [] and parser.fetched == ["mt-bench/report.html"], "a link, and nothing that is fetched"
    assert page.count("<svg") == 6, "three losses, rewards, margin, accuracy"
    assert "var(--dpo)" in page and not re.search("#0[1-7]0[1-7]0[1-7]", page), "figures follow the theme"
    assert len(page) < 1_000_000


def test_the_report_escapes_what_models_say(finished: Path) -> None:
    problems = tasks.held_out_problems(10, 0)
    evil = ["<script>alert(1)</script>"] * len(problems)
    page = report.render(results(finished, {"base": evil, "sft": evil, "dpo": evil}, problems), {})
    assert "<script>" not in page and "&lt;b&gt;Hi" in page


def test_metrics_are_read_past_a_torn_line_and_a_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert report.series(report.read_metrics(path), "loss") == ([1, 2], [3.0, 1.5])


def test_the_demo_leaves_everything_and_repeats_itself(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("report.html", "evaluation.json", "dpo/model.safetensors", "recipes/sft.yaml", "data/chat/test.jsonl"):
        assert (finished / name).stat().st_size > 0, name
    before = json.loads((finished / "evaluation.json").read_text())
    weights = (finished / "dpo/model.safetensors").read_bytes()
    again = main.run_demo(finished, quick=True)
    assert again == before and (finished / "dpo/model.safetensors").read_bytes() == weights
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(UserError, match="seed 0"):
        main.run_demo(finished, quick=True, seed=5)


@pytest.mark.parametrize("precious", ["thesis.txt", "data/chat/train.jsonl"])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, precious: str) -> None:
    path = tmp_path / precious
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("precious")
    with pytest.raises(UserError, match="holds no demo"):
        main.run_demo(tmp_path, quick=True)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["precious"]


def test_a_demo_stopped_at_its_files_makes_them_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, console = main.Settings(**main.QUICK), Console(quiet=True)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(main, "make_model", stop)
        main._claim(tmp_path / "run", settings, console)
    main._claim(tmp_path / "run", settings, console)
    assert (tmp_path / "run/init/model.safetensors").exists() and (tmp_path / "run/recipes/dpo.yaml").exists()
    written = (tmp_path / "run/init/model.safetensors").stat().st_mtime_ns
    main._claim(tmp_path / "run", settings, console)
    assert (tmp_path / "run/init/model.safetensors").stat().st_mtime_ns == written


def test_the_written_recipes_are_the_ones_that_ran(finished: Path) -> None:
    import yaml

    for stage in main.MODELS:
        written = yaml.safe_load((finished / "recipes" / f"{stage}.yaml").read_text())
        ran = yaml.safe_load((finished / stage / "recipe.yaml").read_text())
        assert (
            Recipe.from_dict(written, stage=stage).to_dict().items()
            >= {key: ran[key] for key in ("learning_rate", "max_length", "seed")}.items()
        )


def test_the_readmes_examples_run_after_the_demo(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo-run").symlink_to(finished)
    blocks = re.findall(r"```(python|bash)[^\n]*\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    for block in (text for language, text in blocks if language == "python"):
        exec(compile(block, "README.md", "exec"), {})
    lines = [line for language, text in blocks if language == "bash" for line in text.splitlines()]
    runnable = [line for line in lines if line.startswith(("mambalign convert", "mambalign bench perplexity"))]
    assert len(runnable) == 3
    for line in runnable:
        result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, result.output


def test_the_conversation_sees_its_history(tokenizer) -> None:
    asked = []

    class Echo:
        device = "cpu"

        def eval(self) -> None: ...

        def generate(self, input_ids, **_):
            asked.append(tokenizer.decode(input_ids[0]))
            return input_ids

    from mambalign.demo.evaluate import converse

    messages = converse(Echo(), tokenizer, ["Hello!", "Thank you!"])
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert "Hello!" in asked[0] and "Thank you!" not in asked[0]
    assert "Hello!" in asked[1] and "Thank you!" in asked[1]


def test_the_table_prints_every_model(finished: Path) -> None:
    console = Console(record=True, width=120)
    results = json.loads((finished / "evaluation.json").read_text())
    results["conversation"][-1]["content"] = "[/red] is no markup"
    main.show(results, console)
    text = console.export_text()
    assert all(title in text for _, title in main.MODELS.values())
    assert "[/red] is no markup" in text


def test_problems_are_drawn_without_repeats() -> None:
    problems = tasks.held_out_problems(40, 3)
    assert len({(p.task, p.content) for p in problems}) == len(problems)
