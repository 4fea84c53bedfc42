"""Fixtures of the tests of the model: every machine is audited when its test ends."""

from collections.abc import Iterator
from typing import Any

import pytest
from collapse_kit import MakeMachine, advised, small_machine

from pykhuge import Machine, Process


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The running kernel is one: what turns its knobs runs on one worker, one after the other."""
    from xdist.scheduler import LoadScopeScheduling

    class OneForTheKernel(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            turns_knobs = ("tests/kernel/", "tests/conform/", "tests/cli/test_conform")
            return "kernel" if nodeid.startswith(turns_knobs) else nodeid

    return OneForTheKernel(config, log)


@pytest.fixture
def make_machine() -> Iterator[MakeMachine]:
    """Machines that are audited at the end, unless they have panicked."""
    made: list[Machine] = []

    def make(memory: str = "64M", **options: object) -> Machine:
        machine = small_machine(memory, **options)
        made.append(machine)
        return machine

    yield make
    for machine in made:
        if machine.mem.panic is None:
            machine.audit()


@pytest.fixture
def machine(make_machine: MakeMachine) -> Machine:
    """A machine of 64 MiB with a swap device and device memory, THP enabled=madvise."""
    return make_machine(swap="16M", device_memory="2M")


@pytest.fixture
def process(machine: Machine) -> Process:
    """A process on it."""
    return machine.process("app")


@pytest.fixture
def block(process: Process) -> int:
    """The address of one 2 MiB block, advised huge, untouched."""
    return advised(process)
