"""What memory management is about: Mm, Vma, Inode, AddressSpace, AnonVma. Fields, no behaviour."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from pykhuge.hw.memory import PAGE_SHIFT
from pykhuge.kernel.locking import Rank, RwSem, Spinlock
from pykhuge.kernel.sched import Task
from pykhuge.mm.errors import Signal
from pykhuge.mm.xarray import XArray

__all__ = [
    "AddressSpace",
    "AnonVma",
    "File",
    "Inode",
    "KhugepagedScan",
    "MemCgroup",
    "Mm",
    "MmFlag",
    "MmSlot",
    "MmuNotifier",
    "RegularInode",
    "ShmemInode",
    "ShmemSuperBlock",
    "Userfaultfd",
    "VmFlag",
    "Vma",
]


class VmFlag(enum.IntFlag):
    """vm_flags, with the kernel's bits."""

    VM_READ = 0x1
    VM_WRITE = 0x2
    VM_EXEC = 0x4
    VM_SHARED = 0x8
    VM_UFFD_MISSING = 0x200
    VM_PFNMAP = 0x400
    VM_UFFD_WP = 0x1000
    VM_LOCKED = 0x2000
    VM_IO = 0x4000
    VM_DONTCOPY = 0x20000
    VM_DONTEXPAND = 0x40000
    VM_NORESERVE = 0x200000
    VM_WIPEONFORK = 0x2000000
    VM_MIXEDMAP = 0x10000000
    VM_HUGEPAGE = 0x20000000
    VM_NOHUGEPAGE = 0x40000000


# As plain ints: `&` on an IntFlag costs a microsecond, and faults test these for every page.
VM_READ, VM_WRITE, VM_EXEC, VM_SHARED = 0x1, 0x2, 0x4, 0x8
VM_UFFD_MISSING, VM_UFFD_WP = 0x200, 0x1000
VM_LOCKED = 0x2000
VM_DONTCOPY, VM_WIPEONFORK = 0x20000, 0x2000000
VM_NORESERVE = 0x200000
VM_HUGEPAGE, VM_NOHUGEPAGE = 0x20000000, 0x40000000
VM_HUGETLB = 0x400000
VM_SPECIAL = (
    VmFlag.VM_IO.value
    | VmFlag.VM_DONTEXPAND.value
    | VmFlag.VM_PFNMAP.value
    | VmFlag.VM_MIXEDMAP.value
)
VM_UFFD_FLAGS = VM_UFFD_MISSING | VM_UFFD_WP


class MmFlag(enum.IntFlag):
    """mm->flags, as far as the model reads them."""

    MMF_VM_HUGEPAGE = 1 << 17
    MMF_DISABLE_THP = 1 << 24
    MMF_HAS_PINNED = 1 << 27
    MMF_DISABLE_THP_EXCEPT_ADVISED = 1 << 30


MMF_VM_HUGEPAGE = MmFlag.MMF_VM_HUGEPAGE.value
MMF_DISABLE_THP = MmFlag.MMF_DISABLE_THP.value
MMF_HAS_PINNED = MmFlag.MMF_HAS_PINNED.value
MMF_DISABLE_THP_EXCEPT_ADVISED = MmFlag.MMF_DISABLE_THP_EXCEPT_ADVISED.value


@dataclass(eq=False)
class MemCgroup:
    """A memory cgroup. `usage` and `limit` in pages; key 0 is the root, which charges nobody."""

    key: int
    limit: int
    usage: int = 0


@dataclass(eq=False)
class AnonVma:
    """struct anon_vma: which VMAs may map the anonymous pages that name it in page->mapping.

    `vmas` is the interval tree. All anon_vmas of one family share the root's lock.
    """

    key: int
    root: AnonVma | None = None
    vmas: list[Vma] = field(default_factory=list)
    rwsem: RwSem = field(default_factory=lambda: RwSem("anon_vma", Rank.ANON_VMA))

    @property
    def lock(self) -> RwSem:
        """The lock of the whole family: the root's."""
        return (self.root or self).rwsem


