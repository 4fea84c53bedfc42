"""The knobs held against the running kernel's: the same text written to both."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kernel.conftest import THP, turned

from pykhuge import Machine

KNOBS = [name for name in Machine().sysfs if not name.endswith("_collapsed")]
WRITABLE = [name for name in KNOBS if name not in ("hpage_pmd_size", "khugepaged/full_scans")]
WORDS = [
    "always",
    "madvise",
    "never",
    "defer",
    "defer+madvise",
    "within_size",
    "advise",
    "deny",
    "force",
]
numbers = st.one_of(
    st.integers(-2, 520), st.sampled_from([2**32 - 1, 2**32, 2**64 - 1, 2**64, 10**30])
).map(str)
texts = st.builds(
    lambda before, what, behind: before + what + behind,
    st.sampled_from(["", "", "", "+", "-", " ", "0", "0x", "\n", "\0"]),
    st.one_of(numbers, st.sampled_from([*WORDS, ""])),
    st.sampled_from(["", "", "\n", "\n\n", " ", "x", "\0", "\0x", "\n\0", ".0"]),
)


@pytest.fixture(scope="module")
def knobs(thp: None) -> Iterator[None]:  # noqa: ARG001 (the lock against other runs)
    """Every knob as it was, afterwards."""
    with contextlib.ExitStack() as stack:
        for name in WRITABLE:
            old = (THP / name).read_text()
            stack.enter_context(turned(THP / name, old if "[" not in old else chosen(old)))
        yield


def chosen(text: str) -> str:
    """The word in brackets."""
    return text.partition("[")[2].partition("]")[0]


def write(path: Path, text: str) -> int | None:
    """The errno of open and write, as one system call each; None if both went well."""
    try:
        descriptor = os.open(path, os.O_WRONLY)
    except OSError as error:
        return error.errno
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        return error.errno
    finally:
        os.close(descriptor)
    return None


def write_model(machine: Machine, name: str, text: str) -> int | None:
    """The same in the model."""
    try:
        machine.sysfs[name] = text
    except OSError as error:
        return error.errno
    return None


@pytest.mark.usefixtures("knobs")
@settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(name="khugepaged/defrag", text=str(2**64))
@example(name="khugepaged/max_ptes_none", text=str(2**64))
@example(name="khugepaged/pages_to_scan", text="0")
@given(name=st.sampled_from(KNOBS), text=texts)
def test_a_knob_takes_and_refuses_what_the_running_kernels_does(name: str, text: str) -> None:
    """The same errno, and the same text to be read afterwards."""
    machine, path = Machine(), THP / name
    if name in WRITABLE:
        before = path.read_text()
        machine.sysfs[name] = chosen(before) or before
    assert write_model(machine, name, text) == write(path, text)
    if name != "khugepaged/full_scans":
        assert machine.sysfs[name] == path.read_text()
