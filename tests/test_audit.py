"""The audit is itself tested: one thing corrupted by hand, and it must name that thing."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    advised,
    compound_block,
    fill,
    pageout,
    paused,
    pfn_of,
    ptes_of,
)

from pykhuge import KernelBug, Machine, Process, ScanResult
from pykhuge.kernel.locking import READ
from pykhuge.mm import page as pg
from pykhuge.mm import vmstat as vs
from pykhuge.mm.page_table import PAGE_RW, make_swap_pte
from pykhuge.mm.rmap import pmd_of, set_pmd


class Scene(NamedTuple):
    """A machine with something of everything, sound until it is corrupted."""

    machine: Machine
    process: Process
    child: Process
    block: int
    huge: int
    compound: int

    @property
    def mem(self) -> Any:
        return self.machine.mem

    def pfn(self, page: int = 0) -> int:
        """An exclusive base page on the LRU."""
        return pfn_of(self.process, self.block, page)

    @property
    def head(self) -> int:
        """The huge page, mapped by a PMD."""
        return pfn_of(self.process, self.huge, 0)


@pytest.fixture
def scene() -> Scene:
    machine = Machine("64M", swap="4M", cpus=2)
    process = machine.process("app", memcg=machine.memcg("32M"))
    block, huge = advised(process), advised(process)
    fill(process, block, [100, 101])
    child = process.fork("child")
    fill(process, block, range(50))
    fill(process, huge)
    machine.lru_add_drain_all()
    pageout(process, block, [40, 41])
    machine.collapse(process, huge)
    compound = compound_block(process)
    machine.lru_add_drain_all()
    process.read(block + 41 * PAGE, 1)  # in the swap cache, and in the batch
    process.mlock(process.mmap(PAGE), PAGE)
    machine.audit()
    return Scene(machine, process, child, block, huge, compound)


def flag(bit: int) -> Callable[[Scene], None]:
    """Toggle a flag of a base page."""

    def corrupt(scene: Scene) -> None:
        scene.mem.pages.flags[scene.pfn()] ^= np.uint32(bit)

    return corrupt


def node_stat(item: int) -> Callable[[Scene], None]:
    def corrupt(scene: Scene) -> None:
        scene.mem.vmstat.node[0][item] += 1

    return corrupt


def mm_stat(item: int) -> Callable[[Scene], None]:
    def corrupt(scene: Scene) -> None:
        scene.process.mm.rss_stat[item] -= 1

    return corrupt


def field(name: str, delta: int = 1) -> Callable[[Scene], None]:
    """Add to a field of a base page."""

    def corrupt(scene: Scene) -> None:
        getattr(scene.mem.pages, name)[scene.pfn()] += delta

    return corrupt


def head_field(name: str) -> Callable[[Scene], None]:
    """Add to a field of the huge page."""

    def corrupt(scene: Scene) -> None:
        getattr(scene.mem.pages, name)[scene.head] += 1

    return corrupt


def subpage_mapcount(scene: Scene) -> None:
    scene.mem.pages.mapcount[pfn_of(scene.process, scene.compound, 9)] += 1


def leaked_page(scene: Scene) -> None:
    """A frame with a reference that nobody has."""
    free = scene.mem.nodes[0].high * NR - 1
    scene.mem.pages.refcount[free] += 1


def lost_table(scene: Scene) -> None:
    table = pmd_of(scene.mem, scene.process.mm, scene.block)
    assert table
    scene.mem.pages.flags[table >> 12 & 0xFFFFFFFFF] &= ~np.uint32(pg.PG_table)


def lost_deposit(scene: Scene) -> None:
    scene.process.mm.deposits[scene.huge >> 30].pop()


def pgtables(scene: Scene) -> None:
    scene.process.mm.pgtables_bytes += PAGE


def unmapped_entry(scene: Scene) -> None:
    ptes_of(scene.process, scene.block)[7] = 0


def writable_shared(scene: Scene) -> None:
    ptes_of(scene.child, scene.block)[100] |= np.uint64(PAGE_RW)


def writable_huge(scene: Scene) -> None:
    scene.mem.pages.flags[scene.head] &= ~np.uint32(pg.PG_anon_exclusive)


def exclusive_shared(scene: Scene) -> None:
    pfn = pfn_of(scene.child, scene.block, 100)
    scene.mem.pages.flags[pfn] |= np.uint32(pg.PG_anon_exclusive)


def wrong_anon_vma(scene: Scene) -> None:
    scene.mem.pages.mapping[scene.pfn()] += 1000


def wrong_index(scene: Scene) -> None:
    scene.mem.pages.index[scene.head] += 1


def no_vma(scene: Scene) -> None:
    vma = next(each for each in scene.child.mm.vmas if each.vm_start <= scene.block < each.vm_end)
    scene.child.mm.vmas.remove(vma)


def huge_beyond_vma(scene: Scene) -> None:
    mm = scene.process.mm
    vma = next(each for each in mm.vmas if each.vm_start <= scene.huge < each.vm_end)
    vma.vm_end = scene.huge + PAGE


def huge_none(scene: Scene) -> None:
    set_pmd(scene.mem, scene.process.mm, scene.huge, 0)


def batched_and_listed(scene: Scene) -> None:
    scene.mem.lru_batches[1].append(scene.pfn())
    scene.mem.pages.refcount[scene.pfn()] += 1


def locked(scene: Scene) -> None:
    scene.mem.pages.flags[scene.pfn()] |= np.uint32(pg.PG_locked)


def used_blocks(scene: Scene) -> None:
    scene.mem.nodes[0].used[0] += 1


def swap_map(scene: Scene) -> None:
    slot = next(iter(scene.mem.swap.swap_map))
    scene.mem.swap.swap_map[slot] += 1


def leaked_slot(scene: Scene) -> None:
    scene.mem.swap.swap_map[scene.mem.swap.next_slot] = 0
    scene.mem.swap.next_slot += 1


def swap_entry(scene: Scene) -> None:
    ptes_of(scene.process, scene.block)[300] = make_swap_pte(0, 77)


def cached_slot(scene: Scene) -> None:
    (pfn,) = scene.mem.swap.cache.values()
    scene.mem.pages.private[pfn] += 1


def lost_cache(scene: Scene) -> None:
    scene.mem.swap.cache.clear()


def slot_numbers(scene: Scene) -> None:
    scene.mem.swap.next_slot += 1


def memcg_usage(scene: Scene) -> None:
    scene.mem.memcgs[1].usage += 1


def memcg_page(scene: Scene) -> None:
    scene.mem.pages.memcg[scene.pfn()] = 0


def spinlock(scene: Scene) -> None:
    scene.process.mm.page_table_lock.held = True


def mmap_lock(scene: Scene) -> None:
    scene.process.mm.mmap_lock.lock(scene.process.task, READ)


def anon_vma_lock(scene: Scene) -> None:
    scene.process.mm.vmas[0].anon_vma.lock.lock(scene.process.task, READ)  # type: ignore[union-attr]


CORRUPTIONS: dict[str, tuple[Callable[[Scene], None], str]] = {
    "refcount": (field("refcount"), r"page 0x[0-9a-f]+: refcount is 2, recount 1"),
    "refcount lost": (field("refcount", -1), r"refcount is 0, recount 1"),
    "mapcount": (field("mapcount"), r"mapcount is 2, recount 1"),
    "mapcount of a subpage": (subpage_mapcount, r"mapcount is 2, recount 1"),
    "entire_mapcount": (head_field("entire_mapcount"), r"entire_mapcount is 2, recount 1"),
    "refcount of a head": (head_field("refcount"), r"refcount is 2, recount 1"),
    "pincount": (head_field("pincount"), r"pincount is 1, recount 0"),
    "leaked page": (leaked_page, r"refcount is 1, recount 0"),
    "PG_lru": (flag(pg.PG_lru), r"node0: nr_inactive_anon is \d+, recount \d+"),
    "PG_active": (flag(pg.PG_active), r"node0: nr_active_anon is 0, recount 1"),
    "PG_unevictable": (flag(pg.PG_unevictable), r"node0: nr_unevictable is 0, recount 1"),
    "PG_swapbacked": (flag(pg.PG_swapbacked), r"node0: nr_inactive_file is 0, recount 1"),
    "PG_mlocked": (flag(pg.PG_mlocked), r"node0: nr_mlock is 1, recount 2"),
    "PG_swapcache": (flag(pg.PG_swapcache), r"node0: nr_swapcached is 1, recount 2"),
    "PG_isolated": (flag(pg.PG_isolated), r"node0: nr_isolated_anon is 0, recount 1"),
    "PG_locked": (locked, r"is locked, and nobody has isolated it"),
    "PG_table": (flag(pg.PG_table), r"node0: nr_page_table_pages is \d+, recount \d+"),
    "PG_table lost": (lost_table, r"page-table pages are not those that the address spaces use"),
    "deposit lost": (lost_deposit, r"deposited tables of GiB \d+ is \d, recount \d"),
    "pgtables_bytes": (pgtables, r"pgtables_bytes is \d+, recount \d+"),
    "PTE lost": (unmapped_entry, r"MM_ANONPAGES is \d+, recount \d+"),
    "PMD lost": (huge_none, r"entire_mapcount is 1, recount 0"),
    "writable shared PTE": (writable_shared, r"is writable but not exclusive"),
    "writable shared PMD": (writable_huge, r"huge page 0x[0-9a-f]+ is writable but not exclusive"),
    "exclusive shared page": (exclusive_shared, r"exclusive page 0x[0-9a-f]+ is mapped more than"),
    "mapping": (wrong_anon_vma, r"rmap does not find the page mapped at 0x"),
    "index": (wrong_index, r"rmap does not find the page mapped at 0x"),
    "VMA lost": (no_vma, r"is mapped at 0x[0-9a-f]+, outside of any VMA"),
    "VMA cut": (huge_beyond_vma, r"a huge PMD at 0x[0-9a-f]+ reaches beyond its VMA"),
    "in batch and on list": (batched_and_listed, r"is in an LRU batch and on a list"),
    "used frames": (used_blocks, r"node0: used pages of block 0 is \d+, recount \d+"),
    "swap_map": (swap_map, r"swap slot \d+: users is 2, recount 1"),
    "swap slot leaked": (leaked_slot, r"swap slot \d+ is kept for nobody"),
    "swap entry": (swap_entry, r"swap slot 77: users is None, recount 1"),
    "swap cache's slot": (cached_slot, r"swap slot is \d+, recount \d+"),
    "swap cache lost": (lost_cache, r"swap cache is \[\], recount \[\d+\]"),
    "slot numbers": (slot_numbers, r"swap slots is \d+, recount \d+"),
    "memcg usage": (memcg_usage, r"memcg 1: usage is \d+, recount \d+"),
    "memcg of a page": (memcg_page, r"memcg 1: usage is \d+, recount \d+"),
    "spinlock": (spinlock, r"page_table_lock held is True, recount False"),
    "mmap_lock": (mmap_lock, r"mmap_lock \(held for read by app\) by a task that has ended"),
    "anon_vma lock": (anon_vma_lock, r"anon_vma \(held for read by app\) by a task that has ended"),
}
CORRUPTIONS |= {
    f"counter {name}": (node_stat(item), rf"node0: {name} is \d+, recount \d+")
    for item, name in enumerate(vs.NODE_STATS)
}
CORRUPTIONS |= {
    f"counter {name}": (mm_stat(item), rf"{name} is -?\d+, recount \d+")
    for item, name in enumerate(vs.MM_COUNTERS)
}


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_audit_names_what_does_not_add_up(scene: Scene, what: str) -> None:
    """Each corruption is found and described."""
    corrupt, finding = CORRUPTIONS[what]
    corrupt(scene)
    with pytest.raises(KernelBug, match=finding) as found:
        scene.machine.audit()
    assert all(isinstance(line, str) for line in found.value.findings)


@pytest.mark.parametrize("item", range(len(vs.NODE_STATS)))
def test_a_counter_off_by_one_is_the_only_finding(scene: Scene, item: int) -> None:
    """The audit blames the counter, and nothing else."""
    node_stat(item)(scene)
    with pytest.raises(KernelBug) as found:
        scene.machine.audit()
    assert len(found.value.findings) == 1


@pytest.mark.parametrize("where", ["scanned", "prepared", "copied"])
def test_audit_holds_in_the_middle_of_a_collapse(scene: Scene, where: str) -> None:
    """Isolated pages, a detached page table and a huge page in flight are accounted for."""
    scene.process.read(scene.block + 40 * PAGE, 1)
    task = paused(scene.machine, scene.process, scene.block, where)
    scene.machine.audit()
    assert task.finish() is ScanResult.SCAN_SUCCEED
    scene.machine.audit()


def test_audit_holds_at_every_step_of_a_collapse(scene: Scene) -> None:
    """Wherever a task may lose the CPU the sums are right, also with poison to be undone."""
    scene.process.read(scene.block + 40 * PAGE, 1)
    pfn = scene.process.poison(scene.block)
    for expected in (ScanResult.SCAN_COPY_MC, ScanResult.SCAN_SUCCEED):
        task = scene.machine.spawn(scene.machine.collapse.steps(scene.process, scene.block))
        while task.step():
            scene.machine.audit()
        assert task.result is expected
        scene.mem.poison.unpoison(pfn)


def test_audit_holds_with_everything_held_and_released(scene: Scene) -> None:
    """Pins and references from outside are counted while they last, on base and huge pages."""
    held = [
        scene.process.pin(scene.block, 3 * PAGE),
        scene.process.get(scene.block, 3 * PAGE),
        scene.process.pin(scene.huge, 2 * PAGE),
        scene.process.get(scene.huge, HPAGE),
        scene.process.lock_page(scene.block + 9 * PAGE),
    ]
    scene.machine.audit()
    for each in held:
        each.release()
        scene.machine.audit()


def test_exit_gives_everything_back(scene: Scene) -> None:
    """When all processes are gone every frame and slot is free, and every counter 0."""
    scene.process.exit()
    scene.machine.audit()
    scene.child.exit()
    scene.machine.lru_add_drain_all()
    scene.machine.audit()
    counts = scene.machine.vmstat()
    assert counts.pop("nr_free_pages") == scene.mem.nr_pages - 1  # the zero page
    assert {name: counts[name] for name in vs.NODE_STATS if counts.get(name)} == {}
    assert scene.mem.swap.swap_map == {}
    assert scene.mem.mappings == {}
    assert scene.mem.memcgs[1].usage == 0
