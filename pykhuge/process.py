"""Process: one task and its address space, by the system calls a program would make.

Every call can be made plainly, or taken as steps (`process.munmap.steps(...)`) for
`Machine.spawn`, so that tasks can be put in each other's way.
"""

from __future__ import annotations

import errno
from typing import Any

from pykhuge.advice import Advice, AdviceCalls
from pykhuge.files import FileCalls
from pykhuge.hw.memory import PAGE_SHIFT, PAGE_SIZE
from pykhuge.hw.poison import LINE_SHIFT
from pykhuge.kernel.locking import WRITE
from pykhuge.kernel.sched import Acquire, Release, Steps, Task, steps
from pykhuge.khugepaged.control import KhugepagedSettings
from pykhuge.mm import userfaultfd
from pykhuge.mm.errors import (
    BusError,
    SegmentationFault,
    Signal,
    check_int,
    os_error,
)
from pykhuge.mm.file_table import get_file, release_file
from pykhuge.mm.fork import dup_mmap
from pykhuge.mm.gup import (
    LockedPage,
    UserPages,
    follow_page,
    get_user_pages,
    lock_page,
    populate,
)
from pykhuge.mm.migrate_device import migrate_to_device
from pykhuge.mm.mm import (
    change_flags,
    check_span,
    check_whole,
    do_mmap,
    do_munmap,
    exit_mmap,
    mapped_up_to,
    mlock_vma_range,
    vmas_in,
)
from pykhuge.mm.mm_types import (
    MMF_DISABLE_THP,
    MMF_DISABLE_THP_EXCEPT_ADVISED,
    VM_EXEC,
    VM_LOCKED,
    VM_NORESERVE,
    VM_READ,
    VM_SHARED,
    VM_WRITE,
    File,
    MemCgroup,
    Mm,
    MmuNotifier,
    Userfaultfd,
)
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.mprotect import do_mprotect
from pykhuge.mm.mremap import do_mremap
from pykhuge.mm.page_table import (
    is_swap_pte,
    pmd_trans_huge,
    pte_index,
    pte_pfn,
    swp_offset,
    swp_type,
)
from pykhuge.mm.rmap import pmd_of
from pykhuge.mm.shmem import shmem_file_setup
from pykhuge.user_access import UserAccess, check_access

__all__ = ["PROT_EXEC", "PROT_NONE", "PROT_READ", "PROT_WRITE", "Advice", "Process", "UserFaultFd"]

PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, VM_READ, VM_WRITE, VM_EXEC
PROT_ANY = PROT_READ | PROT_WRITE | PROT_EXEC


_THP_DISABLE = {
    "completely": MMF_DISABLE_THP,
    "except_advised": MMF_DISABLE_THP_EXCEPT_ADVISED,
}


class UserFaultFd:
    """A userfaultfd of one process. Faults it should answer raise `UserFault` in the task."""

    def __init__(self, process: Process, ctx: Userfaultfd) -> None:
        self._process = process
        self._ctx = ctx

    @property
    def task(self) -> Task[Any]:
        """In whose name its calls run."""
        return self._process.task

    def check_alive(self) -> None:
        """Raises: what `Process.check_alive` raises."""
        self._process.check_alive()

    @steps
    def register(
        self, addr: int, length: int, *, missing: bool = True, wp: bool = False
    ) -> Steps[None]:
        """UFFDIO_REGISTER with MODE_MISSING, MODE_WP or both."""
        mem, mm = self._process.mem, self._process.mm
        return userfaultfd.uffd_register(mem, mm, self._ctx, addr, length, missing=missing, wp=wp)

    @steps
    def unregister(self, addr: int, length: int) -> Steps[None]:
        """UFFDIO_UNREGISTER."""
        mem, mm = self._process.mem, self._process.mm
        return userfaultfd.uffd_unregister(mem, mm, self._ctx, addr, length)

    @steps
    def copy(self, addr: int, data: bytes) -> Steps[None]:
        """UFFDIO_COPY of whole pages. Raises: OSError EEXIST where something is mapped."""
        return userfaultfd.uffd_copy(self._process.mem, self._process.mm, addr, data)

    @steps
    def zeropage(self, addr: int, length: int) -> Steps[None]:
        """UFFDIO_ZEROPAGE. Raises: OSError EEXIST where something is mapped."""
        return userfaultfd.uffd_zeropage(self._process.mem, self._process.mm, addr, length)

    @steps
    def poison(self, addr: int, length: int) -> Steps[None]:
        """UFFDIO_POISON (Linux 6.6): whoever touches the range gets SIGBUS, as for lost memory.

        Raises: OSError EEXIST where something is mapped.
        """
        return userfaultfd.uffd_poison(self._process.mem, self._process.mm, addr, length)

    @steps
    def writeprotect(self, addr: int, length: int, *, protect: bool = True) -> Steps[None]:
        """UFFDIO_WRITEPROTECT, on or off."""
        mem, mm = self._process.mem, self._process.mm
        return userfaultfd.uffd_writeprotect(mem, mm, addr, length, protect=protect)


