"""Machine: one host. It owns all state; nothing is global."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pykhuge import audit
from pykhuge.hw.memory import HPAGE_PMD_SIZE, PAGE_SHIFT, PAGE_SIZE
from pykhuge.kernel.clock import Clock
from pykhuge.kernel.sched import Steps, Task, steps
from pykhuge.kernel.trace import Trace
from pykhuge.kernel.version import KernelVersion
from pykhuge.khugepaged.control import CollapseControl, KhugepagedSettings
from pykhuge.khugepaged.daemon import Khugepaged
from pykhuge.khugepaged.scan import khugepaged_scan_block
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.mm.errors import check_int, os_error
from pykhuge.mm.filemap import drop_cache
from pykhuge.mm.memory_failure import memory_failure, unpoison_memory
from pykhuge.mm.mm_types import MemCgroup, ShmemSuperBlock
from pykhuge.mm.mmzone import LOCAL_DISTANCE, REMOTE_DISTANCE, Memory, ThpSettings
from pykhuge.mm.page_writeback import finish_io
from pykhuge.mm.soft_offline import soft_offline_page
from pykhuge.mm.swap import lru_add_drain_all
from pykhuge.mm.vmstat import Ledger
from pykhuge.process import Process
from pykhuge.procfs import Procfs, vmstat
from pykhuge.sysfs import Sysfs

__all__ = ["Machine", "parse_size"]

# Below this a machine boots with all huge pages off (hugepage_init).
SMALL_MACHINE = 512 << 20
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(name: str, text: str | int) -> int:
    """Bytes in "64M", "1G", "1T" or a plain number. Raises: ValueError."""
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", str(text).strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(
            f"{name}={text!r}: allowed a number of bytes, or one with K, M, G or T behind it"
        )
    return int(match[1]) * _UNITS[match[2].upper()]


class Machine:
    """A host with memory, a kernel and khugepaged; processes are made with `process`.

    Args:
        memory: of all nodes together, a multiple of 2 MiB for each node. One of less than
            512 MiB boots with `thp.enabled` never, as with Linux; set it to have huge pages.
        nodes: NUMA nodes, of one size; or the size of each.
        distances: node_distance() as a square matrix; 10 and 20 if not given.
        device_memory: ZONE_DEVICE memory beside it, for `Process` pages that are not normal.
        swap: size of the swap device; none by default.
        swap_synchronous_io: it is memory itself, such as zram: a page that one page-table entry
            alone names comes back without entering the swap cache.
        cpus: CPUs, each with its LRU batch.
        commit_limit: what shared memory may be promised in all (vm.overcommit_memory=2); no limit
            if not given.
        recovery: False is the kernel before the series: a machine check in a collapse's copy is a
            panic. There is no later kernel without it. If not given, as `kernel` has it.
        kernel: what it does otherwise than the kernel of the series; see `KernelVersion`.
        seed: of all randomness; equal machines with equal calls give equal traces.
    Raises: ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        memory: str | int = "1G",
        *,
        nodes: int | Sequence[str | int] = 1,
        distances: Sequence[Sequence[int]] | None = None,
        device_memory: str | int = 0,
        swap: str | int = 0,
        swap_synchronous_io: bool = False,
        cpus: int = 1,
        commit_limit: str | int | None = None,
        recovery: bool | None = None,
        kernel: KernelVersion = KernelVersion.REF,
        seed: int = 0,
    ) -> None:
        if not isinstance(cpus, int) or cpus < 1:
            raise ValueError(f"cpus={cpus!r}: allowed 1 and more")
        if not isinstance(swap_synchronous_io, bool):
            raise ValueError(f"swap_synchronous_io={swap_synchronous_io!r}: allowed False and True")
        if not isinstance(recovery, bool | None):
            raise ValueError(f"recovery={recovery!r}: allowed False, True and None")
        if not isinstance(kernel, KernelVersion):
            raise TypeError(
                f"kernel={kernel!r}: allowed a KernelVersion, such as KernelVersion.REF and V6_18"
            )
        if recovery is False and kernel.is_later():
            raise ValueError(f"recovery=False: allowed with KernelVersion.REF, not {kernel.name}")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed={seed!r}: allowed 0 and more")
        sizes = _node_sizes(memory, nodes)
        self.mem = Memory(
            [size >> PAGE_SHIFT for size in sizes],
            distances=_distances(len(sizes), distances),
            nr_device_pages=parse_size("device_memory", device_memory) >> PAGE_SHIFT,
            nr_swap_slots=parse_size("swap", swap) >> PAGE_SHIFT,
            swap_synchronous_io=swap_synchronous_io,
            nr_cpus=cpus,
            recovery=kernel.collapse_recovers if recovery is None else recovery,
            version=kernel,
            seed=seed,
        )
        if commit_limit is not None:
            self.mem.commit_limit = parse_size("commit_limit", commit_limit) >> PAGE_SHIFT
        small = self.mem.nr_pages < SMALL_MACHINE >> PAGE_SHIFT
        if small:
            self.mem.thp.enabled = self.mem.thp.defrag = "never"
            self.mem.thp.use_zero_page = False
        self.khugepaged_settings = KhugepagedSettings(defrag=int(not small))
        self.khugepaged = Khugepaged(self.mem, self.khugepaged_settings)
        self.sysfs = Sysfs(self.mem.thp, self.khugepaged_settings)

    @property
    def task(self) -> Task[Any]:
        """The daemon's, in whose name the machine's own calls run."""
        return self.khugepaged.task

    @property
    def clock(self) -> Clock:
        """Virtual time since boot."""
        return self.mem.clock

    @property
    def procfs(self) -> Procfs:
        """What /proc shows, as files and as numbers."""
        return Procfs(self.mem)

    @property
    def thp(self) -> ThpSettings:
        """/sys/kernel/mm/transparent_hugepage."""
        return self.mem.thp

    @property
    def node_reclaim_mode(self) -> int:
        """/proc/sys/vm/zone_reclaim_mode: not 0, a collapse refuses blocks spread too far."""
        return self.mem.node_reclaim_mode

    @node_reclaim_mode.setter
    def node_reclaim_mode(self, mode: int) -> None:
        if not 0 <= mode <= 7:
            raise ValueError(f"node_reclaim_mode={mode}: allowed 0..7")
        self.mem.node_reclaim_mode = mode

    @property
    def trace(self) -> Trace:
        """The trace events so far; `text()` is what trace_pipe prints."""
        return self.mem.trace

    @property
    def log(self) -> list[str]:
        """The kernel log."""
        return self.mem.log

    @property
    def memory_failure_early_kill(self) -> bool:
        """/proc/sys/vm: tell processes of bad pages at once, unless they have chosen themselves."""
        return self.mem.hwpoison.early_kill

    @memory_failure_early_kill.setter
    def memory_failure_early_kill(self, on: bool) -> None:
        self.mem.hwpoison.early_kill = _check_switch("memory_failure_early_kill", on)

    @property
    def memory_failure_recovery(self) -> bool:
        """/proc/sys/vm: False lets a memory failure panic the host."""
        return self.mem.hwpoison.recovery

    @memory_failure_recovery.setter
    def memory_failure_recovery(self, on: bool) -> None:
        self.mem.hwpoison.recovery = _check_switch("memory_failure_recovery", on)

    @steps
    def memory_failure(self, pfn: int, *, injected: bool = False) -> Steps[None]:
        """A scrubber, or firmware, has found frame `pfn` bad: it is taken away from everybody.

        Args:
            injected: by a test (hwpoison-inject), to be undone by `unpoison_memory`.
        Raises: OSError EBUSY (in a use that cannot be dealt with), EHWPOISON (known already), ENXIO
        (device memory); KernelPanic with `memory_failure_recovery` off. Kernel: memory_failure.
        """
        self._check_pfn(pfn)
        _raise(f"frame {pfn:#x}", (yield from memory_failure(self.mem, pfn, sw_simulated=injected)))

    @steps
    def soft_offline_page(self, pfn: int) -> Steps[None]:
        """Frame `pfn` is about to go bad: what it holds moves elsewhere, it is not used again.

        Raises: OSError EBUSY (somebody else refers to it), EIO (no page that can be moved);
        KernelPanic if it is poisoned already, for the copy has no recovery.
        """
        self._check_pfn(pfn)
        _raise(f"frame {pfn:#x}", (yield from soft_offline_page(self.mem, pfn)))

    def unpoison_memory(self, pfn: int) -> None:
        """Undo an injected failure (hwpoison/unpoison-pfn): the frame may be used again.

        Poisoned lines stay: see `mem.poison.unpoison`.
        Raises: OSError EOPNOTSUPP after a failure that was not injected, EBUSY.
        """
        self.check_alive()
        self._check_pfn(pfn)
        _raise(f"frame {pfn:#x}", unpoison_memory(self.mem, pfn))

    def _check_pfn(self, pfn: int) -> None:
        check_int(pfn=pfn)
        if not 0 <= pfn < self.mem.pages.nr_pages:
            raise ValueError(f"pfn={pfn}: allowed 0..{self.mem.pages.nr_pages - 1}")

    def check_alive(self) -> None:
        """Raises: KernelPanic if the host is dead."""
        if self.mem.panic is not None:
            raise self.mem.panic

    def process(
        self, comm: str = "task", *, memcg: MemCgroup | None = None, cpu: int = 0
    ) -> Process:
        """A new process with an empty address space."""
        self.check_alive()
        self._check_cpu(cpu)
        if memcg is not None and memcg not in self.mem.memcgs:
            raise ValueError(
                f"memcg={memcg!r}: allowed a group of this machine, from Machine.memcg"
            )
        pid = self.mem.next_pid()
        return Process(
            self.mem, self.khugepaged_settings, comm, pid, memcg or self.mem.memcgs[0], cpu
        )

    def tmpfs(self, size: str | int = 0, *, huge: str = "never") -> ShmemSuperBlock:
        """Mount a tmpfs, for `Process.open(name, flags, tmpfs=...)`.

        Args:
            size: mount option size=; 0 is no limit.
            huge: mount option huge=: always, within_size, advise, never.
        """
        self.check_alive()
        allowed = ("always", "within_size", "advise", "never")
        if huge not in allowed:
            raise ValueError(f"huge={huge!r}: allowed {', '.join(allowed)}")
        mount = ShmemSuperBlock(-(-parse_size("size", size) // PAGE_SIZE), huge=huge)
        self.mem.mounts.append(mount)
        return mount

    def finish_io(self) -> None:
        """Time passes: pages under writeback reach the disk."""
        self.check_alive()
        finish_io(self.mem)

    def drop_caches(self) -> None:
        """/proc/sys/vm/drop_caches: clean pages that nobody uses leave the page cache.

        Of shmem that is what has only been read so far.
        """
        self.check_alive()
        lru_add_drain_all(self.mem)
        for inode in self.mem.inodes:
            drop_cache(self.mem, inode.i_mapping)

    def _check_cpu(self, cpu: int) -> None:
        if not 0 <= cpu < len(self.mem.lru_batches):
            raise ValueError(f"cpu={cpu}: allowed 0..{len(self.mem.lru_batches) - 1}")

    def memcg(self, limit: str | int) -> MemCgroup:
        """A memory cgroup that may use `limit` bytes."""
        self.check_alive()
        group = MemCgroup(len(self.mem.memcgs), parse_size("limit", limit) >> PAGE_SHIFT)
        self.mem.memcgs.append(group)
        return group

    @steps
    def collapse(
        self, process: Process, addr: int, *, is_khugepaged: bool = True
    ) -> Steps[ScanResult]:
        """Scan one block as khugepaged would when it comes there; collapse it if it is worth it.

        Args:
            addr: 2 MiB aligned.
            is_khugepaged: heed the daemon's limits and `enabled`; False scans as MADV_COLLAPSE.
        Returns: SCAN_SUCCEED, or why not; since 6.6, SCAN_PTE_MAPPED_HUGEPAGE where MADV_COLLAPSE
        has made a file's cache huge and has yet to map it. SCAN_VMA_CHECK, without a trace event,
        where the daemon would not even look: by `thp.enabled` it takes only what MADV_HUGEPAGE was
        asked for.
        Raises: ValueError for an address that is not aligned, or another machine's process.
        """
        if not isinstance(process, Process) or process.mem is not self.mem:
            raise ValueError(f"process={process!r}: allowed a process of this machine")
        check_int(addr=addr)
        if addr % HPAGE_PMD_SIZE:
            raise ValueError(f"addr={addr:#x}: allowed multiples of {HPAGE_PMD_SIZE:#x}")
        cc = CollapseControl(is_khugepaged=is_khugepaged, settings=self.khugepaged_settings)
        return khugepaged_scan_block(self.mem, process.mm, addr, cc)

    def spawn(self, generator: Steps[Any], comm: str = "thread", *, cpu: int = 0) -> Task[Any]:
        """A task that will run `generator` (from a call's `.steps`), step by step.

        Raises: TypeError for anything else, ValueError for a CPU that the machine does not have.
        """
        self.check_alive()
        if not isinstance(generator, Generator):
            raise TypeError(f"generator={generator!r}: allowed what a call's .steps(...) returns")
        self._check_cpu(cpu)
        task: Task[Any] = Task(self.mem.sched, comm, self.mem.next_pid(), cpu)
        task.start(generator)
        return task

    def lru_add_drain_all(self) -> None:
        """Drain the LRU batches of all CPUs, as both contexts of a collapse do first."""
        self.check_alive()
        lru_add_drain_all(self.mem)

    def vmstat(self) -> dict[str, int]:
        """/proc/vmstat, as far as the model has its counters."""
        return vmstat(self.mem)

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """Record every change of a counter meanwhile.

        with machine.ledger() as ledger:
            process.munmap(addr, length)
        ledger.balance()  # what did not cancel, by (owner, counter)
        """
        outer, self.mem.vmstat.ledger = self.mem.vmstat.ledger, Ledger()
        try:
            yield self.mem.vmstat.ledger
        finally:
            self.mem.vmstat.ledger = outer

    def audit(self) -> None:
        """Recount everything from first principles.

        Raises: KernelBug with a line for every number that is not what it must be; KernelPanic if
        the host is dead: it died in the middle of something.
        """
        self.check_alive()
        audit.audit(self.mem)


def _raise(what: str, number: int) -> None:
    if number:
        raise os_error(number, what)


def _check_switch(name: str, on: bool) -> bool:
    if not isinstance(on, bool):
        raise ValueError(f"{name}={on!r}: allowed False and True")
    return on


def _node_sizes(memory: str | int, nodes: int | Sequence[str | int]) -> list[int]:
    if isinstance(nodes, int):
        if nodes < 1 or isinstance(nodes, bool):
            raise ValueError(f"nodes={nodes}: allowed 1 and more")
        total = parse_size("memory", memory)
        sizes = [total // nodes] * nodes
    else:
        if isinstance(nodes, str) or not isinstance(nodes, Sequence) or not nodes:
            raise ValueError(f"nodes={nodes!r}: allowed a number, or the size of each")
        sizes = [parse_size("nodes", size) for size in nodes]
    for size in sizes:
        if size < HPAGE_PMD_SIZE or size % HPAGE_PMD_SIZE:
            raise ValueError(
                f"memory={memory!r}: allowed multiples of {HPAGE_PMD_SIZE} bytes for each node"
            )
    return sizes


def _distances(nr: int, given: Sequence[Sequence[int]] | None) -> list[list[int]]:
    if given is None:
        return [
            [LOCAL_DISTANCE if a == b else REMOTE_DISTANCE for b in range(nr)] for a in range(nr)
        ]
    if len(given) != nr or any(len(row) != nr for row in given):
        raise ValueError(f"distances={given!r}: allowed {nr} rows of {nr}")
    return [list(row) for row in given]
