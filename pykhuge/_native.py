"""The C core with types: the only file that touches ``ffi`` and ``lib``. No checks, no choices.

Addresses are plain integers; whoever passes one vouches for the memory behind it and keeps it
alive. Every copy runs with the GIL released.
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from typing import Any

from pykhuge import _copy
from pykhuge._copy import ffi, lib

PAGE_SIZE: int = lib.PYKHUGE_PAGE_SIZE
LINE_SIZE: int = lib.PYKHUGE_LINE_SIZE
HOLE: int = lib.PYKHUGE_HOLE

_CHARS = ffi.typeof("char[]")
_VOID_P = ffi.typeof("void *")
_INT64_P = ffi.typeof("int64_t *")
_UINT64_P = ffi.typeof("uint64_t *")
_UINTPTR = ffi.typeof("uintptr_t")


@dataclass(frozen=True, slots=True)
class MachineCheck:
    """A copy that stopped at memory it could not read, as the signal and the copy had it."""

    index: int  #: which frame of a range; 0 for a single page or a run of bytes
    not_copied: int  #: bytes of that frame, page or run that are not in the destination
    si_code: int  #: ``BUS_MCEERR_AR`` (4), or ``BUS_ADRERR`` (2) past the end of a mapped file
    si_addr: int  #: where; may be coarse, and is not what ``not_copied`` is computed from
    si_addr_lsb: int  #: ``1 << si_addr_lsb`` bytes around it are lost; 0 if the signal does not say


class DestinationFault(OSError):
    """The destination of a copy could not be written: no count can say what it holds now."""

    def __init__(self, address: int) -> None:
        """``address``: where the write failed."""
        super().__init__(errno.EFAULT, f"destination cannot be written at {address:#x}")
        self.address = address


def last_machine_check() -> MachineCheck:
    """The calling thread's record; all zero before its first failure."""
    record = lib.pykhuge_last_machine_check()
    return MachineCheck(
        record.index, record.not_copied, record.code, record.address, record.address_lsb
    )


def outcome(result: int) -> int:
    """The one place where C's numbers become exceptions."""
    if result == lib.PYKHUGE_DESTINATION_FAULT:
        raise DestinationFault(lib.pykhuge_last_machine_check().address)
    return result


def export(buffer: Any, *, writable: bool = False) -> Any:
    """A C view of ``buffer``, which cannot be closed or resized until the view is released."""
    return ffi.from_buffer(_CHARS, buffer, writable)


def release(view: Any) -> None:
    """Let go of an exported buffer."""
    ffi.release(view)


def address(view: Any) -> int:
    """Where an exported buffer lies."""
    return int(ffi.cast(_UINTPTR, view))


def _highpage() -> Any:
    """The module that shares cffi's shared object (PEP 489, multiple modules in one library)."""
    loader = ExtensionFileLoader("pykhuge._highpage", _copy.__file__)
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


#: ``copy_mc_page(to, from_, bad_lines)``: one page from buffer to buffer. Bytes not copied;
#: negative if an argument was wrong or the destination faulted. Nothing was copied if wrong.
copy_mc_page: Callable[[Any, Any, int], int] = _highpage().copy_mc_page


def copy_mc_bytes(to: int, from_: int, nr_bytes: int, bad_lines: int) -> int:
    """Any run of bytes; ``bad_lines`` is where a uint64 by page is, or 0. Bytes not copied."""
    return outcome(
        lib.pykhuge_copy_mc_bytes(
            ffi.cast(_VOID_P, to),
            ffi.cast(_VOID_P, from_),
            nr_bytes,
            ffi.cast(_UINT64_P, bad_lines),
        )
    )


def copy_mc_frames(to: int, base: int, frames: int, nr: int, bad_lines: int) -> MachineCheck | None:
    """``nr`` frames, numbers in int64 at ``frames`` from ``base``, to consecutive pages at ``to``.

    A negative number is a hole, cleared. ``bad_lines`` is where a uint64 by frame number is, or 0
    for none. None when all was copied, else what stopped it.
    """
    if not outcome(
        lib.pykhuge_copy_mc_frames(
            ffi.cast(_VOID_P, to),
            ffi.cast(_VOID_P, base),
            ffi.cast(_INT64_P, frames),
            nr,
            ffi.cast(_UINT64_P, bad_lines),
        )
    ):
        return None
    return last_machine_check()


