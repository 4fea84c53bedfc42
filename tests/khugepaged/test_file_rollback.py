"""A file's block whose copy met poison: the cache is as it was, and every byte can be read."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    MakeMachine,
    block_bytes,
    fill,
    page_bytes,
    small_machine,
)
from file_kit import (
    ALL,
    DISK,
    SHMEM,
    FileBlock,
    Mapping,
    add_mapper,
    bytes_expected,
    cache_is_huge,
    cache_snapshot,
    dirty_free_memory,
    disk_block,
    file_collapses,
    file_scans,
    fill_file,
    machine_checks,
    map_block,
    memfd,
    shared_anonymous_block,
    shmem_block,
    slots_of,
    touch_pages,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pykhuge import PROT_READ, PROT_WRITE, Advice, Machine, ScanResult, WouldBlock
from pykhuge.khugepaged import file as collapse_file
from pykhuge.mm.page import PG_dirty, PG_frozen, PG_locked, PG_lru, PG_swapbacked, PG_uptodate
from pykhuge.mm.swap import lru_pages
from pykhuge.mm.vmstat import NR_INACTIVE_ANON, NR_INACTIVE_FILE

S = ScanResult
LINE = 64
GARBAGE = 0xA5
CONTEXTS = pytest.mark.parametrize(
    "is_khugepaged", [pytest.param(True, id="khugepaged"), pytest.param(False, id="madvise")]
)
SORTS = pytest.mark.parametrize("sort", [SHMEM, DISK])


def block_of(sort: str, machine: Machine, path: Path, **options: Any) -> FileBlock:
    """A full block of shmem or of a disk file, wholly mapped."""
    machine.thp.enabled = "always"
    return (
        shmem_block(machine, **options) if sort == SHMEM else disk_block(machine, path, **options)
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a disk file may be."""
    return tmp_path / "disk"


def out_of_step(block: FileBlock, first: int) -> Mapping:
    """A process that maps the file from page `first` on, at an address no huge page could have."""
    process = block.machine.process("askew")
    process.mm.files.append(block.file)
    block.file.f_count += 1
    addr = process.mmap(
        HPAGE - first * PAGE,
        addr=(1 << 40) + PAGE * (first + 1),
        fixed=True,
        file=block.file,
        offset=first * PAGE,
        shared=True,
        prot=PROT_READ,
    )
    assert (addr - first * PAGE) % HPAGE
    return Mapping(process, addr - first * PAGE)


def read_around(mapping: Mapping, bad: dict[int, set[int]], first: int = 0) -> bytes:
    """The block through a mapping, bad lines left out (zeros): a touch would take the page."""
    process, addr = mapping
    out = bytearray(HPAGE)
    for page in range(first, NR):
        where = addr + page * PAGE
        if page not in bad:
            out[page * PAGE : (page + 1) * PAGE] = process.read(where, PAGE)
            continue
        for line in range(64):
            at = line * LINE
            if line not in bad[page]:
                out[page * PAGE + at : page * PAGE + at + LINE] = process.read(where + at, LINE)
    return bytes(out)


def without(content: bytes, bad: dict[int, set[int]]) -> bytes:
    """`content` with zeros where lines are bad."""
    out = bytearray(content)
    for page, lines in bad.items():
        for line in lines:
            at = page * PAGE + line * LINE
            out[at : at + LINE] = bytes(LINE)
    return bytes(out)


def pread_around(block: FileBlock, bad: Iterable[int]) -> bytes:
    """The block by pread, poisoned pages left out (zeros): reading them so is a panic."""
    out = bytearray(HPAGE)
    for page in set(ALL) - set(bad):
        data = block.process.pread(block.file, page * PAGE, PAGE)
        out[page * PAGE : (page + 1) * PAGE] = data
    return bytes(out)


# After COPY_MC at any place.

PAGES = st.sets(st.integers(0, NR - 1), max_size=24)


def held_pages(edges: tuple[int, int], removed: set[int], added: set[int]) -> list[int]:
    """A run of pages, some taken out of it and some put in elsewhere."""
    run = set(range(min(edges), max(edges) + 1))
    return sorted((run - removed) | added) or [edges[0]]