class Process(UserAccess, FileCalls, AdviceCalls):
    """A task with an address space; made by `Machine.process` and `Process.fork`.

    node: the NUMA node its faults prefer to allocate on.
    """

    def __init__(
        self,
        mem: Memory,
        settings: KhugepagedSettings,
        comm: str,
        pid: int,
        memcg: MemCgroup,
        cpu: int = 0,
    ) -> None:
        self.mem = mem
        self.settings = settings
        self.pid = pid
        self.task: Task[Any] = Task(mem.sched, comm, pid, cpu)
        self.mm = Mm(f"mm:{pid}", mem.rng.getrandbits(32), memcg, task=self.task)
        mem.mms.append(self.mm)

    def check_alive(self) -> None:
        """Raises: KernelPanic if the host is dead, OSError ESRCH if the process is."""
        if self.mem.panic is not None:
            raise self.mem.panic
        if self.mm.mm_users == 0:
            raise os_error(errno.ESRCH, f"process {self.pid} has exited")

    @property
    def signals(self) -> list[Signal]:
        """Signals sent to the process that it has not taken yet; take them with `pop`."""
        return self.mm.signals

    @property
    def mce_kill(self) -> str:
        """prctl(PR_MCE_KILL): "early" tells it of bad pages at once, "late" when it touches them.

        "default" leaves that to `Machine.memory_failure_early_kill`. Children inherit it.
        """
        return self.mm.mce_kill

    @mce_kill.setter
    def mce_kill(self, policy: str) -> None:
        if policy not in ("early", "late", "default"):
            raise ValueError(f"mce_kill={policy!r}: allowed early, late, default")
        self.mm.mce_kill = policy

    @property
    def thp_disable(self) -> str:
        """prctl(PR_SET_THP_DISABLE): "no", "completely", or, since Linux 6.18, "except_advised".

        The last leaves what MADV_HUGEPAGE or MADV_COLLAPSE asks for. Children inherit it.
        """
        return next((word for word, bit in _THP_DISABLE.items() if self.mm.flags & bit), "no")

    @thp_disable.setter
    def thp_disable(self, how: str) -> None:
        self.check_alive()
        spares = self.mem.version.thp_disable_except_advised
        allowed = ("no", "completely", "except_advised") if spares else ("no", "completely")
        if how not in allowed:
            raise ValueError(f"thp_disable={how!r}: allowed {', '.join(allowed)}")
        self.task.run(self._set_thp_disable(_THP_DISABLE.get(how, 0)))

    def _set_thp_disable(self, bit: int) -> Steps[None]:
        yield Acquire(self.mm.mmap_lock, WRITE)
        self.mm.flags = self.mm.flags & ~sum(_THP_DISABLE.values()) | bit
        yield Release(self.mm.mmap_lock)

    @property
    def node(self) -> int:
        """The NUMA node its faults prefer (set_mempolicy(MPOL_PREFERRED))."""
        return self.mm.preferred_node

    @node.setter
    def node(self, nid: int) -> None:
        if not 0 <= nid < len(self.mem.nodes):
            raise ValueError(f"node={nid}: allowed 0..{len(self.mem.nodes) - 1}")
        self.mm.preferred_node = nid

    @steps
    def mmap(
        self,
        length: int,
        *,
        addr: int | None = None,
        prot: int = PROT_READ | PROT_WRITE,
        fixed: bool = False,
        file: File | None = None,
        offset: int = 0,
        shared: bool = False,
        noreserve: bool = False,
    ) -> Steps[int]:
        """Map `length` bytes of anonymous memory, or of `file`; returns the address.

        Args:
            addr: where; only a hint unless `fixed`, which replaces what is mapped there.
            prot: PROT_NONE, or an OR of PROT_READ, PROT_WRITE, PROT_EXEC.
            file: an open file; `offset` is the byte of it to begin with, a multiple of 4096.
            shared: MAP_SHARED instead of MAP_PRIVATE. Without a file that is shmem too.
            noreserve: MAP_NORESERVE: shared memory is committed page by page.
        Raises: OSError EINVAL, ENOMEM, EACCES (the file is not open for that), EBADF.
        """
        check_int(length=length, offset=offset)
        flags = _check_prot(prot) | VM_SHARED * shared
        if offset % PAGE_SIZE or offset < 0 or (offset and file is None):
            raise os_error(
                errno.EINVAL, f"offset={offset}: allowed multiples of {PAGE_SIZE} of a file"
            )
        if file is not None:
            self._check_open(file)
        elif shared and length > 0:
            return (yield from self._mmap_shared(addr, length, flags, fixed, noreserve))
        pgoff = offset >> PAGE_SHIFT
        call = do_mmap(self.mem, self.mm, addr, length, flags, fixed=fixed, file=file, pgoff=pgoff)
        return (yield from call if file is None else self._held(file, call))

    def _mmap_shared(
        self, addr: int | None, length: int, flags: int, fixed: bool, noreserve: bool
    ) -> Steps[int]:
        """shmem_zero_setup(): shared anonymous memory is a shmem file that only its VMAs know."""
        size = length + PAGE_SIZE - 1 & -PAGE_SIZE
        reserve = VM_NORESERVE if noreserve else 0
        file = shmem_file_setup(self.mem, "dev/zero", size, reserve)
        self.mem.held_files.append(file)
        try:
            where = yield from do_mmap(
                self.mem, self.mm, addr, length, flags, fixed=fixed, file=file
            )
        except GeneratorExit:
            # A plain call that would have to wait is given up: nobody else knows the file.
            self.mem.sched.current.run(release_file(self.mem, file))
            raise
        except OSError:
            yield from release_file(self.mem, file)
            raise
        yield from release_file(self.mem, file)
        return where

    @steps
    def munmap(self, addr: int, length: int) -> Steps[None]:
        """Unmap a range; parts where nothing is mapped are no error."""
        return do_munmap(self.mem, self.mm, addr, length)

    @steps
    def mprotect(self, addr: int, length: int, prot: int) -> Steps[None]:
        """Change the protection. Raises: OSError ENOMEM if part of the range is not mapped."""
        return do_mprotect(self.mem, self.mm, addr, length, _check_prot(prot))

    @steps
    def mremap(self, old: int, length: int, new: int, new_length: int | None = None) -> Steps[int]:
        """Move a range to `new` (MREMAP_MAYMOVE | MREMAP_FIXED), cut or grown to `new_length`.

        Raises: OSError EFAULT (not one mapping), EINVAL (the places overlap). Up to Linux 6.16 what
        was at `new` is gone even if the range turns out to leave its mapping.
        """
        to_length = length if new_length is None else new_length
        return do_mremap(self.mem, self.mm, old, length, new, to_length)

    @steps
    def mlock(self, addr: int, length: int) -> Steps[None]:
        """Fault the range in and keep it in: its pages become unevictable."""
        start, end = _lock_range(addr, length)
        if start == end:
            return
        yield from self._set_locked(start, end, lock=True)
        for vma in vmas_in(self.mm, start, end):
            write = vma.vm_flags & (VM_WRITE | VM_SHARED) == VM_WRITE
            low, high = max(start, vma.vm_start), min(end, vma.vm_end)
            try:
                yield from populate(self.mem, self.mm, low, high, write=write)
            except (SegmentationFault, BusError) as fault:
                raise os_error(errno.ENOMEM, f"{fault.address:#x} cannot be touched") from None

    @steps
    def munlock(self, addr: int, length: int) -> Steps[None]:
        """Undo mlock."""
        start, end = _lock_range(addr, length)
        if start < end:
            yield from self._set_locked(start, end, lock=False)

    def _set_locked(self, start: int, end: int, *, lock: bool) -> Steps[None]:
        mm = self.mm
        yield Acquire(mm.mmap_lock, WRITE)
        stop = mapped_up_to(mm, start, end)
        changed = change_flags(
            self.mem,
            mm,
            start,
            stop,
            lambda vma: vma.vm_flags | VM_LOCKED if lock else vma.vm_flags & ~VM_LOCKED,
        )
        for low, high in changed:
            mlock_vma_range(self.mem, mm, low, high, lock=lock)
        yield Release(mm.mmap_lock)
        check_whole(stop, end)

    @steps
    def fork(self, comm: str | None = None) -> Steps[Process]:
        """A child with a copy of the address space, pages shared until one of the two writes."""
        child = Process(
            self.mem,
            self.settings,
            comm or self.task.comm,
            self.mem.next_pid(),
            self.mm.memcg,
            self.task.cpu,
        )
        child.mm.preferred_node = self.mm.preferred_node
        child.mm.mce_kill = self.mm.mce_kill
        child.mm.files = [get_file(file) for file in self.mm.files]
        try:
            yield from dup_mmap(self.mem, self.mm, child.mm)
        except MemoryError:
            yield from exit_mmap(self.mem, child.mm)
            raise
        except GeneratorExit:
            # A plain call that would have to wait is given up: nobody will ever have the child.
            if not child.mm.vmas:
                self.mem.mms.remove(child.mm)
                for file in child.mm.files:
                    file.f_count -= 1
            raise
        return child

    @steps
    def exit(self) -> Steps[None]:
        """The process ends: its memory is unmapped, it can be used no more."""
        return exit_mmap(self.mem, self.mm)

    @steps
    def pin(self, addr: int, length: int) -> Steps[UserPages]:
        """pin_user_pages(FOLL_WRITE | FOLL_PIN): hold the pages as a device does for DMA."""
        check_access(addr, length)
        return get_user_pages(self.mem, self.mm, addr, length, pinned=True)

    @steps
    def get(self, addr: int, length: int) -> Steps[UserPages]:
        """get_user_pages(FOLL_GET): hold the pages as vmsplice does, to read them."""
        check_access(addr, length)
        return get_user_pages(self.mem, self.mm, addr, length, pinned=False)

    def lock_page(self, addr: int) -> LockedPage:
        """Lock the page at `addr` (lock_page), as writeback or migration does, until `release`.

        Raises: ValueError if no page is there, WouldBlock if it is locked already.
        """
        self.check_alive()
        return lock_page(self.mem, self.mm, addr)

    @steps
    def migrate_to_device(self, addr: int) -> Steps[int]:
        """Move the page at `addr` to device memory (see `Machine`); returns the frame.

        Raises: OSError EFAULT (no page there), EBUSY (in use by others), ENOMEM.
        """
        return migrate_to_device(self.mem, self.mm, addr)

    def fail_swap_reads(self, addr: int) -> None:
        """Let the swap device fail to read the page at `addr`, until its slot is freed.

        Raises: ValueError if nothing is swapped out there.
        """
        self.check_alive()
        pmd = pmd_of(self.mem, self.mm, addr) or 0
        pte = 0 if pmd_trans_huge(pmd) else int(self.mem.ram.words[pte_pfn(pmd), pte_index(addr)])
        if not is_swap_pte(pte) or swp_type(pte) or not pmd:
            raise ValueError(f"addr={addr:#x}: allowed where a page is swapped out")
        self.mem.swap.bad.add(swp_offset(pte))

    def userfaultfd(self) -> UserFaultFd:
        """A new userfaultfd, watching nothing yet."""
        self.check_alive()
        return UserFaultFd(self, Userfaultfd(self.pid))

    def pfn(self, addr: int) -> int | None:
        """The frame behind `addr`, as /proc/pid/pagemap tells; None if it is not present."""
        return follow_page(self.mem, self.mm, addr)

    def poison(self, addr: int, line: int | None = None) -> int:
        """Let the cache line at `addr` (or line 0..63 of its page) go bad; returns the frame.

        Nobody notices until it is read. Raises: ValueError if no page is there.
        """
        self.check_alive()
        pfn = self.pfn(addr)
        if pfn is None or pfn == self.mem.zero_pfn:
            raise ValueError(
                f"addr={addr:#x}: allowed where a page of the process's own is present;"
                " write or read it first"
            )
        self.mem.poison.poison(pfn, (addr % PAGE_SIZE) >> LINE_SHIFT if line is None else line)
        return pfn

    def register_mmu_notifier(self, notifier: MmuNotifier) -> None:
        """Let a secondary MMU know of page-table changes that a collapse makes."""
        self.check_alive()
        self.mm.mmu_notifiers.append(notifier)

    def is_huge(self, addr: int) -> bool:
        """Whether a huge PMD maps `addr`."""
        pmd = pmd_of(self.mem, self.mm, addr)
        return bool(pmd and pmd_trans_huge(pmd))


def _lock_range(addr: int, length: int) -> tuple[int, int]:
    """The pages that mlock(2) means. Raises: OSError EINVAL."""
    check_int(addr=addr, length=length)
    start = addr & -PAGE_SIZE
    return start, check_span(start, length + addr - start if length >= 0 else length)


def _check_prot(prot: int) -> int:
    check_int(prot=prot)
    if prot & ~(PROT_READ | PROT_WRITE | PROT_EXEC):
        raise os_error(
            errno.EINVAL, f"prot={prot:#x}: allowed an OR of PROT_READ, PROT_WRITE, PROT_EXEC"
        )
    return prot
