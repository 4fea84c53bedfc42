"""What the tests need of the running kernel, set up and put back."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_kit import lacking

TRACEFS = Path("/sys/kernel/tracing")
THP = Path("/sys/kernel/mm/transparent_hugepage")
ZRAM = Path("/sys/class/zram-control")


@pytest.fixture(scope="module")
def kernel_version() -> tuple[int, int]:
    """Major and minor number of the running kernel."""
    major, minor = re.findall(r"\d+", platform.release())[:2]
    return int(major), int(minor)


@contextlib.contextmanager
def turned(knob: Path, value: str) -> Iterator[None]:
    """Turn a knob, and turn it back."""
    old = knob.read_text()
    chosen = re.search(r"\[(.*?)\]", old)
    knob.write_text(value)
    try:
        yield
    finally:
        knob.write_text(chosen[1] if chosen else old)


@pytest.fixture(scope="module")
def thp(kernel_version: tuple[int, int]) -> Iterator[None]:
    """Transparent huge pages of 2 MiB on advice only, and no smaller ones."""
    if os.geteuid():
        lacking("this needs root")
    if platform.machine() != "x86_64":
        lacking(f"the layouts are for 4 KiB pages on x86-64, this is {platform.machine()}")
    if not THP.exists() or kernel_version < (6, 1):
        lacking("this kernel has no MADV_COLLAPSE")
    with contextlib.ExitStack() as stack:
        # Two runs at once would put back what the other had turned.
        directory = os.open(THP, os.O_RDONLY)
        stack.callback(os.close, directory)
        fcntl.flock(directory, fcntl.LOCK_EX)
        stack.enter_context(turned(THP / "enabled", "madvise"))
        for knob in THP.glob("hugepages-*kB/enabled"):
            huge = knob.parent.name == "hugepages-2048kB"
            stack.enter_context(turned(knob, "inherit" if huge else "never"))
        stack.enter_context(turned(THP / "khugepaged/scan_sleep_millisecs", "100000"))
        yield


@pytest.fixture(scope="module")
def tracefs() -> Iterator[Path]:
    """Where tracefs is mounted."""
    mounted = (TRACEFS / "instances").exists()
    if not mounted:
        command = ["mount", "-t", "tracefs", "nodev", str(TRACEFS)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            lacking("tracefs cannot be mounted")
    yield TRACEFS
    if not mounted:
        subprocess.run(["umount", str(TRACEFS)], check=True)


@pytest.fixture
def huge_memory_trace(tracefs: Path) -> Iterator[Path]:
    """The trace file of an instance of its own, in which the huge_memory events are on."""
    instance = tracefs / "instances" / f"pykhuge-{os.getpid()}"
    events = tracefs / "events/huge_memory"
    if not events.exists():
        lacking("this kernel has no huge_memory trace events")
    instance.mkdir()
    try:
        (instance / "events/huge_memory/enable").write_text("1")
        yield instance / "trace"
        (instance / "events/huge_memory/enable").write_text("0")
    finally:
        instance.rmdir()


@pytest.fixture(scope="module")
def swap() -> Iterator[None]:
    """A swap device in compressed memory, taken down afterwards."""
    if not ZRAM.exists():
        lacking("this kernel has no zram to swap to")
    number = (ZRAM / "hot_add").read_text().strip()
    device = Path(f"/dev/zram{number}")
    try:
        (Path("/sys/block") / device.name / "disksize").write_text("64M")
        for _ in range(50):
            if device.exists():
                break
            time.sleep(0.1)
        subprocess.run(["mkswap", str(device)], check=True, capture_output=True)
        subprocess.run(["swapon", "-p", "32000", str(device)], check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run(["swapoff", str(device)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        lacking(f"zram cannot be set up: {error}")
    finally:
        (ZRAM / "hot_remove").write_text(number)