HELD = st.builds(
    held_pages, st.tuples(st.integers(0, NR - 1), st.integers(0, NR - 1)), PAGES, PAGES
)


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(), held=HELD, is_khugepaged=st.booleans(), touched=PAGES, skew=st.integers(0, 9)
)
def test_cache_and_contents_are_as_before_wherever_the_poison_is(
    data: st.DataObject, held: list[int], is_khugepaged: bool, touched: set[int], skew: int
) -> None:
    """Same frames in the same slots, holes again, unmapped, on the LRU; then one more look."""
    lines = st.sets(st.integers(0, 63), min_size=1, max_size=3)
    bad = data.draw(st.dictionaries(st.sampled_from(held), lines, min_size=1, max_size=4))
    machine = small_machine("24M", swap="4M")
    block = shmem_block(machine, held, others=[touched])
    askew = out_of_step(block, skew)
    for page, each in bad.items():
        for line in each:
            block.poison(page, line)
    hpage = dirty_free_memory(machine, GARBAGE)
    before, charged = cache_snapshot(block.file, machine), charges(block)
    free = machine.vmstat()["nr_free_pages"]

    assert block.collapse(is_khugepaged=is_khugepaged) is S.SCAN_COPY_MC

    assert charges(block) == charged
    (event,) = file_collapses(machine)
    first = min(bad)
    assert (event.hpage_pfn, event.index, event.nr) == (hpage, first, NR)
    assert (event.result, event.is_shmem) == (S.SCAN_COPY_MC, True)
    (mce,) = machine_checks(machine)
    assert (mce.pfn, mce.line, mce.recovered) == (block.pfn(first), min(bad[first]), True)
    copied = first * PAGE + min(bad[first]) * LINE
    new = machine.mem.ram.pages[hpage : hpage + NR].tobytes()
    assert new[:copied] == block.content()[:copied]
    assert new[copied:] == bytes([GARBAGE]) * (HPAGE - copied)
    machine.lru_add_drain_all()
    assert cache_snapshot(block.file, machine) == before._replace(refcount=[1] * len(held))
    pages = machine.mem.pages
    pfns = np.array([block.pfn(page) for page in held])
    assert not pages.mapcount[pfns].any()
    flags = pages.flags[pfns] & np.uint32(PG_locked | PG_frozen | PG_lru | PG_uptodate)
    assert (flags == PG_lru | PG_uptodate).all()
    assert not pages.flags[hpage : hpage + NR].any()
    assert not pages.refcount[hpage : hpage + NR].any()
    assert machine.vmstat()["nr_free_pages"] == free
    machine.audit()

    look_again(block, askew, skew, bad)
    machine.audit()


def charges(block: FileBlock) -> list[int]:
    """What the file is charged for in each of its books."""
    inode = block.shmem
    committed = block.machine.mem.vm_committed_as
    return [inode.alloced, inode.i_blocks, inode.i_mapping.nrpages, committed]


def look_again(block: FileBlock, askew: Mapping, skew: int, bad: dict[int, set[int]]) -> None:
    """Byte for byte through every mapping and pread, around the poison, and whole once it is gone.

    The askew mapping begins `skew` pages into the block.
    """
    content = block.content()
    for mapping in block.maps:
        assert read_around(mapping, bad) == without(content, bad)
    behind = bytes(skew * PAGE) + content[skew * PAGE :]
    skewed = {page: lines for page, lines in bad.items() if page >= skew}
    assert read_around(askew, skewed, skew) == without(behind, skewed)
    assert pread_around(block, bad) == without(content, {page: set(range(64)) for page in bad})
    for page in bad:
        block.machine.mem.poison.unpoison(block.pfn(page))
    assert block.process.pread(block.file, 0, HPAGE) == content
    for mapping in block.maps:
        assert mapping.process.read(mapping.addr, HPAGE) == content
    block.machine.lru_add_drain_all()
    assert block.collapse() is S.SCAN_SUCCEED
    assert cache_is_huge(block.file)
    for mapping in block.maps:
        assert mapping.process.read(mapping.addr, HPAGE) == content
    askew.process.read(askew.addr + skew * PAGE, HPAGE - skew * PAGE)
    assert block.process.pread(block.file, 0, HPAGE) == content


