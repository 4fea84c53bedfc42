"""MADV_COLLAPSE of any range of three full blocks: the running kernel's errno, and the model's."""

from __future__ import annotations

import ctypes
import errno
import mmap

import pytest
from collapse_kit import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykhuge import Advice, Machine

PAGE, BLOCK, NR = 4096, 2 << 20, 3
libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def here(start: int, pages: int) -> int | None:
    """Errno of the running kernel; None for 0."""
    area = mmap.mmap(-1, (NR + 1) * BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    first = -(-base // BLOCK) * BLOCK
    area[first - base : first - base + NR * BLOCK] = b"\1" * (NR * BLOCK)
    failed = libc.madvise(first + start * PAGE, pages * PAGE, Advice.MADV_COLLAPSE)
    return ctypes.get_errno() if failed else None


def model(start: int, pages: int) -> int | None:
    """The same of the model."""
    machine = Machine("1G")
    process = machine.process()
    addr = process.mmap(NR * BLOCK)
    process.write(addr, b"\1" * (NR * BLOCK))
    call = lambda: process.madvise(addr + start * PAGE, pages * PAGE, Advice.MADV_COLLAPSE)  # noqa: E731
    outcome = refused(call)
    machine.audit()
    return outcome


edges = st.sampled_from([0, 1, 511, 512, 513, 1023, 1024, 1025, 1535, 1536])


@pytest.mark.usefixtures("thp")
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(start=edges, pages=edges)
def test_ranges_are_rounded_as_the_running_kernel_does(start: int, pages: int) -> None:
    """0 for no whole block from an edge on, EINVAL inside of one."""
    pages = min(pages, NR * 512 - start)
    outcome = here(start, pages)
    if outcome == errno.EAGAIN:  # a page was in somebody's hands just then
        outcome = here(start, pages)
    assert model(start, pages) == outcome
