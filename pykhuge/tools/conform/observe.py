"""What can be seen of a layout and its collapse, said alike for the kernel and for the model.

Frames and pointers are a host's own. Here a frame has the name of the page of the layout that it
held before the collapse, such as "main 17".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pykhuge.tools.conform.layout import BLOCK, NR, PAGE, Layout, Stroke

__all__ = ["BASE", "COUNTERS", "Event", "Outcome", "Side", "contents", "observe", "parse_events"]

Words = npt.NDArray[np.uint64]

# Nothing else is mapped in these 1 GiB, so page tables are as empty as they can be.
BASE = 0x1000_0000_0000
# Nobody else moves these while a layout is looked at, but khugepaged for others.
COUNTERS = (
    "thp_collapse_alloc",
    "thp_collapse_alloc_failed",
    "thp_scan_exceed_none_pte",
    "thp_scan_exceed_swap_pte",
    "thp_scan_exceed_share_pte",
    "thp_split_page",
    "thp_split_page_failed",
    "thp_split_pmd",
    "thp_file_mapped",
    "nr_shmem_hugepages",
    "nr_shmem_pmdmapped",
)
# These others move as well, when their memory is reclaimed: they can only add to what is expected.
SPLITS = ("thp_split_page", "thp_split_page_failed", "thp_split_pmd")
# LazyFree is not among them: pages become so by batches of a CPU, of which kernels have their own.
SMAPS = ("Rss", "Anonymous", "AnonHugePages", "ShmemPmdMapped", "Swap", "Locked")

PRESENT, SWAPPED, UFFD_WP, EXCLUSIVE = 1 << 63, 1 << 62, 1 << 57, 1 << 56
FRAME = (1 << 55) - 1
NO_FRAME = (1 << 64) - 1
PRESENT_, FRAME_ = np.uint64(PRESENT), np.uint64(FRAME)


class Event(dict[str, str]):
    """A trace event: its name as "event", and its fields as printed."""


class Side(Protocol):
    """Where a layout is built: the kernel, or the model. `who` is "main", "child 1", ...

    knobs: the errno of turning each.
    """

    layout: Layout
    knobs: dict[str, int]

    def stroke(self, stroke: Stroke) -> int:
        """Do it, and say the errno."""

    def collapse(self) -> int:
        """MADV_COLLAPSE of all that is mapped: errno."""

    def khugepaged(self) -> int:
        """One scan of everything: pages_collapsed."""

    def people(self) -> list[str]:
        """The processes, in the order of their birth."""

    def pagemap(self, who: str, addr: int, nr: int) -> Words:
        """The words of /proc/pid/pagemap for `nr` pages."""

    def smaps(self, who: str) -> str:
        """/proc/pid/smaps."""

    def vmstat(self) -> dict[str, int]:
        """/proc/vmstat, COUNTERS at least."""

    def zero_frame(self) -> int:
        """The frame of the zero page."""

    def unwatch(self) -> None:
        """Close userfaultfd: who reads on is not stopped by it."""

    def page(self, who: str, page: int) -> bytes | None:
        """The bytes of a page, None if it cannot be read."""

    def file_bytes(self) -> bytes:
        """All bytes of the file."""

    def clear_events(self) -> None:
        """Forget the events so far."""

    def events(self) -> list[tuple[str, Event]]:
        """The events since the last clearing, with whose they are; "" if nobody's of the layout."""