@pytest.mark.parametrize("line", [0, 1, 37, 63])
@pytest.mark.parametrize("page", [0, 1, 14, 15, 255, 510, 511])
@SORTS
def test_every_frame_is_back_in_its_place(
    machine: Machine, path: Path, sort: str, page: int, line: int
) -> None:
    """A full block: the 512 frames of before, whichever line of whichever page was bad."""
    block = block_of(sort, machine, path)
    pfn = block.poison(page, line)
    slots = block.slots()
    assert block.collapse() is S.SCAN_COPY_MC
    assert block.slots() == slots
    assert not cache_is_huge(block.file)
    assert block.file.f_mapping.nr_thps == 0
    (mce,) = machine_checks(machine)
    assert (mce.pfn, mce.line, mce.consumer) == (pfn, line, "collapse_file")
    assert read_around(block.maps[0], {page: {line}}) == without(block_bytes(), {page: {line}})


@SORTS
def test_trace_tells_of_the_copy_and_then_of_the_scan(
    machine: Machine, path: Path, sort: str
) -> None:
    """collapse_file with the page it stopped at and the huge page given up, then scan_file."""
    block = block_of(sort, machine, path)
    block.poison(77)
    hpage = dirty_free_memory(machine)
    block.collapse()
    (event,), (scan,) = file_collapses(machine), file_scans(machine)
    assert (event.hpage_pfn, event.index, event.nr) == (hpage, 77, NR)
    assert (event.is_shmem, event.addr) == (sort == SHMEM, block.addr)
    assert (scan.scan_pfn, scan.present, scan.swap) == (-1, NR, 0)
    assert event.result is scan.result is S.SCAN_COPY_MC
    assert "result=copy_poisoned_page" in machine.trace.text()


@SORTS
def test_poison_is_met_again_at_every_visit_until_it_is_gone(
    machine: Machine, path: Path, sort: str
) -> None:
    """Nothing is marked: ten visits, ten machine checks, as much free memory as before each."""
    block = block_of(sort, machine, path)
    pfn = block.poison(300)
    free = machine.vmstat()["nr_free_pages"]
    for times in range(1, 11):
        assert block.collapse() is S.SCAN_COPY_MC
        assert len(machine_checks(machine)) == times
    assert machine.vmstat()["nr_free_pages"] == free
    machine.mem.poison.unpoison(pfn)
    touch_pages(block.process, block.addr, ALL)
    assert block.collapse() is S.SCAN_SUCCEED
    assert block.process.read(block.addr, HPAGE) == block_bytes()


@SORTS
def test_pages_go_back_to_the_lru_in_the_order_of_the_file(
    machine: Machine, path: Path, sort: str
) -> None:
    """512 is 34 batches of 15 and 2 more, which are off the LRU, referenced, until drained."""
    block = block_of(sort, machine, path)
    slots = block.slots()
    block.poison(0)
    block.collapse()
    assert machine.mem.lru_batches == [slots[-2:]]
    assert machine.mem.pages.refcount[slots].tolist() == [1] * 510 + [2] * 2
    machine.lru_add_drain_all()
    lru = NR_INACTIVE_ANON if sort == SHMEM else NR_INACTIVE_FILE
    assert [pfn for pfn in lru_pages(machine.mem, lru).tolist() if pfn in slots] == slots


def test_pages_stay_dirty(machine: Machine) -> None:
    """What only memory has is as dirty after the rollback as before: reclaim may not drop it."""
    block = shmem_block(machine, range(5, 500))
    block.poison(5)
    block.collapse()
    machine.lru_add_drain_all()
    flags = machine.mem.pages.flags[[block.pfn(page) for page in block.held]]
    wanted = np.uint32(PG_dirty | PG_swapbacked)
    assert (flags & wanted == wanted).all()


