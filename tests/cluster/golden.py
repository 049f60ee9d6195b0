"""Texts compared with files. After a change that is meant, delete the file, run the test twice, and read it."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("golden")


def check_golden(name: str, files: dict[str, str]) -> None:
    """`files` is golden/NAME.txt, one under the other; recipes are left out, they are not ours to render."""
    text = "".join(f"# ---- {file}\n{content}\n" for file, content in files.items() if not file.endswith(".yaml"))
    path = FOLDER / f"{name}.txt"
    if not path.exists():
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text)
        raise AssertionError(f"{path.name} was not there and has been written: read it, and run the test again")
    assert text == path.read_text(), f"{path.name} differs; delete it to have it written anew, if that is meant"
