"""Process: bad arguments, reads and writes, pins, what a dead process answers."""

import errno
from collections.abc import Callable

import numpy as np
import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    MakeMachine,
    advised,
    block_bytes,
    counters,
    faults,
    fill,
    refused,
)
from file_kit import memfd

from pykhuge import Advice, BusError, KernelVersion, Machine, Process, WouldBlock
from pykhuge.mm.mm_types import VM_HUGEPAGE, VM_WIPEONFORK


@pytest.mark.parametrize(
    ("call", "number", "message"),
    [
        (lambda p, _: p.mmap(0), "EINVAL", r"length=0: allowed 1 and more"),
        (lambda p, _: p.mmap(-1), "EINVAL", r"length=-1: allowed 1 and more"),
        (
            lambda p, _: p.mmap(PAGE, addr=5, fixed=True),
            "EINVAL",
            r"addr=0x5: allowed multiples",
        ),
        (lambda p, _: p.mmap(1 << 60), "ENOMEM", r"length=0x1000000000000000: allowed up to"),
        (lambda p, _: p.mmap(PAGE, prot=8), "EINVAL", r"prot=0x8: allowed an OR of PROT_READ"),
        (lambda p, _: p.mmap(PAGE, addr=-1), "EINVAL", r"addr=-0x1: allowed 0 and more"),
        (lambda p, a: p.mlock(a, -1), "EINVAL", r"length=-0x1: allowed 0 and more"),
        (lambda p, _: p.munmap(-PAGE, PAGE), "EINVAL", r"addr=-0x1000 .*: allowed up to"),
        (lambda p, a: p.mremap(a, PAGE, a + PAGE, 0), "EINVAL", r"new_length=0: allowed 1"),
        (lambda p, a: p.userfaultfd().register(a, -PAGE), "EINVAL", r"length=-4096: allowed 1"),
        (lambda p, a: p.userfaultfd().zeropage(a, 100), "EINVAL", r"length=0x64: allowed mult"),
        (lambda p, a: p.munmap(a + 1, PAGE), "EINVAL", r"allowed multiples of 4096"),
        (lambda p, a: p.munmap(a, 0), "EINVAL", r"length=0"),
        (lambda p, a: p.mprotect(a, PAGE, 16), "EINVAL", r"prot=0x10"),
        (lambda p, a: p.madvise(a, PAGE, 999), "EINVAL", r"advice=999: allowed MADV_DONTNEED \(4"),
        (lambda p, a: p.madvise(a + 1, PAGE, 4), "EINVAL", r"allowed multiples of 4096"),
        (lambda p, a: p.mremap(a, PAGE, a), "EINVAL", r"overlap"),
        (lambda p, _: p.mlock(0, PAGE), "ENOMEM", r"nothing is mapped at 0x0"),
        (
            lambda p, a: p.userfaultfd().register(a, PAGE, missing=False),
            "EINVAL",
            r"missing=False wp=False: allowed one",
        ),
        (lambda p, a: p.userfaultfd().copy(a, b"x"), "EINVAL", r"data has 1 bytes"),
        (lambda p, a: p.userfaultfd().zeropage(a, PAGE), "ENOENT", r"not registered"),
        (lambda p, a: p.userfaultfd().writeprotect(a, PAGE), "ENOENT", r"not registered"),
    ],
)
def test_bad_arguments_carry_errno_and_bound_and_change_nothing(
    machine: Machine,
    process: Process,
    call: Callable[[Process, int], object],
    number: str,
    message: str,
) -> None:
    """The kernel's errno, the value, what is allowed; VMAs, pages and locks are as before."""
    addr = process.mmap(PAGE)
    process.write(addr, b"x")
    before = counters(machine, process), [str(vma) for vma in process.mm.vmas]
    with pytest.raises(OSError, match=message) as failed:
        call(process, addr)
    assert errno.errorcode[failed.value.errno or 0] == number
    assert (counters(machine, process), [str(vma) for vma in process.mm.vmas]) == before
    assert process.mm.mmap_lock.holders == []
    assert process.read(addr, 1) == b"x"


