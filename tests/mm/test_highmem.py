"""The page copies as a user calls them: arguments, metadata, buffers of every kind."""

import array
import mmap
from typing import Any

import numpy as np
import pytest

import pykhuge
from failing_memory import PAGE, UNTOUCHED, pages, pattern

READ_ONLY = bytes(PAGE)


def test_copy_mc_highpage_copies_a_page() -> None:
    """A page that can be read is copied whole, and the result is 0."""
    to, from_ = pages(1), pages(1, pattern(PAGE))
    assert pykhuge.copy_mc_highpage(to, from_) == 0
    assert to[:] == pattern(PAGE)


def test_copy_mc_user_highpage_takes_the_kernels_arguments() -> None:
    """The address and the mapping are accepted, and of no effect, as on x86."""
    to, from_ = pages(1), pages(1, pattern(PAGE))
    assert pykhuge.copy_mc_user_highpage(to, from_, 0x7F0000001000, object()) == 0
    assert to[:] == pattern(PAGE)


def test_copy_highpage_copies_a_page() -> None:
    """The copy without recovery is the same copy."""
    to, from_ = pages(1), pages(1, pattern(PAGE))
    pykhuge.copy_highpage(to, from_)
    assert to[:] == pattern(PAGE)


def test_copy_mc_huge_page_gathers_frames_and_clears_holes() -> None:
    """Any order, frames repeated, holes zero."""
    arena = pages(4, pattern(4 * PAGE))
    to = pages(5, bytes([UNTOUCHED]) * 5 * PAGE)
    assert pykhuge.copy_mc_huge_page(to, arena, [3, -1, 0, 3, 1]) is None
    page = [arena[i * PAGE : (i + 1) * PAGE] for i in range(4)]
    assert to[:] == page[3] + bytes(PAGE) + page[0] + page[3] + page[1]


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4095, 4096, 4097, 100_000])
def test_copy_mc_copies_any_size(size: int) -> None:
    """No size is special."""
    to = bytearray(size)
    assert pykhuge.copy_mc(to, pattern(size)) == 0
    assert to == pattern(size)


@pytest.mark.parametrize(
    "buffer",
    [
        bytearray(PAGE),
        array.array("Q", bytes(PAGE)),
        np.zeros((8, 64), np.float64),
        memoryview(bytearray(PAGE)),
        mmap.mmap(-1, PAGE),
    ],
    ids=lambda buffer: type(buffer).__name__,
)
def test_any_contiguous_buffer_is_accepted(buffer: Any) -> None:
    """Item type and shape do not matter, only the bytes."""
    assert pykhuge.copy_mc(buffer, pattern(PAGE)) == 0
    assert bytes(memoryview(buffer).cast("B")) == pattern(PAGE)


def test_shadow_is_copied_by_copy_mc_highpage_on_success_only() -> None:
    """KMSAN's metadata of the source follows the copy; a copy that fails leaves it."""
    to, from_ = pages(1), pages(1)
    to_shadow, from_shadow = bytearray([UNTOUCHED]) * PAGE, pattern(PAGE)
    shadow = (to_shadow, from_shadow)
    assert pykhuge.copy_mc_highpage(to, from_, bad_lines=1, shadow=shadow) == PAGE
    assert to_shadow == bytes([UNTOUCHED]) * PAGE
    assert pykhuge.copy_mc_highpage(to, from_, shadow=shadow) == 0
    assert to_shadow == from_shadow


def test_shadow_is_marked_initialised_by_copy_mc_user_highpage_on_success_only() -> None:
    """KMSAN takes a page copied for user space as initialised, if it was copied."""
    to, from_ = pages(1), pages(1)
    shadow = bytearray([UNTOUCHED]) * PAGE
    assert pykhuge.copy_mc_user_highpage(to, from_, bad_lines=1 << 63, shadow=shadow) == 64
    assert shadow == bytes([UNTOUCHED]) * PAGE
    assert pykhuge.copy_mc_user_highpage(to, from_, shadow=shadow) == 0
    assert shadow == bytes(PAGE)


def test_machine_check_keeps_the_last_failure_of_this_thread() -> None:
    """A copy that succeeds afterwards does not clear it."""
    to, from_ = pages(1), pages(1)
    pykhuge.copy_mc_highpage(to, from_, bad_lines=1 << 60)
    pykhuge.copy_mc_highpage(to, from_)
    check = pykhuge.machine_check()
    assert check is not None
    assert check.not_copied == 4 * 64


PAGE_FORMS = [
    pykhuge.copy_mc_highpage,
    pykhuge.copy_mc_user_highpage,
    pykhuge.copy_highpage,
]


