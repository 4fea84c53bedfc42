"""Table 4.6 of the behavioural reference: what a collapse of a file moves, by layout and ending.

h pages of the block are holes, m pages are mapped by somebody, k of them by one process; r pages of
a disk file had to be read. The expected numbers are the table's, in terms of these.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from collapse_kit import HPAGE, NR, PAGE, MakeMachine, changes, flags_of
from file_kit import (
    ALL,
    DISK,
    FileBlock,
    add_mapper,
    cache_is_huge,
    cache_snapshot,
    dirty_free_memory,
    disk_block,
    file_collapses,
    fill_file,
    map_block,
    pte_mapped_thp,
    shared_anonymous_block,
    shmem_block,
)

from pykhuge import PROT_EXEC, PROT_READ, PROT_WRITE, Advice, Machine, Process, ScanResult
from pykhuge.mm.mm_types import ShmemInode
from pykhuge.mm.page import (
    PG_active,
    PG_dirty,
    PG_frozen,
    PG_head,
    PG_locked,
    PG_lru,
    PG_private,
    PG_swapbacked,
    PG_uptodate,
)
from pykhuge.mm.vmstat import NR_FILE_PAGES, NR_SHMEM, NR_SHMEM_THPS, Ledger

S = ScanResult
EVEN, ODD = range(0, NR, 2), range(1, NR, 2)


class Layout(NamedTuple):
    """held: pages the file has (a disk file: has in its cache). maps: what each process has mapped.

    The first of `maps` is whose block is collapsed.
    """

    held: Iterable[int]
    maps: tuple[Iterable[int], ...]

    @property
    def h(self) -> int:
        """Holes; of a disk file, pages to be read."""
        return NR - len(set(self.held))

    def k(self, number: int, below: int = NR) -> int:
        """Pages that process `number` has mapped, in front of page `below`."""
        return len([page for page in set(self.maps[number]) & set(self.held) if page < below])

    def m(self, below: int = NR) -> int:
        """Pages that anybody has mapped, in front of page `below`."""
        mapped = set().union(*self.maps) & set(self.held)
        return len([page for page in mapped if page < below])


LAYOUTS = {
    "all held, all mapped": Layout(ALL, (ALL,)),
    "all held, one mapped": Layout(ALL, ([300],)),
    "one page": Layout([7], ([7],)),
    "first and last": Layout([0, 511], ([0, 511],)),
    "hole in front": Layout(range(1, NR), (range(1, 40),)),
    "hole behind": Layout(range(511), (ALL,)),
    "holes between": Layout(EVEN, (range(100, 300),)),
    "two processes, same pages": Layout(ALL, (range(50), range(50))),
    "two processes, other pages": Layout(EVEN, (range(100), range(90, 400))),
    "three, one of them without a table": Layout(range(17, 400), (ODD, [], EVEN)),
}


class Kind(NamedTuple):
    """A sort of file, and which of its books a hole fills."""

    build: Callable[[Machine, Layout, Path], FileBlock]
    committed: bool = False
    limited: bool = False


def memfd_of(machine: Machine, layout: Layout, _: Path) -> FileBlock:
    return shmem_block(machine, layout.held, mapped=layout.maps[0], others=layout.maps[1:])


def tmpfs_of(machine: Machine, layout: Layout, _: Path) -> FileBlock:
    return shmem_block(
        machine,
        layout.held,
        mapped=layout.maps[0],
        others=layout.maps[1:],
        tmpfs=machine.tmpfs("4M"),
    )


def anonymous(machine: Machine, layout: Layout, *, noreserve: bool) -> FileBlock:
    """Shared anonymous memory. Its pages come in by writing: all that are held are touched."""
    block = shared_anonymous_block(
        machine, layout.held, noreserve=noreserve, others=layout.maps[1:]
    )
    unmapped = set(ALL) - set(layout.maps[0])
    for page in unmapped:
        block.process.madvise(block.addr + page * PAGE, PAGE, Advice.MADV_DONTNEED)
    return block


SHMEM_KINDS = {
    "memfd": Kind(memfd_of, committed=True),
    "tmpfs with a limit": Kind(tmpfs_of, committed=True, limited=True),
    "reserved": Kind(lambda machine, layout, _: anonymous(machine, layout, noreserve=False)),
    "noreserve": Kind(
        lambda machine, layout, _: anonymous(machine, layout, noreserve=True), committed=True
    ),
}


def disk_of(machine: Machine, layout: Layout, path: Path) -> FileBlock:
    return disk_block(
        machine, path, cached=layout.held, mapped=layout.maps[0], others=layout.maps[1:]
    )


@pytest.fixture(params=list(LAYOUTS.values()), ids=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> Layout:
    """Each of LAYOUTS."""
    assert isinstance(request.param, Layout)
    return request.param


@pytest.fixture(params=list(SHMEM_KINDS.values()), ids=list(SHMEM_KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each sort of shmem."""
    assert isinstance(request.param, Kind)
    return request.param


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a disk file may be."""
    return tmp_path / "disk"


MADV, DAEMON = False, True
CONTEXTS = pytest.mark.parametrize(
    "is_khugepaged",
    [pytest.param(DAEMON, id="khugepaged"), pytest.param(MADV, id="madvise")],
)
LRU_LISTS = {f"nr_{state}_{sort}" for state in ("active", "inactive") for sort in ("anon", "file")}


def moved(before: dict[str, int], block: FileBlock) -> dict[str, int]:
    """What differs in the books by now; which LRU list a page is on is not at stake."""
    return {
        name: delta
        for name, delta in changes(before, block.books()).items()
        if name not in LRU_LISTS
    }


def nonzero(expected: dict[str, int]) -> dict[str, int]:
    return {name: delta for name, delta in expected.items() if delta}


def mm_moves(block: FileBlock, layout: Layout, below: int = NR) -> dict[str, int]:
    """Cell "mm file/shmem counter" of a failure: -k in each mm, of the pages passed."""
    counter = "MM_SHMEMPAGES" if isinstance(block.file.inode, ShmemInode) else "MM_FILEPAGES"
    return {
        f"{each.process.task.comm} {counter}": -layout.k(number, below)
        for number, each in enumerate(block.maps)
    }


# Success.


def success(block: FileBlock, layout: Layout, is_khugepaged: bool) -> dict[str, int]:
    """The cells of a success that do not depend on the sort of file."""
    tables = [each for number, each in enumerate(block.maps) if layout.k(number)]
    retracted = [each for each in tables if is_khugepaged or each is block.maps[0]]
    expected = mm_moves(block, layout)
    expected |= {f"{each.process.task.comm} pgtables": -1 for each in retracted}
    expected |= {
        "nr_mapped": -layout.m(),
        "nr_page_table_pages": -len(retracted),
        "nr_free_pages": len(retracted) - layout.h,
        "nrpages": layout.h,
        "nr_file_pages": layout.h,
        "thp_collapse_alloc": 1,
    }
    return expected


def with_pmd(expected: dict[str, int], counter: str, pmdmapped: str) -> dict[str, int]:
    """MADV_COLLAPSE has mapped the huge page in the process it is for."""
    more = {"nr_mapped": NR, f"app {counter}": NR, pmdmapped: 1, "thp_file_mapped": 1}
    return expected | {name: expected.get(name, 0) + delta for name, delta in more.items()}


@CONTEXTS
def test_success_of_shmem_moves_the_counters_of_the_table(
    machine: Machine, path: Path, kind: Kind, layout: Layout, is_khugepaged: bool
) -> None:
    """Holes are paid for in every book, mapped pages leave every table, one huge page more."""
    block = kind.build(machine, layout, path)
    before = block.books()
    result = block.collapse(is_khugepaged=is_khugepaged)
    assert result is S.SCAN_SUCCEED
    h = layout.h
    expected = success(block, layout, is_khugepaged) | {
        "nr_shmem": h,
        "nr_shmem_hugepages": 1,
        "alloced": h,
        "i_blocks": 8 * h,
        "used_blocks": h if kind.limited else 0,
        "vm_committed_as": h if kind.committed else 0,
    }
    if not is_khugepaged:
        expected = with_pmd(expected, "MM_SHMEMPAGES", "nr_shmem_pmdmapped")
    assert moved(before, block) == nonzero(expected)
    assert block.process.is_huge(block.addr) is not is_khugepaged


@CONTEXTS
def test_success_of_a_disk_file_moves_the_counters_of_the_table(
    machine: Machine, path: Path, layout: Layout, is_khugepaged: bool
) -> None:
    """What was not cached is read; nr_thps and NR_FILE_THPS count the huge page."""
    machine.thp.enabled = "always"
    block = disk_of(machine, layout, path)
    before = block.books()
    assert block.collapse(is_khugepaged=is_khugepaged) is S.SCAN_SUCCEED
    expected = success(block, layout, is_khugepaged) | {"nr_thps": 1, "nr_file_hugepages": 1}
    if not is_khugepaged:
        expected = with_pmd(expected, "MM_FILEPAGES", "nr_file_pmdmapped")
    assert moved(before, block) == nonzero(expected)


def test_counters_of_a_collapse_are_posted_once_each(machine: Machine, path: Path) -> None:
    """NR_SHMEM_THPS moves by +512 at once, NR_FILE_PAGES and NR_SHMEM by +h at once."""
    block = memfd_of(machine, LAYOUTS["holes between"], path)
    with machine.ledger() as ledger:
        assert block.collapse() is S.SCAN_SUCCEED
    posted = [
        (posting.counter, posting.delta)
        for posting in ledger
        if posting.counter in ("nr_file_pages", "nr_shmem", "nr_shmem_hugepages")
    ]
    assert posted == [("nr_shmem_hugepages", 512), ("nr_file_pages", 256), ("nr_shmem", 256)]


def test_block_without_a_table_collapses_in_the_cache_alone(machine: Machine, path: Path) -> None:
    """The process had touched nothing there: the cache is huge, the result is not success."""
    block = memfd_of(machine, Layout(EVEN, ([], range(9))), path)
    before = block.books()
    assert block.collapse() in (S.SCAN_PMD_NULL, S.SCAN_PMD_NONE)
    assert cache_is_huge(block.file)
    assert moved(before, block) == {
        "nr_shmem": 256,
        "nr_file_pages": 256,
        "nrpages": 256,
        "alloced": 256,
        "i_blocks": 2048,
        "vm_committed_as": 256,
        "nr_shmem_hugepages": 1,
        "nr_mapped": -5,
        "other0 MM_SHMEMPAGES": -5,
        "other0 pgtables": -1,
        "nr_page_table_pages": -1,
        "nr_free_pages": 1 - 256,
        "thp_collapse_alloc": 1,
    }
    assert machine.khugepaged_settings.pages_collapsed == 0


@CONTEXTS
@pytest.mark.parametrize("sort", ["memfd", DISK])
def test_success_frees_the_old_pages_and_completes_the_new(
    machine: Machine, path: Path, sort: str, is_khugepaged: bool
) -> None:
    """512 references and one for a PMD; up to date, dirty if shmem; the old frames hold nothing."""
    machine.thp.enabled = "always"
    layout = LAYOUTS["two processes, other pages"]
    block = (memfd_of if sort == "memfd" else disk_of)(machine, layout, path)
    old = [entry for entry in block.slots() if entry > 0]
    assert block.collapse(is_khugepaged=is_khugepaged) is S.SCAN_SUCCEED
    machine.lru_add_drain_all()
    pages = machine.mem.pages
    head = block.pfn(0)
    assert [block.pfn(page) for page in ALL] == list(range(head, head + NR))
    assert not set(old) & set(range(head, head + NR))
    assert not pages.refcount[old].any()
    assert not pages.flags[old].any()
    assert pages.refcount[head] == NR + (not is_khugepaged)
    shmem = PG_dirty | PG_swapbacked if sort == "memfd" else 0
    wanted = PG_uptodate | PG_head | PG_lru | shmem
    unwanted = PG_locked | PG_frozen | PG_active | PG_dirty | PG_swapbacked
    assert flags_of(block.process, head) & (wanted | unwanted) == wanted
    assert pages.mapping[head] == block.file.f_mapping.key
    assert cache_is_huge(block.file)
    for each in block.maps:
        expected = block.content() if sort == "memfd" else path.read_bytes()
        assert each.process.read(each.addr, HPAGE) == expected


@CONTEXTS
def test_others_tables_go_with_the_daemon_and_wait_for_it_with_madvise(
    machine: Machine, path: Path, is_khugepaged: bool
) -> None:
    """-1 page-table page for each retracted VMA; MADV_COLLAPSE notes the others for the daemon."""
    block = memfd_of(machine, LAYOUTS["two processes, same pages"], path)
    block.collapse(is_khugepaged=is_khugepaged)
    other = block.maps[1]
    noted = [] if is_khugepaged else [other.addr]
    assert pte_mapped_thp(other.process) == noted
    assert other.process.read(other.addr, HPAGE) == block.content()
    assert other.process.is_huge(other.addr) is is_khugepaged


# Failure.

NEVER = {
    "nr_file_pages",
    "nr_shmem",
    "nr_shmem_hugepages",
    "nr_file_hugepages",
    "nr_shmem_pmdmapped",
    "nr_file_pmdmapped",
    "nr_anon_pages",
    "nr_anon_transparent_hugepages",
    "nr_isolated_anon",
    "nr_isolated_file",
    "nr_dirty",
    "nr_writeback",
    "nr_page_table_pages",
}
COME_BACK = ("nrpages", "alloced", "i_blocks", "used_blocks", "vm_committed_as", "nr_thps")


def postings(ledger: Ledger, counter: str) -> list[int]:
    return [posting.delta for posting in ledger if posting.counter == counter]


def untouched(ledger: Ledger) -> None:
    """On failure no NR_* page or THP counter moves, not even to come back."""
    assert [posting for posting in ledger if posting.counter in NEVER] == []


class Stop(NamedTuple):
    """How a scan failure ends: the place it fails at, and whether that page was unmapped first."""

    result: ScanResult
    place: int
    unmapped: bool = False


def mapped_page(block: FileBlock, layout: Layout) -> tuple[Process, int, int]:
    """The last page that somebody has mapped: who, where, and which."""
    for each, pages in zip(block.maps, layout.maps, strict=True):
        places = set(pages) & set(layout.held)
        if places:
            return each.process, each.addr, max(places)
    raise AssertionError("nobody has mapped anything")


def locked_page(block: FileBlock, layout: Layout) -> tuple[Stop, Callable[[], None]]:
    process, addr, page = mapped_page(block, layout)
    held = process.lock_page(addr + page * PAGE)
    return Stop(S.SCAN_PAGE_LOCK, page), held.release


def referenced_page(block: FileBlock, layout: Layout) -> tuple[Stop, Callable[[], None]]:
    process, addr, page = mapped_page(block, layout)
    held = process.get(addr + page * PAGE, 1)
    return Stop(S.SCAN_PAGE_COUNT, page, unmapped=True), held.release


def store_failure(block: FileBlock, layout: Layout) -> tuple[Stop, Callable[[], None]]:
    page = block.holes[layout.h // 2]
    block.file.f_mapping.fail_stores.add(page)
    return Stop(S.SCAN_STORE_FAILED, page), block.file.f_mapping.fail_stores.clear


def commit_limit(block: FileBlock, layout: Layout) -> tuple[Stop, Callable[[], None]]:
    mem, half = block.machine.mem, layout.h // 2
    mem.commit_limit = mem.vm_committed_as + half
    return Stop(S.SCAN_FAIL, block.holes[half]), lambda: None


def full_mount(block: FileBlock, layout: Layout) -> tuple[Stop, Callable[[], None]]:
    sb, half = block.shmem.i_sb, layout.h // 2
    sb.max_blocks = sb.used_blocks + half
    return Stop(S.SCAN_FAIL, block.holes[half]), lambda: None


Failing = Callable[[FileBlock, Layout], tuple[Stop, Callable[[], None]]]


def shmem_failures() -> list[Any]:
    """Each kind and layout with each failure that it can have."""
    cases = []
    for kind_name, kind in SHMEM_KINDS.items():
        for layout_name, layout in LAYOUTS.items():
            failures = [locked_page, referenced_page]
            failures += [store_failure] if layout.h else []
            failures += [commit_limit] if layout.h and kind.committed else []
            failures += [full_mount] if layout.h and kind.limited else []
            for failing in failures:
                name = f"{kind_name}, {layout_name}, {failing.__name__}"
                cases.append(pytest.param(kind, layout, failing, id=name))
    return cases


@pytest.mark.parametrize(("kind", "layout", "failing"), shmem_failures())
def test_scan_failure_of_shmem_moves_nothing_but_what_was_unmapped(
    machine: Machine, path: Path, kind: Kind, layout: Layout, failing: Failing
) -> None:
    """-m and -k of the pages passed so far; all that was charged comes back."""
    block = kind.build(machine, layout, path)
    task = block.task()
    task.run_until("scanned")
    stop, release = failing(block, layout)
    snapshot = cache_snapshot(block.file, machine)
    before = block.books()
    with machine.ledger() as ledger:
        assert task.finish() is stop.result
    release()
    below = stop.place + stop.unmapped
    unmapped = {"nr_mapped": -layout.m(below)} | mm_moves(block, layout, below)
    assert moved(before, block) == nonzero(unmapped | {"thp_collapse_alloc": 1})
    untouched(ledger)
    charged = len([page for page in block.holes if page < stop.place])
    for counter, unit in (("nrpages", 1), ("alloced", 1), ("i_blocks", 8)):
        assert postings(ledger, counter) == ([charged * unit, -charged * unit] if charged else [])
    machine.lru_add_drain_all()
    after = cache_snapshot(block.file, machine)
    assert (after.slots, after.order, after.content) == (snapshot.slots, 0, snapshot.content)
    put_back(block, list(layout.held))


def put_back(block: FileBlock, held: list[int]) -> None:
    """Cell "old pages": refcount 1 for the cache and one for each mapping left, on the LRU."""
    pages = block.machine.mem.pages
    pfns = np.array([block.pfn(page) for page in held])
    private = pages.flags[pfns] & np.uint32(PG_private) != 0
    assert (pages.refcount[pfns] == 1 + pages.mapcount[pfns] + private).all()
    assert (pages.flags[pfns] & np.uint32(PG_lru | PG_uptodate) == PG_lru | PG_uptodate).all()
    assert not (pages.flags[pfns] & np.uint32(PG_locked | PG_frozen)).any()
    block.machine.audit()


def middle(layout: Layout) -> int:
    """A page that the file has, with others on both sides of it where it has more."""
    return sorted(layout.held)[len(set(layout.held)) // 2]


@CONTEXTS
def test_copy_mc_of_shmem_moves_nothing_but_what_was_unmapped(
    machine: Machine,
    path: Path,
    kind: Kind,
    layout: Layout,
    is_khugepaged: bool,
) -> None:
    """-m, -k, one allocation; all h holes were charged at once and come back at once."""
    block = kind.build(machine, layout, path)
    block.poison(middle(layout), 11)
    snapshot = cache_snapshot(block.file, machine)
    before = block.books()
    with machine.ledger() as ledger:
        assert block.collapse(is_khugepaged=is_khugepaged) is S.SCAN_COPY_MC
    unmapped = {"nr_mapped": -layout.m()} | mm_moves(block, layout)
    assert moved(before, block) == nonzero(unmapped | {"thp_collapse_alloc": 1})
    untouched(ledger)
    for counter, unit in (
        ("nrpages", 1),
        ("alloced", 1),
        ("i_blocks", 8),
        ("used_blocks", kind.limited),
        ("vm_committed_as", kind.committed),
    ):
        nr = layout.h * unit
        assert postings(ledger, counter) == ([nr, -nr] if nr else [])
    assert postings(ledger, "nr_thps") == []
    machine.lru_add_drain_all()
    after = cache_snapshot(block.file, machine)
    assert (after.slots, after.order, after.content) == (snapshot.slots, 0, snapshot.content)
    assert after.refcount == [1] * len(set(layout.held))
    put_back(block, list(layout.held))


@CONTEXTS
def test_copy_mc_of_a_disk_file_undoes_nr_thps_and_keeps_what_was_read(
    machine: Machine,
    path: Path,
    layout: Layout,
    is_khugepaged: bool,
) -> None:
    """nr_thps +1 -1, the r pages read in stay, -m and -k, and that is all."""
    machine.thp.enabled = "always"
    block = disk_of(machine, layout, path)
    block.poison(middle(layout), 63)
    before, frames = block.books(), block.slots()
    with machine.ledger() as ledger:
        assert block.collapse(is_khugepaged=is_khugepaged) is S.SCAN_COPY_MC
    r = layout.h
    expected = {"nr_mapped": -layout.m()} | mm_moves(block, layout)
    expected |= {"nrpages": r, "nr_file_pages": r, "nr_free_pages": -r, "thp_collapse_alloc": 1}
    assert moved(before, block) == nonzero(expected)
    assert postings(ledger, "nr_thps") == [1, -1]
    assert sum(postings(ledger, "nr_file_pages")) == r
    assert min(postings(ledger, "nr_file_pages"), default=0) >= 0
    for counter in NEVER - {"nr_file_pages"}:
        assert postings(ledger, counter) == []
    machine.lru_add_drain_all()
    assert [now for now, then in zip(block.slots(), frames, strict=True) if then] == [
        each for each in frames if each
    ]
    put_back(block, list(ALL))


def private_page(block: FileBlock, layout: Layout) -> tuple[Stop, Callable[[], None]]:
    """The file system needs what it keeps with the page, and does not give it up."""
    page = middle(layout)
    block.process.attach_private(block.file, page, releasable=False)
    return Stop(S.SCAN_PAGE_HAS_PRIVATE, page), lambda: block.process.attach_private(
        block.file, page
    )


@pytest.mark.parametrize("failing", [locked_page, referenced_page, private_page])
def test_scan_failure_of_a_disk_file_never_counts_a_huge_page(
    machine: Machine, path: Path, layout: Layout, failing: Failing
) -> None:
    """nr_thps is not reached; what was read in front of the failing page stays."""
    block = disk_of(machine, layout, path)
    task = block.task(is_khugepaged=False)
    task.run_until("scanned")
    stop, release = failing(block, layout)
    before = block.books()
    with machine.ledger() as ledger:
        assert task.finish() is stop.result
    release()
    below = stop.place + stop.unmapped
    read = len(set(range(stop.place)) - set(layout.held))
    expected = {"nr_mapped": -layout.m(below)} | mm_moves(block, layout, below)
    expected |= {"nrpages": read, "nr_file_pages": read, "nr_free_pages": -read}
    expected |= {"thp_collapse_alloc": 1}
    assert moved(before, block) == nonzero(expected)
    assert postings(ledger, "nr_thps") == []
    machine.lru_add_drain_all()
    put_back(block, [page for page in ALL if page < stop.place or page in layout.held])


def test_dirty_page_of_a_disk_file_sends_it_to_the_disk(machine: Machine, path: Path) -> None:
    """Cell nr_dirty: 0 but for the writeback that the failure starts; a later visit succeeds."""
    block = disk_block(machine, path)
    writer = machine.process("writer")
    file = writer.open(str(path), 2)
    writer.pwrite(file, 200 * PAGE, b"new")
    writer.close(file)
    machine.lru_add_drain_all()
    before = block.books()
    assert (before["nr_dirty"], before["i_writecount"]) == (1, 0)
    assert block.collapse(is_khugepaged=False) is S.SCAN_FAIL
    expected = {"nr_mapped": -200, "app MM_FILEPAGES": -200, "thp_collapse_alloc": 1}
    assert moved(before, block) == expected | {"nr_dirty": -1, "nr_writeback": 1}
    assert block.collapse(is_khugepaged=False) is S.SCAN_FAIL
    machine.finish_io()
    assert block.collapse(is_khugepaged=False) is S.SCAN_SUCCEED
    assert block.process.read(block.addr + 200 * PAGE, 3) == b"new"
    assert path.read_bytes()[200 * PAGE :][:3] == b"new"


def test_write_open_race_moves_nothing_but_what_was_unmapped(
    machine: Machine, path: Path, layout: Layout
) -> None:
    """Column "write-open race": -m, -k, nr_thps +1 -1, and all pages are back."""
    block = disk_of(machine, layout, path)
    writer = machine.process("writer")
    task = block.task(is_khugepaged=False)
    task.run_until("scanned")
    opening = machine.spawn(writer.open.steps(str(path), 2))
    opening.run_until("i_writecount")
    before = block.books()
    with machine.ledger() as ledger:
        assert task.finish() is S.SCAN_FAIL
    r = layout.h
    expected = {"nr_mapped": -layout.m()} | mm_moves(block, layout)
    expected |= {"nrpages": r, "nr_file_pages": r, "nr_free_pages": -r}
    expected |= {"thp_collapse_alloc": 1}
    assert moved(before, block) == nonzero(expected)
    assert postings(ledger, "nr_thps") == [1, -1]
    for counter in NEVER - {"nr_file_pages"}:
        assert postings(ledger, counter) == []
    (event,) = file_collapses(machine)
    assert (event.index, event.nr, event.result) == (NR, NR, S.SCAN_FAIL)
    opening.finish()
    machine.lru_add_drain_all()
    put_back(block, list(ALL))
    assert block.process.read(block.addr, HPAGE) == path.read_bytes()


@pytest.mark.parametrize("sort", ["memfd", DISK])
def test_no_huge_page_to_be_had_counts_no_allocation(
    make_machine: MakeMachine, path: Path, sort: str
) -> None:
    """thp_collapse_alloc is 0 and its _failed one more; nothing was even unmapped."""
    machine = make_machine("6M")
    block = (memfd_of if sort == "memfd" else disk_of)(machine, LAYOUTS["holes between"], path)
    hog = machine.process("hog")
    where = hog.mmap(4 << 20)
    for page in range(1024):
        if machine.vmstat()["nr_free_pages"] < 200:
            break
        hog.write(where + page * PAGE, b"x")
    before = block.books()
    assert block.collapse(is_khugepaged=False) is S.SCAN_ALLOC_HUGE_PAGE_FAIL
    assert moved(before, block) == {"thp_collapse_alloc_failed": 1}


def test_charge_of_the_cgroup_follows_the_huge_page(machine: Machine) -> None:
    """COPY_MC returns the 512 pages; success keeps them instead of the small pages' charges."""
    group = machine.memcg("4M")
    process = machine.process("app", memcg=group)
    file = process.memfd_create("charged")
    process.ftruncate(file, HPAGE)
    fill_file(process, file, range(100))
    addr = map_block(process, file)
    process.read(addr, PAGE)
    machine.thp.shmem_enabled = "advise"
    usage = group.usage
    bad = process.cached_pfn(file, 50)
    assert bad is not None
    machine.mem.poison.poison(bad, 0)
    assert machine.collapse(process, addr) is S.SCAN_COPY_MC
    assert group.usage == usage
    machine.mem.poison.unpoison(bad)
    assert machine.collapse(process, addr) is S.SCAN_SUCCEED
    assert group.usage == usage + NR - 100 - 1  # the page table is gone


