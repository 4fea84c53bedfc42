"""How a block of anonymous memory comes to each scan result that it can have."""

from __future__ import annotations

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SIZE
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.mm.page import PG_lru
from pykhuge.mm.page_table import PAGE_ACCESSED, pte_pfn
from pykhuge.mm.rmap import pmd_of
from pykhuge.mm.vmstat import NR_INACTIVE_ANON
from pykhuge.process import Advice
from pykhuge.tools.acceptance.scan_kit import (
    Block,
    Case,
    anon_block,
    content,
    new_machine,
)

__all__ = ["CASES"]

GIB = 1 << 30
S = ScanResult
# Here a collapse has its huge page, has dropped mmap_lock, and will look at everything anew.
SCANNED = ("acquire mmap_lock for read",)


def full() -> Block:
    """All pages are there."""
    return anon_block()


def swap_cannot_be_read() -> Block:
    """Three pages are on swap, and the device loses one."""
    block = anon_block()
    block.advise(Advice.MADV_PAGEOUT, range(5, 8))
    block.process.fail_swap_reads(block.page(6))
    return block


def no_pmd_table() -> Block:
    """The block lies in a GiB that has no page table; the VMA has pages in the next."""
    block = anon_block(pages=range(1), addr=5 * GIB - HPAGE_PMD_SIZE, nr_blocks=2)
    block.process.munmap(block.addr, HPAGE_PMD_SIZE)
    block.process.mmap(HPAGE_PMD_SIZE, addr=block.addr, fixed=True)
    block.advise(Advice.MADV_HUGEPAGE)
    block.length = HPAGE_PMD_SIZE
    return block


def empty_pmd() -> Block:
    """The VMA has pages in its second block alone."""
    block = anon_block(nr_blocks=2)
    block.process.munmap(block.addr, HPAGE_PMD_SIZE)
    block.process.mmap(HPAGE_PMD_SIZE, addr=block.addr, fixed=True)
    block.advise(Advice.MADV_HUGEPAGE)
    block.length = HPAGE_PMD_SIZE
    return block


def huge_already() -> Block:
    """It has been collapsed before."""
    block = anon_block()
    block.machine.collapse(block.process, block.addr)
    return block


def too_many_holes() -> Block:
    """max_ptes_none, and one more."""
    block = anon_block(pages=range(101, HPAGE_PMD_NR))
    block.machine.khugepaged_settings.max_ptes_none = 100
    return block


def watched_hole() -> Block:
    """A userfaultfd waits for a fault in the one hole."""
    block = anon_block(pages=range(1, HPAGE_PMD_NR))
    block.process.userfaultfd().register(block.addr, HPAGE_PMD_SIZE, missing=True)
    return block


def too_much_on_swap() -> Block:
    """max_ptes_swap, and one more."""
    block = anon_block()
    block.advise(Advice.MADV_PAGEOUT, range(65))
    return block


def too_much_shared() -> Block:
    """A child shares max_ptes_shared pages, and one more."""
    block = anon_block()
    block.process.fork("child")
    block.fill(range(HPAGE_PMD_NR - 257))
    return block


def write_protected() -> Block:
    """A userfaultfd has write-protected a page."""
    block = anon_block()
    uffd = block.process.userfaultfd()
    uffd.register(block.addr, HPAGE_PMD_SIZE, missing=False, wp=True)
    uffd.writeprotect(block.page(9), PAGE_SIZE)
    return block


def nothing_writable() -> Block:
    """A child that has exited has left every entry write-protected."""
    block = anon_block()
    block.process.fork("child").exit()
    return block


def forgotten() -> Block:
    """Nobody has used a page lately: accessed bits are cleared as aging clears them."""
    block = anon_block()
    pmd = pmd_of(block.machine.mem, block.process.mm, block.addr)
    assert pmd
    block.machine.mem.ram.words[pte_pfn(pmd)] &= np.uint64(~PAGE_ACCESSED & (1 << 64) - 1)
    return block


def device_page() -> Block:
    """A page lives on a device."""
    block = anon_block(new_machine(device_memory="2M"))
    block.process.migrate_to_device(block.page(40))
    return block


def far_apart() -> Block:
    """Half of it lies on a node beyond the reclaim distance, with node reclaim on."""
    machine = new_machine(nodes=2, distances=[[10, 40], [40, 10]])
    machine.node_reclaim_mode = 1
    block = anon_block(machine, pages=range(256))
    block.process.node = 1
    block.fill(range(256, HPAGE_PMD_NR))
    return block


def pinned() -> Block:
    """A device has a page for DMA."""
    block = anon_block()
    block.at_end.callback(block.process.pin(block.page(511), 1).release)
    return block


def isolated_by_another() -> Block:
    """A child's collapse of the same pages is in the middle of its copy."""
    block = anon_block(pages=range(1, HPAGE_PMD_NR))
    machine, child = block.machine, block.process.fork("child")
    child.write(block.addr, content(range(1)))
    block.fill(range(1))
    machine.khugepaged_settings.max_ptes_shared = HPAGE_PMD_NR - 1
    other = machine.spawn(machine.collapse.steps(child, block.addr), "khugepaged")
    other.run_until("copied")
    block.at_end.callback(other.finish)
    return block


