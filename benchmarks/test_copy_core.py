"""The copies beside what they are held against; each group's ratio column is the result.

Within a group the contenders take turns: before each timed round the others run once, untimed, so
that all start from the same caches and whatever else the machine does hits all alike.

Cold means: 512 random frames of an arena far larger than any cache, other ones in every round.
Arena and huge page are as in the model: private, 2 MiB aligned, advised huge.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import pykhuge
from pykhuge import _native

PAGE = 4096
HPAGE = 2 << 20
NR_FRAMES = HPAGE // PAGE
ARENA_SIZE = 1 << 30
ROUNDS = 400

Bytes = npt.NDArray[np.uint8]
Frames = npt.NDArray[np.int64]
Contender = Callable[["Copying", Frames], Any]


def huge_memory(nr_bytes: int) -> Bytes:
    """Written memory at a multiple of 2 MiB, in huge pages where the system allows it."""
    memory = mmap.mmap(-1, nr_bytes + HPAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % HPAGE
    view = whole[start : start + nr_bytes]
    words = view.view(np.uint64)
    words[:] = np.arange(words.size)
    return view


class Copying:
    """A source, a destination, and frames to copy: never the same ones soon."""

    def __init__(self, arena: Bytes, to: Bytes) -> None:
        self.arena, self.to = arena, to
        self.pages = arena.reshape(-1, PAGE)
        self.to_pages = to.reshape(NR_FRAMES, PAGE)
        rng = np.random.default_rng(0)
        order = rng.permutation(len(self.pages))
        self.cold_frames = itertools.cycle(order.reshape(-1, NR_FRAMES))
        self.hot_frames = np.arange(NR_FRAMES)

    def check(self, frames: Frames) -> None:
        """The work was done."""
        assert (self.to_pages == self.pages[frames]).all()


@pytest.fixture(scope="module")
def copying() -> Copying:
    """One arena for all."""
    return Copying(huge_memory(ARENA_SIZE), huge_memory(HPAGE))


def with_recovery(copying: Copying, frames: Frames) -> None:
    """One call, one recovery point."""
    where = copying.to.ctypes.data, copying.arena.ctypes.data, frames.ctypes.data
    assert _native.copy_mc_frames(*where, NR_FRAMES, 0) is None


def without_recovery(copying: Copying, frames: Frames) -> None:
    """The same copy before the series."""
    where = copying.to.ctypes.data, copying.arena.ctypes.data, frames.ctypes.data
    _native.copy_frames(*where, NR_FRAMES)


def libc_memcpy(copying: Copying, frames: Frames) -> None:
    """A C loop of libc's memcpy."""
    where = copying.to.ctypes.data, copying.arena.ctypes.data, frames.ctypes.data
    _native.baseline_memcpy_frames(*where, NR_FRAMES)


def numpy_take(copying: Copying, frames: Frames) -> None:
    """What numpy does by default: with its default mode it goes through a buffer of its own."""
    np.take(copying.pages, frames, axis=0, out=copying.to_pages)


def numpy_take_clip(copying: Copying, frames: Frames) -> None:
    """What numpy does where one knows that mode="clip" spares it that buffer."""
    np.take(copying.pages, frames, axis=0, out=copying.to_pages, mode="clip")


def in_turn(
    benchmark: Any,
    copying: Copying,
    frames: Iterator[Frames],
    contender: Contender,
    others: list[Contender],
) -> None:
    """Time one contender, the others running before each round."""

    def setup() -> tuple[tuple[Copying, Frames], dict[str, Any]]:
        for other in others:
            other(copying, next(frames))
        return (copying, next(frames)), {}

    benchmark.pedantic(contender, setup=setup, rounds=ROUNDS, warmup_rounds=10)
    last = next(frames)
    contender(copying, last)
    copying.check(last)


HOT: list[Contender] = [without_recovery, with_recovery]
COLD: list[Contender] = [libc_memcpy, numpy_take, numpy_take_clip, with_recovery]


@pytest.mark.benchmark(group="2 MiB, hot, one recovery point")
@pytest.mark.parametrize("contender", HOT)
def test_hot_huge_page(benchmark: Any, copying: Copying, contender: Contender) -> None:
    """What a recovery point costs, and the look whether the handler is still there."""
    others = [other for other in HOT if other is not contender]
    in_turn(benchmark, copying, itertools.repeat(copying.hot_frames), contender, others)


@pytest.mark.benchmark(group="512 scattered cold frames to 2 MiB")
@pytest.mark.parametrize("contender", COLD)
def test_cold_frames(benchmark: Any, copying: Copying, contender: Contender) -> None:
    """What khugepaged does, beside what others would do it with."""
    others = [other for other in COLD if other is not contender]
    in_turn(benchmark, copying, copying.cold_frames, contender, others)


@pytest.mark.benchmark(group="512 scattered cold frames to 2 MiB, by instruction set")
@pytest.mark.parametrize("name", _native.instruction_sets())
def test_instruction_sets(benchmark: Any, copying: Copying, name: str) -> None:
    """Each of them, on the same frames."""
    before = _native.current_instruction_set()
    _native.use_instruction_set(name)
    in_turn(benchmark, copying, copying.cold_frames, with_recovery, [libc_memcpy])
    _native.use_instruction_set(before)


def slice_assignment(to: memoryview, from_: memoryview) -> None:
    """What Python has without us."""
    to[:] = from_


@pytest.mark.benchmark(group="one 4 KiB page from Python")
@pytest.mark.parametrize("copy", [slice_assignment, pykhuge.copy_mc_highpage])
def test_one_page(benchmark: Any, copy: Callable[..., Any]) -> None:
    """A whole call, hot. Half of ours is the system call that looks for our handler."""
    to, from_ = (memoryview(mmap.mmap(-1, PAGE)) for _ in range(2))
    from_[:] = bytes(range(256)) * (PAGE // 256)
    benchmark.pedantic(copy, args=(to, from_), rounds=ROUNDS, iterations=1000, warmup_rounds=10)
    assert to == from_


@pytest.mark.benchmark(group="one 4 KiB page from Python, poisoned in its last line")
def test_one_poisoned_page(benchmark: Any) -> None:
    """A real signal, and the way back."""
    to, from_ = (memoryview(mmap.mmap(-1, PAGE)) for _ in range(2))

    def copy() -> int:
        return pykhuge.copy_mc_highpage(to, from_, bad_lines=1 << 63)

    assert benchmark.pedantic(copy, rounds=ROUNDS, iterations=100, warmup_rounds=10) == 64
