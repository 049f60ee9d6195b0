"""Checks of the documents: every link, every block, every command, every key and every quoted message.

    python docs/check.py               # all that needs no network: seconds, and the commands that are run
    python docs/check.py --external    # asks the addresses of other sites whether they are there

How a fenced block says what it is, by the title that stands over it on the site:

    ```bash title="CI runs this"            run here, page after page in the handbook's order, in one folder
    ```bash title="needs: a GPU, the hub"   not run; its commands are parsed all the same
    ```bash title="CI runs this: FILE"      run by that test or script, which must exist
    ```yaml title="sft.yaml"                a recipe or a pipeline, written to that file for the page's commands
    ```yaml title="in a recipe"             some of a recipe's keys; "in a pipeline", "in a profile" likewise
    ```yaml title="not ours: axolotl"       only parsed as YAML
    ```text title="message"                 what the program says; must be in the source, `...` stands for what varies
"""

from __future__ import annotations

import ast
import json
import logging
import re
import shlex
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent))
import hooks

ROOT = hooks.ROOT
CI = "CI runs this"
COMMANDS = ("bash", "make", "mambalign", "pip", "python", "sbatch", "torchrun", "condor_submit", "lm_eval", "vllm")
PROGRAMS = ("mambalign", "make", "pip")


@dataclass(frozen=True)
class Block:
    """A fenced block. page: repository path; line: of its fence."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        return self.title == CI

    @property
    def file(self) -> str | None:
        """The name under which the page's commands find it, if it is a file."""
        named = re.fullmatch(r"[\w./-]+\.\w+", self.title)
        return self.title if named and self.language not in ("bash", "python") else None


