"""A user's calls, type-checked and never run."""

from __future__ import annotations

import mmap
import os

import numpy as np
import numpy.typing as npt

import pykhuge
from pykhuge import (
    Advice,
    CollapseError,
    File,
    KernelVersion,
    Machine,
    MachineCheck,
    Process,
    ScanResult,
    Signal,
)

to, source = mmap.mmap(-1, 4096), bytes(4096)
not_copied: int = pykhuge.copy_mc_highpage(to, source, bad_lines=1)
not_copied = pykhuge.copy_mc_user_highpage(to, source, 0x7F0000000000, None)
not_copied = pykhuge.copy_mc(bytearray(100), b"x" * 100, bad_lines=np.zeros(1, np.uint64))
stopped: MachineCheck | None = pykhuge.copy_mc_huge_page(to, source, [0, -1])
last: MachineCheck | None = pykhuge.machine_check()

machine = Machine("1G", nodes=2, swap="64M", cpus=2, kernel=KernelVersion.V6_18, seed=1)
process: Process = machine.process("app", memcg=machine.memcg("64M"))
addr: int = process.mmap(2 << 20)
process.write(addr, b"data")
data: bytes = process.read(addr, 4)
file: File = process.open("name", os.O_RDWR | os.O_CREAT, tmpfs=machine.tmpfs("4M"))
written: int = process.pwrite(file, 0, data)
addr = process.mmap(2 << 20, file=process.memfd_create("memory"), shared=True)
process.fallocate(file, 0, 4096, punch_hole=True)
child: Process = process.fork()
try:
    process.madvise(addr, 2 << 20, Advice.MADV_COLLAPSE)
except CollapseError as error:
    result: ScanResult = error.scan_result
result = machine.collapse(process, addr)
task = machine.spawn(machine.collapse.steps(process, addr, is_khugepaged=False), "khugepaged")
task.run_until("copied")
counters: dict[str, int] = machine.vmstat()
with machine.ledger() as ledger:
    process.munmap(addr, 2 << 20)
balance: dict[tuple[str, str], int] = ledger.balance()
millisecs: float = machine.khugepaged.step()
came: bool = machine.khugepaged.run(until=60) and machine.khugepaged.run(lambda: True)
for millisecs in machine.khugepaged.delays():
    machine.clock.advance_to(int(millisecs * 1_000_000))
machine.khugepaged_settings.pages_to_scan = 512
machine.sysfs["khugepaged/max_ptes_none"] = "256\n"
text: str = machine.sysfs["enabled"]
process.mce_kill = "early"
machine.memory_failure(7, injected=True)
machine.unpoison_memory(7)
machine.soft_offline_page(8)
signals: list[Signal] = process.signals
text = machine.procfs["meminfo"]
sizes: dict[str, int] = machine.procfs.smaps(process)[0].fields
words: npt.NDArray[np.uint64] = machine.procfs.pagemap(process, addr, 2 << 20)
words = machine.procfs.kpageflags(0, 512)
machine.audit()
