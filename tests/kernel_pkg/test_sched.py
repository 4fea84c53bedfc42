"""Steps and tasks: where a task pauses, what it announces, who waits for whom."""

from typing import Any

import pytest

from pykhuge.kernel.clock import Clock
from pykhuge.kernel.locking import READ, WRITE, Rank, RwSem, Spinlock
from pykhuge.kernel.panic import KernelBug, KernelPanic
from pykhuge.kernel.sched import Acquire, Preempt, Release, Sched, Steps, Task, WouldBlock, steps


@pytest.fixture
def sched() -> Sched:
    return Sched()


@pytest.fixture
def lock() -> RwSem:
    return RwSem("mmap_lock", Rank.MMAP_LOCK)


def task(sched: Sched, name: str = "task") -> Task[Any]:
    return Task(sched, name, 1)


def holding(lock: RwSem, mode: Any, log: list[str]) -> Steps[str]:
    yield Acquire(lock, mode)
    log.append("got it")
    yield Preempt("inside")
    log.append("leaving")
    yield Release(lock)
    return "done"


def test_step_takes_effect_when_the_task_goes_on(sched: Sched, lock: RwSem) -> None:
    """An announced acquire or release has not happened yet while the task is paused."""
    one = task(sched)
    log: list[str] = []
    one.start(holding(lock, WRITE, log))
    assert one.step()
    assert str(one.pending) == "acquire mmap_lock for write"
    assert lock.holders == []
    assert one.step()
    assert lock.holders == [one]
    assert log == ["got it"]
    one.run_until("release mmap_lock")
    assert lock.holders == [one]
    assert one.finish() == "done"
    assert lock.holders == []
    assert one.done
    assert one.idle


def test_waiting_task_does_not_step(sched: Sched, lock: RwSem) -> None:
    """A writer waits for readers; when they are gone it goes on."""
    reader, writer = task(sched, "reader"), task(sched, "writer")
    reader.start(holding(lock, READ, []))
    writer.start(holding(lock, WRITE, []))
    reader.run_until("inside")
    writer.step()
    assert not writer.step()
    with pytest.raises(WouldBlock, match="writer waits: acquire mmap_lock for write"):
        writer.finish()
    reader.finish()
    assert writer.finish() == "done"


def test_plain_run_that_must_wait_is_refused(sched: Sched, lock: RwSem) -> None:
    """Nobody else would run: WouldBlock, and nothing is held."""
    holder, other = task(sched, "holder"), task(sched, "other")
    holder.start(holding(lock, WRITE, []))
    holder.run_until("inside")
    with pytest.raises(WouldBlock, match="held for write by holder"):
        other.run(holding(lock, READ, []))
    assert other.held == []
    holder.finish()
    assert other.run(holding(lock, READ, [])) == "done"


def test_run_until_a_step_that_never_comes(sched: Sched, lock: RwSem) -> None:
    """LookupError names the step."""
    one = task(sched)
    one.start(holding(lock, READ, []))
    with pytest.raises(LookupError, match="'elsewhere'"):
        one.run_until("elsewhere")


def test_error_of_a_task_is_raised_by_its_result(sched: Sched) -> None:
    """The exception waits for whoever asks; the task is done."""

    def failing() -> Steps[None]:
        yield Preempt("before")
        raise OSError(5, "no")

    one = task(sched)
    one.start(failing())
    while one.step():
        pass
    assert one.done
    with pytest.raises(OSError, match="no"):
        one.finish()


def test_panic_stops_every_task(sched: Sched) -> None:
    """After a panic a paused task raises it instead of running on."""
    one, ran = task(sched), []

    def run() -> Steps[None]:
        yield Preempt("here")
        ran.append(True)

    one.start(run())
    one.step()
    sched.panic = KernelPanic("dead")
    with pytest.raises(KernelPanic, match="Kernel panic - not syncing: dead"):
        one.step()
    assert ran == []


def test_current_is_whoever_steps(sched: Sched) -> None:
    """The task that runs is the one that trace events name."""
    seen = []

    def run() -> Steps[None]:
        seen.append(sched.current)
        yield Preempt("a")
        seen.append(sched.current)

    one, two = task(sched, "one"), task(sched, "two")
    one.start(run())
    two.start(run())
    for each in (one, two, two, one):
        each.step()
    assert [each.comm for each in seen] == ["one", "two", "two", "one"]


