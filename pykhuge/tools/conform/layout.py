"""A layout: a few blocks of memory painted stroke by stroke, and how it is then collapsed.

It is one value with a text form, which `pykhuge conform --layout` takes:

    anon blocks=2 via=khugepaged none=200: write 0+512; dontneed 100+50; fork; child.write 3+1

Pages count from the block that holds the mapping's start. A stroke is a call and its pages:
`first+nr`, `first+nr/step` for every step-th of them, `first+nr>to` for a move, one number for a
size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import NamedTuple

__all__ = [
    "BLOCK",
    "CONTEXTS",
    "LIMITS",
    "MEMORIES",
    "NR",
    "PAGE",
    "SPELLED",
    "STROKES",
    "WITH_FILE",
    "WORDS",
    "Layout",
    "Stroke",
    "UnfitLayout",
    "parse",
    "runs",
]

PAGE, NR, BLOCK = 4096, 512, 2 << 20

MEMORIES = {
    "anon": "private anonymous",
    "shm": "shared anonymous",
    "memfd": "a memfd, mapped shared",
    "private": "a memfd, mapped private",
}
WITH_FILE = ("memfd", "private")
CONTEXTS = ("madvise", "khugepaged")
# Words that a layout has beside its numbers, and what they may be. `enabled=always`, and shmem's
# `always` and `within_size`, would be about more memory than the layout's.
WORDS = {
    "via": CONTEXTS,
    "enabled": ("madvise", "never"),
    "shmem": ("advise", "never", "deny", "force"),
    "size": ("inherit", "madvise", "never"),
    "size_shmem": ("inherit", "always", "within_size", "advise", "never"),
}

# What a stroke does to its pages, and what is written behind its name.
STROKES = {
    "write": "range",  # a store to each page
    "read": "range",  # a load from each page
    "dontneed": "range",  # MADV_DONTNEED
    "free": "range",  # MADV_FREE
    "pageout": "range",  # MADV_PAGEOUT
    "hugepage": "range",  # MADV_HUGEPAGE
    "nohugepage": "range",  # MADV_NOHUGEPAGE
    "collapse": "range",  # MADV_COLLAPSE
    "protect": "range",  # mprotect(PROT_READ)
    "unprotect": "range",  # mprotect(PROT_READ | PROT_WRITE)
    "thp-disable": "size",  # PR_SET_THP_DISABLE: 0 no, 1 completely, 2 but for what is advised
    "mlock": "range",
    "munlock": "range",
    "munmap": "range",
    "move": "move",  # mremap, over what is mapped there
    "populate": "range",  # MADV_POPULATE_WRITE
    "pin": "range",  # vmsplice into a pipe that nobody reads
    "fork": "",  # the children stay; child.* is done by the last
    "child.write": "range",
    "child.read": "range",
    "child.dontneed": "range",
    "child.free": "range",
    "child.pageout": "range",
    "child.pin": "range",
    "child.collapse": "range",
    "child.munmap": "range",
    "arm": "range",  # UFFDIO_REGISTER for missing pages
    "uffd-wp": "range",  # UFFDIO_REGISTER for writes, and UFFDIO_WRITEPROTECT
    "uffd-poison": "range",  # UFFDIO_REGISTER for missing pages, and UFFDIO_POISON
    "pwrite": "range",  # into the file, not through the mapping
    "fallocate": "range",
    "punch": "range",  # fallocate(FALLOC_FL_PUNCH_HOLE)
    "truncate": "size",  # ftruncate
    "alias": "size",  # the file mapped shared once more, from this page on, and what is cached read
    "child.alias": "size",
}
FILE_STROKES = frozenset({"pwrite", "fallocate", "punch", "truncate", "alias", "child.alias"})


class Stroke(NamedTuple):
    """One call on pages first, first + step, ... below first + nr."""

    name: str
    first: int = 0
    nr: int = 0
    step: int = 1
    to: int = 0

    def __str__(self) -> str:
        kind = STROKES[self.name]
        if kind == "":
            return self.name
        if kind == "size":
            return f"{self.name} {self.first}"
        text = f"{self.name} {self.first}+{self.nr}"
        if kind == "move":
            return f"{text}>{self.to}"
        return text if self.step == 1 else f"{text}/{self.step}"

    def pages(self) -> range:
        """The pages it is about."""
        return range(self.first, self.first + self.nr, self.step)


class UnfitLayout(Exception):
    """A layout that cannot be compared. reason: why, alike for all such. detail: what it met."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def runs(stroke: Stroke) -> list[tuple[int, int]]:
    """The pages of a stroke as runs of (first, nr)."""
    if stroke.step == 1:
        return [(stroke.first, stroke.nr)]
    return [(page, 1) for page in stroke.pages()]


