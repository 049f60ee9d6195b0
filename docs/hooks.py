"""What mkdocs does not do by itself: references made from the code, and what the pages link to outside docs/.

A page of docs/ may link to any file of the repository. Markdown becomes a page under `repository/`, a folder a page
that shows its files, any other file is copied; so the site is whole without a network, and links are a forge's, too.
"""

from __future__ import annotations

import html
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = PurePosixPath("docs")
OUTSIDE = "repository"
_LINKS = (
    re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(\s*<?(?P<target>[^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)"),
    re.compile(r"^ {0,3}\[[^\]]+\]:\s+<?(?P<target>[^\s>]+)", flags=re.M),
    re.compile(r"\b(?:href|src)=\"(?P<target>[^\"]+)\""),
)
_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>[^`\n]*)$")

sys.path.insert(0, str(ROOT))  # mkdocs runs anywhere; the references are those of this checkout


@dataclass(frozen=True)
class Link:
    """A link of a page: its target as written, and where in the text the target stands."""

    target: str
    start: int
    end: int

    @property
    def path(self) -> str:
        return self.target.partition("#")[0]

    @property
    def anchor(self) -> str:
        return self.target.partition("#")[2]

    @property
    def external(self) -> bool:
        return bool(re.match(r"[a-z][a-z0-9+.-]*:", self.target))


def prose(text: str) -> str:
    """The text with code, fenced and inline, and comments blanked out; every character stays where it was."""
    lines: list[str] = []
    closing = ""
    for line in text.splitlines(keepends=True):
        fence = _FENCE.match(line.rstrip("\n"))
        if closing:
            closing = "" if line.strip() == closing else closing
        elif fence:
            closing = fence["fence"]
        else:
            lines.append(line)
            continue
        lines.append(re.sub(r"[^\n]", " ", line))

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    whole = re.sub(r"<!--.*?-->", blank, "".join(lines), flags=re.S)
    return re.sub(r"(?<!`)(`+)(?!`)(?:(?!\n\n).)*?(?<!`)\1(?!`)", _blank_code, whole, flags=re.S)


def _blank_code(match: re.Match[str]) -> str:
    # The brackets of a link's own text stay: `[`key`](page.md)`.
    return re.sub(r"[^\n]", "x", match[0])


def links(text: str) -> list[Link]:
    """The links and images in a page's prose, in Markdown or HTML, and what its references are defined as."""
    shown = prose(text)
    found = [Link(m["target"], m.start("target"), m.end("target")) for kind in _LINKS for m in kind.finditer(shown)]
    return sorted(found, key=lambda link: link.start)


def target_of(page: PurePosixPath, link: Link) -> PurePosixPath:
    """The repository path that a relative link of `page` (a repository path too) leads to."""
    return PurePosixPath(os.path.normpath(page.parent / link.path)) if link.path else page


# -------------------------------------------------------------------------------------------- pages outside docs/


def repository_path(source: str) -> PurePosixPath:
    """The repository path of a page, from mkdocs' path of its source."""
    path = PurePosixPath(source)
    return path.relative_to(OUTSIDE) if path.parts[0] == OUTSIDE else DOCS / path


def site_source(path: PurePosixPath) -> str:
    """mkdocs' path of a file of the repository."""
    if path.is_relative_to(DOCS):
        return str(path.relative_to(DOCS))
    if (ROOT / path).is_dir():
        path = path / ("README.md" if (ROOT / path / "README.md").is_file() else "index.md")
    return str(OUTSIDE / path)


def outside_pages(nav: Iterable[str]) -> Iterator[tuple[str, str | Path]]:
    """(mkdocs' path, text or file) of everything outside docs/ that it or its `nav` leads to, however indirectly."""
    seen: set[PurePosixPath] = set()
    waiting = [DOCS / path.relative_to(ROOT / DOCS).as_posix() for path in sorted((ROOT / DOCS).rglob("*.md"))]
    waiting += [repository_path(source) for source in nav if source.startswith(OUTSIDE)]
    while waiting:
        path = repository_path(site_source(waiting.pop()))  # of a folder: its README
        file = ROOT / path
        if path in seen or not (file.exists() or (file.name == "index.md" and file.parent.is_dir())):
            continue
        seen.add(path)
        if not path.is_relative_to(DOCS):
            yield site_source(path), file if file.exists() else folder_page(path.parent)
        if file.suffix == ".md" and file.exists():
            found = links(file.read_text(encoding="utf-8"))
            waiting += [target_of(path, link) for link in found if not link.external and link.path]


def folder_page(folder: PurePosixPath) -> str:
    """A page that shows the files of a folder."""
    parts = [f"# {folder}\n"]
    for file in sorted((ROOT / folder).iterdir()):
        if file.is_file() and not file.name.startswith("."):
            language = {".yaml": "yaml", ".json": "json", ".py": "python"}.get(file.suffix, "text")
            parts.append(f"## {file.name}\n\n````{language}\n{file.read_text(encoding='utf-8').rstrip()}\n````\n")
    return "\n".join(parts)


# ----------------------------------------------------------------------------------------------- made from the code


def recipe_keys() -> str:
    """Every key of a recipe, a table a group."""
    from mambalign.recipe import key_default, key_groups, key_types, type_name
    from mambalign.recipe.schema import STAGE_DEFAULTS

    parts = []
    for group, items in key_groups().items():
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for item in items:
            default = json.dumps(key_default(item), ensure_ascii=False)
            stages = {stage: given[item.name] for stage, given in STAGE_DEFAULTS.items() if item.name in given}
            default = f"`{default}`" + "".join(f"; {s}: `{json.dumps(v)}`" for s, v in stages.items())
            kind = _cell(type_name(key_types()[item.name]))
            rows.append(
                f'| <a id="{item.name}"></a>`{item.name}` | {kind} | {default} | {_cell(item.metadata["help"])} |'
            )
        parts.append(f"## {group}\n\n" + "\n".join(rows))
    return "\n\n".join(parts)


def old_keys() -> str:
    """Keys of earlier recipes and what becomes of them."""
    from mambalign.recipe.legacy import _IGNORED_ALWAYS, _IGNORED_VALUES, RENAMED

    rows = ["| key | read as |", "|---|---|", *(f"| `{old}` | `{new}` |" for old, new in RENAMED.items())]
    ignored = ["| key | harmless values | why it means nothing here |", "|---|---|---|"]
    ignored += [f"| `{key}` | any | {_cell(why)} |" for key, why in _IGNORED_ALWAYS.items()]
    for key, (values, why) in _IGNORED_VALUES.items():
        ignored.append(f"| `{key}` | {', '.join(f'`{json.dumps(v)}`' for v in values)} | {_cell(why)} |")
    return "\n".join(rows) + "\n\n" + "\n".join(ignored)


def command_line() -> str:
    """Every verb with its help and options."""
    import typer.main

    from mambalign.cli import app

    return "\n\n".join(_commands(typer.main.get_command(app), "mambalign"))


def _commands(command: Any, name: str) -> Iterator[str]:
    if hasattr(command, "commands"):
        for inner in command.commands.values():
            yield from _commands(inner, f"{name} {inner.name}")
        return
    lines = [f"## {name}", _plain(command.help or "")]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not getattr(p, "hidden", False)]
    words = [str(p.metavar or p.name.upper()) for p in arguments]
    lines.append(f"```text\n{' '.join([name, *words, '[OPTIONS]'])}\n```")
    rows = []
    for option in options:
        flags = ", ".join(f"`{flag}`" for flag in option.opts)
        default = "" if option.default is None or option.is_flag or callable(option.default) else f"`{option.default}`"
        rows.append(f"| {flags} | {default} | {_cell(_plain(option.help or ''))} |")
    if rows:
        lines.append("\n".join(["| option | default | |", "|---|---|---|", *rows]))
    if command.epilog:
        lines.append(_plain(command.epilog))
    yield "\n\n".join(lines)


def _plain(text: str) -> str:
    """Help text without rich's marks; what it shows in bold is a command."""
    text = re.sub(r"\[bold\](.*?)\[/\]", r"`\1`", text)
    return re.sub(r"\[/?(?:bold|dim)?\]", "", text)


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("{", "&#123;").replace("\n", " ")


GENERATED: dict[str, Callable[[], str]] = {
    "recipe keys": recipe_keys,
    "old keys": old_keys,
    "command line": command_line,
}


def expand(text: str) -> str:
    """The text with every `<!-- generated: NAME -->` replaced by what it names."""
    return re.sub(r"<!-- generated: ([a-z ]+) -->", lambda match: GENERATED[match[1]](), text)


# ----------------------------------------------------------------------------------------------------- mkdocs' calls


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside docs/."""
    from mkdocs.structure.files import File, InclusionLevel

    nav = re.findall(r"[\w./-]+\.md", str(config.nav))
    for source, content in outside_pages(nav):
        given = {"abs_src_path": str(content)} if isinstance(content, Path) else {"content": content}
        file = File.generated(config, source, **given)
        file.inclusion = InclusionLevel.INCLUDED if source in nav else InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in the references, and turn the repository's links into the site's."""
    source = page.file.src_uri
    here = repository_path(source)
    markdown = expand(markdown)
    for link in reversed(links(markdown)):
        target = target_of(here, link)
        if not link.external and (not target.is_relative_to(DOCS) or not here.is_relative_to(DOCS)):
            path = os.path.relpath(site_source(target), PurePosixPath(source).parent)
            written = path + (f"#{link.anchor}" if link.anchor else "")
            markdown = markdown[: link.start] + written + markdown[link.end :]
    return markdown