@pytest.mark.parametrize("bad", [0, 300, 511])
def test_swapped_in_pages_stay_after_a_failure(machine: Machine, path: Path, bad: int) -> None:
    """For each, nrpages +1, swapped -1, a swap slot less."""
    block = memfd_of(machine, LAYOUTS["all held, all mapped"], path)
    swapped = range(100, 115)
    block.process.madvise(
        block.addr + swapped.start * PAGE, len(swapped) * PAGE, Advice.MADV_PAGEOUT
    )
    assert block.shmem.swapped == len(swapped)
    block.poison(bad)
    machine.lru_add_drain_all()
    before = block.books()
    result = block.collapse()
    assert result in (S.SCAN_COPY_MC, S.SCAN_DEL_PAGE_LRU)
    after = changes(before, block.books())
    nr = block.shmem.swapped
    assert after["swapped"] == nr - len(swapped) < 0
    assert after["nrpages"] == -after["swapped"]
    assert after["swap slots"] == after["swapped"]
    assert "alloced" not in after
    assert "vm_committed_as" not in after
    assert after["nr_file_pages"] == after["nr_shmem"] == after["nrpages"]


def test_collapse_of_executable_shmem_is_no_different(machine: Machine) -> None:
    """Protection plays no part: a private, read-only, executable mapping of a memfd collapses."""
    block = shmem_block(machine, range(0, NR, 3), mapped=[])
    other = add_mapper(
        block, range(0, NR, 3), shared=False, prot=PROT_READ | PROT_WRITE | PROT_EXEC
    )
    dirty_free_memory(machine)
    assert machine.collapse(other.process, other.addr) is S.SCAN_SUCCEED
    assert other.process.read(other.addr, HPAGE) == block.content()