@dataclass(frozen=True)
class Layout:
    """Memory, what is done to it, and how it is collapsed.

    blocks: how many it spans. head, tail: pages by which it starts late and ends early.
    offset: page of the file at the first block's start, from which a file's strokes count too.
    via: who collapses it. none, swap, shared: max_ptes_*, which the daemon heeds.
    enabled, shmem: transparent_hugepage/enabled, shmem_enabled; size, size_shmem: the same in
    hugepages-2048kB.
    """

    memory: str
    blocks: int = 1
    head: int = 0
    tail: int = 0
    offset: int = 0
    via: str = "madvise"
    none: int = 511
    swap: int = 64
    shared: int = 256
    enabled: str = "madvise"
    shmem: str = "advise"
    size: str = "inherit"
    size_shmem: str = "inherit"
    strokes: tuple[Stroke, ...] = ()

    def __post_init__(self) -> None:
        if self.memory not in MEMORIES:
            raise ValueError(f"memory {self.memory!r}: allowed {', '.join(MEMORIES)}")
        for name, words in WORDS.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name}={getattr(self, name)}: allowed {', '.join(words)}")
        for name, most in LIMITS.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)}: allowed 0..{most}")
        if not self.blocks or not self.nr:
            raise ValueError(f"{self}: allowed layouts of one page and more")
        for stroke in self.strokes:
            self._check(stroke)

    def _check(self, stroke: Stroke) -> None:
        whole = self.blocks * NR
        if stroke.name in FILE_STROKES and not self.has_file:
            raise ValueError(f"{stroke}: allowed in {', '.join(WITH_FILE)}")
        if STROKES[stroke.name] in ("range", "move"):
            low, high = (
                (0, whole) if stroke.name in FILE_STROKES else (self.head, self.head + self.nr)
            )
            for first in {stroke.first, stroke.to} if stroke.name == "move" else {stroke.first}:
                if not low <= first < first + stroke.nr <= high:
                    raise ValueError(f"{stroke}: allowed pages {low}..{high - 1}")
        else:
            most = 2 if stroke.name == "thp-disable" else whole
            if not 0 <= stroke.first <= most:
                raise ValueError(f"{stroke}: allowed 0..{most}")

    def knobs(self) -> dict[str, str]:
        """The words of transparent_hugepage, by file, in the order in which they are turned."""
        return {
            "enabled": self.enabled,
            "shmem_enabled": self.shmem,
            "hugepages-2048kB/enabled": self.size,
            "hugepages-2048kB/shmem_enabled": self.size_shmem,
        }

    @property
    def has_file(self) -> bool:
        """Whether there is a file to be worked on."""
        return self.memory in WITH_FILE

    @property
    def nr(self) -> int:
        """Pages mapped, of which the first is `head`."""
        return self.blocks * NR - self.head - self.tail

    def __str__(self) -> str:
        head = [self.memory]
        for field in fields(self)[1:-1]:
            value = getattr(self, field.name)
            if value != field.default:
                head.append(f"{field.name}={value}")
        return " ".join(head) + ": " + "; ".join(map(str, self.strokes))


LIMITS = {
    "blocks": 8,
    "head": NR - 1,
    "tail": 8 * NR,
    "offset": 2 * NR,
    "none": NR - 1,
    "swap": NR - 1,
    "shared": NR - 1,
}


def parse(text: str) -> Layout:
    """The layout of a text form. Raises: ValueError, which names what is wrong."""
    head, colon, tail = text.partition(":")
    words = head.split()
    if not colon or not words:
        raise ValueError(f"{text!r}: allowed MEMORY [NAME=VALUE ...]: STROKE; ...")
    values: dict[str, int | str] = {}
    for word in words[1:]:
        name, _, value = word.partition("=")
        if name in WORDS:
            values[name] = value
        elif name in LIMITS and re.fullmatch("[0-9]{1,5}", value):
            values[name] = int(value)
        else:
            choices, numbers = "=, ".join(WORDS), "=, ".join(LIMITS)
            raise ValueError(f"{word}: allowed {choices}= and a word, {numbers}= and a number")
    strokes = tuple(_parse_stroke(each.strip()) for each in tail.split(";") if each.strip())
    return Layout(words[0], strokes=strokes, **values)  # type: ignore[arg-type]


FORMS = {
    "": r"",
    "size": r"(?P<first>\d{1,5})",
    "range": r"(?P<first>\d{1,5})\+(?P<nr>\d{1,5})(?:/(?P<step>[1-9]\d{0,4}))?",
    "move": r"(?P<first>\d{1,5})\+(?P<nr>\d{1,5})>(?P<to>\d{1,5})",
}
SPELLED = {
    "": "",
    "size": "SIZE",
    "range": "FIRST+NR or FIRST+NR/STEP",
    "move": "FIRST+NR>TO",
}


def _parse_stroke(text: str) -> Stroke:
    name, _, pages = text.partition(" ")
    if name not in STROKES:
        raise ValueError(f"{text!r}: allowed strokes are {', '.join(STROKES)}")
    found = re.fullmatch(FORMS[STROKES[name]], pages.strip())
    if not found:
        raise ValueError(f"{text!r}: allowed {name} {SPELLED[STROKES[name]]}".rstrip())
    return Stroke(name, **{key: int(value) for key, value in found.groupdict().items() if value})
