"""The daemon hosted by SimPy does what it does by the machine's own clock."""

import math
from collections.abc import Generator

import simpy
from collapse_kit import HPAGE, advised, fill

from pykhuge import Advice, Machine


def scene() -> Machine:
    """Three processes with blocks to collapse, one of them with a bad line."""
    machine = Machine("1G", seed=3)
    for number, blocks in enumerate((1, 5, 12)):
        process = machine.process(f"task{number}")
        addr = advised(process, blocks * HPAGE)
        for block in range(blocks):
            fill(process, addr + block * HPAGE, range(0, 512, 1 + number))
        process.madvise(addr, blocks * HPAGE, Advice.MADV_HUGEPAGE)
        process.poison(addr)
    machine.khugepaged_settings.scan_sleep_millisecs = 700
    return machine


def test_a_simulator_that_sleeps_the_delays_sees_the_trace_of_run() -> None:
    """The same events in the same order, at the same tenth of a second."""
    own, hosted = scene(), scene()
    own.khugepaged.run(until=10)
    env = simpy.Environment()

    def khugepaged() -> Generator[simpy.Event, object, None]:
        for millisecs in hosted.khugepaged.delays():
            assert millisecs != math.inf
            yield env.timeout(millisecs / 1000)
            hosted.clock.advance_to(int(env.now * 1e9))

    env.process(khugepaged())
    env.run(until=10)
    events = [
        [(round(record.now_ns / 1e8), record.pid, str(record.event.body())) for record in trace]
        for trace in (own.trace, hosted.trace)
    ]
    assert len(events[0]) > 100
    assert events[0] == events[1]
    own.audit()
    hosted.audit()