def test_block_in_the_midst_of_a_file_leaves_its_neighbours_alone(machine: Machine) -> None:
    """Of three blocks the second fails; entries, frames and bytes of all three are unchanged."""
    process = machine.process()
    file = memfd(process, [], size=3 * HPAGE)
    for number in range(3):
        fill_file(process, file, range(number, NR - number), start=number * NR)
    addr = map_block(process, file, length=3 * HPAGE)
    process.read(addr + HPAGE + PAGE, HPAGE - 2 * PAGE)
    machine.lru_add_drain_all()
    machine.thp.shmem_enabled = "advise"
    before = [cache_snapshot(file, machine, number * NR) for number in range(3)]
    bad = process.cached_pfn(file, NR + 100)
    assert bad is not None
    machine.mem.poison.poison(bad, 1)
    assert machine.collapse(process, addr + HPAGE) is S.SCAN_COPY_MC
    assert file_collapses(machine)[0].index == NR + 100
    machine.lru_add_drain_all()
    after = [cache_snapshot(file, machine, number * NR) for number in range(3)]
    assert after[0] == before[0]
    assert after[1] == before[1]._replace(refcount=[1] * (NR - 2))
    assert after[2] == before[2]
    machine.mem.poison.unpoison(bad)
    for number in (1, 0, 2):
        assert process.read(addr + number * HPAGE, HPAGE) == bytes_expected(
            range(number, NR - number)
        )


def test_private_copies_are_nobody_elses_business(machine: Machine) -> None:
    """A page that was written privately stays mapped where it is, with its own bytes."""
    block = shmem_block(machine)
    other = add_mapper(block, shared=False)
    fill(other.process, other.addr + 9 * PAGE, [0])
    copy = other.process.pfn(other.addr + 9 * PAGE)
    block.poison(9)
    assert block.collapse() is S.SCAN_COPY_MC
    assert other.process.pfn(other.addr + 9 * PAGE) == copy
    assert other.process.pfn(other.addr + 8 * PAGE) is None
    expected = bytearray(block.content())
    expected[9 * PAGE : 10 * PAGE] = page_bytes(0)
    assert other.process.read(other.addr, HPAGE) == expected


def test_stores_after_the_rollback_are_seen_by_all(machine: Machine) -> None:
    """It is one file still: a store by one process is what the others and pread see."""
    block = shmem_block(machine, range(100, NR), others=[range(150)])
    block.poison(200)
    assert block.collapse() is S.SCAN_COPY_MC
    block.process.write(block.addr + 5 * PAGE, b"into a hole")
    block.maps[1].process.write(block.maps[1].addr + 300 * PAGE, b"over a page")
    for process, addr in block.maps:
        assert process.read(addr + 5 * PAGE, 11) == b"into a hole"
        assert process.read(addr + 300 * PAGE, 11) == b"over a page"
    assert block.process.pread(block.file, 300 * PAGE, 11) == b"over a page"


def test_file_survives_a_trip_to_swap_after_the_rollback(machine: Machine) -> None:
    """Once the poison is gone the pages can be swapped out and come back with their bytes."""
    block = shmem_block(machine, range(0, NR, 2))
    pfn = block.poison(256, 9)
    assert block.collapse() is S.SCAN_COPY_MC
    machine.mem.poison.unpoison(pfn)
    block.process.read(block.addr, HPAGE)
    machine.lru_add_drain_all()
    block.process.madvise(block.addr, HPAGE, Advice.MADV_PAGEOUT)
    assert block.shmem.swapped > 200
    assert block.process.read(block.addr, HPAGE) == block.content()


def test_disk_file_can_be_dropped_and_read_anew_after_the_rollback(
    machine: Machine, path: Path
) -> None:
    """The cache gives its pages up, as only pages without a leaked reference are given up."""
    block = disk_block(machine, path)
    pfn = block.poison(100)
    assert block.collapse(is_khugepaged=False) is S.SCAN_COPY_MC
    machine.drop_caches()
    assert block.file.f_mapping.nrpages == 0
    machine.mem.poison.unpoison(pfn)
    assert block.process.read(block.addr, HPAGE) == path.read_bytes()


def test_truncation_after_the_rollback_frees_all_that_was_charged(machine: Machine) -> None:
    """Holes were given back once, not twice: an empty file is charged nothing."""
    block = shmem_block(machine, range(0, NR, 3), tmpfs=machine.tmpfs("4M"))
    block.poison(300)
    assert block.collapse() is S.SCAN_COPY_MC
    block.process.ftruncate(block.file, 0)
    inode = block.shmem
    assert (inode.alloced, inode.i_blocks, inode.i_mapping.nrpages) == (0, 0, 0)
    assert (inode.i_sb.used_blocks, machine.mem.vm_committed_as) == (0, 0)
    assert inode.i_mapping.i_pages.nodes == {}


