"""Copies within the modelled memory, and what a machine check met on the way does to the host.

The bytes go through the C core: a poisoned line is a real SIGBUS there. Here it becomes an entry in
the machine-check log and the kernel log, and a panic where the copy had no way to recover.
"""

from __future__ import annotations

import numpy as np

from pykhuge import _native
from pykhuge.hw.memory import PAGE_SIZE
from pykhuge.hw.poison import LINE_SHIFT, Mce
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import Pfns

__all__ = ["copy_mc_page", "copy_mc_pages"]


def copy_mc_pages(
    mem: Memory, to: int, frames: Pfns, *, consumer: str, recovery: bool = True
) -> Mce | None:
    """Copy frames to consecutive frames from `to` on, up to the first poisoned line.

    Args:
        frames: int64[n], contiguous; -1 clears its place instead.
        consumer: the kernel function that copies, for the log.
        recovery: False for a copy that is not machine-check safe.
    Returns: None, or the machine check that stopped it; all bytes before the line are copied.
    Raises: KernelPanic if there is no recovery.
    """
    base = mem.ram.address
    where = frames.__array_interface__["data"][0]
    stopped = _native.copy_mc_frames(
        base + to * PAGE_SIZE, base, where, len(frames), mem.poison.address
    )
    if stopped is None:
        return None
    mce = mem.poison.machine_check(
        int(frames[stopped.index]),
        (PAGE_SIZE - stopped.not_copied) >> LINE_SHIFT,
        cpu=mem.sched.current.cpu,
        consumer=consumer,
        recovered=recovery,
    )
    if not recovery:
        raise mem.die_of_machine_check(mce)
    mem.log_machine_check(mce, by_user=False)
    return mce


def copy_mc_page(
    mem: Memory, to: int, source: int, *, consumer: str, recovery: bool = True
) -> Mce | None:
    """`copy_mc_pages` of one page."""
    return copy_mc_pages(
        mem, to, np.array([source], np.int64), consumer=consumer, recovery=recovery
    )