@pytest.mark.parametrize(
    "call",
    [
        lambda p: p.read(-1, 1),
        lambda p: p.read(0, -1),
        lambda p: p.pin(-PAGE, 1),
        lambda p: p.poison(0x5000),
        lambda p: p.lock_page(0x5000),
    ],
)
def test_bad_addresses_are_value_errors(
    process: Process, call: Callable[[Process], object]
) -> None:
    """Not something a system call sees: ValueError with the address."""
    with pytest.raises(ValueError, match=r"addr=.*allowed"):
        call(process)


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 1),
        (4095, 2),
        (100, 3 * PAGE),
        (HPAGE - 1, 2),
        (HPAGE - 7, HPAGE + 14),
        (0, 3 * HPAGE),
        (5, 0),
    ],
)
def test_reads_and_writes_cross_pages_and_blocks(
    process: Process, offset: int, length: int
) -> None:
    """Any offset and length: what was written is read, what lies beside it is untouched."""
    addr = process.mmap(3 * HPAGE)
    data = block_bytes(3, NR * 3 + 1)[:length]
    with faults(process, "never"):
        process.write(addr + offset, data)
        assert process.read(addr + offset, length) == data
        expected = bytearray(3 * HPAGE)
        expected[offset : offset + length] = data
        assert process.read(addr, 3 * HPAGE) == expected


def test_write_takes_any_bytes(process: Process) -> None:
    """bytes, bytearray, memoryview."""
    addr = process.mmap(PAGE)
    for data in (b"abc", bytearray(b"def"), memoryview(b"ghi")):
        process.write(addr, data)
        assert process.read(addr, 3) == bytes(data)


def test_dead_process_answers_esrch(machine: Machine, process: Process) -> None:
    """After exit every call is ESRCH, and its memory is free."""
    addr = process.mmap(PAGE)
    process.write(addr, b"x")
    process.exit()
    for call in (
        lambda: process.read(addr, 1),
        lambda: process.mmap(PAGE),
        process.fork,
        process.exit,
    ):
        with pytest.raises(ProcessLookupError):
            call()
    machine.lru_add_drain_all()
    assert machine.vmstat()["nr_anon_pages"] == 0
    assert machine.vmstat()["nr_page_table_pages"] == 0


def test_pins_are_released_once(process: Process) -> None:
    """A second release is an error of the caller's."""
    addr = process.mmap(PAGE)
    for held in (process.pin(addr, 1), process.get(addr, 1), process.lock_page(addr)):
        held.release()
        with pytest.raises(ValueError, match="released already"):
            held.release()


def test_pin_breaks_copy_on_write_first(process: Process) -> None:
    """A pin for writing gets a page of the process's own."""
    addr = process.mmap(PAGE)
    process.write(addr, b"x")
    child = process.fork()
    held = child.pin(addr, 1)
    assert held.pfns.tolist() == [child.pfn(addr)]
    assert child.pfn(addr) != process.pfn(addr)
    held.release()


def test_pin_of_nothing_holds_nothing(process: Process) -> None:
    """A range that runs out of its mapping is refused whole, by EFAULT."""
    addr = process.mmap(2 * PAGE)
    with pytest.raises(OSError, match="no VMA there allows to write") as refused:
        process.pin(addr, 3 * PAGE)
    assert refused.value.errno == errno.EFAULT
    assert process.mem.user_pages == []


LOW, HIGH = 7 * PAGE + 128, 7 * PAGE + 192


@pytest.mark.parametrize(("offset", "length"), [(LOW, 1), (HIGH - 1, 1), (LOW - 1, 2), (0, HPAGE)])
@pytest.mark.parametrize("huge", [False, True])
def test_poison_is_by_line(process: Process, huge: bool, offset: int, length: int) -> None:
    """Reads that do not touch the bad line succeed; the first that does is SIGBUS for its page."""
    addr = advised(process)
    if huge:
        process.write(addr, block_bytes())
    else:
        fill(process, addr)
    process.poison(addr + 7 * PAGE + 130)  # line 2
    content = block_bytes()
    assert process.read(addr, LOW) == content[:LOW]
    assert process.read(addr + HIGH, HPAGE - HIGH) == content[HIGH:]
    with pytest.raises(BusError) as raised:
        process.read(addr + offset, length)
    error = raised.value
    assert (error.address, error.code, error.lsb) == (addr + 7 * PAGE, 4, 12)
    # The page is gone; the rest of a huge page is not.
    with pytest.raises(BusError) as raised:
        process.read(addr, HPAGE)
    assert (raised.value.address, raised.value.code) == (addr + 7 * PAGE, 4)
    assert process.read(addr + 8 * PAGE, HPAGE - 8 * PAGE) == content[8 * PAGE :]


