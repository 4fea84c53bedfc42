"""`pykhuge conform`: the model against the running kernel."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import textwrap
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from pykhuge.cli.errors import CommandError, import_rich
from pykhuge.kernel.version import KernelVersion
from pykhuge.tools.conform import (
    LIMITS,
    MEMORIES,
    NOT_REACHABLE,
    SPELLED,
    STROKES,
    WORDS,
    Comparison,
    Lacking,
    Layout,
    Report,
    conform,
    draw,
    host_version,
    kernel_version,
    parse,
    running_kernel,
)

__all__ = ["add_parser"]

SCHEMA = 1
DEFAULT_LAYOUTS = 1000
MOST = 10_000_000
DESCRIPTION = """\
Build random layouts of memory twice, in a process of the running kernel and in the model, have
both collapsed by MADV_COLLAPSE or by khugepaged, and compare what can be seen: errnos, the
huge_memory trace events of the processes field by field, pagemap, smaps, counters, all bytes.
Needs root, tracefs and zram. What it turns it puts back, also when it is killed.
"""
EPILOG = """\
exit status:
  0    nothing differs
  1    something does, or a layout broke one of the two
  2    the command could not be done: usage, rights, what this kernel has not

With --json an object is printed. Its keys:
  schema, release, model, layouts, left_out, kernel_asked_again, mismatches, smallest, scan_results,
  kinds, strokes, not_reachable
"""


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "conform",
        help="hold the model against the running kernel",
        description=DESCRIPTION,
        epilog=EPILOG + _language(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--layouts",
        metavar="N",
        default=str(DEFAULT_LAYOUTS),
        help=f"how many random layouts ({DEFAULT_LAYOUTS})",
    )
    what.add_argument("--layout", metavar="TEXT", help="this one, in its text form")
    parser.add_argument("--seed", metavar="S", default="0", help="of the random layouts (0)")
    parser.add_argument(
        "--without",
        metavar="SWITCH",
        help="take one of the kernel's differences away from the model: the run is to notice",
    )
    parser.add_argument(
        "--allow-sysfs",
        action="store_true",
        help="let it turn the knobs of transparent_hugepage, which is needed",
    )
    parser.add_argument("--json", action="store_true", help="print the same for programs")
    parser.set_defaults(run=run)


def _language() -> str:
    """What --layout takes."""
    memories = [f"  {name:<12} {what}" for name, what in MEMORIES.items()]
    numbers = [f"{name}=0..{most}" for name, most in LIMITS.items()]
    words = [f"  {name}={'|'.join(allowed)}" for name, allowed in WORDS.items()]
    strokes = []
    for form, spelled in SPELLED.items():
        names = [name for name, has in STROKES.items() if has == form]
        strokes.append(
            textwrap.fill(
                ", ".join(names),
                99,
                break_on_hyphens=False,
                initial_indent=f"  {spelled or 'alone'}: ",
                subsequent_indent="    ",
            )
        )
    return "\n".join(
        [
            "\na layout is MEMORY [NAME=VALUE ...]: STROKE; STROKE; ...",
            "  anon blocks=2 via=khugepaged none=200: write 0+512; fork; child.write 3+1",
            "memory:",
            *memories,
            "names, of which numbers are pages but for blocks of 512 of them:",
            textwrap.fill(", ".join(numbers), 99, initial_indent="  ", subsequent_indent="  "),
            *words,
            "strokes, pages counted from the block in which the mapping starts:",
            *strokes,
        ]
    )


def run(options: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status. Raises: CommandError."""
    nr = _number("--layouts", options.layouts, 1)
    seed = _number("--seed", options.seed, 0)
    version = _version(options.without)
    layouts: Iterable[Layout] = draw(seed)
    if options.layout is not None:
        nr, layouts = 1, [_layout(options.layout)]
    try:
        with running_kernel(allow_sysfs=options.allow_sysfs) as host:
            reports = conform(layouts, host, version, most=nr)
            if not options.json:
                reports = import_rich("pykhuge.cli.conform_table", "the bar", "--json").watched(
                    reports, nr
                )
            report = deque(reports, 1).pop()
    except Lacking as error:
        raise CommandError(str(error)) from error
    if not report.layouts:
        raise CommandError(f"--layout {options.layout}: {', '.join(report.left_out)}")
    if options.json:
        print(json.dumps({"schema": SCHEMA} | report.as_json(), indent=2))
    else:
        print("\n".join(_lines(report)))
    return 1 if report.mismatches else 0


def _number(name: str, text: str, least: int) -> int:
    number = int(text) if re.fullmatch("[0-9]{1,20}", text) else -1
    if not least <= number <= MOST:
        raise CommandError(f"{name} {text}: allowed {least}..{MOST}")
    return number


def _layout(text: str) -> Layout:
    try:
        return parse(text)
    except ValueError as error:
        raise CommandError(f"--layout: {error}") from error


def _version(without: str | None) -> KernelVersion:
    version = host_version()
    if without is None:
        return version
    if without not in KernelVersion.switches():
        raise CommandError(f"--without {without}: allowed {', '.join(KernelVersion.switches())}")
    return version.flipped(without)


def _lines(report: Report) -> Iterator[str]:
    """The report as text: what differed, what was met, what cannot be."""
    for comparison in report.smallest:
        yield from _mismatch(comparison)
        yield ""
    yield f"Linux {report.release}, model {report.model.name}"
    if kernel_version(report.release) > KernelVersion.NEWEST:
        newest = ".".join(map(str, KernelVersion.NEWEST))
        yield f"what is later than Linux {newest} is not known to the model"
    yield f"{report.layouts} layouts, {len(report.mismatches)} mismatches"
    for why, nr in report.left_out.items():
        yield f"{nr} left out: {why}"
    if report.again:
        yield f"{report.again} agreed only when the kernel was asked again"
    yield from _counted("met", report.results)
    yield from _counted("layouts of", report.kinds)
    yield from _counted("layouts with", report.strokes)
    yield "not reachable here:"
    yield from (f"  {what}: {why}" for what, why in NOT_REACHABLE.items())


def _counted(title: str, counts: dict[str, int]) -> Iterator[str]:
    yield f"{title}:"
    for name, nr in sorted(counts.items(), key=lambda each: -each[1]):
        yield f"  {nr:>7}  {name}"


def _mismatch(comparison: Comparison) -> Iterator[str]:
    yield f"pykhuge conform --allow-sysfs --layout '{comparison.layout}'"
    if comparison.error:
        yield f"  {comparison.error}"
    if comparison.kernel is None or comparison.model is None:
        return
    kernel, model = comparison.kernel.as_json(), comparison.model.as_json()
    for name in comparison.differs:
        yield f"  {name}:"
        if name == "events":
            yield from _side_by_side(kernel[name], model[name])
        else:
            yield f"    kernel {kernel[name]}"
            yield f"    model  {model[name]}"


def _side_by_side(kernel: list[dict[str, str]], model: list[dict[str, str]]) -> Iterator[str]:
    """Event by event; `>` marks those that are not alike."""
    nothing: dict[str, str] = {}
    for one, other in itertools.zip_longest(kernel, model, fillvalue=nothing):
        mark = " " if one == other else ">"
        yield f"  {mark} kernel {_event(one)}"
        if one != other:
            yield f"  {mark} model  {_event(other)}"


def _event(event: dict[str, str]) -> str:
    return " ".join(f"{key}={text}" for key, text in event.items()) or "(none)"