@dataclass(eq=False)
class AddressSpace:
    """struct address_space: the page cache of one file.

    i_pages: its entries. nrpages: pages and subpages among them, values not counted.
    nr_thps: huge pages of a file system that does not know about them (regular files alone).
    i_mmap: the VMAs that map the file. Lock: i_mmap_rwsem.
    wb_err: the last error of writeback, an `errseq` value.
    fail_create_range, fail_stores: make xas_create_range, or the store of a new page at these
        indexes, fail for want of memory, as failslab does.
    """

    key: int
    host: Inode
    i_pages: XArray = field(default_factory=XArray)
    nrpages: int = 0
    nr_thps: int = 0
    i_mmap: list[Vma] = field(default_factory=list)
    i_mmap_rwsem: RwSem = field(default_factory=lambda: RwSem("i_mmap_rwsem", Rank.I_MMAP))
    wb_err: int = 0
    fail_create_range: bool = False
    fail_stores: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Inode:
    """struct inode, as far as memory management looks at it.

    name: of its dentry, for the trace.
    i_size: bytes. i_blocks: 512-byte units, of shmem alone.
    i_writecount: how many open files may write to it; negative denies writing.
    i_nlink: names. Without names, the last File to go takes the inode with it.
    i_count: Files that are open on it.
    i_freeing: it is being evicted (I_FREEING).
    i_rwsem: keeps calls that change contents or size apart (inode_lock).
    """

    name: str
    i_size: int = 0
    i_blocks: int = 0
    i_writecount: int = 0
    i_nlink: int = 1
    i_count: int = 0
    i_freeing: bool = False
    i_rwsem: RwSem = field(default_factory=lambda: RwSem("i_rwsem", Rank.INODE))
    i_mapping: AddressSpace = field(init=False)


@dataclass(eq=False)
class ShmemSuperBlock:
    """struct shmem_sb_info: one tmpfs mount.

    max_blocks, used_blocks: pages; 0 is no limit, and then none are counted.
    huge: mount option huge=, or what `shmem_enabled` makes of it for the kernel's own mount.
    """

    max_blocks: int = 0
    used_blocks: int = 0
    huge: str = "never"
    names: dict[str, ShmemInode] = field(default_factory=dict)


@dataclass(eq=False, kw_only=True)
class ShmemInode(Inode):
    """struct shmem_inode_info. alloced: pages charged. swapped: pages that are on swap.

    fallocend: first page index behind what was ever preallocated.
    flags: VM_NORESERVE if pages are committed one by one, else the whole size was beforehand.
    """

    i_sb: ShmemSuperBlock
    alloced: int = 0
    fallocend: int = 0
    swapped: int = 0
    flags: int = VM_NORESERVE


@dataclass(eq=False, kw_only=True)
class RegularInode(Inode):
    """A file on a disk: `path` on the host, open there as descriptor `fd` until `closer` is called.

    writable: `fd` was opened for writing too.
    """

    path: str
    fd: int
    writable: bool = False
    closer: Callable[[], object] = field(init=False)


@dataclass(eq=False, repr=False)
class File:
    """struct file: an open file. f_count: descriptors and VMAs that refer to it.

    ra_pages: readahead window, in pages (struct file_ra_state). f_wb_err: the `errseq` value of its
    mapping that it was last told of.
    """

    inode: Inode
    readable: bool
    writable: bool
    ra_pages: int
    f_count: int = 1
    f_wb_err: int = 0

    def __repr__(self) -> str:
        modes = "read" * self.readable + " " * (self.readable and self.writable)
        return f"<File {self.inode.name}, {modes}{'write' * self.writable}>"

    @property
    def f_mapping(self) -> AddressSpace:
        """Its page cache."""
        return self.inode.i_mapping


class MmuNotifier(Protocol):
    """A secondary MMU (KVM, an IOMMU) that mirrors page tables: what it is told and asked."""

    def invalidate_range_start(self, start: int, end: int) -> None:
        """Entries of [start, end) are about to go: stop using them."""
        ...

    def invalidate_range_end(self, start: int, end: int) -> None:
        """They are gone."""
        ...

    def test_young(self, addr: int) -> bool:
        """Whether the page at `addr` was used by way of this MMU lately."""
        ...


@dataclass(eq=False)
class Userfaultfd:
    """A userfaultfd context; which VMAs it watches stands in their vm_flags."""

    key: int