@pytest.mark.parametrize("advice", [Advice.MADV_POPULATE_READ, Advice.MADV_POPULATE_WRITE])
def test_populate_faults_in(process: Process, advice: Advice) -> None:
    """POPULATE_READ maps zero pages, POPULATE_WRITE real ones."""
    addr = process.mmap(5 * PAGE)
    process.madvise(addr, 5 * PAGE, advice)
    assert process.mm.rss_stat[1] == (5 if advice is Advice.MADV_POPULATE_WRITE else 0)
    assert process.pfn(addr + 4 * PAGE) is not None


@pytest.mark.parametrize("end", [1, 2, 511])
def test_advice_on_part_of_a_mapping_ends_there(process: Process, end: int) -> None:
    """Nothing behind the range is touched."""
    addr = process.mmap(HPAGE)
    fill(process, addr)
    process.madvise(addr, end * PAGE, Advice.MADV_DONTNEED)
    assert process.mm.rss_stat[1] == NR - end
    assert process.read(addr + end * PAGE, HPAGE - end * PAGE) == block_bytes(end, NR - end)


TOP = 1 << 64
TASK_SIZE = 1 << 47
# What every kernel answers, by advice that does nothing else to these ranges.
RANGES = {
    "rounds up to nothing": (0, TOP - 1, errno.EINVAL),
    "wraps": (PAGE, TOP - PAGE, errno.EINVAL),
    "ends where addresses do": (TOP - PAGE, PAGE, errno.EINVAL),
    "is empty at the end": (TOP - PAGE, 0, None),
    "is negative": (0, -1, errno.EINVAL),
    "is the last that there can be": (TOP - 2 * PAGE, PAGE, errno.ENOMEM),
    "begins behind user space": (TASK_SIZE, PAGE, errno.ENOMEM),
    "lies in the middle of nowhere": (TOP >> 1, PAGE, errno.ENOMEM),
}


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize(
    "advice",
    [
        Advice.MADV_DONTNEED,
        Advice.MADV_DOFORK,
        Advice.MADV_REMOVE,
        Advice.MADV_POPULATE_READ,
        Advice.MADV_COLLAPSE,
    ],
)
def test_a_range_of_advice_must_not_wrap(process: Process, kind: str, advice: Advice) -> None:
    """EINVAL where it does; anything else is only a range in which nothing is mapped."""
    addr, length, number = RANGES[kind]
    assert refused(lambda: process.madvise(addr, length, advice)) == number


@pytest.mark.parametrize("end", [TASK_SIZE, TASK_SIZE + PAGE, TOP - PAGE])
def test_advice_holds_for_what_is_mapped_wherever_the_range_ends(
    process: Process, end: int
) -> None:
    """ENOMEM comes last, behind gaps and beyond user space; MADV_HWPOISON ends with EFAULT."""
    addr = process.mmap(4 * PAGE)
    process.write(addr, block_bytes(0, 4))
    process.munmap(addr + PAGE, PAGE)
    for advice in (Advice.MADV_DONTNEED, Advice.MADV_POPULATE_WRITE, Advice.MADV_HUGEPAGE):
        assert refused(lambda advice=advice: process.madvise(addr, end - addr, advice)) == 12
        gone = advice is Advice.MADV_DONTNEED
        assert process.mm.rss_stat[1] == (0 if gone else 3)
    assert all(vma.vm_flags & VM_HUGEPAGE for vma in process.mm.vmas)
    behind = addr + 2 * PAGE
    hwpoison = Advice.MADV_HWPOISON
    assert refused(lambda: process.madvise(behind, end - behind, hwpoison)) == errno.EFAULT
    assert process.mem.num_poisoned_pages == 2


@pytest.mark.parametrize(("version", "nr"), [((6, 4), 3), ((6, 9), 1)])
def test_populate_goes_on_behind_a_gap_until_6_9(
    make_machine: MakeMachine, version: tuple[int, int], nr: int
) -> None:
    """VMA by VMA at first, later through the whole range until it fails."""
    process = make_machine(kernel=KernelVersion.at(*version)).process()
    addr = process.mmap(4 * PAGE)
    process.munmap(addr + PAGE, PAGE)
    write = Advice.MADV_POPULATE_WRITE
    assert refused(lambda: process.madvise(addr, 4 * PAGE, write)) == errno.ENOMEM
    assert process.mm.rss_stat[1] == nr


