"""`mambalign chat`: what is kept, what is shown, and that a line of input never ends in a traceback."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import MambaConfig

from mambalign.data.chat import encode_prompt
from mambalign.generation.engine import Engine
from mambalign.generation.requests import Request
from mambalign.generation.terminal import Settings, Terminal, visible
from mambalign.models import MambaForCausalLM
from mambalign.models.checkpoint import save_model
from mambalign.recipe import UserError
from tests.generation.serving import ANSWER, FakeEngine
from tests.train.conftest import byte_tokenizer
from tests.waiting import until

SURE = Settings(temperature=0)
GREEDY = Settings(temperature=0, max_new_tokens=24)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Random, of letters only, so that its answers are text again when they are read again."""
    torch.manual_seed(3)
    model = MambaForCausalLM(MambaConfig(vocab_size=257, hidden_size=16, num_hidden_layers=2, state_size=4))
    letters = byte_tokenizer()("abcdefghijklmnop ")["input_ids"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        quiet = torch.ones(257, dtype=torch.bool)
        quiet[letters] = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.lm_head.weight[quiet] = -model.lm_head.weight[letters].mean(0)
        model.config.tie_word_embeddings = False
    folder = tmp_path_factory.mktemp("chat") / "tiny"
    save_model(model, folder, tokenizer=byte_tokenizer())
    return Engine.load(str(folder), device="cpu", slots=1)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_settings() -> None:
    assert GREEDY.changed(["temperature=0.5", "seed=4", "top_k=3"]) == Settings(0.5, top_k=3, max_new_tokens=24, seed=4)
    assert GREEDY.changed(["seed=4"]).changed(["seed=none"]) == GREEDY
    for words in (["temprature=1"], ["top_k=x"], ["top_k=1.5"], ["temperature=-1"], ["top_p=0"], ["seed"]):
        with pytest.raises(UserError):
            GREEDY.changed(words)
    fixed = Settings(seed=7)
    assert fixed.sampling(0).seed == 7 != fixed.sampling(1).seed
    drawn = {GREEDY.sampling(0).seed for _ in range(3)}
    assert len(drawn) == 3


# -------------------------------------------------------------------------------------------------- the terminal


def at_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, lines: str, engine: Any = None, settings: Settings = SURE
) -> tuple[Terminal, str, str]:
    """The terminal after `lines` were piped in, what it answered, and what it noted."""
    notes = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    terminal = Terminal(engine or FakeEngine(), settings, Console(file=notes, width=200))
    terminal.run()
    return terminal, capsys.readouterr().out, notes.getvalue()


