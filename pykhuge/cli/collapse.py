"""`pykhuge collapse FILE`: its arguments, what is allowed for them, and its exit status."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import stat
from pathlib import Path
from types import ModuleType
from typing import Any

from pykhuge.cli.errors import CommandError, import_rich
from pykhuge.cli.experiment import Experiment, FileBecameShorter
from pykhuge.cli.kinds import KINDS
from pykhuge.cli.report import BadLine, Report
from pykhuge.hw.poison import LINES_PER_PAGE

__all__ = ["add_parser"]

ALLOWED_FILE = "allowed is a regular file that is not empty"
DESCRIPTION = """\
Load a file into the memory of a modelled process, let cache lines of it go bad, have khugepaged
collapse it, and read every byte back.

The file fills ranges of 2 MiB; behind its end the last range is a hole. Memory use does not grow
with the file. Nothing is ever written to the file.
"""
EPILOG = """\
exit status:
  0    all is consistent; a collapse that was rolled back is
  1    the audit, or a byte, does not hold
  2    the command could not be done: usage, the file, the output
  3    the modelled host panicked, as the kernel before the series must on poison

With --json an object is printed. Its keys:
  schema, file, size, kind, pages, seed, exit_status, consistent
  panic               null, or the panic's text
  poisoned            [{page, line}]
  ranges              [{range, addr, result, status, errno, errno_name, map, poisoned,
                        machine_check, trace, log}]
                      result: enum scan_result, null after a panic; status: its trace text;
                      errno: what MADV_COLLAPSE would fail with; map: 512 characters of legend
  legend              {character: meaning}
  ranges_not_reached  how many the panic came before
  trace_overrun       older trace events overwritten, as in the kernel's ring
  counters            {name: {before, after}}, summed over the ranges
  audit               what the audit found, a text each; empty is good
  bytes               {verified, unreadable, wrong}; unreadable ones are on poisoned lines
  bytes_findings      where bytes are wrong
  audit_holds, bytes_hold
                      true, false, or null where a dead host cannot be looked at
"""


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "collapse",
        help="load a file, poison it, let it collapse, see what happened",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="any regular file that is not empty")
    parser.add_argument(
        "--poison",
        metavar="PAGE[:LINE]",
        action="append",
        default=[],
        help="poison a cache line: 4 KiB page PAGE of the file, from 0, and line LINE of it, 0..63"
        " (0 if not given); may be repeated",
    )
    parser.add_argument(
        "--poison-random", metavar="N", help="poison N more lines, drawn from all of the file"
    )
    parser.add_argument(
        "--seed", metavar="S", help="draw them by this seed, 0 and more (0 if not given)"
    )
    parser.add_argument(
        "--kind",
        metavar="KIND",
        default="anon",
        help="the memory it is loaded into: anon, private anonymous memory (if not given); shmem, a"
        " memfd; file, the file itself, mapped to be read and executed, by way of the page cache,"
        " where a last range that is not full cannot be collapsed",
    )
    parser.add_argument(
        "--no-recovery",
        action="store_true",
        help="the kernel before the series: a machine check in the copy is a panic",
    )
    parser.add_argument(
        "--all", action="store_true", help="show every range, not only the first few of interest"
    )
    parser.add_argument("--json", action="store_true", help="print the same for programs")
    parser.add_argument("--svg", metavar="PATH", help="also save the picture")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status. Raises: CommandError."""
    report = _what_is_asked(options)
    if options.svg is not None:
        _check_svg(options.svg, options.file)
    render = None
    if not options.json or options.svg is not None:
        render = import_rich("pykhuge.cli.render", "the picture", "--json")
    _run_experiment(report, render)
    if options.svg is not None:
        assert render is not None
        _write(options.svg, render.svg(report, all_ranges=options.all))
    if options.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        assert render is not None
        render.show(report, all_ranges=options.all)
    return report.exit_status


