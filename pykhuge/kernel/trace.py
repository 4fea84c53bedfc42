"""The trace ring buffer: events are kept as they are and turned to text when somebody reads.

A line reads as /sys/kernel/tracing/trace_pipe prints it:

      khugepaged-36      [000] .....     1.000002: mm_collapse_huge_page: mm=..., isolated=1, ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from pykhuge.kernel.clock import Clock

__all__ = ["Trace", "TraceEvent", "TraceRecord"]


class TraceEvent(Protocol):
    """One event: its fields, and the body the kernel's TP_printk makes of them."""

    @property
    def name(self) -> str:
        """The event's name in tracefs."""
        ...

    @property
    def preempt_depth(self) -> int:
        """How many spinlocks are held where it is told of (CONFIG_PREEMPT_COUNT)."""
        ...

    def body(self) -> str:
        """The text behind the name."""
        ...


class TraceRecord(NamedTuple):
    """An event with the common fields of a trace line."""

    now_ns: int
    comm: str
    pid: int
    cpu: int
    event: TraceEvent

    def __str__(self) -> str:
        seconds, nsec = divmod(self.now_ns, 1_000_000_000)
        # irqs-off, need-resched, hardirq/softirq, preempt-depth, migrate-disable
        latency = f"...{self.event.preempt_depth or '.'}."
        return (
            f"{self.comm:>16}-{self.pid:<7} [{self.cpu:03d}] {latency}"
            f" {seconds:5d}.{nsec // 1000:06d}: {self.event.name}: {self.event.body()}"
        )


class Trace:
    """The newest `capacity` records; older ones are overwritten and counted in `overrun`."""

    def __init__(self, clock: Clock, capacity: int = 1 << 16) -> None:
        self.clock = clock
        self.records: deque[TraceRecord] = deque(maxlen=capacity)
        self.overrun = 0

    def emit(self, comm: str, pid: int, cpu: int, event: TraceEvent) -> None:
        """Record `event` as met by the task `comm`-`pid` on `cpu`."""
        self.overrun += len(self.records) == self.records.maxlen
        self.records.append(TraceRecord(self.clock.tick(), comm, pid, cpu, event))

    def __iter__(self) -> Iterator[TraceRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def text(self) -> str:
        """All records as trace_pipe prints them, one line each."""
        return "".join(f"{record}\n" for record in self.records)

    def clear(self) -> None:
        """Forget all records, as writing to the `trace` file does."""
        self.records.clear()
        self.overrun = 0
