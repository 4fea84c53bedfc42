"""`pykhuge acceptance`: the scenarios of the kernel's own people, and what came out of each."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from pykhuge.cli.errors import CommandError, import_rich
from pykhuge.tools.acceptance import Scenario, Verdict, all_scenarios

__all__ = ["add_parser"]

SCHEMA = 1
DEFAULT_SEEDS = 1000
MAX_SEEDS = 1_000_000
DESCRIPTION = """\
Run the scenarios by which the kernel's own people accepted this work, each on a machine of its
own: the manual tests of the patch series with random poison, every combination of the kernel's
khugepaged selftest, its memory-failure selftest and userfaultfd's poison, and each of the 31 scan
results by each path that can come to it.
"""
EPILOG = """\
exit status:
  0    every scenario came out as expected
  1    one did not
  2    the command could not be done: usage, the output

With --json an object is printed. Its keys:
  schema, seeds, passed, failed
  scenarios   [{group, name, memory, context, expected, got, passed}]
"""
HEADINGS = ("scenario", "memory", "context", "expected", "got")


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "acceptance",
        help="run the scenarios by which the kernel's own people judge this work",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--filter",
        metavar="TEXT",
        default="",
        help="only scenarios that have TEXT in their group or in NAME[CONTEXT-MEMORY]",
    )
    parser.add_argument(
        "--seeds",
        metavar="N",
        default=str(DEFAULT_SEEDS),
        help=f"how many random placements of poison the series' tests try ({DEFAULT_SEEDS})",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the same for programs")
    form.add_argument("--markdown", action="store_true", help="print the table for a README")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status. Raises: CommandError."""
    seeds = _seeds(options.seeds)
    chosen = [each for each in all_scenarios(seeds) if options.filter in f"{each.group} {each.id}"]
    if not chosen:
        raise CommandError(f"--filter {options.filter}: allowed what a scenario's name has in it")
    if options.json:
        verdicts = [each.run() for each in chosen]
        print(json.dumps(_as_json(verdicts, seeds), indent=2))
    elif options.markdown:
        verdicts = [each.run() for each in chosen]
        print("\n".join(_markdown(verdicts)))
    else:
        table = import_rich("pykhuge.cli.acceptance_table", "the table", "--json or --markdown")
        verdicts = table.show(chosen)
    return 0 if all(each.passed for each in verdicts) else 1


def _seeds(text: str) -> int:
    seeds = int(text) if re.fullmatch("[0-9]{1,20}", text) else 0
    if not 1 <= seeds <= MAX_SEEDS:
        raise CommandError(f"--seeds {text}: allowed 1..{MAX_SEEDS}")
    return seeds


def _as_json(verdicts: list[Verdict], seeds: int) -> dict[str, Any]:
    passed = sum(each.passed for each in verdicts)
    return {
        "schema": SCHEMA,
        "seeds": seeds,
        "passed": passed,
        "failed": len(verdicts) - passed,
        "scenarios": [_row_json(each) for each in verdicts],
    }


def _row_json(verdict: Verdict) -> dict[str, Any]:
    scenario = verdict.scenario
    names = ("group", "name", "memory", "context", "expected")
    row: dict[str, Any] = {name: getattr(scenario, name) for name in names}
    return row | {"got": verdict.got, "passed": verdict.passed}


def _markdown(verdicts: list[Verdict]) -> Iterator[str]:
    """A table for each group. Scenarios that differ in memory or context alone share a row."""
    for number, (group, of_group) in enumerate(groupby(verdicts, lambda each: each.scenario.group)):
        yield "\n" * bool(number) + f"**{group}**\n"
        yield "| " + " | ".join(HEADINGS) + " |"
        yield "|---" * len(HEADINGS) + "|"
        for cells in _rows(of_group):
            yield "| " + " | ".join(cells) + " |"


def _rows(verdicts: Iterator[Verdict]) -> Iterator[tuple[str, ...]]:
    memory: dict[tuple[str, ...], list[str]] = {}
    for verdict in verdicts:
        each: Scenario = verdict.scenario
        got = verdict.got if verdict.passed else f"**{verdict.got}**"
        memory.setdefault((each.name, each.context, each.expected, got), []).append(each.memory)
    contexts: dict[tuple[str, ...], list[str]] = {}
    for (name, context, expected, got), kinds in memory.items():
        contexts.setdefault((name, ", ".join(kinds), expected, got), []).append(context)
    for (name, joined, expected, got), of_row in contexts.items():
        yield name, joined, ", ".join(of_row), expected, got
