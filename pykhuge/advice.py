"""Advice: what a process tells the kernel of its memory, by madvise(2) (mm/madvise.c)."""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable, Iterator
from typing import Any

from pykhuge.hw.memory import PAGE_SHIFT, PAGE_SIZE
from pykhuge.kernel.locking import READ, WRITE
from pykhuge.kernel.sched import Acquire, Release, Steps, Task, steps
from pykhuge.khugepaged.control import CollapseControl, KhugepagedSettings
from pykhuge.khugepaged.madvise import madvise_collapse
from pykhuge.mm.errors import (
    BUS_MCEERR_AR,
    EHWPOISON,
    BusError,
    SegmentationFault,
    os_error,
)
from pykhuge.mm.fault import find_vma
from pykhuge.mm.file_table import inode_locked
from pykhuge.mm.gup import (
    get_user_pages,
    populate,
)
from pykhuge.mm.memory_failure import memory_failure
from pykhuge.mm.mm import (
    change_flags,
    check_mapped,
    check_span,
    vmas_in,
)
from pykhuge.mm.mm_slot import khugepaged_enter_vma
from pykhuge.mm.mm_types import (
    VM_DONTCOPY,
    VM_HUGEPAGE,
    VM_LOCKED,
    VM_NOHUGEPAGE,
    VM_SHARED,
    VM_WIPEONFORK,
    VM_WRITE,
    Mm,
    ShmemInode,
    Vma,
)
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.shmem import shmem_undo_range
from pykhuge.mm.soft_offline import soft_offline_page
from pykhuge.mm.swap import put_pages
from pykhuge.mm.vmscan import mark_page_lazyfree_range, pageout_range
from pykhuge.mm.zap import madvise_dontneed

__all__ = ["Advice", "AdviceCalls"]


class Advice(enum.IntEnum):
    """What `Process.madvise` takes, with Linux's numbers."""

    MADV_DONTNEED = 4
    MADV_FREE = 8
    MADV_REMOVE = 9
    MADV_DONTFORK = 10
    MADV_DOFORK = 11
    MADV_HUGEPAGE = 14
    MADV_NOHUGEPAGE = 15
    MADV_WIPEONFORK = 18
    MADV_KEEPONFORK = 19
    MADV_PAGEOUT = 21
    MADV_POPULATE_READ = 22
    MADV_POPULATE_WRITE = 23
    MADV_COLLAPSE = 25
    MADV_HWPOISON = 100
    MADV_SOFT_OFFLINE = 101


# Advice that only changes vm_flags: bits set, bits cleared.
_FLAGS = {
    Advice.MADV_DONTFORK: (VM_DONTCOPY, 0),
    Advice.MADV_DOFORK: (0, VM_DONTCOPY),
    Advice.MADV_HUGEPAGE: (VM_HUGEPAGE, VM_NOHUGEPAGE),
    Advice.MADV_NOHUGEPAGE: (VM_NOHUGEPAGE, VM_HUGEPAGE),
    Advice.MADV_WIPEONFORK: (VM_WIPEONFORK, 0),
    Advice.MADV_KEEPONFORK: (0, VM_WIPEONFORK),
}
# Advice that works on the pages of each VMA.
_ON_PAGES: dict[Advice, Callable[[Memory, Vma, int, int], None]] = {
    Advice.MADV_DONTNEED: madvise_dontneed,
    Advice.MADV_PAGEOUT: pageout_range,
    Advice.MADV_FREE: mark_page_lazyfree_range,
}