@pytest.mark.parametrize("copy", PAGE_FORMS, ids=lambda copy: copy.__name__)
def test_page_forms_refuse_what_is_not_two_pages(copy: Any) -> None:
    """The message names the argument, its value and what is allowed; nothing was written."""
    page = pages(1, bytes([UNTOUCHED]) * PAGE)
    two = memoryview(pages(2, pattern(2 * PAGE)))
    closed = pages(1)
    closed.close()
    strided = memoryview(pages(2))[::2]
    for to, from_, error, message in [
        (READ_ONLY, page, ValueError, "to is a bytes: .*writable"),
        (page, two, ValueError, "from_ has 8192 bytes: allowed 4096"),
        (two, page, ValueError, "to has 8192 bytes: allowed 4096"),
        (page, two[8 : PAGE + 8], ValueError, "from_ is at 0x[0-9a-f]+: allowed are multiples"),
        (two[8 : PAGE + 8], page, ValueError, "to is at 0x[0-9a-f]+: allowed are multiples"),
        (page, page, ValueError, "overlaps"),
        (page, closed, ValueError, "closed"),
        (closed, page, ValueError, "closed"),
        (page, strided, ValueError, "contiguous"),
        (page, 17, TypeError, "from_=17: "),
        (None, page, TypeError, "to=None: "),
    ]:
        with pytest.raises(error, match=message):
            copy(to, from_)
    assert page[:] == bytes([UNTOUCHED]) * PAGE
    assert two == pattern(2 * PAGE)


@pytest.mark.parametrize(
    ("bad_lines", "error"), [(-1, ValueError), (1 << 64, ValueError), ("1", TypeError)]
)
def test_page_forms_refuse_lines_that_do_not_exist(bad_lines: Any, error: type) -> None:
    """There are 64 lines in a page."""
    to, from_ = pages(1), pages(1, pattern(PAGE))
    for copy in (pykhuge.copy_mc_highpage, pykhuge.copy_mc_user_highpage):
        with pytest.raises(error, match="bad_lines="):
            copy(to, from_, bad_lines=bad_lines)
    assert to[:] == bytes(PAGE)


def test_page_forms_refuse_a_wrong_shadow_before_a_byte_moves() -> None:
    """Metadata has the page's size and can be written."""
    to, from_ = pages(1), pages(1, pattern(PAGE))
    short = bytearray(PAGE - 1)
    with pytest.raises(ValueError, match=r"shadow\[0\] has 4095 bytes: allowed 4096"):
        pykhuge.copy_mc_highpage(to, from_, shadow=(short, READ_ONLY))
    with pytest.raises(ValueError, match=r"shadow\[0\] is a bytes: .*writable"):
        pykhuge.copy_mc_highpage(to, from_, shadow=(READ_ONLY, READ_ONLY))
    with pytest.raises(ValueError, match="shadow has 4095 bytes: allowed 4096"):
        pykhuge.copy_mc_user_highpage(to, from_, shadow=short)
    assert to[:] == bytes(PAGE)


def test_copy_mc_refuses_what_it_cannot_copy() -> None:
    """Sizes that differ, overlap, and a bad_lines that does not fit."""
    buffer = memoryview(bytearray(pattern(PAGE)))
    to: Any
    lines: Any
    for to, from_, lines, message in [
        (buffer[:8], buffer[8:18], None, "to has 8 bytes, from_ 10: allowed are equal sizes"),
        (buffer[:16], buffer[15:31], None, "overlaps"),
        (bytes(8), buffer[:8], None, "writable"),
        (bytearray(8), buffer[:8], np.zeros(2, np.uint64), r"uint64\[2\]: allowed is uint64\[1\]"),
        (bytearray(8), buffer[:8], np.zeros(1, np.int64), r"int64\[1\]: allowed is uint64\[1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            pykhuge.copy_mc(to, from_, bad_lines=lines)
    assert buffer == pattern(PAGE)


def test_copy_mc_huge_page_refuses_frames_that_are_not_there() -> None:
    """The message names the frame and how many there are; nothing was written."""
    arena, to = pages(4, pattern(4 * PAGE)), pages(2, bytes([UNTOUCHED]) * 2 * PAGE)
    frames: Any
    for frames, error, message in [
        ([0, 4], ValueError, "frames has 4: allowed 0..3, or -1"),
        ([0, -2], ValueError, "frames has -2: allowed 0..3, or -1"),
        ([], ValueError, r"allowed 1\.\.512"),
        ([0] * 513, ValueError, r"allowed 1\.\.512"),
        ([[0, 1]], ValueError, r"shape \(1, 2\)"),
        ([0.0, 1.0], TypeError, "float64: allowed are integers"),
        ([0], ValueError, "to has 8192 bytes: allowed 4096"),
        (np.array([0, 1 << 63], np.uint64), ValueError, "frames has 9223372036854775808"),
    ]:
        with pytest.raises(error, match=message):
            pykhuge.copy_mc_huge_page(to, arena, frames)
    with pytest.raises(ValueError, match="overlaps"):
        pykhuge.copy_mc_huge_page(arena, arena, [0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"uint64\[2\]: allowed is uint64\[4\]"):
        pykhuge.copy_mc_huge_page(to, arena, [0, 1], bad_lines=np.zeros(2, np.uint64))
    assert to[:] == bytes([UNTOUCHED]) * 2 * PAGE
