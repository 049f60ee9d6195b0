"""A conversation at the terminal: lines in, answers out as they come, commands that begin with a slash."""

from __future__ import annotations

import contextlib
import io
import re
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from types import FrameType
from typing import Any

from jinja2.exceptions import TemplateError
from rich.console import Console

from mambalign.generation.conversation import Conversation
from mambalign.generation.requests import FinishReason, Sampling
from mambalign.recipe import UserError, nearest
from mambalign.support import encodable

# What a terminal obeys (C0, DEL, C1), and what turns the direction of text around; newline and tab are text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")

HELP = """\
/save FILE      write the conversation and the model's state, to go on without reading it again
/load FILE      go on with a saved one
/reset          begin anew (the system prompt stays)
/system TEXT    set the system prompt and begin anew; without TEXT: remove it
/undo           take back the last question and its answer
/retry          ask the last question again
/settings       show how answers are sampled; /settings temperature=0.2 seed=1 changes it
/help           this
/quit           leave (Ctrl-D, too); Ctrl-C stops an answer
"""


@dataclass(frozen=True)
class Settings:
    """How answers are sampled. seed: None draws one for every answer."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 1024
    seed: int | None = None

    def sampling(self, attempt: int) -> Sampling:
        """attempt: 0 is the first answer to a question; another one gets another answer, also from a fixed seed."""
        values = asdict(self)
        seed = values.pop("seed")
        return Sampling(**values, seed=secrets.randbits(31) if seed is None else seed + attempt)

    def changed(self, words: list[str]) -> Settings:
        """With `key=value` words.

        Raises:
            UserError: an unknown key, or a value that is none for it.
        """
        found = self
        kinds = {item.name: type(item.default) for item in fields(self)}
        for word in words:
            key, _, value = word.partition("=")
            if key not in kinds:
                raise UserError(f"unknown setting {key!r}{nearest(key, kinds)}")
            kind: Any = float if kinds[key] is float else int
            try:
                new: dict[str, Any] = {key: None if (key, value) == ("seed", "none") else kind(value)}
                found = replace(found, **new)
            except ValueError:
                raise UserError(f"{key}: {value!r} is no {'number' if kind is float else 'whole number'}") from None
        found.sampling(0)
        return found


def visible(text: str) -> str:
    """Text that a terminal only shows: what it would obey is replaced by a sign for it.

    >>> visible("a\\x1b[31mb\\r\\n")
    'a␛[31mb␍\\n'
    """
    return _CONTROL.sub(lambda match: chr(0x2400 + ord(c)) if ord(c := match[0]) < 0x20 else "\ufffd", text)


class Terminal:
    """Reads lines and answers them. Answers go to standard output, all else to standard error."""

    def __init__(
        self, engine: Any, settings: Settings, console: Console, system: str | None = None, load: str | None = None
    ):
        self.engine, self.settings, self.console, self.system = engine, settings, console, system
        self.talk = Conversation.load(load, engine) if load else self._fresh()
        self.attempt = 0
        self.quit = False
        self._commands: dict[str, Callable[[str], None]] = {
            "save": self._save, "load": self._load, "reset": self._reset, "system": self._system, "undo": self._undo,
            "retry": self._retry, "settings": self._settings, "help": lambda _: self.note(HELP), "quit": self._quit,
        }  # fmt: skip

    def note(self, text: str) -> None:
        self.console.print(visible(text), style="dim", markup=False, highlight=False)

    def run(self) -> None:
        """Until the input ends or /quit."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # what Python makes of other bytes is no text
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (line editing and history for input())
            self.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        while not self.quit:
            try:
                line = input("> ") if sys.stdin.isatty() else next(sys.stdin, None)
            except KeyboardInterrupt:
                self.note("\n/quit or Ctrl-D leaves")
                continue
            except EOFError:
                print()
                return
            if line is None:
                return
            if line.strip():
                self.handle(line.rstrip("\r\n"))

    def handle(self, line: str) -> None:
        """One line: a command, or a question. A mistake is told, and the conversation goes on."""
        try:
            if line.startswith("/"):
                self._command(line)
            else:
                self.attempt = 0
                self.answer(line)
        except BrokenPipeError:  # nobody reads the answers any more
            raise
        except (UserError, OSError) as error:
            self.console.print(visible(str(error)), style="red", markup=False, highlight=False)

    def answer(self, question: str) -> None:
        """
        Raises:
            UserError: the chat template refuses the conversation, which is as it was then.
        """
        question = encodable(question)  # an argument may be no UTF-8
        reason: FinishReason | None = None
        before = len(self.talk.messages)
        answer: Any = self.talk.ask(self.engine, question, self.settings.sampling(self.attempt))
        try:
            with contextlib.closing(answer), _interruptions() as stopped:
                for delta in answer:
                    sys.stdout.write(visible(delta.text))
                    sys.stdout.flush()
                    reason = delta.finish_reason
                    if stopped():
                        break
        except TemplateError as error:
            message = " ".join(str(error).split())[:200]
            raise UserError(f"the chat template refuses this conversation: {message}") from error
        print(flush=True)
        if reason is None:
            kept = len(self.talk.messages) > before
            self.note("(stopped)" if kept else "(stopped before it began; the question is taken back)")
        elif reason == "length":
            self.note(f"(cut off at max_new_tokens={self.settings.max_new_tokens})")

    def _fresh(self) -> Conversation:
        return Conversation([] if self.system is None else [{"role": "system", "content": self.system}])

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].strip().partition(" ")
        if name not in self._commands:
            raise UserError(f"there is no /{name}{nearest(name, self._commands)}; /help lists the commands")
        self._commands[name](rest.strip())

    def _save(self, rest: str) -> None:
        self.talk.save(_file(rest, "save"))
        self.note(f"saved to {rest}")

    def _load(self, rest: str) -> None:
        self.talk = Conversation.load(_file(rest, "load"), self.engine)
        for message in self.talk.messages:
            self.note(f"{message['role']}: {message['content']}")

    def _reset(self, _: str) -> None:
        self.talk = self._fresh()
        self.note("a new conversation")

    def _system(self, rest: str) -> None:
        self.system = rest or None
        self._reset("")

    def _undo(self, _: str) -> None:
        self.note(f"taken back: {self._take_back()}")

    def _take_back(self) -> str:
        if [message["role"] for message in self.talk.messages[-2:]] != ["user", "assistant"]:
            raise UserError("nothing has been asked yet")
        question = self.talk.messages[-2]["content"]
        del self.talk.messages[-2:]
        return question

    def _retry(self, _: str) -> None:
        question = self._take_back()
        self.attempt += 1
        self.answer(question)

    def _settings(self, rest: str) -> None:
        if rest:
            self.settings = self.settings.changed(rest.split())
        self.note(" ".join(f"{key}={'none' if v is None else v}" for key, v in asdict(self.settings).items()))

    def _quit(self, _: str) -> None:
        self.quit = True


def _file(text: str, command: str) -> str:
    if not text:
        raise UserError(f"/{command} needs the name of a file")
    return text


@contextlib.contextmanager
def _interruptions() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag, which the function yielded reads: a step of the engine is never cut in two. The second one
    in a row interrupts after all."""
    asked = False

    def note(_: int, __: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
