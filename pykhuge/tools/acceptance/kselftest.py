"""The scenarios of the kernel's own khugepaged selftest, in 45 combinations, and its other test.

Kernel: tools/testing/selftests/mm/khugepaged.c. Facts are its; each function here is the test of
that name there, and its `pykhuge acceptance` row tells what every collapse it asks for came to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SIZE
from pykhuge.process import Advice
from pykhuge.tools.acceptance.scenario import Scenario, check
from pykhuge.tools.acceptance.selftest_kit import (
    AREAS,
    BASE_ADDR,
    CONTEXTS,
    AnonArea,
    Area,
    Context,
    Khugepaged,
    Madvise,
    Selftest,
)

__all__ = ["NR_COMBINATIONS", "scenarios"]

NR_COMBINATIONS = 45
GROUP = "kselftest"
COLLAPSED, LEFT_ALONE = "collapsed", "left alone"
# What a limit that is exceeded by one, then met, makes of the daemon; MADV_COLLAPSE never asks.
LIMITED = {"khugepaged": f"{LEFT_ALONE}, {COLLAPSED}", "madvise": COLLAPSED}


def alloc_at_fault() -> str:
    """The first touch brings in a huge page, and the loss of one page splits its PMD."""
    with Selftest() as selftest:
        area = AnonArea(selftest)
        with selftest.pushed(enabled="always"):
            addr = area.setup(1)
            area.process.write(addr, b"\1")
            check(area.check_huge(addr, 1), "a huge page at the first touch")
        area.process.madvise(addr, PAGE_SIZE, Advice.MADV_DONTNEED)
        check(area.check_huge(addr, 0), "the PMD split by MADV_DONTNEED")
        area.cleanup(addr, 1)
    return "huge, then split"


def collapse_full(context: Context, area: Area) -> str:
    """Four blocks, all of them touched."""
    addr = area.setup(4)
    area.fault(addr, 0, 4 * HPAGE_PMD_NR)
    result = context.collapse(area, addr, 4)
    area.validate(addr, 4 * HPAGE_PMD_NR)
    area.cleanup(addr, 4)
    return result


def collapse_empty(context: Context, area: Area) -> str:
    """A block that nobody has touched."""
    addr = area.setup(1)
    result = context.collapse(area, addr, 1)
    area.cleanup(addr, 1)
    return result


def collapse_single_pte_entry(context: Context, area: Area) -> str:
    """One page of 512."""
    addr = area.setup(1)
    area.fault(addr, 0, 1)
    result = context.collapse(area, addr, 1)
    area.validate(addr, 1)
    area.cleanup(addr, 1)
    return result


def collapse_max_ptes_none(context: Context, area: Area) -> str:
    """One page fewer than max_ptes_none wants, then as many."""
    max_ptes_none = HPAGE_PMD_NR // 2
    with area.selftest.pushed(max_ptes_none=str(max_ptes_none)):
        addr = area.setup(1)
        results = []
        for touched in (HPAGE_PMD_NR - max_ptes_none - 1, HPAGE_PMD_NR - max_ptes_none):
            area.fault(addr, 0, touched)
            results.append(context.collapse(area, addr, 1))
            area.validate(addr, touched)
            if not context.enforces_limits:
                break
        area.cleanup(addr, 1)
    return ", ".join(results)


def collapse_swapin_single_pte(context: Context, area: Area) -> str:
    """One page on swap."""
    addr = area.setup(1)
    area.fault(addr, 0, HPAGE_PMD_NR)
    _swap_out(area, addr, 1)
    result = context.collapse(area, addr, 1)
    area.validate(addr, HPAGE_PMD_NR)
    area.cleanup(addr, 1)
    return result


def collapse_max_ptes_swap(context: Context, area: Area) -> str:
    """One page more on swap than max_ptes_swap allows, then as many."""
    max_ptes_swap = int(area.selftest.machine.sysfs["khugepaged/max_ptes_swap"])
    addr = area.setup(1)
    results = []
    for swapped in (max_ptes_swap + 1, max_ptes_swap):
        area.fault(addr, 0, HPAGE_PMD_NR)
        _swap_out(area, addr, swapped)
        results.append(context.collapse(area, addr, 1))
        area.validate(addr, HPAGE_PMD_NR)
        if not context.enforces_limits:
            break
    area.cleanup(addr, 1)
    return ", ".join(results)


def _swap_out(area: Area, addr: int, nr: int) -> None:
    area.process.madvise(addr, nr * PAGE_SIZE, Advice.MADV_PAGEOUT)
    area.check_swap(addr, nr)


def collapse_single_pte_entry_compound(context: Context, area: Area) -> str:
    """One entry, which maps a page of a huge one."""
    addr = area.alloc_hpage()
    process = area.process
    process.madvise(addr, HPAGE_PMD_SIZE, Advice.MADV_NOHUGEPAGE)
    process.madvise(addr + PAGE_SIZE, HPAGE_PMD_SIZE - PAGE_SIZE, Advice.MADV_DONTNEED)
    check(area.check_huge(addr, 0), "the PMD split")
    result = context.collapse(area, addr, 1)
    area.validate(addr, 1)
    area.cleanup(addr, 1)
    return result


def collapse_full_of_compound(context: Context, area: Area) -> str:
    """512 entries, which map the pages of one huge page."""
    addr = area.alloc_hpage()
    _split_pmd(area, addr)
    result = context.collapse(area, addr, 1)
    area.validate(addr, HPAGE_PMD_NR)
    area.cleanup(addr, 1)
    return result


def _split_pmd(area: Area, addr: int) -> None:
    """MADV_NOHUGEPAGE of the first page cuts the VMA, and its PMD with it."""
    area.process.madvise(addr, PAGE_SIZE, Advice.MADV_NOHUGEPAGE)
    area.process.madvise(addr, HPAGE_PMD_SIZE, Advice.MADV_NOHUGEPAGE)
    check(area.check_huge(addr, 0), "the PMD split")


def collapse_compound_extreme(context: Context, area: Area) -> str:
    """512 entries, each of which maps a page of another huge page.

    The block is built from its end: each round a huge page is made behind what there is, and all
    of it but that page's first small page moved below, to make room for the next.
    """
    process, far = area.process, BASE_ADDR + 2 * HPAGE_PMD_SIZE
    area.setup(1)
    for done in range(HPAGE_PMD_NR):
        process.madvise(BASE_ADDR, HPAGE_PMD_SIZE, Advice.MADV_HUGEPAGE)
        area.fault(BASE_ADDR, 0, HPAGE_PMD_NR)
        check(area.check_huge(BASE_ADDR, 1), f"huge page {done}")
        process.madvise(BASE_ADDR, HPAGE_PMD_SIZE, Advice.MADV_NOHUGEPAGE)
        old, kept = done * PAGE_SIZE, (done + 1) * PAGE_SIZE
        process.mremap(BASE_ADDR - old, old + HPAGE_PMD_SIZE, far, kept)
        process.mremap(far, kept, BASE_ADDR - kept, kept + HPAGE_PMD_SIZE)
    addr = BASE_ADDR - HPAGE_PMD_SIZE
    process.munmap(BASE_ADDR, HPAGE_PMD_SIZE)
    area.fault(addr, 0, HPAGE_PMD_NR)
    check(area.check_huge(addr, 0), "512 small entries")
    heads = {area.head(addr + page * PAGE_SIZE) for page in range(HPAGE_PMD_NR)}
    check(len(heads) == HPAGE_PMD_NR, f"512 huge pages: {len(heads)}")
    result = context.collapse(area, addr, 1)
    area.validate(addr, HPAGE_PMD_NR)
    area.cleanup(addr, 1)
    return result


def collapse_fork(context: Context, area: Area) -> str:
    """A child collapses a block with a page that it shares with its parent."""
    addr = area.setup(1)
    area.fault(addr, 0, 1)
    check(area.check_huge(addr, 0), "a small page")
    with area.child():
        check(area.check_huge(addr, 0), "a small page in the child")
        area.fault(addr, 1, 2)
        result = context.collapse(area, addr, 1)
        area.validate(addr, 1)
        area.cleanup(addr, 1)
    check(area.check_huge(addr, 0), "the parent still has a small page")
    area.validate(addr, 1)
    area.cleanup(addr, 1)
    return result


def collapse_fork_compound(context: Context, area: Area) -> str:
    """A child collapses a block that it shares as a huge page with its parent."""
    addr = area.alloc_hpage()
    with area.child():
        check(area.check_huge(addr, 1), "a huge page in the child")
        _split_pmd(area, addr)
        area.fault(addr, 0, 1)
        with area.selftest.pushed(max_ptes_shared=str(HPAGE_PMD_NR - 1)):
            result = context.collapse(area, addr, 1)
        area.validate(addr, HPAGE_PMD_NR)
        area.cleanup(addr, 1)
    _parent_still_has_a_huge_page(area, addr)
    return result


def _parent_still_has_a_huge_page(area: Area, addr: int) -> None:
    check(area.check_huge(addr, 1), "the parent still has a huge page")
    area.validate(addr, HPAGE_PMD_NR)
    area.cleanup(addr, 1)


def collapse_max_ptes_shared(context: Context, area: Area) -> str:
    """One page more shared than max_ptes_shared allows, then as many."""
    max_ptes_shared = int(area.selftest.machine.sysfs["khugepaged/max_ptes_shared"])
    addr = area.alloc_hpage()
    results = []
    with area.child():
        check(area.check_huge(addr, 1), "a huge page in the child")
        for shared in (max_ptes_shared + 1, max_ptes_shared):
            area.fault(addr, 0, HPAGE_PMD_NR - shared)
            check(area.check_huge(addr, 0), "small pages in the child")
            results.append(context.collapse(area, addr, 1))
            if not context.enforces_limits:
                break
        area.validate(addr, HPAGE_PMD_NR)
        area.cleanup(addr, 1)
    _parent_still_has_a_huge_page(area, addr)
    return ", ".join(results)


def madvise_collapse_existing_thps(context: Context, area: Area) -> str:
    """MADV_COLLAPSE of what is huge already."""
    assert isinstance(context, Madvise)
    addr = area.setup(1)
    area.fault(addr, 0, HPAGE_PMD_NR)
    results = [context.collapse(area, addr, 1)]
    area.validate(addr, HPAGE_PMD_NR)
    results.append(context.collapse_anyhow(area, addr, 1))
    area.validate(addr, HPAGE_PMD_NR)
    area.cleanup(addr, 1)
    return ", ".join(results)


def madvise_retracted_page_tables(context: Context, area: Area) -> str:
    """MADV_COLLAPSE of a block that khugepaged has collapsed, leaving its PMD empty."""
    addr = area.setup(1)
    area.fault(addr, 0, HPAGE_PMD_NR)
    check(Khugepaged().wait_for_scan(area, addr, 1), "khugepaged has scanned all in time")
    check(area.process.pfn(addr) is None, "khugepaged has left the PMD empty")
    result = context.collapse(area, addr, 1)
    area.validate(addr, HPAGE_PMD_NR)
    area.cleanup(addr, 1)
    return result


class Test(NamedTuple):
    """A test, with the types of memory and the contexts it is run for, and what comes out.

    on_tmpfs: whether it is for files of a tmpfs too.
    """

    play: Callable[[Context, Area], str]
    types: tuple[str, ...]
    expected: dict[str, str]
    on_tmpfs: bool = False
    memory: str = "1G"


ANON, ANON_FILE, ALL = ("anon",), ("anon", "file"), ("anon", "file", "shmem")
BOTH = dict.fromkeys(CONTEXTS, COLLAPSED)
TESTS = (
    Test(collapse_full, ALL, BOTH, on_tmpfs=True),
    Test(collapse_empty, ANON, dict.fromkeys(CONTEXTS, LEFT_ALONE)),
    Test(collapse_single_pte_entry, ALL, BOTH, on_tmpfs=True),
    Test(collapse_max_ptes_none, ANON_FILE, LIMITED),
    Test(collapse_single_pte_entry_compound, ANON_FILE, BOTH),
    Test(collapse_full_of_compound, ALL, BOTH, on_tmpfs=True),
    Test(collapse_compound_extreme, ANON, BOTH, memory="2G"),
    Test(collapse_swapin_single_pte, ANON, BOTH),
    Test(collapse_max_ptes_swap, ANON, LIMITED),
    Test(collapse_fork, ANON, BOTH),
    Test(collapse_fork_compound, ANON, BOTH),
    Test(collapse_max_ptes_shared, ANON, LIMITED),
    Test(madvise_collapse_existing_thps, ALL, {"madvise": f"{COLLAPSED}, {COLLAPSED}"}, True),
    Test(madvise_retracted_page_tables, ("file", "shmem"), {"madvise": COLLAPSED}, True),
)


def scenarios() -> list[Scenario]:
    """All of them, in the order of the selftest; those on a tmpfs behind the 45."""
    found = [Scenario(GROUP, "alloc_at_fault", "anon", "fault", "huge, then split", alloc_at_fault)]
    found += [
        _scenario(test, c, memory) for test in TESTS for c in test.expected for memory in test.types
    ]
    found += [_scenario(test, c, "tmpfs") for test in TESTS if test.on_tmpfs for c in test.expected]
    return found


def _scenario(test: Test, context: str, memory: str) -> Scenario:
    def play() -> str:
        with Selftest(test.memory) as selftest:
            return test.play(CONTEXTS[context](), AREAS[memory](selftest))

    return Scenario(GROUP, test.play.__name__, memory, context, test.expected[context], play)
