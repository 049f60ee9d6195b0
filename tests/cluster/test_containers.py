"""The container definitions: what a linter would say, and that both hold the same."""

from __future__ import annotations

import re
from pathlib import Path

CONTAINERS = Path(__file__).resolve().parents[2] / "containers"


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", (CONTAINERS / "Dockerfile").read_text(), flags=re.M))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def definition() -> dict[str, str]:
    """Section -> text of the Apptainer definition; the header is ''."""
    parts = re.split(r"^%(\w+)\n", (CONTAINERS / "mambalign.def").read_text(), flags=re.M)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_base_is_pinned_and_the_same() -> None:
    base = next(arguments for instruction, arguments in dockerfile() if instruction == "FROM")
    assert re.fullmatch(r"\S+:\d+\.\d+\.\d+\S*", base), "a tag that moves is another image tomorrow"
    assert f"From: {base}\n" in definition()[""]


def test_the_image_is_lean_and_does_not_run_as_root() -> None:
    lines = dockerfile()
    for script in [arguments for instruction, arguments in lines if instruction == "RUN"] + [definition()["post"]]:
        if "apt-get install" in script:
            assert "--no-install-recommends" in script and "rm -rf /var/lib/apt/lists/*" in script
            assert "apt-get update" in script, "update and install belong in one layer"
        assert "pip install" not in script or "--no-cache-dir" in script
        assert "sudo" not in script and "apt-get upgrade" not in script
    users = [arguments for instruction, arguments in lines if instruction == "USER"]
    assert users and users[-1] not in ("root", "0")
    assert not any(instruction == "ADD" for instruction, _ in lines), "COPY does no magic"
    order = [instruction for instruction, _ in lines]
    assert order.index("USER") > max(i for i, name in enumerate(order) if name == "RUN")
    assert eval(next(a for i, a in lines if i == "CMD")) == ["mambalign", "--help"], "CMD in its exec form"
    assert "set -eu" in definition()["post"]


def test_what_is_copied_exists_and_both_take_a_base_model() -> None:
    copied = [words for i, words in dockerfile() if i == "COPY"]
    sources = {word for words in copied for word in words.split()[:-1]}
    assert sources == {line.split()[0] for line in definition()["files"].splitlines() if line.strip()}
    assert all((CONTAINERS.parent / source).exists() for source in sources)
    for name in ("BASE_MODEL", "BASE_REVISION"):
        assert any(i == "ARG" and words.startswith(name) for i, words in dockerfile())
        assert name in definition()["arguments"] and f"{{{{ {name} }}}}" in definition()["post"]
    assert "hf download" in definition()["post"] and any("hf download" in words for _, words in dockerfile())


def test_they_install_what_the_package_needs() -> None:
    import tomllib

    project = tomllib.loads((CONTAINERS.parent / "pyproject.toml").read_text())["project"]
    for text in (definition()["post"], (CONTAINERS / "Dockerfile").read_text()):
        extras = re.search(r"/opt/mambalign\[([\w,]+)\]", text)
        assert extras and set(extras[1].split(",")) <= set(project["optional-dependencies"])
        assert "-c /opt/mambalign/constraints.txt" in text
