"""How a block of a file, on a disk or of shmem, comes to each scan result that it can have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SIZE
from pykhuge.kernel.locking import READ, Holder, Mode, RwSem
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.mm.fault import vma_lookup
from pykhuge.mm.gup import LockedPage
from pykhuge.mm.mm_types import File
from pykhuge.mm.new_pages import pte_table
from pykhuge.mm.page import PG_head
from pykhuge.mm.page_writeback import set_page_dirty
from pykhuge.mm.rmap import anon_vma_prepare, pmd_of
from pykhuge.mm.swap import isolate_lru_pages, putback_lru_pages
from pykhuge.process import PROT_READ, Advice
from pykhuge.tools.acceptance.scan_kit import (
    Block,
    Case,
    content,
    disk_block,
    new_machine,
    shmem_block,
)
from pykhuge.tools.acceptance.scenario import check

__all__ = ["CASES"]

GIB = 1 << 30
S = ScanResult
# The scan is over, and collapse_file about to allocate.
SCANNED = ("scanned",)
# The huge page is complete, and page tables about to be retracted.
COPIED = ("copied",)
# MADV_COLLAPSE is done with its first block, and comes back to the VMA for the second.
SECOND_BLOCK = ("copied", "acquire mmap_lock for read")
# MADV_COLLAPSE has met a huge page in the cache, and will map it.
PTE_MAPPED = ("acquire mmap_lock for write",)


def file_of(block: Block) -> File:
    """What is mapped there."""
    assert block.file is not None
    return block.file


def full_shmem() -> Block:
    """All pages of a memfd are there and mapped."""
    return shmem_block()


def full_file() -> Block:
    """All pages of a file of the host are cached and mapped."""
    return disk_block()


def two_blocks() -> Block:
    """Two blocks of a memfd."""
    return shmem_block(nr_blocks=2)


def dirty() -> Block:
    """By hand: a page is dirty, as the last writer may have left it."""
    block = disk_block()
    set_page_dirty(block.machine.mem, np.array([block.pfn(9)]))
    block.at_end.callback(block.machine.finish_io)
    return block


def lost_by_swap() -> Block:
    """A page is on swap, and the device cannot read it."""
    block = shmem_block()
    block.advise(Advice.MADV_PAGEOUT, range(9, 10))
    block.machine.mem.swap.bad.add(-file_of(block).f_mapping.i_pages.load(9))
    return block


def no_pmd_table() -> Block:
    """The process has touched nothing there: it has no page table in that GiB."""
    return shmem_block(touched=False, addr=5 * GIB)


def empty_pmd() -> Block:
    """The process has touched the next block alone."""
    block = shmem_block(nr_blocks=2, touched=False, addr=5 * GIB)
    block.process.read(block.addr + HPAGE_PMD_SIZE, 1)
    block.length = HPAGE_PMD_SIZE
    return block


def too_few_present() -> Block:
    """One page fewer than max_ptes_none wants."""
    block = shmem_block(pages=range(300))
    block.machine.khugepaged_settings.max_ptes_none = 211
    return block


def too_much_on_swap() -> Block:
    """max_ptes_swap, and one more."""
    block = shmem_block()
    block.advise(Advice.MADV_PAGEOUT, range(65))
    return block


def watched() -> Block:
    """A userfaultfd protects it against writes: its page table may hold markers, and stays."""
    block = shmem_block()
    block.process.userfaultfd().register(block.addr, HPAGE_PMD_SIZE, missing=False, wp=True)
    return block


def huge_already() -> Block:
    """The cache holds a huge page, and the PMD is empty."""
    block = shmem_block()
    block.machine.collapse(block.process, block.addr)
    return block


def far_apart() -> Block:
    """Part of it lies on a node beyond the reclaim distance, with node reclaim on."""
    machine = new_machine(nodes=2, distances=[[10, 40], [40, 10]])
    machine.node_reclaim_mode = 1
    block = shmem_block(machine, pages=range(300))
    block.process.node = 1
    rest = range(300, HPAGE_PMD_NR)
    block.process.pwrite(file_of(block), rest.start * PAGE_SIZE, content(rest))
    return block


def held() -> Block:
    """Somebody reads a page by way of a pipe."""
    block = shmem_block()
    block.at_end.callback(block.process.get(block.page(9), PAGE_SIZE).release)
    return block


def isolated() -> Block:
    """By hand: a page is off its LRU list, as a reclaim takes it."""
    block = shmem_block()
    mem, one = block.machine.mem, np.array([block.pfn(9)])
    isolate_lru_pages(mem, one)
    block.at_end.callback(putback_lru_pages, mem, one)
    return block


def large_folio() -> Block:
    """By hand: a page has become the head of a larger folio, as some file systems make them."""
    block = shmem_block()
    block.set_flag(8, PG_head, on=True)
    return block


def swapped() -> Block:
    """A page is on swap; brought in, it waits in the LRU batch."""
    block = shmem_block()
    block.advise(Advice.MADV_PAGEOUT, range(9, 10))
    return block


def no_huge_page_left() -> Block:
    """Memory is full but for a few pages."""
    machine = new_machine("8M")
    block = shmem_block(machine)
    hog, nr = machine.process("hog"), machine.vmstat()["nr_free_pages"] - 16
    hog.write(hog.mmap(nr * PAGE_SIZE), bytes(nr * PAGE_SIZE))
    return block


def cgroup_is_full() -> Block:
    """The cgroup's limit leaves no room for a huge page beside the small ones."""
    machine = new_machine()
    return shmem_block(machine, memcg=machine.memcg((HPAGE_PMD_NR + 100) * PAGE_SIZE))


