"""hpage_collapse_scan_file and collapse_file, held against loops that go page by page.

The loops are the reference's sections 4.1 and 4.2, one `if` for each line of them; the model looks
at 512 pages together, and must stop where they stop, for their reason, having done what they did.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    small_machine,
)
from file_kit import ALL, FileBlock, books, cache_is_huge, disk_block, shmem_block
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pykhuge import Advice, Machine, ScanResult
from pykhuge.mm.gup import LockedPage, UserPages
from pykhuge.mm.page_writeback import set_page_dirty, start_page_writeback
from pykhuge.mm.swap import (
    del_pages_from_lru,
    isolate_lru_pages,
    lru_cache_add,
    putback_lru_pages,
)

S = ScanResult
State = frozenset[str]
PLAIN: State = frozenset()
PLACES = st.one_of(st.sampled_from([0, 1, 14, 255, 510, 511]), st.integers(0, NR - 1))


def states_of(kinds: list[str], marks: list[str]) -> st.SearchStrategy[dict[int, State]]:
    """A few places that are not plain cached pages: of one kind, or pages with marks."""
    state = st.one_of(
        st.sampled_from(kinds).map(lambda kind: frozenset([kind])),
        st.sets(st.sampled_from(marks), min_size=1, max_size=3).map(frozenset),
    )
    return st.dictionaries(PLACES, state, max_size=6)


class Found(NamedTuple):
    """Where a walk ended: the result, the place, and pages present and swapped before it."""

    result: ScanResult
    place: int
    present: int
    swap: int


# Scanning.


def slow_scan(states: dict[int, State], *, daemon: bool, max_none: int, max_swap: int) -> Found:
    """Section 4.1, entry by entry."""
    present = swap = 0
    for place in range(NR):
        state = states.get(place, PLAIN)
        if "hole" in state:
            continue
        if "swapped" in state:
            swap += 1
            if daemon and swap > max_swap:
                return Found(S.SCAN_EXCEED_SWAP_PTE, place, present, swap)
            continue
        if "off lru" in state:
            return Found(S.SCAN_PAGE_LRU, place, present, swap)
        if "pinned" in state:
            return Found(S.SCAN_PAGE_COUNT, place, present, swap)
        present += 1
    if daemon and present < NR - max_none:
        return Found(S.SCAN_EXCEED_NONE_PTE, -1, present, swap)
    return Found(S.SCAN_SUCCEED, -1, present, swap)


@contextmanager
def marked(block: FileBlock, states: dict[int, State]) -> Iterator[None]:
    """Give pages their marks meanwhile: references of others, off their list, locked."""
    mem, held, isolated = block.machine.mem, [], []
    for place, state in states.items():
        if "off lru" in state:
            isolated.append(block.pfn(place))
        if "pinned" in state:
            mem.pages.refcount[block.pfn(place)] += 1
            held.append(UserPages(mem, np.array([block.pfn(place)]), pinned=False))
        if "locked" in state:
            mem.pages.refcount[block.pfn(place)] += 1
            held.append(LockedPage(mem, block.pfn(place)))
    off = np.array(isolated, np.int64)
    if isolated:
        isolate_lru_pages(mem, off)
    yield
    putback_lru_pages(mem, off)
    for each in held:
        each.release()


@settings(max_examples=60, deadline=None)
@given(
    states=states_of(["hole", "swapped"], ["off lru", "pinned"]),
    daemon=st.booleans(),
    max_none=st.sampled_from([0, 1, 3, 511]),
    max_swap=st.sampled_from([0, 1, 3, 64]),
)
@example(states={0: frozenset(["off lru", "pinned"])}, daemon=True, max_none=0, max_swap=0)
def test_scan_stops_where_a_loop_over_the_entries_stops(
    states: dict[int, State], daemon: bool, max_none: int, max_swap: int
) -> None:
    """Result, scan_pfn, present and swap of the trace event."""
    machine = small_machine("16M", swap="8M")
    machine.khugepaged_settings.max_ptes_none = max_none
    machine.khugepaged_settings.max_ptes_swap = max_swap
    block = block_in(machine, states)
    expected = slow_scan(states, daemon=daemon, max_none=max_none, max_swap=max_swap)
    with marked(block, states):
        stopper = (
            block.pfn(expected.place)
            if S.SCAN_PAGE_COUNT <= expected.result <= S.SCAN_PAGE_LRU
            else -1
        )
        task = block.task(is_khugepaged=daemon)
        try:
            task.run_until("scanned")
            went_on = True
        except LookupError:
            went_on = False
        task.finish()
        (event,) = [r.event for r in machine.trace if r.event.name == "mm_khugepaged_scan_file"]
    assert went_on == (expected.result is S.SCAN_SUCCEED)
    assert (event.present, event.swap) == (expected.present, expected.swap)
    if not went_on:
        assert (event.result, event.scan_pfn) == (expected.result, stopper)
    machine.audit()


def block_in(machine: Machine, states: dict[int, State]) -> FileBlock:
    """A shmem block, all mapped, with its holes, swapped and preallocated pages as told."""
    absent = {p for p, state in states.items() if state & {"hole", "fallocated"}}
    block = shmem_block(machine, held=sorted(set(ALL) - absent))
    for place, state in states.items():
        where = block.addr + place * PAGE
        if "swapped" in state:
            block.process.madvise(where, PAGE, Advice.MADV_PAGEOUT)
        if "fallocated" in state:
            block.process.fallocate(block.file, place * PAGE, PAGE, keep_size=True)
    machine.lru_add_drain_all()
    machine.trace.clear()
    return block


# Replacing.


class Ended(NamedTuple):
    """How the replacing ended: the result, the place, and which pages were unmapped by then."""

    result: ScanResult
    place: int
    unmapped: set[int]


def slow_shmem(states: dict[int, State], room: int, fail_stores: set[int]) -> Ended:
    """Section 4.2, left column, index by index."""
    charged, unmapped = 0, set[int]()
    for place in range(NR):
        state = states.get(place, PLAIN)
        if "hole" in state:
            if place == 0 and all("hole" in states.get(other, PLAIN) for other in range(NR)):
                return Ended(S.SCAN_TRUNCATED, place, unmapped)
            if charged == room:
                return Ended(S.SCAN_FAIL, place, unmapped)
            if place in fail_stores:
                return Ended(S.SCAN_STORE_FAILED, place, unmapped)
            charged += 1
            continue
        if "swapped" in state:
            return Ended(S.SCAN_DEL_PAGE_LRU, place, unmapped)  # it waits in the batch
        result = slow_page(state)
        if "fallocated" not in state and result in (S.SCAN_SUCCEED, S.SCAN_PAGE_COUNT):
            unmapped.add(place)
        if result is not S.SCAN_SUCCEED:
            return Ended(result, place, unmapped)
    return Ended(S.SCAN_SUCCEED, NR, unmapped)


def slow_disk(states: dict[int, State]) -> Ended:
    """Section 4.2, right column, index by index."""
    unmapped = set[int]()
    drained = False
    for place in range(NR):
        state = states.get(place, PLAIN)
        if "absent" in state:
            drained = True  # readahead, then this CPU's batch
            continue
        if drained:
            state -= {"in batch"}
        if state & {"dirty", "writeback"}:
            return Ended(S.SCAN_FAIL, place, unmapped)
        result = slow_page(state)
        if result in (S.SCAN_SUCCEED, S.SCAN_PAGE_COUNT):
            unmapped.add(place)
        if result is not S.SCAN_SUCCEED:
            return Ended(result, place, unmapped)
    return Ended(S.SCAN_SUCCEED, NR, unmapped)


def slow_page(state: State) -> ScanResult:
    """Section 4.2, both columns, from the trylock on."""
    if "locked" in state:
        return S.SCAN_PAGE_LOCK
    if "in batch" in state:
        return S.SCAN_DEL_PAGE_LRU
    if "kept" in state:
        return S.SCAN_PAGE_HAS_PRIVATE
    if "pinned" in state:
        return S.SCAN_PAGE_COUNT
    return S.SCAN_SUCCEED


@contextmanager
def changed_meanwhile(block: FileBlock, states: dict[int, State]) -> Iterator[None]:
    """What others do to the pages between the scan and the collapse."""
    mem = block.machine.mem
    with marked(block, states):
        for place, state in states.items():
            if state & {"hole", "swapped", "fallocated", "absent"}:
                continue
            one = np.array([block.pfn(place)])
            if state & {"dirty", "writeback"}:
                set_page_dirty(mem, one)
            if "writeback" in state:
                start_page_writeback(mem, one)
            if state & {"private", "kept"}:
                block.process.attach_private(block.file, place, releasable="kept" not in state)
            if "in batch" in state:
                del_pages_from_lru(mem, one)
                mem.pages.refcount[one] += 1
                lru_cache_add(mem, one)
        yield


def check(block: FileBlock, states: dict[int, State], expected: Ended) -> None:
    """Run the collapse behind its scan, and compare."""
    machine, process = block.machine, block.process
    mapped = {place for place in ALL if process.pfn(block.addr + place * PAGE) is not None}
    task = block.task(is_khugepaged=False)
    task.run_until("scanned")
    with changed_meanwhile(block, states):
        before = books(machine, block.file)
        task.finish()
        after = books(machine, block.file)
        (event,) = [r.event for r in machine.trace if r.event.name == "mm_khugepaged_collapse_file"]
        left = {place for place in ALL if process.pfn(block.addr + place * PAGE) is not None}
    if expected.result is S.SCAN_SUCCEED:
        assert cache_is_huge(block.file)
    else:
        assert (event.result, event.index) == (expected.result, expected.place)
        assert mapped - left == expected.unmapped & mapped
        assert not cache_is_huge(block.file)
        swapped_in = before.get("swapped", 0) - after.get("swapped", 0)
        read_in = after["nrpages"] - before["nrpages"] - swapped_in
        absent = {place for place, state in states.items() if "absent" in state}
        assert read_in == len([place for place in absent if place < expected.place])
        for name in ("alloced", "i_blocks", "used_blocks", "vm_committed_as", "nr_thps"):
            assert before.get(name) == after.get(name), name
    machine.finish_io()
    machine.audit()


@settings(max_examples=80, deadline=None)
@given(
    states=states_of(["hole", "swapped", "fallocated"], ["locked", "in batch", "pinned"]),
    room=st.sampled_from([0, 1, 2, 600]),
    fail_stores=st.sets(PLACES, max_size=2),
)
@example(states={place: frozenset(["hole"]) for place in ALL}, room=600, fail_stores=set())
@example(states={0: frozenset(["hole"])}, room=0, fail_stores={0})
@example(states={0: frozenset(["locked", "in batch", "pinned"])}, room=1, fail_stores=set())
def test_collapse_of_shmem_goes_as_a_loop_over_the_indexes_goes(
    states: dict[int, State], room: int, fail_stores: set[int]
) -> None:
    """Result, index, pages unmapped by then, and every charge taken back."""
    machine = small_machine("16M", swap="8M")
    block = block_in(machine, {} if all_holes(states) else states)
    machine.mem.commit_limit = machine.mem.vm_committed_as + room
    block.file.f_mapping.fail_stores = fail_stores
    if all_holes(states):
        check_truncated(block, slow_shmem(states, room, fail_stores))
    else:
        check(block, states, slow_shmem(states, room, fail_stores))


def all_holes(states: dict[int, State]) -> bool:
    """Whether nothing is left of the block: to be punched out behind the scan."""
    return len(states) == NR


def check_truncated(block: FileBlock, expected: Ended) -> None:
    """The block is punched out between the scan and the collapse."""
    task = block.task(is_khugepaged=False)
    task.run_until("scanned")
    block.process.fallocate(block.file, 0, HPAGE, punch_hole=True)
    assert task.finish() is expected.result is S.SCAN_TRUNCATED
    block.machine.audit()


@settings(max_examples=80, deadline=None)
@given(
    states=states_of(
        ["absent"], ["dirty", "writeback", "locked", "in batch", "private", "kept", "pinned"]
    )
)
@example(states={3: frozenset(["absent"]), 9: frozenset(["in batch"])})
@example(states={3: frozenset(["in batch"]), 9: frozenset(["absent"])})
@example(states={3: frozenset(["kept", "pinned"]), 9: frozenset(["dirty"])})
def test_collapse_of_a_disk_file_goes_as_a_loop_over_the_indexes_goes(
    states: dict[int, State],
) -> None:
    """Result, index, pages unmapped by then, pages read in, nr_thps."""
    machine = small_machine("16M")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block"
        cached = [place for place in ALL if "absent" not in states.get(place, PLAIN)]
        block = disk_block(machine, path, cached=cached, mapped=cached)
        # Dirty pages are of a writer that has gone.
        block.process.close(block.process.open(str(path), os.O_RDWR))
        check(block, states, slow_disk(states))
