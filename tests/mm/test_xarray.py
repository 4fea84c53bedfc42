"""i_pages: entries by index, huge ones, values, and nodes that come and go."""

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykhuge.mm.xarray import (
    SHADOW,
    SWAPIN_ERROR,
    XArray,
    is_swap_value,
    piece_orders,
    swap_value,
    value_slots,
)

NR = 512


def array(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """int64[n]."""
    return np.array(values, np.int64)


def listed(xa: XArray, first: int = 0, last: int = 1 << 52) -> dict[int, int]:
    """Everything in [first, last), by index."""
    found: dict[int, int] = {}
    for indexes, entries in xa.entries(first, last):
        assert len(indexes) == len(entries) > 0
        found.update(zip(indexes.tolist(), entries.tolist(), strict=True))
    return found


def test_nothing_is_stored_at_first() -> None:
    """Any index is a hole, and looking at it makes no node."""
    xa = XArray()
    assert (xa.load(0), xa.load(1 << 40), xa.order(7)) == (0, 0, 0)
    assert not xa.node(9).any()
    assert xa.nodes == {}


def test_looking_at_a_missing_node_cannot_change_it() -> None:
    """All missing nodes are one and the same, read-only."""
    with pytest.raises(ValueError, match="read-only"):
        XArray().node(9)[0] = 1


def test_entries_are_found_where_they_were_stored() -> None:
    """Also across nodes and with several at once; one value may go to many places."""
    xa = XArray()
    xa.store(array(511, 512, 5000), array(7, 8, 9))
    xa.store(array(3, 1 << 40), SHADOW)
    assert listed(xa) == {3: SHADOW, 511: 7, 512: 8, 5000: 9, 1 << 40: SHADOW}
    assert xa.load(5000) == 9
    assert xa.node(513)[0] == 8
    assert list(listed(xa)) == sorted(listed(xa))


def test_node_goes_with_its_last_entry() -> None:
    """A file that is truncated keeps no tree."""
    xa = XArray()
    xa.store(array(1, 600), array(5, 6))
    xa.store(array(1), 0)
    assert set(xa.nodes) == {1}
    xa.store(array(600), 0)
    assert xa.nodes == {}


def test_node_made_for_a_collapse_goes_if_it_stays_empty() -> None:
    """create_range makes 512 slots; shrink takes them away, but never filled ones."""
    xa = XArray()
    slots = xa.create_range(700)
    assert len(slots) == NR
    xa.shrink(700)
    assert xa.nodes == {}
    xa.create_range(700)[3] = 1
    xa.shrink(700)
    assert xa.load(NR + 3) == 1
    assert xa.create_range(600) is xa.create_range(700)


def test_huge_entry_is_found_under_each_of_its_indexes() -> None:
    """By its first frame, with order 9; its neighbours are not touched."""
    xa = XArray()
    xa.store(array(511, 1024), array(1, 2))
    xa.store_range(NR, NR, 4096, 9)
    assert [xa.load(index) for index in (511, 512, 777, 1023, 1024)] == [1, 4096, 4096, 4096, 2]
    assert [xa.order(index) for index in (511, 512, 777, 1023, 1024)] == [0, 9, 9, 9, 0]
    assert len(listed(xa, 600, 610)) == 10
    xa.store_range(NR, NR, 0, 0)
    assert listed(xa) == {511: 1, 1024: 2}
    assert xa.order(777) == 0


@pytest.mark.parametrize("places", [range(5, 6), range(16, 31), range(8, 24)])
def test_part_of_an_entry_is_not_stored_over(places: range) -> None:
    """That would lose the rest of it."""
    xa = XArray()
    xa.store_range(16, 16, 4096, 4)
    xa.store(array(5), 9)
    with contextlib.nullcontext() if 16 not in places else pytest.raises(AssertionError):
        xa.store(np.array(places), 7)


def test_span_of_an_entry_is_all_its_indexes() -> None:
    """Of order 0 that is its own; a hole is like that."""
    xa = XArray()
    xa.store_range(NR + 16, 16, 4096, 4)
    assert xa.span(NR + 30).tolist() == list(range(NR + 16, NR + 32))
    assert xa.span(NR + 32).tolist() == [NR + 32]
    assert np.flatnonzero(xa.node_orders(NR)).tolist() == list(range(16, 32))
    assert not xa.node_orders(0).any()


@given(
    st.integers(1, 9).flatmap(lambda order: st.tuples(st.just(order), st.integers(0, 2**order - 1)))
)
def test_pieces_are_the_halves_that_the_cut_is_not_in(block: tuple[int, int]) -> None:
    """Halving by halving, as one would by hand; each piece is in line with its own size."""
    order, place = block
    expected = np.zeros(1 << order, np.uint8)
    low, size = 0, 1 << order
    while size > 1:
        size //= 2
        upper = place >= low + size
        other = low if upper else low + size
        expected[other : other + size] = size.bit_length() - 1
        low += size * upper
    assert piece_orders(order, place).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("order", "left"),
    [
        (9, {6: 7 * 64, 5: 32, 0: 32}),
        (8, {6: 192, 5: 32, 0: 32}),
        (6, {5: 32, 0: 32}),
        (4, {0: 16}),
    ],
)
def test_value_that_is_split_leaves_values_as_large_as_nodes_let_it(
    order: int, left: dict[int, int]
) -> None:
    """The page asked for is alone; each index keeps its own slot."""
    xa, nr = XArray(), 1 << order
    slots = -np.arange(1, nr + 1)
    xa.store_range(0, nr, slots, order)
    xa.split_value(nr // 2 + 3)
    assert xa.order(nr // 2 + 3) == 0
    assert dict(zip(*np.unique(xa.node_orders(0)[:nr], return_counts=True), strict=True)) == left
    assert xa.node(0)[:nr].tolist() == slots.tolist()


def test_entries_may_be_changed_while_they_are_walked() -> None:
    """What a walk hands out are copies; nodes that go meanwhile are passed over."""
    xa = XArray()
    xa.store(array(1, 600, 1100), array(1, 2, 3))
    seen = []
    for indexes, entries in xa.entries(0, 1 << 52):
        seen.append((indexes.tolist(), entries.tolist()))
        xa.store(array(1, 600), 0)
    assert seen == [([1], [1]), ([1100], [3])]


def test_values_tell_what_they_are() -> None:
    """Swap slots are found again; shadows and errors name none."""
    entries = array(5, 0, swap_value(1), SHADOW, swap_value(77), SWAPIN_ERROR)
    assert [is_swap_value(entry) for entry in entries.tolist()] == [0, 0, 1, 0, 1, 0]
    assert value_slots(entries).tolist() == [1, 77]


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("store"),
            st.lists(st.integers(0, 1600), min_size=1, max_size=20, unique=True),
            st.sampled_from([0, 0, 5, 9, swap_value(3), SHADOW]),
        ),
        st.tuples(
            st.just("large"),
            st.tuples(st.integers(1, 9), st.integers(0, 1600)),
            st.sampled_from([0, 1024, 2048]),
        ),
        st.tuples(st.just("create"), st.integers(0, 1600), st.just(0)),
    ),
    max_size=25,
)


