"""/proc/pid/status and /proc/swaps."""

from __future__ import annotations

import re

from collapse_kit import MakeMachine

from pykhuge import Machine, Process
from pykhuge.process import PROT_EXEC, PROT_READ, PROT_WRITE

PAGE, BLOCK = 4096, 2 << 20


def values(text: str) -> dict[str, int]:
    """Numbers of lines such as "VmRSS:       8 kB"."""
    return {name: int(number) for name, number in re.findall(r"^(\w+):\s+(\d+)", text, re.M)}


def test_status_counts_what_is_mapped_and_what_is_there(machine: Machine, process: Process) -> None:
    """Sizes by permission, pages by kind, in kB."""
    addr = process.mmap(BLOCK)
    process.write(addr, b"x" * 3 * PAGE)
    process.mmap(4 * PAGE, prot=PROT_READ | PROT_EXEC)
    shared = process.mmap(8 * PAGE, shared=True, prot=PROT_READ | PROT_WRITE)
    process.write(shared, b"x")
    process.mlock(addr, PAGE)
    text = machine.procfs[f"{process.pid}/status"]
    shown = values(text)
    assert "\nVmRSS:\t      16 kB\n" in text
    assert (shown["RssAnon"], shown["RssFile"], shown["RssShmem"]) == (12, 0, 4)
    assert shown["VmSize"] == 2048 + 16 + 32
    assert (shown["VmData"], shown["VmLib"], shown["VmLck"]) == (2048, 16, 4)
    assert shown["VmPTE"] == process.mm.pgtables_bytes // 1024
    assert (shown["VmSwap"], shown["THP_enabled"]) == (0, 1)


def test_swaps_reads_as_the_kernels_file(make_machine: MakeMachine) -> None:
    """The header alone where there is no swap device."""
    header = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    assert make_machine().procfs["swaps"] == header
    line = make_machine(swap="16M").procfs["swaps"].removeprefix(header)
    assert re.fullmatch(r"/dev/zram0 {30}partition\t16380\t\t0\t\t-2\n", line)
