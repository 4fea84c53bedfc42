"""RateLimit: log lines of one kind that come in bursts (lib/ratelimit.c)."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["RateLimit"]

DEFAULT_RATELIMIT_INTERVAL_NS = 5_000_000_000
DEFAULT_RATELIMIT_BURST = 10


class RateLimit:
    """struct ratelimit_state: `burst` lines in an interval, which begins with the first of them.

    function: which kernel function asks; the line that counts what was missed names it.
    """

    def __init__(
        self,
        function: str,
        interval_ns: int = DEFAULT_RATELIMIT_INTERVAL_NS,
        burst: int = DEFAULT_RATELIMIT_BURST,
    ) -> None:
        self.function = function
        self.interval_ns = interval_ns
        self.burst = burst
        self._begin_ns: int | None = None
        self._printed = self._missed = 0

    def allows(self, now_ns: int, printk: Callable[[str], None]) -> bool:
        """Whether the caller may log now; the first who asks in a new interval has it tell."""
        if self._begin_ns is None:
            self._begin_ns = now_ns
        if now_ns > self._begin_ns + self.interval_ns:
            if self._missed:
                printk(f"{self.function}: {self._missed} callbacks suppressed")
            self._begin_ns = now_ns
            self._printed = self._missed = 0
        allowed = self._printed < self.burst
        self._printed += allowed
        self._missed += not allowed
        return allowed