def copy_page(to: int, from_: int) -> None:
    """One page, without recovery."""
    lib.pykhuge_copy_page(ffi.cast(_VOID_P, to), ffi.cast(_VOID_P, from_))


def copy_frames(to: int, base: int, frames: int, nr: int) -> None:
    """As ``copy_mc_frames``, without recovery."""
    lib.pykhuge_copy_frames(
        ffi.cast(_VOID_P, to), ffi.cast(_VOID_P, base), ffi.cast(_INT64_P, frames), nr
    )


class PteScanner:
    """``pykhuge_scan_ptes`` for one machine, whose arrays must outlive it."""

    def __init__(
        self,
        *,
        tables: int,
        flags: int,
        refcount: int,
        mapcount: int,
        entire_mapcount: int,
        zero_pfn: int,
        node_ends: list[int],
        distances: list[list[int]],
    ) -> None:
        """The first five are addresses; ``distances`` has a row for each node."""
        self._node_ends = ffi.new("int64_t[]", node_ends)
        self._distances = ffi.new("int32_t[]", [far for row in distances for far in row])
        self._pages = ffi.new("struct pykhuge_pages *")
        self._pages.tables = ffi.cast("uint64_t(*)[512]", tables)
        self._pages.flags = ffi.cast("uint32_t *", flags)
        self._pages.refcount = ffi.cast("int32_t *", refcount)
        self._pages.mapcount = ffi.cast("int32_t *", mapcount)
        self._pages.entire_mapcount = ffi.cast("int32_t *", entire_mapcount)
        self._pages.zero_pfn = zero_pfn
        self._pages.node_ends = self._node_ends
        self._pages.distances = self._distances
        self._pages.nr_nodes = len(node_ends)
        self._limits = ffi.new("struct pykhuge_scan_limits *")
        self._scanned = ffi.new("struct pykhuge_scanned *")
        #: int32 by node, of the last scan: pages that were counted
        self.node_load = ffi.new("int32_t[]", len(node_ends))

    def scan(
        self,
        table: int,
        *,
        none: int,
        swap: int,
        shared: int,
        daemon: bool,
        notified: bool,
        reclaim_distance: int,
        folios: bool = False,
        read_only: bool = False,
    ) -> Any:
        """One table; the limits are ``struct pykhuge_scan_limits``. Returns its ``scanned``.

        What is returned is overwritten by the next scan.
        """
        limits = self._limits
        limits.none, limits.swap, limits.shared = none, swap, shared
        limits.daemon, limits.notified = daemon, notified
        limits.reclaim_distance = reclaim_distance
        limits.folios, limits.read_only = folios, read_only
        lib.pykhuge_scan_ptes(self._pages, table, limits, self.node_load, self._scanned)
        return self._scanned


def baseline_memcpy_frames(to: int, base: int, frames: int, nr: int) -> None:
    """A C loop of libc's memcpy over the same frames, to measure against."""
    lib.pykhuge_baseline_memcpy_frames(
        ffi.cast(_VOID_P, to), ffi.cast(_VOID_P, base), ffi.cast(_INT64_P, frames), nr
    )


def instruction_sets() -> list[str]:
    """What this processor can copy with, best first; ``portable`` is always the last."""
    names = (lib.pykhuge_instruction_set(i) for i in range(8))
    return [ffi.string(name).decode() for name in names if name]


def current_instruction_set() -> str:
    """The one in use, by the whole process."""
    name: bytes = ffi.string(lib.pykhuge_current_instruction_set())
    return name.decode()


def use_instruction_set(name: str) -> None:
    """Copy with another one, for tests and measurements."""
    if lib.pykhuge_use_instruction_set(name.encode()):
        raise ValueError(f"instruction set {name!r}: allowed {instruction_sets()}")
