"""Ranges of addresses that calls take, refuse, or take in part: the running kernel, and the model.

Both do the same calls at the same addresses; errno, and of each page what may be done with it, must
come out alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from collapse_kit import refused
from kernel_kit import lacking

from pykhuge import Advice, File, KernelVersion, Machine

PAGE, PAGES = 4096, 32
BASE, OTHER = 0x2000_0000_0000, 0x2000_0100_0000
END = (1 << 47) - PAGE
READ, WRITE = 1, 2
SHARED, PRIVATE, FIXED, ANONYMOUS = 1, 2, 0x10, 0x20
SHOWN = {"rd", "wr", "wf", "um", "uw", "lo"}

libc = ctypes.CDLL(None, use_errno=True)
word = ctypes.c_ulong
libc.mmap.argtypes = [word, word, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [word, word, word, ctypes.c_int, word]
libc.munmap.argtypes = libc.mlock.argtypes = [word, word]
libc.mprotect.argtypes = libc.madvise.argtypes = [word, word, ctypes.c_int]
for name in ("mmap", "mremap"):
    getattr(libc, name).restype = ctypes.c_long


class Side(Protocol):
    """A process; each call raises OSError."""

    def mmap(self, addr: int, length: int, prot: int = 3, kind: str = "memory") -> int: ...
    def hint(self, addr: int, length: int) -> int: ...
    def munmap(self, addr: int, length: int) -> None: ...
    def mremap(self, old: int, length: int, new: int, new_length: int) -> None: ...
    def mprotect(self, addr: int, length: int, prot: int) -> None: ...
    def mlock(self, addr: int, length: int) -> None: ...
    def madvise(self, addr: int, length: int, advice: int) -> None: ...
    def uffd(self, which: int, call: str, addr: int, length: int) -> None: ...


class Here:
    """The process that runs the test."""

    UFFD: dict[str, tuple[int, Callable[[int, int], tuple[int, ...]]]] = {  # noqa: RUF012
        "register": (0xC020AA00, lambda addr, length: (addr, length, 1, 0)),
        "register_wp": (0xC020AA00, lambda addr, length: (addr, length, 2, 0)),
        "unregister": (0x8010AA01, lambda addr, length: (addr, length)),
        "copy": (0xC028AA03, lambda addr, length: (addr, BASE, length, 0, 0)),
        "zeropage": (0xC020AA04, lambda addr, length: (addr, length, 0, 0)),
        "writeprotect": (0xC018AA06, lambda addr, length: (addr, length, 1)),
    }

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.stack = stack
        for addr in (BASE, OTHER):
            stack.callback(libc.munmap, addr, PAGES * PAGE)
        self.uffds = [self._open_uffd() for _ in range(2)]
        shmem = os.memfd_create("f")
        os.truncate(shmem, PAGE)
        self.files = {
            "shmem": (SHARED, shmem),
            "shmem private": (PRIVATE, shmem),
            "shmem read-only": (SHARED, os.open(f"/proc/self/fd/{shmem}", os.O_RDONLY)),
            "disk": (PRIVATE, os.open(sys.executable, os.O_RDONLY)),
            "disk shared": (SHARED, os.open(sys.executable, os.O_RDONLY)),
        }
        for fd in {fd for _, fd in self.files.values()}:
            stack.callback(os.close, fd)

    def _open_uffd(self) -> int:
        fd = libc.syscall(323, os.O_CLOEXEC)
        if fd < 0:
            lacking(f"userfaultfd: {os.strerror(ctypes.get_errno())}")
        self.stack.callback(os.close, fd)
        fcntl.ioctl(fd, 0xC018AA3F, bytearray(struct.pack("3Q", 0xAA, 1, 0)))
        return int(fd)

    @staticmethod
    def _checked(result: int) -> int:
        if result == -1:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    def mmap(self, addr: int, length: int, prot: int = 3, kind: str = "memory") -> int:
        flags, fd = self.files.get(kind, (PRIVATE | ANONYMOUS, -1))
        return self._checked(libc.mmap(addr, length, prot, flags | FIXED, fd, 0))

    def hint(self, addr: int, length: int) -> int:
        got = self._checked(libc.mmap(addr, length, 3, PRIVATE | ANONYMOUS, -1, 0))
        libc.munmap(got, length)
        return got

    def munmap(self, addr: int, length: int) -> None:
        self._checked(libc.munmap(addr, length))

    def mremap(self, old: int, length: int, new: int, new_length: int) -> None:
        self._checked(libc.mremap(old, length, new_length, 3, new))

    def mprotect(self, addr: int, length: int, prot: int) -> None:
        self._checked(libc.mprotect(addr, length, prot))

    def mlock(self, addr: int, length: int) -> None:
        self._checked(libc.mlock(addr, length))

    def madvise(self, addr: int, length: int, advice: int) -> None:
        self._checked(libc.madvise(addr, length, advice))

    def uffd(self, which: int, call: str, addr: int, length: int) -> None:
        request, arguments = self.UFFD[call]
        words = arguments(addr, length)
        fcntl.ioctl(self.uffds[which], request, bytearray(struct.pack(f"{len(words)}Q", *words)))

    def pages(self) -> dict[int, set[str]]:
        """VmFlags of the pages of the two areas, by address."""
        seen, addresses = {}, range(0)
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                low, high = (int(part, 16) for part in found.groups())
                inside = any(area <= low < area + PAGES * PAGE for area in (BASE, OTHER))
                addresses = range(low, high, PAGE) if inside else range(0)
            elif line.startswith("VmFlags:"):
                seen.update(dict.fromkeys(addresses, SHOWN & set(line.split()[1:])))
        return seen


class Modelled:
    """A process of the model."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.process = machine, machine.process()
        self.uffds = [self.process.userfaultfd() for _ in range(2)]
        mount = machine.tmpfs()
        shmem = self.process.open("f", os.O_RDWR | os.O_CREAT, tmpfs=mount)
        self.process.ftruncate(shmem, PAGE)
        disk = self.process.open(sys.executable)
        self.files: dict[str, tuple[bool, File]] = {
            "shmem": (True, shmem),
            "shmem private": (False, shmem),
            "shmem read-only": (True, self.process.open("f", tmpfs=mount)),
            "disk": (False, disk),
            "disk shared": (True, disk),
        }
        for call in ("munmap", "mprotect", "mlock", "madvise", "mremap"):
            setattr(self, call, getattr(self.process, call))

    def mmap(self, addr: int, length: int, prot: int = 3, kind: str = "memory") -> int:
        shared, file = self.files.get(kind, (False, None))
        return self.process.mmap(length, addr=addr, prot=prot, fixed=True, file=file, shared=shared)

    def hint(self, addr: int, length: int) -> int:
        got = self.process.mmap(length, addr=addr)
        self.process.munmap(got, length)
        return got

    def mremap(self, old: int, length: int, new: int, new_length: int) -> None:
        self.process.mremap(old, length, new, new_length)

    def uffd(self, which: int, call: str, addr: int, length: int) -> None:
        uffd = self.uffds[which]
        if call == "copy":
            uffd.copy(addr, bytes(length))
        elif call == "register_wp":
            uffd.register(addr, length, missing=False, wp=True)
        else:
            getattr(uffd, call)(addr, length)

    def pages(self) -> dict[int, set[str]]:
        seen = {}
        for entry in self.machine.procfs.smaps(self.process):
            addresses = range(entry.start, entry.end, PAGE)
            seen.update(dict.fromkeys(addresses, SHOWN & set(entry.flags)))
        return seen


