"""Machine: its arguments, its knobs, its allocator; what it shows."""

import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest
from collapse_kit import HPAGE, NR, PAGE, MakeMachine, advised, faults, fill, pfn_of

from pykhuge import KernelBug, KernelPanic, Machine, Process, ScanResult
from pykhuge.machine import parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1G", 1 << 30),
        ("2M", 2 << 20),
        ("4k", 4096),
        ("1T", 1 << 40),
        ("3MiB", 3 << 20),
        ("8MB", 8 << 20),
        (" 12 ", 12),
        (4096, 4096),
    ],
)
def test_sizes_are_read(text: str | int, expected: int) -> None:
    """K, M, G, T are powers of 1024, in either case."""
    assert parse_size("memory", text) == expected


@pytest.mark.parametrize("text", ["", "G", "1.5G", "-1M", "1P", "one"])
def test_bad_sizes_are_named(text: str) -> None:
    """The message has argument, value, and what is allowed."""
    with pytest.raises(ValueError, match=r"memory='.*': allowed a number of bytes"):
        Machine(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": "1M"}, r"memory='1M': allowed multiples of 2097152"),
        ({"memory": "3M"}, r"memory='3M': allowed multiples"),
        ({"memory": "64M", "nodes": 0}, r"nodes=0: allowed 1 and more"),
        ({"memory": "64M", "nodes": 3}, r"allowed multiples of 2097152 bytes for each node"),
        ({"nodes": ["2M", "1K"]}, r"allowed multiples of 2097152"),
        ({"memory": "2M", "cpus": 0}, r"cpus=0: allowed 1 and more"),
        ({"memory": "4M", "nodes": 2, "distances": [[10]]}, r"allowed 2 rows of 2"),
        ({"memory": "2M", "swap": "lots"}, r"swap='lots': allowed a number"),
    ],
)
def test_bad_arguments_of_a_machine_are_named(arguments: dict[str, Any], message: str) -> None:
    """Each says the value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        Machine(**arguments)


def set_limit(name: str, value: int) -> Callable[[Machine], None]:
    return lambda machine: setattr(machine.khugepaged_settings, name, value)


def set_thp(name: str, value: object) -> Callable[[Machine], None]:
    return lambda machine: setattr(machine.thp, name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_limit("max_ptes_none", 512), r"max_ptes_none=512: allowed 0\.\.511"),
        (set_limit("max_ptes_swap", -1), r"max_ptes_swap=-1: allowed 0\.\.511"),
        (set_limit("max_ptes_shared", 1 << 32), r"max_ptes_shared=4294967296: allowed 0\.\.511"),
        (set_thp("enabled", "sometimes"), r"enabled='sometimes': allowed always, madvise, never"),
        (set_thp("use_zero_page", 7), r"use_zero_page=7: allowed False, True"),
        (set_thp("defrag", ""), r"defrag='': allowed always, defer, defer\+madvise"),
        (lambda machine: machine.process(cpu=1), r"cpu=1: allowed 0\.\.0"),
        (lambda machine: machine.memcg("x"), r"limit='x': allowed"),
        (lambda machine: setattr(machine, "node_reclaim_mode", 8), r"node_reclaim_mode=8: allowed"),
        (lambda machine: setattr(machine.process(), "node", 1), r"node=1: allowed 0\.\.0"),
        (
            lambda machine: machine.collapse(machine.process(), PAGE),
            r"addr=0x1000: allowed multiples of 0x200000",
        ),
        (lambda machine: machine.mem.poison.poison(0, 64), r"line=64: allowed 0\.\.63"),
        (lambda machine: machine.mem.poison.poison(-1, 0), r"pfn=-1: allowed 0\.\."),
    ],
)
def test_bad_values_are_named_and_change_nothing(
    machine: Machine, change: Callable[[Machine], None], message: str
) -> None:
    """A knob, a limit, an index: value and bound stand in the message."""
    before = repr(machine.khugepaged_settings), repr(machine.thp), machine.vmstat()
    with pytest.raises(ValueError, match=message):
        change(machine)
    assert (repr(machine.khugepaged_settings), repr(machine.thp), machine.vmstat()) == before
    assert machine.node_reclaim_mode == 0


def test_limits_default_to_the_kernels(machine: Machine) -> None:
    """max_ptes_none 511, swap 64, shared 256; enabled=madvise."""
    settings = machine.khugepaged_settings
    assert (settings.max_ptes_none, settings.max_ptes_swap, settings.max_ptes_shared) == (
        511,
        64,
        256,
    )
    assert machine.thp.enabled == "madvise"


def test_misspelt_knob_is_an_error(machine: Machine) -> None:
    """A knob that does not exist is not made by writing to it."""
    with pytest.raises(AttributeError, match="max_ptes_none"):
        machine.khugepaged_settings.max_pte_none = 1
    with pytest.raises(AttributeError, match="use_zero_page"):
        machine.thp.enable = "always"


def test_fresh_machine_is_free_but_for_the_zero_page(make_machine: MakeMachine) -> None:
    """nr_free_pages is memory less one page, on all nodes together."""
    machine = make_machine("64M", nodes=4, device_memory="2M")
    assert machine.vmstat()["nr_free_pages"] == 64 * 256 - 1
    assert [node.end_pfn - node.start_pfn for node in machine.mem.nodes] == [16 * 256] * 4


def test_vmstat_shows_huge_pages_in_huge_pages(machine: Machine, process: Process) -> None:
    """nr_anon_transparent_hugepages counts huge pages, nr_anon_pages base pages."""
    addr = advised(process, 3 * HPAGE)
    process.write(addr, bytes(3 * HPAGE))
    assert machine.vmstat()["nr_anon_transparent_hugepages"] == 3
    assert machine.vmstat()["nr_anon_pages"] == 3 * NR


def test_all_of_memory_can_be_used(make_machine: MakeMachine) -> None:
    """Every frame but the zero page's and the page tables' ends up mapped."""
    machine = make_machine("8M")
    process = machine.process()
    addr = process.mmap(8 << 20)
    with faults(machine, "never"), pytest.raises(MemoryError):
        process.write(addr, bytes(8 << 20))
    assert machine.vmstat()["nr_free_pages"] == 0
    frames = {process.pfn(addr + page * PAGE) for page in range(2047)} - {None}
    assert len(frames) == 2048 - 1 - process.mm.pgtables_bytes // PAGE


def test_huge_page_needs_a_free_block(make_machine: MakeMachine) -> None:
    """One page in each 2 MiB block is enough to leave no huge page."""
    machine = make_machine("8M")
    process = machine.process()
    addr = process.mmap(8 << 20)
    with faults(machine, "never"):
        process.write(addr, bytes(7 << 20))
    machine.lru_add_drain_all()
    by_block: dict[int, int] = {}
    for page in range(7 * 256):
        by_block.setdefault(pfn_of(process, addr, page) // NR, page)
    for page in set(range(7 * 256)) - set(by_block.values()):
        process.madvise(addr + page * PAGE, PAGE, 4)
    machine.lru_add_drain_all()
    assert machine.vmstat()["nr_free_pages"] > 2000
    huge = advised(process)
    fill(process, huge, [0])
    assert machine.collapse(process, huge) is ScanResult.SCAN_ALLOC_HUGE_PAGE_FAIL
    process.munmap(addr, 8 << 20)
    machine.lru_add_drain_all()
    assert machine.collapse(process, huge) is ScanResult.SCAN_SUCCEED


def test_ledger_names_who_posted(machine: Machine, process: Process) -> None:
    """A posting has owner, counter, delta and function; ledgers nest and end with their block."""
    addr = process.mmap(PAGE)
    with machine.ledger() as outer:
        process.write(addr, b"x")
        with machine.ledger() as inner:
            process.munmap(addr, PAGE)
    process.mmap(PAGE)
    assert inner.balance()[process.mm.name, "MM_ANONPAGES"] == -1
    assert outer.balance()[process.mm.name, "MM_ANONPAGES"] == 1
    (posting,) = [each for each in outer if each.counter == "MM_ANONPAGES"]
    assert posting.function == "map_new_pages"
    with pytest.raises(KernelBug, match=r"MM_ANONPAGES is off by \+1: map_new_pages \+1"):
        outer.assert_cancels(except_for=["nr_free_pages"])


def test_large_machine_costs_nothing_until_used(make_machine: MakeMachine) -> None:
    """A machine of 256 GiB collapses a block like any other."""
    machine = make_machine("256G")
    process = machine.process()
    addr = advised(process)
    fill(process, addr, [0, 511])
    assert machine.collapse(process, addr) is ScanResult.SCAN_SUCCEED


@pytest.mark.parametrize(
    "options",
    [
        {"recovery": "no"},
        {"seed": -1},
        {"seed": 1.5},
        {"cpus": 1.5},
        {"nodes": []},
        {"nodes": "2"},
        {"nodes": 1.5},
    ],
    ids=str,
)
def test_a_machine_names_the_argument_it_does_not_take(options: dict[str, object]) -> None:
    """And the value, and what is allowed."""
    (name,) = options
    with pytest.raises(ValueError, match=rf"{name}=.*allowed"):
        Machine("16M", **options)  # type: ignore[arg-type]


def test_what_belongs_to_another_machine_is_refused(machine: Machine) -> None:
    """Processes, cgroups and mounts know whose they are; nothing has changed in either."""
    other = Machine("16M")
    stranger = other.process("stranger")
    addr = advised(stranger)
    with pytest.raises(ValueError, match="allowed a process of this machine"):
        machine.collapse(stranger, addr)
    with pytest.raises(ValueError, match="allowed a group of this machine"):
        machine.process(memcg=other.memcg("1M"))
    with pytest.raises(ValueError, match="allowed a mount of this machine"):
        stranger.open("name", os.O_RDWR | os.O_CREAT, tmpfs=machine.tmpfs())
    other.audit()
    machine.audit()


def test_spawn_takes_what_steps_returns(machine: Machine) -> None:
    """A call without .steps is the likely slip."""
    with pytest.raises(TypeError, match=r"allowed what a call's \.steps"):
        machine.spawn(machine.collapse)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cpu=9: allowed 0\.\.0"):
        machine.spawn(machine.process().munmap.steps(0, 4096), cpu=9)
    machine.audit()


def test_calls_show_their_signature_and_text(process: Process) -> None:
    """Inspect and help see the method behind a call that can be taken in steps."""
    assert str(inspect.signature(process.munmap)) == "(addr: 'int', length: 'int') -> 'Steps[None]'"
    assert repr(process.munmap).startswith("<Process.munmap(addr")


def test_a_wrong_step_name_is_told_with_those_there_were(machine: Machine) -> None:
    """run_until() has run the call to its end by then."""
    process = machine.process()
    addr = process.mmap(4096)
    task = machine.spawn(process.munmap.steps(addr, 4096))
    with pytest.raises(LookupError, match="it had: acquire mmap_lock for write, release"):
        task.run_until("copy")
    machine.audit()


def test_a_dead_machine_is_not_audited(machine: Machine) -> None:
    """It died in the middle of something: the panic again, not its consequences."""
    machine.mem.die("for the test")
    with pytest.raises(KernelPanic):
        machine.audit()