def test_shared_anonymous_memory_reads_back_in_parent_and_children(machine: Machine) -> None:
    """Fork shares the block; whoever looks after the rollback finds every byte."""
    block = shared_anonymous_block(machine, range(3, 400), others=[range(50), []])
    pfn = block.process.poison(block.addr + 200 * PAGE, 12)
    assert block.collapse() is S.SCAN_COPY_MC
    for mapping in block.maps:
        assert read_around(mapping, {200: {12}}) == without(block.content(), {200: {12}})
    machine.mem.poison.unpoison(pfn)
    for process, addr in block.maps:
        assert process.read(addr, HPAGE) == block.content()


def test_mlocked_pages_are_unmapped_and_come_back_locked(machine: Machine) -> None:
    """Mlock does not keep a page mapped; until it is touched again it is an evictable page."""
    block = shmem_block(machine)
    block.process.mlock(block.addr, HPAGE)
    pfn = block.poison(100)
    assert mlocked(block) == (NR, NR)
    assert block.collapse() is S.SCAN_COPY_MC
    assert mlocked(block) == (0, 0)
    machine.mem.poison.unpoison(pfn)
    block.process.read(block.addr, HPAGE)
    assert mlocked(block) == (NR, NR)


def mlocked(block: FileBlock) -> tuple[int, int]:
    """nr_mlock and nr_unevictable, no page waiting in a batch."""
    block.machine.lru_add_drain_all()
    books = block.books()
    return books["nr_mlock"], books["nr_unevictable"]


# While the copy is under way.


@pytest.mark.parametrize("where", ["copy", "copied"])
@SORTS
def test_readers_wait_for_the_rollback_and_find_the_old_page(
    machine: Machine, path: Path, sort: str, where: str
) -> None:
    """A lookup meets the locked huge page, waits, and looks anew; so does a fault."""
    block = block_of(sort, machine, path)
    block.poison(400)
    slots = block.slots()
    task = block.task()
    task.run_until(where)
    machine.audit()
    with pytest.raises(WouldBlock):
        block.process.pread(block.file, 17 * PAGE, 8)
    with pytest.raises(WouldBlock):
        block.process.read(block.addr + 17 * PAGE, 8)
    reader = machine.spawn(block.process.pread.steps(block.file, 17 * PAGE, PAGE))
    fault = machine.spawn(block.process.read.steps(block.addr + 18 * PAGE, PAGE))
    for waiting in (reader, fault):
        while waiting.step():
            pass
        assert not waiting.done
    assert task.finish() is S.SCAN_COPY_MC
    assert reader.finish() == page_bytes(17)
    assert fault.finish() == page_bytes(18)
    assert block.slots() == slots
    assert block.process.pfn(block.addr + 18 * PAGE) == slots[18]


@pytest.mark.parametrize("where", ["copy", "copied"])
def test_truncation_during_the_copy_waits_and_then_takes_the_old_pages(
    machine: Machine, where: str
) -> None:
    """It finds the pages that the rollback put back, and no hole that somebody thought a page."""
    block = shmem_block(machine, range(1, NR, 2))
    block.poison(401)
    task = block.task()
    task.run_until(where)
    truncation = machine.spawn(block.process.ftruncate.steps(block.file, 100 * PAGE))
    while truncation.step():
        pass
    assert not truncation.done
    assert task.finish() is S.SCAN_COPY_MC
    truncation.finish()
    inode = block.shmem
    assert (inode.alloced, inode.i_mapping.nrpages, inode.i_size) == (50, 50, 100 * PAGE)
    assert block.process.pread(block.file, 0, HPAGE) == block.content()[: 100 * PAGE]


def test_last_user_gone_during_the_copy(machine: Machine) -> None:
    """The process exits meanwhile: the collapse held the file, and its end frees all of it."""
    free, committed = machine.vmstat()["nr_free_pages"], machine.mem.vm_committed_as
    block = shmem_block(machine, range(300))
    block.poison(299)
    task = block.task()
    task.run_until("copied")
    block.process.exit()
    machine.audit()
    assert task.finish() is S.SCAN_COPY_MC
    machine.lru_add_drain_all()
    assert machine.vmstat()["nr_free_pages"] == free
    assert machine.mem.vm_committed_as == committed
    assert machine.mem.inodes == []


