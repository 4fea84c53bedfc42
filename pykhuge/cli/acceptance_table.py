"""How `pykhuge acceptance` looks: a table for each group, a row for each scenario."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from pykhuge.tools.acceptance import Scenario, Verdict

__all__ = ["show"]

HEADINGS = ("scenario", "memory", "context", "expected", "got")
# Where there is no terminal there are no edges: rows are not folded.
PIPE_WIDTH = 200


def show(scenarios: list[Scenario]) -> list[Verdict]:
    """Run the scenarios, with a bar on a terminal's standard error, and print their tables."""
    verdicts = [scenario.run() for scenario in _watched(scenarios)]
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    for group, of_group in groupby(verdicts, key=lambda each: each.scenario.group):
        console.print(_table(group, of_group))
    failed = sum(not each.passed for each in verdicts)
    if failed:
        console.print(
            Text(f"{failed} of {len(verdicts)} did not come out as expected", style="bold red")
        )
    else:
        console.print(Text(f"all {len(verdicts)} came out as expected", style="green"))
    return verdicts


def _watched(scenarios: list[Scenario]) -> Iterator[Scenario]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    wanted = console.is_terminal
    with ProgressBar(*columns, console=console, transient=True, disable=not wanted) as bar:
        task = bar.add_task("", total=len(scenarios))
        for scenario in scenarios:
            bar.update(task, description=scenario.id)
            yield scenario
            bar.advance(task)


def _table(group: str, verdicts: Iterable[Verdict]) -> Table:
    table = Table(title=group, title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading)
    for verdict in verdicts:
        each = verdict.scenario
        style = "green" if verdict.passed else "bold white on red"
        got = Text(verdict.got, style=style)
        table.add_row(each.name, each.memory, each.context, each.expected, got)
    return table
