"""What the scenarios of the kernel's khugepaged selftest are made of: settings, memory, contexts.

As in tools/testing/selftests/mm/khugepaged.c: an area of memory of one type at 1 GiB, filled with a
word in each page; a context that collapses it and looks, by smaps, whether it is huge.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SIZE
from pykhuge.khugepaged.scan_result import CollapseError
from pykhuge.machine import Machine
from pykhuge.mm.mm_types import File
from pykhuge.process import PROT_EXEC, PROT_READ, Advice, Process
from pykhuge.tools.acceptance.scenario import Mismatch, check

__all__ = [
    "AREAS",
    "BASE_ADDR",
    "CONTEXTS",
    "AnonArea",
    "Area",
    "Context",
    "Khugepaged",
    "Madvise",
    "Selftest",
    "pattern",
]

BASE_ADDR = 1 << 30
TICK_SECONDS = 0.5
POLLS = 6
SETTINGS = {
    "enabled": "madvise",
    "defrag": "always",
    "shmem_enabled": "advise",
    "use_zero_page": "0",
    "khugepaged/defrag": "1",
    "khugepaged/alloc_sleep_millisecs": "10",
    "khugepaged/scan_sleep_millisecs": "10",
    "khugepaged/max_ptes_none": str(HPAGE_PMD_NR - 1),
    "khugepaged/max_ptes_swap": str(HPAGE_PMD_NR // 8),
    "khugepaged/max_ptes_shared": str(HPAGE_PMD_NR // 2),
    "khugepaged/pages_to_scan": str(HPAGE_PMD_NR * 8),
}


def pattern(first: int, end: int) -> bytes:
    """Pages [first, end) of an area: page i begins with the 32-bit word i + 0xdead0000."""
    pages = np.zeros((end - first, PAGE_SIZE // 4), np.uint32)
    pages[:, 0] = np.arange(first, end, dtype=np.uint32) + np.uint32(0xDEAD0000)
    return pages.tobytes()


class Selftest:
    """A machine with the selftest's settings, and the process that runs it.

    Use it in a `with` statement: its files go at the end, and the machine is audited.
    """

    def __init__(self, memory: str = "1G") -> None:
        self.machine = Machine(memory, swap="16M")
        self.process = self.machine.process("khugepaged-test")
        # The page cache is to hold what was touched, and nothing that was read ahead.
        self.machine.mem.ra_pages = 0
        self.settings: dict[str, str] = {}
        self._write(SETTINGS)
        self._closing = ExitStack()

    def __enter__(self) -> Selftest:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._closing.close()
        if kind is None:
            self.machine.audit()

    def _write(self, settings: dict[str, str]) -> None:
        self.settings = self.settings | settings
        for name, text in self.settings.items():
            self.machine.sysfs[name] = f"{text}\n"

    @contextmanager
    def pushed(self, **changes: str) -> Iterator[None]:
        """Settings changed meanwhile; a name stands for the file of that name, of either folder."""
        before = self.settings
        folder = {name.rpartition("/")[2]: name for name in reversed(SETTINGS)}
        self._write({folder[name]: text for name, text in changes.items()})
        yield
        self._write(before)

    def full_scans(self) -> int:
        """khugepaged/full_scans."""
        return int(self.machine.sysfs["khugepaged/full_scans"])

    def temporary_directory(self) -> str:
        """A folder of the host, removed at the end."""
        return self._closing.enter_context(tempfile.TemporaryDirectory(prefix="pykhuge-"))

    def kilobytes(self, process: Process, addr: int, name: str) -> int:
        """A field of smaps, of the mapping that begins at `addr`."""
        entries = self.machine.procfs.smaps(process)
        found = next((each for each in entries if each.start == addr), None)
        if found is None:
            raise Mismatch(f"no mapping begins at {addr:#x}")
        return found.fields[name]


class Area:
    """Memory of one type: struct mem_ops of the selftest. `huge_field` is of smaps.

    process: who touches it and looks at it; after a fork, the child.
    """

    name = ""
    huge_field = "AnonHugePages"

    def __init__(self, selftest: Selftest) -> None:
        self.selftest = selftest
        self.process = selftest.process

    def setup(self, nr_hpages: int) -> int:
        """Map room for so many blocks; returns the address."""
        raise NotImplementedError

    def fault(self, addr: int, first: int, end: int) -> None:
        """Touch pages [first, end), with the pattern."""
        self.process.write(addr + first * PAGE_SIZE, pattern(first, end))

    def check_huge(self, addr: int, nr_hpages: int) -> bool:
        """Whether smaps shows exactly so many huge pages in the mapping that begins at `addr`."""
        kilobytes = self.selftest.kilobytes(self.process, addr, self.huge_field)
        return kilobytes == nr_hpages * HPAGE_PMD_SIZE >> 10

    def check_swap(self, addr: int, nr: int) -> None:
        """Raises: Mismatch unless so many pages of the mapping are on swap."""
        kilobytes = self.selftest.kilobytes(self.process, addr, "Swap")
        check(kilobytes == nr * PAGE_SIZE >> 10, f"{nr} pages on swap: smaps has {kilobytes} kB")

    def head(self, addr: int) -> int | None:
        """The first frame of the compound page that is mapped at `addr`."""
        pfn = self.process.pfn(addr)
        return None if pfn is None else self.process.mem.pages.head_of(pfn)

    def validate(self, addr: int, nr: int) -> None:
        """Raises: Mismatch unless the first `nr` pages hold the pattern."""
        holds = self.process.read(addr, nr * PAGE_SIZE) == pattern(0, nr)
        check(holds, f"content of {nr} pages at {addr:#x}")

    def cleanup(self, addr: int, nr_hpages: int) -> None:
        """Unmap it."""
        self.process.munmap(addr, nr_hpages * HPAGE_PMD_SIZE)

    @contextmanager
    def child(self) -> Iterator[None]:
        """A child of the process takes its place meanwhile, and exits."""
        parent, self.process = self.process, self.process.fork()
        yield
        self.process.exit()
        self.process = parent

    def alloc_hpage(self) -> int:
        """A block that is huge, filled, and advised so only afterwards."""
        addr = self.setup(1)
        self.fault(addr, 0, HPAGE_PMD_NR)
        check(collapse_retry(self.process, addr, 1) is None, "MADV_COLLAPSE of a full block")
        check(self.check_huge(addr, 1), "a huge page to begin with")
        self.process.madvise(addr, HPAGE_PMD_SIZE, Advice.MADV_HUGEPAGE)
        return addr


class AnonArea(Area):
    """Private anonymous memory."""

    name = "anon"

    def setup(self, nr_hpages: int) -> int:
        """At 1 GiB."""
        return self.process.mmap(nr_hpages * HPAGE_PMD_SIZE, addr=BASE_ADDR, fixed=True)


class ShmemArea(Area):
    """A memfd, mapped shared."""

    name = "shmem"
    huge_field = "ShmemPmdMapped"
    file: File

    def setup(self, nr_hpages: int) -> int:
        """A new memfd, without pages."""
        size = nr_hpages * HPAGE_PMD_SIZE
        self.file = self.process.memfd_create("khugepaged-selftest-collapse-shmem")
        self.process.ftruncate(self.file, size)
        return self.process.mmap(size, addr=BASE_ADDR, fixed=True, file=self.file, shared=True)

    def cleanup(self, addr: int, nr_hpages: int) -> None:
        """Unmap it, and close the file."""
        super().cleanup(addr, nr_hpages)
        self.process.close(self.file)


class FileArea(ShmemArea):
    """A file of the host, opened read-only and mapped private, to be read and executed."""

    name = "file"
    huge_field = "FilePmdMapped"

    def setup(self, nr_hpages: int) -> int:
        """Write the file, and map it with its cache dropped."""
        process = self.process
        written = self._open(os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        process.pwrite(written, 0, pattern(0, nr_hpages * HPAGE_PMD_NR))
        process.fsync(written)
        process.close(written)
        self.file = self._open(os.O_RDONLY)
        size = nr_hpages * HPAGE_PMD_SIZE
        prot = PROT_READ | PROT_EXEC
        addr = process.mmap(size, addr=BASE_ADDR, fixed=True, file=self.file, prot=prot)
        self.selftest.machine.drop_caches()
        return addr

    def _open(self, flags: int) -> File:
        if flags & os.O_CREAT:
            self.path = os.path.join(self.selftest.temporary_directory(), "collapse_test_file")
        return self.process.open(self.path, flags)

    def fault(self, addr: int, first: int, end: int) -> None:
        """MADV_POPULATE_READ."""
        start, length = addr + first * PAGE_SIZE, (end - first) * PAGE_SIZE
        self.process.madvise(start, length, Advice.MADV_POPULATE_READ)


class TmpfsArea(FileArea):
    """The same on a tmpfs, mounted with huge=advise."""

    name = "tmpfs"
    huge_field = "ShmemPmdMapped"

    def __init__(self, selftest: Selftest) -> None:
        super().__init__(selftest)
        self.mount = selftest.machine.tmpfs(huge="advise")

    def _open(self, flags: int) -> File:
        return self.process.open("collapse_test_file", flags, tmpfs=self.mount)


AREAS: dict[str, type[Area]] = {
    each.name: each for each in (AnonArea, FileArea, ShmemArea, TmpfsArea)
}


def collapse_retry(process: Process, addr: int, nr_hpages: int) -> CollapseError | None:
    """MADV_COLLAPSE, once more after EAGAIN; the error it ended with."""
    error = _collapse(process, addr, nr_hpages)
    if error is not None and error.errno == errno.EAGAIN:
        error = _collapse(process, addr, nr_hpages)
    return error


def _collapse(process: Process, addr: int, nr_hpages: int) -> CollapseError | None:
    try:
        process.madvise(addr, nr_hpages * HPAGE_PMD_SIZE, Advice.MADV_COLLAPSE)
    except CollapseError as error:
        return error
    return None


class Context:
    """Who collapses: struct collapse_context of the selftest.

    enforces_limits: whether max_ptes_* bind it.
    """

    name = ""
    enforces_limits = False

    def collapse(self, area: Area, addr: int, nr_hpages: int) -> str:
        """Have blocks collapsed. Returns: "collapsed" or "left alone"."""
        raise NotImplementedError


class Madvise(Context):
    """MADV_COLLAPSE, with `enabled` and `shmem_enabled` at never."""

    name = "madvise"

    def collapse(self, area: Area, addr: int, nr_hpages: int) -> str:
        """Of blocks that are not huge."""
        check(area.check_huge(addr, 0), "no huge page to begin with")
        return self.collapse_anyhow(area, addr, nr_hpages)

    def collapse_anyhow(self, area: Area, addr: int, nr_hpages: int) -> str:
        """Of blocks that may be huge already. Return value and smaps must agree."""
        with area.selftest.pushed(enabled="never", shmem_enabled="never"):
            area.process.madvise(addr, nr_hpages * HPAGE_PMD_SIZE, Advice.MADV_HUGEPAGE)
            error = collapse_retry(area.process, addr, nr_hpages)
            if error is None:
                check(area.check_huge(addr, nr_hpages), "MADV_COLLAPSE returns 0, smaps disagrees")
                return "collapsed"
            check(area.check_huge(addr, 0), f"{error}, but smaps has huge pages")
            return "left alone"


class Khugepaged(Context):
    """The daemon, given two full scans, or three seconds at most."""

    name = "khugepaged"
    enforces_limits = True

    def wait_for_scan(self, area: Area, addr: int, nr_hpages: int) -> bool:
        """Have the daemon look at the blocks; False if it has not come there in time."""
        machine, length = area.selftest.machine, nr_hpages * HPAGE_PMD_SIZE
        check(area.check_huge(addr, 0), "no huge page to begin with")
        area.process.madvise(addr, length, Advice.MADV_HUGEPAGE)
        enough = area.selftest.full_scans() + 2
        in_time = False
        for _ in range(POLLS):
            if area.check_huge(addr, nr_hpages) or area.selftest.full_scans() >= enough:
                in_time = True
                break
            machine.khugepaged.run(until=machine.clock.now_ns / 1e9 + TICK_SECONDS)
        area.process.madvise(addr, length, Advice.MADV_NOHUGEPAGE)
        return in_time

    def collapse(self, area: Area, addr: int, nr_hpages: int) -> str:
        """Blocks of a file are touched again: the daemon leaves their PMD empty.

        A process without any page there is not known to the daemon, which then scans nothing.
        """
        in_time = self.wait_for_scan(area, addr, nr_hpages)
        known = area.process.mm.mm_slot is not None
        check(in_time is known, f"khugepaged knows of the process: {known}; all scanned: {in_time}")
        if in_time and not isinstance(area, AnonArea):
            area.fault(addr, 0, nr_hpages * HPAGE_PMD_NR)
        if area.check_huge(addr, nr_hpages):
            return "collapsed"
        check(area.check_huge(addr, 0), "all blocks huge, or none")
        return "left alone"


CONTEXTS: dict[str, type[Context]] = {each.name: each for each in (Khugepaged, Madvise)}