@dataclass(eq=False)
class Vma:
    """struct vm_area_struct, [vm_start, vm_end) of one mm. Lock: mmap_lock of the mm.

    vm_file: what it maps; None is anonymous memory. vm_lock: the per-VMA lock.
    anon_shmem: it maps shmem that had no name then (vma_is_anon_shmem).
    """

    mm: Mm
    vm_start: int
    vm_end: int
    vm_flags: int
    vm_pgoff: int
    anon_vma: AnonVma | None = None
    # Every anon_vma whose pages may lie here: the family's, the own one last.
    anon_vma_chain: list[AnonVma] = field(default_factory=list)
    userfaultfd_ctx: Userfaultfd | None = None
    vm_file: File | None = None
    anon_shmem: bool = False
    vm_lock: RwSem = field(default_factory=lambda: RwSem("vm_lock", Rank.VMA_LOCK))

    def linear_page_index(self, addr: int) -> int:
        """page->index of the page at `addr`."""
        return self.vm_pgoff + ((addr - self.vm_start) >> PAGE_SHIFT)

    def address_of(self, index: int) -> int:
        """Where page `index` of the mapping lies here, if it does (vma_address)."""
        return self.vm_start + ((index - self.vm_pgoff) << PAGE_SHIFT)

    def may_write(self) -> bool:
        """VM_MAYWRITE: whether it is, or mprotect could make it, writable."""
        return not self.vm_flags & VM_SHARED or self.vm_file is None or self.vm_file.writable

    def userfaultfd_armed(self) -> bool:
        """Whether a userfaultfd watches it for anything."""
        return bool(self.vm_flags & VM_UFFD_FLAGS)

    def __str__(self) -> str:
        return f"{self.vm_start:012x}-{self.vm_end:012x}"


@dataclass(eq=False, repr=False)
class Mm:
    """struct mm_struct.

    vmas: sorted by address, not overlapping. Lock: mmap_lock.
    pmd_tables: page frame of the PMD table of each GiB that has one. Lock: mmap_lock.
    detached: PMD words that a collapse in progress has taken out, by address. Lock: mmap_lock.
    deposits: page tables kept for the huge PMDs of each GiB, oldest first. Lock: page_table_lock.
    rss_stat: MM_FILEPAGES, MM_ANONPAGES, MM_SWAPENTS, MM_SHMEMPAGES.
    mm_users: 0 once the process is exiting.
    tlb_gen: how often a collapse has flushed its TLBs.
    mm_slot: its place in the daemon's list, once it is registered (MMF_VM_HUGEPAGE).
    files: open files.
    signals: those that wait for the process. mce_kill: "early", "late" or "default" (PR_MCE_KILL).
    """

    name: str
    hashed_ptr: int
    memcg: MemCgroup
    mm_users: int = 1
    flags: int = 0
    mmap_lock: RwSem = field(default_factory=lambda: RwSem("mmap_lock", Rank.MMAP_LOCK))
    page_table_lock: Spinlock = field(default_factory=lambda: Spinlock("page_table_lock"))
    vmas: list[Vma] = field(default_factory=list)
    pmd_tables: dict[int, int] = field(default_factory=dict)
    detached: dict[int, int] = field(default_factory=dict)
    deposits: dict[int, list[int]] = field(default_factory=dict)
    rss_stat: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    pgtables_bytes: int = 0
    preferred_node: int = 0
    mmu_notifiers: list[MmuNotifier] = field(default_factory=list)
    tlb_gen: int = 0
    mm_slot: MmSlot | None = None
    task: Task[Any] | None = None
    signals: list[Signal] = field(default_factory=list)
    mce_kill: str = "default"
    files: list[File] = field(default_factory=list)
    mmap_base: int = 0x7F00_0000_0000

    def __repr__(self) -> str:
        return f"<Mm {self.name}, {len(self.vmas)} VMAs>"


@dataclass(eq=False)
class MmSlot:
    """struct khugepaged_mm_slot: an mm that the daemon visits.

    pte_mapped_thp: its blocks whose page is huge and whose entries are small, for the next visit.
    """

    mm: Mm
    pte_mapped_thp: list[int] = field(default_factory=list)


@dataclass(eq=False)
class KhugepagedScan:
    """struct khugepaged_scan: the daemon's cursor.

    mm_head: every registered mm, in the order of the visits.
    mm_slot: where the daemon is; None between two rounds. address: where it goes on in that mm.
    wakeup: called when the list is empty no more.
    """

    mm_head: list[MmSlot] = field(default_factory=list)
    mm_slot: MmSlot | None = None
    address: int = 0
    wakeup: Callable[[], None] = lambda: None