def test_remove_goes_on_behind_a_gap(process: Process) -> None:
    """Every mapping of the range is punched, then it is ENOMEM."""
    file = memfd(process, range(4), size=4 * PAGE)
    addr = process.mmap(4 * PAGE, file=file, shared=True)
    process.munmap(addr + PAGE, PAGE)
    remove = Advice.MADV_REMOVE
    assert refused(lambda: process.madvise(addr, 4 * PAGE, remove)) == errno.ENOMEM
    assert file.f_mapping.nrpages == 1


@pytest.mark.parametrize(
    ("kinds", "number", "wiped"),
    [
        ("afa", errno.EINVAL, "a"),
        ("a-a", errno.ENOMEM, "aa"),
        ("-af", errno.EINVAL, "a"),
        ("faa", errno.EINVAL, ""),
        ("asa", errno.EINVAL, "a"),
    ],
)
def test_wipe_on_fork_holds_up_to_a_file(
    process: Process, kinds: str, number: int, wiped: str
) -> None:
    """Mapping by mapping: what lies below one that is refused has the advice; a gap has no say."""
    base, file = 0x10_0000_0000, process.memfd_create("f")
    for page, kind in enumerate(kinds):
        addr = base + page * PAGE
        if kind != "-":
            mapped = file if kind == "f" else None
            process.mmap(PAGE, addr=addr, fixed=True, file=mapped, shared=kind != "a")
    call = lambda: process.madvise(base, 3 * PAGE, Advice.MADV_WIPEONFORK)  # noqa: E731
    assert refused(call) == number
    flags = [vma.vm_flags for vma in process.mm.vmas]
    assert sum(bool(each & VM_WIPEONFORK) for each in flags) == len(wiped)


CALLS: dict[str, Callable[[Process], object]] = {
    "length": lambda process: process.mmap("2M"),  # type: ignore[arg-type]
    "offset": lambda process: process.mmap(PAGE, offset=1.5),  # type: ignore[arg-type]
    "prot": lambda process: process.mmap(PAGE, prot="rw"),  # type: ignore[arg-type]
    "addr": lambda process: process.munmap("x", PAGE),  # type: ignore[arg-type]
    "new": lambda process: process.mremap(0, PAGE, "x"),  # type: ignore[arg-type]
    "old": lambda process: process.mremap(None, PAGE, 0),  # type: ignore[arg-type]
    "flags": lambda process: process.open("/dev/null", "r"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_that_is_no_integer_is_named(
    machine: Machine, process: Process, name: str
) -> None:
    """TypeError with the value and what is allowed, before anything has changed."""
    with pytest.raises(TypeError, match=f"{name}=.*: allowed integers"):
        CALLS[name](process)
    assert process.mm.vmas == []
    machine.audit()


def test_numpys_integers_are_integers(machine: Machine, process: Process) -> None:
    """Addresses come out of arrays too."""
    addr = process.mmap(np.int64(PAGE))
    process.write(np.int64(addr), b"x")
    assert process.read(np.int64(addr), np.int64(1)) == b"x"
    machine.audit()


def test_names_are_cut_where_the_kernel_cuts_them(machine: Machine) -> None:
    """15 characters in trace and log, whoever gives the name."""
    name = "qemu-system-x86_64"
    process = machine.process(name)
    tasks = [
        process.task,
        process.fork("database-checkpointer").task,
        process.fork().task,
        machine.spawn(process.mmap.steps(4096), "io_uring-worker-0"),
    ]
    assert [task.comm for task in tasks] == [
        "qemu-system-x86",
        "database-checkp",
        "qemu-system-x86",
        "io_uring-worker",
    ]
    addr = process.mmap(4096)
    process.write(addr, b"x")
    process.poison(addr)
    with pytest.raises(BusError):
        process.read(addr, 1)
    assert any(f"SIGBUS to qemu-system-x86:{process.pid} due" in line for line in machine.log)


def test_thp_disable_takes_mmap_lock(machine: Machine, process: Process) -> None:
    """Where a paused task has it, nothing changes."""
    task = machine.spawn(process.mmap.steps(PAGE))
    task.run_until("release mmap_lock")
    with pytest.raises(WouldBlock, match="waits to acquire mmap_lock for write"):
        process.thp_disable = "completely"
    assert process.thp_disable == "no"
    task.finish()
    process.thp_disable = "completely"
    assert process.thp_disable == "completely"