def contents(pages: range, who: str) -> list[bytes]:
    """What `write` stores in each page: no two pages of two processes are alike."""
    return [f"{who} {page} ".encode().ljust(64, b".") * (PAGE // 64) for page in pages]


@dataclass
class Outcome:
    """All that is compared, ready for JSON.

    knobs, strokes: the errno of each. result: errno, or how many blocks the daemon collapsed.
    before, after: of each process the runs of pages that are alike. sizes: of smaps.
    counters: what moved. Result and counters are None where work on others' memory is among them.
    contents: a digest of each process's memory and of the file.
    """

    knobs: dict[str, int]
    strokes: list[int]
    result: int | None
    events: list[dict[str, str]]
    before: dict[str, list[str]]
    after: dict[str, list[str]]
    sizes: dict[str, list[str]]
    counters: dict[str, int] | None
    contents: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)

    def differences(self, other: Outcome) -> list[str]:
        """The names of what is not as `other`, the model's, expects it.

        What one of the two does not know is not asked.
        """
        mine, others = asdict(self), asdict(other)
        if self.counters is not None and other.counters is not None:
            for name in SPLITS:
                if self.counters.get(name, 0) > (expected := other.counters.get(name, 0)):
                    mine["counters"][name] = others["counters"][name] = expected
        known = [name for name in mine if None not in (mine[name], others[name])]
        return [name for name in known if mine[name] != others[name]]

    def scan_results(self) -> set[str]:
        """What the events say came out."""
        return {event[key] for event in self.events for key in ("status", "result") if key in event}


class View:
    """What the processes have in the layout's pages at one moment: their pagemap words."""

    def __init__(self, side: Side, people: list[str]) -> None:
        nr = side.layout.blocks * NR
        self.words = {who: side.pagemap(who, BASE, nr) for who in people}
        self.frames = {
            who: np.where(words & PRESENT_, words & FRAME_, 0) for who, words in self.words.items()
        }

    def blocks(self, who: str) -> npt.NDArray[np.uint64]:
        """The frames of a process, a row for each block."""
        return self.frames[who].reshape(-1, NR)


class Names:
    """Frames by what they hold: "main 17" is the frame that page had before the collapse.

    A frame that is given up may come back anywhere at once; from then on its name is no good.
    """

    def __init__(self, zero: int, before: View) -> None:
        self.known: dict[int, str] = {}
        self.learn("", before)
        self.known[zero] = "zero"

    def learn(self, kind: str, view: View) -> None:
        """Frames that are new get the name of their place."""
        for who, frames in view.frames.items():
            for page in np.flatnonzero(frames).tolist():
                self.known.setdefault(int(frames[page]), f"{kind}{who} {page}")

    def forget(self, frames: npt.NDArray[np.uint64]) -> None:
        """These were given up."""
        for frame in frames.tolist():
            if self.known.get(frame) != "zero":
                self.known.pop(frame, None)

    def of(self, frame: int) -> str:
        """The name of a frame."""
        return "none" if frame == NO_FRAME else self.known.get(frame, "other")


def observe(side: Side) -> Outcome:
    """Paint the layout of `side`, have it collapsed, and look."""
    layout = side.layout
    strokes = [side.stroke(stroke) for stroke in layout.strokes]
    people = side.people()
    before = View(side, people)
    counted = side.vmstat()
    side.clear_events()
    result = side.collapse() if layout.via == "madvise" else side.khugepaged()
    events = side.events()
    counters = side.vmstat()
    alone = all(who for who, _ in events)
    moved = {name: counters[name] - counted[name] for name in COUNTERS}
    after = View(side, people)
    sizes = {who: list(_sizes(side.smaps(who))) for who in people}
    zero = side.zero_frame()
    side.unwatch()
    digests = {who: _digest(side, who, after) for who in people}
    if layout.has_file:
        digests["file"] = hashlib.blake2b(side.file_bytes(), digest_size=8).hexdigest()
    return Outcome(
        side.knobs,
        strokes,
        result if alone or layout.via == "madvise" else None,
        _named_events([each for each in events if each[0]], before, after, Names(zero, before)),
        {who: list(_runs(who, before, Names(zero, before))) for who in people},
        {who: list(_runs(who, after, _names_after(zero, before, after))) for who in people},
        sizes,
        {name: by for name, by in moved.items() if by} if alone else None,
        digests,
    )


def _names_after(zero: int, before: View, after: View) -> Names:
    """What stayed where it was keeps its name; all else is new."""
    names = Names(zero, before)
    for who, frames in before.frames.items():
        names.forget(frames[frames != after.frames[who]])
    stayed = np.concatenate(
        [frames[frames == after.frames[who]] for who, frames in before.frames.items()]
    )
    again = Names(zero, before)
    names.known |= {frame: again.known[frame] for frame in stayed.tolist() if frame}
    names.learn("new ", after)
    return names


def _runs(who: str, view: View, names: Names) -> Iterator[str]:
    """Pages that are alike, run by run: "0+100 main exclusive"."""
    cells = [_cell(page, word, names) for page, word in enumerate(view.words[who].tolist())]
    at = 0
    for cell, group in groupby(cells):
        nr = len(list(group))
        if cell:
            yield f"{at}+{nr} {cell}"
        at += nr


def _cell(page: int, word: int, names: Names) -> str:
    said = []
    if word & SWAPPED:
        said.append("swapped")
    if word & PRESENT:
        owner, _, number = names.of(word & FRAME).rpartition(" ")
        shift = int(number) - page if owner else 0
        said.append((owner or number) + (f"{shift:+d}" if shift else ""))
    if word & UFFD_WP:
        said.append("uffd-wp")
    if word & EXCLUSIVE:
        said.append("exclusive")
    return " ".join(said)


def _named_events(
    events: list[tuple[str, Event]], before: View, after: View, names: Names
) -> list[dict[str, str]]:
    """The events without what is a host's own: pointers are left out, frames have names.

    Blocks are scanned from the lowest on, so the events that tell of a success are, one by one,
    those of the blocks that became huge; their frames are free from then on.
    """
    became_huge = {
        who: _new_huge_blocks(before.blocks(who), after.blocks(who)) for who in before.frames
    }
    named = []
    for who, event in events:
        fields = {key: text for key, text in event.items() if key != "mm"}
        if fields.get("status") == "page_not_in_lru":
            # Which pages still wait in a CPU's batch hangs on what that CPU did before.
            fields = {key: fields[key] for key in ("event", "status")}
        if fields.get("result") == "exceed_swap_pte":
            del fields["scan_pfn"]  # of a swap entry that is taken for a page
        elif "scan_pfn" in fields:
            fields["scan_pfn"] = names.of(int(fields["scan_pfn"], 16))
        if "hpage_pfn" in fields:
            fields["hpage_pfn"] = "none" if int(fields["hpage_pfn"], 16) == NO_FRAME else "some"
        named.append({"who": who} | fields)
        if "scan" in event["event"] and "succeeded" in event.values() and became_huge[who]:
            block = became_huge[who].pop(0)
            for each in before.frames:
                names.forget(before.blocks(each)[block])
    return named


def _new_huge_blocks(before: npt.NDArray[np.uint64], after: npt.NDArray[np.uint64]) -> list[int]:
    huge = (after[:, 0] != 0) & (after[:, 0] % NR == 0) & (after[:, -1] == after[:, 0] + NR - 1)
    return np.flatnonzero(huge & (before[:, 0] != after[:, 0])).tolist()


def _sizes(smaps: str) -> Iterator[str]:
    """Of each VMA of the layout where it lies, in pages, and its sizes in kB that are not 0."""
    inside = False
    for line in smaps.splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line):
            start, end = int(head[1], 16), int(head[2], 16)
            inside = BASE <= start < BASE + 8 * BLOCK
            where = f"{(start - BASE) // PAGE}+{(end - start) // PAGE} {head[3]}"
            if inside:
                yield where
            continue
        size = re.match(r"(\w+): +([1-9]\d*) kB", line)
        if inside and size and size[1] in SMAPS:
            yield f"{size[1]} {size[2]}"


def _digest(side: Side, who: str, view: View) -> str:
    """Of all pages that were there or in swap."""
    digest = hashlib.blake2b(digest_size=8)
    for page in np.flatnonzero(view.words[who] & np.uint64(PRESENT | SWAPPED)).tolist():
        content = side.page(who, page)
        digest.update(b"lost" if content is None else content)
    return digest.hexdigest()


def parse_events(trace: str, mms: dict[str, str]) -> list[tuple[str, Event]]:
    """The huge_memory events of a trace with whose they are.

    mms: who, by the hashed pointer. An event that names no mm is part of the next one that does.
    """
    events: list[tuple[str, Event]] = []
    unnamed: dict[str, list[Event]] = {}
    for line in trace.splitlines():
        found = re.search(r"-(\d+) +\[\d+\].*?: (mm_\w+): (.*)", line)
        if not found:
            continue
        task, name, body = found.groups()
        event = Event([("event", name), *re.findall(r"(\w+)=([^,\s]+)", body)])
        waiting = unnamed.setdefault(task, [])
        waiting.append(event)
        if "mm" in event:
            events += [(mms.get(event["mm"], ""), each) for each in waiting]
            waiting.clear()
    return events
