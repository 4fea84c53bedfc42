"""Random operations against a shadow of what every byte of every process should be.

A step is one call that a program, an administrator or the hardware could make. After each the
machine is audited and all memory is held against the shadow. `--model-steps` makes it longer.
"""

# ruff: noqa: PT017  a call may fail or not: what matters is that it does as the shadow says

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from collapse_kit import small_machine
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)
from properties.machines import Steps, address, pattern, run_machine, size, some_pages
from properties.shadow import (
    BASE,
    BLOCK,
    NR_BLOCKS,
    NR_PAGES,
    PAGE,
    READ_WRITE,
    Look,
    Shadow,
    blocks_of_one_mapping,
    check_contents,
    look,
    pins_poison,
    touched_poison,
)

from pykhuge.kernel.sched import Task, WouldBlock
from pykhuge.khugepaged.scan_result import CollapseError, ScanResult
from pykhuge.mm.errors import BUS_MCEERR_AR, EHWPOISON, BusError, SegmentationFault, UserFault
from pykhuge.mm.gup import UserPages
from pykhuge.mm.huge_memory import OutOfMemory
from pykhuge.mm.page_table import is_swap_pte
from pykhuge.process import (
    PROT_EXEC,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    Advice,
    Process,
    UserFaultFd,
)

MAX_PROCESSES = 4
MISSING, WP = 1, 2

who = st.integers(0, MAX_PROCESSES - 1)
seeds = st.integers(0, 1 << 16)
blocks = st.integers(0, NR_BLOCKS - 1).map(lambda block: slice(block * 512, block * 512 + 512))
page_ranges = st.one_of(blocks, some_pages)
# Many accesses meet where something happened before: at the edges of blocks.
byte_ranges = st.builds(
    lambda pages, skip, length: (
        pages.start * PAGE + skip,
        min(length, NR_PAGES * PAGE - pages.start * PAGE - skip),
    ),
    page_ranges,
    st.one_of(st.just(0), st.integers(0, PAGE - 1)),
    st.one_of(
        st.integers(1, 200), st.integers(1, 3 * PAGE), st.just(BLOCK), st.integers(1, 2 * BLOCK)
    ),
)
prots = st.sampled_from(
    [READ_WRITE, READ_WRITE, PROT_READ, PROT_NONE, PROT_WRITE, PROT_READ | PROT_EXEC]
)


@dataclass(eq=False)
class Actor:
    """A process, what it should hold, and its userfaultfd."""

    process: Process
    shadow: Shadow
    uffd: UserFaultFd


