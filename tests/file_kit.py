"""What the tests of file-backed memory build blocks with, and look at them by.

A block here is 512 pages of a file's cache, filled with `page_bytes`, in small pages; processes map
it, and have touched some pages of it.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from collapse_kit import HPAGE, NR, PAGE, block_bytes, events, page_bytes, rss, runs

from pykhuge import PROT_EXEC, PROT_READ, Advice, File, Machine, Process, ScanResult
from pykhuge.hw.poison import Mce
from pykhuge.khugepaged.trace_events import mm_khugepaged_collapse_file, mm_khugepaged_scan_file
from pykhuge.mm.mm_types import ShmemInode, ShmemSuperBlock
from pykhuge.mm.page_alloc import alloc_huge_page
from pykhuge.mm.swap import put_pages

SHMEM, DISK = "shmem", "disk"
ALL = range(NR)


class Mapping(NamedTuple):
    """Where a process has mapped the block."""

    process: Process
    addr: int


@dataclass
class FileBlock:
    """One block of a file and those who map it; `maps[0]` is the one a collapse comes by.

    start: its first page index. held: which of its pages the file has; the others are holes.
    """

    machine: Machine
    file: File
    maps: list[Mapping]
    held: list[int] = field(default_factory=lambda: list(ALL))
    start: int = 0

    @property
    def process(self) -> Process:
        """Who a collapse is for."""
        return self.maps[0].process

    @property
    def addr(self) -> int:
        """Where that one has mapped the block."""
        return self.maps[0].addr

    @property
    def shmem(self) -> ShmemInode:
        """The inode, which must be shmem's."""
        assert isinstance(self.file.inode, ShmemInode)
        return self.file.inode

    @property
    def holes(self) -> list[int]:
        """Pages that the file does not have."""
        return sorted(set(ALL) - set(self.held))

    def content(self) -> bytes:
        """What all the block must read as."""
        return bytes_expected(self.held)

    def slots(self) -> list[int]:
        """The 512 entries of the cache."""
        return slots_of(self.file, self.start)

    def pfn(self, page: int) -> int:
        """The frame that caches page `page` of the block, which must be there."""
        pfn = self.process.cached_pfn(self.file, self.start + page)
        assert pfn is not None
        return pfn

    def poison(self, page: int, line: int = 0) -> int:
        """Let one line of a cached page go bad; returns the frame."""
        pfn = self.pfn(page)
        self.machine.mem.poison.poison(pfn, line)
        return pfn

    def collapse(self, *, is_khugepaged: bool = True) -> ScanResult:
        """Collapse it as the daemon would, or as MADV_COLLAPSE does."""
        return self.machine.collapse(self.process, self.addr, is_khugepaged=is_khugepaged)

    def task(self, *, is_khugepaged: bool = True, cpu: int = 0) -> Any:
        """The same, not started yet."""
        generator = self.machine.collapse.steps(
            self.process, self.addr, is_khugepaged=is_khugepaged
        )
        return self.machine.spawn(generator, "khugepaged", cpu=cpu)

    def books(self) -> dict[str, int]:
        """All that is counted about the block, as `books` has it."""
        return books(self.machine, self.file, *(each.process for each in self.maps))


def bytes_expected(held: Iterable[int], first: int = 0) -> bytes:
    """A block that holds `page_bytes(first + i)` at each page i of `held`, zeros elsewhere."""
    block = bytearray(HPAGE)
    for page in held:
        block[page * PAGE : (page + 1) * PAGE] = page_bytes(first + page)
    return bytes(block)


def slots_of(file: File, start: int = 0) -> list[int]:
    """The 512 entries of the cache around page `start`: frames, 0 for holes, values below 0."""
    return file.f_mapping.i_pages.node(start).tolist()


def cache_is_huge(file: File, start: int = 0) -> bool:
    """Whether one order-9 entry caches the block."""
    return file.f_mapping.i_pages.order(start) == 9


def fill_file(process: Process, file: File, pages: Iterable[int] = ALL, start: int = 0) -> None:
    """Write page `start + i` with `page_bytes(i)`, as small pages."""
    for first, last in runs(pages):
        data = block_bytes(first, last - first)
        assert process.pwrite(file, (start + first) * PAGE, data) == len(data)


def memfd(process: Process, pages: Iterable[int] = ALL, *, size: int = HPAGE) -> File:
    """A memfd of `size` bytes that has `pages`."""
    file = process.memfd_create("block")
    process.ftruncate(file, size)
    fill_file(process, file, pages)
    return file


