"""Whole collapses, beside the running kernel's own; what a machine costs; what the import costs.

Each group's ratio column is the result. The pages are scattered over physical memory and cold: all
ranges are written before the first is collapsed, on either side, as a daemon finds them.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pykhuge import PROT_EXEC, PROT_READ, Advice, Machine, Process, ScanResult
from pykhuge.mm import copy_mc

HPAGE_PMD_SIZE = 2 << 20
PAGE_SIZE = 4096
MADV_COLLAPSE = 25
ROUNDS = 60
LENGTH = ROUNDS * HPAGE_PMD_SIZE

Setup = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def busy() -> Iterator[tuple[Machine, Process]]:
    """A machine of 1 GiB that has been up for a while.

    Its memory is backed by the host's, and its free pages are scattered.
    """
    machine = Machine("1G")
    filler = machine.process("filler")
    everything = filler.mmap(1000 << 20)
    filler.madvise(everything, 1000 << 20, Advice.MADV_POPULATE_WRITE)
    filler.munmap(everything + (256 << 20), 744 << 20)
    for page in random.Random(0).sample(range(256 << 20 >> 12), 32 * 1024):
        filler.madvise(everything + page * PAGE_SIZE, PAGE_SIZE, Advice.MADV_DONTNEED)
    yield machine, machine.process("collapser")
    machine.audit()


def small_pages(machine: Machine, process: Process) -> int:
    """2 MiB of written small pages in a VMA that may become huge."""
    addr = process.mmap(HPAGE_PMD_SIZE)
    process.madvise(addr, HPAGE_PMD_SIZE, Advice.MADV_POPULATE_WRITE)
    process.madvise(addr, HPAGE_PMD_SIZE, Advice.MADV_HUGEPAGE)
    machine.lru_add_drain_all()
    return addr


def fresh_ranges(
    machine: Machine, process: Process, nr: int, poisoned_page: int | None = None
) -> Setup:
    """Write `nr` ranges; the setup hands out one a round."""
    addrs = [small_pages(machine, process) for _ in range(nr)]
    if poisoned_page is not None:
        for addr in addrs:
            process.poison(addr + poisoned_page * PAGE_SIZE)
    rest = iter(addrs)
    return lambda: ((process, next(rest)), {})


def collapse_checked(machine: Machine, expected: ScanResult) -> Callable[..., None]:
    """The call that is timed, with a look at its result."""

    def collapse(process: Process, addr: int) -> None:
        assert machine.collapse(process, addr) is expected

    return collapse


@pytest.mark.benchmark(group="whole anonymous collapse, 512 cold pages")
def test_kernel_madv_collapse(benchmark: Any) -> None:
    """The running kernel's MADV_COLLAPSE of 512 written pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    arena = mmap.mmap(-1, (ROUNDS + 1) * HPAGE_PMD_SIZE, flags=private)
    view = np.frombuffer(arena, np.uint8)
    order = np.random.default_rng(0).permutation(len(view) // PAGE_SIZE) * PAGE_SIZE
    first = -(-view.ctypes.data // HPAGE_PMD_SIZE) * HPAGE_PMD_SIZE
    addrs = range(first, first + ROUNDS * HPAGE_PMD_SIZE, HPAGE_PMD_SIZE)

    def write_small_pages() -> None:
        arena.madvise(mmap.MADV_NOHUGEPAGE)
        arena.madvise(mmap.MADV_DONTNEED)
        view[order] = 1
        arena.madvise(mmap.MADV_HUGEPAGE)

    def collapse(addr: int) -> None:
        while libc.madvise(addr, HPAGE_PMD_SIZE, MADV_COLLAPSE):
            if ctypes.get_errno() != errno.EAGAIN:
                pytest.skip(f"this kernel refuses MADV_COLLAPSE: errno {ctypes.get_errno()}")

    # A virtual machine backs memory when it is first written to, which no collapse should pay for:
    # both kinds of pages have been in use before.
    for _ in range(3):
        write_small_pages()
        for addr in addrs:
            collapse(addr)
    write_small_pages()
    rest = iter(addrs)
    benchmark.pedantic(collapse, setup=lambda: ((next(rest),), {}), rounds=ROUNDS)


@pytest.mark.benchmark(group="whole anonymous collapse, 512 cold pages")
def test_pykhuge_collapse(benchmark: Any, busy: tuple[Machine, Process]) -> None:
    """The model's collapse of 512 written pages, copy and all."""
    collapse = collapse_checked(busy[0], ScanResult.SCAN_SUCCEED)
    benchmark.pedantic(collapse, setup=fresh_ranges(*busy, ROUNDS), rounds=ROUNDS)


@pytest.mark.benchmark(group="the same without its copy")
def test_pykhuge_collapse_without_copy(
    benchmark: Any, busy: tuple[Machine, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own overhead: everything but the bytes."""

    def copy_nothing(to: int, base: int, frames: int, nr: int, bad_lines: int) -> None:
        del to, base, frames, nr, bad_lines

    monkeypatch.setattr(copy_mc._native, "copy_mc_frames", copy_nothing)
    collapse = collapse_checked(busy[0], ScanResult.SCAN_SUCCEED)
    benchmark.pedantic(collapse, setup=fresh_ranges(*busy, ROUNDS), rounds=ROUNDS)


@pytest.mark.benchmark(group="a collapse that meets poison in page 511")
@pytest.mark.parametrize("poisoned_page", [None, 511], ids=["succeeds", "rolls back"])
def test_rollback(benchmark: Any, busy: tuple[Machine, Process], poisoned_page: int | None) -> None:
    """A rollback beside a success."""
    expected = ScanResult.SCAN_SUCCEED if poisoned_page is None else ScanResult.SCAN_COPY_MC
    collapse = collapse_checked(busy[0], expected)
    benchmark.pedantic(collapse, setup=fresh_ranges(*busy, ROUNDS, poisoned_page), rounds=ROUNDS)


def ready_ranges(machine: Machine, process: Process, addr: int, poisoned_page: int | None) -> Setup:
    """Poison what is to be poisoned; the setup hands out one mapped range a round."""
    machine.lru_add_drain_all()
    machine.thp.enabled, machine.thp.shmem_enabled = "always", "force"
    addrs = range(addr, addr + LENGTH, HPAGE_PMD_SIZE)
    if poisoned_page is not None:
        for each in addrs:
            process.poison(each + poisoned_page * PAGE_SIZE)
    rest = iter(addrs)
    return lambda: ((process, next(rest)), {})


def shmem_ranges(machine: Machine, process: Process, poisoned_page: int | None = None) -> Setup:
    """Ranges of a memfd, written through a shared mapping."""
    file = process.memfd_create("ranges")
    process.ftruncate(file, LENGTH)
    addr = process.mmap(LENGTH, file=file, shared=True)
    process.madvise(addr, LENGTH, Advice.MADV_POPULATE_WRITE)
    return ready_ranges(machine, process, addr, poisoned_page)


def disk_ranges(machine: Machine, process: Process, path: Path) -> Setup:
    """Ranges of a file on the disk, read through a mapping."""
    path.write_bytes(os.urandom(HPAGE_PMD_SIZE) * ROUNDS)
    file = process.open(str(path))
    addr = process.mmap(LENGTH, file=file, prot=PROT_READ | PROT_EXEC)
    process.madvise(addr, LENGTH, Advice.MADV_POPULATE_READ)
    return ready_ranges(machine, process, addr, None)


@pytest.mark.benchmark(group="whole shmem collapse, 512 cold pages")
def test_kernel_madv_collapse_of_a_memfd(benchmark: Any) -> None:
    """The running kernel's MADV_COLLAPSE of 512 written pages of a memfd."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mmap.restype = ctypes.c_void_p
    reserved = mmap.mmap(-1, LENGTH + HPAGE_PMD_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = np.frombuffer(reserved, np.uint8).ctypes.data
    first = -(-base // HPAGE_PMD_SIZE) * HPAGE_PMD_SIZE
    fd = os.memfd_create("ranges")
    map_fixed = 0x10
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | map_fixed
    os.ftruncate(fd, LENGTH)
    assert libc.mmap(first, LENGTH, protection, flags, fd, 0) == first
    view = np.ctypeslib.as_array((ctypes.c_uint8 * LENGTH).from_address(first))
    order = np.random.default_rng(0).permutation(LENGTH // PAGE_SIZE) * PAGE_SIZE

    def write_small_pages() -> None:
        os.ftruncate(fd, 0)
        os.ftruncate(fd, LENGTH)
        view[order] = 1

    def collapse(addr: int) -> None:
        while libc.madvise(addr, HPAGE_PMD_SIZE, MADV_COLLAPSE):
            if ctypes.get_errno() != errno.EAGAIN:
                pytest.skip(f"this kernel refuses MADV_COLLAPSE: errno {ctypes.get_errno()}")

    addrs = range(first, first + LENGTH, HPAGE_PMD_SIZE)
    # A virtual machine backs memory when it is first written to: both kinds of pages were in use.
    for _ in range(3):
        write_small_pages()
        for addr in addrs:
            collapse(addr)
    write_small_pages()
    rest = iter(addrs)
    benchmark.pedantic(collapse, setup=lambda: ((next(rest),), {}), rounds=ROUNDS)
    os.close(fd)


@pytest.mark.benchmark(group="whole shmem collapse, 512 cold pages")
def test_pykhuge_collapse_of_a_memfd(benchmark: Any, busy: tuple[Machine, Process]) -> None:
    """The model's collapse of 512 written pages of a memfd, copy and all."""
    collapse = collapse_checked(busy[0], ScanResult.SCAN_SUCCEED)
    benchmark.pedantic(collapse, setup=shmem_ranges(*busy), rounds=ROUNDS)


@pytest.mark.benchmark(group="a file on the disk, beside shmem")
def test_shmem(benchmark: Any, busy: tuple[Machine, Process]) -> None:
    """What the other is held against."""
    collapse = collapse_checked(busy[0], ScanResult.SCAN_SUCCEED)
    benchmark.pedantic(collapse, setup=shmem_ranges(*busy), rounds=ROUNDS)


@pytest.mark.benchmark(group="a file on the disk, beside shmem")
def test_disk_file(benchmark: Any, busy: tuple[Machine, Process], tmp_path: Path) -> None:
    """512 cached pages of a read-only file."""
    collapse = collapse_checked(busy[0], ScanResult.SCAN_SUCCEED)
    benchmark.pedantic(collapse, setup=disk_ranges(*busy, tmp_path / "ranges"), rounds=ROUNDS)


@pytest.mark.benchmark(group="a shmem collapse that meets poison in page 511")
@pytest.mark.parametrize("poisoned_page", [None, 511], ids=["succeeds", "rolls back"])
def test_shmem_rollback(
    benchmark: Any, busy: tuple[Machine, Process], poisoned_page: int | None
) -> None:
    """A rollback beside a success."""
    expected = ScanResult.SCAN_SUCCEED if poisoned_page is None else ScanResult.SCAN_COPY_MC
    collapse = collapse_checked(busy[0], expected)
    benchmark.pedantic(collapse, setup=shmem_ranges(*busy, poisoned_page), rounds=ROUNDS)


@pytest.mark.benchmark(group="create a machine and collapse one range")
@pytest.mark.parametrize("memory", ["1G", "1T"])
def test_machine(benchmark: Any, memory: str) -> None:
    """A machine of any size costs what is used of it; `extra_info` has the peak resident size."""

    def create_and_collapse() -> None:
        machine = Machine(memory)
        process = machine.process()
        assert machine.collapse(process, small_pages(machine, process)) is ScanResult.SCAN_SUCCEED

    benchmark.pedantic(create_and_collapse, rounds=ROUNDS, warmup_rounds=2)
    benchmark.extra_info["resident_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


@pytest.mark.benchmark(group="import, in a fresh interpreter")
@pytest.mark.parametrize("module", ["numpy", "pykhuge"])
def test_import(benchmark: Any, module: str) -> None:
    """The import, with the interpreter's own start in both."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", f"import {module}"]
    subprocess.check_call(command, env=env)
    benchmark.pedantic(
        subprocess.check_call, args=(command,), kwargs={"env": env}, rounds=ROUNDS // 3
    )
