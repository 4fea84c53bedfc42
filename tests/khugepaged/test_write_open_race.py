"""A file is opened for writing while khugepaged collapses a block of it: one sees the other.

The collapse stores nr_thps and then looks at i_writecount; the open stores i_writecount and then
looks at nr_thps. Here every order of the steps of the two is run, and what came of each collected.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from collapse_kit import (
    HPAGE,
    PAGE,
    block_bytes,
    small_machine,
)
from file_kit import FileBlock, cache_is_huge, disk_block
from hypothesis import given, settings
from hypothesis import strategies as st

from pykhuge import File, Process, ScanResult
from pykhuge.kernel.sched import Steps, Task

S = ScanResult


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file that both are after."""
    return tmp_path / "program"


@pytest.fixture(scope="module")
def shared_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for tests that run many examples; each of them writes it anew."""
    return tmp_path_factory.mktemp("race") / "program"


class Race(NamedTuple):
    """One machine with tasks that are to be run in some order. tasks[0] collapses."""

    block: FileBlock
    writers: list[Process]
    tasks: list[Task[Any]]


class Outcome(NamedTuple):
    """How the collapse ended, and whether a writer has emptied the cache."""

    result: ScanResult
    emptied: bool


def race(path: Path, *, poisoned: bool = False, nr_writers: int = 1) -> Race:
    """A collapse that has looked at the pages and will now begin, and writers about to open."""
    machine = small_machine("8M")
    block = disk_block(machine, path, mapped=range(64))
    if poisoned:
        block.poison(100, 5)
    collapse = block.task(is_khugepaged=False)
    collapse.run_until("scanned")
    writers = [machine.process(f"writer{number}") for number in range(nr_writers)]
    opens = [machine.spawn(each.open.steps(str(path), os.O_RDWR)) for each in writers]
    return Race(block, writers, [collapse, *opens])


def schedules(make: Callable[[], Race]) -> Iterator[Race]:
    """Run the tasks of a fresh race in every order of their steps; yields each race once it ended.

    A race is run along one order to its end; wherever a later task could have gone instead, the
    order up to there is kept to be tried.
    """
    untried: list[list[int]] = [[]]
    while untried:
        prefix = untried.pop()
        current, taken = make(), list[int]()
        while not all(task.done for task in current.tasks):
            forced = prefix[len(taken)] if len(taken) < len(prefix) else None
            able = [number for number, task in enumerate(current.tasks) if can_run(task)]
            assert able, "deadlock"
            choice = able[0] if forced is None else forced
            if forced is None:
                untried += [[*taken, other] for other in able[1:]]
            assert current.tasks[choice].step()
            taken.append(choice)
        yield current


def can_run(task: Task[Any]) -> bool:
    return not task.done and (task.pending is None or task.pending.ready())


def outcome(ended: Race) -> Outcome:
    """Check what must hold whatever the order was, and say which way it went."""
    block = ended.block
    for task in ended.tasks[1:]:
        assert isinstance(task.result, File)
    assert block.file.inode.i_writecount == len(ended.writers)
    assert not cache_is_huge(block.file), "a huge page in the cache of a file open for writing"
    assert block.file.f_mapping.nr_thps == 0
    assert block.machine.vmstat()["nr_file_hugepages"] == 0
    block.machine.audit()
    result = ended.tasks[0].result
    assert isinstance(result, ScanResult)
    return Outcome(result, block.file.f_mapping.nrpages == 0)


def usable(ended: Race, path: Path) -> None:
    """The file still reads as it should, and what is written is seen by all and by the disk."""
    block, writer = ended.block, ended.writers[0]
    block.machine.mem.poison.lines[:] = 0
    assert block.process.read(block.addr, HPAGE) == block_bytes()
    writer.pwrite(ended.tasks[1].result, 70 * PAGE, b"written")
    assert block.process.read(block.addr + 70 * PAGE, 7) == b"written"
    writer.fsync(ended.tasks[1].result)
    assert path.read_bytes()[70 * PAGE :][:7] == b"written"
    block.machine.audit()


# Every order.


def test_one_side_always_sees_the_other(path: Path) -> None:
    """Collapse gives up, or the writer empties the cache, or both; never neither."""
    found = set()
    for ended in schedules(lambda: race(path)):
        found.add(outcome(ended))
        usable(ended, path)
    assert found == {
        Outcome(S.SCAN_FAIL, emptied=False),
        Outcome(S.SCAN_FAIL, emptied=True),
        Outcome(S.SCAN_SUCCEED, emptied=True),
    }


def test_poisoned_copy_leaves_a_writer_nothing_to_empty_once_it_is_undone(path: Path) -> None:
    """COPY_MC takes nr_thps back: a writer finds the huge page on its way, or none at all."""
    found = set()
    for ended in schedules(lambda: race(path, poisoned=True)):
        found.add(outcome(ended))
        usable(ended, path)
    assert found == {
        Outcome(S.SCAN_FAIL, emptied=False),
        Outcome(S.SCAN_FAIL, emptied=True),
        Outcome(S.SCAN_COPY_MC, emptied=True),
        Outcome(S.SCAN_COPY_MC, emptied=False),
    }


def visit(writer: Process, path: Path) -> Steps[None]:
    """Open the file for writing, write a few bytes of one page, close it again."""
    file = yield from writer.open.steps(str(path), os.O_RDWR)
    yield from writer.pwrite.steps(file, 100 * PAGE, b"visit")
    yield from writer.close.steps(file)


def test_bytes_written_meanwhile_are_never_lost(path: Path) -> None:
    """A writer that comes and goes: the block may be huge then, and holds what was written."""

    def visited() -> Race:
        current = race(path)
        (writer,) = current.writers
        return current._replace(
            tasks=[current.tasks[0], current.block.machine.spawn(visit(writer, path))]
        )

    expected = bytearray(block_bytes())
    expected[100 * PAGE : 100 * PAGE + 5] = b"visit"
    results = set()
    for ended in schedules(visited):
        assert ended.tasks[1].error is None
        file = ended.block.file
        assert file.inode.i_writecount == 0
        assert file.f_mapping.nr_thps == cache_is_huge(file)
        assert ended.block.process.read(ended.block.addr, HPAGE) == expected
        ended.block.machine.audit()
        results.add(ended.tasks[0].result)
    assert results == {S.SCAN_FAIL, S.SCAN_SUCCEED}


# Orders at random, where there are too many for all of them.


def at_random(current: Race, data: st.DataObject) -> Race:
    """Run the tasks to their ends, each step that of a task drawn."""
    while able := [task for task in current.tasks if can_run(task)]:
        task = able[0] if len(able) == 1 else data.draw(st.sampled_from(able))
        task.step()
    assert all(task.done for task in current.tasks), "deadlock"
    return current


@settings(max_examples=30, deadline=None)
@given(data=st.data(), poisoned=st.booleans(), nr_writers=st.integers(2, 3))
def test_several_writers_at_once(
    shared_path: Path, data: st.DataObject, poisoned: bool, nr_writers: int
) -> None:
    """However many open it and in whatever order: small pages in the end, or none."""
    ended = at_random(race(shared_path, poisoned=poisoned, nr_writers=nr_writers), data)
    found = outcome(ended)
    assert found.result is S.SCAN_FAIL or found.emptied or poisoned
    usable(ended, shared_path)


# One after the other.


def test_writer_that_is_there_already_keeps_khugepaged_away(path: Path) -> None:
    """A file open for writing is not looked at at all; once it is closed it collapses."""
    machine = small_machine("8M")
    block = disk_block(machine, path)
    writer = machine.process("writer")
    file = writer.open(str(path), os.O_RDWR)
    before = block.books()
    assert block.collapse(is_khugepaged=False) is S.SCAN_VMA_CHECK
    assert block.books() == before
    writer.close(file)
    assert block.collapse(is_khugepaged=False) is S.SCAN_SUCCEED
    machine.audit()


def test_writer_that_comes_and_goes_unnoticed_stops_nothing(path: Path) -> None:
    """Opened and closed between two looks, nothing written: the collapse succeeds."""
    current = race(path)
    (writer,) = current.writers
    writer.close(writer.open(str(path), os.O_RDWR))
    assert current.tasks[0].finish() is S.SCAN_SUCCEED
    assert current.block.file.f_mapping.nr_thps == 1
    current.block.machine.audit()


def test_open_for_reading_takes_no_part(path: Path) -> None:
    """Readers may come at any step: the block stays huge."""
    current = race(path)
    collapse = current.tasks[0]
    while not collapse.done:
        reader = current.writers[0]
        reader.close(reader.open(str(path)))
        collapse.step()
    assert collapse.result is S.SCAN_SUCCEED
    assert cache_is_huge(current.block.file)
    current.block.machine.audit()


def test_second_opener_throws_away_what_the_first_has_written(path: Path) -> None:
    """Linux empties the cache without writing it back, and looks only once whether it has to."""
    current = race(path)
    first = current.block.machine.process("first")
    assert current.tasks[0].finish() is S.SCAN_SUCCEED
    opening = current.tasks[1]
    opening.run_until("i_writecount")
    opening.step()
    file = first.open(str(path), os.O_RDWR)
    assert current.block.file.f_mapping.nr_thps == 0
    first.pwrite(file, 0, b"lost")
    opening.finish()
    assert first.pread(file, 0, 4) == block_bytes()[:4]
    assert current.block.machine.vmstat()["nr_dirty"] == 0
    current.block.machine.audit()
