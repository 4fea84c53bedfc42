"""khugepaged as one process of a SimPy simulation: a workload maps memory, time decides the rest.

SimPy owns the time. The daemon says how long it wants to sleep, and sleeps by SimPy's clock; it is
woken early when the first process registers or a sleep knob is written.
"""

import math
from collections.abc import Generator

import simpy

from pykhuge import Advice, Machine

HPAGE_PMD_SIZE = 2 << 20

env = simpy.Environment()  # its unit is the millisecond
machine = Machine("1G")


def say(text: str) -> None:
    print(f"{env.now / 1000:6.1f} s  {text}")


def khugepaged() -> Generator[simpy.Event, object, None]:
    for millisecs in machine.khugepaged.delays():
        wakeup = env.event()
        machine.khugepaged.on_wakeup = lambda event=wakeup: event.triggered or event.succeed()
        yield wakeup if millisecs == math.inf else env.timeout(millisecs) | wakeup
        machine.khugepaged.on_wakeup = None
        machine.clock.advance_to(int(env.now * 1_000_000))


def workload(blocks: int, poisoned: int | None) -> Generator[simpy.Event, object, None]:
    process = machine.process(f"task{blocks}")
    addr = process.mmap(blocks * HPAGE_PMD_SIZE)
    process.write(addr, bytes(range(256)) * (blocks * HPAGE_PMD_SIZE // 256))
    if poisoned is not None:
        process.poison(addr + poisoned * HPAGE_PMD_SIZE)
    process.madvise(addr, blocks * HPAGE_PMD_SIZE, Advice.MADV_HUGEPAGE)
    say(f"{process.task.comm} has written {blocks} blocks")
    while True:
        huge = sum(process.is_huge(addr + n * HPAGE_PMD_SIZE) for n in range(blocks))
        if huge == blocks - (poisoned is not None):
            break
        yield env.timeout(500)
    say(f"{process.task.comm} has {huge} huge pages")


def arrivals() -> Generator[simpy.Event, object, None]:
    yield env.timeout(3_000)
    env.process(workload(4, poisoned=2))
    yield env.timeout(4_000)
    env.process(workload(12, poisoned=None))
    yield env.timeout(20_000)
    machine.sysfs["khugepaged/scan_sleep_millisecs"] = "1000\n"
    say("scan_sleep_millisecs is 1000 now")


env.process(khugepaged())
env.process(arrivals())
env.run(until=40_000)

settings = machine.khugepaged_settings
say(f"{settings.pages_collapsed} collapsed in {settings.full_scans} full scans")
failures = sum("copy_poisoned_page" in str(r) and "scan_pmd" in str(r) for r in machine.trace)
say(f"the block with the bad line was tried {failures} times")
machine.audit()
