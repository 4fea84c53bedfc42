"""The trace ring buffer."""

from typing import NamedTuple

from pykhuge.kernel.clock import Clock
from pykhuge.kernel.trace import Trace


class Event(NamedTuple):
    number: int
    preempt_depth: int = 0

    @property
    def name(self) -> str:
        return "event"

    def body(self) -> str:
        return f"number={self.number}"


def test_full_buffer_drops_the_oldest_and_counts() -> None:
    """The newest `capacity` records stay; `overrun` says how many went."""
    trace = Trace(Clock(), capacity=3)
    for number in range(5):
        trace.emit("task", 1, 0, Event(number))
    assert [record.event for record in trace] == [Event(2), Event(3), Event(4)]
    assert len(trace) == 3
    assert trace.overrun == 2
    trace.clear()
    assert trace.text() == ""
    assert trace.overrun == 0


def test_columns_widen_as_in_the_kernel() -> None:
    """Comm is right-aligned to 16, pid left-aligned to 7, CPU three digits."""
    clock = Clock()
    clock.sleep(100_000_000_000)
    trace = Trace(clock)
    trace.emit("a", 1234567, 12, Event(1))
    trace.emit("sixteen-letters-", 5, 130, Event(2, preempt_depth=1))
    assert trace.text() == (
        "               a-1234567 [012] .....   100.000000: event: number=1\n"
        "sixteen-letters--5       [130] ...1.   100.000001: event: number=2\n"
    )