class AdviceCalls:
    """madvise(2) of `Process`."""

    mem: Memory
    mm: Mm
    task: Task[Any]
    settings: KhugepagedSettings

    def check_alive(self) -> None:
        """Raises: KernelPanic if the host is dead, OSError ESRCH if the process is."""
        raise NotImplementedError

    @steps
    def madvise(self, addr: int, length: int, advice: int) -> Steps[None]:
        """madvise(2); `advice` is one of `Advice`.

        Raises: OSError EINVAL, ENOMEM (part of the range is not mapped; the advice holds for what
        is, also beyond it), or for MADV_COLLAPSE a CollapseError, which also names the last scan
        result.
        """
        if advice not in tuple(Advice):
            allowed = ", ".join(f"{each.name} ({each.value})" for each in Advice)
            raise os_error(errno.EINVAL, f"advice={advice}: allowed {allowed}")
        end, advice = check_span(addr, length), Advice(advice)
        if end == addr:
            return
        if advice in (Advice.MADV_POPULATE_READ, Advice.MADV_POPULATE_WRITE):
            yield from self._populate(addr, end, write=advice is Advice.MADV_POPULATE_WRITE)
            return
        if advice in (Advice.MADV_HWPOISON, Advice.MADV_SOFT_OFFLINE):
            yield from self._inject_error(addr, addr + length, advice)
            return
        if advice is Advice.MADV_REMOVE:
            yield from self._remove(addr, end)
            return
        mode = WRITE if advice in _FLAGS else READ
        yield Acquire(self.mm.mmap_lock, mode)
        try:
            yield from self._advise(addr, end, advice)
        except OSError:
            yield Release(self.mm.mmap_lock)
            raise
        yield Release(self.mm.mmap_lock)

    def _remove(self, start: int, end: int) -> Steps[None]:
        """Punch the range out of the file that is mapped there (madvise_remove).

        Files of the host are as on a file system without fallocate.
        """
        for vma, at, stop in self._walk_vmas(start, end):
            if vma.vm_flags & VM_LOCKED or vma.vm_file is None:
                raise os_error(errno.EINVAL, f"{vma}: allowed where a file is mapped, not mlocked")
            writable = self.mem.version.remove_asks_may_write or vma.vm_flags & VM_WRITE
            if not (vma.vm_flags & VM_SHARED and writable and vma.may_write()):
                raise os_error(errno.EACCES, f"{vma}: allowed where a mapping is shared, writable")
            inode = vma.vm_file.inode
            if not isinstance(inode, ShmemInode):
                raise os_error(errno.EOPNOTSUPP, f"{inode.name}: allowed for shmem files")
            low = vma.linear_page_index(at) << PAGE_SHIFT
            punch = shmem_undo_range(self.mem, inode, low, low + stop - at, even_cows=False)
            yield from inode_locked(self.mem, inode, punch)

    def _inject_error(self, start: int, end: int, advice: Advice) -> Steps[None]:
        """Kernel: madvise_inject_error. No machine check: the pages are only said to be bad."""
        required = self.mem.version.hwpoison_requires_action
        pending = len(self.mm.signals)
        while start < end:
            held = yield from get_user_pages(self.mem, self.mm, start, 1, pinned=False)
            pfn, at = int(held.pfns[0]), f"at process virtual address {start:#x}"
            size = self.mem.pages.compound_nr(self.mem.pages.head_of(pfn)) * PAGE_SIZE
            held.hand_over()
            try:
                if advice is Advice.MADV_SOFT_OFFLINE:
                    self.mem.printk(f"Soft offlining pfn {pfn:#x} {at}")
                    error = yield from soft_offline_page(self.mem, pfn, count_increased=True)
                else:
                    self.mem.printk(f"Injecting memory failure for pfn {pfn:#x} {at}")
                    error = yield from memory_failure(
                        self.mem,
                        pfn,
                        current=self.mm if required else None,
                        count_increased=True,
                        sw_simulated=True,
                    )
            except GeneratorExit:
                put_pages(self.mem, held.pfns)  # a plain call, given up before it began
                raise
            if required:  # a second SIGBUS is not queued while one is pending
                del self.mm.signals[pending + 1 :]
            if error:
                raise os_error(error, f"{advice.name} of page {pfn:#x} {at}")
            start += size

    def _populate(self, start: int, end: int, *, write: bool) -> Steps[None]:
        """Kernel: madvise_populate."""
        if self.mem.version.populate_stops_at_gap:
            yield from self._populate_range(start, end, write=write)
            return
        for _, low, high in self._walk_vmas(start, end):
            yield from self._populate_range(low, high, write=write)

    def _populate_range(self, start: int, end: int, *, write: bool) -> Steps[None]:
        try:
            yield from populate(self.mem, self.mm, start, end, write=write)
        except SegmentationFault as fault:
            mapped = vmas_in(self.mm, fault.address, fault.address + 1)
            number = errno.EINVAL if mapped else errno.ENOMEM
            raise os_error(number, f"{fault.address:#x} cannot be touched") from None
        except BusError as fault:
            number = EHWPOISON if fault.code == BUS_MCEERR_AR else errno.EFAULT
            raise os_error(number, str(fault)) from None

    def _advise(self, start: int, end: int, advice: Advice) -> Steps[None]:
        if advice in _FLAGS:
            self._advise_flags(start, end, advice)
            return
        for vma, low, high in self._walk_vmas(start, end):
            if advice is Advice.MADV_COLLAPSE:
                cc = CollapseControl(is_khugepaged=False, settings=self.settings)
                yield from madvise_collapse(self.mem, vma, low, high, cc)
            else:
                self._advise_pages(vma, low, high, advice)

    def _walk_vmas(self, start: int, end: int) -> Iterator[tuple[Vma, int, int]]:
        """madvise_walk_vmas(): the part of [start, end) that lies in each VMA.

        Looked up one by one: a collapse drops mmap_lock, and the VMAs may be others afterwards. A
        gap counts if the walk meets it: what goes while a VMA is worked on is not missed.
        Raises: OSError ENOMEM behind the last one, if there was a gap.
        """
        gap: int | None = None
        while start < end:
            vma = find_vma(self.mm, start)
            if gap is None and (vma is None or vma.vm_start > start):
                gap = start
            if vma is None or vma.vm_start >= end:
                break
            low, start = max(start, vma.vm_start), min(end, vma.vm_end)
            yield vma, low, start
        if gap is not None:
            raise os_error(errno.ENOMEM, f"nothing is mapped at {gap:#x}")

    def _advise_flags(self, start: int, end: int, advice: Advice) -> None:
        bits, cleared = _FLAGS[advice]
        wipe = advice is Advice.MADV_WIPEONFORK
        refuse = next((vma for vma in vmas_in(self.mm, start, end) if wipe and vma.vm_file), None)
        if refuse is not None:
            end = max(start, refuse.vm_start)  # VMA by VMA: what lies below has the advice
        if advice is Advice.MADV_HUGEPAGE:
            for vma in vmas_in(self.mm, start, end):
                # As a whole, before it is cut to the range.
                khugepaged_enter_vma(self.mem, vma, vma.vm_flags & ~cleared | bits)
        change_flags(self.mem, self.mm, start, end, lambda vma: vma.vm_flags & ~cleared | bits)
        if refuse is not None:
            raise os_error(errno.EINVAL, f"MADV_WIPEONFORK of a file at {refuse}")
        check_mapped(self.mm, start, end)

    def _advise_pages(self, vma: Vma, low: int, high: int, advice: Advice) -> None:
        if vma.vm_flags & VM_LOCKED:
            raise os_error(errno.EINVAL, f"{advice.name} of mlocked memory at {low:#x}")
        if advice is Advice.MADV_FREE and vma.vm_file is not None:
            raise os_error(errno.EINVAL, f"MADV_FREE of a file at {low:#x}")
        _ON_PAGES[advice](self.mem, vma, low, high)
