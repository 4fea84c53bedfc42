"""i_pages: the entries of one file's page cache, by page index (lib/xarray.c, as filemap uses it).

An entry is a page frame (> 0), a hole (0), or a value (< 0): `swap_value(slot)` where shmem has
swapped the page out, SHADOW where reclaim took it, SWAPIN_ERROR where the swap device lost it.
Nodes hold 512 slots, the reach of one huge page; a huge page is one entry of order 9 and is found
under each of its 512 indexes, always by its first frame.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import HPAGE_PMD_NR

__all__ = ["SHADOW", "SWAPIN_ERROR", "XArray", "is_swap_value", "swap_value", "value_slots"]

Entries = npt.NDArray[np.int64]
Indexes = npt.NDArray[np.int64]

SHADOW = -(1 << 62)
SWAPIN_ERROR = -(1 << 61)
_EMPTY: Entries = np.zeros(HPAGE_PMD_NR, np.int64)
_EMPTY.flags.writeable = False


def swap_value(slot: int) -> int:
    """swp_to_radix_entry(): the value that stands for swap slot `slot` (1 and more)."""
    return -slot


def is_swap_value(entry: int) -> bool:
    """Whether the entry stands for a swap slot."""
    return SWAPIN_ERROR < entry < 0


def value_slots(entries: Entries) -> Entries:
    """The swap slots among `entries` (int64[n]). Returns: int64[<= n]."""
    return -entries[(entries < 0) & (entries > SWAPIN_ERROR)]


class XArray:
    """Entries by index. `nodes` holds the slots of every 512 indexes that have an entry.

    multi: the nodes (index // 512) that are one entry of order 9.
    """

    def __init__(self) -> None:
        self.nodes: dict[int, Entries] = {}
        self.multi: set[int] = set()

    def load(self, index: int) -> int:
        """The entry at `index`."""
        node = self.nodes.get(index // HPAGE_PMD_NR)
        return 0 if node is None else int(node[index % HPAGE_PMD_NR])

    def order(self, index: int) -> int:
        """9 if the entry at `index` spans its whole node, else 0."""
        return 9 if index // HPAGE_PMD_NR in self.multi else 0

    def node(self, index: int) -> Entries:
        """The 512 slots around `index`, to be read only."""
        return self.nodes.get(index // HPAGE_PMD_NR, _EMPTY)

    def create_range(self, index: int) -> Entries:
        """The 512 slots around `index`, made if they are not there (xas_create_range)."""
        return self.nodes.setdefault(index // HPAGE_PMD_NR, np.zeros(HPAGE_PMD_NR, np.int64))

    def store(self, indexes: Indexes, entries: Entries | int) -> None:
        """Store `entries` at `indexes` (int64[n]); a node left empty goes.

        Raises: nothing of an order-9 entry may be among them; that takes `store_order_9`.
        """
        numbers = indexes // HPAGE_PMD_NR
        for number in np.unique(numbers).tolist():
            assert number not in self.multi
            own = numbers == number
            node = self.create_range(number * HPAGE_PMD_NR)
            node[indexes[own] % HPAGE_PMD_NR] = (
                entries if isinstance(entries, int) else entries[own]
            )
            self.shrink(number * HPAGE_PMD_NR)

    def store_order_9(self, index: int, head: int) -> None:
        """One entry for all 512 indexes from `index` on; 0 takes it away."""
        number = index // HPAGE_PMD_NR
        if head:
            self.create_range(index)[:] = head
            self.multi.add(number)
        else:
            self.multi.discard(number)
            self.nodes.pop(number, None)

    def split(self, index: int) -> Entries:
        """The order-9 entry at `index` becomes 512 of order 0; returns the slots, to be filled."""
        self.multi.discard(index // HPAGE_PMD_NR)
        return self.create_range(index)

    def shrink(self, index: int) -> None:
        """Free the node around `index` if nothing is left in it."""
        node = self.nodes.get(index // HPAGE_PMD_NR)
        if node is not None and not node.any():
            del self.nodes[index // HPAGE_PMD_NR]

    def entries(self, first: int, last: int) -> Iterator[tuple[Indexes, Entries]]:
        """Indexes and entries that are not holes in [first, last), ascending, node by node.

        Each is a copy: the array may change meanwhile.
        """
        for number in sorted(self.nodes):
            base = number * HPAGE_PMD_NR
            if number not in self.nodes or base + HPAGE_PMD_NR <= first or base >= last:
                continue
            low, high = max(first - base, 0), min(last - base, HPAGE_PMD_NR)
            places = low + np.flatnonzero(self.nodes[number][low:high])
            if len(places):
                yield base + places, self.nodes[number][places]
