"""The command line. Each verb is a few lines over one library function, which is imported when the verb runs.

Exit codes: 0 done; 1 a crash (a traceback says where) or a diverged loss; 2 something the user wrote (one sentence says
what); 85 stopped by a signal after a checkpoint, run it again; 130 interrupted from the keyboard.
"""

from __future__ import annotations

from importlib import import_module

from mambalign.cli.app import app

__all__ = ["app", "main"]

# Each adds its verbs to `app`; --help shows them in this order.
for _module in (
    "first",
    "training",
    "cluster",
    "models",
    "talk",
    "evaluation",
    "answering",
    "judging",
    "reporting",
    "benching",
):
    import_module(f"mambalign.cli.{_module}")


def main() -> None:
    """Entry point of the `mambalign` command."""
    app()