def locked() -> Block:
    """A page is locked."""
    block = anon_block()
    block.at_end.callback(block.process.lock_page(block.page(17)).release)
    return block


def no_huge_page_left() -> Block:
    """A page is in use in every 2 MiB of memory."""
    machine = new_machine("8M")
    block = anon_block(machine)
    process, nr = block.process, machine.vmstat()["nr_free_pages"] - 16
    filler = process.mmap(nr * PAGE_SIZE)
    process.write(filler, bytes(nr * PAGE_SIZE))
    machine.lru_add_drain_all()
    kept: set[int] = set()
    for page in range(filler, filler + nr * PAGE_SIZE, PAGE_SIZE):
        where = (process.pfn(page) or 0) // HPAGE_PMD_NR
        if where in kept:
            process.madvise(page, PAGE_SIZE, Advice.MADV_DONTNEED)
        kept.add(where)
    machine.lru_add_drain_all()
    return block


def cgroup_is_full() -> Block:
    """The cgroup's limit leaves no room for a huge page beside the small ones."""
    machine = new_machine()
    return anon_block(machine, memcg=machine.memcg((HPAGE_PMD_NR + 100) * PAGE_SIZE))


def poisoned() -> Block:
    """A cache line is bad, and nobody knows."""
    block = anon_block()
    block.process.poison(block.page(100), 3)
    return block


def swap_out(block: Block) -> None:
    """A page goes to swap."""
    block.advise(Advice.MADV_PAGEOUT, range(77, 78))


def become_a_file(block: Block) -> None:
    """A memfd is mapped in its place."""
    process = block.process
    file = process.memfd_create("instead")
    process.ftruncate(file, HPAGE_PMD_SIZE)
    process.mmap(HPAGE_PMD_SIZE, addr=block.addr, fixed=True, file=file)
    block.advise(Advice.MADV_HUGEPAGE)


def exit_process(block: Block) -> None:
    """The process exits."""
    block.process.exit()


def unmap(block: Block) -> None:
    """It is unmapped, and nothing lies above."""
    block.process.munmap(block.addr, HPAGE_PMD_SIZE)


def forbid(block: Block) -> None:
    """MADV_NOHUGEPAGE."""
    block.advise(Advice.MADV_NOHUGEPAGE)


def cut_off(block: Block) -> None:
    """Its last page is unmapped."""
    block.process.munmap(block.page(511), PAGE_SIZE)


def lose_from_lru(block: Block) -> None:
    """By hand: a page is on no list for a moment, as between two instructions of a reclaim."""
    block.set_flag(200, PG_lru, on=False)
    block.machine.mem.vmstat.mod_node(NR_INACTIVE_ANON, -1)
    block.at_end.callback(block.machine.mem.vmstat.mod_node, NR_INACTIVE_ANON, +1)


K, M = ("khugepaged anon",), ("madvise anon",)
BOTH = K + M
CASES = (
    Case(S.SCAN_FAIL, swap_cannot_be_read, BOTH),
    Case(S.SCAN_SUCCEED, full, BOTH),
    Case(S.SCAN_PMD_NULL, no_pmd_table, BOTH),
    Case(S.SCAN_PMD_NONE, empty_pmd, BOTH),
    Case(S.SCAN_PMD_MAPPED, huge_already, BOTH),
    Case(S.SCAN_EXCEED_NONE_PTE, too_many_holes, K),
    Case(S.SCAN_EXCEED_NONE_PTE, watched_hole, M),
    Case(S.SCAN_EXCEED_SWAP_PTE, too_much_on_swap, K),
    Case(S.SCAN_EXCEED_SHARED_PTE, too_much_shared, K),
    Case(S.SCAN_PTE_NON_PRESENT, full, BOTH, swap_out, SCANNED),
    Case(S.SCAN_PTE_UFFD_WP, write_protected, BOTH),
    Case(S.SCAN_PAGE_RO, nothing_writable, BOTH),
    Case(S.SCAN_LACK_REFERENCED_PAGE, forgotten, K),
    Case(S.SCAN_PAGE_NULL, device_page, BOTH),
    Case(S.SCAN_SCAN_ABORT, far_apart, BOTH),
    Case(S.SCAN_PAGE_COUNT, pinned, BOTH),
    Case(S.SCAN_PAGE_LRU, isolated_by_another, BOTH),
    Case(S.SCAN_PAGE_LOCK, locked, BOTH),
    Case(S.SCAN_PAGE_ANON, full, BOTH, become_a_file, SCANNED),
    Case(S.SCAN_ANY_PROCESS, full, K, exit_process, SCANNED),
    Case(S.SCAN_VMA_NULL, full, BOTH, unmap, SCANNED),
    Case(S.SCAN_VMA_CHECK, full, BOTH, forbid, SCANNED),
    Case(S.SCAN_ADDRESS_RANGE, full, BOTH, cut_off, SCANNED),
    Case(S.SCAN_DEL_PAGE_LRU, full, BOTH, lose_from_lru, SCANNED),
    Case(S.SCAN_ALLOC_HUGE_PAGE_FAIL, no_huge_page_left, BOTH),
    Case(S.SCAN_CGROUP_CHARGE_FAIL, cgroup_is_full, BOTH),
    Case(S.SCAN_COPY_MC, poisoned, BOTH),
)
