"""Memory that fails genuinely, for tests: one unreadable page between two that are not."""

import ctypes
import fcntl
import mmap
import os
import platform
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import pytest

PAGE = 4096
LINE = 64
UNTOUCHED = 0xA5

_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_USER_MODE_ONLY = 1
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_ZEROPAGE = 0xC020AA04
_UFFDIO_POISON = 0xC020AA08
_MODE_MISSING = 1


def pattern(nr_bytes: int) -> bytes:
    """Bytes in which every 8-byte word differs from every other."""
    words = np.arange(1, nr_bytes // 8 + 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return words.tobytes()[:nr_bytes]


def pages(nr_pages: int, content: bytes = b"") -> mmap.mmap:
    """Private, page-aligned memory."""
    memory = mmap.mmap(-1, nr_pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[: len(content)] = content
    return memory


def untouched(nr_bytes: int) -> npt.NDArray[np.uint8]:
    """A destination that shows where it was written to."""
    return np.full(nr_bytes, UNTOUCHED, np.uint8)


def address_of(buffer: mmap.mmap | memoryview) -> int:
    """Where it lies. Never let pytest show a failing buffer itself: it would read it."""
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def require_kernel(reason: str) -> NoReturn:
    """Skip for want of a kernel feature, or fail where PYKHUGE_REQUIRE_KERNEL promises it."""
    if os.environ.get("PYKHUGE_REQUIRE_KERNEL") == "1":
        pytest.fail(f"PYKHUGE_REQUIRE_KERNEL=1: {reason}")
    pytest.skip(reason)


@contextmanager
def truncated() -> Iterator[mmap.mmap]:
    """Three pages of a file that was cut after the first."""
    fd = os.memfd_create("truncated")
    try:
        os.ftruncate(fd, 3 * PAGE)
        memory = mmap.mmap(fd, 3 * PAGE)
        memory[:PAGE] = pattern(PAGE)
        os.ftruncate(fd, PAGE)
        yield memory
    finally:
        os.close(fd)


@contextmanager
def _second_page_by_userfaultfd() -> Iterator[tuple[mmap.mmap, int, int]]:
    """Three pages, the userfaultfd that answers for the second, and where that one is."""
    memory = pages(3)
    memory[:PAGE] = pattern(PAGE)
    number = _SYS_USERFAULTFD[platform.machine()]
    uffd = ctypes.CDLL(None, use_errno=True).syscall(number, os.O_CLOEXEC | _USER_MODE_ONLY)
    if uffd < 0:
        require_kernel(f"userfaultfd: {os.strerror(ctypes.get_errno())}")
    try:
        start = address_of(memory) + PAGE
        fcntl.ioctl(uffd, _UFFDIO_API, struct.pack("QQQ", 0xAA, 0, 0))
        fcntl.ioctl(uffd, _UFFDIO_REGISTER, struct.pack("QQQQ", start, PAGE, _MODE_MISSING, 0))
        yield memory, uffd, start
    finally:
        os.close(uffd)


@contextmanager
def poisoned() -> Iterator[mmap.mmap]:
    """Three pages of which UFFDIO_POISON (Linux 6.6) made the second one fail as poison does."""
    with _second_page_by_userfaultfd() as (memory, uffd, start):
        try:
            fcntl.ioctl(uffd, _UFFDIO_POISON, struct.pack("QQQq", start, PAGE, 0, 0))
        except OSError as error:
            require_kernel(f"UFFDIO_POISON: {error}")
        yield memory


@contextmanager
def missing() -> Iterator[tuple[mmap.mmap, Callable[[], object]]]:
    """Three pages; whoever reads the second waits until the function has been called."""
    with _second_page_by_userfaultfd() as (memory, uffd, start):
        zero_page = struct.pack("QQQq", start, PAGE, 0, 0)
        yield memory, lambda: fcntl.ioctl(uffd, _UFFDIO_ZEROPAGE, zero_page)


FAILING = {"truncated": truncated, "poisoned": poisoned}
