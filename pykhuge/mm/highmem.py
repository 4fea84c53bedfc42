"""Page copies that survive memory errors in their source (Linux: include/linux/highmem.h).

``copy_mc_highpage`` and ``copy_mc_user_highpage`` copy one page and return 0, or the number of
bytes *not* copied: everything before the first unreadable 64-byte line is in the destination, and
nothing after it was written. ``copy_mc_huge_page`` copies up to 512 scattered pages into one huge
page, and ``copy_mc`` any run of bytes. What stopped a copy, as the signal told it, is
``machine_check()`` afterwards on the same thread.

Memory fails genuinely (poisoned memory, a file truncated under its mapping, ``UFFDIO_POISON``) or
by declaration: ``bad_lines`` names lines of the source that raise a machine check when reached.

Any object with the buffer protocol will do, if it is contiguous and the destination writable.
Wrong arguments raise ``ValueError`` or ``TypeError`` before a byte moves; a destination that cannot
be written raises ``DestinationFault``, which is no count. The GIL is released while bytes move.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from pykhuge import _native
from pykhuge._native import HOLE, LINE_SIZE, PAGE_SIZE, DestinationFault, MachineCheck

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    # numpy's stubs call arrays buffers from Python 3.12 on only.
    Readable: TypeAlias = ReadableBuffer | npt.NDArray[Any]
    Writable: TypeAlias = WriteableBuffer | npt.NDArray[Any]

__all__ = [
    "DestinationFault",
    "MachineCheck",
    "copy_highpage",
    "copy_mc",
    "copy_mc_highpage",
    "copy_mc_huge_page",
    "copy_mc_user_highpage",
    "machine_check",
]

_MAX_FRAMES = 512
_copy_mc_page = _native.copy_mc_page  # a global is found faster than a module's attribute
_ALL_LINES = (1 << PAGE_SIZE // LINE_SIZE) - 1


class _Span:
    """A buffer's bytes, held in place within ``with``.

    Not for as long as this object lives: an exception's traceback would keep the buffer from being
    closed.
    """

    __slots__ = ("_view", "address", "nr_bytes")

    def __init__(self, name: str, buffer: "Readable", *, writable: bool = False) -> None:
        try:
            self._view = _native.export(buffer, writable=writable)
        except TypeError:
            raise TypeError(f"{name}={buffer!r}: allowed are objects with a buffer") from None
        except (BufferError, ValueError) as error:
            # Not its repr: that might read memory that fails.
            raise ValueError(
                f"{name} is a {type(buffer).__name__}: {error}; "
                f"allowed are contiguous{', writable' if writable else ''} buffers"
            ) from None
        self.address = _native.address(self._view)
        self.nr_bytes = len(self._view)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _native.release(self._view)


def _disjoint(to: _Span, from_: _Span) -> None:
    if to.address < from_.address + from_.nr_bytes and from_.address < to.address + to.nr_bytes:
        raise ValueError(
            f"to={to.address:#x}+{to.nr_bytes} overlaps from_={from_.address:#x}+{from_.nr_bytes}: "
            "allowed are buffers apart from each other"
        )


def _whole_pages(name: str, span: _Span, nr_pages: int | None = None) -> None:
    if nr_pages is not None and span.nr_bytes != nr_pages * PAGE_SIZE:
        raise ValueError(f"{name} has {span.nr_bytes} bytes: allowed {nr_pages * PAGE_SIZE}")
    if span.nr_bytes % PAGE_SIZE:
        raise ValueError(f"{name} has {span.nr_bytes} bytes: allowed are multiples of {PAGE_SIZE}")
    if span.address % PAGE_SIZE:
        raise ValueError(f"{name} is at {span.address:#x}: allowed are multiples of {PAGE_SIZE}")


def _check_pages(to: _Span, from_: _Span) -> None:
    _whole_pages("to", to, 1)
    _whole_pages("from_", from_, 1)
    _disjoint(to, from_)


def _check_lines(bad_lines: int) -> None:
    if not isinstance(bad_lines, int):
        raise TypeError(f"bad_lines={bad_lines!r}: allowed are integers")
    if not 0 <= bad_lines <= _ALL_LINES:
        raise ValueError(f"bad_lines={bad_lines:#x}: allowed 0..{_ALL_LINES:#x}, bit i is line i")


def _line_words(bad_lines: Any, nr_pages: int) -> npt.NDArray[np.uint64] | None:
    if bad_lines is None:
        return None
    words = np.ascontiguousarray(bad_lines)
    if words.dtype != np.uint64 or words.shape != (nr_pages,):
        raise ValueError(
            f"bad_lines is {words.dtype}{list(words.shape)}: allowed is uint64[{nr_pages}], "
            "one word a page"
        )
    return words


def _address(words: npt.NDArray[np.uint64] | None) -> int:
    return 0 if words is None else words.ctypes.data


def copy_mc_highpage(
    to: "Writable",
    from_: "Readable",
    *,
    bad_lines: int = 0,
    shadow: "tuple[Writable, Readable] | None" = None,
) -> int:
    """Copy one page; return 0, or the bytes not copied.

    Args:
        to: 4096 bytes, page aligned, writable.
        from_: 4096 bytes, page aligned, apart from ``to``.
        bad_lines: bit i declares 64-byte line i of ``from_`` unreadable.
        shadow: KMSAN metadata of ``to`` and of ``from_``, 4096 bytes each: the second is copied to
            the first when the whole page was copied, and neither is touched otherwise.
    Raises: ValueError, TypeError, DestinationFault.
    Kernel: copy_mc_highpage (include/linux/highmem.h).
    """
    if shadow is None:
        not_copied = _copy_mc_page(to, from_, bad_lines)
        if not_copied >= 0:
            return not_copied
        _page_failure(not_copied, to, from_, bad_lines)
    to_shadow = _shadow("shadow[0]", shadow[0], writable=True)
    from_shadow = _shadow("shadow[1]", shadow[1])
    not_copied = copy_mc_highpage(to, from_, bad_lines=bad_lines)
    if not not_copied:
        to_shadow[:] = from_shadow
    return not_copied


def copy_mc_user_highpage(
    to: "Writable",
    from_: "Readable",
    vaddr: int = 0,  # noqa: ARG001  kept, as in the kernel, for caches indexed by virtual address
    vma: object = None,  # noqa: ARG001
    *,
    bad_lines: int = 0,
    shadow: "Writable | None" = None,
) -> int:
    """Copy one page of a user mapping; return 0, or the bytes not copied.

    Args:
        to: 4096 bytes, page aligned, writable.
        from_: 4096 bytes, page aligned, apart from ``to``.
        vaddr: where the page is mapped; of no effect here, as on x86.
        vma: the mapping; likewise.
        bad_lines: bit i declares 64-byte line i of ``from_`` unreadable.
        shadow: KMSAN metadata of ``to``, 4096 bytes: marked initialised (all zero) when the whole
            page was copied, untouched otherwise.
    Raises: ValueError, TypeError, DestinationFault.
    Kernel: copy_mc_user_highpage (include/linux/highmem.h).
    """
    if shadow is None:
        return copy_mc_highpage(to, from_, bad_lines=bad_lines)
    to_shadow = _shadow("shadow", shadow, writable=True)
    not_copied = copy_mc_highpage(to, from_, bad_lines=bad_lines)
    if not not_copied:
        to_shadow[:] = bytes(PAGE_SIZE)
    return not_copied


def _page_failure(result: int, to: "Writable", from_: "Readable", bad_lines: int) -> NoReturn:
    """Say why one page could not be copied at all."""
    _native.outcome(result)
    _check_lines(bad_lines)
    with _Span("to", to, writable=True) as dst, _Span("from_", from_) as src:
        _check_pages(dst, src)
    raise ValueError("to or from_ changed while being copied: allowed are buffers that stay")


def _shadow(name: str, buffer: Any, *, writable: bool = False) -> memoryview:
    with _Span(name, buffer, writable=writable) as span:
        if span.nr_bytes != PAGE_SIZE:
            raise ValueError(f"{name} has {span.nr_bytes} bytes: allowed {PAGE_SIZE}")
    return memoryview(buffer).cast("B")


def copy_highpage(to: "Writable", from_: "Readable") -> None:
    """Copy one page as before the series: without recovery.

    Memory that cannot be read raises its SIGBUS as if this library were not there.
    Kernel: copy_highpage (include/linux/highmem.h).
    """
    with _Span("to", to, writable=True) as dst, _Span("from_", from_) as src:
        _check_pages(dst, src)
        _native.copy_page(dst.address, src.address)


def copy_mc(
    to: "Writable",
    from_: "Readable",
    *,
    bad_lines: npt.NDArray[np.uint64] | None = None,
) -> int:
    """Copy bytes of any number and alignment; return 0, or the bytes not copied.

    Args:
        to: writable, as many bytes as ``from_``.
        from_: apart from ``to``.
        bad_lines: uint64 by 4096 bytes *of the buffer*, the last page may be short: bit i of word p
            declares the 64 bytes from ``4096 * p + 64 * i`` unreadable, wherever the buffer lies.
    Raises: ValueError, TypeError, DestinationFault.
    """
    with _Span("to", to, writable=True) as dst, _Span("from_", from_) as src:
        if dst.nr_bytes != src.nr_bytes:
            raise ValueError(
                f"to has {dst.nr_bytes} bytes, from_ {src.nr_bytes}: allowed are equal sizes"
            )
        _disjoint(dst, src)
        words = _line_words(bad_lines, -(-src.nr_bytes // PAGE_SIZE))
        return _native.copy_mc_bytes(dst.address, src.address, src.nr_bytes, _address(words))


def copy_mc_huge_page(
    to: "Writable",
    from_: "Readable",
    frames: Sequence[int] | npt.NDArray[np.int64],
    *,
    bad_lines: npt.NDArray[np.uint64] | None = None,
) -> MachineCheck | None:
    """Copy up to 512 scattered pages to consecutive ones, stopping at the first failure.

    One call, one recovery point: what ``__collapse_huge_page_copy`` does with 512 of them.

    Args:
        to: ``len(frames)`` pages, page aligned, writable.
        from_: any number of pages, page aligned, apart from ``to``.
        frames: page numbers in ``from_``, in any order, also repeated; -1 is a hole, cleared in
            ``to``.
        bad_lines: uint64 by page of ``from_``: bit i declares line i of that page unreadable.
    Returns: None when all was copied; else which of ``frames`` stopped it, how many bytes of that
        one are missing, and the signal's account. Pages after that one are as they were.
    Raises: ValueError, TypeError, DestinationFault.
    """
    with _Span("to", to, writable=True) as dst, _Span("from_", from_) as src:
        _whole_pages("from_", src)
        nr_pages = src.nr_bytes // PAGE_SIZE
        numbers = _frame_numbers(frames, nr_pages)
        _whole_pages("to", dst, numbers.size)
        _disjoint(dst, src)
        words = _line_words(bad_lines, nr_pages)
        return _native.copy_mc_frames(
            dst.address, src.address, numbers.ctypes.data, numbers.size, _address(words)
        )


def _frame_numbers(
    frames: Sequence[int] | npt.NDArray[np.int64], nr_pages: int
) -> npt.NDArray[np.int64]:
    numbers = np.ascontiguousarray(frames)
    if numbers.ndim != 1 or not 1 <= numbers.size <= _MAX_FRAMES:
        raise ValueError(f"frames has shape {numbers.shape}: allowed 1..{_MAX_FRAMES} numbers")
    if not np.issubdtype(numbers.dtype, np.integer):
        raise TypeError(f"frames is {numbers.dtype}: allowed are integers")
    wrong = numbers[(numbers < HOLE) | (numbers >= nr_pages)]
    if wrong.size:
        raise ValueError(f"frames has {wrong[0]}: allowed 0..{nr_pages - 1}, or {HOLE} for a hole")
    return numbers.astype(np.int64, copy=False)


def machine_check() -> MachineCheck | None:
    """What stopped the last copy that failed on the calling thread; None before the first.

    A later copy that succeeds leaves it as it is, as hardware does with its banks.
    """
    record = _native.last_machine_check()
    return record if record.not_copied else None
