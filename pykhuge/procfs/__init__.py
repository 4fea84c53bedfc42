"""What /proc shows of a machine: text files in the kernel's format, and the numbers in them.

    machine.procfs["meminfo"]
    machine.procfs[f"{process.pid}/smaps"]
    machine.procfs.pagemap(process, addr, length)

The formats are v6.4's. The views look on from outside and take no lock: where the kernel would wait
for a call in progress, they show what is there now.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping

from pykhuge.mm.errors import os_error
from pykhuge.mm.mm_types import Mm
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page_table import Ptes
from pykhuge.process import Process
from pykhuge.procfs.kpage import Kpf, kpagecount, kpageflags
from pykhuge.procfs.maps import show_maps
from pykhuge.procfs.meminfo import meminfo, show_meminfo, show_vmstat, vmstat
from pykhuge.procfs.pagemap import pagemap
from pykhuge.procfs.smaps import Smaps, show_smaps, show_smaps_rollup, smaps
from pykhuge.procfs.status import show_status, show_swaps

__all__ = ["Kpf", "Procfs", "Smaps", "vmstat"]

_FILES: dict[str, Callable[[Memory], str]] = {
    "meminfo": show_meminfo,
    "swaps": show_swaps,
    "vmstat": show_vmstat,
}
_OF_PROCESS: dict[str, Callable[[Memory, Mm], str]] = {
    "maps": show_maps,
    "smaps": show_smaps,
    "smaps_rollup": show_smaps_rollup,
    "status": show_status,
}


class Procfs(Mapping[str, str]):
    """The files by name, "meminfo" or "{pid}/smaps"; reading gives their text.

    Raises: FileNotFoundError for any other name, and for a process that has exited.
    """

    def __init__(self, mem: Memory) -> None:
        self._mem = mem

    def __getitem__(self, name: str) -> str:
        if name in _FILES:
            return _FILES[name](self._mem)
        pid, _, view = str(name).partition("/")
        mm = self._mms().get(pid)
        if mm is None or view not in _OF_PROCESS:
            raise os_error(errno.ENOENT, f"{name}: allowed {', '.join(self)}")
        return _OF_PROCESS[view](self._mem, mm)

    def __iter__(self) -> Iterator[str]:
        yield from _FILES
        for pid in self._mms():
            yield from (f"{pid}/{view}" for view in _OF_PROCESS)

    def __len__(self) -> int:
        return len(_FILES) + len(self._mms()) * len(_OF_PROCESS)

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def _mms(self) -> dict[str, Mm]:
        """Address spaces of the processes that live, by pid."""
        return {mm.name.removeprefix("mm:"): mm for mm in self._mem.mms if mm.mm_users}

    def _mm(self, process: Process) -> Mm:
        if not isinstance(process, Process) or process.mem is not self._mem:
            raise ValueError(f"process={process!r}: allowed a process of this machine")
        if process.mm.mm_users == 0:
            raise os_error(errno.ENOENT, f"{process.pid}: allowed {', '.join(self._mms())}")
        return process.mm

    def vmstat(self) -> dict[str, int]:
        """/proc/vmstat. Huge-page counters are in huge pages, all others in pages."""
        return vmstat(self._mem)

    def meminfo(self) -> dict[str, int]:
        """/proc/meminfo, in kB."""
        return meminfo(self._mem)

    def smaps(self, process: Process) -> list[Smaps]:
        """/proc/pid/smaps, an entry for each VMA."""
        return smaps(self._mem, self._mm(process))

    def pagemap(self, process: Process, addr: int, length: int) -> Ptes:
        """/proc/pid/pagemap of [addr, addr + length), a word for each page.

        Bits 0..54 are the frame, or the type (0..4) and offset (5..54) of a swap entry; bit 56 says
        mapped once, 57 write-protected by userfaultfd, 61 of a file or shared, 62 swap entry, 63
        present.
        Returns: uint64[length / 4096]. Raises: ValueError unless both are whole pages of user
        space.
        """
        return pagemap(self._mem, self._mm(process), addr, length)

    def kpageflags(self, pfn: int, nr: int) -> Ptes:
        """/proc/kpageflags of `nr` frames from `pfn` on: `Kpf` bits.

        Returns: uint64[nr]. Raises: ValueError beyond the last frame.
        """
        return kpageflags(self._mem, pfn, nr)

    def kpagecount(self, pfn: int, nr: int) -> Ptes:
        """/proc/kpagecount of `nr` frames from `pfn` on: how often each is mapped.

        Returns: uint64[nr]. Raises: ValueError beyond the last frame.
        """
        return kpagecount(self._mem, pfn, nr)
