"""The bits that csrc/scan_ptes.h reads the model's arrays by are those that the model sets."""

import pytest

from pykhuge import ScanResult
from pykhuge._copy import lib
from pykhuge.hw.memory import HPAGE_PMD_NR
from pykhuge.mm import page, page_table

NAMES = [name for name in dir(lib) if name.startswith("PYKHUGE_P") and name != "PYKHUGE_PTES"]
BITS = [name for name in NAMES if name.startswith(("PYKHUGE_PG_", "PYKHUGE_PAGE_"))]
RESULTS = [name for name in dir(lib) if name.startswith("PYKHUGE_SCAN_")]


@pytest.mark.parametrize("name", [name for name in BITS if name != "PYKHUGE_PAGE_SIZE"])
def test_a_bit_is_the_models_own(name: str) -> None:
    """PG_* of mm/page, PAGE_* of mm/page_table."""
    short = name.removeprefix("PYKHUGE_")
    if short.startswith("PG_"):
        assert getattr(lib, name) == getattr(page, "PG_" + short[3:].lower())
    else:
        assert getattr(lib, name) == getattr(page_table, short)


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_the_kernels_number(name: str) -> None:
    """Enum scan_result."""
    assert getattr(lib, name) == ScanResult[name.removeprefix("PYKHUGE_")]


def test_the_rest_is_the_models_own() -> None:
    """The swap-type words, and how long a table is."""
    assert lib.PYKHUGE_PTES == HPAGE_PMD_NR
    assert lib.PYKHUGE_SWP_UFFD_WP == page_table.PAGE_SWP_UFFD_WP
    assert lib.PYKHUGE_SWP_PTE_MARKER == page_table.SWP_PTE_MARKER
    assert lib.PYKHUGE_PTE_MARKER_UFFD_WP == page_table.PTE_MARKER_UFFD_WP
    assert len(BITS) > 12
    assert len(RESULTS) == 13