def touch_pages(process: Process, addr: int, pages: Iterable[int], *, write: bool = False) -> None:
    """Map exactly these pages of a block, one by one or in runs, without those around them.

    A read would bring in neighbours (fault-around); what it did bring in too much is discarded.
    """
    wanted = sorted(set(pages))
    for first, last in runs(wanted):
        if write:
            old = process.read(addr + first * PAGE, (last - first) * PAGE)
            process.write(addr + first * PAGE, old)
        else:
            process.read(addr + first * PAGE, (last - first) * PAGE)
    for first, last in runs(set(ALL) - set(wanted)):
        process.madvise(addr + first * PAGE, (last - first) * PAGE, Advice.MADV_DONTNEED)


def map_block(
    process: Process, file: File, *, start: int = 0, length: int = HPAGE, **options: Any
) -> int:
    """Map a block shared and VM_HUGEPAGE; a file of the host read-only and executable."""
    if not isinstance(file.inode, ShmemInode):
        options.setdefault("prot", PROT_READ | PROT_EXEC)
        options.setdefault("shared", False)
    options.setdefault("shared", True)
    addr = process.mmap(length, file=file, offset=start * PAGE, **options)
    process.madvise(addr, length, Advice.MADV_HUGEPAGE)
    return addr


def shmem_block(
    machine: Machine,
    held: Iterable[int] = ALL,
    *,
    mapped: Iterable[int] = ALL,
    others: Iterable[Iterable[int]] = (),
    tmpfs: ShmemSuperBlock | None = None,
    open_file: Callable[[Process], File] | None = None,
) -> FileBlock:
    """A block of a memfd, or of a file on `tmpfs`, which the daemon may collapse.

    Args:
        held: pages the file has.
        mapped: of these, the pages that the process maps; `others` has the same for more processes.
        open_file: makes the file, which is to be of at least a block, in another way.
    """
    machine.thp.shmem_enabled = "never"
    process = machine.process("app")
    held = sorted(held)
    if tmpfs is not None:
        file = process.open("block", os.O_RDWR | os.O_CREAT, tmpfs=tmpfs)
        process.ftruncate(file, HPAGE)
        fill_file(process, file, held)
    elif open_file is not None:
        file = open_file(process)
    else:
        file = memfd(process, held)
    block = FileBlock(machine, file, [Mapping(process, map_block(process, file))], held)
    touch_pages(process, block.addr, set(mapped) & set(held))
    for pages in others:
        add_mapper(block, pages)
    machine.lru_add_drain_all()
    block.shmem.i_sb.huge = machine.thp.shmem_enabled = "advise"
    for mapping in block.maps:
        register(mapping)
    machine.trace.clear()
    return block


def register(mapping: Mapping) -> None:
    """Let the daemon know of the process, as MADV_HUGEPAGE does once shmem may be huge."""
    mapping.process.madvise(mapping.addr, PAGE, Advice.MADV_HUGEPAGE)


def pte_mapped_thp(process: Process) -> list[int]:
    """The blocks that the daemon will look at when it visits the process next."""
    slot = process.mm.mm_slot
    return [] if slot is None else list(slot.pte_mapped_thp)


def shared_anonymous_block(
    machine: Machine,
    held: Iterable[int] = ALL,
    *,
    noreserve: bool = False,
    others: Iterable[Iterable[int]] = (),
) -> FileBlock:
    """A block of MAP_SHARED | MAP_ANONYMOUS; the `others` are children that have touched pages."""
    machine.thp.shmem_enabled = "never"
    process = machine.process("app")
    addr = process.mmap(HPAGE, shared=True, noreserve=noreserve)
    process.madvise(addr, HPAGE, Advice.MADV_HUGEPAGE)
    for first, last in runs(held):
        process.write(addr + first * PAGE, block_bytes(first, last - first))
    vma = next(vma for vma in process.mm.vmas if vma.vm_start == addr)
    assert vma.vm_file is not None
    block = FileBlock(machine, vma.vm_file, [Mapping(process, addr)], sorted(held))
    for number, pages in enumerate(others):
        child = process.fork(f"other{number}")
        touch_pages(child, addr, set(pages) & set(block.held))
        block.maps.append(Mapping(child, addr))
    machine.lru_add_drain_all()
    machine.thp.shmem_enabled = "advise"
    machine.trace.clear()
    return block


