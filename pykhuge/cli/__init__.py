"""The command `pykhuge`: one file here for each subcommand; rich is imported nowhere else.

Exit status of every command: 2 and one line on stderr when it could not be done, 130 when it was
interrupted, 141 when its reader went away (as a shell reports SIGPIPE); else as its help says.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

from pykhuge.cli import acceptance, collapse, conform
from pykhuge.cli.errors import CommandError, printable

__all__ = ["main"]

EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + 2
EXIT_BROKEN_PIPE = 128 + 13


class _Parser(argparse.ArgumentParser):
    """argparse, but a usage error is one line without the usage in front."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (try {self.prog} --help)")


class _Version(argparse.Action):
    """--version; the package's metadata is read only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        try:
            version = metadata.version("pykhuge")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"pykhuge {version}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pykhuge",
        description="Linux's khugepaged and its machine-check safe page copy, as a model.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    collapse.add_parser(commands)
    acceptance.add_parser(commands)
    conform.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (sys.argv if None); returns the exit status."""
    try:
        status = _run(argv)
        # What is still buffered may fail to be written; better here than at the interpreter's end.
        sys.stdout.flush()
        return status
    except CommandError as error:
        return _fail(f"pykhuge: {printable(error)}", EXIT_USAGE)
    except KeyboardInterrupt:
        return _fail("pykhuge: interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_BROKEN_PIPE
    except OSError as error:
        # Files of the user's are opened elsewhere: only the output is left.
        _discard_stdout()
        return _fail(f"pykhuge: the output cannot be written: {error.strerror}", EXIT_USAGE)


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as leaving:  # --help and --version
        return int(leaving.code or 0)
    status: int = arguments.run(arguments)
    return status


def _fail(line: str, status: int) -> int:
    print(line, file=sys.stderr)
    return status


def _discard_stdout() -> None:
    """Let the interpreter's last flush go nowhere: the reader is gone, or the disk is full."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
