"""The copies against a few lines of Python that say what they do."""

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

import pykhuge
from failing_memory import LINE, PAGE, UNTOUCHED, pages, pattern
from pykhuge import _native

NR_FRAMES = 16
ARENA = pages(NR_FRAMES, pattern(NR_FRAMES * PAGE))
HUGE = pages(64)
SOURCE = np.frombuffer(pattern(4 * PAGE + 2 * LINE), np.uint8)
NO_LINE, ALL_LINES = 0, (1 << 64) - 1

words = st.one_of(
    st.just(NO_LINE),
    st.integers(0, 63).map(lambda line: 1 << line),
    st.integers(NO_LINE, ALL_LINES),
)
instruction_sets = st.sampled_from(_native.instruction_sets())


def first_line(word: int) -> int:
    """The lowest bit that is set."""
    return (word & -word).bit_length() - 1


def model_copy_mc(to: npt.NDArray[np.uint8], from_: npt.NDArray[np.uint8], bad: list[int]) -> int:
    """What copy_mc promises, line by line."""
    for at in range(0, from_.size, LINE):
        if bad[at // PAGE] >> (at % PAGE // LINE) & 1:
            return from_.size - at
        to[at : at + LINE] = from_[at : at + LINE]
    return 0


@given(
    instruction_set=instruction_sets,
    from_at=st.integers(0, LINE),
    to_at=st.integers(0, LINE),
    size=st.integers(0, 4 * PAGE),
    bad=st.lists(words, min_size=4, max_size=4),
)
def test_copy_mc_does_what_a_loop_over_lines_does(
    instruction_set: str, from_at: int, to_at: int, size: int, bad: list[int]
) -> None:
    """Count and every byte, written or not, for any size, alignment and set of bad lines."""
    _native.use_instruction_set(instruction_set)
    from_ = SOURCE[from_at : from_at + size]
    expected, to = (np.full(4 * PAGE + 2 * LINE, UNTOUCHED, np.uint8) for _ in range(2))
    not_copied = model_copy_mc(expected[to_at : to_at + size], from_, bad)
    bad_lines = np.array(bad[: -(-size // PAGE)], np.uint64)
    assert pykhuge.copy_mc(to[to_at : to_at + size], from_, bad_lines=bad_lines) == not_copied
    assert (to == expected).all()


@given(
    instruction_set=instruction_sets,
    frames=st.lists(st.integers(-1, NR_FRAMES - 1), min_size=1, max_size=64),
    bad=st.lists(
        st.one_of(st.just(NO_LINE), st.just(NO_LINE), words),
        min_size=NR_FRAMES,
        max_size=NR_FRAMES,
    ),
)
def test_copy_mc_huge_page_does_what_a_loop_over_pages_does(
    instruction_set: str, frames: list[int], bad: list[int]
) -> None:
    """Where it stops, what it reports, and every byte of the destination."""
    _native.use_instruction_set(instruction_set)
    source = np.frombuffer(ARENA, np.uint8).reshape(NR_FRAMES, PAGE)
    to: Any = memoryview(HUGE)[: len(frames) * PAGE]
    to[:] = bytes([UNTOUCHED]) * len(to)
    expected = np.full((len(frames), PAGE), UNTOUCHED, np.uint8)
    stopped: tuple[int, int] | None = None
    for index, frame in enumerate(frames):
        word = bad[frame] if frame >= 0 else NO_LINE
        good = first_line(word) * LINE if word else PAGE
        expected[index, :good] = source[frame, :good] if frame >= 0 else 0
        if word:
            stopped = (index, PAGE - good)
            break
    check = pykhuge.copy_mc_huge_page(to, ARENA, frames, bad_lines=np.array(bad, np.uint64))
    assert (None if check is None else (check.index, check.not_copied)) == stopped
    assert to == expected.tobytes()