@SORTS
def test_second_collapse_of_a_block_leaves_the_first_alone(
    machine: Machine, path: Path, sort: str
) -> None:
    """It gives up on a disk file's locked page, and waits for shmem's to find pages off the LRU."""
    block = block_of(sort, machine, path, others=[range(9)])
    block.poison(100)
    slots, other = block.slots(), block.maps[1]
    second = machine.spawn(machine.collapse.steps(other.process, other.addr))
    second.run_until("scanned")
    first = block.task()
    first.run_until("copied")
    while second.step():
        pass
    machine.audit()
    assert second.done is (sort == DISK)
    assert first.finish() is S.SCAN_COPY_MC
    assert second.finish() is (S.SCAN_PAGE_LOCK if sort == DISK else S.SCAN_DEL_PAGE_LRU)
    assert block.slots() == slots
    assert read_around(other, {100: {0}}) == without(block.content(), {100: {0}})


# Holes are cleared by the running index, in front of, between and behind the pages.

HOLES: dict[str, list[int]] = {
    "none": list(ALL),
    "in front": list(range(200, NR)),
    "behind": list(range(200)),
    "in front and behind": list(range(100, 300)),
    "all but the first": [0],
    "all but the last": [511],
    "all but one": [255],
    "last": list(range(511)),
    "first": list(range(1, NR)),
    "even": list(range(1, NR, 2)),
    "odd": list(range(0, NR, 2)),
    "runs": [page for page in ALL if page % 50 < 30],
}


@CONTEXTS
@pytest.mark.parametrize("held", HOLES.values(), ids=HOLES)
def test_holes_read_as_zeros_from_a_frame_that_held_garbage(
    machine: Machine, held: list[int], is_khugepaged: bool
) -> None:
    """Nothing of what the huge page's frames held before shows through any hole."""
    block = shmem_block(machine, held)
    hpage = dirty_free_memory(machine, GARBAGE)
    assert block.collapse(is_khugepaged=is_khugepaged) is S.SCAN_SUCCEED
    assert block.pfn(0) == hpage
    assert contents(block) == [block.content()] * 3


def contents(block: FileBlock) -> list[bytes]:
    """The block as its frames hold it, as a mapping has it, as pread reads it."""
    pfns = [block.pfn(page) for page in ALL]
    return [
        block.machine.mem.ram.pages[pfns].tobytes(),
        block.process.read(block.addr, HPAGE),
        block.process.pread(block.file, 0, HPAGE),
    ]


@settings(max_examples=25, deadline=None)
@given(held=HELD)
def test_any_holes_read_as_zeros(held: list[int]) -> None:
    """Whatever pages there are, the rest is zeros."""
    machine = small_machine("24M")
    block = shmem_block(machine, held, mapped=held[:1])
    hpage = dirty_free_memory(machine, GARBAGE)
    assert block.collapse() is S.SCAN_SUCCEED
    assert block.pfn(0) == hpage
    assert contents(block) == [block.content()] * 3
    machine.audit()


CopyPages = Callable[..., Any]


def forgets_holes_behind(frames: Any, place: int) -> bool:
    return place > int(np.flatnonzero(frames >= 0)[-1])


def forgets_holes_in_front(frames: Any, place: int) -> bool:
    return place < int((frames >= 0).argmax())


def forgets_holes_between(frames: Any, place: int) -> bool:
    return not forgets_holes_behind(frames, place) and not forgets_holes_in_front(frames, place)


def clears_by_the_last_index(frames: Any, place: int) -> bool:
    return forgets_holes_behind(frames, place)


@pytest.mark.parametrize(
    "wrong",
    [
        forgets_holes_behind,
        forgets_holes_in_front,
        forgets_holes_between,
        clears_by_the_last_index,
    ],
)
def test_an_uncleared_hole_would_show(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Any, int], bool]
) -> None:
    """The tests above see each way of clearing too little, as v7 of the series did."""
    right = collapse_file.copy_mc_pages

    def copy(mem: Any, to: int, frames: Any, **options: Any) -> Any:
        result = right(mem, to, frames, **options)
        for place in np.flatnonzero(frames < 0).tolist():
            if wrong(frames, place):
                mem.ram.pages[to + place] = GARBAGE
        if wrong is clears_by_the_last_index:
            mem.ram.pages[to + int(np.flatnonzero(frames >= 0)[-1])] = 0
        return result

    monkeypatch.setattr(collapse_file, "copy_mc_pages", copy)
    block = shmem_block(machine, [100, 101, 105, 300])
    dirty_free_memory(machine, GARBAGE)
    assert block.collapse() is S.SCAN_SUCCEED
    assert block.content() not in contents(block)


