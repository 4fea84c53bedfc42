"""Layouts: the text form, what is refused, what is drawn, and what is left of one by shrinking."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykhuge import KernelVersion
from pykhuge.tools.conform import Layout, draw, parse
from pykhuge.tools.conform.compare import shrink
from pykhuge.tools.conform.layout import UnfitLayout
from pykhuge.tools.conform.model import in_model

V6_18 = KernelVersion.V6_18


def drawn(seed: int, number: int) -> Layout:
    """Layout `number` of `seed`."""
    return next(itertools.islice(draw(seed), number, None))


@given(st.integers(0, 1 << 32), st.integers(0, 20))
@settings(max_examples=300)
def test_a_layout_is_its_text(seed: int, number: int) -> None:
    """Nothing is lost on the way; so a mismatch can be run again."""
    layout = drawn(seed, number)
    assert parse(str(layout)) == layout


def test_the_same_seed_draws_the_same_layouts() -> None:
    """And another one others."""
    first = list(itertools.islice(draw(7), 50))
    assert first == list(itertools.islice(draw(7), 50))
    assert first != list(itertools.islice(draw(8), 50))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("anon write 0+1", "allowed MEMORY [NAME=VALUE ...]: STROKE; ..."),
        ("", "allowed MEMORY [NAME=VALUE ...]: STROKE; ..."),
        ("file: write 0+1", "memory 'file': allowed anon, shm, memfd, private"),
        ("anon via=daemon: write 0+1", "via=daemon: allowed madvise, khugepaged"),
        ("anon enabled=always: ", "enabled=always: allowed madvise, never"),
        ("memfd shmem=always: ", "shmem=always: allowed advise, never, deny, force"),
        ("anon size=always: ", "size=always: allowed inherit, madvise, never"),
        ("anon: thp-disable 3", "thp-disable 3: allowed 0..2"),
        (
            "anon blocks=x: write 0+1",
            "blocks=x: allowed via=, enabled=, shmem=, size=, size_shmem= and a",
        ),
        ("anon colour=3: write 0+1", "colour=3: allowed via=, enabled=, shmem=, size=, size_shm"),
        ("anon blocks=9: ", "blocks=9: allowed 0..8"),
        ("anon none=512: ", "none=512: allowed 0..511"),
        ("anon head=511 tail=1: ", "allowed layouts of one page and more"),
        ("anon: rite 0+1", "'rite 0+1': allowed strokes are write, read,"),
        ("anon: write 5", "'write 5': allowed write FIRST+NR or FIRST+NR/STEP"),
        ("anon: move 0+5", "'move 0+5': allowed move FIRST+NR>TO"),
        ("anon: write 0+0", "write 0+0: allowed pages 0..511"),
        ("anon: write 511+2", "write 511+2: allowed pages 0..511"),
        ("anon head=1: write 0+2", "write 0+2: allowed pages 1..511"),
        ("anon: move 0+9>510", "move 0+9>510: allowed pages 0..511"),
        ("memfd: truncate 513", "truncate 513: allowed 0..512"),
        ("shm: punch 0+1", "punch 0+1: allowed in memfd, private"),
    ],
)
def test_what_is_wrong_with_a_text_is_named(text: str, complaint: str) -> None:
    """With what would have been allowed."""
    with pytest.raises(ValueError, match=re.escape(complaint)):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "anon: protect 0+512; write 0+1",
        "anon: munmap 0+9; read 3+1",
        "anon: arm 0+512; read 0+1",
        "anon: read 0+512; uffd-wp 502+2; mlock 0+512",
        "memfd: truncate 0; read 0+1",
        "memfd: write 0+512; collapse 0+512; pageout 0+512; truncate 300",
    ],
)
def test_what_would_kill_its_process_or_never_end_is_unfit(text: str) -> None:
    """The model says so before the kernel is asked."""
    with pytest.raises(UnfitLayout):
        in_model(parse(text), kernel=V6_18)


@pytest.mark.parametrize(
    ("kernel", "model", "alike"),
    [
        ({}, {}, True),
        ({"thp_split_page_failed": 4}, {}, True),
        ({"thp_split_pmd": 3}, {"thp_split_pmd": 1}, True),
        ({"thp_split_pmd": 1}, {"thp_split_pmd": 3}, False),
        ({}, {"thp_split_page": 1}, False),
        ({"thp_collapse_alloc": 2}, {"thp_collapse_alloc": 1}, False),
        (None, {"thp_collapse_alloc": 1}, True),
    ],
)
def test_others_may_have_split_more_than_expected_not_less(
    kernel: dict[str, int] | None, model: dict[str, int], alike: bool
) -> None:
    """Their memory may be reclaimed meanwhile; no other counter is theirs to move."""
    outcome = in_model(parse("anon: write 0+1"), kernel=V6_18)
    seen, expected = replace(outcome, counters=kernel), replace(outcome, counters=model)
    assert seen.differences(expected) == ([] if alike else ["counters"])


def test_a_mismatch_is_shrunk_until_nothing_can_be_left_out() -> None:
    """Strokes that do not matter go, the others get fewer pages, and what is said is plain."""
    wrong = V6_18.flipped("exceed_none_is_ebusy")

    def differs(layout: Layout) -> bool:
        try:
            outcomes = [in_model(layout, kernel=version) for version in (V6_18, wrong)]
        except UnfitLayout:
            return False
        return bool(outcomes[0].differences(outcomes[1]))

    layout = parse("anon: write 0+512; fork; arm 0+512; dontneed 5+9")
    assert differs(layout)
    assert str(shrink(layout, differs)) == "anon: write 0+1; arm 0+512"
