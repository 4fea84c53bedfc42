"""Which blocks a scan visits, against the kernel's two loops written down one after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from collapse_kit import HPAGE, PAGE
from hypothesis import given, settings
from hypothesis import strategies as st

from pykhuge import Advice, Machine, Process

BASE = 0x4000_0000
# A block is too empty to collapse (mmap_lock is kept), or full and its cgroup too (it is dropped).
# Neither changes it: a failed copy leaves pages in the LRU batch, where the next visit finds them.
KEPT, DROPPED = "exceed_none_pte", "ccgroup_charge_failed"


@dataclass
class SlowVma:
    """[start, end) in bytes from the process's base, and its whole blocks, lowest first."""

    eligible: bool
    start: int
    blocks: list[str]
    end: int

    @property
    def hstart(self) -> int:
        """Where its first whole block begins."""
        return -(-self.start // HPAGE) * HPAGE


@dataclass
class SlowMm:
    """A process as the daemon sees it."""

    name: int
    vmas: list[SlowVma]
    dead: bool = False


@dataclass
class SlowDaemon:
    """khugepaged_do_scan and khugepaged_scan_mm_slot, as the reference's section 5 tells them."""

    mms: list[SlowMm] = field(default_factory=list)
    at: SlowMm | None = None
    address: int = 0
    full_scans: int = 0
    seen: list[tuple[int, str]] = field(default_factory=list)

    def scan(self, pages: int) -> float:
        progress = heads = 0
        while progress < pages:
            if self.at is None:
                heads += 1
            if not self.mms or heads == 2:
                break
            progress += self.visit(pages - progress)
        return 10_000 if self.mms else math.inf

    def visit(self, pages: int) -> int:
        if self.at is None:
            self.at, self.address = self.mms[0], 0
        progress, done = 1, True
        for vma in [] if self.at.dead else self.at.vmas:
            if vma.end <= self.address:
                continue
            hend = vma.hstart + len(vma.blocks) * HPAGE
            if not vma.eligible or self.address > hend:
                progress += 1
                continue
            self.address = max(self.address, vma.hstart)
            while done and self.address < hend:
                block = vma.blocks[(self.address - vma.hstart) // HPAGE]
                self.seen.append((self.at.name, block))
                self.address += HPAGE
                progress += 512
                done = block == KEPT and progress < pages
            if not done:
                break
        if done:
            self.leave()
        return progress

    def leave(self) -> None:
        assert self.at is not None
        place = self.mms.index(self.at) + 1
        left, self.at = self.at, self.mms[place] if place < len(self.mms) else None
        if self.at is None:
            self.full_scans += 1
        else:
            self.address = 0
        if left.dead:
            self.mms.remove(left)

    def exit(self, mm: SlowMm) -> None:
        mm.dead = True
        if mm is not self.at:
            self.mms.remove(mm)


vmas = st.builds(
    lambda eligible, skip, blocks, tail: (eligible, skip, blocks, tail),
    st.booleans(),
    st.sampled_from([0, PAGE, HPAGE - PAGE]),
    st.lists(st.sampled_from([KEPT, KEPT, DROPPED]), min_size=1, max_size=4),
    st.sampled_from([0, PAGE, HPAGE - PAGE]),
)
births = st.tuples(st.just("birth"), st.lists(vmas, min_size=1, max_size=4))
deaths = st.tuples(st.just("death"), st.integers(0, 5))
scans = st.tuples(
    st.just("scan"), st.sampled_from([1, 2, 512, 513, 514, 1025, 2100, 4096, 1 << 20])
)


def layout(shapes: list[tuple[bool, int, list[str], int]]) -> list[SlowVma]:
    """VMAs one behind the other, a block apart; each begins and ends as far off a block as it says.

    One at least is eligible, or nobody would know of the process.
    """
    made, at = [], 0
    for number, (eligible, skip, blocks, tail) in enumerate(shapes):
        start = at + skip
        end = at + (HPAGE if skip else 0) + len(blocks) * HPAGE + tail
        made.append(SlowVma(eligible or number == 0, start, blocks, end))
        at = -(-end // HPAGE) * HPAGE + HPAGE
    return made


def realise(machine: Machine, vmas: list[SlowVma]) -> Process:
    """The same in the model: only eligible memory has MADV_HUGEPAGE.

    Its cgroup has room for page tables, but for no huge page.
    """
    blocks = [block for vma in vmas for block in vma.blocks]
    used = blocks.count(KEPT) * PAGE + blocks.count(DROPPED) * HPAGE
    process = machine.process("task", memcg=machine.memcg(used + HPAGE // 2))
    for vma in vmas:
        addr = process.mmap(vma.end - vma.start, addr=BASE + vma.start, fixed=True)
        process.madvise(addr, PAGE, Advice.MADV_DONTFORK)  # keeps it apart, as flags that differ do
        process.madvise(addr, PAGE, Advice.MADV_DOFORK)
        for number, block in enumerate(vma.blocks):
            where = BASE + vma.hstart + number * HPAGE
            process.write(where, b"x" * (HPAGE if block == DROPPED else PAGE))
    for vma in vmas:
        if vma.eligible:
            process.madvise(BASE + vma.start, vma.end - vma.start, Advice.MADV_HUGEPAGE)
    return process


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(births, deaths, scans, scans), min_size=3, max_size=14))
def test_a_scan_visits_what_the_kernels_loops_visit(
    story: list[tuple[str, object]],
) -> None:
    """The same blocks of the same processes in the same order, the same cursor, the same sleep."""
    machine, slow = Machine("1G"), SlowDaemon()
    machine.khugepaged_settings.max_ptes_none = 200
    processes: dict[int, tuple[SlowMm, Process]] = {}
    names: dict[int, int] = {}
    for what, how in story:
        if what == "birth":
            made = layout(how)  # type: ignore[arg-type]
            process = realise(machine, made)
            names[process.mm.hashed_ptr] = process.pid
            processes[process.pid] = SlowMm(process.pid, made), process
            slow.mms.append(processes[process.pid][0])
        elif what == "death" and processes:
            pid = sorted(processes)[how % len(processes)]  # type: ignore[operator]
            mm, process = processes.pop(pid)
            slow.exit(mm)
            process.exit()
        elif what == "scan":
            machine.khugepaged_settings.pages_to_scan = how  # type: ignore[assignment]
            machine.trace.clear()
            slow.seen.clear()
            assert machine.khugepaged.step() == slow.scan(how)  # type: ignore[arg-type]
            seen = [
                (names[record.event.mm], record.event.status.text)  # type: ignore[attr-defined]
                for record in machine.trace
                if record.event.name == "mm_khugepaged_scan_pmd"
            ]
            assert seen == slow.seen
        scan = machine.mem.khugepaged_scan
        assert [slot.mm.hashed_ptr for slot in scan.mm_head] == [
            next(ptr for ptr, pid in names.items() if pid == mm.name) for mm in slow.mms
        ]
        assert (scan.mm_slot is None) == (slow.at is None)
        if slow.at is not None and scan.mm_slot is not None:
            assert names[scan.mm_slot.mm.hashed_ptr] == slow.at.name
            assert max(scan.address, BASE) == BASE + slow.address or not scan.address
        assert machine.khugepaged_settings.full_scans == slow.full_scans
    machine.audit()
