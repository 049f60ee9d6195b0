"""A `CheckReport` as tables in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mambalign.check.run import CheckReport


def show(report: CheckReport, console: Console) -> None:
    """Print every section, then notes and findings, then the verdict."""
    for heading, values in report.sections.items():
        title = heading.replace("_", " ")
        table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
        table.add_column(style="dim", min_width=28)
        table.add_column()
        for name, value in values.items():
            table.add_row(name.replace("_", " "), escape(_text(value)))
        console.print(table)
        console.print()
    for note in report.notes:
        console.print(f"[dim]note[/]     {escape(note)}")
    for finding in report.findings:
        colour = "red" if finding.level == "error" else "yellow"
        console.print(f"[{colour}]{finding.level:<8}[/] [bold]{escape(finding.key)}[/]: {escape(finding.message)}")
    warnings = len(report.findings) - len(report.errors)
    if report.usable:
        tail = f" with {warnings} warning(s)" if warnings else ""
        console.print(f"[green]ok[/]       {escape(report.path)} can be run ({report.stage}){tail}")
    else:
        console.print(f"[red]not ok[/]   {escape(report.path)}: {len(report.errors)} error(s), {warnings} warning(s)")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) or value != int(value) else f"{int(value):,}"