def per_node(machine: Machine, item: int) -> list[int]:
    return [node[item] for node in machine.mem.vmstat.node]


def test_counters_of_other_nodes_stay_behind(make_machine: MakeMachine) -> None:
    """Holes count on the huge page's node, old pages stay counted on theirs; a rollback moves none.

    Linux does the same: node by node the numbers drift, their sum does not.
    """
    machine = make_machine("64M", nodes=2)
    process = machine.process()
    file = process.memfd_create("nodes")
    process.ftruncate(file, HPAGE)
    process.node = 1
    fill_file(process, file, range(300))
    process.node = 0
    fill_file(process, file, range(300, 500))
    addr = map_block(process, file)
    process.read(addr, PAGE)
    machine.lru_add_drain_all()
    machine.thp.shmem_enabled = "advise"
    bad = process.cached_pfn(file, 0)
    assert bad is not None
    machine.mem.poison.poison(bad, 0)
    assert machine.collapse(process, addr) is S.SCAN_COPY_MC
    assert per_node(machine, NR_SHMEM) == per_node(machine, NR_FILE_PAGES) == [200, 300]
    machine.mem.poison.unpoison(bad)
    assert machine.collapse(process, addr) is S.SCAN_SUCCEED
    assert per_node(machine, NR_SHMEM) == per_node(machine, NR_FILE_PAGES) == [200, 312]
    assert per_node(machine, NR_SHMEM_THPS) == [0, 512]
