"""Locks that know their holder, so that a missing unlock or a wrong order is found.

Lock order, outermost first (a task may take only locks that stand below what it holds; trylocks
are free of the rule, as in the kernel):

    i_rwsem > mmap_lock > vm_lock > page lock > i_mmap_rwsem > anon_vma rwsem
        > page_table_lock / PTE lock

khugepaged, which comes to the page tables of a file with the page and i_mmap_rwsem held, only tries
mmap_lock and vm_lock.

Sleeping locks (`RwSem`) are taken by yielding `Acquire` and `Release` (kernel/sched); spinlocks
are plain context managers, because nothing may be yielded while one is held. Page locks are the
PG_locked bit of struct page.
"""

from __future__ import annotations

import enum
from types import TracebackType
from typing import Self

from pykhuge.kernel.panic import KernelBug

__all__ = ["READ", "WRITE", "Mode", "Rank", "RwSem", "Spinlock"]


class Rank(enum.IntEnum):
    """Place in the lock order: a higher rank is taken later."""

    INODE = 0
    MMAP_LOCK = 1
    VMA_LOCK = 2
    I_MMAP = 3
    ANON_VMA = 4


class Mode(enum.Enum):
    """How a read-write semaphore is held."""

    READ = "read"
    WRITE = "write"


READ = Mode.READ
WRITE = Mode.WRITE


class Holder:
    """Whoever can hold a sleeping lock; kernel/sched's Task is the one kind there is."""

    def __init__(self, comm: str) -> None:
        self.comm = comm
        self.held: list[RwSem] = []

    @property
    def idle(self) -> bool:
        """Whether it runs nothing, and so should hold nothing."""
        raise NotImplementedError


class RwSem:
    """A read-write semaphore (mmap_lock, anon_vma->root->rwsem, i_mmap_rwsem)."""

    __slots__ = ("name", "rank", "readers", "writer")

    def __init__(self, name: str, rank: Rank) -> None:
        self.name = name
        self.rank = rank
        self.writer: Holder | None = None
        self.readers: list[Holder] = []

    def available(self, mode: Mode) -> bool:
        """Whether a lock in `mode` would be had at once."""
        return self.writer is None and (mode is READ or not self.readers)

    def lock(self, holder: Holder, mode: Mode) -> None:
        """Take the lock, which must be available.

        Raises: KernelBug if the holder would break the lock order or wait for itself.
        """
        # All of them: a trylock may have been taken against the order.
        for held in holder.held:
            if held.rank >= self.rank:
                raise KernelBug(f"{holder.comm} takes {self} while it holds {held}: wrong order")
        if not self.trylock(holder, mode):
            raise KernelBug(f"{holder.comm} takes {self} for {mode.value}, which is not available")

    def trylock(self, holder: Holder, mode: Mode) -> bool:
        """Take the lock if it is available; say whether it was."""
        if not self.available(mode):
            return False
        if mode is WRITE:
            self.writer = holder
        else:
            self.readers.append(holder)
        holder.held.append(self)
        return True

    def unlock(self, holder: Holder) -> None:
        """Give the lock back.

        Raises: KernelBug if `holder` does not hold it.
        """
        if self.writer is holder:
            self.writer = None
        elif holder in self.readers:
            self.readers.remove(holder)
        else:
            raise KernelBug(f"{holder.comm} unlocks {self}, which it does not hold")
        holder.held.remove(self)

    def assert_held(self, mode: Mode) -> None:
        """lockdep_assert_held(_write): somebody holds the lock at least in `mode`.

        Raises: KernelBug if nobody does.
        """
        if self.writer is None and (mode is WRITE or not self.readers):
            raise KernelBug(f"{self} must be held for {mode.value}")

    @property
    def holders(self) -> list[Holder]:
        """Everybody who holds it now."""
        return [self.writer] if self.writer is not None else list(self.readers)

    def __str__(self) -> str:
        who = ", ".join(holder.comm for holder in self.holders)
        how = "write" if self.writer is not None else "read"
        return f"{self.name} (held for {how} by {who})" if who else self.name


class Spinlock:
    """A lock under which nobody sleeps: held only between two yields."""

    __slots__ = ("held", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.held = False

    def __enter__(self) -> Self:
        if self.held:
            raise KernelBug(f"{self.name} is taken twice")
        self.held = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.held = False
