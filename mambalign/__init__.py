"""Aligns Mamba-family language models: packed SFT and prefix-shared DPO that are exactly right.

The names below are the public face. They are looked up on first use, so ``import mambalign`` is instant and
does not import torch (login nodes, ``mambalign --help``).

>>> import mambalign
>>> "load_recipe" in mambalign.__all__
True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambalign.models.checkpoint import load_model, load_tokenizer, save_model
    from mambalign.ops.segments import Segments
    from mambalign.recipe import Recipe, UserError, load_recipe
    from mambalign.train.run import run

__version__ = "0.1.0"

_HOME = {
    "Recipe": "mambalign.recipe",
    "Segments": "mambalign.ops.segments",
    "UserError": "mambalign.recipe",
    "load_model": "mambalign.models.checkpoint",
    "load_recipe": "mambalign.recipe",
    "load_tokenizer": "mambalign.models.checkpoint",
    "run": "mambalign.train.run",
    "save_model": "mambalign.models.checkpoint",
}

__all__ = ["Recipe", "Segments", "UserError", "load_model", "load_recipe", "load_tokenizer", "run", "save_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
