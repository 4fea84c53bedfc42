"""Memory: all that memory management works on, passed to every function of it.

It holds state and the few one-line ways to reach it; behaviour lives in the files above. A `Node`
is a NUMA node's range of page frames (struct pglist_data).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pykhuge._native import PteScanner
from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PhysicalMemory, lazy_zeros
from pykhuge.hw.poison import Mce, Poison
from pykhuge.kernel.clock import Clock
from pykhuge.kernel.panic import KernelPanic
from pykhuge.kernel.ratelimit import RateLimit
from pykhuge.kernel.sched import Sched, Task, WouldBlock
from pykhuge.kernel.trace import Trace, TraceEvent
from pykhuge.kernel.version import KernelVersion
from pykhuge.mm.mm_types import (
    AddressSpace,
    AnonVma,
    File,
    Inode,
    KhugepagedScan,
    MemCgroup,
    Mm,
    RegularInode,
    ShmemSuperBlock,
)
from pykhuge.mm.page import Pages, Pfns, PG_reserved, PG_zone_device
from pykhuge.mm.vmstat import NR_FREE_PAGES, VmStat

__all__ = ["LOCAL_DISTANCE", "REMOTE_DISTANCE", "Memory", "Node", "SwapDevice", "ThpSettings"]

LOCAL_DISTANCE = 10
REMOTE_DISTANCE = 20
NSEC_PER_SEC = 1_000_000_000
# node_reclaim_distance: farther nodes are not worth allocating from (RECLAIM_DISTANCE).
NODE_RECLAIM_DISTANCE = 30


class Node:
    """A NUMA node: frames [start_pfn, end_pfn).

    used: int16 by 2 MiB block, frames of it that are not free.
    high: blocks from this one on have never been used; searches end there.
    memory_failure: how they ended (/sys/devices/system/node/node*/memory_failure).
    """

    def __init__(self, nid: int, start_pfn: int, end_pfn: int) -> None:
        self.nid = nid
        self.start_pfn = start_pfn
        self.end_pfn = end_pfn
        self.nr_blocks = (end_pfn - start_pfn) // HPAGE_PMD_NR
        self.used: npt.NDArray[np.int16] = lazy_zeros(self.nr_blocks, np.int16)  # type: ignore[assignment]
        self.high = 0
        self.memory_failure = dict.fromkeys(
            ("total", "ignored", "failed", "delayed", "recovered"), 0
        )


@dataclass
class SwapDevice:
    """One swap file.

    swap_map: references to each slot, from PTEs and, one more, from the swap cache.
    contents: the page in each slot that has been written.
    shmem: slots named by a page cache instead of page tables.
    cache: page frame of each slot that is in the swap cache.
    bad: slots whose reads fail.
    synchronous_io: SWP_SYNCHRONOUS_IO; it is memory itself, such as zram, and answers at once.
    read_errors, write_errors: how often the log says that it could not.
    """

    nr_slots: int
    synchronous_io: bool = False
    swap_map: dict[int, int] = field(default_factory=dict)
    contents: dict[int, bytes] = field(default_factory=dict)
    cache: dict[int, int] = field(default_factory=dict)
    bad: set[int] = field(default_factory=set)
    shmem: set[int] = field(default_factory=set)
    free: list[int] = field(default_factory=list)
    next_slot: int = 1  # slot 0 holds the header
    read_errors: RateLimit = field(default_factory=lambda: RateLimit("end_swap_bio_read"))
    write_errors: RateLimit = field(default_factory=lambda: RateLimit("end_swap_bio_write"))

    def vm_swap_full(self) -> bool:
        """More than half of the slots are in use: cached copies are given up early."""
        return len(self.swap_map) * 2 > self.nr_slots


@dataclass
class HwPoison:
    """What memory_failure keeps.

    refs: bad pages that it holds by a reference, for good. queue: pages it has still to deal with.
    device: pages of devices among num_poisoned_pages, which are not marked. again: how often it was
    told of pages there that it knew.
    hw_memory_failure: it was not always injected. early_kill, recovery: /proc/sys/vm.
    How often the log says that there were machine checks (mce_notify), what became of pages to be
    unpoisoned (unpoison), and that the huge zero page was to be split (split_warning).
    """

    split_warning: RateLimit
    refs: set[int] = field(default_factory=set)
    queue: list[int] = field(default_factory=list)
    device: int = 0
    again: int = 0
    hw_memory_failure: bool = False
    early_kill: bool = False
    recovery: bool = True
    mce_notify: RateLimit = field(
        default_factory=lambda: RateLimit("mce_notify_irq", 60 * NSEC_PER_SEC, 2)
    )
    unpoison: RateLimit = field(default_factory=lambda: RateLimit("unpoison_memory"))


@dataclass
class ThpSettings:
    """/sys/kernel/mm/transparent_hugepage: what every fault asks.

    enabled: who gets huge pages, and whether the daemon runs. shmem_enabled: the same for shmem.
    size_enabled, size_shmem_enabled: the same in hugepages-2048kB, in kernels that have the folder;
    what they say, if not "inherit", counts instead, for shmem where it is anonymous.
    defrag: which faults may wait for a huge page to be made.
    use_zero_page: whether a read of untouched memory maps the huge zero page.
    hpage_pmd_size: bytes of a huge page; read only.
    """

    # Told whether anybody has huge pages when `enabled` was written: the daemon follows.
    on_enabled: Callable[[bool], None] = field(default_factory=lambda: lambda _: None, repr=False)
    version: KernelVersion = field(default=KernelVersion.REF, repr=False)
    enabled: str = "madvise"
    shmem_enabled: str = "never"
    size_enabled: str = "inherit"
    size_shmem_enabled: str = "inherit"
    defrag: str = "madvise"
    use_zero_page: bool = True
    # huge= of the kernel's own tmpfs mount: the last `shmem_enabled` that was a mount policy.
    shm_mnt_huge: str = field(default="never", init=False)

    ENABLED = ("always", "madvise", "never")
    SHMEM_ENABLED = ("always", "within_size", "advise", "never", "deny", "force")
    SIZE_ENABLED = ("always", "inherit", "madvise", "never")
    SIZE_SHMEM_ENABLED = ("always", "inherit", "within_size", "advise", "never")
    DEFRAG = ("always", "defer", "defer+madvise", "madvise", "never")

    @property
    def hpage_pmd_size(self) -> int:
        """The size of a huge page in bytes: 2 MiB."""
        return HPAGE_PMD_SIZE

    def __setattr__(self, name: str, value: object) -> None:
        if name == "on_enabled" and not callable(value):
            raise TypeError(f"on_enabled={value!r}: allowed a function of a boolean")
        if name == "version" and "version" in vars(self):
            raise AttributeError(f"version={value!r}: read only, it is {self.version.name}")
        if name in ("on_enabled", "version"):
            object.__setattr__(self, name, value)
            return
        if name == "hpage_pmd_size":
            raise AttributeError(f"{name}={value!r}: read only, it is {HPAGE_PMD_SIZE}")
        sizes, shmem_sizes = self.version.per_size_enabled, self.version.per_size_shmem_enabled
        allowed: dict[str, tuple[object, ...]] = {
            "enabled": self.ENABLED,
            "shmem_enabled": self.SHMEM_ENABLED,
            "size_enabled": self.SIZE_ENABLED if sizes else ("inherit",),
            "size_shmem_enabled": self.SIZE_SHMEM_ENABLED if shmem_sizes else ("inherit",),
            "defrag": self.DEFRAG,
            "use_zero_page": (False, True),
            "shm_mnt_huge": self.SHMEM_ENABLED[:4],
        }
        if name not in allowed:
            raise AttributeError(f"{name}: allowed {', '.join(allowed)}")
        if value not in allowed[name]:
            raise ValueError(f"{name}={value!r}: allowed {', '.join(map(str, allowed[name]))}")
        if name == "shmem_enabled" and value == "force" and self.size_shmem_enabled != "inherit":
            raise ValueError(
                f"shmem_enabled='force': allowed with size_shmem_enabled='inherit', "
                f"not {self.size_shmem_enabled!r}"
            )
        before = getattr(self, name), self.shm_mnt_huge
        object.__setattr__(self, name, bool(value) if name == "use_zero_page" else value)
        if name == "shmem_enabled" and value not in ("deny", "force"):
            object.__setattr__(self, "shm_mnt_huge", value)
        try:
            self._tell(name)
        except WouldBlock:
            object.__setattr__(self, name, before[0])
            object.__setattr__(self, "shm_mnt_huge", before[1])
            raise

    def _tell(self, name: str) -> None:
        """Whoever writes a knob starts and stops the daemon, if it is one that may."""
        asked = name in ("enabled", "size_enabled")
        if self.version.khugepaged_runs_for_shmem:
            asked |= name in ("shmem_enabled", "size_shmem_enabled")
        if asked:
            self.on_enabled(self.pmd_enabled())

    def pmd_enabled(self) -> bool:
        """hugepage_pmd_enabled(): whether anybody may have huge pages, and so khugepaged runs."""
        if self.enabled != "never" or self.size_enabled in ("always", "madvise"):
            return True
        if not self.version.khugepaged_runs_for_shmem or self.shmem_enabled == "deny":
            return False
        if self.size_shmem_enabled == "inherit":
            return self.shmem_enabled != "never"
        return self.size_shmem_enabled != "never"


class HeldPages(Protocol):
    """References taken from outside the page tables (mm/gup); the audit counts them."""

    pfns: Pfns
    pinned: bool
    locked: bool


class Memory:
    """All memory of one host.

    Frame 0 is the zero page. `mappings` finds the AnonVma or AddressSpace behind a key in
    page->mapping. `commit_limit` is in pages; None commits without limit (overcommit_memory=1).
    """

    def __init__(
        self,
        nr_pages_by_node: list[int],
        *,
        distances: list[list[int]],
        nr_device_pages: int,
        nr_swap_slots: int,
        swap_synchronous_io: bool,
        nr_cpus: int,
        recovery: bool,
        version: KernelVersion,
        seed: int,
    ) -> None:
        nr_pages = sum(nr_pages_by_node) + nr_device_pages
        self.recovery = recovery
        self.version = version
        self._last_pid = 0
        self.panic: KernelPanic | None = None
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.trace = Trace(self.clock)
        self.sched = Sched()
        self.log: list[str] = []

        self.ram = PhysicalMemory(nr_pages)
        self.poison = Poison(nr_pages, self.clock)
        self.pages = Pages(nr_pages)
        self.vmstat = VmStat(len(nr_pages_by_node))
        self.nodes = self._new_nodes(nr_pages_by_node)
        self.device_start = self.nodes[-1].end_pfn
        self.distances = distances
        self.node_reclaim_mode = 0

        self.lru_batches: list[list[int]] = [[] for _ in range(nr_cpus)]
        self.lru_clock = 1
        self.mappings: dict[int, AnonVma | AddressSpace] = {}
        self.next_mapping = 1
        self.inodes: list[Inode] = []
        self.regular_inodes: dict[tuple[int, int], RegularInode] = {}  # by device and number
        self.shm_mnt = ShmemSuperBlock()
        self.mounts: list[ShmemSuperBlock] = []
        self.vm_committed_as = 0
        self.commit_limit: int | None = None
        # Pages that one read asks the disk for (VM_READAHEAD_PAGES: 128 KiB), and the most of it.
        self.ra_pages = 32
        self.writeback: set[int] = set()  # pages on their way to the disk
        self.io_pages = 320
        self.memcgs = [MemCgroup(0, nr_pages)]
        self.mms: list[Mm] = []
        self.khugepaged_scan = KhugepagedScan()
        # New huge pages that nothing maps yet, and who will: for the audit.
        self.in_flight: dict[int, Task[Any]] = {}
        # Files that code in progress refers to: for the audit.
        self.held_files: list[File] = []
        # Holes that a collapse has charged, and not yet filled, by key of the cache: for the audit.
        self.charged_ahead: Counter[int] = Counter()
        # Cached huge pages that a collapse has locked, and by whom.
        self.page_locks: dict[int, Task[Any]] = {}
        self.user_pages: list[HeldPages] = []
        self.hwpoison = HwPoison(
            RateLimit("__folio_split" if version.split_leaves_pieces else "split_huge_page_to_list")
        )
        self.num_poisoned_pages = 0
        self.swap = SwapDevice(nr_swap_slots, swap_synchronous_io)
        self.thp = ThpSettings(version=version)
        self.huge_zero_pfn: int | None = None

        self.zero_pfn = 0
        self.pte_scanner = self._new_pte_scanner()
        self.nodes[0].used[0] = self.nodes[0].high = 1
        self.pages.refcount[0] = 1
        self.pages.flags[0] = PG_reserved
        self.vmstat.mod_node(NR_FREE_PAGES, -1, 0)

    def _new_nodes(self, nr_pages_by_node: list[int]) -> list[Node]:
        nodes: list[Node] = []
        start = 0
        for nid, nr in enumerate(nr_pages_by_node):
            nodes.append(Node(nid, start, start + nr))
            self.vmstat.mod_node(NR_FREE_PAGES, nr, nid)
            start += nr
        return nodes

    def _new_pte_scanner(self) -> PteScanner:
        return PteScanner(
            tables=self.ram.address,
            flags=self.pages.flags.ctypes.data,
            refcount=self.pages.refcount.ctypes.data,
            mapcount=self.pages.mapcount.ctypes.data,
            entire_mapcount=self.pages.entire_mapcount.ctypes.data,
            zero_pfn=self.zero_pfn,
            node_ends=[node.end_pfn for node in self.nodes],
            distances=self.distances,
        )

    def new_address_space(self, inode: Inode) -> AddressSpace:
        """Give `inode` a page cache of its own."""
        inode.i_mapping = AddressSpace(self.next_mapping, inode)
        self.mappings[self.next_mapping] = inode.i_mapping
        self.next_mapping += 1
        return inode.i_mapping

    def nid_of(self, pfn: int) -> int:
        """page_to_nid(). Device pages count as the last node's."""
        for node in self.nodes:
            if pfn < node.end_pfn:
                return node.nid
        return self.nodes[-1].nid

    def nids_of(self, pfns: Pfns) -> npt.NDArray[np.int64]:
        """page_to_nid() of many. Returns: int64[n]."""
        ends = [node.end_pfn for node in self.nodes[:-1]]
        return np.searchsorted(ends, pfns, side="right")

    def mod_pages(self, item: int, pfns: Pfns, sign: int) -> None:
        """Count each of `pfns` (int64[n]) `sign` times in NR_* `item` of its node."""
        if len(self.nodes) == 1:
            self.vmstat.mod_node(item, sign * len(pfns))
            return
        for nid, nr in enumerate(np.bincount(self.nids_of(pfns)).tolist()):
            if nr:
                self.vmstat.mod_node(item, sign * nr, nid)

    def mod_page(self, item: int, pfn: int, delta: int) -> None:
        """Count `delta` pages in NR_* `item` of the node of `pfn`."""
        self.vmstat.mod_node(item, delta, self.nid_of(pfn))

    def mod_mm(self, mm: Mm, item: int, delta: int) -> None:
        """add_mm_counter()."""
        self.vmstat.mod_mm(mm.rss_stat, item, delta, mm.name)

    def emit(self, event: TraceEvent) -> None:
        """Record a trace event in the name of the running task."""
        task = self.sched.current
        self.trace.emit(task.comm, task.pid, task.cpu, event)

    def printk(self, line: str) -> None:
        """Add a line to the kernel log, with its time."""
        seconds, nsec = divmod(self.clock.tick(), 1_000_000_000)
        self.log.append(f"[{seconds:5d}.{nsec // 1000:06d}] {line}")

    def log_machine_check(self, mce: Mce, *, by_user: bool) -> None:
        """What the log shows of a machine check that the host has survived.

        Args:
            by_user: a program has met it. Where a copy of the kernel has, and recovers, it counts
                as handled (kflags), and its record is printed only with mce=print_all.
        """
        if self.hwpoison.mce_notify.allows(self.clock.now_ns, self.printk):
            self.printk("mce: [Hardware Error]: Machine check events logged")
        if by_user:
            for line in mce.lines():
                self.printk(line)

    def die_of_machine_check(self, mce: Mce) -> KernelPanic:
        """mce_panic(): the kernel itself has loaded the bad line, where it cannot recover."""
        for line in mce.lines():
            self.printk(line)
        for line in (
            "Run the above through 'mcelog --ascii'",
            "Machine check: Data load in unrecoverable area of kernel",
        ):
            self.printk(f"mce: [Hardware Error]: {line}")
        return self.die("Fatal local machine check")

    def die(self, reason: str) -> KernelPanic:
        """panic(): the host is dead from here on. Returns the exception to raise."""
        self.panic = self.sched.panic = KernelPanic(reason)
        self.printk(str(self.panic))
        return self.panic

    def is_device(self, pfn: int) -> bool:
        """is_zone_device_page()."""
        return bool(self.pages.flags[pfn] & PG_zone_device)

    def next_pid(self) -> int:
        """A process id nobody has had yet."""
        self._last_pid += 1
        return self._last_pid

    @property
    def nr_pages(self) -> int:
        """Frames of all nodes, without device memory."""
        return self.device_start
