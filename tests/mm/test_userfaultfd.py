"""userfaultfd: which ranges its calls take, and in which order they refuse."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from collapse_kit import PAGE, MakeMachine, page_bytes, refused

from pykhuge import PROT_READ, KernelVersion, Machine, Process
from pykhuge.mm.mm_types import VM_UFFD_FLAGS
from pykhuge.process import UserFaultFd

BASE = 0x20_0000_0000
END = (1 << 47) - PAGE
CALLS: dict[str, Callable[[UserFaultFd, int, int], object]] = {
    "register": lambda uffd, addr, length: uffd.register(addr, length),
    "unregister": lambda uffd, addr, length: uffd.unregister(addr, length),
    "copy": lambda uffd, addr, length: uffd.copy(addr, bytes(length)),
    "zeropage": lambda uffd, addr, length: uffd.zeropage(addr, length),
    "poison": lambda uffd, addr, length: uffd.poison(addr, length),
    "writeprotect": lambda uffd, addr, length: uffd.writeprotect(addr, length),
}


def watched(process: Process) -> list[bool]:
    """Of each VMA, whether a userfaultfd watches it."""
    return [bool(vma.vm_flags & VM_UFFD_FLAGS) for vma in process.mm.vmas]


def lay(machine: Machine, process: Process, disk: Path, *kinds: str) -> UserFaultFd:
    """A page of each kind from BASE on; returns the userfaultfd that watches those of `other`."""
    other = process.userfaultfd()
    mount = machine.tmpfs()
    process.close(process.open("f", os.O_RDWR | os.O_CREAT, tmpfs=mount))
    disk.write_bytes(bytes(PAGE))
    for number, kind in enumerate(kinds):
        addr = BASE + number * PAGE
        if kind == "read-only":
            file = process.open("f", tmpfs=mount)
            process.mmap(PAGE, addr=addr, fixed=True, file=file, shared=True, prot=PROT_READ)
        elif kind == "disk":
            file = process.open(str(disk))
            process.mmap(PAGE, addr=addr, fixed=True, file=file, prot=PROT_READ)
        elif kind != "gap":
            process.mmap(PAGE, addr=addr, fixed=True)
        if kind == "other":
            other.register(addr, PAGE)
    return other


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("addr", "length"),
    [
        (BASE, 0),
        (BASE, 100),
        (BASE, PAGE + 1),
        (BASE + 1, PAGE),
        (END, PAGE),
        (END - PAGE, 2 * PAGE),
        (1 << 47, PAGE),
        ((1 << 64) - PAGE, PAGE),
    ],
)
def test_a_range_is_whole_pages_of_user_space(
    process: Process, call: str, addr: int, length: int
) -> None:
    """EINVAL for any other, before it is looked at what is mapped."""
    process.mmap(4 * PAGE, addr=BASE, fixed=True)
    uffd = process.userfaultfd()
    uffd.register(BASE, 4 * PAGE, wp=True)
    assert refused(lambda: CALLS[call](uffd, addr, length)) == errno.EINVAL
    assert watched(process) == [True]
    assert process.pfn(BASE) is None


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("wp", [False, True])
def test_a_shared_file_must_be_open_for_writing(
    machine: Machine, process: Process, shared: bool, wp: bool
) -> None:
    """EPERM, for what the userfaultfd would fill; a private mapping is the process's own."""
    mount = machine.tmpfs()
    process.pwrite(process.open("f", os.O_RDWR | os.O_CREAT, tmpfs=mount), 0, page_bytes(0))
    file = process.open("f", tmpfs=mount)
    addr = process.mmap(PAGE, file=file, shared=shared, prot=PROT_READ)
    uffd = process.userfaultfd()
    number = errno.EPERM if shared else None
    assert refused(lambda: uffd.register(addr, PAGE, missing=not wp, wp=wp)) == number
    assert watched(process) == [not shared]
    uffd.unregister(addr, PAGE)


@pytest.mark.parametrize(
    ("kinds", "number"),
    [
        (("memory", "gap", "memory"), None),
        (("gap", "memory"), None),
        (("gap", "gap"), errno.EINVAL),
        (("memory", "disk"), errno.EINVAL),
        (("memory", "gap", "disk"), errno.EINVAL),
        (("memory", "read-only"), errno.EPERM),
        (("memory", "other"), errno.EBUSY),
        (("other", "disk"), errno.EBUSY),
        (("disk", "other"), errno.EINVAL),
        (("other", "read-only"), errno.EBUSY),
        (("read-only", "other"), errno.EPERM),
        (("disk", "read-only"), errno.EINVAL),
    ],
)
def test_register_names_the_first_mapping_it_cannot_take(
    machine: Machine,
    process: Process,
    tmp_path: Path,
    kinds: tuple[str, ...],
    number: int | None,
) -> None:
    """VMA by VMA, from low to high; nothing is watched then that was not before."""
    lay(machine, process, tmp_path / "disk", *kinds)
    before, uffd = watched(process), process.userfaultfd()
    assert refused(lambda: uffd.register(BASE, len(kinds) * PAGE)) == number
    assert watched(process) == (before if number else [True] * len(before))


@pytest.mark.parametrize(
    ("kinds", "number"),
    [
        (("memory", "gap"), None),
        (("memory", "read-only"), None),
        (("gap", "gap"), errno.EINVAL),
        (("memory", "disk"), errno.EINVAL),
    ],
)
def test_unregister_takes_what_could_be_registered(
    machine: Machine,
    process: Process,
    tmp_path: Path,
    kinds: tuple[str, ...],
    number: int | None,
) -> None:
    """EINVAL where nothing is mapped, or a disk file anywhere: what is watched stays so."""
    lay(machine, process, tmp_path / "disk", *kinds)
    uffd = process.userfaultfd()
    if "memory" in kinds:
        uffd.register(BASE, PAGE)
    assert refused(lambda: uffd.unregister(BASE, len(kinds) * PAGE)) == number
    assert any(watched(process)) is ("memory" in kinds and number is not None)


@pytest.mark.parametrize("version", [(6, 16), (6, 17)])
def test_unregister_of_anothers_is_refused_since_6_17(
    make_machine: MakeMachine, tmp_path: Path, version: tuple[int, int]
) -> None:
    """EINVAL; before that it was let go."""
    machine = make_machine(kernel=KernelVersion.at(*version))
    process = machine.process()
    lay(machine, process, tmp_path / "disk", "memory", "other")
    uffd, later = process.userfaultfd(), version == (6, 17)
    uffd.register(BASE, PAGE)
    number = errno.EINVAL if later else None
    assert refused(lambda: uffd.unregister(BASE, 2 * PAGE)) == number
    assert any(watched(process)) is later
