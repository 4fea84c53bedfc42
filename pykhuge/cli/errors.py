"""What a command says when it cannot do what it was asked."""

from __future__ import annotations

__all__ = ["CommandError", "printable"]


class CommandError(Exception):
    """The command line or a file it names is wrong: one line for the user, and exit status 2."""


def printable(text: object) -> str:
    """`text` fit for any terminal: file names may hold control characters and stray bytes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "replace").decode()
        for char in str(text)
    )