def lay(side: Any, kinds: str) -> None:
    """Pages from BASE on: Memory, Other's memory, shMem read-only, Disk, a gap."""
    named = {"m": "memory", "o": "memory", "s": "shmem read-only", "d": "disk", "f": "shmem"}
    for number, kind in enumerate(kinds):
        if kind in named:
            addr = BASE + number * PAGE
            side.mmap(addr, PAGE, 3 if kind in "mof" else 1, named[kind])
            if kind == "o":
                side.uffd(1, "register", addr, PAGE)


def moves(side: Any, old: int, length: int, new: int, new_length: int) -> None:
    """Eight pages, a gap, four pages; sixteen at the other place."""
    side.mmap(BASE, 8 * PAGE)
    side.mmap(BASE + 12 * PAGE, 4 * PAGE)
    side.mmap(OTHER, 16 * PAGE, READ)
    side.mremap(old, length, new, new_length)


def uffd_range(side: Any, call: str, addr: int, length: int) -> None:
    side.mmap(BASE, 4 * PAGE)
    side.uffd(0, "register_wp" if call == "writeprotect" else "register", BASE, 4 * PAGE)
    side.uffd(0, call, addr, length)


def uffd_over(side: Any, call: str, kinds: str) -> None:
    lay(side, kinds)
    if call == "unregister" and kinds[0] == "m":
        side.uffd(0, "register", BASE, PAGE)
    side.uffd(0, call, BASE, len(kinds) * PAGE)


def advise_over(side: Any, advice: int, kinds: str) -> None:
    lay(side, kinds)
    side.madvise(BASE, len(kinds) * PAGE, advice)


def remove(side: Any, kind: str, prot: int, locked: bool) -> None:
    side.mmap(BASE, PAGE, prot, kind)
    if locked:
        side.mlock(BASE, PAGE)
    side.madvise(BASE, PAGE, Advice.MADV_REMOVE)


def limit(side: Any, call: str, addr: int, length: int) -> None:
    side.mmap(BASE, PAGE)
    rest = {"mprotect": (READ,), "madvise": (Advice.MADV_DONTNEED,)}.get(call, ())
    getattr(side, call)(addr, length, *rest)


