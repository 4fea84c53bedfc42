"""What a command says when it cannot do what it was asked."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["CommandError", "import_rich", "printable"]


class CommandError(Exception):
    """The command line or a file it names is wrong: one line for the user, and exit status 2."""


def printable(text: object) -> str:
    """`text` fit for any terminal: file names may hold control characters and stray bytes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "replace").decode()
        for char in str(text)
    )


def import_rich(module: str, what: str, instead: str) -> ModuleType:
    """The module of cli/ that draws `what`: rich is an extra, and `instead` works without it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        raise CommandError(
            f'{what} needs rich, which is not installed: pip install "pykhuge[cli]",'
            f" or use {instead}"
        ) from error
