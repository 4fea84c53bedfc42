"""A user's calls, type-checked and never run."""

from __future__ import annotations

import mmap
import os

import numpy as np

import pykhuge
from pykhuge import Advice, CollapseError, File, Machine, MachineCheck, Process, ScanResult

to, source = mmap.mmap(-1, 4096), bytes(4096)
not_copied: int = pykhuge.copy_mc_highpage(to, source, bad_lines=1)
not_copied = pykhuge.copy_mc_user_highpage(to, source, 0x7F0000000000, None)
not_copied = pykhuge.copy_mc(bytearray(100), b"x" * 100, bad_lines=np.zeros(1, np.uint64))
stopped: MachineCheck | None = pykhuge.copy_mc_huge_page(to, source, [0, -1])
last: MachineCheck | None = pykhuge.machine_check()

machine = Machine("1G", nodes=2, swap="64M", cpus=2, seed=1)
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
machine.audit()
