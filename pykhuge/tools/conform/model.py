"""The layout in the model."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import numpy as np

from pykhuge.machine import Machine
from pykhuge.mm.errors import BusError, SegmentationFault, UserFault
from pykhuge.mm.mm_types import File
from pykhuge.mm.page import PG_uptodate
from pykhuge.process import Advice, Process, UserFaultFd
from pykhuge.tools.conform.layout import NR, PAGE, Layout, Stroke, UnfitLayout, runs
from pykhuge.tools.conform.observe import (
    BASE,
    Event,
    Outcome,
    Words,
    contents,
    observe,
    parse_events,
)

__all__ = ["in_model"]

PROT_READ, PROT_WRITE = 1, 2
# Why a layout is left out.
KILLS = "a stroke would kill its process"
WAITS = "a stroke would wait for its own userfaultfd"
NEVER_RETURNS = "a truncation into a huge page on swap never returns, as seen on 6.18.44"
ALIAS = BASE + (1 << 30)


def in_model(layout: Layout, **options: Any) -> Outcome:
    """What the model makes of a layout. options: of `Machine`, as the kernel version."""
    machine = Machine("1G", swap="64M", swap_synchronous_io=True, **options)
    outcome = observe(_Model(machine, layout))
    machine.audit()
    return outcome


class _Model:
    """A process of the model that has the layout's memory mapped, and its children."""

    def __init__(self, machine: Machine, layout: Layout) -> None:
        self.machine = machine
        self.layout = layout
        self.main = machine.process("main")
        self.children: list[Process] = []
        self.file: File | None = None
        self.uffds: list[UserFaultFd] = []
        machine.thp.shmem_enabled = "advise"
        self.knobs = {knob: self._turn(knob, word) for knob, word in layout.knobs().items()}
        limits = machine.khugepaged_settings
        limits.max_ptes_none, limits.max_ptes_swap = layout.none, layout.swap
        limits.max_ptes_shared = layout.shared
        limits.pages_to_scan = 1 << 20
        self._map()

    def _turn(self, knob: str, word: str) -> int:
        return _errno(lambda: self.machine.sysfs.__setitem__(knob, word))

    def _map(self) -> None:
        layout, addr = self.layout, self._at(self.layout.head)
        if not layout.has_file:
            self.main.mmap(layout.nr * PAGE, addr=addr, fixed=True, shared=layout.memory == "shm")
            return
        self.file = self.main.memfd_create("layout")
        self.main.ftruncate(self.file, (layout.offset + layout.blocks * NR) * PAGE)
        self.main.mmap(
            layout.nr * PAGE,
            addr=addr,
            fixed=True,
            file=self.file,
            offset=(layout.offset + layout.head) * PAGE,
            shared=layout.memory == "memfd",
        )

    def _at(self, page: int) -> int:
        return BASE + page * PAGE

    def stroke(self, stroke: Stroke) -> int:
        """Do it, and say the errno."""
        name, who = stroke.name, self.main
        if name.startswith("child."):
            if not self.children:
                return errno.ESRCH
            name, who = name.removeprefix("child."), self.children[-1]
        return _errno(lambda: getattr(self, "_" + name.replace("-", "_"))(who, stroke))

    def _range(self, stroke: Stroke) -> tuple[int, int]:
        return self._at(stroke.first), stroke.nr * PAGE

    def _by_page(self, stroke: Stroke, advice: Advice, who: Process) -> None:
        for first, nr in runs(stroke):
            who.madvise(self._at(first), nr * PAGE, advice)

    def _write(self, who: Process, stroke: Stroke) -> None:
        name = self._name(who)
        for first, nr in runs(stroke):
            who.write(self._at(first), b"".join(contents(range(first, first + nr), name)))

    def _read(self, who: Process, stroke: Stroke) -> None:
        for page in stroke.pages():
            who.read(self._at(page), 1)

    def _dontneed(self, who: Process, stroke: Stroke) -> None:
        self._by_page(stroke, Advice.MADV_DONTNEED, who)

    def _free(self, who: Process, stroke: Stroke) -> None:
        self._by_page(stroke, Advice.MADV_FREE, who)

    def _pageout(self, who: Process, stroke: Stroke) -> None:
        self._by_page(stroke, Advice.MADV_PAGEOUT, who)

    def _hugepage(self, who: Process, stroke: Stroke) -> None:
        who.madvise(*self._range(stroke), Advice.MADV_HUGEPAGE)

    def _nohugepage(self, who: Process, stroke: Stroke) -> None:
        who.madvise(*self._range(stroke), Advice.MADV_NOHUGEPAGE)

    def _collapse(self, who: Process, stroke: Stroke) -> None:
        who.madvise(*self._range(stroke), Advice.MADV_COLLAPSE)

    def _protect(self, who: Process, stroke: Stroke) -> None:
        who.mprotect(*self._range(stroke), PROT_READ)

    def _unprotect(self, who: Process, stroke: Stroke) -> None:
        who.mprotect(*self._range(stroke), PROT_READ | PROT_WRITE)

    def _populate(self, who: Process, stroke: Stroke) -> None:
        who.madvise(*self._range(stroke), Advice.MADV_POPULATE_WRITE)

    def _thp_disable(self, who: Process, stroke: Stroke) -> None:
        how = ("no", "completely", "except_advised")[stroke.first]
        try:
            who.thp_disable = how
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error)) from error

    def _mlock(self, who: Process, stroke: Stroke) -> None:
        who.mlock(*self._range(stroke))

    def _munlock(self, who: Process, stroke: Stroke) -> None:
        who.munlock(*self._range(stroke))

    def _munmap(self, who: Process, stroke: Stroke) -> None:
        who.munmap(*self._range(stroke))

    def _move(self, who: Process, stroke: Stroke) -> None:
        who.mremap(*self._range(stroke), self._at(stroke.to))

    def _pin(self, who: Process, stroke: Stroke) -> None:
        for page in stroke.pages():
            who.get(self._at(page), PAGE)

    def _fork(self, who: Process, stroke: Stroke) -> None:  # noqa: ARG002 (all of it)
        self.children.append(who.fork())

    def _uffd(self) -> UserFaultFd:
        if not self.uffds:
            self.uffds.append(self.main.userfaultfd())
        return self.uffds[0]

    def _arm(self, who: Process, stroke: Stroke) -> None:  # noqa: ARG002 (of main alone)
        self._uffd().register(*self._range(stroke))

    def _uffd_wp(self, who: Process, stroke: Stroke) -> None:  # noqa: ARG002 (of main alone)
        self._uffd().register(*self._range(stroke), missing=False, wp=True)
        self._uffd().writeprotect(*self._range(stroke))

    def _uffd_poison(self, who: Process, stroke: Stroke) -> None:  # noqa: ARG002 (of main alone)
        self._uffd().register(*self._range(stroke))
        self._uffd().poison(*self._range(stroke))

    def _file_range(self, first: int, nr: int) -> tuple[File, int, int]:
        assert self.file is not None
        return self.file, (self.layout.offset + first) * PAGE, nr * PAGE

    def _pwrite(self, who: Process, stroke: Stroke) -> None:
        for first, nr in runs(stroke):
            file, offset, _ = self._file_range(first, nr)
            who.pwrite(file, offset, b"".join(contents(range(first, first + nr), "file")))

    def _fallocate(self, who: Process, stroke: Stroke) -> None:
        for first, nr in runs(stroke):
            who.fallocate(*self._file_range(first, nr))

    def _punch(self, who: Process, stroke: Stroke) -> None:
        for first, nr in runs(stroke):
            who.fallocate(*self._file_range(first, nr), punch_hole=True, keep_size=True)

    def _truncate(self, who: Process, stroke: Stroke) -> None:
        file, offset, _ = self._file_range(stroke.first, 0)
        cut, i_pages = offset // PAGE, file.f_mapping.i_pages
        if i_pages.load(cut) < 0 and cut % (1 << i_pages.order(cut)):
            raise UnfitLayout(NEVER_RETURNS, str(stroke))
        who.ftruncate(file, offset)

    def _alias(self, who: Process, stroke: Stroke) -> None:
        self._map_again(who, ALIAS, self.layout.offset + stroke.first)

    def _map_again(self, who: Process, addr: int, first: int) -> None:
        """Map the file from page `first` on at `addr` too, and read what mincore finds."""
        assert self.file is not None
        nr = self.layout.offset + self.layout.blocks * NR - first
        if not nr:
            raise OSError(errno.EINVAL, "nothing is left of the file")
        offset = first * PAGE
        who.mmap(
            nr * PAGE,
            addr=addr,
            fixed=True,
            file=self.file,
            offset=offset,
            shared=True,
            prot=PROT_READ,
        )
        for page in range(nr):
            pfn = who.cached_pfn(self.file, first + page)
            pages = self.machine.mem.pages
            if pfn is not None and pages.flags[pages.head_of(pfn)] & PG_uptodate:
                who.read(addr + page * PAGE, 1)

    def collapse(self) -> int:
        start, length = self._at(self.layout.head), self.layout.nr * PAGE
        return _errno(lambda: self.main.madvise(start, length, Advice.MADV_COLLAPSE))

    def khugepaged(self) -> int:
        before = self.machine.khugepaged_settings.pages_collapsed
        self.machine.khugepaged.step()
        return self.machine.khugepaged_settings.pages_collapsed - before

    def people(self) -> list[str]:
        return ["main", *(f"child {number}" for number in range(1, len(self.children) + 1))]

    def _who(self, who: str) -> Process:
        return dict(zip(self.people(), [self.main, *self.children], strict=True))[who]

    def _name(self, process: Process) -> str:
        return self.people()[[self.main, *self.children].index(process)]

    def pagemap(self, who: str, addr: int, nr: int) -> Words:
        return np.asarray(self.machine.procfs.pagemap(self._who(who), addr, nr * PAGE))

    def smaps(self, who: str) -> str:
        return self.machine.procfs[f"{self._who(who).pid}/smaps"]

    def vmstat(self) -> dict[str, int]:
        return self.machine.vmstat()

    def zero_frame(self) -> int:
        return self.machine.mem.zero_pfn

    def unwatch(self) -> None:
        watched = [vma for vma in self.main.mm.vmas if vma.userfaultfd_armed()]
        for vma in watched:
            self._uffd().unregister(vma.vm_start, vma.vm_end - vma.vm_start)

    def page(self, who: str, page: int) -> bytes | None:
        try:
            return self._who(who).read(self._at(page), PAGE)
        except BusError:
            return None

    def file_bytes(self) -> bytes:
        file, _, _ = self._file_range(0, 0)
        return self.main.pread(file, 0, (self.layout.offset + self.layout.blocks * NR) * PAGE)

    def clear_events(self) -> None:
        self.machine.trace.clear()

    def events(self) -> list[tuple[str, Event]]:
        mms = {f"{self._who(who).mm.hashed_ptr:016x}": who for who in self.people()}
        return parse_events(self.machine.trace.text(), mms)


def _errno(call: Callable[[], object]) -> int:
    try:
        call()
    except (BusError, SegmentationFault) as error:
        raise UnfitLayout(KILLS, str(error)) from error
    except UserFault as error:
        raise UnfitLayout(WAITS, str(error)) from error
    except OSError as error:
        return error.errno or 0
    return 0