def disk_block(
    machine: Machine,
    path: Path,
    *,
    cached: Iterable[int] = ALL,
    mapped: Iterable[int] = ALL,
    others: Iterable[Iterable[int]] = (),
    length: int = HPAGE,
) -> FileBlock:
    """A block of a host file, mapped read-only and executable, as programs are.

    Args:
        cached: pages that the cache holds already; the disk has all.
    """
    path.write_bytes(block_bytes()[:length])
    process = machine.process("app")
    file = process.open(str(path))
    for first, last in runs(cached):
        file.ra_pages = last - first
        process.pread(file, first * PAGE, 1)
    file.ra_pages = 0
    addr = map_block(process, file)
    block = FileBlock(machine, file, [Mapping(process, addr)])
    touch_pages(process, addr, set(mapped) & set(cached))
    for pages in others:
        add_mapper(block, set(pages) & set(cached))
    machine.lru_add_drain_all()
    machine.trace.clear()
    return block


def add_mapper(
    block: FileBlock, touched: Iterable[int] = ALL, *, addr: int | None = None, **options: Any
) -> Mapping:
    """One more process maps the block, by default in step with it, and touches pages it has.

    options: of mmap.
    """
    process = block.machine.process(f"other{len(block.maps) - 1}")
    if isinstance(block.file.inode, ShmemInode):
        file = process.receive(block.file)
    else:
        file = process.open(block.file.inode.path)  # type: ignore[attr-defined]
    where = map_block(process, file, start=block.start, addr=addr, **options)
    mapping = Mapping(process, where)
    touch_pages(process, mapping.addr, set(touched) & set(block.held))
    block.maps.append(mapping)
    return mapping


def books(machine: Machine, file: File, *processes: Process) -> dict[str, int]:
    """Every number about the file: its inode's, its mount's, vmstat, and each mm's counters."""
    inode, mapping = file.inode, file.f_mapping
    found = {
        "nrpages": mapping.nrpages,
        "nr_thps": mapping.nr_thps,
        "i_size": inode.i_size,
        "i_blocks": inode.i_blocks,
        "i_writecount": inode.i_writecount,
        "vm_committed_as": machine.mem.vm_committed_as,
        "swap slots": len(machine.mem.swap.swap_map),
    }
    if isinstance(inode, ShmemInode):
        found |= {
            "alloced": inode.alloced,
            "swapped": inode.swapped,
            "used_blocks": inode.i_sb.used_blocks,
        }
    for process in dict.fromkeys(processes):
        found |= {f"{process.task.comm} {name}": count for name, count in rss(process).items()}
    return found | machine.vmstat()


class CacheSnapshot(NamedTuple):
    """What a rollback must leave as it was: the entries, the frames' counts, and their bytes."""

    slots: list[int]
    order: int
    refcount: list[int]
    content: bytes


def cache_snapshot(file: File, machine: Machine, start: int = 0) -> CacheSnapshot:
    """A block of the cache, seen without touching any page."""
    slots = slots_of(file, start)
    pfns = [entry for entry in slots if entry > 0]
    return CacheSnapshot(
        slots,
        file.f_mapping.i_pages.order(start),
        machine.mem.pages.refcount[pfns].tolist(),
        machine.mem.ram.pages[pfns].tobytes(),
    )


def dirty_free_memory(machine: Machine, byte: int = 0xA5) -> int:
    """Fill the frames that the next huge page will get with garbage; returns the first of them.

    What a collapse forgets to clear or to copy shows then.
    """
    mem = machine.mem
    head = alloc_huge_page(mem, 0)
    assert head is not None
    mem.ram.pages[head : head + NR] = byte
    put_pages(mem, np.array([head]))
    return head


def file_scans(machine: Machine) -> list[mm_khugepaged_scan_file]:
    """Trace events mm_khugepaged_scan_file since the last `trace.clear()`."""
    return [event for event in events(machine) if isinstance(event, mm_khugepaged_scan_file)]


def file_collapses(machine: Machine) -> list[mm_khugepaged_collapse_file]:
    """Those of mm_khugepaged_collapse_file."""
    return [event for event in events(machine) if isinstance(event, mm_khugepaged_collapse_file)]


def machine_checks(machine: Machine) -> list[Mce]:
    """The machine-check log."""
    return machine.mem.poison.log