def pages() -> list[str]:
    """The handbook's pages in its order, then the other documents; repository paths."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    ordered = [str(hooks.repository_path(source)) for source in re.findall(r": (\S+\.md)$", nav, flags=re.M)]
    others = ["README.md", *(p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "recipes").rglob("*.md")))]
    left = [p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "docs").rglob("*.md"))]
    return list(dict.fromkeys([*ordered, *others, *left]))


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, text: str | None = None) -> list[Block]:
    """The fenced blocks of a page."""
    found = []
    lines = (read(page) if text is None else text).splitlines()
    at = 0
    while at < len(lines):
        fence = hooks._FENCE.match(lines[at])
        if fence:
            end = next((n for n in range(at + 1, len(lines)) if lines[n].strip() == fence["fence"]), len(lines))
            language, _, rest = fence["info"].strip().partition(" ")
            title = re.search(r'title="([^"]*)"', rest)
            inside = [line[len(fence["indent"]) :] for line in lines[at + 1 : end]]
            given = title[1] if title else ""
            found.append(Block(page, at + 1, language, given, "\n".join(inside) + "\n"))
            at = end
        at += 1
    return found


def all_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks(page)]


# -------------------------------------------------------------------------------------------------------------- links


def check_links() -> list[str]:
    """Every relative link leads to a file, every anchor to a heading, every address of another site has its form."""
    return [problem for page in pages() for problem in link_problems(page, read(page))]


def link_problems(page: str, text: str) -> Iterator[str]:
    here = PurePosixPath(page)
    for link in hooks.links(hooks.expand(text)):
        if link.external:
            parts = urlsplit(link.target)
            if parts.scheme not in ("http", "https", "mailto") or (
                parts.scheme != "mailto" and "." not in parts.netloc
            ):
                yield f"{page}: {link.target} is no address"
            continue
        target = hooks.target_of(here, link)
        if not (ROOT / target).exists():
            yield f"{page}: {link.target} leads nowhere"
        elif link.anchor and target.suffix == ".md" and link.anchor not in anchors(str(target)):
            yield f"{page}: {link.target}: {target} has no heading #{link.anchor}"


@cache
def anchors(page: str) -> frozenset[str]:
    """The anchors that a forge and the site agree on."""
    text = hooks.expand(read(page))
    shown = text  # headings may hold code, so code is not blanked out; fences are
    fenced = {
        number for block in blocks(page, text) for number in range(block.line, block.line + block.text.count("\n"))
    }
    found = set(re.findall(r'<a id="([^"]+)">', text))
    for number, line in enumerate(shown.splitlines(), start=1):
        heading = re.match(r"#{1,6} +(.+?) *$", line)
        if heading and number not in fenced:
            words = re.sub(r"[^\w\- ]", "", heading[1].lower())
            forge, site = words.replace(" ", "-"), re.sub(r"[-\s]+", "-", words.strip())
            found |= {forge} if forge == site else set()
    return frozenset(found)


def external_links() -> dict[str, list[str]]:
    """Address -> pages that link to it."""
    found: dict[str, list[str]] = {}
    for page in pages():
        for link in hooks.links(read(page)):
            if link.external:
                found.setdefault(link.target, []).append(page)
    return found


def ask_external() -> list[str]:
    """Which addresses of other sites do not answer. Needs a network."""
    problems = []
    for address, where in sorted(external_links().items()):
        if address.startswith("http"):
            try:
                request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "docs-check"})
                urllib.request.urlopen(request, timeout=20).close()
            except (OSError, ValueError) as error:
                problems.append(f"{', '.join(where)}: {address}: {error}")
    return problems


# ------------------------------------------------------------------------------------------------------------- blocks


def check_blocks() -> list[str]:
    """Every block says what it is, and is that."""
    return [problem for block in all_blocks() for problem in block_problems(block)]


def block_problems(block: Block) -> Iterator[str]:
    kind = {"bash": _bash, "yaml": _yaml, "json": _json, "jsonl": _json, "python": _python, "text": _text, "": _text}
    if block.language not in (*kind, "jinja"):
        yield f"{block.place}: a block of {block.language!r} is not known to the check"
    elif block.language in kind:
        for problem in kind[block.language](block):
            yield f"{block.place}: {problem}"


def _classified(block: Block) -> Iterator[str]:
    elsewhere = block.title.removeprefix(f"{CI}: ")
    if elsewhere != block.title:
        if not (ROOT / elsewhere).is_file():
            yield f"{elsewhere} does not exist"
    elif block.title != CI and not re.fullmatch(r"needs: .+", block.title):
        yield f'say title="{CI}" or title="needs: ..." behind ```{block.language}'


def _bash(block: Block) -> Iterator[str]:
    yield from _classified(block)
    if block.title == f"{CI}: .ci/run":
        for line in filter(None, (line.partition("#")[0].strip() for line in block.text.splitlines())):
            if line not in read(".ci/run"):
                yield f".ci/run does not run `{line}`"


def _text(block: Block) -> Iterator[str]:
    first = block.text.lstrip().partition("\n")[0].removeprefix("$ ")
    if re.sub(r"^(\w+=\S+ )+", "", first).split(" ")[0] in COMMANDS:
        yield "these are commands; write ```bash and a title"


def _json(block: Block) -> Iterator[str]:
    rows = block.text.splitlines() if block.language == "jsonl" else [block.text]
    for row in rows:
        try:
            json.loads(row)
        except ValueError as error:
            yield f"not JSON: {error}"


def _python(block: Block) -> Iterator[str]:
    yield from _classified(block)
    try:
        tree = ast.parse(block.text)
    except SyntaxError as error:
        yield f"not Python: {error}"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mambalign"):
            module = __import__(str(node.module), fromlist=["_"])
            yield from (f"{node.module} has no {n.name}" for n in node.names if not hasattr(module, n.name))


def _yaml(block: Block) -> Iterator[str]:
    from mambalign.recipe import UserError
    from mambalign.recipe.values import parse_yaml

    try:
        values = parse_yaml(block.text, "YAML")
        if block.title in ("in a recipe", "in a pipeline", "in a profile") or block.file:
            if not isinstance(values, dict):
                yield "not a map"
            elif block.title == "in a pipeline" or "stages" in values:
                yield from _pipeline_problems(block, values)
            elif block.title != "in a profile":
                yield from _recipe_problems(values, old=block.page.startswith("docs/coming-from/"))
            else:
                yield from _profile_problems(values)
        elif not block.title.startswith("not ours: "):
            yield 'say title="in a recipe", "in a pipeline", "in a profile", a file\'s name or "not ours: ..."'
    except UserError as error:
        yield str(error)


def _recipe_problems(values: dict[str, Any], old: bool) -> Iterator[str]:
    from mambalign.recipe import Recipe, key_types
    from mambalign.recipe.legacy import rename_keys
    from mambalign.recipe.values import coerce

    given = {key: value for key, value in values.items() if key != "extends"}
    renamed, notes = rename_keys(given, key_types())
    yield from (f"a key of old: {note}" for note in notes if not old)
    for key, value in renamed.items():
        coerce(key, value, key_types()[key])
    if {"model_name_or_path", "dataset_mixer", "output_dir"} <= set(renamed):
        Recipe.from_dict(renamed)


def _pipeline_problems(block: Block, values: dict[str, Any]) -> Iterator[str]:
    from mambalign.cli.cluster import load_pipeline

    whole = values if "stages" in values else {"stages": values}
    with tempfile.TemporaryDirectory() as folder, chdir(ROOT):
        file = Path(folder, "pipeline.yaml")
        file.write_text(json.dumps({"name": "example"} | whole), encoding="utf-8")
        try:
            load_pipeline(file)
        except ValueError as error:
            yield str(error)


def _profile_problems(values: dict[str, Any]) -> Iterator[str]:
    examples = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "recipes/clusters").glob("*.yaml"))
    yield from (f"no profile has the key {key}" for key in values if not re.search(rf"^#? ?{key}:", examples, re.M))


# ----------------------------------------------------------------------------------------------------------- commands


def check_commands() -> list[str]:
    """Every `mambalign` and `make` of every block, run or not, is understood: verb, options, recipe and its keys."""
    problems = []
    for page in pages():
        with tempfile.TemporaryDirectory() as folder:
            found = blocks(page)
            write_files(found, Path(folder))
            for block in found:
                for words in commands(block):
                    problems += [f"{block.place}: {shlex.join(words)}: {p}" for p in command_problems(words, folder)]
    return problems


def write_files(found: list[Block], folder: Path) -> None:
    """The files that a page shows, where its commands look for them."""
    for block in found:
        if block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text, encoding="utf-8")


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block that is one of `PROGRAMS`, whatever launches it."""
    for line in block.text.replace("\\\n", " ").splitlines() if block.language == "bash" else ():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if re.fullmatch(r"[|&;()<>]+", word):
                at = next((n for n, w in enumerate(words) if w in PROGRAMS and _starts(words[:n])), None)
                if at is not None:
                    yield words[at:]
                words = []
            else:
                words.append(word)


