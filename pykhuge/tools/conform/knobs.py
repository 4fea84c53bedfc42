"""The knobs, mounts and devices of the running kernel that a run needs, and how they come back.

They are turned and put back by a process of its own, which waits for the end of the one that asked:
by its leave or by its death, whatever killed it. What would put them back is written down before
they are turned, so that even if both are killed the next run does it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pykhuge.kernel.version import KernelVersion

__all__ = [
    "KHUGEPAGED_SLEEPS",
    "THP",
    "Lacking",
    "WayBack",
    "keep",
    "kernel_version",
    "prepared",
    "turn_all",
]

THP = Path("/sys/kernel/mm/transparent_hugepage")
TRACEFS = Path("/sys/kernel/tracing")
ZRAM = Path("/sys/class/zram-control")
WRITTEN_DOWN = Path("/run/pykhuge-conform.json")
KHUGEPAGED_SLEEPS = 1 << 30  # milliseconds: until it is woken


class Lacking(Exception):
    """What this machine has not, or is not allowed to do."""


def kernel_version(release: str = "") -> tuple[int, int]:
    """Major and minor number of a release, of the running kernel's if none is given."""
    major, minor = re.findall(r"\d+", release or platform.release())[:2]
    return int(major), int(minor)


def check() -> None:
    """Raises: Lacking, if layouts cannot be realised here at all."""
    if platform.machine() != "x86_64":
        raise Lacking(f"layouts are of x86-64's pages, this is {platform.machine()}")
    if os.geteuid():
        raise Lacking("pagemap and tracefs are root's")
    if not THP.exists() or kernel_version() < KernelVersion.OLDEST:
        raise Lacking(f"Linux {platform.release()} has no MADV_COLLAPSE, or it is not built in")


@contextlib.contextmanager
def prepared(*, allow_sysfs: bool) -> Iterator[tuple[Path, int]]:
    """The kernel as a run needs it; yields the folder of a trace instance, and a file descriptor.

    Nothing is put back while any process has that open: who turns knobs meanwhile inherits it.

    allow_sysfs: knobs of sysfs may be turned; without that nothing is done.
    Raises: Lacking.
    """
    check()
    if not allow_sysfs:
        raise Lacking(
            "the knobs of transparent_hugepage are turned, for all processes:"
            " --allow-sysfs permits it"
        )
    # -P: what lies in the current folder is not what is installed.
    command = [sys.executable, "-P", "-c", f"from {__name__} import keep; keep()"]
    keeper = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    try:
        said = keeper.stdout.readline().strip()
        if not said.startswith("/"):
            raise Lacking(said or "the kernel could not be prepared")
        yield Path(said), keeper.stdin.fileno()
    finally:
        keeper.communicate()


def keep() -> None:
    """Turn everything, say so, wait for the end of standard input, and put everything back."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    # Two runs at once would put back what the other had turned.
    folder = os.open(THP, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    back = WayBack()
    back.go()
    try:
        said = str(turn_all(back))
    except Exception as error:  # it is told to whoever asked
        said = f"not prepared: {error}"
    with contextlib.suppress(OSError):
        print(said, flush=True)
    sys.stdin.read()
    back.go()


class WayBack:
    """How to put back what is turned, the last thing first.

    Each step is written down before what it undoes is done, so it may find that nothing is.
    """

    def __init__(self) -> None:
        """With what an earlier run was killed over."""
        self.steps: list[list[str]] = []
        if WRITTEN_DOWN.exists():
            self.steps = json.loads(WRITTEN_DOWN.read_text())

    def has(self, *step: str) -> None:
        """One more: "write" with a path and a text, "rmdir" with a path, or a command to run."""
        self.steps.append(list(step))
        # Moved into its place whole, as a kill may come at any moment.
        draft = WRITTEN_DOWN.with_suffix(".new")
        draft.write_text(json.dumps(self.steps))
        draft.replace(WRITTEN_DOWN)

    def go(self) -> None:
        """Put everything back."""
        while self.steps:
            what, *rest = self.steps.pop()
            with contextlib.suppress(OSError):
                if what == "write":
                    Path(rest[0]).write_text(rest[1])
                elif what == "rmdir":
                    Path(rest[0]).rmdir()
                else:
                    subprocess.run([what, *rest], check=False, capture_output=True)
        WRITTEN_DOWN.unlink(missing_ok=True)


def turn_all(back: WayBack) -> Path:
    """Everything a run needs; returns the folder of the trace instance."""
    knobs = {
        "enabled": "madvise",
        "shmem_enabled": "advise",
        "defrag": "madvise",
        "use_zero_page": "1",
        "khugepaged/defrag": "1",
        "khugepaged/pages_to_scan": str(1 << 20),
        "khugepaged/alloc_sleep_millisecs": "10",
        "khugepaged/scan_sleep_millisecs": str(KHUGEPAGED_SLEEPS),
    }
    for knob in sorted(THP.glob("hugepages-*kB/*enabled")):
        huge = knob.parent.name == "hugepages-2048kB"
        knobs[f"{knob.parent.name}/{knob.name}"] = "inherit" if huge else "never"
    for name in ("none", "swap", "shared"):  # each layout has its own
        knobs[f"khugepaged/max_ptes_{name}"] = ""
    for name, value in knobs.items():
        _turn(back, THP / name, value)
    _swap(back)
    return _trace(back)


def _turn(back: WayBack, knob: Path, value: str) -> None:
    old = knob.read_text()
    chosen = re.search(r"\[(.*?)\]", old)
    back.has("write", str(knob), chosen[1] if chosen else old)
    if value:
        knob.write_text(value)


def _swap(back: WayBack) -> None:
    """A swap device in compressed memory."""
    if not ZRAM.exists():
        raise Lacking("this kernel has no zram to swap to")
    number = (ZRAM / "hot_add").read_text().strip()
    back.has("write", str(ZRAM / "hot_remove"), number)
    device = Path(f"/dev/zram{number}")
    (Path("/sys/block") / device.name / "disksize").write_text("64M")
    for _ in range(50):
        if device.exists():
            break
        time.sleep(0.1)
    _run("mkswap", str(device))
    back.has("swapoff", str(device))
    _run("swapon", "-p", "32000", str(device))


def _trace(back: WayBack) -> Path:
    """An instance of tracefs with the huge_memory events on, mounted if it was not."""
    if not (TRACEFS / "instances").exists():
        back.has("umount", str(TRACEFS))
        _run("mount", "-t", "tracefs", "nodev", str(TRACEFS))
    instance = TRACEFS / "instances" / f"pykhuge-{os.getpid()}"
    back.has("rmdir", str(instance))
    instance.mkdir()
    events = instance / "events/huge_memory/enable"
    if not events.exists():
        raise Lacking("this kernel has no huge_memory trace events")
    events.write_text("1")
    return instance


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise Lacking(f"{' '.join(command)}: {done.stderr.strip()}")
