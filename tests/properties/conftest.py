"""The random walks know poison by line: a page is not taken away from who touches a bad line.

What memory_failure does then has a walk of its own, in tests/mm/test_memory_failure.py.
"""

from collections.abc import Iterator

import pytest

from pykhuge import BusError
from pykhuge.hw.memory import PAGE_SIZE
from pykhuge.kernel.sched import Steps
from pykhuge.mm import fault
from pykhuge.mm.errors import BUS_MCEERR_AR
from pykhuge.user_access import UserAccess


def _signal_only(_self: UserAccess, addr: int) -> Steps[None]:
    yield from ()
    raise BusError(addr & -PAGE_SIZE, BUS_MCEERR_AR, 12)


@pytest.fixture(autouse=True)
def _pages_stay() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UserAccess, "_machine_check", _signal_only)
        patch.setattr(fault, "memory_failure_queue", lambda _mem, _pfn: None)
        yield
