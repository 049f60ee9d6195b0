"""The layers of docs/architecture.md, enforced over the source: each package imports only what lies below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mambalign"
# Units on one line are neighbours: they may not import each other.
LAYERS = [
    {"support"},
    {"ops", "recipe", "cluster"},
    {"models", "data"},
    {"train", "generation"},
    {"evals"},
    {"bench", "check", "demo", "doctor"},
    {"cli"},
]
RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}
# What torch costs (seconds, and its absence on login nodes) these must not pay.
TORCH_FREE = ["mambalign", "mambalign.support", "mambalign.recipe", "mambalign.cli", "mambalign.cluster"]
HEAVY = ("torch", "transformers", "datasets", "accelerate", "matplotlib")


def unit_of(module: str) -> str:
    """`mambalign.ops.segments` -> `ops`; `mambalign` and `mambalign.__main__` -> the name that has no rank."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in the file, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package else -1]
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*parents, base] if base else parents)
            # `from mambalign import ops` names the unit in the imported names, not in the module.
            yield from ((node.lineno, f"{base}.{alias.name}" if base == "mambalign" else base) for alias in node.names)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    unit = unit_of(module)
    if unit not in RANK:  # the public face and __main__ may name anything
        return []
    found = []
    for line, imported in imports(ast.parse(source), module, is_package):
        if imported.split(".")[0] != "mambalign":
            continue
        other = unit_of(imported)
        if other in RANK and other != unit and RANK[other] >= RANK[unit]:
            found.append(f"{module}:{line} ({unit}) imports {imported} ({other})")
    return found


def sources() -> list[tuple[str, Path]]:
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        modules.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return modules


def test_imports_go_downward() -> None:
    found = [
        violation
        for module, path in sources()
        for violation in violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    ]
    assert not found, "imports that do not go downward:\n" + "\n".join(found)


def test_every_unit_has_a_layer() -> None:
    units = {unit_of(module) for module, _ in sources()} - {"", "__main__"}
    assert units <= set(RANK), f"give {sorted(units - set(RANK))} a layer here and in docs/architecture.md"


def test_no_file_outgrows_a_reader() -> None:
    long = {module: n for module, path in sources() if (n := len(path.read_text(encoding="utf-8").splitlines())) > 600}
    assert not long, f"split these files, none should have more than 600 lines: {long}"


@pytest.mark.parametrize(
    ("module", "source", "bad"),
    [
        ("mambalign.ops.scan", "from mambalign.train.run import run", True),
        ("mambalign.ops.scan", "def f():\n    from mambalign import train", True),
        ("mambalign.ops.scan", "from ..models.mamba import MambaForCausalLM", True),
        ("mambalign.models.mamba", "import mambalign.data.chat", True),  # neighbours
        ("mambalign.models.mamba", "from ..ops.segments import Segments\nfrom .checkpoint import load_model", False),
        ("mambalign.ops.scan", "from mambalign import __version__\nimport torch", False),
        ("mambalign.cli", "from .train.run import run", False),
    ],
)
def test_the_check_itself(module: str, source: str, bad: bool) -> None:
    assert bool(violations(source, module)) is bad


@pytest.mark.parametrize("module", [name for name in TORCH_FREE if name in dict(sources())])
def test_importing_stays_light(module: str) -> None:
    code = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"import {module} imports {done.stdout.strip()}"


def test_public_names_resolve_and_are_sorted() -> None:
    import mambalign

    assert list(mambalign.__all__) == sorted(mambalign.__all__)
    missing = []
    for name in mambalign.__all__:
        try:
            getattr(mambalign, name)
        except (ImportError, AttributeError) as error:
            missing.append(f"{name}: {error}")
    assert not missing, missing
