"""The audit is itself tested: one thing corrupted by hand, and it must name that thing."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    advised,
    block_bytes,
    compound_block,
    fill,
    pageout,
    paused,
    pfn_of,
    ptes_of,
    small_machine,
)

from pykhuge import (
    PROT_EXEC,
    PROT_READ,
    File,
    KernelBug,
    Machine,
    Process,
    ScanResult,
)
from pykhuge.kernel.locking import READ
from pykhuge.mm import page as pg
from pykhuge.mm import vmstat as vs
from pykhuge.mm.mm_types import MMF_VM_HUGEPAGE, RegularInode, ShmemInode
from pykhuge.mm.page import PG_hwpoison
from pykhuge.mm.page_table import PAGE_RW, make_swap_pte
from pykhuge.mm.regular_file import filemap_flush
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
    machine = small_machine("64M", swap="4M", cpus=2)
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


def registered(scene: Scene) -> Any:
    """The daemon's cursor, which is at the process."""
    scan = scene.mem.khugepaged_scan
    scan.mm_slot = scene.process.mm.mm_slot
    scene.machine.audit()
    return scan


def unlisted_slot(scene: Scene) -> None:
    registered(scene).mm_head.clear()


def slot_without_flag(scene: Scene) -> None:
    registered(scene)
    scene.process.mm.flags &= ~MMF_VM_HUGEPAGE


def slot_listed_twice(scene: Scene) -> None:
    scan = registered(scene)
    scan.mm_head.append(scan.mm_slot)


def slot_of_the_dead(scene: Scene) -> None:
    scan = registered(scene)
    scene.mem.mms.remove(scene.process.mm)
    scan.mm_slot = None


def slot_overfull(scene: Scene) -> None:
    registered(scene).mm_slot.pte_mapped_thp.extend(range(9))


def poisoned_uncounted(scene: Scene) -> None:
    scene.mem.pages.flags[scene.pfn()] |= np.uint32(PG_hwpoison)


def good_page_kept(scene: Scene) -> None:
    scene.mem.hwpoison.refs.add(scene.pfn())