def _what_is_asked(options: argparse.Namespace) -> Report:
    seed = 0
    if options.seed is not None:
        if options.poison_random is None:
            raise CommandError(f"--seed {options.seed}: allowed with --poison-random N")
        seed = _number("--seed", options.seed, 0, None)
    if options.kind not in KINDS:
        raise CommandError(f"--kind {options.kind}: allowed {', '.join(KINDS)}")
    size = _file_size(options.file)
    report = Report(options.file, size, options.kind, not options.no_recovery, seed)
    bad = {_bad_line(text, report.nr_pages) for text in options.poison}
    if options.poison_random is not None:
        free = report.nr_pages * LINES_PER_PAGE - len(bad)
        if not free:
            raise CommandError("--poison-random: allowed where --poison leaves a line that is good")
        nr = _number("--poison-random", options.poison_random, 1, free)
        bad |= _random_lines(nr, report.nr_pages, sorted(bad), random.Random(seed))
    report.poisoned = sorted(bad)
    return report


def _bad_line(text: str, nr_pages: int) -> BadLine:
    page, colon, line = text.partition(":")
    number = _number(f"--poison {text}: page", page, 0, nr_pages - 1)
    where = f"--poison {text}: line"
    return BadLine(number, _number(where, line, 0, LINES_PER_PAGE - 1) if colon else 0)


def _random_lines(nr: int, nr_pages: int, taken: list[BadLine], rng: random.Random) -> set[BadLine]:
    """`nr` lines of the file that are not in `taken`, which is sorted."""
    lines = set()
    for place in rng.sample(range(nr_pages * LINES_PER_PAGE - len(taken)), nr):
        for page, line in taken:
            place += page * LINES_PER_PAGE + line <= place  # noqa: PLW2901  counted without `taken`
        lines.add(BadLine(*divmod(place, LINES_PER_PAGE)))
    return lines


def _number(name: str, text: str, low: int, high: int | None) -> int:
    allowed = f"{low} and more" if high is None else f"{low}..{high}"
    number = int(text) if re.fullmatch("[0-9]{1,20}", text) else -1
    if number < low or (high is not None and number > high):
        raise CommandError(f"{name} {text}: allowed {allowed}")
    return number


def _file_size(path: str) -> int:
    """Bytes in the file. Looked at before it is opened: to open a pipe is to wait."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise _cannot("read", path, error) from error
    if stat.S_ISDIR(status.st_mode):
        raise CommandError(f"{path}: is a directory; {ALLOWED_FILE}")
    if not stat.S_ISREG(status.st_mode):
        raise CommandError(f"{path}: is no regular file; {ALLOWED_FILE}")
    if status.st_size == 0:
        raise CommandError(f"{path}: is empty; {ALLOWED_FILE}")
    return status.st_size


def _check_svg(path: str, file: str) -> None:
    """Say before the work, not after it, that the picture cannot be written."""
    target = Path(path)
    if target.is_dir():
        raise CommandError(f"--svg {path}: is a directory; allowed is the path of a file")
    if target.exists() and target.samefile(file):
        raise CommandError(f"--svg {path}: is FILE itself; allowed is another path")
    if not target.parent.is_dir():
        raise CommandError(f"--svg {path}: No such file or directory: {target.parent}")


def _run_experiment(report: Report, render: ModuleType | None) -> None:
    try:
        with open(report.file, "rb", buffering=0) as file:
            experiment = Experiment(report)
            if render is None:
                experiment.run(file, _nobody_watches)
            else:
                with render.progress(report.size) as progress:
                    experiment.run(file, progress)
    except FileBecameShorter as error:
        raise CommandError(f"{report.file}: became shorter while it was read") from error
    except OSError as error:
        raise _cannot("read", report.file, error) from error
    except MemoryError as error:
        raise CommandError(f"{report.file}: {error}") from error


def _nobody_watches(_: int) -> None:
    """Progress nobody is shown."""


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise _cannot("write", path, error) from error


def _cannot(what: str, path: str, error: Exception) -> CommandError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return CommandError(f"{path}: cannot {what} it: {reason}")
