"""The bar of `pykhuge conform`, on a terminal's standard error."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from pykhuge.tools.conform import Report

__all__ = ["watched"]


def watched(reports: Iterator[Report], nr: int) -> Iterator[Report]:
    """Pass the reports on, with a bar that shows how many of `nr` layouts they hold."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with ProgressBar(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=nr)
        for report in reports:
            mismatches = len(report.mismatches)
            bar.update(task, completed=report.layouts, description=f"{mismatches} mismatches")
            yield report
