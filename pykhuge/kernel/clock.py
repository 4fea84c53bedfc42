"""Virtual time: nothing here reads the host's clock, so equal calls give equal traces."""

from __future__ import annotations

__all__ = ["Clock"]

NSEC_PER_USEC = 1_000


class Clock:
    """Nanoseconds since boot. Every trace event and log line moves it on by one microsecond."""

    def __init__(self) -> None:
        self.now_ns = 0

    def tick(self) -> int:
        """Return the time, and let one microsecond pass."""
        now = self.now_ns
        self.now_ns += NSEC_PER_USEC
        return now

    def advance_to(self, now_ns: int) -> None:
        """Let time pass until `now_ns`; a time that has passed changes nothing."""
        self.now_ns = max(self.now_ns, now_ns)

    def sleep(self, nsec: int) -> None:
        """Let `nsec` nanoseconds pass.

        Raises: ValueError for a negative time.
        """
        if nsec < 0:
            raise ValueError(f"nsec={nsec}: allowed 0 and more")
        self.now_ns += nsec