class Operations(RuleBasedStateMachine):
    """Every operation that the model has on anonymous memory, on a machine that is too small."""

    # How many of its steps count for the total: some examples end early.
    STEPS_AN_EXAMPLE = 30
    # Outcomes of collapses without which a run would not be worth much.
    WANTED: ClassVar = {"SCAN_SUCCEED"}

    def __init__(self) -> None:
        super().__init__()
        self.actors: list[Actor] = []
        self.held: list[UserPages] = []
        self.machine = small_machine("16M")

    @initialize(
        nodes=st.sampled_from([1, 2]),
        enabled=st.sampled_from(["always", "madvise", "madvise"]),
        megabytes=st.sampled_from([12, 24]),
        seed=seeds,
    )
    def boot(self, nodes: int, enabled: str, megabytes: int, seed: int) -> None:
        """A machine with two processes, a block of theirs mapped and filled."""
        self.machine = small_machine(f"{megabytes}M", nodes=nodes, swap="3M", cpus=2, seed=seed)
        self.machine.thp.enabled = enabled
        for _ in range(2):
            actor = self.start(self.machine.process())
            actor.process.mmap(NR_PAGES * PAGE, addr=BASE, fixed=True)
            actor.shadow.map(slice(0, NR_PAGES), READ_WRITE)
            self.store(actor, BASE, pattern(seed, BLOCK))
            self.store(actor, BASE + BLOCK + 5 * PAGE, pattern(seed, BLOCK))

    def start(self, process: Process, shadow: Shadow | None = None) -> Actor:
        actor = Actor(process, shadow or Shadow(), process.userfaultfd())
        self.actors.append(actor)
        return actor

    def actor(self, number: int) -> Actor:
        return self.actors[number % len(self.actors)]

    # What a program does with memory it has.

    @rule(number=who, where=byte_ranges, seed=seeds)
    def write(self, number: int, where: tuple[int, int], seed: int) -> None:
        """Write random bytes."""
        self.store(self.actor(number), BASE + where[0], pattern(seed, where[1]))

    def store(self, actor: Actor, addr: int, data: bytes) -> None:
        end = addr + len(data)
        first, last = (addr - BASE) // PAGE, (end - 1 - BASE) // PAGE
        try:
            actor.process.write(addr, data)
        except (SegmentationFault, BusError, WouldBlock, OutOfMemory) as error:
            end = self.stopped_at(actor, addr, end, error)
        else:
            assert actor.shadow.writable()[first : last + 1].all()
            guarded = actor.shadow.wp & (actor.shadow.uffd & WP != 0)
            assert not guarded[first : last + 1].any(), "a write-protected page was written"
            seen = look(self.machine, actor.process)
            assert touched_poison(self.machine, seen.frames, addr, end) is None
        actor.shadow.write(addr, data[: end - addr])

    def stopped_at(self, actor: Actor, addr: int, end: int, error: Exception) -> int:
        """Where a write stopped, which must be where it had to."""
        seen = look(self.machine, actor.process, detached=False)
        there = seen.writable & actor.shadow.writable()
        done = np.flatnonzero(~there[(addr - BASE) // PAGE : (end - 1 - BASE) // PAGE + 1])
        limit = max(addr, (addr & -PAGE) + int(done[0]) * PAGE) if len(done) else end
        bad = touched_poison(self.machine, seen.frames, addr, limit)
        if isinstance(error, (SegmentationFault, UserFault, BusError)):
            page = (error.address - BASE) // PAGE
        if isinstance(error, SegmentationFault):
            assert not actor.shadow.writable()[page]
        elif isinstance(error, UserFault):
            assert actor.shadow.uffd[page]
        elif isinstance(error, BusError):
            assert error.code == BUS_MCEERR_AR
            assert error.lsb == 12
            if bad is not None:
                assert error.address == bad & -PAGE
                return bad
            # Copy on write reads the whole page.
            assert not there[page]
            assert self.machine.mem.poison.lines[seen.frames[page]]
        assert bad is None, "a write went over a poisoned line"
        if isinstance(error, (SegmentationFault, UserFault, BusError)):
            assert limit == max(addr, error.address & -PAGE)
        return limit

    @rule(number=who, where=byte_ranges)
    def read(self, number: int, where: tuple[int, int]) -> None:
        """Read, and compare."""
        actor, addr, end = self.actor(number), BASE + where[0], BASE + sum(where)
        first, last = where[0] // PAGE, (end - 1 - BASE) // PAGE
        try:
            got = actor.process.read(addr, end - addr)
        except SegmentationFault as fault:
            assert not actor.shadow.readable()[(fault.address - BASE) // PAGE]
            assert actor.shadow.readable()[first : (fault.address - BASE) // PAGE].all()
        except UserFault as fault:
            assert actor.shadow.uffd[(fault.address - BASE) // PAGE] & MISSING
        except BusError as error:
            frames = look(self.machine, actor.process).frames
            bad = touched_poison(self.machine, frames, addr, end)
            assert bad is not None
            assert error.address == bad & -PAGE
            assert (error.code, error.lsb) == (BUS_MCEERR_AR, 12)
        except (OutOfMemory, WouldBlock):
            pass
        else:
            assert actor.shadow.readable()[first : last + 1].all()
            frames = look(self.machine, actor.process).frames
            assert touched_poison(self.machine, frames, addr, end) is None
            assert got == actor.shadow.bytes_at(addr, end - addr)

    # What it asks the kernel for.

    @rule(number=who, pages=page_ranges, prot=prots, fixed=st.booleans())
    def mmap(self, number: int, pages: slice, prot: int, fixed: bool) -> None:
        """Map fresh memory, over what is there or where nothing is."""
        actor = self.actor(number)
        if not fixed and actor.shadow.mapped[pages].any():
            return
        try:
            addr = actor.process.mmap(size(pages), addr=address(pages), prot=prot, fixed=fixed)
        except WouldBlock:
            return
        assert addr == address(pages)
        actor.shadow.map(pages, prot)

    @rule(number=who, pages=page_ranges)
    def munmap(self, number: int, pages: slice) -> None:
        """Unmap."""
        actor = self.actor(number)
        try:
            actor.process.munmap(address(pages), size(pages))
        except WouldBlock:
            return
        actor.shadow.clear(pages)

    @rule(number=who, pages=page_ranges, prot=prots)
    def mprotect(self, number: int, pages: slice, prot: int) -> None:
        """Change protection; a gap is ENOMEM."""
        actor = self.actor(number)
        done = self.up_to_gap(actor, pages, "mprotect", prot)
        actor.shadow.prot[done] = prot

    def up_to_gap(self, actor: Actor, pages: slice, call: str, *args: Any) -> slice:
        """Make a call that works up to the first gap and fails with ENOMEM if there is one."""
        gaps = np.flatnonzero(~actor.shadow.mapped[pages])
        try:
            getattr(actor.process, call)(address(pages), size(pages), *args)
        except WouldBlock:
            return slice(0, 0)
        except OSError as error:
            assert error.errno == errno.ENOMEM
            assert len(gaps)
            return slice(pages.start, pages.start + int(gaps[0]))
        assert not len(gaps)
        return pages

    @rule(number=who, pages=page_ranges, to=st.integers(0, NR_PAGES - 1), align=st.booleans())
    def mremap(self, number: int, pages: slice, to: int, align: bool) -> None:
        """Move a range, aligned as it was or not."""
        actor, nr = self.actor(number), pages.stop - pages.start
        to = to & -512 | pages.start % 512 if align else to
        if to + nr > NR_PAGES:
            return
        new = slice(to, to + nr)
        try:
            actor.process.mremap(address(pages), size(pages), address(new))
        except OutOfMemory:
            actor.shadow.clear(new)
            return
        except WouldBlock:
            return
        except OSError as error:
            actor.shadow.refused_move(pages, new, error.errno)
            return
        actor.shadow.clear(new)
        actor.shadow.move(pages, new)

    @rule(number=who, pages=page_ranges)
    def mlock(self, number: int, pages: slice) -> None:
        """Lock memory, which faults it in; unlock it again."""
        shadow, process = self.actor(number).shadow, self.actor(number).process
        gaps = np.flatnonzero(~shadow.mapped[pages])
        stop = pages.start + int(gaps[0]) if len(gaps) else pages.stop
        try:
            process.mlock(address(pages), size(pages))
        except UserFault:
            pass
        except WouldBlock:
            return
        except (OutOfMemory, BusError):
            pass  # the VMAs are locked, not all pages are in
        except OSError as error:
            assert error.errno == errno.ENOMEM
            # Or a page to be copied for the write is poisoned.
            poisoned = self.machine.mem.poison.lines.any()
            assert len(gaps) or not shadow.readable()[pages].all() or poisoned
        shadow.locked[pages.start : stop] = True

    @rule(number=who, pages=page_ranges)
    def munlock(self, number: int, pages: slice) -> None:
        """Unlock."""
        actor = self.actor(number)
        actor.shadow.locked[self.up_to_gap(actor, pages, "munlock")] = False

    @rule(
        number=who,
        pages=page_ranges,
        advice=st.sampled_from(
            [
                Advice.MADV_HUGEPAGE,
                Advice.MADV_NOHUGEPAGE,
                Advice.MADV_DONTFORK,
                Advice.MADV_DOFORK,
                Advice.MADV_WIPEONFORK,
                Advice.MADV_KEEPONFORK,
            ]
        ),
    )
    def advise_flags(self, number: int, pages: slice, advice: Advice) -> None:
        """Advice that is only remembered; a gap is ENOMEM, after the rest was done."""
        actor = self.actor(number)
        shadow, mapped = actor.shadow, actor.shadow.mapped[pages]
        try:
            actor.process.madvise(address(pages), size(pages), advice)
        except WouldBlock:
            return
        except OSError as error:
            assert error.errno == errno.ENOMEM
            assert not mapped.all()
        else:
            assert mapped.all()
        if advice in (Advice.MADV_DONTFORK, Advice.MADV_DOFORK):
            shadow.dontfork[pages] = mapped & (advice is Advice.MADV_DONTFORK)
        elif advice in (Advice.MADV_WIPEONFORK, Advice.MADV_KEEPONFORK):
            shadow.wipe[pages] = mapped & (advice is Advice.MADV_WIPEONFORK)

    @rule(
        number=who,
        pages=page_ranges,
        advice=st.sampled_from([Advice.MADV_DONTNEED, Advice.MADV_FREE, Advice.MADV_PAGEOUT]),
    )
    def advise_pages(self, number: int, pages: slice, advice: Advice) -> None:
        """Drop, drop later, swap out: up to the first mlocked VMA, over gaps."""
        actor = self.actor(number)
        shadow = actor.shadow
        locked = np.flatnonzero(shadow.locked[pages])
        done = slice(pages.start, pages.start + int(locked[0])) if len(locked) else pages
        try:
            actor.process.madvise(address(pages), size(pages), advice)
        except WouldBlock:
            return
        except OSError as error:
            gap = not shadow.mapped[pages].all()
            assert error.errno == (errno.EINVAL if len(locked) else errno.ENOMEM)
            assert gap or len(locked)
        else:
            assert shadow.mapped[pages].all()
            assert not len(locked)
        if advice is Advice.MADV_DONTNEED:
            shadow.data[done] = 0
            shadow.lazy[done] = False
        elif advice is Advice.MADV_FREE:
            shadow.lazy[done] = shadow.mapped[done]

    @rule(number=who, pages=page_ranges, write=st.booleans())
    def populate(self, number: int, pages: slice, write: bool) -> None:
        """MADV_POPULATE_*: no byte changes, whatever happens; poison in its way is EHWPOISON."""
        actor = self.actor(number)
        advice = Advice.MADV_POPULATE_WRITE if write else Advice.MADV_POPULATE_READ
        try:
            actor.process.madvise(address(pages), size(pages), advice)
        except (WouldBlock, OutOfMemory, BusError):
            return
        except OSError as error:
            if error.errno == EHWPOISON and self.machine.mem.poison.lines.any():
                return
            allowed = actor.shadow.writable() if write else actor.shadow.readable()
            # Mapping by mapping; a gap is told of behind the last.
            refused = actor.shadow.mapped[pages] & ~allowed[pages]
            assert error.errno == (errno.EINVAL if refused.any() else errno.ENOMEM)
            return
        allowed = actor.shadow.writable() if write else actor.shadow.readable()
        assert allowed[pages].all()

    # Others.

    @rule(number=who)
    def fork(self, number: int) -> None:
        """A child, unless a poisoned page is pinned: that copy has no recovery."""
        actor = self.actor(number)
        if len(self.actors) == MAX_PROCESSES or pins_poison(self.machine):
            return
        try:
            child = actor.process.fork()
        except (OutOfMemory, WouldBlock):
            return
        self.start(child, actor.shadow.fork())

    @rule(limit=st.sampled_from([None, "1M", "3M", "5M"]), node=st.integers(0, 1))
    def new_process(self, limit: str | None, node: int) -> None:
        """A process from nowhere, in a cgroup with little memory or in none."""
        if len(self.actors) == MAX_PROCESSES:
            return
        memcg = self.machine.memcg(limit) if limit else None
        actor = self.start(self.machine.process(memcg=memcg, cpu=node))
        actor.process.node = node % len(self.machine.mem.nodes)

    @rule(number=who)
    def exit(self, number: int) -> None:
        """A process ends."""
        if len(self.actors) < 2:
            return
        actor = self.actor(number)
        try:
            actor.process.exit()
        except WouldBlock:
            return
        self.actors.remove(actor)

    @rule(number=who, where=byte_ranges, pinned=st.booleans())
    def hold(self, number: int, where: tuple[int, int], pinned: bool) -> None:
        """A device pins pages, or a pipe holds them."""
        actor, length = self.actor(number), min(where[1], 8 * PAGE)
        first, last = where[0] // PAGE, (where[0] + length - 1) // PAGE
        allowed = actor.shadow.writable() if pinned else actor.shadow.readable()
        hold = actor.process.pin if pinned else actor.process.get
        try:
            held = hold(BASE + where[0], length)
        except (WouldBlock, OutOfMemory):
            return
        except OSError as error:
            assert error.errno in (errno.EFAULT, EHWPOISON)
            assert error.errno == EHWPOISON or not allowed[first : last + 1].all()
            return
        assert allowed[first : last + 1].all()
        self.held.append(held)

    @rule(number=st.integers(0, 20))
    def release(self, number: int) -> None:
        """The device is done."""
        if self.held:
            self.held.pop(number % len(self.held)).release()

    @rule(number=who, page=st.integers(0, NR_PAGES - 1), line=st.integers(0, 63), near=who)
    def poison(self, number: int, page: int, line: int, near: int) -> None:
        """A line of a frame in use goes bad."""
        actor = self.actor(number)
        frames = look(self.machine, actor.process).frames
        present = np.flatnonzero(frames > 0)
        if len(present):
            page = int(present[(page + near) % len(present)])
            if frames[page] != self.machine.mem.huge_zero_pfn:
                self.machine.mem.poison.poison(int(frames[page]), line)

    @rule(nr=st.integers(0, 3))
    def unpoison(self, nr: int) -> None:
        """The frames are replaced, but for the last few."""
        poison = self.machine.mem.poison
        for pfn in np.flatnonzero(poison.lines)[nr:].tolist():
            poison.unpoison(pfn)

    @rule(
        limits=st.tuples(*[st.sampled_from([0, 1, 64, 256, 511])] * 3),
        enabled=st.sampled_from(["always", "madvise", "never"]),
        zero=st.booleans(),
        number=who,
        node=st.integers(0, 1),
    )
    def administer(
        self, limits: tuple[int, int, int], enabled: str, zero: bool, number: int, node: int
    ) -> None:
        """The administrator turns every knob, and moves a process to another node."""
        for name, limit in zip(("none", "swap", "shared"), limits, strict=True):
            setattr(self.machine.khugepaged_settings, f"max_ptes_{name}", limit)
        self.machine.thp.enabled = enabled
        self.machine.thp.use_zero_page = zero
        self.actor(number).process.node = node % len(self.machine.mem.nodes)

    @rule()
    def drain(self) -> None:
        """All LRU batches are drained."""
        self.machine.lru_add_drain_all()

    # userfaultfd.

    @rule(number=who, pages=page_ranges, modes=st.integers(1, 3))
    def uffd_register(self, number: int, pages: slice, modes: int) -> None:
        """Watch what is mapped of a range; what is watched for as much, or more, stays so."""
        actor = self.actor(number)
        mapped = actor.shadow.mapped[pages]
        try:
            actor.uffd.register(
                address(pages), size(pages), missing=bool(modes & MISSING), wp=bool(modes & WP)
            )
        except WouldBlock:
            return
        except OSError as error:
            assert error.errno == errno.EINVAL
            assert not mapped.any()
            return
        watched = actor.shadow.uffd[pages]
        actor.shadow.uffd[pages] = np.where(watched & modes == modes, watched, modes) * mapped

    @rule(number=who, pages=page_ranges)
    def uffd_unregister(self, number: int, pages: slice) -> None:
        """Watch it no longer."""
        actor = self.actor(number)
        try:
            actor.uffd.unregister(address(pages), size(pages))
        except WouldBlock:
            return
        except OSError as error:
            assert error.errno == errno.EINVAL
            assert not actor.shadow.mapped[pages].any()
            return
        actor.shadow.uffd[pages] = 0
        actor.shadow.wp[pages] = False

    @rule(number=who, pages=page_ranges, protect=st.booleans())
    def uffd_writeprotect(self, number: int, pages: slice, protect: bool) -> None:
        """Write-protect what is there, or lift that; up to what is not watched for it."""
        actor = self.actor(number)
        refused = actor.shadow.mapped[pages] & (actor.shadow.uffd[pages] & WP == 0)
        there = look(self.machine, actor.process).words[pages] != 0
        try:
            actor.uffd.writeprotect(address(pages), size(pages), protect=protect)
        except WouldBlock:
            return
        except OSError as error:
            assert error.errno == errno.ENOENT
            assert refused.any() or not actor.shadow.mapped[pages].any()
            before = np.logical_or.accumulate(refused)
            there = np.where(before, actor.shadow.wp[pages], there & protect)
        else:
            assert not refused.any()
            there &= protect
        actor.shadow.wp[pages] = there & actor.shadow.mapped[pages]

    @rule(number=who, page=st.integers(0, NR_PAGES - 1), seed=seeds, zero=st.booleans())
    def uffd_fill(self, number: int, page: int, seed: int, zero: bool) -> None:
        """Answer a fault that nobody has had yet."""
        actor, addr = self.actor(number), BASE + page * PAGE
        watched = np.flatnonzero(actor.shadow.uffd)
        if len(watched):
            page = int(watched[page % len(watched)])
            addr = BASE + page * PAGE
        there = look(self.machine, actor.process).words[page] != 0
        data = bytes(PAGE) if zero else pattern(seed, PAGE)
        try:
            actor.uffd.zeropage(addr, PAGE) if zero else actor.uffd.copy(addr, data)
        except (WouldBlock, OutOfMemory):
            return
        except OSError as error:
            expected = errno.EEXIST if actor.shadow.uffd[page] else errno.ENOENT
            assert error.errno == expected
            assert there or not actor.shadow.uffd[page]
            return
        assert actor.shadow.uffd[page]
        actor.shadow.write(addr, data)

    # Collapse.

    @rule(number=who, block=st.integers(0, NR_BLOCKS - 1), is_khugepaged=st.booleans())
    def collapse(self, number: int, block: int, is_khugepaged: bool) -> None:
        """One block is looked at by khugepaged."""
        actor = self.actor(number)
        before = look(self.machine, actor.process)
        try:
            result = self.machine.collapse(
                actor.process, BASE + block * BLOCK, is_khugepaged=is_khugepaged
            )
        except WouldBlock:
            return
        Steps.met[result.name] += 1
        after = look(self.machine, actor.process)
        if result is ScanResult.SCAN_SUCCEED:
            assert actor.process.is_huge(BASE + block * BLOCK)
            assert not before.huge[block]
        else:
            assert before.huge == after.huge
        self.check_unchanged(before, after)

    @rule(
        number=who,
        block=st.integers(0, NR_BLOCKS - 1),
        fresh=st.booleans(),
        holes=st.sampled_from([0, 0, 1, 400]),
        bad=st.sampled_from([None, None, 0, 100]),
        is_khugepaged=st.booleans(),
        seed=seeds,
    )
    def fill_and_collapse(
        self,
        number: int,
        block: int,
        fresh: bool,
        holes: int,
        bad: int | None,
        is_khugepaged: bool,
        seed: int,
    ) -> None:
        """A block comes to be what khugepaged looks for, but for what lies in the way already."""
        actor, first = self.actor(number), block * 512
        whole = slice(first, first + 512)
        if fresh or not actor.shadow.mapped[whole].all():
            self.machine.mem.poison.lines[:] = 0
            self.mmap(number, whole, READ_WRITE, fixed=True)
        self.store(actor, BASE + first * PAGE, pattern(seed, (512 - holes) * PAGE))
        if is_khugepaged:
            self.advise_flags(number, whole, Advice.MADV_HUGEPAGE)
        frames = look(self.machine, actor.process).frames
        if bad is not None and frames[first + bad] > 0:
            self.machine.mem.poison.poison(int(frames[first + bad]), seed % 64)
        self.collapse(number, block, is_khugepaged)

    def check_unchanged(self, before: Look, after: Look) -> None:
        """Entries of blocks that did not become huge are as they were, or swapped in."""
        for block in range(NR_BLOCKS):
            if after.huge[block] and not before.huge[block]:
                continue
            changed = np.flatnonzero(before.block(block) != after.block(block))
            for place in changed.tolist():
                assert is_swap_pte(int(before.block(block)[place]))
                assert after.frames[block * 512 + place] > 0 or not after.block(block)[place]

    @rule(number=who, pages=page_ranges)
    def madvise_collapse(self, number: int, pages: slice) -> None:
        """MADV_COLLAPSE of any range."""
        actor = self.actor(number)
        before = look(self.machine, actor.process)
        whole = blocks_of_one_mapping(actor.process, pages)
        try:
            actor.process.madvise(address(pages), size(pages), Advice.MADV_COLLAPSE)
        except WouldBlock:
            return
        except CollapseError as error:
            Steps.met[error.scan_result.name] += 1
            assert error.errno == error.scan_result.errno
            assert error.errno
        except OSError as error:
            assert error.errno == errno.ENOMEM
            assert not actor.shadow.mapped[pages].all()
        else:
            Steps.met["SCAN_SUCCEED"] += len(whole)
            assert all(actor.process.is_huge(BASE + block * BLOCK) for block in whole)
        self.check_unchanged(before, look(self.machine, actor.process))

    @invariant()
    def adds_up(self) -> None:
        """The audit holds, and every byte is what it should be."""
        Steps.taken += 1
        self.machine.audit()
        assert self.machine.mem.panic is None
        for actor in self.actors:
            check_contents(self.machine, actor.process, actor.shadow)
        self.check_processes()

    def check_processes(self) -> None:
        assert len(self.machine.mem.mms) == len(self.actors)

    def teardown(self) -> None:
        """Everybody reads all there is, then leaves, and nothing is left."""
        for number, actor in enumerate(self.actors):
            for page in np.flatnonzero(np.diff(actor.shadow.readable(), prepend=False)).tolist():
                self.read(number, (page * PAGE, (NR_PAGES - page) * PAGE))
        for held in self.held:
            held.release()
            self.machine.audit()
        for actor in self.actors:
            actor.process.exit()
            self.machine.audit()
        self.machine.lru_add_drain_all()
        self.machine.audit()
        free = sum(node[0] for node in self.machine.mem.vmstat.node)
        kept = 1 + 512 * (self.machine.mem.huge_zero_pfn is not None)
        assert free == self.machine.mem.nr_pages - kept, "pages have leaked"
        assert not self.machine.mem.swap.swap_map, "swap slots have leaked"
        assert not self.machine.mem.mappings, "anon_vmas have leaked"


class PausedCollapses(Operations):
    """The same, while collapses stand still wherever they can lose the CPU."""

    # A rule takes many of them, with an audit after each.
    STEPS_AN_EXAMPLE = 30
    WANTED: ClassVar = {"SCAN_SUCCEED"}

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[Task[Any]] = []
        self.leaving: list[Task[Any]] = []

    @rule(
        number=who,
        block=st.integers(0, NR_BLOCKS - 1),
        is_khugepaged=st.booleans(),
        steps=st.integers(1, 12),
    )
    def start_collapse(self, number: int, block: int, is_khugepaged: bool, steps: int) -> None:
        """A collapse begins, and gets some way."""
        process = self.actor(number).process
        if len(self.tasks) < 3:
            generator = self.machine.collapse.steps(
                process, BASE + block * BLOCK, is_khugepaged=is_khugepaged
            )
            self.tasks.append(self.machine.spawn(generator, "khugepaged"))
            self.go_on(len(self.tasks) - 1, steps)

    @rule(number=who, first=st.integers(0, NR_BLOCKS - 1), steps=st.integers(1, 16))
    def start_madvise(self, number: int, first: int, steps: int) -> None:
        """MADV_COLLAPSE of the blocks from `first` on, and gets some way."""
        process = self.actor(number).process
        if len(self.tasks) < 3:
            generator = process.madvise.steps(
                BASE + first * BLOCK, (NR_BLOCKS - first) * BLOCK, Advice.MADV_COLLAPSE
            )
            self.tasks.append(self.machine.spawn(generator, "madvise"))
            self.go_on(len(self.tasks) - 1, steps)

    @rule(number=st.integers(0, 2), steps=st.integers(1, 8))
    def go_on(self, number: int, steps: int) -> None:
        """A paused collapse goes on, with an audit at each pause."""
        if self.tasks:
            task = self.tasks[number % len(self.tasks)]
            for _ in range(steps):
                if not task.step():
                    break
                self.adds_up()
            if task.done:
                self.tasks.remove(task)
                self.check_end(task)

    def check_end(self, task: Task[Any]) -> None:
        if isinstance(task.error, CollapseError):
            Steps.met[task.error.scan_result.name] += 1
        elif task.error is None:
            Steps.met[(task.result or ScanResult.SCAN_SUCCEED).name] += 1
        elif not (isinstance(task.error, OSError) and not isinstance(task.error, WouldBlock)):
            raise task.error

    @rule(number=who)
    def exit(self, number: int) -> None:
        """A process ends, as soon as it gets the lock."""
        if len(self.actors) > 1:
            actor = self.actor(number)
            self.actors.remove(actor)
            task = self.machine.spawn(actor.process.exit.steps(), "exit")
            task.step()
            self.leaving.append(task)

    def adds_up(self) -> None:
        """Those that leave go on whenever they can."""
        for task in self.leaving:
            while task.step():
                pass
            if task.error:
                raise task.error
        self.leaving = [task for task in self.leaving if not task.done]
        super().adds_up()

    adds_up = invariant()(adds_up)

    def check_processes(self) -> None:
        assert len(self.machine.mem.mms) == len(self.actors) + len(self.leaving)

    def finish_all(self) -> None:
        while self.tasks or self.leaving:
            moved = False
            for task in list(self.tasks):
                moved |= task.step()
                if task.done:
                    self.tasks.remove(task)
                    self.check_end(task)
            self.adds_up()
            assert moved or not self.tasks, "deadlock"

    def teardown(self) -> None:
        """All collapses end first."""
        self.finish_all()
        super().teardown()


@pytest.mark.parametrize("kind", [Operations, PausedCollapses])
def test_memory_holds_what_was_written_whatever_happens(
    kind: type[Operations], model_steps: int
) -> None:
    """Any sequence of operations leaves every byte, count, lock and reference as it must be."""
    run_machine(kind, model_steps)