@settings(deadline=None)
@given(steps, st.integers(0, 1700), st.integers(0, 1700))
def test_it_is_a_dictionary(steps: list[tuple[str, Any, int]], first: int, last: int) -> None:
    """Whatever is stored, of any order, or taken away, and whichever part is listed."""
    xa, expected = XArray(), dict[int, tuple[int, int]]()
    for name, where, entry in steps:
        if name == "create":
            xa.create_range(where)
            xa.shrink(where)
            continue
        order, indexes = 0, where
        if name == "large":
            order, place = where
            indexes = list(range(place & -1 << order, (place & -1 << order) + (1 << order)))
        # What is stored over goes as a whole.
        covered = sorted({each for index in indexes for each in xa.span(index).tolist()})
        xa.store(np.array(covered), 0)
        if order:
            xa.store_range(indexes[0], len(indexes), entry, order if entry else 0)
        else:
            xa.store(np.array(indexes), entry)
        expected.update(dict.fromkeys(covered, (0, 0)))
        expected.update(dict.fromkeys(indexes, (entry, order)))
    expected = {index: each for index, each in expected.items() if each[0]}
    assert listed(xa) == {index: entry for index, (entry, _) in expected.items()}
    assert listed(xa, first, last) == {
        index: entry for index, (entry, _) in expected.items() if first <= index < last
    }
    orders = {index: order for index, (_, order) in expected.items()}
    assert {index: xa.order(index) for index in expected} == orders
    assert set(xa.nodes) == {index // NR for index in expected}
    assert set(xa.orders) == {index // NR for index, order in orders.items() if order}
