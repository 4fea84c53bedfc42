"""A scenario of the acceptance: what is done to a machine of its own, and what must come out.

What comes out is a short text, and a scenario holds if it is the text expected. A scenario that
finds something else wrong on the way raises `Mismatch`. Every machine is audited at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Mismatch", "Scenario", "Verdict", "check"]


class Mismatch(Exception):
    """Something on the way to the result is not as it must be."""


def check(holds: bool, what: str) -> None:
    """Raises: Mismatch saying `what` is wrong, unless it holds."""
    if not holds:
        raise Mismatch(what)


@dataclass(frozen=True)
class Scenario:
    """One row of the table.

    group: "series", "kselftest", "memory failure" or "scan result".
    name: as the kernel's people call it. memory: anon, file, shmem or tmpfs.
    context: who collapses, khugepaged or madvise; elsewhere what brings the outcome about.
    play: does it on a machine of its own, and returns what came out. Raises: Mismatch.
    """

    group: str
    name: str
    memory: str
    context: str
    expected: str
    play: Callable[[], str]

    @property
    def id(self) -> str:
        """Its name for filters and tests."""
        return f"{self.name}[{self.context}-{self.memory}]"

    def run(self) -> Verdict:
        """Play it; whatever it raises is what came out."""
        try:
            got = self.play()
        except Exception as error:
            lines = str(error).splitlines() or [""]
            got = f"{type(error).__name__}: {lines[0]}"
        return Verdict(self, got)


class Verdict(NamedTuple):
    """What came out of a scenario."""

    scenario: Scenario
    got: str

    @property
    def passed(self) -> bool:
        """Whether it is what was expected."""
        return self.got == self.scenario.expected