def test_piped_lines_are_questions_and_only_answers_come_out(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    terminal, out, notes = at_terminal(monkeypatch, capsys, "one\n\n  \ntwo\r\nthree")
    assert out == f"{ANSWER}\n" * 3
    assert [turn["content"] for turn in terminal.talk.messages[::2]] == ["one", "two", "three"]
    assert notes == ""


def test_commands(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    lines = ["one", "/retry", "two", "/undo", "/settings seed=5", "/system be brief", "x", "/help", "/quit", "never"]
    fake = FakeEngine()
    terminal, out, notes = at_terminal(monkeypatch, capsys, "\n".join(lines), fake)
    assert out == f"{ANSWER}\n" * 4
    assert terminal.talk.messages == [{"role": "system", "content": "be brief"}, *turns("x", ANSWER)]
    assert "seed=5" in notes and "taken back: two" in notes and "/save FILE" in notes
    asked = encode_prompt(byte_tokenizer(), [{"role": "system", "content": "be brief"}, *turns("x")])
    assert list(fake.requests[-1].prompt) == asked
    assert fake.requests[0].sampling.seed != fake.requests[1].sampling.seed and fake.requests[-1].sampling.seed == 5


def test_a_question_is_read_alone_and_a_saved_talk_goes_on(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = tmp_path / "talk.safetensors"
    lines = f"hello\n/save {file}\ngo on\n"
    whole, out, _ = at_terminal(monkeypatch, capsys, lines, engine, GREEDY)
    assert whole.talk.reread is None and len(out.splitlines()) >= 2
    again, rest, notes = at_terminal(monkeypatch, capsys, f"/load {file}\ngo on\n", engine, GREEDY)
    assert again.talk.messages == whole.talk.messages and out.endswith(rest) and again.talk.reread is None
    assert "user: hello" in notes


def test_a_failing_engine_leaves_the_conversation_as_it_was(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    fake = FakeEngine(fail_at=1)
    terminal = Terminal(fake, SURE, Console(file=io.StringIO()))
    with pytest.raises(RuntimeError, match="fell off"):
        terminal.answer("one")
    assert terminal.talk.messages == [] and fake.running == {}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/sav x", "there is no /sav; did you mean 'save'"),
        ("/", "there is no /"),
        ("/save", "/save needs the name of a file"),
        ("/save /dev/null/x.safetensors", "Not a directory"),
        ("/load nowhere.safetensors", "there is no saved state nowhere.safetensors"),
        ("/save ~no-such-user/x", "~no-such-user/x: there is no such user"),
        ("/load ~no-such-user", "there is no such user"),
        ("/save a\0b", "no name of a file"),
        ("/undo", "nothing has been asked yet"),
        ("/retry", "nothing has been asked yet"),
        ("/settings top_p=2", "top_p: 2.0 must be above 0 and at most 1"),
    ],
)
def test_a_mistake_is_a_sentence_and_the_talk_goes_on(
    line: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    _, out, notes = at_terminal(monkeypatch, capsys, f"{line}\nhello\n")
    assert words in notes and out == f"{ANSWER}\n"


def test_bytes_that_are_no_text_are_still_a_question(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for errors in ("strict", "surrogateescape"):  # as Python opens standard input in a UTF-8 and in the C locale
        piped = io.TextIOWrapper(io.BytesIO(b"a\xff\xfeb\nlast"), "utf-8", errors)
        monkeypatch.setattr(sys, "stdin", piped)
        terminal = Terminal(FakeEngine(), SURE, Console(file=io.StringIO()))
        terminal.run()
        assert [turn["content"] for turn in terminal.talk.messages[::2]] == ["a\ufffd\ufffdb", "last"]
    terminal.answer("\udcff?")  # of an argument
    assert terminal.talk.messages[-2]["content"] == "??"
    capsys.readouterr()


def test_nobody_reading_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    fake = FakeEngine()
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        Terminal(fake, SURE, Console(file=io.StringIO())).run()
    assert len(fake.requests) == 1 and fake.running == {}


def test_control_sequences_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\r\x08\x7f\u202eabc\tok [bold]x[/]"
    _, out, _ = at_terminal(monkeypatch, capsys, "hi\n", FakeEngine(answer=evil))
    assert not [c for c in out if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c == "\u202e"]
    assert "␛]0;title␇" in out and out.endswith("abc\tok [bold]x[/]\n")
    assert visible("plain héllo 🙂\n\t") == "plain héllo 🙂\n\t"


def test_ctrl_c_stops_the_answer_and_not_the_program(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    fake, longest = FakeEngine(answer="abc", endless=True, step_seconds=0.01), 100_000  # a quarter of an hour
    sent = threading.Event()

    def interrupt() -> None:
        until(lambda: fake.steps >= 3)
        os.kill(os.getpid(), signal.SIGINT)
        sent.set()

    threading.Thread(target=interrupt).start()
    before = signal.getsignal(signal.SIGINT)
    lines = "one\n/settings max_new_tokens=3\ntwo\n"
    terminal, _, notes = at_terminal(monkeypatch, capsys, lines, fake, Settings(max_new_tokens=longest))
    assert sent.is_set() and signal.getsignal(signal.SIGINT) is before
    assert "(stopped)" in notes
    assert [turn["content"] for turn in terminal.talk.messages[::2]] == ["one", "two"]
    assert len(terminal.talk.messages[1]["content"]) < longest and terminal.talk.messages[3]["content"] == "abc"
    assert fake.running == {}


def test_the_verb_answers_once_and_needs_no_extra(engine: Engine) -> None:
    folder = engine.model.config._name_or_path
    code = (
        "import sys\nfor name in ('fastapi', 'uvicorn', 'prometheus_client'): sys.modules[name] = None\n"
        f"from mambalign.cli import app\napp(['chat', {folder!r}, '--prompt', 'hello', '--temperature', '0', "
        "'--max-new-tokens', '24', '--device', 'cpu'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    prompt = tuple(encode_prompt(byte_tokenizer(), turns("hello")))
    (answer,) = engine.generate([Request(prompt, GREEDY.sampling(0))])[0]
    assert done.returncode == 0, done.stderr
    assert done.stdout == visible(answer.text) + "\n"
    assert "Loading" not in done.stderr and "INFO" not in done.stderr