class Owner:
    """Something with a call made of steps."""

    def __init__(self, sched: Sched) -> None:
        self.task: Task[Any] = task(sched)
        self.alive = True

    def check_alive(self) -> None:
        if not self.alive:
            raise KernelPanic("dead")

    @steps
    def double(self, number: int) -> Steps[int]:
        """Twice."""
        yield Preempt("thinking")
        return 2 * number


def test_steps_are_called_plainly_or_one_by_one(sched: Sched) -> None:
    """The call runs to the end; `.steps` gives the generator; both look whether all is well."""
    owner = Owner(sched)
    assert owner.double(4) == 8
    assert str(next(owner.double.steps(4))) == "thinking"
    assert Owner.double.__doc__ == "Twice."
    owner.alive = False
    with pytest.raises(KernelPanic):
        owner.double(4)
    with pytest.raises(KernelPanic):
        owner.double.steps(4)


# Locks.


def test_readers_share_and_a_writer_does_not(sched: Sched, lock: RwSem) -> None:
    """Two readers at once; no writer with anybody."""
    a, b = task(sched, "a"), task(sched, "b")
    assert lock.trylock(a, READ)
    assert lock.trylock(b, READ)
    assert not lock.available(WRITE)
    lock.unlock(a)
    lock.unlock(b)
    assert lock.trylock(a, WRITE)
    assert not lock.available(READ)
    assert str(lock) == "mmap_lock (held for write by a)"


def test_lock_order_is_enforced(sched: Sched, lock: RwSem) -> None:
    """What stands above may not be taken below; a trylock may."""
    one, inner = task(sched), RwSem("anon_vma", Rank.ANON_VMA)
    inner.lock(one, READ)
    with pytest.raises(KernelBug, match="wrong order"):
        lock.lock(one, READ)
    assert lock.trylock(one, READ)
    with pytest.raises(KernelBug, match="wrong order"):
        RwSem("anon_vma", Rank.ANON_VMA).lock(one, WRITE)


def test_unlock_by_a_stranger_is_a_bug(sched: Sched, lock: RwSem) -> None:
    """The message names lock and task."""
    with pytest.raises(KernelBug, match="stranger unlocks mmap_lock, which it does not hold"):
        lock.unlock(task(sched, "stranger"))


def test_assert_held(sched: Sched, lock: RwSem) -> None:
    """A read lock satisfies READ, not WRITE."""
    with pytest.raises(KernelBug, match="must be held for read"):
        lock.assert_held(READ)
    lock.lock(task(sched), READ)
    lock.assert_held(READ)
    with pytest.raises(KernelBug, match="must be held for write"):
        lock.assert_held(WRITE)


def test_deadlock_of_one_task_is_a_bug(sched: Sched, lock: RwSem) -> None:
    """A plain call that holds one lock and waits for another taken by a paused task."""
    inner = RwSem("anon_vma", Rank.ANON_VMA)
    inner.lock(task(sched, "paused"), WRITE)

    def both() -> Steps[None]:
        yield Acquire(lock, READ)
        yield Acquire(inner, WRITE)

    with pytest.raises((KernelBug, WouldBlock), match="anon_vma"):
        task(sched, "one").run(both())


def test_spinlock_is_not_taken_twice() -> None:
    """A second taker would spin for ever."""
    lock = Spinlock("ptl")
    with lock, pytest.raises(KernelBug, match="ptl is taken twice"), lock:
        pass


def test_clock_moves_only_when_told() -> None:
    """A microsecond for each event, a sleep as long as it is; never backwards."""
    clock = Clock()
    assert [clock.tick(), clock.tick()] == [0, 1000]
    clock.sleep(5)
    assert clock.now_ns == 2005
    with pytest.raises(ValueError, match="nsec=-1: allowed 0 and more"):
        clock.sleep(-1)


@pytest.mark.parametrize(
    ("name", "kept"),
    [("a" * 15, "a" * 15), ("a" * 16, "a" * 15), ("a" * 14 + "é", "a" * 14), ("", "")],
)
def test_a_name_has_room_for_15_bytes(name: str, kept: str) -> None:
    """TASK_COMM_LEN; of a letter that does not fit nothing is left."""
    assert Task(Sched(), name, 1).comm == kept