def _starts(before: list[str]) -> bool:
    """Whether what stands before a program only launches it."""
    return not before or before[-1] == "-m" or before[0] in ("srun", "nohup") or all("=" in word for word in before)


def command_problems(words: list[str], folder: str) -> list[str]:
    if words[0] == "make":
        verbs = re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.M)
        return [f"no verb {word}" for word in words[1:] if "=" not in word and word not in verbs]
    if words[0] == "pip":
        extras = [extra for word in words for part in re.findall(r"\[(.*?)\]", word) for extra in part.split(",")]
        known = read("pyproject.toml").partition("[project.optional-dependencies]")[2].partition("[project.")[0]
        return [f"no extra {extra}" for extra in extras if not re.search(rf"^{extra} = ", known, flags=re.M)]
    return _mambalign_problems(words[1:], folder)


@cache
def _program() -> Any:
    import typer.main

    from mambalign.cli import app

    return typer.main.get_command(app)


def _mambalign_problems(words: list[str], folder: str) -> list[str]:
    command = _program()
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return [f"no verb {words[0]}"]
        command, words = command.commands[words[0]], words[1:]
    if hasattr(command, "commands"):
        return [] if words in (["--help"], ["--version"]) else ["no verb"]
    context = command.context_class(command, info_name=command.name, **command.context_settings)
    if "--help" in words:
        return []
    try:
        command.parse_args(context, list(words))
    except Exception as error:  # typer has its own copies of click's exceptions
        return [getattr(error, "message", "") or str(error)]
    given, rest = context.params, list(context.args)
    try:
        with chdir(folder):
            for name in ("recipes", "benchmarks"):
                if not Path(name).exists():
                    Path(name).symlink_to(ROOT / name)
            return list(_argument_problems(command.name, given, rest))
    except ValueError as error:
        return [str(error)]


def _argument_problems(verb: str, given: dict[str, Any], rest: list[str]) -> Iterator[str]:
    """Of a command whose options are known: the recipes, pipelines and profiles it names, and the recipe's keys."""
    from mambalign.cli.cluster import load_pipeline
    from mambalign.recipe import STAGES, load_recipe

    if given.get("recipe") and given["recipe"] != "RECIPE" and not given["recipe"].startswith("demo-run/"):
        load_recipe(given["recipe"], rest, stage=verb if verb in STAGES else given.get("stage"))
    if given.get("pipeline"):
        load_pipeline(Path(given["pipeline"]))
    if given.get("profile") and not Path(given["profile"]).is_file():
        yield f"there is no profile {given['profile']}"
    if verb == "keys" and given.get("group"):
        from mambalign.recipe import key_groups

        if given["group"] not in key_groups():
            yield f"no group {given['group']}"


def check_inline() -> list[str]:
    """Every `mambalign VERB --option` and every recipe that stands in a sentence or a table is there."""
    return [problem for page in pages() for problem in inline_problems(page, read(page))]


def inline_problems(page: str, text: str) -> Iterator[str]:
    for block in blocks(page, text):
        text = text.replace(block.text, "\n")
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        if re.fullmatch(r"recipes/[\w./-]+", code) and not (ROOT / code).exists():
            yield f"{page}: `{code}` does not exist"
        words = code.split()
        if words[0] != "mambalign":
            continue
        command, rest = _program(), words[1:]
        while hasattr(command, "commands") and rest and re.fullmatch(r"[a-z][a-z-]*", rest[0]):
            if rest[0] not in command.commands:
                yield f"{page}: `{code}`: no verb {rest[0]}"
                break
            command, rest = command.commands[rest[0]], rest[1:]
        else:
            yield from (f"{page}: `{code}`: no option {word}" for word in rest if _unknown_option(command, word))