@pytest.mark.parametrize("held", HOLES.values(), ids=HOLES)
def test_holes_are_holes_again_after_a_failed_copy(machine: Machine, held: list[int]) -> None:
    """The index reached is the page's own, with however many holes in front of it."""
    block = shmem_block(machine, held)
    hpage = dirty_free_memory(machine, GARBAGE)
    block.poison(held[-1], 7)
    assert block.collapse() is S.SCAN_COPY_MC
    assert file_collapses(machine)[0].index == held[-1]
    copied = held[-1] * PAGE + 7 * LINE
    new = machine.mem.ram.pages[hpage : hpage + NR].tobytes()
    assert new == block.content()[:copied] + bytes([GARBAGE]) * (HPAGE - copied)
    assert [page for page, entry in enumerate(block.slots()) if entry] == held
    for page in block.holes:
        assert block.process.cached_pfn(block.file, page) is None
        assert block.process.pread(block.file, page * PAGE, PAGE) == bytes(PAGE)


# Acceptance of the series, for files.


def test_only_blocks_with_poison_fail(make_machine: MakeMachine) -> None:
    """Two buffers on tmpfs, four bad pages: exactly their blocks stay small, no byte is lost."""
    machine = make_machine("64M")
    process = machine.process()
    tmpfs = machine.tmpfs("32M")
    bad = {(0, 1): 17, (0, 3): 511, (1, 0): 0, (1, 2): 300}
    buffers = []
    for name in range(2):
        file = process.open(str(name), 0o102, tmpfs=tmpfs)
        process.pwrite(file, 0, block_bytes() * 4)
        addr = map_block(process, file, length=4 * HPAGE)
        process.read(addr, 4 * HPAGE)
        buffers.append((file, addr))
    tmpfs.huge = "advise"
    for (name, number), page in bad.items():
        process.poison(buffers[name][1] + number * HPAGE + page * PAGE, 40)
    for name, (file, addr) in enumerate(buffers):
        for number in range(4):
            result = machine.collapse(process, addr + number * HPAGE)
            fails = (name, number) in bad
            assert result is (S.SCAN_COPY_MC if fails else S.SCAN_SUCCEED)
            assert cache_is_huge(file, number * NR) is not fails
            assert all(slots_of(file, number * NR))
            for page in ALL:
                if bad.get((name, number)) != page:
                    where = addr + number * HPAGE + page * PAGE
                    assert process.read(where, PAGE) == page_bytes(page)
    assert machine.khugepaged_settings.pages_collapsed == 4


def test_madvise_says_einval_and_leaves_the_block_readable(machine: Machine) -> None:
    """COPY_MC has no errno of its own; the call ends at the block it met."""
    block = shmem_block(machine, range(0, NR, 2))
    block.poison(2)
    with pytest.raises(OSError, match="SCAN_COPY_MC") as failed:
        block.process.madvise(block.addr, HPAGE, Advice.MADV_COLLAPSE)
    assert failed.value.errno == 22
    assert read_around(block.maps[0], {2: {0}}) == without(block.content(), {2: {0}})


def test_mapping_without_access_is_unmapped_too(machine: Machine) -> None:
    """PROT_NONE hides the pages from the process, not from a collapse; they refault later."""
    block = shmem_block(machine)
    block.process.mprotect(block.addr, HPAGE, 0)
    pfn = block.poison(3)
    before = block.books()["nr_mapped"]
    assert block.collapse() is S.SCAN_COPY_MC
    assert block.books()["nr_mapped"] == before - NR
    machine.mem.poison.unpoison(pfn)
    block.process.mprotect(block.addr, HPAGE, PROT_READ | PROT_WRITE)
    assert block.process.read(block.addr, HPAGE) == block_bytes()
