"""i_pages: entries by index, huge ones, values, and nodes that come and go."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykhuge.mm.xarray import (
    SHADOW,
    SWAPIN_ERROR,
    XArray,
    is_swap_value,
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
    xa.store_order_9(NR, 4096)
    assert [xa.load(index) for index in (511, 512, 777, 1023, 1024)] == [1, 4096, 4096, 4096, 2]
    assert [xa.order(index) for index in (511, 512, 777, 1023, 1024)] == [0, 9, 9, 9, 0]
    assert len(listed(xa, 600, 610)) == 10
    xa.store_order_9(NR, 0)
    assert listed(xa) == {511: 1, 1024: 2}
    assert xa.order(777) == 0


def test_huge_entry_is_not_stored_over_one_by_one() -> None:
    """That would lose 511 of its places."""
    xa = XArray()
    xa.store_order_9(0, 4096)
    with pytest.raises(AssertionError):
        xa.store(array(5), array(1))


def test_split_gives_512_slots_to_fill() -> None:
    """Order 0 afterwards."""
    xa = XArray()
    xa.store_order_9(NR, 4096)
    xa.split(700)[:] = np.arange(4096, 4096 + NR)
    assert (xa.order(700), xa.load(NR), xa.load(2 * NR - 1)) == (0, 4096, 4096 + NR - 1)
    xa.store(array(NR), 0)
    assert xa.load(NR + 1) == 4097


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
        st.tuples(st.just("huge"), st.integers(0, 3), st.sampled_from([0, 1024, 2048])),
        st.tuples(st.just("split"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("create"), st.integers(0, 1600), st.just(0)),
    ),
    max_size=25,
)


@settings(deadline=None)
@given(steps, st.integers(0, 1700), st.integers(0, 1700))
def test_it_is_a_dictionary(
    steps: list[tuple[str, list[int] | int, int]], first: int, last: int
) -> None:
    """Whatever is stored, huge or small, split or taken away, and whichever part is listed."""
    xa, expected, huge = XArray(), dict[int, int](), set[int]()
    for name, where, entry in steps:
        if isinstance(where, list):
            indexes = [index for index in where if index // NR not in huge]
            xa.store(array(*indexes), entry)
            expected.update(dict.fromkeys(indexes, entry))
        elif name == "huge":
            xa.store_order_9(where * NR, entry)
            expected.update(dict.fromkeys(range(where * NR, (where + 1) * NR), entry))
            huge = huge | {where} if entry else huge - {where}
        elif name == "split" and where in huge:
            xa.split(where * NR)[:] = np.arange(1, NR + 1)
            expected.update((where * NR + place, place + 1) for place in range(NR))
            huge -= {where}
        elif name == "create" and where // NR not in huge:
            xa.create_range(where)
            xa.shrink(where)
    expected = {index: entry for index, entry in expected.items() if entry}
    assert listed(xa) == expected
    assert listed(xa, first, last) == {
        index: entry for index, entry in expected.items() if first <= index < last
    }
    assert {number for number in range(4) if xa.order(number * NR)} == huge
    assert set(xa.nodes) == {index // NR for index in expected}