def no_pages() -> Block:
    """All of it has been punched out."""
    block = shmem_block()
    punch_out(block)
    return block


def journalled() -> Block:
    """The file system does not let go of what it keeps with a page."""
    block = disk_block()
    block.process.attach_private(file_of(block), 9, releasable=False)
    return block


def no_memory_for_a_slot() -> Block:
    """The xarray cannot store the huge page in the one hole."""
    block = shmem_block(pages=range(511))
    file_of(block).f_mapping.fail_stores.add(511)
    return block


def poisoned_shmem() -> Block:
    """A cache line is bad, and nobody knows."""
    block = shmem_block()
    block.process.poison(block.page(100), 3)
    return block


def poisoned_file() -> Block:
    """The same in the cache of a file of the host."""
    block = disk_block()
    block.process.poison(block.page(100), 3)
    return block


def punch_out(block: Block) -> None:
    """All pages go."""
    block.process.fallocate(file_of(block), 0, HPAGE_PMD_SIZE, punch_hole=True)


def lock(block: Block) -> None:
    """Somebody locks a page."""
    mem, pfn = block.machine.mem, block.pfn(9)
    mem.pages.refcount[pfn] += 1
    block.at_end.callback(LockedPage(mem, pfn).release)


def begin_to_exit(block: Block) -> None:
    """The process exits, and has not come to its page tables yet."""
    leaving = block.machine.spawn(block.process.exit.steps(), "app")
    leaving.run_until("acquire mmap_lock for write")
    block.at_end.callback(leaving.finish)


def unmap_all(block: Block) -> None:
    """Both blocks are unmapped."""
    block.process.munmap(block.addr, block.length)


def cut_off(block: Block) -> None:
    """The last page of the second block is unmapped."""
    block.process.munmap(block.addr + block.length - PAGE_SIZE, PAGE_SIZE)


def forbid(block: Block) -> None:
    """MADV_NOHUGEPAGE."""
    block.process.madvise(block.addr, block.length, Advice.MADV_NOHUGEPAGE)


class _Interrupted(RwSem):
    """A lock, and what another CPU does just before it is tried."""

    __slots__ = ("_before",)

    def __init__(self, lock: RwSem, before: Callable[[], object]) -> None:
        super().__init__(lock.name, lock.rank)
        self._before = before

    def trylock(self, holder: Holder, mode: Mode) -> bool:
        """The same, a moment later."""
        self._before()
        return super().trylock(holder, mode)


def private_write_comes_between(block: Block) -> None:
    """A write to the private mapping begins between the two looks at its anon_vma.

    It has its anon_vma then, and waits for the page. The model takes the two looks in one step;
    the write comes in by way of the lock that is tried between them.
    """
    mem, mm = block.machine.mem, block.process.mm
    vma = vma_lookup(mm, block.addr)
    assert vma is not None
    mm.mmap_lock = _Interrupted(mm.mmap_lock, partial(anon_vma_prepare, mem, vma))


def hold_mmap_lock(block: Block) -> None:
    """Somebody holds mmap_lock while page tables are retracted.

    The block is noted then, and khugepaged frees its page table when it comes by again.
    """
    machine, mm = block.machine, block.process.mm
    holder = machine.spawn(block.process.mprotect.steps(block.addr, PAGE_SIZE, PROT_READ), "app")
    mm.mmap_lock.lock(holder, READ)

    def come_by_again() -> None:
        mm.mmap_lock.unlock(holder)
        check(bool(pmd_of(machine.mem, mm, block.addr)), "the page table left alone")
        machine.khugepaged.step()
        check(not pmd_of(machine.mem, mm, block.addr), "the page table freed by khugepaged")

    block.at_end.callback(come_by_again)


# A huge page in the cache, mapped by MADV_COLLAPSE: collapse_pte_mapped_thp.


def mapped_by_ptes() -> Block:
    """The cache is huge, and the process maps it by 512 entries.

    A fault finds an empty page table there, as one does that had to wait when it had made it.
    """
    block = huge_already()
    pte_table(block.machine.mem, block.process.mm, block.addr)
    block.process.read(block.addr, HPAGE_PMD_SIZE)
    return block


def mapped_by_pmd() -> Block:
    """The cache is huge, and so is the PMD."""
    block = huge_already()
    block.process.read(block.addr, 1)
    return block


