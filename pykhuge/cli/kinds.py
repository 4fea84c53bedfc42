"""The kinds of memory that `pykhuge collapse` can put a file into: how it gets there and leaves."""

from __future__ import annotations

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SIZE
from pykhuge.machine import Machine
from pykhuge.mm.mm_types import File, ShmemInode
from pykhuge.process import PROT_EXEC, PROT_READ, Advice, Process

__all__ = ["KINDS", "Anon", "FileOnDisk", "Shmem"]


class Anon:
    """Private anonymous memory, written by the process. The others differ from it."""

    always_shown: tuple[str, ...] = (
        "nr_isolated_anon",
        "nr_anon_pages",
        "nr_anon_transparent_hugepages",
    )
    # Whether the last range reads as zeros behind the end of the file.
    zeros_behind_end = True

    def __init__(self, machine: Machine, process: Process, path: str, nr_ranges: int) -> None:
        self.machine = machine
        self.process = process
        self.length = nr_ranges * HPAGE_PMD_SIZE
        self.addr = self.map(path)

    def map(self, path: str) -> int:
        """Map room for all ranges; returns the address."""
        del path
        return self.process.mmap(self.length)

    def load(self, start: int, data: memoryview) -> None:
        """Bytes of the file go to offset `start`, in small pages that the process maps."""
        self.process.write(self.addr + start, data)

    def unload(self, start: int, length: int) -> None:
        """Give up [start, start + length), whole ranges, memory and all."""
        self.process.munmap(self.addr + start, length)

    def pfn(self, page: int) -> int | None:
        """The frame that holds page `page`, counted over all ranges; None for a hole."""
        return self.process.pfn(self.addr + page * PAGE_SIZE)

    def is_huge(self, index: int) -> bool:
        """Whether range `index` is one huge page."""
        return self.process.is_huge(self.addr + index * HPAGE_PMD_SIZE)

    def counters(self) -> dict[str, int]:
        """What is counted besides vmstat and the mm."""
        return {}


class _Cached(Anon):
    """What the two kinds have in common that live in a page cache."""

    file: File

    def pfn(self, page: int) -> int | None:
        """The frame that caches page `page`."""
        return self.process.cached_pfn(self.file, page)

    def is_huge(self, index: int) -> bool:
        """Whether one order-9 entry caches the range."""
        return self.file.f_mapping.i_pages.order(index * HPAGE_PMD_NR) == 9


class Shmem(_Cached):
    """A memfd, written by pwrite and mapped shared."""

    always_shown = ("nr_shmem", "nr_shmem_hugepages", "nrpages", "i_blocks")

    def map(self, path: str) -> int:
        """Make the memfd, without pages yet."""
        del path
        self.machine.thp.shmem_enabled = "advise"
        self.file = self.process.memfd_create("pykhuge")
        self.process.ftruncate(self.file, self.length)
        return self.process.mmap(self.length, file=self.file, shared=True)

    def load(self, start: int, data: memoryview) -> None:
        """Write the bytes, and touch every page that has some."""
        self.process.pwrite(self.file, start, bytes(data))
        self.process.read(self.addr + start, len(data))

    def unload(self, start: int, length: int) -> None:
        """Punch the ranges out."""
        self.process.fallocate(self.file, start, length, punch_hole=True)

    def counters(self) -> dict[str, int]:
        """What the inode counts."""
        inode = self.file.inode
        assert isinstance(inode, ShmemInode)
        nrpages = inode.i_mapping.nrpages
        return {"nrpages": nrpages, "alloced": inode.alloced, "i_blocks": inode.i_blocks}


class FileOnDisk(_Cached):
    """The file itself, opened read-only and mapped to be read and executed."""

    always_shown = ("nr_file_pages", "nr_file_hugepages", "nrpages", "nr_thps")
    zeros_behind_end = False

    def map(self, path: str) -> int:
        """Open the file. Raises: OSError."""
        self.file = self.process.open(path)
        return self.process.mmap(self.length, file=self.file, prot=PROT_READ | PROT_EXEC)

    def load(self, start: int, data: memoryview) -> None:
        """Touch every page; the bytes come from the disk."""
        self.process.read(self.addr + start, len(data))

    def unload(self, start: int, length: int) -> None:
        """Unmap the pages and drop them from the cache."""
        self.process.madvise(self.addr + start, length, Advice.MADV_DONTNEED)
        self.machine.drop_caches()

    def counters(self) -> dict[str, int]:
        """What the address_space counts."""
        mapping = self.file.f_mapping
        return {"nrpages": mapping.nrpages, "nr_thps": mapping.nr_thps}


KINDS: dict[str, type[Anon]] = {"anon": Anon, "shmem": Shmem, "file": FileOnDisk}