CORRUPTIONS |= {
    "a bad page that is not counted": (poisoned_uncounted, "num_poisoned_pages is 0, recount 1"),
    "a good page kept as bad": (good_page_kept, "is kept by memory_failure, and is not bad"),
    "a registered mm in no list": (unlisted_slot, "the daemon is at .*, not one of its list"),
    "a slot without the flag": (slot_without_flag, r"slots in the daemon's list is 1, recount"),
    "a slot listed twice": (slot_listed_twice, r"slots in the daemon's list is 2, recount"),
    "a slot of a process that has ended": (slot_of_the_dead, "has ended and is in the daemon's"),
    "a slot with nine blocks": (slot_overfull, "its mm_slot is another, or overfull"),
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


class FileScene(NamedTuple):
    """A machine with files of every kind, sound until it is corrupted.

    Pages of the tmpfs file: 0 to 3 are mapped by `app`, 4 and 5 are on swap, 6 is not mapped. The
    disk file has a dirty page (0), two under writeback (1, 2) and one with private data (3).
    """

    machine: Machine
    process: Process
    shmem: File
    shmem_at: int
    huge: File
    huge_at: int
    reserved_at: int
    disk: File
    disk_at: int
    program: File
    program_at: int

    @property
    def mem(self) -> Any:
        return self.machine.mem

    def cached(self, page: int = 0) -> int:
        """A page of the tmpfs file."""
        pfn = self.process.cached_pfn(self.shmem, page)
        assert pfn is not None
        return pfn

    def on_disk(self, page: int) -> int:
        """A page of the disk file."""
        pfn = self.process.cached_pfn(self.disk, page)
        assert pfn is not None
        return pfn


@pytest.fixture
def files(tmp_path: Path) -> FileScene:
    machine = small_machine("64M", swap="4M", cpus=2)
    process = machine.process("app", memcg=machine.memcg("32M"))
    mount = machine.tmpfs("8M")
    shmem = process.open("file", os.O_RDWR | os.O_CREAT, tmpfs=mount)
    process.pwrite(shmem, 0, block_bytes(0, 7))
    shmem_at = process.mmap(7 * PAGE, file=shmem, shared=True)
    process.read(shmem_at + 4 * PAGE, 2 * PAGE)
    machine.lru_add_drain_all()
    pageout(process, shmem_at, [4, 5])
    process.munmap(shmem_at + 4 * PAGE, 3 * PAGE)
    machine.thp.shmem_enabled = "always"
    huge = process.memfd_create("huge")
    process.pwrite(huge, 0, block_bytes())
    machine.thp.shmem_enabled = "never"
    huge_at = process.mmap(HPAGE, file=huge, shared=True)
    process.read(huge_at, 1)
    reserved_at = process.mmap(3 * PAGE, shared=True)
    process.write(reserved_at, b"x")
    disk, disk_at = disk_scene(machine, process, tmp_path)
    path = tmp_path / "program"
    path.write_bytes(block_bytes())
    program = process.open(str(path))
    program_at = process.mmap(HPAGE, file=program, prot=PROT_READ | PROT_EXEC)
    process.read(program_at, HPAGE)
    machine.lru_add_drain_all()
    result = machine.collapse(process, program_at, is_khugepaged=False)
    assert result is ScanResult.SCAN_SUCCEED
    machine.audit()
    return FileScene(
        machine,
        process,
        shmem,
        shmem_at,
        huge,
        huge_at,
        reserved_at,
        disk,
        disk_at,
        program,
        program_at,
    )


def disk_scene(machine: Machine, process: Process, tmp_path: Path) -> tuple[File, int]:
    path = tmp_path / "disk"
    path.write_bytes(block_bytes(0, 4))
    disk = process.open(str(path), os.O_RDWR)
    process.pwrite(disk, PAGE, block_bytes(7, 2))
    filemap_flush(machine.mem, disk.f_mapping)
    process.pwrite(disk, 0, b"dirty")
    process.pread(disk, 3 * PAGE, 1)
    process.attach_private(disk, 3)
    disk_at = process.mmap(4 * PAGE, file=disk)
    process.read(disk_at, 1)
    return disk, disk_at


def add(what: str, name: str, delta: int = 1) -> Callable[[FileScene], None]:
    """Add to a field of one of the scene's files ("shmem.inode": of its inode)."""

    def corrupt(files: FileScene) -> None:
        found: Any = files
        for part in what.split("."):
            found = getattr(found, part)
        setattr(found, name, getattr(found, name) + delta)

    return corrupt


def toggle(pick: Callable[[FileScene], int], bit: int) -> Callable[[FileScene], None]:
    """Toggle a flag of a page."""

    def corrupt(files: FileScene) -> None:
        files.mem.pages.flags[pick(files)] ^= np.uint32(bit)

    return corrupt


def program_head(files: FileScene) -> int:
    return pfn_of(files.process, files.program_at, 0)


def huge_head(files: FileScene) -> int:
    return pfn_of(files.process, files.huge_at, 0)


def lost_from_cache(files: FileScene) -> None:
    """The slot is emptied; the page does not know."""
    files.shmem.f_mapping.i_pages.store(np.array([6]), 0)


def cached_twice(files: FileScene) -> None:
    files.shmem.f_mapping.i_pages.store(np.array([9]), files.cached(6))


def cached_elsewhere(files: FileScene) -> None:
    files.mem.pages.mapping[files.cached(6)] = files.huge.f_mapping.key


def cached_index(files: FileScene) -> None:
    files.mem.pages.index[files.cached(6)] += 1


def nobodys_slot(files: FileScene) -> None:
    """A swap value in a file that no slot stands behind."""
    files.shmem.f_mapping.i_pages.store(np.array([40]), -99)


def order_of_a_tail(files: FileScene) -> None:
    files.mem.pages.order[huge_head(files) + 5] = 3


def order_of_an_entry(files: FileScene) -> None:
    files.huge.f_mapping.i_pages.orders[0][:] = 8


def part_of_a_value(files: FileScene) -> None:
    """Eight pages have gone to swap as one, it says; its neighbours know nothing of that."""
    i_pages = files.shmem.f_mapping.i_pages
    orders = i_pages.orders[0] = np.zeros(512, np.uint8)
    orders[i_pages.node(0).argmin()] = 3


def lost_slot(files: FileScene) -> None:
    files.mem.swap.shmem.pop()


def unmapped(files: FileScene) -> None:
    ptes_of(files.process, files.shmem_at)[0] = 0


def unmapped_huge(files: FileScene) -> None:
    set_pmd(files.mem, files.process.mm, files.huge_at, 0)


def off_i_mmap(files: FileScene) -> None:
    files.shmem.f_mapping.i_mmap.pop()


def twice_on_i_mmap(files: FileScene) -> None:
    files.shmem.f_mapping.i_mmap *= 2


def vma_of(files: FileScene, addr: int) -> Any:
    return next(vma for vma in files.process.mm.vmas if vma.vm_start <= addr < vma.vm_end)


def other_offset(files: FileScene) -> None:
    vma_of(files, files.shmem_at).vm_pgoff += 1


def vmas_swapped(files: FileScene) -> None:
    files.process.mm.vmas.reverse()


def lost_anon_vma(files: FileScene) -> None:
    files.process.write(files.disk_at, b"own")
    files.machine.audit()
    vma_of(files, files.disk_at).anon_vma_chain.clear()


def read_only_vma(files: FileScene) -> None:
    vma_of(files, files.shmem_at).vm_flags &= ~2


def read_only_huge_vma(files: FileScene) -> None:
    vma_of(files, files.huge_at).vm_flags &= ~2


def writable_file_page(files: FileScene) -> None:
    ptes_of(files.process, files.disk_at)[files.disk_at // PAGE % NR] |= np.uint64(PAGE_RW)


def unprotected(files: FileScene) -> None:
    """An entry that userfaultfd protects becomes writable behind its back."""
    uffd = files.process.userfaultfd()
    uffd.register(files.shmem_at, 4 * PAGE, missing=False, wp=True)
    uffd.writeprotect(files.shmem_at, 4 * PAGE)
    files.process.read(files.shmem_at, PAGE)
    files.machine.audit()
    ptes_of(files.process, files.shmem_at)[files.shmem_at // PAGE % NR] |= np.uint64(PAGE_RW)


def i_mmap_rwsem(files: FileScene) -> None:
    files.huge.f_mapping.i_mmap_rwsem.lock(files.process.task, READ)


def i_mmap_rwsem_of_unmapped(files: FileScene) -> None:
    file = files.process.memfd_create("unmapped")
    file.f_mapping.i_mmap_rwsem.lock(files.process.task, READ)


def stale_page_lock(files: FileScene) -> None:
    head = huge_head(files)
    files.mem.pages.flags[head] |= np.uint32(pg.PG_locked)
    files.mem.page_locks[head] = files.process.task


def held_file(files: FileScene) -> None:
    files.mem.held_files.append(files.shmem)


def closed_twice(files: FileScene) -> None:
    files.process.mm.files.remove(files.shmem)


FILE_CORRUPTIONS: dict[str, tuple[Callable[[FileScene], None], str]] = {
    "f_count": (add("shmem", "f_count"), r"file: f_count is 3, recount 2"),
    "file held for nobody": (held_file, r"file: f_count is 2, recount 3"),
    "descriptor lost": (closed_twice, r"file: f_count is 2, recount 1"),
    "i_count": (add("shmem.inode", "i_count"), r"file: i_count is 2, recount 1"),
    "i_writecount": (add("disk.inode", "i_writecount"), r"disk: i_writecount is 2, recount 1"),
    "i_writecount lost": (add("disk.inode", "i_writecount", -1), r"i_writecount is 0, recount 1"),
    "i_writecount of a reader": (add("program.inode", "i_writecount"), r"program: i_writecount"),
    "nr_thps": (add("program.f_mapping", "nr_thps"), r"program: nr_thps is 2, recount 1"),
    "nr_thps lost": (add("program.f_mapping", "nr_thps", -1), r"nr_thps is 0, recount 1"),
    "nrpages": (add("shmem.f_mapping", "nrpages"), r"file: nrpages is 6, recount 5"),
    "nrpages of a huge file": (
        add("huge.f_mapping", "nrpages", -1),
        r"nrpages is 511, recount 512",
    ),
    "swapped": (add("shmem.inode", "swapped"), r"file: swapped is 3, recount 2"),
    "alloced lost": (add("shmem.inode", "alloced", -1), r"file: alloced is 6, recount 7"),
    "alloced": (add("shmem.inode", "alloced"), r"tmpfs: used_blocks is 7, recount 8"),
    "i_blocks": (add("shmem.inode", "i_blocks"), r"file: i_blocks is 57, recount 56"),
    "used_blocks": (add("shmem.inode.i_sb", "used_blocks"), r"used_blocks is 8, recount 7"),
    "vm_committed_as": (add("mem", "vm_committed_as"), r"vm_committed_as is \d+, recount \d+"),
    "page lost from the cache": (
        lost_from_cache,
        r"pages \[\d+\] are cached and do not say so, or",
    ),
    "page cached twice": (cached_twice, r"file: page 0x[0-9a-f]+ is cached and does not know it"),
    "page of another file": (cached_elsewhere, r"is cached and does not know it"),
    "index of a cached page": (cached_index, r"is cached and does not know it"),
    "slot without a page": (nobodys_slot, r"swap slot 99: users is None, recount 1"),
    "order of a tail": (order_of_a_tail, r"is not part of the compound page that it says"),
    "order of an entry": (order_of_an_entry, r"the order of page 0x[0-9a-f]+ is not its entry's"),
    "part of a value": (part_of_a_value, r"file: the value at \d+ is not at all of its indexes"),
    "slot not known as shmem's": (lost_slot, r"swap slots of shmem is \[\d\], recount \[\d, \d\]"),
    "PTE lost": (unmapped, r"MM_SHMEMPAGES is \d+, recount \d+"),
    "PMD lost": (unmapped_huge, r"entire_mapcount is 1, recount 0"),
    "VMA not on i_mmap": (off_i_mmap, r"mapping \d+ and its VMAs do not know each other"),
    "VMA twice on i_mmap": (twice_on_i_mmap, r"mapping \d+ and its VMAs do not know each other"),
    "offset of a VMA": (other_offset, r"rmap does not find the page mapped at 0x"),
    "VMAs out of order": (vmas_swapped, r"VMA [0-9a-f]+-[0-9a-f]+ is out of order"),
    "VMA without its anon_vma": (lost_anon_vma, r"is not on its own anon_vma"),
    "entry writable in a read-only VMA": (
        read_only_vma,
        r"the entry at 0x[0-9a-f]+ may not be wri",
    ),
    "PMD writable in a read-only VMA": (read_only_huge_vma, r"the entry at 0x[0-9a-f]+ may not be"),
    "protected entry writable": (unprotected, r"the entry at 0x[0-9a-f]+ may not be writable"),
    "file's page writable in private": (
        writable_file_page,
        r"the file's own page is writable at 0x",
    ),
    "i_mmap_rwsem": (i_mmap_rwsem, r"i_mmap_rwsem \(held for read by app\) by a task that has end"),
    "i_mmap_rwsem of a file not mapped": (
        i_mmap_rwsem_of_unmapped,
        r"i_mmap_rwsem \(held for read",
    ),
    "page lock": (stale_page_lock, r"page 0x[0-9a-f]+ is locked by app, which has ended"),
    "PG_dirty": (toggle(lambda f: f.on_disk(0), pg.PG_dirty), r"nr_dirty is 1, recount 0"),
    "PG_writeback": (
        toggle(lambda f: f.on_disk(1), pg.PG_writeback),
        r"nr_writeback is 2, recount 1",
    ),
    "PG_private": (toggle(lambda f: f.on_disk(3), pg.PG_private), r"refcount is \d, recount \d"),
    "PG_swapbacked": (
        toggle(FileScene.cached, pg.PG_swapbacked),
        r"node0: nr_shmem is \d+, recount \d+",
    ),
    "PG_head of a program": (toggle(program_head, pg.PG_swapbacked), r"nr_file_hugepages is 512"),
    "PG_frozen": (toggle(FileScene.cached, pg.PG_frozen), r"is frozen, and no collapse is at it"),
    "PG_in_flight": (
        toggle(huge_head, pg.PG_in_flight),
        r"huge pages in flight is \[\], recount \[",
    ),
    "PG_locked": (toggle(FileScene.cached, pg.PG_locked), r"is locked, and nobody has isolated it"),
}
FILE_CORRUPTIONS |= {
    f"counter {name}": (
        lambda files, item=item: node_stat(item)(files),  # type: ignore[misc]
        rf"node0: {name} is \d+, recount \d+",
    )
    for item, name in enumerate(vs.NODE_STATS)
}
FILE_CORRUPTIONS |= {
    f"counter {name}": (
        lambda files, item=item: mm_stat(item)(files),  # type: ignore[misc]
        rf"{name} is -?\d+, recount \d+",
    )
    for item, name in enumerate(vs.MM_COUNTERS)
}


@pytest.mark.parametrize("what", FILE_CORRUPTIONS)
def test_audit_names_what_does_not_add_up_of_files(files: FileScene, what: str) -> None:
    """Each corruption is found and described."""
    corrupt, finding = FILE_CORRUPTIONS[what]
    corrupt(files)
    with pytest.raises(KernelBug, match=finding):
        files.machine.audit()


@pytest.mark.parametrize("item", range(len(vs.NODE_STATS)))
def test_counter_off_by_one_is_the_only_finding_among_files(files: FileScene, item: int) -> None:
    """The audit blames the counter, and nothing else."""
    node_stat(item)(files)  # type: ignore[arg-type]
    with pytest.raises(KernelBug) as found:
        files.machine.audit()
    assert len(found.value.findings) == 1


@pytest.mark.parametrize("name", ["nr_file_pages", "nr_shmem"])
def test_counters_that_drift_between_nodes_are_held_against_their_sum(name: str) -> None:
    """A collapse may leave them on the wrong node, as in the kernel; none is lost by that."""
    machine = small_machine("64M", nodes=2)
    process = machine.process("app")
    file = process.memfd_create("f")
    process.pwrite(file, 0, block_bytes(0, 8))
    machine.audit()
    item = vs.NODE_STATS.index(name)
    machine.mem.vmstat.node[0][item] -= 3
    machine.mem.vmstat.node[1][item] += 3
    machine.audit()
    machine.mem.vmstat.node[1][item] += 1
    with pytest.raises(KernelBug, match=rf"all nodes: {name} is 9, recount 8") as found:
        machine.audit()
    assert len(found.value.findings) == 1


def test_collapse_of_pages_from_two_nodes_passes_the_audit(tmp_path: Path) -> None:
    """Of shmem with holes and of a disk file, collapsed, read, and truncated away."""
    machine = small_machine("64M", nodes=2)
    process = machine.process("app")
    path = tmp_path / "program"
    path.write_bytes(block_bytes())
    shmem, program = process.memfd_create("f"), process.open(str(path))
    process.ftruncate(shmem, HPAGE)
    for page in range(0, 300, 10):
        process.node = page // 10 % 2
        process.pwrite(shmem, page * PAGE, block_bytes(page, 10 if page < 200 else 1))
        process.pread(program, page * PAGE, 1)
    shmem_at = process.mmap(HPAGE, file=shmem, shared=True)
    program_at = process.mmap(HPAGE, file=program, prot=PROT_READ | PROT_EXEC)
    for addr in (shmem_at, program_at):
        process.read(addr, HPAGE)
        machine.lru_add_drain_all()
        result = machine.collapse(process, addr, is_khugepaged=False)
        assert result is ScanResult.SCAN_SUCCEED
        machine.audit()
    process.ftruncate(shmem, 9 * PAGE)
    process.open(str(path), os.O_RDWR)
    machine.audit()
    process.exit()
    machine.audit()
    assert machine.vmstat()["nr_shmem"] == machine.vmstat()["nr_file_pages"] == 0


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("kind", ["shmem", "program"])
def test_audit_holds_at_every_step_of_a_file_collapse(
    files: FileScene, kind: str, poison: bool
) -> None:
    """Frozen pages, charges ahead of pages, nr_thps ahead of the huge page are accounted for."""
    machine, process = files.machine, files.process
    addr = shmem_to_collapse(files) if kind == "shmem" else program_to_collapse(files)
    if poison:
        process.poison(addr + 77 * PAGE)
    results = []
    while not process.is_huge(addr):
        machine.lru_add_drain_all()
        task = machine.spawn(machine.collapse.steps(process, addr, is_khugepaged=False))
        while task.step():
            machine.audit()
        results.append(task.result)
        if task.result is ScanResult.SCAN_COPY_MC:
            files.mem.poison.unpoison(files.mem.poison.log[-1].pfn)
        assert len(results) < 5
    assert (ScanResult.SCAN_COPY_MC in results) == poison
    assert results[-1] is ScanResult.SCAN_SUCCEED
    # A page just swapped in still waits in the batch: one more try for each.
    assert results.count(ScanResult.SCAN_DEL_PAGE_LRU) == (2 if kind == "shmem" else 0)


def shmem_to_collapse(files: FileScene) -> int:
    """A block of shmem with holes, two pages on swap, and one that was only preallocated."""
    process = files.process
    file = process.memfd_create("f")
    process.ftruncate(file, HPAGE)
    process.pwrite(file, 5 * PAGE, block_bytes(0, 100))
    process.fallocate(file, 200 * PAGE, PAGE)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.read(addr + 5 * PAGE, 100 * PAGE)
    files.machine.lru_add_drain_all()
    pageout(process, addr, [20, 21])
    return addr


def program_to_collapse(files: FileScene) -> int:
    """A disk file whose huge page a writer has made small again, and has read half of it."""
    process = files.process
    assert isinstance(files.program.inode, RegularInode)
    process.close(process.open(files.program.inode.path, os.O_RDWR))
    process.read(files.program_at, HPAGE // 2)
    return files.program_at


def test_exit_gives_every_file_back(files: FileScene) -> None:
    """Files without names go with their process; the mount and the disk keep theirs."""
    files.process.exit()
    files.machine.finish_io()
    files.machine.audit()
    counts = files.machine.vmstat()
    assert counts["nr_mapped"] == counts["nr_shmem_hugepages"] == counts["nr_page_table_pages"] == 0
    assert counts["nr_shmem"] == 5
    assert files.mem.vm_committed_as == 7
    assert {inode.name for inode in files.mem.inodes} == {"file", "disk", "program"}
    other = files.machine.process("other")
    assert isinstance(files.shmem.inode, ShmemInode)
    assert isinstance(files.disk.inode, RegularInode)
    mount = files.shmem.inode.i_sb
    other.unlink("file", tmpfs=mount)
    other.fsync(other.open(files.disk.inode.path))
    files.machine.drop_caches()
    files.machine.audit()
    counts = files.machine.vmstat()
    assert {name: counts[name] for name in vs.NODE_STATS[1:] if counts.get(name)} == {}
    assert files.mem.swap.swap_map == {}
    assert (mount.used_blocks, files.mem.vm_committed_as) == (0, 0)
