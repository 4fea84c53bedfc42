"""The two ways a modelled host dies: a panic it has in common with the real one, and a bug."""

from __future__ import annotations

__all__ = ["KernelBug", "KernelPanic"]


class KernelPanic(Exception):
    """The modelled host died; it refuses further use.

    `reason` is the text behind "Kernel panic - not syncing: ".
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"Kernel panic - not syncing: {reason}")


class KernelBug(AssertionError):
    """The model contradicts itself: a BUG_ON, a lock misused, or an audit that does not add up.

    `findings` holds one line for each contradiction.
    """

    def __init__(self, *findings: str) -> None:
        self.findings = findings
        super().__init__("\n".join(findings))
