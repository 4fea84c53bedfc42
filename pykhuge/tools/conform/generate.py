"""Random layouts, the same ones for the same seed.

Each begins with a way to fill its blocks, most often one that a collapse takes, in every second
with huge pages already, and gets a few strokes that stand in its way, or nearly so.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from pykhuge.tools.conform.layout import NR, STROKES, WITH_FILE, WORDS, Layout, Stroke

__all__ = ["layout"]

EDGES = (0, 1, 63, 64, 65, 127, 255, 256, 257, 447, 510, 511)
LIMITS = (0, 1, 64, 255, 256, 510, 511)
MAX_PINS = 4
CHILD = [
    "child.write", "child.write", "child.read", "child.read", "child.dontneed", "child.dontneed",
    "child.free", "child.pageout", "child.pin", "child.collapse", "child.munmap", "child.munmap",
]  # fmt: skip
AT_ONCE = ("child.collapse", "child.munmap")


def layout(seed: int, number: int, memory: str = "", via: str = "") -> Layout:
    """The layout `number` of `seed`. memory, via: what it is to be; drawn if empty."""
    return _Artist(random.Random(f"{seed} {number}"), memory, via).paint()


class _Artist:
    """Draws one layout. `pages` is what a stroke may be about."""

    def __init__(self, draw: random.Random, memory: str, via: str) -> None:
        self.draw = draw
        self.memory = memory or draw.choice(
            ["anon", "anon", "anon", "memfd", "memfd", "shm", "private"]
        )
        self.via = via or draw.choice(["madvise", "khugepaged"])
        self.blocks = draw.choice([1, 1, 1, 2, 3])
        self.head = draw.choice([0] * 12 + [1, 511])
        self.tail = draw.choice([0] * 12 + [1, 511])
        if self.blocks == 1 and self.head + self.tail >= NR:
            self.tail = 0
        self.offset = draw.choice([0] * 8 + [1, NR]) if self.memory in WITH_FILE else 0
        self.low, self.high = self.head, self.blocks * NR - self.tail
        self.strokes: list[Stroke] = []
        self.readonly = self.armed = self.guarded = self.gone = False
        self.children = 0

    def paint(self) -> Layout:
        draw = self.draw
        if self.via == "khugepaged" or draw.random() < 0.25:
            self._early_huge()
        self._fill()
        if draw.random() < 0.35:
            self._earlier()
        for _ in range(draw.choice([0, 1, 1, 2, 2, 3, 5])):
            self._disturb()
        if self.via == "khugepaged" and draw.random() < 0.95:
            advised = Stroke("hugepage", self.low, self.high - self.low)
            # Shmem is known to later daemons when it is advised again.
            self.strokes += [advised] * (
                1 if self.memory == "anon" else draw.choice([1, 2, 2, 2, 2])
            )
        return Layout(
            self.memory,
            self.blocks,
            self.head,
            self.tail,
            self.offset,
            self.via,
            strokes=tuple(self.strokes),
            **self._knobs(),
        )

    def _knobs(self) -> dict[str, Any]:
        knobs: dict[str, Any] = {}
        if self.via == "khugepaged":
            for name in ("none", "swap", "shared"):
                if self.draw.random() < 0.4:
                    knobs[name] = self.draw.choice(LIMITS)
        for name in ("enabled", "size") if self.memory == "anon" else ("shmem", "size_shmem"):
            if self.draw.random() < 0.1:
                knobs[name] = self.draw.choice(WORDS[name])
        if self.draw.random() < 0.05:
            knobs["enabled"] = "never"
        return knobs

    def _early_huge(self) -> None:
        """Anonymous memory that is advised before it is touched gets huge pages by the faults."""
        if self.memory == "anon" and self.draw.random() < 0.5:
            self.strokes.append(Stroke("hugepage", self.low, self.high - self.low))

    def _fill(self) -> None:
        for block in range(self.blocks):
            how = self.draw.random()
            low, high = max(self.low, block * NR), min(self.high, block * NR + NR)
            if how < 0.65:
                self._add("write", low, high - low)
            elif how < 0.75:
                self._add("write", low, high - low, self.draw.choice([2, 3, 7, 100]))
            elif how < 0.85:
                self._add("read", low, high - low)
            elif how < 0.93:
                self._add("write", *self._run(low, high))
            if self.memory in WITH_FILE and self.draw.random() < 0.2:
                self._add("pwrite", *self._run(block * NR, block * NR + NR))

    def _disturb(self) -> None:
        kinds: list[Callable[[], None]] = [
            self._touch, self._touch, self._drop, self._drop, self._swap, self._swap, self._pin,
            self._protect, self._lock, self._share, self._share, self._move, self._refuse,
            self._watch, self._earlier, self._unmap, self._populate,
        ]  # fmt: skip
        if self.memory in WITH_FILE:
            kinds += [self._work_on_file] * 5
        self.draw.choice(kinds)()

    def _touch(self) -> None:
        name = self.draw.choice(["write", "read"])
        if self.armed or (name == "write" and self.readonly) or self.gone:
            return
        self._add(name, *self._run(), self._step())

    def _populate(self) -> None:
        if not self.guarded and not self.armed:
            self._add("populate", *self._run())

    def _drop(self) -> None:
        """Parts, halves, or the whole."""
        name = self.draw.choice(["dontneed", "dontneed", "free"])
        for first, nr in self._runs():
            self._add(name, first, nr)

    def _swap(self) -> None:
        if self.draw.random() < 0.1:
            self._add("pageout", self.low, self.high - self.low)
        else:
            self._add("pageout", *self._run(), self._step())

    def _pin(self) -> None:
        if self.armed or self.gone:
            return
        for _ in range(self.draw.randint(1, MAX_PINS)):
            self._add("pin", self._page(), 1)

    def _protect(self) -> None:
        whole = self.draw.random() < 0.6
        where = (self.low, self.high - self.low) if whole else self._run()
        self._add("protect", *where)
        if self.draw.random() < 0.5:
            self._add("unprotect", *where)
        else:
            self.readonly = True

    def _lock(self) -> None:
        if self.armed or self.guarded or self.gone:
            return
        whole = self.draw.random() < 0.6
        where = (self.low, self.high - self.low) if whole else self._run()
        self._add("mlock", *where)
        if self.draw.random() < 0.3:
            self._add("munlock", *where)

    def _share(self) -> None:
        if self.children == 2:
            return
        self.children += 1
        self._add("fork")
        for _ in range(self.draw.randint(0, 2)):
            name = self.draw.choice(CHILD)
            if self.gone or (name == "child.write" and self.readonly):
                continue
            if name in ("child.read", "child.pin") and self.armed:
                continue
            self._add(name, *self._run(), 1 if name in AT_ONCE else self._step())
            if name == "child.munmap":
                break
        if not self.readonly and not self.armed and self.draw.random() < 0.5:
            self._add("write", *self._run(), self._step())

    def _move(self) -> None:
        first, nr = self._run()
        nr = min(nr, (self.high - self.low) // 2)
        first = min(first, self.high - nr)
        places = [
            at
            for at in (self.low, self.high - nr, first ^ 1, first + nr)
            if self.low <= at <= self.high - nr and abs(at - first) >= nr
        ]
        if places and nr:
            self.strokes.append(Stroke("move", first, nr, to=self.draw.choice(places)))
            self.gone = True

    def _refuse(self) -> None:
        if self.draw.random() < 0.3:
            self._add("nohugepage", self.low, self.high - self.low)
        elif self.draw.random() < 0.3:
            self._add("thp-disable", self.draw.choice([0, 1, 2]))

    def _watch(self) -> None:
        whole = self.draw.random() < 0.6
        where = (self.low, self.high - self.low) if whole else self._run()
        name = self.draw.choice(["arm", "uffd-wp", "uffd-poison"])
        if name == "uffd-poison":
            if whole:  # so that the markers lie inside a VMA that has whole blocks
                self._add("arm", *where)
            where = self._run()
            self._add("dontneed", *where)
        if name == "uffd-wp":
            self.readonly = self.guarded = True
        else:
            self.armed = True
        self._add(name, *where)

    def _earlier(self) -> None:
        """A collapse before the one that counts."""
        self._add("collapse", self.low, self.high - self.low)
        if self.draw.random() < 0.5:
            self._drop()

    def _unmap(self) -> None:
        if self.draw.random() < 0.3:
            self._add("munmap", *self._run())
            self.gone = True

    def _work_on_file(self) -> None:
        name = self.draw.choice(["pwrite", "fallocate", "punch", "punch", "truncate", "alias"])
        whole = self.blocks * NR
        if name == "alias":
            who = "child." if self.children and self.draw.random() < 0.5 else ""
            self._add(who + name, self.draw.choice([0, 1, NR - 1]))
            return
        if name == "truncate":
            self._add(name, self.draw.choice([0, 1, 300, NR, whole]))
            self.gone = True
            if self.draw.random() < 0.5:
                self._add(name, whole)
                self.gone = False
            return
        for first, nr in self._runs(0, whole):
            self._add(name, first, nr)

    def _add(self, name: str, first: int = 0, nr: int = 0, step: int = 1) -> None:
        if STROKES[name] != "range" or nr:
            self.strokes.append(Stroke(name, first, nr, step))

    def _page(self) -> int:
        draw = self.draw
        block = draw.randrange(self.blocks) * NR
        page = block + (draw.choice(EDGES) if draw.random() < 0.5 else draw.randrange(NR))
        return min(max(page, self.low), self.high - 1)

    def _run(self, low: int = -1, high: int = -1) -> tuple[int, int]:
        """A few pages, or many, somewhere in between."""
        low, high = (self.low, self.high) if low < 0 else (low, high)
        first = min(max(self._page(), low), high - 1)
        nr = self.draw.choice([1, 1, 2, 9, 64, 65, 100, 255, 256, 257, 511, 512])
        return first, min(nr, high - first)

    def _runs(self, low: int = -1, high: int = -1) -> list[tuple[int, int]]:
        low, high = (self.low, self.high) if low < 0 else (low, high)
        how = self.draw.random()
        if how < 0.1:
            return [(low, high - low)]
        if how < 0.2 and high - low > 1:
            half = (high - low) // 2
            return [(low, half), (low + half, high - low - half)]
        return [self._run(low, high)]

    def _step(self) -> int:
        return self.draw.choice([1, 1, 1, 1, 2, 5, 64])
