"""What a run turns it puts back: at its end, on ^C, and when it is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kernel_kit import lacking

from pykhuge.tools.conform import Lacking, knobs

THP = knobs.THP
HOLD = (
    "import signal\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's & ignores it
    "from pykhuge.tools.conform.knobs import prepared\n"
    "with prepared(allow_sysfs=True) as (trace, held):\n"
    "    print(trace, flush=True)\n"
    "    signal.pause()\n"
)


def state() -> dict[str, str]:
    """All that a run turns, sets up or mounts."""
    files = [path for path in THP.rglob("*") if path.is_file()]
    counters = {"full_scans", "pages_collapsed"}
    seen = {
        str(path): path.read_text()
        for path in files
        if path.name not in counters and path.parent.name != "stats"
    }
    seen["swaps"] = Path("/proc/swaps").read_text().partition("\n")[2]
    seen["mounts"] = "\n".join(
        line for line in Path("/proc/mounts").read_text().splitlines() if "tracefs" in line
    )
    seen["zram"] = " ".join(sorted(path.name for path in Path("/dev").glob("zram*")))
    seen["instances"] = " ".join(path.name for path in knobs.TRACEFS.glob("instances/*"))
    return seen


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def before() -> dict[str, str]:
    """The state before a run."""
    try:
        with knobs.prepared(allow_sysfs=True):
            pass
    except Lacking as lack:
        lacking(str(lack))
    return state()


def held() -> subprocess.Popen[str]:
    """A process that has everything turned."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert Path(process.stdout.readline().strip(), "events/huge_memory/enable").read_text() == "1\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_all_is_put_back_when_a_run_is_ended(before: dict[str, str], number: int) -> None:
    """By ^C, by its supervisor, or the hard way."""
    process = held()
    assert state() != before
    process.send_signal(number)
    process.communicate()
    assert eventually(lambda: state() == before)


def test_the_next_run_puts_back_what_a_killed_keeper_left(before: dict[str, str]) -> None:
    """It was written down before it was turned."""
    process = held()
    keeper = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
    subprocess.run(["kill", "-KILL", str(keeper)], check=True)
    process.kill()
    process.communicate()
    assert state() != before
    assert knobs.WRITTEN_DOWN.exists()
    with knobs.prepared(allow_sysfs=True):
        pass
    assert eventually(lambda: state() == before)
    assert not knobs.WRITTEN_DOWN.exists()


def test_nothing_is_turned_without_leave(before: dict[str, str]) -> None:
    """The flag is named."""
    with (
        pytest.raises(Lacking, match="--allow-sysfs permits it"),
        knobs.prepared(allow_sysfs=False),
    ):
        pass
    assert state() == before


def test_what_could_not_be_turned_is_said_and_the_rest_put_back(
    before: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here there is no zram."""
    monkeypatch.setattr(knobs, "ZRAM", Path("/nowhere"))
    back = knobs.WayBack()
    with pytest.raises(Lacking, match="this kernel has no zram to swap to"):
        knobs.turn_all(back)
    assert state() != before
    back.go()
    assert state() == before


def test_nothing_is_put_back_before_the_last_layout_is_done(before: dict[str, str]) -> None:
    """What a killed run leaves behind may turn knobs still; so it is waited for."""
    layout = "from pykhuge.tools.conform import running_kernel, parse\n"
    layout += "with running_kernel(allow_sysfs=True) as host:\n"
    layout += "    print('up', flush=True)\n"
    layout += "    while True:\n"
    layout += "        host.run(parse('anon via=khugepaged none=9: write 0+512; hugepage 0+512'))\n"
    process = subprocess.Popen([sys.executable, "-c", layout], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    time.sleep(0.5)
    process.kill()
    process.communicate()
    assert eventually(lambda: state() == before)
    time.sleep(1)
    assert state() == before
