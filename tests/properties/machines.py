"""What the state machines of memory and of files have in common: where, what, and for how long."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar, Protocol

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from properties.shadow import BASE, NR_PAGES, PAGE

__all__ = ["Steps", "address", "pattern", "run_machine", "size", "some_pages"]

some_pages = st.builds(
    lambda first, nr: slice(first, min(first + nr, NR_PAGES)),
    st.integers(0, NR_PAGES - 1),
    st.one_of(st.integers(1, 4), st.integers(1, 1024)),
)


def address(pages: slice) -> int:
    return BASE + int(pages.start) * PAGE


def size(pages: slice) -> int:
    return int(pages.stop - pages.start) * PAGE


def pattern(seed: int, length: int) -> bytes:
    return np.random.default_rng(seed).bytes(length)


class Steps:
    """How many steps were really taken, and what came of the collapses among them."""

    taken = 0
    met: ClassVar[Counter[str]] = Counter()


class Kind(Protocol):
    """A state machine: how many steps of an example count, and what a run is to have met."""

    STEPS_AN_EXAMPLE: ClassVar[int]
    WANTED: ClassVar[set[str]]

    def __call__(self) -> RuleBasedStateMachine: ...


def run_machine(kind: Kind, model_steps: int) -> None:
    """Run random steps, `model_steps` of them in all: the same ones each time in the same tree."""
    Steps.taken, Steps.met = 0, Counter()
    run_state_machine_as_test(
        kind,
        settings=settings(
            max_examples=-(-model_steps // kind.STEPS_AN_EXAMPLE),
            stateful_step_count=50,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert Steps.taken >= model_steps
    if model_steps >= 1000:
        assert set(Steps.met) >= kind.WANTED, Steps.met