def huge_without_pmd_table() -> Block:
    """The cache is huge; the process has no page table in that GiB."""
    block = huge_already()
    process = block.process
    process.munmap(block.addr, HPAGE_PMD_SIZE)
    block.addr = process.mmap(
        HPAGE_PMD_SIZE, addr=5 * GIB, fixed=True, file=file_of(block), shared=True
    )
    return block


def huge_and_watched() -> Block:
    """The same as `mapped_by_ptes`, with a userfaultfd that protects it against writes."""
    block = mapped_by_ptes()
    block.process.userfaultfd().register(block.addr, HPAGE_PMD_SIZE, missing=False, wp=True)
    return block


def private_copy() -> Block:
    """The cache is huge, and a private mapping of it has a page of its own."""
    block = huge_already()
    process = block.process
    block.addr = process.mmap(HPAGE_PMD_SIZE, file=file_of(block))
    process.write(block.page(7), b"mine")
    block.machine.lru_add_drain_all()
    return block


def private_copy_on_swap() -> Block:
    """The same, and that page is on swap."""
    block = private_copy()
    block.advise(Advice.MADV_PAGEOUT, range(7, 8))
    return block


K_SHMEM, M_SHMEM = ("khugepaged shmem",), ("madvise shmem",)
K_FILE, M_FILE = ("khugepaged file",), ("madvise file",)
SHMEM, FILE = K_SHMEM + M_SHMEM, K_FILE + M_FILE
PTES = ("pte-mapped shmem",)
CASES = (
    Case(S.SCAN_FAIL, lost_by_swap, SHMEM),
    Case(S.SCAN_FAIL, dirty, FILE),
    Case(S.SCAN_FAIL, private_copy, PTES),
    Case(S.SCAN_SUCCEED, full_shmem, SHMEM),
    Case(S.SCAN_SUCCEED, full_file, FILE),
    Case(S.SCAN_SUCCEED, mapped_by_ptes, PTES),
    Case(S.SCAN_PMD_NULL, no_pmd_table, SHMEM),
    Case(S.SCAN_PMD_NULL, huge_without_pmd_table, PTES),
    Case(S.SCAN_PMD_NONE, empty_pmd, SHMEM),
    Case(S.SCAN_PMD_MAPPED, mapped_by_pmd, PTES),
    Case(S.SCAN_EXCEED_NONE_PTE, too_few_present, K_SHMEM),
    Case(S.SCAN_EXCEED_SWAP_PTE, too_much_on_swap, K_SHMEM),
    Case(S.SCAN_PTE_NON_PRESENT, private_copy_on_swap, PTES),
    Case(S.SCAN_PTE_UFFD_WP, watched, SHMEM),
    Case(S.SCAN_PTE_UFFD_WP, huge_and_watched, PTES),
    Case(S.SCAN_PTE_MAPPED_HUGEPAGE, huge_already, SHMEM),
    Case(S.SCAN_PTE_MAPPED_HUGEPAGE, full_shmem, K_SHMEM, hold_mmap_lock, COPIED, "trylock lost"),
    Case(S.SCAN_PAGE_NULL, mapped_by_ptes, PTES, punch_out, PTE_MAPPED),
    Case(S.SCAN_SCAN_ABORT, far_apart, SHMEM),
    Case(S.SCAN_PAGE_COUNT, held, SHMEM),
    Case(S.SCAN_PAGE_LRU, isolated, SHMEM),
    Case(S.SCAN_PAGE_LOCK, full_shmem, SHMEM, lock, SCANNED),
    Case(S.SCAN_PAGE_ANON, full_file, FILE, private_write_comes_between, COPIED),
    Case(S.SCAN_PAGE_COMPOUND, large_folio, SHMEM),
    Case(S.SCAN_ANY_PROCESS, full_shmem, K_SHMEM, begin_to_exit, COPIED),
    Case(S.SCAN_VMA_NULL, two_blocks, M_SHMEM, unmap_all, SECOND_BLOCK),
    Case(S.SCAN_VMA_CHECK, two_blocks, M_SHMEM, forbid, SECOND_BLOCK),
    Case(S.SCAN_VMA_CHECK, mapped_by_ptes, PTES, unmap_all, PTE_MAPPED),
    Case(S.SCAN_ADDRESS_RANGE, two_blocks, M_SHMEM, cut_off, SECOND_BLOCK),
    Case(S.SCAN_DEL_PAGE_LRU, swapped, SHMEM),
    Case(S.SCAN_ALLOC_HUGE_PAGE_FAIL, no_huge_page_left, SHMEM),
    Case(S.SCAN_CGROUP_CHARGE_FAIL, cgroup_is_full, SHMEM),
    Case(S.SCAN_TRUNCATED, full_shmem, K_SHMEM, punch_out, SCANNED),
    Case(S.SCAN_TRUNCATED, no_pages, M_SHMEM),
    Case(S.SCAN_PAGE_HAS_PRIVATE, journalled, FILE),
    Case(S.SCAN_STORE_FAILED, no_memory_for_a_slot, SHMEM),
    Case(S.SCAN_COPY_MC, poisoned_shmem, SHMEM),
    Case(S.SCAN_COPY_MC, poisoned_file, FILE),
)
