"""Where a copy stops, for every position a fault can have: count, prefix, suffix, address."""

import signal
from collections.abc import Iterator

import numpy as np
import pytest

import pykhuge
from failing_memory import FAILING, LINE, PAGE, UNTOUCHED, address_of, pages, pattern, untouched
from pykhuge import _native

BUS_ADRERR, BUS_MCEERR_AR = 2, 4
BEYOND = 200  # bytes asked for past the start of the bad page
ALIGNMENTS = range(LINE)
STARTS = range(LINE + 1)  # bytes between the start of the copy and what is bad


@pytest.fixture(params=_native.instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds for each way of copying."""
    before = _native.current_instruction_set()
    _native.use_instruction_set(request.param)
    yield
    _native.use_instruction_set(before)


@pytest.fixture(params=sorted(FAILING))
def failing(request: pytest.FixtureRequest) -> Iterator[memoryview]:
    """Three pages of which the second cannot be accessed."""
    with FAILING[request.param]() as memory:
        yield memoryview(memory)


def test_copy_mc_stops_at_an_unreadable_page_from_every_start_and_alignment(
    failing: memoryview,
) -> None:
    """All before the page is copied, nothing after it written, the address lies in the page."""
    bad_page = address_of(failing) + PAGE
    to = untouched(PAGE)
    for start in STARTS:
        source = failing[PAGE - start : PAGE + BEYOND]
        prefix = bytes(source[:start])
        for align in ALIGNMENTS:
            to[:] = UNTOUCHED
            target = to[align : align + len(source)]
            assert pykhuge.copy_mc(target, source) == BEYOND
            assert target[:start].tobytes() == prefix
            assert (to[:align] == UNTOUCHED).all()
            assert (to[align + start :] == UNTOUCHED).all()
            check = pykhuge.machine_check()
            assert check is not None
            assert check.si_code in (BUS_ADRERR, BUS_MCEERR_AR)
            assert bad_page <= check.si_addr < bad_page + PAGE


def test_copy_mc_raises_for_a_destination_fault_at_every_start_and_alignment(
    failing: memoryview,
) -> None:
    """A destination that cannot be written is an exception with its address, never a count."""
    bad_page = address_of(failing) + PAGE
    source = np.frombuffer(pattern(PAGE), np.uint8)
    for start in STARTS:
        target = failing[PAGE - start : PAGE + BEYOND]
        for align in ALIGNMENTS:
            with pytest.raises(pykhuge.DestinationFault) as caught:
                pykhuge.copy_mc(target, source[align : align + len(target)])
            assert bad_page <= caught.value.address < bad_page + PAGE


def test_copy_mc_stops_at_a_simulated_line_at_every_alignment_of_both_sides() -> None:
    """The bad line is counted from the buffer's start, wherever the buffer lies."""
    source = np.frombuffer(pattern(PAGE), np.uint8)
    to = untouched(PAGE)
    for from_align in ALIGNMENTS:
        for to_align in ALIGNMENTS:
            line = (from_align + to_align) % 3
            nr_bytes = 3 * LINE + from_align % 7
            from_ = source[from_align : from_align + nr_bytes]
            target = to[to_align : to_align + nr_bytes]
            to[:] = UNTOUCHED
            bad_lines = np.array([1 << line | 1 << 63], np.uint64)
            good = line * LINE
            assert pykhuge.copy_mc(target, from_, bad_lines=bad_lines) == nr_bytes - good
            assert (target[:good] == from_[:good]).all()
            assert (target[good:] == UNTOUCHED).all()
            assert pykhuge.machine_check() == pykhuge.MachineCheck(
                0, nr_bytes - good, BUS_MCEERR_AR, from_.ctypes.data + good, 6
            )


def test_copy_mc_finds_a_bad_line_in_any_page_of_a_run() -> None:
    """Word p of bad_lines speaks of the p-th 4096 bytes of the buffer."""
    source = np.frombuffer(pattern(5 * PAGE), np.uint8)[3 : 4 * PAGE + 100]
    for page in range(5):
        bad_lines = np.zeros(5, np.uint64)
        bad_lines[page] = 1 << 1
        to = untouched(source.size)
        good = page * PAGE + LINE
        if good >= source.size:
            assert pykhuge.copy_mc(to, source, bad_lines=bad_lines) == 0
        else:
            assert pykhuge.copy_mc(to, source, bad_lines=bad_lines) == source.size - good
            assert (to[good:] == UNTOUCHED).all()
        assert (to[:good] == source[:good]).all()


def test_copy_mc_highpage_stops_at_the_first_of_any_two_bad_lines() -> None:
    """All 64 lines, alone and in pairs; the later one is never met."""
    to, from_ = pages(1), pages(1, pattern(PAGE))
    target = np.frombuffer(to, np.uint8)
    source = np.frombuffer(from_, np.uint8)
    for first in range(64):
        for second in range(first, 64):
            target[:] = UNTOUCHED
            good = first * LINE
            not_copied = pykhuge.copy_mc_highpage(to, from_, bad_lines=1 << first | 1 << second)
            assert not_copied == PAGE - good
            assert (target[:good] == source[:good]).all()
            assert (target[good:] == UNTOUCHED).all()
            check = pykhuge.machine_check()
            assert check is not None
            assert (check.si_addr, check.si_addr_lsb) == (source.ctypes.data + good, 6)


def test_page_forms_return_the_whole_page_for_an_unreadable_one(failing: memoryview) -> None:
    """A page that fails as a whole leaves 4096 bytes not copied, and the destination as it was."""
    to = pages(1, bytes([UNTOUCHED]) * PAGE)
    for copy in (pykhuge.copy_mc_highpage, pykhuge.copy_mc_user_highpage):
        assert copy(to, failing[PAGE : 2 * PAGE]) == PAGE
        assert to[:] == bytes([UNTOUCHED]) * PAGE
        assert copy(to, failing[:PAGE]) == 0
        to[:] = bytes([UNTOUCHED]) * PAGE


def test_page_forms_raise_when_the_destination_cannot_be_written(failing: memoryview) -> None:
    """The exception is an OSError with EFAULT and the address."""
    from_ = pages(1, pattern(PAGE))
    with pytest.raises(pykhuge.DestinationFault) as caught:
        pykhuge.copy_mc_highpage(failing[PAGE : 2 * PAGE], from_)
    bad_page = address_of(failing) + PAGE
    assert bad_page <= caught.value.address < bad_page + LINE
    with pytest.raises(OSError, match="destination cannot be written at 0x"):
        pykhuge.copy_mc_huge_page(failing, from_, [0, 0, -1])


def test_copy_mc_huge_page_names_the_genuinely_unreadable_frame(failing: memoryview) -> None:
    """Frames before it, holes included, are in place; those after it are untouched."""
    to = pages(4, bytes([UNTOUCHED]) * 4 * PAGE)
    check = pykhuge.copy_mc_huge_page(to, failing, [0, -1, 1, 0])
    assert check is not None
    assert (check.index, check.not_copied) == (2, PAGE)
    assert to[:PAGE] == bytes(failing[:PAGE])
    assert to[PAGE : 2 * PAGE] == bytes(PAGE)
    assert to[2 * PAGE :] == bytes([UNTOUCHED]) * 2 * PAGE


@pytest.mark.parametrize("stop", [0, 1, 255, 510, 511])
def test_copy_mc_huge_page_stops_at_a_bad_line_of_any_frame(stop: int) -> None:
    """First, last and middle frame: exact prefix, and the record has index, code and address."""
    arena = pages(600, pattern(600 * PAGE))
    to = pages(512, bytes([UNTOUCHED]) * 512 * PAGE)
    frames = np.random.default_rng(stop).permutation(600)[:512]
    bad_lines = np.zeros(600, np.uint64)
    bad_lines[frames[stop]] = 1 << 17 | 1 << 40
    check = pykhuge.copy_mc_huge_page(to, arena, frames, bad_lines=bad_lines)
    source = np.frombuffer(arena, np.uint8)
    address = source.ctypes.data + int(frames[stop]) * PAGE + 17 * LINE
    assert check == pykhuge.MachineCheck(stop, PAGE - 17 * LINE, BUS_MCEERR_AR, address, 6)
    assert check == pykhuge.machine_check()
    good = stop * PAGE + 17 * LINE
    expected = source.reshape(600, PAGE)[frames].reshape(-1)
    assert to[:good] == expected[:good].tobytes()
    assert to[good:] == bytes([UNTOUCHED]) * (512 * PAGE - good)


def test_sigbus_stays_deliverable_after_many_machine_checks() -> None:
    """The jump skips the return from the signal; the mask must not suffer from it."""
    to, from_ = pages(1), pages(1)
    for _ in range(1000):
        assert pykhuge.copy_mc_highpage(to, from_, bad_lines=1) == PAGE
    assert signal.SIGBUS not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