def _unknown_option(command: Any, word: str) -> bool:
    from mambalign.recipe import key_types

    name = word.partition("=")[0]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
    takes_keys = bool(command.context_settings.get("ignore_unknown_options"))
    key = name.removeprefix("--").partition(".")[0].replace("-", "_")
    return name.startswith("--") and name not in known and not (takes_keys and key in key_types())


# --------------------------------------------------------------------------------------------- keys, quoted messages


def check_messages() -> list[str]:
    """Every quoted message is one that the source can say: its fixed parts, in order, within one text of it."""
    problems = []
    for block in all_blocks():
        for message in block.text.strip().split("\n\n") if block.title == "message" else ():
            parts = [part.strip() for part in " ".join(message.split()).split("...") if part.strip()]
            if sum(map(len, parts)) < 20:
                problems.append(f"{block.place}: too little of it is fixed to tell it from others: {message!r}")
            elif not any(_in_order(parts, text) for text in source_texts()):
                problems.append(f"{block.place}: nothing in mambalign/ says {message!r}")
    return problems


def _in_order(parts: list[str], text: str) -> bool:
    at = 0
    for part in parts:
        found = text.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


@cache
def source_texts() -> tuple[str, ...]:
    """Every text literal of the package, what is filled in written as a NUL."""
    found = []
    for file in sorted((ROOT / "mambalign").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp):
                found.append(" ".join(_literal(node).split()))
    return tuple(text for text in found if len(text) > 10)


def _literal(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_literal(part) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_literal(node.left) or "\0") + (_literal(node.right) or "\0")
    return ""


def check_key_tables() -> list[str]:
    """The tables of docs/coming-from/: what becomes of each of their keys is what the program does with it."""
    problems = []
    for page in pages():
        if page.startswith("docs/coming-from/"):
            for theirs, how, here in key_rows(page):
                problems += [f"{page}: {key}: {p}" for key in theirs for p in _row_problems(key, how, here)]
    return problems


def key_rows(page: str) -> Iterator[tuple[list[str], str, list[str]]]:
    """(their keys, what becomes of them, our keys) of each row of the tables whose header is `theirs | how | here`."""
    inside = False
    for line in read(page).splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells[:3] == ["theirs", "how", "here"]:
            inside = True
        elif not cells:
            inside = False
        elif inside and not set(cells[0]) <= set("-: "):
            yield re.findall(r"`([^`]+)`", cells[0]), cells[1], re.findall(r"`([^`]+)`", cells[2])


def _row_problems(theirs: str, how: str, here: list[str]) -> Iterator[str]:
    from mambalign.recipe import UserError, key_types
    from mambalign.recipe.legacy import _IGNORED_ALWAYS, _IGNORED_VALUES, RENAMED

    keys, key = key_types(), theirs.partition(":")[0].partition(".")[0].strip()
    meant = RENAMED.get(key, key)
    ours = [name.partition(":")[0].partition(".")[0].strip() for name in here]
    yield from (f"`{name}` is no key here" for name in ours if re.fullmatch(r"[a-z]\w*", name) and name not in keys)
    wrong = {
        "same": key not in keys or (bool(ours) and key not in ours),
        "read as": RENAMED.get(key) not in ours,
        "ignored": meant in keys or meant not in {**_IGNORED_ALWAYS, **_IGNORED_VALUES, "dataset_kwargs": ""},
        "write": key in keys or key in RENAMED or not here,
        "refused": key in keys or bool(ours),
        "not needed": key in keys,
    }
    if how not in wrong:
        yield f"{how!r} is none of {', '.join(wrong)}"
    elif wrong[how]:
        yield f"not true that it is {how!r}"
    if how in ("refused", "not needed", "write"):
        from mambalign.recipe.legacy import rename_keys

        try:
            _, notes = rename_keys({key: "x"}, keys)
        except UserError:
            return
        yield f"{how!r}, but the program takes it: {notes}"


CHECKS: tuple[Callable[[], list[str]], ...] = (
    check_links,
    check_blocks,
    check_commands,
    check_inline,
    check_messages,
    check_key_tables,
)


def main() -> int:
    logging.getLogger("mambalign").setLevel(logging.ERROR)  # what recipes of other stacks are told
    problems = ask_external() if "--external" in sys.argv[1:] else [p for check in CHECKS for p in check()]
    if "--external" not in sys.argv[1:]:
        import sandbox

        if not problems:
            with sandbox.ready() as place:
                problems = sandbox.run_pages(*place)
    print("\n".join(problems) or "the documents are in order")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
