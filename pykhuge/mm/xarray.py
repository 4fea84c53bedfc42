"""i_pages: the entries of one file's page cache, by page index (lib/xarray.c, as filemap uses it).

An entry is a page frame (> 0), a hole (0), or a value (< 0): `swap_value(slot)` where shmem has
swapped the page out, SHADOW where reclaim took it, SWAPIN_ERROR where the swap device lost it.
Nodes hold 512 slots, the reach of one huge page. An entry of order k is found under each of its
2**k indexes, which begin at a multiple of that: a compound page always by its first frame, what
went to swap as one by the slot of that very page.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import HPAGE_PMD_NR, PLACES

__all__ = [
    "SHADOW",
    "SWAPIN_ERROR",
    "XArray",
    "is_swap_value",
    "is_swap_values",
    "piece_orders",
    "swap_value",
    "value_slots",
]

Entries = npt.NDArray[np.int64]
Indexes = npt.NDArray[np.int64]
Orders = npt.NDArray[np.uint8]

SHADOW = -(1 << 62)
SWAPIN_ERROR = -(1 << 61)
_EMPTY: Entries = np.zeros(HPAGE_PMD_NR, np.int64)
_EMPTY.flags.writeable = False
_ORDER_0: Orders = np.zeros(HPAGE_PMD_NR, np.uint8)
_ORDER_0.flags.writeable = False


def swap_value(slot: int) -> int:
    """swp_to_radix_entry(): the value that stands for swap slot `slot` (1 and more)."""
    return -slot


def is_swap_value(entry: int) -> bool:
    """Whether the entry stands for a swap slot."""
    return SWAPIN_ERROR < entry < 0


def is_swap_values(entries: Entries) -> npt.NDArray[np.bool_]:
    """`is_swap_value` of many: int64[n] in, bool[n] out."""
    return (entries < 0) & (entries > SWAPIN_ERROR)


def value_slots(entries: Entries) -> Entries:
    """The swap slots among `entries` (int64[n]). Returns: int64[<= n]."""
    return -entries[is_swap_values(entries)]


def piece_orders(order: int, place: int) -> Orders:
    """The orders of the pieces when a block of `order` is halved again and again around `place`.

    Each page (uint8[2**order]) is in the piece whose order is the highest bit in which the page's
    own place differs from `place`; the page at `place` is a piece of order 0.
    """
    exponents: Orders = np.frexp(PLACES[: 1 << order] ^ place)[1].astype(np.uint8)
    return exponents - (exponents > 0)


class XArray:
    """Entries by index. `nodes` holds the slots of every 512 indexes that have an entry.

    orders: uint8[512] for the nodes (index // 512) with an entry of order 1 or more.
    """

    def __init__(self) -> None:
        self.nodes: dict[int, Entries] = {}
        self.orders: dict[int, Orders] = {}

    def load(self, index: int) -> int:
        """The entry at `index`."""
        node = self.nodes.get(index // HPAGE_PMD_NR)
        return 0 if node is None else int(node[index % HPAGE_PMD_NR])

    def order(self, index: int) -> int:
        """The order of the entry at `index`: it spans 2**order indexes."""
        orders = self.orders.get(index // HPAGE_PMD_NR)
        return 0 if orders is None else int(orders[index % HPAGE_PMD_NR])

    def node(self, index: int) -> Entries:
        """The 512 slots around `index`, to be read only."""
        return self.nodes.get(index // HPAGE_PMD_NR, _EMPTY)

    def node_orders(self, index: int) -> Orders:
        """The orders of the 512 slots around `index`, to be read only."""
        return self.orders.get(index // HPAGE_PMD_NR, _ORDER_0)

    def create_range(self, index: int) -> Entries:
        """The 512 slots around `index`, made if they are not there (xas_create_range)."""
        return self.nodes.setdefault(index // HPAGE_PMD_NR, np.zeros(HPAGE_PMD_NR, np.int64))

    def store(self, indexes: Indexes, entries: Entries | int) -> None:
        """Store `entries` of order 0 at `indexes` (int64[n]); a node left empty goes.

        Of an old entry all indexes or none are among them.
        """
        numbers = indexes // HPAGE_PMD_NR
        for number in np.unique(numbers).tolist():
            own = numbers == number
            places = indexes[own] % HPAGE_PMD_NR
            node = self.create_range(number * HPAGE_PMD_NR)
            node[places] = entries if isinstance(entries, int) else entries[own]
            if number in self.orders:
                self._set_orders(number, places, 0)
            self.shrink(number * HPAGE_PMD_NR)

    def store_range(
        self, index: int, nr: int, entries: Entries | int, orders: Orders | int
    ) -> None:
        """Store `entries` of `orders` (each for all, or [nr]) at [index, index + nr) of one node.

        A single entry of order k is stored at all of its 2**k indexes. See `store` for old ones.
        """
        first = index % HPAGE_PMD_NR
        places = slice(first, first + nr)
        self.create_range(index)[places] = entries
        self._set_orders(index // HPAGE_PMD_NR, places, orders)
        self.shrink(index)

    def _set_orders(self, number: int, places: Indexes | slice, orders: Orders | int) -> None:
        known = self.orders.get(number)
        if known is None:
            known = self.orders[number] = np.zeros(HPAGE_PMD_NR, np.uint8)
        elif known[places].any():
            stored = PLACES[places]
            line = np.left_shift(np.int64(-1), known[places])
            whole = np.isin(stored & line, stored) & np.isin(stored | ~line, stored)
            assert whole.all(), "a part of an entry is overwritten"
        known[places] = orders
        if not known.any():
            del self.orders[number]

    def split_value(self, index: int) -> None:
        """Make smaller entries of the value at `index`, which is of order 0 from now on.

        Its neighbours stay together as far as the kernel's nodes, which have 64 slots, let them
        without being allocated more than once (xas_try_split).
        """
        known = self.orders[index // HPAGE_PMD_NR]
        while order := self.order(index):
            smaller = 6 if order > 6 else 5 if order == 6 else 0
            known[self.span(index) % HPAGE_PMD_NR] = smaller
        if not known.any():
            del self.orders[index // HPAGE_PMD_NR]

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

    def span(self, index: int) -> Indexes:
        """All indexes of the entry at `index`."""
        nr = 1 << self.order(index)
        return (index & -nr) + PLACES[:nr]
