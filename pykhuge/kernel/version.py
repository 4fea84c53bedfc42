"""Which kernel a machine is: what later ones do otherwise than the series, each a switch.

`KernelVersion.REF` is the kernel at "Memory poison recovery in khugepaged", just before 6.4, and
has every switch off; `KernelVersion.V6_18` has them all on. Code that differs asks `mem.version`.

    Machine(kernel=KernelVersion.V6_18)
    Machine(kernel=replace(KernelVersion.REF, name="6.8-like", file_thp_without_exec=True))
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

__all__ = ["KernelVersion"]

# The one value of enum scan_result that went: all above it moved down.
_SCAN_PAGE_RO = 11


def _since(version: str, what: str, *, unseen: str = "") -> bool:
    """One difference. unseen: why no layout of `pykhuge conform` shows it."""
    metadata = {"since": version, "what": what, "unseen": unseen}
    switch: bool = field(default=False, metadata=metadata)
    return switch


@dataclass(frozen=True)
class KernelVersion:
    """A kernel by name and by what it does otherwise than REF; each switch is False there."""

    REF: ClassVar[KernelVersion]
    V6_18: ClassVar[KernelVersion]
    OLDEST: ClassVar[tuple[int, int]] = (6, 1)
    NEWEST: ClassVar[tuple[int, int]] = (6, 18)

    name: str
    # What REF has of its own, and earlier kernels have not.
    collapse_recovers: bool = True  # 6.4: poison met by khugepaged's copy is no panic
    cow_recovers: bool = True  # 6.2: nor is poison met by copy-on-write
    exceed_none_is_ebusy: bool = _since(
        "6.4", "SCAN_EXCEED_NONE_PTE is EBUSY to MADV_COLLAPSE, not EINVAL"
    )
    collapse_file_keeps_pages: bool = _since(
        "6.4",
        "collapse_file leaves the old pages in the cache, locked and isolated, until all are"
        " copied; holes are looked at again then (SCAN_PAGE_FILLED), and userfaultfd may forbid"
        " them; the trace names the huge page whatever became of it",
    )
    collapse_file_drains_shmem: bool = _since(
        "6.4", "the LRU batch is drained after collapse_file has brought in a page of shmem"
    )
    swapin_ret_is_scan_result: bool = _since(
        "6.5",
        "mm_collapse_huge_page_swapin prints the number of the scan_result, not 0 or 1",
        unseen="the two differ where somebody else holds a page in the swap cache locked",
    )
    retract_without_mmap_lock: bool = _since(
        "6.6",
        "retract_page_tables needs no mmap_lock and notes nothing for later; what maps a cached"
        " huge page by a table is dealt with at once, under mmap_lock for read",
    )
    pgfault_without_retries: bool = _since(
        "6.5",
        "a fault that is to be tried again, for a lock or for userfaultfd, does not count as one",
        unseen="pgfault moves by all that a process does",
    )
    migration_drains_mlocked: bool = _since(
        "6.7 (eebb3dabbb5c)",
        "a page that has moved goes onto its LRU list at once only if it is mlocked, not whenever"
        " it is mapped",
        unseen="no layout has pages that are taken out of use",
    )
    remove_asks_may_write: bool = _since(
        "6.7 (e8e17ee90eaf)",
        "MADV_REMOVE of a shared mapping that could be made writable need not find it so",
        unseen="no layout protects what it punches",
    )
    file_thp_without_exec: bool = _since(
        "6.8 (7fbb5e188248)",
        "files need not be mapped with VM_EXEC",
        unseen="files on disks need CONFIG_READ_ONLY_THP_FOR_FS",
    )
    per_size_enabled: bool = _since(
        "6.8",
        "hugepages-2048kB/enabled decides for anonymous memory; `inherit` there asks `enabled`",
    )
    populate_stops_at_gap: bool = _since(
        "6.9 (631426ba1d45)",
        "MADV_POPULATE_READ and _WRITE end at the first gap, not behind the last mapping",
    )
    lru_batch_of_31: bool = _since(
        "6.9",
        "a CPU collects 31 pages, not 15, before it puts them onto an LRU list",
        unseen="what else is in a CPU's batch hangs on what that CPU did before",
    )
    copy_queues_memory_failure: bool = _since(
        "6.11 (28bdacbcb36d)",
        "a copy that meets poison has memory_failure() deal with the page",
        unseen="it takes memory that is poisoned",
    )
    hwpoison_requires_action: bool = _since(
        "6.11 (66802526298e)",
        "MADV_HWPOISON is as if its caller had touched the page: it is sent SIGBUS at once",
        unseen="no layout has pages that are poisoned",
    )
    unsplit_thp_kills: bool = _since(
        "6.11 (1a3798dececa)",
        "a bad page in a huge page that cannot be split counts as failed, not as ignored, and those"
        " who map it are sent SIGBUS; memory_failure returns EHWPOISON then, not EBUSY",
        unseen="no layout has pages that are poisoned",
    )
    action_result_says_more: bool = _since(
        "6.11 (b8b9488d50b7)",
        "memory_failure of poison that is known has a result, `already poisoned: Failed`, and"
        " counts again; a page of a kind that cannot be dealt with is a `get hwpoison page`, not an"
        " `unknown page`, and one in an unknown state is ignored, which was a failure",
        unseen="no layout has pages that are poisoned",
    )
    offline_logs_frame_first: bool = _since(
        "6.11 (fa70d377b449, 865319f772e6)",
        "the log's lines of unpoison and soft offline are of one form, `Soft offline: 0x64: why`",
        unseen="no layout has pages that are poisoned",
    )
    shmem_heeds_past_advice: bool = _since(
        "6.11",
        "whether shmem_enabled=advise lets a mapping have huge pages is asked of the advice it had"
        " before: the first MADV_HUGEPAGE does not make the process known to khugepaged",
    )
    per_size_shmem_enabled: bool = _since(
        "6.11",
        "hugepages-2048kB/shmem_enabled decides for anonymous shmem; `inherit` there asks"
        " `shmem_enabled`",
    )
    shmem_allocates_what_fits: bool = _since(
        "6.11", "a fault in shmem gets a huge page only if the mapping could have it by a PMD"
    )
    finish_fault_maps_folios: bool = _since(
        "6.11",
        "a fault on a page of a cached compound page maps all of it by PTEs, where that fits and"
        " none of them is taken",
    )
    collapse_file_addr_in_hex: bool = _since(
        "6.12", "mm_khugepaged_collapse_file prints the address in hex"
    )
    no_pg_error: bool = _since(
        "6.12",
        "PG_error is gone: pages whose contents memory_failure has lost do not show KPF_ERROR",
        unseen="no layout has pages that are poisoned",
    )
    split_maps_zero_page: bool = _since(
        "6.12", "splitting an anonymous huge page maps the zero page for subpages that are zero"
    )
    khugepaged_runs_for_shmem: bool = _since(
        "6.12", "khugepaged runs also if shmem alone may have huge pages"
    )
    set_pmd_heeds_nohugepage: bool = _since(
        "6.12 (2b0f922323cc)",
        "a cached huge page is not mapped by a PMD where MADV_NOHUGEPAGE, or the process,"
        " wants none",
    )
    large_folios: bool = _since(
        "by 6.13",
        "a subpage counts as shared if any part of its compound page is mapped by another mm; the"
        " trace names the head; MADV_PAGEOUT and MADV_FREE take compound pages mapped by PTEs",
    )
    disable_thp_is_exit: bool = _since(
        "by 6.13",
        "a process with MMF_DISABLE_THP is treated as one that exits: SCAN_ANY_PROCESS",
        unseen="it must be set in the middle of a collapse",
    )
    huge_zero_page_gives_huge: bool = _since(
        "6.13", "a write to the huge zero page gets a huge page if there is one, not small ones"
    )
    mremap_lifts_uffd_wp: bool = _since(
        "6.13 (0cef0bb836e3)",
        "mremap moves pages that userfaultfd watches without their write protection",
    )
    shmem_swaps_huge: bool = _since(
        "6.14",
        "a huge page of shmem goes to swap as one, and comes back as one",
    )
    dontneed_frees_page_table: bool = _since(
        "6.14", "MADV_DONTNEED of a whole block frees its page table (CONFIG_PT_RECLAIM)"
    )
    split_leaves_pieces: bool = _since(
        "6.15",
        "a huge page of shmem that is punched or truncated in part is halved again and again"
        " around the cut: what is not near it stays in compound pages of smaller orders",
    )
    known_poison_counts_once: bool = _since(
        "6.17 (3be306cccdcc)",
        "memory_failure of poison that is known counts no more, and logs its result alone, `already"
        " poisoned page: Failed`",
        unseen="no layout has pages that are poisoned",
    )
    mremap_moves_many: bool = _since(
        "6.17",
        "mremap moves a range of several mappings, with the gaps between them, and refuses what it"
        " refuses before it unmaps anything",
    )
    uffd_unregisters_its_own: bool = _since(
        "6.17 (23ec90eb122f)",
        "UFFDIO_UNREGISTER of what another userfaultfd watches is EINVAL",
        unseen="no layout has two userfaultfds in one process",
    )
    fault_around_maps_folios: bool = _since(
        "6.18",
        "fault-around maps all of a cached compound page that its window has a part of, where that"
        " fits",
    )
    thp_disable_except_advised: bool = _since(
        "6.18", "PR_SET_THP_DISABLE can spare what MADV_HUGEPAGE or MADV_COLLAPSE asks for"
    )
    no_scan_page_ro: bool = _since(
        "6.18",
        "SCAN_PAGE_RO is gone: blocks without a writable entry collapse, no trace prints"
        " `writable`, and the numbers of enum scan_result above it are one less",
    )

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name={self.name!r}: allowed a string")
        for switch in ("collapse_recovers", "cow_recovers", *self.switches()):
            value = getattr(self, switch)
            if not isinstance(value, bool):
                raise TypeError(f"{switch}={value!r}: allowed False and True")

    @classmethod
    def switches(cls) -> dict[str, dict[str, str]]:
        """Of each switch: `since`, `what`, and `unseen`, why no layout shows it if none does."""
        return {each.name: dict(each.metadata) for each in fields(cls) if each.metadata}

    def is_later(self) -> bool:
        """Whether any switch is on."""
        return any(getattr(self, switch) for switch in self.switches())

    @classmethod
    def at(cls, major: int, minor: int) -> KernelVersion:
        """Linux `major`.`minor`: what differs since then or before.

        A kernel later than `NEWEST` is as that one, as far as is known here.
        Raises: ValueError before 6.1, which brought MADV_COLLAPSE.
        """
        if (major, minor) < cls.OLDEST:
            raise ValueError(f"Linux {major}.{minor}: allowed 6.1 and later")
        met = {}
        for name, switch in cls.switches().items():
            since = re.findall("[0-9]+", switch["since"])
            met[name] = (int(since[0]), int(since[1])) <= (major, minor)
        recovers = {
            "collapse_recovers": (major, minor) >= (6, 4),
            "cow_recovers": (major, minor) >= (6, 2),
        }
        return cls(f"{major}.{minor}", **recovers, **met)

    def flipped(self, switch: str) -> KernelVersion:
        """The same with one difference on the wrong side."""
        change: dict[str, Any] = {switch: not getattr(self, switch)}
        return replace(self, name=f"{self.name}, {switch} wrong", **change)

    def number(self, scan_result: int) -> int:
        """The number that this kernel's enum scan_result has for `scan_result`.

        Raises: ValueError for SCAN_PAGE_RO where it is gone.
        """
        if not self.no_scan_page_ro:
            return int(scan_result)
        if scan_result == _SCAN_PAGE_RO:
            raise ValueError(f"scan_result={scan_result!r}: {self.name} has no such value")
        return int(scan_result) - (scan_result > _SCAN_PAGE_RO)


KernelVersion.REF = KernelVersion("REF")
KernelVersion.V6_18 = KernelVersion("6.18", **dict.fromkeys(KernelVersion.switches(), True))