CASES: dict[str, Callable[[Any], object]] = {}
for old, nr, to, new_nr in [
    (BASE, 12, OTHER, 13),
    (BASE, 16, OTHER, 9),
    (BASE, 16, OTHER, 8),
    (BASE, 16, OTHER, 4),
    (BASE, 10, OTHER, 10),
    (BASE, 16, OTHER, 16),
    (BASE - PAGE, 9, OTHER, 9),
    (BASE - PAGE, 9, OTHER, 4),
    (BASE + 9 * PAGE, 1, OTHER, 1),
    (BASE + 9 * PAGE, 2, BASE + 10 * PAGE, 2),
    (BASE, 8, BASE + 4 * PAGE, 2),
    (BASE, 0, OTHER, 1),
    (BASE, 1, OTHER, 0),
    (BASE, 1, END, 1),
    (BASE, 2, END - PAGE, 2),
    (BASE, 1, 1 << 47, 1),
    (END, 1, OTHER, 1),
    (1 << 47, 1, OTHER, 1),
    ((1 << 64) - PAGE, 1, OTHER, 1),
    (OTHER, 1 << 35, BASE, 1),
]:
    CASES[f"mremap {old:#x}+{nr} to {to:#x}+{new_nr}"] = (
        lambda side, a=(old, nr * PAGE, to, new_nr * PAGE): moves(side, *a)
    )
for call in Here.UFFD:
    for addr, length in [
        (BASE, 0),
        (BASE, 100),
        (BASE, PAGE + 1),
        (BASE + 1, PAGE),
        (END, PAGE),
        (END - PAGE, 2 * PAGE),
        (END - PAGE, PAGE),
        (1 << 47, PAGE),
        ((1 << 64) - PAGE, PAGE),
    ]:
        CASES[f"{call} {addr:#x}+{length}"] = lambda side, a=(call, addr, length): uffd_range(
            side, *a
        )
for call in ("register", "register_wp", "unregister"):
    for kinds in ["m-m", "-m", "--", "md", "m-d", "ms", "mo", "od", "do", "os", "so", "sd", "ds"]:
        CASES[f"{call} {kinds}"] = lambda side, a=(call, kinds): uffd_over(side, *a)
for advice in (Advice.MADV_WIPEONFORK, Advice.MADV_KEEPONFORK):
    for kinds in ["mfm", "m-m", "-mf", "fmm", "mdm", "md-"]:
        CASES[f"{advice.name} {kinds}"] = lambda side, a=(advice, kinds): advise_over(side, *a)
for kind in ("memory", "shmem", "shmem private", "shmem read-only", "disk", "disk shared"):
    for prot in (READ, READ | WRITE):
        for locked in (False, True):
            CASES[f"remove {kind} prot={prot} locked={locked}"] = (
                lambda side, a=(kind, prot, locked): remove(side, *a)
            )
for call in ("mmap", "munmap", "mprotect", "mlock", "madvise"):
    for addr, length in [
        (END, PAGE),
        (END, 1),
        (END - PAGE, 2 * PAGE),
        (1 << 47, PAGE),
        ((1 << 64) - PAGE, PAGE),
        ((1 << 64) - PAGE, 2 * PAGE),
    ]:
        CASES[f"{call} {addr:#x}+{length}"] = lambda side, a=(call, addr, length): limit(side, *a)
CASES["mmap unaligned"] = lambda side: side.mmap(BASE + 1, PAGE)
CASES["mmap unaligned beyond"] = lambda side: side.mmap(END + 1, PAGE)
CASES["mmap too long"] = lambda side: side.hint(BASE, 1 << 47)


@pytest.fixture(scope="module")
def version() -> KernelVersion:
    """Of the running kernel."""
    if platform.machine() != "x86_64":
        lacking(f"the limits are x86-64's, this is {platform.machine()}")
    if " la57" in Path("/proc/cpuinfo").read_text():
        lacking("with page tables of five levels user space does not end at 2^47")
    major, minor = re.findall(r"\d+", platform.release())[:2]
    return KernelVersion.at(int(major), int(minor))


@pytest.fixture
def here(version: KernelVersion) -> Iterator[Here]:  # noqa: ARG001
    """The process itself, cleaned up."""
    with contextlib.ExitStack() as stack:
        yield Here(stack)


@pytest.mark.parametrize("case", CASES)
def test_errno_and_mappings_are_the_running_kernels(
    here: Here, version: KernelVersion, case: str
) -> None:
    """A refusal leaves of each page what the kernel leaves of it."""
    machine = Machine("16M", kernel=version)
    side = Modelled(machine)
    number = refused(lambda: CASES[case](here))
    assert refused(lambda: CASES[case](side)) == number
    assert side.pages() == here.pages()
    machine.audit()


@pytest.mark.parametrize("addr", [BASE, BASE + 1, BASE + PAGE - 1, END - PAGE, END - 1])
def test_a_hint_is_taken_as_the_running_kernel_takes_it(
    here: Here, version: KernelVersion, addr: int
) -> None:
    """Rounded down, where there is room."""
    assert Modelled(Machine("16M", kernel=version)).hint(addr, PAGE) == here.hint(addr, PAGE)


@pytest.mark.parametrize("addr", [0, 1, PAGE - 1, END, END + 1, 1 << 47, (1 << 64) - 1])
def test_a_hint_is_passed_over_as_the_running_kernel_does(
    here: Here, version: KernelVersion, addr: int
) -> None:
    """No error: the mapping comes where it would without one."""
    for side in (Modelled(Machine("16M", kernel=version)), here):
        assert side.hint(addr, PAGE) == side.hint(0, PAGE)
